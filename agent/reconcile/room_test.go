package reconcile

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// smallDisk mounts a file system of so many bytes, or skips the test where
// that is not allowed.
func smallDisk(t *testing.T, bytes int) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("none", dir, "tmpfs", 0, fmt.Sprintf("size=%d", bytes)); err != nil {
		t.Skipf("mount a small file system: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// A disk that is too small is found out before a byte of the files travels,
// also where it says that it has more room than it has; all else is as it was,
// and the download goes on when there is room.
func TestFullDiskIsFoundOutBefore(t *testing.T) {
	rng := seeded(t)
	a := pack(t, map[string][][]byte{"model.onnx": blocks(rng, 10)})
	b := pack(t, map[string][][]byte{"model.onnx": blocks(rng, 10), "model.data": blocks(rng, 30)})
	reg := serveBundles(t, a, b)
	dir := smallDisk(t, int(a.size+b.size))
	s, err := openBundles(filepath.Join(dir, "bundles"))
	if err != nil {
		t.Fatal(err)
	}
	if err := newDownload(t, s, reg, a).run(t.Context()); err != nil {
		t.Fatal(err)
	}
	ballast := filepath.Join(dir, "ballast")
	if err := os.WriteFile(ballast, make([]byte, b.size/2), 0o600); err != nil {
		t.Fatal(err)
	}
	before, err := freeSpace(dir)
	if err != nil {
		t.Fatal(err)
	}
	for name, free := range map[string]func(string) (uint64, error){
		"it says so":        freeSpace,
		"it says it is not": func(string) (uint64, error) { return 1 << 40, nil },
	} {
		d := newDownload(t, s, reg, b)
		d.free = free
		if err := d.run(t.Context()); !errors.Is(err, errNoRoom) {
			t.Errorf("%s: got %v, want that there is no room", name, err)
		}
		for _, file := range []string{"model.onnx", "model.data"} {
			if asked := reg.take(b.blobOf(file)); len(asked) > 0 {
				t.Errorf("%s: asked for %v of %s", name, asked, file)
			}
		}
		after, err := freeSpace(dir)
		if err != nil || after+64<<10 < before { // the documents may stay
			t.Errorf("%s: %d bytes are free, before there were %d (%v)", name, after, before, err)
		}
		checkInstalled(t, s, a)
	}
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	if err := s.remove(a.digest); err != nil {
		t.Fatal(err)
	}
	if err := newDownload(t, s, reg, b).run(t.Context()); err != nil {
		t.Fatal(err)
	}
	checkInstalled(t, s, b)
}

// A download that has its room does not need it a second time, nor the
// reserve: it goes on after a start though the disk is full otherwise.
func TestResumedDownloadHasItsRoom(t *testing.T) {
	rng := seeded(t)
	b := pack(t, map[string][][]byte{"model.onnx": blocks(rng, 20)})
	reg := serveBundles(t, b)
	s := testStore(t)
	reg.setFault(func(d digest.Digest, offset int64, _ []byte) verdict {
		if d == b.blobOf("model.onnx") && offset > b.size/2 {
			return cut
		}
		return pass
	})
	if err := newDownload(t, s, reg, b).run(t.Context()); err == nil || errors.Is(err, errNoRoom) {
		t.Fatalf("got %v, want a cut", err)
	}
	reg.setFault(nil)
	d := newDownload(t, s, reg, b)
	d.reserve, d.free = 1<<30, func(string) (uint64, error) { return uint64(rand.IntN(1000)), nil }
	if err := d.run(t.Context()); err != nil {
		t.Fatal(err)
	}
	checkInstalled(t, s, b)
}
