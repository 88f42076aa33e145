package reconcile

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/opencontainers/go-digest"
)

// Ref names what a model's repository holds.
type Ref struct {
	Model    string
	Digest   digest.Digest
	Manifest bool // else a blob
}

// Source is where bundles come from. What it gives counts when its digest has
// been verified, by the caller. It may be used by many goroutines.
type Source interface {
	// String names it, for people.
	String() string
	// Get asks for length bytes from offset on, or for all where length is 0.
	// A source that has no parts answers with all of it. What it does not have
	// is ErrAbsent.
	Get(ctx context.Context, r Ref, offset, length int64) (*Body, error)
	// Streams is how many answers it may be asked for at a time, 1 or more.
	Streams() int
}

// Body is an answer of a source. It ends with an error where no byte has come
// for long; the caller closes it.
type Body struct {
	io.ReadCloser
	Offset int64 // of its first byte in what was asked for
	Whole  bool  // it goes on to the end, whatever was asked for
}

// ErrAbsent is the error of a source that does not have what it is asked for.
var ErrAbsent = errors.New("the source does not have it")

// small reads a whole document of at most limit bytes and verifies it. One
// that is longer, or does not have its digest, is asked for again before that
// counts.
func small(ctx context.Context, s Source, r Ref, what string, limit int64) ([]byte, error) {
	for try := 0; ; try++ {
		raw, err := readAll(ctx, s, r, limit+1)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", what, err)
		}
		if int64(len(raw)) > limit {
			err = fmt.Errorf("has more than %d bytes", limit)
		} else if got := digest.FromBytes(raw); got != r.Digest {
			err = fmt.Errorf("has digest %s, want %s", got, r.Digest)
		} else {
			return raw, nil
		}
		if try == chunkRetries {
			return nil, &VerifyError{File: what, Err: err}
		}
	}
}

// readAll reads what r names, or its first most bytes.
func readAll(ctx context.Context, s Source, r Ref, most int64) ([]byte, error) {
	b, err := s.Get(ctx, r, 0, 0)
	if err != nil {
		return nil, err
	}
	defer b.Close()
	return io.ReadAll(io.LimitReader(b, most))
}
