package ort

import (
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
	"testing"

	"github.com/dunlin/dunlin/models/tensor"
)

type session struct{}

func TestBinding(t *testing.T) {
	if err := checkBinding(); err != nil {
		t.Error(err)
	}
	for in, want := range map[reflect.Type]string{
		reflect.TypeFor[struct{ session *session }](): "",
		reflect.TypeFor[struct{ handle *session }]():  "has no field session",
		reflect.TypeFor[struct{ session session }]():  "has type ort.session, not a pointer to session",
		reflect.TypeFor[struct{ session *int }]():     "has type *int, not a pointer to session",
	} {
		err := checkField(in, "session", "session")
		if want == "" && err == nil {
			continue
		}
		if err == nil || want == "" || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), bindingVersion) {
			t.Errorf("%s: %v", in, err)
		}
	}
}

// TestOnePool counts the threads of a process that opens many sessions: all
// of them run on the pool that Init made.
func TestOnePool(t *testing.T) {
	const variable = "DUNLIN_TEST_POOL"
	if os.Getenv(variable) == "" {
		cmd := exec.Command(os.Args[0], "-test.run=^TestOnePool$", "-test.v")
		cmd.Env = append(os.Environ(), variable+"=1")
		if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "--- PASS") {
			t.Fatalf("%v\n%s", err, out)
		}
		return
	}
	const threads = 24 // one of them is the caller's
	before := tasks(t)
	if err := Init(library(t), threads); err != nil {
		t.Fatal(err)
	}
	var pool []string
	for id := range tasks(t) {
		if _, old := before[id]; !old {
			pool = append(pool, id)
		}
	}
	if len(pool) < threads-1 {
		t.Fatalf("Init began %d threads, not %d", len(pool), threads-1)
	}
	x := tensor.Tensor{Name: "x", Type: tensor.Float32, Shape: []int64{256, 256}, Data: make([]byte, 4*256*256)}
	const sessions = 20
	for range sessions {
		if _, err := run(t.Context(), openModel(t, "chain.onnx"), []tensor.Tensor{x}, nil); err != nil {
			t.Fatal(err)
		}
	}
	after := tasks(t)
	// The Go runtime may begin one or the other itself.
	if more := len(after) - len(before) - len(pool); more >= sessions {
		t.Errorf("%d more threads for %d sessions", more, sessions)
	}
	worked := 0
	for _, id := range pool {
		if after[id] > 0 {
			worked++
		}
	}
	t.Logf("threads: %d, with the pool's %d, with %d sessions %d; %d of the pool's have worked", len(before), len(before)+len(pool), sessions, len(after), worked)
	if worked == 0 {
		t.Error("no thread of the pool has done anything")
	}
}

// tasks gives the CPU time of each thread of this process, in clock ticks.
func tasks(t *testing.T) map[string]int {
	stats, err := filepath.Glob("/proc/self/task/*/stat")
	if err != nil || len(stats) == 0 {
		t.Fatal("no threads", err)
	}
	all := make(map[string]int)
	for _, path := range stats {
		b, err := os.ReadFile(path)
		if err != nil {
			continue // it has ended
		}
		_, rest, _ := strings.Cut(string(b), ") ")
		ticks, err := strconv.Atoi(strings.Fields(rest)[11]) // utime
		if err != nil {
			t.Fatal(err)
		}
		all[filepath.Base(filepath.Dir(path))] = ticks
	}
	return all
}
