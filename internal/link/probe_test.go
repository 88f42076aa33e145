package link

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"log/slog"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	mochi "github.com/mochi-mqtt/server/v2"

	"github.com/dunlin/dunlin/internal/netem"
	"github.com/dunlin/dunlin/internal/pki"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// A session on which nothing comes through ends soon after something was said,
// not with its keepalive: a new connection may fare better. The next is given
// more time, until one has answered.
func TestStalledSession(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		broker := mochi.New(&mochi.Options{Logger: slog.New(slog.DiscardHandler)})
		for _, err := range []error{broker.AddHook(new(rules), nil), broker.Serve()} {
			if err != nil {
				t.Fatal(err)
			}
		}
		s := newSite(t)
		network := netem.NewLink(netem.Conditions{RTT: 100 * time.Millisecond}, 1)
		var serving sync.WaitGroup
		l, err := New(Config{
			BrokerURL: "mqtts://127.0.0.1:8883", Device: "dev", BootID: "boot", Log: slog.New(slog.DiscardHandler),
			TLS: func() *tls.Config {
				return pki.ClientConfig(pki.Client{
					Trust:       func() pki.Trust { return pki.Trust{Roots: []*x509.Certificate{s.authority.Certificate}} },
					Certificate: func() *tls.Certificate { return s.device },
				}, "127.0.0.1")
			},
			Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
				if network.Conditions().Down {
					<-ctx.Done()
					return nil, ctx.Err()
				}
				near, far := network.Pipe()
				serving.Go(func() { _ = broker.EstablishConnection("pipe", tls.Server(far, s.server())) })
				return near, nil
			},
		})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		serving.Go(func() { _ = l.Run(ctx) })
		connected := func() {
			t.Helper()
			for began := time.Now(); l.Session() == ""; time.Sleep(100 * time.Millisecond) {
				if time.Since(began) > 30*time.Second {
					t.Fatal("not connected")
				}
			}
		}
		stalled := func(want time.Duration) {
			t.Helper()
			network.Set(netem.Conditions{RTT: 100 * time.Millisecond, Down: true})
			_ = l.Send(Reported, &dunlinv1.Reported{})
			began := time.Now()
			for l.Session() != "" {
				time.Sleep(100 * time.Millisecond)
			}
			if took := time.Since(began); took < want || took > want+5*time.Second {
				t.Errorf("the session has ended after %v, want %v", took, want)
			}
			time.Sleep(2 * goodbyeTimeout)
			if state, err := l.State(); state != Unreachable || !errors.Is(err, errSilent) {
				t.Errorf("state %v, %v", state, err)
			}
			network.Reset()
			network.Set(netem.Conditions{RTT: 100 * time.Millisecond})
		}
		connected()
		time.Sleep(5 * time.Second) // hello has its answer
		stalled(probePatience)
		connected()
		stalled(probePatience) // one has answered before
		connected()
		stalled(2 * probePatience)
		connected()
		time.Sleep(10*time.Minute + DefaultKeepAlive/2) // not when the client asks, too
		if l.Session() == "" {
			t.Error("the session of a good link has ended")
		}
		stalled(probePatience)
		cancel()
		if err := broker.Close(); err != nil {
			t.Error(err)
		}
		serving.Wait()
	})
}
