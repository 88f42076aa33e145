package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	"github.com/dunlin/dunlin/agent/simfleet"
	"github.com/dunlin/dunlin/agent/state"
	profiles "github.com/dunlin/dunlin/firmware-profiles"
	"github.com/dunlin/dunlin/internal/e2e"
	"github.com/dunlin/dunlin/internal/e2e/byhand"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
	"github.com/dunlin/dunlin/proto/dunlin/v1/dunlinv1connect"
)

const (
	// host is where everything listens.
	host = "127.0.0.1"
	// model is deployed to the devices.
	model = "digits"
	// patience bounds each step.
	patience = 10 * time.Minute
	// quiet is the time after a change in which what comes of it is counted as
	// its cost: events, acknowledgements, the end of the rollout.
	quiet = 10 * time.Second
)

// figures are what was measured.
type figures struct {
	size
	join, connect, reconnect time.Duration
	// From the change to the moment at which so many percent had the document,
	// served its version, and were known at the controller to do so.
	fanout, serving, known spread
	bare                   spread // had a document from a bare broker
	cpu                    time.Duration
	memory                 int64
	idleBytes              float64 // of a device in an hour, there and back
}

// spread is some percentiles.
type spread struct{ p50, p99, all time.Duration }

func (s spread) String() string {
	return fmt.Sprintf("p50 %.0f ms, p99 %.0f ms, all %.0f ms", ms(s.p50), ms(s.p99), ms(s.all))
}

func ms(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

func (f *figures) ratio() float64 { return float64(f.fanout.p99) / float64(f.bare.p99) }

func (f *figures) print(w io.Writer) {
	fmt.Fprintf(w, "%d devices joined, each by a connection of its own, and connected, after %.1f s\n", f.devices, f.join.Seconds())
	fmt.Fprintf(w, "they connected again, joined, after %.1f s\n", f.connect.Seconds())
	fmt.Fprintf(w, "a deployment was changed: the document was there: %v; its version served: %v; the controller knew: %v\n", f.fanout, f.serving, f.known)
	fmt.Fprintf(w, "from a bare broker a document of the same size was there: %v\n", f.bare)
	fmt.Fprintf(w, "the controller used %.2f s of CPU for that, and has had %.0f MB of memory at most\n", f.cpu.Seconds(), float64(f.memory)/1e6)
	fmt.Fprintf(w, "after the controller was started again all were connected after %.1f s\n", f.reconnect.Seconds())
	if f.idle > 0 {
		fmt.Fprintf(w, "a device whose state does not change sent and received %.1f kB an hour, TLS included, counted over %v, from %v after the change on\n", f.idleBytes/1e3, f.idle, f.quiet+f.settle)
	}
	fmt.Fprintf(w, "fleet: devices=%d connect_s=%.1f converge_p99_ms=%.0f fanout_ratio=%.2f controller_rss_mb=%.0f cpu_s_per_1k_changes=%.2f\n",
		f.devices, f.connect.Seconds(), ms(f.known.p99), f.ratio(), float64(f.memory)/1e6, f.cpu.Seconds()*1000/float64(f.devices))
}

// bench is a run.
type bench struct {
	figures
	controller *e2e.Fleet
	fleet      *simfleet.Fleet
	progress   io.Writer
	traffic    meter
	toBare     atomic.Pointer[string] // address of the bare broker, while devices are to connect there

	mu      sync.Mutex // guards what follows
	began   time.Time
	have    map[string]time.Duration // since began, by device: has a new document
	serve   map[string]time.Duration // serves want
	want    int64
	desired map[string]state.Desired // the newest
}

// measure runs everything against one controller, whose data is in dir.
func measure(ctx context.Context, s size, programs e2e.Programs, self, root, dir string, progress io.Writer) (_ *figures, err error) {
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, err
	}
	controller, err := e2e.NewFleet(programs, dir, "")
	if err != nil {
		return nil, err
	}
	controller.ControllerArgs = []string{"--log-level", "warn"}
	defer func() {
		if err = errors.Join(err, controller.Stop()); err != nil && controller.Controller != nil {
			err = fmt.Errorf("%w\n%s", err, controller.Controller.LogTail(20))
		}
	}()
	if err := controller.StartController(ctx); err != nil {
		return nil, err
	}
	for i, file := range []string{"v1.onnx", "v2.onnx"} {
		if _, err := controller.CLI(ctx, "push", filepath.Join(root, "models/examples/digits", file), fmt.Sprint(model, ":", i+1)); err != nil {
			return nil, err
		}
	}
	bareBroker, authority, err := startBare(self, dir)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, bareBroker.stop()) }()

	b := &bench{figures: figures{size: s}, controller: controller, progress: progress, desired: map[string]state.Desired{}}
	cfg, err := fleetConfig(ctx, controller, s.devices, dir, progress)
	if err != nil {
		return nil, err
	}
	cfg.Dial, cfg.OnDesired, cfg.OnServing = b.dial, b.onDesired, b.onServing
	cfg.Roots = append(cfg.Roots, authority)
	if b.fleet, err = simfleet.New(cfg); err != nil {
		return nil, err
	}
	return &b.figures, b.run(ctx, bareBroker)
}

// classes are those of the devices.
var classes = []string{"raspberry-pi-5", "jetson-orin-nano-8gb"}

// fleetConfig has a fleet of the classes join a controller.
func fleetConfig(ctx context.Context, controller *e2e.Fleet, devices int, dir string, progress io.Writer) (cfg simfleet.Config, err error) {
	made, err := dunlinv1connect.NewEnrollmentServiceClient(byhand.User(controller.Token, nil), controller.URL).
		CreateJoinToken(ctx, connect.NewRequest(&dunlinv1.CreateJoinTokenRequest{Uses: uint32(devices)}))
	if err != nil {
		return cfg, err
	}
	set, err := profiles.Load()
	if err != nil {
		return cfg, err
	}
	cfg = simfleet.Config{
		Controller: controller.DeviceURL(), JoinToken: made.Msg.GetJoinToken(), Devices: devices, Seed: 1, Dir: dir,
		Log: slog.New(slog.NewTextHandler(progress, &slog.HandlerOptions{Level: slog.LevelWarn})),
	}
	for _, class := range classes {
		p, err := set.Named(class)
		if err != nil {
			return cfg, err
		}
		cfg.Classes = append(cfg.Classes, simfleet.Share{Profile: p, Weight: 1})
	}
	return cfg, nil
}

// dial counts what devices send and receive.
func (b *bench) dial(ctx context.Context, network, address string) (net.Conn, error) {
	if to := b.toBare.Load(); to != nil && address == b.controller.MQTT {
		address = *to
	}
	c, err := new(net.Dialer).DialContext(ctx, network, address)
	if err != nil {
		return nil, err
	}
	return b.traffic.count(c), nil
}

func (b *bench) onDesired(d *simfleet.Device, desired state.Desired) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.desired[d.Name] = desired
	if _, ok := b.have[d.Name]; !ok && b.have != nil {
		b.have[d.Name] = time.Since(b.began)
	}
}

func (b *bench) onServing(d *simfleet.Device, versions map[string]int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if _, ok := b.serve[d.Name]; !ok && b.serve != nil && versions[model] == b.want {
		b.serve[d.Name] = time.Since(b.began)
	}
}

// begin starts the clock for documents that want a version.
func (b *bench) begin(want int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.want, b.have, b.serve = want, map[string]time.Duration{}, map[string]time.Duration{}
	b.began = time.Now()
}

// count says how many devices have a new document, and how many serve it.
func (b *bench) count() (have, serve int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return len(b.have), len(b.serve)
}

// percentiles gives the spread of what the devices took.
func percentiles(took map[string]time.Duration) spread {
	var all []time.Duration
	for _, d := range took {
		all = append(all, d)
	}
	if len(all) == 0 {
		return spread{}
	}
	slices.Sort(all)
	at := func(part float64) time.Duration { return all[min(int(part*float64(len(all))), len(all)-1)] }
	return spread{at(0.5), at(0.99), all[len(all)-1]}
}

// until waits for something, and gives how long it took.
func (b *bench) until(ctx context.Context, what string, pause time.Duration, done func() (bool, string)) (time.Duration, error) {
	began := time.Now()
	fmt.Fprintln(b.progress, what)
	said := began
	for {
		ok, how := done()
		took := time.Since(began)
		if ok {
			return took, nil
		}
		if took > patience {
			return took, fmt.Errorf("%s: not after %v: %s", what, patience, how)
		}
		if time.Since(said) > 5*time.Second {
			said = time.Now()
			fmt.Fprintln(b.progress, " ", how)
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return took, ctx.Err()
		}
	}
}

func (b *bench) connected() (bool, string) {
	n := b.fleet.Connected()
	return n == b.devices, fmt.Sprintf("%d are connected", n)
}

// look is the pause between two looks at all devices.
func (b *bench) look() time.Duration {
	return max(5*time.Millisecond, time.Duration(b.devices)*10*time.Microsecond)
}

// start runs the devices; stop ends them.
func (b *bench) start(ctx context.Context) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = b.fleet.Run(ctx) // nil
	}()
	return func() {
		cancel()
		<-done
	}
}

func (b *bench) run(ctx context.Context, bareBroker *bare) (err error) {
	stop := b.start(ctx)
	defer func() { stop() }()
	if b.join, err = b.until(ctx, "joining", b.look(), b.connected); err != nil {
		return err
	}
	stop()
	stop = b.start(ctx)
	if b.connect, err = b.until(ctx, "connecting", b.look(), b.connected); err != nil {
		return err
	}
	if _, err := b.change(ctx, 1); err != nil {
		return err
	}
	before := b.clone()
	cpu, err := b.controller.Controller.CPUTime()
	if err != nil {
		return err
	}
	if b.known, err = b.change(ctx, 2); err != nil {
		return err
	}
	b.mu.Lock()
	b.fanout, b.serving = percentiles(b.have), percentiles(b.serve)
	b.mu.Unlock()
	if err := pause(ctx, b.quiet); err != nil {
		return err
	}
	after, err := b.controller.Controller.CPUTime()
	if err != nil {
		return err
	}
	b.cpu = after - cpu
	if b.idle > 0 {
		fmt.Fprintln(b.progress, "counting the traffic of idle devices, from", b.settle, "on")
		if err := pause(ctx, b.settle); err != nil {
			return err
		}
		before := b.traffic.read()
		if err := pause(ctx, b.idle); err != nil {
			return err
		}
		sum, _, _ := b.traffic.since(before)
		b.idleBytes = float64(sum.bytes()) / float64(b.devices) / b.idle.Hours()
	}
	if b.memory, err = b.controller.Controller.PeakMemory(); err != nil {
		return err
	}
	if err := b.restart(ctx); err != nil {
		return err
	}
	return b.compare(ctx, bareBroker, before)
}

func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// change deploys a version to all devices, and gives how long it took until
// the controller knew that so many have it.
func (b *bench) change(ctx context.Context, version int64) (known spread, err error) {
	b.begin(version)
	if err := b.deploy(ctx, model, version); err != nil {
		return known, err
	}
	client := dunlinv1connect.NewRolloutServiceClient(byhand.User(b.controller.Token, nil), b.controller.URL)
	_, err = b.until(ctx, fmt.Sprint("deploying version ", version), 100*time.Millisecond, func() (bool, string) {
		have, serve := b.count()
		how := fmt.Sprintf("%d have the document, %d serve", have, serve)
		if serve < b.devices/2 { // asking for the rollout costs the controller something, too
			return false, how
		}
		// What the controller knows is what it knew when it answered.
		r, err := client.GetRollout(ctx, connect.NewRequest(&dunlinv1.GetRolloutRequest{Deployment: model}))
		at := time.Since(b.began)
		if err != nil {
			return false, err.Error()
		}
		ready := 0
		for _, d := range r.Msg.GetRollout().GetDevices() {
			if d.Phase == dunlinv1.RolloutDevice_PHASE_READY {
				ready++
			}
		}
		if r.Msg.GetRollout().GetToVersion() != version {
			ready = 0
		}
		if known.p50 == 0 && ready*2 >= b.devices {
			known.p50 = at
		}
		if known.p99 == 0 && ready*100 >= b.devices*99 {
			known.p99 = at
		}
		known.all = at
		return ready == b.devices, how + fmt.Sprintf(", the controller knows %d; %s", ready, r.Msg.GetRollout().GetReason())
	})
	return known, err
}

// deploy has all devices serve a version of a model.
func (b *bench) deploy(ctx context.Context, model string, version int64) error {
	file := filepath.Join(b.controller.Dir, "deployment.yaml")
	text := fmt.Sprintf("apiVersion: dunlin/v1\nkind: Deployment\nmetadata: {name: %[1]s}\nspec: {model: %[1]s, version: %[2]d, selector: {}}\n", model, version)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		return err
	}
	_, err := b.controller.CLI(ctx, "apply", "-f", file)
	return err
}

// clone gives the desired documents that the devices have.
func (b *bench) clone() map[string]state.Desired {
	b.mu.Lock()
	defer b.mu.Unlock()
	all := make(map[string]state.Desired, len(b.desired))
	maps.Copy(all, b.desired)
	return all
}

// restart starts the controller, and with it its broker, again.
func (b *bench) restart(ctx context.Context) error {
	if err := b.controller.Controller.Stop(); err != nil {
		return err
	}
	lost := func() (bool, string) { return b.fleet.Connected() < b.devices, "no device has noticed" }
	if _, err := b.until(ctx, "the controller has stopped", time.Millisecond, lost); err != nil {
		return err
	}
	began := time.Now()
	if err := b.controller.StartController(ctx); err != nil {
		return err
	}
	_, err := b.until(ctx, "connecting again", b.look(), b.connected)
	b.reconnect = time.Since(began)
	return err
}

// compare has a bare broker send the devices the documents that they had
// before, and measures how long that takes.
func (b *bench) compare(ctx context.Context, bareBroker *bare, before map[string]state.Desired) error {
	b.toBare.Store(&bareBroker.address)
	for _, d := range b.fleet.Devices() {
		d.Net().Reset()
	}
	if err := pause(ctx, time.Second); err != nil {
		return err
	}
	if _, err := b.until(ctx, "connecting to a bare broker", b.look(), b.connected); err != nil {
		return err
	}
	if err := pause(ctx, 5*time.Second); err != nil { // until hellos and reports are over
		return err
	}
	name := b.fleet.Devices()[0].Name
	old, now := before[name], b.clone()[name]
	if len(old.Document) == 0 {
		return fmt.Errorf("%s has had no document", name)
	}
	payload, err := proto.Marshal(&dunlinv1.Desired{
		Generation: &dunlinv1.Generation{Incarnation: now.Incarnation, Number: now.Number + 1000000}, Sha256: old.SHA256, SizeBytes: uint64(len(old.Document)), Document: old.Document,
	})
	if err != nil {
		return err
	}
	b.begin(1)
	if err := bareBroker.publish(strings.TrimSuffix(name, "-0"), b.devices, payload); err != nil {
		return err
	}
	_, err = b.until(ctx, "the bare broker sends", 20*time.Millisecond, func() (bool, string) {
		have, serve := b.count()
		return serve == b.devices, fmt.Sprintf("%d have the document, %d serve", have, serve)
	})
	b.mu.Lock()
	defer b.mu.Unlock()
	b.bare = percentiles(b.have)
	return err
}
