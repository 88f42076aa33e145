package store

import (
	"crypto"
	"crypto/x509"
	"database/sql"
	"fmt"
	"math/big"
	"path/filepath"
	"testing"
	"time"

	"github.com/dunlin/dunlin/controller/identity"
	"github.com/dunlin/dunlin/internal/pki"
	"github.com/dunlin/dunlin/internal/pki/pkitest"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// joinsBy issues what joins asks for.
var joinsBy *pki.Authority

// vouch makes joinsBy one of a store's authorities, and records nothing.
func vouch(t *testing.T, s *Store) {
	t.Helper()
	if joinsBy == nil {
		joinsBy = pkitest.Authority(t)
	}
	_, err := s.writer.ExecContext(t.Context(), "INSERT INTO authorities (id, certificate, cross_certs, active, created_at) VALUES (?, ?, x'', 1, 0)", joinsBy.ID(), joinsBy.Certificate.Raw)
	must(t, err)
}

// joins is a device with a new key that wants to join, for a year.
func joins(t *testing.T, token [32]byte, device string, labels map[string]string) Join {
	t.Helper()
	if joinsBy == nil {
		joinsBy = pkitest.Authority(t)
	}
	key := pkitest.Key(t)
	id, err := pki.ID(key.Public())
	must(t, err)
	return Join{Token: token, Device: device, Key: id, Labels: labels, Issue: func() (*x509.Certificate, error) {
		return joinsBy.IssueDevice(device, key.Public(), time.Now(), 365*24*time.Hour)
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
	if superseded, err := v.Used(ctx, Use{"d", v.first.SerialNumber}); superseded || err != nil {
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
	if superseded, err := v.Used(ctx, Use{"d", second.SerialNumber}); !superseded || err != nil {
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

// Of certificates that were never used, those from before one that is count no
// more: a thief who renewed once and waits has nothing.
func TestUnused(t *testing.T) {
	v := newVouched(t)
	ctx := t.Context()
	renewed := func() *x509.Certificate {
		t.Helper()
		v.clock.now = v.clock.now.Add(time.Hour)
		c, err := v.renew(v.first, pkitest.Key(t))
		must(t, err)
		return c
	}
	waiting, second, newest := renewed(), renewed(), renewed()
	if superseded, err := v.Used(ctx, Use{"d", second.SerialNumber}); !superseded || err != nil {
		t.Errorf("the first use of the second: %t, %v", superseded, err)
	}
	is(t, v.CheckDevice(ctx, "d", v.first), identity.ErrRevoked)
	is(t, v.CheckDevice(ctx, "d", waiting), identity.ErrRevoked)
	must(t, v.CheckDevice(ctx, "d", second))
	must(t, v.CheckDevice(ctx, "d", newest))
}

// A device that renews all the time fills neither the store nor the audit log.
func TestRenewalsAreBounded(t *testing.T) {
	v := newVouched(t)
	key := pkitest.Key(t)
	cert := v.first
	for range maxRenewals - 1 {
		var err error
		cert, err = v.renew(cert, key) // the same key, for which each renewal is another one
		must(t, err)
	}
	_, err := v.renew(cert, key)
	is(t, err, ErrLimit)
	_, err = v.renew(cert, pkitest.Key(t))
	is(t, err, ErrLimit)
	v.clock.now = v.clock.now.Add(time.Hour)
	_, err = v.renew(cert, key)
	must(t, err)
}

// Who takes a device's identity back takes back what lets it have another one.
func TestRevokeTakesJoinTokens(t *testing.T) {
	v := newVouched(t)
	ctx := t.Context()
	forDevice := func() Join {
		t.Helper()
		_, hash := identity.NewToken("")
		_, err := v.CreateJoinToken(ctx, "user:a", hash, JoinToken{UsesLeft: 1, ExpiresAt: v.clock.now.Add(time.Hour), Device: "d"})
		must(t, err)
		key := pkitest.Key(t)
		id, err := pki.ID(key.Public())
		must(t, err)
		return Join{Token: hash, Device: "d", Key: id, Issue: v.issue(key)}
	}
	for _, take := range []func() error{
		func() error { return v.RevokeDevice(ctx, "user:a", "d", "") },
		func() error { return v.RevokeDevice(ctx, "user:a", "d", "again") },
		func() error { return v.RemoveDevice(ctx, "user:a", "d") },
	} {
		j := forDevice()
		must(t, take())
		_, err := v.Join(ctx, j)
		is(t, err, ErrRefused)
	}
}

// The certificates of an authority that is retired count no more, whoever
// verified them before, and are not given out again.
func TestRetiredAuthority(t *testing.T) {
	v := newVouched(t)
	ctx := t.Context()
	key := pkitest.Key(t)
	waiting, err := v.renew(v.first, key)
	must(t, err)
	retired := v.ca
	v.ca = pkitest.Authority(t)
	must(t, v.AddAuthority(ctx, "user:a", identity.AuthorityRecord{Certificate: v.ca.Certificate}))
	must(t, v.CheckDevice(ctx, "d", v.first))
	must(t, v.RemoveAuthority(ctx, "user:a", retired.ID(), true))
	is(t, v.CheckDevice(ctx, "d", v.first), identity.ErrUnknown)
	forged, err := retired.IssueDevice("d", key.Public(), v.clock.now, time.Hour)
	must(t, err)
	is(t, v.CheckDevice(ctx, "d", forged), identity.ErrUnknown)
	// The device joins again with the key that it has.
	_, hash := identity.NewToken("")
	_, err = v.CreateJoinToken(ctx, "user:a", hash, JoinToken{UsesLeft: 1, ExpiresAt: v.clock.now.Add(time.Hour), Device: "d"})
	must(t, err)
	again, err := v.Join(ctx, Join{Token: hash, Device: "d", Key: pki.CertificateID(waiting), Issue: v.issue(key)})
	must(t, err)
	must(t, v.CheckDevice(ctx, "d", again))
}

// A broker that goes by names is told of a revoked device whose certificate is
// not known, as after a restore.
func TestRevokedWithoutCertificate(t *testing.T) {
	v := newVouched(t)
	ctx := t.Context()
	v.clock.now = v.first.NotAfter.Add(time.Hour) // the newer one was issued after the copy was made
	must(t, v.RevokeDevice(ctx, "user:a", "d", "stolen"))
	if got, err := v.RevokedDevices(ctx); err != nil || len(got) != 1 || got[0] != "d" {
		t.Errorf("revoked devices are %v, %v", got, err)
	}
}

// What has expired is forgotten once a while, not by each device that connects
// for the first time: that would be the square of the fleet.
func TestExpiredCertificatesAreForgottenByPrune(t *testing.T) {
	v := newVouched(t)
	count := func() (n int) {
		must(t, v.reader.QueryRowContext(t.Context(), "SELECT count(*) FROM certificates").Scan(&n))
		return n
	}
	v.clock.now = v.first.NotAfter.Add(identity.MaxGrace)
	second, err := v.rejoin("d")
	must(t, err)
	must(t, v.Prune(t.Context()))
	if n := count(); n != 2 {
		t.Errorf("%d certificates at the end of the grace period, want both", n)
	}
	v.clock.now = v.clock.now.Add(time.Second)
	if _, err := v.Used(t.Context(), Use{"d", second.SerialNumber}); err != nil {
		t.Fatal(err)
	}
	if n := count(); n != 2 {
		t.Errorf("%d certificates after one was used, want both still", n)
	}
	must(t, v.Prune(t.Context()))
	if n := count(); n != 1 {
		t.Errorf("%d certificates are kept, want the one that counts", n)
	}
	must(t, v.CheckDevice(t.Context(), "d", second))
}

// BenchmarkFirstUse is a device that connects for the first time, of 10,000.
func BenchmarkFirstUse(b *testing.B) {
	const devices = 10_000
	s, err := Open(b.Context(), filepath.Join(b.TempDir(), "store.db"), Options{})
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	fill := func() error {
		return s.write(b.Context(), "fill", func(tx *sql.Tx) error {
			_, err := tx.ExecContext(b.Context(), `WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?)
				INSERT INTO certificates (serial, device, authority, key, der, not_after, issued_at)
				SELECT unhex(printf('%040d', i)), 'device-' || i, 'a', 'k', zeroblob(700), ?, 1 FROM n`, devices, time.Now().Add(time.Hour).UnixNano())
			return err
		})
	}
	if err := fill(); err != nil {
		b.Fatal(err)
	}
	for i := 0; b.Loop(); i++ {
		n := i%devices + 1
		serial, _ := new(big.Int).SetString(fmt.Sprintf("%040d", n), 16)
		if _, err := s.Used(b.Context(), Use{fmt.Sprint("device-", n), serial}); err != nil {
			b.Fatal(err)
		}
	}
}
