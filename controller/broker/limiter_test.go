package broker

import (
	"fmt"
	"io"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestLimiter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out syncBuffer
		log := slog.New(newLimiter(slog.NewTextHandler(&out, nil))).With("hook", "h", "secret", "s3cret").WithGroup("g")
		for range 1000 {
			log.Warn("one", "error", "x", "pk", "s3cret")
			log.Info("chatter")
		}
		log.Error("two")
		for msg, want := range map[string]int{"msg=one": logBurst, "msg=two": 1, "chatter": 0, "s3cret": 0, "error=x": logBurst, "hook=h": logBurst + 1} {
			if got := strings.Count(out.String(), msg); got != want {
				t.Errorf("%s: %d times, want %d", msg, got, want)
			}
		}
		time.Sleep(logWindow)
		log.Warn("one")
		if want := fmt.Sprintf("suppressed=%d", 1000-logBurst); !strings.Contains(out.String(), want) {
			t.Errorf("the log does not say %s", want)
		}
	})
}

// TestAbruptEndsAreLoggedWithinBounds: connections that end without a
// goodbye, are refused, or send rubbish.
func TestAbruptEndsAreLoggedWithinBounds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out syncBuffer
		_, p, stop := startPiped(t, newAccounts("a"), newInbox().handle, &out)
		defer stop()
		for range 500 {
			c := p.dial(t, "a")
			c.mustConnect(connectPacket("a"))
			c.Close()
			p.dial(t, "b").connect(connectPacket("b"))
			c = p.dial(t, "a")
			c.mustConnect(connectPacket("a"))
			c.Write([]byte{0xff, 0xff})
			c.wantClosed()
		}
		synctest.Wait()
		// A few messages, each at most logBurst times.
		if lines := strings.Count(out.String(), "\n"); lines == 0 || lines > 6*logBurst {
			t.Errorf("%d lines in the log", lines)
		}
	})
}

// TestSecretsAreNotLogged: the server logs whole packets, a second CONNECT for
// one.
func TestSecretsAreNotLogged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out syncBuffer
		_, p, stop := startPiped(t, newAccounts("a"), newInbox().handle, io.MultiWriter(&out, t.Output()))
		defer stop()
		c := p.dial(t, "")
		c.mustConnect(enrolPacket(joinUser))
		c.send(enrolPacket(joinUser))
		c.wantClosed()
		synctest.Wait()
		if !strings.Contains(out.String(), "error processing packet") || strings.Contains(out.String(), passwordOf(joinUser)) {
			t.Errorf("the log has the secret, or nothing of the packet:\n%s", out.String())
		}
	})
}
