package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// groupRoom is what the child may take beside the budget: the runtime itself,
// tensors, the heap of Go.
const groupRoom = 192 << 20

var errNoGroup = errors.New("no memory control group can be made here")

// group is a memory control group.
type group struct{ dir, procs string }

// newGroup makes a group with a bound, of version 2 or 1 of control groups,
// whichever has the memory.
func newGroup(bytes int64) (*group, error) {
	name := fmt.Sprintf("dunlin-overcommit-%d", os.Getpid())
	var errs []error
	for _, v := range []struct{ root, limit string }{{"/sys/fs/cgroup", "memory.max"}, {"/sys/fs/cgroup/memory", "memory.limit_in_bytes"}} {
		dir := filepath.Join(v.root, name)
		if err := os.Mkdir(dir, 0o755); err != nil {
			errs = append(errs, err)
			continue
		}
		g := &group{dir, filepath.Join(dir, "cgroup.procs")}
		if _, err := os.Stat(filepath.Join(dir, v.limit)); err != nil {
			errs = append(errs, err, g.remove())
			continue
		}
		if err := os.WriteFile(filepath.Join(dir, v.limit), []byte(strconv.FormatInt(bytes, 10)), 0); err != nil {
			errs = append(errs, err, g.remove())
			continue
		}
		return g, nil
	}
	return nil, errors.Join(errs...)
}

func (g *group) add(pid int) error {
	return os.WriteFile(g.procs, []byte(strconv.Itoa(pid)), 0)
}

// remove removes the group once nobody is in it.
func (g *group) remove() error {
	var err error
	for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		if err = os.Remove(g.dir); err == nil || errors.Is(err, fs.ErrNotExist) {
			return nil
		}
	}
	return err
}

// forget has the kernel forget the contents of a file.
func forget(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
}

// diskRate measures how many bytes per second the disk gives of the largest
// file below a folder, of which nothing is in memory.
func diskRate(dir string) (float64, error) {
	var largest string
	var size int64
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		info, err := d.Info()
		if err == nil && info.Size() > size {
			largest, size = path, info.Size()
		}
		return err
	})
	if err != nil || largest == "" {
		return 0, errors.Join(err, errors.New("there is no file to measure the disk by"))
	}
	f, err := os.Open(largest)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	began := time.Now()
	n, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{f}, make([]byte, 4<<20))
	if err != nil {
		return 0, err
	}
	return float64(n) / time.Since(began).Seconds(), nil
}
