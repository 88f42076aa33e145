package repository

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/dunlin/dunlin/agent/engine"
)

// TestRuntimeComesLate starts without a runtime.
func TestRuntimeComesLate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		tree(t, dir, map[string]string{"m/1": "a", "n/1": "b"})
		fake := newFake()
		away := fmt.Errorf("%w: no library", engine.ErrUnavailable)
		fake.fail = func(string, engine.VersionID) error { return away }
		f := start(t, Config{Dir: dir, Control: Explicit, Startup: []string{"*"}}, fake)
		time.Sleep(10 * time.Second)
		if err := f.Ready(); err == nil || !strings.HasPrefix(err.Error(), "model m: version 1: the runtime is not available: no library; model n: ") {
			t.Errorf("got %v", err)
		}
		if log := f.take(); strings.Count(log, "level=WARN") != 2 || strings.Contains(log, "level=ERROR") {
			t.Errorf("log %s", log)
		}
		if err := f.Repository.Unload(t.Context(), "n"); err != nil { // it is not wanted any more
			t.Error(err)
		}
		f.setFail(nil)
		time.Sleep(lastRetry)
		if err := f.Ready(); err != nil {
			t.Error(err)
		}
		if got := f.versions(); got != "m:1" {
			t.Errorf("loaded %s", got)
		}
	})
}

func TestLost(t *testing.T) {
	id := engine.VersionID{Model: "m", Version: 2}
	tests := []struct {
		name   string
		fail   error // of loading it again
		reason error // nil: the worker died
		index  string
		serves int64
	}{
		{"comes back", nil, nil, "m:1 READY, m:2 READY", 2},
		{"does not", errors.New("crash"), nil, "m:1 READY, m:2 UNAVAILABLE version 2: crash", 1},
		{"not yet", engine.ErrUnavailable, nil, "m:1 READY, m:2 UNAVAILABLE version 2: the runtime is not available", 1},
		{"is in quarantine", nil, engine.ErrQuarantined, "m:1 READY, m:2 UNAVAILABLE lost: version is in quarantine", 1},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				dir := t.TempDir()
				tree(t, dir, map[string]string{"m/1": "a", "m/2": "b", "m/config.pbtxt": `version_policy { all {} }`})
				fake := newFake()
				f := start(t, Config{Dir: dir}, fake)
				synctest.Wait()
				f.setFail(func(op string, _ engine.VersionID) error {
					if op == "check" {
						return tt.fail
					}
					return nil
				})
				f.Lost(id, cmp.Or(tt.reason, errors.New("the worker died")))
				synctest.Wait()
				if got := f.index(t); got != tt.index || f.serving["m"] != tt.serves {
					t.Errorf("index %s, serving %v", got, f.serving)
				}
				said := `msg="version lost; it is loaded again" model=m version=2 error="the worker died"`
				if tt.reason != nil {
					said = `msg="version put into quarantine; loading it again by hand gives it another try" model=m version=2 error="version is in quarantine"`
				}
				if log := f.take(); !strings.Contains(log, said) {
					t.Errorf("log %s", log)
				}
				f.setFail(nil)
				time.Sleep(lastRetry)
				synctest.Wait()
				if got, want := f.serving["m"], tt.serves; tt.reason == nil && tt.fail == nil || errors.Is(tt.fail, engine.ErrUnavailable) {
					if got != 2 {
						t.Errorf("version %d serves", got)
					}
				} else if got != want {
					t.Errorf("version %d serves, want %d", got, want)
				}
				f.Lost(engine.VersionID{Model: "unknown", Version: 1}, errors.New("?"))
				f.Lost(engine.VersionID{Model: "m", Version: 9}, errors.New("?"))
				synctest.Wait()
			})
		})
	}
}

func TestPoll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake := newFake()
		f := start(t, Config{Control: Poll, Poll: 5 * time.Second}, fake)
		look := func(index string) {
			t.Helper()
			time.Sleep(5 * time.Second)
			synctest.Wait()
			if got := f.index(t); got != index {
				t.Errorf("index %s\nwant %s", got, index)
			}
		}
		look("")
		tree(t, f.dir, map[string]string{"m/1": "a"})
		look("m:1 READY")
		tree(t, f.dir, map[string]string{"m/2": "b", "n/1": "c"})
		look("m:1 UNAVAILABLE unloaded, m:2 READY, n:1 READY")
		f.take()
		calls := len(f.fake.calls)
		look("m:1 UNAVAILABLE unloaded, m:2 READY, n:1 READY")
		tree(t, f.dir, map[string]string{"m/3/model.onnx": "bro"})
		reason := "version 3: model.onnx: not an ONNX model: field 12 at byte 0 has 114 bytes, only 1 are left"
		for range 3 {
			look("m:1 UNAVAILABLE unloaded, m:2 READY serves on; the last load failed: " + reason + ", m:3 UNAVAILABLE " + reason + ", n:1 READY")
		}
		if log := f.take(); strings.Count(log, "level=ERROR") != 1 || len(f.fake.calls) != calls {
			t.Errorf("%d calls, log %s", len(f.fake.calls)-calls, log)
		}
		tree(t, f.dir, map[string]string{"m/3": "d"})
		look("m:2 UNAVAILABLE unloaded, m:3 READY, n:1 READY")
		if err := os.RemoveAll(filepath.Join(f.dir, "m", "3")); err != nil {
			t.Fatal(err)
		}
		look("m:2 READY, m:3 UNAVAILABLE unloaded, n:1 READY")
		if err := os.RemoveAll(filepath.Join(f.dir, "m")); err != nil {
			t.Fatal(err)
		}
		look("n:1 READY")
		if len(f.models) != 1 {
			t.Errorf("%d models are remembered", len(f.models))
		}
		if err := os.Rename(f.dir, f.dir+".away"); err != nil {
			t.Fatal(err)
		}
		time.Sleep(5 * time.Second)
		synctest.Wait()
		if got := f.versions(); got != "n:1" {
			t.Errorf("loaded %s after the folder has gone", got)
		}
		if log := f.take(); !strings.Contains(log, "the model repository cannot be read; what is loaded stays") {
			t.Errorf("log %s", log)
		}
		if err := os.Rename(f.dir+".away", f.dir); err != nil {
			t.Fatal(err)
		}
		look("n:1 READY")
	})
}

// TestPollGoesOn looks at the folder while a load takes its time.
func TestPollGoesOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake := newFake()
		f := start(t, Config{Control: Poll, Poll: 5 * time.Second}, fake)
		held := make(chan struct{})
		f.setFail(func(_ string, id engine.VersionID) error {
			if id.Model == "stuck" {
				<-held
			}
			return nil
		})
		tree(t, f.dir, map[string]string{"stuck/1": "a"})
		time.Sleep(6 * time.Second)
		tree(t, f.dir, map[string]string{"m/1": "a"})
		time.Sleep(6 * time.Second)
		synctest.Wait()
		if got := f.index(t); got != "m:1 READY, stuck:1 LOADING" {
			t.Errorf("index %s", got)
		}
		close(held)
		synctest.Wait()
		if got := f.index(t); got != "m:1 READY, stuck:1 READY" {
			t.Errorf("index %s", got)
		}
	})
}
