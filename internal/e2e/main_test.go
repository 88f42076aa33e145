package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/dunlin/dunlin/models/onnxwriter"
	"github.com/dunlin/dunlin/models/tensor"
)

var (
	root     string
	programs Programs
	library  string
)

func TestMain(m *testing.M) {
	if os.Getenv(crashEnv) != "" {
		os.Exit(crashingController())
	}
	if os.Getenv(wireEnv) != "" {
		os.Exit(controllerOfAnotherRelease())
	}
	code, err := setup(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

// setup builds the programs as users get them, but with the race detector,
// which otherwise sleeps for a second at the end of each process.
func setup(m *testing.M) (int, error) {
	ctx := context.Background()
	if err := os.Setenv("GORACE", "atexit_sleep_ms=0"); err != nil {
		return 1, err
	}
	var err error
	if root, err = Root(); err != nil {
		return 1, err
	}
	if library, err = RuntimeLibrary(ctx, root, os.Stderr); err != nil {
		return 1, err
	}
	dir, err := os.MkdirTemp("", "dunlin-e2e-")
	if err != nil {
		return 1, err
	}
	defer os.RemoveAll(dir)
	if programs, err = Build(ctx, root, dir, "-race"); err != nil {
		return 1, err
	}
	return m.Run(), nil
}

// limit bounds what any single wait in these tests may take, on a machine
// that is busy with the other packages' tests.
const limit = 90 * time.Second

func within(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	t.Cleanup(cancel)
	return ctx
}

// newFleet starts a controller.
func newFleet(t *testing.T) *Fleet {
	t.Helper()
	f, err := NewFleet(programs, t.TempDir(), library)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stop(t, f) })
	if err := f.StartController(within(t)); err != nil {
		t.Fatalf("%v\n%s", err, f.Controller.LogTail(50))
	}
	return f
}

// stop stops a fleet and looks through its logs.
func stop(t *testing.T, f *Fleet) {
	if err := f.Stop(); err != nil {
		t.Errorf("stop: %v", err)
	}
	logs := map[string]*Process{}
	if f.Controller != nil {
		logs["controller"] = f.Controller
	}
	for _, a := range f.Agents {
		logs[a.Name] = a.Process
	}
	for name, p := range logs {
		b, err := os.ReadFile(p.Log)
		if err != nil {
			t.Error(err)
			continue
		}
		for _, bad := range []string{"WARNING: DATA RACE", "panic:", "fatal error:"} {
			if bytes.Contains(b, []byte(bad)) {
				t.Errorf("the log of %s holds %q", name, bad)
			}
		}
		if t.Failed() {
			t.Logf("--- end of %s's log ---\n%s", name, p.LogTail(60))
		}
	}
}

func startAgent(t *testing.T, f *Fleet, name string, args ...string) *Agent {
	t.Helper()
	a, err := f.StartAgent(within(t), name, args...)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// cli runs the command line, which must succeed.
func cli(t *testing.T, f *Fleet, args ...string) string {
	t.Helper()
	out, err := f.CLI(within(t), args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// fails runs the command line, which must end with the exit code, and gives
// what it said on stderr.
func fails(t *testing.T, f *Fleet, code int, args ...string) string {
	t.Helper()
	_, err := f.CLI(within(t), args...)
	if err == nil {
		t.Fatalf("dunlin %s: succeeded", strings.Join(args, " "))
	}
	if exit, ok := errors.AsType[*exec.ExitError](err); !ok || exit.ExitCode() != code {
		t.Fatalf("want exit code %d: %v", code, err)
	}
	return err.Error()
}

// apply applies a Deployment of a model to every device, and a Route of the same name.
func apply(t *testing.T, f *Fleet, model string, version int) {
	t.Helper()
	cli(t, f, "apply", "-f", document(t, f, model, version))
}

func document(t *testing.T, f *Fleet, model string, version int) string {
	t.Helper()
	path := filepath.Join(f.Dir, fmt.Sprintf("%s-%d.yaml", model, version))
	text := fmt.Sprintf(`apiVersion: dunlin/v1
kind: Deployment
metadata: {name: %[1]s}
spec: {model: %[1]s, version: %[2]d, selector: {}}
---
apiVersion: dunlin/v1
kind: Route
metadata: {name: %[1]s-route}
spec: {targets: [{model: %[1]s, weight: 1}]}
`, model, version)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// digitsFile gives the path of a committed digits model.
func digitsFile(name string) string {
	return filepath.Join(root, "models/examples/digits", name+".onnx")
}

// bigModel writes a net with random weights of about size bytes.
func bigModel(t *testing.T, seed uint64, size int) string {
	t.Helper()
	random := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)})
	const rows = 64
	columns := int64(size / rows / 4)
	data := make([]byte, rows*columns*4)
	_, _ = random.Read(data)
	for i := 3; i < len(data); i += 4 {
		data[i] = 0x3f // floats between about 0.5 and 2
	}
	m := onnxwriter.Model{
		Opset:   17,
		Inputs:  []onnxwriter.Value{onnxwriter.Float("x", -1, rows)},
		Outputs: []onnxwriter.Value{onnxwriter.Float("y", -1, columns)},
		Weights: []onnxwriter.Weight{{Name: "w", Type: tensor.Float32, Shape: []int64{rows, columns}, Data: data}},
		Nodes:   []onnxwriter.Node{{Op: "MatMul", In: []string{"x", "w"}, Out: []string{"y"}}},
	}
	return write(t, "big.onnx", m.Marshal())
}

func write(t *testing.T, name string, data []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// device is what `dunlin get devices -o json` says of one, as far as these tests read it.
type device struct {
	Name      string `json:"name"`
	Connected bool   `json:"connected"`
	Reported  struct {
		Versions []struct {
			Model   string `json:"model"`
			Version string `json:"version"`
			State   string `json:"state"`
			Reason  string `json:"reason"`
			Serving bool   `json:"serving"`
		} `json:"versions"`
	} `json:"reported"`
}

func devices(t *testing.T, f *Fleet) []device {
	t.Helper()
	var all struct {
		Devices []device `json:"devices"`
	}
	decode(t, cli(t, f, "get", "devices", "-o", "json"), &all)
	return all.Devices
}

// eventually calls f until it gives "", and fails with what it gave last.
func eventually(t *testing.T, f func() string) {
	t.Helper()
	deadline := time.Now().Add(limit)
	for {
		problem := f()
		if problem == "" {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal(problem)
		}
		pause(t)
	}
}

// pause lets the processes under test have the machine between two looks at them.
func pause(t *testing.T) {
	select {
	case <-t.Context().Done():
	case <-time.After(20 * time.Millisecond):
	}
}
