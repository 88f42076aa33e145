package reconcile

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"
)

// job is a range of one file that is being asked for.
type job struct {
	source     Source
	file       int
	start, end int64
	sums       [][sha256.Size]byte // what it is to bring
	buf        []byte
	asked      time.Time
	heard      chan struct{} // closed when it has been taken in that the answer has begun
}

// news is how far a job is.
type news struct {
	job   *job
	began bool // the answer has begun; else it has ended
	whole bool // the source has no ranges
	bytes int64
	err   error
}

// errWrong is the error of a source whose bytes are not those asked for.
var errWrong = errors.New("other bytes than those asked for")

// fetcher asks for what a download lacks. One goroutine uses it.
type fetcher struct {
	*download
	pace    *pacer
	news    chan news
	claimed map[[sha256.Size]byte]bool // what jobs are to bring
	spare   [][]byte                   // buffers
	passed  bool                       // remote may be asked
	turn    int                        // of the sources near
	last    Source                     // that was asked
	single  bool                       // a source has answered with a whole file: there is one job at a time
}

// fetch asks for what is missing, until it is there or an error comes of the
// last source. Those near are given up one by one, and that is no error.
func (d *download) fetch(ctx context.Context) error {
	for i := range d.manifest.Files { // empty files, too
		if _, err := d.file(i); err != nil {
			return err
		}
	}
	f := &fetcher{download: d, news: make(chan news), claimed: map[[sha256.Size]byte]bool{}}
	under := 0
	var failure error
	for {
		for failure == nil && (f.pace == nil || under < f.pace.streams) {
			j, err := f.next(ctx)
			if err != nil {
				failure = err
			}
			if j == nil {
				break
			}
			under++
			go f.do(ctx, j)
		}
		if under == 0 {
			return failure
		}
		n := <-f.news
		if n.began {
			f.pace.began(time.Since(n.job.asked))
			if n.whole {
				f.single = true
				f.pace.streams, f.pace.most = 1, 1
				f.extend(n.job)
			} else {
				f.pace.streams = max(f.pace.streams, min(2, f.pace.most))
			}
			close(n.job.heard)
			continue
		}
		under--
		for _, sum := range n.job.sums {
			delete(f.claimed, sum)
		}
		f.spare = append(f.spare, n.job.buf)
		if n.err == nil {
			f.pace.ended(n.bytes, time.Now())
			continue
		}
		f.pace.failed()
		if ctx.Err() != nil {
			failure = context.Cause(ctx)
		} else if n.job.source != d.remote && !errors.Is(n.err, errNoRoom) {
			f.giveUp(n.job.source, n.err)
		} else if failure == nil && !errors.Is(n.err, errWrong) {
			failure = n.err
		}
	}
}

// next gives the next job; nil where there is nothing to ask for now.
func (f *fetcher) next(ctx context.Context) (*job, error) {
	if err := ctx.Err(); err != nil {
		return nil, context.Cause(ctx)
	}
	f.mu.Lock()
	done := len(f.missing) == 0
	f.mu.Unlock()
	if done {
		return nil, nil
	}
	s, err := f.source(ctx)
	if err != nil {
		return nil, err
	}
	if f.pace == nil {
		need := f.lacks()
		most := s.Streams()
		if len(f.near) > 0 {
			most = max(most, min(len(f.near), streams))
		}
		f.pace = newPacer(most, need, f.gate.thrifty(), time.Now())
	} else if s == f.remote && f.last != s && !f.single {
		f.pace.most = max(s.Streams(), 1) // those near are given up
		f.pace.streams = min(f.pace.streams, f.pace.most)
	}
	f.last = s
	f.mu.Lock()
	defer f.mu.Unlock()
	for file := range f.manifest.Files {
		pieces := f.pieces[f.first[file]:f.first[file+1]]
		// A chunk that is there twice travels once.
		seen := map[[sha256.Size]byte]bool{}
		wanted := func(p *piece) bool {
			if !f.wanted(p) || seen[p.sum] {
				return false
			}
			seen[p.sum] = true
			return true
		}
		start, end, waste := nextRange(pieces, wanted, f.pace.gap(), f.pace.waste, f.pace.length())
		if start == end {
			continue
		}
		f.pace.waste -= min(waste, f.pace.waste)
		j := &job{source: s, file: file, start: start, end: end, asked: time.Now(), heard: make(chan struct{})}
		f.claim(j)
		if n := len(f.spare); n > 0 {
			j.buf, f.spare = f.spare[n-1], f.spare[:n-1]
		} else {
			j.buf = make([]byte, f.longest)
		}
		return j, nil
	}
	return nil, nil
}

// wanted says whether a piece is missing and no job's; it is called with mu held.
func (f *fetcher) wanted(p *piece) bool { return !p.have && !f.claimed[p.sum] }

// claim makes what is wanted of a job's range the job's.
func (f *fetcher) claim(j *job) {
	for i := f.first[j.file]; i < f.first[j.file+1]; i++ {
		if p := &f.pieces[i]; f.wanted(p) && p.offset >= j.start && p.offset < j.end {
			f.claimed[p.sum] = true
			j.sums = append(j.sums, p.sum)
		}
	}
}

// extend makes the whole file the job's: its answer has all of it.
func (f *fetcher) extend(j *job) {
	f.mu.Lock()
	defer f.mu.Unlock()
	j.start, j.end = 0, f.manifest.Files[j.file].Size
	f.claim(j)
}

// source says whom to ask: those near in turn, else remote when it may be.
func (f *fetcher) source(ctx context.Context) (Source, error) {
	if n := len(f.near); n > 0 {
		f.turn++
		return f.near[f.turn%n], nil
	}
	if f.remote == nil {
		return nil, errNoSource
	}
	if !f.passed {
		if err := f.gate.pass(ctx, f.lacks()); err != nil {
			return nil, err
		}
		f.passed = true
	}
	return f.remote, nil
}

// giveUp asks a source near no more.
func (d *download) giveUp(s Source, why error) {
	if at := slices.Index(d.near, s); at >= 0 {
		d.log.Warn("a source near is given up", "source", s.String(), "digest", d.digest, "error", why)
		d.near = slices.Delete(slices.Clone(d.near), at, at+1)
	}
}

// do does one job.
func (f *fetcher) do(ctx context.Context, j *job) {
	n := news{job: j}
	n.bytes, n.err = f.fetchRange(ctx, j)
	f.news <- n
}

// fetchRange asks for a range, and puts what comes of it that is missing and
// not another job's.
func (f *fetcher) fetchRange(ctx context.Context, j *job) (got int64, err error) {
	d := f.download
	name := d.manifest.Files[j.file].Path
	b, err := j.source.Get(ctx, d.ref(d.manifest.Files[j.file].Digest, false), j.start, j.end-j.start)
	if err != nil {
		return 0, err
	}
	defer b.Close()
	in := &metered{Reader: b, ctx: ctx, count: &d.fetched}
	if j.source == d.remote {
		in.gate = d.gate
	} else {
		defer func() { d.fromSite.Add(in.n) }()
	}
	f.news <- news{job: j, began: true, whole: b.Whole}
	<-j.heard
	mine := map[[sha256.Size]byte]bool{}
	for _, sum := range j.sums {
		mine[sum] = true
	}
	at, wrong := b.Offset, false
	for i := d.first[j.file]; i < d.first[j.file+1]; i++ {
		p := &d.pieces[i]
		if p.offset >= j.end {
			break
		}
		if p.offset < at || !mine[p.sum] {
			continue
		}
		delete(mine, p.sum)
		data := j.buf[:p.length]
		if _, err = io.CopyN(io.Discard, in, p.offset-at); err == nil {
			_, err = io.ReadFull(in, data)
		}
		if err != nil {
			return in.n, fmt.Errorf("%s after byte %d: %w", name, at, err)
		}
		at = p.offset + int64(p.length)
		if sum := sha256.Sum256(data); sum != p.sum {
			if j.source != d.remote {
				return in.n, fmt.Errorf("%s at byte %d: %w", name, p.offset, errWrong)
			}
			if p.tries++; p.tries > chunkRetries {
				return in.n, &VerifyError{File: name, Offset: p.offset,
					Err: fmt.Errorf("chunk of %d bytes has SHA-256 %x, want %x", p.length, sum, p.sum)}
			}
			wrong = true
			continue
		}
		if err := d.put(p.sum, data); err != nil {
			return in.n, err
		}
	}
	if wrong {
		return in.n, errWrong
	}
	return in.n, nil
}

// small reads a document from those near, or else from remote.
func (d *download) small(ctx context.Context, r Ref, what string, limit int64) ([]byte, error) {
	for _, s := range d.near {
		raw, err := small(ctx, s, r, what, limit)
		if err == nil {
			d.fetched.Add(int64(len(raw)))
			return raw, nil
		}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		if !errors.Is(err, ErrAbsent) || r.Digest == d.digest {
			d.giveUp(s, err)
		}
	}
	if d.remote == nil {
		return nil, errNoSource
	}
	if err := d.gate.pass(ctx, 0); err != nil {
		return nil, err
	}
	raw, err := small(ctx, d.remote, r, what, limit)
	d.fetched.Add(int64(len(raw)))
	d.gate.count(len(raw))
	return raw, err
}
