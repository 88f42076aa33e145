package console

import (
	"bufio"
	"net/http"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/dunlin/dunlin/internal/link"
	v1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// A device's page gets its samples as rows of numbers, and the parts that
// change; what a device does not have is no zero.
func TestLiveDevice(t *testing.T) {
	w := start(t)
	w.join("cam-1", map[string]string{"site": "rome"}, &v1.Reported{})
	sample := func(cpu float64, ago time.Duration) {
		w.up("cam-1", link.Telemetry, &v1.Telemetry{At: timestamppb.New(time.Now().Add(-ago)), CpuUtilisation: &cpu, MemoryUsedBytes: new(uint64(1 << 30)), MemoryTotalBytes: new(uint64(4 << 30))})
	}
	sample(0.25, time.Second)
	w.wait(func() bool { return w.dispatch.Telemetry("cam-1") != nil })
	b := w.browser().signIn("ada")
	_, body := b.do("GET", "/devices/cam-1", nil)
	has(t, body, `sse-connect="/live/devices/cam-1"`, `id="live"`, `id="part-memory"`, "/assets/uplot.min.")
	req, err := http.NewRequestWithContext(t.Context(), "GET", w.url+"/live/devices/cam-1", nil)
	must(t, err)
	resp, err := b.Do(req)
	must(t, err)
	defer resp.Body.Close()
	lines := bufio.NewReader(resp.Body)
	until := func(what string) string {
		t.Helper()
		for {
			line, err := lines.ReadString('\n')
			if err != nil {
				t.Fatalf("%v, while %q was waited for", err, what)
			}
			if strings.Contains(line, what) {
				return line
			}
		}
	}
	if line := until(",25,"); !strings.Contains(line, ",25,null,25,null,null,null,null]") {
		t.Errorf("got %s", line)
	}
	sample(0.5, 0)
	until(",50,")
	until(`hx-swap-oob="true" id="part-`)
	w.up("cam-1", link.Reported, &v1.Reported{Session: "cam-1", Sequence: 2, Versions: []*v1.VersionStatus{{Model: "digits", Version: 1, State: v1.VersionState_VERSION_STATE_QUARANTINED, Reason: script}}})
	until("digits:1")
	// Nobody sees what lies outside the scope.
	ben := w.browser().signIn("ben")
	if resp, _ := ben.do("GET", "/live/devices/cam-1", nil); resp.StatusCode != http.StatusNotFound {
		t.Errorf("got %s", resp.Status)
	}
}
