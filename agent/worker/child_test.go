package worker

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dunlin/dunlin/models/tensor"
)

func TestCheck(t *testing.T) {
	info, err := Check(t.Context(), testConfig(t, ""), spec(t, "digits-size.onnx"))
	if err != nil || len(info.Inputs) != 1 || info.Inputs[0].String() != "x:FP32[-1,64]" {
		t.Errorf("%+v, %v", info, err)
	}
	r, err := Probe(t.Context(), testConfig(t, ""))
	if err != nil || !strings.HasPrefix(r.Version, "1.") || len(r.Providers) == 0 {
		t.Errorf("Probe: %+v, %v", r, err)
	}
	if _, err := Check(t.Context(), testConfig(t, ""), spec(t, "unknown-operator.onnx")); err == nil || !strings.Contains(err.Error(), "check unknown-operator:1") {
		t.Error(err)
	}
	for mode, want := range map[string]string{"kill-on-load=add.onnx": "signal: killed", "fault-on-load": "signal: segmentation fault"} {
		_, err := Check(t.Context(), testConfig(t, mode), spec(t, "add.onnx"))
		if _, died := errors.AsType[*DeathError](err); !died || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", mode, err)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	began := time.Now()
	if _, err := Check(ctx, testConfig(t, "hang-on-load"), spec(t, "add.onnx")); !errors.Is(err, context.DeadlineExceeded) || time.Since(began) > 10*time.Second {
		t.Errorf("after %v: %v", time.Since(began), err)
	}
}

// TestGarbage has children that answer nonsense: each run gets an error, and
// nothing stays open.
func TestGarbage(t *testing.T) {
	before := descriptors(t)
	for seed := range uint64(25) {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) {
			w := start(t, testConfig(t, fmt.Sprint("garbage=", seed)))
			id, _ := load(t, w, "digits-size.onnx")
			_, err := w.Run(t.Context(), id, []tensor.Tensor{floats("x", 1, []int64{1, 100}[seed%2], 64)}, nil)
			if _, died := errors.AsType[*DeathError](err); !died || !strings.Contains(err.Error(), "malformed") {
				t.Error(err)
			}
		})
	}
	until(t, "descriptors to be closed", func() bool { return descriptors(t) <= before })
}

// TestParentDies kills a parent and waits for its child to go.
func TestParentDies(t *testing.T) {
	cmd := exec.Command(os.Args[0], "parent")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var pid int
	_, err = fmt.Fscan(bufio.NewReader(out), &pid)
	cmd.Process.Kill()
	cmd.Wait()
	if err != nil {
		t.Fatal(err)
	}
	until(t, "the child to die", func() bool {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		return err != nil || strings.Contains(string(stat), ") Z ")
	})
}

// plainChild starts a child without a Worker and gives the parent's socket;
// wait gives how it ended and what it printed.
func plainChild(t *testing.T) (s *socket, wait func() (string, error)) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	theirs := os.NewFile(uintptr(pair[1]), "socket")
	shared, err := newRegion(DefaultSharedBytes)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(shared.close)
	cmd := exec.Command(os.Args[0], "worker")
	cmd.ExtraFiles = []*os.File{theirs, shared.file}
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	theirs.Close()
	s, err = newSocket(os.NewFile(uintptr(pair[0]), "socket"), shared, DefaultMaxBytes, false)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.close() })
	return s, func() (string, error) { err := cmd.Wait(); return out.String(), err }
}

// hello has a plain child open the runtime.
func hello(t *testing.T, s *socket) {
	lib, err := library()
	if err != nil {
		t.Fatal(err)
	}
	if err := s.send(&message{kind: kindInit, seq: 1, strings: []string{lib}, limit: 1 << 20}, slot{}); err != nil {
		t.Fatal(err)
	}
	if m, _, err := s.receive(); err != nil || m.kind != kindDone {
		t.Fatalf("%+v, %v", m, err)
	}
}

// TestSocketCloses closes the parent's end: the child leaves by itself.
func TestSocketCloses(t *testing.T) {
	s, wait := plainChild(t)
	hello(t, s)
	s.close()
	if out, err := wait(); err != nil || out != "" {
		t.Errorf("the child ended with %v and printed %q", err, out)
	}
}

// TestChildRefuses has a parent that talks nonsense: the child says so and
// leaves with status 1.
func TestChildRefuses(t *testing.T) {
	for name, send := range map[string]func(s *socket) error{
		"no init": func(s *socket) error { return s.send(&message{kind: kindRun, seq: 1}, slot{}) },
		"bytes":   func(s *socket) error { return s.write([]byte("hello"), nil) },
		"an answer": func(s *socket) error {
			hello(t, s)
			return s.send(&message{kind: kindDone, seq: 2}, slot{})
		},
		"beyond the region": func(s *socket) error {
			hello(t, s)
			return s.send(&message{kind: kindShared, seq: 2, number: 10, slot: slot{1 << 60, 1 << 60}}, slot{})
		},
		"no memory": func(s *socket) error {
			hello(t, s)
			return s.write([]byte{attached, 1, 2, 3, 4, 5, 6, 7, 8}, nil)
		},
		"beyond the limit": func(s *socket) error {
			hello(t, s)
			return s.send(&message{kind: kindRun, seq: 2, tensors: []tensor.Tensor{floats("x", 1, 1<<18)}}, slot{})
		},
	} {
		s, wait := plainChild(t)
		if err := send(s); err != nil {
			t.Fatal(err)
		}
		out, err := wait()
		if exit, ok := errors.AsType[*exec.ExitError](err); !ok || exit.ExitCode() != 1 || !strings.Contains(out, "malformed message") {
			t.Errorf("%s: %v, printed %q", name, err, out)
		}
	}
}
