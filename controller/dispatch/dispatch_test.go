package dispatch

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"
	"google.golang.org/protobuf/proto"

	"github.com/dunlin/dunlin/controller/fleet"
	"github.com/dunlin/dunlin/controller/identity"
	"github.com/dunlin/dunlin/controller/store"
	"github.com/dunlin/dunlin/internal/link"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// recorder is a Bus that keeps what is published.
type recorder struct {
	mu   sync.Mutex
	sent []message
	cut  []string
	news chan struct{} // capacity 1
	// onPublish, if set, is called with each message before Publish returns.
	onPublish func(message)
}

func newRecorder() *recorder { return &recorder{news: make(chan struct{}, 1)} }

func (r *recorder) note() {
	select {
	case r.news <- struct{}{}:
	default:
	}
}

func (r *recorder) Publish(topic string, payload []byte) error {
	m := message{kind: "epoch", payload: payload}
	if topic != link.EpochTopic {
		var err error
		if m.device, m.kind, err = link.ParseDown(topic); err != nil {
			return err
		}
	}
	r.mu.Lock()
	r.sent = append(r.sent, m)
	r.note()
	onPublish := r.onPublish
	r.mu.Unlock()
	if onPublish != nil {
		onPublish(m)
	}
	return nil
}

func (r *recorder) Disconnect(device string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.cut = append(r.cut, device)
	r.note()
}

// wait gives the first thing that find finds in what was sent from position
// from on, and the position behind it.
func (r *recorder) wait(t *testing.T, what string, from int, find func(message) bool) (message, int) {
	t.Helper()
	deadline := time.After(10 * time.Second)
	for {
		r.mu.Lock()
		sent := r.sent[min(from, len(r.sent)):]
		i := slices.IndexFunc(sent, find)
		var m message
		if i >= 0 {
			m = sent[i]
		}
		r.mu.Unlock()
		if i >= 0 {
			return m, from + i + 1
		}
		select {
		case <-r.news:
		case <-deadline:
			t.Fatalf("no %s", what)
		}
	}
}

type world struct {
	t       *testing.T
	path    string
	store   *store.Store
	bus     *recorder
	d       *Dispatcher
	metrics *prometheus.Registry
	stop    func()
	ahead   atomic.Int64 // of the clock, nanoseconds
}

var fast = timing{
	resend: 20 * time.Millisecond, resendMost: 50 * time.Millisecond, ask: 20 * time.Millisecond, pass: time.Millisecond,
	look: 20 * time.Millisecond, beat: 20 * time.Millisecond, silence: time.Hour,
	sample: 20 * time.Millisecond, keep: 20 * time.Millisecond, drift: 20 * time.Millisecond,
}

func start(t *testing.T, path string, timing timing) *world {
	t.Helper()
	s, err := store.Open(t.Context(), path, store.Options{})
	if err != nil {
		t.Fatal(err)
	}
	w := &world{t: t, path: path, store: s, bus: newRecorder(), metrics: prometheus.NewRegistry()}
	w.run(timing)
	return w
}

func fresh(t *testing.T, timing timing) *world {
	return start(t, filepath.Join(t.TempDir(), "store.db"), timing)
}

func (w *world) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) join(device string) {
	w.t.Helper()
	_, hash := identity.NewToken("")
	_, err := w.store.CreateJoinToken(w.t.Context(), "user:test", hash, store.JoinToken{UsesLeft: 1, ExpiresAt: time.Now().Add(time.Hour)})
	w.must(err)
	w.must(joinDevice(w.t.Context(), w.store, hash, device))
	w.d.Joined(device)
}

func (w *world) push(model string) {
	w.t.Helper()
	_, _, err := w.store.CreateVersion(w.t.Context(), store.Version{Model: model, Digest: rnd(), Size: 10, CreatedBy: "user:test"})
	w.must(err)
}

var counter int

func rnd() string { counter++; return fmt.Sprintf("sha256:%064d", counter) }

func (w *world) apply(model string, version int, rollout ...string) string {
	w.t.Helper()
	objects, err := fleet.Parse(fmt.Sprintf("apiVersion: dunlin/v1\nkind: Deployment\nmetadata: {name: %s}\nspec: {model: %s, version: %d, selector: {}, rollout: {%s}}", model, model, version, strings.Join(rollout, ", ")))
	w.must(err)
	changes, err := w.store.Apply(w.t.Context(), "user:test", objects, false)
	w.must(err)
	w.d.Replan()
	return changes[0].Rollout
}

func (w *world) up(device, kind string, m proto.Message) {
	w.t.Helper()
	payload, err := proto.Marshal(m)
	w.must(err)
	w.d.Handle(link.Up(device, kind), payload)
}

func (w *world) hello(device, session string, have *dunlinv1.Generation) {
	w.t.Helper()
	w.up(device, link.Hello, &dunlinv1.Hello{BootId: "boot", Session: session, HaveGeneration: have})
}

// desired waits for a generation that find takes.
func (w *world) desired(device string, from int, find func(*dunlinv1.Desired, *dunlinv1.DesiredDocument) bool) (*dunlinv1.Desired, int) {
	w.t.Helper()
	var m dunlinv1.Desired
	_, at := w.bus.wait(w.t, "desired document", from, func(in message) bool {
		if in.device != device || in.kind != link.Desired {
			return false
		}
		var doc dunlinv1.DesiredDocument
		w.must(proto.Unmarshal(in.payload, &m))
		w.must(proto.Unmarshal(m.Document, &doc))
		return find(&m, &doc)
	})
	return &m, at
}

func hasVersion(model string, version int64) func(*dunlinv1.Desired, *dunlinv1.DesiredDocument) bool {
	return func(_ *dunlinv1.Desired, doc *dunlinv1.DesiredDocument) bool {
		return slices.ContainsFunc(doc.Versions, func(v *dunlinv1.DesiredVersion) bool { return v.Model == model && v.Version == version })
	}
}

func anything(*dunlinv1.Desired, *dunlinv1.DesiredDocument) bool { return true }

func isCommand(m message, device string, test func(*dunlinv1.Command) bool) bool {
	if m.kind != link.Command || m.device != device {
		return false
	}
	var c dunlinv1.Command
	return proto.Unmarshal(m.payload, &c) == nil && test(&c)
}

// rollout waits until a rollout is as find wants it.
func (w *world) rollout(id string, find func(fleet.Rollout) bool) fleet.Rollout {
	w.t.Helper()
	deadline := time.After(10 * time.Second)
	for {
		changed := w.d.Changed()
		r, err := w.store.Rollout(w.t.Context(), id)
		w.must(err)
		if find(r) {
			return r
		}
		select {
		case <-changed:
		case <-deadline:
			w.t.Fatalf("rollout is %+v", r)
		}
	}
}

func ended(state fleet.State) func(fleet.Rollout) bool {
	return func(r fleet.Rollout) bool { return r.State == state }
}

func (w *world) ignored(kind string, want float64) {
	w.t.Helper()
	waitFor(w.t, func() bool { return count(w.t, w.metrics, "dunlin_controller_ignored_total", kind) == want }, "%v ignored messages of kind %s", want, kind)
}

// count reads a counter of a kind.
func count(t *testing.T, metrics *prometheus.Registry, name, kind string) float64 {
	t.Helper()
	families, err := metrics.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			if f.GetName() == name && m.GetLabel()[0].GetValue() == kind {
				return m.GetCounter().GetValue()
			}
		}
	}
	return 0
}

// waitFor polls with a deadline what has no other sign.
func waitFor(t *testing.T, done func() bool, what string, args ...any) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for !done() {
		if time.Now().After(deadline) {
			t.Fatalf("not reached: "+what, args...)
		}
		<-tick.C
	}
}

func TestRollout(t *testing.T) {
	w := fresh(t, defaultTiming)
	w.join("dev")
	w.push("digits")
	w.hello("dev", "s1", nil)
	m, at := w.desired("dev", 0, anything)
	if len(m.Document) != 0 || m.Generation.Incarnation != w.store.Incarnation() {
		t.Errorf("first generation: %v", m)
	}
	id := w.apply("digits", 1)
	m, at = w.desired("dev", at, hasVersion("digits", 1))
	r := w.rollout(id, func(r fleet.Rollout) bool { return len(r.Devices) == 1 })
	if r.Reason != "waits for 1 of 1 device: dev" || r.Devices[0].Phase != fleet.DevicePending {
		t.Errorf("got %+v", r)
	}
	status := &dunlinv1.VersionStatus{Model: "digits", Version: 1, BytesPresent: 5, BytesTotal: 10}
	w.up("dev", link.Reported, &dunlinv1.Reported{Session: "s1", Sequence: 1, Observed: m.Generation, Versions: []*dunlinv1.VersionStatus{status}})
	w.rollout(id, func(r fleet.Rollout) bool {
		d := r.Devices[0]
		return d.Phase == fleet.DeviceWorking && d.BytesPresent == 5 && d.BytesTotal == 10 && d.Wave == 1 && !d.AdmittedAt.IsZero()
	})
	status.Serving = true
	w.up("dev", link.Reported, &dunlinv1.Reported{Session: "s1", Sequence: 2, Observed: m.Generation, Versions: []*dunlinv1.VersionStatus{status}})
	w.rollout(id, ended(fleet.Succeeded))

	w.push("digits")
	id = w.apply("digits", 2)
	m, at = w.desired("dev", at, hasVersion("digits", 2))
	w.up("dev", link.Reported, &dunlinv1.Reported{Session: "s1", Sequence: 3, Observed: m.Generation, Versions: []*dunlinv1.VersionStatus{
		status, {Model: "digits", Version: 2, State: dunlinv1.VersionState_VERSION_STATE_QUARANTINED, Reason: "opset 99"},
	}})
	m, _ = w.desired("dev", at, hasVersion("digits", 1))
	w.up("dev", link.Reported, &dunlinv1.Reported{Session: "s1", Sequence: 4, Observed: m.Generation, Versions: []*dunlinv1.VersionStatus{status}})
	r = w.rollout(id, ended(fleet.RolledBack))
	if !strings.Contains(r.Reason, "dev (opset 99)") {
		t.Error(r.Reason)
	}
}

// A device may report before the pass that published its generation ends; the
// rollout does not wait until the planner looks again by itself.
func TestReportDuringPass(t *testing.T) {
	slow := defaultTiming
	slow.look = time.Hour
	w := fresh(t, slow)
	w.join("dev")
	w.push("digits")
	w.hello("dev", "s1", nil)
	w.desired("dev", 0, anything)
	reported := make(chan error, 1)
	w.bus.mu.Lock()
	w.bus.onPublish = func(in message) {
		var m dunlinv1.Desired
		var doc dunlinv1.DesiredDocument
		if in.kind != link.Desired || proto.Unmarshal(in.payload, &m) != nil || proto.Unmarshal(m.Document, &doc) != nil || len(doc.Versions) == 0 {
			return
		}
		payload, err := proto.Marshal(&dunlinv1.Reported{Session: "s1", Sequence: 1, Observed: m.Generation, Versions: []*dunlinv1.VersionStatus{
			{Model: "digits", Version: 1, Serving: true},
		}})
		w.d.take(t.Context(), []message{{"dev", link.Reported, payload}})
		reported <- err
	}
	w.bus.mu.Unlock()
	id := w.apply("digits", 1)
	w.must(<-reported)
	w.rollout(id, ended(fleet.Succeeded))
}

// A refusal of an earlier try does not count against the next.
func TestRolloutAgain(t *testing.T) {
	w := fresh(t, defaultTiming)
	w.join("dev")
	w.push("digits")
	w.push("digits")
	w.hello("dev", "s1", nil)
	sequence := uint64(0)
	report := func(m *dunlinv1.Desired, versions ...*dunlinv1.VersionStatus) {
		sequence++
		w.up("dev", link.Reported, &dunlinv1.Reported{Session: "s1", Sequence: sequence, Observed: m.Generation, Versions: versions})
	}
	bad := &dunlinv1.VersionStatus{Model: "digits", Version: 2, State: dunlinv1.VersionState_VERSION_STATE_QUARANTINED}
	first := w.apply("digits", 2)
	m, at := w.desired("dev", 0, hasVersion("digits", 2))
	report(m, bad)
	w.rollout(first, ended(fleet.Failed))
	second := w.apply("digits", 1)
	m, at = w.desired("dev", at, hasVersion("digits", 1))
	report(m, bad, &dunlinv1.VersionStatus{Model: "digits", Version: 1, Serving: true})
	w.rollout(second, ended(fleet.Succeeded))
	third := w.apply("digits", 2)
	m, _ = w.desired("dev", at, hasVersion("digits", 2))
	w.rollout(third, func(r fleet.Rollout) bool { return len(r.Devices) == 1 && r.Devices[0].Phase == fleet.DevicePending })
	report(m, &dunlinv1.VersionStatus{Model: "digits", Version: 2, Serving: true})
	w.rollout(third, ended(fleet.Succeeded))
}

func TestResentUntilObserved(t *testing.T) {
	w := fresh(t, fast)
	w.join("dev")
	w.hello("dev", "s1", nil)
	var m *dunlinv1.Desired
	at := 0
	for range 4 {
		m, at = w.desired("dev", at, anything)
	}
	w.up("dev", link.Reported, &dunlinv1.Reported{Session: "s1", Sequence: 1, Observed: m.Generation})
	waitFor(t, func() bool { w.d.mu.Lock(); defer w.d.mu.Unlock(); return w.d.live["dev"].pending == 0 }, "observed")
	// The backoff is bounded.
	w.d.mu.Lock()
	defer w.d.mu.Unlock()
	for n := range 100 {
		if b := w.d.backoff(n); b < fast.resend/2 || b > fast.resendMost {
			t.Errorf("backoff %d is %s", n, b)
		}
	}
}

// A device whose report a rollout waits for is asked again.
func TestAsked(t *testing.T) {
	w := fresh(t, fast)
	w.join("dev")
	w.push("digits")
	w.hello("dev", "s1", nil)
	w.apply("digits", 1)
	w.bus.wait(t, "question", 0, func(m message) bool {
		return isCommand(m, "dev", func(c *dunlinv1.Command) bool { return c.GetHelloAgain() != nil })
	})
}

// A restart redoes what is not done: whatever was stored when the last one
// ended is compiled, published and stepped.
func TestRestart(t *testing.T) {
	w := fresh(t, defaultTiming)
	w.join("dev")
	w.push("digits")
	w.hello("dev", "s1", nil)
	w.desired("dev", 0, anything)
	waitFor(t, func() bool {
		d, err := w.store.Device(t.Context(), "dev")
		return err == nil && d.Connected
	}, "connected")
	w.stop()

	// Applied, and ended before anything followed from it.
	s, err := store.Open(t.Context(), w.path, store.Options{})
	w.must(err)
	w.store = s
	id := w.apply("digits", 1)
	w.must(s.Close())

	w = start(t, w.path, defaultTiming)
	m, _ := w.desired("dev", 0, hasVersion("digits", 1))
	w.stop()

	// Persisted and published, and not heard of.
	w = start(t, w.path, defaultTiming)
	again, _ := w.desired("dev", 0, hasVersion("digits", 1))
	if !proto.Equal(m.Generation, again.Generation) {
		t.Errorf("another generation %v than %v for the same document", again.Generation, m.Generation)
	}
	// The session goes on if the broker kept the connection.
	w.up("dev", link.Reported, &dunlinv1.Reported{Session: "s1", Sequence: 1, Observed: m.Generation, Versions: []*dunlinv1.VersionStatus{{Model: "digits", Version: 1, Serving: true}}})
	w.rollout(id, ended(fleet.Succeeded))
}

// A device that is not heard any more counts as away, and holds nothing up.
func TestSilence(t *testing.T) {
	timing := fast
	timing.silence = 200 * time.Millisecond
	w := fresh(t, timing)
	w.join("quiet")
	w.join("dev")
	w.push("digits")
	w.hello("quiet", "s1", nil)
	w.hello("dev", "s1", nil)
	w.desired("dev", 0, anything)
	id := w.apply("digits", 1)
	m, _ := w.desired("dev", 0, hasVersion("digits", 1))
	for n := uint64(1); ; n++ {
		changed := w.d.Changed()
		w.up("dev", link.Reported, &dunlinv1.Reported{Session: "s1", Sequence: n, Observed: m.Generation, Versions: []*dunlinv1.VersionStatus{{Model: "digits", Version: 1, Serving: true}}})
		r, err := w.store.Rollout(t.Context(), id)
		w.must(err)
		if r.State == fleet.Succeeded {
			break
		}
		select {
		case <-changed:
		case <-time.After(50 * time.Millisecond):
		}
		if n > 200 {
			t.Fatalf("rollout is %+v", r)
		}
	}
	if d, err := w.store.Device(t.Context(), "quiet"); err != nil || d.Connected {
		t.Errorf("got %+v, %v", d, err)
	}
}

// A device that was found away and is heard again is asked to say hello until
// it does: what was made for it meanwhile was not sent to it.
func TestHeardAgain(t *testing.T) {
	timing := fast
	timing.silence = 50 * time.Millisecond
	for kind, m := range map[string]func(n uint64) proto.Message{
		link.Telemetry: func(uint64) proto.Message { return &dunlinv1.Telemetry{} },
		link.Reported:  func(n uint64) proto.Message { return &dunlinv1.Reported{Session: "s1", Sequence: n} },
	} {
		w := fresh(t, timing)
		w.join("dev")
		w.hello("dev", "s1", nil)
		waitFor(t, func() bool {
			d, err := w.store.Device(t.Context(), "dev")
			return err == nil && !d.LastHeardAt.IsZero() && !d.Connected
		}, "away")
		w.bus.mu.Lock()
		at := len(w.bus.sent)
		w.bus.mu.Unlock()
		n := uint64(0)
		waitFor(t, func() bool {
			n++
			w.up("dev", kind, m(n))
			w.bus.mu.Lock()
			defer w.bus.mu.Unlock()
			asked := 0
			for _, m := range w.bus.sent[at:] {
				if isCommand(m, "dev", func(c *dunlinv1.Command) bool { return c.GetHelloAgain() != nil }) {
					asked++
				}
			}
			return asked >= 3
		}, "three questions after messages of kind %s", kind)
		w.stop()
	}
}

// Reports that come before the planner knows of a rollout are not held against
// it: they follow from older objects.
func TestRolloutBeforeReplan(t *testing.T) {
	w := fresh(t, defaultTiming)
	w.join("dev")
	w.push("digits")
	w.push("digits")
	w.hello("dev", "s1", nil)
	w.apply("digits", 2)
	m, at := w.desired("dev", 0, hasVersion("digits", 2))
	// It has taken the second version in, and still serves the first.
	old := []*dunlinv1.VersionStatus{{Model: "digits", Version: 1, Serving: true}}
	w.up("dev", link.Reported, &dunlinv1.Reported{Session: "s1", Sequence: 1, Observed: m.Generation, Versions: old})
	waitFor(t, func() bool {
		r, err := w.store.Rollouts(t.Context(), "digits", 1)
		return err == nil && len(r[0].Devices) == 1 && r[0].Devices[0].Phase == fleet.DeviceWorking
	}, "the rollout has seen the report")
	objects, err := fleet.Parse("apiVersion: dunlin/v1\nkind: Deployment\nmetadata: {name: digits}\nspec: {model: digits, version: 1, selector: {}}")
	w.must(err)
	changes, err := w.store.Apply(t.Context(), "user:test", objects, false)
	w.must(err)
	w.up("dev", link.Reported, &dunlinv1.Reported{Session: "s1", Sequence: 2, Observed: m.Generation, Versions: old})
	w.d.Replan()
	m, _ = w.desired("dev", at, hasVersion("digits", 1))
	r, err := w.store.Rollout(t.Context(), changes[0].Rollout)
	w.must(err)
	if r.State != fleet.Running {
		t.Errorf("got %+v", r)
	}
	w.up("dev", link.Reported, &dunlinv1.Reported{Session: "s1", Sequence: 3, Observed: m.Generation, Versions: old})
	w.rollout(r.ID(), ended(fleet.Succeeded))
}

func TestEpoch(t *testing.T) {
	w := fresh(t, fast)
	read := func(from int) (*dunlinv1.Epoch, int) {
		m, at := w.bus.wait(t, "epoch", from, func(m message) bool { return m.kind == "epoch" })
		var e dunlinv1.Epoch
		w.must(proto.Unmarshal(m.payload, &e))
		return &e, at
	}
	first, at := read(0)
	second, _ := read(at)
	if first.Incarnation != w.store.Incarnation() || first.BootId == "" || first.HelloWithinMs == 0 || !proto.Equal(first, second) {
		t.Errorf("got %v, then %v", first, second)
	}
	w.d.Resumed()
	w.bus.wait(t, "other boot", at, func(m message) bool {
		var e dunlinv1.Epoch
		return m.kind == "epoch" && proto.Unmarshal(m.payload, &e) == nil && e.BootId != first.BootId
	})
}

// After Run has ended, Handle drops and does not block.
// Messages of one device are taken in in order, however many devices send.
// No payload of any kind crashes, and what is malformed leaves the store as
// it is.
