package reconcile

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/dunlin/dunlin/agent/engine"
)

func seeded(t testing.TB) *rand.Rand {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	return rand.New(rand.NewPCG(seed, 0))
}

func testStore(t testing.TB) *bundles {
	t.Helper()
	s, err := openBundles(filepath.Join(t.TempDir(), "bundles"))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func newDownload(t testing.TB, s *bundles, r *testRegistry, b *testBundle) *download {
	return &download{store: s, remote: newRemote(r.registry(), 5*time.Second), id: engine.VersionID{Model: "m", Version: 1}, trust: trustAll, digest: b.digest, free: freeSpace, log: testLog(t)}
}

// checkInstalled says whether a bundle is on disk as it should be.
func checkInstalled(t testing.TB, s *bundles, b *testBundle) {
	t.Helper()
	found, err := s.open(b.digest)
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range b.files {
		got, err := os.ReadFile(filepath.Join(found.dir, name))
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: %d bytes, error %v; want %d bytes", name, len(got), err, len(want))
		}
	}
	if _, err := os.Stat(s.path(b.digest) + partSuffix); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the part is still there: %v", err)
	}
}

func sum(spans []span) (n int64) {
	for _, s := range spans {
		n += s.end - s.start
	}
	return n
}

func TestFetch(t *testing.T) {
	rng := seeded(t)
	for _, ranges := range []bool{true, false} {
		t.Run(fmt.Sprintf("ranges=%t", ranges), func(t *testing.T) {
			same := block(rng)
			b := pack(t, map[string][][]byte{
				"model.onnx":  append(blocks(rng, 3), []byte("end")),
				"w/data.bin":  append(append(append(blocks(rng, 150), same), blocks(rng, 2)...), same), // no gap, that might be cheaper than a round trip
				"w/tiny.data": {[]byte("tiny")},
			})
			reg := serveBundles(t, b)
			reg.noRanges = !ranges
			s := testStore(t)
			d := newDownload(t, s, reg, b)
			if err := d.run(t.Context()); err != nil {
				t.Fatal(err)
			}
			checkInstalled(t, s, b)
			if d.present.Load() != b.size || d.total.Load() != b.size {
				t.Errorf("progress %d of %d, want %d", d.present.Load(), d.total.Load(), b.size)
			}
			asked := reg.take(b.blobOf("w/data.bin"))
			once := int64(len(b.files["w/data.bin"])) // with ranges the chunk that is there twice travels once
			if ranges {
				once -= int64(len(same))
			}
			if got := sum(asked); got != once {
				t.Errorf("asked for %d bytes of w/data.bin, of which %d have to travel", got, once)
			}
			for _, a := range asked {
				if ranges && a.end-a.start > mostRange {
					t.Errorf("asked for %d bytes at once", a.end-a.start)
				}
			}
			if !ranges && len(asked) != 1 {
				t.Errorf("asked %d times for the whole file", len(asked))
			}
		})
	}
}

// missingOnDisk hashes the part on disk on its own account.
func missingOnDisk(t *testing.T, s *bundles, b *testBundle, name string, chunks [][]byte) []span {
	t.Helper()
	raw, err := os.ReadFile(filepath.Join(s.path(b.digest)+partSuffix, filesFolder, name))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	var spans []span
	at := 0
	for _, c := range chunks {
		end := at + len(c)
		if end > len(raw) || !bytes.Equal(raw[at:end], c) {
			spans = append(spans, span{int64(at), int64(end)})
		}
		at = end
	}
	return spans
}

// checkOnlyMissing says whether no byte was asked for that was on disk, but
// for gaps that are cheaper to fetch than to leave out, and none twice.
func checkOnlyMissing(t *testing.T, asked, missing []span) {
	t.Helper()
	slices.SortFunc(asked, func(a, b span) int { return int(a.start - b.start) })
	for i, a := range asked {
		if i > 0 && a.start < asked[i-1].end {
			t.Errorf("bytes %d to %d were asked for twice", a.start, asked[i-1].end)
		}
		at := a.start
		for _, m := range missing {
			if m.end <= a.start || m.start >= a.end {
				continue
			}
			if m.start-at >= mostGap {
				t.Errorf("asked for bytes %d to %d, of which %d to %d were on disk", a.start, a.end, at, m.start)
			}
			at = m.end
		}
		if at < a.end {
			t.Errorf("asked for bytes %d to %d, of which %d to %d were on disk", a.start, a.end, at, a.end)
		}
	}
}

// A download that is cancelled after random writes, and whose last writes are
// lost or spoilt as in a power cut, asks only for what is missing.
func TestFetchResumes(t *testing.T) {
	rng := seeded(t)
	chunks := blocks(rng, 120)
	b := pack(t, map[string][][]byte{"model.onnx": chunks})
	reg := serveBundles(t, b)
	s := testStore(t)
	var total int64
	for runs := 1; ; runs++ {
		missing := missingOnDisk(t, s, b, "model.onnx", chunks)
		ctx, cancel := context.WithCancel(t.Context())
		left := 1 + rng.IntN(10)
		d := newDownload(t, s, reg, b)
		d.wrote = func() {
			if left--; left == 0 {
				cancel()
			}
		}
		err := d.run(ctx)
		cancel()
		asked := reg.take(b.blobOf("model.onnx"))
		checkOnlyMissing(t, asked, missing)
		total += sum(asked)
		if err == nil {
			t.Logf("%d runs", runs)
			break
		}
		if !errors.Is(err, context.Canceled) {
			t.Fatal(err)
		}
		path := filepath.Join(s.path(b.digest)+partSuffix, filesFolder, "model.onnx")
		switch info, err := os.Stat(path); {
		case err != nil || info.Size() == 0:
		case rng.IntN(3) == 0: // the end is lost
			if err := os.Truncate(path, info.Size()-rng.Int64N(min(info.Size(), 100<<10))); err != nil {
				t.Fatal(err)
			}
		case rng.IntN(3) == 0: // a page came out as zeros
			f, err := os.OpenFile(path, os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := f.WriteAt(make([]byte, 4096), rng.Int64N(info.Size())); err != nil {
				t.Fatal(err)
			}
			if err := f.Close(); err != nil {
				t.Fatal(err)
			}
		}
	}
	checkInstalled(t, s, b)
	if manifests := len(reg.take(b.digest)); manifests != 1 {
		t.Errorf("the manifest was fetched %d times", manifests)
	}
}

// Environment of the process that TestFetchSurvivesKill kills.
const (
	childDir, childURL, childDigest = "DUNLIN_TEST_FETCH_DIR", "DUNLIN_TEST_FETCH_URL", "DUNLIN_TEST_FETCH_DIGEST"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv(childDir); dir != "" {
		os.Exit(fetchAsChild(dir))
	}
	os.Exit(m.Run())
}

func fetchAsChild(dir string) int {
	s, err := openBundles(dir)
	if err == nil {
		d := &download{
			store: s, id: engine.VersionID{Model: "m", Version: 1}, trust: trustAll, digest: digest.Digest(os.Getenv(childDigest)), free: freeSpace,
			remote: newRemote(Registry{URL: os.Getenv(childURL), Client: http.DefaultClient}, 10*time.Second),
		}
		err = d.run(context.Background())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// kill -9 in the middle of a download, many times: each start asks only for
// what is missing on disk.
func TestFetchSurvivesKill(t *testing.T) {
	const kills = 50
	rng := seeded(t)
	chunks := blocks(rng, 2*kills)
	b := pack(t, map[string][][]byte{"model.onnx": chunks})
	reg := serveBundles(t, b)
	s := testStore(t)
	var killed atomic.Int64
	for {
		missing := missingOnDisk(t, s, b, "model.onnx", chunks)
		cmd := exec.CommandContext(t.Context(), os.Args[0])
		cmd.Env = append(os.Environ(), childDir+"="+s.dir, childURL+"="+reg.URL, childDigest+"="+b.digest.String())
		out := &bytes.Buffer{}
		cmd.Stdout, cmd.Stderr = out, out
		started := make(chan *os.Process, 1)
		reg.setFault(nil)
		if killed.Load() < kills {
			var once sync.Once
			served, after := int64(0), rng.Int64N(128<<10)
			reg.setFault(func(_ digest.Digest, _ int64, p []byte) verdict {
				if served += int64(len(p)); served > after {
					once.Do(func() {
						killed.Add(1)
						_ = (<-started).Kill()
					})
				}
				return pass
			})
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		started <- cmd.Process
		err := cmd.Wait()
		reg.CloseClientConnections()
		checkOnlyMissing(t, reg.take(b.blobOf("model.onnx")), missing)
		if err == nil {
			break
		}
		if exit, ok := errors.AsType[*exec.ExitError](err); !ok || exit.ExitCode() != -1 {
			t.Fatalf("child: %v\n%s", err, out)
		}
	}
	checkInstalled(t, s, b)
	if killed.Load() < kills {
		t.Errorf("only %d kills before the download was complete", killed.Load())
	}
}

func TestFetchFaults(t *testing.T) {
	rng := seeded(t)
	chunks := blocks(rng, 20)
	b := pack(t, map[string][][]byte{"a.onnx": blocks(rng, 2), "b.data": chunks})
	victim := int64(len(chunks[0]) + len(chunks[1]))
	flip := func(times int) func(digest.Digest, int64, []byte) verdict {
		return func(d digest.Digest, offset int64, p []byte) verdict {
			if at := victim - offset; d == b.blobOf("b.data") && at >= 0 && at < int64(len(p)) && times > 0 {
				times--
				p[at] ^= 4
			}
			return pass
		}
	}
	t.Run("flipped bit", func(t *testing.T) {
		reg := serveBundles(t, b)
		reg.setFault(flip(chunkRetries))
		s := testStore(t)
		if err := newDownload(t, s, reg, b).run(t.Context()); err != nil {
			t.Fatal(err)
		}
		checkInstalled(t, s, b)
		if got, want := sum(reg.take(b.blobOf("b.data"))), int64(len(b.files["b.data"])+chunkRetries*len(chunks[2])); got != want {
			t.Errorf("asked for %d bytes, want %d", got, want)
		}
	})
	t.Run("flipped bit for ever", func(t *testing.T) {
		reg := serveBundles(t, b)
		reg.setFault(flip(1000))
		s := testStore(t)
		err := newDownload(t, s, reg, b).run(t.Context())
		v, ok := errors.AsType[*VerifyError](err)
		if !ok || v.File != "b.data" || v.Offset != victim {
			t.Fatalf("got %v, want a VerifyError of b.data at %d", err, victim)
		}
		if _, err := s.open(b.digest); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("the bundle is there: %v", err)
		}
	})
	t.Run("flipped bit in the manifest", func(t *testing.T) {
		reg := serveBundles(t, b)
		reg.setFault(func(d digest.Digest, _ int64, p []byte) verdict {
			if d == b.digest {
				p[0] ^= 1
			}
			return pass
		})
		err := newDownload(t, testStore(t), reg, b).run(t.Context())
		if v, ok := errors.AsType[*VerifyError](err); !ok || v.File != "manifest" {
			t.Errorf("got %v, want a VerifyError of the manifest", err)
		}
	})
	t.Run("config longer than it is", func(t *testing.T) {
		reg := serveBundles(t, b)
		for d, raw := range b.blobs {
			if bytes.Contains(raw, []byte(`"entry"`)) && d != b.digest {
				reg.blobs[d] = append(bytes.Clone(raw), "and more"...)
				reg.setFault(func(asked digest.Digest, _ int64, _ []byte) verdict {
					if asked == d { // once only
						reg.blobs[d] = raw
					}
					return pass
				})
			}
		}
		s := testStore(t)
		if err := newDownload(t, s, reg, b).run(t.Context()); err != nil {
			t.Fatal(err)
		}
		checkInstalled(t, s, b)
	})
	t.Run("connection cut", func(t *testing.T) {
		reg := serveBundles(t, b)
		cuts := 0
		reg.setFault(func(d digest.Digest, offset int64, p []byte) verdict {
			if d == b.blobOf("b.data") && offset > int64(cuts)*(300<<10) && cuts < 5 {
				cuts++
				return cut
			}
			return pass
		})
		s := testStore(t)
		d := newDownload(t, s, reg, b)
		for range 6 {
			before := d.present.Load()
			err := d.run(t.Context())
			if err == nil {
				break
			}
			if _, ok := errors.AsType[*VerifyError](err); ok || d.present.Load() <= before {
				t.Fatalf("after %d of %d bytes: %v", before, d.total.Load(), err)
			}
		}
		checkInstalled(t, s, b)
	})
	t.Run("stall", func(t *testing.T) {
		reg := serveBundles(t, b)
		reg.setFault(func(d digest.Digest, offset int64, p []byte) verdict {
			if d == b.blobOf("b.data") && offset > 0 {
				return stalled
			}
			return pass
		})
		d := newDownload(t, testStore(t), reg, b)
		d.remote.(*remote).stall = 50 * time.Millisecond
		if err := d.run(t.Context()); !errors.Is(err, errStalled) {
			t.Errorf("got %v, want a stall", err)
		}
	})
	t.Run("other file of the right chunks", func(t *testing.T) {
		lying := pack(t, map[string][][]byte{"a.onnx": chunks[:2]})
		s, reg := testStore(t), serveBundles(t, lying)
		d := newDownload(t, s, reg, lying)
		if err := d.openForTest(t); err != nil {
			t.Fatal(err)
		}
		// The chunks agree with what the registry sends, but the file does not
		// have its digest.
		d.manifest.Files[0].Digest = digest.FromString("other")
		reg.mu.Lock()
		reg.blobs[digest.FromString("other")] = lying.files["a.onnx"]
		reg.mu.Unlock()
		err := d.run(t.Context())
		if v, ok := errors.AsType[*VerifyError](err); !ok || v.File != "a.onnx" || !strings.Contains(err.Error(), "whole file") {
			t.Errorf("got %v, want a VerifyError of the whole file", err)
		}
	})
}

func TestFetchKeepsReserve(t *testing.T) {
	b := pack(t, map[string][][]byte{"m.onnx": blocks(seeded(t), 4)})
	reg := serveBundles(t, b)
	s := testStore(t)
	d := newDownload(t, s, reg, b)
	d.reserve = 1000
	free := uint64(b.size) + 999
	d.free = func(string) (uint64, error) { return free, nil }
	err := d.run(t.Context())
	if !errors.Is(err, errNoRoom) || !strings.Contains(err.Error(), fmt.Sprint(b.size)) {
		t.Fatalf("got %v, want that there is not enough room for %d bytes", err, b.size)
	}
	if asked := reg.take(b.blobOf("m.onnx")); len(asked) > 0 {
		t.Errorf("asked for %v without room", asked)
	}
	free++
	if err := d.run(t.Context()); err != nil {
		t.Fatal(err)
	}
	checkInstalled(t, s, b)
}

func TestFetchReusesLocalChunks(t *testing.T) {
	rng := seeded(t)
	v1 := blocks(rng, 40)
	v2 := slices.Clone(v1)
	fresh := block(rng)
	v2 = slices.Insert(v2, 20, fresh)
	a := pack(t, map[string][][]byte{"model.onnx": v1})
	b := pack(t, map[string][][]byte{"model.onnx": v2[:30], "more.data": v2[30:]})
	reg := serveBundles(t, a, b)
	s := testStore(t)
	if err := newDownload(t, s, reg, a).run(t.Context()); err != nil {
		t.Fatal(err)
	}
	before := reg.servedBytes()
	if err := newDownload(t, s, reg, b).run(t.Context()); err != nil {
		t.Fatal(err)
	}
	checkInstalled(t, s, b)
	if got := sum(reg.take(b.blobOf("model.onnx"))) + sum(reg.take(b.blobOf("more.data"))); got != int64(len(fresh)) {
		t.Errorf("asked for %d bytes of files, only %d are new", got, len(fresh))
	}
	t.Logf("%d of %d bytes served for the second bundle", reg.servedBytes()-before, b.size)

	// A damaged chunk of another bundle is not taken over.
	found, err := s.open(a.digest)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.remove(b.digest); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(found.dir, "model.onnx"), make([]byte, len(a.files["model.onnx"])), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := newDownload(t, s, reg, b).run(t.Context()); err != nil {
		t.Fatal(err)
	}
	checkInstalled(t, s, b)
}

func TestBundlesFinishRemovalsAndDropDamage(t *testing.T) {
	b := pack(t, map[string][][]byte{"model.onnx": blocks(seeded(t), 2)})
	reg := serveBundles(t, b)
	s := testStore(t)
	if err := newDownload(t, s, reg, b).run(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(s.path(b.digest), s.path(b.digest)+goneSuffix); err != nil {
		t.Fatal(err)
	}
	s, err := openBundles(s.dir)
	if err != nil {
		t.Fatal(err)
	}
	if entries, err := os.ReadDir(s.dir); err != nil || len(entries) > 0 {
		t.Errorf("left over: %v, %v", entries, err)
	}
	if err := newDownload(t, s, reg, b).run(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(filepath.Join(s.path(b.digest), filesFolder, "model.onnx"), 5); err != nil {
		t.Fatal(err)
	}
	if _, err := s.open(b.digest); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("damaged bundle: %v", err)
	}
	whole, part, err := s.list()
	if err != nil || len(whole)+len(part) > 0 {
		t.Errorf("list gives %v and %v, %v", whole, part, err)
	}
}

// A bundle that cannot be read for want of descriptors is there all the same.
func TestBundlesOutliveScarcity(t *testing.T) {
	b := pack(t, map[string][][]byte{"model.onnx": blocks(seeded(t), 2)})
	s := testStore(t)
	if err := newDownload(t, s, serveBundles(t, b), b).run(t.Context()); err != nil {
		t.Fatal(err)
	}
	var limit unix.Rlimit
	if err := unix.Prlimit(0, unix.RLIMIT_NOFILE, nil, &limit); err != nil {
		t.Fatal(err)
	}
	none := unix.Rlimit{Cur: 0, Max: limit.Max}
	if err := unix.Prlimit(0, unix.RLIMIT_NOFILE, &none, nil); err != nil {
		t.Fatal(err)
	}
	_, scarce := s.open(b.digest)
	if err := unix.Prlimit(0, unix.RLIMIT_NOFILE, &limit, nil); err != nil {
		t.Fatal(err)
	}
	if !errors.Is(scarce, unix.EMFILE) || errors.Is(scarce, fs.ErrNotExist) {
		t.Errorf("without descriptors: %v", scarce)
	}
	checkInstalled(t, s, b)
}

// A config that is not the bundle's own does not say which file is opened.
func TestBundlesVerifyTheConfig(t *testing.T) {
	b := pack(t, map[string][][]byte{"model.onnx": blocks(seeded(t), 2), "other.data": blocks(seeded(t), 1)})
	s := testStore(t)
	if err := newDownload(t, s, serveBundles(t, b), b).run(t.Context()); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(s.path(b.digest), configFile)
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, bytes.Replace(raw, []byte(`"model.onnx"`), []byte(`"other.data"`), 1), 0o600); err != nil {
		t.Fatal(err)
	}
	if found, err := s.open(b.digest); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("opened as %+v, %v", found, err)
	}
}

// openForTest goes as far as knowing what is missing.
func (d *download) openForTest(t *testing.T) error {
	t.Helper()
	if err := os.MkdirAll(filepath.Join(d.part(), filesFolder), 0o700); err != nil {
		return err
	}
	root, err := os.OpenRoot(filepath.Join(d.part(), filesFolder))
	if err != nil {
		return err
	}
	d.root, d.files = root, map[int]*os.File{}
	defer func() {
		for _, f := range d.files {
			_ = f.Close()
		}
		_ = root.Close()
	}()
	return d.open(t.Context())
}
