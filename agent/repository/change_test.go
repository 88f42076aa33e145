package repository

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/dunlin/dunlin/agent/engine"
	"github.com/dunlin/dunlin/agent/oip"
)

// TestFailedLoadChangesNothing fails each step of a load that brings a new
// version, replaces two and keeps one from before: what was loaded is loaded
// still, and serves.
func TestFailedLoadChangesNothing(t *testing.T) {
	changes := map[string]map[string]string{
		"options": {"m/4": "b", "m/config.pbtxt": `version_policy { latest { num_versions: 3 } } max_batch_size: 4`},
		"files":   {"m/4": "b", "m/2": "b", "m/3": "b"},
	}
	for what, change := range changes {
		for _, step := range []string{"check m:2", "check m:3", "check m:4", "load m:4", "replace m:2", "replace m:3"} {
			t.Run(what+"/"+step, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					f := start(t, Config{Control: Explicit}, newFake())
					tree(t, f.dir, map[string]string{"m/1": "a", "m/2": "a", "m/3": "a", "m/config.pbtxt": `version_policy { latest { num_versions: 3 } }`})
					if err := f.Repository.Load(t.Context(), "m", oip.Override{}); err != nil {
						t.Fatal(err)
					}
					failLoad(t, f, change, step, what == "files")
				})
			})
		}
	}
}

// failLoad has a load fail at one step. gone says that the change takes away
// the files that were loaded: a version that has been touched is then new, as
// the package's comment says.
func failLoad(t *testing.T, f fixture, change map[string]string, step string, gone bool) {
	want := f.contents()
	tree(t, f.dir, change)
	failed := false
	f.setFail(func(op string, id engine.VersionID) error {
		if !failed && op+" "+id.String() == step {
			failed = true
			return errors.New("failure")
		}
		return nil
	})
	f.fake.take()
	err := f.Repository.Load(t.Context(), "m", oip.Override{})
	calls := f.fake.take()
	if !failed {
		t.Errorf("the engine was not asked for this, but for %v", calls)
	}
	if err == nil || !strings.HasPrefix(err.Error(), `load model "m": version `) || !strings.HasSuffix(err.Error(), "failure") {
		t.Errorf("got %v", err)
	}
	got := f.contents()
	for id := range want {
		if gone && slices.Contains(calls, "replace "+id) && step != "replace "+id {
			want[id] = got[id]
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("after %v: %s", calls, diff)
	}
	if f.serving["m"] != 3 {
		t.Errorf("%v serves, want 3", f.serving)
	}
	if err := f.Ready(); err != nil {
		t.Error(err)
	}
	f.setFail(nil)
	if err := f.Repository.Load(t.Context(), "m", oip.Override{}); err != nil {
		t.Error(err)
	}
	if got := f.versions(); got != "m:2 m:3 m:4" || f.serving["m"] != 4 {
		t.Errorf("loaded %s, serving %v", got, f.serving)
	}
	for id, c := range f.contents() {
		if now, err := os.ReadFile(filepath.Join(f.dir, "m", strings.TrimPrefix(id, "m:"), "model.onnx")); err != nil || !strings.HasPrefix(c, string(now)) {
			t.Errorf("%s is not what is in the folder", id)
		}
	}
}

// contents gives the bytes and the options of what is loaded and can run.
func (f *fake) contents() map[string]string {
	f.mu.Lock()
	defer f.mu.Unlock()
	all := map[string]string{}
	for id, c := range f.loaded {
		if !f.draining[id] {
			all[id.String()] = c.bytes
			if c.spec.Options != nil {
				all[id.String()] += fmt.Sprintf(" %+v", *c.spec.Options)
			}
		}
	}
	return all
}

// TestSwap replaces a version by another of its number.
func TestSwap(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := start(t, Config{Control: Explicit}, newFake())
		tree(t, f.dir, map[string]string{"m/1": "a"})
		load := func() {
			t.Helper()
			if err := f.Repository.Load(t.Context(), "m", oip.Override{}); err != nil {
				t.Fatal(err)
			}
		}
		load()
		f.fake.take()
		want := []string{"check m:1", "replace m:1"}
		tree(t, f.dir, map[string]string{"m/1": "b"})
		load()
		if got := f.fake.take(); !slices.Equal(got, want) {
			t.Errorf("calls %v, want %v", got, want)
		}
		tree(t, f.dir, map[string]string{"m/config.pbtxt": "max_batch_size: 4"})
		load()
		id := engine.VersionID{Model: "m", Version: 1}
		if got := f.fake.take(); !slices.Equal(got, want) || f.loaded[id].spec.Options.MaxBatchSize != 4 {
			t.Errorf("calls %v with %+v", got, f.loaded[id].spec)
		}
		tree(t, f.dir, map[string]string{"m/config.pbtxt": "max_batch_size: 4 # a comment", "m/notes.txt": "x"})
		load()
		if got := f.fake.take(); got != nil {
			t.Errorf("calls %v for nothing", got)
		}
	})
}

// TestLostGeneration loses versions that another one has taken the place of,
// which changes nothing, and then the one in their place.
func TestLostGeneration(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := start(t, Config{Control: Explicit}, newFake())
		var ids []engine.VersionID
		for _, files := range []map[string]string{
			{"m/1": "a"}, {"m/1": "b"}, {"m/config.pbtxt": "max_batch_size: 4"},
			{"m/config.pbtxt": "max_batch_size: 4 # the same"}, // not loaded again
		} {
			tree(t, f.dir, files)
			if err := f.Repository.Load(t.Context(), "m", oip.Override{}); err != nil {
				t.Fatal(err)
			}
			ids = append(ids, f.loaded[engine.VersionID{Model: "m", Version: 1}].id)
		}
		if ids[0] == ids[1] || ids[1] == ids[2] || ids[2] != ids[3] {
			t.Errorf("loaded by the ids %+v", ids)
		}
		f.fake.take()
		for _, id := range ids[:2] {
			f.Lost(id, errors.New("the worker died"))
		}
		synctest.Wait()
		if got := f.fake.take(); got != nil || f.index(t) != "m:1 READY" {
			t.Errorf("calls %v, index %s", got, f.index(t))
		}
		f.Lost(ids[3], errors.New("the worker died"))
		synctest.Wait()
		if got, want := f.fake.take(), []string{"unload m:1", "check m:1", "load m:1"}; !slices.Equal(got, want) || f.index(t) != "m:1 READY" {
			t.Errorf("calls %v, want %v; index %s", got, want, f.index(t))
		}
	})
}

// TestOthersGoOn loads a model while the load of another one takes its time.
func TestOthersGoOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake := newFake()
		f := start(t, Config{Control: Explicit}, fake)
		tree(t, f.dir, map[string]string{"a/1": "a", "b/1": "b"})
		held := make(chan struct{})
		f.setFail(func(op string, id engine.VersionID) error {
			if id.Model == "a" {
				<-held
			}
			return nil
		})
		var wg sync.WaitGroup
		for range 3 { // one at work, and two that wait for their turn
			wg.Go(func() {
				if err := f.Repository.Load(t.Context(), "a", oip.Override{}); err != nil {
					t.Error(err)
				}
			})
		}
		synctest.Wait()
		if got := f.index(t); got != "a:1 LOADING, b" {
			t.Errorf("index %s", got)
		}
		if err := f.Repository.Load(t.Context(), "b", oip.Override{}); err != nil {
			t.Error(err)
		}
		if err := f.Repository.Unload(t.Context(), "b"); err != nil {
			t.Error(err)
		}
		close(held)
		wg.Wait()
		if got := f.index(t); got != "a:1 READY, b:1 UNAVAILABLE unloaded" {
			t.Errorf("index %s", got)
		}
	})
}

func TestUnloading(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake := newFake()
		f := start(t, Config{Control: Explicit}, fake)
		tree(t, f.dir, map[string]string{"m/1": "a"})
		if err := f.Repository.Load(t.Context(), "m", oip.Override{}); err != nil {
			t.Fatal(err)
		}
		drained := make(chan error)
		f.setFail(func(op string, id engine.VersionID) error { return <-drained })
		done := make(chan error)
		go func() { done <- f.Repository.Unload(t.Context(), "m") }()
		synctest.Wait()
		if got := f.index(t); got != "m:1 UNLOADING" || len(f.serving) > 0 {
			t.Errorf("index %s, serving %v", got, f.serving)
		}
		drained <- errors.New("no answer")
		if err := <-done; err == nil || err.Error() != `unload model "m": unload m:1: no answer` {
			t.Errorf("got %v", err)
		}
		if got := f.index(t); got != "m:1 UNAVAILABLE unload m:1: no answer" {
			t.Errorf("index %s", got)
		}
		f.setFail(nil)
		if err := f.Repository.Load(t.Context(), "m", oip.Override{}); err != nil {
			t.Error(err)
		}
		if got := f.index(t); got != "m:1 READY" {
			t.Errorf("index %s", got)
		}
	})
}

// TestHalfALoadStays has a load fail, and the unload of what it had loaded too:
// the next load takes that away first.
func TestHalfALoadStays(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := start(t, Config{Control: Explicit}, newFake())
		tree(t, f.dir, map[string]string{"m/1": "a", "m/2": "a", "m/config.pbtxt": `version_policy { all {} }`})
		f.setFail(func(op string, id engine.VersionID) error {
			if op == "load" && id.Version == 2 || op == "unload" {
				return errors.New("failure")
			}
			return nil
		})
		if err := f.Repository.Load(t.Context(), "m", oip.Override{}); err == nil {
			t.Error("no error")
		}
		if got := f.index(t); got != "m:1 UNAVAILABLE version 2: load m:2: failure, m:2 UNAVAILABLE version 2: load m:2: failure" || len(f.serving) > 0 {
			t.Errorf("index %s, serving %v", got, f.serving)
		}
		if err := f.Repository.Load(t.Context(), "m", oip.Override{}); err == nil || err.Error() != `load model "m": unload m:1: failure` {
			t.Errorf("got %v", err)
		}
		f.setFail(nil)
		if err := f.Repository.Load(t.Context(), "m", oip.Override{}); err != nil {
			t.Error(err)
		}
		if got := f.index(t); got != "m:1 READY, m:2 READY" || f.serving["m"] != 2 {
			t.Errorf("index %s, serving %v", got, f.serving)
		}
	})
}

// TestCallerLeaves shows that a load that has begun is done, and one that has
// not is not.
func TestCallerLeaves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake := newFake()
		f := start(t, Config{Control: Explicit}, fake)
		tree(t, f.dir, map[string]string{"m/1": "a"})
		held := make(chan error)
		f.setFail(func(string, engine.VersionID) error { return <-held })
		ctx, leave := context.WithCancel(t.Context())
		done := make(chan error, 3)
		go func() { done <- f.Repository.Load(ctx, "m", oip.Override{}) }()
		synctest.Wait()
		go func() { done <- f.Repository.Unload(ctx, "m") }()
		brought := oip.Override{Config: []byte(`{}`), Files: map[string][]byte{"2/model.onnx": modelBytes(2)}}
		go func() { done <- f.Repository.Load(ctx, "m", brought) }()
		synctest.Wait()
		leave()
		for range 3 {
			if err := <-done; !errors.Is(err, context.Canceled) {
				t.Errorf("got %v", err)
			}
		}
		held <- nil // the check
		held <- nil // the load
		synctest.Wait()
		if got := f.index(t); got != "m:1 READY" {
			t.Errorf("index %s", got)
		}
		if n, left := f.pending.Load(), stagedFolders(t, f.Repository); n != 0 || left != 0 {
			t.Errorf("%d calls are pending, %d folders are left", n, left)
		}
		f.setFail(nil)
	})
}

func TestPendingIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake := newFake()
		f := start(t, Config{Control: Explicit}, fake)
		tree(t, f.dir, map[string]string{"m/1": "a"})
		held := make(chan struct{})
		f.setFail(func(string, engine.VersionID) error { <-held; return nil })
		var wg sync.WaitGroup
		for range maxPending {
			wg.Go(func() {
				if err := f.Repository.Load(t.Context(), "m", oip.Override{}); err != nil {
					t.Error(err)
				}
			})
		}
		synctest.Wait()
		err := f.Repository.Load(t.Context(), "m", oip.Override{})
		if e, ok := errors.AsType[*oip.Error](err); !ok || e.Code != oip.Unavailable || e.RetryAfter == 0 {
			t.Errorf("got %v", err)
		}
		close(held)
		wg.Wait()
		if err := f.Repository.Unload(t.Context(), "m"); err != nil {
			t.Error(err)
		}
	})
}

// TestTwoAtATime bounds how many models are loaded at a time.
func TestTwoAtATime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		for i := range 10 {
			tree(t, dir, map[string]string{fmt.Sprintf("m%d/1", i): "a"})
		}
		fake := newFake()
		var mu sync.Mutex
		now, most := 0, 0
		fake.fail = func(string, engine.VersionID) error {
			mu.Lock()
			now++
			most = max(most, now)
			mu.Unlock()
			time.Sleep(time.Second)
			mu.Lock()
			now--
			mu.Unlock()
			return nil
		}
		f := start(t, Config{Dir: dir}, fake)
		synctest.Wait()
		if err := f.Ready(); err == nil || !strings.Contains(err.Error(), "model m0: is being loaded; ") || !strings.HasSuffix(err.Error(), "; and 2 more") {
			t.Errorf("got %v", err)
		}
		time.Sleep(time.Minute)
		if err := f.Ready(); err != nil || most != maxLoading {
			t.Errorf("%v; %d at a time, want %d", err, most, maxLoading)
		}
	})
}
