package pki

import (
	"crypto/x509"
	"encoding/pem"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// Files that cannot be read are tried when they change, and otherwise seldom.
func TestFiles(t *testing.T) {
	dir := t.TempDir()
	cert, key := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	start := time.Now()
	write := func(path string, content []byte, at time.Time) {
		t.Helper()
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(path, at, at); err != nil {
			t.Fatal(err)
		}
	}
	issue := func() (leaf *x509.Certificate, certText, keyText []byte) {
		a := authority(t, start)
		der, err := x509.MarshalPKCS8PrivateKey(a.key)
		if err != nil {
			t.Fatal(err)
		}
		return a.Certificate, EncodeCertificates(a.Certificate), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
	}
	if _, err := NewFiles(cert, key); err == nil {
		t.Error("files that are not there are taken")
	}
	first, text, secret := issue()
	write(cert, text, start)
	write(key, secret, start)
	f, err := NewFiles(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	second, text, secret := issue()
	write(cert, text, start.Add(time.Second))
	broken := []byte(strings.Repeat("x", len(secret)))
	write(key, broken, start.Add(time.Second))
	for _, step := range []struct {
		name string
		at   time.Duration
		do   func()
		want *x509.Certificate
		ok   bool
	}{
		{"broken", 0, nil, first, false},
		{"mended, not to be seen", retryEvery - 1, func() { write(key, secret, start.Add(time.Second)) }, first, false},
		{"tried again", retryEvery, nil, second, true},
		{"not read again", time.Hour, func() { write(key, broken, start.Add(time.Second)) }, second, true},
		{"gone", time.Hour, func() { os.Remove(key) }, second, false},
		{"back", time.Hour, func() { write(key, secret, start.Add(time.Second)) }, second, true},
	} {
		if step.do != nil {
			step.do()
		}
		if f.look(start.Add(step.at)); !f.pair.Leaf.Equal(step.want) || (f.err == nil) != step.ok {
			t.Errorf("%s: %v", step.name, f.err)
		}
	}
}
