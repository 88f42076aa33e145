package signing

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// reference gives the reference implementation's command.
func reference(t *testing.T) func(args ...string) (string, error) {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "sh", "fetch-model-signing.sh").Output()
	if e, ok := errors.AsType[*exec.ExitError](err); ok {
		if e.ExitCode() == 75 {
			t.Skipf("the Python Package Index cannot be reached: %s", e.Stderr)
		}
		t.Fatalf("%v: %s", err, e.Stderr)
	} else if err != nil {
		t.Fatal(err)
	}
	dir := strings.TrimSpace(string(out))
	return func(args ...string) (string, error) {
		out, err := exec.CommandContext(t.Context(), filepath.Join(dir, "bin", "python"), append([]string{"-m", "model_signing"}, args...)...).CombinedOutput()
		return string(out), err
	}
}

func write(t *testing.T, path string, data []byte) string {
	t.Helper()
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, data, 0o600)); err != nil {
		t.Fatal(err)
	}
	return path
}

func writePEM(t *testing.T, path, kind string, der []byte, err error) string {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	return write(t, path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}))
}

// What is signed here verifies with the reference implementation, and the
// other way round.
func TestReference(t *testing.T) {
	run := reference(t)
	dir := t.TempDir()
	files := map[string]string{"model.onnx": "weights", "w/data.bin": "more", "w-2.bin": "-", "w.bin": "."}
	folder := filepath.Join(dir, "digits")
	for p, text := range files {
		write(t, filepath.Join(folder, filepath.FromSlash(p)), []byte(text))
	}
	m := manifestOf(files)

	// The reference looks at certificates at the time that they begin.
	from := time.Now().Add(-time.Hour)
	key, ca := newKey(t), newKey(t)
	caCert := authority(t, ca, from.Add(-time.Hour), from.Add(year))
	cert := leaf(t, key.Public(), caCert, ca, from, from.Add(year), x509.ExtKeyUsageCodeSigning)
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	private := writePEM(t, filepath.Join(dir, "key.pem"), "PRIVATE KEY", pkcs8, err)
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	public := writePEM(t, filepath.Join(dir, "key.pub"), "PUBLIC KEY", spki, err)
	certFile := writePEM(t, filepath.Join(dir, "cert.pem"), "CERTIFICATE", cert.Raw, nil)
	caFile := writePEM(t, filepath.Join(dir, "ca.pem"), "CERTIFICATE", caCert.Raw, nil)

	keys := func(public crypto.PublicKey, authority *x509.Certificate) []Key {
		tk, err := NewTrustKey(public, authority, "")
		if err != nil {
			t.Fatal(err)
		}
		k, err := parseKey(tk)
		if err != nil {
			t.Fatal(err)
		}
		return []Key{k}
	}
	for _, method := range []struct {
		name         string
		by           Signer
		verify, sign []string
		keys         []Key
	}{
		{"key", Signer{Key: key}, []string{"--public_key", public}, []string{"--private_key", private}, keys(key.Public(), nil)},
		{"certificate", Signer{key, []*x509.Certificate{cert}}, []string{"--certificate_chain", caFile},
			[]string{"--private_key", private, "--signing_certificate", certFile, "--certificate_chain", caFile}, keys(nil, caCert)},
	} {
		t.Run(method.name, func(t *testing.T) {
			raw := signBundle(t, method.by, 3, m)
			ours := write(t, filepath.Join(dir, method.name+"-ours.sig"), raw)
			verify := func(signature string) (string, error) {
				return run(append(append([]string{"verify", method.name, folder, "--signature", signature}, method.verify...), "--ignore-git-paths")...)
			}
			if out, err := verify(ours); err != nil {
				t.Errorf("the reference refuses what we signed: %v\n%s", err, out)
			}
			i := bytes.Index(raw, []byte(`"payload":"`)) + 100
			raw[i] ^= 1
			if _, err := verify(write(t, filepath.Join(dir, method.name+"-changed.sig"), raw)); err == nil {
				t.Error("the reference takes a changed signature: this test proves nothing")
			}

			theirs := filepath.Join(dir, method.name+"-theirs.sig")
			if out, err := run(append([]string{"sign", method.name, folder, "--signature", theirs}, method.sign...)...); err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			if raw, err = os.ReadFile(theirs); err != nil {
				t.Fatal(err)
			}
			s, err := Parse(raw)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := s.Verify(method.keys, time.Now()); err != nil {
				t.Errorf("we refuse what the reference signed: %v", err)
			}
			if _, err := s.Verify(newSite(t).trust(t).Publishers(), time.Now()); err == nil {
				t.Error("verifies with another's key")
			}
			st, err := s.Statement()
			if err != nil || st.Name != "digits" || len(st.Files) != len(files) {
				t.Fatal(st, err)
			}
			for p, text := range files {
				if st.Files[p] != digest.FromString(text) {
					t.Errorf("file %s: %s", p, st.Files[p])
				}
			}
			// It is of no manifest, so it cannot stand for a version.
			site := newSite(t)
			site.document.ControllerKeys = []*dunlinv1.TrustKey{trustKey(t, key)}
			wantRefused(t, site.trust(t).Admit("digits", 3, m, [][]byte{raw}, now), "it is of")
		})
	}
}
