package link

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"google.golang.org/protobuf/proto"

	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// inboxSize bounds the commands and blocks that wait to be taken. When it is
// full, new ones are dropped and counted: the controller sends again what is
// not answered.
const inboxSize = 64

// inbox hands messages from the connection's reader to the taker of out.
// Desired documents do not queue up: a newer one takes the place of the one
// that waits.
type inbox struct {
	out     chan proto.Message
	wake    chan struct{}
	dropped atomic.Uint64

	mu      sync.Mutex // guards what follows
	desired proto.Message
	others  []proto.Message
}

func newInbox() *inbox {
	return &inbox{out: make(chan proto.Message), wake: make(chan struct{}, 1)}
}

func (b *inbox) put(m proto.Message) {
	b.mu.Lock()
	switch _, isDesired := m.(*dunlinv1.Desired); {
	case isDesired:
		b.desired = m
	case len(b.others) < inboxSize:
		b.others = append(b.others, m)
	default:
		b.dropped.Add(1)
	}
	b.mu.Unlock()
	select {
	case b.wake <- struct{}{}:
	default:
	}
}

func (b *inbox) head() proto.Message {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.desired != nil {
		return b.desired
	}
	if len(b.others) > 0 {
		return b.others[0]
	}
	return nil
}

// pop forgets m, unless a newer desired document has taken its place.
func (b *inbox) pop(m proto.Message) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.desired == m {
		b.desired = nil
	} else if len(b.others) > 0 && b.others[0] == m {
		b.others[0] = nil
		b.others = b.others[1:]
	}
}

func (b *inbox) run(ctx context.Context) {
	for {
		var out chan proto.Message
		m := b.head()
		if m != nil {
			out = b.out
		}
		select {
		case out <- m:
			b.pop(m)
		case <-b.wake:
		case <-ctx.Done():
			return
		}
	}
}

var errMalformed = errors.New("malformed")

// decode reads a message to the device, and checks what its receivers rely on.
func decode(device, topic string, payload []byte) (proto.Message, error) {
	if len(payload) > MaxPayload {
		return nil, fmt.Errorf("%w: %d bytes, allowed are %d", errMalformed, len(payload), MaxPayload)
	}
	if topic == EpochTopic {
		return unmarshal(payload, new(dunlinv1.Epoch), func(m *dunlinv1.Epoch) error {
			if m.Incarnation == "" || m.BootId == "" {
				return errors.New("incarnation and boot_id must not be empty")
			}
			return nil
		})
	}
	to, kind, err := ParseDown(topic)
	if err != nil {
		return nil, err
	}
	if to != device {
		return nil, fmt.Errorf("%w: for device %s", errMalformed, to)
	}
	switch kind {
	case Desired:
		return unmarshal(payload, new(dunlinv1.Desired), checkDesired)
	case Command:
		return unmarshal(payload, new(dunlinv1.Command), func(m *dunlinv1.Command) error {
			if m.Command == nil {
				return errors.New("unknown command")
			}
			return nil
		})
	case Data:
		return unmarshal(payload, new(dunlinv1.FetchData), checkData)
	default: // Block: ParseDown knows no other kind
		return unmarshal(payload, new(dunlinv1.Block), func(m *dunlinv1.Block) error {
			if len(m.Sha256) != sha256.Size {
				return fmt.Errorf("sha256 has %d bytes, not %d", len(m.Sha256), sha256.Size)
			}
			if len(m.Data) > MaxBlock {
				return fmt.Errorf("data has %d bytes, allowed are %d", len(m.Data), MaxBlock)
			}
			return nil
		})
	}
}

func unmarshal[M proto.Message](payload []byte, m M, check func(M) error) (proto.Message, error) {
	if err := proto.Unmarshal(payload, m); err != nil {
		return nil, fmt.Errorf("%w: %w", errMalformed, err)
	}
	if err := check(m); err != nil {
		return nil, fmt.Errorf("%w: %w", errMalformed, err)
	}
	return m, nil
}

func checkDesired(m *dunlinv1.Desired) error {
	if m.Generation.GetIncarnation() == "" {
		return errors.New("generation.incarnation must not be empty")
	}
	if len(m.Sha256) != sha256.Size {
		return fmt.Errorf("sha256 has %d bytes, not %d", len(m.Sha256), sha256.Size)
	}
	if m.SizeBytes > MaxInlineDocument {
		if len(m.Document) > 0 {
			return fmt.Errorf("document of %d bytes is inline, allowed are %d", m.SizeBytes, MaxInlineDocument)
		}
		return nil
	}
	if uint64(len(m.Document)) != m.SizeBytes {
		return fmt.Errorf("document has %d bytes, size_bytes is %d", len(m.Document), m.SizeBytes)
	}
	if sum := sha256.Sum256(m.Document); !bytes.Equal(sum[:], m.Sha256) {
		return fmt.Errorf("document has digest %x, sha256 is %x", sum, m.Sha256)
	}
	return nil
}
