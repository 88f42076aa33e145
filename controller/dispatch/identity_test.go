package dispatch

import (
	"slices"
	"testing"

	"github.com/dunlin/dunlin/internal/link"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// Of two agents with one identity, the second is told to stand down and is
// given nothing; both are named.
func TestStandDown(t *testing.T) {
	w := fresh(t, fast)
	w.join("dev")
	says := func(boot, host string) {
		t.Helper()
		w.up("dev", link.Hello, &dunlinv1.Hello{BootId: boot, Session: "s-" + boot, Info: &dunlinv1.DeviceInfo{Hostname: host}})
	}
	says("a", "shop")
	says("b", "stolen")
	says("a", "shop")
	says("b", "stolen")
	w.bus.wait(t, "stand down", 0, func(m message) bool {
		return isCommand(m, "dev", func(c *dunlinv1.Command) bool {
			return c.GetStandDown().GetBootId() == "b" && c.GetStandDown().GetKeptHostname() == "shop"
		})
	})
	known, err := w.store.Identities(t.Context(), "dev")
	w.must(err)
	twins := known["dev"].GetTwins()
	if len(twins) != 2 || !twins[0].GetKept() || twins[0].GetHostname() != "shop" || twins[1].GetKept() || twins[1].GetHostname() != "stolen" {
		t.Errorf("twins are %v", twins)
	}
	page, err := w.store.ListAudit(t.Context(), 0, 10, true)
	w.must(err)
	if !slices.ContainsFunc(page.Records, func(r *dunlinv1.AuditRecord) bool {
		return r.GetAction() == "device.cloned" && r.GetAfter() == "agents on shop, stolen"
	}) {
		t.Errorf("the audit log does not say so: %v", page.Records)
	}
}

// A device that trusts too little, or an authority that is retired, is told to
// renew, another one is not; a new certificate in use ends the older ones.
func TestIdentify(t *testing.T) {
	w := fresh(t, fast)
	w.join("behind")
	w.join("current")
	w.join("beyond")
	root := make([]byte, 32)
	ended := 0
	w.d.trusted = func() (uint64, [][]byte) { return 3, [][]byte{root} }
	w.d.superseded = func() { ended++ }
	w.up("current", link.Hello, &dunlinv1.Hello{BootId: "b", Session: "s", TrustVersion: 3, RootIds: [][]byte{root}})
	w.up("beyond", link.Hello, &dunlinv1.Hello{BootId: "b", Session: "s", TrustVersion: 3, RootIds: [][]byte{{1}, root}})
	w.up("behind", link.Hello, &dunlinv1.Hello{BootId: "b", Session: "s", TrustVersion: 3, RootIds: [][]byte{{1}}})
	renew := func(device string) func(m message) bool {
		return func(m message) bool {
			return isCommand(m, device, func(c *dunlinv1.Command) bool { return c.GetRenewNow().GetWithinMs() > 0 })
		}
	}
	w.bus.wait(t, "renew now", 0, renew("behind"))
	w.bus.wait(t, "renew now", 0, renew("beyond"))
	w.up("current", link.Hello, &dunlinv1.Hello{BootId: "b", Session: "t", TrustVersion: 2, RootIds: [][]byte{root}})
	w.bus.wait(t, "renew now", 0, renew("current"))
	w.bus.mu.Lock()
	n := 0
	for _, m := range w.bus.sent {
		if renew("current")(m) {
			n++
		}
	}
	w.bus.mu.Unlock()
	if n != 1 {
		t.Errorf("a device that has everything, and then not, is told to renew %d times", n)
	}
	if ended != 0 {
		t.Errorf("certificates were superseded %d times", ended)
	}
}
