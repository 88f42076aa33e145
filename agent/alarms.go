package agent

import (
	"context"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/proto"

	"github.com/dunlin/dunlin/agent/alarm"
	"github.com/dunlin/dunlin/agent/engine"
	profiles "github.com/dunlin/dunlin/firmware-profiles"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

const (
	// sampleEvery is how often the device is sampled for alarms.
	sampleEvery = 10 * time.Second
	// limitTime bounds how long the engine may take to change the load that it
	// takes; it is asked again with the next sample.
	limitTime = time.Second
)

// sampled is the part of a machine that is watched.
type sampled interface {
	Sample() *dunlinv1.Telemetry
}

// scheduler is what a watch needs of the engine.
type scheduler interface {
	Versions() []engine.Status
	Memory() engine.Memory
}

// watch is the one that samples the device: it has the newest sample for
// whoever asks, the alarms, and does what the settings say about them.
type watch struct {
	machine  sampled
	engine   scheduler
	detector *alarm.Detector
	respond  *alarm.Responder
	limit    func(context.Context, alarm.Load) error
	event    func(*dunlinv1.Event) // nil: nobody is told
	log      *slog.Logger

	limited alarm.Load    // what the engine was told
	sampled chan struct{} // closed when there is a sample

	mu     sync.Mutex // guards what follows
	newest *dunlinv1.Telemetry
	alarms []*dunlinv1.Alarm
	// celsius is the highest temperature of newest; heated says that it has one.
	celsius float64
	heated  bool
}

// newWatch gives one that samples m. It starts nothing.
func (h *host) newWatch(m sampled, profile profiles.Profile, event func(*dunlinv1.Event)) *watch {
	w := &watch{
		machine: m, engine: h.engine, limit: h.limit, event: event, log: h.serving.Log, sampled: make(chan struct{}),
		detector: alarm.New(alarm.Config{
			WarnCelsius: profile.Thermal.WarnCelsius, SlowdownCelsius: profile.Thermal.SlowdownCelsius, ReserveBytes: uint64(max(profile.Storage.ReserveBytes, 0)),
		}),
		respond: alarm.NewResponder(alarm.Reaction(h.serving.OnAlarm)),
	}
	h.watched.Store(w)
	return w
}

// hottest gives the highest temperature of a sample, in degrees Celsius.
func hottest(t *dunlinv1.Telemetry) (celsius float64, known bool) {
	add := func(c float64) {
		if !known || c > celsius {
			celsius, known = c, true
		}
	}
	for _, s := range t.Temperatures {
		add(s.Celsius)
	}
	for _, g := range t.Gpus {
		if g.Celsius != nil {
			add(*g.Celsius)
		}
		if g.MemoryCelsius != nil {
			add(*g.MemoryCelsius)
		}
	}
	return celsius, known
}

// limit has the engine take no more than a load.
func (h *host) limit(ctx context.Context, l alarm.Load) error {
	return h.engine.Throttle(ctx, engine.Throttle(l))
}

// run samples until ctx is done.
func (w *watch) run(ctx context.Context) error {
	began := time.Now()
	tick := time.NewTicker(sampleEvery)
	defer tick.Stop()
	for {
		w.look(ctx, time.Since(began))
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// look takes a sample and does what follows from it.
func (w *watch) look(ctx context.Context, now time.Duration) {
	t := w.machine.Sample()
	memory := w.engine.Memory()
	t.ModelMemoryBudgetBytes, t.ModelMemoryUsedBytes = new(uint64(memory.Budget)), new(uint64(memory.Used))
	versions := w.engine.Versions()
	s := alarm.Sample{Telemetry: t, Limited: w.limited != alarm.Load{}}
	for i := range versions {
		s.Versions = append(s.Versions, counted(&versions[i]))
	}
	changes := w.detector.Observe(now, s)
	pressing, hot := w.detector.Pressing()
	w.act(ctx, w.respond.Decide(now, len(pressing) > 0, hot))
	for _, a := range w.detector.Alarms() {
		k := alarm.Key{Kind: a.Kind, Subject: a.Subject}
		if slices.Contains(pressing, k) {
			w.detector.Did(k, w.limited.String())
		} else {
			w.detector.Did(k, "")
		}
	}
	alarms := w.detector.Alarms()
	w.mu.Lock()
	first := w.newest == nil
	w.newest, w.alarms = t, alarms
	w.celsius, w.heated = hottest(t)
	w.mu.Unlock()
	if first {
		close(w.sampled)
	}
	for _, c := range changes {
		if c.Kind != alarm.Cleared { // as it stands after what was done about it
			for _, a := range alarms {
				if a.Kind == c.Alarm.Kind && a.Subject == c.Alarm.Subject {
					c.Alarm = a
				}
			}
		}
		w.tell(c)
	}
}

// act has the engine take the load that was decided on.
func (w *watch) act(ctx context.Context, load alarm.Load) {
	if load == w.limited {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, limitTime)
	defer cancel()
	if err := w.limit(ctx, load); err != nil {
		w.log.Error("load not changed on an alarm; tried again", "to", load.String(), "error", err)
		return
	}
	if w.limited = load; load == (alarm.Load{}) {
		w.log.Info("the device takes its full load again: the alarm is over")
	} else {
		w.log.Warn("the device lowers its load on an alarm", "to", load.String())
	}
}

// tell says what has become of an alarm.
func (w *watch) tell(c alarm.Change) {
	e := &dunlinv1.Event{Kind: "alarm.raised", Severity: c.Alarm.Severity, Message: c.Alarm.Message, Alarm: c.Alarm}
	level, text := slog.LevelWarn, "alarm raised"
	switch {
	case c.Kind == alarm.Cleared:
		e.Kind, e.Severity = "alarm.cleared", dunlinv1.Severity_SEVERITY_INFO
		level, text = slog.LevelInfo, "alarm cleared"
	case c.Alarm.Severity == dunlinv1.Severity_SEVERITY_ERROR:
		level = slog.LevelError
	}
	w.log.Log(context.Background(), level, text, "kind", c.Alarm.Kind, "subject", c.Alarm.Subject, "message", c.Alarm.Message, "action", c.Alarm.Action)
	if w.event != nil {
		w.event(e)
	}
}

// telemetry gives a copy of the newest sample with the alarms that are raised;
// it waits for the first, and gives nil when ctx is done before.
func (w *watch) telemetry(ctx context.Context) *dunlinv1.Telemetry {
	select {
	case <-w.sampled:
	case <-ctx.Done():
		return nil
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	t := proto.CloneOf(w.newest)
	for _, a := range w.alarms {
		t.Alarms = append(t.Alarms, proto.CloneOf(a))
	}
	return t
}

var alarmsNow = prometheus.NewDesc("dunlin_alarms", "1 for each alarm that is raised.", []string{"kind", "subject"}, nil)

// Describe implements prometheus.Collector.
func (w *watch) Describe(ch chan<- *prometheus.Desc) { ch <- alarmsNow }

// Collect implements prometheus.Collector.
func (w *watch) Collect(ch chan<- prometheus.Metric) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, a := range w.alarms {
		ch <- prometheus.MustNewConstMetric(alarmsNow, prometheus.GaugeValue, 1, a.Kind, a.Subject)
	}
}

// counted gives the counts of a version.
func counted(v *engine.Status) alarm.Version {
	f := &v.Figures
	return alarm.Version{
		Model: v.ID.Model, Version: v.ID.Version,
		// Prepacked weights come and go with the room for them.
		Form:      alarm.Form{Generation: v.Info.ID.Generation, MaxBatchSize: v.Info.Options.MaxBatchSize, Instances: v.Info.Options.Instances, Threads: v.Setting.Threads},
		Succeeded: f.Success.Count, Failed: f.Failure.Count, Refused: f.Overloaded + f.Expired + f.Refused,
		Time: f.Success.Time, Run: f.Infer.Time, Data: v.Data,
	}
}
