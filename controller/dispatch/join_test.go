package dispatch

import (
	"context"
	"crypto/x509"
	"sync"
	"time"

	"github.com/dunlin/dunlin/controller/store"
	"github.com/dunlin/dunlin/internal/pki"
)

// vouch makes certificates, all for one key.
var vouch = sync.OnceValues(func() (*pki.Authority, error) {
	key, err := pki.NewKey()
	if err != nil {
		return nil, err
	}
	return pki.NewAuthority(key, time.Now(), 10*365*24*time.Hour)
})

// joinDevice makes a device known.
func joinDevice(ctx context.Context, s *store.Store, token [32]byte, device string) error {
	a, err := vouch()
	if err != nil {
		return err
	}
	_, err = s.Join(ctx, store.Join{Token: token, Device: device, Key: device, Issue: func() (*x509.Certificate, error) {
		return a.IssueDevice(device, a.Certificate.PublicKey, time.Now(), 365*24*time.Hour)
	}})
	return err
}
