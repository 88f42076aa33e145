package reconcile

import (
	"context"
	"log/slog"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/dunlin/dunlin/agent/engine"
	"github.com/dunlin/dunlin/models/signing"
)

// Fetch brings one bundle into a folder of bundles, as the download of a
// reconciler does that has the folder, but for signatures: whose the bundle is
// nobody asks.
func Fetch(ctx context.Context, dir string, from Source, model string, bundle digest.Digest, log *slog.Logger) error {
	b, err := openBundles(dir)
	if err != nil {
		return err
	}
	if _, err := b.open(bundle); err == nil {
		return nil
	}
	d := &download{
		store: b, remote: from, id: engine.VersionID{Model: model}, digest: bundle,
		trust: func() *signing.Trust { return signing.TrustAll }, now: time.Now, free: freeSpace, log: log,
	}
	return d.run(ctx)
}
