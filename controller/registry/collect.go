package registry

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path"
	"path/filepath"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
)

// Garbage is what no version and no signature of one refers to. It is deleted
// a grace time after it was last pushed, looked for by who pushes, or let go.
//
// The collector runs while others push. Two things keep it off what they count
// on. Who makes, links or relies on something holds its name until it is done;
// the collector claims a name before it deletes, which fails while somebody
// holds it, and who comes to hold it waits until the deletion is over. And who
// relies on something that is there makes its link young before letting go of
// it; the collector looks at that age after it has claimed the name. So it
// does not matter how old the list is that it goes by.

// claims are the names that are held or claimed. It is safe for concurrent use.
type claims struct {
	mu      sync.Mutex
	held    map[string]int
	claimed map[string]chan struct{} // closed when the claim ends
}

// hold waits for claims on names to end, and keeps new ones off until release
// is called.
func (c *claims) hold(ctx context.Context, names ...string) (release func(), err error) {
	for {
		wait := c.tryHold(names)
		if wait == nil {
			break
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-wait:
		}
	}
	return sync.OnceFunc(func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		for _, n := range names {
			if c.held[n]--; c.held[n] == 0 {
				delete(c.held, n)
			}
		}
	}), nil
}

// tryHold gives nil, or what to wait for.
func (c *claims) tryHold(names []string) <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, n := range names {
		if wait := c.claimed[n]; wait != nil {
			return wait
		}
	}
	if c.held == nil {
		c.held = map[string]int{}
	}
	for _, n := range names {
		c.held[n]++
	}
	return nil
}

// claim gives nil where somebody holds the name.
func (c *claims) claim(name string) (end func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.held[name] > 0 || c.claimed[name] != nil {
		return nil
	}
	if c.claimed == nil {
		c.claimed = map[string]chan struct{}{}
	}
	done := make(chan struct{})
	c.claimed[name] = done
	return func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		delete(c.claimed, name)
		close(done)
	}
}

// tagsName is the name that stands for all tags of a model.
func tagsName(model string) string { return "tags " + model }

// rely keeps the collector off blobs of a model, some of which may not be
// there yet, until release is called.
func (r *Registry) rely(ctx context.Context, model string, blobs ...digest.Digest) (release func(), err error) {
	names := make([]string, len(blobs))
	for i, d := range blobs {
		names[i] = d.String()
	}
	if release, err = r.claims.hold(ctx, names...); err != nil {
		return nil, err
	}
	for _, d := range blobs {
		if d.Validate() != nil {
			continue // it names nothing
		}
		if err := errors.Join(r.young(layerLink(model, d)), r.young(manifestLink(model, d))); err != nil {
			release()
			return nil, err
		}
	}
	return release, nil
}

// relyOnManifest is rely for a manifest that may be there, with all that it
// names.
func (r *Registry) relyOnManifest(ctx context.Context, model string, d digest.Digest) (release func(), err error) {
	first, err := r.rely(ctx, model, d)
	if err != nil {
		return nil, err
	}
	blobs, err := readBlobsOf(r.root, d)
	if err != nil { // it is not there, or no manifest: whoever asks is told so
		return first, nil
	}
	second, err := r.rely(ctx, model, blobs...)
	if err != nil {
		first()
		return nil, err
	}
	return func() { second(); first() }, nil
}

// relyOnPushed is rely for a manifest that is being pushed, with all that it
// names.
func (r *Registry) relyOnPushed(ctx context.Context, model string, manifest []byte) (release func(), err error) {
	blobs, err := blobsOf(manifest)
	if err != nil { // whoever pushes it is told what is wrong with it
		blobs = nil
	}
	return r.rely(ctx, model, append(blobs, digest.FromBytes(manifest))...)
}

// young makes a file as if it had been written now, if it is there.
func (r *Registry) young(file string) error {
	now := time.Now()
	err := os.Chtimes(filepath.Join(r.root, filepath.FromSlash(file)), now, now)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// LetGo begins the grace time of a manifest, and of what it names: as long as
// it lasts, they stay though nothing refers to them.
func (r *Registry) LetGo(ctx context.Context, model string, manifest digest.Digest) error {
	release, err := r.relyOnManifest(ctx, model, manifest)
	if err == nil {
		release()
	}
	return err
}

// Untag takes away the tags of a model that point to a manifest, unless others
// are being made just now.
func (r *Registry) Untag(ctx context.Context, model string, manifest digest.Digest) error {
	release, err := r.claims.hold(ctx, manifest.String())
	if err != nil {
		return err
	}
	defer release()
	_, err = r.dropTags(model, manifest)
	return err
}

// dropTags takes away what the tags of a model say of a manifest; false: a tag
// is being made just now.
func (r *Registry) dropTags(model string, d digest.Digest) (bool, error) {
	end := r.claims.claim(tagsName(model))
	if end == nil {
		return false, nil
	}
	defer end()
	tags, err := tagsOf(r.root, model)
	if err != nil {
		return false, err
	}
	for tag, points := range tags {
		dir := filepath.Join(r.root, filepath.FromSlash(tagsFolder(model)), tag)
		if points != d.String() {
			dir = filepath.Join(dir, "index", d.Algorithm().String(), d.Encoded())
		}
		if err := os.RemoveAll(dir); err != nil {
			return false, err
		}
	}
	return true, nil
}

// Collected is what a collection deleted.
type Collected struct {
	Manifests, Links, Blobs int
	Bytes                   int64 // of the blobs
}

// Collect deletes the garbage that was last touched before a time. What it
// cannot understand it leaves alone.
func (r *Registry) Collect(ctx context.Context, before time.Time) (c Collected, err error) {
	kept, err := r.versions.Manifests(ctx)
	if err != nil {
		return c, err
	}
	live := map[string]map[digest.Digest]bool{} // by model: manifests and blobs
	keep := func(model string, d digest.Digest) error {
		blobs, err := readBlobsOf(r.root, d)
		if err != nil {
			return fmt.Errorf("manifest %s of model %s: %w", d, model, err)
		}
		if live[model] == nil {
			live[model] = map[digest.Digest]bool{}
		}
		live[model][d] = true
		for _, b := range blobs {
			live[model][b] = true
		}
		return nil
	}
	for _, m := range kept {
		// Where one that is kept cannot be read, nothing is known.
		if err := keep(m.Model, m.Digest); err != nil {
			return c, err
		}
	}
	storage := filepath.Join(r.root, filepath.FromSlash(storageDir))
	repositories, err := os.ReadDir(filepath.Join(storage, "repositories"))
	if errors.Is(err, fs.ErrNotExist) {
		return c, nil // nobody has pushed yet
	}
	if err != nil {
		return c, err
	}
	linked := map[digest.Digest]bool{}
	for _, e := range repositories {
		if err := r.collectModel(ctx, e.Name(), before, live, keep, linked, &c); err != nil {
			return c, err
		}
	}
	// The content of what no repository links to.
	return c, r.digests(filepath.Join(storage, "blobs"), true, func(d digest.Digest, dir string) error {
		if linked[d] {
			return ctx.Err()
		}
		size, err := r.delete(d, filepath.Join(dir, "data"), dir, before, func() (bool, error) {
			// Read again: a model that is new since may have it.
			repositories, err := os.ReadDir(filepath.Join(storage, "repositories"))
			if err != nil {
				return false, err
			}
			for _, e := range repositories {
				for _, link := range []string{layerLink(e.Name(), d), manifestLink(e.Name(), d)} {
					if _, err := os.Stat(filepath.Join(r.root, filepath.FromSlash(link))); !errors.Is(err, fs.ErrNotExist) {
						return false, err
					}
				}
			}
			return true, nil
		})
		if size >= 0 {
			c.Blobs++
			c.Bytes += size
		}
		return errors.Join(err, ctx.Err())
	})
}

// collectModel deletes the manifests and links of a model that are garbage,
// and notes what is linked still.
func (r *Registry) collectModel(ctx context.Context, model string, before time.Time, live map[string]map[digest.Digest]bool, keep func(string, digest.Digest) error, linked map[digest.Digest]bool, c *Collected) error {
	always := func() (bool, error) { return true, nil }
	repository := filepath.Join(r.root, filepath.FromSlash(repositoryFolder(model)))
	revisions := filepath.Join(repository, "_manifests", "revisions")
	// A manifest that is young keeps what it names, be that ever so old.
	err := r.digests(revisions, false, func(d digest.Digest, dir string) error {
		if info, err := os.Stat(filepath.Join(dir, "link")); err == nil && !info.ModTime().Before(before) && !live[model][d] {
			if err := keep(model, d); err != nil {
				r.log.DebugContext(ctx, "a manifest that was pushed is not whole", slog.Any("error", err))
			}
		}
		return ctx.Err()
	})
	if err != nil {
		return err
	}
	err = r.digests(revisions, false, func(d digest.Digest, dir string) error {
		size := int64(-1)
		if !live[model][d] {
			var err error
			size, err = r.delete(d, filepath.Join(dir, "link"), dir, before, func() (bool, error) {
				if err := r.signatures.RemoveSignature(ctx, model, d); err != nil {
					return false, err
				}
				return r.dropTags(model, d)
			})
			if err != nil {
				return err
			}
		}
		if size < 0 {
			linked[d] = true
		} else {
			c.Manifests++
		}
		return ctx.Err()
	})
	if err != nil {
		return err
	}
	return r.digests(filepath.Join(repository, "_layers"), false, func(d digest.Digest, dir string) error {
		size := int64(-1)
		if !live[model][d] {
			var err error
			if size, err = r.delete(d, filepath.Join(dir, "link"), dir, before, always); err != nil {
				return err
			}
		}
		if size < 0 {
			linked[d] = true
		} else {
			c.Links++
		}
		return ctx.Err()
	})
}

// delete deletes dir, which is about d, unless somebody holds d, or its file
// is not older than before, or sure says no. It gives the size of the file,
// or -1 where it left it.
func (r *Registry) delete(d digest.Digest, file, dir string, before time.Time, sure func() (bool, error)) (size int64, err error) {
	end := r.claims.claim(d.String())
	if end == nil {
		return -1, nil
	}
	defer end()
	info, err := os.Stat(file)
	if errors.Is(err, fs.ErrNotExist) { // half of something that was cut short
		if info, err = os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
			return -1, nil
		}
	}
	if err != nil || !info.ModTime().Before(before) {
		return -1, err
	}
	if ok, err := sure(); err != nil || !ok {
		return -1, err
	}
	// The file first: a folder without it is nothing to the registry.
	if err := os.Remove(file); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return -1, err
	}
	return info.Size(), os.RemoveAll(dir)
}

// digests calls do for each digest that has a folder in dir: ALGORITHM/HEX,
// or, where it is split, ALGORITHM/FIRST TWO/HEX.
func (r *Registry) digests(dir string, split bool, do func(d digest.Digest, dir string) error) error {
	list := func(dir string) ([]os.DirEntry, error) {
		entries, err := os.ReadDir(dir)
		if errors.Is(err, fs.ErrNotExist) {
			return nil, nil
		}
		return entries, err
	}
	algorithms, err := list(dir)
	if err != nil {
		return err
	}
	for _, a := range algorithms {
		parents := []string{filepath.Join(dir, a.Name())}
		if split {
			parents = nil
			entries, err := list(filepath.Join(dir, a.Name()))
			if err != nil {
				return err
			}
			for _, e := range entries {
				parents = append(parents, filepath.Join(dir, a.Name(), e.Name()))
			}
		}
		for _, parent := range parents {
			entries, err := list(parent)
			if err != nil {
				return err
			}
			for _, e := range entries {
				d := digest.NewDigestFromEncoded(digest.Algorithm(a.Name()), e.Name())
				if d.Validate() != nil {
					continue
				}
				if err := do(d, path.Join(parent, e.Name())); err != nil {
					return err
				}
			}
		}
	}
	return nil
}
