package dispatch

import (
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
