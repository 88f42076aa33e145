package identity

import (
	"context"
	"testing"
	"time"
)

// kept is an AuthorityStore in memory.
type kept struct{ all []AuthorityRecord }

func (k *kept) Authorities(context.Context) ([]AuthorityRecord, error) { return k.all, nil }

func (k *kept) AddAuthority(_ context.Context, _ string, r AuthorityRecord) error {
	k.all = append(k.all, r)
	return nil
}

func (k *kept) RemoveAuthority(context.Context, string, string, bool) error { return nil }

// A clock that is set, either way, has certificates made anew that do not count
// by it.
func TestClockIsSet(t *testing.T) {
	now := time.Now()
	a, err := OpenAuthorities(t.Context(), new(kept), t.TempDir(), []string{"localhost"}, func() time.Time { return now })
	if err != nil {
		t.Fatal(err)
	}
	for _, by := range []time.Duration{0, 365 * 24 * time.Hour, -300 * 24 * time.Hour} {
		now = now.Add(by)
		c, err := a.ServerCertificate()
		if err != nil {
			t.Fatal(err)
		}
		if now.Before(c.Leaf.NotBefore) || now.After(c.Leaf.NotAfter) {
			t.Errorf("by %s: from %s until %s", now, c.Leaf.NotBefore, c.Leaf.NotAfter)
		}
	}
	// A clock that is set moves on as before by its monotonic reading, which
	// must not say when the next one is due.
	if due := a.server.renew; due != due.Round(0) {
		t.Errorf("%v is due by the time since the start", due)
	}
}
