package inband

import (
	"cmp"
	"slices"
	"time"

	"github.com/dunlin/dunlin/agent/reconcile"
	"github.com/dunlin/dunlin/internal/link"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// The limits of a flow.
const (
	// grain is what the places of blocks are multiples of.
	grain = link.MinFetchBlock
	// firstWindow is how many bytes are asked for at first, and maxWindow the
	// most; sharedWindow is that of a connection with other messages on it.
	firstWindow  = 16 << 10
	maxWindow    = 4 << 20
	sharedWindow = 64 << 10
	// firstBlock is the size of blocks until the rate is known, and
	// sharedBlock the most beside other messages.
	firstBlock  = 8 << 10
	sharedBlock = 16 << 10
	// askShare: what is asked for at a time is at least that part of the window,
	// so that there are few requests for many blocks.
	askShare = 8
	// blockTime is how long one block may take on its way, by the rate at
	// which they come: messages behind it wait that long.
	blockTime = time.Second
	// A block comes in time when it takes no more than timeFactor times what
	// the quickest took, and lateBy: more means that a queue builds up.
	timeFactor = 2
	lateBy     = 500 * time.Millisecond
	// leastTimeout and mostTimeout bound the wait for a block that is asked
	// for again.
	leastTimeout = 3 * time.Second
	mostTimeout  = time.Minute
	// overtaken is by how much later a block was asked for than one that has
	// not come, for that one to be lost: they come in order.
	overtaken = time.Second
	// maxAhead bounds what is asked for ahead of the reader of a stream.
	maxAhead = 8 << 20
	// maxBusy bounds the pause that a busy answer asks for.
	maxBusy = time.Minute
)

// flow decides what to ask for, and when: a window of bytes on their way that
// grows while blocks come in time, and halves when they do not come. It is
// pure; the caller says what time it is.
type flow struct {
	streams []*stream // in the order in which they began
	asks    map[uint64]*ask
	lastID  uint64

	window, threshold, onTheWay int64
	most                        int64 // of window
	mostBlock                   uint32
	quickest, smooth, spread    time.Duration // of the time that a block takes; 0: not known yet
	strikes                     int           // time-outs since the last block
	cutAt                       time.Time     // when the window was halved last
	pausedUntil                 time.Time     // as the controller asked
	rateBytes, rateSeconds      float64       // what came, in what time
	lastArrival, newest         time.Time     // when a block came last, and the latest time of asking for one that came
}

// span is a part of a blob, from a multiple of grain on.
type span struct{ from, to int64 }

// stream is one part of a blob that is asked for, in order.
type stream struct {
	ref     reconcile.Ref
	missing []span // neither here nor asked for, in order
	to      int64  // where it ends
	sized   bool   // to is known to be no more than the blob has
	at      int64  // of the reader
	parts   map[int64][]byte
	failed  error
	ready   chan struct{} // capacity 1: something has changed for the reader
}

// ask is one request.
type ask struct {
	stream *stream
	size   uint32
	out    map[uint64]time.Time // blocks that have not come, by when they were asked for
}

func newFlow() *flow {
	f := &flow{}
	f.begin(time.Time{}, false)
	return f
}

// begin says that there is a new connection; what was asked for on the one
// before is asked for again.
func (f *flow) begin(now time.Time, shared bool) {
	for _, a := range f.asks {
		for n := range a.out {
			f.lose(a, n)
		}
	}
	f.asks = map[uint64]*ask{}
	f.most, f.mostBlock = maxWindow, link.MaxBlock
	if shared {
		f.most, f.mostBlock = sharedWindow, sharedBlock
	}
	if f.lastID == 0 { // nothing is known of the way
		f.window, f.threshold = firstWindow, maxWindow
	} else {
		f.window, f.threshold = min(firstWindow, max(f.window/2, grain)), max(f.window/2, grain)
	}
	f.window = min(f.window, f.most)
	f.quickest, f.smooth, f.spread, f.strikes = 0, 0, 0, 0
	f.pausedUntil, f.cutAt, f.lastArrival, f.newest = time.Time{}, now, time.Time{}, time.Time{}
}

// add begins a stream.
func (f *flow) add(ref reconcile.Ref, offset, length int64) *stream {
	s := &stream{ref: ref, at: offset, parts: map[int64][]byte{}, ready: make(chan struct{}, 1)}
	from := offset / grain * grain
	if s.to = offset + length; length == 0 { // how long it is comes with the first block
		s.to = from + firstBlock
	} else {
		s.sized = true
	}
	s.missing = []span{{from, s.to}}
	f.streams = append(f.streams, s)
	return s
}

// remove ends a stream.
func (f *flow) remove(s *stream) {
	f.streams = slices.DeleteFunc(f.streams, func(o *stream) bool { return o == s })
	for id, a := range f.asks {
		if a.stream == s {
			f.onTheWay -= int64(a.size) * int64(len(a.out))
			delete(f.asks, id)
		}
	}
}

// blockSize gives the largest size of which one block takes no longer than
// blockTime, and the window holds a few.
func (f *flow) blockSize() uint32 {
	size := uint32(firstBlock)
	if f.rateSeconds > 0 {
		size = grain
		for size < link.MaxBlock && float64(2*size) <= f.rateBytes/f.rateSeconds*blockTime.Seconds() {
			size *= 2
		}
	}
	for size > grain && int64(size) > f.window/2 {
		size /= 2
	}
	return min(size, f.mostBlock)
}

// next gives the requests to send now.
func (f *flow) next(now time.Time) (requests []*dunlinv1.FetchRequest) {
	if now.Before(f.pausedUntil) {
		return nil
	}
	for _, s := range f.streams {
		for s.failed == nil {
			m := f.request(s, now)
			if m == nil {
				break
			}
			requests = append(requests, m)
		}
	}
	return requests
}

// request gives a request for blocks of one size, as many as the window has
// room for; nil: none.
func (f *flow) request(s *stream, now time.Time) *dunlinv1.FetchRequest {
	room := f.window - f.onTheWay
	if room < f.window/askShare {
		return nil // rather a few more at a time
	}
	at := f.skip(s)
	if at == len(s.missing) {
		return nil
	}
	size := f.blockSize()
	first := s.missing[at]
	for length := first.to - first.from; size > grain && (first.from%int64(size) != 0 || length <= int64(size)/2 || length < int64(size) && first.to != s.to); {
		size /= 2
	}
	a := &ask{stream: s, size: size, out: map[uint64]time.Time{}}
	begin := uint64(first.from) / uint64(size)
	var wanted []byte
	for at < len(s.missing) && (room >= int64(size) || f.onTheWay == 0) {
		m := &s.missing[at]
		n := uint64(m.from) / uint64(size)
		if m.from%int64(size) != 0 || n-begin >= link.MaxWanted || m.from >= s.at+maxAhead || m.to-m.from < int64(size) && m.to != s.to || f.coming(s, m.from) > m.from {
			break
		}
		if 2*size <= f.blockSize() && len(a.out) > 0 && m.from%int64(2*size) == 0 && m.to-m.from >= int64(2*size) {
			break // larger ones can follow
		}
		for uint64(len(wanted)) <= (n-begin)/8 {
			wanted = append(wanted, 0)
		}
		wanted[(n-begin)/8] |= 1 << ((n - begin) % 8)
		a.out[n] = now
		f.onTheWay += int64(size)
		room -= int64(size)
		if m.from += int64(size); m.from >= m.to {
			s.missing = slices.Delete(s.missing, at, at+1)
		}
	}
	if len(a.out) == 0 {
		return nil
	}
	f.lastID++
	f.asks[f.lastID] = a
	sum, _ := bytesOf(s.ref.Digest) // checked when the stream began
	return &dunlinv1.FetchRequest{
		Id: f.lastID, Model: s.ref.Model, Sha256: sum, Manifest: s.ref.Manifest,
		BlockBytes: size, First: begin, Wanted: wanted,
	}
}

// skip gives the first span of a stream that is not on its way for another one,
// as an index; what is, stays missing until it has come.
func (f *flow) skip(s *stream) int {
	for at := 0; at < len(s.missing); at++ {
		m := s.missing[at]
		end := f.coming(s, m.from)
		if end <= m.from {
			return at
		}
		if end < m.to {
			s.missing = slices.Insert(s.missing, at, span{m.from, end})
			s.missing[at+1].from = end
		}
	}
	return len(s.missing)
}

// coming gives the end of a block that was asked for by another stream of the
// same blob, and holds the byte at a place; 0: there is none. The controller
// sends a block once that is asked for twice at a time: parts that lie side by
// side have one in common.
func (f *flow) coming(s *stream, at int64) (end int64) {
	if len(f.streams) < 2 {
		return 0
	}
	for _, a := range f.asks {
		if a.stream == s || a.stream.ref != s.ref {
			continue
		}
		n := at / int64(a.size)
		if _, out := a.out[uint64(n)]; out {
			end = max(end, (n+1)*int64(a.size))
		}
	}
	return end
}

// lose makes a block that was asked for one that is missing.
func (f *flow) lose(a *ask, n uint64) {
	delete(a.out, n)
	f.onTheWay -= int64(a.size)
	from := int64(n) * int64(a.size)
	to := min(from+int64(a.size), a.stream.to)
	if from >= to {
		return
	}
	s := a.stream
	s.missing = append(s.missing, span{from, to})
	slices.SortFunc(s.missing, func(a, b span) int { return cmp.Compare(a.from, b.from) })
	merged := s.missing[:1]
	for _, m := range s.missing[1:] {
		if last := &merged[len(merged)-1]; last.to == m.from {
			last.to = m.to
		} else {
			merged = append(merged, m)
		}
	}
	s.missing = merged
}

// arrived takes in an answer, and says whether it has brought something.
func (f *flow) arrived(m *dunlinv1.FetchData, now time.Time) bool {
	a := f.asks[m.Id]
	if a == nil {
		return false
	}
	s := a.stream
	defer func() {
		if len(a.out) == 0 {
			delete(f.asks, m.Id)
		}
	}()
	switch m.Error {
	case "":
	case "busy":
		for n := range a.out {
			f.lose(a, n)
		}
		f.pausedUntil = now.Add(min(time.Duration(m.RetryMs)*time.Millisecond, maxBusy))
		f.halve(now, f.smooth)
		return true // somebody is there
	case "unknown":
		if _, wanted := a.out[m.Block]; wanted && m.BlobBytes > 0 && m.BlobBytes <= maxBlob { // it ends before that block
			delete(a.out, m.Block)
			f.onTheWay -= int64(a.size)
			s.ends(int64(m.BlobBytes))
			return true
		}
		s.fail(reconcile.ErrAbsent)
		return true
	default:
		s.fail(&refusedError{m.Error})
		return true
	}
	asked, wanted := a.out[m.Block]
	if !wanted {
		return false // it was asked for twice
	}
	from := int64(m.Block) * int64(a.size)
	if int64(len(m.Data)) != min(int64(a.size), int64(m.BlobBytes)-from) || m.BlobBytes > maxBlob {
		return false // asked for again after a while
	}
	delete(a.out, m.Block)
	f.onTheWay -= int64(a.size)
	f.measure(now, asked, len(m.Data))
	s.ends(int64(m.BlobBytes))
	s.parts[from] = m.Data
	for _, o := range f.streams {
		if o != s && o.ref == s.ref {
			o.ends(int64(m.BlobBytes))
			o.offer(from, m.Data)
		}
	}
	return true
}

// offer takes what came for another stream where it is missing here.
func (s *stream) offer(from int64, data []byte) {
	to := from + int64(len(data))
	for i := 0; i < len(s.missing); i++ {
		m := &s.missing[i]
		if m.from < from || m.from >= to {
			continue
		}
		s.parts[from] = data
		if m.from = to; m.from >= m.to {
			s.missing = slices.Delete(s.missing, i, i+1)
			i--
		}
	}
}

// ends says how long the blob is.
func (s *stream) ends(blob int64) {
	if !s.sized && blob > s.to {
		s.missing = append(s.missing, span{s.to, blob})
		s.to = blob
	}
	s.sized, s.to = true, min(s.to, blob)
	for len(s.missing) > 0 && s.missing[len(s.missing)-1].to > s.to {
		if last := &s.missing[len(s.missing)-1]; last.from >= s.to {
			s.missing = s.missing[:len(s.missing)-1]
		} else {
			last.to = s.to
		}
	}
	signal(s.ready)
}

// measure adapts window and rate to a block that came.
func (f *flow) measure(now, asked time.Time, bytes int) {
	took := now.Sub(asked)
	since := asked
	if f.lastArrival.After(asked) {
		since = f.lastArrival
	}
	f.lastArrival = now
	if asked.After(f.newest) {
		f.newest = asked
	}
	f.rateBytes += float64(bytes)
	f.rateSeconds += max(now.Sub(since), time.Microsecond).Seconds()
	if f.rateSeconds > 2 {
		f.rateBytes, f.rateSeconds = f.rateBytes/2, f.rateSeconds/2
	}
	f.strikes = 0
	if f.smooth == 0 {
		f.quickest, f.smooth, f.spread = took, took, took/2
	} else {
		f.quickest = min(f.quickest, took)
		f.spread += ((took - f.smooth).Abs() - f.spread) / 4
		f.smooth += (took - f.smooth) / 8
	}
	switch late := timeFactor*f.quickest + lateBy; {
	case took > 2*late:
		f.halve(now, f.smooth)
	case took > late:
	case f.window < f.threshold && took <= f.quickest+lateBy: // no queue at all
		f.window += int64(bytes)
	default:
		f.window += int64(bytes) * int64(f.blockSize()) / f.window
	}
	f.window = min(f.window, f.most)
}

// halve halves the window, once in a while.
func (f *flow) halve(now time.Time, every time.Duration) {
	if now.Sub(f.cutAt) < every {
		return
	}
	f.cutAt = now
	f.window = max(f.window/2, grain)
	f.threshold = f.window
}

// timeout is how long a block may take before it is asked for again.
func (f *flow) timeout() time.Duration {
	d := max(leastTimeout, f.smooth+4*f.spread)
	return min(d<<min(f.strikes, 5), mostTimeout)
}

// due is when a block that was asked for counts as lost: not while others come.
func (f *flow) due(asked time.Time, limit time.Duration) time.Time {
	if f.lastArrival.After(asked) {
		asked = f.lastArrival
	}
	return asked.Add(limit)
}

// expire makes blocks missing that have not come in time.
func (f *flow) expire(now time.Time) {
	limit := f.timeout()
	lost := false
	for id, a := range f.asks {
		for n, at := range a.out {
			if !now.Before(f.due(at, limit)) || f.newest.Sub(at) >= overtaken {
				f.lose(a, n)
				lost = true
			}
		}
		if len(a.out) == 0 {
			delete(f.asks, id)
		}
	}
	if lost {
		f.strikes++
		// The way may not be worth what it was.
		f.rateBytes /= 2
		f.halve(now, 0)
	}
}

// wake gives when there is something to do though nothing happens; zero: never.
func (f *flow) wake(now time.Time) (at time.Time) {
	limit := f.timeout()
	earlier := func(t time.Time) {
		if at.IsZero() || t.Before(at) {
			at = t
		}
	}
	for _, a := range f.asks {
		for _, asked := range a.out {
			earlier(f.due(asked, limit))
		}
	}
	if now.Before(f.pausedUntil) {
		earlier(f.pausedUntil)
	}
	return at
}

func (s *stream) fail(err error) {
	s.failed = err
	signal(s.ready)
}

// read gives what has come in order, as much as p holds. n is 0 where there is
// nothing; end says that nothing follows.
func (s *stream) read(p []byte) (n int, end bool) {
	for n < len(p) && !(s.sized && s.at >= s.to) {
		from, part, ok := s.part()
		if !ok {
			break
		}
		rest := part[s.at-from:]
		if over := s.at + int64(len(rest)) - s.to; over > 0 {
			rest = rest[:int64(len(rest))-over]
		}
		c := copy(p[n:], rest)
		n += c
		if s.at += int64(c); c == len(rest) {
			delete(s.parts, from)
		}
	}
	return n, s.sized && s.at >= s.to
}

// part gives the part in which the reader is: their sizes are powers of two
// times grain, from multiples of themselves on.
func (s *stream) part() (from int64, part []byte, ok bool) {
	for size := int64(grain); size <= link.MaxBlock; size *= 2 {
		from = s.at / size * size
		if part, ok = s.parts[from]; ok && from+int64(len(part)) > s.at {
			return from, part, true
		}
	}
	return 0, nil, false
}
