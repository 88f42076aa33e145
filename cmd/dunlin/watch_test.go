package main

import (
	"bytes"
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// answers is a list that changes from one question to the next; the last
// question is an interrupt.
func answers(stop context.CancelFunc, all ...any) func(context.Context) (view, error) {
	return func(ctx context.Context) (view, error) {
		if len(all) == 0 {
			stop()
			return view{}, ctx.Err()
		}
		next := all[0]
		all = all[1:]
		if err, failed := next.(error); failed {
			return view{}, err
		}
		return next.(view), nil
	}
}

func deploymentsView(all ...*dunlinv1.Deployment) view {
	return viewOf(&dunlinv1.ListDeploymentsResponse{Deployments: all}, func() *table { return deploymentsTable(time.Now(), all) })
}

// TestWatchList: what is new or changed is written, once, in the columns of
// before; what is gone and a controller that is away are told on stderr.
func TestWatchList(t *testing.T) {
	at := func(n int64) *timestamppb.Timestamp { return timestamppb.New(time.Unix(n, 0)) }
	digits := func(ready uint32) *dunlinv1.Deployment {
		return &dunlinv1.Deployment{Name: "digits", Model: "digits", Version: 2, Devices: 3, Ready: ready}
	}
	faces := &dunlinv1.Deployment{Name: "fa\x1bces", Model: "faces", Version: 12}
	again := &dunlinv1.Deployment{Name: "fa\x1bces", Model: "faces", Version: 12, UpdatedAt: at(1e9)}
	event := func(n uint64) *dunlinv1.DeviceEvent {
		return &dunlinv1.DeviceEvent{Device: "cam-1", Event: &dunlinv1.Event{Sequence: n, Kind: "worker.died", Severity: dunlinv1.Severity_SEVERITY_ERROR}}
	}
	events := func(all ...*dunlinv1.DeviceEvent) view {
		return viewOf(&dunlinv1.ListEventsResponse{Events: all}, func() *table { return eventsTable(time.Now(), all) })
	}
	unavailable := connect.NewError(connect.CodeUnavailable, errors.New("refused"))
	for name, test := range map[string]struct {
		out       format
		journal   bool
		all       []any
		want, err string
		code      int
	}{
		"rows": {out: "table", all: []any{deploymentsView(digits(1)), deploymentsView(digits(1), faces), deploymentsView(digits(2), faces), deploymentsView(faces), deploymentsView(again)},
			want: "NAME    MODEL     DEVICES  READY  FAILED  SELECTOR  UPDATED\n" +
				"digits  digits:2  3        1      0       (all)     -\n" +
				"fa\ufffdces  faces:12  0        0      0       (all)     -\n" +
				"digits  digits:2  3        2      0       (all)     -\n" +
				"fa\ufffdces  faces:12  0        0      0       (all)     now\n", err: "digits is gone\n"},
		"names": {out: "name", all: []any{deploymentsView(digits(1)), deploymentsView(digits(2), faces)}, want: "digits\nfa\ufffdces\n"},
		"away": {out: "name", all: []any{deploymentsView(digits(1)), unavailable, unavailable, deploymentsView(digits(2)), connect.NewError(connect.CodePermissionDenied, errors.New("no"))},
			want: "digits\n", err: "The controller is away; trying again every 2s.\nThe controller is back.\n", code: exitNotAllowed},
		"away from the start": {out: "name", all: []any{unavailable}, code: exitError},
		"its name is gone":    {out: "name", all: []any{deploymentsView(digits(1)), notFound("deployment", "digits"), deploymentsView(digits(1))}, want: "digits\ndigits\n", err: "digits is gone\n"},
		"events": {out: "table", journal: true, all: []any{events(event(2), event(1)), events(event(3), event(2))},
			want: "WHEN  DEVICE  SEVERITY  KIND         MODEL  MESSAGE\n-     cam-1   error     worker.died  -      -\n-     cam-1   error     worker.died  -      -\n-     cam-1   error     worker.died  -      -\n"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, stop := context.WithCancel(t.Context())
				defer stop()
				var out, stderr bytes.Buffer
				c := &cli{out: &out, err: &stderr}
				code := exitOK
				if err := c.watchList(ctx, answers(stop, test.all...), newWatched(test.out, test.journal), watchEvery); err != nil {
					code = exitCode(err)
				}
				if out.String() != test.want || stderr.String() != test.err || code != test.code {
					t.Errorf("exit code %d, want %d\n%s%swant\n%s%s", code, test.code, &out, &stderr, test.want, test.err)
				}
			})
		})
	}
}

// TestWatchPause: a controller that takes long to answer is asked less often.
func TestWatchPause(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, stop := context.WithTimeout(t.Context(), 65*time.Second)
		defer stop()
		asked := 0
		list := func(context.Context) (view, error) {
			asked++
			time.Sleep(3 * time.Second)
			return deploymentsView(), nil
		}
		c := &cli{out: &bytes.Buffer{}, err: &bytes.Buffer{}}
		if err := c.watchList(ctx, list, newWatched("jsonl", false), watchEvery); err != nil {
			t.Fatal(err)
		}
		if asked != 2 {
			t.Errorf("asked %d times in 65 s", asked)
		}
	})
}
