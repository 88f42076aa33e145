package worker

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"

	"github.com/dunlin/dunlin/agent/compiled"
	"github.com/dunlin/dunlin/agent/engine"
	"github.com/dunlin/dunlin/agent/ort"
)

// compiledAs are the options by which Compile compiles, and compiledFor the
// execution provider: a file made otherwise is another one.
const (
	compiledAs  = "all optimizations"
	compiledFor = "CPUExecutionProvider"
)

// Cached gives a Config.Compile that looks into a cache first, and keeps there
// what it compiles, one version at a time, in children as cfg says. What can be
// compiled and not be kept, for want of room, is as what cannot be compiled:
// ort.ErrNotCompilable.
func Cached(cache *compiled.Cache, cfg Config) func(context.Context, Runtime, engine.Spec) (Image, error) {
	lane := make(chan struct{}, 1)
	return func(ctx context.Context, r Runtime, s engine.Spec) (Image, error) {
		key := compiled.Key{Runtime: r.Version, Provider: compiledFor, Options: compiledAs}
		var err error
		if key.Model, err = cache.Digest(s.Dir, s.Entry); err == nil {
			key.CPU, err = compiled.CPU()
		}
		if err != nil {
			return Image{}, fmt.Errorf("compile %s: %w", s.ID, err)
		}
		e, err := cache.Get(ctx, key)
		if errors.Is(err, compiled.ErrNone) {
			if err := take(ctx, lane); err != nil {
				return Image{}, err
			}
			defer func() { <-lane }()
			made := false
			e, err = cache.Put(ctx, key, func(dir string) (compiled.Model, error) {
				c, err := Compile(ctx, cfg, s, filepath.Join(dir, compiled.FileName))
				made = err == nil
				return compiled.Model{
					Inputs: c.Info.Inputs, Outputs: c.Info.Outputs, Batch: c.Info.Batch, Need: c.Need, Prepack: c.Prepack, Run: c.Run,
				}, err
			})
			if err != nil && made && ctx.Err() == nil {
				err = fmt.Errorf("compile %s: %w, or rather kept: %w", s.ID, ort.ErrNotCompilable, err)
			}
		}
		if err != nil {
			return Image{}, err
		}
		info := engine.Info{Inputs: e.Inputs, Outputs: e.Outputs, Batch: e.Batch, Need: e.Need, Run: e.Run}
		info.Need.Mapped = true
		return Image{File: e.File, Info: info, Release: e.Release}, nil
	}
}
