package e2e

import (
	"context"
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
	agent  *Agent
	up     sync.RWMutex // held to ask, and by who kills the agent until it serves again
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
		if a.Version != "1" && a.Version != "2" {
			t.Errorf("%s answers by version %s", c.agent.Name, a.Version)
		}
		c.answer.Add(1)
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
		}
	}
}

// Controller and real agents are killed at any time, simulated devices meet
// what devices meet, and documents come and go: all come to run what is wanted,
// no request fails on an agent that is up, no event is lost.
//
// make test-faults runs it with many faults.
func TestFaults(t *testing.T) {
	seed := number(t, "DUNLIN_SEED", rand.Uint64())
	faults, devices, agents := number(t, "FAULTS", 12), number(t, "FAULTS_DEVICES", 20), number(t, "FAULTS_AGENTS", 1)
	t.Logf("DUNLIN_SEED=%d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	f := newFleet(t)
	for i, file := range []string{"v1", "v2"} {
		cli(t, f, "push", digitsFile(file), fmt.Sprint("digits:", i+1))
	}
	apply(t, f, "digits", 1)
	images, _ := digits.HeldOut()
	var clients []*client
	for i := range agents {
		c := &client{agent: startAgent(t, f, fmt.Sprint("real-", i), "--profile", "off")}
		awaitAnswer(t, c.agent, images[:1])
		clients = append(clients, c)
	}
	fleet := startSimulatedFleet(t, f, int(devices), seed)

	ctx, cancel := context.WithCancel(t.Context())
	var asking sync.WaitGroup
	defer asking.Wait()
	defer cancel()
	for _, c := range clients {
		asking.Go(func() { c.ask(ctx, t, images[:1]) })
	}
	var ends []func()
	version := 1
	for n := range faults {
		befall(t, f, clients, fleet, random, &version, &ends, images[:1])
		time.Sleep(time.Duration(random.IntN(400)) * time.Millisecond)
		if t.Failed() {
			t.Fatalf("after fault %d", n+1)
		}
	}
	for _, end := range ends {
		end()
	}
	apply(t, f, "digits", 2)
	patience := time.Now().Add(2*time.Minute + time.Duration(faults)*time.Second/4)
	for {
		left := undone(fleet, clients, images[:1])
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
	for _, c := range clients {
		if c.answer.Load() == 0 {
			t.Errorf("%s has answered nothing", c.agent.Name)
		}
	}
	var got struct {
		Events []struct{ Kind, Device, Message string }
	}
	decode(t, cli(t, f, "get", "events", "--limit", "1000", "-o", "json"), &got)
	if len(got.Events) == 0 {
		t.Error("there are no events")
	}
	for _, e := range got.Events {
		if e.Kind == "gap" {
			t.Errorf("events of %s are lost: %s", e.Device, e.Message)
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

// befall has one fault happen, by chance; what has to be undone goes to ends.
func befall(t *testing.T, f *Fleet, clients []*client, fleet *simfleet.Fleet, random *rand.Rand, version *int, ends *[]func(), images [][64]float32) {
	t.Helper()
	device := func() *simfleet.Device { return fleet.Devices()[random.IntN(len(fleet.Devices()))] }
	lasting := func(fault simfleet.Fault) {
		d := device()
		d.Meet(fault, false)
		*ends = append(*ends, func() { d.Meet(fault, true) })
	}
	switch what := random.IntN(12); what {
	case 0: // kill -9 of the controller
		f.Controller.Kill()
		if err := f.StartController(within(t)); err != nil {
			t.Fatal(err)
		}
	case 1, 2: // and of an agent
		c := clients[random.IntN(len(clients))]
		c.up.Lock()
		c.agent.Kill()
		err := f.RestartAgent(within(t), c.agent)
		if err != nil {
			t.Fatal(err)
		}
		awaitAnswer(t, c.agent, images)
		c.up.Unlock()
	case 3, 4:
		*version = 3 - *version
		apply(t, f, "digits", *version)
	case 5:
		device().Meet(simfleet.Fault{Crash: true, Off: time.Duration(random.IntN(2000)) * time.Millisecond}, false)
	case 6:
		for _, d := range fleet.Devices() {
			d.Meet(simfleet.Fault{Cut: true}, false)
		}
	case 7:
		lasting(simfleet.Fault{Down: true})
	case 8:
		lasting(simfleet.Fault{Loss: new(0.3 * random.Float64()), RTT: new(100 * time.Millisecond)})
	case 9:
		lasting(simfleet.Fault{Corrupt: new(0.05)})
	case 10:
		lasting(simfleet.Fault{DiskFull: true})
	case 11:
		lasting(simfleet.Fault{Skew: new(time.Duration(random.Int64N(int64(48*time.Hour))) - 24*time.Hour)})
	}
}

// undone says who does not run version 2 yet, or has events that the controller
// does not have; "" for nobody.
func undone(fleet *simfleet.Fleet, clients []*client, images [][64]float32) string {
	for _, c := range clients {
		if a, err := Classify(context.Background(), c.agent.URL, "digits-route", images); err != nil || a.Version != "2" {
			return fmt.Sprintf("%s answers by version %q, %v", c.agent.Name, a.Version, err)
		}
	}
	for _, d := range fleet.Devices() {
		if err := d.Converged(); err != nil {
			return fmt.Sprintf("%s: %v", d.Name, err)
		}
		var served strings.Builder
		for _, v := range d.Report().GetVersions() {
			if v.Serving {
				served.WriteString(fmt.Sprintf("%s:%d", v.Model, v.Version))
			}
		}
		if served.String() != "digits:2" {
			return fmt.Sprintf("%s serves %s", d.Name, served.String())
		}
		if n, err := d.Waiting(); err != nil || n > 0 {
			return fmt.Sprintf("%s has %d events that are not acknowledged, %v", d.Name, n, err)
		}
	}
	return ""
}
