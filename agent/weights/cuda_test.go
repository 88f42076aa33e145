package weights

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestCUDA takes a pool out and in by the table of NVIDIA's driver, on a
// library that has its functions and checks their arguments.
func TestCUDA(t *testing.T) {
	const child = "DUNLIN_TEST_LIBCUDA"
	if os.Getenv(child) == "" {
		dir := t.TempDir()
		build := exec.CommandContext(t.Context(), "cc", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC",
			"-o", filepath.Join(dir, "libcuda.so.1"), "testdata/libcuda.c", "driver_fake.c", "-lpthread")
		if out, err := build.CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestCUDA$", "-test.v")
		cmd.Env = append(os.Environ(), child+"=1", "LD_LIBRARY_PATH="+dir)
		if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "--- PASS") {
			t.Errorf("%v\n%s", err, out)
		}
		return
	}
	if _, err := Open(CUDA(1), Settings{}); err == nil || errors.Is(err, ErrNoGPU) || !strings.Contains(err.Error(), "there are 1") {
		t.Errorf("GPU 1 of 1: %v", err)
	}
	if _, err := Open(CUDA(0), Settings{Pinned: 1 << 60}); !errors.Is(err, ErrOutOfMemory) {
		t.Errorf("too much pinned memory: %v", err)
	}
	d, err := Open(CUDA(0), Settings{Pinned: 1 << 20, Recycled: 8 << 20})
	if err != nil {
		t.Fatal(err)
	}
	want := Info{Name: "Stub 9000", UUID: "GPU-00112233-4455-6677-8899-aabbccddeeff", Driver: "12.9", Integrated: true}
	if d.Info() != want {
		t.Errorf("%+v", d.Info())
	}
	p := newPool(t, d, 1<<30)
	blocks := mustFill(t, p, 100, 3<<20, 70_000)
	if _, err := p.Allocate(64 << 20); !errors.Is(err, ErrOutOfMemory) {
		t.Errorf("too much: %v", err)
	}
	if err := p.Capture(); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := p.Out(); err != nil {
			t.Fatal(err)
		}
		if err := p.In(t.Context()); err != nil {
			t.Fatal(err)
		}
		expectContent(t, p, blocks)
	}
	if took, err := d.Measure(1<<20, 2); err != nil || len(took) != 2 {
		t.Errorf("%v, %v", took, err)
	}
	mustClose(t, p, blocks)
	if free, total, err := d.Memory(); err != nil || free != total-d.Stats().Physical {
		t.Errorf("%d of %d free, %v, %+v", free, total, err, d.Stats())
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
}
