package oip

import (
	"crypto/rand"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/dunlin/dunlin/models/tensor"
	"github.com/dunlin/dunlin/proto/inference"
)

// object makes a shared memory object and gives its name.
func object(t testing.TB, content string) string {
	name := "dunlin-test-" + rand.Text()
	path := filepath.Join(memoryFolder, name)
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(path) })
	return name
}

func content(t *testing.T, name string) string {
	b, err := os.ReadFile(filepath.Join(memoryFolder, name))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestMemory(t *testing.T) {
	s := New(Config{Backend: &fake{}, SharedMemory: true})
	in, out := object(t, "..abcd.."), object(t, strings.Repeat("-", 10))
	for region, key := range map[string]string{"in": "/" + in, "out": out} {
		if err := s.RegisterMemory(region, key, 2, 6); err != nil {
			t.Fatal(err)
		}
	}
	all, err := s.Memory("")
	want := map[string]*inference.SystemSharedMemoryStatusResponse_RegionStatus{
		"in": {Name: "in", Key: "/" + in, Offset: 2, ByteSize: 6}, "out": {Name: "out", Key: out, Offset: 2, ByteSize: 6},
	}
	if diff := cmp.Diff(want, all, protocmp.Transform()); diff != "" || err != nil {
		t.Error(diff, err)
	}
	delete(want, "out")
	if one, err := s.Memory("in"); err != nil || cmp.Diff(want, one, protocmp.Transform()) != "" {
		t.Errorf("one region: %v, %v", one, err)
	}
	if _, err := s.Memory("other"); CodeOf(err) != NotFound {
		t.Error(err)
	}

	request := func() *Request {
		return &Request{
			Model: "m", Inputs: []Input{{Tensor: tensor.Tensor{Name: "x", Type: tensor.Uint8, Shape: []int64{4}}, Memory: &Slice{"in", 0, 4}}},
			Outputs: []Output{{Name: "x", Memory: &Slice{"out", 1, 5}}},
		}
	}
	r, err := s.Infer(t.Context(), request())
	if err != nil {
		t.Fatal(err)
	}
	r.Release()
	if got := content(t, out); got != "---abcd---" {
		t.Errorf("the output is %q", got)
	}
	if o := r.Outputs[0]; o.Data != nil || *o.Memory != (Slice{"out", 1, 4}) || o.Shape[0] != 4 {
		t.Errorf("response %+v", o)
	}
	if err := s.Hold(DefaultMaxBodies); err != nil {
		t.Errorf("after the request: %v", err)
	}
	_ = s.Hold(-DefaultMaxBodies)

	for name, tt := range map[string]struct {
		change func(*Request)
		code   Code
		want   string
	}{
		"unknown input region":  {func(r *Request) { r.Inputs[0].Memory.Region = "other" }, NotFound, `inputs[0] "x": there is no shared memory region "other"`},
		"unknown output region": {func(r *Request) { r.Outputs[0].Memory.Region = "other" }, NotFound, `outputs[0] "x": there is no shared memory region "other"`},
		"input beyond":          {func(r *Request) { r.Inputs[0].Memory.Size = 7 }, InvalidArgument, "do not fit shared memory region \"in\" of 6 bytes"},
		"output beyond":         {func(r *Request) { r.Outputs[0].Memory.Offset = 2 }, InvalidArgument, "shared_memory_offset 2 and shared_memory_byte_size 5 do not fit"},
		"offset overflows":      {func(r *Request) { r.Inputs[0].Memory.Offset = math.MaxInt64 }, InvalidArgument, "do not fit"},
		"negative offset":       {func(r *Request) { r.Inputs[0].Memory.Offset = -1 }, InvalidArgument, "do not fit"},
		"negative size":         {func(r *Request) { r.Outputs[0].Memory.Size = -1 }, InvalidArgument, "do not fit"},
		"wrong size":            {func(r *Request) { r.Inputs[0].Memory.Size = 3 }, InvalidArgument, "has 3 bytes of data"},
		"output too small":      {func(r *Request) { r.Outputs[0].Memory.Size = 3 }, InvalidArgument, `outputs[0] "x": needs 4 bytes of shared memory, shared_memory_byte_size gives 3`},
	} {
		r := request()
		tt.change(r)
		if _, err := s.Infer(t.Context(), r); CodeOf(err) != tt.code || !strings.Contains(fmt.Sprint(err), tt.want) {
			t.Errorf("%s: %v, want %q", name, err, tt.want)
		}
	}

	// What the caller shortens is an error, and not made longer again.
	if err := os.Truncate(filepath.Join(memoryFolder, out), 6); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Infer(t.Context(), request()); CodeOf(err) != InvalidArgument || !strings.Contains(err.Error(), "was shortened") {
		t.Errorf("output: %v", err)
	}
	if got := content(t, out); len(got) != 6 {
		t.Errorf("the output is %q", got)
	}
	if err := os.Truncate(filepath.Join(memoryFolder, in), 3); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Infer(t.Context(), request()); CodeOf(err) != InvalidArgument || !strings.Contains(err.Error(), "was shortened") {
		t.Errorf("input: %v", err)
	}

	if err := s.UnregisterMemory("in"); err != nil {
		t.Error(err)
	}
	if err := s.UnregisterMemory("in"); err != nil {
		t.Errorf("twice: %v", err)
	}
	if _, err := s.Memory("in"); CodeOf(err) != NotFound {
		t.Error(err)
	}
	if err := s.UnregisterMemory(""); err != nil {
		t.Error(err)
	}
	if all, err := s.Memory(""); len(all) != 0 || err != nil {
		t.Error(all, err)
	}
}

func TestRegisterMemoryRefuses(t *testing.T) {
	s := New(Config{Backend: &fake{}, SharedMemory: true})
	name := object(t, "abcd")
	link, folder, pipe := name+"-link", name+"-folder", name+"-pipe"
	if err := syscall.Mkfifo(filepath.Join(memoryFolder, pipe), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(filepath.Join(memoryFolder, pipe)) })
	if err := os.Symlink("/etc/passwd", filepath.Join(memoryFolder, link)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(filepath.Join(memoryFolder, link)) })
	if err := os.Mkdir(filepath.Join(memoryFolder, folder), 0o700); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(filepath.Join(memoryFolder, folder)) })
	if err := s.RegisterMemory("taken", name, 0, 4); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		region, key  string
		offset, size uint64
		want         string
	}{
		{"", name, 0, 4, "name of the shared memory region is empty"},
		{strings.Repeat("r", MaxName+1), name, 0, 4, "has 1025 bytes"},
		{"taken", name, 0, 4, `"taken" is registered already`},
		{"r", name, 0, 0, "byte_size is 0"},
		{"r", name, 0, 5, "offset 0 and byte_size 5 do not fit"},
		{"r", name, 5, 1, "do not fit"},
		{"r", name, 4, 1, "do not fit"},
		{"r", name, math.MaxUint64, 2, "do not fit"},
		{"r", name, 2, math.MaxUint64, "do not fit"},
		{"r", name, 1 << 63, 1 << 63, "do not fit"},
		{"r", name + "-none", 0, 4, "no such file"},
		{"r", "", 0, 4, "key is"},
		{"r", "/", 0, 4, "key is"},
		{"r", ".", 0, 4, "key is"},
		{"r", "..", 0, 4, "key is"},
		{"r", "../etc/passwd", 0, 4, "key is"},
		{"r", "/../etc/passwd", 0, 4, "key is"},
		{"r", "//" + name, 0, 4, "key is"},
		{"r", "/etc/passwd", 0, 4, "key is"},
		{"r", name + "\x00", 0, 4, "key is"},
		{"r", strings.Repeat("k", 300), 0, 4, "key is"},
		{"r", link, 0, 4, "is not a shared memory object"},
		{"r", folder, 0, 4, "is not a shared memory object"},
		{"r", pipe, 0, 4, "is not a shared memory object"},
	} {
		err := s.RegisterMemory(tt.region, tt.key, tt.offset, tt.size)
		if CodeOf(err) != InvalidArgument || !strings.Contains(fmt.Sprint(err), tt.want) || len(err.Error()) > 400 {
			t.Errorf("%q %q %d %d: %v, want %q", tt.region, tt.key, tt.offset, tt.size, err, tt.want)
		}
	}
	for i := range MaxRegions - 1 {
		if err := s.RegisterMemory(fmt.Sprint(i), name, 0, 4); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.RegisterMemory("r", name, 0, 4); CodeOf(err) != Unavailable {
		t.Errorf("one region too many: %v", err)
	}
	if err := s.UnregisterMemory(""); err != nil {
		t.Error(err)
	}
	off := New(Config{Backend: &fake{}})
	if err := off.RegisterMemory("r", name, 0, 4); CodeOf(err) != Unsupported {
		t.Errorf("off: %v", err)
	}
	if err := off.UnregisterMemory(""); CodeOf(err) != Unsupported {
		t.Errorf("off: %v", err)
	}
	if all, err := off.Memory(""); err != nil || len(all) != 0 {
		t.Errorf("off: %v, %v", all, err)
	}
}

// Inputs in shared memory count as the bytes of bodies do.
func TestMemoryIsBounded(t *testing.T) {
	s := New(Config{Backend: &fake{}, SharedMemory: true, MaxBody: 5, MaxBodies: 8})
	if err := s.RegisterMemory("r", object(t, "abcdefgh"), 0, 8); err != nil {
		t.Fatal(err)
	}
	infer := func(sizes ...int64) error {
		r := &Request{Model: "m"}
		for i, n := range sizes {
			r.Inputs = append(r.Inputs, Input{Tensor: tensor.Tensor{Name: fmt.Sprint(i), Type: tensor.Uint8, Shape: []int64{n}}, Memory: &Slice{"r", 0, n}})
		}
		_, err := s.Infer(t.Context(), r)
		return err
	}
	for range 10 {
		if err := infer(3, 2); err != nil {
			t.Fatal(err)
		}
		if err := infer(3, 3); CodeOf(err) != TooLarge {
			t.Error(err)
		}
	}
	if err := s.Hold(4); err != nil {
		t.Fatal(err)
	}
	if err := infer(5); CodeOf(err) != Unavailable {
		t.Error(err)
	}
}

// A region that is forgotten while a request uses it stays until that is done.
func TestUnregisterWhileInUse(t *testing.T) {
	f := &fake{}
	s := New(Config{Backend: f, SharedMemory: true})
	name := object(t, "abcd")
	if err := s.RegisterMemory("r", name, 0, 4); err != nil {
		t.Fatal(err)
	}
	region := s.memory.regions["r"]
	f.answer = func(Call, *Answer) error { return s.UnregisterMemory("r") }
	in := input("x", "ABCD")
	if _, err := s.Infer(t.Context(), &Request{Model: "m", Inputs: []Input{in}, Outputs: []Output{{Name: "x", Memory: &Slice{"r", 0, 4}}}}); err != nil {
		t.Error(err)
	}
	if got := content(t, name); got != "ABCD" {
		t.Errorf("the output is %q", got)
	}
	if _, err := region.file.Stat(); err == nil {
		t.Error("the object is still open")
	}
}

func TestMemoryConcurrently(t *testing.T) {
	s := New(Config{Backend: &concurrent{}, SharedMemory: true})
	name := object(t, strings.Repeat("a", 64))
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			region := fmt.Sprint(i % 2)
			for range 200 {
				_ = s.RegisterMemory(region, name, 0, 64) // may be registered by another
				_, err := s.Infer(t.Context(), &Request{
					Model: "m", Inputs: []Input{{Tensor: tensor.Tensor{Name: "x", Type: tensor.Uint8, Shape: []int64{64}}, Memory: &Slice{region, 0, 64}}},
					Outputs: []Output{{Name: "x", Memory: &Slice{region, 0, 64}}},
				})
				if err != nil && CodeOf(err) != NotFound {
					t.Error(err)
				}
				if err := s.UnregisterMemory(region); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if held := s.held.Load(); held != 0 {
		t.Errorf("%d bytes are held at the end", held)
	}
}
