package controller

import (
	"context"
	"crypto/subtle"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/dunlin/dunlin/controller/broker"
	"github.com/dunlin/dunlin/controller/identity"
	"github.com/dunlin/dunlin/controller/store"
	"github.com/dunlin/dunlin/internal/link"
)

// brokerTrust is how the controller and those who come by its broker know each
// other.
type brokerTrust struct {
	authorities
	server *tls.Config // of the embedded broker
	auth   broker.Authenticator
	// refused may be nil.
	refused func(who, object, reason, from string)
	// revoked are the devices that may do nothing any more, joinTokens the
	// broker.HashPassword of each join token that can still be used, by its id.
	revoked    func(context.Context) ([]string, error)
	joinTokens func(context.Context) (map[string]string, error)
}

type authorities interface {
	Roots() []*x509.Certificate
	// BrokerCertificate is for the names and addresses of this machine.
	BrokerCertificate() (*tls.Certificate, error)
	ClientTLS(serverName string) *tls.Config
	// DeviceTLS is how to connect as a device, for a moment.
	DeviceTLS(device, serverName string) (*tls.Config, error)
	// CRLs are the lists of revoked certificates of all authorities, which
	// have not run out: the same ones while nothing is revoked and they have
	// time left.
	CRLs(ctx context.Context) ([][]byte, error)
}

// mosquittoEvery is how often the files of Mosquitto are looked at, besides
// when something is known to have changed: certificates are renewed, join
// tokens run out.
const mosquittoEvery = time.Minute

// bus is the configured broker.
type bus struct {
	bus     broker.Bus
	url     string                          // that devices connect to
	changed func(ctx context.Context) error // after a change of who may connect; nil: the broker asks itself
	resumed func()                          // set before Run
	close   func()                          // of one that was not run
	log     *slog.Logger
}

func openBus(ctx context.Context, c Config, t brokerTrust, log *slog.Logger) (*bus, error) {
	if t.authorities == nil || t.auth == nil {
		return nil, errors.New("a broker needs certificate authorities")
	}
	if c.BrokerURL == "" {
		e, err := broker.NewEmbedded(broker.EmbeddedConfig{
			Listen: c.MQTTListen, TLS: t.server, Auth: t.auth, Refused: t.refused, Log: log,
		})
		if err != nil {
			return nil, err
		}
		return &bus{bus: e, url: "mqtts://" + publicAddress(c.hosts()[0], e.Addr()), close: func() { _ = e.Close() }, log: log}, nil
	}
	secret, err := password(c)
	if err != nil {
		return nil, err
	}
	address, secure, err := brokerAddress(c.BrokerURL)
	if err != nil {
		return nil, err
	}
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return nil, fmt.Errorf("broker-url: %w", err)
	}
	b := &bus{url: "tcp://" + address, close: func() {}, log: log}
	cfg := broker.ExternalConfig{
		URL: c.BrokerURL, Username: c.BrokerUsername, Password: secret, Log: log, OnConnect: func() { b.resumed() },
	}
	if secure {
		b.url, cfg.TLS = "mqtts://"+address, t.ClientTLS(host)
		cfg.DeviceTLS = func(device string) (*tls.Config, error) { return t.DeviceTLS(device, host) }
	}
	if b.bus, err = broker.NewExternal(cfg); err != nil {
		return nil, err
	}
	if c.MosquittoDir == "" {
		return b, nil
	}
	mosquitto := &broker.Mosquitto{Dir: c.MosquittoDir}
	var mu sync.Mutex // one writer of the files, which then hold all that the store has
	b.changed = func(ctx context.Context) error {
		mu.Lock()
		defer mu.Unlock()
		files, err := t.mosquitto(ctx, host)
		if err != nil {
			return err
		}
		return mosquitto.Write(files)
	}
	// A broker that does not run yet reads the files when it starts.
	if err := b.changed(ctx); err != nil {
		log.Warn("cannot tell Mosquitto who may connect", "error", err)
	}
	return b, nil
}

// wire is a bus whose messages arrive as change has them.
type wire struct {
	broker.Bus
	change func(topic string, payload []byte) []byte
}

func (w wire) Run(ctx context.Context, handle broker.Handler) error {
	return w.Bus.Run(ctx, func(topic string, payload []byte) {
		if payload = w.change(topic, payload); payload != nil {
			handle(topic, payload)
		}
	})
}

func (w wire) Publish(topic string, payload []byte) error {
	if payload = w.change(topic, payload); payload == nil {
		return nil
	}
	return w.Bus.Publish(topic, payload)
}

// run carries messages, and keeps Mosquitto's files.
func (b *bus) run(ctx context.Context, handle broker.Handler) error {
	var keeping sync.WaitGroup
	defer keeping.Wait()
	if b.changed != nil {
		keeping.Go(func() {
			tick := time.NewTicker(mosquittoEvery)
			defer tick.Stop()
			for {
				select {
				case <-tick.C:
				case <-ctx.Done():
					return
				}
				if err := b.changed(ctx); err != nil && ctx.Err() == nil {
					b.log.Warn("cannot tell Mosquitto who may connect", "error", err)
				}
			}
		})
	}
	return b.bus.Run(ctx, handle)
}

// mosquitto gives what Mosquitto goes by, under a name that devices call it by.
func (t brokerTrust) mosquitto(ctx context.Context, host string) (files broker.MosquittoFiles, err error) {
	files.Roots = t.Roots()
	if files.Certificate, err = t.BrokerCertificate(); err != nil {
		return files, err
	}
	leaf, err := x509.ParseCertificate(files.Certificate.Certificate[0])
	if err == nil {
		err = leaf.VerifyHostname(host)
	}
	if err != nil {
		return files, fmt.Errorf("certificate for Mosquitto: %w", err)
	}
	if files.CRLs, err = t.CRLs(ctx); err != nil {
		return files, err
	}
	if files.Revoked, err = t.revoked(ctx); err != nil {
		return files, err
	}
	files.JoinTokens, err = t.joinTokens(ctx)
	return files, err
}

// brokerAuth says who may connect to the embedded broker.
type brokerAuth struct {
	*identity.Authenticator
	store *store.Store
	log   *slog.Logger
}

// Enrolling lets in who holds a join token, and who renews, whom anybody can
// say to be: each of their requests proves what it asks for.
func (a brokerAuth) Enrolling(ctx context.Context, user, password, from string) bool {
	if user == link.RenewUser {
		return subtle.ConstantTimeCompare([]byte(password), []byte(link.RenewUser)) == 1
	}
	attempt := identity.Attempt{From: from, Credential: password}
	if a.Guard().Check(attempt) != nil {
		return false
	}
	known := user == link.TokenUser(password)
	if known {
		var err error
		if known, err = a.store.JoinTokenKnown(ctx, identity.Hash(password)); err != nil {
			a.log.Error("cannot look a join token up", "error", err)
			return false
		}
	}
	if known {
		a.Guard().Right(attempt)
	} else {
		a.Guard().Wrong(attempt)
	}
	return known
}
