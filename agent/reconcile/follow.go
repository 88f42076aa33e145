package reconcile

import (
	"context"
	"crypto/sha256"
	"fmt"
	"hash"

	"github.com/opencontainers/go-digest"
)

// follower hashes the files as wholes while their pieces come: it is as far as
// they are there without a gap.
type follower struct {
	file, piece int // the next one
	hash        hash.Hash
	buf         []byte
}

// follow hashes until all files are verified, or ctx is done. It goes on where
// it was. Only one call may be under way.
func (d *download) follow(ctx context.Context) error {
	w := &d.whole
	if w.hash == nil {
		w.hash, w.buf = sha256.New(), make([]byte, d.longest)
	}
	for ; w.file < len(d.manifest.Files); w.file++ {
		want := d.manifest.Files[w.file]
		f, err := d.file(w.file)
		if err != nil {
			return err
		}
		for ; w.piece < d.first[w.file+1]; w.piece++ {
			if err := d.await(ctx, w.piece); err != nil {
				return err
			}
			p := &d.pieces[w.piece]
			data := w.buf[:p.length]
			if _, err := f.ReadAt(data, p.offset); err != nil {
				return fmt.Errorf("read %s: %w", want.Path, err)
			}
			w.hash.Write(data)
		}
		if got := digest.NewDigest(digest.SHA256, w.hash); got != want.Digest {
			return &VerifyError{File: want.Path, Err: fmt.Errorf("the whole file has digest %s, want %s", got, want.Digest)}
		}
		w.hash.Reset()
	}
	return nil
}

// await waits until a piece is there.
func (d *download) await(ctx context.Context, piece int) error {
	for {
		d.mu.Lock()
		have, moved := d.pieces[piece].have, d.moved
		d.mu.Unlock()
		if have {
			return nil
		}
		select {
		case <-moved:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}
