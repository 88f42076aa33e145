package signing

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/dunlin/dunlin/models"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// Limits of a trust document.
const (
	MaxTrustBytes = 32 << 10
	maxKeys       = 64 // of one kind
	maxFloors     = 256
	maxComment    = 256
	maxSigned     = 16 // signatures of a document
	maxChain      = 4096
)

// Trust is a trust document that is signed as it should be. It does not
// change, and is safe for concurrent use.
type Trust struct {
	signed   *dunlinv1.SignedTrust
	document *dunlinv1.TrustDocument
	all      bool

	issued, expires                        time.Time
	roots, publishers, controllers, agents []Key
	requirePublisher                       bool
	agentFloor                             string
	floors                                 map[string]int64
}

// TrustAll takes every bundle, signed or not. It is for tests.
var TrustAll = &Trust{all: true}

// Version is the document's number; 0 for none.
func (t *Trust) Version() uint64 {
	if t == nil {
		return 0
	}
	return t.document.GetVersion()
}

// Signed is the document as it was signed; nobody changes it.
func (t *Trust) Signed() *dunlinv1.SignedTrust { return t.signed }

// Document gives a copy of the document.
func (t *Trust) Document() *dunlinv1.TrustDocument { return proto.CloneOf(t.document) }

// IssuedAt is when the document was made.
func (t *Trust) IssuedAt() time.Time { return t.issued }

// ExpiresAt is until when new bundles are taken by it.
func (t *Trust) ExpiresAt() time.Time { return t.expires }

// Expired says whether nothing new is taken by the document.
func (t *Trust) Expired(now time.Time) bool { return !t.all && now.After(t.expires) }

// Publishers are the keys that sign bundles as publishers.
func (t *Trust) Publishers() []Key { return t.publishers }

// Controllers are the keys that sign bundles as controllers.
func (t *Trust) Controllers() []Key { return t.controllers }

// Roots are the keys that may sign the next document.
func (t *Trust) Roots() []Key { return t.roots }

// Hint is what signatures name the key by; empty for an authority.
func (k *Key) Hint() string { return k.hint }

// TrustMessage is what the signatures of a trust document are over.
func TrustMessage(document []byte) []byte {
	b := append([]byte("dunlin/v1 trust"), 0)
	return append(binary.BigEndian.AppendUint64(b, uint64(len(document))), document...)
}

// NewTrust encodes a document, and refuses one that nobody could take.
func NewTrust(d *dunlinv1.TrustDocument) (*dunlinv1.SignedTrust, error) {
	raw, err := proto.MarshalOptions{Deterministic: true}.Marshal(d)
	if err != nil {
		return nil, fmt.Errorf("encode trust document: %w", err)
	}
	signed := &dunlinv1.SignedTrust{Document: raw}
	_, err = parseTrust(signed)
	return signed, err
}

// ParseTrustDocument reads a document without asking who signed it.
func ParseTrustDocument(signed *dunlinv1.SignedTrust) (*dunlinv1.TrustDocument, error) {
	t, err := parseTrust(signed)
	if err != nil {
		return nil, err
	}
	return t.document, nil
}

// SignTrust adds a key's signature to a document.
func SignTrust(signed *dunlinv1.SignedTrust, key crypto.Signer) error {
	id, err := KeyID(key.Public())
	if err != nil {
		return err
	}
	signature, err := sign(key, TrustMessage(signed.GetDocument()))
	if err != nil {
		return fmt.Errorf("sign trust document: %w", err)
	}
	signed.Signatures = slices.DeleteFunc(signed.Signatures, func(s *dunlinv1.TrustSignature) bool { return s.GetKeyId() == id })
	signed.Signatures = append(signed.Signatures, &dunlinv1.TrustSignature{KeyId: id, Signature: signature})
	return nil
}

// NewTrustKey describes a public key, or the authority of a certificate.
func NewTrustKey(public crypto.PublicKey, authority *x509.Certificate, comment string) (*dunlinv1.TrustKey, error) {
	k := &dunlinv1.TrustKey{Comment: comment}
	if authority != nil {
		k.Certificate = authority.Raw
		public = authority.PublicKey
	}
	der, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		return nil, fmt.Errorf("describe key: %w", err)
	}
	if k.KeyId = idOf(der); authority == nil {
		k.PublicKey = der
	}
	_, err = parseKey(k)
	return k, err
}

// Advance gives the newest trust document that a chain leads to from the one
// that is had: the documents after it, or with it, without gaps, oldest first.
// Each must be signed by a root key of the one before and by one of its own,
// which must count when it was issued. Without one that is had, the first is
// taken for its own signature: it must come from where it may be believed.
//
// A document that has expired is taken as well: there may be no newer one, and
// what it forbids stays forbidden.
func Advance(have *Trust, chain []*dunlinv1.SignedTrust) (*Trust, error) {
	if len(chain) > maxChain {
		return nil, fmt.Errorf("%d trust documents, the limit is %d", len(chain), maxChain)
	}
	for _, signed := range chain {
		next, err := parseTrust(signed)
		if err != nil {
			return nil, fmt.Errorf("trust document: %w", err)
		}
		if have != nil {
			if next.Version() == have.Version() && bytes.Equal(signed.GetDocument(), have.signed.GetDocument()) {
				continue
			}
			if err := next.follows(have); err != nil {
				return nil, fmt.Errorf("trust document %d: %w", next.Version(), err)
			}
		}
		if err := next.signedBy(next.roots); err != nil {
			return nil, fmt.Errorf("trust document %d is signed by no root key of its own: %w", next.Version(), err)
		}
		have = next
	}
	return have, nil
}

// follows says whether t is the document after have, and have's roots say so.
func (t *Trust) follows(have *Trust) error {
	switch v, had := t.Version(), have.Version(); {
	case v < had:
		return fmt.Errorf("is older than the one in force, %d", had)
	case v == had:
		return errors.New("is another one than that of this number in force")
	case v > had+1:
		return fmt.Errorf("%d to %d are missing before it", had+1, v-1)
	case t.issued.Before(have.issued):
		return fmt.Errorf("was issued on %s, before the one that it follows", t.issued.Format(time.RFC3339))
	}
	if err := t.signedBy(have.roots); err != nil {
		return fmt.Errorf("is signed by no root key of the one before: %w", err)
	}
	return nil
}

// signedBy says whether one of keys, which counted when the document was
// issued, has signed it.
func (t *Trust) signedBy(keys []Key) error {
	var why error
	for _, s := range t.signed.GetSignatures() {
		i := slices.IndexFunc(keys, func(k Key) bool { return k.ID == s.GetKeyId() })
		if i < 0 {
			why = errors.Join(why, fmt.Errorf("key %.64s is none of them", s.GetKeyId()))
			continue
		}
		err := verify(keys[i].Public, TrustMessage(t.signed.GetDocument()), s.GetSignature())
		if err == nil {
			err = keys[i].counts(t.issued)
		}
		if err == nil {
			return nil
		}
		why = errors.Join(why, fmt.Errorf("key %s: %w", keys[i].ID, err))
	}
	if why == nil {
		why = errors.New("it has no signature")
	}
	return why
}

// parseTrust reads a document and checks all of it but its signatures.
func parseTrust(signed *dunlinv1.SignedTrust) (*Trust, error) {
	if n := len(signed.GetDocument()); n < 1 || n > MaxTrustBytes {
		return nil, fmt.Errorf("has %d bytes, allowed are 1 to %d", n, MaxTrustBytes)
	}
	if n := len(signed.GetSignatures()); n > maxSigned {
		return nil, fmt.Errorf("has %d signatures, the limit is %d", n, maxSigned)
	}
	d := new(dunlinv1.TrustDocument)
	if err := proto.Unmarshal(signed.GetDocument(), d); err != nil {
		return nil, fmt.Errorf("is malformed: %w", err)
	}
	t := &Trust{signed: signed, document: d, requirePublisher: d.GetRequirePublisher(), agentFloor: d.GetAgentFloor(), floors: map[string]int64{}}
	if d.GetVersion() == 0 {
		return nil, errors.New("version is 0")
	}
	if err := errors.Join(d.GetIssuedAt().CheckValid(), d.GetExpiresAt().CheckValid()); err != nil {
		return nil, fmt.Errorf("issued_at, expires_at: %w", err)
	}
	if t.issued, t.expires = d.GetIssuedAt().AsTime(), d.GetExpiresAt().AsTime(); !t.expires.After(t.issued) {
		return nil, errors.New("expires_at is not after issued_at")
	}
	for _, list := range []struct {
		name string
		from []*dunlinv1.TrustKey
		to   *[]Key
	}{
		{"root_keys", d.GetRootKeys(), &t.roots}, {"publisher_keys", d.GetPublisherKeys(), &t.publishers},
		{"controller_keys", d.GetControllerKeys(), &t.controllers}, {"agent_keys", d.GetAgentKeys(), &t.agents},
	} {
		if n := len(list.from); n > maxKeys {
			return nil, fmt.Errorf("%s has %d keys, the limit is %d", list.name, n, maxKeys)
		}
		for i, from := range list.from {
			k, err := parseKey(from)
			if err != nil {
				return nil, fmt.Errorf("%s[%d]: %w", list.name, i, err)
			}
			if slices.ContainsFunc(*list.to, func(o Key) bool { return o.ID == k.ID }) {
				return nil, fmt.Errorf("%s[%d]: key %s is there twice", list.name, i, k.ID)
			}
			*list.to = append(*list.to, k)
		}
	}
	if len(t.roots) == 0 {
		return nil, errors.New("root_keys is empty: there could be no document after this one")
	}
	if i := slices.IndexFunc(t.roots, func(k Key) bool { return k.Public == nil }); i >= 0 {
		return nil, fmt.Errorf("root_keys[%d]: is a certificate, a root is a key", i)
	}
	if t.agentFloor != "" {
		if _, err := models.ParseRelease(t.agentFloor); err != nil {
			return nil, fmt.Errorf("agent_floor: %w", err)
		}
	}
	if n := len(d.GetModelFloors()); n > maxFloors {
		return nil, fmt.Errorf("model_floors has %d, the limit is %d", n, maxFloors)
	}
	for i, f := range d.GetModelFloors() {
		if err := models.CheckName(f.GetModel()); err != nil {
			return nil, fmt.Errorf("model_floors[%d].model: %w", i, err)
		}
		if v := f.GetVersion(); v < 1 || v > models.MaxVersion {
			return nil, fmt.Errorf("model_floors[%d].version: %d, allowed are 1 to %d", i, v, int64(models.MaxVersion))
		}
		if t.floors[f.GetModel()] != 0 {
			return nil, fmt.Errorf("model_floors[%d].model: %s is there twice", i, f.GetModel())
		}
		t.floors[f.GetModel()] = f.GetVersion()
	}
	return t, nil
}

func parseKey(from *dunlinv1.TrustKey) (Key, error) {
	k := Key{ID: from.GetKeyId(), Comment: from.GetComment()}
	spki := from.GetPublicKey()
	switch {
	case len(k.Comment) > maxComment:
		return k, fmt.Errorf("comment has %d bytes, the limit is %d", len(k.Comment), maxComment)
	case (len(spki) > 0) == (len(from.GetCertificate()) > 0):
		return k, errors.New("has not one of public_key and certificate")
	case len(spki) > 0:
		public, err := x509.ParsePKIXPublicKey(spki)
		if err != nil {
			return k, fmt.Errorf("public_key: %w", err)
		}
		if _, err := hashOf(public); err != nil {
			return k, fmt.Errorf("public_key: %w", err)
		}
		k.Public, k.hint = public, hintOf(spki)
	default:
		c, err := x509.ParseCertificate(from.GetCertificate())
		if err != nil {
			return k, fmt.Errorf("certificate: %w", err)
		}
		if !c.IsCA || !c.BasicConstraintsValid {
			return k, fmt.Errorf("certificate %s is not an authority's", c.Subject)
		}
		k.Authority, spki = c, c.RawSubjectPublicKeyInfo
	}
	if id := idOf(spki); k.ID != id {
		return k, fmt.Errorf("key_id is %.64q, the key's is %s", k.ID, id)
	}
	for _, bound := range []struct {
		from *timestamppb.Timestamp
		to   *time.Time
	}{{from.GetNotBefore(), &k.NotBefore}, {from.GetNotAfter(), &k.NotAfter}} {
		if bound.from == nil {
			continue
		}
		if err := bound.from.CheckValid(); err != nil {
			return k, fmt.Errorf("not_before, not_after: %w", err)
		}
		*bound.to = bound.from.AsTime()
	}
	return k, nil
}
