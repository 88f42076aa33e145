package identity

import (
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"

	"github.com/dunlin/dunlin/internal/pki"
)

// keyFile holds the key of the device's certificate.
const keyFile = "device.key"

func (d *Device) path(file string) string { return filepath.Join(d.cfg.Dir, file) }

// makeKey gives the key in a file, which it makes where there is none.
func (d *Device) makeKey(file string) (crypto.Signer, error) {
	key, err := pki.ReadKey(d.path(file))
	if !errors.Is(err, fs.ErrNotExist) {
		return key, err
	}
	if key, err = pki.NewKey(); err != nil {
		return nil, err
	}
	return key, pki.WriteKey(d.path(file), key)
}

// keyOf gives the key of a certificate.
func (d *Device) keyOf(c *x509.Certificate) (crypto.Signer, error) {
	key, err := pki.ReadKey(d.path(keyFile))
	if err != nil {
		return nil, err
	}
	id, err := pki.ID(key.Public())
	if err != nil {
		return nil, err
	}
	if id != pki.CertificateID(c) {
		return nil, fmt.Errorf("%s is not the key of the device's certificate", d.path(keyFile))
	}
	return key, nil
}
