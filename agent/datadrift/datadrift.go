// Package datadrift tells whether what a version of a model is asked, and what
// it answers, is still distributed as in a reference.
//
// Of each row of an input or output it takes figures: the values at some
// positions, their mean, deviation and roughness, and of classes the most
// probable one and how sure it is. For each figure it counts in a few buckets
// how the reference is distributed, and how the last rows are. The reference is
// what came with the version, or else its first day.
//
// Drift is what two measures agree on for a figure: the population stability
// index, which says that a difference matters, and a test of two samples, which
// says that it is none of chance, and may be asked for ever; see chance. A
// change that leaves each figure by itself as it was is not seen.
//
// The package is pure: time comes from its caller. What is kept of a version is
// bounded by maxBytes, and no value leaves it.
package datadrift

import (
	"encoding/binary"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dunlin/dunlin/internal/sketch"
	"github.com/dunlin/dunlin/models/tensor"
)

// Threshold is the index above which data drifts.
const Threshold = 0.25

const (
	// The reference of a version that brings none is its first referenceTime,
	// and referenceRows rows at least. One that comes along has referenceLeast
	// rows at least.
	referenceTime  = 24 * time.Hour
	referenceRows  = 1000
	referenceLeast = 256
	// The last rows are windowBlocks blocks of blockRows rows. A look is taken
	// whenever a block is whole.
	blockRows    = 64
	windowBlocks = 4
	windowRows   = blockRows * windowBlocks
	// rowsASecond are taken into account at most, the first of each second. That
	// is a sample by time and not by content.
	rowsASecond = 1000

	// What a version's figures are taken of: maxTensors inputs and outputs, in
	// that order, and maxPositions positions of all of them together.
	maxTensors   = 8
	maxPositions = 64
	maxFigures   = maxPositions + 5*maxTensors
	maxClasses   = 1024
	// smallRow is from how many elements on a row has mean, deviation and
	// roughness.
	smallRow = 4

	// The buckets of a figure are bounded by deciles of the first learnRows
	// rows, and by the least and the largest of these. They count no more: so
	// the bounds are chosen independently of all that is counted.
	learnRows  = 100
	maxBounds  = 11
	maxBuckets = maxBounds + 1
	maxBytes   = 64 << 10

	// alpha bounds the probability that a version without drift is ever said to
	// have some.
	alpha = 1e-3
	// An index above psiRaise begins a drift (see sketch.PSI), which ends when
	// for calmLooks looks it is not above psiClear, or one look by itself would
	// find as much by chance with a probability above calmChance.
	psiRaise, psiClear = Threshold, 0.2
	calmLooks          = 2 * windowBlocks
	calmChance         = 0.01
	// unusual is by how much the distance must be more than the largest one
	// while the reference came together: a night is no drift.
	unusual = 0.1
)

// Evidence is how the last rows differ from the reference, by the figure that
// differs most.
type Evidence struct {
	Tensor string
	Output bool   // else an input
	Figure string // "element 12", "mean", "class"
	PSI    float64
	// Distance is the largest one of the two distribution functions. P bounds
	// the probability of such a difference without drift, corrected for all
	// figures and looks.
	Distance, P     float64
	Rows, Reference uint64
}

// String says it for people.
func (e Evidence) String() string {
	kind := "input"
	if e.Output {
		kind = "output"
	}
	p := fmt.Sprintf("p %.2g", e.P)
	if e.P < 1e-12 {
		p = "p < 1e-12"
	}
	return fmt.Sprintf("%s %q: %s is distributed otherwise in the last %d rows than in the %d of the reference: PSI %.2f, distance %.2f, %s", kind, e.Tensor, e.Figure, e.Rows, e.Reference, e.PSI, e.Distance, p)
}

// Finding is how a version stands.
type Finding struct {
	Looks   uint64 // how often rows were compared with a reference
	Drifted bool
	// Times is how often a drift has begun.
	Times uint64
	// Now is of the last look, Worst of the strongest one since the last drift
	// began; its Tensor is empty where there was none.
	Now, Worst Evidence
}

// Watch watches one version. It is safe for use by many goroutines. A nil one
// sees nothing.
type Watch struct {
	batched bool
	streams []*stream // inputs, then outputs
	figures float64   // of all of them
	finding atomic.Pointer[Finding]

	mu     sync.Mutex // guards what follows, and the streams
	second int64      // that left is of
	left   int        // rows that may be looked at in it
	row    [maxFigures]float32
}

// New gives a watch for a version of these inputs and outputs; nil where none
// has numbers. batched says that their first dimension is that of rows.
func New(inputs, outputs []tensor.Info, batched bool) *Watch {
	w := &Watch{batched: batched}
	for n, infos := range [][]tensor.Info{inputs, outputs} {
		for i := range infos {
			if infos[i].Type.Size() > 0 && len(w.streams) < maxTensors {
				w.streams = append(w.streams, newStream(&infos[i], n == 1, batched))
			}
		}
	}
	if len(w.streams) == 0 {
		return nil
	}
	// The small ones have what they need, the large ones share the rest.
	bySize := slices.Clone(w.streams)
	slices.SortStableFunc(bySize, func(a, b *stream) int { return a.width - b.width })
	positions := maxPositions
	for i, s := range bySize {
		n := min(s.width, positions/(len(bySize)-i))
		positions -= n
		s.place(n)
		w.figures += float64(s.count)
	}
	return w
}

// Refer takes in the reference that came with the version, before the first
// Look. Those inputs and outputs that it gives too few rows of have the first
// day as theirs. It says whether there are any that it suffices for.
func (w *Watch) Refer(inputs, outputs []tensor.Tensor) (any bool) {
	if w == nil {
		return false
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for n, tensors := range [][]tensor.Tensor{inputs, outputs} {
		for i := range tensors {
			s := w.stream(&tensors[i], n == 1)
			if rows, _ := w.rows(&tensors[i], s); rows < referenceLeast {
				continue
			}
			w.tensor(s, &tensors[i], math.MaxInt, time.Time{})
			s.whole(w.figures)
			for k := range s.figures { // its order says nothing
				s.figures[k].usual = 0
			}
			any = true
		}
	}
	return any
}

// Look takes in requests that were answered. It keeps nothing of them.
func (w *Watch) Look(now time.Time, inputs, outputs [][]tensor.Tensor) {
	if w == nil {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if s := now.Unix(); s != w.second {
		w.second, w.left = s, rowsASecond
	}
	for i := range inputs {
		if w.left <= 0 {
			return
		}
		most := 0
		for n := range inputs[i] {
			t := &inputs[i][n]
			most = max(most, w.tensor(w.stream(t, false), t, w.left, now))
		}
		if i < len(outputs) {
			for n := range outputs[i] {
				t := &outputs[i][n]
				most = max(most, w.tensor(w.stream(t, true), t, w.left, now))
			}
		}
		w.left -= most
	}
}

// Finding says how the version stands, as of the last look. It does not wait.
func (w *Watch) Finding() Finding {
	if w != nil {
		if f := w.finding.Load(); f != nil {
			return *f
		}
	}
	return Finding{}
}

// find works the finding out.
func (w *Watch) find() *Finding {
	f := new(Finding)
	for _, s := range w.streams {
		f.Looks += s.looks
		f.Times += s.times
		if s.now.Tensor != "" && (f.Now.Tensor == "" || s.now.PSI > f.Now.PSI) {
			f.Now = s.now
		}
		// What drifts counts before what did.
		if s.worst.Tensor != "" && (f.Worst.Tensor == "" || s.drifted && !f.Drifted || s.drifted == f.Drifted && s.worst.PSI > f.Worst.PSI) {
			f.Worst = s.worst
		}
		f.Drifted = f.Drifted || s.drifted
	}
	return f
}

func (w *Watch) stream(t *tensor.Tensor, output bool) *stream {
	for _, s := range w.streams {
		if s.output == output && s.name == t.Name {
			return s
		}
	}
	return nil
}

// rows gives how many rows a tensor has, and the bytes of each; 0 of what is
// not looked at, or does not hold what it says.
func (w *Watch) rows(t *tensor.Tensor, s *stream) (rows, size int) {
	if s == nil || t.Type != s.typ || len(t.Data) == 0 {
		return 0, 0
	}
	rows = 1
	if w.batched && len(t.Shape) > 0 {
		if t.Shape[0] <= 0 || t.Shape[0] > int64(len(t.Data)) {
			return 0, 0
		}
		rows = int(t.Shape[0])
	}
	if len(t.Data)%(rows*s.size) != 0 {
		return 0, 0
	}
	return rows, len(t.Data) / rows
}

// tensor takes in rows of a tensor, most at most, and gives how many.
func (w *Watch) tensor(s *stream, t *tensor.Tensor, most int, now time.Time) int {
	rows, size := w.rows(t, s)
	rows = min(rows, most)
	for i := range rows {
		row := w.row[:s.count]
		s.measure(t.Data[i*size:(i+1)*size], row)
		if s.take(row, now, w.figures) {
			w.finding.Store(w.find())
		}
	}
	return rows
}

// stream is an input or output.
type stream struct {
	name   string
	output bool
	typ    tensor.Type
	size   int // of an element
	width  int // elements of a row; maxWidth: that many, more, or not known
	fixed  bool
	class  bool

	at      []float64 // positions, as parts of a row
	count   int       // of figures
	figures []figure  // of the positions, then mean, deviation and roughness, then class; nil before the first row
	learn   []float32 // the first values of each figure; nil once the bounds are known
	limits  []limits  // of each figure; nil until the reference is whole

	began time.Time // when the reference began
	seen  uint64    // rows of the reference, those learned from included
	full  bool      // the reference is whole

	rows    int // of the present block
	block   int
	filled  int    // blocks that are whole
	looks   uint64 // since the reference is whole
	calm    int    // looks
	drifted bool
	times   uint64
	now     Evidence
	worst   Evidence // as in Finding
}

// figure is how one figure of a row is distributed.
type figure struct {
	bounds    [maxBounds]float32 // upper ones, rising
	n         int                // of them
	usual     float64            // the largest distance while the reference came together
	reference [maxBuckets]uint32
	window    [windowBlocks][maxBuckets]uint8
}

// limits are between which values the distribution function lies at each bound.
type limits [maxBounds]struct{ low, high float32 }

const maxWidth = 1 << 30

func newStream(info *tensor.Info, output, batched bool) *stream {
	s := &stream{name: info.Name, output: output, typ: info.Type, size: info.Type.Size(), width: 1, fixed: info.Shape != nil}
	dims := info.Shape
	if batched && len(dims) > 0 {
		dims = dims[1:]
	}
	for _, d := range dims {
		s.fixed = s.fixed && d >= 0
		if s.width = int(max(min(int64(s.width)*min(d, maxWidth), maxWidth), 0)); d < 0 {
			s.width = maxWidth
		}
	}
	if !s.fixed {
		s.width = maxWidth
	}
	s.width = max(s.width, 1)
	float := info.Type == tensor.Float32 || info.Type == tensor.Float16
	s.class = output && float && len(info.Shape) == 2 && (batched || info.Shape[0] == 1) && (info.Shape[1] < 0 || info.Shape[1] >= 2 && info.Shape[1] <= maxClasses)
	return s
}

// place chooses n positions: all where there are no more, else one at random of
// each n-th part of the row, always the same ones.
func (s *stream) place(n int) {
	r := rand.New(rand.NewPCG(0x6461746164726966, uint64(n)))
	s.at = make([]float64, n)
	for i := range s.at {
		within := 0.5
		if s.width != n {
			within = r.Float64()
		}
		s.at[i] = (float64(i) + within) / float64(n)
	}
	if s.width >= smallRow {
		n += 3
	}
	if s.class {
		n += 2
	}
	s.count = n
}

// called names a figure.
func (s *stream) called(i int) string {
	switch i -= len(s.at); {
	case i < 0 && s.fixed:
		return fmt.Sprintf("element %d", int(s.at[i+len(s.at)]*float64(s.width)))
	case i < 0:
		return fmt.Sprintf("the element at %.0f %%", 100*s.at[i+len(s.at)])
	case s.width >= smallRow && i < 3:
		return []string{"the mean", "the standard deviation", "the roughness"}[i]
	case i == s.count-len(s.at)-1:
		return "the largest value"
	}
	return "the class"
}

// measure takes the figures of a row. Mean, deviation and roughness, which is
// the mean difference of an element to the next one, are those at the positions.
func (s *stream) measure(row []byte, figures []float32) {
	n := len(row) / s.size
	value := func(i int) float64 {
		if s.typ == tensor.Float32 {
			return float64(math.Float32frombits(binary.LittleEndian.Uint32(row[4*i:])))
		}
		return s.typ.Number(row[i*s.size:])
	}
	var sum, squares, rough float64
	for k, part := range s.at {
		i := min(int(part*float64(n)), n-1)
		x := value(i)
		figures[k] = float32(x)
		if s.width >= smallRow {
			sum += x
			squares += x * x
			rough += math.Abs(x - value(min(i+1, n-1)))
		}
	}
	if s.width >= smallRow {
		k := float64(len(s.at))
		mean := sum / k
		figures = figures[len(s.at):]
		figures[0], figures[1], figures[2] = float32(mean), float32(math.Sqrt(max(squares/k-mean*mean, 0))), float32(rough/k)
	}
	if s.class {
		class, most := -1, math.Inf(-1)
		for i := range min(n, maxClasses) {
			if x := value(i); x > most {
				class, most = i, x
			}
		}
		figures = figures[len(figures)-2:]
		figures[0], figures[1] = float32(class), float32(most)
	}
}

// take takes in the figures of a row and says whether it looked; all is how many
// figures the version has.
func (s *stream) take(row []float32, now time.Time, all float64) (looked bool) {
	if s.seen == 0 {
		s.began, s.figures, s.learn = now, make([]figure, s.count), make([]float32, s.count*learnRows)
	}
	if s.learn != nil {
		for i, x := range row {
			s.learn[i*learnRows+int(s.seen)] = x
		}
		if s.seen++; s.seen == learnRows {
			s.bound()
		}
		return false
	}
	if !s.full && s.counted() >= referenceRows && now.Sub(s.began) >= referenceTime {
		s.whole(all)
	}
	for i, x := range row {
		f := &s.figures[i]
		b := f.bucket(x)
		f.window[s.block][b]++
		if !s.full {
			f.reference[b]++
		}
	}
	if !s.full {
		s.seen++
	}
	if s.rows++; s.rows < blockRows {
		return false
	}
	s.filled = min(s.filled+1, windowBlocks)
	switch {
	case s.filled < windowBlocks:
	case s.full:
		s.look(all)
		looked = true
	case s.counted() >= referenceRows:
		for i := range s.figures {
			f := &s.figures[i]
			f.usual = max(f.usual, f.distance(s.counted()))
		}
	}
	s.rows, s.block = 0, (s.block+1)%windowBlocks
	for i := range s.figures {
		s.figures[i].window[s.block] = [maxBuckets]uint8{}
	}
	return looked
}

// bound gives the figures their buckets.
func (s *stream) bound() {
	for i := range s.figures {
		f, sorted := &s.figures[i], s.learn[i*learnRows:(i+1)*learnRows]
		slices.Sort(sorted) // NaN comes first
		for len(sorted) > 0 && sorted[0] != sorted[0] {
			sorted = sorted[1:]
		}
		add := func(x float32) {
			if !math.IsInf(float64(x), 0) && (f.n == 0 || x > f.bounds[f.n-1]) {
				f.bounds[f.n] = x
				f.n++
			}
		}
		if len(sorted) > 0 {
			add(math.Nextafter32(sorted[0], float32(math.Inf(-1))))
			for q := 1; q <= 10; q++ {
				add(sorted[(len(sorted)-1)*q/10])
			}
		}
	}
	s.learn = nil
}

// bucket gives that of a value; one that is no number is above all bounds.
func (f *figure) bucket(x float32) int {
	i := 0
	for i < f.n && !(x <= f.bounds[i]) {
		i++
	}
	return i
}

// counted gives the rows that the reference counts.
func (s *stream) counted() uint64 { return s.seen - learnRows }

// whole ends the reference.
func (s *stream) whole(all float64) {
	s.full, s.rows, s.block, s.filled = true, 0, 0, 0
	s.limits = make([]limits, len(s.figures))
	for i := range s.figures {
		f := &s.figures[i]
		f.window = [windowBlocks][maxBuckets]uint8{}
		f.limit(&s.limits[i], s.counted(), all)
	}
}

// distance gives the largest one of the distribution functions of the last rows
// and of the reference, of so many rows, at the bounds of the buckets.
func (f *figure) distance(reference uint64) (most float64) {
	var r, w uint32
	for b := range f.n {
		r += f.reference[b]
		for k := range f.window {
			w += uint32(f.window[k][b])
		}
		most = max(most, math.Abs(float64(r)/float64(reference)-float64(w)/windowRows))
	}
	return most
}

// psi gives the population stability index of the last rows.
func (f *figure) psi() float64 {
	var reference, window [maxBuckets]uint64
	for b := range maxBuckets {
		reference[b] = uint64(f.reference[b])
		for k := range f.window {
			window[b] += uint64(f.window[k][b])
		}
	}
	return sketch.PSI(reference[:], window[:])
}

// divergence is that of Kullback and Leibler between two events of these
// probabilities.
func divergence(p, q float64) (d float64) {
	if p > 0 {
		d += p * math.Log(p/q)
	}
	if p < 1 {
		d += (1 - p) * math.Log((1-p)/(1-q))
	}
	return d
}

// limit finds the limits of a figure's distribution function from its reference.
func (f *figure) limit(l *limits, reference uint64, all float64) {
	n := float64(reference)
	most := math.Log(4*all*maxBounds/alpha) / n
	var below uint64
	for b := range f.n {
		below += uint64(f.reference[b])
		share := float64(below) / n
		reach := func(end float64) float32 {
			near, far := share, end
			for range 24 {
				if middle := (near + far) / 2; divergence(share, middle) <= most {
					near = middle
				} else {
					far = middle
				}
			}
			return float32(far)
		}
		l[b].low, l[b].high = reach(0), reach(1)
	}
}

// chance gives the logarithm of a bound of the probability that without drift a
// share of the last rows is as far beyond the limits as one of theirs is, at the
// bound of a bucket where it is least likely.
//
// Of n independent rows, a share of s or more, where p < s is the probability of
// one, comes with a probability of exp(-n D(s, p)) at most, D being the
// divergence, and so does one of s or less where p > s (Hoeffding, Probability
// inequalities for sums of bounded random variables, 1963). Half of alpha is
// spent once, on the reference, evenly on both sides of all bounds of all
// figures: that gives the limits between which p lies. The other half is spent on
// the last rows, evenly on the same, and on look k a share of 6/(pi k)^2, whose
// sum is 1 for however many looks; see corrected. The union bound asks for no
// independence of figures, or of windows that overlap; that rows are independent
// of each other is what it takes for granted.
func (f *figure) chance(l *limits) (least float64) {
	var below uint32
	for b := range f.n {
		for k := range f.window {
			below += uint32(f.window[k][b])
		}
		share := float64(below) / windowRows
		switch low, high := float64(l[b].low), float64(l[b].high); {
		case share > high:
			least = min(least, -windowRows*divergence(share, high))
		case share < low:
			least = min(least, -windowRows*divergence(share, low))
		}
	}
	return least
}

// corrected gives the probability for as many figures and look k: at most alpha
// is none of chance.
func corrected(chance, figures float64, look uint64) float64 {
	k := float64(look)
	return min(1, math.Exp(chance)*4*figures*maxBounds*math.Pi*math.Pi*k*k/6)
}

// look compares the last rows with the reference. What it finds is of the figure
// with the largest index of those whose difference is none of chance, and else
// of the one that is least likely, or furthest away.
func (s *stream) look(all float64) {
	s.looks++
	found, significant, least := Evidence{}, false, 0.
	for i := range s.figures {
		f := &s.figures[i]
		distance := f.distance(s.counted())
		if distance < f.usual+unusual {
			continue
		}
		chance := f.chance(&s.limits[i])
		p := corrected(chance, all, s.looks)
		e := Evidence{Tensor: s.name, Output: s.output, Distance: distance, P: p, Rows: windowRows, Reference: s.counted()}
		switch {
		case p <= alpha:
			e.PSI = f.psi()
			if significant && e.PSI <= found.PSI {
				continue
			}
		case significant || chance > least || chance == least && distance <= found.Distance:
			continue
		default:
			e.PSI = f.psi()
		}
		e.Figure = s.called(i)
		found, significant, least = e, p <= alpha, chance
	}
	s.now = found
	switch {
	case !s.drifted && significant && found.PSI > psiRaise:
		s.drifted, s.calm, s.worst = true, 0, found
		s.times++
	case s.drifted && found.PSI > psiClear && corrected(least, all, 1) <= calmChance:
		s.calm = 0
		if significant && found.PSI > s.worst.PSI {
			s.worst = found
		}
	case s.drifted:
		if s.calm++; s.calm >= calmLooks {
			s.drifted = false
		}
	}
}
