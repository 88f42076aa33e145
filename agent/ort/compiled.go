package ort

// #include "shim.h"
import "C"

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"unsafe"

	binding "github.com/yalue/onnxruntime_go"
	"golang.org/x/sys/unix"

	"github.com/dunlin/dunlin/models"
)

// MaxCompiled bounds the bytes of a compiled model: a flatbuffer ends there.
const MaxCompiled = math.MaxInt32

// ErrNotCompilable is the error of a model that a compiled file cannot hold.
// It can be opened by Open all the same.
var ErrNotCompilable = errors.New("model cannot be compiled")

// Compile loads a model as Open does and writes what the runtime has made of
// it, for this machine, to the new file out in the runtime's ORT format. It
// gives up soon after ctx is done; there is no file then, nor after an error.
func Compile(ctx context.Context, dir, entry, out string) error {
	if !filepath.IsLocal(entry) {
		return fmt.Errorf("compile model: entry %q leaves the model's folder", entry)
	}
	if err := compile(ctx, filepath.Join(dir, entry), out); err != nil {
		os.Remove(out)
		return fmt.Errorf("compile model: %w", err)
	}
	return nil
}

func compile(ctx context.Context, path, out string) error {
	// The runtime does not notice where the flatbuffer ends. What Inspect
	// refuses is the runtime's to refuse.
	if g, err := models.Inspect(path); err == nil && g.WeightBytes > MaxCompiled {
		return fmt.Errorf("%w: its weights have %d bytes, more than %d", ErrNotCompilable, g.WeightBytes, MaxCompiled)
	}
	session, err := create(ctx, path, 0, map[string]string{
		"session.save_model_format":  "ORT",
		"session.disable_prepacking": "1", // nobody runs it
	}, func(o *binding.SessionOptions) (*binding.DynamicAdvancedSession, error) {
		if err := o.SetOptimizedModelFilePath(out); err != nil {
			return nil, err
		}
		return binding.NewDynamicAdvancedSession(path, nil, nil, o)
	})
	if err != nil {
		return err
	}
	session.Destroy()
	C.ort_trim_heap()
	info, err := os.Stat(out)
	if err == nil && info.Size() > MaxCompiled {
		err = fmt.Errorf("%w: it has %d bytes, more than %d", ErrNotCompilable, info.Size(), MaxCompiled)
	}
	return err
}

// OpenCompiled opens a file that Compile has written, with the same library
// on the same kind of machine, and reads its weights where it is mapped: they
// are the page cache's, not this process's own. With Setting.Prepack, the session
// has copies of those that some kernels rather have in another order. The file
// must not change until the session is closed; one that is cut kills the
// process.
func OpenCompiled(ctx context.Context, file string, set Setting) (*Session, error) {
	s, err := openCompiled(ctx, file, set)
	if err != nil {
		return nil, fmt.Errorf("open compiled model: %w", err)
	}
	return s, nil
}

func openCompiled(ctx context.Context, file string, set Setting) (*Session, error) {
	mapped, err := mapFile(file)
	if err != nil {
		return nil, err
	}
	disable := 1
	if set.Prepack {
		disable = 0
	}
	session, err := create(ctx, file, set.Threads, map[string]string{
		"session.load_model_format":                    "ORT",
		"session.use_ort_model_bytes_directly":         "1",
		"session.use_ort_model_bytes_for_initializers": "1",
		"session.disable_prepacking":                   strconv.Itoa(disable),
	}, func(o *binding.SessionOptions) (*binding.DynamicAdvancedSession, error) {
		return binding.NewDynamicAdvancedSessionWithONNXData(mapped, nil, nil, o)
	})
	if err != nil {
		unix.Munmap(mapped)
		return nil, err
	}
	if set.Prepack {
		C.ort_trim_heap() // packing leaves much behind, and nobody waits
	}
	return newSession(session, mapped)
}

// mapFile maps a file to be read.
func mapFile(file string) ([]byte, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if size := info.Size(); !info.Mode().IsRegular() || size == 0 || size > MaxCompiled {
		return nil, fmt.Errorf("%s: %s of %d bytes is not a file of 1 to %d", file, info.Mode().Type(), size, MaxCompiled)
	}
	mapped, err := unix.Mmap(int(f.Fd()), 0, int(info.Size()), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map %s: %w", file, err)
	}
	// One call is much cheaper than the faults of the first run. Where the
	// kernel cannot, these do it. What is not in the page cache is asked of the
	// disk all at once before.
	if !cached(mapped) {
		_ = unix.Madvise(mapped, unix.MADV_WILLNEED)
	}
	_ = unix.Madvise(mapped, unix.MADV_POPULATE_READ)
	return mapped, nil
}

// cached looks at a few pages of a mapped file, and says whether all of them are
// in the page cache.
func cached(mapped []byte) bool {
	const looks = 16
	page := os.Getpagesize()
	pages := (len(mapped) + page - 1) / page
	for i := range looks {
		at := pages * i / looks * page
		var in [1]byte
		_, _, errno := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(&mapped[at])), 1, uintptr(unsafe.Pointer(&in[0])))
		if errno != 0 || in[0]&1 == 0 {
			return false
		}
	}
	return true
}

// Mapped gives the bytes that the session reads from a mapped file, 0 for
// Open's.
func (s *Session) Mapped() int64 { return int64(len(s.mapped)) }
