package reconcile

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/dunlin/dunlin/agent/engine"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// Whatever becomes of the files of an installed bundle behind the agent's back,
// it is found, told and repaired, and the version serves all the while.
func TestDrift(t *testing.T) {
	rng := seeded(t)
	b := pack(t, map[string][][]byte{"m.onnx": blocks(rng, 12), "labels.txt": {[]byte("a\nb\n")}})
	reg := serveBundles(t, b)
	d := startDevice(t, reg)
	d.until("is up", func(*dunlinv1.Reported) bool { return true })
	d.inspect = 5 * time.Millisecond
	d.restart()
	d.Desire(desired(1, nil, b.want("digits", 1)))
	d.untilServing("digits", 1)
	folder := filepath.Join(d.dir, "bundles", b.digest.Encoded())
	model := filepath.Join(folder, filesFolder, "m.onnx")
	write := func(t *testing.T, path string, raw []byte) {
		t.Helper()
		other := filepath.Join(t.TempDir(), "new")
		if err := os.WriteFile(other, raw, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(other, path); err != nil { // at once: it may be looked at meanwhile
			t.Fatal(err)
		}
	}
	half := int64(len(b.files["m.onnx"]) / 2)
	for _, tt := range []struct {
		name    string
		harm    func(t *testing.T)
		subject string
		have    string
		most    int64 // bytes of the files that may travel; 0: none may
	}{
		{"one byte", func(t *testing.T) {
			f, err := os.OpenFile(model, os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if _, err := f.WriteAt([]byte{^b.files["m.onnx"][half]}, half); err != nil {
				t.Fatal(err)
			}
		}, "digits:1 m.onnx", "sha256:", half},
		{"truncated", func(t *testing.T) {
			if err := os.Truncate(model, half); err != nil {
				t.Fatal(err)
			}
		}, "digits:1 m.onnx", "bytes instead of", half + 256<<10},
		{"longer", func(t *testing.T) {
			write(t, model, append(bytes.Clone(b.files["m.onnx"]), "more"...))
		}, "digits:1 m.onnx", "bytes instead of", 0},
		{"removed", func(t *testing.T) {
			if err := os.Remove(filepath.Join(folder, filesFolder, "labels.txt")); err != nil {
				t.Fatal(err)
			}
		}, "digits:1 labels.txt", "missing", 64},
		{"replaced by a link", func(t *testing.T) {
			other := filepath.Join(t.TempDir(), "other")
			write(t, other, b.files["m.onnx"])
			if err := os.Symlink(other, other+".link"); err != nil {
				t.Fatal(err)
			}
			if err := os.Rename(other+".link", model); err != nil { // at once, else it is missing first
				t.Fatal(err)
			}
		}, "digits:1 m.onnx", "not a file", 2 * half},
		{"the manifest", func(t *testing.T) { write(t, filepath.Join(folder, manifestFile), []byte("{}")) }, "digits:1 " + manifestFile, "sha256:", 0},
		{"the chunk index", func(t *testing.T) { write(t, filepath.Join(folder, indexFile), nil) }, "digits:1 " + indexFile, "0 bytes instead of", 0},
		{"the whole folder", func(t *testing.T) {
			if err := os.Rename(folder, filepath.Join(t.TempDir(), "gone")); err != nil {
				t.Fatal(err)
			}
		}, "digits:1 " + manifestFile, "missing", 2*half + 64},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d.simulated.mu.Lock()
			d.events = nil
			d.simulated.mu.Unlock()
			documents := int64(0)
			for name, raw := range b.blobs {
				if name != b.blobOf("m.onnx") && name != b.blobOf("labels.txt") {
					documents += int64(len(raw))
				}
			}
			before := reg.servedBytes()
			reg.refuses.Store(tt.most > 0) // the repair waits
			tt.harm(t)
			if tt.most > 0 {
				d.until("finds it", func(r *dunlinv1.Reported) bool {
					return len(r.Drifts) == 1 && r.Drifts[0].Kind == "file" && strings.HasPrefix(r.Drifts[0].Subject, tt.subject) && strings.Contains(r.Drifts[0].Have, tt.have) &&
						r.Drifts[0].Want != "" && r.Drifts[0].Repair != "" && time.Since(r.Drifts[0].Since.AsTime()) < time.Minute && r.Versions[0].Serving
				})
				reg.refuses.Store(false)
				d.Retry()
			}
			d.until("repairs it", func(r *dunlinv1.Reported) bool {
				return strings.HasSuffix(d.kinds(), "drift.repaired") && len(r.Drifts) == 0 && r.Versions[0].Serving
			})
			if d.answers("digits") != 1 {
				t.Error("it does not serve")
			}
			for name, want := range b.files {
				if got, err := os.ReadFile(filepath.Join(folder, filesFolder, name)); err != nil || !bytes.Equal(got, want) {
					t.Errorf("%s has %d bytes, want %d (%v)", name, len(got), len(want), err)
				}
			}
			if n := reg.servedBytes() - before; n > tt.most+documents {
				t.Errorf("%d bytes travelled, want at most %d and %d of documents", n, tt.most, documents)
			}
			d.simulated.mu.Lock()
			_, file, _ := strings.Cut(tt.subject, " ")
			if e := d.events; len(e) != 2 || e[0].Kind != "drift.found" || !strings.HasPrefix(e[0].Message, "file "+file) || !strings.Contains(e[0].Message, tt.have) {
				t.Errorf("events %v", e)
			}
			d.simulated.mu.Unlock()
		})
	}
	d.restart()
	d.untilServing("digits", 1)
}

// A file whose looks are as before is found out by its content.
func TestScrub(t *testing.T) {
	rng := seeded(t)
	b := pack(t, map[string][][]byte{"m.onnx": blocks(rng, 40)})
	d := startDevice(t, serveBundles(t, b))
	d.Desire(desired(1, nil, b.want("digits", 1)))
	d.untilServing("digits", 1)
	i := &inspector{folder: d.folder, list: d.whole, seen: map[digest.Digest]map[string]stamp{}}
	defer i.scrub.close()
	pass := func(now time.Time) (found []finding) {
		for {
			n, f := i.step(now)
			if f != nil {
				found = append(found, *f)
			}
			if n == 0 {
				return found
			}
		}
	}
	now := time.Unix(1e9, 0)
	if found := append(i.look(t.Context()), pass(now)...); len(found) > 0 {
		t.Errorf("found %v", found)
	}
	model := filepath.Join(d.dir, "bundles", b.digest.Encoded(), filesFolder, "m.onnx")
	info, err := os.Stat(model)
	if err != nil {
		t.Fatal(err)
	}
	raw := bytes.Clone(b.files["m.onnx"])
	raw[len(raw)/2] ^= 1
	if err := os.WriteFile(model, raw, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chtimes(model, info.ModTime(), info.ModTime()); err != nil {
		t.Fatal(err)
	}
	if found := i.look(t.Context()); len(found) > 0 {
		t.Errorf("by its looks: %v", found)
	}
	if found := pass(now.Add(time.Hour)); len(found) > 0 {
		t.Errorf("before it is time: %v", found)
	}
	found := pass(now.Add(scrubEvery))
	if len(found) != 1 || found[0].file != "m.onnx" || found[0].have != digest.FromBytes(raw).String() || found[0].want != b.blobOf("m.onnx").String() {
		t.Errorf("by its content: %v", found)
	}
	// A touch changes nothing.
	if err := os.WriteFile(model, b.files["m.onnx"], 0o600); err != nil {
		t.Fatal(err)
	}
	if found := i.look(t.Context()); len(found) > 0 {
		t.Errorf("after a touch: %v", found)
	}
}

// A file that has changed since it was verified is not opened: not after a start,
// and not before the next look at the installed bundles either.
func TestOpensNothingUnverified(t *testing.T) {
	rng := seeded(t)
	one, two := pack(t, map[string][][]byte{"m.onnx": blocks(rng, 12)}), pack(t, map[string][][]byte{"m.onnx": blocks(rng, 12)})
	reg := serveBundles(t, one, two)
	d := startDevice(t, reg)
	d.until("is up", func(*dunlinv1.Reported) bool { return true })
	d.opens = func(s engine.Spec) {
		want := map[int64]*testBundle{1: one, 2: two}[s.ID.Version].files["m.onnx"]
		if got, err := os.ReadFile(filepath.Join(s.Dir, s.Entry)); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s is opened, and its file is not what it should be (%v)", s.ID, err)
		}
	}
	d.restart()
	d.Desire(desired(1, nil, one.want("digits", 1)))
	d.untilServing("digits", 1)
	damage := func(b *testBundle) {
		t.Helper()
		f, err := os.OpenFile(filepath.Join(d.dir, "bundles", b.digest.Encoded(), filesFolder, "m.onnx"), os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		half := int64(len(b.files["m.onnx"]) / 2)
		if _, err := f.WriteAt([]byte{^b.files["m.onnx"][half]}, half); err != nil {
			t.Fatal(err)
		}
	}
	mended := func() bool { return strings.HasSuffix(d.kinds(), "drift.found drift.repaired version.serving") }

	d.stop()
	damage(one)
	reg.refuses.Store(true)
	d.start()
	d.until("finds it", func(r *dunlinv1.Reported) bool { return len(r.Drifts) == 1 && !r.Versions[0].Serving })
	reg.refuses.Store(false)
	d.Retry()
	d.untilServing("digits", 1)
	if !mended() {
		t.Errorf("after a start: events %s", d.kinds())
	}

	d.simulated.mu.Lock()
	d.faults = []error{errors.New("busy")}
	d.simulated.mu.Unlock()
	d.Desire(desired(2, nil, two.want("digits", 2)))
	d.until("waits to load it again", func(r *dunlinv1.Reported) bool {
		s := status(r, "digits", 2)
		return s != nil && strings.Contains(s.Reason, "busy")
	})
	damage(two)
	d.Retry()
	d.untilServing("digits", 2)
	if !mended() {
		t.Errorf("before the next look: events %s", d.kinds())
	}
}

// What of the device others find is reported, and told once.
func TestDriftOfTheDevice(t *testing.T) {
	d := startDevice(t, serveBundles(t))
	drift := []*dunlinv1.Drift{{Kind: "setting", Subject: "agent.yaml", Want: "a", Have: "b"}}
	for range 3 {
		d.Drifted(drift)
		d.until("reports it", func(r *dunlinv1.Reported) bool { return len(r.Drifts) == 1 && r.Drifts[0].Subject == "agent.yaml" })
	}
	if got := d.kinds(); got != "drift.found" {
		t.Errorf("events %q", got)
	}
	d.Drifted(nil)
	d.until("forgets it", func(r *dunlinv1.Reported) bool { return len(r.Drifts) == 0 })
}

// A damaged version that crashes is not opened again before it is repaired; the
// good one stands in.
func TestDamagedAndLost(t *testing.T) {
	w := newWorld(t.Errorf)
	v1, v2 := wantVersion("m", 1, "one"), wantVersion("m", 2, "two")
	w.desire(doc(v1))
	w.settle()
	w.desire(doc(v2))
	w.work()
	w.log = nil
	if news := w.core.damaged(finding{digest: keyOf(v2).digest, file: "m.onnx"}, w.now); len(news) != 1 {
		t.Errorf("%d versions are damaged", len(news))
	}
	if news := w.core.damaged(finding{digest: keyOf(v2).digest, file: "other"}, w.now); len(news) != 0 {
		t.Error("it is told twice")
	}
	w.begin()
	w.core.lost(engine.VersionID{Model: "m", Version: 2}, "crashed", false, w.now)
	w.begin()
	w.end(keyOf(v2), outcome{})
	w.work()
	if got, want := strings.Join(w.log, ", "), "repair m:2, withdraw m:2, serve m:1, unload m:2"; got != want {
		t.Errorf("got:  %s\nwant: %s", got, want)
	}
}
