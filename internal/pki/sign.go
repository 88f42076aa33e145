package pki

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"time"
)

// ErrSignature is a signature that is not the key's over the message.
var ErrSignature = errors.New("the signature is wrong")

// Sign signs a message: ECDSA over its SHA-256 (ASN.1), or Ed25519.
func Sign(key crypto.Signer, message []byte) ([]byte, error) {
	if _, ok := key.Public().(ed25519.PublicKey); ok {
		return key.Sign(rand.Reader, message, crypto.Hash(0))
	}
	sum := sha256.Sum256(message)
	return key.Sign(rand.Reader, sum[:], crypto.SHA256)
}

// Verify checks what Sign made.
func Verify(public crypto.PublicKey, message, signature []byte) error {
	ok := false
	switch k := public.(type) {
	case *ecdsa.PublicKey:
		sum := sha256.Sum256(message)
		ok = ecdsa.VerifyASN1(k, sum[:], signature)
	case ed25519.PublicKey:
		ok = ed25519.Verify(k, message, signature)
	default:
		return fmt.Errorf("a %T cannot verify", public)
	}
	if !ok {
		return ErrSignature
	}
	return nil
}

// message joins parts such that no two lists give the same bytes, and such
// that a signature for one purpose is none for another.
func message(purpose string, parts ...[]byte) []byte {
	b := append([]byte("dunlin/v1 "+purpose), 0)
	for _, p := range parts {
		b = binary.BigEndian.AppendUint64(b, uint64(len(p)))
		b = append(b, p...)
	}
	return b
}

// RenewalMessage is what a device's old key signs to get a new certificate.
func RenewalMessage(certificate, csr []byte) []byte { return message("renew", certificate, csr) }

// TimeMessage is what the controller signs to say what time it is.
func TimeMessage(nonce []byte, now time.Time) []byte {
	return message("time", nonce, binary.BigEndian.AppendUint64(nil, uint64(now.UnixNano())))
}
