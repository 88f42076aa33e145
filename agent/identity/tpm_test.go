package identity

import (
	"bytes"
	"crypto/x509"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/dunlin/dunlin/internal/pki"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// startTPM starts a simulated TPM and gives its socket.
func startTPM(t *testing.T) string {
	t.Helper()
	if _, err := exec.LookPath("swtpm"); err != nil {
		t.Skip("there is no swtpm: install Debian's package swtpm, best by internal/e2e/setup.sh")
	}
	dir, err := os.MkdirTemp("", "tpm") // t.TempDir's paths are too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	socket := filepath.Join(dir, "s")
	var out bytes.Buffer
	cmd := exec.CommandContext(t.Context(), "swtpm", "socket", "--tpm2", "--tpmstate", "dir="+dir,
		"--server", "type=unixio,path="+socket, "--ctrl", "type=unixio,path="+filepath.Join(dir, "c"), "--flags", "not-need-init,startup-clear")
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if t.Failed() {
			t.Logf("swtpm: %s", &out)
		}
	})
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if _, err := os.Stat(socket); err == nil {
			return socket
		}
		if time.Now().After(end) {
			t.Fatalf("swtpm makes no socket: %s", &out)
		}
	}
}

// A device whose key is in a TPM joins, connects, renews, and starts again;
// another TPM's key is of no use to it.
func TestTPM(t *testing.T) {
	w := &watch{at: time.Now()}
	c := serveAt(t, w)
	cfg := newConfig(t, c)
	cfg.InTPM, cfg.TPM = true, startTPM(t)
	d := join(t, cfg)
	connects := func(d *Device) error {
		url, client := d.Registry()
		resp, err := client.Get(url)
		if err == nil {
			resp.Body.Close()
		}
		return err
	}
	if err := connects(d); err != nil {
		t.Error(err)
	}
	raw, err := os.ReadFile(filepath.Join(cfg.Dir, keyFile))
	if err != nil || !bytes.HasPrefix(raw, []byte(tpmBlock)) {
		t.Errorf("%s holds %q, %v", keyFile, raw, err)
	}
	if info, err := os.Stat(filepath.Join(cfg.Dir, keyFile)); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info, err)
	}
	if got, want := d.Key(), "ECDSA P-256 in TPM "+cfg.TPM; got != want {
		t.Errorf("key %q, want %q", got, want)
	}
	before := pki.CertificateID(d.Certificate())
	if err := d.renew(t.Context()); err != nil || pki.CertificateID(d.Certificate()) == before {
		t.Errorf("renewed: %v", err)
	}
	again := open(t, cfg)
	if err := connects(again); err != nil {
		t.Error(err)
	}
	// Keys move into a file, and back, with a renewal.
	for _, in := range []bool{false, true} {
		again.cfg.InTPM = in
		if err := again.renew(t.Context()); err != nil || strings.Contains(again.Key(), "TPM") != in {
			t.Errorf("in the TPM: %v: %s, %v", in, again.Key(), err)
		}
	}
	cfg.TPM = startTPM(t)
	stolen := open(t, cfg)
	if err := connects(stolen); err == nil || !strings.Contains(err.Error(), "TPM") {
		t.Errorf("with another TPM: %v", err)
	}
	cfg.TPM = filepath.Join(t.TempDir(), "none")
	if err := connects(open(t, cfg)); err == nil || !strings.Contains(err.Error(), "TPM") {
		t.Errorf("without a TPM: %v", err)
	}
	fresh := newConfig(t, c)
	fresh.InTPM, fresh.TPM, fresh.Name = true, cfg.TPM, "edge-2"
	if err := open(t, fresh).Join(t.Context(), &dunlinv1.DeviceInfo{}); err == nil || !strings.Contains(err.Error(), "TPM") {
		t.Errorf("a join without a TPM: %v", err)
	}
}

func FuzzLoadTPMKey(f *testing.F) {
	f.Add([]byte(tpmBlock + "\nMAA=\n-----END TSS2 PRIVATE KEY-----\n"))
	f.Fuzz(func(t *testing.T, content []byte) {
		if k, err := loadTPMKey("x", content); err == nil {
			if _, err := x509.MarshalPKIXPublicKey(k.Public()); err != nil {
				t.Error(err)
			}
		}
	})
}
