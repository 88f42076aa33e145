package e2e

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"log/slog"
	mathrand "math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"google.golang.org/protobuf/proto"

	"github.com/dunlin/dunlin/agent/inband"
	"github.com/dunlin/dunlin/agent/reconcile"
	"github.com/dunlin/dunlin/controller/broker"
	server "github.com/dunlin/dunlin/controller/inband"
	"github.com/dunlin/dunlin/internal/link"
	"github.com/dunlin/dunlin/internal/pki/pkitest"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// everybody may connect by a certificate.
type everybody struct{}

func (everybody) Device(_ context.Context, cert *x509.Certificate) (string, error) {
	return cert.Subject.CommonName, nil
}
func (everybody) Enrolling(context.Context, string, string, string) bool { return false }

// shelf has one blob, for everybody.
type shelf struct{ blob []byte }

func (s shelf) Open(context.Context, string, string, digest.Digest, bool) (server.Blob, int64, error) {
	return struct {
		io.ReaderAt
		io.Closer
	}{bytes.NewReader(s.blob), io.NopCloser(nil)}, int64(len(s.blob)), nil
}

// TestControlBesideInBand has many devices fetch over MQTT as fast as they can,
// by one broker, while another one is told things and says things: those stay
// quick, and all that fetch get their share.
func TestControlBesideInBand(t *testing.T) {
	const devices, probes = 16, 40
	blob := make([]byte, 8<<20)
	chacha := mathrand.NewChaCha8([32]byte{})
	chacha.Read(blob) // never fails
	sum := digest.FromBytes(blob)

	ca := pkitest.Authority(t)
	log := slog.New(slog.DiscardHandler)
	b, err := broker.NewEmbedded(broker.EmbeddedConfig{Listen: "127.0.0.1:0", TLS: pkitest.ServerTLS(t, ca), Auth: everybody{}, Log: log})
	if err != nil {
		t.Fatal(err)
	}
	s := server.New(server.Config{Bus: b, Registry: shelf{blob}, Log: log, Malformed: func(device string, err error) { t.Error(device, err) }})
	reports := make(chan time.Time, probes)
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	defer running.Wait()
	defer cancel()
	start := func(run func(context.Context) error) { running.Go(func() { _ = run(ctx) }) }
	start(s.Run)
	start(func(ctx context.Context) error {
		return b.Run(ctx, func(topic string, payload []byte) {
			switch device, kind, _ := link.ParseUp(topic); kind {
			case link.Fetch:
				s.Handle(device, payload)
			case link.Reported:
				reports <- time.Now()
			}
		})
	})
	open := func(name string) *link.Link {
		own := pkitest.Device(t, ca, name)
		l, err := link.New(link.Config{
			BrokerURL: "mqtts://" + b.Addr().String(), Device: name, BootID: "boot", Log: log,
			TLS: func() *tls.Config { return pkitest.ClientTLS(ca, own) },
		})
		if err != nil {
			t.Fatal(err)
		}
		start(l.Run)
		select {
		case <-l.Connected():
		case <-time.After(limit):
			t.Fatal(name, "is not connected")
		}
		return l
	}
	var fetched [devices]atomic.Int64
	for i := range devices {
		l := open(fmt.Sprint("device-", i))
		f := inband.New(inband.Config{Log: log, Open: func(ctx context.Context) (inband.Line, error) { return l.OpenData(ctx) }})
		start(f.Run)
		running.Go(func() {
			for ctx.Err() == nil {
				body, err := f.Get(ctx, reconcile.Ref{Model: "m", Digest: sum}, 0, int64(len(blob)))
				if err == nil {
					h := sha256.New()
					_, err = io.Copy(io.MultiWriter(h, counting{&fetched[i]}), body)
					body.Close()
					if got := digest.NewDigest(digest.SHA256, h); err == nil && got != sum {
						t.Errorf("device-%d has fetched %s", i, got)
					}
				}
				if err != nil && ctx.Err() == nil {
					t.Errorf("device-%d: %v", i, err)
					return
				}
			}
		})
	}
	control := open("control")
	eventually(t, func() string {
		for i := range fetched {
			if fetched[i].Load() == 0 {
				return fmt.Sprintf("device-%d has fetched nothing", i)
			}
		}
		return ""
	})
	before := shares(&fetched)
	began := time.Now()
	var down, up []time.Duration
	for i := range probes {
		document := []byte(strings.Repeat("x", 20_000))
		digested := sha256.Sum256(document)
		payload, err := proto.Marshal(&dunlinv1.Desired{
			Generation: &dunlinv1.Generation{Incarnation: "i", Number: uint64(i + 1)}, Sha256: digested[:], SizeBytes: uint64(len(document)), Document: document,
		})
		if err != nil {
			t.Fatal(err)
		}
		sent := time.Now()
		if err := b.Publish(link.Down("control", link.Desired), payload); err != nil {
			t.Fatal(err)
		}
		select {
		case <-control.Inbox():
		case <-time.After(limit):
			t.Fatal("a document does not arrive")
		}
		down = append(down, time.Since(sent))
		sent = time.Now()
		if err := control.Send(link.Reported, &dunlinv1.Reported{Session: "s", Sequence: uint64(i + 1)}); err != nil {
			t.Fatal(err)
		}
		select {
		case at := <-reports:
			up = append(up, at.Sub(sent))
		case <-time.After(limit):
			t.Fatal("a report does not arrive")
		}
		time.Sleep(10 * time.Millisecond) // a rate, not a wait for something
	}
	took := time.Since(began).Seconds()
	after := shares(&fetched)
	total, least, most := int64(0), int64(1<<62), int64(0)
	for i := range after {
		n := after[i] - before[i]
		total, least, most = total+n, min(least, n), max(most, n)
	}
	slices.Sort(down)
	slices.Sort(up)
	t.Logf("%d devices fetch %.0f MB/s, one %.1f to %.1f; documents p50 %s p99 %s, reports p50 %s p99 %s", devices,
		float64(total)/1e6/took, float64(least)/1e6/took, float64(most)/1e6/took, down[probes/2], down[probes-1], up[probes/2], up[probes-1])
	if worst := max(down[probes-1], up[probes-1]); worst > time.Second {
		t.Errorf("a control message took %s beside what devices fetch, want 1 s at most", worst)
	}
	if least*5 < total/devices {
		t.Errorf("one device got %d bytes where the mean is %d", least, total/devices)
	}
}

type counting struct{ n *atomic.Int64 }

func (c counting) Write(p []byte) (int, error) {
	c.n.Add(int64(len(p)))
	return len(p), nil
}

func shares(fetched *[16]atomic.Int64) (n [16]int64) {
	for i := range fetched {
		n[i] = fetched[i].Load()
	}
	return n
}
