// Package controller wires and runs the controller.
package controller

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/dunlin/dunlin/controller/api"
	"github.com/dunlin/dunlin/controller/console"
	"github.com/dunlin/dunlin/controller/dispatch"
	"github.com/dunlin/dunlin/controller/enrol"
	"github.com/dunlin/dunlin/controller/fleet"
	"github.com/dunlin/dunlin/controller/identity"
	"github.com/dunlin/dunlin/controller/inband"
	"github.com/dunlin/dunlin/controller/registry"
	"github.com/dunlin/dunlin/controller/store"
	"github.com/dunlin/dunlin/controller/webhook"
	"github.com/dunlin/dunlin/internal/link"
	"github.com/dunlin/dunlin/internal/pki"
	"github.com/dunlin/dunlin/internal/program"
	"github.com/dunlin/dunlin/internal/telemetry"
	"github.com/dunlin/dunlin/models"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// Files in the data folder.
const (
	storeFile      = "controller.db"
	registryFolder = "registry"
	// AdminTokenFile holds a token of the first administrator.
	AdminTokenFile = "admin-token"
)

// stopGrace bounds how long requests may take to end when the controller stops.
const stopGrace = 5 * time.Second

// bodyOfNobody is how long the body of a request may take of which it is not
// known whose it is.
const bodyOfNobody = 30 * time.Second

// servicesPrefix begins the names of all services.
const servicesPrefix = "dunlin.v1."

// Run runs the controller until ctx is done or a part of it fails.
func Run(ctx context.Context, c Config) (err error) {
	if err := c.check(); err != nil {
		return err
	}
	log := c.Log
	if log == nil {
		if log, err = telemetry.NewLogger(os.Stderr, c.LogLevel, c.LogFormat); err != nil {
			return err
		}
	}
	if err := os.MkdirAll(c.Data, 0o700); err != nil {
		return fmt.Errorf("make data folder: %w", err)
	}
	lock, err := program.LockFolder(c.Data)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, lock.Close()) }()
	if err := checkRestored(c.Data); err != nil {
		return err
	}

	var hooks []webhook.Hook
	if c.Webhooks != "" {
		if hooks, err = webhook.Load(c.Webhooks); err != nil {
			return fmt.Errorf("webhooks: %w", err)
		}
	}

	st, err := store.Open(ctx, filepath.Join(c.Data, storeFile), store.Options{OnStep: c.OnStep})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, st.Close()) }()
	if err := adminToken(ctx, st, filepath.Join(c.Data, AdminTokenFile), log); err != nil {
		return fmt.Errorf("administrator's token: %w", err)
	}
	auth := identity.New(st, identity.Options{OIDC: c.oidc(log), Log: log})
	metrics := c.Metrics
	if metrics == nil {
		metrics = telemetry.NewMetrics()
	}
	t, err := openTrust(ctx, c, st)
	if err != nil {
		return err
	}

	certificates := watchCertificates(t, metrics, log)
	var hooked *webhook.Sender
	if c.Webhooks != "" {
		hooked = webhook.New(st, hooks, metrics, log)
	}

	bus, err := openBus(ctx, c, t.forBroker(brokerAuth{auth, st, log}, func(who, object, reason, from string) {
		st.Refused(ctx, identity.Refusal{Who: who, From: from, Action: "mqtt.refused", Object: object, Reason: reason})
	}), log)
	if err != nil {
		return err
	}
	defer bus.close()
	if c.Wire != nil {
		bus.bus = wire{bus.bus, c.Wire}
	}
	dispatcher := dispatch.New(dispatch.Config{
		Store: st, Bus: bus.bus, Log: log, Metrics: metrics, OnStep: c.OnStep,
		Trusted: t.trusted, Superseded: func() {
			if err := t.changed(ctx, bus); err != nil {
				log.Warn("cannot tell the broker of revoked certificates", "error", err)
			}
		},
	})
	bus.resumed = dispatcher.Resumed

	signer, err := openSigner(ctx, c.Data, st, log, time.Now, dispatcher.Replan, dispatcher.Resumed)
	if err != nil {
		return err
	}
	reg, err := registry.New(registry.Config{Root: filepath.Join(c.Data, registryFolder), Auth: auth, Refusals: st, Versions: versions{st, dispatcher.CachesFor}, Grace: time.Duration(c.RegistryGraceDays) * day, Signatures: signer, Trust: signer.trust, Log: log})
	if err != nil {
		return err
	}
	if err := signer.signAll(ctx, reg); err != nil {
		return err
	}
	fetching := inband.New(inband.Config{
		Bus: bus.bus, Registry: blobs{reg}, Log: log,
		Malformed: func(device string, err error) { dispatcher.Malformed(link.Fetch, device, err) },
	})
	listener, err := net.Listen("tcp", c.Listen)
	if err != nil {
		return fmt.Errorf("%w; --listen chooses another address", err)
	}
	defer listener.Close()
	tls := t.listenerTLS()
	deviceURL := "https://" + listener.Addr().String()
	url := deviceURL
	if program.CheckAddress(listener.Addr().String()) == nil { // in clear, which needs no --ca
		url = "http://" + listener.Addr().String()
	}
	told := "https://" + publicAddress(c.hosts()[0], listener.Addr()) // to devices
	enrolment := enrol.New(enrol.Config{
		Store: st, Authorities: t.Authorities, Lifetime: time.Duration(c.DeviceCertDays) * day, Grace: time.Duration(c.DeviceGraceDays) * day,
		BrokerURL: bus.url, RegistryURL: told,
		Roots: t.deviceRoots, Trust: st.TrustSince, AccountsChanged: func(ctx context.Context) error { return t.changed(ctx, bus) }, Joined: dispatcher.Joined, CutOff: dispatcher.CutOff,
		Refusals: st,
		Now:      time.Now, Log: log,
	})
	stopping := make(chan struct{})
	mux := http.NewServeMux()
	mux.Handle("/v2/", reg)
	mux.Handle("/metrics", api.Protect(auth, log, identity.Metrics, telemetry.Handler(metrics)))
	mux.HandleFunc("/healthz", func(w http.ResponseWriter, r *http.Request) { _, _ = io.WriteString(w, "ok\n") })
	services := api.New(api.Config{
		Store: st, Dispatch: dispatcher, Registry: reg, Auth: auth, Log: log, Enrol: enrolment, Authorities: t.Authorities,
		Version: program.Version(), SigningKey: signer.id, AccountsChanged: func(ctx context.Context) error { return t.changed(ctx, bus) }, Stopping: stopping,
	})
	pages := console.New(console.Config{API: services, Log: log, DeviceURL: told, Stopping: stopping})
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		if strings.HasPrefix(r.URL.Path, "/"+servicesPrefix) {
			services.ServeHTTP(w, r)
			return
		}
		pages.ServeHTTP(w, r)
	})
	server := newServer(mux, log)
	server.RegisterOnShutdown(func() { close(stopping) })

	log.Info("controller is ready", "url", url, "devices", told, "broker", bus.url, "data", c.Data, "version", program.Version())
	if c.OnReady != nil {
		c.OnReady(Addresses{URL: url, DeviceURL: deviceURL, Broker: bus.url})
	}
	components := []component{
		{"audit", func(ctx context.Context) error { return st.RunRefusals(ctx, log) }},
		{"certificates", func(ctx context.Context) error {
			return certificates.run(ctx, func(ctx context.Context) {
				if err := t.changed(ctx, bus); err != nil {
					log.Warn("cannot tell of other authorities", "error", err)
				}
				dispatcher.Resumed()
			})
		}},
		{"dispatch", dispatcher.Run},
		{"history", historyOf(c, st, dispatcher, log).run},
		{"in-band delivery", fetching.Run},
		{"enrolment", func(ctx context.Context) error { return enrolment.Run(ctx, bus.bus.Publish) }},
		{"broker", func(ctx context.Context) error {
			return bus.run(ctx, func(topic string, payload []byte) {
				if user, nonce, err := link.ParseJoinUp(topic); err == nil {
					enrolment.Take(user, nonce, payload)
					return
				}
				if device, kind, err := link.ParseUp(topic); err == nil && kind == link.Fetch {
					fetching.Handle(device, payload)
					return
				}
				dispatcher.Handle(topic, payload)
			})
		}},
		{"registry", reg.Run},
		{"signer", signer.run},
		{"http", func(ctx context.Context) error { return serve(ctx, server, split(listener, tls)) }},
	}
	if hooked != nil {
		components = append(components, component{"webhooks", hooked.Run})
	}
	if t.acme != nil {
		components = append(components, component{"acme", func(ctx context.Context) error { return t.acme.run(ctx, log) }})
	}
	return runAll(ctx, components)
}

// component is a part that runs until its context is done.
type component struct {
	name string
	run  func(context.Context) error
}

// runAll starts the components in order and, when ctx is done or one of them
// ends, stops them in reverse order, one after the other.
func runAll(ctx context.Context, components []component) error {
	type running struct {
		cancel context.CancelFunc
		done   chan struct{}
		err    error
	}
	ended := make(chan struct{}, len(components))
	var started []*running
	for _, c := range components {
		own, cancel := context.WithCancel(context.WithoutCancel(ctx))
		r := &running{cancel: cancel, done: make(chan struct{})}
		started = append(started, r)
		go func() { // waited for below
			defer close(r.done)
			defer func() { ended <- struct{}{} }()
			if err := c.run(own); err != nil {
				r.err = fmt.Errorf("%s: %w", c.name, err)
			} else if own.Err() == nil {
				r.err = fmt.Errorf("%s ended by itself", c.name)
			}
		}()
	}
	select {
	case <-ctx.Done():
	case <-ended:
	}
	var errs []error
	for i := len(started) - 1; i >= 0; i-- {
		started[i].cancel()
		<-started[i].done
		errs = append(errs, started[i].err)
	}
	return errors.Join(errs...)
}

func newServer(h http.Handler, log *slog.Logger) *http.Server {
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetHTTP2(true)
	protocols.SetUnencryptedHTTP2(true) // gRPC on loopback
	return &http.Server{
		Handler: identity.Impatient(h, bodyOfNobody), Protocols: protocols, ReadHeaderTimeout: openTimeout, IdleTimeout: 2 * time.Minute,
		MaxHeaderBytes: 64 << 10, ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
}

func serve(ctx context.Context, server *http.Server, l net.Listener) error {
	failed := make(chan error, 1)
	go func() { failed <- server.Serve(l) }()
	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
	}
	grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopGrace)
	defer cancel()
	if err := server.Shutdown(grace); err != nil {
		_ = server.Close() // requests that outlast the grace are cut off
	}
	<-failed
	return nil
}

// adminToken makes sure that the file at path holds a valid token: it makes a
// new one where it does not, as at the first start.
func adminToken(ctx context.Context, st *store.Store, path string, log *slog.Logger) error {
	b, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	_, err = st.TokenOwner(ctx, identity.Hash(strings.TrimSpace(string(b))))
	if !errors.Is(err, identity.ErrUnknown) {
		return err
	}
	token, hash := identity.NewToken("dunlin_")
	if err := st.AddToken(ctx, "admin", identity.Admin, hash); err != nil {
		return err
	}
	if err := pki.WriteFile(path, []byte(token+"\n"), 0o600); err != nil {
		return err
	}
	log.Info("made a token for the administrator", "file", path)
	return nil
}

// versions is the store as the registry sees it.
type versions struct {
	store *store.Store
	// cachesFor says whether a device may fetch a model for others; nil: none may.
	cachesFor func(ctx context.Context, device, model string) (bool, error)
}

func (v versions) CreateVersion(ctx context.Context, n registry.NewVersion) (int64, bool, error) {
	s := store.Version{Model: n.Model, Version: n.Want, Digest: n.Digest, Size: n.Manifest.Size, Opset: n.Config.Opset, Bundle: fleet.BundleOf(n.Config, n.WeightTypes), CreatedBy: n.By}
	if n.Source != n.Digest {
		s.Source = n.Source
	}
	for _, i := range n.Config.Inputs {
		s.Inputs = append(s.Inputs, i.String())
	}
	for _, o := range n.Config.Outputs {
		s.Outputs = append(s.Outputs, o.String())
	}
	made, created, err := v.store.CreateVersion(ctx, s)
	if c, ok := errors.AsType[*store.VersionExistsError](err); ok {
		return 0, false, registry.ErrVersionExists{Model: c.Model, Version: c.Version, Have: c.Digest}
	}
	return made.Version, created, err
}

func (v versions) VersionDigest(ctx context.Context, model string, version int64) (string, bool, error) {
	found, err := v.store.Version(ctx, model, version)
	if errors.Is(err, store.ErrNotFound) {
		return "", false, nil
	}
	return found.Digest, err == nil, err
}

func (v versions) Given(ctx context.Context, device, model string) (bool, error) {
	documents, err := v.store.Documents(ctx, []string{device})
	given := slices.ContainsFunc(documents[device].GetVersions(), func(d *dunlinv1.DesiredVersion) bool { return d.GetModel() == model })
	if model == models.AgentModel {
		given = documents[device].GetAgent() != nil
	}
	if err != nil || given || v.cachesFor == nil {
		return given, err
	}
	return v.cachesFor(ctx, device, model)
}

// blobs is the registry as devices read it over MQTT.
type blobs struct{ registry *registry.Registry }

func (b blobs) Open(ctx context.Context, device, model string, d digest.Digest, manifest bool) (inband.Blob, int64, error) {
	f, size, err := b.registry.Open(ctx, device, model, d, manifest)
	if err == nil {
		return f, size, nil
	}
	if _, denied := errors.AsType[*identity.DeniedError](err); denied {
		err = fmt.Errorf("%w: %w", inband.ErrRefused, err)
	} else if errors.Is(err, registry.ErrNotFound) {
		err = fmt.Errorf("%w: %w", inband.ErrUnknown, err)
	}
	return nil, 0, err
}

func (v versions) Manifests(ctx context.Context) ([]registry.Manifest, error) {
	kept, err := v.store.Manifests(ctx)
	all := make([]registry.Manifest, len(kept))
	for i, m := range kept {
		all[i] = registry.Manifest{Model: m.Model, Digest: digest.Digest(m.Digest)}
	}
	return all, err
}

// password gives the controller's own for an external broker.
func password(c Config) (string, error) {
	if c.BrokerPasswordFile == "" {
		return "", nil
	}
	b, err := os.ReadFile(c.BrokerPasswordFile)
	if err != nil {
		return "", fmt.Errorf("password for the broker: %w", err)
	}
	return strings.TrimRight(string(b), "\r\n"), nil
}
