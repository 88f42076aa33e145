package agent

import (
	"cmp"
	"context"
	"crypto/x509"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"github.com/dunlin/dunlin/agent/alarm"
	"github.com/dunlin/dunlin/agent/identity"
	"github.com/dunlin/dunlin/agent/inband"
	"github.com/dunlin/dunlin/agent/state"
	"github.com/dunlin/dunlin/internal/link"
	"github.com/dunlin/dunlin/internal/pki"
	"github.com/dunlin/dunlin/internal/program"
	"github.com/dunlin/dunlin/internal/telemetry"
)

// Serving says how a host answers inference. The YAML keys are those of a
// --config file.
type Serving struct {
	Listen       string `yaml:"listen"`        // host:port of REST
	GRPCListen   string `yaml:"grpc-listen"`   // host:port of gRPC; "": none
	TLSCert      string `yaml:"tls-cert"`      // PEM file of the listeners' certificate; "": no TLS, on loopback only
	TLSKey       string `yaml:"tls-key"`       // PEM file of its key
	APIKeys      string `yaml:"api-keys"`      // file of who may ask, by key or certificate; "": whom ClientCA vouches for, or everybody
	ClientCA     string `yaml:"client-ca"`     // PEM file of who vouches for clients' certificates; "": they have none
	SharedMemory bool   `yaml:"shared-memory"` // callers may name shared memory of this host
	TraceFile    string `yaml:"trace-file"`    // where traces of requests go; "": there are none
	Threads      int    `yaml:"threads"`       // of the runtime; 0: by the firmware profile
	MemoryMiB    int    `yaml:"memory-mib"`    // what models may take; 0: by the firmware profile
	Oversize     string `yaml:"oversize"`      // what becomes of a model that is larger: refuse or map
	CacheMiB     int    `yaml:"cache-mib"`     // bound of the models compiled for this device, on disk
	OnAlarm      string `yaml:"on-alarm"`      // what is done about heat and memory errors: none, throttle or cordon
	Profile      string `yaml:"profile"`       // whether models are measured: on or off
	ProfileDuty  int    `yaml:"profile-duty"`  // percent of the time that measuring may take; 0: as where nobody says
	RuntimeLib   string `yaml:"runtime-lib"`   // path of ONNX Runtime's shared library
	WorkerBy     string `yaml:"worker-by"`     // command that starts the worker process, words apart; "": the program itself does

	FirmwareProfiles string `yaml:"firmware-profiles"` // folder of the site's own; "": none
	FirmwareProfile  string `yaml:"firmware-profile"`  // name of the one to go by; "": the one that matches

	LogLevel  string `yaml:"log-level"`
	LogFormat string `yaml:"log-format"`

	Simulation `yaml:",inline"`

	Log    *slog.Logger   `yaml:"-"`
	Worker []string       `yaml:"-"` // command of the worker process; this program with "worker" where empty
	level  *slog.LevelVar // of Log; nil where Log was given
	eager  bool           // see worker.Config.Eager; for tests on machines that are busy

	machine machine // nil until it is opened
}

// maxThreads bounds Serving.Threads.
const maxThreads = 1024

// Bounds of Serving.MemoryMiB and Serving.CacheMiB, and what the latter is
// where nobody says.
const (
	maxMemoryMiB    = 16 << 20
	maxCacheMiB     = 16 << 20
	defaultCacheMiB = 16 << 10
)

// defaultProfileDuty is the percentage of the time that measuring takes where
// nobody says: a request that comes after a while finds the caches cold one
// time in ten at most.
const defaultProfileDuty = 10

func (s *Serving) settings() []program.Setting {
	s.Listen, s.GRPCListen, s.LogLevel, s.LogFormat = "127.0.0.1:8000", "127.0.0.1:8001", "info", "text"
	s.Oversize, s.CacheMiB, s.OnAlarm = "refuse", defaultCacheMiB, string(alarm.None)
	s.Profile, s.ProfileDuty = "on", defaultProfileDuty
	return append([]program.Setting{
		{Name: "listen", Usage: "`host:port` of inference by REST", Value: &s.Listen},
		{Name: "grpc-listen", Usage: "`host:port` of inference by gRPC; off: none", Value: &s.GRPCListen},
		{Name: "tls-cert", Usage: "PEM `file` of a certificate: REST and gRPC speak TLS", Value: &s.TLSCert},
		{Name: "tls-key", Usage: "PEM `file` of the certificate's key", Value: &s.TLSKey},
		{Name: "api-keys", Usage: "`file` of the API keys and client certificates that may ask, and for what, one on each line", Value: &s.APIKeys},
		{Name: "client-ca", Usage: "PEM `file` of the authorities whose client certificates may ask", Value: &s.ClientCA},
		{Name: "shared-memory", Usage: "let callers name shared memory of this host", Value: &s.SharedMemory},
		{Name: "trace-file", Usage: "`file` for traces of requests, where the trace settings ask for them", Value: &s.TraceFile},
		{Name: "threads", Usage: "`number` of threads of the runtime; 0: as the firmware profile says", Value: &s.Threads},
		{Name: "memory-mib", Usage: "`MiB` of memory that models may take; 0: as the firmware profile says", Value: &s.MemoryMiB},
		{Name: "oversize", Usage: "`what` becomes of a model that is larger than that: refuse, or map: its weights stay in their file and are read as they are needed", Value: &s.Oversize},
		{Name: "cache-mib", Usage: "`MiB` of disk for models compiled for this device", Value: &s.CacheMiB},
		{Name: "on-alarm", Usage: "`what` the device does about heat and memory errors: none, throttle: take less load, or cordon: refuse new requests", Value: &s.OnAlarm},
		{Name: "profile", Usage: "`whether` models are measured on this device, when it is idle: on or off", Value: &s.Profile},
		{Name: "profile-duty", Usage: "`percent` of the time that measuring may take", Value: &s.ProfileDuty},
		{Name: "runtime-lib", Usage: "`path` of ONNX Runtime's shared library; also DUNLIN_ORT_LIB", Value: &s.RuntimeLib, Environment: "DUNLIN_ORT_LIB"},
		{Name: "worker-by", Usage: "`command` that this program is started by as a process that holds the runtime, such as \"numactl -N 0\"", Value: &s.WorkerBy},
		{Name: "firmware-profiles", Usage: "`folder` of firmware profiles beside the built-in ones", Value: &s.FirmwareProfiles},
		{Name: "firmware-profile", Usage: "`name` of the firmware profile to go by; without one, the most specific that matches", Value: &s.FirmwareProfile},
		{Name: "log-level", Usage: "`level` of the log: debug, info, warn or error", Value: &s.LogLevel},
		{Name: "log-format", Usage: "`format` of the log: text or json", Value: &s.LogFormat},
	}, s.Simulation.settings()...)
}

// check completes the settings and reports what is wrong with them.
func (s *Serving) check(add func(name string, err error)) {
	if s.GRPCListen == "off" {
		s.GRPCListen = ""
	}
	s.checkPorts(add)
	if s.Threads < 0 || s.Threads > maxThreads {
		add("threads", fmt.Errorf("is %d, allowed are 0 to %d", s.Threads, maxThreads))
	}
	if s.MemoryMiB < 0 || s.MemoryMiB > maxMemoryMiB {
		add("memory-mib", fmt.Errorf("is %d, allowed are 0 to %d", s.MemoryMiB, maxMemoryMiB))
	}
	s.CacheMiB = cmp.Or(s.CacheMiB, defaultCacheMiB)
	if s.CacheMiB < 0 || s.CacheMiB > maxCacheMiB {
		add("cache-mib", fmt.Errorf("is %d, allowed are 1 to %d, and 0 for %d", s.CacheMiB, maxCacheMiB, defaultCacheMiB))
	}
	s.Oversize = cmp.Or(s.Oversize, "refuse")
	if s.Oversize != "refuse" && s.Oversize != "map" {
		add("oversize", fmt.Errorf("%q is not refuse or map", s.Oversize))
	}
	s.checkSimulation(add)
	s.OnAlarm = cmp.Or(s.OnAlarm, string(alarm.None))
	if !slices.Contains(alarm.Reactions, alarm.Reaction(s.OnAlarm)) {
		add("on-alarm", fmt.Errorf("%q is not none, throttle or cordon", s.OnAlarm))
	}
	s.Profile, s.ProfileDuty = cmp.Or(s.Profile, "off"), cmp.Or(s.ProfileDuty, defaultProfileDuty)
	if s.Profile != "on" && s.Profile != "off" {
		add("profile", fmt.Errorf("%q is not on or off", s.Profile))
	}
	if s.ProfileDuty < 1 || s.ProfileDuty > 100 {
		add("profile-duty", fmt.Errorf("is %d, allowed are 1 to 100", s.ProfileDuty))
	}
	if s.Log == nil {
		var err error
		s.level = new(slog.LevelVar)
		s.Log, err = telemetry.NewLevelLogger(os.Stderr, s.level, s.LogLevel, s.LogFormat)
		add("log", err)
	}
	if len(s.Worker) == 0 {
		self, err := os.Executable()
		add("worker", err)
		s.Worker = append(strings.Fields(s.WorkerBy), self, "worker")
		s.Worker[0], err = exec.LookPath(s.Worker[0]) // the process has no PATH
		add("worker-by", err)
	}
}

func onLoopback(address string) bool { return program.CheckAddress(address) == nil }

// Config configures an agent. The YAML keys are those of a --config file.
type Config struct {
	Serving    `yaml:",inline"`
	Data       string            `yaml:"data"`       // folder of everything that the agent keeps
	Controller string            `yaml:"controller"` // base URL; "": serve what is there, without a controller
	CA         string            `yaml:"ca"`         // PEM file of authorities that may vouch for the controller beside its own, or systemRoots; "": only its own
	KeyStore   string            `yaml:"key-store"`  // where the device's key is made: file or tpm
	TPM        string            `yaml:"tpm"`        // path of the TPM
	JoinToken  string            `yaml:"join-token"` // needed until the device has joined
	Delivery   string            `yaml:"delivery"`   // by which way bundles come: an inband.Mode
	Name       string            `yaml:"name"`       // of the device; the host's where empty
	Labels     map[string]string `yaml:"labels"`     // of the device

	SiteListen      string `yaml:"site-listen"`      // host:port at which other devices of the site fetch bundles; "": they cannot
	SiteCacheMiB    int    `yaml:"site-cache"`       // MiB of bundles that are kept for the site; 0: none
	Metered         string `yaml:"metered"`          // whether bytes cost money: on, off, or auto: as the firmware profile says
	UpdateProbation int    `yaml:"update-probation"` // seconds for which a new release of the agent must be healthy to stay

	file       string              // that settings were read from; "": none
	roots      []*x509.Certificate // of CA
	maxBackoff time.Duration       // of the link, see link.Config; for tests
}

// systemRoots is the Config.CA for authorities that the system trusts.
const systemRoots = "system"

// Limits of what the command line gives.
const (
	maxLabels = 64
	maxLabel  = 63
)

var labelPattern = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9._/-]*[A-Za-z0-9])?$`)

// ParseConfig makes a Config from defaults, the file that --config names,
// the environment and the flags, each stronger than the one before. All
// faults are reported together. What --help prints goes to help.
func ParseConfig(args []string, getenv func(string) string, help io.Writer) (Config, error) {
	var cfg Config
	err := parseInto(&cfg, "dunlin-agent run", args, getenv, help, nil)
	return cfg, err
}

// Main runs an agent by args, or becomes the release of it that is to run.
func Main(ctx context.Context, args []string, getenv func(string) string, help io.Writer) error {
	if err := launch(ctx, args, getenv, os.Stderr); err != nil {
		return err
	}
	cfg, err := ParseConfig(args, getenv, help)
	if errors.Is(err, flag.ErrHelp) {
		return nil
	} else if err != nil {
		return err
	}
	tune(getenv)
	err = Run(ctx, cfg)
	if r, ok := errors.AsType[*restart](err); ok {
		return relaunch(getenv, r.kept)
	}
	return err
}

// tune leaves half of the cores to the process that computes: what the agent
// itself does is to pass bytes on. A GOMAXPROCS that is set stays. It has
// little live memory, so that collecting less often costs little, and much of
// the time of a request with a large tensor goes into collecting.
func tune(getenv func(string) string) {
	shortSlices()
	debug.SetGCPercent(gcPercent)
	if getenv("GOMAXPROCS") == "" {
		runtime.GOMAXPROCS(max(1, runtime.GOMAXPROCS(0)/2))
	}
}

const gcPercent = 200

// commands is what every help says of the others.
const commands = "Commands: dunlin-agent run, the default; dunlin-agent serve; dunlin-agent simulate; dunlin-agent doctor; dunlin-agent verify; dunlin-agent import; dunlin-agent version."

func parseInto(cfg *Config, name string, args []string, getenv func(string) string, help io.Writer, more func(*flag.FlagSet)) error {
	*cfg = Config{Data: defaultData(getenv), KeyStore: "file", TPM: "/dev/tpmrm0", Delivery: string(inband.Auto), Metered: "auto", UpdateProbation: defaultProbation}
	labels := map[string]string{}
	err := program.Source{
		Program: name, Notes: commands, Prefix: "DUNLIN_AGENT_",
		Args: args, Getenv: getenv, Help: help, File: &cfg.file,
	}.Load(append([]program.Setting{
		{Name: "data", Usage: "`folder` of everything that the agent keeps", Value: &cfg.Data},
		{Name: "controller", Usage: "base `URL` of the controller, or mqtts://host:port of its broker; without one, serve what is there", Value: &cfg.Controller},
		{Name: "ca", Usage: "PEM `file` of authorities that may vouch for the controller beside its own; system: those that this system trusts", Value: &cfg.CA},
		{Name: "join-token", Usage: "`@file` with the token by which the device joins; also DUNLIN_JOIN_TOKEN", Value: &cfg.JoinToken, Environment: "DUNLIN_JOIN_TOKEN", Secret: true},
		{Name: "key-store", Usage: "`where` the device's key is made: file, in the data folder, or tpm", Value: &cfg.KeyStore},
		{Name: "tpm", Usage: "`path` of the TPM: its device, or the socket of a simulated one", Value: &cfg.TPM},
		{Name: "delivery", Usage: "`way` by which models come: https, mqtt, or auto: by HTTPS, and over MQTT while the registry cannot be reached", Value: &cfg.Delivery},
		{Name: "name", Usage: "`name` of the device; without one, the host's", Value: &cfg.Name},
		{Name: "site-listen", Usage: "`host:port` at which other devices of the same site fetch models that are here", Value: &cfg.SiteListen},
		{Name: "site-cache", Usage: "`MiB` of disk for models that are fetched and kept for the site, though this device does not run them", Value: &cfg.SiteCacheMiB},
		{Name: "metered", Usage: "`whether` bytes over the device's link cost money: on, off, or auto: as the firmware profile says", Value: &cfg.Metered},
		{Name: "update-probation", Usage: "`seconds` for which a new release of the agent must be healthy to stay", Value: &cfg.UpdateProbation},
	}, cfg.settings()...), cfg, func(flags *flag.FlagSet) {
		flags.Func("label", "`key=value` label of the device; may be repeated; in the file, labels is a mapping", func(s string) error {
			k, v, ok := strings.Cut(s, "=")
			if !ok {
				return errors.New("is not key=value")
			}
			labels[k] = v
			return nil
		})
		if more != nil {
			more(flags)
		}
	})
	if errors.Is(err, flag.ErrHelp) {
		return err
	}
	if cfg.Labels == nil {
		cfg.Labels = map[string]string{}
	}
	maps.Copy(cfg.Labels, labels)
	if faults := cfg.check(); faults != nil {
		err = errors.Join(err, fmt.Errorf("%w: %w", program.ErrUsage, faults))
	}
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
	cfg.Serving.check(add)
	if cfg.Controller != "" {
		add("controller", program.CheckURL(cfg.Controller, "https", "mqtts"))
	}
	cfg.checkSite(add)
	cfg.UpdateProbation = cmp.Or(cfg.UpdateProbation, defaultProbation)
	if n := cfg.UpdateProbation; n < 1 || n > maxProbation {
		add("update-probation", fmt.Errorf("is %d, allowed are 1 to %d", n, maxProbation))
	}
	cfg.KeyStore = cmp.Or(cfg.KeyStore, "file")
	if cfg.KeyStore != "file" && cfg.KeyStore != "tpm" {
		add("key-store", fmt.Errorf("%q is not file or tpm", cfg.KeyStore))
	}
	cfg.Delivery = cmp.Or(cfg.Delivery, string(inband.Auto))
	if !slices.Contains(inband.Modes, inband.Mode(cfg.Delivery)) {
		add("delivery", fmt.Errorf("%q is not auto, https or mqtt", cfg.Delivery))
	}
	if cfg.CA != "" && cfg.CA != systemRoots {
		cfg.roots, err = pki.ReadCertificates(cfg.CA)
		add("ca", err)
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
	return errors.Join(errs...)
}

// identity says who the device is to be.
func (cfg *Config) identity(store *state.Store) identity.Config {
	return identity.Config{
		Dir: cfg.Data, InTPM: cfg.KeyStore == "tpm", TPM: cfg.TPM, State: store, Name: cfg.Name, Controller: cfg.Controller, JoinToken: cfg.JoinToken,
		Labels: cfg.Labels, Roots: cfg.roots, System: cfg.CA == systemRoots, Log: cfg.Log,
	}
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
