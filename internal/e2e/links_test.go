package e2e

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	"github.com/dunlin/dunlin/agent/simfleet"
	"github.com/dunlin/dunlin/internal/e2e/byhand"
	"github.com/dunlin/dunlin/internal/netem"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
	"github.com/dunlin/dunlin/proto/dunlin/v1/dunlinv1connect"
)

// links are those of devices to a controller that is a process: simulated
// devices, each over a link of its own in this process, and an agent that is a
// process, whose connections go by a gateway at pathHost.
type links struct {
	*Fleet
	fleet   *simfleet.Fleet
	agent   *netem.Link // nil: there is none
	devices int         // with the agent
}

// newLinks starts a controller, simulated devices and an agent, which know it
// and have good links.
func newLinks(t *testing.T, devices int, agent bool, seed uint64) *links {
	t.Helper()
	f, err := NewFleet(programs, t.TempDir(), library)
	if err != nil {
		t.Fatal(err)
	}
	f.ControllerArgs = []string{"--hosts", pathHost + ",127.0.0.1"}
	good := netem.Conditions{RTT: time.Millisecond}
	l := &links{Fleet: f, devices: devices}
	if agent {
		l.agent, l.devices = netem.NewLink(good, seed), devices+1
		l.gateway(t) // stops after the agent
	}
	t.Cleanup(func() { stop(t, f) })
	if err := f.StartController(within(t)); err != nil {
		t.Fatalf("%v\n%s", err, f.Controller.LogTail(50))
	}
	l.fleet = startSimulatedFleet(t, f, devices, seed, func(cfg *simfleet.Config) { cfg.Net, cfg.Download, cfg.Dial = good, true, direct })
	if agent {
		startAgent(t, f, "real-0", "--profile", "off", "--controller", strings.Replace(f.DeviceURL(), "127.0.0.1", pathHost, 1))
	}
	return l
}

// direct connects to the controller, whose devices are told that it is at
// pathHost.
func direct(ctx context.Context, network, address string) (net.Conn, error) {
	return new(net.Dialer).DialContext(ctx, network, strings.Replace(address, pathHost, "127.0.0.1", 1))
}

// gateway passes on what comes to pathHost over the agent's link to the
// controller.
func (l *links) gateway(t *testing.T) {
	t.Helper()
	var serving sync.WaitGroup
	var listeners []net.Listener
	t.Cleanup(func() {
		l.agent.Set(netem.Conditions{})
		for _, listener := range listeners {
			listener.Close()
		}
		serving.Wait()
	})
	for _, address := range []string{l.MQTT, strings.TrimPrefix(l.URL, "http://")} {
		listener, err := net.Listen("tcp", strings.Replace(address, "127.0.0.1", pathHost, 1))
		if err != nil {
			t.Fatal(err)
		}
		listeners = append(listeners, listener)
		serving.Go(func() {
			_ = l.agent.Serve(listener, func(ctx context.Context) (net.Conn, error) { return direct(ctx, "tcp", address) }) // until it is closed
		})
	}
}

// all sets the conditions of all links, and resets their connections.
func (l *links) all(c netem.Conditions) {
	each := []*netem.Link{}
	for _, d := range l.fleet.Devices() {
		each = append(each, d.Net())
	}
	if l.agent != nil {
		each = append(each, l.agent)
	}
	for _, link := range each {
		link.Set(c)
		link.Reset()
	}
}

// await waits until the controller knows all devices to observe the newest
// documents and to be as ok says, and gives how long that took since began, for
// the first, for half, and for all.
func (l *links) await(t *testing.T, what string, limit time.Duration, began time.Time, ok func(*dunlinv1.Reported) bool) {
	t.Helper()
	client := dunlinv1connect.NewDeviceServiceClient(byhand.User(l.Token, nil), l.URL)
	took := map[string]time.Duration{}
	for {
		r, err := client.ListDevices(t.Context(), connect.NewRequest(&dunlinv1.ListDevicesRequest{}))
		if err != nil {
			t.Fatal(err)
		}
		since := time.Since(began)
		var left []string
		for _, d := range r.Msg.GetDevices() {
			switch {
			case !d.GetConnected() || !proto.Equal(d.GetDesired(), d.GetReported().GetObserved()) || !ok(d.GetReported()):
				left = append(left, d.GetName())
			case took[d.GetName()] == 0:
				took[d.GetName()] = since
			}
		}
		if len(r.Msg.GetDevices()) == l.devices && len(left) == 0 {
			break
		}
		if since > limit {
			t.Fatalf("%s: not within %v for %s", what, limit, strings.Join(left, ", "))
		}
		time.Sleep(50 * time.Millisecond)
	}
	var sorted []time.Duration
	for _, d := range took {
		sorted = append(sorted, d)
	}
	slices.Sort(sorted)
	line := fmt.Sprintf("%s: first after %.1f s, half after %.1f s, all after %.1f s of %v allowed", what, sorted[0].Seconds(), sorted[len(sorted)/2].Seconds(), sorted[len(sorted)-1].Seconds(), limit)
	if l.agent != nil {
		line += fmt.Sprintf("; the agent that is a process after %.1f s", took["real-0"].Seconds())
	}
	t.Log(line)
}

// serving says whether a device serves a version of a model.
func serving(model string, version int64) func(*dunlinv1.Reported) bool {
	return func(r *dunlinv1.Reported) bool {
		return slices.ContainsFunc(r.GetVersions(), func(v *dunlinv1.VersionStatus) bool {
			return v.GetModel() == model && v.GetVersion() == version && v.GetServing()
		})
	}
}

// Devices reach a controller that is a process over links with a round trip of
// 100 ms, 100 kbit/s, and packets of which a part is lost: a change is there,
// and known to be, within a minute at 10 %, and three at 30, from the moment on
// at which all connections are gone; a model of 300 KB serves within three
// minutes at 10 %. It takes the time that it takes, by no simulated clock.
//
// make test-links runs it with LINKS=full; otherwise one device hears of a
// change.
func TestBadLinks(t *testing.T) {
	seed := number(t, "DUNLIN_SEED", rand.Uint64())
	full := os.Getenv("LINKS") == "full"
	tests := []struct {
		loss           float64
		control, model time.Duration
	}{
		{0.1, time.Minute, 3 * time.Minute},
		{0.3, 3 * time.Minute, 0},
	}
	devices := 10
	if !full {
		tests, devices = tests[:1], 1
		tests[0].model = 0
	}
	for _, tt := range tests {
		t.Run(fmt.Sprintf("%v %%", 100*tt.loss), func(t *testing.T) {
			t.Logf("DUNLIN_SEED=%d", seed)
			l := newLinks(t, devices, full, seed)
			cli(t, l.Fleet, "push", digitsFile("v1"), "digits:1")
			apply(t, l.Fleet, "digits", 1)
			l.await(t, "a small model, over good links", limit, time.Now(), serving("digits", 1))

			bad := netem.Conditions{RTT: 100 * time.Millisecond, Loss: tt.loss, BitsPerSecond: 100e3}
			began := time.Now()
			l.all(bad)
			path := filepath.Join(l.Dir, "route.yaml")
			if err := os.WriteFile(path, []byte("apiVersion: dunlin/v1\nkind: Route\nmetadata: {name: other}\nspec: {targets: [{model: digits, weight: 1}]}\n"), 0o600); err != nil {
				t.Fatal(err)
			}
			cli(t, l.Fleet, "apply", "-f", path)
			l.await(t, "connects, and has a new route", tt.control, began, func(r *dunlinv1.Reported) bool {
				return slices.ContainsFunc(r.GetRoutes(), func(s *dunlinv1.RouteStatus) bool { return s.GetName() == "other" && s.GetReady() })
			})
			if tt.model == 0 {
				return
			}
			cli(t, l.Fleet, "push", bigModel(t, seed, 300e3), "big:1")
			began = time.Now()
			apply(t, l.Fleet, "big", 1)
			l.await(t, "serves a model of 300 KB", tt.model, began, serving("big", 1))
		})
	}
}
