package main

import (
	"context"
	"crypto/tls"
	"debug/elf"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/rogpeppe/go-internal/testscript"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/dunlin/dunlin/controller"
	"github.com/dunlin/dunlin/internal/link"
	"github.com/dunlin/dunlin/internal/pki"
	"github.com/dunlin/dunlin/internal/pki/pkitest"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
	"github.com/dunlin/dunlin/proto/dunlin/v1/dunlinv1connect"
)

// patience bounds what a script waits for.
const patience = 30 * time.Second

func TestMain(m *testing.M) {
	time.Local = time.UTC // tables show it
	testscript.Main(m, map[string]func(){"dunlin": func() { os.Exit(Main()) }})
}

// TestScripts runs testdata/*.txtar, each with a controller of its own.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata",
		RequireExplicitExec: true,
		Setup:               setup,
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"device": deviceCommand,
			"mode":   modeCommand,
			"exits":  exitsCommand,
			// watching NAME dunlin ARGS...: runs it beside the script
			"watching": watchingCommand,
			// seen NAME REGEXP: waits until that is what it has written
			"seen": seenCommand,
			// interrupt NAME CODE: interrupts it, and checks its exit code
			"interrupt": interruptCommand,
			// oldsettings: writes the settings file of an older version
			"oldsettings": func(ts *testscript.TestScript, _ bool, _ []string) {
				path := ts.MkAbs(".config/dunlin/config.yaml")
				ts.Check(os.MkdirAll(filepath.Dir(path), 0o700))
				ts.Check(os.WriteFile(path, []byte("url: "+ts.Getenv("URL")+"\ntoken: "+ts.Getenv("TOKEN")+"\n"), 0o600))
			},
		},
	})
}

type fleetKey struct{}

// fleetOf is what belongs to one script.
type fleetOf struct {
	url     string
	mu      sync.Mutex
	devices map[string]*device
	beside  map[string]*beside
}

// beside is a command line that runs while the script goes on.
type beside struct {
	stop context.CancelFunc
	code chan int
	mu   sync.Mutex // guards what follows
	text strings.Builder
	more chan struct{} // closed at the next write
}

func (b *beside) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	close(b.more)
	b.more = make(chan struct{})
	return b.text.Write(p)
}

func watchingCommand(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 3 || args[1] != "dunlin" {
		ts.Fatalf("usage: watching NAME dunlin ARGS...")
	}
	ctx, stop := context.WithCancel(context.Background())
	b := &beside{stop: stop, code: make(chan int, 1), more: make(chan struct{})}
	f := ts.Value(fleetKey{}).(*fleetOf)
	f.beside[args[0]] = b
	cmd := exec.CommandContext(ctx, "dunlin", args[2:]...)
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.Dir, cmd.Stdout, cmd.Stderr = ts.MkAbs("."), b, b
	for _, name := range []string{"HOME", "PATH", "XDG_CONFIG_HOME", "DUNLIN_URL", "DUNLIN_TOKEN", "DUNLIN_CONTEXT"} {
		cmd.Env = append(cmd.Env, name+"="+ts.Getenv(name))
	}
	ts.Check(cmd.Start())
	go func() {
		_ = cmd.Wait()
		b.code <- cmd.ProcessState.ExitCode()
	}()
	ts.Defer(func() { stop() })
}

func seenCommand(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: seen NAME REGEXP")
	}
	want := regexp.MustCompile(args[1])
	b := ts.Value(fleetKey{}).(*fleetOf).beside[args[0]]
	for deadline := time.After(patience); ; {
		b.mu.Lock()
		text, more := b.text.String(), b.more
		b.mu.Unlock()
		if want.MatchString(text) {
			return
		}
		select {
		case <-more:
		case code := <-b.code:
			ts.Fatalf("ended with %d: %s", code, text)
		case <-deadline:
			ts.Fatalf("after %s it wrote only %q", patience, text)
		}
	}
}

func interruptCommand(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: interrupt NAME CODE")
	}
	b := ts.Value(fleetKey{}).(*fleetOf).beside[args[0]]
	b.stop()
	if code := fmt.Sprint(<-b.code); code != args[1] {
		ts.Fatalf("exit code %s, want %s: %s", code, args[1], b.text.String())
	}
}

// startController runs a controller with its data in a folder, and gives its
// URL and the administrator's token.
func startController(data, listen string, change ...func(*controller.Config)) (url, token string, stop func(), err error) {
	ctx, cancel := context.WithCancel(context.Background())
	ready := make(chan controller.Addresses, 1)
	failed := make(chan error, 1)
	var running sync.WaitGroup
	running.Go(func() {
		c := controller.DefaultConfig()
		c.Data, c.Listen, c.MQTTListen = data, listen, "127.0.0.1:0"
		c.Log = slog.New(slog.DiscardHandler)
		for _, f := range change {
			f(&c)
		}
		c.OnReady = func(a controller.Addresses) { ready <- a }
		if err := controller.Run(ctx, c); err != nil {
			failed <- err
		}
	})
	stop = func() { cancel(); running.Wait() }
	select {
	case a := <-ready:
		url = a.URL
	case err = <-failed:
	case <-time.After(patience):
		err = fmt.Errorf("the controller is not ready after %s", patience)
	}
	if err == nil {
		var b []byte
		b, err = os.ReadFile(filepath.Join(data, controller.AdminTokenFile))
		token = strings.TrimSpace(string(b))
	}
	if err != nil {
		stop()
	}
	return url, token, stop, err
}

func setup(env *testscript.Env) error {
	data := filepath.Join(env.WorkDir, ".controller")
	url, token, stop, err := startController(data, "127.0.0.1:0")
	if err != nil {
		return err
	}
	env.Defer(stop)
	f := &fleetOf{url: url, devices: map[string]*device{}, beside: map[string]*beside{}}
	env.Values[fleetKey{}] = f
	env.Defer(f.stop) // before the controller
	digits, err := filepath.Abs(filepath.Join("..", "..", "models", "examples", "digits"))
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(env.WorkDir, "agent"), emptyProgram(), 0o755); err != nil {
		return err
	}
	env.Setenv("HOME", env.WorkDir)
	env.Setenv("XDG_CONFIG_HOME", filepath.Join(env.WorkDir, ".config"))
	env.Setenv("URL", url)
	env.Setenv("TOKEN", token)
	env.Setenv("TOKEN_FILE", filepath.Join(data, controller.AdminTokenFile))
	env.Setenv("DIGITS", digits)
	// Most scripts are of somebody who is logged in.
	env.Setenv("DUNLIN_CONTEXT", "")
	env.Setenv("DUNLIN_URL", url)
	env.Setenv("DUNLIN_TOKEN", token)
	return nil
}

// emptyProgram is an ELF file for linux/amd64 with nothing in it.
func emptyProgram() []byte {
	b := append([]byte("\x7fELF\x02\x01\x01"), make([]byte, 57)...)
	b[16], b[18], b[20], b[52] = byte(elf.ET_EXEC), byte(elf.EM_X86_64), byte(elf.EV_CURRENT), 64
	return b
}

// device is the device's end of the wire: a real session with the broker,
// and a script in place of an agent.
type device struct {
	name     string
	link     *link.Link
	cancel   context.CancelFunc
	running  sync.WaitGroup
	last     *dunlinv1.Desired
	sequence uint64
	event    uint64
}

func (f *fleetOf) stop() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, d := range f.devices {
		d.cancel()
		d.running.Wait()
	}
	clear(f.devices)
}

// deviceCommand: device NAME join TOKEN_FILE [BUDGET_BYTES] | desires MODEL VERSION |
// serves MODEL VERSION | refuses MODEL VERSION REASON | event KIND MESSAGE |
// measures MODEL VERSION | alarm KIND SUBJECT | leave
func deviceCommand(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: device NAME VERB ...")
	}
	f := ts.Value(fleetKey{}).(*fleetOf)
	f.mu.Lock()
	defer f.mu.Unlock()
	name, verb, args := args[0], args[1], args[2:]
	if verb == "join" {
		var limits *dunlinv1.DeviceLimits
		if len(args) > 1 {
			n, err := strconv.ParseUint(args[1], 10, 64)
			ts.Check(err)
			limits = &dunlinv1.DeviceLimits{HostMemoryBytes: n}
		}
		f.devices[name] = join(ts, f.url, name, strings.TrimSpace(ts.ReadFile(args[0])), limits)
		return
	}
	d := f.devices[name]
	if d == nil {
		ts.Fatalf("no device %s", name)
	}
	version := func() int64 {
		n, err := strconv.ParseInt(args[1], 10, 64)
		ts.Check(err)
		return n
	}
	switch verb {
	case "desires":
		d.waitDesired(ts, args[0], version())
	case "serves":
		d.report(ts, &dunlinv1.VersionStatus{Model: args[0], Version: version(), State: dunlinv1.VersionState_VERSION_STATE_RESIDENT, Serving: true})
	case "refuses":
		d.report(ts, &dunlinv1.VersionStatus{Model: args[0], Version: version(), State: dunlinv1.VersionState_VERSION_STATE_QUARANTINED, Reason: args[2]})
	case "event":
		d.send(ts, &dunlinv1.Event{Kind: args[0], Severity: dunlinv1.Severity_SEVERITY_ERROR, Model: "digits", Version: 1, Message: args[1]})
	case "measures":
		d.waitDesired(ts, args[0], version())
		d.send(ts, &dunlinv1.Event{Kind: "profile.measured", Severity: dunlinv1.Severity_SEVERITY_INFO, Model: args[0], Version: version(), Message: "measured",
			Profile: measuredProfile(args[0], version(), d.digest(ts, args[0]))})
	case "alarm":
		alarm := &dunlinv1.Alarm{Kind: args[0], Subject: args[1], Severity: dunlinv1.Severity_SEVERITY_WARNING, RaisedAt: timestamppb.Now(), Message: "it rises",
			Method: "theil-sen", Unit: "°C", Threshold: new(80.0), SlopePerHour: new(4.0), HoursToThreshold: new(1.5), Samples: []*dunlinv1.AlarmSample{{Value: 73}, {Value: 74}}}
		ts.Check(d.link.Send(link.Telemetry, &dunlinv1.Telemetry{At: timestamppb.Now(), Alarms: []*dunlinv1.Alarm{alarm}}))
		d.send(ts, &dunlinv1.Event{Kind: "alarm.raised", Severity: alarm.Severity, Message: alarm.Message, Alarm: alarm})
	case "leave":
		d.cancel()
		d.running.Wait()
		delete(f.devices, name)
	default:
		ts.Fatalf("unknown verb %s", verb)
	}
}

// send sends the next event, and waits until the controller has it.
func (d *device) send(ts *testscript.TestScript, e *dunlinv1.Event) {
	d.event++
	e.Sequence, e.At = d.event, timestamppb.Now()
	ts.Check(d.link.Send(link.Events, &dunlinv1.EventBatch{OutboxId: "o-" + d.name, Events: []*dunlinv1.Event{e}}))
	d.waitAck(ts)
}

// digest gives that of the version of a model that the device should have.
func (d *device) digest(ts *testscript.TestScript, model string) string {
	var document dunlinv1.DesiredDocument
	ts.Check(proto.Unmarshal(d.last.GetDocument(), &document))
	for _, v := range document.GetVersions() {
		if v.GetModel() == model {
			return v.GetDigest()
		}
	}
	ts.Fatalf("device %s should not have %s", d.name, model)
	return ""
}

func measuredProfile(model string, version int64, digest string) *dunlinv1.ModelProfile {
	setting := func(batch uint32) *dunlinv1.ModelSetting {
		return &dunlinv1.ModelSetting{Provider: "CPUExecutionProvider", Batch: batch, Instances: 1}
	}
	return &dunlinv1.ModelProfile{
		Model: model, Version: version, Digest: digest, FirmwareProfile: "board", RuntimeVersion: "1.30.0", CpuModel: "Cortex-A76",
		MeasuredAt: timestamppb.New(time.Date(2026, 11, 20, 12, 0, 0, 0, time.UTC)), MeasuredSeconds: 12.5,
		WeightBytes: 3 << 20, SessionBytes: 1 << 20, WorkspaceFixedBytes: 1 << 19, WorkspaceRowBytes: 1 << 18,
		ActivationColdSeconds: 0.021, ActivationWarmSeconds: 0.004,
		Points: []*dunlinv1.ProfilePoint{
			{Setting: setting(1), Runs: 100, P50Seconds: 0.00125, P95Seconds: 0.0014, P99Seconds: 0.002, RowsPerSecond: 790, JoulesPerRow: new(0.005)},
			{Setting: setting(4), Runs: 100, P50Seconds: 0.003, P95Seconds: 0.0032, P99Seconds: 0.004, RowsPerSecond: 1310, PeakBytes: new(uint64(6 << 20)), JoulesPerRow: new(0.0035)},
		},
		Recommended: setting(4), Latency: []*dunlinv1.LatencyPoint{{Rows: 1, Seconds: 0.00125}, {Rows: 4, Seconds: 0.003}},
		Providers: []*dunlinv1.ProviderCheck{{Provider: "CPUExecutionProvider", Accepted: true}, {Provider: "CUDAExecutionProvider", Reason: "a <NaN>", MaxAbsoluteError: 2}},
	}
}

func join(ts *testscript.TestScript, url, name, token string, limits *dunlinv1.DeviceLimits) *device {
	d, err := joinDevice(url, name, token, limits)
	ts.Check(err)
	// What a device sends is taken in in order: with the answer to this, the
	// controller knows that it is there.
	ts.Check(d.link.Send(link.Request, &dunlinv1.BlockRequest{Sha256: make([]byte, 32), Length: 1}))
	for known := false; !known || d.last == nil; {
		switch m := d.next(ts, "answer to its hello").(type) {
		case *dunlinv1.Desired:
			d.last = m
		case *dunlinv1.Block:
			known = true
		}
	}
	return d
}

func joinDevice(url, name, token string, limits *dunlinv1.DeviceLimits) (*device, error) {
	info := &dunlinv1.DeviceInfo{Arch: "arm64", RuntimeVersion: "1.30.0", ServingUrl: "http://127.0.0.1:1", FirmwareProfile: "board", Limits: limits}
	key, err := pki.NewKey()
	if err != nil {
		return nil, err
	}
	csr, err := pki.Request(key, name)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	res, err := dunlinv1connect.NewEnrollmentServiceClient(http.DefaultClient, url).Join(ctx, connect.NewRequest(&dunlinv1.JoinRequest{
		JoinToken: token, Name: name, Csr: csr, Info: info,
	}))
	if err != nil {
		return nil, err
	}
	secure, err := pkitest.Joined{Key: key, Identity: res.Msg.GetIdentity()}.TLS("127.0.0.1")
	if err != nil {
		return nil, err
	}
	l, err := link.New(link.Config{
		BrokerURL: res.Msg.GetBrokerUrl(), Device: name, TLS: func() *tls.Config { return secure }, BootID: "boot-" + name, Log: slog.New(slog.DiscardHandler),
		Hello: func() *dunlinv1.Hello { return &dunlinv1.Hello{Info: info} },
	})
	if err != nil {
		return nil, err
	}
	runCtx, stop := context.WithCancel(context.Background())
	d := &device{name: name, link: l, cancel: stop}
	d.running.Go(func() { _ = l.Run(runCtx) })
	select {
	case <-l.Connected():
		return d, nil
	case <-time.After(patience):
		stop()
		return nil, fmt.Errorf("device %s is not connected after %s", name, patience)
	}
}

// next gives the next message from the controller.
func (d *device) next(ts *testscript.TestScript, what string) proto.Message {
	select {
	case m := <-d.link.Inbox():
		return m
	case <-time.After(patience):
		ts.Fatalf("device %s: no %s after %s", d.name, what, patience)
		return nil
	}
}

func (d *device) waitDesired(ts *testscript.TestScript, model string, version int64) {
	for {
		var document dunlinv1.DesiredDocument
		ts.Check(proto.Unmarshal(d.last.GetDocument(), &document))
		for _, v := range document.GetVersions() {
			if v.GetModel() == model && v.GetVersion() == version {
				return
			}
		}
		if m, ok := d.next(ts, "desired document").(*dunlinv1.Desired); ok {
			d.last = m
		}
	}
}

func (d *device) waitAck(ts *testscript.TestScript) {
	for {
		if c, ok := d.next(ts, "acknowledgement").(*dunlinv1.Command); ok && c.GetEventAck() != nil {
			return
		}
	}
}

func (d *device) report(ts *testscript.TestScript, v *dunlinv1.VersionStatus) {
	d.sequence++
	v.Since = timestamppb.Now()
	ts.Check(d.link.Send(link.Reported, &dunlinv1.Reported{
		Session: d.link.Session(), Observed: d.last.GetGeneration(), At: timestamppb.Now(), Versions: []*dunlinv1.VersionStatus{v}, Sequence: d.sequence,
	}))
}

// exitsCommand: exits CODE dunlin ARGS... runs it and checks its exit code.
func exitsCommand(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits CODE PROGRAM ARGS...")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	err = ts.Exec(args[1], args[2:]...)
	got := 0
	if err != nil {
		e, ok := err.(interface{ ExitCode() int })
		if !ok {
			ts.Fatalf("%v", err)
		}
		got = e.ExitCode()
	}
	if got != want {
		ts.Fatalf("exit code %d, want %d", got, want)
	}
}

// modeCommand: mode FILE OCTAL
func modeCommand(ts *testscript.TestScript, neg bool, args []string) {
	info, err := os.Stat(ts.MkAbs(args[0]))
	ts.Check(err)
	if got := fmt.Sprintf("%o", info.Mode().Perm()); got != args[1] {
		ts.Fatalf("mode of %s is %s, want %s", args[0], got, args[1])
	}
}
