package e2e

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	"github.com/dunlin/dunlin/internal/e2e/byhand"
	"github.com/dunlin/dunlin/internal/link"
	"github.com/dunlin/dunlin/internal/pki/pkitest"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
	"github.com/dunlin/dunlin/proto/dunlin/v1/dunlinv1connect"
)

// pathHost is where the attacker listens: devices are told that the controller
// is there.
const pathHost = "127.0.0.2"

// attack is what is done to the records of TLS in one direction of each
// connection; the zero attack is none.
type attack struct {
	name     string
	toDevice bool
	from     int // number of the record in that direction that it begins with
	do       func(record []byte, next func() ([]byte, error)) ([]byte, error)
}

// attack0 is none.
var attack0 attack

// errCut ends a connection.
var errCut = errors.New("cut")

func altered(record []byte, _ func() ([]byte, error)) ([]byte, error) {
	record = bytes.Clone(record)
	record[len(record)-1] ^= 1
	return record, nil
}

func truncated(record []byte, _ func() ([]byte, error)) ([]byte, error) {
	return record[:len(record)/2], errCut
}

func replayed(record []byte, _ func() ([]byte, error)) ([]byte, error) {
	return append(bytes.Clone(record), record...), nil
}

func reordered(record []byte, next func() ([]byte, error)) ([]byte, error) {
	record = bytes.Clone(record)
	later, err := next()
	return append(bytes.Clone(later), record...), err
}

func delayed(record []byte, _ func() ([]byte, error)) ([]byte, error) {
	time.Sleep(100 * time.Millisecond) // what it does
	return record, nil
}

// path is an attacker between devices and one port of the controller.
type path struct {
	to       string
	listener net.Listener
	serving  sync.WaitGroup

	mu       sync.Mutex // guards what follows
	attack   attack
	hits     int // of the attack
	conns    map[net.Conn]bool
	recorded []byte // what a device sent on the newest connection
}

// newPath listens at pathHost, on the port of the address that it stands before.
func newPath(t *testing.T, to string) *path {
	t.Helper()
	_, port, err := net.SplitHostPort(to)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", net.JoinHostPort(pathHost, port))
	if err != nil {
		t.Fatal(err)
	}
	p := &path{to: to, listener: l, conns: map[net.Conn]bool{}}
	p.serving.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			p.serving.Go(func() { p.serve(c) })
		}
	})
	t.Cleanup(func() {
		l.Close()
		p.cut()
		p.serving.Wait()
	})
	return p
}

// set has an attack begin with the next connections, and ends those that are.
func (p *path) set(a attack) {
	p.mu.Lock()
	p.attack, p.hits = a, 0
	p.mu.Unlock()
	p.cut()
}

func (p *path) cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for c := range p.conns {
		c.Close()
	}
}

func (p *path) count() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.hits
}

func (p *path) serve(device net.Conn) {
	defer device.Close()
	server, err := net.Dial("tcp", p.to)
	if err != nil {
		return
	}
	defer server.Close()
	p.mu.Lock()
	a := p.attack
	p.recorded = nil
	p.conns[device], p.conns[server] = true, true
	p.mu.Unlock()
	var both sync.WaitGroup
	for _, d := range []struct {
		from, to net.Conn
		toDevice bool
	}{{device, server, false}, {server, device, true}} {
		both.Go(func() {
			defer device.Close()
			defer server.Close()
			n := 0
			next := func() ([]byte, error) { return readRecord(d.from) }
			for ; ; n++ {
				record, err := next()
				if err != nil {
					return
				}
				if a.do != nil && a.toDevice == d.toDevice && n >= a.from {
					if record, err = a.do(record, next); err == nil || errors.Is(err, errCut) {
						p.mu.Lock()
						p.hits++
						p.mu.Unlock()
					}
				}
				if !d.toDevice {
					p.mu.Lock()
					p.recorded = append(p.recorded, record...)
					p.mu.Unlock()
				}
				if _, e := d.to.Write(record); e != nil || err != nil {
					return
				}
			}
		})
	}
	both.Wait()
	p.mu.Lock()
	delete(p.conns, device)
	delete(p.conns, server)
	p.mu.Unlock()
}

// readRecord reads one record of TLS.
func readRecord(r io.Reader) ([]byte, error) {
	record := make([]byte, 5)
	if _, err := io.ReadFull(r, record); err != nil {
		return nil, err
	}
	n := int(binary.BigEndian.Uint16(record[3:]))
	record = append(record, make([]byte, n)...)
	_, err := io.ReadFull(r, record[5:])
	return record, err
}

// newPathFleet starts a controller that devices reach through an attacker only.
func newPathFleet(t *testing.T) (f *Fleet, https, mqtt *path) {
	t.Helper()
	f, err := NewFleet(programs, t.TempDir(), library)
	if err != nil {
		t.Fatal(err)
	}
	f.ControllerArgs = []string{"--hosts", pathHost + ",127.0.0.1"}
	t.Cleanup(func() { stop(t, f) })
	if err := f.StartController(within(t)); err != nil {
		t.Fatalf("%v\n%s", err, f.Controller.LogTail(50))
	}
	return f, newPath(t, strings.TrimPrefix(f.URL, "http://")), newPath(t, f.MQTT)
}

// onPath gives the arguments of an agent that reaches the controller by the attacker.
func onPath(f *Fleet) []string {
	return []string{"--controller", strings.Replace(f.DeviceURL(), "127.0.0.1", pathHost, 1)}
}

// linkState gives the state that an agent says its link is in.
func linkState(t *testing.T, a *Agent) string {
	t.Helper()
	resp, err := http.Get(a.URL + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	if m := regexp.MustCompile(`(?m)^dunlin_agent_link_state\{state="([a-z ]+)"\} 1$`).FindSubmatch(b); m != nil {
		return string(m[1])
	}
	return ""
}

func online(t *testing.T, f *Fleet, a *Agent) string {
	t.Helper()
	if s := linkState(t, a); s != "connected" {
		return a.Name + " says that its link is " + s
	}
	for _, d := range devices(t, f) {
		if d.Name == a.Name && d.Connected {
			return ""
		}
	}
	return "the controller does not have " + a.Name + " as connected"
}

// TestAttackerOnPath has somebody between a device and its controller change
// what they send: first on a link that tries again at once, then on an agent.
func TestAttackerOnPath(t *testing.T) {
	f, https, mqtt := newPathFleet(t)
	// The first records make the connection; later ones are messages.
	const handshake, messages = 2, 7
	var attacks []attack
	for _, toDevice := range []bool{false, true} {
		for name, do := range map[string]func([]byte, func() ([]byte, error)) ([]byte, error){"altered": altered, "truncated": truncated, "replayed": replayed, "reordered": reordered} {
			attacks = append(attacks, attack{name, toDevice, handshake, do})
			if name != "reordered" { // of messages there may be no later one
				attacks = append(attacks, attack{name, toDevice, messages, do})
			}
		}
	}

	token, err := f.JoinToken(within(t))
	if err != nil {
		t.Fatal(err)
	}
	enrolment := dunlinv1connect.NewEnrollmentServiceClient(http.DefaultClient, f.URL)
	d, err := byhand.Join(within(t), enrolment, token, "by-hand", pkitest.Key(t))
	if err != nil {
		t.Fatal(err)
	}
	_, port, err := net.SplitHostPort(f.MQTT)
	if err != nil {
		t.Fatal(err)
	}
	l, err := link.New(link.Config{
		BrokerURL: "mqtts://" + net.JoinHostPort(pathHost, port), Device: d.Name, BootID: "boot", Log: slog.New(slog.DiscardHandler),
		TLS: func() *tls.Config { return d.TLS(pathHost) }, MaxBackoff: 50 * time.Millisecond,
		Hello: func() *dunlinv1.Hello { return &dunlinv1.Hello{} },
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() { _ = l.Run(ctx) })
	defer running.Wait()
	defer cancel()
	connected := func() string {
		if s, err := l.State(); s != link.Connected {
			return fmt.Sprintf("the link is %s: %v", s, err)
		}
		return ""
	}
	eventually(t, connected)
	for _, attack := range attacks {
		mqtt.set(attack)
		eventually(t, func() string {
			if n := mqtt.count(); n < 2 {
				return fmt.Sprintf("%+v: the device tried %d times", attack, n)
			}
			if s, err := l.State(); err == nil {
				return fmt.Sprintf("%+v: the device says that its link is %s", attack, s)
			}
			return ""
		})
		mqtt.set(attack0)
		eventually(t, connected)
	}
	if n := l.Malformed(); n != 0 {
		t.Errorf("the link took %d messages that are malformed", n)
	}
	mqtt.set(attack{name: "delayed", do: delayed})
	eventually(t, func() string {
		if mqtt.count() < 5 {
			return "nothing was delayed"
		}
		return connected()
	})
	cutOff := l.Session()
	mqtt.set(attack0)
	eventually(t, func() string {
		if l.Session() == cutOff {
			return "the link has not seen yet that its connection was cut"
		}
		return connected()
	})
	mqtt.mu.Lock()
	recorded := bytes.Clone(mqtt.recorded)
	mqtt.mu.Unlock()
	session := l.Session()
	// The whole of what a device once sent is worth nothing.
	for range 2 {
		c, err := net.Dial("tcp", f.MQTT)
		if err != nil {
			t.Fatal(err)
		}
		if err := c.SetDeadline(time.Now().Add(limit)); err != nil {
			t.Fatal(err)
		}
		_, _ = c.Write(recorded) // the broker may end it before it has all
		if _, err := io.Copy(io.Discard, c); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Error("the broker keeps a connection of replayed bytes")
		}
		c.Close()
	}
	if l.Session() != session {
		t.Error("replayed bytes have ended the device's session")
	}

	// An agent says how it is, and takes a model whole or not at all.
	a := startAgent(t, f, "device-1", onPath(f)...)
	eventually(t, func() string { return online(t, f, a) })
	mqtt.set(attacks[0])
	eventually(t, func() string {
		if s := linkState(t, a); s != link.Unreachable.String() && s != link.Refused.String() {
			return "the agent says that its link is " + s
		}
		if log := a.LogTail(100); !strings.Contains(log, "no connection to the broker; trying on") {
			return "the agent's log does not say that there is no connection:\n" + log
		}
		return ""
	})
	mqtt.set(attack0)
	eventually(t, func() string { return online(t, f, a) })
	cli(t, f, "push", digitsFile("v1"), "digits:1")
	for i, attack := range []attack{{"altered", true, messages, altered}, {"truncated", true, messages, truncated}, {"reordered", true, handshake, reordered}} {
		https.set(attack)
		if i == 0 {
			apply(t, f, "digits", 1)
		}
		eventually(t, func() string {
			if https.count() == 0 {
				return fmt.Sprintf("%+v: the device has not tried", attack)
			}
			return ""
		})
		if problem := serves(t, a, 1); problem == "" {
			t.Errorf("%+v: the device has the model", attack)
		}
	}
	https.set(attack{name: "delayed", do: delayed})
	eventually(t, func() string { return serves(t, a, 1) })
}

// TestOldCertificate has a thief come with a copy of what a device had before
// it renewed.
func TestOldCertificate(t *testing.T) {
	onEachBroker(t, func(t *testing.T, f *Fleet) {
		token, err := f.JoinToken(within(t))
		if err != nil {
			t.Fatal(err)
		}
		enrolment := dunlinv1connect.NewEnrollmentServiceClient(http.DefaultClient, f.URL)
		old, err := byhand.Join(within(t), enrolment, token, "device-1", pkitest.Key(t))
		if err != nil {
			t.Fatal(err)
		}
		hello := func(d *byhand.Device, session string) {
			t.Helper()
			c, err := byhand.Connect(within(t), f.MQTT, d.TLS("127.0.0.1"), byhand.Login{ClientID: d.Name}, nil)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			b, err := proto.Marshal(&dunlinv1.Hello{BootId: "boot", Session: session, CertificateSerial: d.Chain[0].SerialNumber.Bytes()})
			if err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(c.Publish(link.Up(d.Name, link.Hello), b), c.Ping()); err != nil {
				t.Fatal(err)
			}
		}
		pull := func(d *byhand.Device) int {
			t.Helper()
			resp, err := byhand.User("", d.TLS("127.0.0.1")).Get(f.DeviceURL() + "/v2/")
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			return resp.StatusCode
		}
		hello(old, "first")
		if code := pull(old); code != http.StatusOK {
			t.Fatalf("the device's certificate: the registry answers %d", code)
		}
		next, err := old.Renew(within(t), enrolment)
		if err != nil {
			t.Fatal(err)
		}
		hello(next, "second")
		eventually(t, func() string {
			if code := pull(old); code != http.StatusUnauthorized {
				return fmt.Sprintf("the old certificate: the registry answers %d", code)
			}
			return ""
		})
		eventually(t, func() string { // an external broker reads its files again
			c, err := byhand.Connect(within(t), f.MQTT, old.TLS("127.0.0.1"), byhand.Login{ClientID: old.Name}, nil)
			if err == nil {
				c.Close()
				return "the old certificate connects to the broker"
			}
			return ""
		})
		if _, err := old.Renew(within(t), enrolment); connect.CodeOf(err) != connect.CodeUnauthenticated {
			t.Errorf("the old certificate is renewed: %v", err)
		}
		if code := pull(next); code != http.StatusOK {
			t.Errorf("the new certificate: the registry answers %d", code)
		}
		hello(next, "third")
		// Refusals are written once a minute, and at the end.
		if err := f.Controller.Stop(); err != nil {
			t.Fatal(err)
		}
		if err := f.StartController(within(t)); err != nil {
			t.Fatal(err)
		}
		if out := cli(t, f, "audit", "list"); !strings.Contains(out, "a newer one took its place") {
			t.Errorf("the audit log does not say that an old certificate was shown:\n%s", out)
		}
	})
}

// TestOldBundle has a registry give an old version's signatures for a new one.
func TestOldBundle(t *testing.T) {
	f := newFleet(t)
	cli(t, f, "push", digitsFile("v1"), "digits:1")
	cli(t, f, "push", digitsFile("v2"), "digits:2")
	signature := func(version int) string {
		t.Helper()
		versions, err := dunlinv1connect.NewModelServiceClient(byhand.User(f.Token, nil), f.URL).ListModels(within(t), connect.NewRequest(&dunlinv1.ListModelsRequest{Model: "digits"}))
		if err != nil {
			t.Fatal(err)
		}
		for _, v := range versions.Msg.GetVersions() {
			if v.GetVersion() != int64(version) {
				continue
			}
			resp, err := byhand.User(f.Token, nil).Get(f.URL + "/v2/digits/referrers/" + v.GetDigest())
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			var index struct {
				Manifests []struct {
					Digest string `json:"digest"`
				} `json:"manifests"`
			}
			b, err := io.ReadAll(resp.Body)
			if err != nil {
				t.Fatal(err)
			}
			if decode(t, string(b), &index); len(index.Manifests) == 1 {
				return index.Manifests[0].Digest
			}
		}
		t.Fatalf("version %d has not one signature", version)
		return ""
	}
	old, next := signature(1), signature(2)
	liar := newLiar(t, f, func(path string) string { return strings.Replace(path, "/manifests/"+next, "/manifests/"+old, 1) })
	a := startAgent(t, f, "device-1", "--controller", liar)
	apply(t, f, "digits", 1)
	eventually(t, func() string { return serves(t, a, 1) })
	apply(t, f, "digits", 2)
	eventually(t, func() string {
		for _, e := range events(t, f) {
			if e.Device == "device-1" && e.Event.Kind == "bundle.refused" {
				return ""
			}
		}
		return "there is no event bundle.refused"
	})
	if problem := serves(t, a, 1); problem != "" {
		t.Errorf("what it served before: %s", problem)
	}
}

// newLiar is a registry, by a certificate of the controller's own authority,
// that answers with other things than it was asked for.
func newLiar(t *testing.T, f *Fleet, lie func(path string) string) string {
	t.Helper()
	to, err := url.Parse(f.URL)
	if err != nil {
		t.Fatal(err)
	}
	listen, err := FreeAddress()
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Addr: listen, TLSConfig: pkitest.ServerTLS(t, authority(t, f)), Handler: &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(to)
			r.Out.Host = r.In.Host
			r.Out.URL.Path, r.Out.URL.RawPath = lie(r.In.URL.Path), ""
			r.Out.Header.Set("Authorization", "Bearer "+f.Token)
		},
		ErrorHandler: func(w http.ResponseWriter, _ *http.Request, _ error) { w.WriteHeader(http.StatusBadGateway) },
	}}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = server.ListenAndServeTLS("", "")
	}()
	t.Cleanup(func() {
		_ = server.Close()
		<-done
	})
	return "https://" + listen
}

// TestDowngradedAgent has a device verify an older binary, signed by the right key.
func TestDowngradedAgent(t *testing.T) {
	f := newFleet(t)
	file := func(name string) string { return filepath.Join(f.Dir, name) }
	cli(t, f, "keys", "create", file("agent.pem"))
	next := cli(t, f, "trust", "edit", "--add-agent-key", file("agent.pem.pub"), "--agent-floor", "0.7.0")
	if err := os.WriteFile(file("next.json"), []byte(next), 0o600); err != nil {
		t.Fatal(err)
	}
	cli(t, f, "trust", "sign", file("next.json"), "--key", filepath.Join(f.controllerData(), "keys", "trust-root.pem"))
	cli(t, f, "trust", "apply", "--yes", file("next.json"))
	a := startAgent(t, f, "device-1")
	eventually(t, func() string { return online(t, f, a) })
	verify := func(version string) error {
		binary := file("dunlin-agent-" + version)
		if err := os.WriteFile(binary, []byte("an agent of version "+version), 0o600); err != nil {
			t.Fatal(err)
		}
		cli(t, f, "sign-agent", binary, "--key", file("agent.pem"), "--version", version, "--arch", runtime.GOOS+"/"+runtime.GOARCH)
		_, err := Run(within(t), nil, f.Programs.Agent, "verify", "--data", a.Data, binary)
		return err
	}
	if err := verify("0.8.0"); err != nil {
		t.Errorf("a newer agent: %v", err)
	}
	if err := verify("0.6.9"); err == nil || !strings.Contains(err.Error(), "0.7.0") || !strings.Contains(err.Error(), "refused") {
		t.Errorf("an agent below the floor: %v", err)
	}
}

// TestClonedDevice starts a second agent with a copy of a device's folder.
func TestClonedDevice(t *testing.T) {
	f := newFleet(t)
	a := startAgent(t, f, "device-1")
	eventually(t, func() string { return online(t, f, a) })
	if err := a.Stop(); err != nil {
		t.Fatal(err)
	}
	clone := &Agent{Name: "clone", Data: filepath.Join(f.Dir, "clone")}
	if err := os.CopyFS(clone.Data, os.DirFS(a.Data)); err != nil {
		t.Fatal(err)
	}
	listen, err := FreeAddress()
	if err != nil {
		t.Fatal(err)
	}
	clone.URL = "http://" + listen
	clone.args = append(append([]string{}, a.args...), "--data", clone.Data, "--listen", listen)
	f.Agents = append(f.Agents, clone)
	for _, one := range []*Agent{a, clone} {
		if err := f.RestartAgent(within(t), one); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, func() string {
		if out := cli(t, f, "get", "devices"); !strings.Contains(out, "2 agents use its identity") {
			return "the clone is not named:\n" + out
		}
		states := []string{linkState(t, a), linkState(t, clone)}
		if !(states[0] == "connected" && states[1] == "stood down" || states[0] == "stood down" && states[1] == "connected") {
			return fmt.Sprintf("the links are %q, want one connected and one stood down", states)
		}
		return ""
	})
	sessions := func() (n int) {
		for _, one := range []*Agent{a, clone} {
			n += strings.Count(one.LogTail(1000), `msg="connected to the broker"`)
		}
		return n
	}
	before := sessions()
	const most = 12 // three for what came before, and until each has come back once after the other
	if before > most {
		t.Errorf("there were %d sessions until one stood down, want %d at most", before, most)
	}
	// Nothing else may happen now: a telemetry and an epoch later it is as it was.
	cli(t, f, "push", digitsFile("v1"), "digits:1")
	apply(t, f, "digits", 1)
	kept := a
	if linkState(t, a) != "connected" {
		kept = clone
	}
	eventually(t, func() string { return serves(t, kept, 1) })
	if after := sessions(); after != before {
		t.Errorf("there were %d sessions more after one stood down", after-before)
	}
	t.Logf("%d sessions until one stood down", before)
}
