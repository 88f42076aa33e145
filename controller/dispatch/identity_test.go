package dispatch

import (
	"crypto/x509"
	"fmt"
	"log/slog"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/dunlin/dunlin/controller/identity"
	"github.com/dunlin/dunlin/controller/store"
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

// When a fleet joins, each device comes with a new certificate: what says so is
// kept for many of them in one transaction, as their hellos are.
func TestNewCertificatesAreKeptTogether(t *testing.T) {
	const devices = 20
	steps := map[string]int{}
	s, err := store.Open(t.Context(), filepath.Join(t.TempDir(), "store.db"), store.Options{OnStep: func(step string) { steps[step]++ }})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	_, hash := identity.NewToken("")
	if _, err := s.CreateJoinToken(t.Context(), "user:test", hash, store.JoinToken{UsesLeft: devices, ExpiresAt: time.Now().Add(time.Hour)}); err != nil {
		t.Fatal(err)
	}
	a, err := vouch()
	if err != nil {
		t.Fatal(err)
	}
	hellos := func(session string, serials [][]byte) (all []message) {
		for i, serial := range serials {
			payload, err := proto.Marshal(&dunlinv1.Hello{BootId: "b", Session: session, CertificateSerial: serial})
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, message{fmt.Sprint("device-", i), link.Hello, payload})
		}
		return all
	}
	var serials [][]byte
	for i := range devices {
		device := fmt.Sprint("device-", i)
		cert, err := s.Join(t.Context(), store.Join{Token: hash, Device: device, Key: device, Issue: func() (*x509.Certificate, error) {
			return a.IssueDevice(device, a.Certificate.PublicKey, time.Now(), time.Hour)
		}})
		if err != nil {
			t.Fatal(err)
		}
		serials = append(serials, cert.SerialNumber.Bytes())
	}
	d := New(Config{Store: s, Bus: &answering{todo: make(chan message, devices)}, Log: slog.New(slog.DiscardHandler)})
	const used = "after certificate used"
	d.take(t.Context(), hellos("s", serials))
	if steps[used] != 1 {
		t.Errorf("%d transactions keep which certificates are used, want 1", steps[used])
	}
	d.take(t.Context(), hellos("t", serials))
	if steps[used] != 1 {
		t.Errorf("%d transactions once all are known, want no more", steps[used])
	}
	for _, l := range d.live {
		if !l.greeted {
			t.Error("a device that said hello is not served")
		}
	}
	if len(d.live) != devices {
		t.Errorf("%d devices are there, want %d", len(d.live), devices)
	}
}
