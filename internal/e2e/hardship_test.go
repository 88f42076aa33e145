package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/dunlin/dunlin/agent/compiled"
	"github.com/dunlin/dunlin/internal/netem"
)

// hardship is what can befall a real agent from outside: an emulated link to both
// of the controller's ports, a registry whose answers are altered within TLS, and
// a disk of its own that can be full.
type hardship struct {
	agent *Agent
	link  *netem.Link
	blobs *blobProxy
	disk  string // the folder with the agent's data; "": it is not a disk of its own
}

// diskBytes is the size of a real agent's disk, where it has one of its own.
const diskBytes = 64 << 20

// usualLink is what the link of a real agent is like between faults.
var usualLink = netem.Conditions{RTT: 2 * time.Millisecond}

// startHardAgent starts a device that reaches the controller over a link of its own.
func startHardAgent(t *testing.T, f *Fleet, name string, random *rand.Rand) *hardship {
	t.Helper()
	h := &hardship{link: netem.NewLink(usualLink, random.Uint64()), blobs: newBlobProxy(t, f)}
	serve := func(to string) (address string) {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		var serving sync.WaitGroup
		serving.Go(func() {
			_ = h.link.Serve(l, func(ctx context.Context) (net.Conn, error) { return new(net.Dialer).DialContext(ctx, "tcp", to) })
		})
		t.Cleanup(func() {
			l.Close()
			h.link.Set(usualLink)
			h.link.Reset()
			serving.Wait()
		})
		return l.Addr().String()
	}
	h.blobs.broker = serve(f.MQTT)
	controller := serve(strings.TrimPrefix(h.blobs.url, "https://"))

	data := filepath.Join(f.Dir, name)
	if err := os.Mkdir(data, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("none", data, "tmpfs", 0, fmt.Sprintf("size=%d,mode=0700", diskBytes)); err != nil {
		t.Logf("%s's disk cannot be full: mount a small file system: %v", name, err)
	} else {
		h.disk = data
		t.Cleanup(func() {
			if err := unix.Unmount(data, unix.MNT_DETACH); err != nil {
				t.Error(err)
			}
		})
	}
	h.agent = startAgent(t, f, name, "--profile", "off", "--controller", "https://"+controller,
		"--firmware-profiles", smallProfile(t, f), "--firmware-profile", generic())
	t.Cleanup(func() { // before its disk goes
		h.end(t)
		if err := h.agent.Stop(); err != nil {
			t.Errorf("stop %s: %v", name, err)
		}
	})
	return h
}

// generic is the name of the firmware profile of any machine such as this.
func generic() string {
	return map[string]string{"amd64": "generic-x86-64", "arm64": "generic-arm64"}[runtime.GOARCH]
}

// smallProfile writes that profile, with a small reserve on the disk, and gives
// its folder.
func smallProfile(t *testing.T, f *Fleet) string {
	t.Helper()
	raw, err := os.ReadFile(filepath.Join(root, "firmware-profiles", generic()+".yaml"))
	if err != nil {
		t.Fatal(err)
	}
	text := strings.Replace(string(raw), "reserve_bytes: 268435456", "reserve_bytes: 1048576", 1)
	dir := filepath.Join(f.Dir, "profiles")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, generic()+".yaml"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return dir
}

func (h *hardship) ballast() string { return filepath.Join(h.disk, "ballast") }

// fill leaves so many bytes of the disk free.
func (h *hardship) fill(t *testing.T, free int64) {
	t.Helper()
	if h.disk == "" {
		return
	}
	var s unix.Statfs_t
	if err := unix.Statfs(h.disk, &s); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(h.ballast(), os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil && !errors.Is(err, unix.ENOSPC) {
		t.Fatal(err)
	}
	defer f.Close()
	if n := int64(s.Bavail)*s.Bsize - free; n > 0 {
		if err := unix.Fallocate(int(f.Fd()), 0, 0, n); err != nil && !errors.Is(err, unix.ENOSPC) {
			t.Fatal(err)
		}
	}
}

// end ends all hardship that lasts.
func (h *hardship) end(t *testing.T) {
	t.Helper()
	h.link.Set(usualLink)
	h.blobs.alter(nil, 0)
	if h.disk != "" {
		if err := os.Remove(h.ballast()); err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
	}
}

// rot has a byte on the agent's disk be another: of a bundle, whole or on its
// way, or of a compiled model. While the agent lives, compiled models are spared,
// which are mapped, and the bundle with that file, which may be being opened: what
// changes between its verification and that nobody can tell. It gives which file.
func (h *hardship) rot(t *testing.T, random *rand.Rand, spared digest.Digest) string {
	t.Helper()
	var files []string
	for _, pattern := range []string{"bundles/*/files/*", "bundles/*/*.json", "bundles/*/chunks.pb", "compiled/*/*"} {
		if pattern == "compiled/*/*" && spared != "" {
			break
		}
		found, err := filepath.Glob(filepath.Join(h.agent.Data, pattern))
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, slices.DeleteFunc(found, func(path string) bool {
			bundle, _, _ := strings.Cut(strings.TrimPrefix(path, filepath.Join(h.agent.Data, "bundles")+"/"), "/")
			manifest, err := os.ReadFile(filepath.Join(h.agent.Data, "bundles", bundle, "manifest.json"))
			return spared != "" && !strings.HasSuffix(bundle, ".part") && (err != nil || strings.Contains(string(manifest), spared.String()))
		})...)
	}
	for range 10 {
		if len(files) == 0 {
			break
		}
		file := files[random.IntN(len(files))]
		info, err := os.Stat(file)
		if err != nil || !info.Mode().IsRegular() || info.Size() == 0 {
			continue // it has just gone
		}
		f, err := os.OpenFile(file, os.O_RDWR, 0)
		if err != nil {
			continue
		}
		defer f.Close()
		b, at := make([]byte, 1), random.Int64N(info.Size())
		if _, err := f.ReadAt(b, at); err != nil {
			continue
		}
		b[0] ^= 1
		if _, err := f.WriteAt(b, at); err != nil {
			t.Fatal(err)
		}
		return file
	}
	return ""
}

// openings looks at what real agents have opened. An agent opens the bytes of a
// version to compile them, and each entry in its cache of compiled models says,
// by their digest, which bytes those were.
type openings struct {
	genuine map[string]int    // version, by what an entry says of it
	seen    map[string]string // what the entries said, by their folders
	cache   *compiled.Cache   // of its own, for how it names models
}

func newOpenings(t *testing.T) *openings {
	t.Helper()
	cache, err := compiled.Open(t.TempDir(), 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	return &openings{genuine: map[string]int{}, seen: map[string]string{}, cache: cache}
}

// add has the file of a version be one that may be opened.
func (o *openings) add(t *testing.T, version int, file string) {
	t.Helper()
	sum, err := o.cache.Digest(filepath.Dir(file), filepath.Base(file))
	if err != nil {
		t.Fatal(err)
	}
	o.genuine[sum] = version
}

// look fails the test where an agent has opened other bytes than those of a
// version. It is called often, since entries leave the cache in the end.
func (o *openings) look(t *testing.T, a *Agent) {
	t.Helper()
	entries, err := filepath.Glob(filepath.Join(a.Data, "compiled", "*", "entry.json"))
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range entries {
		if o.seen[path] != "" {
			continue
		}
		var entry struct {
			Record struct {
				Key compiled.Key `json:"key"`
			} `json:"record"`
		}
		raw, err := os.ReadFile(path)
		if err != nil || json.Unmarshal(raw, &entry) != nil || entry.Record.Key.Model == "" {
			continue // it is being written, or is damaged
		}
		o.seen[path] = entry.Record.Key.Model
		if o.genuine[entry.Record.Key.Model] == 0 {
			t.Errorf("%s has opened a model that no version has: %s", a.Name, raw)
		}
	}
}
