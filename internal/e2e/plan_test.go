package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// devicePlan is what `dunlin plan -o json` says of one device.
type devicePlan struct {
	Device       string `json:"device"`
	Verdict      string `json:"verdict"`
	Reason       string `json:"reason"`
	MemoryBytes  string `json:"memoryBytes"`
	BudgetBytes  string `json:"budgetBytes"`
	MemorySource string `json:"memorySource"`
}

// TestDoesNotFit: a model that is too large for one device goes to the other
// only; plan says so before, the rollout says why, and the device goes on with
// the version that it had until it has more memory.
func TestDoesNotFit(t *testing.T) {
	f := newFleet(t)
	small := startAgent(t, f, "small", "--memory-mib", "8")
	startAgent(t, f, "large", "--memory-mib", "256")
	cli(t, f, "push", bigModel(t, 1, 1<<20), "net")
	cli(t, f, "push", bigModel(t, 2, 32<<20), "net")
	plan := func(version, code int) map[string]devicePlan {
		t.Helper()
		args := []string{"plan", "-f", document(t, f, "net", version), "-o", "json"}
		if code != 0 {
			fails(t, f, code, args...)
		}
		out, err := f.CLI(within(t), args...)
		if code == 0 && err != nil {
			t.Fatal(err)
		}
		var all struct {
			Devices []devicePlan `json:"devices"`
		}
		decode(t, out, &all)
		by := map[string]devicePlan{}
		for _, p := range all.Devices {
			by[p.Device] = p
		}
		return by
	}
	for device, p := range plan(1, 0) {
		if p.Verdict != "VERDICT_FITS" || p.MemorySource != "SOURCE_ESTIMATED" {
			t.Errorf("version 1 on %s: %+v", device, p)
		}
	}
	apply(t, f, "net", 1)
	cli(t, f, "rollout", "status", "net", "--wait")

	before := plan(2, 1)
	if p := before["large"]; p.Verdict != "VERDICT_FITS" || p.BudgetBytes != fmt.Sprint(256<<20) {
		t.Errorf("version 2 on large: %+v", p)
	}
	if p := before["small"]; p.Verdict != "VERDICT_DOES_NOT_FIT" || !strings.Contains(p.Reason, "the budget is 8.0 MiB") {
		t.Errorf("version 2 on small: %+v", p)
	}
	halting := filepath.Join(f.Dir, "net-halting.yaml") // or else large would go back too
	text, err := os.ReadFile(document(t, f, "net", 2))
	if err == nil {
		err = os.WriteFile(halting, []byte(strings.Replace(string(text), "selector: {}", "selector: {}, rollout: {onFailure: halt}", 1)), 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	out := cli(t, f, "apply", "-f", halting)
	if !strings.Contains(out, "deployment/net refused on small: net:2 does not fit: it needs 3") || strings.Contains(out, "on large") {
		t.Errorf("apply printed %q", out)
	}
	if said := fails(t, f, 5, "rollout", "status", "net", "--wait"); !strings.Contains(said, "small (does not fit: it needs ") {
		t.Errorf("the rollout says %s", said)
	}
	serving := func(want map[string]string) string {
		got := map[string]string{}
		for _, d := range devices(t, f) {
			for _, v := range d.Reported.Versions {
				if v.Serving {
					got[d.Name] = v.Version
				} else if v.State == "VERSION_STATE_QUARANTINED" {
					return fmt.Sprintf("%s tried version %s: %s", d.Name, v.Version, v.Reason)
				}
			}
		}
		if fmt.Sprint(got) != fmt.Sprint(want) {
			return fmt.Sprintf("serving are %v", got)
		}
		return ""
	}
	eventually(t, func() string { return serving(map[string]string{"small": "1", "large": "2"}) })

	// A restart of the controller takes nothing away.
	if err := f.Controller.Stop(); err != nil {
		t.Fatal(err)
	}
	if err := f.StartController(within(t)); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() string { return serving(map[string]string{"small": "1", "large": "2"}) })

	// With more memory it is given the version, without anybody applying it.
	if err := small.Stop(); err != nil {
		t.Fatal(err)
	}
	for i, arg := range small.args {
		if arg == "--memory-mib" {
			small.args[i+1] = "256"
		}
	}
	if err := f.RestartAgent(within(t), small); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() string { return serving(map[string]string{"small": "2", "large": "2"}) })
	for device, p := range plan(2, 0) {
		if p.Verdict != "VERDICT_FITS" {
			t.Errorf("after: version 2 on %s: %+v", device, p)
		}
	}
}
