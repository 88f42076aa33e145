package main

import (
	"bytes"
	"os"
	"regexp"
	"testing"
	"time"

	"github.com/dunlin/dunlin/agent/worker"
	"github.com/dunlin/dunlin/bench/zoo"
)

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "worker" {
		os.Exit(worker.Child())
	}
	os.Exit(m.Run())
}

// TestShort runs the benchmark on the smallest net: what it does is checked,
// its times are not.
func TestShort(t *testing.T) {
	var out bytes.Buffer
	err := run(t.Context(), options{nets: []zoo.Net{zoo.MLP(seed)}, batch: 4, rounds: 1, block: 100 * time.Millisecond, out: &out})
	t.Logf("%s", &out)
	if err != nil {
		t.Fatal(err)
	}
	if !regexp.MustCompile(`\nprofile: mem_err_pct=0\.0 latency_err_pct=[\d.]+ best_ratio=[\d.]+ time_ratio=[\d.]+ p99_impact_pct=-?[\d.]+\n$`).Match(out.Bytes()) {
		t.Error("the last line is another")
	}
}
