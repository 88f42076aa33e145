package identity

import (
	"bytes"
	"context"
	"crypto/x509"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/dunlin/dunlin/agent/identity/identitytest"
	"github.com/dunlin/dunlin/agent/state"
	"github.com/dunlin/dunlin/internal/pki"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// watch is a clock that a test sets.
type watch struct {
	mu sync.Mutex
	at time.Time
}

func (w *watch) now() time.Time {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.at
}

func (w *watch) set(at time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.at = at
}

func (w *watch) add(d time.Duration) { w.set(w.now().Add(d)) }

// serveAt serves by a clock.
func serveAt(t *testing.T, w *watch) *identitytest.Controller {
	t.Helper()
	c := identitytest.New(t, w.now)
	c.Serve(http.NewServeMux())
	return c
}

// running runs d until the test, or stop, ends it.
func running(t *testing.T, d *Device) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { d.Run(ctx) })
	stop = sync.OnceFunc(func() {
		cancel()
		wg.Wait()
	})
	t.Cleanup(stop)
	return stop
}

func changed(t *testing.T, d *Device) {
	t.Helper()
	select {
	case <-d.Changed():
	case <-time.After(20 * time.Second):
		t.Fatal("nothing has changed")
	}
}

// A device renews at half-life, when it was off for months, when its
// certificate has expired, and when the controller asks; each time with a new
// key; also when answers are lost, and when the authority is another one.
func TestRenew(t *testing.T) {
	w := &watch{at: time.Now()}
	c := serveAt(t, w)
	cfg := newConfig(t, c)
	d := join(t, cfg)
	var keys []string
	for _, step := range []struct {
		name   string
		before func(*Device)
		later  time.Duration
	}{
		{"at half-life", func(*Device) {}, c.Lifetime * 6 / 10},
		{"after months, by another authority", func(*Device) { c.Rotate() }, c.Lifetime * 9 / 10},
		{"expired", func(*Device) {}, c.Lifetime + c.Grace/2},
		{"asked", func(d *Device) { d.RenewWithin(0) }, time.Minute},
		{"answers lost", func(*Device) { c.Cut(2) }, c.Lifetime * 6 / 10},
	} {
		w.add(step.later)
		step.before(d)
		keys = append(keys, pki.CertificateID(d.Certificate()))
		if step.name == "answers lost" {
			for range 2 {
				if err := d.renew(t.Context()); err == nil {
					t.Fatal("an answer that was lost came")
				}
			}
		}
		stop := running(t, d)
		changed(t, d)
		stop()
		if id := pki.CertificateID(d.Certificate()); slices.Contains(keys, id) {
			t.Errorf("%s: the key is an old one", step.name)
		}
		if left := d.Certificate().NotAfter.Sub(w.now()); left < c.Lifetime-time.Minute {
			t.Errorf("%s: the certificate lasts %s more", step.name, left)
		}
		if _, err := os.Stat(filepath.Join(cfg.Dir, nextKeyFile)); !os.IsNotExist(err) {
			t.Errorf("%s: a next key is left: %v", step.name, err)
		}
		// A start finds the same.
		if again := open(t, cfg); !again.Certificate().Equal(d.Certificate()) {
			t.Errorf("%s: another certificate after a start", step.name)
		}
		if !slices.ContainsFunc(d.Roots(), c.Authority().Certificate.Equal) {
			t.Errorf("%s: the authority of today is not known", step.name)
		}
	}
	w.add(c.Lifetime + c.Grace + time.Hour)
	if err := d.renew(t.Context()); err == nil || !strings.Contains(err.Error(), "too long ago") {
		t.Errorf("after the grace period: %v", err)
	}
}

// A device that could not renew does so as soon as the controller can be
// reached again, though it would wait for longer.
func TestRenewWhenReached(t *testing.T) {
	w := &watch{at: time.Now()}
	c := serveAt(t, w)
	d := join(t, newConfig(t, c))
	w.add(c.Lifetime + time.Hour)
	for range 20 {
		d.plan = d.plan.fail(w.now(), 1)
	}
	running(t, d)
	w.add(time.Hour)
	d.Reached()
	changed(t, d)
	if c.Calls("Renew") != 1 {
		t.Errorf("%d calls", c.Calls("Renew"))
	}
}

// copying copies the folder of a device before and after each step.
func copying(t *testing.T, cfg *Config) (copies *[]string) {
	t.Helper()
	to, copies := t.TempDir(), new([]string)
	cfg.OnStep = func(step string) {
		dir := filepath.Join(to, strings.ReplaceAll(step, " ", "-"))
		if err := os.CopyFS(dir, os.DirFS(cfg.Dir)); err != nil {
			t.Fatal(err)
		}
		*copies = append(*copies, dir)
	}
	return copies
}

// revive starts the device that is in a folder.
func revive(t *testing.T, cfg Config, dir string) *Device {
	t.Helper()
	store, err := state.Open(t.Context(), filepath.Join(dir, "state.db"), state.Limits{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { store.Close() })
	cfg.Dir, cfg.State, cfg.OnStep = dir, store, nil
	return open(t, cfg)
}

// Whatever is on the disk between two steps of a join is a device that starts,
// and joins as the same.
func TestJoinSurvivesKill(t *testing.T) {
	c := serve(t)
	cfg := newConfig(t, c)
	copies := copying(t, &cfg)
	join(t, cfg)
	if len(*copies) != 4 {
		t.Errorf("steps %v", *copies)
	}
	for _, dir := range *copies {
		if filepath.Base(dir) == "before-write-key" {
			continue // the controller has not heard of the device: tested by each join
		}
		if err := revive(t, cfg, dir).Join(t.Context(), &dunlinv1.DeviceInfo{}); err != nil {
			t.Errorf("%s: %v", dir, err)
		}
	}
}

// A device whose key and state are in memory joins, renews and starts again as
// another does.
func TestKeysInMemory(t *testing.T) {
	c := serve(t)
	cfg := newConfig(t, c)
	store, err := state.NewMemory(state.Limits{}, nil)
	if err != nil {
		t.Fatal(err)
	}
	cfg.Dir, cfg.State, cfg.Keys = "/dev/null/nowhere", store, new(Keys)
	d := join(t, cfg)
	first := d.Certificate()
	if err := d.renew(t.Context()); err != nil {
		t.Fatal(err)
	}
	if pki.CertificateID(first) == pki.CertificateID(d.Certificate()) {
		t.Error("the new certificate has the old key")
	}
	cfg.State = store.Crash()
	again := open(t, cfg)
	if err := again.renew(t.Context()); err != nil || c.Calls("Join") != 1 {
		t.Errorf("after a crash: %v, %d joins", err, c.Calls("Join"))
	}
	cfg.Keys = new(Keys)
	if _, err := Open(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), "not the key") {
		t.Errorf("without the key: %v", err)
	}
}

// Whatever is on the disk between two steps of a renewal is a device that
// starts, has the key of its certificate, and renews.
func TestRenewSurvivesKill(t *testing.T) {
	w := &watch{at: time.Now()}
	c := serveAt(t, w)
	cfg := newConfig(t, c)
	d := join(t, cfg)
	copies := copying(t, &d.cfg)
	if err := d.renew(t.Context()); err != nil {
		t.Fatal(err)
	}
	if len(*copies) != 6 {
		t.Errorf("steps %v", *copies)
	}
	for _, dir := range *copies {
		d := revive(t, cfg, dir)
		if err := d.settle(); err != nil {
			t.Errorf("%s: %v", dir, err)
		}
		before := pki.CertificateID(d.Certificate())
		url, client := d.Registry()
		resp, err := client.Get(url)
		if err != nil {
			t.Fatalf("%s: %v", dir, err)
		}
		resp.Body.Close()
		if err := d.renew(t.Context()); err != nil || pki.CertificateID(d.Certificate()) == before {
			t.Errorf("%s: renewed: %v", dir, err)
		}
		if key, err := pki.ReadKey(filepath.Join(dir, keyFile)); err != nil {
			t.Error(err)
		} else if id, _ := pki.ID(key.Public()); id != pki.CertificateID(d.Certificate()) {
			t.Errorf("%s: %s is not the key", dir, keyFile)
		}
	}
}

// A device that believes it is 1970 joins, connects, and renews.
func TestClockOf1970(t *testing.T) {
	w, own := &watch{at: time.Now()}, &watch{at: time.Unix(1000, 0)}
	c := serveAt(t, w)
	cfg := newConfig(t, c)
	cfg.Now = own.now
	pass := func(d time.Duration) { w.add(d); own.add(d) }
	d := join(t, cfg)
	connects := func(d *Device, what string) {
		t.Helper()
		url, client := d.Registry()
		resp, err := client.Get(url)
		if err != nil {
			t.Errorf("%s: %v", what, err)
			return
		}
		resp.Body.Close()
		if off := d.Now().Sub(w.now()).Abs(); off > time.Second {
			t.Errorf("%s: the time is wrong by %s", what, off)
		}
	}
	connects(d, "joined")
	if n := c.Calls("GetTime"); n != 1 {
		t.Errorf("asked for the time %d times", n)
	}
	pass(time.Hour)
	connects(d, "an hour later")

	// A start, of a device that was off for a year and begins in 1970 again.
	own.set(time.Unix(0, 0))
	w.add(c.Lifetime * 9 / 10)
	again := open(t, cfg)
	stop := running(t, again)
	for again.Certificate().Equal(d.Certificate()) {
		changed(t, again)
	}
	stop()
	connects(again, "renewed")
	if n := c.Calls("GetTime"); n != 2 {
		t.Errorf("asked for the time %d times", n)
	}
	// One that is a little slow is not asked about.
	slow := cfg
	slow.Now = func() time.Time { return w.now().Add(-slack / 2) }
	if open(t, slow).lost() {
		t.Error("a clock that is a little slow is not believed")
	}
	// The clock is set: it counts from then on.
	own.set(w.now())
	connects(again, "the clock was set")
	// What was the time once is over, also for the next start.
	own.set(w.now().Add(-24 * time.Hour))
	if last := open(t, cfg); !last.lost() {
		t.Error("yesterday is believed after a start")
	}
}

// A device that does not know the time, and has nobody to ask, ends when it is
// told to.
func TestEndsWithoutTheTime(t *testing.T) {
	w, own := &watch{at: time.Now()}, &watch{at: time.Now()}
	c := serveAt(t, w)
	cfg := newConfig(t, c)
	cfg.Now = own.now
	join(t, cfg)
	own.set(time.Unix(0, 0))
	d := open(t, cfg)
	if !d.lost() {
		t.Fatal("1970 is believed")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	ended := make(chan struct{})
	go func() { d.Run(ctx); close(ended) }()
	select {
	case <-ended:
	case <-time.After(10 * time.Second):
		t.Error("it runs on")
	}
}

// Answers about the time that are forged, replayed, or out of bounds are
// refused, and the device does not join by them.
func TestTimeIsRefused(t *testing.T) {
	w := &watch{at: time.Now()}
	c := serveAt(t, w)
	other := identitytest.New(t, w.now)
	deviceKey, err := pki.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	device, err := c.Authority().IssueDevice("edge-2", deviceKey.Public(), w.now(), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	authority := c.Authority() // the controller is locked while it answers
	var replayed *dunlinv1.GetTimeResponse
	for name, test := range map[string]struct {
		tamper func(*dunlinv1.GetTimeResponse)
		want   string
	}{
		"changed":      {func(a *dunlinv1.GetTimeResponse) { a.Now.Seconds++ }, pki.ErrSignature.Error()},
		"no time":      {func(a *dunlinv1.GetTimeResponse) { a.Now = nil }, "now:"},
		"no signature": {func(a *dunlinv1.GetTimeResponse) { a.Signature = nil }, pki.ErrSignature.Error()},
		"nobody's":     {func(a *dunlinv1.GetTimeResponse) { a.Certificates = nil }, "no certificate"},
		"replayed":     {func(a *dunlinv1.GetTimeResponse) { proto.Reset(a); proto.Merge(a, replayed) }, pki.ErrSignature.Error()},
		"another's": {func(a *dunlinv1.GetTimeResponse) {
			proto.Merge(reset(a), identitytest.SignTime(t, other.Authority(), c.Nonce, w.now()))
		}, "unknown authority"},
		"before": {func(a *dunlinv1.GetTimeResponse) {
			proto.Merge(reset(a), identitytest.SignTime(t, authority, c.Nonce, built.Add(-time.Second)))
		}, "x509"},
		"after the end": {func(a *dunlinv1.GetTimeResponse) {
			proto.Merge(reset(a), identitytest.SignTime(t, authority, c.Nonce, w.now().Add(2*identitytest.Lifetime)))
		}, "x509"},
		"a device's": {func(a *dunlinv1.GetTimeResponse) {
			signature, err := pki.Sign(deviceKey, pki.TimeMessage(c.Nonce, a.Now.AsTime()))
			if err != nil {
				t.Error(err)
			}
			a.Signature, a.Certificates = signature, pki.Raw(authority.Chain(device))
		}, "not the controller"},
	} {
		t.Run(name, func(t *testing.T) {
			replayed = identitytest.SignTime(t, c.Authority(), []byte("another nonce"), w.now())
			c.Tamper = func(m proto.Message) {
				if a, ok := m.(*dunlinv1.GetTimeResponse); ok {
					test.tamper(a)
				}
			}
			cfg := newConfig(t, c)
			cfg.Now = func() time.Time { return time.Unix(0, 0) }
			d := open(t, cfg)
			d.stored.ControllerURL = cfg.Controller
			if err := d.learnTime(t.Context()); err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("got %v, want %q", err, test.want)
			}
			if !d.lost() {
				t.Error("the time is believed")
			}
		})
	}
}

func reset(a *dunlinv1.GetTimeResponse) *dunlinv1.GetTimeResponse {
	proto.Reset(a)
	return a
}

func TestClock(t *testing.T) {
	day0 := time.Date(2026, 6, 1, 0, 0, 0, 0, time.UTC)
	end := day0.Add(10 * year)
	c := clock{floor: day0}
	if _, err := c.hear(day0.Add(-slack-1), time.Unix(0, 0), end); err == nil {
		t.Error("a time before the floor is believed")
	}
	if _, err := c.hear(end.Add(1), time.Unix(0, 0), end); err == nil {
		t.Error("a time after the authority's end is believed")
	}
	if c.wrong(day0.Add(-slack)) || !c.wrong(day0.Add(-slack-1)) || !c.wrong(day0, &x509.Certificate{NotBefore: day0.Add(1)}) {
		t.Error("wrong")
	}
	heard, err := c.hear(day0.Add(year), time.Unix(5, 0), end)
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct{ own, want time.Time }{
		{time.Unix(5, 0), day0.Add(year)}, {time.Unix(65, 0), day0.Add(year + time.Minute)}, {time.Unix(0, 0), day0.Add(year)},
		{day0.Add(year), day0.Add(year)}, {day0.Add(2 * year), day0.Add(2 * year)},
	} {
		if got := heard.now(test.own); !got.Equal(test.want) {
			t.Errorf("at %s: %s, want %s", test.own, got, test.want)
		}
	}
	// A clock that was ahead, and is right again, is not wrong for ever: what
	// the device itself saw counts less than what the controller says.
	c.seen = day0.Add(year)
	if !c.lost(day0.Add(day)) {
		t.Error("a clock that goes back is believed")
	}
	if c, err = c.hear(day0.Add(day), day0.Add(day), end); err != nil || c.lost(day0.Add(2*day)) {
		t.Errorf("the controller is not believed: %v", err)
	}
}

// What a stranger sends as the time is refused or bounded.
func FuzzTimeOf(f *testing.F) {
	now := time.Now()
	key, err := pki.NewKey()
	if err != nil {
		f.Fatal(err)
	}
	a, err := pki.NewAuthority(key, now, year)
	if err != nil {
		f.Fatal(err)
	}
	nonce := bytes.Repeat([]byte{1}, timeNonce)
	good := identitytest.SignTime(f, a, nonce, now)
	raw, err := proto.Marshal(good)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(raw)
	for _, change := range []*dunlinv1.GetTimeResponse{{}, {Now: timestamppb.New(now)}, {Now: good.Now, Signature: good.Signature}} {
		raw, err := proto.Marshal(change)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(raw)
	}
	roots := []*x509.Certificate{a.Certificate}
	f.Fuzz(func(t *testing.T, raw []byte) {
		var m dunlinv1.GetTimeResponse
		if proto.Unmarshal(raw, &m) != nil {
			return
		}
		if at, _, err := timeOf(&m, nonce, roots, nil); err == nil && !at.Equal(good.Now.AsTime()) {
			t.Errorf("%s is believed", at)
		}
	})
}

// A device that reaches nothing but the broker joins, learns the time, and
// renews over it, also when its certificate has expired.
func TestOnlyMQTT(t *testing.T) {
	w := &watch{at: time.Now()}
	c := identitytest.New(t, w.now)
	cfg := newConfig(t, c)
	cfg.Controller = c.ServeMQTT()
	wrong := cfg
	wrong.JoinToken = "x" + c.Token
	if err := open(t, wrong).Join(t.Context(), &dunlinv1.DeviceInfo{}); err == nil || !strings.Contains(err.Error(), "does not know the join token") {
		t.Errorf("a wrong token: %v", err)
	}
	own := &watch{at: time.Unix(0, 0)}
	cfg.Now = own.now
	d := join(t, cfg)
	if c.Calls("Join") != 1 || c.Calls("GetTime") != 1 || d.Stored().ControllerURL != cfg.Controller {
		t.Errorf("%v", d.Stored())
	}
	twin := newConfig(t, c)
	twin.Controller = cfg.Controller
	if err := open(t, twin).Join(t.Context(), &dunlinv1.DeviceInfo{}); err == nil || !strings.Contains(err.Error(), "another device has this name") {
		t.Errorf("another key: %v", err)
	}
	before := pki.CertificateID(d.Certificate())
	w.add(c.Lifetime + c.Grace/2)
	own.add(c.Lifetime + c.Grace/2)
	stop := running(t, d)
	changed(t, d)
	stop()
	if pki.CertificateID(d.Certificate()) == before || c.Calls("Renew") != 1 {
		t.Errorf("not renewed after %d calls", c.Calls("Renew"))
	}
	c.Remove()
	if err := d.renew(t.Context()); err == nil || !refused(err) {
		t.Errorf("a device that was removed: %v", err)
	}
}
