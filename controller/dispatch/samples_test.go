package dispatch

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/dunlin/dunlin/internal/link"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// TestSamples gives each sample once, the newest of a device.
func TestSamples(t *testing.T) {
	w := fresh(t, defaultTiming)
	for _, device := range []string{"b", "a"} {
		w.join(device)
		w.hello(device, "s", nil)
		w.up(device, link.Telemetry, &dunlinv1.Telemetry{At: timestamppb.Now(), BootId: "old"})
		w.up(device, link.Telemetry, &dunlinv1.Telemetry{At: timestamppb.Now(), BootId: "new"})
	}
	newest := func(device, boot string) bool { return w.d.Telemetry(device).GetBootId() == boot }
	for deadline := time.Now().Add(10 * time.Second); !newest("a", "new") || !newest("b", "new"); {
		if time.Now().After(deadline) {
			t.Fatal("the telemetry did not arrive")
		}
		time.Sleep(time.Millisecond)
	}
	got := w.d.Samples()
	if len(got) != 2 || got[0].Device != "a" || got[1].Device != "b" || got[0].Telemetry.GetBootId() != "new" || time.Since(got[0].ReceivedAt) > time.Minute {
		t.Errorf("got %v", got)
	}
	if got := w.d.Samples(); len(got) != 0 {
		t.Errorf("given twice: %v", got)
	}
}

// TestAlarmsKeepTheirEvidence has a device send what an alarm rests on once, as
// devices do, and then the alarm alone: it is still there, until the alarm is
// another.
func TestAlarmsKeepTheirEvidence(t *testing.T) {
	w := fresh(t, defaultTiming)
	w.join("a")
	w.hello("a", "s", nil)
	raised := timestamppb.Now()
	alarm := func(message string, at *timestamppb.Timestamp, severity dunlinv1.Severity, values ...float64) *dunlinv1.Alarm {
		a := &dunlinv1.Alarm{Kind: "temperature", Subject: "cpu", Method: "cusum", Severity: severity, RaisedAt: at, Message: message}
		for _, v := range values {
			a.Samples = append(a.Samples, &dunlinv1.AlarmSample{At: at, Value: v})
		}
		return a
	}
	const warning, bad = dunlinv1.Severity_SEVERITY_WARNING, dunlinv1.Severity_SEVERITY_ERROR
	for _, tt := range []struct {
		message string
		alarm   *dunlinv1.Alarm
		want    []float64
	}{
		{"first", alarm("first", raised, warning, 80, 81), []float64{80, 81}},
		{"second", alarm("second", raised, warning), []float64{80, 81}},
		{"third", alarm("third", raised, warning), []float64{80, 81}},
		{"worse", alarm("worse", raised, bad), nil},
		{"worse, with samples", alarm("worse, with samples", raised, bad, 90), []float64{90}},
		{"later", alarm("later", timestamppb.New(raised.AsTime().Add(time.Hour)), bad), nil},
	} {
		w.up("a", link.Telemetry, &dunlinv1.Telemetry{At: timestamppb.Now(), Alarms: []*dunlinv1.Alarm{tt.alarm}})
		var got *dunlinv1.Alarm
		for deadline := time.Now().Add(10 * time.Second); got.GetMessage() != tt.message; {
			if time.Now().After(deadline) {
				t.Fatalf("%s: the telemetry did not arrive", tt.message)
			}
			time.Sleep(time.Millisecond)
			if all := w.d.Telemetry("a").GetAlarms(); len(all) == 1 {
				got = all[0]
			}
		}
		var values []float64
		for _, s := range got.GetSamples() {
			values = append(values, s.GetValue())
		}
		if !slices.Equal(values, tt.want) {
			t.Errorf("%s: rests on %v, want %v", tt.message, values, tt.want)
		}
	}
}

// Who looks at a device has it send a sample each second, until nobody does,
// and does not shorten what a rollout has leased.
func TestLook(t *testing.T) {
	w := fresh(t, defaultTiming)
	for i := range maxLooked + 2 {
		w.join(fmt.Sprint("d", i))
		w.hello(fmt.Sprint("d", i), "s", nil)
	}
	waitFor(t, func() bool {
		w.d.mu.Lock()
		defer w.d.mu.Unlock()
		return len(w.d.live) == maxLooked+2
	}, "all devices")
	lease := func(device string, from int) (*dunlinv1.TelemetryLease, int) {
		var got *dunlinv1.TelemetryLease
		_, at := w.bus.wait(t, "lease of "+device, from, func(m message) bool {
			return isCommand(m, device, func(c *dunlinv1.Command) bool {
				got = c.GetTelemetryLease()
				return got != nil
			})
		})
		return got, at
	}
	w.d.mu.Lock()
	w.d.live["d1"].leased = w.d.now().Add(40 * time.Second)
	w.d.mu.Unlock()
	w.d.Look("d0")
	w.d.Look("d0") // it has most of its time left
	w.d.Look("d1")
	first, at := lease("d0", 0)
	if first.GetEveryMs() != 1000 || first.GetForMs() != 15000 {
		t.Errorf("got %v", first)
	}
	if second, _ := lease("d1", 0); second.GetEveryMs() != 1000 || second.GetForMs() < 35000 {
		t.Errorf("a rollout's lease became %v", second)
	}
	w.bus.mu.Lock()
	for _, m := range w.bus.sent[at:] {
		if isCommand(m, "d0", func(c *dunlinv1.Command) bool { return c.GetTelemetryLease() != nil }) {
			t.Error("d0 was told again at once")
		}
	}
	w.bus.mu.Unlock()
	for i := range maxLooked + 2 {
		w.d.Look(fmt.Sprint("d", i))
	}
	w.d.mu.Lock()
	defer w.d.mu.Unlock()
	looked := 0
	for _, l := range w.d.live {
		if !l.looked.IsZero() {
			looked++
		}
	}
	if looked != maxLooked {
		t.Errorf("%d devices are looked at, the limit is %d", looked, maxLooked)
	}
}
