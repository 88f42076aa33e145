package serve

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/dunlin/dunlin/agent/engine"
	"github.com/dunlin/dunlin/agent/oip"
	"github.com/dunlin/dunlin/agent/oip/rest"
	"github.com/dunlin/dunlin/models/tensor"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// adder is a runtime whose versions add their number to each byte.
type adder struct{ fail func(engine.VersionID) error }

var adderInfo = engine.Info{
	Inputs:  []tensor.Info{{Name: "x", Type: tensor.Uint8, Shape: []int64{-1}}},
	Outputs: []tensor.Info{{Name: "y", Type: tensor.Uint8, Shape: []int64{-1}}},
}

func (a adder) Load(context.Context, engine.Spec) (engine.Info, error)      { return adderInfo, nil }
func (a adder) Unload(context.Context, engine.VersionID) error              { return nil }
func (a adder) Set(context.Context, engine.VersionID, engine.Setting) error { return nil }
func (a adder) Deactivate(context.Context, engine.VersionID) error          { return nil }
func (a adder) Activate(context.Context, engine.VersionID, engine.Setting) (engine.Need, error) {
	return engine.Need{}, nil
}
func (a adder) Run(_ context.Context, id engine.VersionID, requests [][]tensor.Tensor, _ []string) (engine.Outcome, error) {
	if a.fail != nil {
		if err := a.fail(id); err != nil {
			return engine.Outcome{}, err
		}
	}
	var out engine.Outcome
	for _, in := range requests {
		t := tensor.Tensor{Name: "y", Type: tensor.Uint8, Shape: in[0].Shape, Data: bytes.Clone(in[0].Data)}
		for i := range t.Data {
			t.Data[i] += byte(id.Version)
		}
		out.Outputs = append(out.Outputs, []tensor.Tensor{t})
	}
	return out, nil
}

func startEngine(t *testing.T, a adder) *engine.Engine {
	t.Helper()
	e := engine.New(engine.Config{Runtime: a})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := e.Run(ctx); err != nil {
			t.Error(err)
		}
	}()
	t.Cleanup(func() {
		cancel()
		<-done
	})
	return e
}

func load(t *testing.T, e *engine.Engine, model string, version int64) {
	t.Helper()
	if _, err := e.Load(t.Context(), engine.Spec{ID: engine.VersionID{Model: model, Version: version}}); err != nil {
		t.Fatal(err)
	}
}

// r makes a route; its targets are given as "digits", "digits:2" or "digits:2=30".
func r(name string, targets ...string) *dunlinv1.DesiredRoute {
	route := &dunlinv1.DesiredRoute{Name: name}
	for _, s := range targets {
		target := &dunlinv1.RouteTarget{Weight: 1}
		ref, weight, weighted := strings.Cut(s, "=")
		if weighted {
			fmt.Sscan(weight, &target.Weight)
		}
		model, version, _ := strings.Cut(ref, ":")
		target.Model = model
		fmt.Sscan(version, &target.Version)
		route.Targets = append(route.Targets, target)
	}
	return route
}

func request(name string, version int64) oip.Call {
	return oip.Call{Model: name, Version: version, Inputs: []tensor.Tensor{{Name: "x", Type: tensor.Uint8, Shape: []int64{1}, Data: []byte{10}}}}
}

func codeOf(err error) oip.Code {
	if e, ok := errors.AsType[*oip.Error](err); ok {
		return e.Code
	}
	return oip.Internal
}

func TestResolve(t *testing.T) {
	e := startEngine(t, adder{})
	s := New(e, nil)
	load(t, e, "digits", 1)
	load(t, e, "digits", 2)
	load(t, e, "letters", 3)
	s.SetServing(map[string]int64{"digits": 1, "letters": 3, "gone": 5})
	s.SetRoutes("inc/7", []*dunlinv1.DesiredRoute{
		r("live", "digits"), r("next", "digits:2"), r("letters", "digits:2"), r("missing", "digits:9"), r("soon", "coming"),
		r("off", "digits:1=1", "digits:9=0"), r("broken"),
	}, nil)
	for _, tt := range []struct {
		name    string
		version int64
		want    string // what answers; else the error
		code    oip.Code
	}{
		{"digits", 0, "digits:1", 0},
		{"digits", 1, "digits:1", 0},
		{"digits", 2, "digits:2", 0},
		{"live", 0, "digits:1", 0},
		{"next", 0, "digits:2", 0},
		{"letters", 0, "digits:2", 0}, // a route comes before a model of the same name
		{"letters", 3, "letters:3", 0},
		{"off", 0, "digits:1", 0},
		{"digits", 9, "model digits has no version 9", oip.NotFound},
		{"live", 1, `unknown model "live"`, oip.NotFound},
		{"other", 0, `unknown model "other"`, oip.NotFound},
		{"other", 1, `unknown model "other"`, oip.NotFound},
		{"missing", 0, "digits:9: version is not loaded", oip.Unavailable},
		{"soon", 0, "model coming: no version serves", oip.Unavailable},
		{"coming", 0, "model coming: no version serves", oip.Unavailable},
		{"gone", 0, "gone:5: version is not loaded", oip.Unavailable},
		{"gone", 5, "gone:5: version is not loaded", oip.Unavailable},
		{"broken", 0, "targets: there are 0", oip.Unavailable},
	} {
		resp, err := s.Infer(t.Context(), request(tt.name, tt.version))
		m, modelErr := s.Model(t.Context(), tt.name, tt.version)
		if tt.code != 0 {
			if err == nil || codeOf(err) != tt.code || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%s:%d: %v (code %d), want %q (code %d)", tt.name, tt.version, err, codeOf(err), tt.want, tt.code)
			}
			if modelErr == nil && (m.NotReady == "" || tt.code != oip.Unavailable) || modelErr != nil && codeOf(modelErr) != tt.code {
				t.Errorf("model %s:%d: %+v, %v; infer says %v", tt.name, tt.version, m, modelErr, err)
			}
			continue
		}
		if err != nil || modelErr != nil {
			t.Errorf("%s:%d: %v, %v", tt.name, tt.version, err, modelErr)
			continue
		}
		answered := fmt.Sprintf("%s:%d", resp.Model, resp.Version)
		if answered != tt.want || resp.Header[HeaderVersion] != tt.want || resp.Header[HeaderGeneration] != "inc/7" ||
			resp.Outputs[0].Data[0] != 10+byte(resp.Version) {
			t.Errorf("%s:%d: answered by %s: %+v, want %s", tt.name, tt.version, answered, resp, tt.want)
		}
		want := oip.Model{Name: tt.name, Versions: []int64{resp.Version}, Inputs: adderInfo.Inputs, Outputs: adderInfo.Outputs}
		if tt.name == "digits" && tt.version == 0 {
			want.Versions = []int64{1, 2} // of a model, all that are loaded
		}
		if m.Config.GetName() != tt.name || len(m.Config.GetInput()) != 1 {
			t.Errorf("model %s:%d: config %v", tt.name, tt.version, m.Config)
		}
		m.Config = nil
		if diff := cmp.Diff(want, m); diff != "" {
			t.Errorf("model %s:%d: %s", tt.name, tt.version, diff)
		}
	}
}

func TestReady(t *testing.T) {
	e := startEngine(t, adder{})
	s := New(e, nil)
	ready := func(want bool, when string) {
		t.Helper()
		if err := s.Ready(t.Context()); (err == nil) != want {
			t.Errorf("%s: ready says %v", when, err)
		}
	}
	ready(true, "nothing to serve")
	s.SetRoutes("g", []*dunlinv1.DesiredRoute{r("live", "digits", "digits:2")}, nil)
	ready(false, "a route without its model")
	load(t, e, "digits", 1)
	s.SetServing(map[string]int64{"digits": 1})
	ready(false, "a route without one of its targets")
	if m, err := s.Model(t.Context(), "live", 0); err != nil || !strings.Contains(m.NotReady, "digits:2") {
		t.Errorf("model: %+v, %v", m, err)
	}
	load(t, e, "digits", 2)
	ready(true, "all there")
	if m, err := s.Model(t.Context(), "live", 0); err != nil || !cmp.Equal(m.Versions, []int64{1, 2}) {
		t.Errorf("model: %+v, %v", m, err)
	}
	s.SetServing(map[string]int64{"digits": 3})
	ready(false, "the serving version is not loaded")
	s.SetServing(map[string]int64{"digits": 1})
	s.SetRoutes("g", []*dunlinv1.DesiredRoute{r("broken")}, nil)
	ready(false, "a broken route")
	s.SetRoutes("g", nil, nil)
	ready(true, "no routes")
}

func TestWeights(t *testing.T) {
	e := startEngine(t, adder{})
	s := New(e, nil)
	load(t, e, "digits", 1)
	load(t, e, "digits", 2)
	s.SetRoutes("g", []*dunlinv1.DesiredRoute{r("split", "digits:1=3", "digits:2=1")}, nil)
	const n = 2000
	count := map[int64]int{}
	for range n {
		resp, err := s.Infer(t.Context(), request("split", 0))
		if err != nil {
			t.Fatal(err)
		}
		count[resp.Version]++
	}
	// 1500 are expected of version 1, with a standard deviation of 19.4; seven
	// of those are never exceeded.
	if count[1] < 1364 || count[1] > 1636 {
		t.Errorf("of %d requests in shares of 3 to 1, version 1 got %d", n, count[1])
	}
}

// Requests go on without a failure while the model is switched from version
// to version, each of which leaves as soon as the next one serves.
func TestSwitchFailsNoRequest(t *testing.T) {
	e := startEngine(t, adder{})
	s := New(e, nil)
	load(t, e, "digits", 1)
	s.SetServing(map[string]int64{"digits": 1})
	s.SetRoutes("g", []*dunlinv1.DesiredRoute{r("live", "digits")}, nil)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for i := range 4 {
		name := []string{"live", "digits"}[i%2]
		wg.Go(func() {
			for n := 0; ; n++ {
				select {
				case <-stop:
					return
				default:
				}
				resp, err := s.Infer(context.Background(), request(name, 0))
				if err != nil || resp.Outputs[0].Data[0] != 10+byte(resp.Version) {
					t.Errorf("request %d: %+v, %v", n, resp, err)
					return
				}
			}
		})
	}
	for v := int64(2); v < 60; v++ {
		load(t, e, "digits", v)
		s.SetServing(map[string]int64{"digits": v})
		if err := e.Unload(t.Context(), engine.VersionID{Model: "digits", Version: v - 1}); err != nil {
			t.Error(err)
		}
	}
	close(stop)
	wg.Wait()
}

// leaving is an engine whose versions are always about to leave.
type leaving struct {
	calls int
	then  func()
}

func (l *leaving) Info(engine.VersionID) (engine.Info, bool) { return adderInfo, true }
func (l *leaving) Admits() error                             { return nil }
func (l *leaving) Backlog() engine.Backlog                   { return engine.Backlog{Waiting: 3} }
func (l *leaving) Versions() []engine.Status                 { return nil }
func (l *leaving) Infer(context.Context, engine.VersionID, engine.Request) (engine.Result, error) {
	l.calls++
	l.then()
	return engine.Result{}, engine.ErrDraining
}

func TestResolvingEnds(t *testing.T) {
	l := &leaving{then: func() {}}
	s := New(l, nil)
	s.SetServing(map[string]int64{"digits": 1})
	if _, err := s.Infer(t.Context(), request("digits", 0)); codeOf(err) != oip.Unavailable || l.calls != 1 {
		t.Errorf("a version that leaves without a successor: %v after %d calls", err, l.calls)
	}
	l.calls, l.then = 0, func() { s.SetServing(map[string]int64{"digits": int64(l.calls)}) }
	if _, err := s.Infer(t.Context(), request("digits", 0)); codeOf(err) != oip.Unavailable || l.calls != maxResolves {
		t.Errorf("routes that change all the time: %v after %d calls", err, l.calls)
	}
}

func TestUnavailableRuntime(t *testing.T) {
	e := startEngine(t, adder{fail: func(engine.VersionID) error { return fmt.Errorf("%w: no library", engine.ErrUnavailable) }})
	load(t, e, "digits", 1)
	if _, err := New(e, nil).Infer(t.Context(), request("digits", 1)); codeOf(err) != oip.Unavailable || !strings.Contains(err.Error(), "no library") {
		t.Error(err)
	}
}

func TestOverHTTP(t *testing.T) {
	crash := errors.New("out of registers")
	e := startEngine(t, adder{fail: func(id engine.VersionID) error {
		if id.Version == 4 {
			return crash
		}
		return nil
	}})
	s := New(e, nil)
	load(t, e, "digits", 2)
	load(t, e, "digits", 4)
	s.SetServing(map[string]int64{"digits": 2})
	s.SetRoutes("inc/7", []*dunlinv1.DesiredRoute{r("live", "digits")}, nil)
	h := rest.New(oip.New(oip.Config{Backend: s}))
	post := func(path, body string) *httptest.ResponseRecorder {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest(http.MethodPost, path, strings.NewReader(body)))
		return w
	}
	const body = `{"inputs":[{"name":"x","datatype":"UINT8","shape":[2],"data":[1,2]}]}`
	w := post("/v2/models/live/infer", body)
	want := `{"model_name":"digits","model_version":"2","outputs":[{"name":"y","datatype":"UINT8","shape":[2],"data":[3,4]}]}`
	if w.Code != 200 || w.Body.String() != want || w.Header().Get(HeaderVersion) != "digits:2" || w.Header().Get(HeaderGeneration) != "inc/7" {
		t.Errorf("status %d, headers %v, body %s", w.Code, w.Header(), w.Body)
	}
	for path, tt := range map[string]struct {
		body   string
		status int
		want   string
	}{
		"/v2/models/live/infer":              {strings.Replace(body, "UINT8", "INT8", 1), 400, "the model takes UINT8"},
		"/v2/models/digits/infer":            {`{"inputs":[]}`, 400, `\"x\": missing`},
		"/v2/models/digits/versions/2/infer": {strings.Replace(body, `{"inputs"`, `{"outputs":[{"name":"z"}],"inputs"`, 1), 400, `no output \"z\"`},
		"/v2/models/digits/versions/4/infer": {body, 500, "out of registers"},
		"/v2/models/digits/versions/3/infer": {body, 404, "no version 3"},
	} {
		if w := post(path, tt.body); w.Code != tt.status || !strings.Contains(w.Body.String(), tt.want) {
			t.Errorf("%s: status %d, body %s, want %d with %q", path, w.Code, w.Body, tt.status, tt.want)
		}
	}
	ready := func() *httptest.ResponseRecorder {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/v2/health/ready", nil))
		return w
	}
	if w := ready(); w.Code != 200 {
		t.Errorf("ready: status %d, %s", w.Code, w.Body)
	}
	if err := e.Throttle(t.Context(), engine.Throttle{Cordon: true}); err != nil {
		t.Fatal(err)
	}
	w = post("/v2/models/live/infer", body)
	if w.Code != 503 || w.Header().Get("Retry-After") != "10" || !strings.Contains(w.Body.String(), "cordoned") {
		t.Errorf("cordoned: status %d, headers %v, body %s", w.Code, w.Header(), w.Body)
	}
	if w := ready(); w.Code != 400 || !strings.Contains(w.Body.String(), "cordoned") {
		t.Errorf("cordoned, ready: status %d, %s", w.Code, w.Body)
	}
	if err := e.Throttle(t.Context(), engine.Throttle{}); err != nil {
		t.Fatal(err)
	}
	if w := post("/v2/models/live/infer", body); w.Code != 200 {
		t.Errorf("open again: status %d, body %s", w.Code, w.Body)
	}
}

func BenchmarkResolve(b *testing.B) {
	s := New(&leaving{then: func() {}}, nil)
	s.SetServing(map[string]int64{"digits": 1})
	s.SetRoutes("g", []*dunlinv1.DesiredRoute{r("live", "digits")}, nil)
	req := request("live", 0)
	t := s.table.Load()
	b.ReportAllocs()
	for b.Loop() {
		if _, err := t.resolve(req, 1, new(choice)); err != nil {
			b.Fatal(err)
		}
	}
}

// What stands by for a version answers where that fails, unless the request is
// at fault or has named the version; and a model between two versions keeps its
// requests waiting.
func TestStandby(t *testing.T) {
	bad := engine.VersionID{Model: "m", Version: 2}
	e := startEngine(t, adder{fail: func(id engine.VersionID) error {
		if id == bad {
			return errors.New("it fails")
		}
		return nil
	}})
	load(t, e, "m", 1)
	load(t, e, "m", 2)
	s := New(e, nil)
	s.SetServing(map[string]int64{"m": 2})
	if _, err := s.Infer(t.Context(), request("m", 0)); err == nil {
		t.Error("it does not fail")
	}
	s.SetStandby(map[string]int64{"m": 1}, nil)
	a, err := s.Infer(t.Context(), request("m", 0))
	if err != nil || a.Version != 1 || a.Outputs[0].Data[0] != 11 || a.Header[HeaderVersion] != "m:1" {
		t.Errorf("%+v, %v", a, err)
	}
	if _, err := s.Infer(t.Context(), request("m", 2)); err == nil {
		t.Error("version 2 was asked for, and another answered")
	}
	wrong := request("m", 0)
	wrong.Inputs[0].Name = "z"
	if _, err := s.Infer(t.Context(), wrong); codeOf(err) != oip.InvalidArgument {
		t.Errorf("a wrong request: %v", err)
	}
	if failed := e.Versions()[1].Figures.Failure.Count; failed != 3 {
		t.Errorf("%d failures are counted of version 2, want 3", failed)
	}
}

func TestWaitsForVersion(t *testing.T) {
	e := startEngine(t, adder{})
	load(t, e, "m", 1)
	s := New(e, nil)
	s.SetStandby(nil, map[string]bool{"m": true})
	answers := make(chan int64, 10)
	var wg sync.WaitGroup
	for range 10 {
		wg.Go(func() {
			a, err := s.Infer(t.Context(), request("m", 0))
			if err != nil {
				t.Error(err)
			}
			answers <- a.Version
		})
	}
	for len(s.places) < 10 { // all wait
		runtime.Gosched()
	}
	s.SetStandby(nil, map[string]bool{"m": true, "other": true}) // no news for them
	s.SetServing(map[string]int64{"m": 1})
	s.SetStandby(nil, nil)
	wg.Wait()
	for range 10 {
		if v := <-answers; v != 1 {
			t.Errorf("version %d answers", v)
		}
	}
	// One whose time is out goes, and one for whom there is no place is told to
	// come again.
	s.SetServing(nil)
	s.SetStandby(nil, map[string]bool{"m": true})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.Infer(ctx, request("m", 0)); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	for range maxWaiting {
		s.places <- struct{}{}
	}
	_, err := s.Infer(t.Context(), request("m", 0))
	if refused, ok := errors.AsType[*oip.Error](err); !ok || refused.Code != oip.Unavailable || refused.RetryAfter != changeRetry {
		t.Errorf("%v", err)
	}
	s.SetStandby(nil, nil)
	if _, err := s.Infer(t.Context(), request("m", 0)); codeOf(err) != oip.NotFound {
		t.Errorf("nothing serves it, and nothing comes: %v", err)
	}
}
