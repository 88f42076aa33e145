package worker

import (
	"context"
	"encoding/binary"
	"fmt"
	"log/slog"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/dunlin/dunlin/agent/engine"
	"github.com/dunlin/dunlin/models/tensor"
	"go.uber.org/goleak"
)

// TestMain runs the tests, or is the child of one: os.Args[2] then says how
// it misbehaves.
func TestMain(m *testing.M) {
	if len(os.Args) < 2 || !slices.Contains([]string{"worker", "parent", "echo", "measure"}, os.Args[1]) {
		goleak.VerifyTestMain(m)
		return
	}
	mode, arg := "", ""
	if len(os.Args) > 2 {
		mode, arg, _ = strings.Cut(os.Args[2], "=")
	}
	switch {
	case os.Args[1] == "parent":
		parent()
	case os.Args[1] == "echo":
		echoes()
	case os.Args[1] == "measure":
		measureNet(os.Args[2:])
	case mode == "escape":
		os.Exit(escapeChild(arg))
	case mode == "garbage":
		kind, _ := strconv.Atoi(arg)
		liar(func(l *lie) { l.answer(kind) })
	case mode == "poisoned":
		liar((*lie).poisoned)
	case mode == "late":
		liar((*lie).late)
	case mode == "kill-on-load":
		os.Exit(runChild(func(file string, opened bool) {
			if !opened && file == arg {
				syscall.Kill(os.Getpid(), syscall.SIGKILL)
				select {}
			}
		}))
	case mode == "abort-on-load":
		os.Exit(runChild(func(file string, opened bool) {
			if !opened && file == arg {
				syscall.Kill(os.Getpid(), syscall.SIGABRT)
				select {}
			}
		}))
	case mode == "abort-on-later-load": // arg is a file that notes the first one, in the child that serves
		os.Exit(runChild(func(_ string, opened bool) {
			if opened || strings.Contains(os.Getenv(sandboxVariable), `"Confined":true`) {
				return
			}
			seen, _ := os.ReadFile(arg)
			if len(seen) == 1 {
				syscall.Kill(os.Getpid(), syscall.SIGABRT)
				select {}
			}
			os.WriteFile(arg, append(seen, '.'), 0o600)
		}))
	case mode == "pools": // arg is the folder in which the test is told of them
		os.Exit((&sessions{watch: watched(arg)}).run())
	case mode == "abort-on-pools":
		os.Exit((&sessions{watch: func(*pools, bool) { syscall.Kill(os.Getpid(), syscall.SIGABRT); select {} }}).run())
	case mode == "fault-on-load":
		os.Exit(runChild(func(string, bool) { syscall.Kill(os.Getpid(), syscall.SIGSEGV); select {} }))
	case mode == "hang-on-load":
		os.Exit(runChild(func(string, bool) { select {} }))
	case mode == "fault-on-run": // arg is the compiled file whose weights nobody may read
		os.Exit(runChild(func(file string, opened bool) {
			if opened && file == arg {
				forbid(file)
			}
		}))
	default:
		os.Exit(Child())
	}
}

// forbid takes the right to read a mapped file from this process.
func forbid(file string) {
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		panic(err)
	}
	for line := range strings.Lines(string(maps)) {
		var from, to uintptr
		if _, err := fmt.Sscanf(line, "%x-%x", &from, &to); err != nil || !strings.HasSuffix(line, file+"\n") {
			continue
		}
		if _, _, failed := syscall.Syscall(syscall.SYS_MPROTECT, from, to-from, syscall.PROT_NONE); failed != 0 {
			panic(failed)
		}
	}
}

// library finds ONNX Runtime for a test.
func library() (string, error) {
	if lib := os.Getenv("DUNLIN_ORT_LIB"); lib != "" {
		return lib, nil
	}
	found, _ := filepath.Glob("../../.cache/onnxruntime/libonnxruntime.so.*")
	if len(found) == 0 {
		return "", fmt.Errorf("ONNX Runtime is not there: run make runtime")
	}
	return filepath.Abs(found[0])
}

func testConfig(t testing.TB, mode string) Config {
	lib, err := library()
	if err != nil {
		t.Fatal(err)
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	testdata, err := filepath.Abs("../ort/testdata")
	if err != nil {
		t.Fatal(err)
	}
	return Config{
		Command: []string{exe, "worker", mode}, RuntimeLib: lib, Folders: []string{testdata, os.TempDir()}, settled: time.Nanosecond, rebuildAfter: time.Nanosecond,
		Log: slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug})),
	}
}

// start runs a worker until the test ends.
func start(t testing.TB, cfg Config) *Worker {
	w := New(cfg)
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := w.Supervise(ctx); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() { cancel(); wg.Wait() })
	return w
}

func spec(t testing.TB, entry string) engine.Spec {
	dir, err := filepath.Abs("../ort/testdata")
	if err != nil {
		t.Fatal(err)
	}
	return engine.Spec{ID: engine.VersionID{Model: strings.TrimSuffix(entry, ".onnx"), Version: 1}, Dir: dir, Entry: entry}
}

// load loads a version and activates it.
func load(t testing.TB, w *Worker, entry string) (engine.VersionID, engine.Info) {
	s := spec(t, entry)
	info, err := w.Load(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Activate(t.Context(), s.ID, engine.Setting{}); err != nil {
		t.Fatal(err)
	}
	return s.ID, info
}

// floats gives a tensor of random numbers.
func floats(name string, seed uint64, shape ...int64) tensor.Tensor {
	r := rand.New(rand.NewPCG(seed, 0))
	n, _ := tensor.Elements(shape)
	t := tensor.Tensor{Name: name, Type: tensor.Float32, Shape: shape}
	for range n {
		t.Data = binary.LittleEndian.AppendUint32(t.Data, math.Float32bits(r.Float32()-0.5))
	}
	return t
}

// until polls until ok.
func until(t testing.TB, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(30 * time.Second); !ok(); <-tick.C {
		if time.Now().After(end) {
			t.Fatalf("waited 30 s for %s", what)
		}
	}
}

// child gives the process of the worker's ready child.
func child(t testing.TB, w *Worker) *process {
	p, err := w.acquire(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// parent is the process that TestParentDies kills: it prints its child's
// process number and waits.
func parent() {
	lib, err := library()
	if err != nil {
		panic(err)
	}
	w := New(Config{Command: []string{os.Args[0], "worker"}, RuntimeLib: lib})
	go w.Supervise(context.Background())
	p, err := w.acquire(context.Background())
	if err != nil {
		panic(err)
	}
	fmt.Println(p.command.Process.Pid)
	select {}
}

// echoes is the process that echo starts.
func echoes() {
	c, err := connect(os.NewFile(socketFD, "socket"))
	if err != nil {
		panic(err)
	}
	b := make([]byte, maxPacket)
	for {
		n, err := c.Read(b)
		if err != nil {
			os.Exit(0)
		}
		if _, err := c.Write(b[:n]); err != nil {
			os.Exit(0)
		}
	}
}
