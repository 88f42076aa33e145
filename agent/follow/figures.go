package follow

import (
	"maps"
	"slices"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/dunlin/dunlin/agent/engine"
	"github.com/dunlin/dunlin/internal/sketch"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// maxRetired bounds the versions whose figures are kept after they have been
// unloaded; of those that are too many the ones unloaded first are forgotten.
const maxRetired = 256

// figures keeps what versions have counted since the agent's start, also over
// the times that they were not loaded, and says what energy their runs took.
type figures struct {
	idle float64 // watts of the device when nothing runs, as its class says; 0: not known

	mu      sync.Mutex // guards what follows
	retired map[engine.VersionID]tally
	order   []engine.VersionID // of retired, the last at the end
	energy  shares
	// While a sample is made of what is loaded, what is unloaded waits in late,
	// so that nothing counts twice.
	sampling bool
	late     []late
}

// late is a version that was unloaded while a sample is made.
type late struct {
	id   engine.VersionID
	last tally
}

// tally is what is counted of a version.
type tally struct {
	succeeded, failed, rows uint64
	infer                   time.Duration // of each request's run
	busy                    time.Duration // of each run
	latency, confidence     sketch.Counts
}

func newFigures(idleWatts float64) *figures {
	return &figures{idle: idleWatts, retired: map[engine.VersionID]tally{}}
}

func taken(f *engine.Figures) tally {
	return tally{f.Success.Count, f.Failure.Count, f.Inferences, f.Infer.Time, f.Run.Time, f.Latency, f.Confidence}
}

func (t tally) add(o tally) tally {
	return tally{
		t.succeeded + o.succeeded, t.failed + o.failed, t.rows + o.rows, t.infer + o.infer, t.busy + o.busy,
		t.latency.Add(o.latency), t.confidence.Add(o.confidence),
	}
}

// retire takes in the figures of a version that is not loaded any more.
func (f *figures) retire(id engine.VersionID, last engine.Figures) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.sampling {
		f.late = append(f.late, late{id, taken(&last)})
		return
	}
	f.keep(id, taken(&last))
}

// begin says that a sample is made of what is loaded from now on, until end.
func (f *figures) begin() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.sampling = true
}

func (f *figures) end() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.sampling = false
	for _, l := range f.late {
		f.keep(l.id, l.last)
	}
	f.late = nil
}

func (f *figures) keep(id engine.VersionID, last tally) {
	have, known := f.retired[id]
	f.retired[id] = have.add(last)
	if known {
		f.order = slices.DeleteFunc(f.order, func(o engine.VersionID) bool { return o == id })
	}
	if f.order = append(f.order, id); len(f.order) > maxRetired {
		delete(f.retired, f.order[0])
		delete(f.energy.of, f.order[0])
		f.order = f.order[1:]
	}
}

// all gives the tallies of the loaded versions, and of those that were.
func (f *figures) all(versions []engine.Status) map[engine.VersionID]tally {
	all := make(map[engine.VersionID]tally, len(versions)+len(f.retired))
	maps.Copy(all, f.retired)
	loaded := make(map[engine.VersionID]bool, len(versions))
	for i := range versions {
		id := versions[i].ID
		loaded[id] = true
		all[id] = all[id].add(taken(&versions[i].Figures))
	}
	for _, l := range f.late {
		if !loaded[l.id] {
			all[l.id] = all[l.id].add(l.last)
		}
	}
	return all
}

// shares divides the energy of the device among the versions.
type shares struct {
	at     time.Time // of the last sample; zero: there was none
	joules float64   // of the device then
	busy   map[engine.VersionID]time.Duration
	idle   float64 // the least power of a time in which nothing ran; 0: not known
	of     map[engine.VersionID]float64
	known  bool
}

// leastIdle is how long nothing must have run for the power to be that of an
// idle device.
const leastIdle = 5 * time.Second

// observe takes in a sample of the device: of the energy since the last one,
// what was above that of an idle device belongs to the runs since then by the
// time that they took, and so does the idle device's for as long as they took,
// not longer than that was. So a version's energy does not depend on how busy
// it was.
func (f *figures) observe(t *dunlinv1.Telemetry, versions []engine.Status) {
	f.mu.Lock()
	defer f.mu.Unlock()
	e, now := &f.energy, t.GetAt().AsTime()
	joules, known := deviceJoules(t)
	if !known {
		e.at = time.Time{}
		return
	}
	if now.Equal(e.at) { // the same sample
		return
	}
	since, last, before := now.Sub(e.at).Seconds(), e.joules, e.busy
	first := e.at.IsZero()
	e.at, e.joules, e.busy = now, joules, map[engine.VersionID]time.Duration{}
	sum := 0.
	ran := map[engine.VersionID]float64{}
	for id, t := range f.all(versions) {
		e.busy[id] = t.busy
		if d := (t.busy - before[id]).Seconds(); d > 0 && !first {
			ran[id] = d
			sum += d
		}
	}
	took := joules - last
	if first || since <= 0 || took < 0 { // the device's count began anew
		return
	}
	e.known = true
	if sum == 0 {
		if watts := took / since; since >= leastIdle.Seconds() && (e.idle == 0 || watts < e.idle) {
			e.idle = watts
		}
		return
	}
	idle := f.idle
	if idle == 0 {
		idle = e.idle
	}
	idle = min(idle*since, took)
	share := took - idle + idle*min(sum/since, 1)
	if e.of == nil {
		e.of = map[engine.VersionID]float64{}
	}
	for id, seconds := range ran {
		e.of[id] += share * seconds / sum
	}
}

// deviceJoules is what the device has taken since some time; of one that
// measures only its GPUs it is what they have.
func deviceJoules(t *dunlinv1.Telemetry) (joules float64, known bool) {
	if t.EnergyJoules != nil {
		return *t.EnergyJoules, true
	}
	for _, g := range t.Gpus {
		if g.EnergyJoules == nil {
			return 0, false
		}
		joules += *g.EnergyJoules
		known = true
	}
	return joules, known
}

// telemetry gives the figures of the loaded versions; in full with those of
// the others that have any, which then follow.
func (f *figures) telemetry(versions []engine.Status, full bool) []*dunlinv1.ModelTelemetry {
	f.mu.Lock()
	defer f.mu.Unlock()
	counted := f.all(versions)
	var all []*dunlinv1.ModelTelemetry
	add := func(id engine.VersionID, m *dunlinv1.ModelTelemetry) {
		c := counted[id]
		m.Succeeded, m.Failed, m.RunNanoseconds = c.succeeded, c.failed, uint64(c.infer)
		if full && c.succeeded+c.failed > 0 {
			m.Figures = &dunlinv1.VersionFigures{Rows: c.rows, Latency: c.latency.Proto(), Confidence: c.confidence.Proto()}
			if f.energy.known {
				m.Figures.Joules = new(f.energy.of[id])
			}
		}
		all = append(all, m)
	}
	loaded := map[engine.VersionID]bool{}
	for _, v := range versions {
		loaded[v.ID] = true
		add(v.ID, modelTelemetry(v))
	}
	if !full {
		return all
	}
	order := f.order
	for _, l := range f.late {
		if !slices.Contains(order, l.id) {
			order = append(slices.Clone(order), l.id)
		}
	}
	for _, id := range order {
		if c := counted[id]; !loaded[id] && c.succeeded+c.failed > 0 {
			add(id, &dunlinv1.ModelTelemetry{Model: id.Model, Version: id.Version})
		}
	}
	return all
}

// fit has a sample fit a message of so many bytes: of very many models the
// counts by reason go first, then the samples of alarms, which the events have,
// then figures, of the models that come last.
func fit(t *dunlinv1.Telemetry, most int) {
	if proto.Size(t) <= most {
		return
	}
	for _, m := range t.Models {
		m.Activations, m.Evictions = nil, nil
	}
	for _, a := range t.Alarms {
		a.Samples = nil
	}
	over := proto.Size(t) - most
	for i := len(t.Models) - 1; i >= 0 && over > 0; i-- {
		over -= proto.Size(t.Models[i].Figures)
		t.Models[i].Figures = nil
	}
}
