package signing

import (
	"bytes"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	bundlev1 "github.com/sigstore/protobuf-specs/gen/pb-go/bundle/v1"
	commonv1 "github.com/sigstore/protobuf-specs/gen/pb-go/common/v1"
	"github.com/sigstore/protobuf-specs/gen/pb-go/dsse"
	"google.golang.org/protobuf/encoding/protojson"
)

const (
	// MediaType is the type of a signature: a Sigstore bundle with a DSSE
	// envelope over an in-toto statement.
	MediaType = "application/vnd.dev.sigstore.bundle.v0.3+json"

	payloadType   = "application/vnd.in-toto+json"
	statementType = "https://in-toto.io/Statement/v1"
)

// MaxSignatureBytes bounds a signature.
const MaxSignatureBytes = 1 << 20

const (
	maxCertificates = 8
	maxString       = 4096 // bytes of a string that is not bounded otherwise
)

// statement is an in-toto statement.
type statement struct {
	Type          string          `json:"_type"`
	Subject       []subject       `json:"subject"`
	PredicateType string          `json:"predicateType"`
	Predicate     json.RawMessage `json:"predicate"`
}

type subject struct {
	Name        string            `json:"name"`
	Digest      map[string]string `json:"digest"`
	Annotations map[string]any    `json:"annotations,omitempty"`
}

// Signature is a signature that has the right form. Whether it is genuine,
// Verify says.
type Signature struct {
	statement statement
	payload   []byte // the encoded statement
	signature []byte
	// By which the key is to be found: what names it, or its certificates.
	hint         string
	certificates []*x509.Certificate
}

// Parse reads a signature.
func Parse(raw []byte) (*Signature, error) {
	if len(raw) > MaxSignatureBytes {
		return nil, fmt.Errorf("signature has %d bytes, the limit is %d", len(raw), MaxSignatureBytes)
	}
	b := new(bundlev1.Bundle)
	// Other tools add fields.
	if err := (protojson.UnmarshalOptions{DiscardUnknown: true, RecursionLimit: 32}).Unmarshal(raw, b); err != nil {
		return nil, fmt.Errorf("signature is not a Sigstore bundle: %w", err)
	}
	if b.GetMediaType() != MediaType {
		return nil, fmt.Errorf("signature has mediaType %.80q instead of %q", b.GetMediaType(), MediaType)
	}
	e := b.GetDsseEnvelope()
	if e.GetPayloadType() != payloadType {
		return nil, fmt.Errorf("signature's payloadType is %.80q instead of %q", e.GetPayloadType(), payloadType)
	}
	if n := len(e.GetSignatures()); n != 1 {
		return nil, fmt.Errorf("envelope has %d signatures instead of 1", n)
	}
	s := &Signature{payload: e.GetPayload(), signature: e.GetSignatures()[0].GetSig()}
	switch m := b.GetVerificationMaterial(); {
	case m.GetPublicKey() != nil:
		s.hint = m.GetPublicKey().GetHint()
	case m.GetX509CertificateChain() != nil:
		chain := m.GetX509CertificateChain().GetCertificates()
		if n := len(chain); n < 1 || n > maxCertificates {
			return nil, fmt.Errorf("signature has %d certificates, allowed are 1 to %d", n, maxCertificates)
		}
		for i, der := range chain {
			c, err := x509.ParseCertificate(der.GetRawBytes())
			if err != nil {
				return nil, fmt.Errorf("signature's certificate %d: %w", i, err)
			}
			s.certificates = append(s.certificates, c)
		}
	default:
		return nil, errors.New("signature names neither a key nor certificates")
	}
	if err := json.Unmarshal(s.payload, &s.statement); err != nil {
		return nil, fmt.Errorf("what is signed is not an in-toto statement: %w", err)
	}
	if s.statement.Type != statementType {
		return nil, fmt.Errorf("what is signed is of type %.80q instead of %q", s.statement.Type, statementType)
	}
	if n := len(s.statement.Subject); n != 1 {
		return nil, fmt.Errorf("what is signed has %d subjects instead of 1", n)
	}
	if n := len(s.statement.Subject[0].Name); n < 1 || n > maxString {
		return nil, fmt.Errorf("the subject's name has %d bytes, allowed are 1 to %d", n, maxString)
	}
	return s, nil
}

// Signer names who seems to have signed: the hint, or the id of the
// certificate's key.
func (s *Signature) Signer() string {
	if len(s.certificates) > 0 {
		return idOf(s.certificates[0].RawSubjectPublicKeyInfo)
	}
	return s.hint
}

// Verify gives the one of keys by which the signature is genuine and counts at
// a time.
func (s *Signature) Verify(keys []Key, at time.Time) (Key, error) {
	var why error
	for _, k := range keys {
		public := k.Public
		if len(s.certificates) > 0 {
			if k.Authority == nil {
				continue
			}
			if err := k.verifyChain(s.certificates, at); err != nil {
				why = errors.Join(why, err)
				continue
			}
			public = s.certificates[0].PublicKey
		} else if public == nil || s.hint != "" && s.hint != k.hint && s.hint != k.ID {
			continue
		}
		err := verify(public, pae(s.payload), s.signature)
		if err == nil {
			err = k.counts(at)
		}
		if err == nil {
			return k, nil
		}
		why = errors.Join(why, err)
	}
	if why == nil {
		why = fmt.Errorf("it is by a key that does not count (%.64s)", s.Signer())
	}
	return Key{}, why
}

// pae is what an envelope's signature is over: DSSE's pre-authentication
// encoding.
func pae(payload []byte) []byte {
	return append(fmt.Appendf(nil, "DSSEv1 %d %s %d ", len(payloadType), payloadType, len(payload)), payload...)
}

// seal signs a statement.
func seal(by Signer, s subject, predicateType string, predicate any) ([]byte, error) {
	body, err := json.Marshal(predicate)
	if err != nil {
		return nil, err
	}
	payload, err := json.Marshal(statement{statementType, []subject{s}, predicateType, body})
	if err != nil {
		return nil, err
	}
	signature, err := sign(by.Key, pae(payload))
	if err != nil {
		return nil, fmt.Errorf("sign: %w", err)
	}
	spki, err := x509.MarshalPKIXPublicKey(by.Key.Public())
	if err != nil {
		return nil, fmt.Errorf("sign: %w", err)
	}
	m := new(bundlev1.VerificationMaterial)
	if len(by.Certificates) > 0 {
		if !bytes.Equal(by.Certificates[0].RawSubjectPublicKeyInfo, spki) {
			return nil, fmt.Errorf("sign: certificate %s is of another key", by.Certificates[0].Subject)
		}
		chain := new(commonv1.X509CertificateChain)
		for _, c := range by.Certificates {
			chain.Certificates = append(chain.Certificates, &commonv1.X509Certificate{RawBytes: c.Raw})
		}
		m.Content = &bundlev1.VerificationMaterial_X509CertificateChain{X509CertificateChain: chain}
	} else {
		m.Content = &bundlev1.VerificationMaterial_PublicKey{PublicKey: &commonv1.PublicKeyIdentifier{Hint: hintOf(spki)}}
	}
	// The specification wants tlogEntries even where it is empty.
	raw, err := protojson.MarshalOptions{EmitDefaultValues: true}.Marshal(&bundlev1.Bundle{
		MediaType: MediaType, VerificationMaterial: m,
		Content: &bundlev1.Bundle_DsseEnvelope{DsseEnvelope: &dsse.Envelope{
			Payload: payload, PayloadType: payloadType, Signatures: []*dsse.Signature{{Sig: signature}},
		}},
	})
	if err != nil {
		return nil, fmt.Errorf("sign: %w", err)
	}
	var compact bytes.Buffer // protojson's spaces are not the same each time
	if err := json.Compact(&compact, raw); err != nil {
		return nil, fmt.Errorf("sign: %w", err)
	}
	return compact.Bytes(), nil
}
