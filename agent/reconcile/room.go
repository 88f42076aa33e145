package reconcile

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// makeRoom gives the bundle's files their blocks before a byte of them
// travels, or refuses a download that would take the disk's reserve.
func (d *download) makeRoom() error {
	var lacking, present int64
	for i, want := range d.manifest.Files {
		f, err := d.file(i)
		if err != nil {
			return err
		}
		has, err := allocated(f)
		if err != nil {
			return err
		}
		lacking += max(want.Size-has, 0)
		present += min(want.Size, has)
	}
	free, err := d.free(d.store.dir)
	if err != nil {
		return fmt.Errorf("free space of %s: %w", d.store.dir, err)
	}
	if need := uint64(lacking); need > 0 && free < need+d.reserve {
		return errors.Join(d.noRoom(need, free), d.dropEmpty(present))
	}
	for i, want := range d.manifest.Files {
		f, err := d.file(i)
		if err != nil {
			return err
		}
		switch err := allocate(f, want.Size); {
		case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
			return errors.Join(d.noRoom(uint64(lacking), free), d.giveBack(), d.dropEmpty(present))
		case err != nil:
			return fmt.Errorf("room for %s: %w", want.Path, err)
		}
	}
	return nil
}

func (d *download) noRoom(need, free uint64) error {
	return fmt.Errorf("%w: the download needs %d bytes, %d are free, and %d of them are kept in reserve", errNoRoom, need, free, d.reserve)
}

// giveBack frees the blocks that the files have beyond what was written.
func (d *download) giveBack() (err error) {
	for _, f := range d.files {
		info, e := f.Stat()
		if e == nil {
			e = f.Truncate(info.Size())
		}
		err = errors.Join(err, e)
	}
	return err
}

// dropEmpty removes files in which there is nothing.
func (d *download) dropEmpty(present int64) (err error) {
	if present > 0 {
		return nil
	}
	for i, f := range d.files {
		err = errors.Join(err, f.Close(), d.root.Remove(filepath.FromSlash(d.manifest.Files[i].Path)))
		delete(d.files, i)
	}
	return err
}

// allocated gives the bytes of a file that have blocks.
func allocated(f *os.File) (int64, error) {
	var s unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &s); err != nil {
		return 0, err
	}
	return s.Blocks * 512, nil
}

// allocate gives a file blocks up to size, without making it longer. A file
// system that cannot do that is none that would say ENOSPC for it.
func allocate(f *os.File, size int64) error {
	if size == 0 {
		return nil
	}
	for {
		err := unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_KEEP_SIZE, 0, size)
		switch {
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.ENOSYS):
			return nil
		default:
			return err
		}
	}
}

// writeBack has the kernel begin to write a part of a file to the disk, so
// that little is left to wait for at the end.
func writeBack(f *os.File, offset, length int64) {
	_ = unix.SyncFileRange(int(f.Fd()), offset, length, unix.SYNC_FILE_RANGE_WRITE) // a hint
}
