package netem

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/net/nettest"
	"pgregory.net/rapid"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// The ends of a connection are net.Conns as others expect them.
func TestConn(t *testing.T) {
	for name, c := range map[string]Conditions{"perfect": {}, "slow": {RTT: time.Millisecond}} {
		t.Run(name, func(t *testing.T) {
			nettest.TestConn(t, func() (c1, c2 net.Conn, stop func(), err error) {
				l := NewLink(c, 1)
				c1, c2 = l.Pipe()
				return c1, c2, l.Reset, nil
			})
		})
	}
}

// carry sends bytes over a link, and gives how long it took until all had
// arrived.
func carry(t testing.TB, l *Link, n int) time.Duration {
	t.Helper()
	near, far := l.Pipe()
	data := make([]byte, n)
	rand.NewChaCha8([32]byte{}).Read(data)
	began := time.Now()
	go func() {
		if _, err := near.Write(data); err != nil {
			t.Error(err)
		}
		near.Close()
	}()
	got, err := io.ReadAll(far)
	took := time.Since(began)
	if err != nil || sha256.Sum256(got) != sha256.Sum256(data) {
		t.Errorf("%d of %d bytes arrived: %v", len(got), n, err)
	}
	far.Close()
	return took
}

// What a link does is what its conditions say, and the same each time.
func TestConditions(t *testing.T) {
	for _, tt := range []struct {
		c           Conditions
		bytes       int
		least, most time.Duration
	}{
		{Conditions{}, 1 << 20, 0, time.Millisecond},
		{Conditions{RTT: 100 * time.Millisecond}, 1000, 50 * time.Millisecond, 51 * time.Millisecond},
		// Slow start: 10, 20, 40, ... segments.
		{Conditions{RTT: 100 * time.Millisecond}, 70 * mss, 250 * time.Millisecond, 251 * time.Millisecond},
		{Conditions{RTT: 100 * time.Millisecond, BitsPerSecond: 100e3}, 300e3, 24 * time.Second, 27 * time.Second},
		{Conditions{RTT: 100 * time.Millisecond, BitsPerSecond: 100e3, Loss: 0.1}, 300e3, 26 * time.Second, 2 * time.Minute},
		{Conditions{RTT: 100 * time.Millisecond, Loss: 0.3}, 20e3, 200 * time.Millisecond, 2 * time.Minute},
		// Mathis: 1448 bytes / 100 ms / sqrt(2/3 x 0.01) are 177 kB/s.
		{Conditions{RTT: 100 * time.Millisecond, Loss: 0.01}, 5e6, 20 * time.Second, 60 * time.Second},
	} {
		t.Run(fmt.Sprintf("%+v", tt.c), func(t *testing.T) {
			var took []time.Duration
			for seed := range uint64(6) {
				synctest.Test(t, func(t *testing.T) {
					took = append(took, carry(t, NewLink(tt.c, seed/2), tt.bytes))
				})
			}
			for i, d := range took {
				if d < tt.least || d > tt.most {
					t.Errorf("seed %d: %v, want %v to %v", i/2, d, tt.least, tt.most)
				}
				if i%2 == 1 && d != took[i-1] {
					t.Errorf("seed %d: %v and then %v", i/2, took[i-1], d)
				}
			}
			t.Log(took)
		})
	}
}

// Whatever the conditions are, and however they change, the bytes that are
// written are those that are read, once both ends can hear each other.
func TestAnyConditions(t *testing.T) {
	rapid.Check(t, func(r *rapid.T) {
		c := Conditions{
			RTT: time.Duration(rapid.IntRange(0, 500).Draw(r, "rtt")) * time.Millisecond, Loss: rapid.Float64Range(0, 0.4).Draw(r, "loss"),
			BitsPerSecond: rapid.SampledFrom([]int64{0, 20e3, 1e6}).Draw(r, "bits"),
		}
		seed, n := rapid.Uint64().Draw(r, "seed"), rapid.IntRange(0, 60e3).Draw(r, "bytes")
		outage := time.Duration(rapid.IntRange(0, 60).Draw(r, "outage")) * time.Second
		synctest.Test(t, func(t *testing.T) {
			l := NewLink(c, seed)
			time.AfterFunc(time.Second, func() {
				down := c
				down.Down = true
				l.Set(down)
				time.AfterFunc(outage, func() { l.Set(c) })
			})
			if took := carry(t, l, n); took > time.Hour {
				t.Errorf("%v", took)
			}
			time.Sleep(2 * time.Minute)
		})
	})
}

// Of two that talk at a time over one link, each has about its share.
func TestSharedBandwidth(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := NewLink(Conditions{RTT: 20 * time.Millisecond, BitsPerSecond: 1e6}, 1)
		var took [2]time.Duration
		done := make(chan struct{})
		for i := range took {
			go func() {
				took[i] = carry(t, l, 500e3)
				done <- struct{}{}
			}()
		}
		<-done
		<-done
		for _, d := range took {
			if d < 6*time.Second || d > 10*time.Second {
				t.Errorf("took %v", took)
			}
		}
	})
}

func TestDial(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := NewLink(Conditions{RTT: 100 * time.Millisecond}, 1)
		dial := l.Dialer(func(context.Context, string, string) (net.Conn, error) {
			a, b := net.Pipe()
			go func() {
				_, _ = io.Copy(b, b)
				b.Close()
			}()
			return a, nil
		})
		began := time.Now()
		c, err := dial(t.Context(), "tcp", "there:1")
		if err != nil || time.Since(began) != 100*time.Millisecond {
			t.Fatalf("connected after %v: %v", time.Since(began), err)
		}
		if _, err := c.Write([]byte("echo")); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 4)
		if _, err := io.ReadFull(c, b); err != nil || string(b) != "echo" {
			t.Errorf("%q %v", b, err)
		}
		// A link that is down loses nothing that is sent again when it is back.
		down := l.Conditions()
		down.Down = true
		l.Set(down)
		began = time.Now()
		if _, err := c.Write([]byte("late")); err != nil {
			t.Fatal(err)
		}
		time.AfterFunc(10*time.Second, func() { l.Set(Conditions{RTT: 100 * time.Millisecond}) })
		if _, err := io.ReadFull(c, b); err != nil || string(b) != "late" || time.Since(began) < 10*time.Second {
			t.Errorf("%q %v after %v", b, err, time.Since(began))
		}
		if l.Open() != 1 {
			t.Errorf("%d connections", l.Open())
		}
		l.Reset()
		if _, err := c.Read(b); !errors.Is(err, ErrReset) {
			t.Errorf("after a reset: %v", err)
		}
		if _, err := c.Write(b); !errors.Is(err, ErrReset) {
			t.Errorf("after a reset: %v", err)
		}
		c.Close()
		l.Set(down)
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if _, err := dial(ctx, "tcp", "there:1"); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("over a link that is down: %v", err)
		}
		if l.Open() != 0 {
			t.Errorf("%d connections are left", l.Open())
		}
	})
}

// Over a plain link bytes pass as they do without, and a reset is told from an
// end that the connection's owner has made.
func TestPlain(t *testing.T) {
	l := Plain()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	accepted := make(chan net.Conn, 1)
	go func() {
		c, _ := listener.Accept()
		accepted <- c
	}()
	c, err := l.Dialer(nil)(t.Context(), "tcp", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	there := <-accepted
	defer there.Close()
	if _, err := c.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 1)
	if _, err := io.ReadFull(there, b); err != nil || b[0] != 'x' {
		t.Errorf("%q %v", b, err)
	}
	l.Reset()
	if _, err := c.Read(b); !errors.Is(err, ErrReset) {
		t.Errorf("after a reset: %v", err)
	}
	if l.Open() != 0 {
		t.Errorf("%d connections are left", l.Open())
	}
	l.Set(Conditions{Down: true})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := l.Dialer(nil)(ctx, "tcp", listener.Addr().String()); !errors.Is(err, context.Canceled) {
		t.Errorf("over a link that is down: %v", err)
	}
}

// A connection whose other end is gone for good ends in the end.
func TestGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := NewLink(Conditions{Down: true}, 1)
		near, _ := l.Pipe()
		if _, err := near.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		if _, err := near.Read(make([]byte, 1)); !errors.Is(err, errGone) || time.Since(began) < 5*time.Minute || time.Since(began) > time.Hour {
			t.Errorf("%v after %v", err, time.Since(began))
		}
	})
}

// An end that does not know yet that the other one has given up ends with Reset.
func TestGoneThenReset(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := NewLink(Conditions{Down: true}, 1)
		near, far := l.Pipe()
		if _, err := near.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		if _, err := near.Read(make([]byte, 1)); !errors.Is(err, errGone) {
			t.Fatal(err)
		}
		if err := far.SetReadDeadline(time.Now().Add(time.Hour)); err != nil {
			t.Fatal(err)
		}
		l.Reset()
		if _, err := far.Read(make([]byte, 1)); !errors.Is(err, ErrReset) || l.Open() != 0 {
			t.Errorf("%v, %d connections are left", err, l.Open())
		}
	})
}

// A peer that does not read stops the one that writes, and does not lose it.
func TestFlowControl(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := NewLink(Conditions{RTT: 10 * time.Millisecond, Loss: 0.05}, 3)
		near, far := l.Pipe()
		data := bytes.Repeat([]byte{1}, 2*receiveBuffer)
		if err := near.SetWriteDeadline(time.Now().Add(time.Hour)); err != nil {
			t.Fatal(err)
		}
		n, err := near.Write(data)
		if !errors.Is(err, os.ErrDeadlineExceeded) || n < receiveBuffer || n > receiveBuffer+sendBuffer+2*mss {
			t.Fatalf("%d bytes, %v", n, err)
		}
		near.Close()
		got, err := io.ReadAll(far)
		if err != nil || len(got) != n {
			t.Errorf("%d of %d bytes arrived: %v", len(got), n, err)
		}
		far.Close()
		time.Sleep(5 * time.Minute)
	})
}

func TestCorrupt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		near, far := NewLink(Conditions{Corrupt: 1}, 1).Pipe()
		if _, err := near.Write([]byte{0, 0, 0}); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 3)
		if _, err := io.ReadFull(far, b); err != nil || b[0]+b[1]+b[2] != 1 {
			t.Errorf("%v %v", b, err)
		}
		near.Close()
		far.Close()
	})
}

func TestTransfer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := NewLink(Conditions{RTT: 100 * time.Millisecond, BitsPerSecond: 100e3, Loss: 0.1}, 1)
		began := time.Now()
		if err := l.Transfer(t.Context(), 300e3); err != nil || time.Since(began) < 25*time.Second || time.Since(began) > 40*time.Second {
			t.Errorf("%v after %v", err, time.Since(began))
		}
		l.Set(Conditions{Down: true})
		if err := l.Transfer(t.Context(), 1); err == nil {
			t.Error("it passes a link that is down")
		}
	})
}

func TestCheck(t *testing.T) {
	for _, c := range []Conditions{{RTT: -1}, {RTT: time.Hour}, {Loss: -0.1}, {Loss: 1.1}, {Corrupt: 2}, {BitsPerSecond: -1}} {
		if c.Check() == nil {
			t.Errorf("%+v is taken", c)
		}
	}
	if err := (Conditions{RTT: time.Second, Loss: 1, BitsPerSecond: 1}).Check(); err != nil {
		t.Error(err)
	}
}
