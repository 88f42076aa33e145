package ort

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
	"unsafe"

	"github.com/dunlin/dunlin/models/tensor"
)

// library finds ONNX Runtime for a test.
func library(t testing.TB) string {
	if lib := os.Getenv("DUNLIN_ORT_LIB"); lib != "" {
		return lib
	}
	found, _ := filepath.Glob("../../.cache/onnxruntime/libonnxruntime.so.*")
	if len(found) == 0 {
		t.Fatal("ONNX Runtime is not there: run make runtime")
	}
	lib, err := filepath.Abs(found[0])
	if err != nil {
		t.Fatal(err)
	}
	return lib
}

func initialise(t testing.TB) {
	if err := Init(library(t), 0); err != nil {
		t.Fatal(err)
	}
}

func openModel(t testing.TB, entry string) *Session {
	initialise(t)
	s, err := Open(t.Context(), "testdata", entry, Setting{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

// run runs a session and keeps its outputs.
func run(ctx context.Context, s *Session, in []tensor.Tensor, outputs []string) (all []tensor.Tensor, err error) {
	err = s.Run(ctx, in, outputs, func(out []tensor.Tensor) error {
		for _, o := range out {
			o.Data = bytes.Clone(o.Data)
			all = append(all, o)
		}
		return nil
	})
	return all, err
}

// sample gives a tensor of n elements of a type, with bytes that tell them apart.
func sample(name string, typ tensor.Type, shape []int64) tensor.Tensor {
	n, _ := tensor.Elements(shape)
	t := tensor.Tensor{Name: name, Type: typ, Shape: shape, Data: []byte{}}
	for i := range n {
		switch {
		case typ == tensor.String:
			t.Data = tensor.AppendString(t.Data, []byte([]string{"", "a\x00b", "größer", "\xff\xfe", strings.Repeat("x", 300)}[i%5]))
		case typ == tensor.Bool:
			t.Data = append(t.Data, byte(i%2))
		default:
			for b := range typ.Size() {
				t.Data = append(t.Data, byte(int(i)*31+b*7+1))
			}
		}
	}
	return t
}

func TestEveryType(t *testing.T) {
	for _, tt := range []struct {
		model string
		shape []int64
	}{
		{"types.onnx", []int64{7}}, {"types.onnx", []int64{1}}, {"types.onnx", []int64{0}}, {"scalars.onnx", []int64{}},
	} {
		s := openModel(t, tt.model)
		var in []tensor.Tensor
		for _, typ := range allTypes {
			in = append(in, sample("in_"+typ.String(), typ, tt.shape))
		}
		out, err := run(t.Context(), s, in, nil)
		if err != nil {
			t.Fatalf("%s %v: %v", tt.model, tt.shape, err)
		}
		for i, o := range out {
			want := in[i]
			want.Name = "out_" + want.Type.String()
			if !reflect.DeepEqual(o, want) {
				t.Errorf("%s %v: got %+v, want %+v", tt.model, tt.shape, o, want)
			}
		}
	}
}

// floats gives a tensor of a matrix.
func floats(name string, shape []int64, values ...float32) tensor.Tensor {
	t := tensor.Tensor{Name: name, Type: tensor.Float32, Shape: shape}
	for _, v := range values {
		t.Data = binary.LittleEndian.AppendUint32(t.Data, math.Float32bits(v))
	}
	return t
}

func TestRun(t *testing.T) {
	s := openModel(t, "add.onnx")
	wantIn := []tensor.Info{
		{Name: "a", Type: tensor.Float32, Shape: []int64{-1, 2}}, {Name: "b", Type: tensor.Float32, Shape: []int64{2, 2}},
	}
	if !reflect.DeepEqual(s.Inputs(), wantIn) {
		t.Errorf("inputs %v", s.Inputs())
	}
	a := floats("a", []int64{3, 2}, 1, 2, 3, 4, 5, 6)
	b := floats("b", []int64{2, 2}, 1, 0, 1, 2)
	// The inputs may come in any order and lie at any address.
	shifted := append([]byte{0}, a.Data...)
	a.Data = shifted[1:]
	if uintptr(unsafe.Pointer(&a.Data[0]))%4 == 0 {
		t.Fatal("the input is aligned")
	}
	product := floats("product", []int64{3, 2}, 3, 4, 7, 8, 11, 12)
	sum := floats("sum", []int64{3, 2}, 5, 6, 7, 8, 9, 10)
	for _, tt := range []struct {
		outputs []string
		want    []tensor.Tensor
	}{
		{nil, []tensor.Tensor{sum, product}}, {[]string{"product", "sum"}, []tensor.Tensor{product, sum}}, {[]string{"sum"}, []tensor.Tensor{sum}},
	} {
		out, err := run(t.Context(), s, []tensor.Tensor{b, a}, tt.outputs)
		if err != nil || !reflect.DeepEqual(out, tt.want) {
			t.Errorf("outputs %v: %v, %v", tt.outputs, out, err)
		}
	}
	failure := errors.New("failure")
	if err := s.Run(t.Context(), []tensor.Tensor{a, b}, nil, func([]tensor.Tensor) error { return failure }); err != failure {
		t.Errorf("use failed, Run gave %v", err)
	}
}

func TestRunRefuses(t *testing.T) {
	add, gather := openModel(t, "add.onnx"), openModel(t, "gather.onnx")
	a, b := floats("a", []int64{1, 2}, 1, 2), floats("b", []int64{2, 2}, 1, 0, 1, 2)
	short := a
	short.Data = short.Data[1:]
	for name, tt := range map[string]struct {
		s       *Session
		in      []tensor.Tensor
		outputs []string
		want    string
	}{
		"missing input":     {add, []tensor.Tensor{a}, nil, `"b" is missing`},
		"input given twice": {add, []tensor.Tensor{a, b, b}, nil, "twice"},
		"unknown input":     {add, []tensor.Tensor{a, b, floats("c", nil, 1)}, nil, `no input "c"`},
		"unknown output":    {add, []tensor.Tensor{a, b}, []string{"d"}, `no output "d"`},
		"no output":         {add, []tensor.Tensor{a, b}, []string{}, "no output"},
		"wrong rank":        {add, []tensor.Tensor{floats("a", []int64{2}, 1, 2), b}, nil, "rank"},
		"wrong dimension":   {add, []tensor.Tensor{floats("a", []int64{1, 3}, 1, 2, 3), b}, nil, "dimension"},
		"wrong type":        {add, []tensor.Tensor{sample("a", tensor.Float64, []int64{1, 2}), b}, nil, "type"},
		"short data":        {add, []tensor.Tensor{short, b}, nil, `"a"`},
	} {
		_, err := run(t.Context(), tt.s, tt.in, tt.outputs)
		e, ok := errors.AsType[*Error](err)
		if !ok || e.Code != InvalidArgument || !strings.Contains(strings.ToLower(err.Error()), strings.ToLower(tt.want)) {
			t.Errorf("%s: %v", name, err)
		}
	}
	row := sample("i", tensor.Int64, []int64{1})
	if _, err := run(t.Context(), gather, []tensor.Tensor{floats("x", []int64{1, 2}, 1, 2), row}, nil); err == nil {
		t.Error("an index outside the matrix gave no error")
	}
}

func TestOpenRefuses(t *testing.T) {
	initialise(t)
	dir := t.TempDir()
	whole, err := os.ReadFile("testdata/chain.onnx")
	if err != nil {
		t.Fatal(err)
	}
	flipped := bytes.Clone(whole)
	flipped[30] ^= 0x80
	for name, content := range map[string][]byte{
		"empty.onnx": {}, "text.onnx": []byte("This is not a model.\n"), "truncated.onnx": whole[:len(whole)/2], "flipped.onnx": flipped,
	} {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for _, tt := range []struct{ dir, entry, want string }{
		{dir, "empty.onnx", ""}, {dir, "text.onnx", ""}, {dir, "truncated.onnx", ""}, {dir, "flipped.onnx", ""},
		{dir, "missing.onnx", "exist"},
		{dir, "../x.onnx", "leaves"},
		{"testdata", "opset99.onnx", "opset"},
		{"testdata", "unknown-operator.onnx", "Frobnicate"},
		{"testdata", "sequence.onnx", "only tensors"},
	} {
		s, err := Open(t.Context(), tt.dir, tt.entry, Setting{})
		if err == nil {
			s.Close()
			t.Errorf("%s opened", tt.entry)
			continue
		}
		t.Logf("%s: %v", tt.entry, err)
		if !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: error %q lacks %q", tt.entry, err, tt.want)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if s, err := Open(ctx, "testdata", "chain.onnx", Setting{}); !errors.Is(err, context.Canceled) {
		t.Errorf("Open with a cancelled context: %v, %v", s, err)
	}
}

func TestAnyRank(t *testing.T) {
	s := openModel(t, "any-rank.onnx")
	if s.Inputs()[0].Shape != nil {
		t.Errorf("inputs %v", s.Inputs())
	}
	if scalar := openModel(t, "scalars.onnx").Inputs()[0].Shape; scalar == nil || len(scalar) != 0 {
		t.Errorf("a scalar has shape %v", scalar)
	}
	for _, shape := range [][]int64{{}, {1}, {1, 1, 1, 1}} {
		out, err := run(t.Context(), s, []tensor.Tensor{floats("x", shape, 2)}, nil)
		if err != nil || !reflect.DeepEqual(out, []tensor.Tensor{floats("y", shape, -2)}) {
			t.Errorf("%v: %v, %v", shape, out, err)
		}
	}
}

// TestCancel ends a run that would take long.
func TestCancel(t *testing.T) {
	s := openModel(t, "chain.onnx")
	x := tensor.Tensor{Name: "x", Type: tensor.Float32, Shape: []int64{1000, 1000}, Data: make([]byte, 4e6)}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	start := time.Now()
	_, err := run(ctx, s, []tensor.Tensor{x}, nil)
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a run of %v gave %v", time.Since(start), err)
	}
	// The session is as good as before.
	one := floats("x", []int64{1, 1}, 1)
	if out, err := run(t.Context(), s, []tensor.Tensor{one}, nil); err != nil || !bytes.Equal(out[0].Data, one.Data) {
		t.Errorf("after it: %v, %v", out, err)
	}
}

// TestClose closes a session under load.
func TestClose(t *testing.T) {
	initialise(t)
	s, err := Open(t.Context(), "testdata", "chain.onnx", Setting{})
	if err != nil {
		t.Fatal(err)
	}
	x := tensor.Tensor{Name: "x", Type: tensor.Float32, Shape: []int64{64, 64}, Data: make([]byte, 4*64*64)}
	var wg sync.WaitGroup
	ran := make(chan struct{}, 1)
	for range 8 {
		wg.Go(func() {
			for {
				if _, err := run(t.Context(), s, []tensor.Tensor{x}, nil); err != nil {
					if !errors.Is(err, ErrClosed) {
						t.Error(err)
					}
					return
				}
				select {
				case ran <- struct{}{}:
				default:
				}
			}
		})
	}
	<-ran
	s.Close()
	s.Close()
	wg.Wait()
}

func TestRuntime(t *testing.T) {
	initialise(t)
	providers, err := Providers()
	if err != nil || !slices.Contains(providers, "CPUExecutionProvider") {
		t.Errorf("providers %v, %v", providers, err)
	}
	if !strings.HasPrefix(Version(), "1.") {
		t.Errorf("version %q", Version())
	}
	if err := Init("/nowhere/else.so", 0); err == nil {
		t.Error("a second library was opened")
	}
}

// TestNoTelemetry runs a model in a process with a home of its own: the
// runtime leaves nothing there.
func TestNoTelemetry(t *testing.T) {
	home := t.TempDir()
	cmd := exec.Command(os.Args[0], "-test.run=^TestRun$")
	cmd.Env = append(os.Environ(), "HOME="+home, "XDG_CACHE_HOME="+home, "TMPDIR="+home)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	left, err := os.ReadDir(home)
	if err != nil || len(left) > 0 {
		t.Errorf("left in the home: %v, %v", left, err)
	}
	initialise(t)
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil || strings.Contains(string(maps), "onnxruntime.db") {
		t.Errorf("a database is mapped, or %v", err)
	}
}

// TestInitRefuses opens what is not ONNX Runtime, each in a process of its own.
func TestInitRefuses(t *testing.T) {
	if lib := os.Getenv("DUNLIN_TEST_INIT"); lib != "" {
		err := Init(lib, 0)
		if again := Init(lib, 0); err == nil || again != err {
			t.Fatalf("%v, then %v", err, again)
		}
		t.Log(err)
		return
	}
	libc, err := filepath.Glob("/lib/*-linux-gnu*/libm.so.6")
	if err != nil || len(libc) == 0 {
		libc = []string{"/lib64/libm.so.6"}
	}
	for lib, want := range map[string]string{"/nowhere/libonnxruntime.so": "cannot open", libc[0]: "is not ONNX Runtime"} {
		cmd := exec.Command(os.Args[0], "-test.run=^TestInitRefuses$", "-test.v")
		cmd.Env = append(os.Environ(), "DUNLIN_TEST_INIT="+lib)
		out, err := cmd.CombinedOutput()
		if err != nil || !strings.Contains(string(out), want) {
			t.Errorf("%s: %v\n%s", lib, err, out)
		}
	}
}

func TestClean(t *testing.T) {
	for message, want := range map[string]string{
		"No Op registered for X ": "No Op registered for X",
		"/src/core/graph/utils.h:46 void onnx::Validate(const std::map<std::basic_string<char>, int>&, bool (*)(int)) Opset 99 is (too) new": "Opset 99 is (too) new",
		"Before. /src/a.cc:1 int C::f() const After":  "Before. After",
		"/src/a.cc:1 no parentheses":                  "/src/a.cc:1 no parentheses",
		"/src/a.cc:1 one that is left open(":          "/src/a.cc:1 one that is left open(",
		"bytes of a model: \xff":                      "bytes of a model: \uFFFD",
		"a path, /models/a.h:12, in the middle of it": "a path, /models/a.h:12, in the middle of it",
	} {
		if got := clean(message); got != want {
			t.Errorf("clean(%q) = %q, want %q", message, got, want)
		}
	}
}
