package worker

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"
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

// plain is a child without a Worker, and the parent's ends of its socket and
// of a lane.
type plain struct {
	socket *socket
	lane   *net.UnixConn
	wait   func() (string, error) // gives how it ended and what it printed
}

func plainChild(t *testing.T) *plain {
	end, theirs, err := socketPair()
	if err != nil {
		t.Fatal(err)
	}
	shared, err := newRegion(DefaultSharedBytes)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(shared.close)
	cmd := exec.Command(os.Args[0], "worker")
	cfg := testConfig(t, "")
	cmd.Env = append(os.Environ(), cfg.serving(nil).environment()...)
	cmd.ExtraFiles = []*os.File{theirs, shared.file}
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	theirs.Close()
	s, err := newSocket(end)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.close() })
	return &plain{socket: s, wait: func() (string, error) { err := cmd.Wait(); return out.String(), err }}
}

// hello has a plain child open the runtime, a model as session 1, and a lane.
func (p *plain) hello(t *testing.T) {
	lib, err := library()
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range []*message{
		{kind: kindInit, seq: 1, strings: []string{lib}},
		{kind: kindActivate, seq: 2, session: 1, strings: []string{spec(t, "passthrough.onnx").Dir, "passthrough.onnx"}},
	} {
		if err := p.socket.send(m, nil); err != nil {
			t.Fatal(err)
		}
		if m, _, err := p.socket.receive(); err != nil || m.kind != kindDone {
			t.Fatalf("%+v, %v", m, err)
		}
	}
	ours, theirs, err := socketPair()
	if err != nil {
		t.Fatal(err)
	}
	defer theirs.Close()
	if p.lane, err = connect(ours); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.lane.Close() })
	if err := p.socket.send(&message{kind: kindLane}, theirs); err != nil {
		t.Fatal(err)
	}
}

// TestSocketCloses closes the parent's end: the child leaves by itself.
func TestSocketCloses(t *testing.T) {
	p := plainChild(t)
	p.hello(t)
	p.socket.close()
	if out, err := p.wait(); err != nil || out != "" {
		t.Errorf("the child ended with %v and printed %q", err, out)
	}
}

// TestChildRefuses has a parent that talks nonsense: the child says so and
// leaves with status 1.
func TestChildRefuses(t *testing.T) {
	for name, send := range map[string]func(p *plain) error{
		"no init": func(p *plain) error { return p.socket.send(&message{kind: kindActivate, seq: 1}, nil) },
		"bytes":   func(p *plain) error { return p.socket.write([]byte("hello"), nil) },
		"an answer": func(p *plain) error {
			p.hello(t)
			return p.socket.send(&message{kind: kindDone, seq: 3}, nil)
		},
		"no socket": func(p *plain) error {
			p.hello(t)
			return p.socket.send(&message{kind: kindLane, number: 1}, nil)
		},
	} {
		p := plainChild(t)
		if err := send(p); err != nil {
			t.Fatal(err)
		}
		out, err := p.wait()
		if exit, ok := errors.AsType[*exec.ExitError](err); !ok || exit.ExitCode() != 1 || !strings.Contains(out, "malformed message") {
			t.Errorf("%s: %v, printed %q", name, err, out)
		}
	}
}

func TestProbePooling(t *testing.T) {
	p, err := ProbePooling(t.Context(), testConfig(t, ""))
	if err != nil || (p.Device == "" && (!p.Works || p.Reason != "")) {
		t.Errorf("%+v, %v", p, err)
	}
	cfg := testConfig(t, "")
	cfg.RuntimeLib = "/nowhere.so"
	if p, err := ProbePooling(t.Context(), cfg); err == nil {
		t.Errorf("without a library: %+v", p)
	}
}
