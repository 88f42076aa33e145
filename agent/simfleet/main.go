package simfleet

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/dunlin/dunlin/agent/sim"
	profiles "github.com/dunlin/dunlin/firmware-profiles"
	"github.com/dunlin/dunlin/internal/pki"
	"github.com/dunlin/dunlin/internal/program"
	"github.com/dunlin/dunlin/internal/telemetry"
)

// settings are those of the command that runs a fleet; the YAML keys are those
// of a --config file.
type settings struct {
	Controller string            `yaml:"controller"`
	CA         string            `yaml:"ca"`
	JoinToken  string            `yaml:"join-token"`
	Devices    int               `yaml:"devices"`
	Class      string            `yaml:"class"`
	Profiles   string            `yaml:"firmware-profiles"`
	Name       string            `yaml:"name"`
	Labels     map[string]string `yaml:"labels"`
	Seed       int               `yaml:"seed"`
	Script     string            `yaml:"script"`
	SimScript  string            `yaml:"sim-script"`
	Requests   string            `yaml:"requests-per-second"`
	For        string            `yaml:"for"`
	Data       string            `yaml:"data"`
	Metrics    string            `yaml:"metrics-listen"`
	LogLevel   string            `yaml:"log-level"`
	LogFormat  string            `yaml:"log-format"`

	cfg Config
	end time.Duration
}

// statusEvery is how often Main says how the fleet is.
const statusEvery = 10 * time.Second

// Main parses args, runs a fleet, and says how it is. It ends when ctx does, or
// the time that was asked for is over; it is an error then that not all devices
// run what is wanted of them.
func Main(ctx context.Context, args []string, getenv func(string) string, out io.Writer) error {
	s, err := parse(args, getenv, out)
	if errors.Is(err, flag.ErrHelp) {
		return nil
	} else if err != nil {
		return err
	}
	if s.Data == "" {
		if s.Data, err = os.MkdirTemp("", "dunlin-simulate-"); err != nil {
			return err
		}
		defer os.RemoveAll(s.Data)
	}
	s.cfg.Dir = s.Data
	f, err := New(s.cfg)
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "%d devices, seed %d\n", s.Devices, s.cfg.Seed)
	if s.end > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, s.end)
		defer cancel()
	}
	return f.tell(ctx, s.Metrics, out)
}

// Check says what is wrong with the arguments that Main would be given.
func Check(args []string, getenv func(string) string) error {
	_, err := parse(args, getenv, io.Discard)
	return err
}

// tell runs a fleet and says how it is.
func (f *Fleet) tell(ctx context.Context, metrics string, out io.Writer) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var wg sync.WaitGroup
	defer wg.Wait()
	if metrics != "" {
		l, err := net.Listen("tcp", metrics)
		if err != nil {
			return fmt.Errorf("%w; --metrics-listen chooses another address", err)
		}
		registry := prometheus.NewRegistry()
		registry.MustRegister(collector{f})
		mux := http.NewServeMux()
		mux.Handle("GET /metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{}))
		server := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}
		wg.Go(func() { _ = server.Serve(l) })
		defer server.Close()
		fmt.Fprintf(out, "metrics at http://%s/metrics\n", l.Addr())
	}
	began := time.Now()
	ended := make(chan error, 1)
	run, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	go func() { ended <- f.Run(run) }()
	tick := time.NewTicker(statusEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			fmt.Fprintln(out, f.Status().line(time.Since(began)))
		case err := <-ended:
			return err
		case <-ctx.Done():
			s := f.Status() // before they say good-bye
			stop()
			err := <-ended
			fmt.Fprintln(out, s.line(time.Since(began)))
			if err == nil && s.Converged < s.Devices {
				err = fmt.Errorf("%d of %d devices do not run what they should: %s", s.Devices-s.Converged, s.Devices, s.Reason)
			}
			return err
		}
	}
}

// line is a status in one line.
func (s Status) line(after time.Duration) string {
	text := fmt.Sprintf("%6.0f s: %d of %d devices joined, %d connected, %d run what they should; %d agents ended by themselves", after.Seconds(), s.Joined, s.Devices, s.Connected, s.Converged, s.Failed)
	if s.SwitchP99 > 0 {
		text += fmt.Sprintf("; from document to switch p50 %.0f ms, p99 %.0f ms", ms(s.SwitchP50), ms(s.SwitchP99))
	}
	if s.Answered+s.Unanswered > 0 {
		text += fmt.Sprintf("; %d requests were answered, %d failed", s.Answered, s.Unanswered)
	}
	if s.Reason != "" && s.Joined == s.Devices {
		text += "; " + s.Reason
	}
	return text
}

func ms(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// collector exports how a fleet is.
type collector struct{ fleet *Fleet }

var (
	devicesNow  = prometheus.NewDesc("dunlin_simulated_devices", "Simulated devices by what they are: all, joined, connected, converged, or failed, whose agent has ended by itself.", []string{"state"}, nil)
	startsNow   = prometheus.NewDesc("dunlin_simulated_starts_total", "Starts of simulated devices' agents.", nil, nil)
	requestsNow = prometheus.NewDesc("dunlin_simulated_requests_total", "Requests that simulated devices were asked.", []string{"outcome"}, nil)
	switchNow   = prometheus.NewDesc("dunlin_simulated_switch_seconds", "From the newest desired document to the switch that it wants, over the devices.", []string{"quantile"}, nil)
)

// Describe implements prometheus.Collector.
func (collector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{devicesNow, startsNow, requestsNow, switchNow} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (c collector) Collect(ch chan<- prometheus.Metric) {
	s := c.fleet.Status()
	for state, n := range map[string]int{"all": s.Devices, "joined": s.Joined, "connected": s.Connected, "converged": s.Converged, "failed": s.Failed} {
		ch <- prometheus.MustNewConstMetric(devicesNow, prometheus.GaugeValue, float64(n), state)
	}
	ch <- prometheus.MustNewConstMetric(startsNow, prometheus.CounterValue, float64(s.Starts))
	ch <- prometheus.MustNewConstMetric(requestsNow, prometheus.CounterValue, float64(s.Answered), "success")
	ch <- prometheus.MustNewConstMetric(requestsNow, prometheus.CounterValue, float64(s.Unanswered), "failure")
	ch <- prometheus.MustNewConstMetric(switchNow, prometheus.GaugeValue, s.SwitchP50.Seconds(), "0.5")
	ch <- prometheus.MustNewConstMetric(switchNow, prometheus.GaugeValue, s.SwitchP99.Seconds(), "0.99")
}

// parse reads the settings and makes a Config of them.
func parse(args []string, getenv func(string) string, help io.Writer) (*settings, error) {
	s := &settings{Devices: 100, Class: "raspberry-pi-5", Name: "sim", Requests: "0", LogLevel: "warn", LogFormat: "text"}
	labels := map[string]string{}
	err := program.Source{
		Program: "dunlin-agent simulate", Prefix: "DUNLIN_SIMULATE_", Args: args, Getenv: getenv, Help: help,
		Notes: "Runs a fleet of simulated devices in one process, against a real controller.",
	}.Load([]program.Setting{
		{Name: "controller", Usage: "base `URL` of the controller, or mqtts://host:port of its broker", Value: &s.Controller},
		{Name: "ca", Usage: "PEM `file` of authorities that may vouch for the controller beside its own; system: those that this system trusts", Value: &s.CA},
		{Name: "join-token", Usage: "`@file` with a token by which so many devices may join; also DUNLIN_JOIN_TOKEN", Value: &s.JoinToken, Environment: "DUNLIN_JOIN_TOKEN", Secret: true},
		{Name: "devices", Usage: "`number` of devices", Value: &s.Devices},
		{Name: "class", Usage: "`profiles` of the devices' classes, comma apart, each with its part: jetson-orin-nano-8gb=30,raspberry-pi-5=70", Value: &s.Class},
		{Name: "firmware-profiles", Usage: "`folder` of firmware profiles beside the built-in ones", Value: &s.Profiles},
		{Name: "name", Usage: "`name` of the devices, before their number", Value: &s.Name},
		{Name: "seed", Usage: "`number` from which all chances come; 0: another each time, which is printed", Value: &s.Seed},
		{Name: "script", Usage: "YAML `file` of what befalls the fleet, and when", Value: &s.Script},
		{Name: "sim-script", Usage: "YAML `file` of what befalls each device, and when, as of dunlin-agent run", Value: &s.SimScript},
		{Name: "requests-per-second", Usage: "`rate` at which each device is asked for inferences of each of its models", Value: &s.Requests},
		{Name: "for", Usage: "`time` after which it ends, like 10m; without one, when it is interrupted", Value: &s.For},
		{Name: "data", Usage: "`folder` for the bundles, once for all devices; without one, a temporary one", Value: &s.Data},
		{Name: "metrics-listen", Usage: "`host:port` of Prometheus metrics, on loopback; without one, there are none", Value: &s.Metrics},
		{Name: "log-level", Usage: "`level` of the log: debug, with that of each device, info, warn or error", Value: &s.LogLevel},
		{Name: "log-format", Usage: "`format` of the log: text or json", Value: &s.LogFormat},
	}, s, func(flags *flag.FlagSet) {
		flags.Func("label", "`key=value` label of the devices; may be repeated; in the file, labels is a mapping", func(text string) error {
			k, v, ok := strings.Cut(text, "=")
			if !ok {
				return errors.New("is not key=value")
			}
			labels[k] = v
			return nil
		})
	})
	if errors.Is(err, flag.ErrHelp) {
		return nil, err
	}
	if s.Labels == nil {
		s.Labels = map[string]string{}
	}
	maps.Copy(s.Labels, labels)
	if faults := s.check(); faults != nil {
		err = errors.Join(err, fmt.Errorf("%w: %w", program.ErrUsage, faults))
	}
	return s, err
}

// check makes the Config and reports what is wrong with the settings.
func (s *settings) check() error {
	var errs []error
	add := func(name string, err error) {
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", name, err))
		}
	}
	c := &s.cfg
	*c = Config{Controller: s.Controller, JoinToken: s.JoinToken, Devices: s.Devices, Name: s.Name, Labels: s.Labels, System: s.CA == "system"}
	var err error
	add("controller", program.CheckURL(s.Controller, "https", "mqtts"))
	if s.JoinToken == "" {
		add("join-token", errors.New("is missing: make one with `dunlin join-token create --uses N`"))
	}
	if s.CA != "" && !c.System {
		c.Roots, err = pki.ReadCertificates(s.CA)
		add("ca", err)
	}
	c.Classes, err = s.classes()
	add("class", err)
	if s.Seed < 0 {
		add("seed", fmt.Errorf("is %d, allowed are 0 to %d", s.Seed, math.MaxInt))
	}
	if c.Seed = uint64(s.Seed); c.Seed == 0 {
		c.Seed = rand.Uint64() >> 1
	}
	if s.Script != "" {
		c.Faults, err = ReadScript(s.Script)
		add("script", err)
	}
	if s.SimScript != "" {
		c.Script, err = sim.ReadScript(s.SimScript)
		add("sim-script", err)
	}
	if c.RequestsPerSecond, err = strconv.ParseFloat(s.Requests, 64); err != nil || !(c.RequestsPerSecond >= 0 && c.RequestsPerSecond <= maxRequests) {
		add("requests-per-second", fmt.Errorf("is %q, allowed are 0 to %d", s.Requests, maxRequests))
	}
	if s.For != "" {
		if s.end, err = time.ParseDuration(s.For); err != nil || s.end <= 0 {
			add("for", fmt.Errorf("is %q, it must be a duration above 0, like 10m", s.For))
		}
	}
	if s.Metrics != "" {
		add("metrics-listen", program.CheckAddress(s.Metrics))
	}
	if s.Devices < 1 || s.Devices > MaxDevices {
		add("devices", fmt.Errorf("is %d, allowed are 1 to %d", s.Devices, MaxDevices))
	}
	level := new(slog.LevelVar)
	c.Log, err = telemetry.NewLevelLogger(os.Stderr, level, s.LogLevel, s.LogFormat)
	add("log", err)
	if err == nil && level.Level() <= slog.LevelDebug {
		c.Agents = c.Log
	}
	return errors.Join(errs...)
}

// maxRequests bounds Config.RequestsPerSecond where a user gives it.
const maxRequests = 1000

// classes reads the classes and their parts.
func (s *settings) classes() ([]Share, error) {
	var folders []string
	if s.Profiles != "" {
		folders = append(folders, s.Profiles)
	}
	set, err := profiles.Load(folders...)
	if err != nil {
		return nil, err
	}
	var all []Share
	for part := range strings.SplitSeq(s.Class, ",") {
		name, text, weighted := strings.Cut(strings.TrimSpace(part), "=")
		share := Share{Weight: 1}
		if share.Profile, err = set.Named(name); err != nil {
			return nil, err
		}
		if weighted {
			if share.Weight, err = strconv.Atoi(text); err != nil || share.Weight < 1 || share.Weight > MaxDevices {
				return nil, fmt.Errorf("%s: its part is %q, allowed are 1 to %d", name, text, MaxDevices)
			}
		}
		all = append(all, share)
	}
	return all, nil
}
