package worker

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dunlin/dunlin/agent/engine"
	"github.com/dunlin/dunlin/agent/weights"
	"github.com/dunlin/dunlin/bench/zoo"
	"github.com/dunlin/dunlin/models/onnxwriter"
	"github.com/dunlin/dunlin/models/tensor"
)

// books are what the child's fake device has given, and its ledger.
type books struct {
	Count  weights.FakeCount
	Stats  weights.Stats
	Breach string
}

// failing is what a test has the fake device do next.
type failing struct {
	Call           string
	N, Times, Code int
}

// watched is the watch of a child that keeps books in a folder, and takes
// failures from there.
func watched(dir string) func(*pools, bool) {
	var mu sync.Mutex
	return func(p *pools, done bool) {
		mu.Lock()
		defer mu.Unlock()
		if p == nil {
			return
		}
		if !done {
			b, err := os.ReadFile(filepath.Join(dir, "fail"))
			if err != nil {
				return
			}
			var f failing
			if err := errors.Join(json.Unmarshal(b, &f), os.Remove(filepath.Join(dir, "fail"))); err != nil {
				panic(err)
			}
			p.fake.Fail(f.Call, f.N, f.Times, f.Code)
			return
		}
		b, err := json.Marshal(books{p.fake.Count(), p.device.Stats(), p.fake.Breach()})
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, "new"), b, 0o600)
		}
		if err == nil {
			err = os.Rename(filepath.Join(dir, "new"), filepath.Join(dir, "books"))
		}
		if err != nil {
			panic(err)
		}
	}
}

// pooledWorker starts a worker with pools on a fake device.
func pooledWorker(t testing.TB, size int64, change func(*Config)) (w *Worker, dir string) {
	dir = t.TempDir()
	cfg := testConfig(t, "pools="+dir)
	cfg.write = []string{dir}
	cfg.Pools, cfg.PoolBytes, cfg.Threads = FakePools, size, 1
	if change != nil {
		change(&cfg)
	}
	w = start(t, cfg)
	if r, err := w.Runtime(t.Context()); err != nil || !r.Pooling.Works || r.PoolBytes <= size/2 || r.PoolBytes > size {
		t.Fatalf("%+v, %v", r, err)
	}
	return w, dir
}

// read gives the books after the last change, which must agree.
func read(t testing.TB, dir string) books {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(dir, "books"))
	if err != nil {
		t.Fatal(err)
	}
	var all books
	if err := json.Unmarshal(b, &all); err != nil {
		t.Fatal(err)
	}
	if c, s := all.Count, all.Stats; c.Mapped != s.Mapped || c.Created != s.Physical || c.Reserved != s.Reserved || all.Breach != "" {
		t.Fatalf("driver and ledger: %+v", all)
	}
	return all
}

// poolSessions gives the version's session, and the one that waits for its
// weights.
func poolSessions(w *Worker, id engine.VersionID) (in, warm *session) {
	w.mu.Lock()
	defer w.mu.Unlock()
	v := w.loaded[id]
	return v.session, v.warm
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// TestPooledResidency has weights leave a pool and come back: the session
// stays, and its answers are the same to the bit, also in the children to come.
func TestPooledResidency(t *testing.T) {
	for _, net := range []zoo.Net{zoo.MLP(1), zoo.MobileNet(1)} {
		t.Run(net.Name, func(t *testing.T) {
			w, dir := pooledWorker(t, 64<<20, nil)
			s, x := write(t, net), input(net, 1)
			far := inProcess(t, s, x, nil)
			info, err := w.Load(t.Context(), s)
			if n := info.Need; err != nil || n.Mapped || n.Prepacked != 0 || n.Weights < granule {
				t.Fatalf("loaded as %+v, %v", info, err)
			}
			need, err := w.Activate(t.Context(), s.ID, engine.Setting{})
			must(t, err)
			session, _ := poolSessions(w, s.ID)
			if n := read(t, dir).Count.Mapped; n == 0 || need != (engine.Need{Weights: n, Measured: true}) || session == nil || session.host == 0 {
				t.Errorf("activated with %d bytes mapped: %+v, %+v", n, need, session)
			}
			var want []byte
			run := func(when string) {
				t.Helper()
				got, err := one(t.Context(), w, s.ID, x, nil)
				must(t, err)
				if want == nil && near(got, far) {
					want = got[0].Data
				}
				if !bytes.Equal(got[0].Data, want) {
					t.Errorf("%s: other outputs", when)
				}
			}
			run("activated")
			must(t, w.Set(t.Context(), s.ID, engine.Setting{Prepack: true}))
			if again, err := w.Activate(t.Context(), s.ID, engine.Setting{}); err != nil || again != need {
				t.Errorf("activated twice: %+v, %v", again, err)
			}
			out := func() {
				t.Helper()
				must(t, w.Deactivate(t.Context(), s.ID))
				if c := read(t, dir).Count; c.Mapped != 0 || c.Reservations != 1 {
					t.Errorf("out: %+v", c)
				}
				if _, err := one(t.Context(), w, s.ID, x, nil); !errors.Is(err, engine.ErrNotLoaded) {
					t.Errorf("run while out: %v", err)
				}
			}
			for range 2 {
				out()
				if in, warm := poolSessions(w, s.ID); in != nil || warm != session {
					t.Errorf("out: %+v, %+v", in, warm)
				}
				if again, err := w.Activate(t.Context(), s.ID, engine.Setting{}); err != nil || again != need || read(t, dir).Count.Mapped != need.Weights {
					t.Errorf("activated again: %+v, %v", again, err)
				}
				if in, warm := poolSessions(w, s.ID); in != session || warm != nil {
					t.Errorf("activated again: %+v, %+v", in, warm)
				}
				run("activated again")
			}
			kill(t, w)
			run("active at a death")
			if n := read(t, dir).Count.Mapped; n != need.Weights {
				t.Errorf("%d bytes mapped after a death", n)
			}
			out()
			kill(t, w)
			if p := child(t, w); p.isDead() {
				t.Error("the new child is dead")
			}
			if _, warm := poolSessions(w, s.ID); warm != nil {
				t.Errorf("a new child has %+v", warm)
			}
			_, err = w.Activate(t.Context(), s.ID, engine.Setting{})
			must(t, err)
			run("out at a death")
			out()
			must(t, w.Unload(t.Context(), s.ID))
			if c := read(t, dir).Count; c.Mapped != 0 || c.Reservations != 0 {
				t.Errorf("unloaded: %+v", c)
			}
			must(t, errors.Join(activateOnly(t, w, s), w.Unload(t.Context(), s.ID)))
			if c := read(t, dir).Count; c.Mapped != 0 || c.Reservations != 0 {
				t.Errorf("unloaded while in: %+v", c)
			}
		})
	}
}

func activateOnly(t testing.TB, w *Worker, s engine.Spec) error {
	_, err := w.Load(t.Context(), s)
	if err == nil {
		_, err = w.Activate(t.Context(), s.ID, engine.Setting{})
	}
	return err
}

// TestPooledCycles has weights leave and come back, and versions be unloaded
// and opened anew, many times: nothing is left behind on device or host.
func TestPooledCycles(t *testing.T) {
	w, dir := pooledWorker(t, 64<<20, nil)
	net := zoo.MobileNet(1)
	s, x := write(t, net), input(net, 1)
	need := activate(t, w, s)
	cycle := func(anew bool) {
		_, err := one(t.Context(), w, s.ID, x, nil)
		must(t, err)
		must(t, w.Deactivate(t.Context(), s.ID))
		if n := read(t, dir).Count.Mapped; n != 0 {
			t.Fatalf("%d bytes mapped while out", n)
		}
		if anew {
			must(t, w.Unload(t.Context(), s.ID))
		}
		must(t, activateOnly(t, w, s))
		if n := read(t, dir).Count.Mapped; n != need.Weights {
			t.Fatalf("%d bytes mapped while in, not %d", n, need.Weights)
		}
	}
	cycle(false)
	cycle(true)
	before := resident(t, child(t, w).command.Process.Pid)
	cycles := 100
	if raced {
		cycles = 40
	}
	for i := range cycles {
		cycle(i%20 == 19)
	}
	after := resident(t, child(t, w).command.Process.Pid)
	t.Logf("kB after a cycle %v, after %d more %v", before, cycles, after)
	if limit := before["Anonymous"] + max(before["Anonymous"]/50, 8<<10); !raced && after["Anonymous"] > limit {
		t.Errorf("the child has %d kB of its own, and had %d", after["Anonymous"], before["Anonymous"])
	}
}

// TestPooledSequences does all there is to do with versions in random order,
// while the driver fails and children are killed: what is active answers, and
// the device has what the ledger says.
func TestPooledSequences(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	w, dir := pooledWorker(t, 9<<20, func(c *Config) { c.WarmBytes = 6 << 20 })
	type tenant struct {
		engine.Spec
		x              []tensor.Tensor
		far            []tensor.Tensor
		loaded, active bool
	}
	var all []*tenant
	for i := range 5 {
		net := zoo.MLP(uint64(i))
		s := write(t, net)
		s.ID.Version = int64(i + 1)
		x := input(net, uint64(i))
		all = append(all, &tenant{Spec: s, x: x, far: inProcess(t, s, x, nil)})
	}
	fake, err := weights.NewFake(weights.FakeConfig{Capacity: 1 << 20})
	must(t, err)
	calls := append(fake.Calls(), "", "")
	fake.Close()
	done := make(map[string]int)
	steps := 300
	if raced {
		steps = 120
	}
	missing := func() string {
		for _, what := range []string{"load", "activate", "deactivate", "unload", "run", "fail", "kill", "cancel", "out of memory"} {
			if done[what] == 0 {
				return what
			}
		}
		return ""
	}
	for step := 0; step < steps || step < 20*steps && missing() != ""; step++ {
		v := all[r.IntN(len(all))]
		if !v.loaded {
			_, err := w.Load(t.Context(), v.Spec)
			must(t, err)
			v.loaded = true
			done["load"]++
		}
		if r.IntN(4) == 0 {
			b, err := json.Marshal(failing{calls[r.IntN(len(calls))], 1 + r.IntN(8), 1 + r.IntN(3), []int{weights.CodeOutOfMemory, weights.CodeUnknown}[r.IntN(2)]})
			must(t, err)
			must(t, os.WriteFile(filepath.Join(dir, "fail"), b, 0o600))
			done["fail"]++
		}
		switch what := r.IntN(20); {
		case what < 8:
			ctx, cancel := context.WithCancel(t.Context())
			if r.IntN(4) == 0 {
				go cancel()
			}
			_, err := w.Activate(ctx, v.ID, engine.Setting{})
			cancel()
			switch {
			case err == nil:
				v.active = true
				done["activate"]++
			case errors.Is(err, engine.ErrOutOfMemory):
				v.active = false
				done["out of memory"]++
			case errors.Is(err, context.Canceled): // it is as before
				done["cancel"]++
			default:
				t.Fatalf("step %d: activate: %v", step, err)
			}
		case what < 16:
			// Where the driver takes nothing back, that is said; it is out all
			// the same.
			if err := w.Deactivate(t.Context(), v.ID); err != nil {
				done["left behind"]++
			}
			v.active = false
			done["deactivate"]++
		case what < 18:
			if err := w.Unload(t.Context(), v.ID); err != nil {
				done["left behind"]++
			}
			v.loaded, v.active = false, false
			done["unload"]++
		case what == 18 && done["kill"] < 6:
			kill(t, w)
			done["kill"]++
		}
		if v.loaded && v.active {
			got, err := one(t.Context(), w, v.ID, v.x, nil)
			if errors.Is(err, engine.ErrOutOfMemory) { // a new child could not open it
				v.active = false
				must(t, w.Deactivate(t.Context(), v.ID))
				continue
			}
			if err != nil || !near(got, v.far) {
				t.Fatalf("step %d: run: %v", step, err)
			}
			done["run"]++
		}
	}
	t.Log(done)
	if what := missing(); what != "" {
		t.Errorf("%q did not come up", what)
	}
	// No failure is due any more, and the last changes give back what was left.
	b, err := json.Marshal(failing{})
	must(t, err)
	must(t, os.WriteFile(filepath.Join(dir, "fail"), b, 0o600))
	for _, v := range all {
		if v.loaded {
			must(t, w.Unload(t.Context(), v.ID))
		}
	}
	must(t, errors.Join(activateOnly(t, w, all[0].Spec), w.Unload(t.Context(), all[0].ID)))
	if c := read(t, dir).Count; c.Mapped != 0 || c.Reservations != 0 {
		t.Errorf("left behind: %+v", c)
	}
}

// dense is a net of one matrix, FP32 and so wide.
func dense(width int64) zoo.Net {
	value := func(name string) []onnxwriter.Value {
		return []onnxwriter.Value{{Name: name, Type: tensor.Float32, Shape: []int64{-1, width}}}
	}
	w := floats("w", 1, width, width)
	return zoo.Net{Name: "dense", Model: onnxwriter.Model{
		Opset: 17, Inputs: value("x"), Outputs: value("y"),
		Weights: []onnxwriter.Weight{{Name: w.Name, Type: w.Type, Shape: w.Shape, Data: w.Data}},
		Nodes:   []onnxwriter.Node{{Op: "MatMul", In: []string{"x", "w"}, Out: []string{"y"}}},
	}}
}

// TestWarmBytes bounds what stays on the host: those that have been out for
// the longest time are closed.
func TestWarmBytes(t *testing.T) {
	const bound = 11 << 20 // an image has 4 MiB
	w, dir := pooledWorker(t, 64<<20, func(c *Config) { c.WarmBytes = bound })
	net := dense(1024)
	var all []engine.Spec
	for i := range 4 {
		s := write(t, net)
		s.ID.Version = int64(i + 1)
		all = append(all, s)
		activate(t, w, s)
		must(t, w.Deactivate(t.Context(), s.ID))
	}
	warm := func() (which []int, host int64) {
		for i, s := range all {
			if _, warm := poolSessions(w, s.ID); warm != nil {
				which = append(which, i)
				host += warm.host
			}
		}
		return which, host
	}
	which, host := warm()
	if len(which) == 0 || len(which) == 4 || which[len(which)-1] != 3 || host > bound {
		t.Errorf("%v have stayed, with %d bytes", which, host)
	}
	if c := read(t, dir).Count; c.Reservations != len(which) {
		t.Errorf("%d have stayed: %+v", len(which), c)
	}
	activate(t, w, all[which[0]])
	must(t, w.Deactivate(t.Context(), all[which[0]].ID))
	activate(t, w, all[0])
	if _, err := one(t.Context(), w, all[0].ID, input(net, 1), nil); err != nil {
		t.Error(err)
	}
	must(t, w.Deactivate(t.Context(), all[0].ID))
	if now, host := warm(); now[0] != 0 || host > bound {
		t.Errorf("%v have stayed, with %d bytes", now, host)
	}
}

// TestPoolTooSmall has the device run out of memory: the error has the
// numbers, and there is room when others have left.
func TestPoolTooSmall(t *testing.T) {
	w, dir := pooledWorker(t, 8<<20, nil)
	net := zoo.MobileNet(1)
	first, second := write(t, net), write(t, zoo.MobileNet(2))
	second.ID.Version = 2
	activate(t, w, first)
	_, err := w.Load(t.Context(), second)
	must(t, err)
	if _, err := w.Activate(t.Context(), second.ID, engine.Setting{}); !errors.Is(err, engine.ErrOutOfMemory) || !strings.Contains(err.Error(), "8388608") {
		t.Errorf("%v", err)
	}
	must(t, w.Deactivate(t.Context(), first.ID))
	need, err := w.Activate(t.Context(), second.ID, engine.Setting{})
	must(t, err)
	if _, err := w.Activate(t.Context(), first.ID, engine.Setting{}); !errors.Is(err, engine.ErrOutOfMemory) {
		t.Errorf("into a full device: %v", err)
	}
	if n := read(t, dir).Count.Mapped; n != need.Weights {
		t.Errorf("%d bytes mapped, not %d", n, need.Weights)
	}
	must(t, w.Deactivate(t.Context(), second.ID))
	activate(t, w, first)
	if _, err := one(t.Context(), w, first.ID, input(net, 1), nil); err != nil {
		t.Error(err)
	}
}

// TestSpent has a run find too little memory: its session does not stay when
// the weights leave.
func TestSpent(t *testing.T) {
	w, dir := pooledWorker(t, 64<<20, nil)
	id, _ := load(t, w, "chain.onnx")
	_, err := one(t.Context(), w, id, []tensor.Tensor{floats("x", 1, 2, 2)}, nil)
	must(t, err)
	pid := child(t, w).command.Process.Pid
	var before unix.Rlimit
	limit := unix.Rlimit{Cur: dataSize(t, pid) + 6<<20, Max: unix.RLIM_INFINITY}
	must(t, unix.Prlimit(pid, unix.RLIMIT_DATA, &limit, &before))
	if _, err := one(t.Context(), w, id, []tensor.Tensor{floats("x", 1, 2000, 2000)}, nil); !errors.Is(err, engine.ErrOutOfMemory) {
		t.Errorf("run: %v", err)
	}
	must(t, unix.Prlimit(pid, unix.RLIMIT_DATA, &before, nil))
	for n := range 2 {
		must(t, w.Deactivate(t.Context(), id))
		if c := read(t, dir).Count; c.Reservations != n {
			t.Errorf("%d times out: %+v", n+1, c)
		}
		_, err := w.Activate(t.Context(), id, engine.Setting{})
		must(t, err)
	}
}

// TestNoPools has devices that cannot be had: models are opened as without,
// and it is said why.
func TestNoPools(t *testing.T) {
	for name, tt := range map[string]struct {
		mode, pools string
		size        int64
		want        string
	}{
		"too small for the probe": {"", FakePools, 1 << 20, "out of memory"},
		"no such device":          {"", "tpu:0", 0, `"tpu:0" is neither`},
		"no such GPU":             {"", "cuda:99", 0, ""},
		"the child dies of it":    {"abort-on-pools", FakePools, 64 << 20, "signal: aborted"},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := testConfig(t, tt.mode)
			cfg.Pools, cfg.PoolBytes = tt.pools, tt.size
			w := start(t, compiling(t, cfg))
			net := zoo.MLP(1)
			s, x := write(t, net), input(net, 1)
			r, err := w.Runtime(t.Context())
			if err != nil || r.Pooling.Works || r.Pooling.Reason == "" || !strings.Contains(r.Pooling.Reason, tt.want) {
				t.Errorf("%+v, %v", r, err)
			}
			need := activate(t, w, s)
			if got, err := one(t.Context(), w, s.ID, x, nil); err != nil || !near(got, inProcess(t, s, x, nil)) || need.Weights == 0 || need.Weights%granule == 0 {
				t.Errorf("%+v, %v", need, err)
			}
			must(t, w.Deactivate(t.Context(), s.ID))
			if _, warm := poolSessions(w, s.ID); warm != nil {
				t.Error("its session has stayed")
			}
		})
	}
}

// TestPoolProtocol asks the child for what cannot be: it answers with an
// error, and lives.
func TestPoolProtocol(t *testing.T) {
	w, dir := pooledWorker(t, 64<<20, nil)
	net := zoo.MLP(1)
	s, x := write(t, net), input(net, 1)
	activate(t, w, s)
	want, err := one(t.Context(), w, s.ID, x, nil)
	must(t, err)
	p := child(t, w)
	in, _ := poolSessions(w, s.ID)
	ask := func(k kind, number uint64) error {
		_, err := p.call(t.Context(), s.ID, &message{kind: k, session: number})
		return err
	}
	refused := func(what string, err error) {
		t.Helper()
		if _, died := errors.AsType[*DeathError](err); err == nil || died {
			t.Errorf("%s: %v", what, err)
		}
	}
	refused("in while it is in", ask(kindIn, in.number))
	refused("out of what is not there", ask(kindOut, 99))
	refused("in of what is not there", ask(kindIn, 99))
	must(t, ask(kindOut, in.number))
	refused("out twice", ask(kindOut, in.number))
	_, err = one(t.Context(), w, s.ID, x, nil)
	refused("run of what is out", err)
	must(t, ask(kindIn, in.number))
	got, err := one(t.Context(), w, s.ID, x, nil)
	if err != nil || !bytes.Equal(got[0].Data, want[0].Data) {
		t.Errorf("in again: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	must(t, w.Deactivate(t.Context(), s.ID))
	if _, err := w.Activate(ctx, s.ID, engine.Setting{}); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	must(t, ask(kindDeactivate, in.number))
	must(t, ask(kindDeactivate, in.number))
	if c := read(t, dir).Count; c.Reservations != 0 {
		t.Errorf("closed: %+v", c)
	}
	activate(t, w, s) // its session is gone, and opened anew
	if got, err := one(t.Context(), w, s.ID, x, nil); err != nil || !bytes.Equal(got[0].Data, want[0].Data) || child(t, w) != p {
		t.Errorf("opened anew: %v", err)
	}
	before, _ := poolSessions(w, s.ID)
	w.mu.Lock()
	lane := w.loaded[s.ID].lane
	w.mu.Unlock()
	lane <- struct{}{} // another change goes on
	if err := w.Deactivate(ctx, s.ID); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	<-lane
	activate(t, w, s)
	if now, _ := poolSessions(w, s.ID); now != before {
		t.Error("its session was opened beside the one that is open")
	}
	must(t, w.Unload(t.Context(), s.ID))
	if c := read(t, dir).Count; c.Reservations != 0 {
		t.Errorf("unloaded: %+v", c)
	}
}

// TestPoisoned has a GPU do nothing more for the child: the next one goes on,
// and a version that does it again is put into quarantine.
func TestPoisoned(t *testing.T) {
	w, dir := pooledWorker(t, 64<<20, nil)
	net := zoo.MLP(1)
	leaving, staying, x := write(t, net), write(t, net), input(net, 1)
	staying.ID.Version = 2
	activate(t, w, leaving)
	activate(t, w, staying)
	p := child(t, w)
	b, err := json.Marshal(failing{"synchronize", 1, 1, 700})
	must(t, err)
	must(t, os.WriteFile(filepath.Join(dir, "fail"), b, 0o600))
	must(t, w.Deactivate(t.Context(), leaving.ID))
	if _, err := one(t.Context(), w, staying.ID, x, nil); err != nil || !p.isDead() {
		t.Errorf("after it: %v", err)
	}
	if n := read(t, dir).Count.Mapped; n != granule {
		t.Errorf("%d bytes mapped", n)
	}
	activate(t, w, leaving)
	if _, err := one(t.Context(), w, leaving.ID, x, nil); err != nil {
		t.Error(err)
	}

	w = start(t, testConfig(t, "poisoned"))
	id, _ := load(t, w, "digits-size.onnx")
	_, err = one(t.Context(), w, id, []tensor.Tensor{floats("x", 1, 1, 64)}, nil)
	if !errors.Is(err, engine.ErrQuarantined) || !strings.Contains(err.Error(), "CUDA failure 700") {
		t.Errorf("each time: %v", err)
	}
}

// TestPooledEngine has an engine serve eight versions on a device that has
// room for three.
func TestPooledEngine(t *testing.T) {
	w, dir := pooledWorker(t, 7<<20, func(c *Config) { c.WarmBytes = 12 << 20 })
	found, err := w.Runtime(t.Context())
	must(t, err)
	e := engine.New(engine.Config{Runtime: w, Memory: found.PoolBytes})
	ctx, stop := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { e.Run(ctx) })
	defer wg.Wait()
	defer stop()
	const versions = 8
	var specs []engine.Spec
	var xs, want [][]tensor.Tensor
	for i := range versions {
		net := zoo.MLP(uint64(i))
		s := write(t, net)
		s.ID.Version = int64(i + 1)
		x := input(net, uint64(i))
		specs, xs, want = append(specs, s), append(xs, x), append(want, inProcess(t, s, x, nil))
		_, err := e.Load(t.Context(), s)
		must(t, err)
	}
	length := 3 * time.Second
	if raced || testing.Short() {
		length = time.Second
	}
	end := time.Now().Add(length)
	var clients sync.WaitGroup
	var mu sync.Mutex
	runs := make(map[int]int)
	for c := range 4 {
		clients.Go(func() {
			zipf := rand.NewZipf(rand.New(rand.NewPCG(1, uint64(c))), 1.1, 1, versions-1)
			for time.Now().Before(end) {
				i := int(zipf.Uint64())
				a, err := e.Infer(ctx, specs[i].ID, engine.Request{Inputs: xs[i]})
				if err != nil || !near(a.Outputs, want[i]) {
					t.Errorf("%s: %v", specs[i].ID, err)
					return
				}
				a.Release()
				mu.Lock()
				runs[i]++
				mu.Unlock()
			}
		})
	}
	clients.Wait()
	t.Log(runs)
	until(t, "the ledger to be what the driver has given", func() bool {
		idle := true
		moves := 0
		for _, v := range e.Versions() {
			idle = idle && (v.Residency == "out" || v.Residency == "resident")
			for _, n := range v.Swaps.Out {
				moves += int(n)
			}
		}
		return idle && moves >= versions && e.Memory().Used == read(t, dir).Count.Mapped
	})
}
