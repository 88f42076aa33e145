package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"log/slog"
	"net"
	"net/url"
	"sync"
	"time"

	mqtt "github.com/eclipse/paho.mqtt.golang"

	"github.com/dunlin/dunlin/controller/broker"
	"github.com/dunlin/dunlin/internal/link"
	"github.com/dunlin/dunlin/internal/pki"
)

// anybody may connect by a certificate.
type anybody struct{}

func (anybody) Device(_ context.Context, cert *x509.Certificate) (string, error) {
	return cert.Subject.CommonName, nil
}
func (anybody) Enrolling(context.Context, string, string, string) bool { return false }

// bareMQTT gives the MB/s at which blocks of the largest size come through the
// broker, over TLS, to a client that drops them: no request, no check, no disk,
// and both ends in this process.
func bareMQTT(ctx context.Context, bytes int64) (float64, error) {
	const device = "bare"
	from, lifetime := time.Now().Add(-time.Hour), 24*time.Hour
	key, err := pki.NewKey()
	if err != nil {
		return 0, err
	}
	authority, err := pki.NewAuthority(key, from, lifetime)
	if err != nil {
		return 0, err
	}
	issue := func(leaf *x509.Certificate, err error) (*tls.Certificate, error) {
		if err != nil {
			return nil, err
		}
		return &tls.Certificate{Certificate: pki.Raw(authority.Chain(leaf)), PrivateKey: key, Leaf: leaf}, nil
	}
	server, err := issue(authority.IssueController([]string{host}, key.Public(), from, lifetime))
	if err != nil {
		return 0, err
	}
	own, err := issue(authority.IssueDevice(device, key.Public(), from, lifetime))
	if err != nil {
		return 0, err
	}
	roots := []*x509.Certificate{authority.Certificate}
	b, err := broker.NewEmbedded(broker.EmbeddedConfig{
		Listen: net.JoinHostPort(host, "0"), Auth: anybody{}, Log: slog.New(slog.DiscardHandler),
		TLS: pki.ServerConfig(func() (*tls.Certificate, error) { return server, nil }, func() []*x509.Certificate { return roots }, tls.VerifyClientCertIfGiven),
	})
	if err != nil {
		return 0, err
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	var running sync.WaitGroup
	defer running.Wait()
	defer cancel()
	running.Go(func() { _ = b.Run(ctx, func(string, []byte) {}) }) // what fails shows in what arrives

	blocks := int(bytes / link.MaxBlock)
	arrived := make(chan struct{}, blocks)
	client := mqtt.NewClient(mqtt.NewClientOptions().AddBroker("mqtts://" + b.Addr().String()).
		SetClientID(link.DataClient(device)).SetUsername(device).SetProtocolVersion(4).SetAutoReconnect(false).
		SetDefaultPublishHandler(func(mqtt.Client, mqtt.Message) { arrived <- struct{}{} }).
		SetCustomOpenConnectionFn(func(*url.URL, mqtt.ClientOptions) (net.Conn, error) {
			return tls.Dial("tcp", b.Addr().String(), pki.ClientConfig(pki.Client{
				Trust:       func() pki.Trust { return pki.Trust{Roots: roots} },
				Certificate: func() *tls.Certificate { return own },
			}, host))
		}))
	for _, ask := range []func() mqtt.Token{client.Connect, func() mqtt.Token { return client.Subscribe(link.Down(device, link.Data), 0, nil) }} {
		t := ask()
		if !t.WaitTimeout(10 * time.Second) {
			return 0, errors.New("no answer from the bare broker")
		}
		if err := t.Error(); err != nil {
			return 0, err
		}
	}
	defer client.Disconnect(0)
	block := make([]byte, link.MaxBlock)
	began := time.Now()
	for range blocks {
		for !b.Room(device) {
			select {
			case <-b.Drained():
			case <-ctx.Done():
				return 0, ctx.Err()
			}
		}
		if err := b.Publish(link.Down(device, link.Data), block); err != nil {
			return 0, err
		}
	}
	for range blocks {
		select {
		case <-arrived:
		case <-ctx.Done():
			return 0, ctx.Err()
		}
	}
	return float64(blocks) * link.MaxBlock / 1e6 / time.Since(began).Seconds(), nil
}
