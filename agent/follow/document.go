package follow

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"

	"google.golang.org/protobuf/proto"

	"github.com/dunlin/dunlin/agent/state"
	"github.com/dunlin/dunlin/internal/link"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// assembly puts a desired document together that is too large for one
// message. It is for one goroutine.
type assembly struct {
	desired *dunlinv1.Desired // nil: nothing is being put together
	data    []byte
}

// begin starts with a document, or goes on where its bytes are those of the
// one before.
func (a *assembly) begin(d *dunlinv1.Desired) error {
	if d.SizeBytes > state.MaxDocument {
		return fmt.Errorf("desired document has %d bytes, allowed are %d", d.SizeBytes, state.MaxDocument)
	}
	if a.desired == nil || !bytes.Equal(a.desired.Sha256, d.Sha256) || a.desired.SizeBytes != d.SizeBytes {
		a.data = nil
	}
	a.desired = d
	return nil
}

// next asks for the next block; nil where nothing is being put together.
func (a *assembly) next() *dunlinv1.BlockRequest {
	if a.desired == nil {
		return nil
	}
	left := a.desired.SizeBytes - uint64(len(a.data))
	return &dunlinv1.BlockRequest{Sha256: a.desired.Sha256, Offset: uint64(len(a.data)), Length: uint32(min(left, link.MaxBlock))}
}

var errUnknownBlock = errors.New("the controller does not know the document any more")

// add takes a block in, and gives the document when it is whole. A block that
// was not asked for is ignored. After an error nothing is being put together:
// the controller sends its desired document again.
func (a *assembly) add(b *dunlinv1.Block) (*dunlinv1.Desired, error) {
	if a.desired == nil || !bytes.Equal(b.Sha256, a.desired.Sha256) || b.Offset != uint64(len(a.data)) {
		return nil, nil
	}
	if len(b.Data) == 0 {
		a.desired, a.data = nil, nil
		return nil, errUnknownBlock
	}
	if uint64(len(b.Data)) > a.desired.SizeBytes-b.Offset {
		a.desired, a.data = nil, nil
		return nil, fmt.Errorf("block at %d has %d bytes more than the document", b.Offset, len(b.Data))
	}
	a.data = append(a.data, b.Data...)
	if uint64(len(a.data)) < a.desired.SizeBytes {
		return nil, nil
	}
	whole := proto.CloneOf(a.desired)
	whole.Document = a.data
	a.desired, a.data = nil, nil
	if sum := sha256.Sum256(whole.Document); !bytes.Equal(sum[:], whole.Sha256) {
		return nil, fmt.Errorf("desired document has SHA-256 %x, want %x", sum, whole.Sha256)
	}
	return whole, nil
}
