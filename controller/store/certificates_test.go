package store

import (
	"crypto"
	"crypto/x509"
	"testing"
	"time"

	"github.com/dunlin/dunlin/controller/identity"
	"github.com/dunlin/dunlin/internal/pki"
	"github.com/dunlin/dunlin/internal/pki/pkitest"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// joins is a device with a new key that wants to join, for a year.
func joins(t *testing.T, token [32]byte, device string, labels map[string]string) Join {
	t.Helper()
	key := pkitest.Key(t)
	id, err := pki.ID(key.Public())
	must(t, err)
	a := pkitest.Authority(t)
	return Join{Token: token, Device: device, Key: id, Labels: labels, Issue: func() (*x509.Certificate, error) {
		return a.IssueDevice(device, key.Public(), time.Now(), 365*24*time.Hour)
	}}
}

// vouched is a store with a device d, and what makes certificates for it.
type vouched struct {
	*Store
	t     *testing.T
	clock *clock
	ca    *pki.Authority
	first *x509.Certificate
}

func newVouched(t *testing.T) *vouched {
	s, c := fresh(t)
	v := &vouched{Store: s, t: t, clock: c, ca: pkitest.Authority(t)}
	must(t, s.AddAuthority(t.Context(), "controller", identity.AuthorityRecord{Certificate: v.ca.Certificate}))
	cert, err := v.rejoin("")
	must(t, err)
	v.first = cert
	return v
}

// rejoin has d join with a new key and a token for a device.
func (v *vouched) rejoin(device string) (*x509.Certificate, error) {
	v.t.Helper()
	_, hash := identity.NewToken("")
	_, err := v.CreateJoinToken(v.t.Context(), "user:a", hash, JoinToken{UsesLeft: 1, ExpiresAt: v.clock.now.Add(time.Hour), Device: device})
	must(v.t, err)
	key := pkitest.Key(v.t)
	id, err := pki.ID(key.Public())
	must(v.t, err)
	return v.Join(v.t.Context(), Join{Token: hash, Device: "d", Key: id, Issue: v.issue(key)})
}

func (v *vouched) issue(key crypto.Signer) func() (*x509.Certificate, error) {
	return func() (*x509.Certificate, error) {
		return v.ca.IssueDevice("d", key.Public(), v.clock.now, 365*24*time.Hour)
	}
}

func (v *vouched) renew(old *x509.Certificate, key crypto.Signer) (*x509.Certificate, error) {
	v.t.Helper()
	id, err := pki.ID(key.Public())
	must(v.t, err)
	return v.Renew(v.t.Context(), Renewal{Device: "d", Old: old, Key: id, Issue: v.issue(key)})
}

func TestRenew(t *testing.T) {
	v := newVouched(t)
	ctx := t.Context()
	if superseded, err := v.Used(ctx, "d", v.first.SerialNumber); superseded || err != nil {
		t.Errorf("the first use: %t, %v", superseded, err)
	}
	key := pkitest.Key(t)
	second, err := v.renew(v.first, key)
	must(t, err)
	if again, err := v.renew(v.first, key); err != nil || !again.Equal(second) {
		t.Errorf("the same renewal again gives %v, %v", again, err)
	}
	// Both count until the new one is used, then only that.
	must(t, v.CheckDevice(ctx, "d", v.first))
	must(t, v.CheckDevice(ctx, "d", second))
	if superseded, err := v.Used(ctx, "d", second.SerialNumber); !superseded || err != nil {
		t.Errorf("the first use of the second: %t, %v", superseded, err)
	}
	is(t, v.CheckDevice(ctx, "d", v.first), identity.ErrRevoked)
	must(t, v.CheckDevice(ctx, "d", second))
	if _, err := v.renew(v.first, pkitest.Key(t)); err == nil {
		t.Error("a stolen old certificate is renewed")
	}
	is(t, v.CheckDevice(ctx, "e", second), identity.ErrUnknown)
	if got, err := v.Revoked(ctx); err != nil || len(got) != 1 || got[0].SerialNumber.Cmp(v.first.SerialNumber) != 0 {
		t.Errorf("revoked are %v, %v", got, err)
	}
	if got, err := v.RevokedDevices(ctx); err != nil || len(got) != 0 {
		t.Errorf("revoked devices are %v, %v", got, err)
	}
}

func TestRevoke(t *testing.T) {
	v := newVouched(t)
	ctx := t.Context()
	must(t, v.RevokeDevice(ctx, "user:a", "d", "stolen"))
	must(t, v.RevokeDevice(ctx, "user:a", "d", "again"))
	is(t, v.RevokeDevice(ctx, "user:a", "x", ""), ErrNotFound)
	is(t, v.CheckDevice(ctx, "d", v.first), identity.ErrRevoked)
	if got, err := v.RevokedDevices(ctx); err != nil || len(got) != 1 || got[0] != "d" {
		t.Errorf("revoked devices are %v, %v", got, err)
	}
	known, err := v.Identities(ctx, "d")
	must(t, err)
	if i := known["d"]; i.GetRevokedAt() == nil || i.GetRevokedReason() != "stolen" {
		t.Errorf("known by %v", i)
	}
	// A token for any device does not bring it back, one for it does, with its
	// history.
	if _, err := v.rejoin(""); err == nil {
		t.Error("it joins again with any token")
	}
	_, err = v.rejoin("other")
	is(t, err, ErrRefused)
	before, err := v.Device(ctx, "d")
	must(t, err)
	second, err := v.rejoin("d")
	must(t, err)
	must(t, v.CheckDevice(ctx, "d", second))
	is(t, v.CheckDevice(ctx, "d", v.first), identity.ErrRevoked)
	after, err := v.Device(ctx, "d")
	must(t, err)
	if !after.JoinedAt.Equal(before.JoinedAt) {
		t.Errorf("joined at %v, before at %v", after.JoinedAt, before.JoinedAt)
	}
	// A removed device's certificate does not count for one that takes its name.
	must(t, v.RemoveDevice(ctx, "user:a", "d"))
	is(t, v.CheckDevice(ctx, "d", second), identity.ErrUnknown)
	_, err = v.rejoin("")
	must(t, err)
	is(t, v.CheckDevice(ctx, "d", second), identity.ErrRevoked)
}

func TestAuthorities(t *testing.T) {
	v := newVouched(t)
	ctx := t.Context()
	next := pkitest.Authority(t)
	cross, err := v.ca.Vouch(next.Certificate, time.Now())
	must(t, err)
	must(t, v.AddAuthority(ctx, "user:a", identity.AuthorityRecord{Certificate: next.Certificate, Cross: []*x509.Certificate{cross}}))
	all, err := v.Authorities(ctx)
	must(t, err)
	for _, r := range all {
		if isNext := r.Certificate.Equal(next.Certificate); isNext != r.Active || isNext != (len(r.Cross) == 1) {
			t.Errorf("%s is active: %t, with %d that vouch for it", r.Certificate.Subject, r.Active, len(r.Cross))
		}
	}
	is(t, v.RemoveAuthority(ctx, "user:a", next.ID(), true), ErrRefused)
	is(t, v.RemoveAuthority(ctx, "user:a", v.ca.ID(), false), ErrRefused) // d has a certificate of it
	is(t, v.RemoveAuthority(ctx, "user:a", "x", true), ErrNotFound)
	first := v.ca.ID()
	v.ca = next
	second, err := v.rejoin("d")
	must(t, err)
	is(t, v.RemoveAuthority(ctx, "user:a", first, false), ErrRefused) // d does not know the next one
	pin := pki.PinOf(next.Certificate)
	_, _, err = v.Hello(ctx, "d", &dunlinv1.Hello{Session: "s", RootIds: [][]byte{pin[:]}, CertificateSerial: second.SerialNumber.Bytes()})
	must(t, err)
	must(t, v.RemoveAuthority(ctx, "user:a", first, false))
	if left, err := v.Authorities(ctx); err != nil || len(left) != 1 {
		t.Errorf("left are %v, %v", left, err)
	}
}
