package engine

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

// TestIdle has requests come and go, one of them without its answer.
func TestIdle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := New(Config{Runtime: new(runtime)}) // a second for everything
		told := func() bool {
			select {
			case <-e.Busy():
				return true
			default:
				return false
			}
		}
		expect := func(when string, idle time.Duration, busy bool) {
			t.Helper()
			if got := e.Idle(); got != idle {
				t.Errorf("%s: idle for %v instead of %v", when, got, idle)
			}
			if got := told(); got != busy {
				t.Errorf("%s: a request has come: %v", when, got)
			}
		}
		time.Sleep(2 * time.Second)
		expect("before it runs", 2*time.Second, false)
		ctx, stop := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- e.Run(ctx) }()
		if _, err := e.Load(ctx, Spec{ID: one}); err != nil {
			t.Fatal(err)
		}
		expect("loaded", 3*time.Second, false)
		answer := make(chan error)
		infer := func(ctx context.Context) {
			_, err := e.Infer(ctx, one, Request{Inputs: request1()})
			answer <- err
		}
		go infer(ctx)
		synctest.Wait()
		expect("one runs", 0, true)
		go infer(ctx)
		synctest.Wait()
		expect("another waits", 0, false)
		for range 2 {
			if err := <-answer; err != nil {
				t.Fatal(err)
			}
		}
		synctest.Wait()
		time.Sleep(5 * time.Second)
		expect("both are answered", 5*time.Second, false)
		gone, leave := context.WithCancel(ctx)
		go infer(gone)
		synctest.Wait()
		leave()
		if err := <-answer; !errors.Is(err, context.Canceled) {
			t.Fatal(err)
		}
		synctest.Wait()
		time.Sleep(time.Second)
		expect("one came and was given up", time.Second, true)
		stop()
		if err := <-done; err != nil {
			t.Fatal(err)
		}
	})
}

func BenchmarkIdle(b *testing.B) {
	e := New(Config{})
	for b.Loop() {
		if e.Idle() < 0 {
			b.Fatal("it ends before it began")
		}
	}
}

// TestBacklog has two requests come to a version, which answers one in a second.
func TestBacklog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := New(Config{Runtime: new(runtime)}) // a second for everything
		expect := func(when string, want Backlog) {
			t.Helper()
			synctest.Wait()
			got := e.Backlog()
			if d := got.Wait - want.Wait; d.Abs() < 100*time.Millisecond { // it is an estimate
				got.Wait = want.Wait
			}
			if got != want {
				t.Errorf("%s: %+v, want %+v", when, got, want)
			}
		}
		expect("before it runs", Backlog{})
		ctx, stop := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- e.Run(ctx) }()
		id := VersionID{Model: "m", Version: 1}
		if _, err := e.Load(ctx, Spec{ID: id}); err != nil {
			t.Fatal(err)
		}
		expect("nothing to do", Backlog{Known: true})
		answer := make(chan error)
		infer := func() {
			_, err := e.Infer(ctx, id, Request{Inputs: request1()})
			answer <- err
		}
		go infer()
		expect("nobody knows yet how long a run takes", Backlog{})
		if err := <-answer; err != nil {
			t.Fatal(err)
		}
		go infer()
		expect("one runs", Backlog{Wait: time.Second, Known: true})
		go infer()
		expect("one runs, and one waits", Backlog{Waiting: 1, Wait: 2 * time.Second, Known: true})
		time.Sleep(500 * time.Millisecond)
		expect("half a second later", Backlog{Waiting: 1, Wait: 1500 * time.Millisecond, Known: true})
		for range 2 {
			if err := <-answer; err != nil {
				t.Fatal(err)
			}
		}
		expect("both are answered", Backlog{Known: true})
		stop()
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		expect("after its end", Backlog{Known: true})
	})
}
