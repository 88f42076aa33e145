package repository

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/dunlin/dunlin/agent/engine"
	"github.com/dunlin/dunlin/agent/oip"
	"github.com/dunlin/dunlin/agent/worker"
)

// TestMain runs the tests, or is the child of one.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "worker" {
		os.Exit(worker.Child())
	}
	goleak.VerifyTestMain(m)
}

func TestNewRefuses(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "m.onnx")
	put(t, file, modelBytes(1))
	tests := []struct {
		give Config
		want string
	}{
		{Config{}, "one folder or one file"},
		{Config{Dir: dir, File: file}, "one folder or one file"},
		{Config{Dir: file}, "is not a folder"},
		{Config{File: dir}, "is not a file"},
		{Config{Dir: filepath.Join(dir, "none")}, "no such file or directory"},
		{Config{Dir: dir, Startup: []string{"m"}}, "with explicit model control only"},
		{Config{Dir: dir, Control: Explicit, Startup: []string{"*", "m"}}, `"*" loads all models at start`},
		{Config{Dir: dir, Control: Poll}, "looked at each 0s"},
	}
	for _, tt := range tests {
		if _, err := New(tt.give); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%+v: got %v, want %s", tt.give, err, tt.want)
		}
	}
}

func TestStart(t *testing.T) {
	files := map[string]string{
		"digits/1": "a", "digits/2": "b", "Simple_V2/7": "c", "densenet_onnx/1": "d",
		"densenet_onnx/config.pbtxt":      `platform: "onnxruntime_onnx" max_batch_size: 8`,
		"README.md":                       "no model",
		".git/HEAD.x":                     "left alone",
		"not a model!/1/x.txt":            "left alone",
		"densenet_onnx/notes/readme.txt":  "left alone",
		"densenet_onnx/007/also.txt":      "left alone",
		"digits/2/extra/deeper/data.bin":  "external data",
		"densenet_onnx/not-a-version.txt": "left alone",
	}
	tests := []struct {
		name    string
		control Control
		startup []string
		loaded  string
		index   string
	}{
		{"none", None, nil, "Simple_V2:7 densenet_onnx:1 digits:2", "Simple_V2:7 READY, densenet_onnx:1 READY, digits:2 READY"},
		{"poll", Poll, nil, "Simple_V2:7 densenet_onnx:1 digits:2", "Simple_V2:7 READY, densenet_onnx:1 READY, digits:2 READY"},
		{"explicit, nothing", Explicit, nil, "", "Simple_V2, densenet_onnx, digits"},
		{"explicit, one", Explicit, []string{"digits"}, "digits:2", "Simple_V2, densenet_onnx, digits:2 READY"},
		{"explicit, all", Explicit, []string{"*"}, "Simple_V2:7 densenet_onnx:1 digits:2", "Simple_V2:7 READY, densenet_onnx:1 READY, digits:2 READY"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				dir := t.TempDir()
				tree(t, dir, files)
				f := start(t, Config{Dir: dir, Control: tt.control, Startup: tt.startup, Poll: time.Hour}, newFake())
				synctest.Wait()
				if got := f.versions(); got != tt.loaded {
					t.Errorf("loaded %s, want %s", got, tt.loaded)
				}
				if got := f.index(t); got != tt.index {
					t.Errorf("index %s\nwant %s", got, tt.index)
				}
				if err := f.Ready(); err != nil {
					t.Error(err)
				}
			})
		})
	}
}

func TestReadyBeforeRun(t *testing.T) {
	r, err := New(Config{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Ready(); err == nil || err.Error() != "the model repository has not been read" {
		t.Errorf("got %v", err)
	}
}

func TestEmptyFolderIsReady(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := start(t, Config{}, newFake())
		synctest.Wait()
		if err := f.Ready(); err != nil {
			t.Error(err)
		}
	})
}

// TestPlan shows what is read from the folder.
func TestPlan(t *testing.T) {
	dims := `input [ { name: "x" data_type: TYPE_FP32 dims: [ 1 ] } ] output [ { name: "y" data_type: TYPE_FP32 dims: [ 1 ] label_filename: "labels.txt" } ]`
	tests := []struct {
		name   string
		files  map[string]string
		loaded string
		fault  string // why it is not ready
		log    string // part of
	}{
		{"latest", map[string]string{"m/1": "a", "m/2": "b", "m/10": "c"}, "m:10", "", `msg="model loaded" model=m version=10`},
		{"latest two", map[string]string{"m/1": "a", "m/2": "b", "m/10": "c", "m/config.pbtxt": `version_policy { latest { num_versions: 2 } }`}, "m:2 m:10", "", ""},
		{"all", map[string]string{"m/1": "a", "m/2": "b", "m/config.pbtxt": `version_policy { all {} }`}, "m:1 m:2", "", ""},
		{
			"specific", map[string]string{"m/1": "a", "m/2": "b", "m/config.pbtxt": `version_policy { specific { versions: [ 1, 5 ] } }`}, "m:1", "",
			`level=WARN msg="config.pbtxt: version_policy names version 5, which is not there" model=m`,
		},
		{
			"specific, none there", map[string]string{"m/2": "b", "m/config.pbtxt": `version_policy { specific { versions: 1 } }`}, "",
			"model m: config.pbtxt: version_policy names none of the versions that are there, [2]", "level=ERROR",
		},
		{"no version", map[string]string{"m/config.pbtxt": ``}, "", "model m: the folder of the model has no folder of a version, which is a number from 1 on", ""},
		{"leading zeros are no version", map[string]string{"m/01": "a"}, "", "model m: the folder of the model has no folder of a version, which is a number from 1 on", ""},
		{"another file", map[string]string{"m/1/net.onnx": string(modelBytes(1)), "m/config.pbtxt": `default_model_filename: "net.onnx"`}, "m:1", "", ""},
		{
			"another file, unnamed", map[string]string{"m/1/net.onnx": string(modelBytes(1))}, "",
			"model m: version 1: there is no model.onnx; there is net.onnx, which default_model_filename can name", "",
		},
		{"a folder for a file", map[string]string{"m/1/model.onnx/model.onnx": string(modelBytes(1))}, "m:1", "", ""},
		{"an empty version", map[string]string{"m/1/readme.txt": ""}, "", "model m: version 1: there is no model.onnx", ""},
		{"a name", map[string]string{"m/1": "a", "m/config.pbtxt": `name: "m"`}, "m:1", "", ""},
		{"another name", map[string]string{"m/1": "a", "m/config.pbtxt": `name: "n"`}, "", `model m: config.pbtxt: name is "n", the model is called "m"`, ""},
		{"what is no text", map[string]string{"m/1": "a", "m/config.pbtxt": "\nfoo: 1"}, "", "model m: config.pbtxt:2:1: unknown field: foo", ""},
		{"what is not served", map[string]string{"m/1": "a", "m/config.pbtxt": `backend: "python"`}, "", `model m: config.pbtxt: backend is "python", only "onnxruntime" is served`, ""},
		{"labels", map[string]string{"m/1": "a", "m/labels.txt": "one\r\ntwo\nthree", "m/config.pbtxt": `max_batch_size: 4 ` + dims}, "m:1", "", ""},
		{
			"no labels", map[string]string{"m/1": "a", "m/config.pbtxt": `max_batch_size: 4 ` + dims}, "",
			`model m: config.pbtxt: label_filename "labels.txt" of output "y": no such file or directory`, "",
		},
		{"labels that are not text", map[string]string{"m/1": "a", "m/labels.txt": "\xff", "m/config.pbtxt": `max_batch_size: 4 ` + dims}, "", `model m: config.pbtxt: label_filename "labels.txt" of output "y": not UTF-8`, ""},
		{
			"another shape", map[string]string{"m/1": "a", "m/labels.txt": "", "m/config.pbtxt": dims}, "",
			"model m: version 1: configuration: input \"x\" has dims [1], the model has [-1 1]; output \"y\" has dims [1], the model has [-1 1]", "",
		},
		{"no model", map[string]string{"m/1/model.onnx": "no model"}, "", "model m: version 1: model.onnx: ", ""},
		{
			"ignored fields", map[string]string{"m/1": "a", "m/config.pbtxt": `optimization { cuda { graphs: true } } model_warmup [ { name: "w" } ]`}, "m:1", "",
			`level=WARN msg="config.pbtxt: optimization.cuda is ignored: the agent chooses where models run" model=m`,
		},
		{"one of two", map[string]string{"a/1": "a", "b/x.txt": ""}, "a:1", "model b: the folder of the model has no folder of a version", `msg="model cannot be loaded" model=b`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				dir := t.TempDir()
				tree(t, dir, tt.files)
				f := start(t, Config{Dir: dir}, newFake())
				synctest.Wait()
				if got := f.versions(); got != tt.loaded {
					t.Errorf("loaded %s, want %s", got, tt.loaded)
				}
				err := f.Ready()
				if (err == nil) != (tt.fault == "") || err != nil && !strings.HasPrefix(err.Error(), tt.fault) {
					t.Errorf("ready: %v\nwant %s", err, tt.fault)
				}
				if log := f.take(); !strings.Contains(log, tt.log) {
					t.Errorf("log: %s\nwant %s", log, tt.log)
				}
			})
		})
	}
}

func (f fixture) take() string { return f.logs.take() }

func TestSpec(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		tree(t, dir, map[string]string{
			"m/3": "a", "m/labels.txt": "one\r\ntwo\nthree",
			"m/config.pbtxt": `max_batch_size: 4 instance_group { count: 2 } output [ { name: "y" label_filename: "labels.txt" } ]`,
			"n/1":            "b",
		})
		f := start(t, Config{Dir: dir}, newFake())
		synctest.Wait()
		m, n := f.loaded[engine.VersionID{Model: "m", Version: 3}].spec, f.loaded[engine.VersionID{Model: "n", Version: 1}].spec
		if m.Dir != filepath.Join(dir, "m", "3") || m.Entry != "model.onnx" || m.Options.MaxBatchSize != 4 || m.Options.Instances != 2 {
			t.Errorf("got %+v", m)
		}
		if diff := cmp.Diff(map[string][]string{"y": {"one", "two", "three"}}, m.Labels); diff != "" {
			t.Error(diff)
		}
		if n.Options != nil || n.Labels != nil {
			t.Errorf("got %+v, where the model decides", n)
		}
	})
}

func TestLinks(t *testing.T) {
	tests := []struct {
		name  string
		link  map[string]string // to, by the path of the link
		ready string
		log   string
	}{
		{"a model", map[string]string{"m": "outside/m"}, "", "the folder of the model is a link out of the model repository, to"},
		{"a version", map[string]string{"m/1": "outside/m/1"}, "", "the file of version 1 is a link out of the model repository, to"},
		{"a file", map[string]string{"m/1/model.onnx": "outside/m/1/model.onnx"}, "", "the file of version 1 is a link out of the model repository, to"},
		{"within", map[string]string{"m": "repository/other"}, "", ""},
		{"a configuration", map[string]string{"m/1": "outside/m/1", "m/config.pbtxt": "outside/m/config.pbtxt"}, "model m: config.pbtxt: path escapes from parent", ""},
		{"labels", map[string]string{"m/1": "outside/m/1", "m/labels.txt": "outside/m/labels.txt"}, `model m: config.pbtxt: label_filename "labels.txt" of output "y": path escapes from parent`, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				top := t.TempDir()
				dir := filepath.Join(top, "repository")
				tree(t, top, map[string]string{"outside/m/1": "a", "outside/m/config.pbtxt": "", "outside/m/labels.txt": "a", "repository/other/1": "b"})
				if tt.name == "labels" {
					tree(t, dir, map[string]string{"m/config.pbtxt": `output [ { name: "y" label_filename: "labels.txt" } ]`})
				}
				for from, to := range tt.link {
					from = filepath.Join(dir, from)
					if err := errors.Join(os.MkdirAll(filepath.Dir(from), 0o700), os.Symlink(filepath.Join(top, to), from)); err != nil {
						t.Fatal(err)
					}
				}
				f := start(t, Config{Dir: dir}, newFake())
				synctest.Wait()
				if err := f.Ready(); fmt.Sprint(err) != cmpOr(tt.ready, "<nil>") {
					t.Errorf("got %v, want %s", err, tt.ready)
				}
				log := f.take()
				if !strings.Contains(log, tt.log) || tt.log == "" && strings.Contains(log, "is a link") {
					t.Errorf("log: %s\nwant %s", log, tt.log)
				}
			})
		})
	}
}

func cmpOr(a, b string) string {
	if a != "" {
		return a
	}
	return b
}

func TestFile(t *testing.T) {
	names := map[string]string{"resnet50.onnx": "resnet50", "My Net (v2).onnx": "My_Net__v2_", ".hidden.onnx": "hidden", "a.b.onnx": "a.b", "é.onnx": "_", "-x.onnx": "-x"}
	for file, name := range names {
		if got := modelName("/some/" + file); got != name || checkName(got) != nil {
			t.Errorf("%s: got %q, want %q", file, got, name)
		}
	}
	if got := modelName("/" + strings.Repeat("n", 251) + ".onnx"); checkName(got) != nil {
		t.Errorf("%q is not a name", got)
	}
	synctest.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		put(t, filepath.Join(dir, "My Net.onnx"), modelBytes(1))
		put(t, filepath.Join(dir, "config.pbtxt"), []byte("not of this model"))
		f := start(t, Config{File: filepath.Join(dir, "My Net.onnx"), Control: Poll, Poll: time.Second}, newFake())
		synctest.Wait()
		if got := f.index(t); got != "My_Net:1 READY" {
			t.Errorf("index %s", got)
		}
		put(t, filepath.Join(dir, "My Net.onnx"), modelBytes(2))
		time.Sleep(time.Second)
		synctest.Wait()
		if got := f.loaded[engine.VersionID{Model: "My_Net", Version: 1}].bytes; got != string(modelBytes(2)) {
			t.Error("the new file is not loaded")
		}
		os.Remove(filepath.Join(dir, "My Net.onnx"))
		time.Sleep(time.Second)
		synctest.Wait()
		if got := f.versions(); got != "My_Net:1" {
			t.Errorf("loaded %q after the file has gone", got)
		}
		if got := f.index(t); !strings.HasPrefix(got, "My_Net:1 READY serves on; the last load failed: ") {
			t.Errorf("index %s", got)
		}
	})
}

func TestForbidden(t *testing.T) {
	for _, control := range []Control{None, Poll} {
		synctest.Test(t, func(t *testing.T) {
			f := start(t, Config{Control: control, Poll: time.Hour}, newFake())
			for _, err := range []error{f.Repository.Load(t.Context(), "m", oip.Override{}), f.Repository.Unload(t.Context(), "m")} {
				if oip.CodeOf(err) != oip.Forbidden || !strings.Contains(err.Error(), "explicit model load / unload is not allowed without --model-control explicit") {
					t.Errorf("got %v", err)
				}
			}
		})
	}
}

func TestLoadAndUnload(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := start(t, Config{Control: Explicit}, newFake())
		step := func(err error, want, index string) {
			t.Helper()
			synctest.Wait()
			if fmt.Sprint(err) != cmpOr(want, "<nil>") {
				t.Errorf("got %v, want %s", err, cmpOr(want, "no error"))
			}
			if got := f.index(t); got != index {
				t.Errorf("index %s\nwant %s", got, index)
			}
		}
		load := func() error { return f.Repository.Load(t.Context(), "m", oip.Override{}) }
		unload := func() error { return f.Repository.Unload(t.Context(), "m") }

		step(load(), `load model "m": the model repository has no such model`, "")
		step(unload(), "", "")
		tree(t, f.dir, map[string]string{"m/1": "a"})
		step(unload(), "", "m")
		step(load(), "", "m:1 READY")
		calls := f.fake.take()
		step(load(), "", "m:1 READY")
		if again := f.fake.take(); again != nil {
			t.Errorf("loading what is loaded: %v, before %v", again, calls)
		}
		tree(t, f.dir, map[string]string{"m/2": "b"})
		step(load(), "", "m:1 UNAVAILABLE unloaded, m:2 READY")
		if got, want := f.fake.take(), []string{"check m:2", "load m:2", "unload m:1"}; !slices.Equal(got, want) {
			t.Errorf("calls %v, want %v", got, want)
		}
		tree(t, f.dir, map[string]string{"m/config.pbtxt": `version_policy { all {} }`})
		step(load(), "", "m:1 READY, m:2 READY")
		tree(t, f.dir, map[string]string{"m/config.pbtxt": `version_policy { specific { versions: 1 } }`})
		step(load(), "", "m:1 READY, m:2 UNAVAILABLE unloaded")
		if f.serving["m"] != 1 {
			t.Errorf("%v serves", f.serving)
		}
		tree(t, f.dir, map[string]string{"m/config.pbtxt": `broken`})
		step(load(), `load model "m": config.pbtxt:1:1: unknown field: broken`, "m:1 READY serves on; the last load failed: config.pbtxt:1:1: unknown field: broken, m:2 UNAVAILABLE unloaded")
		if err := f.Ready(); err != nil {
			t.Errorf("not ready, though the old version serves: %v", err)
		}
		step(unload(), "", "m:1 UNAVAILABLE unloaded, m:2 UNAVAILABLE unloaded")
		step(unload(), "", "m:1 UNAVAILABLE unloaded, m:2 UNAVAILABLE unloaded")
		if err := f.Ready(); err != nil {
			t.Error(err)
		}
		os.Remove(filepath.Join(f.dir, "m", "config.pbtxt"))
		tree(t, f.dir, map[string]string{"m/2/model.onnx": "broken"})
		reason := "version 2: model.onnx: not an ONNX model: field 12 at byte 0 has 114 bytes, only 4 are left"
		step(load(), `load model "m": `+reason, "m:1 UNAVAILABLE unloaded, m:2 UNAVAILABLE "+reason)
	})
}

func TestCodes(t *testing.T) {
	tests := []struct {
		name string
		fail error // of the engine
		load string
		want oip.Code
	}{
		{"unknown", nil, "none", oip.NotFound},
		{"bad name", nil, "../m", oip.InvalidArgument},
		{"empty name", nil, "", oip.InvalidArgument},
		{"long name", nil, strings.Repeat("m", 256), oip.InvalidArgument},
		{"broken", errors.New("no such operator"), "m", oip.InvalidArgument},
		{"no runtime", engine.ErrUnavailable, "m", oip.Unavailable},
		{"stopped", engine.ErrStopped, "m", oip.Unavailable},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				fake := newFake()
				fake.fail = func(string, engine.VersionID) error { return tt.fail }
				f := start(t, Config{Control: Explicit}, fake)
				tree(t, f.dir, map[string]string{"m/1": "a"})
				err := f.Repository.Load(t.Context(), tt.load, oip.Override{})
				if err == nil || oip.CodeOf(err) != tt.want {
					t.Errorf("got %v with code %v, want %v", err, oip.CodeOf(err), tt.want)
				}
				if len(f.models) > 1 {
					t.Errorf("%d models are remembered", len(f.models))
				}
				if err := f.Ready(); err != nil {
					t.Errorf("what a caller could not load keeps it from being ready: %v", err)
				}
			})
		})
	}
}

func TestStopped(t *testing.T) {
	r, err := New(Config{Dir: t.TempDir(), Control: Explicit, Front: newFake(), Engine: newFake()})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	<-r.running
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	for _, err := range []error{r.Load(t.Context(), "m", oip.Override{}), r.Unload(t.Context(), "m")} {
		if oip.CodeOf(err) != oip.Unavailable {
			t.Errorf("got %v", err)
		}
	}
	if r.pending.Load() != 0 || len(r.models) != 0 {
		t.Errorf("%d calls are pending, %d models are there", r.pending.Load(), len(r.models))
	}
	r.Lost(engine.VersionID{Model: "m", Version: 1}, errors.New("gone"))
}
