package reconcile

import (
	"testing"
	"time"

	"pgregory.net/rapid"
)

func TestNextRange(t *testing.T) {
	const gap, most = leastGap, mostRange
	have := func(offset int64, length int) piece { return piece{offset: offset, length: length, have: true} }
	lack := func(offset int64, length int) piece { return piece{offset: offset, length: length} }
	tests := []struct {
		name              string
		pieces            []piece
		start, end, waste int64
	}{
		{"nothing", []piece{have(0, 10)}, 0, 0, 0},
		{"one", []piece{have(0, 10), lack(10, 5), have(15, 5)}, 10, 15, 0},
		{"small gap", []piece{lack(0, 10), have(10, gap-1), lack(gap+9, 5)}, 0, gap + 14, gap - 1},
		{"large gap", []piece{lack(0, 10), have(10, gap), lack(gap+10, 5)}, 0, 10, 0},
		{"longest", []piece{lack(0, most-1), lack(most-1, 1), lack(most, 1)}, 0, most, 0},
		{"one too long", []piece{lack(0, most+1), lack(most+1, 1)}, 0, most + 1, 0},
	}
	for _, tt := range tests {
		start, end, waste := nextRange(tt.pieces, func(p *piece) bool { return !p.have }, gap, gap, most)
		if start != tt.start || end != tt.end || waste != tt.waste {
			t.Errorf("%s: %d to %d with %d in vain, want %d to %d with %d", tt.name, start, end, waste, tt.start, tt.end, tt.waste)
		}
	}
}

// run drives a pacer over a link that brings rate bytes a second through as
// many streams as it likes, and at most each through one.
func runPacer(p *pacer, rate, each float64, latency time.Duration, ranges int) {
	now := time.Time{}
	for range ranges {
		p.began(latency)
		n := p.length()
		all := min(rate, each*float64(p.streams))
		now = now.Add(latency/time.Duration(p.streams) + time.Duration(float64(n)/all*1e9))
		p.ended(n, now)
	}
}

func TestPacer(t *testing.T) {
	tests := []struct {
		name         string
		rate, each   float64
		latency      time.Duration
		least, most  int // streams in the end
		short, long  int64
		lgap, uppgap int64
	}{
		{"one stream is bound by its window", 40e6, 10e6, 100 * time.Millisecond, 4, 4, mostRange, mostRange, mostGap, mostGap},
		{"the link is bound", 100e3, 100e3, 20 * time.Millisecond, 1, 2, leastRange, leastRange, leastGap, leastGap},
		{"near and fast", 300e6, 300e6, 200 * time.Microsecond, 1, 2, mostRange, mostRange, leastGap, leastGap},
	}
	for _, tt := range tests {
		p := newPacer(4, 1<<30, false, time.Time{})
		runPacer(p, tt.rate, tt.each, tt.latency, 50)
		if p.streams < tt.least || p.streams > tt.most {
			t.Errorf("%s: %d streams, want %d to %d", tt.name, p.streams, tt.least, tt.most)
		}
		if n := p.length(); n < tt.short || n > tt.long {
			t.Errorf("%s: ranges of %d bytes, want %d to %d", tt.name, n, tt.short, tt.long)
		}
		if g := p.gap(); g < tt.lgap || g > tt.uppgap {
			t.Errorf("%s: gap of %d bytes, want %d to %d", tt.name, g, tt.lgap, tt.uppgap)
		}
	}
	p := newPacer(4, 1<<30, true, time.Time{})
	runPacer(p, 40e6, 10e6, 100*time.Millisecond, 50)
	if g := p.gap(); g != leastGap {
		t.Errorf("where bytes cost money the gap is %d", g)
	}
}

// Whatever is missing, ranges cover it, once, and what travels in vain is
// within its share.
func TestRangesCoverWhatIsMissing(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var pieces []piece
		var at, need int64
		for range rapid.IntRange(0, 200).Draw(t, "pieces") {
			p := piece{offset: at, length: rapid.IntRange(64<<10, 1<<20).Draw(t, "length"), have: rapid.Bool().Draw(t, "have")}
			at += int64(p.length)
			if !p.have {
				need += int64(p.length)
			}
			pieces = append(pieces, p)
		}
		p := newPacer(4, need, false, time.Time{})
		p.rate, p.streams, p.latency = rapid.Float64Range(1e4, 1e9).Draw(t, "rate"), 2, time.Duration(rapid.IntRange(0, int(time.Second)).Draw(t, "latency"))
		var asked, end int64
		for {
			start, stop, waste := nextRange(pieces, func(p *piece) bool { return !p.have }, p.gap(), p.waste, p.length())
			if start == stop {
				break
			}
			if start < end {
				t.Fatalf("from %d, and before up to %d", start, end)
			}
			p.waste -= min(waste, p.waste)
			asked += stop - start
			end = stop
			for i := range pieces {
				if pieces[i].offset >= start && pieces[i].offset < stop {
					pieces[i].have = true
				}
			}
		}
		for _, p := range pieces {
			if !p.have {
				t.Fatalf("the piece at %d is left", p.offset)
			}
		}
		if vain := asked - need; vain > need/wasteShare {
			t.Errorf("%d bytes in vain for %d", vain, need)
		}
	})
}
