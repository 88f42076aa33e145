package dispatch

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"slices"
	"sync"
	"time"

	"github.com/dunlin/dunlin/controller/store"
	"github.com/dunlin/dunlin/internal/link"
	"github.com/dunlin/dunlin/models"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// siteLabel is the label of a device that says at which site it is: devices
// with the same value fetch bundles from each other.
const siteLabel = "site"

const (
	// maxSources bounds the devices that a device is told of.
	maxSources = 8
	// sitesFor is how long what is known of the sites is used: a hundred devices
	// that ask at once have the fleet looked through once.
	sitesFor = 5 * time.Second
)

// sites keeps who can give bundles to the others of a site.
type sites struct {
	mu      sync.Mutex // guards what follows; held for memory only
	at      time.Time
	givers  map[string][]*store.Device // by site: connected, and with a URL
	members map[string][]string        // by site
	caches  map[string]bool            // by device
	site    map[string]string          // by device
	given   map[string]map[string]bool // by site: models that its devices are known to be given
}

// sources answers who of a device's site has a bundle.
func (d *Dispatcher) sources(device string, q *dunlinv1.SourcesRequest) {
	s := &d.sites
	s.mu.Lock()
	s.refresh(d.view, d.now())
	near := s.givers[s.site[device]]
	s.mu.Unlock()
	d.send(link.Down(device, link.Command), link.Command, &dunlinv1.Command{Command: &dunlinv1.Command_Sources{
		Sources: &dunlinv1.Sources{Digest: q.GetDigest(), Sources: pickSources(device, q.GetDigest(), near)},
	}})
}

// refresh looks the devices through where what is known is too old.
func (s *sites) refresh(v *view, now time.Time) {
	if !s.at.IsZero() && now.Sub(s.at) < sitesFor {
		return
	}
	all := v.all()
	if len(all) == 0 {
		return // the planner has not read them yet
	}
	s.at, s.givers, s.members, s.given = now, map[string][]*store.Device{}, map[string][]string{}, map[string]map[string]bool{}
	s.caches, s.site = map[string]bool{}, map[string]string{}
	for _, d := range all {
		at := d.Labels[siteLabel]
		if at == "" {
			continue
		}
		s.site[d.Name] = at
		s.members[at] = append(s.members[at], d.Name)
		s.caches[d.Name] = d.Info.GetSiteCache()
		if d.Connected && d.Info.GetSiteUrl() != "" {
			s.givers[at] = append(s.givers[at], d)
		}
	}
}

// CachesFor says whether a device is a cache of a site of which a device is
// given a model: it may then fetch it.
func (d *Dispatcher) CachesFor(ctx context.Context, device, model string) (bool, error) {
	s := &d.sites
	s.mu.Lock()
	s.refresh(d.view, d.now())
	at := s.site[device]
	cache, known, members := s.caches[device], s.given[at][model], s.members[at]
	s.mu.Unlock()
	if !cache || known {
		return cache, nil
	}
	documents, err := d.store.Documents(ctx, members)
	if err != nil {
		return false, err
	}
	given := map[string]bool{}
	for _, doc := range documents {
		for _, v := range doc.GetVersions() {
			given[v.GetModel()] = true
		}
		if doc.GetAgent() != nil {
			given[models.AgentModel] = true
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.given[at] = given
	return given[model], nil
}

// pickSources gives those of a site that a device should ask for a bundle:
// first those that have it, each device in an order of its own, so that they
// are asked alike; then caches that would fetch it, in an order that is the
// bundle's, so that one of them does. It is pure.
func pickSources(device, digest string, near []*store.Device) []*dunlinv1.Source {
	type candidate struct {
		*dunlinv1.Source
		has   bool
		order uint64
	}
	var all []candidate
	for _, d := range near {
		if d.Name == device {
			continue
		}
		c := candidate{Source: &dunlinv1.Source{Device: d.Name, Url: d.Info.GetSiteUrl(), Cache: d.Info.GetSiteCache()}}
		c.has = slices.ContainsFunc(d.Reported.GetVersions(), func(v *dunlinv1.VersionStatus) bool {
			return v.GetDigest() == digest && stored(v.GetState())
		})
		switch {
		case c.has:
			c.order = spread(device, d.Name)
		case c.Cache:
			c.order = spread(digest, d.Name)
		default:
			continue
		}
		all = append(all, c)
	}
	slices.SortFunc(all, func(a, b candidate) int {
		if a.has != b.has {
			if a.has {
				return -1
			}
			return 1
		}
		return cmp.Or(cmp.Compare(a.order, b.order), cmp.Compare(a.Device, b.Device))
	})
	var picked []*dunlinv1.Source
	for _, c := range all[:min(len(all), maxSources)] {
		picked = append(picked, c.Source)
	}
	return picked
}

// stored says whether a version in this state is whole on its device.
func stored(s dunlinv1.VersionState) bool {
	switch s {
	case dunlinv1.VersionState_VERSION_STATE_STORED, dunlinv1.VersionState_VERSION_STATE_COMPILED, dunlinv1.VersionState_VERSION_STATE_WARM,
		dunlinv1.VersionState_VERSION_STATE_RESIDENT, dunlinv1.VersionState_VERSION_STATE_DRAINING:
		return true
	}
	return false
}

// spread puts pairs in an order that follows from nothing else.
func spread(a, b string) uint64 {
	sum := sha256.Sum256([]byte(a + "\x00" + b))
	return binary.BigEndian.Uint64(sum[:])
}
