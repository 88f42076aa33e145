package agent

import (
	"context"
	"fmt"

	"github.com/dunlin/dunlin/agent/identity"
	"github.com/dunlin/dunlin/models/signing"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// takeTrust goes on from the trust document that the device has to the newest
// of a chain, and has what was refused looked at again.
func (a *agent) takeTrust(ctx context.Context, chain []*dunlinv1.SignedTrust) error {
	a.takingTrust.Lock() // the controller's and an import's come one after the other
	defer a.takingTrust.Unlock()
	have := a.trust.Load()
	if !a.identity.Joined() { // it is of a join that was cut short
		have = nil
	}
	next, err := signing.Advance(have, chain)
	if err != nil {
		a.event(&dunlinv1.Event{Kind: "trust.refused", Severity: dunlinv1.Severity_SEVERITY_ERROR, Message: err.Error()})
		return fmt.Errorf("take trust documents: %w", err)
	}
	if next == have {
		return nil
	}
	if err := a.store.SetTrust(ctx, next); err != nil {
		return err
	}
	a.trust.Store(next)
	a.cfg.Log.Info("trust document taken", "document", next.Version(), "expires", next.ExpiresAt())
	a.reconcile.TrustChanged()
	return nil
}

// identityConfig is that of the device, whose trust documents come with its
// certificates.
func (a *agent) identityConfig() identity.Config {
	c := a.cfg.identity(a.store)
	c.TakeTrust = a.takeTrust
	c.TrustVersion = func() uint64 {
		if t := a.trust.Load(); t != nil {
			return t.Version()
		}
		return 0
	}
	return c
}
