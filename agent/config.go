package agent

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"runtime/debug"
	"strings"

	"github.com/dunlin/dunlin/internal/link"
	"github.com/dunlin/dunlin/internal/telemetry"
	"github.com/goccy/go-yaml"
)

// Config configures an agent. The YAML keys are those of a --config file.
type Config struct {
	Data       string            `yaml:"data"`        // folder of everything that the agent keeps
	Controller string            `yaml:"controller"`  // base URL; "": serve what is there, without a controller
	JoinToken  string            `yaml:"join-token"`  // needed until the device has joined; "@path" reads a file
	Name       string            `yaml:"name"`        // of the device; the host's where empty
	Labels     map[string]string `yaml:"labels"`      // of the device
	Listen     string            `yaml:"listen"`      // host:port of inference
	RuntimeLib string            `yaml:"runtime-lib"` // path of ONNX Runtime's shared library
	LogLevel   string            `yaml:"log-level"`
	LogFormat  string            `yaml:"log-format"`

	Log    *slog.Logger `yaml:"-"`
	Worker []string     `yaml:"-"` // command of the worker process; this program with "worker" where empty
}

// Limits of what the command line gives.
const (
	maxConfigFile = 1 << 20
	maxLabels     = 64
	maxLabel      = 63
)

var labelPattern = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9._/-]*[A-Za-z0-9])?$`)

// ErrUsage is the error of a command line or of settings that are wrong.
var ErrUsage = errors.New("wrong usage")

// ParseConfig makes a Config from defaults, the file that --config names,
// the environment and the flags, each stronger than the one before. All
// faults are reported together. What --help prints goes to help.
func ParseConfig(args []string, getenv func(string) string, help io.Writer) (Config, error) {
	var cfg Config
	err := parseInto(&cfg, "dunlin-agent run", args, getenv, help, nil)
	return cfg, err
}

// Main parses args and runs an agent.
func Main(ctx context.Context, args []string, getenv func(string) string, help io.Writer) error {
	cfg, err := ParseConfig(args, getenv, help)
	if errors.Is(err, flag.ErrHelp) {
		return nil
	} else if err != nil {
		return err
	}
	debug.SetGCPercent(gcPercent)
	return Run(ctx, cfg)
}

// gcPercent keeps the heap small: an agent has little to collect.
const gcPercent = 40

func parseInto(cfg *Config, name string, args []string, getenv func(string) string, help io.Writer, more func(*flag.FlagSet)) error {
	*cfg = Config{Data: defaultData(getenv), Listen: "127.0.0.1:8000", LogLevel: "info", LogFormat: "text"}
	var flags Config
	labels := map[string]string{}
	fs := flag.NewFlagSet(name, flag.ContinueOnError)
	fs.SetOutput(io.Discard) // an error is said once, by the caller
	file := fs.String("config", "", "YAML `file` with the names of these flags as keys, labels as a mapping")
	fs.StringVar(&flags.Data, "data", "", "`folder` of everything that the agent keeps (default "+cfg.Data+")")
	fs.StringVar(&flags.Controller, "controller", "", "base `URL` of the controller; without one, serve what is there")
	fs.StringVar(&flags.JoinToken, "join-token", "", "`token` by which the device joins, or @file; also DUNLIN_JOIN_TOKEN")
	fs.StringVar(&flags.Name, "name", "", "`name` of the device (default: the host's)")
	fs.StringVar(&flags.Listen, "listen", "", "`host:port` of inference (default "+cfg.Listen+")")
	fs.StringVar(&flags.RuntimeLib, "runtime-lib", "", "`path` of ONNX Runtime's shared library; also DUNLIN_ORT_LIB")
	fs.StringVar(&flags.LogLevel, "log-level", "", "`level` of the log: debug, info, warn or error (default "+cfg.LogLevel+")")
	fs.StringVar(&flags.LogFormat, "log-format", "", "`format` of the log: text or json (default "+cfg.LogFormat+")")
	fs.Func("label", "`key=value` label of the device; may be repeated", func(s string) error {
		k, v, ok := strings.Cut(s, "=")
		if !ok {
			return errors.New("is not key=value")
		}
		labels[k] = v
		return nil
	})
	if more != nil {
		more(fs)
	}
	if err := fs.Parse(args); errors.Is(err, flag.ErrHelp) {
		return errors.Join(err, printHelp(help, fs))
	} else if err != nil {
		return fmt.Errorf("%w: %w\nrun: %s --help", ErrUsage, err, name)
	}
	if fs.NArg() > 0 {
		return fmt.Errorf("%w: unexpected argument %q\nrun: %s --help", ErrUsage, fs.Arg(0), name)
	}
	if *file != "" {
		if err := readConfig(*file, cfg); err != nil {
			return err
		}
	}
	overlay(cfg, Config{JoinToken: getenv("DUNLIN_JOIN_TOKEN"), RuntimeLib: getenv("DUNLIN_ORT_LIB")})
	flags.Labels = labels
	overlay(cfg, flags)
	if err := cfg.check(); err != nil {
		return fmt.Errorf("%w: %w", ErrUsage, err)
	}
	return nil
}

// printHelp lists the flags as they are written in the documents.
func printHelp(w io.Writer, fs *flag.FlagSet) error {
	var b strings.Builder
	fmt.Fprintf(&b, "Usage: %s [flags]\n\n", fs.Name())
	if strings.HasSuffix(fs.Name(), " run") {
		b.WriteString("Other commands: dunlin-agent doctor, dunlin-agent version. Without a command it is run.\n\n")
	}
	fs.VisitAll(func(f *flag.Flag) {
		value, usage := flag.UnquoteUsage(f)
		dashes := "--"
		if len(f.Name) == 1 {
			dashes = "-"
		}
		fmt.Fprintf(&b, "  %-24s %s\n", dashes+f.Name+" "+value, usage)
	})
	_, err := io.WriteString(w, b.String())
	return err
}

func defaultData(getenv func(string) string) string {
	if dir := getenv("STATE_DIRECTORY"); dir != "" { // systemd's
		return dir
	}
	if dir := getenv("XDG_STATE_HOME"); dir != "" {
		return filepath.Join(dir, "dunlin-agent")
	}
	if dir := getenv("HOME"); dir != "" && os.Getuid() != 0 {
		return filepath.Join(dir, ".local", "state", "dunlin-agent")
	}
	return "/var/lib/dunlin-agent"
}

func readConfig(path string, cfg *Config) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("config: %w", err)
	}
	defer f.Close()
	raw, err := io.ReadAll(io.LimitReader(f, maxConfigFile+1))
	if err != nil {
		return fmt.Errorf("config %s: %w", path, err)
	}
	if len(raw) > maxConfigFile {
		return fmt.Errorf("config %s: has more than %d bytes", path, maxConfigFile)
	}
	if err := parseYAML(raw, cfg); err != nil {
		return fmt.Errorf("config %s: %w", path, err)
	}
	return nil
}

// parseYAML reads one document of known keys.
func parseYAML(raw []byte, cfg *Config) error {
	err := yaml.NewDecoder(bytes.NewReader(raw), yaml.Strict()).Decode(cfg)
	if errors.Is(err, io.EOF) { // an empty file
		return nil
	}
	return err
}

// overlay sets what is set in over.
func overlay(cfg *Config, over Config) {
	for to, from := range map[*string]string{
		&cfg.Data: over.Data, &cfg.Controller: over.Controller, &cfg.JoinToken: over.JoinToken, &cfg.Name: over.Name,
		&cfg.Listen: over.Listen, &cfg.RuntimeLib: over.RuntimeLib, &cfg.LogLevel: over.LogLevel, &cfg.LogFormat: over.LogFormat,
	} {
		if from != "" {
			*to = from
		}
	}
	for k, v := range over.Labels {
		if cfg.Labels == nil {
			cfg.Labels = map[string]string{}
		}
		cfg.Labels[k] = v
	}
}

// check completes the settings and reports what is wrong with them.
func (cfg *Config) check() error {
	var errs []error
	add := func(name string, err error) {
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", name, err))
		}
	}
	var err error
	cfg.Data, err = filepath.Abs(cfg.Data)
	add("data", err)
	if cfg.Name == "" {
		host, err := os.Hostname()
		add("name", err)
		cfg.Name = deviceName(host)
	}
	add("name", link.CheckDevice(cfg.Name))
	add("listen", checkAddress(cfg.Listen))
	if cfg.Controller != "" {
		add("controller", checkURL(cfg.Controller, "http"))
	}
	if path, ok := strings.CutPrefix(cfg.JoinToken, "@"); ok {
		raw, err := os.ReadFile(path)
		add("join-token", err)
		cfg.JoinToken = strings.TrimSpace(string(raw))
	}
	if len(cfg.Labels) > maxLabels {
		add("label", fmt.Errorf("%d labels, allowed are %d", len(cfg.Labels), maxLabels))
	}
	for k, v := range cfg.Labels {
		for _, s := range []string{k, v} {
			if len(s) > maxLabel || !labelPattern.MatchString(s) {
				add("label", fmt.Errorf("%s=%s: %q is not 1 to %d letters, digits and . _ - / between them", k, v, s, maxLabel))
			}
		}
	}
	if cfg.Log == nil {
		cfg.Log, err = telemetry.NewLogger(os.Stderr, cfg.LogLevel, cfg.LogFormat)
		add("log", err)
	}
	if len(cfg.Worker) == 0 {
		self, err := os.Executable()
		add("worker", err)
		cfg.Worker = []string{self, "worker"}
	}
	return errors.Join(errs...)
}

// deviceName makes a host's name one of a device.
func deviceName(host string) string {
	name := strings.Map(func(r rune) rune {
		if link.CheckDevice(string(r)) != nil {
			return '-'
		}
		return r
	}, host)
	return name[:min(len(name), link.MaxDeviceName)]
}

var errNotLoopback = errors.New("is not on this machine: without TLS, which Dunlin does not have yet, only loopback addresses such as 127.0.0.1 are allowed")

// checkAddress says whether host:port is on loopback.
func checkAddress(address string) error {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return fmt.Errorf("%q is not host:port", address)
	}
	if _, err := net.LookupPort("tcp", port); err != nil {
		return fmt.Errorf("%q: %w", address, err)
	}
	if ip, err := netip.ParseAddr(host); host != "localhost" && (err != nil || !ip.IsLoopback()) {
		return fmt.Errorf("%q %w", address, errNotLoopback)
	}
	return nil
}

// checkURL says whether a URL has the scheme and is on loopback.
func checkURL(s, scheme string) error {
	u, err := url.Parse(s)
	if err != nil {
		return err
	}
	if u.Scheme != scheme || u.Host == "" || u.User != nil || u.RawQuery != "" {
		return fmt.Errorf("%q is not %s://host:port", s, scheme)
	}
	port := u.Port()
	if port == "" {
		port = scheme
	}
	return checkAddress(net.JoinHostPort(u.Hostname(), port))
}
