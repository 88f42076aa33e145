package reconcile

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/dunlin/dunlin/agent/engine"
	"github.com/dunlin/dunlin/models"
	"github.com/dunlin/dunlin/models/signing"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// programOf says which files of a release of the agent are wanted, and what
// may have chunks of them.
type programOf struct {
	platform string // "linux-amd64"
	reuse    []string
}

// narrow leaves of a release's bundle what the device wants.
func (p *programOf) narrow(cfg *models.Config, m *models.Manifest, index *dunlinv1.ChunkIndex) (*models.Manifest, *dunlinv1.ChunkIndex, error) {
	if cfg.Release == nil {
		return nil, nil, &VerifyError{File: "config", Err: errors.New("it is not one of a release of the agent")}
	}
	if err := cfg.Release.Fits(m); err != nil {
		return nil, nil, &VerifyError{File: "config", Err: err}
	}
	few, part := &models.Manifest{Digest: m.Digest, Config: m.Config, Index: m.Index}, &dunlinv1.ChunkIndex{}
	for i, f := range m.Files {
		if strings.HasPrefix(f.Path, p.platform+"/") {
			few.Files, few.Size = append(few.Files, f), few.Size+f.Size
			part.Files = append(part.Files, index.Files[i])
		}
	}
	if len(few.Files) == 0 {
		return nil, nil, &signing.RefusedError{Reason: fmt.Sprintf("the release has no binary for %s, only for %s", p.platform, strings.Join(cfg.Release.Binaries, ", "))}
	}
	return few, part, nil
}

// reuseProgram copies what is missing from the files of programs.
func (d *download) reuseProgram(ctx context.Context, buf []byte) error {
	for _, file := range d.program.reuse {
		if len(d.missing) == 0 {
			return nil
		}
		index, err := models.ChunkFile(ctx, file, filepath.Base(file))
		if err != nil {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			d.log.Debug("no chunks to reuse", "file", file, "error", err)
			continue
		}
		if err := d.reuseFile(ctx, filepath.Dir(file), index, buf); err != nil {
			return err
		}
	}
	return nil
}

// FetchProgram brings the agent program of a release for this device, and its
// signature, into a folder, under the names that they have in the release. It
// goes on where it was cut short, copies what it can from the files of reuse,
// and tells how far it is each second. A *signing.RefusedError would come again;
// a *WaitError says what is to be waited for. Whether the device may run the
// program is not looked at. It may be called beside Run, once at a time.
func (r *Reconciler) FetchProgram(ctx context.Context, want *dunlinv1.DesiredAgent, folder string, reuse []string, progress func(present, total uint64)) error {
	platform := models.PlatformOf(runtime.GOOS, runtime.GOARCH)
	store, err := openBundles(folder)
	if err != nil {
		return err
	}
	of := digest.Digest(want.Digest)
	registry := r.cfg.Registry()
	if registry.URL == "" {
		return errNoSource
	}
	d := &download{
		store: store, remote: r.over(newRemote(registry, r.cfg.Stall), registry), gate: r.gates.of(want.Delivery), id: engine.VersionID{Model: models.AgentModel, Version: want.Version}, digest: of,
		trust: r.cfg.Trust, now: r.cfg.Now, reserve: r.cfg.Reserve, free: freeSpace, log: r.cfg.Log, program: &programOf{platform, append(reuse, filepath.Join(folder, models.ReleaseFile))},
	}
	if r.cfg.Near != nil {
		d.near = r.cfg.Near(ctx, models.AgentModel, of)
	}
	d.total.Store(int64(want.SizeBytes))
	files := filepath.Join(store.path(of), filesFolder, platform)
	if _, err := os.Stat(files); errors.Is(err, fs.ErrNotExist) {
		ended := make(chan struct{})
		told := make(chan struct{})
		go func() {
			defer close(told)
			tick := time.NewTicker(progressEvery)
			defer tick.Stop()
			for {
				progress(uint64(d.present.Load()), uint64(d.total.Load()))
				select {
				case <-tick.C:
				case <-ended:
					return
				}
			}
		}()
		err := d.run(ctx)
		close(ended)
		<-told
		progress(uint64(d.present.Load()), uint64(d.total.Load()))
		r.gates.meter.store(ctx)
		if isVerify(err) {
			return errors.Join(&signing.RefusedError{Reason: err.Error()}, store.remove(of))
		}
		if err != nil {
			return err
		}
	} else if err != nil {
		return err
	}
	for _, name := range []string{models.ReleaseSignature, models.ReleaseFile} {
		if err := os.Rename(filepath.Join(files, name), filepath.Join(folder, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return store.remove(of)
}
