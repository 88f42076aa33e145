package agent

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/dunlin/dunlin/agent/alarm"
	"github.com/dunlin/dunlin/agent/engine"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// oven is a machine that has the temperature that it is told, and a scheduler
// that takes the load that it is told.
type oven struct {
	mu      sync.Mutex // guards what follows
	celsius float64
	events  []*dunlinv1.Event
	samples int
	load    alarm.Load
	loads   []string
	refuses int // so many changes of the load
}

func (o *oven) Sample() *dunlinv1.Telemetry {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.samples++
	return &dunlinv1.Telemetry{At: timestamppb.Now(), Temperatures: []*dunlinv1.Temperature{{Sensor: "cpu-thermal", Celsius: o.celsius}}}
}
func (*oven) Versions() []engine.Status { return nil }
func (*oven) Memory() engine.Memory     { return engine.Memory{Budget: 7, Used: 5} }

func (o *oven) limit(_ context.Context, load alarm.Load) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.refuses > 0 {
		o.refuses--
		return errors.New("busy")
	}
	o.load = load
	o.loads = append(o.loads, load.String())
	return nil
}

func (o *oven) heat(celsius float64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.celsius = celsius
}

func (o *oven) event(e *dunlinv1.Event) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.events = append(o.events, e)
}

// seen gives what there has been until now.
func (o *oven) seen() (samples int, events []*dunlinv1.Event, loads []string, load alarm.Load) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.samples, slices.Clone(o.events), slices.Clone(o.loads), o.load
}

// A device that is too hot raises an alarm, lowers its load, lowers it again,
// and takes it all back.
func TestWatch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := &oven{celsius: 60, refuses: 1}
		w := &watch{
			machine: o, engine: o, limit: o.limit, log: slog.New(slog.DiscardHandler), sampled: make(chan struct{}),
			event:    o.event,
			detector: alarm.New(alarm.Config{SlowdownCelsius: 95}), respond: alarm.NewResponder(alarm.Throttle),
		}
		ended, cancel := context.WithCancel(t.Context())
		cancel()
		if got := w.telemetry(ended); got != nil {
			t.Errorf("before the first sample: %v", got)
		}
		ctx, stop := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- w.run(ctx) }()
		time.Sleep(time.Minute + time.Second)
		synctest.Wait()
		samples, events, _, _ := o.seen()
		if samples != 7 || len(events) != 0 {
			t.Fatalf("%d samples, %d events", samples, len(events))
		}
		if got := w.telemetry(ctx); got.GetModelMemoryBudgetBytes() != 7 || got.GetModelMemoryUsedBytes() != 5 || len(got.Alarms) != 0 {
			t.Errorf("telemetry %v", got)
		}
		o.heat(97)
		time.Sleep(time.Minute)
		synctest.Wait()
		_, events, loads, _ := o.seen()
		// The first change of the load failed, and was tried again.
		if len(events) != 1 || events[0].Kind != "alarm.raised" || events[0].Severity != dunlinv1.Severity_SEVERITY_ERROR || events[0].Alarm.GetAction() != "" {
			t.Fatalf("events %v", events)
		}
		if !slices.Equal(loads, []string{"duty 0.5, batch 4"}) {
			t.Fatalf("loads %q", loads)
		}
		if got := w.telemetry(ctx).Alarms; len(got) != 1 || got[0].Action != "duty 0.5, batch 4" || got[0].Subject != "cpu-thermal" {
			t.Errorf("alarms %v", got)
		}
		if got := gathered(t, w); got != "cpu-thermal temperature" {
			t.Errorf("metrics %q", got)
		}
		time.Sleep(5 * time.Minute)
		synctest.Wait()
		if _, _, loads, _ = o.seen(); len(loads) != 2 || loads[1] != "duty 0.25, batch 1" {
			t.Fatalf("loads %q", loads)
		}
		o.heat(70)
		time.Sleep(20 * time.Minute)
		synctest.Wait()
		_, events, loads, load := o.seen()
		if len(events) != 2 || events[1].Kind != "alarm.cleared" || events[1].Alarm.ClearedAt == nil || events[1].Alarm.Action != "duty 0.25, batch 1" || load != (alarm.Load{}) || len(loads) != 3 {
			t.Errorf("events %v, loads %q", events, loads)
		}
		if got := gathered(t, w); got != "" {
			t.Errorf("metrics %q", got)
		}
		stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// An alarm that stays after the load was taken back says that nothing is done.
func TestWatchTakesBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := &oven{celsius: 97}
		w := &watch{
			machine: o, engine: o, limit: o.limit, log: slog.New(slog.DiscardHandler), sampled: make(chan struct{}),
			detector: alarm.New(alarm.Config{WarnCelsius: 75, SlowdownCelsius: 95}), respond: alarm.NewResponder(alarm.Throttle),
		}
		for now := time.Duration(0); now < 40*time.Minute; now += sampleEvery {
			if now == 10*time.Minute {
				if got := w.telemetry(t.Context()).Alarms; len(got) != 1 || got[0].Action != "duty 0.25, batch 1" {
					t.Fatalf("alarms %v", got)
				}
				o.heat(80)
			}
			w.look(t.Context(), now)
			time.Sleep(sampleEvery)
		}
		_, _, _, load := o.seen()
		if got := w.telemetry(t.Context()).Alarms; load != (alarm.Load{}) || len(got) != 1 || got[0].Action != "" {
			t.Errorf("load %v, alarms %v", load, got)
		}
	})
}

// gathered gives the labels of what a collector shows.
func gathered(t *testing.T, c prometheus.Collector) string {
	t.Helper()
	r := prometheus.NewPedanticRegistry()
	r.MustRegister(c)
	families, err := r.Gather()
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	for _, f := range families {
		for _, m := range f.Metric {
			for _, l := range m.Label {
				all = append(all, l.GetValue())
			}
		}
	}
	slices.Sort(all)
	return strings.Join(all, " ")
}

// What alarms ask of the engine is what it takes.
func TestLimit(t *testing.T) {
	h := &host{engine: engine.New(engine.Config{Log: slog.New(slog.DiscardHandler)})}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- h.engine.Run(ctx) }()
	for _, reaction := range alarm.Reactions {
		r := alarm.NewResponder(reaction)
		for minute := range 10 {
			load := r.Decide(time.Duration(minute)*time.Minute, minute < 9, true)
			if err := h.limit(ctx, load); err != nil {
				t.Errorf("%s: %v: %v", reaction, load, err)
			}
			if got := alarm.Load(h.engine.Throttled()); got != load {
				t.Errorf("%s: the engine has %v, want %v", reaction, got, load)
			}
		}
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}
