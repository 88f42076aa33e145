package controller

import (
	"cmp"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"net/url"
	"os"
	"slices"
	"strings"

	"github.com/goccy/go-yaml"

	"github.com/dunlin/dunlin/controller/broker"
)

// Config is the controller's configuration. Its yaml names are the names of
// the flags too, and, in capitals with _ for - and DUNLIN_CONTROLLER_ before
// them, those of the environment variables.
type Config struct {
	Data       string `yaml:"data"`
	Listen     string `yaml:"listen"`
	MQTTListen string `yaml:"mqtt-listen"`

	BrokerURL             string `yaml:"broker-url"`
	BrokerUsername        string `yaml:"broker-username"`
	BrokerPasswordFile    string `yaml:"broker-password-file"`
	MosquittoPasswordFile string `yaml:"mosquitto-password-file"`
	MosquittoPIDFile      string `yaml:"mosquitto-pid-file"`

	LogLevel  string `yaml:"log-level"`
	LogFormat string `yaml:"log-format"`

	// What follows is for callers of Run; all may be nil.

	Log *slog.Logger `yaml:"-"` // instead of LogLevel and LogFormat on stderr
	// OnStep is called before and after each step that is persisted or
	// published, with its name: a test ends the process there.
	OnStep func(step string) `yaml:"-"`
	// OnReady is called when everything listens.
	OnReady func(Addresses) `yaml:"-"`
}

// Addresses is where a running controller listens.
type Addresses struct {
	URL    string // of the API and the registry
	Broker string // URL that devices connect to
}

const environment = "DUNLIN_CONTROLLER_"

type setting struct {
	name, usage string
	value       *string
}

func (c *Config) settings() []setting {
	return []setting{
		{"data", "folder of everything that the controller keeps", &c.Data},
		{"listen", "address of the API and the registry", &c.Listen},
		{"mqtt-listen", "address of the embedded broker", &c.MQTTListen},
		{"broker-url", "an external MQTT broker, mqtt://host:port, instead of the embedded one", &c.BrokerURL},
		{"broker-username", "the controller's account at the external broker", &c.BrokerUsername},
		{"broker-password-file", "file with the password of that account; not needed with --mosquitto-password-file", &c.BrokerPasswordFile},
		{"mosquitto-password-file", "Mosquitto's password_file, which the controller writes", &c.MosquittoPasswordFile},
		{"mosquitto-pid-file", "Mosquitto's pid_file, by which the controller tells it of new accounts", &c.MosquittoPIDFile},
		{"log-level", "debug, info, warn or error", &c.LogLevel},
		{"log-format", "text or json", &c.LogFormat},
	}
}

// DefaultConfig gives the configuration that every other one starts from.
func DefaultConfig() Config {
	return Config{
		Data: "dunlin-controller", Listen: "127.0.0.1:8080", MQTTListen: "127.0.0.1:1883",
		BrokerUsername: broker.ControllerUser, LogLevel: "info", LogFormat: "text",
	}
}

// maxConfigFile bounds the configuration file.
const maxConfigFile = 1 << 20

// LoadConfig gives the defaults, overridden by a YAML file (--config), the
// environment and the flags, in this order. Its error holds every fault; it
// is flag.ErrHelp where help was asked for, which is then on output.
func LoadConfig(args []string, getenv func(string) string, output io.Writer) (Config, error) {
	c := DefaultConfig()
	flags := flag.NewFlagSet("dunlin-controller", flag.ContinueOnError)
	flags.SetOutput(io.Discard) // an error is said once, by the caller
	file := flags.String("config", getenv(environment+"CONFIG"), "YAML file with the names of these flags as keys")
	var given Config
	names := given.settings()
	for i, s := range c.settings() {
		flags.StringVar(names[i].value, s.name, *s.value, s.usage)
	}
	if err := flags.Parse(args); errors.Is(err, flag.ErrHelp) {
		return c, errors.Join(err, printHelp(output, flags))
	} else if err != nil {
		return c, fmt.Errorf("%w\nrun: dunlin-controller --help", err)
	}
	var faults []error
	if flags.NArg() > 0 {
		faults = append(faults, fmt.Errorf("unexpected argument %q", flags.Arg(0)))
	}
	if *file != "" {
		if err := readConfig(*file, &c); err != nil {
			faults = append(faults, err)
		}
	}
	set := map[string]bool{}
	flags.Visit(func(f *flag.Flag) { set[f.Name] = true })
	for i, s := range c.settings() {
		if v := getenv(environment + strings.ToUpper(strings.ReplaceAll(s.name, "-", "_"))); v != "" {
			*s.value = v
		}
		if set[s.name] {
			*s.value = *names[i].value
		}
	}
	return c, errors.Join(append(faults, c.check())...)
}

// printHelp lists the flags as they are written in the documents.
func printHelp(w io.Writer, flags *flag.FlagSet) error {
	var b strings.Builder
	b.WriteString("Usage: dunlin-controller [flags]\n\nOther commands: dunlin-controller version.\n\n")
	flags.VisitAll(func(f *flag.Flag) {
		usage := f.Usage
		if f.DefValue != "" {
			usage += " (default " + f.DefValue + ")"
		}
		fmt.Fprintf(&b, "  --%-24s %s\n", f.Name, usage)
	})
	_, err := io.WriteString(w, b.String())
	return err
}

func readConfig(path string, c *Config) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("config: %w", err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxConfigFile+1))
	if err != nil {
		return fmt.Errorf("config %s: %w", path, err)
	}
	if len(b) > maxConfigFile {
		return fmt.Errorf("config %s is above the limit of %d bytes", path, maxConfigFile)
	}
	if err := yaml.UnmarshalWithOptions(b, c, yaml.Strict()); err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("config %s: %w", path, err)
	}
	return nil
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
	if err := checkLoopback("listen", c.Listen); err != nil {
		faults = append(faults, err)
	}
	switch {
	case c.BrokerURL == "":
		if err := checkLoopback("mqtt-listen", c.MQTTListen); err != nil {
			faults = append(faults, err)
		}
		if c.MosquittoPasswordFile != "" || c.BrokerPasswordFile != "" {
			fault("mosquitto-password-file and broker-password-file need broker-url")
		}
	default:
		u, err := url.Parse(c.BrokerURL)
		if err != nil {
			fault("broker-url: %w", err)
			break
		}
		if u.Scheme != "mqtt" && u.Scheme != "tcp" || u.User != nil {
			fault("broker-url %q is not mqtt://host:port", u.Redacted())
			break
		}
		address, err := brokerAddress(c.BrokerURL)
		if err != nil {
			faults = append(faults, err)
		} else if err := checkLoopback("broker-url", address); err != nil {
			faults = append(faults, err)
		}
		if c.MosquittoPasswordFile != "" && c.BrokerUsername != broker.ControllerUser {
			fault("broker-username is %q, with mosquitto-password-file it must be %s", c.BrokerUsername, broker.ControllerUser)
		}
	}
	if c.MosquittoPIDFile != "" && c.MosquittoPasswordFile == "" {
		fault("mosquitto-pid-file needs mosquitto-password-file")
	}
	return errors.Join(faults...)
}

// brokerAddress gives the host and port of an external broker's URL.
func brokerAddress(s string) (string, error) {
	u, err := url.Parse(s)
	if err != nil {
		return "", fmt.Errorf("broker-url: %w", err)
	}
	return net.JoinHostPort(u.Hostname(), cmp.Or(u.Port(), "1883")), nil
}

// checkLoopback refuses every address that another machine could reach, or
// that would send credentials to one.
func checkLoopback(name, address string) error {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	if ip, err := netip.ParseAddr(host); host == "localhost" || err == nil && ip.IsLoopback() {
		return nil
	}
	return fmt.Errorf("%s %q is not on loopback: TLS and device certificates, which other addresses need, come with a later version", name, address)
}
