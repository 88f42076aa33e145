package repository

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/dunlin/dunlin/agent/engine"
	"github.com/dunlin/dunlin/agent/oip"
)

// stagedFolders counts the folders of what callers brought.
func stagedFolders(t testing.TB, r *Repository) int {
	t.Helper()
	entries, err := os.ReadDir(r.cfg.Staging)
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

func TestOverrides(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		staging := filepath.Join(t.TempDir(), "staging")
		tree(t, staging, map[string]string{"left/over.txt": "x", "left.txt": "y"})
		fake := newFake()
		f := start(t, Config{Control: Explicit, Staging: staging}, fake)
		if n := stagedFolders(t, f.Repository); n != 0 {
			t.Errorf("%d folders are left at start", n)
		}
		tree(t, f.dir, map[string]string{"m/1": "a", "m/2": "b", "m/config.pbtxt": "max_batch_size: 2"})
		load := func(name string, o oip.Override) {
			t.Helper()
			if err := f.Repository.Load(t.Context(), name, o); err != nil {
				t.Fatal(err)
			}
		}
		version := func(model string, n int64) content {
			return f.loaded[engine.VersionID{Model: model, Version: n}]
		}
		load("m", oip.Override{})
		load("m", oip.Override{Config: []byte(`{"max_batch_size": 4, "versionPolicy": {"specific": {"versions": [1]}}}`)})
		if got := f.versions(); got != "m:1" || version("m", 1).spec.Options.MaxBatchSize != 4 {
			t.Errorf("loaded %s, %+v", got, version("m", 1).spec)
		}
		load("m", oip.Override{}) // an override is for one load
		if got := f.versions(); got != "m:2" || version("m", 2).spec.Options.MaxBatchSize != 2 {
			t.Errorf("loaded %s, %+v", got, version("m", 2).spec)
		}

		brought := oip.Override{
			Config: []byte(`{"backend": "onnxruntime", "output": [{"name": "y", "label_filename": "labels.txt"}]}`),
			Files:  map[string][]byte{"7/model.onnx": modelBytes(7), "labels.txt": []byte("a\nb\n")},
		}
		for range 2 { // each is loaded anew
			load("m", brought)
			if got := version("m", 7); f.versions() != "m:7" || got.bytes != string(modelBytes(7)) || len(got.spec.Labels["y"]) != 2 || stagedFolders(t, f.Repository) != 1 {
				t.Errorf("loaded %s, %+v, %d folders", f.versions(), got.spec, stagedFolders(t, f.Repository))
			}
		}
		load("new", brought) // which is not in the folder
		if got := f.index(t); got != "m:2 UNAVAILABLE unloaded, m:7 READY, new:7 READY" && got != "m:7 READY, new:7 READY" {
			t.Errorf("index %s", got)
		}
		if n := stagedFolders(t, f.Repository); n != 2 {
			t.Errorf("%d folders", n)
		}
		bad := oip.Override{Config: []byte(`{}`), Files: map[string][]byte{"8/model.onnx": []byte("broken")}}
		if err := f.Repository.Load(t.Context(), "m", bad); oip.CodeOf(err) != oip.InvalidArgument {
			t.Errorf("got %v", err)
		}
		if got := f.versions(); got != "m:7 new:7" || stagedFolders(t, f.Repository) != 2 {
			t.Errorf("loaded %s, %d folders", got, stagedFolders(t, f.Repository))
		}
		load("m", oip.Override{})
		if got := f.versions(); got != "m:2 new:7" || stagedFolders(t, f.Repository) != 1 {
			t.Errorf("loaded %s, %d folders", got, stagedFolders(t, f.Repository))
		}
		if err := f.Repository.Unload(t.Context(), "new"); err != nil {
			t.Error(err)
		}
		if got := f.index(t); strings.Contains(got, "new") || stagedFolders(t, f.Repository) != 0 || len(f.models) != 1 {
			t.Errorf("index %s, %d folders, %d models", got, stagedFolders(t, f.Repository), len(f.models))
		}
	})
}

// TestOverrideIsLost shows that a version that was brought and is lost is
// loaded again from what was brought.
func TestOverrideIsLost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := start(t, Config{Control: Explicit}, newFake())
		o := oip.Override{Config: []byte(`{}`), Files: map[string][]byte{"1/model.onnx": modelBytes(1)}}
		if err := f.Repository.Load(t.Context(), "m", o); err != nil {
			t.Fatal(err)
		}
		f.Lost(engine.VersionID{Model: "m", Version: 1}, errors.New("died"))
		synctest.Wait()
		if got := f.versions(); got != "m:1" || stagedFolders(t, f.Repository) != 1 {
			t.Errorf("loaded %s, %d folders", got, stagedFolders(t, f.Repository))
		}
	})
}

func TestOverridesRefused(t *testing.T) {
	one := map[string][]byte{"1/model.onnx": modelBytes(1)}
	named := func(names ...string) map[string][]byte {
		m := map[string][]byte{}
		for _, n := range names {
			m[n] = modelBytes(1)
		}
		return m
	}
	many := map[string][]byte{}
	for i := range maxStagedFiles + 1 {
		many["1/"+strings.Repeat("x", i%200)+string(rune('a'+i/200))] = nil
	}
	tests := []struct {
		name string
		give oip.Override
		want string
		code oip.Code
	}{
		{"no configuration", oip.Override{Files: one}, "files can be given with the parameter config only", oip.InvalidArgument},
		{"no JSON", oip.Override{Config: []byte(`{"foo": 1}`)}, `parameter config: 1:2: unknown field "foo"`, oip.InvalidArgument},
		{"not served", oip.Override{Config: []byte(`{"backend": "python"}`)}, `parameter config: backend is "python"`, oip.InvalidArgument},
		{"another name", oip.Override{Config: []byte(`{"name": "n"}`)}, `parameter config: name is "n", the model is called "m"`, oip.InvalidArgument},
		{"labels from elsewhere", oip.Override{Config: []byte(`{"output": [{"name": "y", "label_filename": "../n/labels.txt"}]}`)}, `label_filename is "../n/labels.txt", which is not in the model's folder`, oip.InvalidArgument},
		{"a model from elsewhere", oip.Override{Config: []byte(`{"default_model_filename": "../../n/1/model.onnx"}`)}, `which is not the name of a file in the version's folder`, oip.InvalidArgument},
		{"leaves the folder", oip.Override{Config: []byte(`{}`), Files: named("../m/1/model.onnx")}, `file "../m/1/model.onnx": the path is not one of a file in the model's folder`, oip.InvalidArgument},
		{"absolute", oip.Override{Config: []byte(`{}`), Files: named("/1/model.onnx")}, "the path is not one of a file", oip.InvalidArgument},
		{"not clean", oip.Override{Config: []byte(`{}`), Files: named("1//model.onnx")}, "the path is not one of a file", oip.InvalidArgument},
		{"control character", oip.Override{Config: []byte(`{}`), Files: named("1/\x00")}, "the path is not one of a file", oip.InvalidArgument},
		{"backslash", oip.Override{Config: []byte(`{}`), Files: named(`1\model.onnx`)}, "the path is not one of a file", oip.InvalidArgument},
		{"empty path", oip.Override{Config: []byte(`{}`), Files: named("")}, "the path has 0 bytes", oip.InvalidArgument},
		{"long path", oip.Override{Config: []byte(`{}`), Files: named("1/" + strings.Repeat("x", 254))}, "the path has 256 bytes, allowed are 1 to 255", oip.InvalidArgument},
		{"file and folder", oip.Override{Config: []byte(`{}`), Files: named("1", "1/model.onnx")}, "another file is where its folder would be", oip.InvalidArgument},
		{"no version", oip.Override{Config: []byte(`{}`), Files: named("model.onnx")}, "has no folder of a version", oip.InvalidArgument},
		{"many files", oip.Override{Config: []byte(`{}`), Files: many}, "1025 files with 0 bytes, allowed are 1024 with", oip.TooLarge},
		{"nothing", oip.Override{Config: []byte(`{}`), Files: map[string][]byte{}}, "has no folder of a version", oip.InvalidArgument},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := start(t, Config{Control: Explicit}, newFake())
				tree(t, f.dir, map[string]string{"m/1": "a", "n/1": "b", "n/labels.txt": "secret"})
				err := f.Repository.Load(t.Context(), "m", tt.give)
				if err == nil || !strings.Contains(err.Error(), tt.want) || oip.CodeOf(err) != tt.code {
					t.Errorf("got %v with code %v, want %s", err, oip.CodeOf(err), tt.want)
				}
				if n := stagedFolders(t, f.Repository); n != 0 {
					t.Errorf("%d folders are left", n)
				}
				if n := f.pending.Load(); n != 0 {
					t.Errorf("%d calls are pending", n)
				}
			})
		})
	}
}

func TestNoStaging(t *testing.T) {
	s, err := newStaging("")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.override(oip.Override{Config: []byte(`{}`), Files: map[string][]byte{"1/model.onnx": nil}}); oip.CodeOf(err) != oip.Unsupported {
		t.Errorf("got %v", err)
	}
	if o, err := s.override(oip.Override{Config: []byte(`{"max_batch_size": 3}`)}); err != nil || o.config.GetMaxBatchSize() != 3 {
		t.Errorf("got %v, %v", o, err)
	}
}
