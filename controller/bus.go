package controller

import (
	"context"
	"fmt"
	"log/slog"
	"sync"

	"github.com/dunlin/dunlin/controller/broker"
	"github.com/dunlin/dunlin/controller/identity"
	"github.com/dunlin/dunlin/controller/store"
)

// bus is the configured broker.
type bus struct {
	bus      broker.Bus
	url      string                          // that devices connect to
	accounts func(ctx context.Context) error // nil: the broker asks the store itself
	resumed  func()                          // set before Run
	close    func()                          // of one that was not run
}

func openBus(ctx context.Context, c Config, st *store.Store, auth *identity.Authenticator, log *slog.Logger) (*bus, error) {
	if c.BrokerURL == "" {
		e, err := broker.NewEmbedded(broker.EmbeddedConfig{Listen: c.MQTTListen, Auth: auth, Log: log})
		if err != nil {
			return nil, err
		}
		return &bus{bus: e, url: "tcp://" + e.Addr().String(), close: func() { _ = e.Close() }}, nil
	}
	secret, err := password(c)
	if err != nil {
		return nil, err
	}
	address, err := brokerAddress(c.BrokerURL)
	if err != nil {
		return nil, err
	}
	b := &bus{url: "tcp://" + address, close: func() {}}
	e, err := broker.NewExternal(broker.ExternalConfig{
		URL: c.BrokerURL, Username: c.BrokerUsername, Password: secret, Log: log, OnConnect: func() { b.resumed() },
	})
	if err != nil {
		return nil, err
	}
	b.bus = e
	if c.MosquittoPasswordFile == "" {
		return b, nil
	}
	own, err := broker.HashPassword(secret)
	if err != nil {
		return nil, fmt.Errorf("hash the controller's password: %w", err)
	}
	mosquitto := broker.Mosquitto{PasswordFile: c.MosquittoPasswordFile, PIDFile: c.MosquittoPIDFile}
	var mu sync.Mutex // one writer of the file, which then holds all that the store has
	b.accounts = func(ctx context.Context) error {
		mu.Lock()
		defer mu.Unlock()
		accounts, err := st.BrokerAccounts(ctx)
		if err != nil {
			return err
		}
		accounts[broker.ControllerUser] = own
		return mosquitto.Write(accounts)
	}
	// A broker that does not run yet reads the file when it starts.
	if err := b.accounts(ctx); err != nil {
		log.Warn("cannot tell Mosquitto of its accounts", "error", err)
	}
	return b, nil
}
