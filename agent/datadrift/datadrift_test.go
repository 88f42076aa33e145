package datadrift

import (
	"encoding/binary"
	"math"
	"math/rand/v2"
	"testing"
	"time"
	"unsafe"

	"github.com/dunlin/dunlin/models/examples/digits"
	"github.com/dunlin/dunlin/models/tensor"
)

var noon = time.Date(2026, 6, 1, 12, 0, 0, 0, time.UTC)

// The inputs and outputs of the digits' models.
var (
	images  = tensor.Info{Name: "image", Type: tensor.Float32, Shape: []int64{-1, 1, 8, 8}}
	scores  = tensor.Info{Name: "probabilities", Type: tensor.Float32, Shape: []int64{-1, 10}}
	classes = tensor.Info{Name: "label", Type: tensor.Int64, Shape: []int64{-1}}
)

func floats(name string, shape []int64, values []float32) tensor.Tensor {
	t := tensor.Tensor{Name: name, Type: tensor.Float32, Shape: shape, Data: make([]byte, 0, 4*len(values))}
	for _, v := range values {
		t.Data = binary.LittleEndian.AppendUint32(t.Data, math.Float32bits(v))
	}
	return t
}

// image gives a request of one image.
func image(x *[64]float32) [][]tensor.Tensor {
	return [][]tensor.Tensor{{floats("image", []int64{1, 1, 8, 8}, x[:])}}
}

// label gives an answer of one row.
func label(n int64) [][]tensor.Tensor {
	return [][]tensor.Tensor{{{Name: "label", Type: tensor.Int64, Shape: []int64{1}, Data: binary.LittleEndian.AppendUint64(nil, uint64(n))}}}
}

// seeds are those of the tests; each says which one it is about.
var seeds = []uint64{1, 2, 3, 4, 5, 6, 7, 8}

func random(seed uint64) *rand.Rand { return rand.New(rand.NewPCG(seed, 8)) }

// changes are what befalls the digits.
var changes = map[string]func(r *rand.Rand, x [64]float32) [64]float32{
	"rotated": func(_ *rand.Rand, x [64]float32) (y [64]float32) {
		for i := range y {
			y[i] = x[(7-i%8)*8+i/8]
		}
		return y
	},
	"rotated the other way": func(_ *rand.Rand, x [64]float32) (y [64]float32) {
		for i := range y {
			y[i] = x[i%8*8+7-i/8]
		}
		return y
	},
	"noise of 1 of 16": noisy(1),
	"noise of 2 of 16": noisy(2),
	"noise of 4 of 16": noisy(4),
}

// noisy adds noise of a standard deviation, within the values that pixels have.
func noisy(deviation float64) func(r *rand.Rand, x [64]float32) [64]float32 {
	return func(r *rand.Rand, x [64]float32) [64]float32 {
		for i := range x {
			x[i] = min(max(float32(math.Round(float64(x[i])+deviation*r.NormFloat64())), 0), 16)
		}
		return x
	}
}

// feed feeds a watch one request after the other.
type feed struct {
	w   *Watch
	now time.Time
}

func (f *feed) see(x [64]float32, class int, apart time.Duration) Finding {
	f.now = f.now.Add(apart)
	f.w.Look(f.now, image(&x), label(int64(class)))
	return f.w.Finding()
}

// All 600 held-out digits are the reference that comes along: those that are
// drawn from them, with replacement, raise nothing in 20,000 requests, and
// changed ones are noticed within 500. The labels are the true ones, for those
// that the model would give.
func TestDigits(t *testing.T) {
	all, labels := digits.HeldOut()
	whole := tensor.Tensor{Name: "image", Type: tensor.Float32, Shape: []int64{600, 1, 8, 8}}
	for i := range all {
		whole.Data = append(whole.Data, image(&all[i])[0][0].Data...)
	}
	for _, seed := range seeds {
		f := feed{New([]tensor.Info{images}, []tensor.Info{classes}, true), noon}
		if !f.w.Refer([]tensor.Tensor{whole}, nil) {
			t.Fatal("600 rows are no reference")
		}
		t.Logf("seed %d", seed)
		settled(t, f, seed, all, labels, 20000)
	}
}

// A version that brings no reference has its first day as one.
func TestFirstDay(t *testing.T) {
	all, labels := digits.HeldOut()
	for _, seed := range seeds {
		t.Logf("seed %d", seed)
		f := feed{New([]tensor.Info{images}, []tensor.Info{classes}, true), noon}
		r := random(seed)
		for range 1500 {
			i := r.IntN(len(all))
			if got := f.see(all[i], labels[i], 24*time.Hour/1499); got != (Finding{}) {
				t.Fatalf("seed %d: in the first day: %+v", seed, got)
			}
		}
		settled(t, f, seed, all, labels, 20000)
	}
}

// settled sends requests like the reference, then each kind of changed ones and
// requests as before.
func settled(t *testing.T, f feed, seed uint64, all [][64]float32, labels []int, requests int) {
	t.Helper()
	r := random(seed)
	most := 0.
	draw := func(n int, change func(*rand.Rand, [64]float32) [64]float32, until func(Finding) bool) int {
		for k := range n {
			i := r.IntN(len(all))
			x := all[i]
			if change != nil {
				x = change(r, x)
			}
			got := f.see(x, labels[i], time.Second)
			most = max(most, got.Now.Distance)
			if until(got) {
				return k + 1
			}
		}
		return 0
	}
	drifted := func(f Finding) bool { return f.Drifted }
	if n := draw(requests, nil, drifted); n != 0 {
		t.Fatalf("seed %d: request %d of those like the reference raises %+v", seed, n, f.w.Finding().Worst)
	}
	if f.w.Finding().Looks < uint64(requests/blockRows-8) {
		t.Errorf("seed %d: %d looks at %d requests", seed, f.w.Finding().Looks, requests)
	}
	t.Logf("seed %d: %d requests like the reference: distances up to %.3f", seed, requests, most)
	times := uint64(0)
	for _, name := range []string{"rotated", "rotated the other way", "noise of 1 of 16", "noise of 2 of 16", "noise of 4 of 16"} {
		n := draw(500, changes[name], drifted)
		if n == 0 {
			t.Errorf("seed %d, %s: nothing is noticed in 500 requests: %+v", seed, name, f.w.Finding())
			continue
		}
		times++
		found := f.w.Finding()
		if found.Times != times || found.Worst.Tensor != "image" || found.Worst.PSI <= psiRaise || found.Worst.Figure == "" || found.Worst.P > alpha {
			t.Errorf("seed %d, %s: %+v", seed, name, found)
		}
		t.Logf("seed %d: %s noticed after %d requests: %v", seed, name, n, found.Worst)
		back := draw(2000, nil, func(f Finding) bool { return !f.Drifted })
		if back < windowRows {
			t.Errorf("seed %d, after %s: over after %d requests", seed, name, back)
		}
	}
}

// Answers drift where requests do not.
func TestOutputs(t *testing.T) {
	for _, seed := range seeds {
		r := random(seed)
		w := New(nil, []tensor.Info{scores}, true)
		now := noon
		look := func(class int) Finding {
			var row [10]float32
			for i := range row {
				row[i] = float32(r.Float64() / 20)
			}
			row[class] = 0.7
			now = now.Add(90 * time.Second)
			w.Look(now, make([][]tensor.Tensor, 1), [][]tensor.Tensor{{floats("probabilities", []int64{1, 10}, row[:])}})
			return w.Finding()
		}
		for range 2000 {
			if look(r.IntN(10)).Drifted {
				t.Fatalf("seed %d: drift without change", seed)
			}
		}
		n := 0
		for ; n < 500 && !look(r.IntN(2)+4).Drifted; n++ {
		}
		if f := w.Finding(); !f.Drifted || !f.Worst.Output || f.Worst.Tensor != "probabilities" {
			t.Errorf("seed %d: of two classes only: %+v", seed, f)
		}
		t.Logf("seed %d: two classes of ten noticed after %d: %v", seed, n, w.Finding().Worst.Figure)
	}
}

// What differed as much by day and by night while the reference came together
// is no drift on the next days.
func TestDayAndNight(t *testing.T) {
	r := random(1)
	w := New([]tensor.Info{{Name: "x", Type: tensor.Float32, Shape: []int64{-1, 16}}}, nil, true)
	day := func(hour int, shift float64) {
		for n := range 600 {
			row := make([]float32, 16)
			for i := range row {
				row[i] = float32(r.NormFloat64() + shift)
				if hour%24 < 8 {
					row[i] -= 2
				}
			}
			w.Look(noon.Add(time.Duration(hour)*time.Hour+time.Duration(n)*6*time.Second), [][]tensor.Tensor{{floats("x", []int64{1, 16}, row)}}, nil)
		}
	}
	for hour := range 96 {
		if day(hour, 0); w.Finding().Drifted {
			t.Fatalf("hour %d: %v", hour, w.Finding().Worst)
		}
	}
	if day(96, 6); !w.Finding().Drifted {
		t.Error("what is above all that there was is no drift")
	}
}

// However often one looks, what is like the reference is not said to drift; and
// what differs by so much is, after however many looks.
func TestChance(t *testing.T) {
	whole := func(reference int, draw func() float64) *stream {
		s := &stream{width: 1, fixed: true, size: 4, typ: tensor.Float32, count: 1, name: "x"}
		for range learnRows + reference {
			s.take([]float32{float32(draw())}, noon, 1)
		}
		s.whole(1)
		return s
	}
	r := random(1)
	drifts, nearest := 0, 1.
	for range 300 {
		s := whole(referenceLeast-learnRows, r.NormFloat64)
		for range 100 * blockRows {
			s.take([]float32{float32(r.NormFloat64())}, noon, 1)
			if s.now.Tensor != "" {
				nearest = min(nearest, s.now.P)
			}
		}
		drifts += int(s.times)
	}
	t.Logf("300 streams without drift, 100 looks each: %d drifts, the least probability %.3g", drifts, nearest)
	if drifts > 0 {
		t.Errorf("%d drifts", drifts)
	}
	s := whole(1000, r.NormFloat64)
	s.looks = 1e9
	for range windowRows {
		s.take([]float32{float32(r.NormFloat64() + 1)}, noon, 1)
	}
	if !s.drifted {
		t.Errorf("after 1e9 looks, a shift by one deviation: %+v", s.now)
	}
	if corrected(-20, 80, 1000) <= corrected(-20, 80, 1) || corrected(-20, 80, 1) <= corrected(-20, 8, 1) || corrected(0, 1, 1) != 1 {
		t.Error("more looks, or more figures, are no worse")
	}
	var few, many limits
	f := figure{n: 1, reference: [maxBuckets]uint32{100, 100}}
	f.limit(&few, 200, 80)
	f.reference = [maxBuckets]uint32{10000, 10000}
	f.limit(&many, 20000, 80)
	if !(few[0].low < many[0].low && many[0].low < 0.5 && many[0].high > 0.5 && few[0].high > many[0].high && few[0].high < 1) {
		t.Errorf("limits of half: %v of 200 rows, %v of 20000", few[0], many[0])
	}
}

// What does not hold what it says is left out, and so is what is no number;
// numbers that are none are counted as such.
func TestOddRows(t *testing.T) {
	text := tensor.Info{Name: "text", Type: tensor.String, Shape: []int64{-1}}
	if New([]tensor.Info{text}, nil, true) != nil {
		t.Error("text is watched")
	}
	var none *Watch
	none.Look(noon, nil, nil)
	if none.Refer(nil, nil) || none.Finding() != (Finding{}) {
		t.Error("nothing finds something")
	}
	nan, inf := float32(math.NaN()), float32(math.Inf(1))
	open := tensor.Info{Name: "open", Type: tensor.Float32}
	w := New([]tensor.Info{images, open, text}, nil, true)
	now := noon
	look := func(t ...tensor.Tensor) {
		now = now.Add(2 * time.Minute)
		w.Look(now, [][]tensor.Tensor{t}, nil)
	}
	for range 2000 {
		look(floats("open", []int64{1, 3}, []float32{nan, inf, -inf}))
	}
	short := floats("image", []int64{1 << 40, 1, 8, 8}, make([]float32, 64))
	look(short)
	short.Shape[0] = 0
	look(short)
	short.Shape[0] = -4
	look(short)
	short.Shape[0] = 3
	look(short)
	look(tensor.Tensor{Name: "image", Type: tensor.Float64, Shape: []int64{1, 1, 8, 8}, Data: make([]byte, 512)})
	look(tensor.Tensor{Name: "image", Type: tensor.Float32, Shape: []int64{1, 0}})
	look(tensor.Tensor{Name: "other", Type: tensor.Float32, Shape: []int64{1}, Data: make([]byte, 4)})
	if w.streams[0].seen != 0 {
		t.Errorf("%d rows of what cannot be read", w.streams[0].seen)
	}
	if w.Finding().Looks == 0 || w.Finding().Drifted {
		t.Errorf("of what is no number: %+v", w.Finding())
	}
	for range 500 {
		look(floats("open", []int64{1, 3}, []float32{0, 0, 0}))
	}
	if !w.Finding().Drifted {
		t.Error("numbers instead of none are no drift")
	}
}

// So many rows a second count, and a large one is not read as a whole.
func TestRate(t *testing.T) {
	w := New([]tensor.Info{images}, nil, true)
	batch := [][]tensor.Tensor{{floats("image", []int64{300, 1, 8, 8}, make([]float32, 64*300))}}
	for range 10 {
		w.Look(noon, batch, nil)
	}
	if got := w.streams[0].seen; got != rowsASecond {
		t.Errorf("%d rows in a second, want %d", got, rowsASecond)
	}
	if w.Look(noon.Add(time.Second), batch, nil); w.streams[0].seen != rowsASecond+300 {
		t.Errorf("%d rows with the next one", w.streams[0].seen)
	}
}

// A version takes up so much memory at most, whatever its inputs and outputs.
func TestSize(t *testing.T) {
	wide := func(n int) (all []tensor.Info) {
		for range n {
			all = append(all, tensor.Info{Name: "x", Type: tensor.Float16, Shape: []int64{-1, 1000}})
		}
		return all
	}
	for _, n := range []int{1, 2, 3, 8, 50} {
		w := New(wide(n), wide(n), true)
		bytes, positions := int(unsafe.Sizeof(*w)), 0
		for _, s := range w.streams {
			positions += len(s.at)
			each := int(unsafe.Sizeof(figure{})) + max(4*learnRows, int(unsafe.Sizeof(limits{})))
			bytes += int(unsafe.Sizeof(*s)) + 8*len(s.at) + s.count*each
		}
		if bytes > maxBytes || w.figures > maxFigures || positions > maxPositions || positions < maxPositions-maxTensors {
			t.Errorf("of %d inputs: %d bytes, %v figures, %d positions", n, bytes, w.figures, positions)
		}
		t.Logf("of %d inputs and as many outputs: %d bytes", n, bytes)
	}
}

func BenchmarkLook(b *testing.B) {
	all, _ := digits.HeldOut()
	for name, row := range map[string]struct {
		info tensor.Info
		t    tensor.Tensor
	}{
		"64 elements":     {images, image(&all[0])[0][0]},
		"150528 elements": {tensor.Info{Name: "image", Type: tensor.Float32, Shape: []int64{-1, 3, 224, 224}}, floats("image", []int64{1, 3, 224, 224}, make([]float32, 3*224*224))},
	} {
		b.Run(name, func(b *testing.B) {
			w := New([]tensor.Info{row.info}, nil, true)
			in := [][]tensor.Tensor{{row.t}}
			now := noon
			for range 2000 {
				w.Look(now, in, nil)
				now = now.Add(time.Minute)
			}
			b.ReportAllocs()
			for b.Loop() {
				w.Look(now, in, nil)
				w.left = rowsASecond
			}
		})
	}
}
