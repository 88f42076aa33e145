package reconcile

import "time"

// Missing chunks that are near each other are asked for in one request: the
// bytes between them cost less than a round trip. How near is measured, within
// these bounds; those bytes are at most a wasteShare-th of what is needed.
const (
	leastGap   = 64 << 10
	mostGap    = 512 << 10
	wasteShare = 20
)

// A range is as long as what one stream brings in rangeTime, within these
// bounds, and at least one chunk: so an answer is never long behind others.
const (
	rangeTime  = 2 * time.Second
	leastRange = 256 << 10
	firstRange = 1 << 20
	mostRange  = 8 << 20
)

// pacer says how many ranges of one download are under way at a time, and how
// long they are. It is pure.
type pacer struct {
	most    int // streams that the source takes
	streams int
	thrifty bool // bytes cost more than time

	latency time.Duration // until an answer begins, smoothed
	rate    float64       // bytes a second of all streams, in the last round
	best    float64
	round   int64 // bytes so far in this round
	left    int   // ranges to come in this round
	since   time.Time
	waste   int64 // bytes that may still travel in vain
}

// newPacer begins with one stream: whether the source answers with ranges is
// not known yet.
func newPacer(most int, need int64, thrifty bool, now time.Time) *pacer {
	return &pacer{most: max(most, 1), streams: 1, thrifty: thrifty, left: 1, since: now, waste: need / wasteShare}
}

// began takes in that an answer has begun, and how long after it was asked for.
func (p *pacer) began(after time.Duration) {
	if p.latency == 0 {
		p.latency = after
	}
	p.latency += (after - p.latency) / 4
}

// ended takes in that a range has come. After each round, of a range for each
// stream, one more stream is tried while that has made all of them together
// faster, and one less where they have become slower.
func (p *pacer) ended(bytes int64, now time.Time) {
	p.round += bytes
	if p.left--; p.left > 0 {
		return
	}
	p.rate = float64(p.round) / max(now.Sub(p.since).Seconds(), 1e-6)
	switch {
	case p.rate > p.best*1.1:
		p.best = p.rate
		p.streams = min(p.streams+1, p.most)
	case p.rate < p.best*0.7:
		p.best = p.rate
		p.streams = max(p.streams-1, 1)
	}
	p.round, p.left, p.since = 0, p.streams, now
}

// failed takes in that a stream broke off.
func (p *pacer) failed() { p.streams, p.best, p.round, p.left = 1, 0, 0, 1 }

// length gives the length of the next range.
func (p *pacer) length() int64 {
	if p.rate == 0 {
		return firstRange
	}
	return min(max(int64(p.rate/float64(p.streams)*rangeTime.Seconds()), leastRange), mostRange)
}

// gap gives how far from each other chunks of one range may be.
func (p *pacer) gap() int64 {
	if p.thrifty {
		return leastGap
	}
	cost := int64(p.latency.Seconds() * p.rate / float64(p.streams))
	return min(max(min(cost, p.waste), leastGap), mostGap)
}

// nextRange gives the range of bytes to ask for next, of the pieces that are
// wanted; empty when none is. The pieces are in the order of their offsets,
// and waste, which is at most vain, is how many bytes between them are not
// wanted.
func nextRange(pieces []piece, wanted func(*piece) bool, gap, vain, length int64) (start, end, waste int64) {
	for i := range pieces {
		p := &pieces[i]
		if !wanted(p) {
			continue
		}
		switch pieceEnd := p.offset + int64(p.length); {
		case start == end:
			start, end = p.offset, pieceEnd
		case p.offset-end >= gap || waste+p.offset-end > vain || pieceEnd-start > length:
			return start, end, waste
		default:
			waste += p.offset - end
			end = pieceEnd
		}
	}
	return start, end, waste
}
