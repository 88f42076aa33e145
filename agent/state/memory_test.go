package state

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

// A change that the disk takes is there after a crash, and one that it has not
// taken yet is not.
func TestMemoryCrash(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := must(NewMemory(Limits{}, func(ctx context.Context) error {
			time.Sleep(time.Second)
			return nil
		}))(t)
		if err := m.SetDesired(t.Context(), Desired{Number: 1}); err != nil {
			t.Fatal(err)
		}
		done := make(chan error, 1)
		go func() { done <- m.SetDesired(t.Context(), Desired{Number: 2}) }()
		time.Sleep(time.Second / 2)
		next := m.Crash()
		if err := <-done; !errors.Is(err, ErrCrashed) {
			t.Errorf("cut short: %v", err)
		}
		if _, err := m.Desired(t.Context()); !errors.Is(err, ErrCrashed) {
			t.Errorf("read after the crash: %v", err)
		}
		if d := must(next.Desired(t.Context()))(t); d.Number != 1 {
			t.Errorf("after the crash there is %d", d.Number)
		}
		if next.OutboxID() != m.OutboxID() {
			t.Error("the outbox has another id")
		}
	})
}

// A full disk refuses a change as a whole.
func TestMemoryFull(t *testing.T) {
	full := errors.New("no space left on device")
	var err error
	m := must(NewMemory(Limits{}, func(context.Context) error { return err }))(t)
	must(m.Append(t.Context(), event("one")))(t)
	err = full
	if _, err := m.Append(t.Context(), event("two")); !errors.Is(err, full) {
		t.Errorf("on a full disk: %v", err)
	}
	err = nil
	if seq := must(m.Append(t.Context(), event("three")))(t); seq != 2 {
		t.Errorf("the refused event took a sequence: the next is %d", seq)
	}
}
