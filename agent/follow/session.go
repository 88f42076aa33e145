package follow

import (
	"context"
	"maps"
	"slices"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/dunlin/dunlin/agent/engine"
	"github.com/dunlin/dunlin/internal/link"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

const (
	// reportEvery bounds the rate of reports; changes in between go out with
	// the next.
	reportEvery = 250 * time.Millisecond
	// batchEvents bounds the events of one message.
	batchEvents = 100
	// firstResend and lastResend bound the wait for an acknowledgement before
	// events are sent again; it doubles with each time.
	firstResend = 5 * time.Second
	lastResend  = time.Minute
	// blockWait is the wait for a block before it is asked for again.
	blockWait      = 5 * time.Second
	telemetryEvery = time.Minute
)

// session is the agent's part of the conversation with the controller.
type session struct {
	*Follower
	link   *link.Link
	report chan struct{} // report at once
	resend chan struct{} // what was sent went to another session
	sample chan struct{} // send telemetry at once
	leases chan lease    // the newest that telemetry has not taken
}

func newSession(l *link.Link, f *Follower) *session {
	return &session{Follower: f, link: l, report: make(chan struct{}, 1), resend: make(chan struct{}, 1), sample: make(chan struct{}, 1), leases: make(chan lease, 1)}
}

// run talks to the controller until ctx is done.
func (s *session) run(ctx context.Context) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	for _, part := range []func(context.Context){s.receive, s.reports, s.events, s.telemetry} {
		wg.Go(func() { part(ctx) })
	}
	if err := s.link.Run(ctx); ctx.Err() == nil {
		return err
	}
	return nil
}

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// sleep waits, and says whether ctx lasted that long.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// receive takes in what the controller says.
func (s *session) receive(ctx context.Context) {
	var document assembly
	again := time.NewTimer(0)
	<-again.C
	defer again.Stop()
	ask := func() {
		if request := document.next(); request != nil {
			_ = s.link.Send(link.Request, request) // asked for again where it is lost
			again.Reset(blockWait)
		}
	}
	for {
		select {
		case <-ctx.Done():
			return
		case <-s.link.Connected():
			signal(s.report)
			signal(s.resend)
			signal(s.sample)
			s.Reconcile.Retry()
			if s.cfg.Program != nil {
				s.cfg.Program.Retry()
			}
			ask()
		case <-again.C:
			ask()
		case m := <-s.link.Inbox():
			switch m := m.(type) {
			case *dunlinv1.Desired:
				if m.SizeBytes <= link.MaxInlineDocument {
					document = assembly{} // which is older
					s.Reconcile.Desire(m)
				} else if proto.Equal(m.Generation, s.Reconcile.Generation()) {
					s.Reconcile.Desire(m)
				} else if err := document.begin(m); err != nil {
					s.cfg.Log.Error("desired document refused", "generation", m.Generation.GetNumber(), "error", err)
				} else {
					ask()
				}
			case *dunlinv1.Block:
				whole, err := document.add(m)
				if err != nil {
					s.cfg.Log.Warn("desired document given up", "error", err)
				} else if whole != nil {
					s.Reconcile.Desire(whole)
				}
				ask()
			case *dunlinv1.Command:
				if found := m.GetSources(); found != nil {
					s.asking.answer(found.Digest, found.Sources)
				} else if renew := m.GetRenewNow(); renew != nil {
					s.Identity.RenewWithin(time.Duration(renew.WithinMs) * time.Millisecond)
				} else if ack := m.GetEventAck(); ack != nil {
					if err := s.store.Ack(ctx, ack.OutboxId, ack.Sequence); err != nil && ctx.Err() == nil {
						s.cfg.Log.Warn("acknowledgement ignored", "error", err)
					}
					signal(s.outbox)
				} else if l := m.GetTelemetryLease(); l != nil {
					select {
					case <-s.leases: // it takes its place
					default:
					}
					s.leases <- leaseOf(l)
				}
			}
		}
	}
}

// reports sends the reported state in each new session and after changes.
func (s *session) reports(ctx context.Context) {
	var last string
	var sequence uint64
	var program <-chan struct{}
	if s.cfg.Program != nil {
		program = s.cfg.Program.Changed()
	}
	for {
		select {
		case <-ctx.Done():
			return
		case <-s.report:
		case <-s.Reconcile.Changed():
		case <-program:
		}
		now := s.link.Session()
		if report := s.Reconcile.Report(); now != "" && report != nil {
			if now != last {
				last, sequence = now, 0
			}
			sequence++
			report = proto.CloneOf(report)
			report.Session, report.Sequence, report.At = now, sequence, timestamppb.Now()
			if s.cfg.Program != nil {
				report.Agent = s.cfg.Program.Status()
			}
			if err := s.link.Send(link.Reported, report); err != nil {
				s.cfg.Log.Debug("report not sent; the next session has it", "error", err)
			}
		}
		if !sleep(ctx, reportEvery) {
			return
		}
	}
}

// events sends what is in the outbox, a batch at a time, until it is
// acknowledged.
func (s *session) events(ctx context.Context) {
	timer := time.NewTimer(0)
	<-timer.C
	defer timer.Stop()
	var sent uint64 // last sequence that was sent and is not known to be acknowledged
	wait := firstResend
	for {
		again := false
		select {
		case <-ctx.Done():
			return
		case <-s.outbox:
		case <-s.resend:
			again, wait = true, firstResend
		case <-timer.C:
			again, wait = true, min(2*wait, lastResend)
		}
		if s.link.Session() == "" {
			continue // the next session begins with all of it
		}
		events, err := s.store.Pending(ctx, batchEvents)
		if err != nil {
			if ctx.Err() == nil {
				s.cfg.Log.Error("outbox not read", "error", err)
			}
			timer.Reset(wait)
			continue
		}
		switch {
		case len(events) == 0:
			sent, wait = 0, firstResend
			timer.Stop()
			continue
		case sent >= events[0].Sequence && !again:
			continue // not acknowledged yet
		}
		if sent < events[0].Sequence {
			wait = firstResend
		}
		batch := &dunlinv1.EventBatch{OutboxId: s.store.OutboxID(), Events: events}
		for len(batch.Events) > 1 && proto.Size(batch) > link.MaxPayload {
			batch.Events = batch.Events[:len(batch.Events)/2]
		}
		if err := s.link.Send(link.Events, batch); err != nil {
			s.cfg.Log.Debug("events not sent; the next session has them", "error", err)
			continue
		}
		sent = batch.Events[len(batch.Events)-1].Sequence
		timer.Reset(wait)
	}
}

// Bounds of a telemetry lease; what is asked for beyond is brought within.
const (
	leaseFastest = time.Second
	leaseLongest = 10 * time.Minute
)

// lease is telemetry that is sent more often, with the figures of versions, for
// a while.
type lease struct{ every, lasts time.Duration }

func leaseOf(l *dunlinv1.TelemetryLease) lease {
	return lease{
		every: min(max(time.Duration(l.EveryMs)*time.Millisecond, leaseFastest), telemetryEvery),
		lasts: min(time.Duration(l.ForMs)*time.Millisecond, leaseLongest),
	}
}

// swapsEvery says in which samples without a lease the counts of swaps are: in
// one of so many. They are sums, so that nothing is lost, and would be the most
// of what a quiet device has to say.
const swapsEvery = 10

// telemetry sends a sample at the begin of a session and every minute, and
// more often while a lease lasts.
func (s *session) telemetry(ctx context.Context) {
	tick := time.NewTicker(telemetryEvery)
	defer tick.Stop()
	over := time.NewTimer(0)
	<-over.C
	defer over.Stop()
	sender := sender{session: s}
	leased := false
	for {
		full := leased
		select {
		case <-ctx.Done():
			return
		case <-s.sample:
			sender.sent, sender.shown = 0, nil
		case l := <-s.leases:
			if leased = l.lasts > 0; leased {
				tick.Reset(l.every)
				over.Reset(l.lasts)
			} else {
				tick.Reset(telemetryEvery)
				over.Stop()
			}
			full = leased
		case <-over.C: // with a last sample in full
			leased = false
			tick.Reset(telemetryEvery)
		case <-tick.C:
		}
		if !sender.send(ctx, full) {
			return
		}
	}
}

// sender sends the samples of a session.
type sender struct {
	*session
	requests traffic
	dropped  uint64
	sent     int               // without a lease, since the session began
	shown    map[evidence]bool // that the controller has had since then, or in the last hour
	shows    int               // samples since shown was empty
}

// evidence is what an alarm rests on at most once: its samples are others only
// where one of these is.
type evidence struct {
	kind, subject, method string
	severity              dunlinv1.Severity
	raised                int64
}

// evidenceEvery says how often the samples of an alarm are sent that stays
// raised: the controller keeps those that it has had.
const evidenceEvery = 60

// withhold leaves out the samples of alarms that the controller has had, and
// gives what it has when it has had t.
func (s *sender) withhold(t *dunlinv1.Telemetry) map[evidence]bool {
	if s.shows++; s.shows > evidenceEvery || s.shown == nil {
		s.shown, s.shows = map[evidence]bool{}, 1
	}
	has := make(map[evidence]bool, len(t.Alarms))
	for _, a := range t.Alarms {
		e := evidence{a.Kind, a.Subject, a.Method, a.Severity, a.RaisedAt.AsTime().UnixNano()}
		if has[e] = true; s.shown[e] {
			a.Samples = nil
		}
	}
	return has
}

// send sends a sample, in full with the figures of versions, and says whether
// ctx lasted that long.
func (s *sender) send(ctx context.Context, full bool) bool {
	t := s.cfg.Sample(ctx)
	if t == nil {
		return false
	}
	s.figures.begin()
	defer s.figures.end()
	versions := s.cfg.Versions()
	s.requests.fill(t, time.Now(), versions)
	s.figures.observe(t, versions)
	t.Models, t.BootId, t.Dropped = s.figures.telemetry(versions, full), s.boot, s.dropped
	if !full {
		if s.sent%swapsEvery != 0 {
			for _, m := range t.Models {
				m.Activations, m.Evictions = nil, nil
			}
		}
		s.sent++
	}
	has := s.withhold(t)
	fit(t, link.MaxPayload/2)
	if s.dropped++; s.link.Send(link.Telemetry, t) == nil {
		s.dropped, s.shown = 0, has
	}
	return true
}

// modelTelemetry gives what a version has of the memory; its counts are put in
// by figures.
func modelTelemetry(v engine.Status) *dunlinv1.ModelTelemetry {
	t := &dunlinv1.ModelTelemetry{
		Model: v.ID.Model, Version: v.ID.Version,
		Resident: v.Residency == "resident", MemoryBytes: uint64(v.Bytes), NeedBytes: uint64(v.Need.Weights + v.Need.Session), Measured: v.Need.Measured,
	}
	for _, reason := range slices.Sorted(maps.Keys(v.Swaps.In)) {
		n := v.Swaps.In[reason]
		t.Activations = append(t.Activations, &dunlinv1.SwapCount{Reason: string(reason), Count: n.Count, Nanoseconds: uint64(n.Time)})
	}
	for _, reason := range slices.Sorted(maps.Keys(v.Swaps.Out)) {
		t.Evictions = append(t.Evictions, &dunlinv1.SwapCount{Reason: string(reason), Count: v.Swaps.Out[reason]})
	}
	return t
}

// traffic gives the figures of all requests between two moments.
type traffic struct {
	at   time.Time
	last map[engine.VersionID]counts
}

// counts are those of a version.
type counts struct {
	succeeded, failed uint64
	took              engine.Durations
}

// fill puts in what there was since the last call; the first has nothing.
func (r *traffic) fill(t *dunlinv1.Telemetry, now time.Time, versions []engine.Status) {
	last := r.last
	r.last = make(map[engine.VersionID]counts, len(versions))
	var sum counts
	for _, v := range versions {
		c := counts{v.Figures.Success.Count, v.Figures.Failure.Count, v.Figures.Took}
		before := last[v.ID]
		if c.succeeded < before.succeeded || c.failed < before.failed {
			before = counts{} // loaded again
		}
		r.last[v.ID] = c
		sum.succeeded += c.succeeded - before.succeeded
		sum.failed += c.failed - before.failed
		for i, n := range c.took.Since(&before.took) {
			sum.took[i] += n
		}
	}
	seconds := now.Sub(r.at).Seconds()
	known := !r.at.IsZero() && seconds > 0
	r.at = now
	if !known {
		return
	}
	t.RequestsPerSecond, t.FailuresPerSecond = new(float64(sum.succeeded+sum.failed)/seconds), new(float64(sum.failed)/seconds)
	if sum.took.Count() > 0 {
		t.RequestP99Seconds = new(sum.took.Quantile(0.99).Seconds())
	}
}
