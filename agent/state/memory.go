package state

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/dunlin/dunlin/models/signing"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// ErrCrashed is the error of a Memory that has crashed.
var ErrCrashed = errors.New("the simulated device has crashed")

// Memory is a Store that costs some hundred bytes and no file, for simulated
// devices. Its methods keep Store's contracts; what a disk would make durable
// survives Crash.
type Memory struct {
	limits Limits
	write  func(context.Context) error

	mu      sync.Mutex // guards what follows
	crashed bool
	kept    kept
}

// kept is what is durable. Slices in it are not changed, but replaced.
type kept struct {
	outboxID string
	identity *Identity
	clock    Clock
	until    time.Time // stood down
	cause    string
	desired  *Desired
	versions map[versionKey]Version
	trust    *signing.Trust
	traffic  map[string]int64
	last     uint64
	bytes    int64
	waiting  []waiting
}

type versionKey struct {
	model   string
	version int64
}

// waiting is an event of the outbox.
type waiting struct {
	sequence, first uint64 // first is below sequence only for a gap
	event           []byte
}

// NewMemory gives an empty one. Before each change write is called, where it
// is not nil: it takes the time that the disk takes, and its error, as that of
// a full disk, is that of the change, which is then not made. A crash while it
// runs loses the change.
func NewMemory(limits Limits, write func(context.Context) error) (*Memory, error) {
	limits = limits.orDefaults()
	if err := limits.check(); err != nil {
		return nil, err
	}
	return &Memory{limits: limits, write: write, kept: kept{outboxID: rand.Text(), versions: map[versionKey]Version{}, traffic: map[string]int64{}}}, nil
}

// Crash ends it: what is being changed is lost, and all calls fail from now
// on. It gives what the next start of the device finds.
func (m *Memory) Crash() *Memory {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.crashed = true
	next := &Memory{limits: m.limits, write: m.write, kept: m.kept}
	next.kept.versions, next.kept.traffic = maps.Clone(m.kept.versions), maps.Clone(m.kept.traffic)
	return next
}

// change makes a change durable, as a whole or not at all.
func (m *Memory) change(ctx context.Context, what string, f func(*kept) error) error {
	if m.write != nil {
		if err := m.write(ctx); err != nil {
			return wrap(what, err)
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.crashed {
		return wrap(what, ErrCrashed)
	}
	if err := ctx.Err(); err != nil {
		return wrap(what, err)
	}
	return wrap(what, f(&m.kept))
}

// read gives what is durable.
func read[T any](m *Memory, what string, f func(*kept) (T, error)) (T, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.crashed {
		var none T
		return none, wrap(what, ErrCrashed)
	}
	v, err := f(&m.kept)
	return v, wrap(what, err)
}

// Identity is Store's.
func (m *Memory) Identity(context.Context) (Identity, error) {
	return read(m, "read identity", func(k *kept) (Identity, error) {
		if k.identity == nil {
			return Identity{}, ErrNone
		}
		return *k.identity, nil
	})
}

// SetIdentity is Store's.
func (m *Memory) SetIdentity(ctx context.Context, i Identity) error {
	i.Certificates, i.Roots = slices.Clone(i.Certificates), slices.Clone(i.Roots)
	return m.change(ctx, "store identity", func(k *kept) error {
		k.identity = &i
		return nil
	})
}

// Clock is Store's.
func (m *Memory) Clock(context.Context) (Clock, error) {
	return read(m, "read clock", func(k *kept) (Clock, error) { return k.clock, nil })
}

// SetClock is Store's.
func (m *Memory) SetClock(ctx context.Context, c Clock) error {
	return m.change(ctx, "store clock", func(k *kept) error {
		k.clock = c
		return nil
	})
}

// StoodDown is Store's.
func (m *Memory) StoodDown(context.Context) (until time.Time, cause string, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.crashed {
		return until, cause, wrap("read stood_down", ErrCrashed)
	}
	return m.kept.until, m.kept.cause, nil
}

// SetStoodDown is Store's.
func (m *Memory) SetStoodDown(ctx context.Context, until time.Time, cause string) error {
	return m.change(ctx, "store stood_down", func(k *kept) error {
		if k.until, k.cause = until, cause; until.IsZero() {
			k.cause = ""
		}
		return nil
	})
}

// Desired is Store's.
func (m *Memory) Desired(context.Context) (Desired, error) {
	return read(m, "read desired document", func(k *kept) (Desired, error) {
		if k.desired == nil {
			return Desired{}, ErrNone
		}
		return *k.desired, nil
	})
}

// SetDesired is Store's.
func (m *Memory) SetDesired(ctx context.Context, d Desired) error {
	if err := d.check(); err != nil {
		return err
	}
	d.SHA256, d.Document = slices.Clone(d.SHA256), slices.Clone(d.Document)
	return m.change(ctx, "store desired document", func(k *kept) error {
		k.desired = &d
		return nil
	})
}

// Versions is Store's.
func (m *Memory) Versions(context.Context) ([]Version, error) {
	return read(m, "read versions", func(k *kept) ([]Version, error) {
		return slices.SortedFunc(maps.Values(k.versions), func(a, b Version) int {
			return cmp.Or(cmp.Compare(a.Model, b.Model), cmp.Compare(a.Version, b.Version))
		}), nil
	})
}

// PutVersion is Store's.
func (m *Memory) PutVersion(ctx context.Context, v Version) error {
	return m.change(ctx, fmt.Sprintf("store version %s:%d", v.Model, v.Version), func(k *kept) error {
		if v.LastGood {
			for at, other := range k.versions {
				if other.Model == v.Model && other.LastGood {
					other.LastGood = false
					k.versions[at] = other
				}
			}
		}
		v.Since, v.Signatures = time.Unix(0, v.Since.UnixNano()).UTC(), slices.Clone(v.Signatures)
		k.versions[versionKey{v.Model, v.Version}] = v
		return nil
	})
}

// DeleteVersion is Store's.
func (m *Memory) DeleteVersion(ctx context.Context, model string, version int64) error {
	return m.change(ctx, fmt.Sprintf("delete version %s:%d", model, version), func(k *kept) error {
		delete(k.versions, versionKey{model, version})
		return nil
	})
}

// Trust is Store's.
func (m *Memory) Trust(context.Context) (*signing.Trust, error) {
	return read(m, "read trust document", func(k *kept) (*signing.Trust, error) {
		if k.trust == nil {
			return nil, ErrNone
		}
		return k.trust, nil
	})
}

// SetTrust is Store's.
func (m *Memory) SetTrust(ctx context.Context, t *signing.Trust) error {
	return m.change(ctx, "store trust document", func(k *kept) error {
		k.trust = t
		return nil
	})
}

// Traffic is Store's.
func (m *Memory) Traffic(_ context.Context, days string) (int64, error) {
	return read(m, "read traffic", func(k *kept) (n int64, err error) {
		for day, bytes := range k.traffic {
			if strings.HasPrefix(day, days) {
				n += bytes
			}
		}
		return n, nil
	})
}

// AddTraffic is Store's.
func (m *Memory) AddTraffic(ctx context.Context, day string, bytes int64) error {
	return m.change(ctx, "store traffic", func(k *kept) error {
		k.traffic[day] += bytes
		for len(k.traffic) > keptDays {
			delete(k.traffic, slices.Min(slices.Collect(maps.Keys(k.traffic))))
		}
		return nil
	})
}

// OutboxID is Store's.
func (m *Memory) OutboxID() string { return m.kept.outboxID }

// Append is Store's.
func (m *Memory) Append(ctx context.Context, e *dunlinv1.Event) (uint64, error) {
	e = stamped(e)
	err := m.change(ctx, "append event", func(k *kept) error {
		e.Sequence = k.last + 1
		b, err := encodeEvent(e)
		if err != nil {
			return err
		}
		k.last++
		k.bytes += int64(len(b))
		k.waiting = append(k.waiting, waiting{e.Sequence, e.Sequence, b})
		for len(k.waiting) > m.limits.Events || k.bytes > m.limits.Bytes {
			if err := k.collapse(e.At); err != nil {
				return err
			}
		}
		return nil
	})
	return e.Sequence, err
}

// collapse puts one gap in place of the two oldest events.
func (k *kept) collapse(at *timestamppb.Timestamp) error {
	first, last := k.waiting[0].first, k.waiting[1].sequence
	b, err := encodeEvent(gapEvent(first, last, at))
	if err != nil {
		return err
	}
	k.bytes += int64(len(b) - len(k.waiting[0].event) - len(k.waiting[1].event))
	k.waiting = append([]waiting{{last, first, b}}, k.waiting[2:]...)
	return nil
}

// Pending is Store's.
func (m *Memory) Pending(_ context.Context, limit int) ([]*dunlinv1.Event, error) {
	return read(m, "read outbox", func(k *kept) (events []*dunlinv1.Event, err error) {
		size := 0
		for i, w := range k.waiting[:min(max(limit, 0), len(k.waiting))] {
			if size += len(w.event) + 8; size > MaxBatchBytes {
				break
			}
			e := new(dunlinv1.Event)
			if err := proto.Unmarshal(w.event, e); err != nil {
				return nil, fmt.Errorf("event after %d others: %w", i, err)
			}
			events = append(events, e)
		}
		return events, nil
	})
}

// Ack is Store's.
func (m *Memory) Ack(ctx context.Context, outboxID string, sequence uint64) error {
	if outboxID != m.OutboxID() {
		return fmt.Errorf("acknowledge events: outbox %q is not this one (%s)", outboxID, m.OutboxID())
	}
	return m.change(ctx, "acknowledge events", func(k *kept) error {
		if sequence > k.last {
			return fmt.Errorf("sequence %d was never given, the last is %d", sequence, k.last)
		}
		n := 0
		for ; n < len(k.waiting) && k.waiting[n].sequence <= sequence; n++ {
			k.bytes -= int64(len(k.waiting[n].event))
		}
		k.waiting = slices.Clone(k.waiting[n:])
		if len(k.waiting) == 0 {
			return nil
		}
		// A gap that grew since the events were sent has only lost those after
		// the acknowledged ones.
		gap := &k.waiting[0]
		if gap.first == gap.sequence || gap.first > sequence {
			return nil
		}
		e := new(dunlinv1.Event)
		if err := proto.Unmarshal(gap.event, e); err != nil {
			return err
		}
		b, err := encodeEvent(gapEvent(sequence+1, gap.sequence, e.At))
		if err != nil {
			return err
		}
		k.bytes += int64(len(b) - len(gap.event))
		*gap = waiting{gap.sequence, sequence + 1, b}
		return nil
	})
}
