package worker

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/dunlin/dunlin/agent/ort"
	"github.com/dunlin/dunlin/models/tensor"
)

// BenchmarkHop compares, for tensors of a digit and of a picture and for one
// caller and eight: a socket that gives the same bytes back, the runtime in
// this process, and the runtime in the child.
func BenchmarkHop(b *testing.B) {
	lib, err := library()
	if err != nil {
		b.Fatal(err)
	}
	if err := ort.Init(lib, 0); err != nil {
		b.Fatal(err)
	}
	w := start(b, testConfig(b, ""))
	id, _ := load(b, w, "digits-size.onnx")
	s, err := ort.Open(b.Context(), spec(b, "digits-size.onnx").Dir, "digits-size.onnx", ort.Setting{})
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	ctx, cancel := context.WithCancel(b.Context()) // one that can end, as a request's can
	defer cancel()
	for _, rows := range []int64{1, 2400} {
		x := []tensor.Tensor{floats("x", 1, rows, 64)}
		for _, callers := range []int{1, 8} {
			of := fmt.Sprintf("%dB/%d", len(x[0].Data), callers)
			b.Run("socket/"+of, func(b *testing.B) {
				echoes := make(chan *net.UnixConn, callers)
				for range callers {
					echoes <- echo(b)
				}
				measure(b, callers, func(buffer []byte) error {
					c := <-echoes
					defer func() { echoes <- c }()
					return pingPong(c, x[0].Data, buffer)
				})
			})
			b.Run("in-process/"+of, func(b *testing.B) {
				measure(b, callers, func([]byte) error {
					return s.Run(ctx, x, nil, func([]tensor.Tensor) error { return nil })
				})
			})
			b.Run("worker/"+of, func(b *testing.B) {
				measure(b, callers, func([]byte) error {
					out, err := w.Run(ctx, id, [][]tensor.Tensor{x}, nil)
					if out.Release != nil {
						out.Release()
					}
					return err
				})
			})
		}
	}
}

// measure calls f so often, from so many goroutines.
func measure(b *testing.B, callers int, f func(buffer []byte) error) {
	b.ReportAllocs()
	var left atomic.Int64
	left.Store(int64(b.N))
	all := make([][]time.Duration, callers)
	buffers := make([][]byte, callers)
	for c := range callers {
		all[c] = make([]time.Duration, 0, b.N)
		buffers[c] = make([]byte, maxPacket)
	}
	var wg sync.WaitGroup
	b.ResetTimer()
	for c := range callers {
		wg.Go(func() {
			for left.Add(-1) >= 0 {
				began := time.Now()
				if err := f(buffers[c]); err != nil {
					b.Error(err)
					return
				}
				all[c] = append(all[c], time.Since(began))
			}
		})
	}
	wg.Wait()
	b.StopTimer()
	took := slices.Concat(all...)
	slices.Sort(took)
	for _, percent := range []int{50, 99} {
		b.ReportMetric(float64(took[len(took)*percent/100].Nanoseconds())/1e3, fmt.Sprintf("p%d-us", percent))
	}
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "runs/s")
}

// echo starts a process that gives back what it gets.
func echo(b *testing.B) *net.UnixConn {
	ours, theirs, err := socketPair()
	if err != nil {
		b.Fatal(err)
	}
	defer theirs.Close()
	cmd := exec.Command(os.Args[0], "echo")
	cmd.ExtraFiles = []*os.File{theirs}
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	c, err := connect(ours)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { c.Close(); cmd.Wait() })
	return c
}

// pingPong sends bytes, in packets where they are many, and waits for as many.
func pingPong(c *net.UnixConn, data, buffer []byte) error {
	for len(data) > 0 {
		n := min(len(data), maxPacket/2)
		if _, err := c.Write(data[:n]); err != nil {
			return err
		}
		if _, err := c.Read(buffer); err != nil {
			return err
		}
		data = data[n:]
	}
	return nil
}

// TestFootprint bounds what the child costs before it has a model, and how
// soon it is ready. The bounds of the whole agent are bench-footprint's; these
// are for the child alone, in a test binary.
func TestFootprint(t *testing.T) {
	began := time.Now()
	w := start(t, testConfig(t, ""))
	p := child(t, w)
	took := time.Since(began)
	m := resident(t, p.command.Process.Pid)
	t.Logf("child without a model: ready in %v; kB: %v", took.Round(time.Millisecond), m)
	if took > 5*time.Second || m["Anonymous"] > 30<<10 || m["Rss"] > 80<<10 {
		t.Errorf("the child took %v and has %d kB anonymous, %d kB in all", took, m["Anonymous"], m["Rss"])
	}
	load(t, w, "digits-size.onnx")
	t.Logf("with a small one: kB: %v", resident(t, p.command.Process.Pid))
}

func resident(t testing.TB, pid int) map[string]int {
	b, err := os.ReadFile(filepath.Join("/proc", fmt.Sprint(pid), "smaps_rollup"))
	if err != nil {
		t.Fatal(err)
	}
	m := make(map[string]int)
	for line := range strings.Lines(string(b)) {
		name, rest, _ := strings.Cut(line, ":")
		var kB int
		if _, err := fmt.Sscan(rest, &kB); err == nil && (name == "Rss" || name == "Pss" || name == "Anonymous" || name == "Private_Dirty") {
			m[name] = kB
		}
	}
	return m
}
