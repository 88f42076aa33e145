package engine

import (
	"container/heap"
	"testing"
	"time"

	"github.com/dunlin/dunlin/models/serving"
	"github.com/dunlin/dunlin/models/tensor"
)

// simulation drives a core through simulated time: what is to happen stands
// in a heap, and the core's effects add to it.
type simulation struct {
	core    *core
	now     time.Duration
	pending occurrences
	takes   func(r *run) time.Duration // how long a run lasts
	// started and answered see what the core does.
	started     func(r *run)
	answered    func(r *request)
	enters      time.Duration    // how long an activation lasts
	moved       func(effect)     // sees weights come and go
	failing     func() error     // how an activation ends
	ends        func(*run) error // how a run ends
	interrupted func(interrupt)
	hangs       func(*version) bool // its activation never ends
	refuses     error               // of a change of setting
	alarms      int                 // the number of the latest wake
}

type occurrence struct {
	at    time.Duration
	order int
	event func() event // nil where it has become void
}

type occurrences struct {
	all   []occurrence
	count int
}

func (o *occurrences) Len() int      { return len(o.all) }
func (o *occurrences) Swap(i, j int) { o.all[i], o.all[j] = o.all[j], o.all[i] }
func (o *occurrences) Push(x any)    { o.all = append(o.all, x.(occurrence)) }
func (o *occurrences) Less(i, j int) bool {
	a, b := o.all[i], o.all[j]
	return a.at < b.at || a.at == b.at && a.order < b.order
}
func (o *occurrences) Pop() any {
	last := o.all[len(o.all)-1]
	o.all = o.all[:len(o.all)-1]
	return last
}

var (
	start = time.Unix(1000, 0)
	one   = VersionID{Model: "digits", Version: 1}
)

// newSimulation gives one in which version one is loaded with these options.
func newSimulation(t testing.TB, o serving.Options, takes func(*run) time.Duration) *simulation {
	s := &simulation{core: newCore(start), takes: takes}
	if err := o.Check(); err != nil {
		t.Fatal(err)
	}
	s.add(one, o, Need{})
	return s
}

// add loads a version. The error is there when no activation goes on.
func (s *simulation) add(id VersionID, o serving.Options, need Need) (call *call) {
	s.step(claim{newCall(), Spec{ID: id}, false})
	call = newCall()
	s.step(loaded{call, id, Info{Options: resolve(&o, false), Need: need}, nil})
	return call
}

// at lets an event happen later. The function gives nil where it is void then.
func (s *simulation) at(at time.Duration, ev func() event) {
	s.pending.count++
	heap.Push(&s.pending, occurrence{at, s.pending.count, ev})
}

func (s *simulation) step(ev event) {
	if a, ok := ev.(arrive); ok {
		a.request.info = s.core.current[a.request.id].info
	}
	for _, f := range s.core.step(ev, start.Add(s.now)) {
		switch f := f.(type) {
		case startRun:
			if s.started != nil {
				s.started(f.run)
			}
			s.at(s.now+s.takes(f.run), func() event {
				if f.run.err != nil { // it has ended before
					return nil
				}
				if s.ends != nil {
					f.run.err = s.ends(f.run)
				}
				f.run.outcome.Outputs = make([][]tensor.Tensor, len(f.run.requests))
				return finish(f)
			})
		case startActivate:
			if s.moved != nil {
				s.moved(f)
			}
			if s.hangs != nil && s.hangs(f.version) {
				break
			}
			if s.enters == 0 {
				defer s.step(activated{f.version, f.version.home.need, 0, nil})
				break
			}
			s.at(s.now+s.enters, func() event {
				var err error
				if s.failing != nil {
					err = s.failing()
				}
				return activated{f.version, f.version.home.need, s.enters, err}
			})
		case startDeactivate:
			if s.moved != nil {
				s.moved(f)
			}
			s.at(s.now+s.enters/10, func() event { return deactivated{f.version, nil} })
		case startUnload:
			s.at(s.now+s.enters/10, func() event { return unloaded{f.version.id, nil} })
		case startSet:
			if s.moved != nil {
				s.moved(f)
			}
			s.at(s.now+10*s.enters, func() event { return changed{f.version, s.refuses} })
		case answer:
			if s.answered != nil {
				s.answered(f.request)
			}
		case interrupt:
			if s.interrupted != nil {
				s.interrupted(f)
			}
		case reply:
			f.call.answer <- f
		case wake:
			s.alarms++
			alarm := s.alarms
			s.at(max(s.now, f.at.Sub(start)), func() event {
				if alarm != s.alarms {
					return nil
				}
				return tick{}
			})
		}
	}
}

// arrive lets a request come, whose caller gives it up at its deadline.
func (s *simulation) arrive(at time.Duration, r *request) {
	s.at(at, func() event { return arrive{r} })
	if !r.deadline.IsZero() {
		s.at(r.deadline.Sub(start), func() event {
			if r.state == answered {
				return nil
			}
			return cancelled{r}
		})
	}
}

func (s *simulation) run(until time.Duration) {
	for s.pending.Len() > 0 && s.pending.all[0].at <= until {
		next := heap.Pop(&s.pending).(occurrence)
		s.now = next.at
		if ev := next.event(); ev != nil {
			s.step(ev)
		}
	}
	s.now = until
}
