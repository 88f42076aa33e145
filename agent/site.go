package agent

import (
	"context"
	"fmt"
	"io"
	"path/filepath"
	"sync"

	"github.com/opencontainers/go-digest"

	"github.com/dunlin/dunlin/agent/reconcile"
	"github.com/dunlin/dunlin/agent/site"
	profiles "github.com/dunlin/dunlin/firmware-profiles"
	"github.com/dunlin/dunlin/internal/program"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// siteFolder is that of the bundles that are kept for the site.
const siteFolder = "site"

// maxSiteCacheMiB bounds Config.SiteCacheMiB.
const maxSiteCacheMiB = 16 << 20

// checkSite reports what is wrong with what the device is for its site, and
// with what it says of its link.
func (cfg *Config) checkSite(add func(name string, err error)) {
	if cfg.SiteListen != "" {
		add("site-listen", program.CheckListen(cfg.SiteListen, true))
	}
	if cfg.SiteCacheMiB < 0 || cfg.SiteCacheMiB > maxSiteCacheMiB {
		add("site-cache", fmt.Errorf("is %d, allowed are 0 to %d", cfg.SiteCacheMiB, maxSiteCacheMiB))
	}
	if cfg.SiteCacheMiB > 0 && cfg.SiteListen == "" {
		add("site-cache", fmt.Errorf("needs --site-listen: else nobody can fetch what is kept"))
	}
	switch cfg.Metered {
	case "":
		cfg.Metered = "auto"
	case "auto", "on", "off":
	default:
		add("metered", fmt.Errorf("%q is not auto, on or off", cfg.Metered))
	}
}

// linkOf says what may travel to the device: as its class says, and whether
// bytes cost money as the settings say, where they do.
func (cfg *Config) linkOf(p profiles.Link) (reconcile.Link, error) {
	l := reconcile.Link{
		Metered: p.Metered && cfg.Metered != "off" || cfg.Metered == "on", DayBytes: p.BytesPerDay, MonthBytes: p.BytesPerMonth, BytesPerSecond: p.BytesPerSecond,
	}
	for _, text := range p.Windows {
		w, err := reconcile.ParseWindow(text)
		if err != nil {
			return l, fmt.Errorf("firmware profile: link.windows: %w", err)
		}
		l.Windows = append(l.Windows, w)
	}
	return l, nil
}

// giver gives other devices of the site what this one has.
type giver struct {
	agent  *agent
	server *site.Server
	shelf  *reconcile.Shelf
}

// newGiver listens; nil where the device gives nothing. What it says of itself
// goes to info.
func (a *agent) newGiver(info *dunlinv1.DeviceInfo) (g *giver, err error) {
	if a.cfg.SiteListen == "" {
		return nil, nil
	}
	g = &giver{agent: a}
	if g.server, err = site.Listen(a.cfg.SiteListen, a.cfg.Log); err != nil {
		return nil, fmt.Errorf("site-listen: %w", err)
	}
	if info.SiteUrl, err = g.server.URL(); err == nil {
		info.SiteCache = a.cfg.SiteCacheMiB > 0
		g.shelf, err = reconcile.NewShelf(reconcile.ShelfConfig{
			Bundles: filepath.Join(a.cfg.Data, bundlesFolder), Cache: filepath.Join(a.cfg.Data, siteFolder), CacheBytes: int64(a.cfg.SiteCacheMiB) << 20,
			Reserve: uint64(a.profile.Storage.ReserveBytes), Origin: g.origin, Log: a.cfg.Log,
		})
	}
	if err != nil {
		g.server.Close()
		return nil, fmt.Errorf("site-listen: %w", err)
	}
	return g, nil
}

// origin gives the registry; nil while it is not known.
func (g *giver) origin() reconcile.Source {
	url, client := g.agent.follow.Identity.Registry()
	if url == "" {
		return nil
	}
	return reconcile.NewRemote(reconcile.Registry{URL: url, Client: client})
}

// open gives what the shelf has.
func (g *giver) open(ctx context.Context, model string, d digest.Digest, manifest bool) (io.ReadSeeker, io.Closer, error) {
	c, err := g.shelf.Open(ctx, reconcile.Ref{Model: model, Digest: d, Manifest: manifest})
	if err != nil {
		return nil, nil, err
	}
	return c, c, nil
}

// run answers until ctx is done.
func (g *giver) run(ctx context.Context) error {
	if g == nil {
		return nil
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	wg.Go(func() { _ = g.shelf.Run(ctx) }) // it has no error
	return g.server.Run(ctx, g.agent.follow.Identity, g.open)
}

// of gives what it gives of; nil where it gives nothing.
func (g *giver) of() *reconcile.Shelf {
	if g == nil {
		return nil
	}
	return g.shelf
}

// close stops one that was not run.
func (g *giver) close() {
	if g != nil {
		g.server.Close()
	}
}
