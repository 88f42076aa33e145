package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/proto"

	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

const (
	// watchPause is the wait before a broken watch is begun again.
	watchPause = 500 * time.Millisecond
	// watchGrace is how long, without --timeout, a controller may stay away
	// in the middle of a watch: long enough for it to start again.
	watchGrace = 10 * time.Second
)

func (c *cli) rolloutCommand() *cobra.Command {
	var wait bool
	var timeout time.Duration
	out := format("table")
	status := &cobra.Command{
		Use:   "status NAME",
		Short: "Show the newest rollout of a deployment",
		Long: `status shows how far the newest rollout of the deployment NAME is. With --wait it
follows it to its end. It exits 5 where the rollout failed or a newer one took
its place, and 6 where --timeout passed first.`,
		Example: "  dunlin rollout status digits --wait --timeout 5m",
		Args:    arguments(1, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if timeout < 0 || timeout > 0 && !wait {
				return usagef("--timeout is a time above 0 and goes with --wait")
			}
			ctl, err := connectClient()
			if err != nil {
				return err
			}
			var r *dunlinv1.Rollout
			if wait {
				r, err = c.waitRollout(cmd.Context(), ctl, args[0], timeout)
			} else {
				var res *dunlinv1.GetRolloutResponse
				res, err = call(cmd.Context(), ctl.rollouts().GetRollout, &dunlinv1.GetRolloutRequest{Deployment: args[0]})
				r = res.GetRollout()
			}
			if r != nil {
				if err := c.print(out, r, func() *table { return rolloutTable(r) }); err != nil {
					return err
				}
			}
			if connect.CodeOf(err) == connect.CodeNotFound {
				return fmt.Errorf("no deployment %q has had a rollout\nrun: dunlin get deployments", args[0])
			}
			if err != nil {
				return fmt.Errorf("rollout of %s: %w", args[0], err)
			}
			return rolloutError(r)
		},
	}
	status.Flags().BoolVar(&wait, "wait", false, "follow it to its end")
	status.Flags().DurationVar(&timeout, "timeout", 0, "with --wait: give up after this time (0: never)")
	status.Flags().VarP(&out, "output", "o", "how to write it")
	return group("rollout", "Follow rollouts", status)
}

func ended(r *dunlinv1.Rollout) bool {
	switch r.GetState() {
	case dunlinv1.RolloutState_ROLLOUT_STATE_SUCCEEDED, dunlinv1.RolloutState_ROLLOUT_STATE_FAILED, dunlinv1.RolloutState_ROLLOUT_STATE_SUPERSEDED:
		return true
	}
	return false
}

func rolloutError(r *dunlinv1.Rollout) error {
	reason := ""
	if r.GetReason() != "" {
		reason = ": " + r.GetReason()
	}
	switch r.GetState() {
	case dunlinv1.RolloutState_ROLLOUT_STATE_FAILED:
		return codeError{code: exitRolloutFailed, err: fmt.Errorf("rollout %s of %s failed%s\nrun: dunlin get events", r.GetId(), r.GetDeployment(), reason)}
	case dunlinv1.RolloutState_ROLLOUT_STATE_SUPERSEDED:
		return codeError{code: exitRolloutFailed, err: fmt.Errorf("a newer rollout of %s took the place of %s%s\nrun: dunlin rollout status %s", r.GetDeployment(), r.GetId(), reason, r.GetDeployment())}
	}
	return nil
}

// waitRollout follows the newest rollout of a deployment to its end, and
// tells on stderr what changes. It outlives broken connections. On a time-out
// it gives what it saw last, too.
func (c *cli) waitRollout(ctx context.Context, ctl *client, deployment string, timeout time.Duration) (*dunlinv1.Rollout, error) {
	watchCtx := ctx
	if timeout > 0 {
		var cancel context.CancelFunc
		watchCtx, cancel = context.WithTimeout(ctx, timeout)
		defer cancel()
	}
	timedOut := func(last *dunlinv1.Rollout) (*dunlinv1.Rollout, error) {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		return last, codeError{code: exitTimeout, err: fmt.Errorf("not at its end after %s", timeout)}
	}
	req := &dunlinv1.WatchRolloutRequest{Deployment: deployment}
	var last *dunlinv1.Rollout
	var lost time.Time // since when the controller is away; zero: it is not
	for {
		err := c.watch(watchCtx, ctl, req, func(r *dunlinv1.Rollout) {
			if !proto.Equal(last, r) {
				fmt.Fprintln(c.err, rolloutLine(r))
			}
			last, lost = r, time.Time{}
			// From now on this one, also where a newer one begins.
			req = &dunlinv1.WatchRolloutRequest{Id: r.GetId()}
		})
		switch {
		case ended(last):
			return last, nil
		case watchCtx.Err() != nil, timeout > 0 && connect.CodeOf(err) == connect.CodeDeadlineExceeded:
			return timedOut(last) // the controller's clock may be the first to say so
		case err != nil && connect.CodeOf(err) != connect.CodeUnavailable && connect.CodeOf(err) != connect.CodeUnknown && !errors.Is(err, io.ErrUnexpectedEOF):
			return last, err
		case err != nil && last == nil:
			return nil, err
		case timeout == 0 && !lost.IsZero() && time.Since(lost) > c.watchGrace:
			return last, cmp.Or(err, errors.New("the controller does not say how it goes"))
		case lost.IsZero():
			lost = time.Now()
			fmt.Fprintln(c.err, "The connection to the controller broke; trying again.")
		}
		t := time.NewTimer(watchPause)
		select {
		case <-watchCtx.Done():
			t.Stop()
			return timedOut(last)
		case <-t.C:
		}
	}
}

func (c *cli) watch(ctx context.Context, ctl *client, req *dunlinv1.WatchRolloutRequest, see func(*dunlinv1.Rollout)) error {
	stream, err := ctl.rollouts().WatchRollout(ctx, connect.NewRequest(req))
	if err != nil {
		return err
	}
	defer stream.Close()
	for stream.Receive() {
		see(stream.Msg().GetRollout())
	}
	return stream.Err()
}

// rolloutLine is a rollout on one line.
func rolloutLine(r *dunlinv1.Rollout) string {
	s := fmt.Sprintf("%s: %s:%d %s, %s ready", r.GetDeployment(), r.GetModel(), r.GetToVersion(), enumText(r.GetState(), "ROLLOUT_STATE_"), readyText(r))
	var have, total uint64
	var failed []string
	for _, d := range r.GetDevices() {
		if d.GetPhase() == dunlinv1.RolloutDevice_PHASE_WORKING {
			have += d.GetBytesPresent()
			total += d.GetBytesTotal()
		}
		if d.GetPhase() == dunlinv1.RolloutDevice_PHASE_FAILED {
			failed = append(failed, d.GetDevice())
		}
	}
	if total > 0 {
		s += fmt.Sprintf(", %s of %s fetched", bytesText(int64(have)), bytesText(int64(total)))
	}
	if len(failed) > 0 {
		s += ", failed on " + strings.Join(failed, ", ")
	}
	return s
}

func rolloutTable(r *dunlinv1.Rollout) *table {
	t := &table{header: []string{"ROLLOUT", "MODEL", "STATE", "DEVICE", "PHASE", "FETCHED", "REASON"}}
	model := fmt.Sprintf("%s:%d", r.GetModel(), r.GetToVersion())
	state := enumText(r.GetState(), "ROLLOUT_STATE_")
	if len(r.GetDevices()) == 0 {
		t.add(r.GetId(), model, state, "", "", "", r.GetReason())
	}
	for _, d := range r.GetDevices() {
		fetched := ""
		if d.GetBytesTotal() > 0 {
			fetched = bytesText(int64(d.GetBytesPresent())) + " of " + bytesText(int64(d.GetBytesTotal()))
		}
		t.add(r.GetId(), model, state, d.GetDevice(), enumText(d.GetPhase(), "PHASE_"), fetched, d.GetReason())
	}
	return t
}
