package e2e

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/dunlin/dunlin/agent/simfleet"
	profiles "github.com/dunlin/dunlin/firmware-profiles"
	"github.com/dunlin/dunlin/internal/netem"
	"github.com/dunlin/dunlin/models/examples/digits"
)

// number gives what a variable of the environment says, or what is usual.
func number(t *testing.T, name string, usual uint64) uint64 {
	t.Helper()
	text := os.Getenv(name)
	if text == "" {
		return usual
	}
	n, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return n
}

// client is somebody who asks a real agent without a pause. An agent is killed
// while no request is under way: those that fail are its own.
type client struct {
	*hardship
	up     sync.RWMutex // held to ask, and by who kills the agent until it serves again
	pushed *atomic.Int64
	answer atomic.Int64
}

func (c *client) ask(ctx context.Context, t *testing.T, images [][64]float32) {
	for ctx.Err() == nil {
		c.up.RLock()
		a, err := Classify(context.WithoutCancel(ctx), c.agent.URL, "digits-route", images)
		c.up.RUnlock()
		if err != nil {
			t.Errorf("%s is up and fails a request: %v", c.agent.Name, err)
			return
		}
		if n, err := strconv.ParseInt(a.Version, 10, 64); err != nil || n < 1 || n > c.pushed.Load() {
			t.Errorf("%s answers by version %s", c.agent.Name, a.Version)
		}
		c.answer.Add(1)
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
		}
	}
}

// ordeal is a whole system, and the faults that befall it.
type ordeal struct {
	*Fleet
	random   *rand.Rand
	clients  []*client
	fleet    *simfleet.Fleet
	images   [][64]float32
	opened   *openings
	pushed   atomic.Int64 // versions
	files    []digest.Digest
	wanted   int      // version
	ends     []func() // of what lasts
	befallen map[string]int
}

// push pushes another version: a model of the digits, with a text that makes all
// of it bytes that no device has.
func (o *ordeal) push(t *testing.T) (version int) {
	t.Helper()
	version = int(o.pushed.Load()) + 1
	raw, err := os.ReadFile(digitsFile([]string{"v2", "v1"}[version%2]))
	if err != nil {
		t.Fatal(err)
	}
	text := make([]byte, 20<<10+o.random.IntN(300<<10))
	for i := range text {
		text[i] = 'a' + byte(o.random.IntN(26))
	}
	raw = append(binary.AppendUvarint(append(raw, 6<<3|2), uint64(len(text))), text...) // ModelProto.doc_string
	file := write(t, "digits.onnx", raw)
	o.opened.add(t, version, file)
	o.files = append(o.files, digest.FromBytes(raw))
	cli(t, o.Fleet, "push", file, fmt.Sprint("digits:", version))
	o.pushed.Store(int64(version))
	return version
}

func (o *ordeal) want(t *testing.T, version int) {
	t.Helper()
	o.wanted = version
	apply(t, o.Fleet, "digits", version)
}

// Controller and real agents are killed at any time, all devices meet what
// devices meet, and documents come and go: all come to run what is wanted, no
// request fails on an agent that is up, no event is lost, and real agents open
// nothing but the bytes that were pushed. Only clocks do not jump on real agents,
// which have the machine's.
//
// make test-faults runs it with many faults.
func TestFaults(t *testing.T) {
	seed := number(t, "DUNLIN_SEED", rand.Uint64())
	faults, devices, agents := number(t, "FAULTS", 12), number(t, "FAULTS_DEVICES", 20), number(t, "FAULTS_AGENTS", 1)
	t.Logf("DUNLIN_SEED=%d", seed)
	images, _ := digits.HeldOut()
	o := &ordeal{Fleet: newFleet(t), random: rand.New(rand.NewPCG(seed, 0)), images: images[:1], opened: newOpenings(t), befallen: map[string]int{}}
	o.push(t)
	o.push(t)
	o.want(t, 1)
	for i := range agents {
		c := &client{hardship: startHardAgent(t, o.Fleet, fmt.Sprint("real-", i), o.random), pushed: &o.pushed}
		awaitAnswer(t, c.agent, o.images)
		o.clients = append(o.clients, c)
	}
	o.fleet = startSimulatedFleet(t, o.Fleet, int(devices), seed)

	ctx, cancel := context.WithCancel(t.Context())
	var asking sync.WaitGroup
	defer asking.Wait()
	defer cancel()
	for _, c := range o.clients {
		asking.Go(func() { c.ask(ctx, t, o.images) })
	}
	for n := range faults {
		what := o.befall(t)
		time.Sleep(time.Duration(o.random.IntN(400)) * time.Millisecond)
		for _, c := range o.clients {
			o.opened.look(t, c.agent)
		}
		if t.Failed() {
			t.Fatalf("after fault %d: %s", n+1, what)
		}
	}
	for _, end := range o.ends {
		end()
	}
	for _, c := range o.clients {
		c.end(t)
	}
	o.want(t, o.push(t))
	patience := time.Now().Add(2*time.Minute + time.Duration(faults)*time.Second/4)
	for {
		left := o.undone()
		if left == "" {
			break
		}
		if time.Now().After(patience) {
			t.Fatalf("not all run what is wanted: %s", left)
		}
		time.Sleep(100 * time.Millisecond)
	}
	cancel()
	asking.Wait()
	for _, c := range o.clients {
		o.opened.look(t, c.agent)
		if c.answer.Load() == 0 {
			t.Errorf("%s has answered nothing", c.agent.Name)
		}
		t.Logf("%s: %d answers; %d answers of the registry were altered", c.agent.Name, c.answer.Load(), c.blobs.altered())
		o.account(t, c.agent.Name)
	}
	o.account(t, "")
	t.Logf("%d versions, %d models opened; faults: %v", o.pushed.Load(), len(o.opened.seen), o.befallen)
}

// account fails the test where events of a device, or of all, are missing. The
// last event of a real agent is awaited: it says that the last version serves.
func (o *ordeal) account(t *testing.T, device string) {
	t.Helper()
	args := []string{"get", "events", "--limit", "10000", "-o", "json"}
	if device != "" {
		args = append(args, device)
	}
	last := fmt.Sprint(o.wanted)
	var got struct {
		Events []struct {
			Device, OutboxID string
			Event            struct{ Sequence, Kind, Version, Message string }
		}
	}
	eventually(t, func() string {
		decode(t, cli(t, o.Fleet, args...), &got)
		for _, e := range got.Events {
			if device == "" || e.Event.Kind == "version.serving" && e.Event.Version == last {
				return ""
			}
		}
		return fmt.Sprintf("%s: there is no event of version %s", device, last)
	})
	before := map[string]uint64{} // sequence number, by outbox; they come newest first
	for _, e := range got.Events {
		n, err := strconv.ParseUint(e.Event.Sequence, 10, 64)
		if err != nil {
			t.Fatalf("event %+v: %v", e, err)
		}
		if later, ok := before[e.OutboxID]; ok && n != later-1 {
			t.Errorf("%s: event %d comes before event %d", e.Device, n, later)
		}
		before[e.OutboxID] = n
		switch e.Event.Kind {
		case "gap":
			t.Errorf("events of %s are lost: %s", e.Device, e.Event.Message)
		case "version.quarantined", "bundle.refused":
			t.Errorf("%s: %s of a good version %s: %s", e.Device, e.Event.Kind, e.Event.Version, e.Event.Message)
		}
	}
	for outbox, n := range before {
		if device != "" && n != 1 {
			t.Errorf("%s: the first event of outbox %s is %d", device, outbox, n)
		}
	}
}

// awaitAnswer waits until an agent answers.
func awaitAnswer(t *testing.T, a *Agent, images [][64]float32) {
	t.Helper()
	if err := a.Wait(within(t), func(ctx context.Context) error {
		_, err := Classify(ctx, a.URL, "digits-route", images)
		return err
	}); err != nil {
		t.Fatal(err)
	}
}

// startSimulatedFleet runs simulated devices in this process, over emulated
// links, as change has them.
func startSimulatedFleet(t *testing.T, f *Fleet, devices int, seed uint64, change ...func(*simfleet.Config)) *simfleet.Fleet {
	t.Helper()
	var made struct {
		JoinToken string `json:"joinToken"`
	}
	if err := json.Unmarshal([]byte(cli(t, f, "join-token", "create", "--uses", fmt.Sprint(devices), "-o", "json")), &made); err != nil {
		t.Fatal(err)
	}
	set, err := profiles.Load()
	if err != nil {
		t.Fatal(err)
	}
	class, err := set.Named("raspberry-pi-5")
	if err != nil {
		t.Fatal(err)
	}
	cfg := simfleet.Config{
		Controller: f.DeviceURL(), JoinToken: strings.TrimSpace(made.JoinToken), Devices: devices, Classes: []simfleet.Share{{Profile: class, Weight: 1}}, Seed: seed,
		Dir: filepath.Join(f.Dir, "simulated"), Net: netem.Conditions{RTT: 5 * time.Millisecond}, Log: slog.New(slog.DiscardHandler),
	}
	for _, c := range change {
		c(&cfg)
	}
	fleet, err := simfleet.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	done := make(chan error, 1)
	go func() { done <- fleet.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return fleet
}

// befall has one fault happen, by chance, and says which.
func (o *ordeal) befall(t *testing.T) string {
	t.Helper()
	random := o.random
	device := func() *simfleet.Device { return o.fleet.Devices()[random.IntN(len(o.fleet.Devices()))] }
	lasting := func(fault simfleet.Fault) {
		d := device()
		d.Meet(fault, false)
		o.ends = append(o.ends, func() { d.Meet(fault, true) })
	}
	c := o.clients[random.IntN(len(o.clients))]
	all := []struct {
		name string
		do   func()
	}{
		{"kill the controller", func() {
			o.Controller.Kill()
			if err := o.StartController(within(t)); err != nil {
				t.Fatal(err)
			}
		}},
		{"kill an agent", func() { o.kill(t, c, false) }},
		{"kill an agent, its disk rots", func() { o.kill(t, c, true) }},
		{"want another version", func() { o.want(t, 1+random.IntN(int(o.pushed.Load()))) }},
		{"want a new version", func() { o.want(t, o.push(t)) }},
		{"cut an agent off for a moment", func() { c.link.Reset() }},
		{"cut an agent off", func() {
			c.link.Set(netem.Conditions{Down: true})
			c.link.Reset()
		}},
		{"an agent's link is bad", func() { c.link.Set(netem.Conditions{RTT: 100 * time.Millisecond, Loss: 0.3 * random.Float64()}) }},
		{"an agent's link corrupts", func() { c.link.Set(netem.Conditions{RTT: usualLink.RTT, Corrupt: 0.05}) }},
		{"an agent's registry gives other bytes", func() { c.blobs.alter(rand.New(rand.NewPCG(random.Uint64(), 0)), 0.5) }},
		{"an agent's disk is full", func() { c.fill(t, random.Int64N(2<<20)) }},
		{"an agent's disk rots", func() { c.rot(t, random, o.files[o.wanted-1]) }},
		{"an agent has peace", func() { c.end(t) }},
		{"crash", func() {
			device().Meet(simfleet.Fault{Crash: true, Off: time.Duration(random.IntN(2000)) * time.Millisecond}, false)
		}},
		{"cut all", func() {
			for _, d := range o.fleet.Devices() {
				d.Meet(simfleet.Fault{Cut: true}, false)
			}
		}},
		{"down", func() { lasting(simfleet.Fault{Down: true}) }},
		{"bad link", func() {
			lasting(simfleet.Fault{Loss: new(0.3 * random.Float64()), RTT: new(100 * time.Millisecond)})
		}},
		{"corruption", func() { lasting(simfleet.Fault{Corrupt: new(0.05)}) }},
		{"full disk", func() { lasting(simfleet.Fault{DiskFull: true}) }},
		{"clock", func() {
			lasting(simfleet.Fault{Skew: new(time.Duration(random.Int64N(int64(48*time.Hour))) - 24*time.Hour)})
		}},
	}
	fault := all[random.IntN(len(all))]
	fault.do()
	o.befallen[fault.name]++
	return fault.name
}

// kill kills an agent and starts it again. Where a byte on its disk is another
// then, it may need the network before it serves.
func (o *ordeal) kill(t *testing.T, c *client, rots bool) {
	t.Helper()
	c.up.Lock()
	defer c.up.Unlock()
	c.agent.Kill()
	if rots {
		c.rot(t, o.random, "")
		c.end(t)
	}
	if err := o.RestartAgent(within(t), c.agent); err != nil {
		t.Fatal(err)
	}
	awaitAnswer(t, c.agent, o.images)
}

// undone says who does not run the wanted version yet, or has events that the
// controller does not have; "" for nobody.
func (o *ordeal) undone() string {
	for _, c := range o.clients {
		if a, err := Classify(context.Background(), c.agent.URL, "digits-route", o.images); err != nil || a.Version != fmt.Sprint(o.wanted) {
			return fmt.Sprintf("%s answers by version %q, %v", c.agent.Name, a.Version, err)
		}
	}
	want := fmt.Sprint("digits:", o.wanted)
	for _, d := range o.fleet.Devices() {
		if err := d.Converged(); err != nil {
			return fmt.Sprintf("%s: %v", d.Name, err)
		}
		var served strings.Builder
		for _, v := range d.Report().GetVersions() {
			if v.Serving {
				served.WriteString(fmt.Sprintf("%s:%d", v.Model, v.Version))
			}
		}
		if served.String() != want {
			return fmt.Sprintf("%s serves %s", d.Name, served.String())
		}
		if n, err := d.Waiting(); err != nil || n > 0 {
			return fmt.Sprintf("%s has %d events that are not acknowledged, %v", d.Name, n, err)
		}
	}
	return ""
}
