// Command route measures what it costs a device to decide where a request
// goes: by 20 rules with expressions, by 20 rules of equality and membership,
// by weights alone, and by a sticky key; and what a cascade on the digits gives. In each policy the last rule matches,
// so that all are looked at; the request has the headers of a usual client.
//
// Decisions are timed one by one where they take microseconds, and in runs of
// a hundred where the clock would be a part of them; the figures are medians.
package main

import (
	"context"
	"flag"
	"fmt"
	"iter"
	"maps"
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"time"

	"github.com/dunlin/dunlin/agent/worker"
	"github.com/dunlin/dunlin/internal/policy"
	"github.com/dunlin/dunlin/models/tensor"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// What a decision may take at the median, in nanoseconds.
const (
	goalCEL     = 15000
	goalNative  = 1000
	goalWeights = 300
)

const rules = 20

func main() {
	if len(os.Args) > 1 && os.Args[1] == "worker" {
		os.Exit(worker.Child())
	}
	n := flag.Int("n", 20000, "`number` of measurements of each policy")
	flag.Parse()
	if *n < 1 {
		fmt.Fprintln(os.Stderr, "route: n must be above 0")
		os.Exit(2)
	}
	if err := run(*n); err != nil {
		fmt.Fprintln(os.Stderr, "route:", err)
		os.Exit(1)
	}
}

// words are policy.Values in a map.
type words map[string]string

func (w words) Get(name string) (string, bool) { v, ok := w[name]; return v, ok }
func (w words) All() iter.Seq2[string, string] { return maps.All(w) }

func run(n int) error {
	request := &policy.Request{
		Parameters: words{"tier": "gold", "priority": "2"},
		Headers: words{
			"accept": "*/*", "accept-encoding": "gzip", "content-length": "3241", "content-type": "application/json",
			"user-agent": "Python-urllib/3.12", "x-request-id": "7d1f0c52-0d5a", "x-tenant": fmt.Sprint("tenant-", rules-1),
		},
		Inputs: []tensor.Tensor{{Name: "image", Type: tensor.Float32, Shape: []int64{1, 28, 28}}},
		Labels: map[string]string{"site": "berlin", "tier": "1"},
		Live:   func() policy.Figures { return policy.Figures{QueueDepth: policy.Figure{Value: 3, Known: true}} },
	}
	weighted := []*dunlinv1.RouteTarget{{Model: "digits", Version: 1, Weight: 90}, {Model: "digits", Version: 2, Weight: 10}}
	expressions := &dunlinv1.DesiredRoute{Name: "vision", Targets: weighted}
	native := &dunlinv1.DesiredRoute{Name: "vision", Targets: weighted}
	for i := range rules {
		name, tenant := fmt.Sprint("rule-", i), fmt.Sprint("tenant-", i)
		expressions.Rules = append(expressions.Rules, &dunlinv1.RouteRule{
			Name: name, Targets: weighted,
			Match: &dunlinv1.RouteMatch{Cel: fmt.Sprintf(`request.headers["x-tenant"] == %q && request.inputs["image"][0] < 8`, tenant)},
		})
		native.Rules = append(native.Rules, &dunlinv1.RouteRule{
			Name: name, Targets: weighted,
			Match: &dunlinv1.RouteMatch{
				Headers: []*dunlinv1.RouteCondition{{Name: "x-tenant", Values: []string{tenant, tenant + "-test"}}},
				Inputs:  []*dunlinv1.RouteInput{{Name: "image", MaxRows: 7}},
			},
		})
	}
	policies := []struct {
		name  string
		route *dunlinv1.DesiredRoute
		rule  int // that must match
		batch int // decisions that are timed together
	}{
		{"cel", expressions, rules - 1, 1},
		{"native", native, rules - 1, 100},
		{"weights", &dunlinv1.DesiredRoute{Name: "vision", Targets: weighted}, -1, 100},
		{"sticky", &dunlinv1.DesiredRoute{Name: "vision", Targets: weighted, Sticky: &dunlinv1.RouteSticky{Header: "x-tenant"}}, -1, 100},
	}
	ns, allocs := map[string]float64{}, map[string]float64{}
	for _, at := range policies {
		p, err := policy.Compile(at.route)
		if err != nil {
			return err
		}
		if d := p.Decide(request, 1); d.Rule != at.rule || d.Faulted != 0 {
			return fmt.Errorf("%s: rule %d decides, faults of %b, want %d", at.name, d.Rule, d.Faulted, at.rule)
		}
		ns[at.name], allocs[at.name] = measure(p, request, n, at.batch)
		fmt.Printf("%s: %.0f ns, %.2f allocations\n", at.name, ns[at.name], allocs[at.name])
	}
	if ns["cel"] > goalCEL || ns["native"] > goalNative || ns["weights"] > goalWeights {
		fmt.Printf("the goals are %d ns for cel, %d for native and %d for weights\n", goalCEL, goalNative, goalWeights)
	}
	share, ratio, err := cascade(context.Background())
	if err != nil {
		return err
	}
	fmt.Printf("route: cel_ns=%.0f native_ns=%.0f native_allocs=%.2f cascade_share=%.3f cascade_acc_ratio=%.4f\n", ns["cel"], ns["native"], allocs["native"], share, ratio)
	return nil
}

// measure gives the median time of a decision in nanoseconds, and the objects
// that one allocates.
func measure(p *policy.Policy, q *policy.Request, n, batch int) (ns, allocs float64) {
	random := rand.Uint64()
	times := make([]time.Duration, n)
	decide := func() {
		for i := range times {
			began := time.Now()
			for range batch {
				random++
				p.Decide(q, random)
			}
			times[i] = time.Since(began)
		}
	}
	decide() // what is made once, and the caches
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	decide()
	runtime.ReadMemStats(&after)
	slices.Sort(times)
	return float64(times[n/2]) / float64(batch), float64(after.Mallocs-before.Mallocs) / float64(n*batch)
}
