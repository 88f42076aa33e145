package dispatch

import (
	"context"
	"fmt"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/dunlin/dunlin/controller/fleet"
	"github.com/dunlin/dunlin/controller/store"
	"github.com/dunlin/dunlin/internal/link"
	"github.com/dunlin/dunlin/internal/sketch"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// obedient makes the bus's devices do as they are told, at once. refuses says
// of a version whether a device quarantines it.
type obedient struct {
	w        *world
	session  string
	mu       sync.Mutex
	sequence map[string]uint64
	has      map[string][]int64 // versions that each device was told to serve, in order
	refuses  func(device string, version int64) bool
}

func (w *world) obey(session string, refuses func(device string, version int64) bool) *obedient {
	o := &obedient{w: w, session: session, sequence: map[string]uint64{}, has: map[string][]int64{}, refuses: refuses}
	w.bus.mu.Lock()
	defer w.bus.mu.Unlock()
	w.bus.onPublish = o.told
	return o
}

func (o *obedient) told(in message) {
	var m dunlinv1.Desired
	var doc dunlinv1.DesiredDocument
	if in.kind != link.Desired || proto.Unmarshal(in.payload, &m) != nil || proto.Unmarshal(m.Document, &doc) != nil {
		return
	}
	r := &dunlinv1.Reported{Session: o.session, Observed: m.Generation}
	o.mu.Lock()
	for _, v := range doc.Versions {
		if had := o.has[in.device]; len(had) == 0 || had[len(had)-1] != v.Version {
			o.has[in.device] = append(had, v.Version)
		}
		s := &dunlinv1.VersionStatus{Model: v.Model, Version: v.Version, Digest: v.Digest, State: dunlinv1.VersionState_VERSION_STATE_RESIDENT, Serving: true}
		if o.refuses != nil && o.refuses(in.device, v.Version) {
			s.State, s.Serving, s.Reason = dunlinv1.VersionState_VERSION_STATE_QUARANTINED, false, "its outputs differ"
		}
		r.Versions = append(r.Versions, s)
	}
	o.sequence[in.device]++
	r.Sequence = o.sequence[in.device]
	o.mu.Unlock()
	payload, err := proto.Marshal(r)
	if err != nil {
		o.w.t.Error(err)
		return
	}
	// Handle may block; the planner, which publishes, must not wait for it.
	go o.w.d.Handle(link.Up(in.device, link.Reported), payload)
}

// served gives the versions that a device was told to serve, in order.
func (o *obedient) served(device string) []int64 {
	o.mu.Lock()
	defer o.mu.Unlock()
	return slices.Clone(o.has[device])
}

func (w *world) applyWaves(version int, rollout string) string {
	w.t.Helper()
	return w.apply("digits", version, rollout)
}

func (w *world) devices(n int) (names []string) {
	w.t.Helper()
	for i := range n {
		name := fmt.Sprintf("d%d", i)
		names = append(names, name)
		w.join(name)
		w.hello(name, "s1", nil)
	}
	return names
}

func (w *world) command(id string, c fleet.Command) {
	w.t.Helper()
	_, err := w.store.ControlRollout(w.t.Context(), "user:test", id, "", c, "")
	w.must(err)
	w.d.Replan()
}

func kinds(decisions []fleet.Decision) string {
	var all []string
	for _, d := range decisions {
		all = append(all, string(d.Kind))
	}
	return strings.Join(all, ", ")
}

// Devices are given the version wave by wave, an operator holds and takes on,
// and each decision is kept.
func TestWaveByWave(t *testing.T) {
	w := fresh(t, fast)
	w.push("digits")
	w.push("digits")
	o := w.obey("s1", nil)
	names := w.devices(5)
	w.rollout(w.apply("digits", 1), ended(fleet.Succeeded))

	id := w.applyWaves(2, "waves: [{count: 1}, {count: 3}], soak: 1h")
	r := w.rollout(id, func(r fleet.Rollout) bool { return !r.WaveReadyAt.IsZero() })
	given := func() (n int) {
		for _, name := range names {
			if told := o.served(name); told[len(told)-1] == 2 {
				n++
			}
		}
		return n
	}
	if r.Wave != 1 || given() != 1 || !strings.Contains(r.Reason, "soaks until") {
		t.Errorf("%d devices are given it, %+v", given(), r)
	}
	w.command(id, fleet.CommandPause)
	w.command(id, fleet.CommandPromote)
	r = w.rollout(id, func(r fleet.Rollout) bool { return r.Wave == 2 && !r.WaveReadyAt.IsZero() })
	if given() != 3 {
		t.Errorf("%d devices are given it, %+v", given(), r)
	}
	w.command(id, fleet.CommandPromote)
	w.rollout(id, func(r fleet.Rollout) bool { return r.Wave == 3 && !r.WaveReadyAt.IsZero() })
	// One that joins now is given what all get in the end.
	w.join("late")
	w.hello("late", "s1", nil)
	w.desired("late", 0, hasVersion("digits", 2))
	w.command(id, fleet.CommandPromote)
	w.rollout(id, ended(fleet.Succeeded))
	if given() != 5 {
		t.Errorf("%d devices are given it", given())
	}
	decisions, err := w.store.Decisions(t.Context(), id)
	w.must(err)
	if got := kinds(decisions); !strings.HasPrefix(got, "start, admit, pause, promote, pass, admit, promote, pass, admit") || !strings.HasSuffix(got, "promote, succeed") {
		t.Errorf("decided %s", got)
	}
	for _, name := range names {
		if got := o.served(name); !slices.Equal(got, []int64{1, 2}) {
			t.Errorf("%s was told to serve %v", name, got)
		}
	}
}

// A canary that refuses the version keeps it from all others, and goes back.
func TestRefusedByCanary(t *testing.T) {
	w := fresh(t, fast)
	w.push("digits")
	w.push("digits")
	o := w.obey("s1", func(_ string, version int64) bool { return version == 2 })
	names := w.devices(4)
	w.rollout(w.apply("digits", 1), ended(fleet.Succeeded))
	id := w.applyWaves(2, "waves: [{canary: 1}]")
	r := w.rollout(id, ended(fleet.RolledBack))
	if !strings.Contains(r.Reason, "its outputs differ") {
		t.Error(r.Reason)
	}
	canaries := 0
	for _, name := range names {
		switch got := o.served(name); {
		case slices.Equal(got, []int64{1, 2, 1}):
			canaries++
		case !slices.Equal(got, []int64{1}):
			t.Errorf("%s was told to serve %v", name, got)
		}
	}
	if canaries != 1 {
		t.Errorf("%d canaries", canaries)
	}
	// One that joins later gets the version that all have.
	w.join("late")
	w.hello("late", "s1", nil)
	w.desired("late", 0, hasVersion("digits", 1))
}

// A freeze keeps changes away, and what has begun goes back all the same.
func TestFreeze(t *testing.T) {
	w := fresh(t, fast)
	w.push("digits")
	w.push("digits")
	o := w.obey("s1", nil)
	w.devices(2)
	w.rollout(w.apply("digits", 1), ended(fleet.Succeeded))
	objects, err := fleet.Parse("apiVersion: dunlin/v1\nkind: Freeze\nmetadata: {name: fair}\nspec: {selector: {}, reason: trade fair}")
	w.must(err)
	_, err = w.store.Apply(t.Context(), "user:test", objects, false)
	w.must(err)
	id := w.applyWaves(2, "waves: [{count: 1}]")
	r := w.rollout(id, func(r fleet.Rollout) bool { return len(r.Devices) == 2 && strings.Contains(r.Reason, "trade fair") })
	if r.State != fleet.Running || slices.Contains(o.served("d0"), 2) || slices.Contains(o.served("d1"), 2) {
		t.Errorf("got %+v", r)
	}
	_, err = w.store.Delete(t.Context(), "user:test", fleet.KindFreeze, "fair")
	w.must(err)
	w.d.Replan()
	w.rollout(id, ended(fleet.Succeeded))
}

// telemetry sends figures as an agent counts them: since its start.
func (w *world) figures(device, boot string, versions map[int64][2]uint64) {
	w.t.Helper()
	m := &dunlinv1.Telemetry{BootId: boot}
	for version, n := range versions {
		latency := make(sketch.Counts, sketch.Latency.Buckets())
		latency[40] = n[0]
		m.Models = append(m.Models, &dunlinv1.ModelTelemetry{Model: "digits", Version: version, Succeeded: n[0], Failed: n[1], Figures: &dunlinv1.VersionFigures{Rows: n[0], Latency: latency.Proto()}})
	}
	w.up(device, link.Telemetry, m)
}

func leased(m message, device string) bool {
	return isCommand(m, device, func(c *dunlinv1.Command) bool { return c.GetTelemetryLease().GetForMs() > 0 })
}

// A version that serves, and fails, is found out by its figures in the canary
// wave: the fleet goes back, and the record says why.
func TestRolledBackByFigures(t *testing.T) {
	w := fresh(t, fast)
	w.push("digits")
	w.push("digits")
	o := w.obey("s1", nil)
	names := w.devices(3)
	w.rollout(w.apply("digits", 1), ended(fleet.Succeeded))
	id := w.applyWaves(2, "waves: [{canary: 1}], soak: 1h, minSample: 100, gates: {errorRate: 0.05}")
	var canary string
	w.rollout(id, func(r fleet.Rollout) bool {
		for _, d := range r.Devices {
			if !d.AdmittedAt.IsZero() {
				canary = d.Device
			}
		}
		return canary != ""
	})
	for _, name := range names {
		w.bus.wait(t, "lease of "+name, 0, func(m message) bool { return leased(m, name) })
	}
	n := uint64(0)
	waitFor(t, func() bool {
		n += 50
		for _, name := range names {
			if name == canary {
				w.figures(name, "b", map[int64][2]uint64{1: {1000, 0}, 2: {n, n}}) // half of them fail
			} else {
				w.figures(name, "b", map[int64][2]uint64{1: {1000 + n, 0}})
			}
		}
		r, err := w.store.Rollout(t.Context(), id)
		return err == nil && r.State == fleet.RolledBack
	}, "rolled back")
	decisions, err := w.store.Decisions(t.Context(), id)
	w.must(err)
	if got := kinds(decisions); got != "start, admit, roll back" {
		t.Errorf("decided %s", got)
	}
	last := decisions[len(decisions)-1]
	if last.By != "gate" || len(last.Gates) != 1 || last.Gates[0].Verdict != fleet.FailedGate || last.Gates[0].New == nil || *last.Gates[0].New < 0.4 || last.Gates[0].OldSamples == 0 || last.DeviceCount != 1 {
		t.Errorf("got %+v", last)
	}
	for _, name := range names {
		if got := o.served(name); name == canary != slices.Equal(got, []int64{1, 2, 1}) {
			t.Errorf("%s was told to serve %v", name, got)
		}
	}
}

// After a halt only what comes after the operator went on counts, not what the
// devices counted while nobody asked for it.
func TestResumedFigures(t *testing.T) {
	w := fresh(t, fast)
	w.push("digits")
	w.push("digits")
	w.obey("s1", nil)
	names := w.devices(3)
	w.rollout(w.apply("digits", 1), ended(fleet.Succeeded))
	id := w.applyWaves(2, "waves: [{canary: 1}], soak: 1h, minSample: 100, gates: {errorRate: 0.05}, onFailure: halt")
	var canary string
	first := w.rollout(id, func(r fleet.Rollout) bool {
		for _, d := range r.Devices {
			if d.Phase == fleet.DeviceReady {
				canary = d.Device
			}
		}
		return canary != ""
	})
	good, bad := uint64(0), uint64(0)
	send := func() {
		for _, name := range names {
			if name == canary {
				w.figures(name, "b", map[int64][2]uint64{1: {1000, 0}, 2: {good, bad}})
			} else {
				w.figures(name, "b", map[int64][2]uint64{1: {1000 + good, 0}})
			}
		}
	}
	waitFor(t, func() bool {
		good, bad = good+50, bad+50
		send()
		r, err := w.store.Rollout(t.Context(), id)
		return err == nil && r.State == fleet.Halted
	}, "halted")
	last := func() fleet.Figures {
		w.d.mu.Lock()
		defer w.d.mu.Unlock()
		return w.d.figures[first.Number].devices[canary].New.Last
	}
	waitFor(t, func() bool { return last().Requests == good+bad }, "all samples are taken in")
	bad += 100_000 // while it was halted
	w.command(id, fleet.CommandResume)
	w.rollout(id, func(r fleet.Rollout) bool { return r.State == fleet.Running && !r.Anew })
	send()
	waitFor(t, func() bool { return last().Requests == good+bad }, "the first sample after it")
	waitFor(t, func() bool {
		good += 50
		send()
		r, err := w.store.Rollout(t.Context(), id)
		w.must(err)
		if r.State != fleet.Running {
			t.Fatalf("it is %s: %s", r.State, r.Reason)
		}
		return len(r.Gates) == 1 && r.Gates[0].Verdict == fleet.Passed
	}, "passed")
}

// A device of which something is heard each time that it is read is not taken
// for one that is gone: a controller that starts while all devices say hello
// keeps to what it gave them.
func TestHeardWhileRead(t *testing.T) {
	w := fresh(t, fast)
	w.push("digits")
	w.push("digits")
	w.obey("s1", nil)
	w.devices(2)
	w.rollout(w.apply("digits", 1), ended(fleet.Succeeded))
	id := w.applyWaves(2, "waves: [{count: 1}], soak: 1h")
	r := w.rollout(id, func(r fleet.Rollout) bool { return !r.WaveReadyAt.IsZero() })
	w.stop()
	s, err := store.Open(t.Context(), w.path, store.Options{})
	w.must(err)
	defer s.Close()
	d := New(Config{Store: s, Bus: newRecorder(), Log: slog.New(slog.DiscardHandler)})
	for range 2 { // the second time after an error
		for _, part := range r.Devices {
			d.view.changed[part.Device] = math.MaxUint64 // that is: after anything is read
		}
		d.planner.loaded = false
		_, err = d.pass(t.Context())
		w.must(err)
	}
	after, err := s.Rollout(t.Context(), id)
	w.must(err)
	if len(after.Devices) != len(r.Devices) {
		t.Fatalf("of %+v are left %+v", r.Devices, after.Devices)
	}
	for i, part := range after.Devices {
		if !part.AdmittedAt.Equal(r.Devices[i].AdmittedAt) || part.Wave != r.Devices[i].Wave {
			t.Errorf("%+v became %+v", r.Devices[i], part)
		}
	}
}

// A lease is renewed while it is needed, and asked for anew when the device
// connects again.
func TestLease(t *testing.T) {
	w := fresh(t, fast)
	w.push("digits")
	w.push("digits")
	w.obey("s1", nil)
	w.devices(2)
	w.rollout(w.apply("digits", 1), ended(fleet.Succeeded))
	w.applyWaves(2, "waves: [{canary: 1}], soak: 1h, minSample: 100, gates: {errorRate: 0.05}")
	_, at := w.bus.wait(t, "lease", 0, func(m message) bool { return leased(m, "d0") })
	w.hello("d0", "s1", nil)
	_, at = w.bus.wait(t, "lease after hello", at, func(m message) bool { return leased(m, "d0") })
	w.d.mu.Lock()
	w.d.live["d0"].leased = time.Now().Add(leaseRenew - time.Second)
	w.d.mu.Unlock()
	w.bus.wait(t, "renewed lease", at, func(m message) bool { return leased(m, "d0") })
}

func sum(f fleet.Figures) [2]uint64 { return [2]uint64{f.Requests, f.Failures} }

// What devices count is taken in exactly once, whatever comes between: a
// controller that was killed goes on from what it kept, and a device that was
// started anew counts from zero.
func TestFiguresCountOnce(t *testing.T) {
	w := fresh(t, fast)
	w.push("digits")
	w.push("digits")
	w.obey("s1", nil)
	w.devices(2)
	w.rollout(w.apply("digits", 1), ended(fleet.Succeeded))
	id := w.applyWaves(2, "waves: [{count: 1}], soak: 1h, minSample: 1000, gates: {errorRate: 0.05}")
	var given, other string
	r := w.rollout(id, func(r fleet.Rollout) bool { return !r.WaveReadyAt.IsZero() })
	for _, d := range r.Devices {
		if given = d.Device; !d.AdmittedAt.IsZero() {
			break
		}
	}
	other = map[string]string{"d0": "d1", "d1": "d0"}[given]
	kept := func(device string, want store.Tally) {
		t.Helper()
		var got store.Tally
		waitFor(t, func() bool {
			all, err := w.store.Tallies(t.Context(), r.Number)
			got = all[device]
			return err == nil && sum(got.New.Sum) == sum(want.New.Sum) && sum(got.Old.Sum) == sum(want.Old.Sum)
		}, "figures of %s: %v and %v", device, sum(want.New.Sum), sum(want.Old.Sum))
	}
	figures := func(n, failed uint64) fleet.Figures { return fleet.Figures{Requests: n, Failures: failed} }
	watched := func() {
		t.Helper()
		waitFor(t, func() bool {
			w.d.mu.Lock()
			defer w.d.mu.Unlock()
			return w.d.figures[r.Number] != nil && len(w.d.figures[r.Number].devices) == 2
		}, "both devices are watched")
	}
	watched()
	// The first sample is only what later ones are counted from.
	w.figures(given, "b1", map[int64][2]uint64{1: {500, 0}, 2: {10, 0}})
	w.figures(other, "b1", map[int64][2]uint64{1: {500, 9}})
	w.figures(given, "b1", map[int64][2]uint64{1: {900, 0}, 2: {14, 3}}) // of the old one no more counts here
	w.figures(other, "b1", map[int64][2]uint64{1: {520, 10}})
	kept(given, store.Tally{New: store.Count{Sum: figures(7, 3)}})
	kept(other, store.Tally{Old: store.Count{Sum: figures(21, 1)}})

	w.stop()
	w = start(t, w.path, fast)
	w.obey("s2", nil)
	for _, name := range []string{"d0", "d1"} {
		w.hello(name, "s2", nil)
	}
	watched()
	w.figures(given, "b1", map[int64][2]uint64{1: {900, 0}, 2: {14, 3}}) // the same sample again
	w.figures(given, "b1", map[int64][2]uint64{1: {900, 0}, 2: {20, 3}})
	kept(given, store.Tally{New: store.Count{Sum: figures(13, 3)}})
	w.figures(given, "b2", map[int64][2]uint64{2: {5, 1}}) // started anew
	w.figures(given, "b2", map[int64][2]uint64{2: {5, 1}})
	kept(given, store.Tally{New: store.Count{Sum: figures(19, 4)}})
	w.up(given, link.Telemetry, &dunlinv1.Telemetry{BootId: "b2", Models: []*dunlinv1.ModelTelemetry{{Model: "digits", Version: 2, Succeeded: 900}}}) // without figures
	w.figures(given, "b2", map[int64][2]uint64{2: {6, 1}})
	kept(given, store.Tally{New: store.Count{Sum: figures(20, 4)}})
	w.up(given, link.Telemetry, &dunlinv1.Telemetry{BootId: "b2", Models: []*dunlinv1.ModelTelemetry{ // no room for all figures
		{Model: "digits", Version: 1, Succeeded: 900, Figures: &dunlinv1.VersionFigures{}}, {Model: "digits", Version: 2, Succeeded: 6, Failed: 1},
	}})
	w.figures(given, "b2", map[int64][2]uint64{2: {7, 1}})
	kept(given, store.Tally{New: store.Count{Sum: figures(21, 4)}})
}

// What a controller had kept when it ended, at any step, is enough for the next
// one to bring the rollout to its end.
func TestKilledBetweenSteps(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "live.db")
	var mu sync.Mutex
	copies := map[string]string{}
	var order []string
	keep := func(step string) {
		if step != "after apply" && step != "after rollout" && step != "after desired" {
			return
		}
		mu.Lock()
		defer mu.Unlock()
		name := fmt.Sprintf("%02d %s", len(order), step)
		to := filepath.Join(dir, strings.ReplaceAll(name, " ", "-")+".db")
		for _, suffix := range []string{"", "-wal"} {
			b, err := os.ReadFile(path + suffix)
			if err == nil {
				err = os.WriteFile(to+suffix, b, 0o600)
			}
			if err != nil {
				t.Error(err)
			}
		}
		order, copies[name] = append(order, name), to
	}
	var on func(string)
	s, err := store.Open(t.Context(), path, store.Options{OnStep: func(step string) {
		mu.Lock()
		do := on
		mu.Unlock()
		if do != nil {
			do(step)
		}
	}})
	if err != nil {
		t.Fatal(err)
	}
	w := &world{t: t, path: path, store: s, bus: newRecorder()}
	w.run(fast)
	w.push("digits")
	w.push("digits")
	w.obey("s1", nil)
	w.devices(3)
	w.rollout(w.apply("digits", 1), ended(fleet.Succeeded))
	mu.Lock()
	on = keep
	mu.Unlock()
	const waves = "waves: [{count: 1}, {count: 2}]"
	id := w.applyWaves(2, waves)
	w.rollout(id, ended(fleet.Succeeded))
	w.stop()
	if len(order) < 8 {
		t.Fatalf("steps: %q", order)
	}
	for _, name := range order {
		next := start(t, copies[name], fast)
		next.obey("s2", nil)
		for i := range 3 {
			next.hello(fmt.Sprintf("d%d", i), "s2", nil)
		}
		r := next.rollout(id, func(r fleet.Rollout) bool { return r.State.Ended() })
		if r.State != fleet.Succeeded {
			t.Errorf("killed %s: %+v", name, r)
		}
		decisions, err := next.store.Decisions(t.Context(), id)
		next.must(err)
		if got := kinds(decisions); !strings.HasPrefix(got, "start, admit") || strings.Count(got, "start") != 1 || strings.Count(got, "succeed") != 1 || strings.Count(got, "pass") != 2 {
			t.Errorf("killed %s: decided %s", name, got)
		}
		next.stop()
	}
}

// A device that does not do as its document says is shown, with since when, and
// no more once it does.
func TestDrift(t *testing.T) {
	w := fresh(t, fast)
	w.push("digits")
	w.devices(1)
	w.apply("digits", 1)
	m, _ := w.desired("d0", 0, hasVersion("digits", 1))
	report := func(n uint64, r *dunlinv1.Reported) {
		r.Session, r.Sequence, r.Observed = "s1", n, m.Generation
		w.up("d0", link.Reported, r)
	}
	has := func(want string) {
		t.Helper()
		var got []string
		defer func() {
			if t.Failed() {
				t.Logf("the drift is %q", got)
			}
		}()
		waitFor(t, func() bool {
			got = nil
			for _, one := range w.d.Drifts()["d0"] {
				got = append(got, one.GetKind()+" "+one.GetSubject())
			}
			return strings.Join(got, ", ") == want
		}, "drift %q", want)
	}
	report(1, &dunlinv1.Reported{Drifts: []*dunlinv1.Drift{{Kind: "file", Subject: "digits:1 model.onnx", Repair: "fetched again"}, {Kind: "odd"}}})
	has("file digits:1 model.onnx, odd ")
	waitFor(t, func() bool { return gauge(t, w, "file") == 1 }, "one file that drifts in the metrics")
	waitFor(t, func() bool { return gauge(t, w, "other") == 1 }, "one other that drifts in the metrics")
	// It has had its document for longer than the grace, once that was noticed.
	report(2, &dunlinv1.Reported{})
	looks := 0
	waitFor(t, func() bool {
		if looks++; looks%100 == 1 {
			w.ahead.Add(int64(fleet.DriftGrace + 2*time.Second))
			w.d.wake()
		}
		d := w.d.Drifts()["d0"]
		return len(d) == 1 && d[0].GetKind() == "version" && d[0].GetSubject() == "digits:1"
	}, "a version that is not there")
	since := w.d.Drifts()["d0"][0].GetSince().AsTime()
	report(3, &dunlinv1.Reported{Versions: []*dunlinv1.VersionStatus{{Model: "digits", Version: 1, State: dunlinv1.VersionState_VERSION_STATE_ABSENT, BytesPresent: 5, BytesTotal: 10}}})
	waitFor(t, func() bool {
		d := w.d.Drifts()["d0"]
		return len(d) == 1 && strings.Contains(d[0].GetHave(), "5 B of 10 B") && d[0].GetSince().AsTime().Equal(since)
	}, "how far it is, since the same time")
	report(4, &dunlinv1.Reported{Versions: []*dunlinv1.VersionStatus{{Model: "digits", Version: 1, State: dunlinv1.VersionState_VERSION_STATE_RESIDENT, Serving: true}}})
	has("")
	waitFor(t, func() bool { return gauge(t, w, "version")+gauge(t, w, "file")+gauge(t, w, "other") == 0 }, "no drift in the metrics")
}

func gauge(t *testing.T, w *world, kind string) float64 {
	t.Helper()
	families, err := w.metrics.Gather()
	w.must(err)
	for _, f := range families {
		for _, m := range f.GetMetric() {
			if f.GetName() == "dunlin_controller_drift" && m.GetLabel()[0].GetValue() == kind {
				return m.GetGauge().GetValue()
			}
		}
	}
	return 0
}

// run starts a dispatcher on the world's store.
func (w *world) run(timing timing) {
	w.t.Helper()
	c := Config{Store: w.store, Bus: w.bus, Log: slog.New(slog.NewTextHandler(w.t.Output(), &slog.HandlerOptions{Level: slog.LevelError}))}
	if w.metrics != nil {
		c.Metrics = w.metrics
	}
	w.d = New(c)
	w.d.timing = timing
	w.d.now = func() time.Time { return time.Now().Add(time.Duration(w.ahead.Load())) }
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- w.d.Run(ctx) }()
	w.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			w.t.Error(err)
		}
		if err := w.store.Close(); err != nil {
			w.t.Error(err)
		}
	})
	w.t.Cleanup(w.stop)
}
