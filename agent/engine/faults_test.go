package engine

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/dunlin/dunlin/models/serving"
)

func needs(n ...Need) func(int) Need { return func(i int) Need { return n[i] } }

// Hungry version; room made for its workspace is refilled by ahead().
func TestHungryLivelock(t *testing.T) {
	c := newCrowd(t, 2, 250, needs(Need{Weights: 100, Workspace: 60}, Need{Weights: 100, Workspace: 10}), time.Millisecond, quick)
	if c.version(0).home.residency != resident || c.version(1).home.residency != resident {
		t.Fatal("both should be in")
	}
	in := c.in
	r := c.ask(2*time.Second, 0)
	c.run(62 * time.Second)
	if c.answers[r] != 1 {
		t.Errorf("not answered within a minute; weights came in %d times\n%s", c.in-in, c)
	} else {
		t.Log(r.err, r.run.started-r.arrived, c.in-in)
	}
}

// Hungry V, busy B.
func TestHungryStarves(t *testing.T) {
	for _, order := range [][2]int{{0, 1}, {1, 0}} {
		n := []Need{{Weights: 100, Workspace: 60}, {Weights: 100, Workspace: 10}}
		hungry, busy := order[0], order[1]
		c := newCrowd(t, 2, 250, func(i int) Need { return n[order[i]] }, time.Millisecond, func(*run) time.Duration { return 10 * time.Millisecond })
		for i := range 6000 {
			c.ask(2*time.Second+time.Duration(i)*9*time.Millisecond, busy)
		}
		r := c.ask(3*time.Second, hungry)
		c.run(50 * time.Second)
		if c.answers[r] != 1 {
			t.Errorf("%v: not answered after 47 s\n%s", order, c)
		} else {
			t.Log(order, r.err, r.run.started-r.arrived)
		}
	}
}

// A pinned version that is busy keeps a request from its workspace.
func TestPinnedBusy(t *testing.T) {
	c := newCrowd(t, 0, 250, nil, time.Millisecond, func(*run) time.Duration { return 10 * time.Millisecond })
	c.ids = []VersionID{{Model: "a", Version: 1}, {Model: "p", Version: 1}}
	c.add(c.ids[1], serving.Options{Pinned: true}, Need{Weights: 100, Workspace: 10})
	c.run(1100 * time.Millisecond)
	c.add(c.ids[0], serving.Options{}, Need{Weights: 100, Workspace: 50})
	c.run(1500 * time.Millisecond)
	for i := range 6000 {
		c.ask(2*time.Second+time.Duration(i)*9*time.Millisecond, 1)
	}
	r := c.ask(3*time.Second, 0)
	c.run(50 * time.Second)
	if c.answers[r] != 1 {
		t.Errorf("not answered after 47 s\n%s", c)
	} else {
		t.Log(r.err, r.run.started-r.arrived)
	}
}

// Unload hangs when the last requests of a draining version that is out are refused in claimant.
func TestUnloadHangs(t *testing.T) {
	c := newCrowd(t, 2, 150, simpleNeed, time.Millisecond, func(*run) time.Duration { return 100 * time.Millisecond })
	busy, target := 0, 1
	if c.version(1).home.residency == resident {
		busy, target = 1, 0
	}
	for i := range 10 {
		c.ask(2*time.Second+time.Duration(i), busy)
	}
	r := c.ask(2*time.Second+10*time.Millisecond, target)
	call := newCall()
	c.at(2*time.Second+11*time.Millisecond, func() event { return drain{call, c.ids[target], false} })
	c.moved = nil
	c.at(2*time.Second+12*time.Millisecond, func() event { return setMemory{100} })
	c.run(10 * time.Minute)
	if !errors.Is(r.err, ErrTooLarge) {
		t.Fatal(r.err)
	}
	select {
	case <-call.answer:
	default:
		t.Errorf("Unload has not returned after ten minutes\n%s", c)
	}
}

// A second instance's run that finds the version gone is not retried.
func TestNotLoadedTwoInstances(t *testing.T) {
	c := newCrowd(t, 0, 1000, nil, time.Millisecond, func(*run) time.Duration { return 10 * time.Millisecond })
	c.ids = []VersionID{{Model: "a", Version: 1}}
	c.add(c.ids[0], serving.Options{Instances: 2}, simpleNeed(0))
	c.run(1500 * time.Millisecond)
	gone := true
	c.ends = func(*run) error {
		if gone {
			return ErrNotLoaded
		}
		return nil
	}
	c.moved = func(f effect) {
		if _, ok := f.(startActivate); ok {
			gone = false
		}
	}
	a, b := c.ask(2*time.Second, 0), c.ask(2*time.Second, 0)
	c.at(2*time.Second+10*time.Millisecond+1, func() event { gone = false; return nil })
	calls := 0
	c.ends = func(*run) error {
		if calls++; calls <= 2 {
			return ErrNotLoaded
		}
		return nil
	}
	c.run(10 * time.Second)
	if a.err != nil || b.err != nil {
		t.Errorf("%v; %v", a.err, b.err)
	}
}

// Two instances, a session that has run out of memory is never closed.
func TestOOMTwoInstances(t *testing.T) {
	c := newCrowd(t, 0, 100000, nil, time.Millisecond, func(*run) time.Duration { return 10 * time.Millisecond })
	c.ids = []VersionID{{Model: "a", Version: 1}}
	c.add(c.ids[0], serving.Options{Instances: 2}, simpleNeed(0))
	c.run(1500 * time.Millisecond)
	broken := true // as worker.version.failure is after a death, until it is activated again
	c.ends = func(*run) error {
		if broken {
			return ErrOutOfMemory
		}
		return nil
	}
	c.moved = func(f effect) {
		if _, ok := f.(startActivate); ok {
			broken = false
		}
	}
	var all []*request
	for i := range 20 {
		all = append(all, c.ask(2*time.Second+time.Duration(i)*5*time.Millisecond, 0))
	}
	c.run(10 * time.Second)
	bad := 0
	for _, r := range all {
		if r.err != nil {
			bad++
		}
	}
	if bad > 0 || len(c.version(0).home.swaps.Out) == 0 {
		t.Errorf("%d of %d requests failed; left %v", bad, len(all), c.version(0).home.swaps.Out)
	}
}

// One OOM at activation makes a model too large for ever.
func TestOOMForEver(t *testing.T) {
	c := newCrowd(t, 2, 150, simpleNeed, time.Millisecond, quick)
	target := 0
	if c.version(0).home.residency == resident {
		target = 1
	}
	once := true
	c.failing = func() error {
		if once {
			once = false
			return ErrOutOfMemory
		}
		return nil
	}
	first := c.ask(2*time.Second, target)
	later := c.ask(2*time.Second+time.Hour, target)
	c.run(3 * time.Hour)
	if first.err != nil || later.err != nil {
		t.Errorf("%v\n an hour later: %v", first.err, later.err)
	}
}

// Runs that find too little memory for a while.
func TestRunOOMForEver(t *testing.T) {
	c := newCrowd(t, 1, 1000, simpleNeed, time.Millisecond, quick)
	c.ends = func(r *run) error {
		if r.started < 12*time.Second {
			return ErrOutOfMemory
		}
		return nil
	}
	for i := range 10 {
		c.ask(2*time.Second+time.Duration(i)*time.Second, 0)
	}
	later := c.ask(time.Hour, 0)
	c.run(3 * time.Hour)
	if later.err != nil {
		t.Errorf("an hour later: %v", later.err)
	}
}

// The second try after too little memory does not wait for those that make room.
func TestOOMRetryTooSoon(t *testing.T) {
	c := newCrowd(t, 4, 1000, simpleNeed, 10*time.Millisecond, quick)
	// 0 leaves by a budget, comes back later: simply fail its next activation.
	c.version(0).home.residency = out
	c.core.charge(c.version(0), 0)
	leaving2 := 0
	once := true
	c.failing = func() error {
		if once {
			once = false
			return ErrOutOfMemory
		}
		return nil
	}
	n := 0
	c.moved = func(f effect) {
		if f, ok := f.(startActivate); ok && f.version == c.core.versions[c.ids[0]] {
			if n++; n == 2 {
				for _, v := range c.core.versions {
					if v.home.residency == leaving {
						leaving2++
					}
				}
			}
		}
	}
	c.ask(2*time.Second, 0)
	c.run(3 * time.Second)
	if leaving2 > 0 {
		t.Errorf("it is activated again while %d that make room for it are still leaving", leaving2)
	}
}

// A request whose time-out has moved it behind others starves across versions.
func TestDelayStarves(t *testing.T) {
	c := newCrowd(t, 1, 150, simpleNeed, time.Millisecond, func(*run) time.Duration { return 10 * time.Millisecond })
	id := VersionID{Model: "patient", Version: 1}
	c.ids = append(c.ids, id)
	o := serving.Options{}
	o.Queue.Timeout, o.Queue.Delay = 10*time.Millisecond, true
	c.add(id, o, simpleNeed(0))
	for i := range 6000 {
		c.ask(2*time.Second+time.Duration(i)*9*time.Millisecond, 0)
	}
	r := c.ask(3*time.Second, 1)
	c.run(50 * time.Second)
	if c.answers[r] != 1 {
		t.Errorf("not answered after 47 s\n%s", c)
	} else {
		t.Log(r.err, r.run.started-r.arrived)
	}
}

// A failed unload wakes nobody.
func TestFailedUnload(t *testing.T) {
	c := newCrowd(t, 2, 150, simpleNeed, time.Millisecond, quick)
	in, target := 0, 1
	if c.version(1).home.residency == resident {
		in, target = 1, 0
	}
	c.now = 2 * time.Second
	v := c.version(in)
	call := newCall()
	// by hand: the unloading takes a second, and fails
	c.core.step(drain{call, c.ids[in], false}, start.Add(c.now))
	if v.phase != unloading {
		t.Fatal(v.phase)
	}
	r := c.ask(2*time.Second+10*time.Millisecond, target)
	c.at(3*time.Second, func() event { return unloaded{c.ids[in], errors.New("broken")} })
	c.run(10 * time.Minute)
	if c.answers[r] != 1 {
		t.Errorf("not answered after ten minutes\n%s", c)
	}
}

// Replace of a pinned version.
func TestReplacePinned(t *testing.T) {
	c := newCrowd(t, 0, 150, nil, time.Millisecond, quick)
	c.ids = []VersionID{{Model: "a", Version: 1}}
	c.add(c.ids[0], serving.Options{Pinned: true}, simpleNeed(0))
	c.run(1500 * time.Millisecond)
	first := newCall()
	c.step(claim{first, Spec{ID: c.ids[0]}, true})
	got := <-first.answer
	if got.err != nil {
		t.Fatal(got.err)
	}
	o := serving.Options{Pinned: true}
	second := newCall()
	c.step(loaded{second, got.id, Info{Options: resolve(&o, false), Need: simpleNeed(0)}, nil})
	c.run(3 * time.Second)
	if r := <-second.answer; r.err != nil {
		t.Error(r.err)
	}
}

// Hungry below saturation: busy at 50 % load.
func TestHungryHalfLoad(t *testing.T) {
	n := []Need{{Weights: 100, Workspace: 60}, {Weights: 100, Workspace: 10}}
	c := newCrowd(t, 2, 250, func(i int) Need { return n[i] }, time.Millisecond, func(*run) time.Duration { return 10 * time.Millisecond })
	for i := range 2500 {
		c.ask(2*time.Second+time.Duration(i)*20*time.Millisecond, 1)
	}
	r := c.ask(3*time.Second, 0)
	in := c.in
	c.run(50 * time.Second)
	if c.answers[r] != 1 {
		t.Errorf("not answered after 47 s, %d in\n%s", c.in-in, c)
	} else {
		t.Log(r.err, r.run.started-r.arrived)
	}
}

// Workspace steal by claimants: three versions, room for two.
func TestReserve(t *testing.T) {
	c := newCrowd(t, 5, 360, func(i int) Need { return Need{Weights: 100, Workspace: 30} }, time.Millisecond, func(*run) time.Duration { return 10 * time.Millisecond })
	var all []*request
	for i := range 5000 {
		all = append(all, c.ask(2*time.Second+time.Duration(i)*12*time.Millisecond, i%5))
	}
	c.run(200 * time.Second)
	worst := time.Duration(0)
	for _, r := range all {
		if c.answers[r] != 1 {
			t.Fatalf("not answered: arrived %v\n%s", r.arrived, c)
		}
		if r.run != nil {
			worst = max(worst, r.run.started-r.arrived)
		}
	}
	t.Log(worst, c.in)
}

// A batch that puts its version into quarantine brings it in again, and others out for that.
func TestQuarantinedBatch(t *testing.T) {
	c := newCrowd(t, 2, 300, simpleNeed, time.Millisecond, func(*run) time.Duration { return 5 * time.Millisecond })
	c.ends = func(r *run) error {
		if r.version == c.version(0) && r.rows > 1 {
			return ErrQuarantined
		}
		return nil
	}
	c.failing = func() error { return ErrQuarantined }
	var rs []*request
	c.ask(2*time.Second, 0)
	for range 3 {
		r := c.ask(2*time.Second, 0)
		r.alone = false
		r.inputs = request1()[1:]
		rs = append(rs, r)
	}
	in := c.in
	c.run(2500 * time.Millisecond)
	for _, r := range rs {
		if !errors.Is(r.err, ErrQuarantined) {
			t.Error(r.err)
		}
	}
	if c.in != in {
		t.Errorf("a lost version was brought in %d times", c.in-in)
	}
}

const stealGap = 4 * time.Millisecond

// An older hungry request's room is taken by a younger claimant.
func TestClaimantSteals(t *testing.T) {
	n := []Need{{Weights: 100, Workspace: 60}, {Weights: 100, Workspace: 10}, {Weights: 100, Workspace: 10}}
	c := newCrowd(t, 3, 250, func(i int) Need { return n[i] }, time.Millisecond, func(*run) time.Duration { return 5 * time.Millisecond })
	c.core.calm = never // nothing ahead of demand
	for i := range 5000 {
		c.ask(2*time.Second+time.Duration(i)*stealGap, 1+i%2)
	}
	r := c.ask(3*time.Second, 0)
	c.run(50 * time.Second)
	if c.answers[r] != 1 {
		t.Errorf("not answered after 47 s, %d in\n%s", c.in, c)
	} else {
		t.Log(r.err, r.run.started-r.arrived)
	}
}

// One model that a pinned one's runs keep out blocks all others.
func TestHeadOfLine(t *testing.T) {
	c := newCrowd(t, 0, 250, nil, time.Millisecond, func(*run) time.Duration { return 10 * time.Millisecond })
	c.ids = []VersionID{{Model: "a", Version: 1}, {Model: "p", Version: 1}, {Model: "s", Version: 1}}
	c.add(c.ids[1], serving.Options{Pinned: true}, Need{Weights: 100, Workspace: 10})
	c.run(1100 * time.Millisecond)
	for i := range 6000 {
		c.ask(1200*time.Millisecond+time.Duration(i)*9*time.Millisecond, 1)
	}
	c.run(1300 * time.Millisecond)
	c.add(c.ids[0], serving.Options{}, Need{Weights: 145, Workspace: 0})
	c.add(c.ids[2], serving.Options{}, Need{Weights: 10, Workspace: 1})
	c.core.calm = never
	c.run(1500 * time.Millisecond)
	v := c.version(2)
	t.Log(v.home.residency, c.version(0).home.residency)
	c.ask(3*time.Second, 0)
	r := c.ask(4*time.Second, 2)
	c.run(50 * time.Second)
	if c.answers[r] != 1 {
		t.Errorf("s has room, and is not answered after 46 s\n%s", c)
	}
}

// Failed trial for lack of memory.
func TestTrialOOM(t *testing.T) {
	c := newCrowd(t, 3, 1000, simpleNeed, time.Millisecond, quick)
	once := true
	c.failing = func() error {
		if once {
			once = false
			return ErrOutOfMemory
		}
		return nil
	}
	call := c.add(VersionID{Model: "new", Version: 1}, serving.Options{}, simpleNeed(0))
	c.run(3 * time.Second)
	select {
	case r := <-call.answer:
		if r.err != nil {
			t.Error(r.err)
		}
	default:
		t.Error("no answer")
	}
}

// Ledger drift when a late ErrNotLoaded comes after the version is back.
func TestLateNotLoaded(t *testing.T) {
	c := newCrowd(t, 0, 1000, nil, time.Millisecond, nil)
	c.ids = []VersionID{{Model: "a", Version: 1}}
	n := 0
	c.takes = func(*run) time.Duration { n++; return time.Duration(n*10) * time.Millisecond }
	c.add(c.ids[0], serving.Options{Instances: 2}, simpleNeed(0))
	c.run(1500 * time.Millisecond)
	calls := 0
	c.ends = func(*run) error {
		if calls++; calls <= 2 {
			return ErrNotLoaded
		}
		return nil
	}
	for range 4 {
		c.ask(2*time.Second, 0)
	}
	ins := 0
	c.moved = func(f effect) {
		if _, ok := f.(startActivate); ok {
			ins++
		}
	}
	c.run(2*time.Second + 21*time.Millisecond)
	c.run(5 * time.Second)
	if ins != 1 || len(c.failed) > 0 {
		t.Errorf("weights came in %d times, %d requests failed", ins, len(c.failed))
	}
}

// The end of Load's context does not end Load while it is tried.
func TestLoadIgnoresContext(t *testing.T) {
	h := &hanging{}
	e := New(Config{Runtime: h})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- e.Run(ctx) }()
	load, end := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer end()
	got := make(chan error, 1)
	go func() { _, err := e.Load(load, Spec{ID: one}); got <- err }()
	select {
	case err := <-got:
		t.Log(err)
	case <-time.After(3 * time.Second):
		t.Error("Load goes on 3 s after its context's end")
	}
	cancel()
	<-done
}

type hanging struct{ Runtime }

func (hanging) Load(context.Context, Spec) (Info, error) { return Info{}, nil }
func (hanging) Activate(ctx context.Context, _ VersionID, _ Setting) (Need, error) {
	<-ctx.Done()
	return Need{}, context.Cause(ctx)
}
func (hanging) Unload(context.Context, VersionID) error { return nil }

// Activations that make no progress are ended, so that others can come in.
func TestActivationHangs(t *testing.T) {
	c := newCrowd(t, 6, 250, simpleNeed, time.Millisecond, quick)
	stuck := map[*job]*version{}
	c.hangs = func(v *version) bool {
		if len(stuck) < 2 {
			stuck[&v.home.move] = v
			return true
		}
		return false
	}
	c.interrupted = func(f interrupt) {
		if f.cause != ErrStalled {
			t.Errorf("interrupted by %v", f.cause)
		}
		c.at(c.now+time.Second, func() event { return activated{stuck[f.job], Need{}, 0, f.cause} })
	}
	var all []*request
	for i := range 6 {
		all = append(all, c.ask(2*time.Second+time.Duration(i)*time.Millisecond, i))
	}
	c.run(3 * hungAfter)
	failed := 0
	for _, r := range all {
		if c.answers[r] != 1 {
			t.Errorf("%s is not answered\n%s", r.id, c)
		} else if r.err != nil {
			failed++
		}
	}
	if failed != 2 || len(stuck) != 2 {
		t.Errorf("%d requests failed with %d activations that hung", failed, len(stuck))
	}
}

// What is not available for a while is asked for again soon after it is back.
func TestUnavailable(t *testing.T) {
	c := newCrowd(t, 2, 150, simpleNeed, time.Millisecond, quick)
	target := 0
	if c.version(0).home.residency == resident {
		target = 1
	}
	c.failing = func() error {
		if c.now < 20*time.Second {
			return ErrUnavailable
		}
		return nil
	}
	for i := range 2500 {
		c.ask(2*time.Second+time.Duration(i)*10*time.Millisecond, target)
	}
	c.run(time.Minute)
	last := time.Duration(0)
	for r, err := range c.failed {
		if !errors.Is(err, ErrUnavailable) {
			t.Fatal(err)
		}
		last = max(last, r.arrived)
	}
	if last > 20*time.Second+2*retryActivate {
		t.Errorf("a request was refused at %v", last)
	}
}
