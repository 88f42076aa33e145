package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// TestSite has the devices of a site fetch a model through its cache, which
// fetches it once and does not run it; and a device with a metered link say
// what would travel, and fetch nothing.
func TestSite(t *testing.T) {
	f := newFleet(t)
	simulated := func(name string, args ...string) *Agent {
		return startAgent(t, f, name, append([]string{"--sim-device", simulatedClass, "--runtime-lib", "/missing"}, args...)...)
	}
	simulated("cache", "--label", "site=lab", "--site-listen", "127.0.0.1:0", "--site-cache", "100")
	const runners = 3
	for i := range runners {
		simulated(fmt.Sprint("runs-", i), "--label", "site=lab", "--label", "role=run")
	}
	const size = 6 << 20
	cli(t, f, "push", bigModel(t, 7, size), "big:1")
	cli(t, f, "apply", "-f", write(t, "big.yaml", []byte("apiVersion: dunlin/v1\nkind: Deployment\nmetadata: {name: big}\nspec: {model: big, version: 1, selector: {role: run}}\n")))
	cli(t, f, "rollout", "status", "big", "--wait")
	log := func(device string) string {
		raw, err := os.ReadFile(filepath.Join(f.Dir, device+".log"))
		if err != nil {
			t.Fatal(err)
		}
		return string(raw)
	}
	if n := strings.Count(log("cache"), "kept for the site"); n != 1 {
		t.Errorf("the cache fetched the model %d times", n)
	}
	stored := regexp.MustCompile(`msg=stored .*from_site=(\d+)`)
	for i := range runners {
		device := fmt.Sprint("runs-", i)
		m := stored.FindStringSubmatch(log(device))
		if m == nil {
			t.Fatalf("%s does not say what it stored", device)
		}
		if n, err := strconv.Atoi(m[1]); err != nil || n < size*9/10 {
			t.Errorf("%s has %s bytes from its site, of %d: %v", device, m[1], size, err)
		}
	}

	metered := simulated("metered", "--label", "role=run", "--metered", "on")
	eventually(t, func() string {
		out := cli(t, f, "get", "devices", "-o", "json")
		if !regexp.MustCompile(`metered link: 6\d{6} bytes would travel`).MatchString(out) {
			return out
		}
		return ""
	})
	if _, err := os.Stat(metered.Data); err != nil {
		t.Fatal(err)
	}
	if strings.Contains(log("metered"), "msg=stored") {
		t.Error("the model was fetched over a metered link")
	}
}
