// Package identity is who a device is to its controller: its key, the
// certificate that it has for it, and whom it trusts.
package identity

import (
	"bytes"
	"context"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"sync"
	"time"

	"github.com/dunlin/dunlin/agent/state"
	"github.com/dunlin/dunlin/internal/pki"
	"github.com/dunlin/dunlin/internal/program"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// Store keeps who a device is; see state.Store.
type Store interface {
	Identity(context.Context) (state.Identity, error)
	SetIdentity(context.Context, state.Identity) error
	Clock(context.Context) (state.Clock, error)
	SetClock(context.Context, state.Clock) error
}

// Config says who a device is to be, and where what it is gets kept.
type Config struct {
	Dir        string // folder of the key
	Keys       *Keys  // holds the key of a simulated device; nil: Dir does
	InTPM      bool   // new keys are made in the TPM, and only their names are in the folder
	TPM        string // path of the TPM: a device, or the socket of a simulated one
	State      Store
	Name       string // of the device, until it has joined
	Controller string // "https://host:port", or "mqtts://host:port" where nothing else can be reached
	JoinToken  string // needed until it has joined
	Labels     map[string]string
	// Roots are authorities that may vouch for the controller beside its own,
	// and System has the system's count too.
	Roots  []*x509.Certificate
	System bool
	// TrustVersion gives the version of the trust document that the device
	// has, and TakeTrust takes in newer ones; nil: it has none.
	TrustVersion func() uint64
	TakeTrust    func(context.Context, []*dunlinv1.SignedTrust) error
	Log          *slog.Logger
	Now          func() time.Time  // the device's own clock, which may be wrong; nil: time.Now
	OnStep       func(step string) // called before and after each step that changes something on the disk; nil: not
	// Dial opens the connections below TLS; nil: TCP.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
}

// Device is a device's identity. Its methods may be called concurrently.
type Device struct {
	cfg     Config
	pin     *pki.Pin      // nil: the join token has none
	changed chan struct{} // certificate or time are others
	asked   chan struct{} // to renew

	mu     sync.Mutex // guards what follows
	stored state.Identity
	own    holding
	roots  []*x509.Certificate
	clock  clock
	plan   schedule // once the device has joined
	// registry asks the registry of stored.
	registry *http.Client
}

// holding is a certificate, those up to a root, and its key.
type holding struct {
	key   crypto.Signer
	chain []*x509.Certificate // empty until the device has joined
}

func (h holding) tls() *tls.Certificate {
	if len(h.chain) == 0 {
		return nil
	}
	return &tls.Certificate{Certificate: pki.Raw(h.chain), PrivateKey: h.key, Leaf: h.chain[0]}
}

// New gives a device that has joined no controller.
func New(cfg Config) *Device {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Dial == nil {
		cfg.Dial = (&net.Dialer{Timeout: callTimeout}).DialContext
	}
	d := &Device{cfg: cfg, changed: make(chan struct{}, 1), asked: make(chan struct{}, 1), clock: clock{floor: built}}
	if pin, ok := pki.PinIn(cfg.JoinToken); ok {
		d.pin = &pin
	}
	return d
}

// Open reads the identity of a device, where it has one. It changes nothing.
func Open(ctx context.Context, cfg Config) (*Device, error) {
	d := New(cfg)
	var err error
	if d.stored, err = cfg.State.Identity(ctx); err != nil && !errors.Is(err, state.ErrNone) {
		return nil, err
	}
	known, err := cfg.State.Clock(ctx)
	if err != nil {
		return nil, err
	}
	d.clock.floor = later(d.clock.floor, known.Answered)
	d.clock.seen = known.Seen
	if len(d.stored.Certificates) == 0 {
		return d, nil
	}
	if d.own.chain, err = x509.ParseCertificates(d.stored.Certificates); err != nil {
		return nil, fmt.Errorf("stored certificates: %w", err)
	}
	if d.roots, err = x509.ParseCertificates(d.stored.Roots); err != nil {
		return nil, fmt.Errorf("stored roots: %w", err)
	}
	if d.own.key, _, err = d.keyOf(d.own.chain[0]); err != nil {
		return nil, err
	}
	d.plan = scheduleOf(d.own.chain[0])
	d.registry = d.client(d.stored.RegistryURL, d.TLS)
	return d, nil
}

// Close gives up connections that are not in use.
func (d *Device) Close() {
	if _, client := d.Registry(); client != nil {
		client.CloseIdleConnections()
	}
}

// Now gives the time, as well as it is known.
func (d *Device) Now() time.Time {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.clock.now(d.cfg.Now(), d.own.chain...)
}

// Joined says whether the device has a certificate.
func (d *Device) Joined() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.own.chain) > 0
}

// Stored gives the name of the device and where its controller is.
func (d *Device) Stored() state.Identity {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.stored
}

// Certificate gives the device's certificate, or nil until it has joined.
func (d *Device) Certificate() *x509.Certificate {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.own.chain) == 0 {
		return nil
	}
	return d.own.chain[0]
}

// TLSCertificate gives the certificate and its key for connections; an error
// until the device has joined.
func (d *Device) TLSCertificate() (*tls.Certificate, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if own := d.own.tls(); own != nil {
		return own, nil
	}
	return nil, errors.New("the device has not joined yet")
}

// Key says what kind the device's key is, and where it is kept; "" until it
// has one.
func (d *Device) Key() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.own.key == nil {
		return ""
	}
	return describeKey(d.own.key)
}

// Roots gives the controller's authorities; nobody changes them.
func (d *Device) Roots() []*x509.Certificate {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.roots
}

// TLS gives the configuration of connections to a host as this device.
func (d *Device) TLS(host string) *tls.Config {
	return pki.ClientConfig(pki.Client{Trust: d.trust, Now: d.Now, Certificate: func() *tls.Certificate {
		d.mu.Lock()
		defer d.mu.Unlock()
		return d.own.tls()
	}}, host)
}

// BrokerTLS gives the configuration of connections to the broker as this
// device.
func (d *Device) BrokerTLS() *tls.Config { return d.TLS(hostOf(d.Stored().BrokerURL)) }

// hostOf gives the host of a URL that was checked before it was stored.
func hostOf(checked string) string {
	u, err := url.Parse(checked)
	if err != nil {
		panic(err)
	}
	return u.Hostname()
}

// Stranger gives the configuration of connections to a host as nobody: a
// certificate that has expired would end them.
func (d *Device) Stranger(host string) *tls.Config {
	return pki.ClientConfig(pki.Client{Trust: d.trust, Now: d.Now}, host)
}

// timeless is Stranger's for the one question what time it is.
func (d *Device) timeless(host string) *tls.Config {
	return pki.ClientConfig(pki.Client{Now: d.Now, Trust: func() pki.Trust {
		t := d.trust()
		t.AnyTime = true
		return t
	}}, host)
}

// trust gives whom the device believes: the one that its join token names
// until it knows the controller's authorities.
func (d *Device) trust() pki.Trust {
	d.mu.Lock()
	defer d.mu.Unlock()
	t := pki.Trust{Roots: append(d.roots[:len(d.roots):len(d.roots)], d.cfg.Roots...), System: d.cfg.System}
	if len(d.roots) == 0 {
		t.Pin = d.pin
	}
	return t
}

// Registry gives the registry's URL and who asks it as this device; "" until
// it has joined, also where a URL is stored from before devices had
// certificates.
func (d *Device) Registry() (string, *http.Client) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.registry == nil {
		return "", nil
	}
	return d.stored.RegistryURL, d.registry
}

// client gives an HTTP client for the host of a URL. There is no limit to how
// long an answer may take in all.
func (d *Device) client(rawURL string, by func(host string) *tls.Config) *http.Client {
	return &http.Client{
		Transport: &http.Transport{
			Proxy:               http.ProxyFromEnvironment,
			TLSClientConfig:     by(hostOf(rawURL)),
			DialContext:         d.cfg.Dial,
			TLSHandshakeTimeout: callTimeout,
			MaxIdleConnsPerHost: 4, // a download has so many
			MaxConnsPerHost:     8,
			IdleConnTimeout:     10 * time.Second,
			DisableCompression:  true,
		},
		// A redirect could carry a join token to where it does not belong.
		CheckRedirect: func(r *http.Request, _ []*http.Request) error {
			return fmt.Errorf("redirected to %s://%s, which is not followed", r.URL.Scheme, r.URL.Host)
		},
	}
}

// TrustVersion gives the version of the trust document that the device has; 0:
// none.
func (d *Device) TrustVersion() uint64 {
	if d.cfg.TrustVersion == nil {
		return 0
	}
	return d.cfg.TrustVersion()
}

// Introduce adds to a hello what the device is known by and whom it trusts.
func (d *Device) Introduce(h *dunlinv1.Hello) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, root := range d.roots {
		pin := pki.PinOf(root)
		h.RootIds = append(h.RootIds, pin[:])
	}
	h.TrustVersion = d.TrustVersion()
	if len(d.own.chain) > 0 {
		h.CertificateSerial = d.own.chain[0].SerialNumber.Bytes()
	}
}

// granted is what the controller gave the device.
type granted struct {
	chain, roots           []*x509.Certificate
	brokerURL, registryURL string
}

// check reads a controller's answer, and refuses one that is not about this
// device and key, or that does not hold together.
func check(device string, public crypto.PublicKey, now time.Time, id *dunlinv1.Identity, brokerURL, registryURL string) (granted, error) {
	g := granted{brokerURL: brokerURL, registryURL: registryURL}
	if err := errors.Join(program.CheckURL(brokerURL, "mqtts"), program.CheckURL(registryURL, "https")); err != nil {
		return g, err
	}
	var err error
	if g.chain, err = pki.ParseCertificates(id.GetCertificates()); err != nil {
		return g, err
	}
	if g.roots, err = pki.ParseCertificates(id.GetRoots()); err != nil {
		return g, fmt.Errorf("roots: %w", err)
	}
	if len(g.chain) == 0 || len(g.roots) == 0 {
		return g, fmt.Errorf("%d certificates and %d roots, at least one of each is needed", len(g.chain), len(g.roots))
	}
	for _, root := range g.roots {
		if !root.IsCA {
			return g, fmt.Errorf("the root %q is not an authority", root.Subject.CommonName)
		}
	}
	want, err := pki.ID(public)
	if err != nil {
		return g, err
	}
	leaf := g.chain[0]
	if pki.CertificateID(leaf) != want {
		return g, errors.New("the certificate is for another key")
	}
	if name, ok := pki.DeviceOf(leaf); !ok || name != device {
		return g, fmt.Errorf("the certificate is for %q", leaf.Subject.CommonName)
	}
	// It is new: where it does not count yet, the clock here is wrong.
	if err := pki.VerifyChain(g.chain, g.roots, pki.Within(now, g.chain), x509.ExtKeyUsageClientAuth); err != nil {
		return g, fmt.Errorf("the certificate is not one of its roots': %w", err)
	}
	return g, nil
}

// take keeps what the controller gave, with its key.
func (d *Device) take(ctx context.Context, g granted, key crypto.Signer) error {
	id := d.Stored()
	id.BrokerURL, id.RegistryURL = g.brokerURL, g.registryURL
	id.Certificates, id.Roots = bytes.Join(pki.Raw(g.chain), nil), bytes.Join(pki.Raw(g.roots), nil)
	if err := d.step("store certificate", func() error { return d.cfg.State.SetIdentity(ctx, id) }); err != nil {
		return err
	}
	d.mu.Lock()
	if d.registry == nil || d.stored.RegistryURL != id.RegistryURL {
		d.registry = d.client(id.RegistryURL, d.TLS)
	}
	d.stored, d.own, d.roots, d.plan = id, holding{key, g.chain}, g.roots, scheduleOf(g.chain[0])
	d.mu.Unlock()
	d.Close() // the next request is by the new certificate
	return nil
}

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
