package access

import (
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync"
	"time"
)

// lookEvery bounds how often a file is looked at.
const lookEvery = time.Second

// file is the content of a file, which is read again when it has changed. It
// is looked at when somebody asks for the content. It is safe for concurrent
// use.
type file[T any] struct {
	path  string
	parse func([]byte) (T, error)
	log   *slog.Logger
	now   func() time.Time

	mu     sync.Mutex // guards what follows
	looked time.Time
	info   os.FileInfo // of the file as it was read last, well or not
	value  T
	broken string // what is wrong with the file, as it was logged last
}

// open reads a file for the first time.
func open[T any](path string, parse func([]byte) (T, error), log *slog.Logger, now func() time.Time) (*file[T], error) {
	f := &file[T]{path: path, parse: parse, log: log, now: now, looked: now()}
	return f, f.read()
}

func (f *file[T]) read() error {
	opened, err := os.Open(f.path)
	if err != nil {
		return err
	}
	defer opened.Close()
	info, err := opened.Stat()
	if err != nil {
		return err
	}
	f.info = info
	text, err := io.ReadAll(io.LimitReader(opened, maxFile+1))
	if err != nil {
		return err
	}
	if len(text) > maxFile {
		return fmt.Errorf("%s has more than %d bytes", f.path, maxFile)
	}
	value, err := f.parse(text)
	if err == nil {
		f.value = value
	}
	return err
}

// newest gives the content. A file that cannot be read any more leaves what it
// held before, and is logged.
func (f *file[T]) newest() T {
	f.mu.Lock()
	defer f.mu.Unlock()
	now := f.now()
	if now.Sub(f.looked) < lookEvery {
		return f.value
	}
	f.looked = now
	info, err := os.Stat(f.path)
	if err == nil {
		if os.SameFile(info, f.info) && info.ModTime().Equal(f.info.ModTime()) && info.Size() == f.info.Size() && f.broken == "" {
			return f.value
		}
		err = f.read()
	}
	switch {
	case err == nil:
		f.broken = ""
		f.log.Info("file read again", "file", f.path)
	case err.Error() != f.broken:
		f.broken = err.Error()
		f.log.Error("file is not read again; what it held before stays in force", "file", f.path, "error", err)
	}
	return f.value
}
