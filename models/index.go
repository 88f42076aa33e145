package models

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"

	chunkers "github.com/PlakarKorp/go-cdc-chunkers"
	_ "github.com/PlakarKorp/go-cdc-chunkers/chunkers/fastcdc" // registers chunkAlgorithm
	"github.com/opencontainers/go-digest"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// How files are cut. A bundle's digest depends on all of these, so a change
// makes new digests of old files. Readers rely on the bounds only: every
// chunk has MinChunk to MaxChunk bytes, the last of a file may have fewer.
const (
	MinChunk       = 64 << 10
	MaxChunk       = 1 << 20
	averageChunk   = 256 << 10
	chunkAlgorithm = "fastcdc-v1.0.0"
)

// chunkFile cuts the file at source and describes it as path.
func chunkFile(ctx context.Context, source, path string) (*dunlinv1.IndexedFile, error) {
	f, size, err := openRegular(source)
	if err != nil {
		return nil, fmt.Errorf("pack %s: %w", path, err)
	}
	defer f.Close()
	entry, err := chunk(ctx, f)
	if err != nil {
		return nil, fmt.Errorf("pack %s: %w", path, err)
	}
	if entry.SizeBytes != uint64(size) {
		return nil, fmt.Errorf("pack %s: file changed from %d to %d bytes while it was read", path, size, entry.SizeBytes)
	}
	entry.Path = path
	return entry, nil
}

func chunk(ctx context.Context, r io.Reader) (*dunlinv1.IndexedFile, error) {
	c, err := chunkers.NewChunker(chunkAlgorithm, r, &chunkers.ChunkerOpts{
		MinSize: MinChunk, NormalSize: averageChunk, MaxSize: MaxChunk,
	})
	if err != nil {
		return nil, err
	}
	whole := sha256.New()
	entry := &dunlinv1.IndexedFile{}
	for {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		data, err := c.Next() // the last one may come with io.EOF
		if err != nil && !errors.Is(err, io.EOF) {
			return nil, err
		}
		if len(data) > 0 {
			sum := sha256.Sum256(data)
			whole.Write(data)
			entry.Chunks = append(entry.Chunks, &dunlinv1.Chunk{
				Offset: entry.SizeBytes, Length: uint32(len(data)), Sha256: sum[:],
			})
			entry.SizeBytes += uint64(len(data))
		}
		if err != nil {
			entry.Sha256 = whole.Sum(nil)
			return entry, nil
		}
	}
}

// ParseIndex reads the chunk index of the bundle that m describes. It refuses
// one that m does not name, or that does not cover m's files, in m's order,
// exactly and with chunks of MinChunk to MaxChunk bytes, the last of a file
// of 1 to MaxChunk.
func ParseIndex(b []byte, m *Manifest) (*dunlinv1.ChunkIndex, error) {
	if d := digest.FromBytes(b); d != m.Index.Digest {
		return nil, invalid("chunk index has digest %s, the manifest names %s", d, m.Index.Digest)
	}
	return parseIndex(b, m)
}

func parseIndex(b []byte, m *Manifest) (*dunlinv1.ChunkIndex, error) {
	if len(b) > MaxIndexBytes {
		return nil, invalid("chunk index has %d bytes, allowed are %d", len(b), MaxIndexBytes)
	}
	// Each file has one chunk that may be short.
	most := int64(len(m.Files)) + int64(len(m.Files)) + m.Size/MinChunk
	if n := countEntries(b); n > most {
		return nil, invalid("chunk index has %d files and chunks, for %d files of %d bytes allowed are %d", n, len(m.Files), m.Size, most)
	}
	index := &dunlinv1.ChunkIndex{}
	if err := proto.Unmarshal(b, index); err != nil {
		return nil, invalid("chunk index: %v", err)
	}
	if len(index.Files) != len(m.Files) {
		return nil, invalid("chunk index has %d files, the manifest has %d", len(index.Files), len(m.Files))
	}
	for i, f := range index.Files {
		if err := checkChunks(f, m.Files[i]); err != nil {
			return nil, fmt.Errorf("chunk index: file %q: %w", shorten(f.Path), err)
		}
	}
	return index, nil
}

// countEntries counts the files and chunks that decoding b would allocate.
func countEntries(b []byte) (n int64) {
	eachMessage(b, 1, func(file []byte) {
		n++
		eachMessage(file, 4, func([]byte) { n++ })
	})
	return n
}

// eachMessage calls visit for the messages in field num, up to where b is
// malformed.
func eachMessage(b []byte, num protowire.Number, visit func([]byte)) {
	for len(b) > 0 {
		got, wire, n := protowire.ConsumeTag(b)
		if n < 0 {
			return
		}
		m := protowire.ConsumeFieldValue(got, wire, b[n:])
		if m < 0 {
			return
		}
		if got == num && wire == protowire.BytesType {
			content, _ := protowire.ConsumeBytes(b[n:])
			visit(content)
		}
		b = b[n+m:]
	}
}

func checkChunks(f *dunlinv1.IndexedFile, want File) error {
	switch {
	case f.Path != want.Path:
		return invalid("the manifest has %q in its place", want.Path)
	case f.SizeBytes != uint64(want.Size):
		return invalid("has %d bytes, %d in the manifest", f.SizeBytes, want.Size)
	case len(f.Sha256) != sha256.Size || digest.NewDigestFromBytes(digest.SHA256, f.Sha256) != want.Digest:
		return invalid("has SHA-256 %x, %s in the manifest", f.Sha256[:min(len(f.Sha256), sha256.Size)], want.Digest)
	}
	var end uint64
	for i, c := range f.Chunks {
		least := uint32(MinChunk)
		if i == len(f.Chunks)-1 {
			least = 1
		}
		switch {
		case c.Offset != end:
			return invalid("chunk %d starts at byte %d, the one before it ends at %d", i, c.Offset, end)
		case c.Length < least || c.Length > MaxChunk:
			return invalid("chunk %d has %d bytes, allowed are %d to %d", i, c.Length, least, MaxChunk)
		case len(c.Sha256) != sha256.Size:
			return invalid("chunk %d has a SHA-256 of %d bytes instead of %d", i, len(c.Sha256), sha256.Size)
		}
		end += uint64(c.Length)
	}
	if end != f.SizeBytes {
		return invalid("its chunks cover %d of %d bytes", end, f.SizeBytes)
	}
	if len(f.Chunks) == 1 && !bytes.Equal(f.Chunks[0].Sha256, f.Sha256) {
		return invalid("its only chunk has another SHA-256 than the file")
	}
	return nil
}
