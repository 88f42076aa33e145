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
		if f.look(start.Add(step.at)); !f.value.Leaf.Equal(step.want) || (f.err == nil) != step.ok {
			t.Errorf("%s: %v", step.name, f.err)
		}
	}
}

func TestRootsFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "roots.pem")
	a, b := authority(t, time.Now()), authority(t, time.Now())
	write := func(certs ...*x509.Certificate) {
		t.Helper()
		if err := WriteFile(path, EncodeCertificates(certs...), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(a.Certificate)
	f, err := NewRootsFile(path, 2)
	if err != nil || !Same(f.Roots(), []*x509.Certificate{a.Certificate}) {
		t.Fatal(err)
	}
	write(a.Certificate, b.Certificate)
	both := f.Roots()
	if err := f.Err(); err != nil || len(both) != 2 {
		t.Errorf("changed: %v, %d certificates", err, len(both))
	}
	leaf, err := a.IssueController([]string{"localhost"}, b.key.Public(), time.Now(), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	for want, certs := range map[string][]*x509.Certificate{
		"the limit is 2":      {a.Certificate, b.Certificate, a.Certificate},
		"is not an authority": {leaf},
		"no PEM block":        nil,
	} {
		write(certs...)
		if err := f.Err(); err == nil || !strings.Contains(err.Error(), want) || !Same(f.Roots(), both) {
			t.Errorf("got %v, want %q", err, want)
		}
	}
}

// A server without a name is nobody: each device's certificate would do.
func TestServerWithoutName(t *testing.T) {
	now := time.Now()
	a := authority(t, now)
	leaf, err := a.IssueDevice("edge-1", a.key.Public(), now, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	if err := verifyServer(Trust{Roots: []*x509.Certificate{a.Certificate}}, a.Chain(leaf), "", now); err == nil {
		t.Error("a device's certificate is taken for a server's")
	}
}
