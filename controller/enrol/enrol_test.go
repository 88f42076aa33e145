package enrol

import (
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"log/slog"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	"github.com/dunlin/dunlin/controller/identity"
	"github.com/dunlin/dunlin/controller/store"
	"github.com/dunlin/dunlin/internal/link"
	"github.com/dunlin/dunlin/internal/pki"
	"github.com/dunlin/dunlin/internal/pki/pkitest"
	"github.com/dunlin/dunlin/models/signing"
	v1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

const year = 365 * 24 * time.Hour

// world is a Service over a real store, with a clock of its own.
type world struct {
	*Service
	t       *testing.T
	now     time.Time
	token   string
	refused []string
}

func start(t *testing.T) *world {
	t.Helper()
	w := &world{t: t, now: time.Now()}
	clock := func() time.Time { return w.now }
	st, err := store.Open(t.Context(), filepath.Join(t.TempDir(), "store.db"), store.Options{Now: clock})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := st.Close(); err != nil {
			t.Error(err)
		}
	})
	authorities, err := identity.OpenAuthorities(t.Context(), st, t.TempDir(), []string{"localhost"}, clock)
	if err != nil {
		t.Fatal(err)
	}
	w.Service = New(Config{
		Store: st, Authorities: authorities, Lifetime: year, Grace: year / 2,
		BrokerURL: "mqtts://localhost:8883", RegistryURL: "https://localhost:8080", Roots: authorities.Roots,
		Trust:    func(context.Context, uint64) ([]*v1.SignedTrust, error) { return nil, nil },
		Joined:   func(string) {},
		Refusals: w,
		Now:      clock, Log: slog.New(slog.DiscardHandler),
	})
	w.token = w.joinToken(100)
	return w
}

// Refused implements identity.Refusals.
func (w *world) Refused(_ context.Context, r identity.Refusal) {
	w.refused = append(w.refused, r.Action+" "+r.Object+": "+r.Reason)
}

func (w *world) joinToken(uses uint32) string {
	w.t.Helper()
	secret, _ := identity.NewToken("dunlin_join_")
	token := pki.AppendPin(secret, w.Authorities.Pin())
	if _, err := w.Store.CreateJoinToken(w.t.Context(), "user:a", identity.Hash(token), store.JoinToken{UsesLeft: uses, ExpiresAt: w.now.Add(3 * year)}); err != nil {
		w.t.Fatal(err)
	}
	return token
}

// device is one that has joined.
type device struct {
	key      crypto.Signer
	identity *v1.Identity
}

func (d device) certificate(t *testing.T) *x509.Certificate {
	t.Helper()
	c, err := x509.ParseCertificate(d.identity.GetCertificates()[0])
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func (w *world) join(name string) device {
	w.t.Helper()
	key, csr := pkitest.Request(w.t, name)
	answer, err := w.Join(w.t.Context(), &v1.JoinRequest{JoinToken: w.token, Name: name, Csr: csr}, w.RegistryURL)
	if err != nil {
		w.t.Fatal(err)
	}
	return device{key, answer.Identity}
}

// renewal is a request by which d gets a certificate for a new key.
func (w *world) renewal(d device) (crypto.Signer, *v1.RenewRequest) {
	w.t.Helper()
	key, csr := pkitest.Request(w.t, "")
	old := d.identity.GetCertificates()[0]
	signature, err := pki.Sign(d.key, pki.RenewalMessage(old, csr))
	if err != nil {
		w.t.Fatal(err)
	}
	return key, &v1.RenewRequest{Certificate: old, Csr: csr, Signature: signature}
}

func (w *world) renew(d device) (device, error) {
	w.t.Helper()
	key, m := w.renewal(d)
	answer, err := w.Renew(w.t.Context(), m, w.RegistryURL)
	return device{key, answer.GetIdentity()}, err
}

func TestJoinAndRenew(t *testing.T) {
	w := start(t)
	d := w.join("d")
	certs, err := pki.ParseCertificates(d.identity.GetCertificates())
	if err != nil {
		t.Fatal(err)
	}
	roots, err := pki.ParseCertificates(d.identity.GetRoots())
	if err != nil {
		t.Fatal(err)
	}
	if err := pki.VerifyChain(certs, roots, w.now, x509.ExtKeyUsageClientAuth); err != nil {
		t.Error(err)
	}
	if name, ok := pki.DeviceOf(certs[0]); name != "d" || !ok || !certs[0].NotAfter.Equal(w.now.Add(year).UTC().Truncate(time.Second)) {
		t.Errorf("a certificate for %q until %v", name, certs[0].NotAfter)
	}
	// Over years, also late, but not later than the grace allows.
	for range 5 {
		w.now = w.now.Add(year + year/4)
		next, err := w.renew(d)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.Store.Used(t.Context(), store.Use{Device: "d", Serial: next.certificate(t).SerialNumber}); err != nil {
			t.Fatal(err)
		}
		d = next
	}
	w.now = w.now.Add(2 * year)
	if _, err := w.renew(d); !errors.Is(err, identity.ErrUnauthenticated) || !strings.Contains(err.Error(), "join again") {
		t.Errorf("after the grace: %v", err)
	}
}

// However many trust documents there have been, an answer fits into a message
// over MQTT: who has none gets the newest, others the next ones.
func TestManyTrustDocuments(t *testing.T) {
	w := start(t)
	var all []*v1.SignedTrust
	for i := range 100 {
		all = append(all, &v1.SignedTrust{Document: append(make([]byte, signing.MaxTrustBytes-1), byte(i))})
	}
	w.Trust = func(_ context.Context, after uint64) ([]*v1.SignedTrust, error) { return all[after:], nil }
	d := w.join("d")
	if got := d.identity.GetTrust(); len(got) != 1 || got[0] != all[99] {
		t.Errorf("a join gives %d documents", len(got))
	}
	_, m := w.renewal(d)
	renewals := 0
	for m.TrustVersion = 1; m.TrustVersion < 100; renewals++ {
		answer, err := w.Renew(t.Context(), m, w.RegistryURL)
		if err != nil {
			t.Fatal(err)
		}
		if n := proto.Size(&v1.EnrolResponse{Response: &v1.EnrolResponse_Renew{Renew: answer}}); n > link.MaxPayload {
			t.Fatalf("an answer has %d bytes, the limit is %d", n, link.MaxPayload)
		}
		got := answer.GetIdentity().GetTrust()
		if len(got) == 0 || got[0] != all[m.TrustVersion] {
			t.Fatalf("after document %d came %d others", m.TrustVersion, len(got))
		}
		m.TrustVersion += uint64(len(got))
	}
	if renewals > 60 {
		t.Errorf("%d renewals for 99 documents", renewals)
	}
}

func TestRenewalProves(t *testing.T) {
	w := start(t)
	d, thief := w.join("d"), w.join("thief")
	foreign := pkitest.Device(t, pkitest.Authority(t), "d")
	for name, test := range map[string]struct {
		edit func(m *v1.RenewRequest)
		code connect.Code
	}{
		"no signature": {func(m *v1.RenewRequest) { m.Signature = nil }, connect.CodeInvalidArgument},
		"another's signature": {func(m *v1.RenewRequest) {
			m.Signature, _ = pki.Sign(thief.key, pki.RenewalMessage(m.Certificate, m.Csr))
		}, connect.CodeUnauthenticated},
		"another request":       {func(m *v1.RenewRequest) { _, m.Csr = pkitest.Request(t, "d") }, connect.CodeUnauthenticated},
		"another's certificate": {func(m *v1.RenewRequest) { m.Certificate = thief.identity.Certificates[0] }, connect.CodeUnauthenticated},
		"no request":            {func(m *v1.RenewRequest) { m.Csr = nil }, connect.CodeInvalidArgument},
		"large":                 {func(m *v1.RenewRequest) { m.Certificate = make([]byte, maxDER+1) }, connect.CodeInvalidArgument},
		"garbage":               {func(m *v1.RenewRequest) { m.Certificate = []byte("x") }, connect.CodeInvalidArgument},
		"the controller's":      {func(m *v1.RenewRequest) { m.Certificate = pkitest.Server(t, pkitest.Authority(t)).Leaf.Raw }, connect.CodeInvalidArgument},
		"of another's authority": {func(m *v1.RenewRequest) {
			m.Certificate = foreign.Leaf.Raw
			m.Signature, _ = pki.Sign(foreign.PrivateKey.(crypto.Signer), pki.RenewalMessage(m.Certificate, m.Csr))
		}, connect.CodeUnauthenticated},
	} {
		_, m := w.renewal(d)
		test.edit(m)
		if _, err := w.Renew(t.Context(), m, ""); Code(err) != test.code {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := w.Store.RevokeDevice(t.Context(), "user:a", "d", "stolen"); err != nil {
		t.Fatal(err)
	}
	if _, err := w.renew(d); Code(err) != connect.CodeUnauthenticated || !strings.Contains(err.Error(), "stolen") {
		t.Errorf("a revoked device: %v", err)
	}
}

func TestJoinRefuses(t *testing.T) {
	w := start(t)
	w.join("taken")
	for want, edit := range map[string]func(m *v1.JoinRequest){
		"name":                      func(m *v1.JoinRequest) { m.Name = "a/b" },
		"csr":                       func(m *v1.JoinRequest) { m.Csr = []byte("x") },
		"labels":                    func(m *v1.JoinRequest) { m.Labels = map[string]string{"": "x"} },
		"info has":                  func(m *v1.JoinRequest) { m.Info = &v1.DeviceInfo{Hostname: strings.Repeat("h", maxInfoBytes)} },
		"unknown, used up":          func(m *v1.JoinRequest) { m.JoinToken = "dunlin_join_x" },
		"a join token for it lets":  func(m *v1.JoinRequest) { m.Name = "taken" },
		"is not signed by its key":  func(m *v1.JoinRequest) { m.Csr[len(m.Csr)-1] ^= 1 },
		"csr has 9000 bytes, the l": func(m *v1.JoinRequest) { m.Csr = make([]byte, 9000) },
	} {
		_, csr := pkitest.Request(t, "d")
		m := &v1.JoinRequest{JoinToken: w.token, Name: "d", Csr: csr}
		edit(m)
		if _, err := w.Join(t.Context(), m, ""); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		} else if strings.Contains(err.Error(), w.token) {
			t.Errorf("the error tells the token: %v", err)
		}
	}
}

// The authority changes while devices have certificates of the old one.
func TestRotation(t *testing.T) {
	w := start(t)
	d := w.join("d")
	old := w.Authorities.Roots()
	if _, err := w.Authorities.Rotate(t.Context(), "user:a"); err != nil {
		t.Fatal(err)
	}
	// One that was away knows the controller still.
	server, err := w.Authorities.ServerCertificate()
	if err != nil {
		t.Fatal(err)
	}
	chain, err := pki.ParseCertificates(server.Certificate)
	if err != nil {
		t.Fatal(err)
	}
	if err := pki.VerifyChain(chain, old, w.now, x509.ExtKeyUsageServerAuth); err != nil {
		t.Error(err)
	}
	// Its certificate counts, and it renews into the new one.
	if err := pki.VerifyChain([]*x509.Certificate{d.certificate(t)}, w.Authorities.Roots(), w.now, x509.ExtKeyUsageClientAuth); err != nil {
		t.Error(err)
	}
	next, err := w.renew(d)
	if err != nil {
		t.Fatal(err)
	}
	if n := len(next.identity.GetRoots()); n != 2 {
		t.Errorf("it is told of %d authorities", n)
	}
	certs, err := pki.ParseCertificates(next.identity.GetCertificates())
	if err != nil {
		t.Fatal(err)
	}
	if err := pki.VerifyChain(certs, w.Authorities.Roots()[1:], w.now, x509.ExtKeyUsageClientAuth); err != nil {
		t.Errorf("its new certificate is not of the new authority: %v", err)
	}
	// After a restart all is as before.
	again, err := identity.OpenAuthorities(t.Context(), w.Store, t.TempDir(), nil, func() time.Time { return w.now })
	if err == nil {
		t.Errorf("authorities without keys: %v", again)
	}
}

func TestTime(t *testing.T) {
	w := start(t)
	nonce := []byte("0123456789abcdef")
	answer, err := w.Time(t.Context(), &v1.GetTimeRequest{Nonce: nonce})
	if err != nil {
		t.Fatal(err)
	}
	chain, err := pki.ParseCertificates(answer.GetCertificates())
	if err != nil {
		t.Fatal(err)
	}
	if err := pki.VerifyChain(chain, w.Authorities.Roots(), w.now, x509.ExtKeyUsageServerAuth); err != nil {
		t.Error(err)
	}
	if err := pki.Verify(chain[0].PublicKey, pki.TimeMessage(nonce, answer.GetNow().AsTime()), answer.GetSignature()); err != nil {
		t.Error(err)
	}
	if _, err := w.Time(t.Context(), &v1.GetTimeRequest{Nonce: nonce[:15]}); Code(err) != connect.CodeInvalidArgument {
		t.Errorf("a short nonce: %v", err)
	}
}

// Over MQTT the same is answered, to the user that may ask.
func TestHandle(t *testing.T) {
	w := start(t)
	user := link.TokenUser(w.token)
	ask := func(user string, m *v1.EnrolRequest) *v1.EnrolResponse {
		b, err := proto.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		answer := &v1.EnrolResponse{}
		if err := proto.Unmarshal(w.Handle(t.Context(), user, b), answer); err != nil {
			t.Fatal(err)
		}
		return answer
	}
	key, csr := pkitest.Request(t, "d")
	join := &v1.EnrolRequest{Request: &v1.EnrolRequest_Join{Join: &v1.JoinRequest{JoinToken: w.token, Name: "d", Csr: csr}}}
	if e := ask("join.000000000000", join).GetError(); connect.Code(e.GetCode()) != connect.CodeInvalidArgument {
		t.Errorf("a join of another user: %v", e)
	}
	joined := ask(user, join).GetJoin()
	if joined.GetRegistryUrl() != w.RegistryURL || len(joined.GetIdentity().GetCertificates()) == 0 {
		t.Fatalf("joined: %v", joined)
	}
	_, renew := w.renewal(device{key, joined.Identity})
	if a := ask(link.RenewUser, &v1.EnrolRequest{Request: &v1.EnrolRequest_Renew{Renew: renew}}); len(a.GetRenew().GetIdentity().GetCertificates()) == 0 {
		t.Errorf("renewed: %v", a)
	}
	if a := ask(link.RenewUser, &v1.EnrolRequest{Request: &v1.EnrolRequest_Time{Time: &v1.GetTimeRequest{Nonce: make([]byte, 16)}}}); a.GetTime() == nil {
		t.Errorf("time: %v", a)
	}
	renew.Signature[9] ^= 1
	if e := ask(link.RenewUser, &v1.EnrolRequest{Request: &v1.EnrolRequest_Renew{Renew: renew}}).GetError(); connect.Code(e.GetCode()) != connect.CodeUnauthenticated || len(w.refused) != 1 {
		t.Errorf("a wrong signature: %v, %q is recorded", e, w.refused)
	}
	if e := ask(link.RenewUser, &v1.EnrolRequest{}).GetError(); connect.Code(e.GetCode()) != connect.CodeInvalidArgument {
		t.Errorf("nothing: %v", e)
	}
}

func FuzzHandle(f *testing.F) {
	for _, m := range []*v1.EnrolRequest{
		{}, {Request: &v1.EnrolRequest_Join{Join: &v1.JoinRequest{Name: "d", Csr: []byte("x")}}},
		{Request: &v1.EnrolRequest_Renew{Renew: &v1.RenewRequest{Certificate: []byte("x"), Signature: []byte("y")}}},
		{Request: &v1.EnrolRequest_Time{Time: &v1.GetTimeRequest{Nonce: make([]byte, 20)}}},
	} {
		b, _ := proto.Marshal(m)
		f.Add(b)
	}
	dir := f.TempDir()
	st, err := store.Open(f.Context(), filepath.Join(dir, "store.db"), store.Options{})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { _ = st.Close() })
	authorities, err := identity.OpenAuthorities(f.Context(), st, dir, []string{"localhost"}, time.Now)
	if err != nil {
		f.Fatal(err)
	}
	s := New(Config{
		Store: st, Authorities: authorities, Lifetime: year, Roots: authorities.Roots, Joined: func(string) {},
		Trust:    func(context.Context, uint64) ([]*v1.SignedTrust, error) { return nil, nil },
		Refusals: st, Now: time.Now, Log: slog.New(slog.DiscardHandler),
	})
	f.Fuzz(func(t *testing.T, b []byte) {
		answer := &v1.EnrolResponse{}
		if err := proto.Unmarshal(s.Handle(t.Context(), link.RenewUser, b), answer); err != nil || answer.GetJoin() != nil || answer.GetRenew() != nil {
			t.Errorf("%v, %v", answer, err)
		}
		if answer.GetError().GetCode() == uint32(connect.CodeInternal) {
			t.Errorf("%x: internal error", b)
		}
	})
}

// Who takes a device's place ends the session of the one before; asking for the
// same answer again ends nothing.
func TestReplacedIsCutOff(t *testing.T) {
	w := start(t)
	var cut []string
	w.CutOff = func(device string) { cut = append(cut, device) }
	w.join("d")
	if cut != nil {
		t.Errorf("a new device ends the sessions of %v", cut)
	}
	secret, _ := identity.NewToken("dunlin_join_")
	if _, err := w.Store.CreateJoinToken(t.Context(), "user:a", identity.Hash(secret), store.JoinToken{UsesLeft: 1, ExpiresAt: w.now.Add(time.Hour), Device: "d"}); err != nil {
		t.Fatal(err)
	}
	_, csr := pkitest.Request(t, "d")
	for range 2 {
		if _, err := w.Join(t.Context(), &v1.JoinRequest{JoinToken: secret, Name: "d", Csr: csr}, w.RegistryURL); err != nil {
			t.Fatal(err)
		}
		if len(cut) != 1 || cut[0] != "d" {
			t.Errorf("the sessions of %v were ended", cut)
		}
	}
}
