package console

import (
	"fmt"
	"log/slog"
	"net/url"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/dunlin/dunlin/controller/identity"
	"github.com/dunlin/dunlin/controller/store"
	"github.com/dunlin/dunlin/internal/pki/pkitest"
	"github.com/dunlin/dunlin/models/signing"
	v1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// trust gives the store its first trust document, as a controller does when it
// starts: the signers of versions are read from it.
func (w *world) trust() {
	w.t.Helper()
	root, controller := pkitest.Key(w.t), pkitest.Key(w.t)
	rootKey, err := signing.NewTrustKey(root.Public(), nil, "")
	must(w.t, err)
	controllerKey, err := signing.NewTrustKey(controller.Public(), nil, "")
	must(w.t, err)
	signed, err := signing.NewTrust(&v1.TrustDocument{
		Version: 1, IssuedAt: timestamppb.New(time.Now().Add(-time.Minute)), ExpiresAt: timestamppb.New(time.Now().Add(time.Hour)),
		RootKeys: []*v1.TrustKey{rootKey}, ControllerKeys: []*v1.TrustKey{controllerKey}})
	must(w.t, err)
	must(w.t, signing.SignTrust(signed, root))
	must(w.t, w.store.AddTrust(w.t.Context(), "test", signed))
}

// version puts a version into the store, as the registry does when it has
// checked a bundle.
func (w *world) version(v store.Version) {
	w.t.Helper()
	if v.Digest == "" {
		v.Digest = fmt.Sprintf("sha256:%064x", v.Version)
	}
	_, _, err := w.store.CreateVersion(w.t.Context(), v)
	must(w.t, err)
}

func TestModelPages(t *testing.T) {
	w := start(t)
	w.trust()
	ada := w.browser().signIn("ada")
	_, body := ada.do("GET", "/models", nil)
	has(t, body, "No model yet", "dunlin push model.onnx digits")

	hostile := []string{script, "\u202Eemag\u202C:FP32[1]", "مرحبا 🐦:FP32[n,10]", strings.Repeat("long", 2000) + ":INT8[]"}
	w.version(store.Version{Model: "digits", Version: 1, Size: 1 << 20, Inputs: []string{"x:FP32[n,64]"}, Outputs: []string{"p:FP32[n,10]"}, Opset: 17, CreatedBy: "user:ada"})
	w.version(store.Version{Model: "digits", Version: 2, Size: 3 << 19, Inputs: []string{"x:FP32[n,64]"}, Outputs: hostile, Opset: 18, CreatedBy: script})
	w.version(store.Version{Model: "faces", Version: 7, Digest: "sha256:" + strings.Repeat("7", 64), Size: 5, CreatedBy: "user:ben"})
	w.join("cam-1", nil, &v1.Reported{Versions: []*v1.VersionStatus{
		{Model: "digits", Version: 2, State: v1.VersionState_VERSION_STATE_RESIDENT, Serving: true},
		{Model: "digits", Version: 1, State: v1.VersionState_VERSION_STATE_QUARANTINED},
		{Model: "faces", Version: 7, State: v1.VersionState_VERSION_STATE_STORED}}})
	fresh := w.browser().signIn("ada")
	w.wait(func() bool {
		_, body = fresh.do("GET", "/models", nil)
		return strings.Contains(body, `href="/?model=digits"`)
	})
	has(t, body, "<b>2</b> of 2 models", `<a href="/models/digits" dir="auto">digits</a>`, "1.5 MiB", "1 quarantined", "1 in memory, 1 serving", "0 in memory, 0 serving, 1 not in memory")
	for query, want := range map[string]string{
		"?q=DIGITS":         "digits",
		"?q=user%3Aben":     "faces",
		"?q=sha256%3A7777":  "faces",
		"?q=%3Cscript":      "digits",
		"?q=none":           "",
		"?q=faces&page=999": "faces",
	} {
		resp, body := fresh.do("GET", "/models"+query, nil)
		for _, name := range []string{"digits", "faces"} {
			if strings.Contains(body, `href="/models/`+name+`"`) != (want == name) {
				t.Errorf("%s: %s is there or not, want %q", query, name, want)
			}
		}
		if want == "" {
			has(t, body, "No model matches.")
		}
		if resp.StatusCode != 200 {
			t.Errorf("%s: got %s", query, resp.Status)
		}
	}

	resp, body := fresh.do("GET", "/models/digits", nil)
	has(t, body, "2 versions", fmt.Sprintf("sha256:%064x", 2), "&#43;512 KiB", "other outputs", "opset 17 before", "no publisher", `href="/?model=digits%3A2"`,
		`<code dir="ltr"><bdi>&lt;script&gt;`, `<bdi>مرحبا 🐦</bdi>:FP32[n,10]`, "dunlin model delete digits:2", "dunlin get profiles digits")
	if strings.Index(body, `id="v2"`) > strings.Index(body, `id="v1"`) {
		t.Error("the newest version is not the first")
	}
	if resp.StatusCode != 200 || strings.Contains(body, "<script>alert") || strings.Contains(body, "ZgotmplZ") {
		t.Errorf("got %s; a text runs as a script", resp.Status)
	}
	for path, want := range map[string]int{
		"/models/none": 404, "/models/" + url.PathEscape("../x"): 404, "/models/" + url.PathEscape(script): 404, "/models/" + url.PathEscape("مرحبا"): 404,
		"/models?q=" + strings.Repeat("x", maxFilter+1): 400, "/models?page=0": 400, "/models/digits?page=x": 400,
	} {
		if resp, body := fresh.do("GET", path, nil); resp.StatusCode != want || strings.Contains(body, "<script>alert") {
			t.Errorf("%.60s: got %s, want %d", path, resp.Status, want)
		}
	}
}

// A version that cannot be deleted is on the page, with the reason.
func TestDeleteVersionRefused(t *testing.T) {
	w := start(t)
	w.trust()
	w.version(store.Version{Model: "digits", Version: 1, CreatedBy: "user:ada"})
	ada := w.browser().signIn("ada")
	for form, want := range map[string]string{
		"version=9":                            `role="alert"`,
		"version=0":                            "version is &#34;0&#34;, allowed are 1 to 9007199254740991",
		"version=-1":                           "allowed are 1 to",
		"version=1.5":                          "allowed are 1 to",
		"version=%3Cb%3E":                      "version is &#34;&lt;b&gt;&#34;",
		"version=" + strings.Repeat("9", 4000): "allowed are 1 to",
		"version=" + strings.Repeat("9", maxForm): "up to 32 KiB",
	} {
		q, err := url.ParseQuery(form)
		must(t, err)
		resp, body := ada.do("POST", "/models/digits", q)
		if resp.StatusCode < 400 || resp.StatusCode >= 500 || !strings.Contains(body, want) {
			t.Errorf("%.40s: got %s, want %q in %s", form, resp.Status, want, body)
		}
	}
	// Another site's page deletes nothing.
	if resp, _ := ada.do("POST", "/models/digits", url.Values{"version": {"1"}}, "Sec-Fetch-Site", "cross-site"); resp.StatusCode != 403 {
		t.Errorf("got %s", resp.Status)
	}
	if _, err := w.store.Version(t.Context(), "digits", 1); err != nil {
		t.Error(err)
	}
}

// Who may not delete versions is offered no form for it, and is refused.
func TestViewerDeletesNothing(t *testing.T) {
	w := start(t)
	w.trust()
	w.version(store.Version{Model: "digits", Version: 1, CreatedBy: "user:ada"})
	must(t, w.store.AddToken(t.Context(), "eve", identity.Viewer, identity.Hash("eve-token")))
	eve := w.browser()
	eve.do("POST", "/sign-in", url.Values{"token": {"eve-token"}})
	resp, body := eve.do("GET", "/models/digits", nil)
	if resp.StatusCode != 200 || strings.Contains(body, "Delete") || !strings.Contains(body, `id="v1"`) {
		t.Errorf("got %s %s", resp.Status, body)
	}
	if resp, body := eve.do("POST", "/models/digits", url.Values{"version": {"1"}}); resp.StatusCode != 403 {
		t.Errorf("got %s %s", resp.Status, body)
	}
	if _, err := w.store.Version(t.Context(), "digits", 1); err != nil {
		t.Error(err)
	}
}

// FuzzModelText puts a text wherever somebody else chose one: it makes no
// element that is not there with a plain word.
func FuzzModelText(f *testing.F) {
	for _, s := range []string{script, `" onclick="x`, "'><b>", "\u202Emodel", "👩‍👩‍👧", "{{.}}", "\x00\xff", "javascript:x", "</code></dd>", strings.Repeat("x", 5000)} {
		f.Add(s)
	}
	p := newPages(newAssets(), slog.New(slog.DiscardHandler))
	made := func(t *testing.T, name, s string) string {
		v := &v1.ModelVersion{Model: "m", Version: 2, Digest: s, CreatedBy: s, Inputs: []string{s}, Outputs: []string{s, s}, Signers: []string{s}}
		u := use{Deployments: []string{s}, Routes: []string{s}, Resident: 1, Bad: 1, URL: filter{Model: s, Page: 1}.URL()}
		var data any = modelsView{Text: "x" + s, All: 1, Rows: []modelRow{{Name: s, Newest: v, Use: u}}}
		if name == "model" {
			profile := &v1.DeviceProfile{Device: s, Profile: &v1.ModelProfile{FirmwareProfile: s, Unmeasured: "x" + s, Recommended: &v1.ModelSetting{Provider: s}}}
			data = modelView{Name: s, Fault: "x" + s, Deletes: true, Versions: []versionView{{V: v, Use: u}}, Profiles: profilesOf([]*v1.DeviceProfile{profile})}
		}
		b, err := p.render(name, "content", page{Data: data})
		must(t, err)
		return string(b)
	}
	f.Fuzz(func(t *testing.T, s string) {
		for _, name := range []string{"models", "model"} {
			plain, body := made(t, name, "word"), made(t, name, s)
			for _, mark := range []string{"<", ">", `"`} {
				if got, want := strings.Count(body, mark), strings.Count(plain, mark); got != want {
					t.Errorf("%s with %q has %d %s, with a word %d:\n%s", name, s, got, mark, want, body)
				}
			}
			if strings.Contains(body, "ZgotmplZ") != strings.Contains(s, "ZgotmplZ") {
				t.Errorf("%s with %q: a value is refused", name, s)
			}
		}
	})
}

// FuzzForms reads the fields of forms: whatever comes, it is a value within
// its limits or an error that is short.
func FuzzForms(f *testing.F) {
	for _, s := range []string{"1", " 7 ", "-1", "1e3", "a=b, c=d", "a=b a=c", "=", script, "مرحبا=🐦", strings.Repeat("9", 400)} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		n, err := numberOf("version", s, 1, 1, 9)
		if err == nil && (n < 1 || n > 9) {
			t.Errorf("%q: got %d", s, n)
		}
		labels, lerr := labelsOf("labels", s)
		if _, empty := labels[""]; empty {
			t.Errorf("%q: got a label without a key", s)
		}
		for _, err := range []error{err, lerr} {
			if err != nil && len(err.Error()) > 1000 {
				t.Errorf("an error of %d bytes", len(err.Error()))
			}
		}
		if words, err := wordsOf(url.Values{"q": {s}}, "q"); err == nil && len([]rune(words["q"])) > maxFilter {
			t.Errorf("%q is taken", s)
		}
	})
}

func TestUsesOf(t *testing.T) {
	uses := usesOf(
		[]*v1.VersionUse{{Model: "a", Version: 1, Resident: 1, Serving: 1}, {Model: "a", Version: 2, Waiting: 1}},
		[]*v1.Deployment{{Name: "all", Model: "a", Version: 2}},
		[]*v1.Route{{Name: "r", Targets: []*v1.RouteTarget{{Model: "a", Version: 1}, {Model: "a", Version: 1}, {Model: "b"}}, Shadow: &v1.RouteShadow{Model: "c", Version: 3},
			Rules: []*v1.RouteRule{{Fallback: []*v1.RouteFallback{{Model: "d", Version: 4}}}}}})
	for ref, want := range map[string]string{"a": "[all] [r] 1 1 0 1", "a:1": "[] [r] 1 0 0 1", "a:2": "[all] [] 0 1 0 0", "b": "[] [r] 0 0 0 0", "c": "[] [r] 0 0 0 0", "c:3": "[] [r] 0 0 0 0", "d:4": "[] [r] 0 0 0 0"} {
		u := uses[ref]
		if u == nil {
			t.Errorf("%s: is not used", ref)
			continue
		}
		if got := fmt.Sprint(u.Deployments, u.Routes, u.Resident, u.Waits, u.Bad, u.Serving); got != want {
			t.Errorf("%s: got %s, want %s", ref, got, want)
		}
	}
	if uses["b:0"] != nil {
		t.Error("version 0 is one")
	}
}

func TestProfilesOf(t *testing.T) {
	at := time.Unix(1_700_000_000, 0)
	one := func(device, class string, version int64, after time.Duration) *v1.DeviceProfile {
		set := &v1.ModelSetting{Provider: "cpu", Batch: 4, Instances: 2}
		return &v1.DeviceProfile{Device: device, Profile: &v1.ModelProfile{Version: version, FirmwareProfile: class, MeasuredAt: timestamppb.New(at.Add(after)), Recommended: set,
			Latency: []*v1.LatencyPoint{{Rows: 8, Seconds: .5}, {Rows: 1, Seconds: .002}},
			Points:  []*v1.ProfilePoint{{Setting: &v1.ModelSetting{Provider: "cpu", Batch: 1, Instances: 2}, JoulesPerRow: new(9.0)}, {Setting: set, JoulesPerRow: new(.125)}}}}
	}
	rows := profilesOf([]*v1.DeviceProfile{one("cam-1", "pi", 1, 0), one("cam-2", "pi", 2, 0), one("cam-3", "pi", 2, time.Hour), one("cam-4", "jetson", 2, 0)})
	var got []string
	for _, r := range rows {
		got = append(got, fmt.Sprintf("%d %s %d %s", r.Version, r.Class, r.Devices, r.P.GetDevice()))
	}
	if s := strings.Join(got, ", "); s != "2 jetson 1 cam-4, 2 pi 2 cam-3, 1 pi 1 cam-1" {
		t.Errorf("got %s", s)
	}
	if r := rows[0]; r.Run != "2 ms for 1 row" || r.Setting != "cpu, 4 rows a run, 2 at a time" || r.Energy != "0.125 J a row" {
		t.Errorf("got %q %q %q", r.Run, r.Setting, r.Energy)
	}
	// What was not measured is not made up.
	if r := profilesOf([]*v1.DeviceProfile{{Profile: &v1.ModelProfile{}}})[0]; r.Run != "" || r.Setting != "" || r.Energy != "" {
		t.Errorf("got %+v", r)
	}
}

func TestSignatureOf(t *testing.T) {
	for text, want := range map[string]signature{"x:FP32[-1,2]": {"x", ":FP32[-1,2]"}, "a:b:INT8[]": {"a:b", ":INT8[]"}, "x": {"x", ""}, "": {}, "مرحبا:BOOL[1]": {"مرحبا", ":BOOL[1]"}} {
		if got := signatureOf(text); got != want {
			t.Errorf("%q: got %q, want %q", text, got, want)
		}
	}
}

func TestGrowth(t *testing.T) {
	for _, c := range []struct {
		now, before uint64
		want        string
	}{{3 << 20, 1 << 20, "+2 MiB"}, {0, 1, "−1 B"}, {5, 5, "the same size"}} {
		if got := growth(c.now, c.before); got != c.want {
			t.Errorf("%d after %d: got %q, want %q", c.now, c.before, got, c.want)
		}
	}
}
