package console

import (
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/hex"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	cdplog "github.com/chromedp/cdproto/log"
	"github.com/chromedp/cdproto/runtime"
	"github.com/chromedp/chromedp"
	"github.com/chromedp/chromedp/kb"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/dunlin/dunlin/controller"
	"github.com/dunlin/dunlin/internal/e2e/byhand"
	"github.com/dunlin/dunlin/internal/link"
	"github.com/dunlin/dunlin/internal/pki"
	v1 "github.com/dunlin/dunlin/proto/dunlin/v1"
	v1connect "github.com/dunlin/dunlin/proto/dunlin/v1/dunlinv1connect"
)

// axe is axe-core 4.14.1 (npm, axe.min.js), under the MPL-2.0; only tests have it.
//
//go:embed testdata/axe.min.js
var axe string

const (
	axeSHA256 = "29348999450cdf2849a8e70b7912fc2da85a849da39c0d0d5394f51d4a9ed95c"
	patience  = 15 * time.Second
	password  = "correct horse battery"
	script    = `<script>alert("reason")</script>`
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

type world struct {
	controller.Addresses
	token string
	data  string
	conns map[string]*byhand.Conn
}

// start runs a controller with a user, ada.
func start(t *testing.T) *world {
	t.Helper()
	c := controller.DefaultConfig()
	c.Data, c.Listen, c.MQTTListen, c.Log = t.TempDir(), "127.0.0.1:0", "127.0.0.1:0", slog.New(slog.DiscardHandler)
	ready := make(chan controller.Addresses, 1)
	c.OnReady = func(a controller.Addresses) { ready <- a }
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- controller.Run(ctx, c) }()
	w := &world{data: c.Data, conns: map[string]*byhand.Conn{}}
	select {
	case w.Addresses = <-ready:
	case err := <-done:
		cancel()
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for _, conn := range w.conns {
			conn.Close()
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	b, err := os.ReadFile(filepath.Join(c.Data, controller.AdminTokenFile))
	must(t, err)
	w.token = strings.TrimSpace(string(b))
	users := v1connect.NewUserServiceClient(byhand.User(w.token, nil), w.URL)
	_, err = users.CreateUser(t.Context(), connect.NewRequest(&v1.CreateUserRequest{Name: "ada", Role: "admin", Password: password}))
	must(t, err)
	return w
}

// device joins, connects, and says how it is.
func (w *world) device(t *testing.T, name string, labels map[string]string, reported *v1.Reported, telemetry *v1.Telemetry) {
	t.Helper()
	enrolment := v1connect.NewEnrollmentServiceClient(byhand.User(w.token, nil), w.URL)
	made, err := enrolment.CreateJoinToken(t.Context(), connect.NewRequest(&v1.CreateJoinTokenRequest{Labels: labels}))
	must(t, err)
	key, err := pki.NewKey()
	must(t, err)
	d, err := byhand.Join(t.Context(), enrolment, made.Msg.GetJoinToken(), name, key)
	must(t, err)
	if reported == nil {
		return
	}
	_, at, _ := strings.Cut(w.Broker, "://")
	conn, err := byhand.Connect(t.Context(), at, d.TLS("127.0.0.1"), byhand.Login{ClientID: name, User: name}, nil)
	must(t, err)
	w.conns[name] = conn
	w.up(t, name, link.Hello, &v1.Hello{BootId: name, Session: name, CertificateSerial: d.Chain[0].SerialNumber.Bytes(), Info: &v1.DeviceInfo{
		Hostname: name, FirmwareProfile: "raspberry-pi-5", Arch: "arm64", CpuModel: "Cortex-A76", CpuCount: 4, AgentVersion: "0.9.0", RuntimeVersion: "1.23.0"}})
	// Some are where they should be.
	devices, err := v1connect.NewDeviceServiceClient(byhand.User(w.token, nil), w.URL).ListDevices(t.Context(), connect.NewRequest(&v1.ListDevicesRequest{Device: name}))
	must(t, err)
	reported.Session, reported.Sequence, reported.Observed = name, 1, devices.Msg.GetDevices()[0].GetDesired()
	w.up(t, name, link.Reported, reported)
	w.up(t, name, link.Telemetry, telemetry)
}

func (w *world) up(t *testing.T, name, kind string, m proto.Message) {
	t.Helper()
	b, err := proto.Marshal(m)
	must(t, err)
	must(t, w.conns[name].Publish(link.Up(name, kind), b))
	must(t, w.conns[name].Ping())
}

// fill gives the fleet devices of every kind.
func (w *world) fill(t *testing.T) {
	sites := []string{"berlin", "rome", "oslo"}
	for i := range 24 {
		labels := map[string]string{"site": sites[i%3], "line": fmt.Sprint(1 + i%4)}
		status := &v1.VersionStatus{Model: "digits", Version: 2, State: v1.VersionState_VERSION_STATE_RESIDENT, Serving: true}
		telemetry := &v1.Telemetry{
			At: timestamppb.Now(), CpuUtilisation: new(0.31), MemoryUsedBytes: new(uint64(5 << 30)), MemoryTotalBytes: new(uint64(8 << 30)), PowerWatts: new(6.4), DiskFreeBytes: new(uint64(21 << 30)),
			Models: []*v1.ModelTelemetry{{Model: "digits", Version: 2, Resident: true, MemoryBytes: 1 << 30, Measured: true}, {Model: "faces", Version: 1, Resident: true, MemoryBytes: 700 << 20}},
		}
		reported := &v1.Reported{Versions: []*v1.VersionStatus{status, {Model: "faces", Version: 1, State: v1.VersionState_VERSION_STATE_RESIDENT, Serving: true}}}
		switch i {
		case 3, 11:
			status.State, status.Serving, status.Reason = v1.VersionState_VERSION_STATE_QUARANTINED, false, "output probabilities is NaN in its check"
		case 5:
			status.State, status.BytesPresent, status.BytesTotal = v1.VersionState_VERSION_STATE_ABSENT, 3<<20, 9<<20
		case 7:
			status.Reason = script
			at := time.Now()
			a := &v1.Alarm{Kind: "temperature", Subject: "cpu-thermal", Severity: v1.Severity_SEVERITY_ERROR, RaisedAt: timestamppb.New(at), Message: "cpu-thermal reaches 85 °C in 2.1 h", Method: "theil-sen", Unit: "°C", Threshold: new(85.0), Action: "duty 0.5"}
			for j := range 24 {
				a.Samples = append(a.Samples, &v1.AlarmSample{At: timestamppb.New(at.Add(time.Duration(j-24) * time.Minute)), Value: 62 + 0.7*float64(j) + float64(j%3)})
			}
			telemetry.Alarms = []*v1.Alarm{a}
			reported.Drifts = []*v1.Drift{{Kind: "file", Subject: "digits:2 model.onnx", Want: "sha256:1f0c", Have: "sha256:99ab", Since: timestamppb.New(at), Repair: "fetched again"}}
		case 9, 17:
			reported = nil
		}
		w.device(t, fmt.Sprintf("cam-%02d", i+1), labels, reported, telemetry)
	}
}

// browser is a page in Chromium, and what was wrong on it.
type browser struct {
	ctx context.Context
	mu  sync.Mutex
	bad []string
}

func open(t *testing.T) *browser {
	t.Helper()
	path, err := exec.LookPath("chromium")
	if err != nil {
		t.Fatalf("%v; sh internal/e2e/setup.sh installs what the tests need", err)
	}
	options := append(chromedp.DefaultExecAllocatorOptions[:], chromedp.ExecPath(path), chromedp.NoSandbox, chromedp.WindowSize(1360, 860))
	ctx, stop := chromedp.NewExecAllocator(context.Background(), options...)
	ctx, cancel := chromedp.NewContext(ctx)
	limited, end := context.WithTimeout(ctx, 3*time.Minute)
	t.Cleanup(func() { end(); cancel(); stop() })
	must(t, chromedp.Run(limited)) // the browser lives as long as the context of its first run
	b := &browser{ctx: limited}
	chromedp.ListenTarget(limited, func(event any) {
		var bad string
		switch e := event.(type) {
		case *runtime.EventExceptionThrown:
			bad = e.ExceptionDetails.Error()
		case *runtime.EventConsoleAPICalled:
			if e.Type == runtime.APITypeError {
				bad = fmt.Sprintf("console.error of %d values", len(e.Args))
			}
		case *cdplog.EventEntryAdded:
			if e.Entry.Level == cdplog.LevelError {
				bad = fmt.Sprintf("%s: %s %s", e.Entry.Source, e.Entry.Text, e.Entry.URL)
			}
		}
		if bad != "" {
			b.mu.Lock()
			b.bad = append(b.bad, bad)
			b.mu.Unlock()
		}
	})
	return b
}

func (b *browser) do(t *testing.T, actions ...chromedp.Action) {
	t.Helper()
	for i, a := range actions {
		ctx, cancel := context.WithTimeout(b.ctx, patience)
		err := chromedp.Run(ctx, a)
		cancel()
		if err != nil {
			b.picture(t, "failed")
			t.Fatalf("step %d: %v", i+1, err)
		}
	}
}

// clean says that nothing was wrong on a page: no error in the browser's
// console, which has violations of the policy too, and no serious fault that
// axe finds.
func (b *browser) clean(t *testing.T, what string) {
	t.Helper()
	var faults []string
	b.do(t, chromedp.Evaluate(axe+`; void 0`, nil),
		chromedp.Evaluate(`axe.run().then(r => r.violations.filter(v => v.impact === 'serious' || v.impact === 'critical').map(v => v.id + ': ' + v.nodes.map(n => n.html + ' ' + n.failureSummary).join('; ')))`, &faults, func(p *runtime.EvaluateParams) *runtime.EvaluateParams { return p.WithAwaitPromise(true) }))
	for _, f := range faults {
		t.Errorf("%s: axe: %.600s", what, f)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, bad := range b.bad {
		t.Errorf("%s: %s", what, bad)
	}
	b.bad = nil
}

// picture keeps how a page looks, where DUNLIN_SCREENSHOTS names a folder.
func (b *browser) picture(t *testing.T, name string) {
	t.Helper()
	dir := os.Getenv("DUNLIN_SCREENSHOTS")
	if dir == "" {
		return
	}
	var png []byte
	b.do(t, chromedp.CaptureScreenshot(&png))
	must(t, os.WriteFile(filepath.Join(dir, name+".png"), png, 0o644))
}

func TestAxeIsWhatItWas(t *testing.T) {
	if sum := sha256.Sum256([]byte(axe)); hex.EncodeToString(sum[:]) != axeSHA256 {
		t.Errorf("axe.min.js is %x, want %s", sum, axeSHA256)
	}
}

func TestConsole(t *testing.T) {
	w := start(t)
	b := open(t)
	for _, theme := range []string{"light", "dark"} {
		b.do(t, chromedp.Navigate(w.URL+"/"), chromedp.WaitVisible("#password"), chromedp.Click(`button[value=`+theme+`]`), chromedp.WaitVisible(`html[data-theme=`+theme+`] #password`))
		b.clean(t, "sign-in, "+theme)
		b.picture(t, "sign-in-"+theme)
	}
	b.do(t, chromedp.SendKeys("#name", "ada"), chromedp.SendKeys("#password", password+"\r"), chromedp.WaitVisible(".empty"))
	b.clean(t, "no device")
	b.picture(t, "empty")
	w.fill(t)
	b.do(t, chromedp.Navigate(w.URL+"/"), chromedp.WaitVisible(`#live[data-state=live]`), chromedp.WaitVisible("#row-cam-08 .state.trouble"))
	for _, theme := range []string{"light", "dark"} {
		b.do(t, chromedp.Click(`button[value=`+theme+`]`), chromedp.WaitVisible(`html[data-theme=`+theme+`] #live[data-state=live]`))
		b.clean(t, "fleet, "+theme)
		b.picture(t, "fleet-"+theme)
	}
	// A row changes while one looks.
	w.up(t, "cam-01", link.Reported, &v1.Reported{Session: "cam-01", Sequence: 2, Versions: []*v1.VersionStatus{{Model: "digits", Version: 3, State: v1.VersionState_VERSION_STATE_QUARANTINED}}})
	b.do(t, chromedp.WaitVisible(`#row-cam-01 .chip.bad`))
	b.clean(t, "live row")
	// By keyboard: "/" finds, and the filter is in the URL.
	var at string
	b.do(t, chromedp.KeyEvent("/"), chromedp.WaitVisible("#q:focus"), chromedp.KeyEvent(kb.Backspace), chromedp.KeyEvent("berlin"), chromedp.WaitNotPresent("#row-cam-02"), chromedp.WaitVisible("#row-cam-01"), chromedp.Location(&at))
	if at != w.URL+"/?q=berlin" {
		t.Errorf("got %s", at)
	}
	b.clean(t, "found")
	b.do(t, chromedp.Navigate(w.URL+"/devices/cam-08"), chromedp.WaitVisible("svg.map"))
	for _, theme := range []string{"light", "dark"} {
		b.do(t, chromedp.Click(`button[value=`+theme+`]`), chromedp.WaitVisible(`html[data-theme=`+theme+`] svg.map`))
		b.clean(t, "device, "+theme)
		b.picture(t, "device-"+theme)
	}
	// A session that is taken back leads to the sign-in, while one looks.
	b.do(t, chromedp.Navigate(w.URL+"/"), chromedp.WaitVisible(`#live[data-state=live]`))
	users := v1connect.NewUserServiceClient(byhand.User(w.token, nil), w.URL)
	list, err := users.ListTokens(t.Context(), connect.NewRequest(&v1.ListTokensRequest{User: "ada"}))
	must(t, err)
	for _, one := range list.Msg.GetTokens() {
		_, err := users.DeleteToken(t.Context(), connect.NewRequest(&v1.DeleteTokenRequest{Id: one.GetId()}))
		must(t, err)
	}
	b.do(t, chromedp.WaitVisible("#password"))
	b.clean(t, "signed out")
}
