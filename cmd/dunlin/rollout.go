package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
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
	return group("rollout", "Follow and steer rollouts", c.rolloutStatusCommand(), c.rolloutWatchCommand(), c.rolloutDecisionsCommand(),
		c.controlCommand("pause", "Give no further device the new version", dunlinv1.ControlRolloutRequest_ACTION_PAUSE,
			`pause keeps a rollout from giving the new version to further devices; those that
have it keep it. "dunlin rollout resume" goes on.`),
		c.controlCommand("resume", "Go on after a pause or a halt", dunlinv1.ControlRolloutRequest_ACTION_RESUME,
			`resume goes on with a rollout that was paused, or that a gate or devices that
refused have halted: what halted it is judged anew.`),
		c.controlCommand("promote", "Begin the next wave now", dunlinv1.ControlRolloutRequest_ACTION_PROMOTE,
			`promote begins the next wave now, whatever soak time, least sample and gates say
of the present one.`),
		c.controlCommand("abort", "End a rollout; every device keeps what it has", dunlinv1.ControlRolloutRequest_ACTION_ABORT,
			`abort ends a rollout: devices that have the new version keep it, the others stay
as they are.`),
		c.controlCommand("rollback", "Give every device the version before", dunlinv1.ControlRolloutRequest_ACTION_ROLL_BACK,
			`rollback gives every device of a rollout the version before it, also after the
rollout has ended. "dunlin rollout watch" shows how far it is.`),
	)
}

const rolloutName = `NAME is a deployment, whose newest rollout it is then, or a rollout's id, as
"dunlin get rollouts" shows it.`

func (c *cli) rolloutStatusCommand() *cobra.Command {
	var wait, devices bool
	var timeout time.Duration
	out := format("table")
	cmd := &cobra.Command{
		Use:   "status NAME",
		Short: "Show the newest rollout of a deployment",
		Long: `status shows how far the newest rollout of the deployment NAME, or the rollout of
that id, is: its waves (# ready, x failed, - away and not waited for), its gates
with the figures that they were judged by, what failed, by reason, and, where
they are few or with --devices, each device. With --wait it follows it until it
ends or halts. It exits 5 where the rollout failed, halted, was rolled back or
aborted, or a newer one took its place, and 6 where --timeout passed first.`,
		Example: "  dunlin rollout status digits --wait --timeout 5m",
		Args:    arguments(1, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if timeout < 0 || timeout > 0 && !wait {
				return usagef("--timeout is a time above 0 and goes with --wait")
			}
			return c.followRollout(cmd.Context(), args[0], following{wait: wait, until: settled, timeout: timeout, out: out, devices: devices})
		},
	}
	cmd.Flags().BoolVar(&wait, "wait", false, "follow it until it ends or halts")
	cmd.Flags().DurationVar(&timeout, "timeout", 0, "with --wait: give up after this time (0: never)")
	cmd.Flags().BoolVar(&devices, "devices", false, fmt.Sprintf("show each device, also where there are more than %d", fewDevices))
	cmd.Flags().VarP(&out, "output", "o", "how to write it")
	return cmd
}

func (c *cli) rolloutWatchCommand() *cobra.Command {
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:   "watch NAME",
		Short: "Follow a rollout to its end",
		Long: `watch shows a rollout as status does, again at each change, to its end: on a
terminal in place, elsewhere one line for each change. Unlike status --wait it
stays where the rollout halts. ` + rolloutName,
		Args: arguments(1, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if timeout < 0 {
				return usagef("--timeout is a time above 0")
			}
			return c.followRollout(cmd.Context(), args[0], following{wait: true, until: ended, timeout: timeout, out: "table"})
		},
	}
	cmd.Flags().DurationVar(&timeout, "timeout", 0, "give up after this time (0: never)")
	return cmd
}

// following is how a rollout is followed and shown.
type following struct {
	wait    bool
	until   func(*dunlinv1.Rollout) bool
	timeout time.Duration
	out     format
	devices bool // each, also where there are many
}

func (c *cli) followRollout(ctx context.Context, name string, f following) error {
	ctl, err := c.client()
	if err != nil {
		return err
	}
	var r *dunlinv1.Rollout
	if f.wait {
		r, err = c.waitRollout(ctx, ctl, name, f)
	} else {
		r, err = findRollout(ctx, ctl, name)
	}
	if r != nil {
		var shown error
		if f.out.tabular() {
			shown = rolloutPage(time.Now(), r, f.devices).write(c.out)
		} else {
			shown = c.print(f.out, r, nil)
		}
		if shown != nil {
			return shown
		}
	}
	if err != nil {
		return fmt.Errorf("rollout of %s: %w", name, err)
	}
	return rolloutError(r)
}

// findRollout gives the newest rollout of the deployment name or, where there
// is none, the rollout of that id.
func findRollout(ctx context.Context, ctl *client, name string) (*dunlinv1.Rollout, error) {
	res, err := call(ctx, ctl.rollouts().GetRollout, &dunlinv1.GetRolloutRequest{Deployment: name})
	if connect.CodeOf(err) == connect.CodeNotFound {
		res, err = call(ctx, ctl.rollouts().GetRollout, &dunlinv1.GetRolloutRequest{Id: name})
	}
	switch connect.CodeOf(err) {
	case connect.CodeNotFound, connect.CodeInvalidArgument: // the latter: it cannot be an id
		return nil, fmt.Errorf("no deployment %q has had a rollout, nor is that the id of one\nrun: dunlin get rollouts", name)
	}
	return res.GetRollout(), err
}

// controlAsks says what those actions do that are asked about first.
var controlAsks = map[dunlinv1.ControlRolloutRequest_Action]string{
	dunlinv1.ControlRolloutRequest_ACTION_PROMOTE:   "this begins the next wave of rollout %s, whatever its gates say",
	dunlinv1.ControlRolloutRequest_ACTION_ABORT:     "this ends rollout %s",
	dunlinv1.ControlRolloutRequest_ACTION_ROLL_BACK: "this gives every device of rollout %s the version before",
}

func (c *cli) controlCommand(verb, short string, action dunlinv1.ControlRolloutRequest_Action, long string) *cobra.Command {
	var reason string
	cmd := &cobra.Command{
		Use:     verb + " NAME",
		Short:   short,
		Long:    long + "\n\n" + rolloutName,
		Example: "  dunlin rollout " + verb + " digits --reason 'the line stands still until Monday'",
		Args:    arguments(1, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctl, err := c.client()
			if err != nil {
				return err
			}
			// Found first: what is steered is the rollout that was the newest then.
			r, err := findRollout(cmd.Context(), ctl, args[0])
			if err != nil {
				return fmt.Errorf("%s: %w", verb, err)
			}
			if asks := controlAsks[action]; asks != "" {
				if err := c.confirm(cmd.Context(), args[0], asks, r.GetId()); err != nil {
					return err
				}
			}
			res, err := call(cmd.Context(), ctl.rollouts().ControlRollout, &dunlinv1.ControlRolloutRequest{Id: r.GetId(), Action: action, Reason: reason})
			if err != nil {
				return fmt.Errorf("%s rollout %s: %w", verb, r.GetId(), err)
			}
			fmt.Fprintf(c.out, "rollout/%s %s\n", res.GetRollout().GetId(), rolloutState(res.GetRollout()))
			return nil
		},
	}
	cmd.Flags().StringVar(&reason, "reason", "", "why, for the record; at most 1000 characters")
	return cmd
}

func (c *cli) rolloutDecisionsCommand() *cobra.Command {
	out := format("table")
	cmd := &cobra.Command{
		Use:   "decisions NAME",
		Short: "Show what was decided in a rollout, and on what",
		Long: `decisions shows, oldest first, what was decided in a rollout, by whom, and the
figures of the gates that it was decided on. ` + rolloutName,
		Args: arguments(1, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctl, err := c.client()
			if err != nil {
				return err
			}
			r, err := findRollout(cmd.Context(), ctl, args[0])
			if err != nil {
				return fmt.Errorf("decisions: %w", err)
			}
			res, err := call(cmd.Context(), ctl.rollouts().ListDecisions, &dunlinv1.ListDecisionsRequest{Id: r.GetId()})
			if err != nil {
				return fmt.Errorf("decisions of rollout %s: %w", r.GetId(), err)
			}
			if out.tabular() {
				return decisionsPage(time.Now(), res.GetDecisions()).write(c.out)
			}
			return c.print(out, res, nil)
		},
	}
	cmd.Flags().VarP(&out, "output", "o", "how to write it")
	return cmd
}

func ended(r *dunlinv1.Rollout) bool {
	switch r.GetState() {
	case dunlinv1.RolloutState_ROLLOUT_STATE_SUCCEEDED, dunlinv1.RolloutState_ROLLOUT_STATE_FAILED, dunlinv1.RolloutState_ROLLOUT_STATE_SUPERSEDED,
		dunlinv1.RolloutState_ROLLOUT_STATE_ROLLED_BACK, dunlinv1.RolloutState_ROLLOUT_STATE_ABORTED:
		return true
	}
	return false
}

// settled says whether nothing more comes of a rollout unless somebody acts.
func settled(r *dunlinv1.Rollout) bool {
	return ended(r) || r.GetState() == dunlinv1.RolloutState_ROLLOUT_STATE_HALTED
}

// rolloutError is what a rollout that did not go as it should exits with.
func rolloutError(r *dunlinv1.Rollout) error {
	reason := ""
	if r.GetReason() != "" {
		reason = ": " + plain(r.GetReason())
	}
	failed := func(format string, args ...any) error {
		return codeError{code: exitRolloutFailed, err: fmt.Errorf(format, args...)}
	}
	switch r.GetState() {
	case dunlinv1.RolloutState_ROLLOUT_STATE_FAILED:
		return failed("rollout %s of %s failed%s\nrun: dunlin get events", r.GetId(), r.GetDeployment(), reason)
	case dunlinv1.RolloutState_ROLLOUT_STATE_SUPERSEDED:
		return failed("a newer rollout of %s took the place of %s%s\nrun: dunlin rollout status %s", r.GetDeployment(), r.GetId(), reason, r.GetDeployment())
	case dunlinv1.RolloutState_ROLLOUT_STATE_HALTED:
		return failed("rollout %s of %s halted%s\nrun: dunlin rollout decisions %s\nThen: dunlin rollout resume, promote, abort or rollback", r.GetId(), r.GetDeployment(), reason, r.GetId())
	case dunlinv1.RolloutState_ROLLOUT_STATE_ROLLED_BACK:
		return failed("rollout %s of %s was rolled back%s\nrun: dunlin rollout decisions %s", r.GetId(), r.GetDeployment(), reason, r.GetId())
	case dunlinv1.RolloutState_ROLLOUT_STATE_ABORTED:
		return failed("rollout %s of %s was aborted%s\nrun: dunlin rollout decisions %s", r.GetId(), r.GetDeployment(), reason, r.GetId())
	}
	return nil
}

// waitRollout follows a rollout, and tells on stderr what changes. It outlives
// broken connections. On a time-out it gives what it saw last, too.
func (c *cli) waitRollout(ctx context.Context, ctl *client, name string, f following) (*dunlinv1.Rollout, error) {
	watchCtx, timeout := ctx, f.timeout
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
	// From now on this one, also where a newer one begins.
	found, err := findRollout(watchCtx, ctl, name)
	switch {
	case err != nil && watchCtx.Err() != nil:
		return timedOut(nil)
	case err != nil:
		return nil, err
	}
	req := &dunlinv1.WatchRolloutRequest{Id: found.GetId()}
	live := newLivePage(c.err)
	defer live.clear()
	var last *dunlinv1.Rollout
	var lost time.Time // since when the controller is away; zero: it is not
	for {
		err := c.watch(watchCtx, ctl, req, func(r *dunlinv1.Rollout) (more bool) {
			if !proto.Equal(last, r) && live != nil {
				live.show(rolloutPage(time.Now(), r, f.devices))
			} else if !proto.Equal(last, r) {
				fmt.Fprintln(c.err, rolloutLine(r))
			}
			last, lost = r, time.Time{}
			return !f.until(r) // a rollout that halts does not end the stream
		})
		switch {
		case last != nil && f.until(last):
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

// watch has see look at a rollout at each change, until it wants no more or the
// stream ends.
func (c *cli) watch(ctx context.Context, ctl *client, req *dunlinv1.WatchRolloutRequest, see func(*dunlinv1.Rollout) (more bool)) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := ctl.rollouts().WatchRollout(ctx, connect.NewRequest(req))
	if err != nil {
		return err
	}
	defer func() {
		cancel() // or closing would wait for what comes next
		_ = stream.Close()
	}()
	for stream.Receive() {
		if !see(stream.Msg().GetRollout()) {
			return nil
		}
	}
	return stream.Err()
}

// rolloutLine is a rollout on one line.
func rolloutLine(r *dunlinv1.Rollout) string {
	s := fmt.Sprintf("%s: %s:%d %s, %s ready", r.GetDeployment(), r.GetModel(), r.GetToVersion(), rolloutState(r), readyText(r))
	if n := len(r.GetWaves()); n > 1 {
		s += fmt.Sprintf(", wave %d of %d", r.GetWave(), n)
	}
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
		s += ", failed on " + listText(failed)
	}
	switch r.GetState() {
	case dunlinv1.RolloutState_ROLLOUT_STATE_PAUSED, dunlinv1.RolloutState_ROLLOUT_STATE_HALTED, dunlinv1.RolloutState_ROLLOUT_STATE_ROLLING_BACK:
		if r.GetReason() != "" {
			s += ": " + plain(r.GetReason())
		}
	}
	return s
}
