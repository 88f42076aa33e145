package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"path/filepath"
	"time"

	"github.com/dunlin/dunlin/agent/compiled"
)

// measure measures the sides in turn, round by round, with the same requests.
func (b *bench) measure(ctx context.Context) (result, error) {
	none := result{math.NaN(), math.NaN(), math.NaN()}
	folder := filepath.Join(absolute(b.plan.dir), "compiled")
	cache, err := compiled.Open(folder, math.MaxInt64)
	if err != nil {
		return none, err
	}
	began := time.Now()
	all, err := b.start(ctx, "budget for all", 0, cache, false)
	if err != nil {
		return none, err
	}
	defer all.stop()
	var whole int64
	for _, v := range all.engine.Versions() {
		n := v.Need
		whole += n.Weights + n.Session + n.Prepacked + n.Workspace
	}
	few := whole / int64(len(b.fleet)) * int64(b.plan.fit)
	fmt.Printf("%d models compiled and loaded in %s; together they need %d MB, the budget for %d of middling size is %d MB\n",
		len(b.fleet), time.Since(began).Round(time.Second), whole/1e6, b.plan.fit, few/1e6)
	sides := []*side{all}
	if !b.plan.only {
		warm, err := b.start(ctx, "budget for few", few, cache, false)
		if err != nil {
			return none, err
		}
		defer warm.stop()
		naive, err := b.start(ctx, "made anew, LRU", few, nil, true)
		if err != nil {
			return none, err
		}
		defer naive.stop()
		sides = append(sides, warm, naive)
	}
	rates := make([][]float64, len(sides))
	for round := range b.plan.rounds + 1 {
		for i, s := range sides {
			took := b.plan.slice
			if round == 0 {
				took /= 2 // to warm up
			}
			rate, _, err := b.throughput(ctx, s, b.plan.seed+uint64(round), took)
			if err != nil {
				return none, err
			}
			fmt.Printf("round %d: %-16s %8.1f requests/s%s\n", round, s.name, rate, s.swaps())
			if round > 0 {
				rates[i] = append(rates[i], rate)
			}
		}
	}
	r := none
	if !b.plan.only {
		var toAll, toNaive []float64
		for i := range rates[0] {
			toAll = append(toAll, rates[1][i]/rates[0][i])
			toNaive = append(toNaive, rates[1][i]/rates[2][i])
		}
		r.warm, r.naive = median(toAll), median(toNaive)
	}
	for _, s := range sides {
		s.stop()
	}
	if b.plan.group {
		r.bound, err = b.bounded(ctx, cache, folder, few, median(rates[0]))
		if errors.Is(err, errNoGroup) {
			fmt.Println("under a memory control group: not measured:", err)
			err = nil
		}
	}
	return r, err
}

// swaps says how often weights came in so far.
func (s *side) swaps() string {
	in := uint64(0)
	var took time.Duration
	prepacked := 0
	for _, v := range s.engine.Versions() {
		for _, t := range v.Swaps.In {
			in += t.Count
			took += t.Time
		}
		if v.Setting.Prepack {
			prepacked++
		}
	}
	if in == 0 {
		return ""
	}
	return fmt.Sprintf(", weights came in %d times so far, %.1f ms on average, %d prepacked", in, took.Seconds()*1000/float64(in), prepacked)
}

// bounded measures with a child in a control group that holds little more than
// the budget, from a cold page cache, and compares with the bound: the time
// that the disk needs for what an optimal order of eviction must read, or that
// the same requests take when everything is in memory, whichever is longer.
func (b *bench) bounded(ctx context.Context, cache *compiled.Cache, folder string, budget int64, unbounded float64) (float64, error) {
	g, err := newGroup(budget + groupRoom)
	if err != nil {
		return math.NaN(), fmt.Errorf("%w: %w", errNoGroup, err)
	}
	defer g.remove()
	s, err := b.start(ctx, "in a group", budget, cache, false)
	if err != nil {
		return math.NaN(), err
	}
	defer s.stop()
	if err := g.add(s.worker.PID()); err != nil {
		return math.NaN(), fmt.Errorf("%w: %w", errNoGroup, err)
	}
	if err := drop(b.plan.dir); err != nil {
		return math.NaN(), err
	}
	disk, err := diskRate(folder)
	if err != nil {
		return math.NaN(), err
	}
	if err := drop(b.plan.dir); err != nil {
		return math.NaN(), err
	}
	sizes := make([]int64, len(b.fleet))
	for i, m := range b.fleet {
		sizes[i] = m.size
	}
	var ratios []float64
	for round := range b.plan.rounds {
		rate, asked, err := b.throughput(ctx, s, b.plan.seed+uint64(round)+100, b.plan.slice)
		if err != nil {
			return math.NaN(), err
		}
		read := optimalReads(sizes, asked, budget)
		reading := float64(read) / disk
		computing := float64(len(asked)) / unbounded
		bound := float64(len(asked)) / max(reading, computing)
		fmt.Printf("round %d: %-16s %8.1f requests/s; the disk gives %.0f MB/s, %d MB must be read: at most %.1f requests/s%s\n",
			round+1, s.name, rate, disk/1e6, read/1e6, bound, s.swaps())
		ratios = append(ratios, rate/bound)
	}
	return median(ratios), nil
}

// optimalReads gives the bytes that must be read for a sequence of requests
// when that model leaves first whose next request is the farthest away (Belady
// 1966), and what stays is bounded.
func optimalReads(sizes []int64, asked []int, budget int64) int64 {
	next := make([]int, len(asked)) // index of the next request for the same
	last := make([]int, len(sizes))
	for i := range last {
		last[i] = len(asked)
	}
	for i := len(asked) - 1; i >= 0; i-- {
		next[i] = last[asked[i]]
		last[asked[i]] = i
	}
	in := map[int]int{} // index of the next request
	used, read := int64(0), int64(0)
	for i, m := range asked {
		if _, ok := in[m]; !ok {
			read += sizes[m]
			used += sizes[m]
		}
		in[m] = next[i]
		for used > budget {
			farthest := -1
			for o, at := range in {
				if o != m && (farthest < 0 || at > in[farthest]) {
					farthest = o
				}
			}
			if farthest < 0 {
				break
			}
			used -= sizes[farthest]
			delete(in, farthest)
		}
	}
	return read
}
