package compiled

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
)

// block is how much of a file one checksum covers.
const block = 1 << 20

// piece is how much is read at a time: it stays in the processor's cache.
const piece = 128 << 10

// castagnoli is the CRC-32C, for which processors have an instruction. It
// finds damage; it does not find what somebody changed on purpose, who could
// as well change the checksums: only the agent's user may write there.
var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// record is what an entry's folder says of itself.
type record struct {
	Key    Key      `json:"key"`
	Format int      `json:"format"`
	Model  Model    `json:"model"`
	Size   int64    `json:"size"`
	Sums   []uint32 `json:"crc32c"` // of each block
}

// envelope is what the file holds: a record and the checksum of its bytes.
type envelope struct {
	Sum    uint32          `json:"crc32c"`
	Record json.RawMessage `json:"record"`
}

// write writes the record to a new file, through to the disk, and gives its
// size.
func (r *record) write(path string) (int64, error) {
	inner, err := json.Marshal(r)
	if err != nil {
		return 0, err
	}
	all, err := json.Marshal(envelope{crc32.Checksum(inner, castagnoli), inner})
	if err != nil {
		return 0, err
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return 0, err
	}
	if _, err = f.Write(all); err == nil {
		err = f.Sync()
	}
	return int64(len(all)), errors.Join(err, f.Close())
}

func readRecord(path string) (*record, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	all, err := io.ReadAll(io.LimitReader(f, maxEntryBytes))
	if err != nil {
		return nil, err
	}
	var e envelope
	if err := json.Unmarshal(all, &e); err != nil {
		return nil, fmt.Errorf("%s: %w", entryName, err)
	}
	if crc32.Checksum(e.Record, castagnoli) != e.Sum {
		return nil, fmt.Errorf("%s is damaged", entryName)
	}
	r := new(record)
	if err := json.Unmarshal(e.Record, r); err != nil {
		return nil, fmt.Errorf("%s: %w", entryName, err)
	}
	return r, nil
}

// verify reads an entry's folder whole and says what is wrong with it.
func verify(ctx context.Context, dir string, key Key) (*record, error) {
	r, err := readRecord(filepath.Join(dir, entryName))
	if err != nil {
		return nil, err
	}
	if r.Key != key || r.Format != Format {
		return nil, fmt.Errorf("it is of format %d and key %v", r.Format, r.Key)
	}
	f, err := os.Open(filepath.Join(dir, FileName))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if info.Size() != r.Size {
		return nil, fmt.Errorf("%s has %d bytes instead of %d", FileName, info.Size(), r.Size)
	}
	got, err := sums(ctx, f, r.Size)
	if err != nil {
		return nil, err
	}
	if len(got) != len(r.Sums) {
		return nil, fmt.Errorf("%s has %d checksums for %d blocks", entryName, len(r.Sums), len(got))
	}
	for i, sum := range got {
		if sum != r.Sums[i] {
			return nil, fmt.Errorf("%s is damaged in its block %d of %d bytes", FileName, i, block)
		}
	}
	return r, nil
}

// sums gives the checksum of each block of a file, with half of the cores:
// the others serve.
func sums(ctx context.Context, f io.ReaderAt, size int64) ([]uint32, error) {
	all := make([]uint32, (size+block-1)/block)
	workers := max(1, runtime.GOMAXPROCS(0)/2)
	errs := make([]error, workers)
	var next atomic.Int64
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			buffer := make([]byte, piece)
			for ctx.Err() == nil {
				i := next.Add(1) - 1
				if i >= int64(len(all)) {
					return
				}
				for at, end := i*block, min((i+1)*block, size); at < end; {
					b := buffer[:min(piece, end-at)]
					if _, err := f.ReadAt(b, at); err != nil {
						errs[w] = err
						return
					}
					all[i] = crc32.Update(all[i], castagnoli, b)
					at += int64(len(b))
				}
			}
			errs[w] = context.Cause(ctx)
		})
	}
	wg.Wait()
	return all, errors.Join(errs...)
}
