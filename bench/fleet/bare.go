package main

import (
	"bufio"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"strings"
	"time"

	mochi "github.com/mochi-mqtt/server/v2"
	"github.com/mochi-mqtt/server/v2/listeners"
	"github.com/mochi-mqtt/server/v2/packets"

	"github.com/dunlin/dunlin/internal/e2e"
	"github.com/dunlin/dunlin/internal/link"
	"github.com/dunlin/dunlin/internal/pki"
)

// bareCommand has this program be a broker that does nothing but to pass on
// what it is told to.
const bareCommand = "bare-broker"

// everybody lets everybody in.
type everybody struct{ mochi.HookBase }

// Provides implements mochi.Hook.
func (*everybody) Provides(b byte) bool {
	return b == mochi.OnConnectAuthenticate || b == mochi.OnACLCheck
}

// OnConnectAuthenticate implements mochi.Hook.
func (*everybody) OnConnectAuthenticate(*mochi.Client, packets.Packet) bool { return true }

// OnACLCheck implements mochi.Hook.
func (*everybody) OnACLCheck(*mochi.Client, string, bool) bool { return true }

// bareBroker listens with the certificate and key in the files args, lets
// everybody in, prints its address, and publishes: for each line "NAME FIRST
// END FILE" on in the bytes of a file to the devices NAME-FIRST up to NAME-END.
func bareBroker(args []string, in io.Reader, out io.Writer) error {
	if len(args) != 2 {
		return errors.New("want a certificate and a key")
	}
	certificate, err := tls.LoadX509KeyPair(args[0], args[1])
	if err != nil {
		return err
	}
	capabilities := mochi.NewDefaultServerCapabilities()
	capabilities.MaximumClients = math.MaxInt32
	server := mochi.New(&mochi.Options{InlineClient: true, Logger: slog.New(slog.DiscardHandler), Capabilities: capabilities, SysTopicResendInterval: math.MaxInt32})
	listener := listeners.NewTCP(listeners.Config{ID: "tcp", Address: "127.0.0.1:0", TLSConfig: &tls.Config{
		MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{certificate}, ClientAuth: tls.RequireAnyClientCert, SessionTicketsDisabled: true,
	}})
	for _, err := range []error{server.AddHook(new(everybody), nil), server.AddListener(listener), server.Serve()} {
		if err != nil {
			return err
		}
	}
	defer server.Close()
	fmt.Fprintln(out, listener.Address())
	for lines := bufio.NewScanner(in); lines.Scan(); {
		var name, file string
		var first, end int
		if _, err := fmt.Sscan(lines.Text(), &name, &first, &end, &file); err != nil {
			return err
		}
		payload, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		for i := first; i < end; i++ {
			if err := server.Publish(link.Down(fmt.Sprint(name, "-", i), link.Desired), payload, false, 0); err != nil {
				return err
			}
		}
	}
	return nil
}

// bare is a bare broker in a process of its own.
type bare struct {
	*e2e.Process
	address string
	in      *os.File
	dir     string
}

// startBare starts one with a certificate of an authority that is made for it.
func startBare(self, dir string) (b *bare, authority *x509.Certificate, err error) {
	key, err := pki.NewKey()
	if err != nil {
		return nil, nil, err
	}
	now, day := time.Now(), 24*time.Hour
	a, err := pki.NewAuthority(key, now, day)
	if err != nil {
		return nil, nil, err
	}
	own, err := pki.NewKey()
	if err != nil {
		return nil, nil, err
	}
	leaf, err := a.IssueController([]string{host}, own.Public(), now, day)
	if err != nil {
		return nil, nil, err
	}
	var chain []byte
	for _, c := range a.Chain(leaf) {
		chain = append(chain, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	certFile, keyFile := filepath.Join(dir, "bare.crt"), filepath.Join(dir, "bare.key")
	if err := errors.Join(os.WriteFile(certFile, chain, 0o600), pki.WriteKey(keyFile, own)); err != nil {
		return nil, nil, err
	}
	// It reads what to publish from a pipe, which ends when this process does.
	read, write, err := os.Pipe()
	if err != nil {
		return nil, nil, err
	}
	defer read.Close()
	log := filepath.Join(dir, "bare.log")
	p, err := e2e.Start("bare broker", log, nil, "/bin/sh", "-c", `exec "$0" "$@" < /proc/`+fmt.Sprint(os.Getpid())+`/fd/`+fmt.Sprint(read.Fd()), self, bareCommand, certFile, keyFile)
	if err != nil {
		return nil, nil, errors.Join(err, write.Close())
	}
	b = &bare{Process: p, in: write, dir: dir}
	for end := time.Now().Add(time.Minute); b.address == ""; time.Sleep(10 * time.Millisecond) {
		raw, err := os.ReadFile(log)
		if err == nil && strings.HasSuffix(string(raw), "\n") {
			b.address = strings.TrimSpace(string(raw))
		}
		select {
		case <-p.Done():
			return nil, nil, fmt.Errorf("the bare broker ended: %s", b.LogTail(5))
		default:
		}
		if time.Now().After(end) {
			return nil, nil, errors.New("the bare broker does not say its address")
		}
	}
	return b, a.Certificate, nil
}

// publish has it send a payload to devices.
func (b *bare) publish(name string, devices int, payload []byte) error {
	file := filepath.Join(b.dir, "payload")
	if err := os.WriteFile(file, payload, 0o600); err != nil {
		return err
	}
	_, err := fmt.Fprintln(b.in, name, 0, devices, file)
	return err
}

// stop ends it.
func (b *bare) stop() error {
	err := b.in.Close()
	select {
	case <-b.Done():
	case <-time.After(time.Minute):
		return errors.Join(err, b.Stop())
	}
	return err
}
