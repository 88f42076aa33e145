package profile

import (
	"cmp"
	"math/bits"
	"slices"
	"time"
)

// What the search goes by.
const (
	// MaxBatch is the largest batch that is looked at.
	MaxBatch = 64
	// MaxInstances is the most runs at a time that are looked at.
	MaxInstances = 8
	// Patience is how many times longer than the fastest run of one row a run
	// with the recommended setting may take. A batch of no more rows than this
	// is within it unless batching slows down; a larger one has to be worth it.
	Patience = 16
	// Near is how much of the best throughput a setting with less memory may
	// be without.
	Near = 0.02
	// gain is by how much a larger batch has to be better to look at one that
	// is larger still, and step by how much a neighbour has to be to be moved to.
	gain = 1.03
	step = 1.02
	// part of the grid that is measured at most, but for minLooks.
	part     = 5
	minLooks = 6
	// manyCores is from how many on there is more than one hill to climb.
	manyCores = 4
	// fills are measurements that are kept back for the model of latency.
	fills = 2
)

// Space is what there is to choose from.
type Space struct {
	Providers []string // that compute what they should, the preferred first
	Cores     int
	Batch     int // most rows of a run; 1 where rows are not independent
	// Prepack is where to begin: what was measured when the version was
	// compiled.
	Prepack bool
	// Fits says whether there is memory for a setting; nil: for each.
	Fits func(Setting) bool
}

// powers gives the powers of two up to n, at least 1, and n itself.
func powers(n int) []int {
	all := []int{1}
	for p := 2; p <= n; p *= 2 {
		all = append(all, p)
	}
	if last := all[len(all)-1]; last < n {
		all = append(all, n)
	}
	return all
}

// Grid gives every setting that a search without a guide would measure.
func (s Space) Grid() []Setting {
	var all []Setting
	for _, provider := range s.Providers {
		for _, prepacked := range []bool{false, true} {
			for _, threads := range powers(s.Cores) {
				for _, instances := range powers(min(s.Cores, MaxInstances)) {
					for _, batch := range powers(min(s.Batch, MaxBatch)) {
						if set := (Setting{provider, batch, instances, threads, prepacked}); s.fits(set) {
							all = append(all, set)
						}
					}
				}
			}
		}
	}
	return all
}

func (s Space) fits(set Setting) bool { return s.Fits == nil || s.Fits(set) }

// Search asks for one measurement after another. It is a function of what it
// was told: the same results lead to the same questions.
//
// For each provider it looks at one row with all cores in one run, with all in
// runs of their own, and in between; with the best of these at batches that
// grow fourfold while that pays; and then climbs from neighbour to neighbour.
// It ends where none is better, or a fifth of the grid has been looked at; and
// last it looks at what the model of latency lacks.
type Search struct {
	space  Space
	known  map[Setting]Result
	order  []Setting
	budget int
}

// NewSearch begins a search.
func NewSearch(s Space) *Search {
	return &Search{space: s, known: make(map[Setting]Result), budget: max(len(s.Grid())/part, minLooks)}
}

// Add tells what was measured.
func (s *Search) Add(set Setting, r Result) {
	if _, again := s.known[set]; !again {
		s.order = append(s.order, set)
	}
	s.known[set] = r
}

// Measured gives the settings that were measured, in that order.
func (s *Search) Measured() []Setting { return slices.Clone(s.order) }

// Result gives what was measured with a setting.
func (s *Search) Result(set Setting) (Result, bool) {
	r, ok := s.known[set]
	return r, ok
}

// Next gives the setting to be measured next; false says that the search is
// over.
func (s *Search) Next() (Setting, bool) {
	w := &walk{search: s, left: s.budget - fills - len(s.known)}
	for _, p := range s.space.Providers {
		if !w.provider(p) {
			return w.want, true
		}
	}
	if len(s.known) >= s.budget {
		return Setting{}, false
	}
	best, ok := s.Best()
	if !ok {
		return Setting{}, false
	}
	for _, batch := range fill(best.Batch, min(s.space.Batch, MaxBatch)) {
		set := best
		set.Batch = batch
		if _, known := s.known[set]; !known && s.space.fits(set) {
			return set, true
		}
	}
	return Setting{}, false
}

// fill gives the batches that the model of latency goes through besides the
// recommended one: one row, and about half way there in powers of two. Where
// that is one row, or two, some rows more: requests may bring as many.
func fill(recommended, most int) []int {
	if recommended <= 2 {
		return []int{1, min(4, max(most, 1))}
	}
	return []int{1, 1 << (bits.Len(uint(recommended)) / 2)}
}

// walk goes the way of a search through what is known, until it comes to what
// is not.
type walk struct {
	search *Search
	left   int // measurements that there may be
	want   Setting
}

// score gives how good a setting is; false: it is to be measured. Where there
// may be no more measurements it is as good as none.
func (w *walk) score(set Setting) (float64, bool) {
	r, known := w.search.known[set]
	if !known {
		if !w.search.space.fits(set) || w.left <= 0 {
			return 0, true
		}
		w.want = set
		return 0, false
	}
	if r.Err != nil || r.P50 > w.search.bound() {
		return 0, true
	}
	return r.RowsPerSecond, true
}

// bound gives how long a run may take.
func (s *Search) bound() time.Duration {
	least := time.Duration(0)
	for set, r := range s.known {
		if set.Batch == 1 && r.Err == nil && (least == 0 || r.P50 < least) {
			least = r.P50
		}
	}
	return Patience * least
}

// provider goes the way for one provider; false: something is to be measured.
func (w *walk) provider(p string) bool {
	s := w.search.space
	most := min(s.Cores, MaxInstances)
	seeds := []Setting{{p, 1, 1, s.Cores, s.Prepack}, {p, 1, most, max(s.Cores/most, 1), s.Prepack}}
	if s.Cores >= manyCores {
		half := min(1<<(bits.Len(uint(s.Cores))/2), most)
		seeds = append(seeds, Setting{p, 1, half, s.Cores / half, s.Prepack}, Setting{p, 1, 2, s.Cores, s.Prepack})
	}
	for _, set := range seeds {
		if _, ok := w.score(set); !ok {
			return false
		}
	}
	score := func(set Setting) float64 { n, _ := w.score(set); return n }
	slices.SortStableFunc(seeds, func(a, b Setting) int { return cmp.Compare(score(b), score(a)) })
	for i, seed := range seeds {
		if i > 0 && s.Cores < manyCores {
			break
		}
		if !w.climb(seed) {
			return false
		}
	}
	return true
}

// climb goes up from a setting until no neighbour is better; false: something
// is to be measured.
func (w *walk) climb(at Setting) bool {
	s := w.search.space
	best, _ := w.score(at)
	for largest := min(s.Batch, MaxBatch); at.Batch < largest; {
		next := at
		next.Batch = min(4*at.Batch, largest)
		score, ok := w.score(next)
		if !ok {
			return false
		}
		if score < best*gain {
			break
		}
		at, best = next, score
	}
	for moved := true; moved; {
		moved = false
		for _, next := range w.neighbours(at) {
			score, ok := w.score(next)
			if !ok {
				return false
			}
			if score > best*step {
				at, best, moved = next, score, true
				break
			}
		}
	}
	return true
}

// neighbours gives the settings next to one, the likeliest to be better first:
// other batches, the other layout of weights, other shares of the cores.
func (w *walk) neighbours(at Setting) []Setting {
	s := w.search.space
	var all []Setting
	add := func(change func(*Setting)) {
		next := at
		change(&next)
		if next != at && next.Batch >= 1 && next.Batch <= min(s.Batch, MaxBatch) &&
			next.Instances >= 1 && next.Instances <= min(s.Cores, MaxInstances) && next.Threads >= 1 && next.Threads <= s.Cores {
			all = append(all, next)
		}
	}
	larger := func(b *Setting) { b.Batch = min(2*b.Batch, max(s.Batch, 1), MaxBatch) }
	smaller := func(b *Setting) { b.Batch /= 2 }
	// Of a hill with one top, the side that is higher far away has it.
	far, near := at, at
	far.Batch, near.Batch = min(4*at.Batch, s.Batch, MaxBatch), at.Batch/4
	if w.search.known[far].RowsPerSecond >= w.search.known[near].RowsPerSecond {
		add(larger)
		add(smaller)
	} else {
		add(smaller)
		add(larger)
	}
	// What compiling found about it holds for one row.
	add(func(b *Setting) { b.Prepacked = !b.Prepacked })
	add(func(b *Setting) { b.Threads, b.Instances = b.Threads/2, b.Instances*2 })
	add(func(b *Setting) { b.Threads, b.Instances = b.Threads*2, b.Instances/2 })
	if 2*w.search.known[at].P50 > w.search.bound() {
		// Fewer runs at a time take less time each: a larger batch may be had.
		add(func(b *Setting) { b.Batch, b.Threads, b.Instances = 2*b.Batch, b.Threads*2, b.Instances/2 })
		add(func(b *Setting) { b.Batch, b.Instances = 2*b.Batch, b.Instances/2 })
		add(func(b *Setting) { b.Batch, b.Threads, b.Instances = 4*b.Batch, b.Threads*4, b.Instances/4 })
	}
	add(func(b *Setting) { b.Instances *= 2 })
	add(func(b *Setting) { b.Threads *= 2 })
	add(func(b *Setting) { b.Threads, b.Instances = 4*b.Threads, b.Instances/2 })
	add(func(b *Setting) { b.Threads /= 2 })
	add(func(b *Setting) { b.Instances /= 2 })
	return all
}

// Best gives the setting that is recommended of those that were measured: of
// those whose median run takes at most Patience times as long as the fastest
// median run of one row, the one with the most rows per second; and of those
// within Near of it the one with the least memory, then the shortest run. The
// median stands for the tail too: the worst of a handful of runs says more of
// the device than of the setting. False: none could be run.
func (s *Search) Best() (Setting, bool) { return Best(s.known) }

// Best is Search.Best for results from anywhere.
func Best(known map[Setting]Result) (Setting, bool) {
	bound := (&Search{known: known}).bound()
	most := 0.0
	for _, r := range known {
		if r.Err == nil && r.P50 <= bound {
			most = max(most, r.RowsPerSecond)
		}
	}
	var best Setting
	found := false
	for set, r := range known {
		if r.Err != nil || r.P50 > bound || r.RowsPerSecond < most*(1-Near) || r.RowsPerSecond <= 0 {
			continue
		}
		if !found || cheaper(set, r, best, known[best]) < 0 {
			best, found = set, true
		}
	}
	return best, found
}

// cheaper compares what two settings cost.
func cheaper(a Setting, ra Result, b Setting, rb Result) int {
	memory := 0
	if ra.Peak > 0 && rb.Peak > 0 {
		memory = cmp.Compare(ra.Peak, rb.Peak)
	}
	packed := func(s Setting) int {
		if s.Prepacked {
			return 1
		}
		return 0
	}
	return cmp.Or(memory, cmp.Compare(packed(a), packed(b)), cmp.Compare(a.Batch*a.Instances, b.Batch*b.Instances),
		cmp.Compare(ra.P50, rb.P50), cmp.Compare(a.Threads, b.Threads), cmp.Compare(a.Batch, b.Batch), cmp.Compare(a.Provider, b.Provider))
}
