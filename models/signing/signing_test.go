package signing

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"errors"
	"math/big"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/dunlin/dunlin/models"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

var now = time.Date(2030, 1, 2, 3, 4, 5, 0, time.UTC)

const year = 365 * 24 * time.Hour

func newKey(t testing.TB) crypto.Signer {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func idFor(t testing.TB, k crypto.Signer) string {
	t.Helper()
	id, err := KeyID(k.Public())
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func trustKey(t testing.TB, k crypto.Signer) *dunlinv1.TrustKey {
	t.Helper()
	tk, err := NewTrustKey(k.Public(), nil, "test")
	if err != nil {
		t.Fatal(err)
	}
	return tk
}

// issue makes a certificate; by itself where parent is nil.
func issue(t testing.TB, template *x509.Certificate, public crypto.PublicKey, parent *x509.Certificate, by crypto.Signer) *x509.Certificate {
	t.Helper()
	template.SerialNumber = big.NewInt(time.Now().UnixNano())
	if parent == nil {
		parent = template
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, public, by)
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func authority(t testing.TB, key crypto.Signer, from, to time.Time) *x509.Certificate {
	return issue(t, &x509.Certificate{
		Subject: pkix.Name{CommonName: "test authority"}, NotBefore: from, NotAfter: to,
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}, key.Public(), nil, key)
}

func leaf(t testing.TB, public crypto.PublicKey, ca *x509.Certificate, by crypto.Signer, from, to time.Time, usage ...x509.ExtKeyUsage) *x509.Certificate {
	return issue(t, &x509.Certificate{
		Subject: pkix.Name{CommonName: "test publisher"}, NotBefore: from, NotAfter: to,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: usage,
	}, public, ca, by)
}

func manifestOf(files map[string]string) *models.Manifest {
	m := &models.Manifest{Digest: digest.FromString("manifest")}
	for p, text := range files {
		m.Files = append(m.Files, models.File{Path: p, Size: int64(len(text)), Digest: digest.FromString(text)})
	}
	return m
}

// site is whose signatures count in a test.
type site struct {
	root, publisher, controller, agent crypto.Signer
	document                           *dunlinv1.TrustDocument
}

func newSite(t testing.TB) *site {
	s := &site{newKey(t), newKey(t), newKey(t), newKey(t), nil}
	s.document = &dunlinv1.TrustDocument{
		Version: 1, IssuedAt: timestamppb.New(now), ExpiresAt: timestamppb.New(now.Add(year)),
		RootKeys: []*dunlinv1.TrustKey{trustKey(t, s.root)}, PublisherKeys: []*dunlinv1.TrustKey{trustKey(t, s.publisher)},
		ControllerKeys: []*dunlinv1.TrustKey{trustKey(t, s.controller)}, AgentKeys: []*dunlinv1.TrustKey{trustKey(t, s.agent)},
	}
	return s
}

func signedBy(t testing.TB, d *dunlinv1.TrustDocument, keys ...crypto.Signer) *dunlinv1.SignedTrust {
	t.Helper()
	signed, err := NewTrust(d)
	for _, k := range keys {
		err = errors.Join(err, SignTrust(signed, k))
	}
	if err != nil {
		t.Fatal(err)
	}
	return signed
}

func (s *site) trust(t testing.TB) *Trust {
	t.Helper()
	tr, err := Advance(nil, []*dunlinv1.SignedTrust{signedBy(t, s.document, s.root)})
	if err != nil {
		t.Fatal(err)
	}
	return tr
}

func signBundle(t testing.TB, by Signer, version int64, m *models.Manifest) []byte {
	t.Helper()
	raw, err := SignBundle(by, "digits", version, m)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

// wantRefused checks that err is a refusal that says each of parts.
func wantRefused(t *testing.T, err error, parts ...string) {
	t.Helper()
	r, ok := errors.AsType[*RefusedError](err)
	if !ok {
		t.Fatalf("error %v, want a refusal with %q", err, parts)
	}
	for _, p := range parts {
		if !strings.Contains(r.Reason, p) {
			t.Errorf("refused because %q, want %q in it", r.Reason, p)
		}
	}
}

func TestAdmit(t *testing.T) {
	m := manifestOf(map[string]string{"model.onnx": "weights", "w/data.bin": "more"})
	ca := newKey(t)
	caCert := authority(t, ca, now.Add(-year), now.Add(10*year))
	certified := newKey(t)
	code := []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning}
	withCert := func(from, to time.Time, usage ...x509.ExtKeyUsage) Signer {
		return Signer{certified, []*x509.Certificate{leaf(t, certified.Public(), caCert, ca, from, to, usage...)}}
	}
	trustCA := func(s *site) {
		k, err := NewTrustKey(nil, caCert, "")
		if err != nil {
			t.Fatal(err)
		}
		s.document.PublisherKeys, s.document.RequirePublisher = []*dunlinv1.TrustKey{k}, true
	}
	later := now.Add(time.Hour)
	tests := map[string]struct {
		prepare func(s *site)
		signers func(s *site) []Signer
		version int64
		at      time.Time
		reasons []string // none: taken
	}{
		"controller's":                     {},
		"controller's and publisher's":     {prepare: func(s *site) { s.document.RequirePublisher = true }, signers: func(s *site) []Signer { return []Signer{{Key: s.publisher}, {Key: s.controller}} }},
		"publisher's only":                 {signers: func(s *site) []Signer { return []Signer{{Key: s.publisher}} }, reasons: []string{"no controller's key"}},
		"no publisher's where required":    {prepare: func(s *site) { s.document.RequirePublisher = true }, reasons: []string{"no publisher's key", "requires one"}},
		"none":                             {signers: func(*site) []Signer { return nil }, reasons: []string{"no controller's key"}},
		"by a stranger":                    {signers: func(*site) []Signer { return []Signer{{Key: newKey(t)}} }, reasons: []string{"a key that does not count"}},
		"by an agent key":                  {signers: func(s *site) []Signer { return []Signer{{Key: s.agent}} }, reasons: []string{"a key that does not count"}},
		"for another version":              {version: 4, reasons: []string{"it is of \"digits:3\""}},
		"below the floor":                  {prepare: func(s *site) { s.document.ModelFloors = []*dunlinv1.ModelFloor{{Model: "digits", Version: 4}} }, reasons: []string{"version 3 of model digits is below the floor 4"}},
		"at the floor":                     {prepare: func(s *site) { s.document.ModelFloors = []*dunlinv1.ModelFloor{{Model: "digits", Version: 3}} }},
		"another model's floor":            {prepare: func(s *site) { s.document.ModelFloors = []*dunlinv1.ModelFloor{{Model: "other", Version: 9}} }},
		"expired document":                 {at: now.Add(year + time.Second), reasons: []string{"trust document 1 has expired"}},
		"key that counts later":            {prepare: func(s *site) { s.document.ControllerKeys[0].NotBefore = timestamppb.New(later.Add(time.Second)) }, reasons: []string{"counts from"}},
		"key that does not count any more": {prepare: func(s *site) { s.document.ControllerKeys[0].NotAfter = timestamppb.New(later.Add(-time.Second)) }, reasons: []string{"has not counted since"}},
		"certificate":                      {prepare: trustCA, signers: func(s *site) []Signer { return []Signer{{Key: s.controller}, withCert(now, now.Add(year), code...)} }},
		"expired certificate":              {prepare: trustCA, signers: func(s *site) []Signer { return []Signer{{Key: s.controller}, withCert(now.Add(-year), now, code...)} }, reasons: []string{"no publisher's key", "expired"}},
		"certificate for something else": {prepare: trustCA, signers: func(s *site) []Signer {
			return []Signer{{Key: s.controller}, withCert(now, now.Add(year), x509.ExtKeyUsageClientAuth)}
		}, reasons: []string{"not one for code signing"}},
		"certificate of no purpose": {prepare: trustCA, signers: func(s *site) []Signer { return []Signer{{Key: s.controller}, withCert(now, now.Add(year))} }, reasons: []string{"not one for code signing"}},
		"certificate of another authority": {prepare: trustCA, signers: func(s *site) []Signer {
			k := newKey(t)
			c := authority(t, k, now, now.Add(year))
			return []Signer{{Key: s.controller}, {certified, []*x509.Certificate{leaf(t, certified.Public(), c, k, now, now.Add(year), code...)}}}
		}, reasons: []string{"no publisher's key"}},
		"the authority's key by itself":  {prepare: trustCA, signers: func(s *site) []Signer { return []Signer{{Key: s.controller}, {Key: ca}} }, reasons: []string{"no publisher's key"}},
		"the certificate's key as a key": {prepare: trustCA, signers: func(s *site) []Signer { return []Signer{{Key: s.controller}, {Key: certified}} }, reasons: []string{"no publisher's key"}},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			s := newSite(t)
			if test.prepare != nil {
				test.prepare(s)
			}
			signers := []Signer{{Key: s.controller}}
			if test.signers != nil {
				signers = test.signers(s)
			}
			var signatures [][]byte
			for _, by := range signers {
				signatures = append(signatures, signBundle(t, by, 3, m))
			}
			at := test.at
			if at.IsZero() {
				at = later
			}
			version := test.version
			if version == 0 {
				version = 3
			}
			err := s.trust(t).Admit("digits", version, m, signatures, at)
			if test.reasons == nil && err != nil {
				t.Fatal(err)
			}
			if test.reasons != nil {
				wantRefused(t, err, test.reasons...)
			}
		})
	}
	if err := TrustAll.Admit("digits", 1, m, nil, now); err != nil {
		t.Error(err)
	}
}

// A bundle that is not what was signed is refused, whatever differs.
func TestAdmitOtherBundle(t *testing.T) {
	s := newSite(t)
	files := map[string]string{"model.onnx": "weights", "w/data.bin": "more"}
	m := manifestOf(files)
	raw := signBundle(t, Signer{Key: s.controller}, 3, m)
	trust := s.trust(t)
	for name, change := range map[string]func(m *models.Manifest){
		"manifest":  func(m *models.Manifest) { m.Digest = digest.FromString("another") },
		"file":      func(m *models.Manifest) { m.Files[1].Digest = digest.FromString("another") },
		"name":      func(m *models.Manifest) { m.Files[1].Path = "w/other.bin" },
		"one fewer": func(m *models.Manifest) { m.Files = m.Files[:1] },
		"one more": func(m *models.Manifest) {
			m.Files = append(m.Files, models.File{Path: "x", Digest: digest.FromString("x")})
		},
		"another name": nil,
	} {
		other, model := manifestOf(files), "digits"
		if change == nil {
			model = "letters"
		} else {
			change(other)
		}
		if err := trust.Admit(model, 3, other, [][]byte{raw}, now); err == nil {
			t.Errorf("%s: taken", name)
		} else {
			wantRefused(t, err, "no controller's key", "it is of")
		}
	}
}

// One byte that differs anywhere in a signature leaves it worthless, or
// meaning the same.
func TestAdmitOneByteChanged(t *testing.T) {
	s := newSite(t)
	m := manifestOf(map[string]string{"model.onnx": "weights"})
	raw := signBundle(t, Signer{Key: s.controller}, 3, m)
	trust := s.trust(t)
	var parsed struct {
		DSSEEnvelope struct {
			Payload    string
			Signatures []struct{ Sig string }
		}
	}
	if err := json.Unmarshal(raw, &parsed); err != nil {
		t.Fatal(err)
	}
	taken := 0
	for i := range raw {
		changed := bytes.Clone(raw)
		changed[i] ^= 1
		if trust.Admit("digits", 3, m, [][]byte{changed}, now) == nil {
			taken++
			// Only what is not signed, and says nothing, may differ.
			got, err := Parse(changed)
			if err != nil {
				t.Fatal(err)
			}
			if base64.StdEncoding.EncodeToString(got.payload) != parsed.DSSEEnvelope.Payload {
				t.Errorf("byte %d: another payload is taken", i)
			}
		}
	}
	t.Logf("%d of %d changes are without meaning", taken, len(raw))
	if taken > 64 { // names of fields that are not needed
		t.Errorf("%d of %d changes are taken", taken, len(raw))
	}
}

func TestKeyKinds(t *testing.T) {
	m := manifestOf(map[string]string{"model.onnx": "weights"})
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	keys := []crypto.Signer{ed}
	for _, c := range []elliptic.Curve{elliptic.P256(), elliptic.P384(), elliptic.P521()} {
		k, err := ecdsa.GenerateKey(c, rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		keys = append(keys, k)
	}
	for _, k := range keys {
		s := newSite(t)
		s.document.ControllerKeys = []*dunlinv1.TrustKey{trustKey(t, k)}
		if err := s.trust(t).Admit("digits", 3, m, [][]byte{signBundle(t, Signer{Key: k}, 3, m)}, now); err != nil {
			t.Error(err)
		}
	}
	weak, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := SignBundle(Signer{Key: weak}, "digits", 1, m); err == nil {
		t.Error("P-224 signs")
	}
	if _, err := NewTrustKey(weak.Public(), nil, ""); err == nil {
		t.Error("P-224 is trusted")
	}
}

func TestAdmitBinary(t *testing.T) {
	sum := [32]byte{1, 2, 3}
	b := Binary{"0.7.0", "linux", "amd64"}
	s := newSite(t)
	raw, err := SignBinary(Signer{Key: s.agent}, b, sum)
	if err != nil {
		t.Fatal(err)
	}
	got, err := s.trust(t).AdmitBinary(sum, "linux", "amd64", raw, now)
	if err != nil || got != b {
		t.Fatal(got, err)
	}
	_, err = s.trust(t).AdmitBinary([32]byte{1}, "linux", "amd64", raw, now)
	wantRefused(t, err, "the file has")
	_, err = s.trust(t).AdmitBinary(sum, "linux", "arm64", raw, now)
	wantRefused(t, err, "for linux/amd64")
	_, err = s.trust(t).AdmitBinary(sum, "linux", "amd64", raw, now.Add(2*year))
	wantRefused(t, err, "expired")
	for floor, ok := range map[string]bool{"0.6.9": true, "0.7.0": true, "0.7.1": false, "0.10.0": false, "1.0.0": false} {
		s.document.AgentFloor = floor
		if _, err = s.trust(t).AdmitBinary(sum, "linux", "amd64", raw, now); (err == nil) != ok {
			t.Errorf("floor %s: %v", floor, err)
		}
	}
	s.document.AgentFloor = ""
	for _, k := range []crypto.Signer{s.root, s.publisher, s.controller} {
		raw, err := SignBinary(Signer{Key: k}, b, sum)
		if err != nil {
			t.Fatal(err)
		}
		_, err = s.trust(t).AdmitBinary(sum, "linux", "amd64", raw, now)
		wantRefused(t, err, "no agent key")
	}
	// A signature of a model is none of a binary, and the other way round.
	m := manifestOf(map[string]string{"model.onnx": "weights"})
	_, err = s.trust(t).AdmitBinary(sum, "linux", "amd64", signBundle(t, Signer{Key: s.agent}, 3, m), now)
	wantRefused(t, err, "not an agent binary")
	wantRefused(t, s.trust(t).Admit("digits", 3, m, [][]byte{raw}, now), "not a model")
	for _, v := range []string{"", "0.7", "v0.7.0", "0.7.0-rc1", "0.07.0", "0.7.0.0", "-1.0.0"} {
		if _, err := SignBinary(Signer{Key: s.agent}, Binary{v, "linux", "amd64"}, sum); err == nil {
			t.Errorf("version %q is signed", v)
		}
	}
}

// next makes the document after d.
func next(d *dunlinv1.TrustDocument, after time.Duration, change func(*dunlinv1.TrustDocument)) *dunlinv1.TrustDocument {
	n := &dunlinv1.TrustDocument{
		Version: d.Version + 1, IssuedAt: timestamppb.New(d.IssuedAt.AsTime().Add(after)), ExpiresAt: timestamppb.New(d.IssuedAt.AsTime().Add(after + year)),
		RootKeys: slices.Clone(d.RootKeys), PublisherKeys: slices.Clone(d.PublisherKeys), ControllerKeys: slices.Clone(d.ControllerKeys), AgentKeys: slices.Clone(d.AgentKeys),
	}
	if change != nil {
		change(n)
	}
	return n
}

func TestAdvance(t *testing.T) {
	s := newSite(t)
	other := newKey(t)
	first := s.trust(t)
	day := 24 * time.Hour
	plain := next(s.document, day, nil)
	handOver := next(s.document, day, func(d *dunlinv1.TrustDocument) { d.RootKeys = []*dunlinv1.TrustKey{trustKey(t, other)} })
	afterwards := next(handOver, day, nil)
	chain := func(all ...*dunlinv1.SignedTrust) []*dunlinv1.SignedTrust { return all }
	one, two, three := signedBy(t, s.document, s.root), signedBy(t, handOver, s.root, other), signedBy(t, afterwards, other)
	second, err := Advance(first, chain(two))
	if err != nil {
		t.Fatal(err)
	}
	broken := signedBy(t, plain, s.root)
	broken.Signatures[0].Signature[10] ^= 1
	early := next(s.document, -day, nil)
	expired := next(s.document, day, nil)
	expired.RootKeys = []*dunlinv1.TrustKey{trustKey(t, s.root)}
	expired.RootKeys[0].NotAfter = timestamppb.New(now)
	for name, test := range map[string]struct {
		have  *Trust
		chain []*dunlinv1.SignedTrust
		want  uint64
		err   string
	}{
		"the next":                 {first, chain(signedBy(t, plain, s.root)), 2, ""},
		"itself":                   {first, chain(signedBy(t, s.document, s.root)), 1, ""},
		"nothing":                  {first, nil, 1, ""},
		"itself and the next":      {first, chain(one, two, three), 3, ""},
		"from nothing":             {nil, chain(three), 3, ""},
		"older":                    {second, chain(one), 0, "is older than the one in force, 2"},
		"older, in a chain":        {second, chain(one, two, three), 0, "is older than the one in force, 2"},
		"gap":                      {first, chain(three), 0, "2 to 2 are missing before it"},
		"another one":              {second, chain(signedBy(t, plain, s.root)), 0, "another one than that of this number"},
		"by the new root only":     {first, chain(signedBy(t, handOver, other)), 0, "no root key of the one before"},
		"by the old root only":     {first, chain(signedBy(t, handOver, s.root)), 0, "no root key of its own"},
		"by a removed root":        {second, chain(signedBy(t, next(handOver, day, nil), s.root)), 0, "no root key of the one before: key " + idFor(t, s.root) + " is none of them"},
		"removed root comes back":  {second, chain(signedBy(t, next(handOver, day, func(d *dunlinv1.TrustDocument) { d.RootKeys = s.document.RootKeys }), s.root)), 0, "no root key of the one before"},
		"by nobody":                {first, chain(signedBy(t, plain)), 0, "it has no signature"},
		"by the publisher":         {first, chain(signedBy(t, plain, s.publisher)), 0, "is none of them"},
		"broken signature":         {first, chain(broken), 0, "the signature is wrong"},
		"unsigned, from nothing":   {nil, chain(signedBy(t, s.document)), 0, "no root key of its own"},
		"issued before":            {first, chain(signedBy(t, early, s.root)), 0, "before the one that it follows"},
		"own root key has expired": {first, chain(signedBy(t, expired, s.root)), 0, "has not counted since"},
	} {
		got, err := Advance(test.have, test.chain)
		switch {
		case test.err == "" && (err != nil || got.Version() != test.want):
			t.Errorf("%s: document %d, error %v", name, got.Version(), err)
		case test.err != "" && (err == nil || !strings.Contains(err.Error(), test.err)):
			t.Errorf("%s: error %v, want %q in it", name, err, test.err)
		}
	}
	changed := signedBy(t, plain, s.root)
	for i := range changed.Document {
		changed.Document[i] ^= 1
		if _, err := Advance(first, chain(changed)); err == nil {
			t.Errorf("byte %d changed: taken", i)
		}
		changed.Document[i] ^= 1
	}
}

// Keys are rotated with an overlap: at each moment some key's signatures count,
// and those of the old one do not any more in the end.
func TestRotation(t *testing.T) {
	s := newSite(t)
	fresh := newKey(t)
	m := manifestOf(map[string]string{"model.onnx": "weights"})
	old := [][]byte{signBundle(t, Signer{Key: s.controller}, 3, m)}
	both := append(slices.Clone(old), signBundle(t, Signer{Key: fresh}, 3, m))
	day := 24 * time.Hour
	rotating := next(s.document, 0, func(d *dunlinv1.TrustDocument) {
		retiring := trustKey(t, s.controller)
		retiring.NotAfter = timestamppb.New(now.Add(20 * day))
		coming := trustKey(t, fresh)
		coming.NotBefore = timestamppb.New(now.Add(10 * day))
		d.ControllerKeys = []*dunlinv1.TrustKey{retiring, coming}
	})
	trust, err := Advance(s.trust(t), []*dunlinv1.SignedTrust{signedBy(t, rotating, s.root)})
	if err != nil {
		t.Fatal(err)
	}
	for n := range 40 {
		at := now.Add(time.Duration(n) * day)
		if err := trust.Admit("digits", 3, m, both, at); err != nil {
			t.Errorf("day %d: %v", n, err)
		}
		if err := trust.Admit("digits", 3, m, old, at); (err == nil) != (n <= 20) {
			t.Errorf("day %d, by the old key: %v", n, err)
		}
		if err := trust.Admit("digits", 3, m, both[1:], at); (err == nil) != (n >= 10) {
			t.Errorf("day %d, by the new key: %v", n, err)
		}
	}
}

// A device that was away for years, whose document has expired long ago, ends
// at the newest, through roots that it has never heard of.
func TestLongAway(t *testing.T) {
	s := newSite(t)
	have := s.trust(t)
	var chain []*dunlinv1.SignedTrust
	d, root := s.document, s.root
	for range 12 {
		successor := newKey(t)
		d = next(d, year/2, func(n *dunlinv1.TrustDocument) {
			n.RootKeys = []*dunlinv1.TrustKey{trustKey(t, successor)}
			n.RootKeys[0].NotBefore, n.RootKeys[0].NotAfter = n.IssuedAt, timestamppb.New(n.IssuedAt.AsTime().Add(year))
		})
		chain = append(chain, signedBy(t, d, root, successor))
		root = successor
	}
	got, err := Advance(have, chain)
	if err != nil || got.Version() != 13 {
		t.Fatalf("document %d, error %v", got.Version(), err)
	}
	at := now.Add(6 * year)
	if !have.Expired(at) || got.Expired(at) {
		t.Error("the old document counts, or the new one does not")
	}
	if _, err := Advance(have, append(slices.Clone(chain[:5]), chain[6:]...)); err == nil || !strings.Contains(err.Error(), "7 to 7 are missing") {
		t.Errorf("a gap: %v", err)
	}
	// Where the newest has expired too, it is had, and takes nothing new.
	got, err = Advance(have, chain)
	if err != nil || !got.Expired(at.Add(year+time.Second)) {
		t.Fatal(got, err)
	}
}

func TestTrustDocumentFaults(t *testing.T) {
	s := newSite(t)
	cert := authority(t, s.root, now, now.Add(year))
	for want, change := range map[string]func(*dunlinv1.TrustDocument){
		"version is 0":                func(d *dunlinv1.TrustDocument) { d.Version = 0 },
		"issued_at":                   func(d *dunlinv1.TrustDocument) { d.IssuedAt = nil },
		"expires_at is not after":     func(d *dunlinv1.TrustDocument) { d.ExpiresAt = d.IssuedAt },
		"root_keys is empty":          func(d *dunlinv1.TrustDocument) { d.RootKeys = nil },
		"is a certificate":            func(d *dunlinv1.TrustDocument) { d.RootKeys[0].PublicKey, d.RootKeys[0].Certificate = nil, cert.Raw },
		"there twice":                 func(d *dunlinv1.TrustDocument) { d.AgentKeys = append(d.AgentKeys, d.AgentKeys[0]) },
		"key_id is":                   func(d *dunlinv1.TrustDocument) { d.AgentKeys[0].KeyId = "x" },
		"not one of public_key":       func(d *dunlinv1.TrustDocument) { d.AgentKeys[0].PublicKey = nil },
		"agent_floor":                 func(d *dunlinv1.TrustDocument) { d.AgentFloor = "7" },
		"model_floors[0].model: name": func(d *dunlinv1.TrustDocument) { d.ModelFloors = []*dunlinv1.ModelFloor{{Model: "A", Version: 1}} },
		"model_floors[0].version":     func(d *dunlinv1.TrustDocument) { d.ModelFloors = []*dunlinv1.ModelFloor{{Model: "a"}} },
		"model_floors[1].model": func(d *dunlinv1.TrustDocument) {
			d.ModelFloors = []*dunlinv1.ModelFloor{{Model: "a", Version: 1}, {Model: "a", Version: 2}}
		},
		"comment has":     func(d *dunlinv1.TrustDocument) { d.AgentKeys[0].Comment = strings.Repeat("x", 257) },
		"the limit is 64": func(d *dunlinv1.TrustDocument) { d.AgentKeys = slices.Repeat(d.AgentKeys, 65) },
	} {
		d := next(s.document, 0, nil)
		d.AgentKeys, d.RootKeys = []*dunlinv1.TrustKey{trustKey(t, s.agent)}, []*dunlinv1.TrustKey{trustKey(t, s.root)}
		change(d)
		if _, err := NewTrust(d); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v, want %q in it", err, want)
		}
	}
}

func FuzzSignature(f *testing.F) {
	m := manifestOf(map[string]string{"model.onnx": "weights"})
	s := newSite(f)
	f.Add(signBundle(f, Signer{Key: s.controller}, 3, m))
	ca := newKey(f)
	caCert := authority(f, ca, now, now.Add(year))
	f.Add(signBundle(f, Signer{s.publisher, []*x509.Certificate{leaf(f, s.publisher.Public(), caCert, ca, now, now.Add(year), x509.ExtKeyUsageCodeSigning)}}, 3, m))
	raw, err := SignBinary(Signer{Key: s.agent}, Binary{"0.7.0", "linux", "amd64"}, [32]byte{})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(raw)
	stranger := newSite(f).trust(f)
	f.Fuzz(func(t *testing.T, raw []byte) {
		if sig, err := Parse(raw); err == nil {
			_, _ = sig.Statement()
			sig.Signer()
		}
		if stranger.Admit("digits", 3, m, [][]byte{raw}, now) == nil {
			t.Error("taken, signed by nobody who is trusted")
		}
		if _, err := stranger.AdmitBinary([32]byte{}, "linux", "amd64", raw, now); err == nil {
			t.Error("taken, signed by nobody who is trusted")
		}
	})
}

func FuzzTrust(f *testing.F) {
	s := newSite(f)
	s.document.ModelFloors, s.document.AgentFloor = []*dunlinv1.ModelFloor{{Model: "a", Version: 1}}, "1.2.3"
	signed := signedBy(f, s.document, s.root)
	f.Add(signed.Document, signed.Signatures[0].KeyId, signed.Signatures[0].Signature)
	have := newSite(f).trust(f)
	f.Fuzz(func(t *testing.T, document []byte, id string, signature []byte) {
		signed := &dunlinv1.SignedTrust{Document: document, Signatures: []*dunlinv1.TrustSignature{{KeyId: id, Signature: signature}}}
		if got, err := Advance(nil, []*dunlinv1.SignedTrust{signed}); err == nil && (got.Version() == 0 || len(got.Roots()) == 0) {
			t.Error("a document without version or root is taken")
		}
		if _, err := Advance(have, []*dunlinv1.SignedTrust{signed}); err == nil {
			t.Error("taken, signed by nobody who is trusted")
		}
	})
}

func FuzzManifest(f *testing.F) {
	raw, err := NewManifest(digest.FromString("bundle"), 100, []byte("signature"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(raw)
	f.Fuzz(func(t *testing.T, raw []byte) {
		subject, signature, err := ParseManifest(raw)
		if err == nil && (subject.Digest.Validate() != nil || signature.Digest.Validate() != nil || signature.Size > MaxSignatureBytes) {
			t.Errorf("taken: %v, %v", subject, signature)
		}
	})
}
