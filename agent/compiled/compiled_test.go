package compiled

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/dunlin/dunlin/agent/engine"
	"github.com/dunlin/dunlin/models/onnxwriter"
	"github.com/dunlin/dunlin/models/tensor"
)

// TestMain runs the tests, or is the child of one.
func TestMain(m *testing.M) {
	if len(os.Args) == 4 && os.Args[1] == "put" {
		puts(os.Args[2], os.Args[3])
		return
	}
	goleak.VerifyTestMain(m)
}

var testModel = Model{
	Inputs: []tensor.Info{{Name: "x", Type: tensor.Float32, Shape: []int64{-1, 3}}, {Name: "any", Type: tensor.String},
		{Name: "scalar", Type: tensor.BFloat16, Shape: []int64{}}},
	Outputs: []tensor.Info{{Name: "y", Type: tensor.Int64, Shape: []int64{-1}}},
	Batch:   true, Prepack: true,
	Need: engine.Need{Weights: 1, Session: 2, Prepacked: 3, Workspace: 4, Measured: true},
}

func testKey(n int) Key {
	return Key{Model: fmt.Sprint(n), Runtime: "1.30.0", Provider: "CPU", CPU: "abc", Options: "all"}
}

func open(t testing.TB, dir string, limit int64) *Cache {
	c, err := Open(dir, limit)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// content writes a compiled model of so many bytes that depend on a number.
func content(n, size int) func(dir string) (Model, error) {
	return func(dir string) (Model, error) {
		b := make([]byte, size)
		r := rand.New(rand.NewPCG(uint64(n), 0))
		for i := 0; i+8 <= size; i += 8 {
			binary.LittleEndian.PutUint64(b[i:], r.Uint64())
		}
		return testModel, os.WriteFile(filepath.Join(dir, FileName), b, 0o600)
	}
}

func put(t testing.TB, c *Cache, n, size int) *Entry {
	e, err := c.Put(t.Context(), testKey(n), content(n, size))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(e.Release)
	return e
}

// names lists what is in the cache's folder.
func names(t testing.TB, dir string) (all []string) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		all = append(all, e.Name())
	}
	return all
}

func TestPutAndGet(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "cache")
	c := open(t, dir, 10<<20)
	if _, err := c.Get(t.Context(), testKey(1)); !errors.Is(err, ErrNone) {
		t.Errorf("an empty cache gives %v", err)
	}
	put(t, c, 1, 3<<20+5)
	for range 2 {
		e, err := c.Get(t.Context(), testKey(1))
		if err != nil {
			t.Fatal(err)
		}
		if info, err := os.Stat(e.File); err != nil || info.Size() != 3<<20+5 || e.Size != info.Size() {
			t.Errorf("%+v: %v, %v", e, info, err)
		}
		if !reflect.DeepEqual(e.Model, testModel) {
			t.Errorf("got %+v", e.Model)
		}
		e.Release()
		e.Release()
		c = open(t, dir, 10<<20)
	}
	other := testKey(1)
	for _, field := range []*string{&other.Runtime, &other.Provider, &other.CPU, &other.Options} {
		*field += "x"
		if _, err := c.Get(t.Context(), other); !errors.Is(err, ErrNone) {
			t.Errorf("key %v gives %v", other, err)
		}
	}
	// What is between two fields does not matter only together.
	if a, b := (Key{Model: "ab", Runtime: "c"}), (Key{Model: "a", Runtime: "bc"}); a.name() == b.name() {
		t.Error("two keys have one name")
	}
}

func TestFailedBuildLeavesNothing(t *testing.T) {
	dir := t.TempDir()
	c := open(t, dir, 1<<20)
	broken := errors.New("broken")
	if _, err := c.Put(t.Context(), testKey(1), func(string) (Model, error) { return Model{}, broken }); !errors.Is(err, broken) {
		t.Errorf("got %v", err)
	}
	if _, err := c.Put(t.Context(), testKey(1), func(string) (Model, error) { return Model{}, nil }); err == nil {
		t.Error("an entry without a file was put")
	}
	if _, err := c.Put(t.Context(), testKey(1), content(1, 2<<20)); err == nil || !strings.Contains(err.Error(), "2097152") {
		t.Errorf("an entry beyond the limit: %v", err)
	}
	if got := names(t, dir); len(got) > 0 || c.Bytes() != 0 {
		t.Errorf("there is %v, %d bytes", got, c.Bytes())
	}
	put(t, c, 1, 1000)
}

// TestDamage changes what is on disk in every way, between two processes.
func TestDamage(t *testing.T) {
	const size = 2<<20 + 100
	for name, damage := range map[string]func(entry string) error{
		"bit of the model": func(entry string) error { return flip(filepath.Join(entry, FileName), 1<<20+77) },
		"last byte":        func(entry string) error { return flip(filepath.Join(entry, FileName), size-1) },
		"cut model":        func(entry string) error { return os.Truncate(filepath.Join(entry, FileName), size-1) },
		"empty model":      func(entry string) error { return os.Truncate(filepath.Join(entry, FileName), 0) },
		"no model":         func(entry string) error { return os.Remove(filepath.Join(entry, FileName)) },
		"bit of the entry": func(entry string) error { return flip(filepath.Join(entry, entryName), 100) },
		"cut entry":        func(entry string) error { return os.Truncate(filepath.Join(entry, entryName), 100) },
		"no entry":         func(entry string) error { return os.Remove(filepath.Join(entry, entryName)) },
		"another's": func(entry string) error {
			return os.Rename(entry, filepath.Join(filepath.Dir(entry), testKey(2).name()))
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			put(t, open(t, dir, 10<<20), 1, size).Release()
			if err := damage(filepath.Join(dir, testKey(1).name())); err != nil {
				t.Fatal(err)
			}
			key := testKey(1)
			if name == "another's" {
				key = testKey(2)
			}
			c := open(t, dir, 10<<20)
			_, err := c.Get(t.Context(), key)
			if !errors.Is(err, ErrNone) || err == ErrNone {
				t.Errorf("got %v", err)
			}
			t.Log(err)
			if got := names(t, dir); len(got) > 0 || c.Bytes() != 0 {
				t.Errorf("there is %v, %d bytes", got, c.Bytes())
			}
			put(t, c, 1, size)
		})
	}
}

func flip(path string, at int64) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	b[at] ^= 4
	return os.WriteFile(path, b, 0o600)
}

func TestRemove(t *testing.T) {
	dir := t.TempDir()
	c := open(t, dir, 10<<20)
	e := put(t, c, 1, 1000)
	other, err := c.Get(t.Context(), testKey(1))
	if err != nil {
		t.Fatal(err)
	}
	e.Remove()
	if _, err := c.Get(t.Context(), testKey(1)); !errors.Is(err, ErrNone) {
		t.Errorf("after Remove: %v", err)
	}
	put(t, c, 1, 2000)
	other.Remove() // is not the one that is there now
	if _, err := c.Get(t.Context(), testKey(1)); err != nil {
		t.Error(err)
	}
}

func TestLimit(t *testing.T) {
	dir := t.TempDir()
	const size = 100 << 10
	c := open(t, dir, 3*size+size/2)
	first := put(t, c, 1, size)
	for n := 2; n <= 3; n++ {
		put(t, c, n, size).Release()
	}
	get := func(n int) bool {
		e, err := c.Get(t.Context(), testKey(n))
		if err == nil {
			e.Release()
		}
		return err == nil
	}
	if !get(2) {
		t.Fatal("2 is gone")
	}
	put(t, c, 4, size).Release() // 1 is in use, 2 was used after 3
	if !get(1) || !get(2) || get(3) || !get(4) {
		t.Errorf("1 to 4: %v %v %v %v", get(1), get(2), get(3), get(4))
	}
	var held []*Entry
	for n := 5; n <= 8; n++ {
		held = append(held, put(t, c, n, size))
	}
	if !get(1) || c.Bytes() < 5*size {
		t.Errorf("entries in use are gone: %d bytes", c.Bytes())
	}
	for _, e := range append(held, first) {
		e.Release()
	}
	if c.Bytes() > 3*size+size/2 || get(1) && get(5) && get(6) {
		t.Errorf("%d bytes after the release of all", c.Bytes())
	}
	if n := len(names(t, dir)); n != 3 {
		t.Errorf("%d folders", n)
	}
	// The order is known after a start too.
	if !get(8) {
		t.Error("8 is gone")
	}
	c = open(t, dir, size+size/2)
	if len(names(t, dir)) != 1 || !get(8) {
		t.Errorf("what was used last is gone: %v", names(t, dir))
	}
}

func TestSingleFlight(t *testing.T) {
	c := open(t, t.TempDir(), 1<<20)
	var built atomic.Int32
	started, proceed := make(chan struct{}), make(chan struct{})
	var wg sync.WaitGroup
	for range 10 {
		wg.Go(func() {
			e, err := c.Put(t.Context(), testKey(1), func(dir string) (Model, error) {
				if built.Add(1) == 1 {
					close(started)
				}
				<-proceed
				return content(1, 1000)(dir)
			})
			if err != nil {
				t.Error(err)
				return
			}
			e.Release()
		})
	}
	<-started
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := c.Get(ctx, testKey(1)); !errors.Is(err, context.Canceled) {
		t.Errorf("Get beside Put: %v", err)
	}
	close(proceed)
	wg.Wait()
	if built.Load() != 1 {
		t.Errorf("built %d times", built.Load())
	}
}

// puts is a child that puts entries until it is killed, and says so of each.
func puts(dir, seed string) {
	c, err := Open(dir, 2<<20)
	if err != nil {
		fmt.Println("error:", err)
		os.Exit(1)
	}
	n := 0
	fmt.Sscan(seed, &n)
	for r := rand.New(rand.NewPCG(uint64(n), 1)); ; {
		k := r.IntN(20)
		e, err := c.Put(context.Background(), testKey(k), content(k, 1000+r.IntN(300<<10)))
		if err != nil {
			fmt.Println("error:", err)
			os.Exit(1)
		}
		fmt.Println("put", k)
		if r.IntN(3) == 0 {
			e.Remove()
		} else {
			e.Release()
		}
	}
}

// TestKill kills a process that puts, each time after another while.
func TestKill(t *testing.T) {
	const seed, kills = 3, 60
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	whole, left := 0, 0
	for n := range kills {
		cmd := exec.Command(exe, "put", dir, fmt.Sprint(n))
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewReader(out)
		first, err := lines.ReadString('\n')
		if err != nil || !strings.HasPrefix(first, "put") {
			t.Fatalf("%q, %v", first, err)
		}
		timer := time.NewTimer(time.Duration(r.IntN(20_000)) * time.Microsecond)
		<-timer.C
		cmd.Process.Kill()
		var rest bytes.Buffer
		rest.ReadFrom(lines)
		cmd.Wait()
		if strings.Contains(rest.String(), "error") {
			t.Fatal(rest.String())
		}
		for _, name := range names(t, dir) {
			if strings.HasPrefix(name, temporary) {
				left++
			}
		}
		c := open(t, dir, 2<<20)
		for k := range 20 {
			e, err := c.Get(t.Context(), testKey(k))
			if err == nil {
				whole++
				e.Release()
			} else if err != ErrNone {
				t.Errorf("kill %d: %v", n, err)
			}
		}
		for _, name := range names(t, dir) {
			if strings.HasPrefix(name, temporary) {
				t.Errorf("kill %d: %s stayed", n, name)
			}
		}
	}
	t.Logf("%d entries were whole, %d folders were left behind and removed", whole, left)
	if whole == 0 || left == 0 {
		t.Error("the test saw nothing")
	}
}

func TestDigest(t *testing.T) {
	dir, cache := t.TempDir(), t.TempDir()
	value := func(name string) []onnxwriter.Value {
		return []onnxwriter.Value{{Name: name, Type: tensor.Float32, Shape: []int64{1}}}
	}
	g := onnxwriter.Model{Opset: 17, Inputs: value("x"), Outputs: value("y"),
		Nodes:   []onnxwriter.Node{{Op: "Add", In: []string{"x", "w"}, Out: []string{"y"}}},
		Weights: []onnxwriter.Weight{{Name: "w", Type: tensor.Float32, Shape: []int64{1}, External: "w.bin"}}}
	write := func(name string, b []byte) {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("m.onnx", g.Marshal())
	write("w.bin", []byte{1, 2, 3, 4})
	c := open(t, cache, 1<<20)
	digestNow := func() string {
		d, err := c.Digest(dir, "m.onnx")
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	first := digestNow()
	if digestNow() != first {
		t.Error("two digests of one model")
	}
	// What is remembered is taken, also after a start.
	path := filepath.Join(dir, "w.bin")
	c = open(t, cache, 1<<20)
	known := c.digests[path]
	c.digests[path] = digest{known.Identity, "remembered"}
	if digestNow() == first {
		t.Error("a file was read again")
	}
	c = open(t, cache, 1<<20)
	if digestNow() != first {
		t.Error("the digest is another after a start")
	}
	write("w.bin", []byte{1, 2, 3, 5})
	if digestNow() == first {
		t.Error("another weight has the same digest")
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Digest(dir, "m.onnx"); err == nil {
		t.Error("a model without its weights has a digest")
	}
}

func TestCPU(t *testing.T) {
	const x86, arm = "processor\t: 0\nflags\t\t: fpu avx2\nprocessor: 1\nflags\t\t: fpu avx2\n", "Features\t: fp asimd\n"
	if cpu(x86) == cpu(arm) || cpu(x86) != cpu("flags : fpu avx2\ncpu MHz : 3\n") || cpu(x86) == cpu("flags : fpu\n") {
		t.Error("the digest is not that of the features")
	}
	if _, err := CPU(); err != nil {
		t.Error(err)
	}
}

func BenchmarkVerify(b *testing.B) {
	const size = 531 << 20
	dir := b.TempDir()
	c := open(b, dir, 1<<30)
	e, err := c.Put(b.Context(), testKey(1), func(dir string) (Model, error) {
		return testModel, os.WriteFile(filepath.Join(dir, FileName), make([]byte, size), 0o600)
	})
	if err != nil {
		b.Fatal(err)
	}
	defer e.Release()
	b.SetBytes(size)
	for b.Loop() {
		if _, err := verify(b.Context(), filepath.Dir(e.File), testKey(1)); err != nil {
			b.Fatal(err)
		}
	}
}
