package follow

import (
	"context"
	"fmt"

	"github.com/dunlin/dunlin/agent/identity"
	"github.com/dunlin/dunlin/models/signing"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// TakeTrust goes on from the trust document that the device has to the newest
// of a chain, and has what was refused looked at again.
func (f *Follower) TakeTrust(ctx context.Context, chain []*dunlinv1.SignedTrust) error {
	f.trusting.Lock() // the controller's and an import's come one after the other
	defer f.trusting.Unlock()
	have := f.trust.Load()
	if !f.Identity.Joined() { // it is of a join that was cut short
		have = nil
	}
	next, err := signing.Advance(have, chain)
	if err != nil {
		f.Event(&dunlinv1.Event{Kind: "trust.refused", Severity: dunlinv1.Severity_SEVERITY_ERROR, Message: err.Error()})
		return fmt.Errorf("take trust documents: %w", err)
	}
	if next == have {
		return nil
	}
	if err := f.store.SetTrust(ctx, next); err != nil {
		return err
	}
	f.trust.Store(next)
	f.cfg.Log.Info("trust document taken", "document", next.Version(), "expires", next.ExpiresAt())
	f.Reconcile.TrustChanged()
	if f.cfg.Program != nil {
		f.cfg.Program.TrustChanged()
	}
	return nil
}

// Trust gives the trust document in force; nil: none yet.
func (f *Follower) Trust() *signing.Trust { return f.trust.Load() }

// identityConfig is that of the device, whose trust documents come with its
// certificates.
func (f *Follower) identityConfig() identity.Config {
	c := f.cfg.Identity
	c.State, c.TakeTrust, c.Dial = f.store, f.TakeTrust, f.cfg.Dial
	c.TrustVersion = func() uint64 {
		if t := f.trust.Load(); t != nil {
			return t.Version()
		}
		return 0
	}
	return c
}
