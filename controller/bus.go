package controller

import (
	"context"
	"crypto/subtle"
	"crypto/x509"
	"fmt"
	"log/slog"
	"strings"
	"sync"

	"github.com/dunlin/dunlin/controller/broker"
	"github.com/dunlin/dunlin/controller/identity"
	"github.com/dunlin/dunlin/controller/store"
	"github.com/dunlin/dunlin/internal/link"
)

// bus is the configured broker.
type bus struct {
	bus      broker.Bus
	url      string                          // that devices connect to
	accounts func(ctx context.Context) error // tells who may connect; nil: the broker asks the store itself
	resumed  func()                          // set before Run
	close    func()                          // of one that was not run
}

// brokerAuth says who may connect to the embedded broker.
type brokerAuth struct {
	*identity.Authenticator
	store *store.Store
	log   *slog.Logger
}

func (a brokerAuth) Device(ctx context.Context, cert *x509.Certificate) (string, error) {
	return a.Authenticator.Device(ctx, cert)
}

// Enrolling lets in who holds a join token, and whom anybody can say to be:
// each of their requests proves what it asks for.
func (a brokerAuth) Enrolling(ctx context.Context, user, password, _ string) bool {
	if user == link.RenewUser {
		return subtle.ConstantTimeCompare([]byte(password), []byte(link.RenewUser)) == 1
	}
	hash := identity.Hash(password)
	if user != link.JoinUser(store.TokenID(hash)) {
		return false
	}
	known, err := a.store.JoinTokenKnown(ctx, hash)
	if err != nil {
		a.log.Error("cannot look a join token up", "error", err)
	}
	return known && err == nil
}

func openBus(ctx context.Context, c Config, st *store.Store, auth *identity.Authenticator, t *trust, refused func(who, object, reason, from string), log *slog.Logger) (*bus, error) {
	if c.BrokerURL == "" {
		e, err := broker.NewEmbedded(broker.EmbeddedConfig{
			Listen: c.MQTTListen, TLS: t.serverTLS(), Auth: brokerAuth{auth, st, log}, Refused: refused, Log: log,
		})
		if err != nil {
			return nil, err
		}
		return &bus{bus: e, url: "mqtts://" + publicAddress(c.hosts()[0], e.Addr()), close: func() { _ = e.Close() }}, nil
	}
	return nil, fmt.Errorf("to do %s %v", strings.ToUpper(""), &sync.Mutex{})
}
