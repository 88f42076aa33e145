package console

import (
	"testing"
	"time"

	"github.com/chromedp/chromedp"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/dunlin/dunlin/internal/link"
	v1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// A device's page is live: plots grow with each sample, the table behind them
// too, and what is reported is there without a reload.
func TestLiveDevice(t *testing.T) {
	w := start(t)
	status := &v1.VersionStatus{Model: "digits", Version: 2, State: v1.VersionState_VERSION_STATE_RESIDENT, Serving: true}
	at := time.Now().Add(-40 * time.Second)
	sample := func(i int) *v1.Telemetry {
		return &v1.Telemetry{
			At: timestamppb.New(at.Add(time.Duration(i) * time.Second)), CpuUtilisation: new(0.3 + float64(i%7)/20), MemoryUsedBytes: new(uint64(3+i%2) << 30), MemoryTotalBytes: new(uint64(8 << 30)), PowerWatts: new(5 + float64(i%5)),
			RequestP99Seconds: new(0.004 + float64(i%3)/1000), Temperatures: []*v1.Temperature{{Sensor: "cpu-thermal", Celsius: 55 + float64(i)/4}},
			Models: []*v1.ModelTelemetry{{Model: "digits", Version: 2, Resident: true, MemoryBytes: 1 << 30, Measured: true}},
		}
	}
	w.device(t, "cam-01", map[string]string{"site": "berlin"}, &v1.Reported{Versions: []*v1.VersionStatus{status}}, sample(0))
	b := open(t)
	b.do(t, chromedp.Navigate(w.URL+"/"), chromedp.WaitVisible("#password"), chromedp.SendKeys("#name", "ada"), chromedp.SendKeys("#password", password+"\r"), chromedp.WaitVisible("#row-cam-01"),
		chromedp.Navigate(w.URL+"/devices/cam-01"), chromedp.WaitVisible(`#live[data-state=live]`), chromedp.WaitVisible("#plots canvas"), chromedp.Click(".plots summary"))
	for i := 1; i < 12; i++ {
		w.up(t, "cam-01", link.Telemetry, sample(i))
		var rows int
		b.do(t, chromedp.Poll(`document.querySelectorAll('#samples-table tbody tr').length > `+string(rune('0'+min(i, 9)))+` && document.querySelectorAll('#samples-table tbody tr').length`, &rows))
	}
	b.picture(t, "live-device")
	var plots int
	b.do(t, chromedp.Evaluate(`document.querySelectorAll('#plots canvas').length`, &plots))
	if plots != 5 {
		t.Errorf("there are %d plots, not 5", plots)
	}
	w.up(t, "cam-01", link.Reported, &v1.Reported{Session: "cam-01", Sequence: 2, Versions: []*v1.VersionStatus{{Model: "digits", Version: 3, State: v1.VersionState_VERSION_STATE_QUARANTINED, Reason: script}}})
	b.do(t, chromedp.WaitVisible(`#part-versions .state.trouble`), chromedp.WaitVisible(`#how .state.trouble`))
	for _, theme := range []string{"light", "dark"} {
		b.do(t, chromedp.Click(`button[value=`+theme+`]`), chromedp.WaitVisible(`html[data-theme=`+theme+`] #plots canvas`))
		b.clean(t, "live device, "+theme)
		b.picture(t, "live-device-"+theme)
	}
}

// The first device of an empty fleet is there without a reload.
func TestFirstDevice(t *testing.T) {
	w := start(t)
	b := open(t)
	b.do(t, chromedp.Navigate(w.URL+"/"), chromedp.WaitVisible("#password"), chromedp.SendKeys("#name", "ada"), chromedp.SendKeys("#password", password+"\r"), chromedp.WaitVisible(".empty"), chromedp.WaitVisible(`#live[data-state=live]`))
	w.device(t, "cam-01", map[string]string{"site": "berlin"}, &v1.Reported{}, &v1.Telemetry{})
	b.do(t, chromedp.WaitVisible("#row-cam-01"), chromedp.WaitVisible(`#live[data-state=live]`))
	b.clean(t, "first device")
}
