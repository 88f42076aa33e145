package worker

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/dunlin/dunlin/agent/ort"
	"github.com/dunlin/dunlin/models/tensor"
)

// BenchmarkHop runs the same model in this process and in the child: the
// difference is what the hop costs. The first size is that of a digit.
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
	s, err := ort.Open(b.Context(), spec(b, "digits-size.onnx").Dir, "digits-size.onnx")
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	for _, batch := range []int64{1, 100, 2400, 40_000} {
		x := []tensor.Tensor{floats("x", 1, batch, 64)}
		size := fmt.Sprintf("%dB", len(x[0].Data))
		b.Run("in-process/"+size, func(b *testing.B) {
			for b.Loop() {
				if err := s.Run(b.Context(), x, nil, func([]tensor.Tensor) error { return nil }); err != nil {
					b.Fatal(err)
				}
			}
		})
		b.Run("worker/"+size, func(b *testing.B) {
			for b.Loop() {
				if _, err := w.Run(b.Context(), id, x, nil); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// TestFootprint bounds what the child costs before it has a model, and how
// soon it is ready. The bounds of the whole agent are bench-footprint's; these
// are for the child alone, in a test binary.
func TestFootprint(t *testing.T) {
	began := time.Now()
	w := start(t, testConfig(t, ""))
	p := child(t, w)
	took := time.Since(began)
	m := memory(t, p.command.Process.Pid)
	t.Logf("child without a model: ready in %v; kB: %v", took.Round(time.Millisecond), m)
	if took > 5*time.Second || m["Anonymous"] > 30<<10 || m["Rss"] > 80<<10 {
		t.Errorf("the child took %v and has %d kB anonymous, %d kB in all", took, m["Anonymous"], m["Rss"])
	}
	load(t, w, "digits-size.onnx")
	t.Logf("with a small one: kB: %v", memory(t, p.command.Process.Pid))
}

func memory(t testing.TB, pid int) map[string]int {
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
