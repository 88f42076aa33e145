package identity

import (
	"bytes"
	"crypto"
	"fmt"
	"io"
	"os"

	keyfile "github.com/foxboron/go-tpm-keyfiles"
	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
	"github.com/google/go-tpm/tpm2/transport/linuxtpm"
	"github.com/google/go-tpm/tpm2/transport/linuxudstpm"

	"github.com/dunlin/dunlin/internal/pki"
)

// tpmBlock begins a file with a key that only the TPM can use that made it, in
// the form that OpenSSL's providers read too.
const tpmBlock = "-----BEGIN TSS2 PRIVATE KEY-----"

// tpmKey is a key that never leaves a TPM. The TPM is open only while it
// signs: other programs use it too.
type tpmKey struct {
	path   string // of the TPM: a device, or the socket of a simulated one
	key    *keyfile.TPMKey
	public crypto.PublicKey
}

func openTPM(path string) (transport.TPMCloser, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("TPM: %w", err)
	}
	open := linuxtpm.Open
	if info.Mode()&os.ModeSocket != 0 {
		open = linuxudstpm.Open
	}
	t, err := open(path)
	if err != nil {
		return nil, fmt.Errorf("TPM %s: %w", path, err)
	}
	return t, nil
}

// newTPMKey makes an ECDSA key on P-256 in a TPM, and the content of its file.
func newTPMKey(path string) (*tpmKey, []byte, error) {
	t, err := openTPM(path)
	if err != nil {
		return nil, nil, err
	}
	defer t.Close()
	key, err := keyfile.NewLoadableKey(t, tpm2.TPMAlgECC, 256, nil, keyfile.WithDescription("Dunlin device key"))
	if err != nil {
		return nil, nil, fmt.Errorf("make a key in TPM %s: %w", path, err)
	}
	k, err := loadTPMKey(path, key.Bytes())
	return k, key.Bytes(), err
}

// loadTPMKey reads what newTPMKey wrote.
func loadTPMKey(path string, content []byte) (*tpmKey, error) {
	key, err := keyfile.Decode(bytes.TrimSpace(content))
	if err != nil {
		return nil, fmt.Errorf("read TPM key: %w", err)
	}
	public, err := key.PublicKey()
	if err != nil {
		return nil, fmt.Errorf("read TPM key: %w", err)
	}
	return &tpmKey{path, key, public}, pki.CheckPublicKey(public)
}

// Public implements crypto.Signer.
func (k *tpmKey) Public() crypto.PublicKey { return k.public }

// Sign implements crypto.Signer.
func (k *tpmKey) Sign(random io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	t, err := openTPM(k.path)
	if err != nil {
		return nil, err
	}
	defer t.Close()
	none := func() ([]byte, error) { return nil, nil }
	signer := keyfile.NewTPMKeySigner(k.key, none, func() transport.TPMCloser { return t }, func(*keyfile.TPMKey) ([]byte, error) { return none() })
	signature, err := signer.Sign(random, digest, opts)
	if err != nil {
		return nil, fmt.Errorf("sign with TPM %s: %w", k.path, err)
	}
	return signature, nil
}
