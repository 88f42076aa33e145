package e2e

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/dunlin/dunlin/agent/simfleet"
	profiles "github.com/dunlin/dunlin/firmware-profiles"
)

// startSimulated runs simulated devices of a class in this process until the
// test ends.
func startSimulated(t *testing.T, f *Fleet, n int, class string) *simfleet.Fleet {
	t.Helper()
	token := cli(t, f, "join-token", "create", "--uses", fmt.Sprint(n), "-o", "json")
	var created struct{ JoinToken string }
	decode(t, token, &created)
	set, err := profiles.Load()
	if err != nil {
		t.Fatal(err)
	}
	p, err := set.Named(class)
	if err != nil {
		t.Fatal(err)
	}
	fleet, err := simfleet.New(simfleet.Config{
		Controller: f.DeviceURL(), JoinToken: created.JoinToken, Devices: n, Classes: []simfleet.Share{{Profile: p, Weight: 1}}, Seed: 1,
		RequestsPerSecond: 2, Dir: t.TempDir(), Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() {
		if err := fleet.Run(ctx); err != nil && ctx.Err() == nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() {
		cancel()
		running.Wait()
	})
	return fleet
}

const gatedRollout = `apiVersion: dunlin/v1
kind: Deployment
metadata: {name: digits}
spec:
  model: digits
  version: %d
  selector: {}
  rollout:
    waves: [{canary: 2}, {percent: 30}, {percent: 100}]
    soak: 1s
    minSample: 200
    gates: {errorRate: 0.05, confidence: 0.25}
    deadline: 3m
---
apiVersion: dunlin/v1
kind: Route
metadata: {name: digits-route}
spec: {targets: [{model: digits, weight: 1}]}
`

// TestBadVersionIsRolledBack rolls a version out that loads and answers, but
// guesses: the real devices among the canaries show it, and a hundred others
// never get it.
func TestBadVersionIsRolledBack(t *testing.T) {
	f := newFleet(t)
	var real []*Agent
	for i := range 3 {
		real = append(real, startAgent(t, f, fmt.Sprint("real-", i)))
	}
	startSimulated(t, f, 100, simulatedClass)
	eventually(t, func() string {
		n := 0
		for _, d := range devices(t, f) {
			if d.Connected {
				n++
			}
		}
		if n != 103 {
			return fmt.Sprintf("%d devices are connected", n)
		}
		return ""
	})
	cli(t, f, "push", digitsFile("v2"), "digits:1")
	cli(t, f, "push", digitsFile("v3-bad"), "digits:2")
	apply(t, f, "digits", 1)
	cli(t, f, "rollout", "status", "digits", "--wait")
	var loads []*load
	for _, a := range real {
		loads = append(loads, startLoad(t, a.URL, "digits-route"))
	}

	path := filepath.Join(f.Dir, "gated.yaml")
	if err := os.WriteFile(path, fmt.Appendf(nil, gatedRollout, 2), 0o600); err != nil {
		t.Fatal(err)
	}
	cli(t, f, "apply", "-f", path)
	type rollout struct {
		State, Reason string
		Wave          int
		Devices       []struct {
			Device, Class string
			Wave          int
			Phase         string
		}
	}
	var r rollout
	deadline := time.Now().Add(2 * limit)
	for {
		r = rollout{}
		out, err := f.CLI(within(t), "rollout", "status", "digits", "-o", "json")
		if out == "" { // the exit code says how the rollout is
			t.Fatal(err)
		}
		decode(t, out, &r)
		if r.State == "ROLLOUT_STATE_ROLLED_BACK" {
			break
		}
		if time.Now().After(deadline) || r.State == "ROLLOUT_STATE_SUCCEEDED" || r.State == "ROLLOUT_STATE_FAILED" {
			t.Fatalf("the rollout is %s: %s\n%s", r.State, r.Reason, cli(t, f, "rollout", "decisions", "digits"))
		}
		pause(t)
	}
	var admitted []string
	for _, d := range r.Devices {
		if d.Wave > 0 {
			admitted = append(admitted, d.Device)
		}
	}
	if r.Wave != 1 || len(admitted) != 4 || !slices.ContainsFunc(admitted, func(d string) bool { return strings.HasPrefix(d, "real-") }) {
		t.Errorf("in wave %d the devices %v were given the version, want two of each class in the first", r.Wave, admitted)
	}
	record := cli(t, f, "rollout", "decisions", "digits", "-o", "json")
	if !strings.Contains(record, `"confidence"`) || !strings.Contains(record, "VERDICT_FAILED") || !strings.Contains(record, `"generic-x86-64"`) {
		t.Errorf("the record does not say why:\n%s", record)
	}
	for i, a := range real {
		eventually(t, func() string { return serves(t, a, 1) })
		loads[i].stop()
	}
	eventually(t, func() string {
		for _, d := range devices(t, f) {
			for _, v := range d.Reported.Versions {
				if v.Serving && v.Version != "1" {
					return d.Name + " serves version " + v.Version
				}
			}
		}
		return ""
	})
	if acc := accuracy(t, real[0].URL); acc < .9 {
		t.Errorf("accuracy after the rollback is %v", acc)
	}
}
