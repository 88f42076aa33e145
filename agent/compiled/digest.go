package compiled

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/dunlin/dunlin/models"
)

// maxDigests bounds the files whose digests are remembered.
const maxDigests = 4096

// digest is that of a file as it was: one of another identity has another.
type digest struct {
	Identity string `json:"identity"`
	SHA256   string `json:"sha256"`
}

// Digest gives the digest of the .onnx file entry of the folder dir and of
// all files that hold its weights. It reads each of them once: their digests
// are remembered, until one has another size, inode or time of change.
func (c *Cache) Digest(dir, entry string) (string, error) {
	graph, err := models.Inspect(filepath.Join(dir, entry))
	if err != nil {
		return "", fmt.Errorf("digest of %s: %w", entry, err)
	}
	folder := filepath.Dir(filepath.Join(dir, entry))
	h := sha256.New()
	changed := false
	for _, path := range append([]string{filepath.Join(dir, entry)}, graph.External...) {
		name := ""
		if !filepath.IsAbs(path) {
			name, path = path, filepath.Join(folder, filepath.FromSlash(path))
		}
		sum, fresh, err := c.digestOf(path)
		if err != nil {
			return "", fmt.Errorf("digest of %s: %w", entry, err)
		}
		changed = changed || fresh
		fmt.Fprintf(h, "%d %s %s\n", len(name), name, sum)
	}
	if changed {
		c.keepDigests() // what is not kept is read again
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// digestOf gives a file's digest, and whether it had to be read.
func (c *Cache) digestOf(path string) (sum string, fresh bool, err error) {
	f, err := os.Open(path)
	if err != nil {
		return "", false, err
	}
	defer f.Close()
	var s unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &s); err != nil {
		return "", false, fmt.Errorf("stat %s: %w", path, err)
	}
	identity := fmt.Sprintf("%d.%d.%d.%d.%d", s.Dev, s.Ino, s.Size, s.Mtim.Nano(), s.Ctim.Nano())
	c.mu.Lock()
	known := c.digests[path]
	c.mu.Unlock()
	if known.Identity == identity {
		return known.SHA256, false, nil
	}
	h := sha256.New()
	if _, err := io.CopyBuffer(h, struct{ io.Reader }{f}, make([]byte, 1<<20)); err != nil {
		return "", false, err
	}
	sum = hex.EncodeToString(h.Sum(nil))
	c.mu.Lock()
	defer c.mu.Unlock()
	for old := range c.digests {
		if len(c.digests) < maxDigests {
			break
		}
		delete(c.digests, old) // any: it costs reading a file again
	}
	c.digests[path] = digest{identity, sum}
	return sum, true, nil
}

func (c *Cache) keepDigests() {
	c.mu.Lock()
	all, err := json.Marshal(c.digests)
	c.mu.Unlock()
	if err != nil {
		return
	}
	f, err := os.CreateTemp(c.dir, temporary)
	if err != nil {
		return
	}
	_, err = f.Write(all)
	if err = errors.Join(err, f.Sync(), f.Close()); err == nil {
		err = os.Rename(f.Name(), filepath.Join(c.dir, digestsName))
	}
	if err != nil {
		os.Remove(f.Name())
	}
}

// readDigests gives what was remembered, nothing where that cannot be read.
func readDigests(path string) map[string]digest {
	all := make(map[string]digest)
	if b, err := os.ReadFile(path); err != nil || json.Unmarshal(b, &all) != nil || all == nil || len(all) > maxDigests {
		return make(map[string]digest)
	}
	return all
}

// CPU gives the digest of what the processors of this machine can do.
func CPU() (string, error) {
	info, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return "", fmt.Errorf("features of the CPU: %w", err)
	}
	return cpu(string(info)), nil
}

// cpu reads what /proc/cpuinfo says: "flags" on x86, "Features" on ARM.
func cpu(info string) string {
	var features []string
	for line := range strings.Lines(info) {
		name, value, _ := strings.Cut(line, ":")
		switch strings.TrimSpace(name) {
		case "flags", "Features", "CPU part":
			features = append(features, strings.TrimSpace(value))
		}
	}
	slices.Sort(features)
	sum := sha256.Sum256([]byte(runtime.GOARCH + "\n" + strings.Join(slices.Compact(features), "\n")))
	return hex.EncodeToString(sum[:8])
}
