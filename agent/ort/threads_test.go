package ort

import (
	"bytes"
	"os"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/dunlin/dunlin/models/tensor"
)

func osThreads(t *testing.T) int {
	all, err := os.ReadDir("/proc/self/task")
	if err != nil {
		t.Fatal(err)
	}
	return len(all)
}

// TestSessionHasItsThreads opens a model in each way with so many threads: all
// but the one that runs it go with the session, and the answers are the same.
func TestSessionHasItsThreads(t *testing.T) {
	dir, entry := write(t, layers(2, 64))
	file := compileModel(t, dir, entry)
	x := floats("x", []int64{2, 64}, make([]float32, 128)...)
	for i := range x.Data {
		x.Data[i] = byte(i % 61)
	}
	ways := map[string]func(threads int) (*Session, error){
		"plain":     func(n int) (*Session, error) { return Open(t.Context(), dir, entry, Setting{Threads: n}) },
		"mapped":    func(n int) (*Session, error) { return OpenCompiled(t.Context(), file, Setting{Threads: n}) },
		"prepacked": func(n int) (*Session, error) { return OpenCompiled(t.Context(), file, Setting{n, true}) },
	}
	for way, open := range ways {
		var want []tensor.Tensor
		for n := range 5 {
			own := 0
			// Go may begin a thread of its own at any time, and none ends.
			for try := 0; try == 0 || try < 20 && own != max(n-1, 0); try++ {
				s, err := open(n)
				if err != nil {
					t.Fatal(err)
				}
				got, err := run(t.Context(), s, []tensor.Tensor{x}, nil)
				if err != nil {
					t.Fatal(err)
				}
				if want == nil {
					want = got
				} else if !bytes.Equal(got[0].Data, want[0].Data) {
					t.Errorf("%s: with %d threads the answer is another", way, n)
				}
				own = osThreads(t)
				s.Close()
				own -= osThreads(t)
			}
			if own != max(n-1, 0) {
				t.Errorf("%s: a session of %d threads has %d of its own", way, n, own)
			}
		}
		for _, n := range []int{-1, MaxThreads + 1} {
			if s, err := open(n); err == nil {
				s.Close()
				t.Errorf("%s: opened with %d threads", way, n)
			}
		}
	}
}

// TestOneThreadIsTheCallers holds the processor time of all others, over runs
// of a session with one thread, against the caller's.
func TestOneThreadIsTheCallers(t *testing.T) {
	dir, entry := write(t, layers(4, 512))
	initialise(t)
	s, err := Open(t.Context(), dir, entry, Setting{Threads: 1})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	x := floats("x", []int64{64, 512}, make([]float32, 64*512)...)
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	used := func(who int) int64 {
		var u unix.Rusage
		if err := unix.Getrusage(who, &u); err != nil {
			t.Fatal(err)
		}
		return u.Utime.Nano() + u.Stime.Nano()
	}
	mine, all := used(unix.RUSAGE_THREAD), used(unix.RUSAGE_SELF)
	for range 40 {
		if _, err := run(t.Context(), s, []tensor.Tensor{x}, nil); err != nil {
			t.Fatal(err)
		}
	}
	mine, all = used(unix.RUSAGE_THREAD)-mine, used(unix.RUSAGE_SELF)-all
	if others := all - mine; others > all/5 {
		t.Errorf("other threads computed for %d ns of %d", others, all)
	}
}
