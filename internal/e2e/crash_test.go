package e2e

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/dunlin/dunlin/controller"
	"github.com/dunlin/dunlin/models"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// crashEnv holds the number of the step at which a crashing controller dies.
const crashEnv = "DUNLIN_E2E_CRASH_AT_STEP"

// crashingController is dunlin-controller with one difference: it kills
// itself, as kill -9 does, at the beginning of a step.
func crashingController() int {
	at, err := strconv.ParseInt(os.Getenv(crashEnv), 10, 64)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 2
	}
	config, err := controller.LoadConfig(os.Args[1:], os.Getenv, os.Stderr)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 2
	}
	var steps atomic.Int64
	config.OnStep = func(step string) {
		if steps.Add(1) == at {
			fmt.Fprintf(os.Stderr, "killed at step %d: %s\n", at, step)
			_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {} // the signal arrives
		}
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	if err := controller.Run(ctx, config); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// controllerKills is how many steps from its start on a controller is killed at.
const controllerKills = 26

// TestControllerKilledBetweenSteps kills the controller at its first step, its
// second, and so on, while a deployment is changed. After each kill what was
// applied, if it was, must be reached without applying it again; the device
// answers throughout.
func TestControllerKilledBetweenSteps(t *testing.T) {
	onEachBroker(t, controllerKilledBetweenSteps)
}

func controllerKilledBetweenSteps(t *testing.T, f *Fleet) {
	a := startAgent(t, f, "device-1")
	cli(t, f, "push", digitsFile("v1"), "digits:1")
	cli(t, f, "push", digitsFile("v2"), "digits:2")
	apply(t, f, "digits", 1)
	cli(t, f, "rollout", "status", "digits", "--wait")
	load := startLoad(t, a.URL, "digits-route")

	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	version, killed := 1, 0
	for n := 1; n <= controllerKills; n++ {
		want := 3 - version
		f.Controller.Kill()
		err := f.startController(within(t), self, []string{crashEnv + "=" + strconv.Itoa(n)})
		if err == nil {
			_, err = f.CLI(within(t), "apply", "-f", document(t, f, "digits", want))
		}
		dead := false
		eventually(t, func() string {
			select {
			case <-f.Controller.Done():
				dead = true
				return ""
			default: // it may come further than this change needs
			}
			if err != nil {
				return "the controller lives, but: " + err.Error()
			}
			return serves(t, a, want)
		})
		if dead {
			killed++
		}
		f.Controller.Kill()
		if err := f.StartController(within(t)); err != nil {
			t.Fatal(err)
		}
		got := deployed(t, f)
		if got != want && got != version {
			t.Fatalf("kill %d: version %d is deployed, was %d, applied %d", n, got, version, want)
		}
		cli(t, f, "rollout", "status", "digits", "--wait")
		eventually(t, func() string { return serves(t, a, got) })
		version = got
	}
	load.stop()
	t.Logf("%d of %d controllers died at their step; %d requests succeeded meanwhile", killed, controllerKills, load.count())
	if killed < controllerKills/2 {
		t.Errorf("only %d of %d controllers died at their step: the change has fewer steps than this test thinks", killed, controllerKills)
	}
}

func deployed(t *testing.T, f *Fleet) int {
	t.Helper()
	var all struct {
		Deployments []struct {
			Version string `json:"version"`
		} `json:"deployments"`
	}
	decode(t, cli(t, f, "get", "deployments", "-o", "json"), &all)
	if len(all.Deployments) != 1 {
		t.Fatalf("%d deployments, want 1", len(all.Deployments))
	}
	v, err := strconv.Atoi(all.Deployments[0].Version)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// agentKills is how often the agent is killed during one download.
const agentKills = 28

// TestAgentKilledDuringDownload kills the agent again and again while it
// downloads, and holds what it asks for afterwards against what it had.
func TestAgentKilledDuringDownload(t *testing.T) {
	onEachBroker(t, agentKilledDuringDownload)
}

func agentKilledDuringDownload(t *testing.T, f *Fleet) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	const size = 48 << 20
	path := bigModel(t, seed, size)
	bundle, err := models.Pack(t.Context(), path, models.PackOptions{})
	if err != nil {
		t.Fatal(err)
	}
	manifest, err := models.ParseManifest(bundle.ManifestBytes)
	if err != nil {
		t.Fatal(err)
	}
	index, err := models.ParseIndex(bundle.IndexBytes, manifest)
	if err != nil {
		t.Fatal(err)
	}
	file := index.Files[0]

	proxy := newBlobProxy(t, f)
	a := startAgent(t, f, "device-1", "--controller", proxy.url)
	cli(t, f, "push", path, "big:1")
	held, release := proxy.hold(512 << 10)
	defer func() { release() }()
	apply(t, f, "big", 1)

	part := filepath.Join(a.Data, "bundles", strings.TrimPrefix(string(bundle.Digest), "sha256:")+".part", "files", file.Path)
	var again int64
	for kill := range agentKills {
		select {
		case <-held:
		case <-time.After(limit):
			t.Fatalf("kill %d: the download has stopped", kill)
		}
		a.Kill()
		release()
		have := completeChunks(t, part, file)
		proxy.requested()
		held, release = proxy.hold(int64(size/agentKills) + random.Int64N(256<<10))
		if err := f.RestartAgent(within(t), a); err != nil {
			t.Fatal(err)
		}
		if kill == agentKills-1 {
			release() // the last one may finish
			cli(t, f, "rollout", "status", "big", "--wait")
		} else {
			select {
			case <-held:
			case <-time.After(limit):
				t.Fatalf("kill %d: the download does not go on", kill)
			}
		}
		again += overlap(t, proxy.requested(), file, have)
	}
	t.Logf("%d kills, %d bytes of the file, %d bytes of blobs served, %d asked for twice", agentKills, file.SizeBytes, proxy.passed(), again)
	// Gaps between missing chunks that are below 64 KiB may be asked for, so
	// that two ranges become one; chunks are hardly ever that small.
	if again > agentKills*(64<<10) {
		t.Errorf("%d bytes that were complete on disk were asked for again", again)
	}
}

// completeChunks gives, by their offsets, the chunks of a partial file that are whole.
func completeChunks(t *testing.T, path string, file *dunlinv1.IndexedFile) map[uint64]bool {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	have := map[uint64]bool{}
	for _, c := range file.Chunks {
		if end := c.Offset + uint64(c.Length); end <= uint64(len(data)) && sha256Is(data[c.Offset:end], c.Sha256) {
			have[c.Offset] = true
		}
	}
	return have
}

// overlap sums the bytes of ranges that lie in chunks that are there.
func overlap(t *testing.T, ranges []string, file *dunlinv1.IndexedFile, have map[uint64]bool) int64 {
	t.Helper()
	var sum int64
	for _, r := range ranges {
		if r == "" {
			continue // config and index, which are asked for whole
		}
		var from, to int64
		if _, err := fmt.Sscanf(r, "bytes=%d-%d", &from, &to); err != nil {
			t.Fatalf("range %q: %v", r, err)
		}
		for _, c := range file.Chunks {
			if have[c.Offset] {
				sum += max(0, min(to+1, int64(c.Offset)+int64(c.Length))-max(from, int64(c.Offset)))
			}
		}
	}
	return sum
}
