package follow

import (
	"context"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/dunlin/dunlin/agent/reconcile"
	"github.com/dunlin/dunlin/agent/site"
	"github.com/dunlin/dunlin/internal/link"
	"github.com/dunlin/dunlin/internal/program"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

const (
	// sourcesWait is the wait for an answer to who of the site has a bundle; a
	// device without one asks the registry.
	sourcesWait = 2 * time.Second
	// maxSources bounds the devices of the site that one download asks.
	maxSources = 8
)

// asking keeps who waits for an answer.
type asking struct {
	mu      sync.Mutex                           // guards what follows
	waiting map[string][]chan []*dunlinv1.Source // by digest
}

// near gives what on the device itself has a bundle, or else asks the controller
// who of the site has it. Nobody does where the controller is not there, or does
// not answer.
func (f *Follower) near(ctx context.Context, model string, bundle digest.Digest) []reconcile.Source {
	if f.cfg.Local != nil {
		if s := f.cfg.Local(bundle); s != nil {
			return []reconcile.Source{s}
		}
	}
	l := f.Link()
	if l == nil || l.Session() == "" {
		return nil
	}
	answer := make(chan []*dunlinv1.Source, 1)
	a := &f.asking
	a.mu.Lock()
	if a.waiting == nil {
		a.waiting = map[string][]chan []*dunlinv1.Source{}
	}
	a.waiting[bundle.String()] = append(a.waiting[bundle.String()], answer)
	a.mu.Unlock()
	defer a.answer(bundle.String(), nil) // nobody waits any more
	if err := l.Send(link.Sources, &dunlinv1.SourcesRequest{Model: model, Digest: bundle.String()}); err != nil {
		return nil
	}
	late := time.NewTimer(sourcesWait)
	defer late.Stop()
	select {
	case found := <-answer:
		return f.sources(found)
	case <-late.C:
	case <-ctx.Done():
	}
	return nil
}

// answer gives those that wait for a bundle's sources what there is.
func (a *asking) answer(bundle string, sources []*dunlinv1.Source) {
	a.mu.Lock()
	waiting := a.waiting[bundle]
	delete(a.waiting, bundle)
	a.mu.Unlock()
	for _, w := range waiting {
		w <- sources // has room
	}
}

// sources gives those of an answer that can be asked.
func (f *Follower) sources(found []*dunlinv1.Source) (all []reconcile.Source) {
	for _, s := range found[:min(len(found), maxSources)] {
		if link.CheckDevice(s.Device) != nil || program.CheckURL(s.Url, "https") != nil || s.Device == f.Identity.Stored().Device {
			continue
		}
		all = append(all, reconcile.NewPeer(s.Url, site.NewClient(f.Identity, s.Device), s.Cache))
	}
	return all
}
