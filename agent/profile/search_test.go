package profile

import (
	"errors"
	"math"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// surface is a model on a machine, made up. A run of b rows on t threads costs
// overhead + (weights + b*row)/speedup(t), where speedup is Amdahl's with a
// serial part and each hand-over to threads costs too; small batches use the
// processor badly; prepacked weights scale the work; beyond some rows the work
// leaves the cache; and runs at a time share the cores and the memory's
// bandwidth.
type surface struct {
	cores                       int
	overhead, weights, row      float64 // seconds
	serial, hand                float64
	filling                     float64 // rows at which half of the processor's throughput is reached
	packed                      float64 // factor of the work when prepacked
	cache                       float64 // rows that fit
	spill                       float64 // factor of the work of those beyond
	contention                  float64 // by which a run slows down for each other one
	noise                       float64
	rowBytes, fixed, packedSize float64
	seed                        uint64
}

// drawn gives any one of so many cores.
func drawn(r *rand.Rand, cores int) surface {
	between := func(low, high float64) float64 { return low + (high-low)*r.Float64() }
	exp := func(low, high float64) float64 { return math.Exp(between(math.Log(low), math.Log(high))) }
	row := exp(2e-6, 0.2)
	return surface{
		cores: cores, overhead: exp(3e-6, 1e-4), row: row, weights: row * exp(0.001, 30),
		serial: between(0, 0.3), hand: exp(1e-6, 3e-5), filling: between(0, 1), packed: between(0.7, 1.05),
		cache: exp(1, 256), spill: between(1, 1.4), contention: between(0, 0.1), noise: 0.01,
		rowBytes: exp(1e3, 1e7), fixed: 1e6, packedSize: 1e7, seed: r.Uint64(),
	}
}

// run gives the time of a run and the rows per second of all instances.
func (s surface) run(set Setting) (seconds, rate float64) {
	b, t, i := float64(set.Batch), float64(set.Threads), float64(set.Instances)
	work := s.weights + s.row*(b+s.filling)
	if set.Prepacked {
		work *= s.packed
	}
	if over := b*i - s.cache; over > 0 {
		work *= 1 + (s.spill-1)*over/(over+s.cache)
	}
	parallel := work*s.serial + work*(1-s.serial)/t
	if t > 1 {
		parallel += s.hand * math.Log2(t)
	}
	// What the instances want of the cores, and what they get.
	busy := work / parallel
	share := max(1, i*busy/float64(s.cores))
	seconds = s.overhead + parallel*share*(1+s.contention*(i-1)/float64(s.cores))
	return seconds, b * i / seconds
}

func (s surface) measure(set Setting) Result {
	r := rand.New(rand.NewPCG(s.seed, uint64(set.Batch)<<32|uint64(set.Threads)<<16|uint64(set.Instances)<<1|uint64(len(set.Provider))))
	seconds, rate := s.run(set)
	off := 1 + s.noise*r.NormFloat64()
	workspace := int64(float64(set.Instances) * (s.fixed + s.rowBytes*float64(set.Batch)))
	peak := workspace
	if set.Prepacked {
		peak += int64(s.packedSize)
	}
	took := time.Duration(seconds * off * 1e9)
	return Result{Runs: 9, P50: took, P95: took, P99: took, RowsPerSecond: rate / off, Workspace: workspace, Peak: peak}
}

// space is what a search finds on the machine; compiling has measured whether
// prepacked weights are faster.
func (s surface) space() Space {
	return Space{Providers: []string{CPU}, Cores: s.cores, Batch: MaxBatch, Prepack: s.packed < 0.98}
}

// search searches, and gives what the measurements took: each goes on for a
// second or five runs, whatever is less, but for three at least.
func (s surface) search(space Space) (*Search, float64) {
	search, cost := NewSearch(space), 0.0
	for set, more := search.Next(); more; set, more = search.Next() {
		search.Add(set, s.measure(set))
		cost += s.cost(set)
	}
	return search, cost
}

func (s surface) cost(set Setting) float64 {
	run, _ := s.run(set)
	return min(5*run, max(1, 3*run))
}

// TestSearchReachesTheBest searches made-up models on made-up machines, and
// holds the setting that comes out against that of the full grid, both by their
// true figures.
func TestSearchReachesTheBest(t *testing.T) {
	const seed, machines = 1, 400
	for _, cores := range []int{2, 4, 6, 8, 16} {
		r := rand.New(rand.NewPCG(seed, uint64(cores)))
		missed, looks, worst, cost, most := 0, 0, 1.0, 0.0, 0.0
		for range machines {
			s := drawn(r, cores)
			space := s.space()
			grid, all := space.Grid(), map[Setting]Result{}
			for _, set := range grid {
				all[set] = s.measure(set)
				most += s.cost(set) / s.row
			}
			search, took := s.search(space)
			n := len(search.Measured())
			if n > len(grid)/5 {
				t.Fatalf("%d of %d settings were measured of %+v", n, len(grid), s)
			}
			best, ok := search.Best()
			top, _ := Best(all)
			if !ok {
				t.Fatalf("nothing is recommended for %+v", s)
			}
			_, got := s.run(best)
			_, want := s.run(top)
			looks, cost, worst = looks+n, cost+took/s.row, min(worst, got/want)
			if got < 0.95*want {
				missed++
				t.Logf("%+v gives %.3f of %+v: %+v", best, got/want, top, s)
			}
		}
		t.Logf("seed %d, %d cores: %d of %d below 0.95, the worst %.3f; %.1f measurements, %.3f of the time", seed, cores, missed, machines, worst, float64(looks)/machines, cost/most)
		if missed > machines/100 || worst < 0.85 || cost > most/5 {
			t.Errorf("%d cores: %d of %d are below 0.95, the worst is %.3f, the search takes %.3f of the time", cores, missed, machines, worst, cost/most)
		}
	}
}

// TestSearchKeepsItsRules lets settings fail, fit or not, and providers be few
// or many.
func TestSearchKeepsItsRules(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		seed := rapid.Uint64().Draw(t, "seed")
		s := drawn(rand.New(rand.NewPCG(seed, 0)), rapid.IntRange(1, 24).Draw(t, "cores"))
		space := s.space()
		space.Batch = rapid.IntRange(1, 100).Draw(t, "batch")
		space.Providers = [][]string{{CPU}, {"CUDAExecutionProvider", CPU}, {}}[rapid.IntRange(0, 2).Draw(t, "providers")]
		room := rapid.IntRange(1, 256).Draw(t, "room")
		space.Fits = func(set Setting) bool { return set.Batch*set.Instances <= room }
		broken := rapid.IntRange(1, 128).Draw(t, "broken from")
		grid := space.Grid()
		search := NewSearch(space)
		for set, more := search.Next(); more; set, more = search.Next() {
			if _, again := search.Result(set); again {
				t.Fatalf("%+v is asked for again", set)
			}
			if !space.fits(set) || set.Batch > space.Batch || !slices.Contains(space.Providers, set.Provider) ||
				set.Threads < 1 || set.Threads > space.Cores || set.Instances < 1 || set.Instances > space.Cores {
				t.Fatalf("%+v is not in the space", set)
			}
			r := s.measure(set)
			if set.Batch >= broken {
				r = Result{Err: errors.New("out of memory")}
			}
			search.Add(set, r)
			if n := len(search.Measured()); n > max(len(grid)/part, minLooks) {
				t.Fatalf("%d of %d settings were measured", n, len(grid))
			}
		}
		best, ok := search.Best()
		if works := broken > 1 && len(space.Providers) > 0; ok != works {
			t.Fatalf("a recommendation: %v, want %v", ok, works)
		}
		if r, _ := search.Result(best); ok && (r.Err != nil || r.P50 > search.bound()) {
			t.Fatalf("%+v is recommended: %+v", best, r)
		}
	})
}

func TestBest(t *testing.T) {
	set := func(batch, instances int, prepacked bool) Setting {
		return Setting{CPU, batch, instances, 2, prepacked}
	}
	ms := time.Millisecond
	tests := []struct {
		name  string
		known map[Setting]Result
		want  Setting
		ok    bool
	}{
		{"nothing", nil, Setting{}, false},
		{"all fail", map[Setting]Result{set(1, 1, false): {Err: errors.New("no")}}, Setting{}, false},
		{"the most rows", map[Setting]Result{
			set(1, 1, false): {P50: ms, RowsPerSecond: 1000}, set(4, 1, false): {P50: 2 * ms, RowsPerSecond: 2000}}, set(4, 1, false), true},
		{"not for too long", map[Setting]Result{
			set(1, 1, false): {P50: ms, RowsPerSecond: 1000}, set(64, 1, false): {P50: 17 * ms, RowsPerSecond: 3764}}, set(1, 1, false), true},
		{"less memory", map[Setting]Result{
			set(1, 1, false): {P50: ms, RowsPerSecond: 990, Peak: 100}, set(1, 1, true): {P50: ms, RowsPerSecond: 1000, Peak: 200}}, set(1, 1, false), true},
		{"memory for more", map[Setting]Result{
			set(1, 1, false): {P50: ms, RowsPerSecond: 970, Peak: 100}, set(1, 1, true): {P50: ms, RowsPerSecond: 1000, Peak: 200}}, set(1, 1, true), true},
	}
	for _, tt := range tests {
		if got, ok := Best(tt.known); got != tt.want || ok != tt.ok {
			t.Errorf("%s: %+v %v, want %+v %v", tt.name, got, ok, tt.want, tt.ok)
		}
	}
}
