package console

import (
	"bufio"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/cookiejar"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/dunlin/dunlin/controller/api"
	"github.com/dunlin/dunlin/controller/dispatch"
	"github.com/dunlin/dunlin/controller/identity"
	"github.com/dunlin/dunlin/controller/store"
	"github.com/dunlin/dunlin/internal/link"
	"github.com/dunlin/dunlin/internal/pki"
	"github.com/dunlin/dunlin/internal/pki/pkitest"
	v1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

type quiet struct{}

func (quiet) Publish(string, []byte) error { return nil }
func (quiet) Disconnect(string)            {}

type world struct {
	t        *testing.T
	store    *store.Store
	dispatch *dispatch.Dispatcher
	url      string
	issuer   *pki.Authority
}

const password = "correct horse battery"

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func start(t *testing.T) *world {
	t.Helper()
	log := slog.New(slog.DiscardHandler)
	st, err := store.Open(t.Context(), filepath.Join(t.TempDir(), "store.db"), store.Options{})
	must(t, err)
	auth := identity.New(st, identity.Options{})
	w := &world{t: t, store: st, dispatch: dispatch.New(dispatch.Config{Store: st, Bus: quiet{}, Log: log}), issuer: pkitest.Authority(t)}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- w.dispatch.Run(ctx) }()
	stopping := make(chan struct{})
	services := api.New(api.Config{Store: st, Dispatch: w.dispatch, Auth: auth, Log: log, Stopping: stopping})
	server := httptest.NewServer(New(Config{API: services, Log: log, DeviceURL: "https://dunlin.example.com:8080", Stopping: stopping}))
	w.url = server.URL
	t.Cleanup(func() {
		close(stopping)
		server.Close()
		cancel()
		if err := errors.Join(<-done, st.Close()); err != nil {
			t.Error(err)
		}
	})
	hash, err := auth.HashPassword(t.Context(), password)
	must(t, err)
	for name, scope := range map[string]map[string]string{"ada": nil, "ben": {"site": "berlin"}} {
		_, err = st.CreateUser(t.Context(), "user:test", store.User{Name: name, Role: identity.Admin, Scope: scope, Password: hash})
		must(t, err)
	}
	must(t, st.AddToken(t.Context(), "admin", identity.Admin, identity.Hash("the-token")))
	return w
}

// join makes a device known, and has it say hello and what it runs.
func (w *world) join(name string, labels map[string]string, reported *v1.Reported) {
	w.t.Helper()
	_, hash := identity.NewToken("")
	_, err := w.store.CreateJoinToken(w.t.Context(), "user:test", hash, store.JoinToken{UsesLeft: 1, ExpiresAt: time.Now().Add(time.Hour), Labels: labels})
	must(w.t, err)
	key := pkitest.Key(w.t)
	id, err := pki.ID(key.Public())
	must(w.t, err)
	_, err = w.store.Join(w.t.Context(), store.Join{Token: hash, Device: name, Key: id, Issue: func() (*x509.Certificate, error) {
		return w.issuer.IssueDevice(name, key.Public(), time.Now(), 365*24*time.Hour)
	}})
	must(w.t, err)
	w.dispatch.Joined(name)
	if reported == nil {
		return
	}
	w.up(name, link.Hello, &v1.Hello{BootId: name, Session: name, Info: &v1.DeviceInfo{Hostname: "host-of-" + name, FirmwareProfile: "board"}})
	reported.Session, reported.Sequence = name, 1
	w.up(name, link.Reported, reported)
	w.wait(func() bool {
		d, err := w.store.Device(w.t.Context(), name)
		return err == nil && d.Reported.GetSession() == name
	})
}

func (w *world) up(name, kind string, m proto.Message) {
	w.t.Helper()
	b, err := proto.Marshal(m)
	must(w.t, err)
	w.dispatch.Handle(link.Up(name, kind), b)
}

func (w *world) wait(until func() bool) {
	w.t.Helper()
	for end := time.Now().Add(20 * time.Second); !until(); {
		if time.Now().After(end) {
			w.t.Fatal("it did not come to pass")
		}
	}
}

type browser struct {
	*http.Client
	w *world
}

func (w *world) browser() *browser {
	jar, err := cookiejar.New(nil)
	must(w.t, err)
	return &browser{&http.Client{Jar: jar}, w}
}

func (b *browser) do(method, path string, form url.Values, header ...string) (*http.Response, string) {
	b.w.t.Helper()
	req, err := http.NewRequestWithContext(b.w.t.Context(), method, b.w.url+path, strings.NewReader(form.Encode()))
	must(b.w.t, err)
	req.Header.Set("Accept", "text/html")
	if form != nil {
		req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	}
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := b.Do(req)
	must(b.w.t, err)
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	must(b.w.t, err)
	return resp, string(body)
}

func (b *browser) signIn(name string) *browser {
	b.w.t.Helper()
	if resp, body := b.do("POST", "/sign-in", url.Values{"name": {name}, "password": {password}}); resp.StatusCode != 200 || !strings.Contains(body, "<h1>Fleet</h1>") {
		b.w.t.Fatalf("got %s %s", resp.Status, body)
	}
	return b
}

func has(t *testing.T, body string, parts ...string) {
	t.Helper()
	for _, p := range parts {
		if !strings.Contains(body, p) {
			t.Errorf("lacks %q:\n%s", p, body)
		}
	}
}

func TestSessions(t *testing.T) {
	w := start(t)
	b := w.browser()
	resp, body := b.do("GET", "/devices/x?a=b", nil)
	if resp.Request.URL.String() != w.url+"/sign-in?next=%2Fdevices%2Fx%3Fa%3Db" {
		t.Errorf("got %s", resp.Request.URL)
	}
	has(t, body, `name="next" value="/devices/x?a=b"`, "admin-token")
	for form, part := range map[string]string{
		"name=ada&password=wrong": "Name or password is wrong.",
		"token=wrong":             "This token is not valid",
		"name=ada&password=" + strings.Repeat("x", maxForm): "up to 32 KiB",
	} {
		q, err := url.ParseQuery(form)
		must(t, err)
		if resp, body := b.do("POST", "/sign-in", q); resp.StatusCode < 400 || !strings.Contains(body, part) {
			t.Errorf("got %s %s, want %q", resp.Status, body, part)
		}
	}
	// Nobody is led to another site.
	resp, _ = b.do("POST", "/sign-in", url.Values{"name": {"ada"}, "password": {password}, "next": {"//evil.example/"}})
	if resp.Request.URL.String() != w.url+"/" {
		t.Errorf("got %s", resp.Request.URL)
	}
	set := resp.Request.Response.Cookies()[0]
	if !set.HttpOnly || set.SameSite != http.SameSiteLaxMode || set.Secure || time.Until(set.Expires) > sessionFor {
		t.Errorf("got %v", set)
	}
	// What another site's page sends does nothing.
	if resp, _ := b.do("POST", "/sign-out", url.Values{}, "Sec-Fetch-Site", "cross-site"); resp.StatusCode != http.StatusForbidden {
		t.Errorf("got %s", resp.Status)
	}
	_, body = b.do("GET", "/", nil)
	has(t, body, "<b>ada</b>")
	if _, token, _ := strings.Cut(set.Value, "~"); strings.Contains(body, token) {
		t.Error("the page holds the token")
	}
	// A token that was taken back ends the session at once.
	id, _, _ := strings.Cut(set.Value, "~")
	must(t, w.store.DeleteToken(t.Context(), "user:test", id, ""))
	if resp, _ := b.do("GET", "/", nil); resp.Request.URL.Path != "/sign-in" {
		t.Errorf("got %s", resp.Request.URL)
	}
	// By a token; the session has another one, which signing out takes back.
	b = w.browser()
	resp, body = b.do("POST", "/sign-in", url.Values{"token": {"the-token"}})
	has(t, body, "<b>admin</b>")
	set = resp.Request.Response.Cookies()[0]
	_, token, _ := strings.Cut(set.Value, "~")
	if token == "the-token" || time.Until(set.Expires) > sessionFor {
		t.Errorf("got %v", set)
	}
	if resp, _ := b.do("POST", "/sign-out", url.Values{}); resp.Request.URL.Path != "/sign-in" {
		t.Errorf("got %s", resp.Request.URL)
	}
	if _, err := w.store.TokenOwner(t.Context(), identity.Hash(token)); !errors.Is(err, identity.ErrUnknown) {
		t.Errorf("got %v", err)
	}
	if _, err := w.store.TokenOwner(t.Context(), identity.Hash("the-token")); err != nil {
		t.Error(err)
	}
}

// A cookie of a session counts only over TLS where it was set there.
func TestCookieOverTLS(t *testing.T) {
	c := SessionCookie("id", "token", true)
	if c.Name != "__Host-dunlin_session" || !c.Secure || !c.HttpOnly || c.Path != "/" || c.Domain != "" || c.Value != "id~token" {
		t.Errorf("got %v", c)
	}
}

const script = `<script>alert("1")</script>`

func TestFleetPage(t *testing.T) {
	w := start(t)
	ada := w.browser().signIn("ada")
	_, body := ada.do("GET", "/", nil)
	has(t, body, "No device yet", "dunlin join-token create --label site=demo", "dunlin-agent --controller https://dunlin.example.com:8080 --join-token @join-token")
	digits := &v1.VersionStatus{Model: "digits", Version: 2, State: v1.VersionState_VERSION_STATE_RESIDENT, Serving: true}
	broken := &v1.VersionStatus{Model: "faces", Version: 1, State: v1.VersionState_VERSION_STATE_QUARANTINED, Reason: script}
	w.join("cam-1", map[string]string{"site": "berlin", "note": script}, &v1.Reported{Versions: []*v1.VersionStatus{digits}})
	w.join("cam-2", map[string]string{"site": "rome"}, &v1.Reported{Versions: []*v1.VersionStatus{broken}})
	w.join("cam-3", map[string]string{"site": "rome", "name": "مرحبا 🐦"}, nil)
	fresh := w.browser().signIn("ada")
	w.wait(func() bool {
		_, body = fresh.do("GET", "/", nil)
		return strings.Contains(body, "row-cam-3") && strings.Contains(body, "quarantined")
	})
	has(t, body, `<b>3</b> of 3 devices`, "مرحبا 🐦", `href="/?state=trouble"`, `href="/?model=faces%3A1"`, `href="/?label=site%3Drome"`)
	if strings.Contains(body, "<script>alert") {
		t.Error("a label runs as a script")
	}
	for query, want := range map[string]string{
		"/?label=site%3Drome":      "cam-2 cam-3",
		"/?label=note":             "cam-1",
		"/?state=trouble":          "cam-2",
		"/?state=offline":          "cam-3",
		"/?model=digits":           "cam-1",
		"/?model=digits%3A1":       "",
		"/?q=HOST-OF-cam-1":        "cam-1",
		"/?q=rome&state=offline":   "cam-3",
		"/?class=board&sort=state": "cam-2 cam-1",
		"/?page=7":                 "cam-1 cam-2 cam-3",
	} {
		_, body := ada.do("GET", query, nil)
		var got []string
		for _, m := range regexp.MustCompile(`<tr id="row-([^"]*)"`).FindAllStringSubmatch(body, -1) {
			got = append(got, m[1])
		}
		if strings.Join(got, " ") != want {
			t.Errorf("%s: got %v, want %s", query, got, want)
		}
	}
	for query, part := range map[string]string{"/?state=happy": "state &#34;happy&#34; is none of", "/?page=0": "page is &#34;0&#34;", "/?q=" + strings.Repeat("x", 201): "q has 201 characters, the limit is 200"} {
		if resp, body := ada.do("GET", query, nil); resp.StatusCode != 400 || !strings.Contains(body, part) {
			t.Errorf("%s: got %s %s", query, resp.Status, body)
		}
	}
	// A scope bounds it as it does the command line.
	ben := w.browser().signIn("ben")
	_, body = ben.do("GET", "/", nil)
	has(t, body, "cam-1", "Within site=berlin")
	if strings.Contains(body, "cam-2") || strings.Contains(body, "rome") {
		t.Errorf("shows what lies outside the scope:\n%s", body)
	}
	if resp, _ := ben.do("GET", "/devices/cam-2", nil); resp.StatusCode != http.StatusNotFound {
		t.Errorf("got %s", resp.Status)
	}
}

func TestDevicePage(t *testing.T) {
	w := start(t)
	_, _, err := w.store.CreateVersion(t.Context(), store.Version{Model: "digits", Digest: "sha256:d", Size: 1, CreatedBy: "user:test"})
	must(t, err)
	w.join("cam-1", map[string]string{"site": "rome", "note": script}, &v1.Reported{
		Versions: []*v1.VersionStatus{{Model: "digits", Version: 2, State: v1.VersionState_VERSION_STATE_ABSENT, BytesPresent: 1 << 20, BytesTotal: 4 << 20, Reason: script}},
		Drifts:   []*v1.Drift{{Kind: "file", Subject: "digits:2 model.onnx", Want: "sha256:a", Have: "sha256:b", Since: timestamppb.Now(), Repair: "fetched again"}},
	})
	at := timestamppb.Now()
	w.up("cam-1", link.Telemetry, &v1.Telemetry{
		At: at, CpuUtilisation: new(0.25), MemoryUsedBytes: new(uint64(3 << 30)), MemoryTotalBytes: new(uint64(4 << 30)),
		Models: []*v1.ModelTelemetry{{Model: "digits", Version: 2, Resident: true, MemoryBytes: 1 << 30, Measured: true}},
		Alarms: []*v1.Alarm{{Kind: "temperature", Subject: "cpu", Severity: v1.Severity_SEVERITY_ERROR, Message: script, RaisedAt: at, Method: "theil-sen", Unit: "°C", Threshold: new(90.0),
			Samples: []*v1.AlarmSample{{At: timestamppb.New(at.AsTime().Add(-time.Hour)), Value: 70}, {At: at, Value: 85}}}},
	})
	w.wait(func() bool { return w.dispatch.Telemetry("cam-1") != nil })
	b := w.browser().signIn("ada")
	resp, body := b.do("GET", "/devices/cam-1", nil)
	has(t, body, "digits:2", "1 MiB of 4 MiB", "Trouble", "temperature cpu", "theil-sen", "25 %", `<rect class="seg-1 edge" x="0.00" y="0" width="250.00"`, "digits:2: 1 GiB, measured",
		`<rect class="seg-other edge" x="250.00" y="0" width="500.00"`, "Free", `points="0.0,95.0 1000.0,27.5"`, "2 samples", "85 °C", "&lt;script&gt;")
	if resp.StatusCode != 200 || strings.Contains(body, "<script>alert") {
		t.Errorf("got %s; a text runs as a script", resp.Status)
	}
	if resp, body := b.do("GET", "/devices/none", nil); resp.StatusCode != 404 {
		t.Errorf("got %s %s", resp.Status, body)
	}
}

// No page has a script or style of its own, or asks another site for anything.
func TestPagesKeepThePolicy(t *testing.T) {
	w := start(t)
	w.join("cam-1", map[string]string{"site": "rome"}, &v1.Reported{})
	b := w.browser()
	check := func(path string) {
		t.Helper()
		resp, body := b.do("GET", path, nil)
		h := resp.Header
		if h.Get("Content-Security-Policy") != policy || strings.Contains(policy, "unsafe") || h.Get("X-Content-Type-Options") != "nosniff" || h.Get("Referrer-Policy") != "same-origin" {
			t.Errorf("%s: got %v", path, h)
		}
		for _, bad := range []string{` style="`, `<style`, ` onclick=`, `javascript:`, `hx-on`, `src="http`, `href="http`} {
			if strings.Contains(body, bad) {
				t.Errorf("%s has %q", path, bad)
			}
		}
		if regexp.MustCompile(`<script[^>]*>[^<]`).MatchString(body) {
			t.Errorf("%s has an inline script", path)
		}
		if strings.Contains(body, "ZgotmplZ") {
			t.Errorf("%s has a value that the template refuses", path)
		}
	}
	check("/sign-in")
	b.signIn("ada")
	w.trust()
	w.version(store.Version{Model: "digits", Version: 1, Inputs: []string{script}, CreatedBy: "user:ada"})
	for _, path := range []string{"/", "/devices/cam-1", "/none", "/?label=site%3Drome", "/models", "/models?q=none", "/models/digits", "/alarms"} {
		check(path)
	}
	// The theme is kept, and the page says it.
	_, body := b.do("POST", "/theme", url.Values{"theme": {"dark"}, "next": {"/devices/cam-1"}})
	has(t, body, `data-theme="dark"`, `value="dark" aria-pressed="true"`, "cam-1")
	if _, body = b.do("POST", "/theme", url.Values{"theme": {"system"}}); strings.Contains(body, "data-theme") {
		t.Error("the theme stays")
	}
}

func TestAssets(t *testing.T) {
	w := start(t)
	b := w.browser()
	_, body := b.do("GET", "/sign-in", nil)
	total := len(zipped([]byte(body)))
	for _, m := range regexp.MustCompile(`(?:src|href)="(/assets/[^"]+)"`).FindAllStringSubmatch(body, -1) {
		resp, got := b.do("GET", m[1], nil)
		tag := resp.Header.Get("ETag")
		if resp.StatusCode != 200 || tag == "" || !strings.Contains(resp.Header.Get("Cache-Control"), "immutable") || len(got) == 0 {
			t.Errorf("%s: got %s %v", m[1], resp.Status, resp.Header)
		}
		total += len(zipped([]byte(got)))
		resp, _ = b.do("GET", m[1], nil, "Accept-Encoding", "gzip")
		zippedTag := resp.Header.Get("ETag")
		if resp.Header.Get("Content-Encoding") != "gzip" || zippedTag == tag && tag[len(tag)-4:] != `-gz"` {
			t.Errorf("%s: got %v", m[1], resp.Header)
		}
		if resp, _ := b.do("GET", m[1], nil, "Accept-Encoding", "gzip", "If-None-Match", zippedTag); resp.StatusCode != http.StatusNotModified {
			t.Errorf("%s: got %s", m[1], resp.Status)
		}
	}
	t.Logf("a first visit takes %d bytes", total)
	if total > 250<<10 {
		t.Errorf("a first visit takes %d bytes, the limit is 250 KiB", total)
	}
}

// What others wrote is as it was published, and said.
func TestVendoredFiles(t *testing.T) {
	b, err := os.ReadFile("assets/vendor.json")
	must(t, err)
	var all []struct{ File, Package, Version, Path, Licence, SHA256 string }
	must(t, json.Unmarshal(b, &all))
	said := map[string]bool{}
	for _, v := range all {
		said[v.File] = true
		content, err := os.ReadFile(filepath.Join("assets/vendor", v.File))
		must(t, err)
		if sum := sha256.Sum256(content); hex.EncodeToString(sum[:]) != v.SHA256 || v.Package == "" || v.Version == "" || v.Path == "" || v.Licence == "" {
			t.Errorf("%s is %x, the manifest says %+v", v.File, sum, v)
		}
	}
	files, err := os.ReadDir("assets/vendor")
	must(t, err)
	for _, f := range files {
		if !said[f.Name()] {
			t.Errorf("the manifest lacks %s", f.Name())
		}
	}
}

// A stream sends the rows that change, and ends with the session.
func TestLiveFleet(t *testing.T) {
	w := start(t)
	w.join("cam-1", map[string]string{"site": "rome"}, &v1.Reported{})
	b := w.browser().signIn("ada")
	w.wait(func() bool { d, err := w.store.Device(t.Context(), "cam-1"); return err == nil && d.Connected })
	req, err := http.NewRequestWithContext(t.Context(), "GET", w.url+"/live/fleet?seen=x", nil)
	must(t, err)
	resp, err := b.Do(req)
	must(t, err)
	defer resp.Body.Close()
	lines := bufio.NewReader(resp.Body)
	next := func() (name, data string) {
		t.Helper()
		for {
			line, err := lines.ReadString('\n')
			must(t, err)
			line = strings.TrimSuffix(line, "\n")
			if v, ok := strings.CutPrefix(line, "event: "); ok {
				name = v
			} else if v, ok := strings.CutPrefix(line, "data: "); ok {
				data += v + "\n"
			} else if line == "" && name != "" {
				return name, data
			}
		}
	}
	name, data := next()
	if name != "fleet" {
		t.Fatalf("got %s", name)
	}
	has(t, data, `<tbody id="rows" hx-swap-oob="true">`, "cam-1", `id="around"`)
	w.up("cam-1", link.Reported, &v1.Reported{Session: "cam-1", Sequence: 2, Versions: []*v1.VersionStatus{{Model: "digits", Version: 1, State: v1.VersionState_VERSION_STATE_QUARANTINED}}})
	name, data = next()
	for !strings.Contains(data, "digits:1") {
		name, data = next()
	}
	has(t, data, `<template><tr id="row-cam-1" hx-swap-oob="true">`, "digits:1", "Trouble")
	if strings.Contains(data, "<tbody") || name != "fleet" {
		t.Errorf("got %s %s", name, data)
	}
	tokens, err := w.store.Tokens(t.Context(), "ada")
	must(t, err)
	for _, one := range tokens {
		must(t, w.store.DeleteToken(t.Context(), "user:test", one.ID, ""))
	}
	for name != "bye" {
		name, _ = next()
	}
}

func TestStreamsAreBounded(t *testing.T) {
	l := newLive(time.Now)
	for i := range maxOfUser {
		if !l.enter("ada") {
			t.Fatalf("stream %d is refused", i+1)
		}
	}
	if l.enter("ada") {
		t.Error("one user opens more streams than allowed")
	}
	for i := range maxStreams - maxOfUser {
		if !l.enter(fmt.Sprint("user-", i/maxOfUser)) {
			t.Fatalf("stream %d is refused", i+maxOfUser+1)
		}
	}
	if l.enter("eve") {
		t.Error("more streams are opened than allowed")
	}
	l.leave("ada")
	if !l.enter("eve") {
		t.Error("one that was closed still counts")
	}
}
