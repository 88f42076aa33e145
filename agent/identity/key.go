package identity

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"

	"github.com/dunlin/dunlin/internal/pki"
)

// Where keys are: that of the device's certificate, and that of the next one,
// which is the device's from the moment on at which its certificate is stored.
const (
	keyFile     = "device.key"
	nextKeyFile = "device.key.next"
)

// Keys holds the keys of a simulated device. The zero value is empty.
type Keys struct {
	mu   sync.Mutex // guards what follows
	keys map[string]crypto.Signer
}

func (k *Keys) get(file string) (crypto.Signer, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if key := k.keys[file]; key != nil {
		return key, nil
	}
	return nil, fmt.Errorf("read key %s: %w", file, fs.ErrNotExist)
}

func (k *Keys) put(file string, key crypto.Signer) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.keys == nil {
		k.keys = map[string]crypto.Signer{}
	}
	k.keys[file] = key
}

// rename gives the key of one file to another.
func (k *Keys) rename(from, to string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.keys[to] = k.keys[from]
	delete(k.keys, from)
}

func (d *Device) path(file string) string { return filepath.Join(d.cfg.Dir, file) }

// makeKey gives the key in a file, which it makes where there is none.
func (d *Device) makeKey(file string) (crypto.Signer, error) {
	key, err := d.readKey(file)
	if !errors.Is(err, fs.ErrNotExist) {
		return key, err
	}
	if d.cfg.InTPM {
		key, content, err := newTPMKey(d.cfg.TPM)
		if err != nil {
			return nil, err
		}
		return key, d.step("write key", func() error { return pki.WriteFile(d.path(file), content, 0o600) })
	}
	if key, err = pki.NewKey(); err != nil {
		return nil, err
	}
	if d.cfg.Keys != nil {
		return key, d.step("write key", func() error { d.cfg.Keys.put(file, key); return nil })
	}
	return key, d.step("write key", func() error { return pki.WriteKey(d.path(file), key) })
}

// nextKey gives the key of the next certificate, and the request for it. What
// cannot be read or used, as with another TPM, is nobody's: settle has found
// the certificate's own. Another key is made in its place.
func (d *Device) nextKey(device string) (key crypto.Signer, csr []byte, err error) {
	for range 2 {
		if key, err = d.makeKey(nextKeyFile); err == nil {
			csr, err = pki.Request(key, device)
		}
		if err == nil || os.Remove(d.path(nextKeyFile)) != nil {
			break
		}
	}
	return key, csr, err
}

// readKey reads a key, wherever it is kept.
func (d *Device) readKey(file string) (crypto.Signer, error) {
	if d.cfg.Keys != nil {
		return d.cfg.Keys.get(file)
	}
	content, err := os.ReadFile(d.path(file))
	if err != nil {
		return nil, fmt.Errorf("read key: %w", err)
	}
	if bytes.HasPrefix(content, []byte(tpmBlock)) {
		return loadTPMKey(d.cfg.TPM, content)
	}
	return pki.ReadKey(d.path(file))
}

// keyOf gives the key of a certificate, and the file that it is in.
func (d *Device) keyOf(c *x509.Certificate) (key crypto.Signer, file string, err error) {
	for _, file := range []string{keyFile, nextKeyFile} {
		key, err := d.readKey(file)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		} else if err != nil {
			return nil, "", err
		}
		id, err := pki.ID(key.Public())
		if err != nil {
			return nil, "", err
		}
		if id == pki.CertificateID(c) {
			return key, file, nil
		}
	}
	return nil, "", fmt.Errorf("%s is not there, or is not the key of the device's certificate: put it back, or join again with an empty --data folder", d.path(keyFile))
}

// settle puts the key of the certificate where it belongs, which a renewal
// that was cut short has left undone.
func (d *Device) settle() error {
	_, file, err := d.keyOf(d.Certificate())
	if err != nil || file == keyFile {
		return err
	}
	return d.step("switch key", func() error {
		if d.cfg.Keys != nil {
			d.cfg.Keys.rename(nextKeyFile, keyFile)
			return nil
		}
		if err := os.Rename(d.path(nextKeyFile), d.path(keyFile)); err != nil {
			return err
		}
		dir, err := os.Open(d.cfg.Dir)
		if err != nil {
			return err
		}
		return errors.Join(dir.Sync(), dir.Close())
	})
}

// step does what changes something on the disk.
func (d *Device) step(name string, do func() error) error {
	if d.cfg.OnStep != nil {
		d.cfg.OnStep("before " + name)
		defer d.cfg.OnStep("after " + name)
	}
	return do()
}

// describeKey says what kind a key is, and where it is kept.
func describeKey(key crypto.Signer) string {
	kind := "Ed25519"
	if k, ok := key.Public().(*ecdsa.PublicKey); ok {
		kind = "ECDSA " + k.Curve.Params().Name
	}
	if k, ok := key.(*tpmKey); ok {
		return kind + " in TPM " + k.path
	}
	return kind + " in a file"
}
