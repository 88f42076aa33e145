package controller

import (
	"cmp"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/url"
	"os"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/crypto/acme"

	"github.com/dunlin/dunlin/controller/broker"
	"github.com/dunlin/dunlin/controller/identity"
	"github.com/dunlin/dunlin/controller/store"
	"github.com/dunlin/dunlin/internal/program"
)

// Config is the controller's configuration. Its yaml names are the names of
// the flags too, and, in capitals with _ for - and DUNLIN_CONTROLLER_ before
// them, those of the environment variables.
type Config struct {
	Data       string `yaml:"data"`
	Listen     string `yaml:"listen"`
	MQTTListen string `yaml:"mqtt-listen"`

	Hosts           string `yaml:"hosts"`             // names and addresses by which the controller is reached, comma apart
	TLSCert         string `yaml:"tls-cert"`          // PEM file of a certificate of another authority; "": the controller's own
	TLSKey          string `yaml:"tls-key"`           // PEM file of its key
	TLSCA           string `yaml:"tls-ca"`            // PEM file of that authority, for devices; "": they trust the system's
	ACMEDomains     string `yaml:"acme-domains"`      // names for which a certificate is asked for by ACME, comma apart
	ACMEDirectory   string `yaml:"acme-directory"`    // URL of the ACME server's directory
	ACMEEmail       string `yaml:"acme-email"`        // whom the ACME server may write to
	ACMECA          string `yaml:"acme-ca"`           // PEM file of the roots by which the ACME server is known; "": the system's
	DeviceCertDays  int    `yaml:"device-cert-days"`  // how long a device's certificate counts
	DeviceGraceDays int    `yaml:"device-grace-days"` // how long after that it can be renewed

	Webhooks string `yaml:"webhooks"` // YAML file of endpoints that are told what happens; "": none

	RegistryGraceDays int `yaml:"registry-grace-days"` // for which what no version refers to stays in the registry; 0: for ever

	TelemetryHours    int `yaml:"telemetry-hours"`     // for which a sample a minute of each device is kept
	TelemetryDays     int `yaml:"telemetry-days"`      // for which one each 10 minutes is kept
	TelemetryLongDays int `yaml:"telemetry-long-days"` // for which one an hour is kept
	EventDays         int `yaml:"event-days"`          // for which events are kept; 0: as long as there is room
	AuditDays         int `yaml:"audit-days"`          // for which audit records are kept; 0: as long as there is room

	BrokerURL          string `yaml:"broker-url"`
	BrokerUsername     string `yaml:"broker-username"`
	BrokerPasswordFile string `yaml:"broker-password-file"`
	MosquittoDir       string `yaml:"mosquitto-dir"`

	OIDCIssuer     string `yaml:"oidc-issuer"`
	OIDCClientID   string `yaml:"oidc-client-id"`
	OIDCNameClaim  string `yaml:"oidc-name-claim"`
	OIDCRoleClaim  string `yaml:"oidc-role-claim"`
	OIDCScopeClaim string `yaml:"oidc-scope-claim"`

	LogLevel  string `yaml:"log-level"`
	LogFormat string `yaml:"log-format"`

	// What follows is for callers of Run; all may be nil.

	Log *slog.Logger `yaml:"-"` // instead of LogLevel and LogFormat on stderr
	// OnStep is called before and after each step that is persisted or
	// published, with its name: a test ends the process there.
	OnStep func(step string) `yaml:"-"`
	// Metrics takes what the controller exports.
	Metrics *prometheus.Registry `yaml:"-"`
	// Wire gives what is to arrive of each message between the controller and
	// its devices: a test has them speak as another release does. nil drops it.
	Wire func(topic string, payload []byte) []byte `yaml:"-"`
	// OnReady is called when everything listens.
	OnReady func(Addresses) `yaml:"-"`
}

// Addresses is where a running controller listens.
type Addresses struct {
	URL       string // of the API and the registry, for users
	DeviceURL string // of the same for devices, which always speak TLS
	Broker    string // URL that devices connect to
}

const environment = "DUNLIN_CONTROLLER_"

func (c *Config) settings() []program.Setting {
	return []program.Setting{
		{Name: "data", Usage: "`folder` of everything that the controller keeps", Value: &c.Data},
		{Name: "listen", Usage: "`host:port` of the API and the registry", Value: &c.Listen},
		{Name: "mqtt-listen", Usage: "`host:port` of the embedded broker", Value: &c.MQTTListen},
		{Name: "hosts", Usage: "`names` and addresses by which the controller is reached, comma apart; the first is the one that devices are told; without any, that of the listener, or this machine's", Value: &c.Hosts},
		{Name: "tls-cert", Usage: "PEM `file` of a certificate of another authority than the controller's own", Value: &c.TLSCert},
		{Name: "tls-key", Usage: "PEM `file` of that certificate's key", Value: &c.TLSKey},
		{Name: "tls-ca", Usage: "PEM `file` of that authority, by which devices know the controller; without it they must trust it already", Value: &c.TLSCA},
		{Name: "acme-domains", Usage: "`names`, comma apart, for which certificates are asked for by ACME, which accepts the terms of its server; --listen must be reached at port 443 of each", Value: &c.ACMEDomains},
		{Name: "acme-directory", Usage: "`URL` of the directory of the ACME server", Value: &c.ACMEDirectory},
		{Name: "acme-email", Usage: "`address` that the ACME server may write to", Value: &c.ACMEEmail},
		{Name: "acme-ca", Usage: "PEM `file` of the roots by which a private ACME server is known, instead of the system's", Value: &c.ACMECA},
		{Name: "device-cert-days", Usage: "`days` that a device's certificate counts; it is renewed when half of them are over", Value: &c.DeviceCertDays},
		{Name: "device-grace-days", Usage: "`days` after its end in which a device's certificate can still be renewed", Value: &c.DeviceGraceDays},
		{Name: "webhooks", Usage: "YAML `file`, mode 0600, of endpoints that are told of alarms, rollouts and other events", Value: &c.Webhooks},
		{Name: "registry-grace-days", Usage: "`days` for which what no version refers to stays in the registry, before it is deleted; 0: for ever", Value: &c.RegistryGraceDays},
		{Name: "telemetry-hours", Usage: "`hours` for which one sample a minute of each device's figures is kept", Value: &c.TelemetryHours},
		{Name: "telemetry-days", Usage: "`days` for which one sample each 10 minutes is kept", Value: &c.TelemetryDays},
		{Name: "telemetry-long-days", Usage: "`days` for which one sample an hour is kept", Value: &c.TelemetryLongDays},
		{Name: "event-days", Usage: "`days` for which events are kept; 0: as long as there is room", Value: &c.EventDays},
		{Name: "audit-days", Usage: "`days` for which audit records are kept; 0: as long as there is room", Value: &c.AuditDays},
		{Name: "broker-url", Usage: "`URL` of an external MQTT broker, mqtts://host:port, instead of the embedded one", Value: &c.BrokerURL},
		{Name: "broker-username", Usage: "`name` of the controller's account at an external broker that does not go by certificates", Value: &c.BrokerUsername},
		{Name: "broker-password-file", Usage: "`file` with the password of that account", Value: &c.BrokerPasswordFile},
		{Name: "mosquitto-dir", Usage: "`folder` that dunlin-controller broker config mosquitto has made, and that the controller keeps up to date", Value: &c.MosquittoDir},
		{Name: "oidc-issuer", Usage: "`URL` of an OpenID Connect issuer whose users may sign in", Value: &c.OIDCIssuer},
		{Name: "oidc-client-id", Usage: "`id` of Dunlin there, which tokens must have as audience", Value: &c.OIDCClientID},
		{Name: "oidc-name-claim", Usage: "`claim` with the user's name, which must not change", Value: &c.OIDCNameClaim},
		{Name: "oidc-role-claim", Usage: "`claim` with the user's role: viewer, operator or admin; who has none is refused", Value: &c.OIDCRoleClaim},
		{Name: "oidc-scope-claim", Usage: "`claim` with the user's scope, site=berlin,env=prod or *; who has none is refused; empty: nobody has a scope", Value: &c.OIDCScopeClaim},
		{Name: "log-level", Usage: "`level` of the log: debug, info, warn or error", Value: &c.LogLevel},
		{Name: "log-format", Usage: "`format` of the log: text or json", Value: &c.LogFormat},
	}
}

// DefaultConfig gives the configuration that every other one starts from.
func DefaultConfig() Config {
	return Config{
		Data: "dunlin-controller", Listen: "127.0.0.1:8080", MQTTListen: "127.0.0.1:8883",
		ACMEDirectory:  acme.LetsEncryptURL,
		DeviceCertDays: int(identity.DeviceLifetime / day), DeviceGraceDays: int(identity.Grace / day),
		RegistryGraceDays: 7,
		TelemetryHours:    int(store.DefaultTelemetryKeep[0] / time.Hour), TelemetryDays: int(store.DefaultTelemetryKeep[1] / day), TelemetryLongDays: int(store.DefaultTelemetryKeep[2] / day),
		EventDays:     400,
		OIDCNameClaim: "sub", OIDCRoleClaim: "dunlin_role", OIDCScopeClaim: "dunlin_scope",
		BrokerUsername: broker.ControllerUser, LogLevel: "info", LogFormat: "text",
	}
}

// LoadConfig gives the defaults, overridden by a YAML file (--config), the
// environment and the flags, in this order. Its error holds every fault and
// is a program.ErrUsage, or flag.ErrHelp where help was asked for, which is
// then on output.
func LoadConfig(args []string, getenv func(string) string, output io.Writer) (Config, error) {
	c := DefaultConfig()
	err := program.Source{
		Program: "dunlin-controller", Notes: "Other commands: dunlin-controller backup FILE, dunlin-controller restore FILE, dunlin-controller version, dunlin-controller broker config mosquitto.", Prefix: environment,
		Args: args, Getenv: getenv, Help: output,
	}.Load(c.settings(), &c, nil)
	if errors.Is(err, flag.ErrHelp) {
		return c, err
	}
	if faults := c.check(); faults != nil {
		err = errors.Join(err, fmt.Errorf("%w: %w", program.ErrUsage, faults))
	}
	return c, err
}

const (
	day         = 24 * time.Hour
	maxCertDays = 10 * 365
	maxKeepDays = 10 * 365 // of events, audit records and hourly telemetry
)

// The least and most of what is kept for some time.
const (
	minTelemetryHours, maxTelemetryHours = 1, 24 * 31
	maxTelemetryDays                     = 400
)

// hostPattern is a DNS name.
var hostPattern = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?$`)

// listed gives what stands in a setting, comma apart.
func listed(s string) []string {
	var list []string
	for one := range strings.SplitSeq(s, ",") {
		if one = strings.TrimSpace(one); one != "" {
			list = append(list, one)
		}
	}
	return list
}

// hosts gives the names and addresses by which the controller is reached, the
// one that devices are told first.
func (c *Config) hosts() []string {
	hosts := append(listed(c.Hosts), c.acmeDomains()...)
	if host, _, err := net.SplitHostPort(c.Listen); err == nil {
		if ip := net.ParseIP(host); host != "" && (ip == nil || !ip.IsUnspecified()) {
			hosts = append(hosts, host)
		}
	}
	if own, err := os.Hostname(); err == nil && hostPattern.MatchString(own) {
		hosts = append(hosts, own)
	}
	hosts = append(hosts, "localhost", "127.0.0.1", "::1")
	if u, err := url.Parse(c.BrokerURL); err == nil && u.Hostname() != "" { // Mosquitto beside it has the same certificate
		hosts = append(hosts, u.Hostname())
	}
	var once []string
	for _, h := range hosts {
		if !slices.Contains(once, h) {
			once = append(once, h)
		}
	}
	return once
}

// check gives all faults of the configuration.
func (c *Config) check() error {
	var faults []error
	fault := func(format string, args ...any) { faults = append(faults, fmt.Errorf(format, args...)) }
	if c.Data == "" {
		fault("data is missing")
	}
	if !slices.Contains([]string{"debug", "info", "warn", "error"}, c.LogLevel) {
		fault("log-level %q is not debug, info, warn or error", c.LogLevel)
	}
	if !slices.Contains([]string{"text", "json"}, c.LogFormat) {
		fault("log-format %q is not text or json", c.LogFormat)
	}
	faults = append(faults, c.checkOIDC()...)
	if err := program.CheckListen(c.Listen, true); err != nil {
		fault("listen %w", err)
	}
	for _, h := range c.hosts() {
		if !hostPattern.MatchString(h) && net.ParseIP(h) == nil {
			fault("hosts: %q is not a name or an address", h)
		}
	}
	if (c.TLSCert == "") != (c.TLSKey == "") {
		fault("tls-cert and tls-key: one is not enough")
	}
	if c.TLSCA != "" && c.TLSCert == "" {
		fault("tls-ca needs tls-cert")
	}
	faults = append(faults, c.checkACME()...)
	if c.DeviceCertDays < 1 || c.DeviceCertDays > maxCertDays {
		fault("device-cert-days is %d, allowed are 1 to %d", c.DeviceCertDays, maxCertDays)
	}
	if most := int(identity.MaxGrace / day); c.DeviceGraceDays < 0 || c.DeviceGraceDays > most {
		fault("device-grace-days is %d, allowed are 0 to %d", c.DeviceGraceDays, most)
	}
	for _, n := range []struct {
		name               string
		value, least, most int
	}{
		{"registry-grace-days", c.RegistryGraceDays, 0, maxKeepDays},
		{"telemetry-hours", c.TelemetryHours, minTelemetryHours, maxTelemetryHours},
		{"telemetry-days", c.TelemetryDays, 1, maxTelemetryDays},
		{"telemetry-long-days", c.TelemetryLongDays, 1, maxKeepDays},
		{"event-days", c.EventDays, 0, maxKeepDays},
		{"audit-days", c.AuditDays, 0, maxKeepDays},
	} {
		if n.value < n.least || n.value > n.most {
			fault("%s is %d, allowed are %d to %d", n.name, n.value, n.least, n.most)
		}
	}
	switch {
	case c.BrokerURL == "":
		if err := program.CheckListen(c.MQTTListen, true); err != nil {
			fault("mqtt-listen %w", err)
		}
		if c.MosquittoDir != "" || c.BrokerPasswordFile != "" {
			fault("mosquitto-dir and broker-password-file need broker-url")
		}
	default:
		address, secure, err := brokerAddress(c.BrokerURL)
		if err != nil {
			faults = append(faults, err)
			break
		}
		if secure {
			err = program.CheckListen(address, true)
		} else {
			err = program.CheckAddress(address)
		}
		if err != nil {
			fault("broker-url %w", err)
		}
		if c.MosquittoDir != "" && !secure {
			fault("mosquitto-dir needs a broker-url mqtts://host:port")
		}
	}
	return errors.Join(faults...)
}

// brokerAddress gives the host and port of an external broker's URL, and
// whether it is one for TLS.
func brokerAddress(s string) (address string, secure bool, err error) {
	u, err := url.Parse(s)
	if err != nil {
		return "", false, fmt.Errorf("broker-url: %w", err)
	}
	secure = u.Scheme == "mqtts"
	if !secure && u.Scheme != "mqtt" && u.Scheme != "tcp" || u.Hostname() == "" || u.User != nil {
		return "", false, fmt.Errorf("broker-url %q is not mqtts://host:port", u.Redacted())
	}
	port := "1883"
	if secure {
		port = "8883"
	}
	return net.JoinHostPort(u.Hostname(), cmp.Or(u.Port(), port)), secure, nil
}
