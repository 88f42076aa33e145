package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/dunlin/dunlin/agent/compiled"
	"github.com/dunlin/dunlin/agent/engine"
	"github.com/dunlin/dunlin/agent/ort"
	"github.com/dunlin/dunlin/agent/profile"
	"github.com/dunlin/dunlin/agent/state"
	"github.com/dunlin/dunlin/agent/worker"
	profiles "github.com/dunlin/dunlin/firmware-profiles"
	"github.com/dunlin/dunlin/internal/link"
	"github.com/dunlin/dunlin/models/tensor"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// batchSize asks a device for the most rows of a run of digits.
func batchSize(url string) (int, error) {
	resp, err := http.Get(url + "/v2/models/digits/config")
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(resp.Body)
	if err != nil {
		return 0, err
	}
	var config struct {
		MaxBatchSize int `json:"max_batch_size"`
	}
	if err := json.Unmarshal(raw, &config); err != nil || resp.StatusCode != http.StatusOK {
		return 0, fmt.Errorf("%s: %s", resp.Status, raw)
	}
	return config.MaxBatchSize, nil
}

// TestAgentMeasures: a model that is loaded is measured, used as it was
// measured, and its profile told to each store of the controller once; after a
// start it is used as it was kept.
func TestAgentMeasures(t *testing.T) {
	c := startControl(t)
	cfg := testConfig(t, c)
	cfg.Profile, cfg.ProfileDuty, cfg.eager = "on", 100, true
	l, err := net.Listen("tcp", cfg.Listen)
	if err != nil {
		t.Fatal(err)
	}
	cfg.Listen = l.Addr().String() // the same for both starts
	l.Close()
	url := "http://" + cfg.Listen
	stop := startAgent(t, cfg)
	c.until("says hello", func(m proto.Message) bool { _, ok := m.(*dunlinv1.Hello); return ok })
	v1 := c.push(digits+"v1.onnx", "digits", 1)
	c.send("edge-1", link.Desired, desired(t, 1, nil, v1))
	var told *dunlinv1.Event
	tells := func(m proto.Message) bool {
		batch, ok := m.(*dunlinv1.EventBatch)
		if ok {
			c.send("edge-1", link.Command, &dunlinv1.Command{Command: &dunlinv1.Command_EventAck{EventAck: &dunlinv1.EventAck{
				OutboxId: batch.OutboxId, Sequence: batch.Events[len(batch.Events)-1].Sequence,
			}}})
		}
		for _, e := range batch.GetEvents() {
			if e.Kind == "profile.measured" && e.Sequence > told.GetSequence() {
				told = e
				return true
			}
		}
		return false
	}
	c.until("tells what it measured", tells)
	p := told.Profile
	if p.Unmeasured != "" || p.Model != "digits" || p.Version != 1 || told.Version != 1 || p.Digest != v1.Digest || !strings.HasPrefix(p.ModelDigest, "sha256:") ||
		p.Recommended == nil || len(p.Latency) < 2 || len(p.Points) < 3 || p.ActivationWarmSeconds <= 0 || p.RuntimeVersion == "" || p.FirmwareProfile == "" {
		t.Fatalf("%v", p)
	}
	if len(p.Providers) != 1 || !p.Providers[0].Accepted || p.Providers[0].MaxRelativeError > 1e-3 {
		t.Errorf("%v", p.Providers)
	}
	if n := proto.Size(told); n > state.MaxEvent {
		t.Errorf("the event has %d bytes", n)
	}
	until(t, "batches as it was measured", func() error {
		if n, err := batchSize(url); err != nil || n != int(p.Recommended.Batch) {
			return fmt.Errorf("batch of %d, %v; measured is %v", n, err, p.Recommended)
		}
		return nil
	})
	again := desired(t, 1, nil, v1)
	again.Generation.Incarnation = "two"
	c.send("edge-1", link.Desired, again)
	c.until("tells a new store", tells)
	if !proto.Equal(told.Profile, p) {
		t.Errorf("told %v, before %v", told.Profile, p)
	}
	stop()

	store, err := profile.OpenStore(filepath.Join(cfg.Data, profilesFolder))
	if err != nil {
		t.Fatal(err)
	}
	kept := proto.CloneOf(p)
	kept.Recommended.Batch = 7
	if err := store.Put(kept); err != nil {
		t.Fatal(err)
	}
	startAgent(t, cfg)
	until(t, "batches as it was kept", func() error {
		if n, err := batchSize(url); err != nil || n != 7 {
			return fmt.Errorf("batch of %d, %v", n, err)
		}
		return nil
	})
	if f := checkProfiles(cfg.Data); f.Verdict != Pass || !strings.HasPrefix(f.Detail, "1 model ") {
		t.Errorf("the doctor says %+v", f)
	}
}

// TestServeMeasures does without a controller.
func TestServeMeasures(t *testing.T) {
	data := t.TempDir()
	startAlone(t, Alone{File: digitsFile(t), Data: data, Serving: Serving{Profile: "on", ProfileDuty: 100, eager: true}})
	until(t, "keeps what it measured", func() error {
		found, err := filepath.Glob(filepath.Join(data, profilesFolder, "*.json"))
		if err != nil || len(found) != 1 {
			return fmt.Errorf("%v, %v", found, err)
		}
		return nil
	})
}

func TestProfilingIsOff(t *testing.T) {
	cfg, err := ParseConfig([]string{"--profile", "off", "--data", t.TempDir()}, env(), io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	if f, err := newProfiler(&host{serving: cfg.Serving}, profiles.Profile{}, cfg.Data); f != nil || err != nil {
		t.Errorf("%v, %v", f, err)
	}
	if _, err := os.Stat(filepath.Join(cfg.Data, profilesFolder)); err == nil {
		t.Error("it makes a folder")
	}
	for want, args := range map[string][]string{
		`profile: "maybe" is not on or off`:          {"--profile", "maybe"},
		"profile-duty: is 101, allowed are 1 to 100": {"--profile-duty", "101"},
		"profile-duty: is -1, allowed are 1 to 100":  {"--profile-duty", "-1"},
	} {
		if _, err := ParseConfig(args, env(), io.Discard); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v: %v, want %q", args, err, want)
		}
	}
	if cfg, err := ParseConfig(nil, env(), io.Discard); err != nil || cfg.Profile != "on" || cfg.ProfileDuty != defaultProfileDuty {
		t.Errorf("%q %d, %v", cfg.Profile, cfg.ProfileDuty, err)
	}
}

// TestTell tells each profile once for each store, version and measurement,
// also over starts.
func TestTell(t *testing.T) {
	store, err := profile.OpenStore(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	var heard []string
	var refused error
	incarnation := ""
	start := func() *profiler {
		return &profiler{
			store: store, told: store.Told(), given: map[engine.VersionID]*dunlinv1.ModelProfile{},
			measured: func(id engine.VersionID, p *dunlinv1.ModelProfile) error {
				if refused == nil {
					heard = append(heard, id.String())
				}
				return refused
			},
			controller: func() string { return incarnation }, log: slog.New(slog.DiscardHandler),
		}
	}
	expect := func(when string, f *profiler, want ...string) {
		t.Helper()
		heard = nil
		f.tell()
		if fmt.Sprint(heard) != fmt.Sprint(want) {
			t.Errorf("%s: told of %v, want %v", when, heard, want)
		}
	}
	at := time.Unix(1, 0)
	f := start()
	f.given[engine.VersionID{Model: "b", Version: 1, Generation: 3}] = &dunlinv1.ModelProfile{ModelDigest: "x", MeasuredAt: timestamppb.New(at)}
	expect("without a controller", f)
	incarnation = "one"
	expect("with one", f, "b:1")
	expect("again", f)
	f.given[engine.VersionID{Model: "a", Version: 2}] = &dunlinv1.ModelProfile{ModelDigest: "x", MeasuredAt: timestamppb.New(at)}
	expect("of another version", f, "a:2")
	given := f.given
	f = start()
	f.given = given
	expect("after a start", f)
	f.given[engine.VersionID{Model: "a", Version: 2}] = &dunlinv1.ModelProfile{ModelDigest: "x", MeasuredAt: timestamppb.New(at.Add(time.Second))}
	expect("measured again", f, "a:2")
	incarnation = "two"
	expect("a new store", f, "a:2", "b:1")
	incarnation, refused = "three", errUnreported
	expect("before it is reported", f)
	refused = nil
	expect("once it is", f, "a:2", "b:1")
	incarnation, refused = "four", errors.New("the disk is full")
	expect("when it is not kept", f)
	refused = nil
	expect("at once after that", f)
	f.mute = time.Time{}
	expect("later", f, "a:2", "b:1")
	var all []string
	for i := range 1100 {
		id := engine.VersionID{Model: "c", Version: int64(1000 + i)}
		f.given[id] = &dunlinv1.ModelProfile{}
		all = append(all, id.String())
	}
	expect("of many versions", f, all...)
	expect("of many versions again", f)
	given = f.given
	f = start()
	f.given = given
	expect("of many versions after a start", f, all[1022:]...)
	expect("of many versions after a start, again", f)
}

func TestProfileEvent(t *testing.T) {
	p := &dunlinv1.ModelProfile{Recommended: &dunlinv1.ModelSetting{Batch: 4, Instances: 2}, Latency: []*dunlinv1.LatencyPoint{{Rows: 1, Seconds: 1}}}
	for range 64 {
		p.Points = append(p.Points, &dunlinv1.ProfilePoint{
			Setting:    &dunlinv1.ModelSetting{Provider: strings.Repeat("P", 100), Batch: 64, Instances: 8, Threads: 16, Prepacked: true},
			P50Seconds: 1, P95Seconds: 1, P99Seconds: 1, RowsPerSecond: 1, PeakBytes: new(uint64(1 << 40)), JoulesPerRow: new(1.5),
		})
	}
	e := profileEvent(engine.VersionID{Model: "m", Version: 3}, "sha256:d", p)
	if n := proto.Size(e); n > state.MaxEvent || n < state.MaxEvent-512 || e.Profile.Recommended == nil || len(e.Profile.Latency) != 1 {
		t.Errorf("%d bytes, %d points", n, len(e.Profile.Points))
	}
	if len(p.Points) != 64 || p.Digest != "" {
		t.Error("it changes the profile")
	}
	if e.Profile.Model != "m" || e.Profile.Version != 3 || e.Profile.Digest != "sha256:d" || e.Severity != dunlinv1.Severity_SEVERITY_INFO {
		t.Errorf("%v", e)
	}
	e = profileEvent(engine.VersionID{Model: "m", Version: 3}, "", &dunlinv1.ModelProfile{Unmeasured: "never idle"})
	if e.Severity != dunlinv1.Severity_SEVERITY_WARNING || !strings.Contains(e.Message, "never idle") {
		t.Errorf("%v", e)
	}
}

func TestTuning(t *testing.T) {
	if _, ok := tuning(&dunlinv1.ModelProfile{Unmeasured: "never idle"}); ok {
		t.Error("what was not measured tunes")
	}
	got, ok := tuning(&dunlinv1.ModelProfile{
		Recommended: &dunlinv1.ModelSetting{Batch: 8, Instances: 2, Threads: 1, Prepacked: true},
		Latency:     []*dunlinv1.LatencyPoint{{Rows: 1, Seconds: 1}, {Rows: 8, Seconds: 4.5}},
	})
	if !ok || got.MaxBatchSize != 8 || got.Instances != 2 || got.Threads != 1 || got.Prepack == nil || !*got.Prepack || got.Latency.At(3) != 2*time.Second {
		t.Errorf("%+v", got)
	}
	if err := got.Check(); err != nil {
		t.Error(err)
	}
}

func TestJoules(t *testing.T) {
	const second = time.Second
	for _, tt := range []struct {
		name          string
		before, after energy
		cpu           time.Duration
		want          float64
	}{
		{"alone", energy{10, 0, 1000, true}, energy{15, 200, 1400, true}, 2 * second, 5},
		{"a slice", energy{10, 0, 1000, true}, energy{11.5, 5, 1020, true}, 40 * time.Millisecond, 1.5},
		{"others computed", energy{10, 0, 1000, true}, energy{15, 320, 1400, true}, 2 * second, 0},
		{"none", energy{}, energy{15, 200, 1400, true}, 2 * second, 0},
		{"none any more", energy{10, 0, 1000, true}, energy{}, 2 * second, 0},
		{"nobody knows who computed", energy{10, 0, 0, true}, energy{15, 0, 0, true}, 2 * second, 0},
		{"began anew", energy{10, 0, 1000, true}, energy{1, 200, 1400, true}, 2 * second, 0},
	} {
		if got := joules(tt.before, tt.after, tt.cpu); got != tt.want {
			t.Errorf("%s: %g J, want %g", tt.name, got, tt.want)
		}
	}
}

// counting is a machine that counts energy.
type counting struct {
	known
	now energy
}

func (c *counting) Energy() (float64, uint64, uint64, bool) {
	return c.now.joules, c.now.busy, c.now.total, c.now.ok
}

// TestMeter counts the energy of a slice, of which the device's samples know
// nothing yet.
func TestMeter(t *testing.T) {
	f := benched(t)
	m := &counting{now: energy{10, 100, 1000, true}}
	f.machine = m
	s, err := f.subject(task{}, worker.Image{})
	if err != nil || s.Meter == nil {
		t.Fatalf("no meter, %v", err)
	}
	end := s.Meter()
	m.now = energy{11.5, 105, 1010, true}
	if got := end(profile.SliceTime); got != 1.5 {
		t.Errorf("%g J", got)
	}
	m.now.ok = false
	if s, err := f.subject(task{}, worker.Image{}); err != nil || s.Meter != nil {
		t.Errorf("a meter of a device that cannot tell, %v", err)
	}
}

// TestQuiet: a device that is throttled or compiles is not idle.
func TestQuiet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := benched(t)
		q := quiet{f.host}
		idle := func(when string, want bool) {
			t.Helper()
			time.Sleep(time.Millisecond)
			if got := q.Idle() > 0; got != want {
				t.Errorf("%s: idle %v", when, got)
			}
		}
		idle("at rest", true)
		if err := f.host.engine.Throttle(t.Context(), engine.Throttle{Cordon: true}); err != nil {
			t.Fatal(err)
		}
		idle("cordoned", false)
		if err := f.host.engine.Throttle(t.Context(), engine.Throttle{}); err != nil {
			t.Fatal(err)
		}
		idle("no more", true)
		if _, err := f.host.counted(func(context.Context, worker.Runtime, engine.Spec) (worker.Image, error) {
			idle("while it compiles", false)
			return worker.Image{}, nil
		})(t.Context(), worker.Runtime{}, engine.Spec{}); err != nil {
			t.Fatal(err)
		}
		idle("compiled", true)
	})
}

// loader is a runtime that loads everything and runs nothing.
type loader struct{}

func (loader) Load(context.Context, engine.Spec) (engine.Info, error) {
	x := []tensor.Info{{Name: "x", Type: tensor.Float32, Shape: []int64{-1, 4}}}
	return engine.Info{Inputs: x, Outputs: x, Batch: true}, nil
}
func (loader) Activate(context.Context, engine.VersionID, engine.Setting) (engine.Need, error) {
	return engine.Need{}, nil
}
func (loader) Set(context.Context, engine.VersionID, engine.Setting) error { return nil }
func (loader) Deactivate(context.Context, engine.VersionID) error          { return nil }
func (loader) Run(context.Context, engine.VersionID, [][]tensor.Tensor, []string) (engine.Outcome, error) {
	return engine.Outcome{}, errors.New("it runs nothing")
}
func (loader) Unload(context.Context, engine.VersionID) error { return nil }

// known is a machine of which all is said.
type known struct {
	available, total uint64
	driver           string
}

func (k *known) Info() *dunlinv1.DeviceInfo {
	return &dunlinv1.DeviceInfo{DriverVersion: k.driver, CpuModel: "a"}
}
func (k *known) Sample() *dunlinv1.Telemetry                  { return &dunlinv1.Telemetry{} }
func (k *known) Memory() (available, total uint64, err error) { return k.available, k.total, nil }
func (k *known) Close() error                                 { return nil }

// benched is a profiler of which a test measures.
func benched(t *testing.T) *profiler {
	t.Helper()
	data := t.TempDir()
	cache, err := compiled.Open(filepath.Join(data, cacheFolder), 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	e := engine.New(engine.Config{Runtime: loader{}})
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- e.Run(ctx) }()
	t.Cleanup(func() { stop(); <-done })
	h := &host{engine: e, cache: cache, serving: Serving{Profile: "on", ProfileDuty: 100, machine: &known{}, Log: slog.New(slog.DiscardHandler)}}
	f, err := newProfiler(h, profiles.Profile{Name: "generic"}, data)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// load loads a version of digits, and notes where its files are.
func (f *profiler) load(t *testing.T, model, file string, load func(context.Context, engine.Spec) (engine.Info, error)) engine.Spec {
	t.Helper()
	s := engine.Spec{ID: engine.VersionID{Model: model, Version: 1}, Dir: t.TempDir(), Entry: "m.onnx"}
	raw, err := os.ReadFile(digits + file)
	if err == nil {
		err = os.WriteFile(filepath.Join(s.Dir, s.Entry), raw, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	info, err := load(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	s.ID = info.ID
	f.mu.Lock()
	f.specs[s.ID] = s
	f.mu.Unlock()
	return s
}

// measures looks, and waits for what is measured then.
func (f *profiler) measures(ctx context.Context) {
	if f.look(ctx, worker.Runtime{}); f.work != nil {
		<-f.work.done
		f.finish(ctx)
	}
}

// batch gives the most rows of a version's run.
func (f *profiler) batch(t *testing.T, s engine.Spec) int {
	t.Helper()
	info, ok := f.host.engine.Info(engine.VersionID{Model: s.ID.Model, Version: s.ID.Version})
	if !ok {
		t.Fatalf("%s is not loaded", s.ID)
	}
	return info.Options.MaxBatchSize
}

// ofBatch is a profile that recommends one.
func ofBatch(n uint32) *dunlinv1.ModelProfile {
	return &dunlinv1.ModelProfile{
		MeasuredAt: timestamppb.Now(), Recommended: &dunlinv1.ModelSetting{Provider: profile.CPU, Batch: n, Instances: 1},
		Latency: []*dunlinv1.LatencyPoint{{Rows: 1, Seconds: 1}},
	}
}

// keep stores the profile of a version.
func (f *profiler) keep(t *testing.T, s engine.Spec, p *dunlinv1.ModelProfile) {
	t.Helper()
	key, err := f.key(s, worker.Runtime{})
	if err != nil {
		t.Fatal(err)
	}
	key.Name(p)
	if err := f.store.Put(p); err != nil {
		t.Fatal(err)
	}
}

// TestLookGoesOn: while a version is measured, what is known of another one is
// used, and a version that is replaced is no longer measured.
func TestLookGoesOn(t *testing.T) {
	f := benched(t)
	left := make(chan struct{})
	n := 0
	f.bench = func(ctx context.Context, _ task) (*dunlinv1.ModelProfile, error) {
		if n++; n == 1 {
			<-ctx.Done()
			close(left)
		}
		return ofBatch(7), nil
	}
	a := f.load(t, "a", "v1.onnx", f.host.engine.Load)
	f.look(t.Context(), worker.Runtime{})
	b := f.load(t, "b", "v2.onnx", f.host.engine.Load)
	f.keep(t, b, ofBatch(4))
	f.look(t.Context(), worker.Runtime{})
	if n := f.batch(t, b); n != 4 {
		t.Errorf("a batch of %d while another version is measured, 4 was kept", n)
	}
	f.load(t, "a", "v2.onnx", f.host.engine.Replace)
	f.look(t.Context(), worker.Runtime{})
	<-left
	f.finish(t.Context())
	if n := f.batch(t, a); n != 4 {
		t.Errorf("a batch of %d; its files are those of b now, of which 4 was kept", n)
	}
	if f.work != nil || n != 1 {
		t.Errorf("measured %d times", n)
	}
}

// TestStoredProfile: a profile counts for the cores, the driver and the provider
// that it was measured with.
func TestStoredProfile(t *testing.T) {
	f := benched(t)
	s := f.load(t, "a", "v1.onnx", f.host.engine.Load)
	f.host.serving.Threads = 4
	f.keep(t, s, ofBatch(4))
	m := f.machine.(*known)
	stored := func(what string, found worker.Runtime, want bool) {
		t.Helper()
		if _, err := f.stored(s, found); (err == nil) != want || err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: %v", what, err)
		}
	}
	stored("as measured", worker.Runtime{}, true)
	stored("on the GPU", worker.Runtime{Pooling: ort.Pooling{Works: true}}, false)
	m.driver = "580.1"
	stored("another driver", worker.Runtime{}, false)
	m.driver, f.host.serving.Threads = "", 1
	stored("other threads", worker.Runtime{}, false)
}

func TestProfiledCores(t *testing.T) {
	f := benched(t)
	f.firmware.Affinity = "0-2,5"
	if n, err := f.cores(); n != 4 || err != nil {
		t.Errorf("%d, %v", n, err)
	}
	f.firmware.Threads = 3
	if n, err := f.cores(); n != 3 || err != nil {
		t.Errorf("%d, %v", n, err)
	}
}

func TestMeasureRoom(t *testing.T) {
	f := &profiler{machine: &known{available: 80 << 30, total: 100 << 30}}
	slack := f.measureRoom(engine.Memory{})
	if slack <= 0 || slack >= 40<<30 {
		t.Errorf("%d of the available memory", slack)
	}
	for _, tt := range []struct{ budget, used, want int64 }{
		{30 << 30, 30 << 30, 1}, {30 << 30, 31 << 30, 1}, {30 << 30, 20 << 30, 10 << 30}, {90 << 30, 1 << 30, slack},
	} {
		if room := f.measureRoom(engine.Memory{Budget: tt.budget, Used: tt.used}); room != tt.want {
			t.Errorf("budget %d of which %d are used: %d, want %d", tt.budget, tt.used, room, tt.want)
		}
	}
}

// TestMeasuringFails: it is tried again, later and later.
func TestMeasuringFails(t *testing.T) {
	f := benched(t)
	n := 0
	f.bench = func(context.Context, task) (*dunlinv1.ModelProfile, error) {
		n++
		return nil, profile.ErrDead
	}
	s := f.load(t, "a", "v1.onnx", f.host.engine.Load)
	want := measureAgain
	for range 12 {
		f.measures(t.Context())
		f.measures(t.Context())
		if wait := time.Until(f.wait[s.ID]); wait > want || wait < want-time.Minute/2 {
			t.Errorf("after %d: waits for %v, want %v", n, wait, want)
		}
		f.wait[s.ID], want = time.Time{}, min(2*want, measureSeldom)
	}
	if n != 12 {
		t.Errorf("measured %d times", n)
	}
}

// TestRunEndsMeasuring: what is measured ends before run does.
func TestRunEndsMeasuring(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := benched(t)
		f.host.worker = &newest{}
		ctx, stop := context.WithCancel(t.Context())
		ended := false
		f.bench = func(ctx context.Context, _ task) (*dunlinv1.ModelProfile, error) {
			stop()
			<-ctx.Done()
			time.Sleep(10 * time.Millisecond)
			ended = true
			return nil, ctx.Err()
		}
		f.load(t, "a", "v1.onnx", f.host.engine.Load)
		if err := f.run(ctx); err != nil || !ended {
			t.Errorf("%v, ended %v", err, ended)
		}
	})
}

// newest is a runner whose runtime has started.
type newest struct{ runner }

func (*newest) Runtime(context.Context) (worker.Runtime, error) { return worker.Runtime{}, nil }
