// Package follow is the half of an agent that follows a controller: who the
// device is, its connection, and what the two say to each other. It knows
// neither how models are run nor what the device is made of.
package follow

import (
	"context"
	"crypto/rand"
	"errors"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"
	"google.golang.org/protobuf/proto"

	"github.com/dunlin/dunlin/agent/engine"
	"github.com/dunlin/dunlin/agent/identity"
	"github.com/dunlin/dunlin/agent/inband"
	"github.com/dunlin/dunlin/agent/reconcile"
	"github.com/dunlin/dunlin/agent/state"
	"github.com/dunlin/dunlin/internal/link"
	"github.com/dunlin/dunlin/models/signing"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// Store keeps what an agent must know after a crash: a *state.Store, or a
// *state.Memory.
type Store interface {
	identity.Store
	reconcile.Store
	Trust(context.Context) (*signing.Trust, error)
	SetTrust(context.Context, *signing.Trust) error
	SetStoodDown(ctx context.Context, until time.Time, cause string) error
	OutboxID() string
	Append(context.Context, *dunlinv1.Event) (uint64, error)
	Pending(ctx context.Context, limit int) ([]*dunlinv1.Event, error)
	Ack(ctx context.Context, outboxID string, sequence uint64) error
}

// Config configures a Follower.
type Config struct {
	Store Store
	// Identity says who the device is to be. New sets TakeTrust, TrustVersion
	// and Dial, and State is Store.
	Identity identity.Config
	// Reconcile says how the device is driven to what the controller wants. New
	// sets State, Registry, Near, Now, Trust, Counts and Event.
	Reconcile reconcile.Config
	// Info is what the device says of itself at first, and Ready is closed when
	// that, or what Describe has made of it, is worth saying.
	Info   *dunlinv1.DeviceInfo
	Ready  <-chan struct{}
	Labels map[string]string
	// Sample waits for the newest figures of the device, without those of its
	// models, and gives a copy; nil when ctx is done before.
	Sample func(ctx context.Context) *dunlinv1.Telemetry
	// Versions gives the figures of the loaded versions.
	Versions func() []engine.Status
	// Program brings the agent program to the release that is wanted; nil: it
	// stays as it is.
	Program Program
	// IdleWatts is what the device takes when nothing runs; 0: not known.
	IdleWatts float64
	// MaxBackoff is that of the link.
	MaxBackoff time.Duration
	// Delivery says by which way bundles come from the controller; empty: by
	// HTTPS.
	Delivery inband.Mode
	// Local gives what on the device itself has a bundle, and nil where nothing
	// has; may be nil.
	Local func(bundle digest.Digest) reconcile.Source
	// Dial opens the connections to the controller, below TLS; nil: TCP.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
	Log  *slog.Logger
}

// Program is the agent program: an *update.Updater, or an *update.Simulated. No
// method waits.
type Program interface {
	Want(*dunlinv1.DesiredAgent) // nil: the one that runs
	Retry()                      // the controller is reached again
	TrustChanged()
	Status() *dunlinv1.AgentStatus
	Changed() <-chan struct{} // receives when Status has changed
}

// Follower follows a controller. Its methods may be called concurrently.
type Follower struct {
	// Identity and Reconcile are parts of it; nobody changes which. Run runs the
	// identity, and the caller the reconciler, with or without a controller.
	Identity  *identity.Device
	Reconcile *reconcile.Reconciler

	cfg       Config
	store     Store
	boot      string // made anew at each start
	figures   *figures
	outbox    chan struct{}                 // an event was appended
	stoodDown bool                          // as the store has it; linkState's
	trust     atomic.Pointer[signing.Trust] // nil: none yet
	lacks     error                         // why it cannot be the device that it was; nil: it can

	asking  asking          // who of the site has a bundle
	fetcher *inband.Fetcher // over MQTT

	trusting sync.Mutex // held while a trust document is taken

	mu   sync.Mutex // guards what follows
	info *dunlinv1.DeviceInfo
	link *link.Link // nil until the device has joined
}

// New takes up what the store has. A device that has models and cannot be who
// it was, as its key is lost, serves them all the same, and says so in Run; one
// that has none is an error.
func New(ctx context.Context, cfg Config) (*Follower, error) {
	f := &Follower{cfg: cfg, store: cfg.Store, boot: rand.Text(), figures: newFigures(cfg.IdleWatts), outbox: make(chan struct{}, 1), info: cfg.Info}
	trust, err := f.store.Trust(ctx)
	if err != nil && !errors.Is(err, state.ErrNone) {
		return nil, err
	}
	f.trust.Store(trust)
	if f.Identity, err = identity.Open(ctx, f.identityConfig()); err != nil {
		if _, none := f.store.Desired(ctx); none != nil {
			return nil, err
		}
		f.Identity, f.lacks = identity.New(f.identityConfig()), err
	}
	r := cfg.Reconcile
	r.State, r.Registry, r.Now, r.Trust, r.Counts, r.Event = f.store, f.registry, f.Identity.Now, f.trust.Load, f.counts, f.Event
	if r.Disk == nil { // simulated devices have no site
		r.Near = f.near
	}
	f.fetcher = f.newFetcher()
	if f.cfg.Delivery != "" {
		r.Origin = f.newDelivery().Over
	}
	if f.cfg.Program != nil {
		r.Agent = f.cfg.Program.Want
	}
	f.Reconcile, err = reconcile.New(r)
	return f, err
}

// Run joins where that has not been done, and then talks to the controller
// until ctx is done.
func (f *Follower) Run(ctx context.Context) error {
	if f.cfg.Identity.Controller == "" && f.lacks == nil && !f.Identity.Joined() {
		f.cfg.Log.Info("no controller is named: serving what is on the device")
		<-ctx.Done()
		return nil
	}
	select {
	case <-f.cfg.Ready:
	case <-ctx.Done():
		return nil
	}
	err := f.lacks
	if err == nil {
		err = f.Identity.Join(ctx, f.Info())
	}
	if err != nil {
		if _, none := f.store.Desired(ctx); none != nil {
			return err
		}
		// It followed a controller before: it had a secret, or a key.
		f.cfg.Log.Error("serving what is on the device, until it is started with what it needs", "error", err)
		<-ctx.Done()
		return nil
	}
	l, err := f.newLink()
	if err != nil {
		return err
	}
	f.mu.Lock()
	f.link = l
	f.mu.Unlock()
	if err := f.store.SetStoodDown(ctx, time.Time{}, ""); err != nil {
		return err
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	wg.Go(func() { f.Identity.Run(ctx) })
	wg.Go(func() { f.reconnect(ctx, l) })
	wg.Go(func() { f.fetcher.Run(ctx) })
	return newSession(l, f).run(ctx)
}

// reconnect has the link use what the device's identity is now.
func (f *Follower) reconnect(ctx context.Context, l *link.Link) {
	for {
		select {
		case <-f.Identity.Changed():
			if err := l.Reconnect(f.Identity.Stored().BrokerURL); err != nil {
				f.cfg.Log.Error("the connection stays the old one", "error", err)
			}
		case <-ctx.Done():
			return
		}
	}
}

// linkState keeps for the doctor that the link is quiet, and tells the
// identity that somebody answers. The link calls it, once at a time.
func (f *Follower) linkState(s link.State, cause error) {
	if s == link.Connected || s == link.Refused {
		f.Identity.Reached()
	}
	var until time.Time
	text := ""
	if s == link.StoodDown {
		until, text = time.Now().Add(link.StandDownFor), cause.Error()
	} else if !f.stoodDown {
		return
	}
	f.stoodDown = s == link.StoodDown
	if err := f.store.SetStoodDown(context.Background(), until, text); err != nil {
		f.cfg.Log.Error("the state of the connection is not kept", "error", err)
	}
}

// newLink makes the link of a device that has joined.
func (f *Follower) newLink() (*link.Link, error) {
	id := f.Identity.Stored()
	return link.New(link.Config{
		BrokerURL: id.BrokerURL, Device: id.Device, BootID: f.boot, Log: f.cfg.Log,
		TLS: f.Identity.BrokerTLS, OnState: f.linkState, MaxBackoff: f.cfg.MaxBackoff, Dial: f.cfg.Dial,
		Hello: func() *dunlinv1.Hello {
			h := &dunlinv1.Hello{HaveGeneration: f.Reconcile.Generation(), Info: f.Info(), Labels: f.cfg.Labels}
			f.Identity.Introduce(h)
			return h
		},
	})
}

func (f *Follower) registry() reconcile.Registry {
	url, client := f.Identity.Registry()
	return reconcile.Registry{URL: url, Client: client}
}

// Link gives the connection; nil until the device has joined.
func (f *Follower) Link() *link.Link {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.link
}

// Info gives what the device says of itself; nobody changes it.
func (f *Follower) Info() *dunlinv1.DeviceInfo {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.info
}

// Describe changes what the device says of itself; the next hello has it.
func (f *Follower) Describe(change func(*dunlinv1.DeviceInfo)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	info := proto.CloneOf(f.info)
	change(info)
	f.info = info
}

// Retired takes in the figures of a version that is not loaded any more: it is
// an engine.Config.Retired.
func (f *Follower) Retired(id engine.VersionID, last engine.Figures) { f.figures.retire(id, last) }

// counts gives those of a loaded version.
func (f *Follower) counts(id engine.VersionID) (reconcile.Counts, bool) {
	for _, v := range f.cfg.Versions() {
		if n := &v.Figures; v.ID == id {
			return reconcile.Counts{Succeeded: n.Success.Count, Failed: n.Failure.Count, Stalled: n.Stalled}, true
		}
	}
	return reconcile.Counts{}, false
}

// Append keeps an event for the controller.
func (f *Follower) Append(e *dunlinv1.Event) error {
	if _, err := f.store.Append(context.Background(), e); err != nil {
		return err
	}
	signal(f.outbox)
	return nil
}

// Event is Append for those who can do nothing about an error: it is logged.
func (f *Follower) Event(e *dunlinv1.Event) {
	if err := f.Append(e); err != nil {
		f.cfg.Log.Error("event lost", "kind", e.Kind, "model", e.Model, "version", e.Version, "error", err)
	}
}
