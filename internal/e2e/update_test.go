package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
)

// release builds the agent as a version, signs it and pushes it, and gives the
// number of the release. A program takes the place of the agent where one is
// named.
func release(t *testing.T, f *Fleet, key, version, program string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "dunlin-agent")
	if program != "" {
		raw, err := os.ReadFile(program)
		if err == nil {
			err = os.WriteFile(file, raw, 0o755)
		}
		if err != nil {
			t.Fatal(err)
		}
	} else if _, err := Run(within(t), []string{"CGO_ENABLED=1"}, "go", "build", "-C", root, "-race",
		"-ldflags", "-s -w -X github.com/dunlin/dunlin/internal/program.version="+version, "-o", file, "./cmd/dunlin-agent"); err != nil {
		t.Fatal(err)
	}
	cli(t, f, "sign-agent", file, "--key", key, "--version", version, "--arch", "linux/"+runtime.GOARCH)
	pushed, _, _ := strings.Cut(cli(t, f, "push-agent", file), " ")
	_, number, ok := strings.Cut(pushed, ":")
	if !ok {
		t.Fatalf("push-agent printed %q", pushed)
	}
	return number
}

// agentKey makes a key whose signatures of agents count, and gives its file.
func agentKey(t *testing.T, f *Fleet) string {
	t.Helper()
	key, next := filepath.Join(f.Dir, "agent.pem"), filepath.Join(f.Dir, "trust.json")
	cli(t, f, "keys", "create", key)
	if err := os.WriteFile(next, []byte(cli(t, f, "trust", "edit", "--add-agent-key", key+".pub")), 0o600); err != nil {
		t.Fatal(err)
	}
	cli(t, f, "trust", "sign", next, "--key", filepath.Join(f.controllerData(), "keys", "trust-root.pem"))
	cli(t, f, "trust", "apply", "--yes", next)
	return key
}

// runRelease has every device run a release of the agent.
func runRelease(t *testing.T, f *Fleet, number string) {
	t.Helper()
	path := filepath.Join(f.Dir, "agents.yaml")
	text := fmt.Sprintf(`apiVersion: dunlin/v1
kind: Deployment
metadata: {name: agents}
spec: {model: dunlin-agent, version: %s, selector: {}}
`, number)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	cli(t, f, "apply", "-f", path)
}

// agentVersion gives which version of the agent a device says that it runs.
func agentVersion(t *testing.T, f *Fleet) string {
	t.Helper()
	var all struct {
		Devices []struct {
			Info struct {
				AgentVersion string `json:"agentVersion"`
			} `json:"info"`
		} `json:"devices"`
	}
	decode(t, cli(t, f, "get", "devices", "-o", "json"), &all)
	return all.Devices[0].Info.AgentVersion
}

// revive starts the agent again whenever it has ended, as systemd does, until
// the test's end.
func revive(t *testing.T, f *Fleet, a *Agent) (stop func()) {
	ended := make(chan struct{})
	var running sync.WaitGroup
	running.Go(func() {
		for {
			select {
			case <-a.Done():
			case <-ended:
				return
			}
			p, err := Start(a.Name, filepath.Join(f.Dir, a.Name+".log"), nil, f.Programs.Agent, a.args...)
			if err != nil {
				t.Error(err)
				return
			}
			a.Process = p
		}
	})
	return sync.OnceFunc(func() { close(ended); running.Wait() })
}

// TestAgentUpdate rolls out a release of the agent to a device under load, and
// then one that ends at once, which the device leaves by itself.
func TestAgentUpdate(t *testing.T) {
	f := newFleet(t)
	key := agentKey(t, f)
	a := startAgent(t, f, "device-1", "--update-probation", "2")
	cli(t, f, "push", digitsFile("v1"), "digits")
	apply(t, f, "digits", 1)
	cli(t, f, "rollout", "status", "digits", "--wait")

	load := startLoad(t, a.URL, "digits-route")
	pid := a.PID()
	runRelease(t, f, release(t, f, key, "0.8.0", ""))
	cli(t, f, "rollout", "status", "agents", "--wait")
	load.stop()
	if v := agentVersion(t, f); v != "0.8.0" {
		t.Errorf("the device says that it runs %s", v)
	}
	if problem := serves(t, a, 1); problem != "" {
		t.Error(problem)
	}
	select {
	case <-a.Done():
		t.Fatalf("the process ended:\n%s", a.LogTail(30))
	default:
	}
	if exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid)); err != nil || !strings.HasSuffix(exe, "/agent/a/dunlin-agent") {
		t.Errorf("process %d runs %s (%v)", pid, exe, err)
	}
	t.Logf("%d requests, none failed, the slowest took %v", load.count(), load.slowest)

	bad := release(t, f, key, "0.9.0", "/bin/false")
	stop := revive(t, f, a)
	defer stop()
	runRelease(t, f, bad)
	said := fails(t, f, 5, "rollout", "status", "agents", "--wait")
	if !strings.Contains(said, "ended 3 times") {
		t.Errorf("the rollout says: %s", said)
	}
	stop()
	eventually(t, func() string { return serves(t, a, 1) })
	if v := agentVersion(t, f); v != "0.8.0" {
		t.Errorf("after the bad release the device runs %s", v)
	}
	eventually(t, func() string {
		seen := map[string]int{}
		for _, e := range events(t, f) {
			seen[e.Event.Kind]++
		}
		if seen["agent.updated"] < 1 || seen["agent.reverted"] != 1 {
			return fmt.Sprintf("events: %v", seen)
		}
		return ""
	})
}
