package e2e

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/dunlin/dunlin/models/examples/digits"
)

// load asks a digits model to classify, one request after the other, until it
// is stopped. Every request must succeed.
type load struct {
	t      *testing.T
	cancel context.CancelFunc
	done   chan struct{}
	once   sync.Once

	mu       sync.Mutex
	requests int
	slowest  time.Duration
	failure  error
}

func startLoad(t *testing.T, url, name string) *load {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	l := &load{t: t, cancel: cancel, done: make(chan struct{})}
	images, _ := digits.HeldOut()
	go func() {
		defer close(l.done)
		for i := 0; ctx.Err() == nil; i++ {
			began := time.Now()
			_, err := Classify(ctx, url, name, images[i%500:i%500+10])
			l.mu.Lock()
			l.slowest = max(l.slowest, time.Since(began))
			switch {
			case err == nil:
				l.requests++
			case ctx.Err() == nil && l.failure == nil:
				l.failure = fmt.Errorf("request %d: %w", l.requests, err)
			}
			l.mu.Unlock()
			select { // leave the machine to what is tested
			case <-ctx.Done():
			case <-time.After(5 * time.Millisecond):
			}
		}
	}()
	t.Cleanup(l.stop)
	return l
}

// stop ends the load and fails the test where a request failed.
func (l *load) stop() {
	l.once.Do(func() {
		l.cancel()
		<-l.done
		if l.failure != nil {
			l.t.Errorf("a request failed: %v", l.failure)
		}
		if l.requests == 0 {
			l.t.Error("no request succeeded")
		}
	})
}

func (l *load) count() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.requests
}

// serves says why the agent does not answer with a version of digits, or "".
func serves(t *testing.T, a *Agent, version int) string {
	t.Helper()
	images, _ := digits.HeldOut()
	answer, err := Classify(within(t), a.URL, "digits-route", images[:1])
	if err != nil {
		return err.Error()
	}
	if answer.Version != strconv.Itoa(version) {
		return fmt.Sprintf("version %s answers, want %d", answer.Version, version)
	}
	return ""
}

func sha256Is(data, want []byte) bool {
	sum := sha256.Sum256(data)
	return string(sum[:]) == string(want)
}

func decode(t *testing.T, text string, v any) {
	t.Helper()
	if err := json.Unmarshal([]byte(text), v); err != nil {
		t.Fatalf("%v in %s", err, text)
	}
}
