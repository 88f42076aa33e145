package worker

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/dunlin/dunlin/agent/profile"
	"github.com/dunlin/dunlin/bench/zoo"
	"github.com/dunlin/dunlin/models"
	"github.com/dunlin/dunlin/models/onnxwriter"
)

func TestMeasure(t *testing.T) {
	cfg := testConfig(t, "")
	s := written(t, zoo.MLP(1).Model)
	file := filepath.Join(t.TempDir(), "model.ort")
	if _, err := Compile(t.Context(), cfg, s, file); err != nil {
		t.Fatal(err)
	}
	for _, file := range []string{file, ""} {
		err := Measure(t.Context(), cfg, s, file, func(ctx context.Context, m *Measuring) error {
			check, err := m.Check(ctx, profile.CPU)
			if err != nil {
				return err
			}
			if !check.Accepted || check.Relative > 1e-3 {
				t.Errorf("%+v", check)
			}
			for _, cold := range []bool{false, true} {
				took, err := m.Activate(ctx, profile.Setting{Provider: profile.CPU, Batch: 1, Instances: 1, Threads: 1}, cold)
				if err != nil {
					return err
				}
				if !cold && took <= 0 || took > time.Minute {
					t.Errorf("activation, cold %v: %v", cold, took)
				}
				t.Logf("activation, cold %v: %v", cold, took)
			}
			set := profile.Setting{Provider: profile.CPU, Batch: 4, Instances: 2, Threads: 1}
			if _, err := m.Slice(ctx, set, 1); err == nil || !strings.Contains(err.Error(), "prepared") {
				t.Errorf("what is not ready is run: %v", err)
			}
			ready, err := m.Prepare(ctx, set)
			if err != nil {
				return err
			}
			// Its inputs alone are more than that, and all there is is less.
			if ready.Run <= 0 || ready.Workspace < 1 || ready.Workspace > 8<<20 || ready.Session > 8<<20 {
				t.Errorf("%+v", ready)
			}
			x, err := m.Slice(ctx, set, 5)
			if err != nil {
				return err
			}
			if len(x.Times) != 10 || x.Wall <= 0 || x.CPU < 0 {
				t.Errorf("%+v", x)
			}
			for _, took := range x.Times {
				if took <= 0 || took > x.Wall {
					t.Errorf("a run of %v in a slice of %v", took, x.Wall)
				}
			}
			if _, err := m.Prepare(ctx, profile.Setting{Provider: "TensorrtExecutionProvider", Batch: 1, Instances: 1, Threads: 1}); err == nil || !strings.Contains(err.Error(), "not supported") {
				t.Errorf("a provider that is not there: %v", err)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
}

// TestMeasureStandsStill pauses a child, which answers only when it may go on.
func TestMeasureStandsStill(t *testing.T) {
	s := written(t, zoo.MLP(1).Model)
	err := Measure(t.Context(), testConfig(t, ""), s, "", func(ctx context.Context, m *Measuring) error {
		m.Pause()
		pid := m.p.command.Process.Pid
		until(t, "the child to stand still", func() bool { return stopped(t, pid) })
		answered := make(chan error, 1)
		go func() {
			_, err := m.Prepare(ctx, profile.Setting{Provider: profile.CPU, Batch: 1, Instances: 1, Threads: 1})
			answered <- err
		}()
		until(t, "the question to be asked", func() bool { return !m.p.quiet() })
		select {
		case err := <-answered:
			t.Errorf("it has answered: %v", err)
		default:
		}
		m.Resume()
		return <-answered
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestMeasureLimit: pauses do not lengthen how long a question may take.
func TestMeasureLimit(t *testing.T) {
	err := Measure(t.Context(), testConfig(t, ""), written(t, zoo.MLP(1).Model), "", func(_ context.Context, m *Measuring) error {
		defer m.begin(func() {})()
		for range 5 {
			before := m.left
			time.Sleep(2 * time.Millisecond)
			m.Pause()
			if m.left > before-2*time.Millisecond {
				t.Errorf("%v are left, and were %v", m.left, before)
			}
			still := m.left
			time.Sleep(2 * time.Millisecond)
			if m.Resume(); m.left != still {
				t.Errorf("%v are left after a pause, %v before it", m.left, still)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// stopped says whether a process stands still.
func stopped(t *testing.T, pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(stat), ") ")
	return strings.HasPrefix(rest, "T")
}

func TestMeasureFails(t *testing.T) {
	s := written(t, zoo.MLP(1).Model)
	set := profile.Setting{Provider: profile.CPU, Batch: 1, Instances: 1, Threads: 1}
	err := Measure(t.Context(), testConfig(t, ""), s, "", func(ctx context.Context, m *Measuring) error {
		if err := m.p.command.Process.Signal(syscall.SIGSEGV); err != nil {
			return err
		}
		_, err := m.Prepare(ctx, set)
		return err
	})
	if death, ok := errors.AsType[*DeathError](err); !ok || !errors.Is(err, profile.ErrDead) {
		t.Errorf("got %v, %v", err, death)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	enough := errors.New("enough")
	err = Measure(ctx, testConfig(t, ""), s, "", func(ctx context.Context, m *Measuring) error {
		m.Pause()
		cancel(enough)
		_, err := m.Prepare(ctx, set)
		return err
	})
	if !errors.Is(err, enough) {
		t.Errorf("got %v", err)
	}
	err = Measure(t.Context(), testConfig(t, ""), spec(t, "unknown-operator.onnx"), "", func(ctx context.Context, m *Measuring) error {
		_, err := m.Prepare(ctx, set)
		return err
	})
	if err == nil || !strings.Contains(err.Error(), "Frobnicate") || errors.Is(err, profile.ErrDead) {
		t.Errorf("got %v", err)
	}
}

// TestMeasureReference has a version bring along what its outputs are, rightly,
// and otherwise.
func TestMeasureReference(t *testing.T) {
	cfg := testConfig(t, "")
	// One input of one number: the output is its double.
	s := written(t, onnxwriter.Model{Opset: 17, Inputs: []onnxwriter.Value{onnxwriter.Float("x", -1, 1)}, Outputs: []onnxwriter.Value{onnxwriter.Float("y", -1, 1)},
		Nodes: []onnxwriter.Node{{Op: "Add", In: []string{"x", "x"}, Out: []string{"y"}}}})
	for _, tt := range []struct {
		name, reference, reason string
		accepted                bool
	}{
		{"right", `{"inputs":[{"name":"x","datatype":"FP32","shape":[2,1],"data":[1,2]}],"outputs":[{"name":"y","datatype":"FP32","shape":[2,1],"data":[2,4]}]}`, "", true},
		{"near", `{"inputs":[{"name":"x","datatype":"FP32","shape":[1,1],"data":[1]}],"outputs":[{"name":"y","datatype":"FP32","shape":[1,1],"data":[2.2]}],"tolerance":{"relative":0.1}}`, "", true},
		{"wrong", `{"inputs":[{"name":"x","datatype":"FP32","shape":[1,1],"data":[1]}],"outputs":[{"name":"y","datatype":"FP32","shape":[1,1],"data":[2.2]}]}`, "1 of 1 values differ", false},
		{"of another model", `{"inputs":[{"name":"z","datatype":"FP32","shape":[1,1],"data":[1]}],"outputs":[{"name":"y","datatype":"FP32","shape":[1,1],"data":[2]}]}`, `input "x" is missing`, false},
		{"not JSON", `{`, "not compared", true},
	} {
		if err := os.WriteFile(filepath.Join(s.Dir, models.ReferenceFile), []byte(tt.reference), 0o600); err != nil {
			t.Fatal(err)
		}
		err := Measure(t.Context(), cfg, s, "", func(ctx context.Context, m *Measuring) error {
			check, err := m.Check(ctx, profile.CPU)
			if err != nil {
				check.Reason = err.Error()
			}
			if check.Accepted != tt.accepted || !strings.Contains(check.Reason, tt.reason) {
				t.Errorf("%s: %+v", tt.name, check)
			}
			return nil
		})
		if err != nil {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
}
