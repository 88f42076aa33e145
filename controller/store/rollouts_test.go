package store

import (
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/dunlin/dunlin/controller/fleet"
	"github.com/dunlin/dunlin/internal/sketch"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// fill sets every field of a struct to something that is not zero, so that one
// which is not kept shows.
func fill(t *testing.T, v reflect.Value, n *int64) {
	t.Helper()
	*n++
	switch v.Interface().(type) {
	case time.Time:
		v.Set(reflect.ValueOf(time.Unix(*n, *n).UTC()))
		return
	case fleet.State:
		v.Set(reflect.ValueOf(fleet.Running))
		return
	}
	switch v.Kind() {
	case reflect.Struct:
		for _, field := range v.Fields() {
			fill(t, field, n)
		}
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 2, 2))
		fill(t, v.Index(0), n)
		fill(t, v.Index(1), n)
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		fill(t, v.Elem(), n)
	case reflect.String:
		v.SetString(fmt.Sprintf("text %03d", *n))
	case reflect.Bool:
		v.SetBool(true)
	case reflect.Int, reflect.Int64:
		v.SetInt(*n)
	case reflect.Uint64:
		v.SetUint(uint64(*n))
	case reflect.Float64:
		v.SetFloat(float64(*n) / 8)
	default:
		t.Fatalf("no value for a %s", v.Type())
	}
}

// A rollout is kept whole, whatever a rollout is: a field that is added to it
// and not to the store fails here.
func TestRolloutIsKeptWhole(t *testing.T) {
	s, _ := fresh(t)
	ctx := t.Context()
	push(t, s, "digits", "d1")
	_, err := s.Apply(ctx, "user:op", parse(t, deployment("a", "digits", 1, "")), false)
	must(t, err)
	before, err := s.Rollout(ctx, "a-1")
	must(t, err)
	var want fleet.Rollout
	n := int64(100)
	fill(t, reflect.ValueOf(&want).Elem(), &n)
	// These do not change once a rollout has begun.
	want.Number, want.Deployment, want.Model, want.From, want.To = before.Number, before.Deployment, before.Model, before.From, before.To
	want.StartedAt, want.Strategy.MaxFailed, want.Strategy.Deadline = before.StartedAt, before.Strategy.MaxFailed, before.Strategy.Deadline
	var decision fleet.Decision
	fill(t, reflect.ValueOf(&decision).Elem(), &n)
	must(t, s.SaveRollout(ctx, before, want, []fleet.Decision{decision}))
	got, err := s.Rollout(ctx, "a-1")
	must(t, err)
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v\nwant %+v", got, want)
	}
	decisions, err := s.Decisions(ctx, "a-1")
	must(t, err)
	if len(decisions) != 1 || !reflect.DeepEqual(decisions[0], decision) {
		t.Errorf("got %+v\nwant %+v", decisions, decision)
	}
	// Where the store has another state than before, nothing is changed.
	other := got
	other.Wave++
	is(t, s.SaveRollout(ctx, other, got, []fleet.Decision{decision}), ErrStale)
	if again, err := s.Decisions(ctx, "a-1"); err != nil || len(again) != 1 {
		t.Errorf("got %+v, %v", again, err)
	}
	// A second look at what is known reads no devices: they are the caller's.
	known := got
	known.Devices = known.Devices[:1]
	snap, err := s.Plans(ctx, []fleet.Rollout{known})
	must(t, err)
	if len(snap.Rollouts) != 1 || len(snap.Rollouts[0].Devices) != 1 {
		t.Errorf("got %+v", snap.Rollouts)
	}
	if snap, err = s.Plans(ctx, []fleet.Rollout{other}); err != nil || len(snap.Rollouts[0].Devices) != 2 {
		t.Errorf("got %+v, %v", snap.Rollouts, err)
	}
}

// Decisions are bounded; the first stays.
func TestDecisionsBounded(t *testing.T) {
	s, _ := fresh(t)
	ctx := t.Context()
	push(t, s, "digits", "d1")
	_, err := s.Apply(ctx, "user:op", parse(t, deployment("a", "digits", 1, "")), false)
	must(t, err)
	r, err := s.Rollout(ctx, "a-1")
	must(t, err)
	var decisions []fleet.Decision
	for i := range MaxDecisions + 10 {
		decisions = append(decisions, fleet.Decision{Kind: fleet.DecideAdmit, Reason: fmt.Sprint(i)})
	}
	must(t, s.SaveRollout(ctx, r, r, decisions))
	got, err := s.Decisions(ctx, "a-1")
	must(t, err)
	if len(got) != MaxDecisions || got[0].Reason != "0" || got[1].Reason != "11" || got[len(got)-1].Reason != fmt.Sprint(MaxDecisions+9) {
		t.Errorf("%d decisions, from %q, %q to %q", len(got), got[0].Reason, got[1].Reason, got[len(got)-1].Reason)
	}
}

func (s *Store) end(t *testing.T, id string, state fleet.State) {
	t.Helper()
	before, err := s.Rollout(t.Context(), id)
	must(t, err)
	after := before
	after.State, after.EndedAt = state, s.now()
	must(t, s.SaveRollout(t.Context(), before, after, nil))
}

// A rollout starts from the version that was proven; a changed document starts
// another one where the last did not get through, the same document none.
func TestRolloutStartsFromTheLastGood(t *testing.T) {
	s, _ := fresh(t)
	ctx := t.Context()
	for i := range 4 {
		push(t, s, "digits", fmt.Sprint("d", i+1))
	}
	push(t, s, "faces", "f1")
	apply := func(text, want string, from int64, fromModel string) {
		t.Helper()
		c, err := s.Apply(ctx, "user:op", parse(t, text), false)
		must(t, err)
		if c[0].Rollout != want {
			t.Fatalf("started %q, want %q", c[0].Rollout, want)
		}
		if want == "" {
			return
		}
		if r, err := s.Rollout(ctx, want); err != nil || r.From != from || r.FromModel != fromModel {
			t.Errorf("%s comes from %q %d, %v", want, r.FromModel, r.From, err)
		}
	}
	v := func(version int) string { return deployment("a", "digits", version, "") }
	patient := func(version int) string {
		return strings.Replace(v(version), "selector", "rollout: {maxFailed: 3}, selector", 1)
	}
	apply(v(1), "a-1", 0, "")
	s.end(t, "a-1", fleet.Succeeded)
	apply(v(2), "a-2", 1, "")
	s.end(t, "a-2", fleet.RolledBack)
	apply(v(2), "", 0, "")          // the same again
	apply(patient(2), "a-3", 1, "") // the same version, and another strategy
	apply(v(3), "a-4", 1, "")       // while that was on its way
	s.end(t, "a-4", fleet.Succeeded)
	apply(patient(3), "", 0, "")
	apply(v(4), "a-5", 3, "")
	s.end(t, "a-5", fleet.Succeeded)
	apply(deployment("a", "faces", 1, ""), "a-6", 4, "digits")
}

func TestControlRollout(t *testing.T) {
	s, _ := fresh(t)
	ctx := t.Context()
	push(t, s, "digits", "d1")
	_, err := s.Apply(ctx, "user:op", parse(t, deployment("a", "digits", 1, "")), false)
	must(t, err)
	r, err := s.ControlRollout(ctx, "user:op", "", "a", fleet.CommandPause, "lunch")
	must(t, err)
	if r.State != fleet.Paused || r.ID() != "a-1" {
		t.Errorf("got %+v", r)
	}
	_, err = s.ControlRollout(ctx, "user:op", "a-1", "", fleet.CommandPause, "")
	is(t, err, ErrState)
	_, err = s.ControlRollout(ctx, "user:op", "a-9", "", fleet.CommandPause, "")
	is(t, err, ErrNotFound)
	_, err = s.ControlRollout(ctx, "user:op", "", "b", fleet.CommandPause, "")
	is(t, err, ErrNotFound)
	_, err = s.ControlRollout(ctx, "user:op", "a-1", "", fleet.CommandAbort, "", func(fleet.Object) error { return errCrash })
	is(t, err, errCrash)
	decisions, err := s.Decisions(ctx, "a-1")
	if err != nil || len(decisions) != 1 || decisions[0].Kind != fleet.DecidePause || decisions[0].By != "user:op" || decisions[0].Reason != "lunch" {
		t.Errorf("got %+v, %v", decisions, err)
	}
	records, err := s.Audit(ctx, 1)
	if err != nil || records[0].Action != "rollout.pause" || records[0].Object != "rollout/a-1" || records[0].Reason != "lunch" || records[0].Before != "running" || records[0].After != "paused" {
		t.Errorf("got %+v, %v", records, err)
	}
	// An older one is history, and so is that of a deployment that is gone.
	push(t, s, "digits", "d2")
	_, err = s.Apply(ctx, "user:op", parse(t, deployment("a", "digits", 2, "")), false)
	must(t, err)
	_, err = s.ControlRollout(ctx, "user:op", "a-1", "", fleet.CommandResume, "")
	is(t, err, ErrState)
	_, err = s.Delete(ctx, "user:op", fleet.KindDeployment, "a")
	must(t, err)
	if r, err := s.Rollout(ctx, "a-2"); err != nil || r.State != fleet.Superseded {
		t.Errorf("got %+v, %v", r, err)
	}
	_, err = s.ControlRollout(ctx, "user:op", "", "a", fleet.CommandRollBack, "")
	is(t, err, ErrState)
}

func TestTallies(t *testing.T) {
	s, _ := fresh(t)
	ctx := t.Context()
	push(t, s, "digits", "d1")
	_, err := s.Apply(ctx, "user:op", parse(t, deployment("a", "digits", 1, "")), false)
	must(t, err)
	before, err := s.Rollout(ctx, "a-1")
	must(t, err)
	after := before
	after.Devices = []fleet.RolloutDevice{{Device: "x", Phase: fleet.DevicePending}}
	must(t, s.SaveRollout(ctx, before, after, nil))
	want := Tally{New: Count{Boot: "b", Last: fleet.Figures{Requests: 7, Latency: make(sketch.Counts, 128), Joules: 1.5, Energy: true}, Sum: fleet.Figures{Requests: 3}}}
	want.New.Last.Latency[127] = 4
	must(t, s.SaveTallies(ctx, 1, map[string]Tally{"x": want, "stranger": want}))
	got, err := s.Tallies(ctx, 1)
	if err != nil || len(got) != 1 || !reflect.DeepEqual(got["x"], want) {
		t.Errorf("got %+v, %v", got, err)
	}
	// They stay when the device's part changes, and go with it.
	before, after.Devices = after, []fleet.RolloutDevice{{Device: "x", Phase: fleet.DeviceReady}}
	must(t, s.SaveRollout(ctx, before, after, nil))
	if got, err = s.Tallies(ctx, 1); err != nil || len(got) != 1 {
		t.Errorf("got %+v, %v", got, err)
	}
	before, after.Devices = after, nil
	must(t, s.SaveRollout(ctx, before, after, nil))
	if got, err = s.Tallies(ctx, 1); err != nil || len(got) != 0 {
		t.Errorf("got %+v, %v", got, err)
	}
}

// Rollouts of a store from before rollouts had waves are read as ever.
func TestRolloutsOfOlderStore(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a.db")
	released := migrations
	defer func() { migrations = released }()
	migrations = released[:3]
	old := open(t, path, Options{})
	_, err := old.writer.Exec(`INSERT INTO rollouts (deployment, model, from_version, to_version, max_failed, deadline, state, reason, started_at, ended_at) VALUES
		('a', 'digits', 0, 1, 2, 3000000000, 2, 'all', 5, 6), ('a', 'digits', 1, 2, 2, 3000000000, 1, 'waits', 7, 0);
		INSERT INTO rollout_devices (rollout, device, phase, reason, bytes_present, bytes_total) VALUES (2, 'x', 2, '', 1, 9)`)
	must(t, err)
	must(t, old.Close())
	migrations = released
	s := open(t, path, Options{})
	all, err := s.Rollouts(t.Context(), "a", 10)
	must(t, err)
	want := fleet.Rollout{
		Number: 2, Deployment: "a", Model: "digits", From: 1, To: 2, Strategy: fleet.Strategy{MaxFailed: 2, Deadline: 3 * time.Second}, State: fleet.Running,
		Reason: "waits", StartedAt: time.Unix(0, 7).UTC(), Devices: []fleet.RolloutDevice{{Device: "x", Phase: fleet.DeviceWorking, BytesPresent: 1, BytesTotal: 9}},
	}
	if some, err := s.RolloutsWithin(t.Context(), "a", 10, 0); err != nil || len(some) != 2 || some[0].Devices != nil {
		t.Errorf("got %+v, %v", some, err)
	}
	if len(all) != 2 || all[1].State != fleet.Succeeded || !reflect.DeepEqual(all[0], want) {
		t.Errorf("got %+v\nwant %+v", all[0], want)
	}
	after := want
	after.State = fleet.Halted
	must(t, s.SaveRollout(t.Context(), all[0], after, nil))
}

// What many devices send is kept in one transaction, in order; what fails, fails
// alone.
func TestTake(t *testing.T) {
	var steps []string
	s := open(t, filepath.Join(t.TempDir(), "a.db"), Options{OnStep: func(step string) {
		if kind, ok := strings.CutPrefix(step, "after "); ok {
			steps = append(steps, kind)
		}
	}})
	ctx := t.Context()
	for _, d := range []string{"a", "b"} {
		join(t, s, d, nil)
	}
	steps = nil
	report := func(device, session string, n uint64) Inbound {
		return Inbound{Device: device, Report: &dunlinv1.Reported{Session: session, Sequence: n}}
	}
	in := []Inbound{
		{Device: "a", Hello: &dunlinv1.Hello{Session: "s1"}}, report("a", "s1", 1), report("a", "s1", 2), report("b", "s1", 1), // b did not say hello
		{Device: "stranger", Hello: &dunlinv1.Hello{Session: "s1"}}, {Device: "a", Events: &dunlinv1.EventBatch{OutboxId: "o", Events: events(1, 2)}},
		{Device: "a", Events: &dunlinv1.EventBatch{OutboxId: "o", Events: events(2, 3)}},
		{Device: "a", Hello: &dunlinv1.Hello{Session: "s2"}}, report("a", "s1", 3), report("a", "s2", 1),
		{Device: "a", Gone: &dunlinv1.Gone{Session: "s1"}}, {Device: "stranger", Events: &dunlinv1.EventBatch{OutboxId: "o", Events: events(1)}},
	}
	taken, err := s.Take(ctx, in)
	must(t, err)
	for i, want := range []error{nil, nil, nil, ErrStale, ErrNotFound, nil, nil, nil, ErrStale, nil, ErrStale, ErrNotFound} {
		if want == nil && taken[i].Err != nil || want != nil {
			is(t, taken[i].Err, want)
		}
	}
	if taken[5].Stored != 2 || taken[6].Stored != 3 || taken[7].Device.Session != "s2" {
		t.Errorf("got %+v", taken)
	}
	d, err := s.Device(ctx, "a")
	if err != nil || d.Session != "s2" || d.Reported.GetSequence() != 1 || !d.Connected {
		t.Errorf("got %+v, %v", d, err)
	}
	if got, err := s.Events(ctx, "a", 10); err != nil || len(got) != 3 {
		t.Errorf("got %+v, %v", got, err)
	}
	if len(steps) != 1 || steps[0] != "take" {
		t.Errorf("transactions: %q", steps)
	}
	// One that the database refuses does not take the others with it.
	steps = nil
	broken := &dunlinv1.Event{Sequence: 4, Kind: "profile.measured", Message: "\xff"} // not UTF-8: it cannot be encoded
	taken, err = s.Take(ctx, []Inbound{report("a", "s2", 2), {Device: "a", Events: &dunlinv1.EventBatch{OutboxId: "o", Events: []*dunlinv1.Event{broken}}}, report("a", "s2", 3)})
	must(t, err)
	if taken[0].Err != nil || taken[1].Err == nil || taken[2].Err != nil {
		t.Errorf("got %+v", taken)
	}
	if d, err := s.Device(ctx, "a"); err != nil || d.Reported.GetSequence() != 3 {
		t.Errorf("got %+v, %v", d, err)
	}
	// Of an older session none counts, be it the last of them or not.
	taken, err = s.Take(ctx, []Inbound{report("a", "s1", 7), report("a", "s1", 8), report("a", "s1", 9)})
	must(t, err)
	for _, one := range taken {
		is(t, one.Err, ErrStale)
	}
}

// A process that ends at any moment of a group of messages leaves all of it or
// nothing.
func TestTakeCrash(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "live.db")
	copies := map[string]string{}
	s := open(t, path, Options{OnStep: func(step string) {
		to := filepath.Join(dir, strings.ReplaceAll(step, " ", "-")+".db")
		for _, suffix := range []string{"", "-wal"} {
			b, err := os.ReadFile(path + suffix)
			if err != nil {
				t.Error(err)
				return
			}
			if err := os.WriteFile(to+suffix, b, 0o600); err != nil {
				t.Error(err)
			}
		}
		copies[step] = to
	}})
	join(t, s, "a", nil)
	_, err := s.Take(t.Context(), []Inbound{
		{Device: "a", Hello: &dunlinv1.Hello{Session: "s"}}, {Device: "a", Report: &dunlinv1.Reported{Session: "s", Sequence: 1}},
		{Device: "a", Events: &dunlinv1.EventBatch{OutboxId: "o", Events: events(1, 2)}},
	})
	must(t, err)
	for step, want := range map[string]int{"before take": 0, "after take": 2} {
		c := open(t, copies[step], Options{})
		got, err := c.Events(t.Context(), "a", 10)
		must(t, err)
		d, err := c.Device(t.Context(), "a")
		must(t, err)
		if len(got) != want || d.Connected != (want > 0) || (d.Reported != nil) != (want > 0) {
			t.Errorf("%s: %d events, %+v", step, len(got), d)
		}
	}
}
