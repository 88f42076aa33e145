package e2e

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/dunlin/dunlin/bench/zoo"
)

// crowdedModels is how many nets of 14 MB TestKilledAmongSwaps serves in
// crowdedMiB of memory, which hold about three.
const (
	crowdedModels = 6
	crowdedMiB    = 72
)

// TestKilledAmongSwaps kills the agent at random times while it compiles and
// while weights come and go. Each start goes on cleanly, and every model gives
// the same answers as before, but for rounding: it depends on what else is in a
// batch, and on whether weights are prepacked.
func TestKilledAmongSwaps(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	dir := t.TempDir()
	for i := range crowdedModels {
		folder := filepath.Join(dir, "models", fmt.Sprintf("m%d", i), "1")
		if err := os.MkdirAll(folder, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := zoo.MobileNet(uint64(i)).WriteFile(filepath.Join(folder, "model.onnx")); err != nil {
			t.Fatal(err)
		}
	}
	serve := func(name string) *Alone {
		a, err := Serve(within(t), programs.Agent, dir, name, library, "--model-repository", filepath.Join(dir, "models"),
			"--data", filepath.Join(dir, "data"), "--memory-mib", strconv.Itoa(crowdedMiB))
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
	input := make([]float32, 3*224*224)
	for i := range input {
		input[i] = random.Float32()
	}
	body := appendFloats(nil, input)
	var mu sync.Mutex
	answers := map[int][]float32{}
	check := func(model int, out []float32) {
		mu.Lock()
		defer mu.Unlock()
		if answers[model] == nil {
			answers[model] = out
		} else if !alike(answers[model], out) {
			t.Errorf("m%d gives another answer than before", model)
		}
	}
	for round := range 10 {
		a := serve(fmt.Sprintf("round-%d", round))
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		for range 2 {
			pick := rand.New(rand.NewPCG(seed, random.Uint64()))
			wg.Go(func() {
				for ctx.Err() == nil {
					model := pick.IntN(crowdedModels)
					if out, err := mobilenet(ctx, a.URL, model, body); err == nil {
						check(model, out)
					}
				}
			})
		}
		life := time.NewTimer(time.Duration(random.IntN(1500)) * time.Millisecond)
		<-life.C
		a.Kill()
		cancel()
		wg.Wait()
	}
	a := serve("last")
	defer func() {
		if err := a.Stop(); err != nil {
			t.Errorf("%v\n%s", err, a.LogTail(30))
		}
	}()
	if err := a.Ready(within(t)); err != nil {
		t.Fatalf("%v\n%s", err, a.LogTail(30))
	}
	for n := range 10 * crowdedModels {
		out, err := mobilenet(within(t), a.URL, n*5%crowdedModels, body)
		if err != nil {
			t.Fatalf("%v\n%s", err, a.LogTail(30))
		}
		check(n*5%crowdedModels, out)
	}
	for i := range crowdedModels {
		for j := range i {
			if alike(answers[i], answers[j]) {
				t.Errorf("m%d and m%d give the same", i, j)
			}
		}
	}
	page, err := fetch(within(t), a.URL+"/metrics")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{`dunlin_model_evictions_total{model="m\d",reason="room",version="1"} [1-9]`, `dunlin_memory_budget_bytes 7.5497472e\+07`} {
		if !regexp.MustCompile(name).MatchString(page) {
			t.Errorf("/metrics has no %s", name)
		}
	}
	entries, err := os.ReadDir(filepath.Join(dir, "data", "compiled"))
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("the cache of compiled models has %d entries", len(entries))
}

// alike says whether two outputs differ by rounding only.
func alike(a, b []float32) bool {
	return slices.EqualFunc(a, b, func(x, y float32) bool {
		return math.Abs(float64(x-y)) <= 1e-3*(1+math.Abs(float64(x)))
	})
}

func fetch(ctx context.Context, url string) (string, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return "", err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(io.LimitReader(resp.Body, 16<<20))
	return string(raw), err
}

// mobilenet asks a net for an answer, in binary both ways.
func mobilenet(ctx context.Context, url string, model int, input []byte) ([]float32, error) {
	header, err := json.Marshal(map[string]any{
		"inputs": []any{map[string]any{"name": "input", "datatype": "FP32", "shape": []int{1, 3, 224, 224},
			"parameters": map[string]any{"binary_data_size": len(input)}}},
		"outputs": []any{map[string]any{"name": "output", "parameters": map[string]any{"binary_data": true}}},
	})
	if err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, fmt.Sprintf("%s/v2/models/m%d/infer", url, model), bytes.NewReader(append(header, input...)))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Inference-Header-Content-Length", strconv.Itoa(len(header)))
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(io.LimitReader(resp.Body, 16<<20))
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("m%d: %s: %s", model, resp.Status, raw)
	}
	at, err := strconv.Atoi(resp.Header.Get("Inference-Header-Content-Length"))
	if err != nil || len(raw)-at != 4000 {
		return nil, fmt.Errorf("m%d: an answer of %d bytes: %w", model, len(raw)-at, err)
	}
	out := make([]float32, 1000)
	for i := range out {
		out[i] = math.Float32frombits(binary.LittleEndian.Uint32(raw[at+4*i:]))
	}
	return out, nil
}
