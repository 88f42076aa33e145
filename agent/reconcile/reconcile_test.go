package reconcile

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"go.uber.org/goleak"
	"google.golang.org/protobuf/proto"

	"github.com/dunlin/dunlin/agent/engine"
	"github.com/dunlin/dunlin/agent/state"
	"github.com/dunlin/dunlin/models/signing"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// simulated loads every file but those that begin with "not a model", and
// answers requests as engine and front of a device do.
type simulated struct {
	t       testing.TB
	mu      sync.Mutex
	loaded  map[engine.VersionID]bool
	serving map[string]int64
	routes  []*dunlinv1.DesiredRoute
	labels  map[string]string
	events  []*dunlinv1.Event
	faults  []error          // of the next loads
	behind  map[string]int64 // what stands by
	counts  map[engine.VersionID]Counts
	opens   func(engine.Spec) // sees what is about to be opened; nil: nobody does
}

func (s *simulated) standby(fallback map[string]int64, _ map[string]bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.behind = fallback
}

// count gives the counts of a loaded version.
func (s *simulated) count(id engine.VersionID) (Counts, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.counts[id], s.loaded[id]
}

// answered has a version have answered so many requests.
func (s *simulated) answered(id engine.VersionID, n Counts) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.counts[id] = n
}

func newSimulated(t testing.TB) *simulated {
	return &simulated{t: t, loaded: map[engine.VersionID]bool{}, serving: map[string]int64{}, counts: map[engine.VersionID]Counts{}}
}

var errNotAModel = errors.New("not a model")

func try(s engine.Spec) error {
	raw, err := os.ReadFile(filepath.Join(s.Dir, s.Entry))
	if err == nil && bytes.HasPrefix(raw, []byte("not a model")) {
		err = fmt.Errorf("%s: %w", filepath.Join(s.Dir, s.Entry), errNotAModel)
	}
	return err
}

func (s *simulated) Check(_ context.Context, spec engine.Spec) (engine.Info, error) {
	if s.opens != nil {
		s.opens(spec)
	}
	return engine.Info{}, try(spec)
}

func (s *simulated) Load(_ context.Context, spec engine.Spec) (engine.Info, error) {
	if s.opens != nil {
		s.opens(spec)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.faults) > 0 {
		err := s.faults[0]
		s.faults = s.faults[1:]
		return engine.Info{}, err
	}
	if s.loaded[spec.ID] {
		s.t.Errorf("%s is loaded twice", spec.ID)
	}
	s.loaded[spec.ID] = true
	return engine.Info{}, try(spec)
}

func (s *simulated) Unload(_ context.Context, id engine.VersionID) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.serving[id.Model] == id.Version {
		s.t.Errorf("%s is unloaded while it serves", id)
	}
	delete(s.loaded, id)
	return nil
}

func (s *simulated) SetServing(versions map[string]int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for model, v := range versions {
		if !s.loaded[engine.VersionID{Model: model, Version: v}] {
			s.t.Errorf("%s:%d serves and is not loaded", model, v)
		}
	}
	s.serving = maps.Clone(versions)
}

func (s *simulated) SetRoutes(_ string, routes []*dunlinv1.DesiredRoute, labels map[string]string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.routes, s.labels = routes, labels
}

func (s *simulated) answers(model string) int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.serving[model]
}

func (s *simulated) event(e *dunlinv1.Event) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.events = append(s.events, e)
}

func (s *simulated) kinds() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var kinds []string
	for _, e := range s.events {
		kinds = append(kinds, e.Kind)
	}
	return strings.Join(kinds, " ")
}

// testDevice is a device's data folder with a Reconciler that runs on it.
type testDevice struct {
	*Reconciler
	*simulated
	t        testing.TB
	dir      string
	registry *testRegistry
	trust    atomic.Pointer[signing.Trust]
	disk     *Disk // nil: a folder
	stop     func()
	// probation is short where a test does not say otherwise.
	probation Probation
	inspect   time.Duration // 0: as rarely as devices do
	opens     func(engine.Spec)
}

func trustAll() *signing.Trust { return signing.TrustAll }

func (d *testDevice) trusts() *signing.Trust { return d.trust.Load() }

func (d *testDevice) start() {
	d.t.Helper()
	store, err := state.Open(d.t.Context(), filepath.Join(d.dir, "state.db"), state.Limits{})
	if err != nil {
		d.t.Fatal(err)
	}
	d.simulated = newSimulated(d.t)
	d.simulated.opens = d.opens
	d.Reconciler, err = New(Config{
		Dir: filepath.Join(d.dir, "bundles"), Disk: d.disk, Registry: d.registry.registry, Stall: 5 * time.Second, State: store, Trust: d.trusts,
		Engine: d.simulated, Check: d.Check, Passing: func(err error) bool { return !errors.Is(err, errNotAModel) },
		Front: d.simulated, Probation: d.probation, Inspect: d.inspect, Standby: d.simulated.standby, Counts: d.simulated.count, Event: d.simulated.event, Log: testLog(d.t),
	})
	if err != nil {
		d.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(d.t.Context())
	done := make(chan error, 1)
	go func() { done <- d.Run(ctx) }()
	d.stop = sync.OnceFunc(func() {
		cancel()
		if err := errors.Join(<-done, store.Close()); err != nil {
			d.t.Error(err)
		}
	})
}

func startDevice(t testing.TB, reg *testRegistry) *testDevice {
	t.Helper()
	return startDeviceOn(t, reg, nil)
}

// startDeviceOn is startDevice with a simulated disk.
func startDeviceOn(t testing.TB, reg *testRegistry, disk *Disk) *testDevice {
	t.Helper()
	ignore := goleak.IgnoreCurrent()
	t.Cleanup(func() {
		goleak.VerifyNone(t, ignore, goleak.IgnoreAnyFunction("net/http.(*persistConn).readLoop"), goleak.IgnoreAnyFunction("net/http.(*persistConn).writeLoop"), goleak.IgnoreAnyFunction("net/http.(*conn).serve"))
	})
	d := &testDevice{t: t, dir: t.TempDir(), registry: reg, disk: disk, probation: Probation{Most: 20 * time.Millisecond}}
	d.trust.Store(signing.TrustAll)
	d.start()
	t.Cleanup(func() { d.stop() })
	return d
}

// try starts it again, with another probation.
func (d *testDevice) try(p Probation) {
	d.t.Helper()
	d.until("is up", func(*dunlinv1.Reported) bool { return true })
	d.probation = p
	d.restart()
}

func (d *testDevice) restart() {
	d.stop()
	d.start()
}

// until waits until the report satisfies ok.
func (d *testDevice) until(what string, ok func(*dunlinv1.Reported) bool) {
	d.t.Helper()
	deadline := time.After(20 * time.Second)
	for {
		if r := d.Report(); r != nil && ok(r) {
			return
		}
		select {
		case <-d.Changed():
		case <-deadline:
			d.t.Fatalf("never %s: %v", what, d.Report())
		}
	}
}

func (d *testDevice) untilServing(model string, version int64) {
	d.t.Helper()
	d.until(fmt.Sprintf("serves %s:%d", model, version), func(r *dunlinv1.Reported) bool {
		s := status(r, model, version)
		return s != nil && s.Serving
	})
	if got := d.answers(model); got != version {
		d.t.Errorf("%s is answered by version %d, reported is %d", model, got, version)
	}
}

func status(r *dunlinv1.Reported, model string, version int64) *dunlinv1.VersionStatus {
	for _, v := range r.Versions {
		if v.Model == model && v.Version == version {
			return v
		}
	}
	return nil
}

func desired(number uint64, routes []*dunlinv1.DesiredRoute, versions ...*dunlinv1.DesiredVersion) *dunlinv1.Desired {
	raw, err := proto.Marshal(&dunlinv1.DesiredDocument{Versions: versions, Routes: routes})
	if err != nil {
		panic(err)
	}
	sum := sha256.Sum256(raw)
	return &dunlinv1.Desired{
		Generation: &dunlinv1.Generation{Incarnation: "one", Number: number}, Sha256: sum[:], SizeBytes: uint64(len(raw)), Document: raw,
	}
}

func (b *testBundle) want(model string, version int64) *dunlinv1.DesiredVersion {
	return &dunlinv1.DesiredVersion{Deployment: model, Model: model, Version: version, Digest: b.digest.String(), SizeBytes: uint64(b.size)}
}

// The labels that rules look at come with the routes.
func TestRoutesHaveLabels(t *testing.T) {
	v1 := pack(t, map[string][][]byte{"m.onnx": blocks(seeded(t), 3)})
	d := startDevice(t, serveBundles(t, v1))
	want := func(number uint64, labels ...*dunlinv1.DeviceLabel) {
		t.Helper()
		g := desired(number, nil)
		doc, err := proto.Marshal(&dunlinv1.DesiredDocument{
			Versions: []*dunlinv1.DesiredVersion{v1.want("digits", 1)}, Routes: []*dunlinv1.DesiredRoute{route("r", target("digits", 0))}, Labels: labels,
		})
		if err != nil {
			t.Fatal(err)
		}
		sum := sha256.Sum256(doc)
		g.Document, g.Sha256, g.SizeBytes = doc, sum[:], uint64(len(doc))
		d.Desire(g)
		d.until("has the route", func(r *dunlinv1.Reported) bool {
			return r.Observed.GetNumber() == number && len(r.Routes) == 1 && r.Routes[0].Ready
		})
		d.mu.Lock()
		defer d.mu.Unlock()
		got := map[string]string{}
		for _, l := range labels {
			got[l.Name] = l.Value
		}
		if !maps.Equal(d.labels, got) || len(d.simulated.routes) != 1 {
			t.Errorf("generation %d: labels %v, want %v", number, d.labels, got)
		}
	}
	want(1, &dunlinv1.DeviceLabel{Name: "site", Value: "a"})
	want(2, &dunlinv1.DeviceLabel{Name: "site", Value: "b"}, &dunlinv1.DeviceLabel{Name: "tier", Value: "1"})
	want(3)
}

// A policy that this device cannot compile is refused, and the one before stays.
func TestBadRuleIsRefused(t *testing.T) {
	v1 := pack(t, map[string][][]byte{"m.onnx": blocks(seeded(t), 3)})
	d := startDevice(t, serveBundles(t, v1))
	d.Desire(desired(1, []*dunlinv1.DesiredRoute{route("r", target("digits", 0))}, v1.want("digits", 1)))
	d.untilServing("digits", 1)
	d.until("has the route", func(r *dunlinv1.Reported) bool { return len(r.Routes) == 1 && r.Routes[0].Ready })
	bad := route("r", target("digits", 0))
	bad.Rules = []*dunlinv1.RouteRule{{Name: "a", Match: &dunlinv1.RouteMatch{Cel: "nobody"}, Targets: bad.Targets}}
	d.Desire(desired(2, []*dunlinv1.DesiredRoute{bad}, v1.want("digits", 1)))
	d.until("says that it refuses", func(r *dunlinv1.Reported) bool { return r.Refused != nil })
	since := d.Report().Refused.Since
	if got := d.Report(); got.Observed.GetNumber() != 1 || got.Refused.Generation.GetNumber() != 2 || since == nil || len(got.Routes) != 1 || !got.Routes[0].Ready ||
		!strings.HasPrefix(got.Refused.Reason, "routes[0]: route r: rules[0].match.cel: column 1 of the expression: undeclared reference to 'nobody'") {
		t.Errorf("report: %v", got)
	}
	// Another one that is refused takes its place; its reason is cut.
	for range 60 {
		bad.Rules = append(bad.Rules, proto.CloneOf(bad.Rules[0]))
	}
	d.Desire(desired(3, []*dunlinv1.DesiredRoute{bad}, v1.want("digits", 1)))
	d.until("refuses the next", func(r *dunlinv1.Reported) bool { return r.Refused.GetGeneration().GetNumber() == 3 })
	if got := d.Report(); len(got.Refused.Reason) > maxRefusal || got.Observed.GetNumber() != 1 {
		t.Errorf("report: %v", got)
	}
	d.Desire(desired(4, []*dunlinv1.DesiredRoute{route("r", target("digits", 1))}, v1.want("digits", 1)))
	d.until("has the fourth", func(r *dunlinv1.Reported) bool { return r.Observed.GetNumber() == 4 && r.Refused == nil })
	if got := d.kinds(); got != "version.stored version.serving desired.refused desired.refused" {
		t.Errorf("events: %s", got)
	}
	if got := d.Report(); len(got.Routes) != 1 || !got.Routes[0].Ready {
		t.Errorf("routes: %v", got.Routes)
	}
}

func TestServesWhatIsWanted(t *testing.T) {
	rng := seeded(t)
	v1, v2 := pack(t, map[string][][]byte{"m.onnx": blocks(rng, 3)}), pack(t, map[string][][]byte{"m.onnx": blocks(rng, 3)})
	d := startDevice(t, serveBundles(t, v1, v2))
	routes := []*dunlinv1.DesiredRoute{route("r", target("digits", 0))}
	d.Desire(desired(1, routes, v1.want("digits", 1)))
	d.untilServing("digits", 1)
	d.until("has the route", func(r *dunlinv1.Reported) bool { return len(r.Routes) == 1 && r.Routes[0].Ready })
	d.Desire(desired(2, routes, v2.want("digits", 2)))
	d.untilServing("digits", 2)
	d.until("removed version 1", func(r *dunlinv1.Reported) bool { return len(r.Versions) == 1 })
	if r := d.Report(); r.Observed.Number != 2 || r.Versions[0].BytesPresent != uint64(v2.size) || r.Versions[0].State != dunlinv1.VersionState_VERSION_STATE_RESIDENT {
		t.Errorf("report: %v", r)
	}
	if got := d.kinds(); got != "version.stored version.serving version.stored version.serving" {
		t.Errorf("events: %s", got)
	}
	d.Desire(desired(1, nil)) // late
	d.Desire(desired(3, nil))
	d.until("is empty", func(r *dunlinv1.Reported) bool { return len(r.Versions) == 0 && r.Observed.Number == 3 })
	entries, err := os.ReadDir(filepath.Join(d.dir, "bundles"))
	if err != nil || len(entries) > 0 {
		t.Errorf("left on disk: %v, %v", entries, err)
	}
	if d.answers("digits") != 0 {
		t.Error("still serving")
	}
}

func TestStartsWithoutNetwork(t *testing.T) {
	rng := seeded(t)
	v1, v2 := pack(t, map[string][][]byte{"m.onnx": blocks(rng, 3)}), pack(t, map[string][][]byte{"m.onnx": blocks(rng, 3)})
	d := startDevice(t, serveBundles(t, v1))
	d.Desire(desired(1, []*dunlinv1.DesiredRoute{route("r", target("digits", 0))}, v1.want("digits", 1)))
	d.untilServing("digits", 1)
	d.registry.Close()
	d.restart()
	d.untilServing("digits", 1)
	if g := d.Generation(); g.GetNumber() != 1 || g.GetIncarnation() != "one" {
		t.Errorf("generation %v", g)
	}
	if len(d.simulated.routes) != 1 {
		t.Errorf("routes %v", d.simulated.routes)
	}
	// A version that cannot be fetched does not stop the old one, whatever is
	// restarted.
	d.Desire(desired(2, nil, v2.want("digits", 2)))
	d.until("gives a reason", func(r *dunlinv1.Reported) bool {
		s := status(r, "digits", 2)
		return s != nil && strings.Contains(s.Reason, "connection refused") && strings.HasPrefix(s.Reason, "try ")
	})
	d.restart()
	d.untilServing("digits", 1)
	if g := d.Generation(); g.GetNumber() != 2 {
		t.Errorf("generation %v", g)
	}
}

func TestQuarantine(t *testing.T) {
	rng := seeded(t)
	good := pack(t, map[string][][]byte{"m.onnx": blocks(rng, 2)})
	unloadable := pack(t, map[string][][]byte{"m.onnx": {append([]byte("not a model"), block(rng)...)}})
	spoilt := pack(t, map[string][][]byte{"m.onnx": blocks(rng, 2)})
	reg := serveBundles(t, good, unloadable, spoilt)
	reg.setFault(func(dg digest.Digest, offset int64, p []byte) verdict {
		if dg == spoilt.blobOf("m.onnx") && offset == 0 {
			p[7] ^= 1
		}
		return pass
	})
	d := startDevice(t, reg)
	d.Desire(desired(1, nil, good.want("digits", 1)))
	d.untilServing("digits", 1)
	for i, tt := range []struct {
		bundle *testBundle
		reason string
	}{{unloadable, "m.onnx: not a model"}, {spoilt, "verify m.onnx at offset 0"}} {
		version := int64(i + 2)
		quarantined := func(r *dunlinv1.Reported) bool {
			s := status(r, "digits", version)
			return s != nil && s.State == dunlinv1.VersionState_VERSION_STATE_QUARANTINED && strings.HasPrefix(s.Reason, tt.reason)
		}
		number := 10 * uint64(version)
		d.Desire(desired(number, nil, tt.bundle.want("digits", version)))
		d.until("quarantines", quarantined)
		asked := reg.servedBytes()
		d.Desire(desired(number+1, nil, tt.bundle.want("digits", version), good.want("other", 1)))
		d.untilServing("other", 1)
		if !quarantined(d.Report()) || reg.servedBytes() != asked {
			t.Errorf("the same digest was tried again: %v", d.Report())
		}
		if got := d.answers("digits"); got != 1 {
			t.Errorf("digits is answered by version %d", got)
		}
		// A start tries once more, behind the version that serves.
		d.restart()
		d.untilServing("digits", 1)
		d.until("quarantines again", quarantined)
	}
	d.Desire(desired(100, nil, good.want("digits", 1)))
	d.until("is clean", func(r *dunlinv1.Reported) bool { return len(r.Versions) == 1 && r.Versions[0].Serving })
}

func TestPassingFaultsAreTriedAgain(t *testing.T) {
	b := pack(t, map[string][][]byte{"m.onnx": blocks(seeded(t), 2)})
	d := startDevice(t, serveBundles(t, b))
	d.mu.Lock()
	d.faults = []error{errors.New("no runtime yet")}
	d.mu.Unlock()
	d.Desire(desired(1, nil, b.want("digits", 1)))
	d.until("gives a reason", func(r *dunlinv1.Reported) bool {
		s := status(r, "digits", 1)
		return s != nil && s.State == dunlinv1.VersionState_VERSION_STATE_STORED && strings.Contains(s.Reason, "no runtime yet")
	})
	d.Retry()
	d.untilServing("digits", 1)
	d.Lost(engine.VersionID{Model: "digits", Version: 1}, errors.New("gone"))
	d.until("lost it", func(r *dunlinv1.Reported) bool { return !status(r, "digits", 1).Serving })
	d.untilServing("digits", 1)
}

func TestNewerGenerationPreempts(t *testing.T) {
	rng := seeded(t)
	slow, b := pack(t, map[string][][]byte{"m.onnx": blocks(rng, 4)}), pack(t, map[string][][]byte{"m.onnx": blocks(rng, 2)})
	reg := serveBundles(t, slow, b)
	hangs := make(chan struct{}, 10)
	reg.setFault(func(dg digest.Digest, offset int64, _ []byte) verdict {
		if dg == slow.blobOf("m.onnx") && offset > 100<<10 {
			hangs <- struct{}{}
			return stalled
		}
		return pass
	})
	d := startDevice(t, reg)
	d.Desire(desired(1, nil, slow.want("digits", 1)))
	<-hangs
	d.Desire(desired(2, nil, b.want("digits", 2)))
	d.untilServing("digits", 2)
	d.until("removed the part", func(r *dunlinv1.Reported) bool { return len(r.Versions) == 1 })
}

func TestRefusesBadDocuments(t *testing.T) {
	b := pack(t, map[string][][]byte{"m.onnx": blocks(seeded(t), 1)})
	d := startDevice(t, serveBundles(t, b))
	wrong := desired(1, nil, b.want("digits", 1), b.want("digits", 2))
	d.Desire(wrong)
	d.Desire(wrong)
	unequal := desired(2, nil, b.want("digits", 1))
	unequal.Sha256 = wrong.Sha256
	d.Desire(desired(3, nil, b.want("digits", 1)))
	d.untilServing("digits", 1)
	d.Desire(unequal)
	other := desired(1, nil)
	other.Generation.Incarnation = "two" // a new store counts from the start
	d.Desire(other)
	d.until("follows the new incarnation", func(r *dunlinv1.Reported) bool { return r.Observed.Incarnation == "two" && len(r.Versions) == 0 })
}

// A part that somebody removes between two tries is fetched again.
func TestPartIsRemoved(t *testing.T) {
	rng := seeded(t)
	b := pack(t, map[string][][]byte{"m.onnx": blocks(rng, 8)})
	reg := serveBundles(t, b)
	var most atomic.Int64
	most.Store(b.size / 2)
	reg.setFault(func(of digest.Digest, offset int64, _ []byte) verdict {
		if of == b.blobOf("m.onnx") && offset > most.Load() {
			return cut
		}
		return pass
	})
	d := startDevice(t, reg)
	d.Desire(desired(1, nil, b.want("digits", 1)))
	d.until("fails", func(r *dunlinv1.Reported) bool {
		s := status(r, "digits", 1)
		return s != nil && s.Reason != ""
	})
	part := filepath.Join(d.dir, "bundles", b.digest.Encoded()+partSuffix)
	if err := os.Rename(part, filepath.Join(t.TempDir(), "gone")); err != nil {
		t.Fatal(err)
	}
	most.Store(b.size)
	d.Retry()
	d.untilServing("digits", 1)
	if got, err := os.ReadFile(filepath.Join(d.dir, "bundles", b.digest.Encoded(), filesFolder, "m.onnx")); err != nil || !bytes.Equal(got, b.files["m.onnx"]) {
		t.Errorf("%d bytes are installed, want %d (%v)", len(got), len(b.files["m.onnx"]), err)
	}
	if kinds := d.kinds(); strings.Count(kinds, "version.stored") != 1 {
		t.Errorf("what was not whole was taken for a bundle: %s", kinds)
	}
}

// However often it is stopped, and whatever is wanted meanwhile, in the end
// it runs what is wanted last.
func TestConvergesOverRestarts(t *testing.T) {
	rng := seeded(t)
	var bundles []*testBundle
	shared := blocks(rng, 6)
	for range 4 {
		bundles = append(bundles, pack(t, map[string][][]byte{"m.onnx": append(blocks(rng, 3), shared...)}))
	}
	reg := serveBundles(t, bundles...)
	faults := rand.New(rand.NewPCG(rng.Uint64(), 0))
	reg.setFault(func(digest.Digest, int64, []byte) verdict {
		if faults.IntN(60) == 0 {
			return cut
		}
		return pass
	})
	d := startDevice(t, reg)
	last := map[string]int64{}
	for number := range uint64(25) {
		var versions []*dunlinv1.DesiredVersion
		clear(last)
		for _, model := range []string{"a", "b"} {
			if v := rng.IntN(len(bundles) + 1); v > 0 {
				last[model] = int64(v)
				versions = append(versions, bundles[v-1].want(model, int64(v)))
			}
		}
		d.Desire(desired(number+1, nil, versions...))
		for range rng.IntN(4) {
			select {
			case <-d.Changed():
			case <-time.After(50 * time.Millisecond):
			}
		}
		d.until("takes the document", func(r *dunlinv1.Reported) bool { return r.Observed.GetNumber() == number+1 })
		if rng.IntN(2) == 0 {
			d.restart()
		}
		d.Retry()
	}
	reg.setFault(nil)
	d.until("runs what is wanted last", func(r *dunlinv1.Reported) bool {
		d.Retry()
		for _, v := range r.Versions {
			if last[v.Model] != v.Version || !v.Serving {
				return false
			}
		}
		return len(r.Versions) == len(last)
	})
}

func FuzzParseDesired(f *testing.F) {
	f.Add(desired(1, []*dunlinv1.DesiredRoute{route("r", target("m", 1))}, wantVersion("m", 1, "x")).Document)
	f.Add([]byte{0xff, 1})
	f.Fuzz(func(t *testing.T, raw []byte) {
		sum := sha256.Sum256(raw)
		doc, err := parseDesired(&dunlinv1.Desired{Generation: &dunlinv1.Generation{}, Sha256: sum[:], Document: raw}, sum)
		if err != nil {
			return
		}
		c := newCore()
		c.setDesired(doc, time.Unix(0, 0))
		if len(c.desired) != len(doc.Versions) || len(c.routes) != len(doc.Routes) {
			t.Errorf("%v gives %d versions and %d routes", doc, len(c.desired), len(c.routes))
		}
		c.next(time.Unix(0, 0))
	})
}

// A version on probation whose requests fail is left for the one before, which
// stood by, without the controller; the document that wants it, and another
// start, do not bring it back. A power cut during a probation brings the good one
// back first, and a stop does not.
func TestGoesBackByItself(t *testing.T) {
	rng := seeded(t)
	b1, b2, b3 := pack(t, map[string][][]byte{"m.onnx": blocks(rng, 2)}), pack(t, map[string][][]byte{"m.onnx": blocks(rng, 2)}), pack(t, map[string][][]byte{"m.onnx": blocks(rng, 2)})
	reg := serveBundles(t, b1, b2, b3)
	d := startDevice(t, reg)
	d.try(Probation{Runs: 100, Most: time.Hour})
	d.Desire(desired(1, nil, b1.want("digits", 1)))
	d.untilServing("digits", 1)
	d.Desire(desired(2, nil, b2.want("digits", 2)))
	d.untilServing("digits", 2)
	d.mu.Lock()
	if d.behind["digits"] != 1 || !d.loaded[engine.VersionID{Model: "digits", Version: 1}] {
		t.Errorf("what stands by is %v", d.behind)
	}
	d.mu.Unlock()
	d.answered(engine.VersionID{Model: "digits", Version: 2}, Counts{Succeeded: 3, Failed: 7})
	back := func(r *dunlinv1.Reported) bool {
		return slices.ContainsFunc(r.Versions, func(v *dunlinv1.VersionStatus) bool {
			return v.Version == 2 && v.Reverted && v.State == dunlinv1.VersionState_VERSION_STATE_QUARANTINED && strings.Contains(v.Reason, "7 of 10 requests failed")
		}) && slices.ContainsFunc(r.Versions, func(v *dunlinv1.VersionStatus) bool { return v.Version == 1 && v.Serving })
	}
	d.until("goes back", back)
	if kinds := d.kinds(); !strings.HasSuffix(kinds, "version.serving version.reverted version.serving") {
		t.Errorf("events %s", kinds)
	}
	d.restart()
	d.until("is back after a start", back)
	d.Desire(desired(3, nil, b2.want("digits", 2)))
	d.until("is back with another document", func(r *dunlinv1.Reported) bool { return r.Observed.GetNumber() == 3 && back(r) })

	// Another version: its probation is cut short, and then it proves itself.
	d.Desire(desired(4, nil, b3.want("digits", 3)))
	d.untilServing("digits", 3)
	d.restart()
	if first := d.first("digits"); first != 3 {
		t.Errorf("after a stop during a probation version %d serves first", first)
	}
	d.untilServing("digits", 3)
	d.cut()
	if first := d.first("digits"); first != 1 {
		t.Errorf("after a power cut during a probation version %d serves first", first)
	}
	d.untilServing("digits", 3)
	d.answered(engine.VersionID{Model: "digits", Version: 3}, Counts{Succeeded: 100})
	d.until("has the new one only", func(r *dunlinv1.Reported) bool { return len(r.Versions) == 1 && r.Versions[0].Version == 3 })
	d.restart()
	if first := d.first("digits"); first != 3 {
		t.Errorf("after its probation version %d serves first", first)
	}
}

// The bundle of the good version is gone at a start after a power cut, and the
// wanted one cannot be had: what served on probation stands in, and that is told.
// When the network is back the wanted one serves, and the good one is there again.
func TestStandsInAtStart(t *testing.T) {
	for name, harm := range map[string]func(folder string) error{
		"damaged": func(folder string) error { return os.Truncate(filepath.Join(folder, manifestFile), 10) },
		"missing": os.RemoveAll,
	} {
		t.Run(name, func(t *testing.T) {
			rng := seeded(t)
			b1, b2, b3 := pack(t, map[string][][]byte{"m.onnx": blocks(rng, 2)}), pack(t, map[string][][]byte{"m.onnx": blocks(rng, 2)}), pack(t, map[string][][]byte{"m.onnx": blocks(rng, 2)})
			s, reg := newSite(t), serveBundles(t, b1, b2, b3)
			one, _ := reg.sign(s.key, b1, "digits", 1)
			two, _ := reg.sign(s.key, b2, "digits", 2)
			three, _ := reg.sign(s.key, b3, "digits", 3)
			d := trusting(t, reg, s)
			d.try(Probation{Runs: 100, Most: time.Hour})
			d.Desire(desired(1, nil, b1.wantSigned("digits", 1, one)))
			d.untilServing("digits", 1)
			d.Desire(desired(2, nil, b2.wantSigned("digits", 2, two)))
			d.untilServing("digits", 2)
			reg.refuses.Store(true)
			d.Desire(desired(3, nil, b3.wantSigned("digits", 3, three)))
			d.until("cannot fetch", func(r *dunlinv1.Reported) bool {
				v := status(r, "digits", 3)
				return v != nil && v.Reason != ""
			})
			d.restart() // after a stop it goes on serving: it stands in for nothing
			d.untilServing("digits", 2)
			d.mu.Lock()
			if e := d.events; len(e) != 1 || e[0].Kind != "version.serving" || e[0].Version != 2 || e[0].Message != "" {
				t.Errorf("after a stop: events %v", e)
			}
			d.mu.Unlock()
			folder := filepath.Join(d.dir, "bundles", b1.digest.Encoded())
			if err := harm(folder); err != nil {
				t.Fatal(err)
			}
			d.cut()
			d.untilServing("digits", 2)
			d.mu.Lock()
			if e := d.events; len(e) != 2 || e[0].Kind != "drift.found" || e[0].Version != 1 || !strings.HasSuffix(e[0].Message, "have "+name) ||
				e[1].Kind != "version.serving" || e[1].Version != 2 || e[1].Message != "stands in for digits:1, which is fetched again" {
				t.Errorf("events %v", e)
			}
			d.mu.Unlock()
			reg.refuses.Store(false)
			d.Retry()
			d.untilServing("digits", 3)
			d.until("has the good one again", func(r *dunlinv1.Reported) bool {
				d.Retry()
				v := status(r, "digits", 1)
				return len(r.Versions) == 2 && v != nil && v.State == dunlinv1.VersionState_VERSION_STATE_STORED
			})
			d.answered(engine.VersionID{Model: "digits", Version: 3}, Counts{Failed: 9})
			d.untilServing("digits", 1)
		})
	}
}

// cut starts the device again with what was on disk before it was stopped.
func (d *testDevice) cut() {
	d.t.Helper()
	was := map[string][]byte{}
	for _, suffix := range []string{"", "-wal", "-shm"} {
		path := filepath.Join(d.dir, "state.db"+suffix)
		raw, err := os.ReadFile(path)
		if err != nil {
			d.t.Fatal(err)
		}
		was[path] = raw
	}
	d.stop()
	for path, raw := range was {
		if err := os.WriteFile(path, raw, 0o600); err != nil {
			d.t.Fatal(err)
		}
	}
	d.start()
}

// first waits for a version to serve and gives it.
func (d *testDevice) first(model string) (version int64) {
	d.t.Helper()
	d.until("serves", func(*dunlinv1.Reported) bool {
		version = d.answers(model)
		return version != 0
	})
	return version
}
