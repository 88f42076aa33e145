package repository

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/dunlin/dunlin/agent/engine"
	"github.com/dunlin/dunlin/models/onnxwriter"
	"github.com/dunlin/dunlin/models/tensor"
)

// fake is an engine and what is in front of it. It keeps what the real ones
// promise, fails where it is told to, and checks that what serves is loaded.
type fake struct {
	mu       sync.Mutex
	loaded   map[engine.VersionID]content
	draining map[engine.VersionID]bool // unloading has failed
	serving  map[string]int64
	calls    []string // "load m:1", in order
	faults   []string // broken promises
	replaced uint64   // how often one was put in the place of another
	checks   []engine.VersionID

	// fail, where not nil, gives the error of a call: "check", "load",
	// "replace" or "unload". It may wait.
	fail func(op string, id engine.VersionID) error
}

// content is what is loaded: the bytes of the model, by the id of the runtime.
type content struct {
	id    engine.VersionID
	spec  engine.Spec
	bytes string
}

func newFake() *fake {
	return &fake{loaded: map[engine.VersionID]content{}, draining: map[engine.VersionID]bool{}}
}

// failing asks for the error of a call.
func (f *fake) failing(op string, id engine.VersionID) error {
	f.mu.Lock()
	f.calls = append(f.calls, op+" "+id.String())
	fail := f.fail
	f.mu.Unlock()
	if fail == nil {
		return nil
	}
	return fail(op, id)
}

// check looks at what serves; f.mu is held.
func (f *fake) verify(after string) {
	for model, n := range f.serving {
		id := engine.VersionID{Model: model, Version: n}
		if _, ok := f.loaded[id]; !ok || f.draining[id] {
			f.faults = append(f.faults, fmt.Sprintf("after %s, %s serves and is not loaded", after, id))
		}
	}
}

func (f *fake) Check(_ context.Context, s engine.Spec) (engine.Info, error) {
	err := f.failing("check", s.ID)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.checks = append(f.checks, s.ID)
	return engine.Info{}, err
}

func (f *fake) Load(ctx context.Context, s engine.Spec) (engine.Info, error) {
	err := f.failing("load", s.ID)
	b, read := os.ReadFile(filepath.Join(s.Dir, s.Entry))
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case err != nil:
		return engine.Info{}, fmt.Errorf("load %s: %w", s.ID, err)
	case ctx.Err() != nil:
		return engine.Info{}, ctx.Err()
	case read != nil:
		return engine.Info{}, read
	case f.draining[s.ID]:
		return engine.Info{}, engine.ErrDraining
	}
	if _, ok := f.loaded[s.ID]; !ok { // a loaded version stays as it is
		f.loaded[s.ID] = content{s.ID, s, string(b)}
	}
	f.verify("load " + s.ID.String())
	return engine.Info{ID: f.loaded[s.ID].id}, nil
}

func (f *fake) Unload(_ context.Context, id engine.VersionID) error {
	err := f.failing("unload", id)
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, ok := f.loaded[id]; !ok {
		return fmt.Errorf("unload %s: %w", id, engine.ErrNotLoaded)
	}
	if err != nil {
		f.draining[id] = true
		f.verify("a failed unload of " + id.String())
		return fmt.Errorf("unload %s: %w", id, err)
	}
	delete(f.loaded, id)
	delete(f.draining, id)
	f.verify("unload " + id.String())
	return nil
}

func (f *fake) SetServing(versions map[string]int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.serving = maps.Clone(versions)
	f.verify("a switch")
}

func (f *fake) Replace(ctx context.Context, s engine.Spec) (engine.Info, error) {
	err := f.failing("replace", s.ID)
	b, read := os.ReadFile(filepath.Join(s.Dir, s.Entry))
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case f.draining[s.ID]:
		return engine.Info{}, engine.ErrDraining
	case err != nil:
		return engine.Info{}, fmt.Errorf("replace %s: %w", s.ID, err)
	case ctx.Err() != nil:
		return engine.Info{}, ctx.Err()
	case read != nil:
		return engine.Info{}, read
	}
	id := s.ID
	if _, ok := f.loaded[id]; ok {
		f.replaced++
		id.Generation = f.replaced
	}
	f.loaded[s.ID] = content{id, s, string(b)}
	return engine.Info{ID: id}, nil
}

// versions gives what is loaded and can run: "m:1 m:2".
func (f *fake) versions() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	var all []string
	for _, id := range slices.SortedFunc(maps.Keys(f.loaded), engine.VersionID.Compare) {
		if !f.draining[id] {
			all = append(all, id.String())
		}
	}
	return strings.Join(all, " ")
}

// take gives the calls since the last take.
func (f *fake) take() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	calls := f.calls
	f.calls = nil
	return calls
}

func (f *fake) setFail(fail func(op string, id engine.VersionID) error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.fail = fail
}

// model gives the bytes of an ONNX model that adds a number.
func modelBytes(add byte) []byte {
	return onnxwriter.Model{
		Opset: 17, Inputs: []onnxwriter.Value{onnxwriter.Float("x", -1, 1)}, Outputs: []onnxwriter.Value{onnxwriter.Float("y", -1, 1)},
		Weights: []onnxwriter.Weight{{Name: "w", Type: tensor.Float32, Shape: []int64{1}, Data: []byte{0, 0, add, 0x40}}},
		Nodes:   []onnxwriter.Node{{Op: "Add", In: []string{"x", "w"}, Out: []string{"y"}}},
	}.Marshal()
}

// place writes a file as it should be done: under another name first.
func place(file string, b []byte) error {
	return errors.Join(os.MkdirAll(filepath.Dir(file), 0o700), os.WriteFile(file+".new", b, 0o600), os.Rename(file+".new", file))
}

func put(t testing.TB, file string, b []byte) {
	t.Helper()
	if err := place(file, b); err != nil {
		t.Fatal(err)
	}
}

// tree writes models by "m/1" and files by their content.
func tree(t testing.TB, dir string, files map[string]string) {
	t.Helper()
	for name, text := range files {
		if filepath.Ext(name) == "" {
			put(t, filepath.Join(dir, name, "model.onnx"), modelBytes(text[0]))
		} else {
			put(t, filepath.Join(dir, name), []byte(text))
		}
	}
}

// logs keeps what is logged.
type logs struct {
	mu   sync.Mutex
	text strings.Builder
}

func (l *logs) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(b)
}

// take gives the lines since the last take.
func (l *logs) take() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	text := l.text.String()
	l.text.Reset()
	return text
}

func (l *logs) logger() *slog.Logger {
	return slog.New(slog.NewTextHandler(l, &slog.HandlerOptions{ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if a.Key == slog.TimeKey || a.Key == "took" {
			return slog.Attr{}
		}
		return a
	}}))
}

// fixture is a repository that runs until the test ends.
type fixture struct {
	*Repository
	*fake
	*logs
	dir string
}

// start runs a repository and waits until its initial loads are over.
func start(t testing.TB, cfg Config, f *fake) fixture {
	t.Helper()
	l := &logs{}
	if cfg.Dir == "" && cfg.File == "" {
		cfg.Dir = t.TempDir()
	}
	if cfg.Staging == "" {
		cfg.Staging = filepath.Join(t.TempDir(), "staging")
	}
	if cfg.Engine == nil {
		cfg.Engine = f
	}
	cfg.Check, cfg.Front, cfg.Log = f.Check, f, l.logger()
	r, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if f.faults != nil {
			t.Error(f.faults)
		}
	})
	fix := fixture{r, f, l, cfg.Dir}
	<-r.running
	return fix
}

// index writes the index in one line: "m:1 READY, m:2 UNAVAILABLE unloaded".
func (f fixture) index(t testing.TB) string {
	t.Helper()
	list, err := f.Index(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	for _, m := range list {
		line := m.Name
		if m.Version != "" {
			line += ":" + m.Version
		}
		all = append(all, strings.TrimSpace(strings.TrimSpace(line+" "+m.State)+" "+m.Reason))
	}
	return strings.Join(all, ", ")
}
