package api

import (
	"crypto"
	"slices"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/dunlin/dunlin/controller/identity"
	"github.com/dunlin/dunlin/controller/store"
	"github.com/dunlin/dunlin/internal/pki"
	"github.com/dunlin/dunlin/models/signing"
	v1 "github.com/dunlin/dunlin/proto/dunlin/v1"
	v1connect "github.com/dunlin/dunlin/proto/dunlin/v1/dunlinv1connect"
)

// site has the keys of a site and its first trust document.
type site struct {
	root       crypto.Signer
	controller *v1.TrustKey
	publisher  *v1.TrustKey
	first      *v1.SignedTrust
}

func newSite(t *testing.T) (s site) {
	t.Helper()
	key := func() (crypto.Signer, *v1.TrustKey) {
		k, err := pki.NewKey()
		must(t, err)
		described, err := signing.NewTrustKey(k.Public(), nil, "")
		must(t, err)
		return k, described
	}
	var root *v1.TrustKey
	s.root, root = key()
	_, s.controller = key()
	_, s.publisher = key()
	s.publisher.Comment = "vision team"
	s.first = s.sign(t, &v1.TrustDocument{
		Version: 1, IssuedAt: timestamppb.New(time.Now().Add(-time.Minute)), ExpiresAt: timestamppb.New(time.Now().Add(time.Hour)),
		RootKeys: []*v1.TrustKey{root}, ControllerKeys: []*v1.TrustKey{s.controller}, PublisherKeys: []*v1.TrustKey{s.publisher},
	})
	return s
}

func (s *site) sign(t *testing.T, d *v1.TrustDocument) *v1.SignedTrust {
	t.Helper()
	signed, err := signing.NewTrust(d)
	must(t, err)
	must(t, signing.SignTrust(signed, s.root))
	return signed
}

// next makes the document after the first.
func (s *site) next(t *testing.T, change func(*v1.TrustDocument)) *v1.SignedTrust {
	t.Helper()
	d, err := signing.ParseTrustDocument(s.first)
	must(t, err)
	d.Version++
	d.IssuedAt = timestamppb.Now()
	change(d)
	return s.sign(t, d)
}

func TestTrust(t *testing.T) {
	w := start(t)
	client := func(role string) v1connect.TrustServiceClient {
		return v1connect.NewTrustServiceClient(w.client, w.url, as(role+"-token"))
	}
	put := func(role string, signed *v1.SignedTrust) error {
		_, err := client(role).PutTrust(t.Context(), connect.NewRequest(&v1.PutTrustRequest{Trust: signed}))
		return err
	}
	nothing := func(*v1.TrustDocument) {}
	for name, test := range map[string]struct {
		signed *v1.SignedTrust
		err    string
	}{
		"gap":  {w.site.next(t, func(d *v1.TrustDocument) { d.Version++ }), "2 to 2 are missing"},
		"none": {nil, "has 0 bytes"},
		"of the future": {w.site.next(t, func(d *v1.TrustDocument) {
			d.IssuedAt = timestamppb.New(time.Now().Add(2 * maxAhead))
			d.ExpiresAt = timestamppb.New(time.Now().Add(3 * maxAhead))
		}), "which is not yet"},
		"expired": {w.site.next(t, func(d *v1.TrustDocument) {
			d.IssuedAt = timestamppb.New(time.Now().Add(-time.Second))
			d.ExpiresAt = timestamppb.New(time.Now().Add(-time.Millisecond))
		}), "has expired"},
		"no controller key": {w.site.next(t, func(d *v1.TrustDocument) { d.ControllerKeys = nil }), "lacks this controller's key"},
	} {
		err := put("admin", test.signed)
		if connect.CodeOf(err) != connect.CodeInvalidArgument || !strings.Contains(err.Error(), test.err) {
			t.Errorf("%s: %v, want %q in it", name, err, test.err)
		}
	}
	stranger := w.site
	stranger.root, _ = pki.NewKey()
	if err := put("admin", stranger.next(t, nothing)); connect.CodeOf(err) != connect.CodeInvalidArgument || !strings.Contains(err.Error(), "no root key of the one before") {
		t.Errorf("by a stranger: %v", err)
	}
	second := w.site.next(t, nothing)
	if err := put("operator", second); connect.CodeOf(err) != connect.CodePermissionDenied {
		t.Errorf("by an operator: %v", err)
	}
	for range 2 { // again, it changes nothing
		must(t, put("admin", second))
	}
	if err := put("admin", w.site.first); connect.CodeOf(err) != connect.CodeInvalidArgument || !strings.Contains(err.Error(), "is older than the one in force") {
		t.Errorf("the first again: %v", err)
	}
	for after, want := range map[uint64]int{0: 2, 1: 1, 2: 0, 1 << 63: 0} {
		got, err := client("viewer").GetTrust(t.Context(), connect.NewRequest(&v1.GetTrustRequest{After: after}))
		must(t, err)
		if len(got.Msg.Trust) != want {
			t.Errorf("after %d: %d documents, want %d", after, len(got.Msg.Trust), want)
		}
	}
	if r := w.audit(t, 1)[0]; r.Who != "user:admin" || r.Action != "trust.put" || r.Object != "trust/2" || !strings.Contains(r.After, "trust document 2") {
		t.Errorf("audit: %+v", r)
	}
}

func TestSigners(t *testing.T) {
	w := start(t)
	v, _, err := w.store.CreateVersion(t.Context(), store.Version{Model: "m", Digest: "sha256:1", CreatedBy: "test"})
	must(t, err)
	for manifest, signer := range map[string]string{"a": w.site.controller.KeyId, "b": w.site.publisher.KeyId, "c": "somebody"} {
		must(t, w.store.AddSignature(t.Context(), "test", store.Signature{Model: "m", Digest: v.Digest, Manifest: manifest, Signer: signer}))
	}
	got, err := v1connect.NewModelServiceClient(w.client, w.url, as("viewer-token")).ListModels(t.Context(), connect.NewRequest(&v1.ListModelsRequest{}))
	must(t, err)
	if signers := got.Msg.Versions[0].Signers; len(signers) != 1 || signers[0] != "vision team ("+w.site.publisher.KeyId+")" {
		t.Errorf("signers: %q", signers)
	}
}

func (w *world) trust(token string) v1connect.TrustServiceClient {
	return v1connect.NewTrustServiceClient(w.client, w.url, as(token))
}

// Nobody stays connected by an authority that is taken out by force: what was
// made with its key is not known.
func TestRetireAuthority(t *testing.T) {
	w := start(t)
	w.join(t, "d")
	w.join(t, "e")
	c := w.trust(admin)
	first := call(t, c.GetAuthorities, &v1.GetAuthoritiesRequest{}).Authorities[0].Id
	refused(t, c.RetireAuthority, &v1.RetireAuthorityRequest{Id: first, Force: true}, connect.CodePermissionDenied, "rotate first")
	call(t, c.RotateAuthority, &v1.RotateAuthorityRequest{})
	refused(t, c.RetireAuthority, &v1.RetireAuthorityRequest{Id: first}, connect.CodePermissionDenied, "2 devices have a valid certificate")
	call(t, c.RetireAuthority, &v1.RetireAuthorityRequest{Id: first, Force: true})
	w.bus.mu.Lock()
	defer w.bus.mu.Unlock()
	if slices.Sort(w.bus.cut); !slices.Equal(w.bus.cut, []string{"d", "e"}) {
		t.Errorf("the sessions of %v ended", w.bus.cut)
	}
}

// There are never more authorities than a device takes.
func TestAuthoritiesAreBounded(t *testing.T) {
	w := start(t)
	c := w.trust(admin)
	first := call(t, c.GetAuthorities, &v1.GetAuthoritiesRequest{}).Authorities[0].Id
	for range identity.MaxAuthorities - 1 {
		call(t, c.RotateAuthority, &v1.RotateAuthorityRequest{})
	}
	refused(t, c.RotateAuthority, &v1.RotateAuthorityRequest{}, connect.CodeFailedPrecondition, "retire")
	call(t, c.RetireAuthority, &v1.RetireAuthorityRequest{Id: first, Force: true})
	call(t, c.RotateAuthority, &v1.RotateAuthorityRequest{})
}
