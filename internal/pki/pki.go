// Package pki is how Dunlin's programs know each other: keys, certificates,
// what is signed with them, and TLS between the programs.
package pki

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
	"io/fs"
	"os"
	"path/filepath"
)

// NewKey makes an ECDSA key on P-256.
func NewKey() (crypto.Signer, error) { return ecdsa.GenerateKey(elliptic.P256(), rand.Reader) }

// ID is the name of a key: SHA-256 of its SubjectPublicKeyInfo, hexadecimal.
func ID(public crypto.PublicKey) (string, error) {
	der, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		return "", fmt.Errorf("name a key: %w", err)
	}
	sum := sha256.Sum256(der)
	return hex.EncodeToString(sum[:]), nil
}

// CertificateID is the ID of a certificate's key.
func CertificateID(c *x509.Certificate) string {
	sum := sha256.Sum256(c.RawSubjectPublicKeyInfo)
	return hex.EncodeToString(sum[:])
}

// CheckPublicKey refuses keys that are not ECDSA on P-256, P-384 or P-521, or
// Ed25519.
func CheckPublicKey(public crypto.PublicKey) error {
	switch k := public.(type) {
	case *ecdsa.PublicKey:
		switch k.Curve {
		case elliptic.P256(), elliptic.P384(), elliptic.P521():
			return nil
		}
		return fmt.Errorf("the key is on curve %s, allowed are P-256, P-384 and P-521", k.Curve.Params().Name)
	case ed25519.PublicKey:
		return nil
	}
	return fmt.Errorf("the key is a %T, allowed are ECDSA and Ed25519", public)
}

// maxKeyFile bounds a file that holds a key or certificates.
const maxKeyFile = 1 << 20

// WriteKey writes a key as PKCS #8 in PEM, readable by its owner only,
// durably, and never over a file that is there.
func WriteKey(path string, key crypto.Signer) error {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return fmt.Errorf("write key: %w", err)
	}
	if _, err := os.Lstat(path); err == nil {
		return fmt.Errorf("write key: %s: %w", path, fs.ErrExist)
	}
	return WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600)
}

// ReadKey reads what WriteKey wrote, or any PEM file with a PKCS #8 key.
func ReadKey(path string) (crypto.Signer, error) {
	raw, err := readFile(path)
	if err != nil {
		return nil, fmt.Errorf("read key: %w", err)
	}
	block, _ := pem.Decode(raw)
	if block == nil || block.Type != "PRIVATE KEY" {
		return nil, fmt.Errorf("read key: %s holds no PEM block PRIVATE KEY", path)
	}
	parsed, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("read key: %s is not PKCS #8", path)
	}
	key, ok := parsed.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("read key: %s: a %T cannot sign", path, parsed)
	}
	return key, CheckPublicKey(key.Public())
}

// ReadCertificates reads the certificates of a PEM file, at least one.
func ReadCertificates(path string) ([]*x509.Certificate, error) {
	raw, err := readFile(path)
	if err != nil {
		return nil, fmt.Errorf("read certificates: %w", err)
	}
	certs, err := DecodeCertificates(raw)
	if err != nil {
		return nil, fmt.Errorf("read certificates: %s: %w", path, err)
	}
	return certs, nil
}

// DecodeCertificates gives the certificates of PEM text, at least one.
func DecodeCertificates(text []byte) ([]*x509.Certificate, error) {
	var certs []*x509.Certificate
	for {
		var block *pem.Block
		if block, text = pem.Decode(text); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			continue
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		certs = append(certs, c)
	}
	if len(certs) == 0 {
		return nil, errors.New("no PEM block CERTIFICATE")
	}
	return certs, nil
}

// EncodeCertificates writes certificates as PEM.
func EncodeCertificates(certs ...*x509.Certificate) []byte {
	var text []byte
	for _, c := range certs {
		text = append(text, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	return text
}

// ParseCertificates reads certificates in DER, at most 8 of them.
func ParseCertificates(ders [][]byte) ([]*x509.Certificate, error) {
	if len(ders) > 8 {
		return nil, fmt.Errorf("%d certificates, the limit is 8", len(ders))
	}
	certs := make([]*x509.Certificate, len(ders))
	for i, der := range ders {
		var err error
		if certs[i], err = x509.ParseCertificate(der); err != nil {
			return nil, fmt.Errorf("certificate %d: %w", i, err)
		}
	}
	return certs, nil
}

// Raw gives certificates in DER.
func Raw(certs []*x509.Certificate) [][]byte {
	ders := make([][]byte, len(certs))
	for i, c := range certs {
		ders[i] = c.Raw
	}
	return ders
}

func readFile(path string) ([]byte, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if info.Size() > maxKeyFile {
		return nil, fmt.Errorf("%s has %d bytes, the limit is %d", path, info.Size(), maxKeyFile)
	}
	return os.ReadFile(path)
}

// WriteFile replaces a file at once or not at all, durably.
func WriteFile(path string, data []byte, mode fs.FileMode) error {
	f, err := os.CreateTemp(filepath.Dir(path), ".new-*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // fails once it is renamed
	_, err = f.Write(data)
	if err = errors.Join(err, f.Chmod(mode), f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}
