// Package signing signs what devices run and verifies it: bundles in the form
// of OpenSSF Model Signing, agent binaries in the same envelope, and the trust
// documents that say whose signatures count. It is pure.
package signing

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"slices"
	"time"
)

// RefusedError says why a device does not take a bundle or a binary.
type RefusedError struct{ Reason string }

func (e *RefusedError) Error() string { return e.Reason }

func refused(format string, args ...any) error {
	return &RefusedError{fmt.Sprintf(format, args...)}
}

// errSignature is a signature that is not the key's over the message.
var errSignature = errors.New("the signature is wrong")

// Signer is who signs.
type Signer struct {
	Key crypto.Signer
	// Certificates has the key's own first, then those up to the authority,
	// without it; empty: the signature names the key.
	Certificates []*x509.Certificate
}

// Key is one whose signatures count.
type Key struct {
	ID      string // of the public key, or of the authority's
	Comment string
	Public  crypto.PublicKey // nil: Authority
	// Authority vouches for keys: those of its certificates for code signing.
	Authority           *x509.Certificate
	NotBefore, NotAfter time.Time // zero: no bound

	hint string
}

// KeyID is the name of a key: SHA-256 of its SubjectPublicKeyInfo, hexadecimal.
func KeyID(public crypto.PublicKey) (string, error) {
	der, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		return "", fmt.Errorf("name a key: %w", err)
	}
	return idOf(der), nil
}

func idOf(spki []byte) string {
	sum := sha256.Sum256(spki)
	return hex.EncodeToString(sum[:])
}

// hintOf is how OpenSSF Model Signing names a key: SHA-256 of its PEM text.
func hintOf(spki []byte) string {
	return idOf(encodePublicKey(spki))
}

// EncodePublicKey writes a public key as PEM.
func EncodePublicKey(public crypto.PublicKey) ([]byte, error) {
	der, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		return nil, fmt.Errorf("encode public key: %w", err)
	}
	return encodePublicKey(der), nil
}

func encodePublicKey(spki []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: spki})
}

// DecodePublicKey reads a public key in PEM.
func DecodePublicKey(text []byte) (crypto.PublicKey, error) {
	block, _ := pem.Decode(text)
	if block == nil || block.Type != "PUBLIC KEY" {
		return nil, errors.New("no PEM block PUBLIC KEY")
	}
	return x509.ParsePKIXPublicKey(block.Bytes)
}

// hashOf gives what a key signs the hash of, as OpenSSF Model Signing has it.
func hashOf(public crypto.PublicKey) (crypto.Hash, error) {
	switch k := public.(type) {
	case *ecdsa.PublicKey:
		switch k.Curve {
		case elliptic.P256():
			return crypto.SHA256, nil
		case elliptic.P384():
			return crypto.SHA384, nil
		case elliptic.P521():
			return crypto.SHA512, nil
		}
		return 0, fmt.Errorf("the key is on curve %s, allowed are P-256, P-384 and P-521", k.Curve.Params().Name)
	case ed25519.PublicKey:
		return crypto.Hash(0), nil
	}
	return 0, fmt.Errorf("the key is a %T, allowed are ECDSA and Ed25519", public)
}

func sign(key crypto.Signer, message []byte) ([]byte, error) {
	hash, err := hashOf(key.Public())
	if err != nil {
		return nil, err
	}
	return crypto.SignMessage(key, rand.Reader, message, hash)
}

func verify(public crypto.PublicKey, message, signature []byte) error {
	hash, err := hashOf(public)
	if err != nil {
		return err
	}
	ok := false
	switch k := public.(type) {
	case *ecdsa.PublicKey:
		h := hash.New()
		h.Write(message)
		ok = ecdsa.VerifyASN1(k, h.Sum(nil), signature)
	case ed25519.PublicKey:
		ok = ed25519.Verify(k, message, signature)
	}
	if !ok {
		return errSignature
	}
	return nil
}

// counts says whether a signature by the key counts at a time.
func (k *Key) counts(at time.Time) error {
	if !k.NotBefore.IsZero() && at.Before(k.NotBefore) {
		return fmt.Errorf("key %s counts from %s on", k.ID, k.NotBefore.Format(time.RFC3339))
	}
	if !k.NotAfter.IsZero() && at.After(k.NotAfter) {
		return fmt.Errorf("key %s has not counted since %s", k.ID, k.NotAfter.Format(time.RFC3339))
	}
	return nil
}

// verifyChain says whether the key's authority vouches for the first of certs
// to sign, at a time.
func (k *Key) verifyChain(certs []*x509.Certificate, at time.Time) error {
	roots, intermediates := x509.NewCertPool(), x509.NewCertPool()
	roots.AddCert(k.Authority)
	for _, c := range certs[1:] {
		intermediates.AddCert(c)
	}
	// crypto/x509 lets a certificate without purposes serve all of them.
	if !slices.Contains(certs[0].ExtKeyUsage, x509.ExtKeyUsageCodeSigning) {
		return fmt.Errorf("certificate %s is not one for code signing", certs[0].Subject)
	}
	_, err := certs[0].Verify(x509.VerifyOptions{
		Roots: roots, Intermediates: intermediates, CurrentTime: at, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning},
	})
	if err != nil {
		return fmt.Errorf("certificate %s: %w", certs[0].Subject, err)
	}
	return nil
}
