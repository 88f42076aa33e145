package agent

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/eclipse/paho.mqtt.golang/packets"

	"github.com/dunlin/dunlin/agent/device"
	"github.com/dunlin/dunlin/agent/identity"
	"github.com/dunlin/dunlin/agent/state"
	"github.com/dunlin/dunlin/agent/worker"
	profiles "github.com/dunlin/dunlin/firmware-profiles"
	"github.com/dunlin/dunlin/internal/pki"
	"github.com/dunlin/dunlin/internal/program"
)

// Verdict is how a check of the doctor came out.
type Verdict string

// The verdicts. Only Fail keeps the agent from its work.
const (
	Pass Verdict = "pass"
	Warn Verdict = "warn"
	Fail Verdict = "fail"
)

// Finding is the outcome of one check.
type Finding struct {
	Check   string  `json:"check"`
	Verdict Verdict `json:"verdict"`
	Detail  string  `json:"detail"`
	Remedy  string  `json:"remedy,omitempty"`
}

const (
	doctorTimeout = 10 * time.Second // of each check
	maxSkew       = 30 * time.Second
)

// ErrUnhealthy is the error of a device on which a check failed.
var ErrUnhealthy = errors.New("a check failed")

// Doctor parses args as ParseConfig does, and -o table or json, examines the
// device, and prints its findings to out. It changes nothing and may run
// beside the agent.
func Doctor(ctx context.Context, args []string, getenv func(string) string, out, help io.Writer) error {
	var cfg Config
	format := ""
	err := parseInto(&cfg, "dunlin-agent doctor", args, getenv, help, func(fs *flag.FlagSet) {
		fs.StringVar(&format, "o", "table", "`format` of the output: table or json (default table)")
	})
	if errors.Is(err, flag.ErrHelp) {
		return nil
	} else if err != nil {
		return err
	}
	if format != "table" && format != "json" {
		return fmt.Errorf("%w: -o: %q is not table or json", program.ErrUsage, format)
	}
	findings := examine(ctx, cfg)
	if format == "json" {
		enc := json.NewEncoder(out)
		enc.SetIndent("", "  ")
		err = enc.Encode(findings)
	} else {
		err = printFindings(out, findings)
	}
	if err == nil && slices.ContainsFunc(findings, func(f Finding) bool { return f.Verdict == Fail }) {
		err = ErrUnhealthy
	}
	return err
}

func printFindings(w io.Writer, findings []Finding) error {
	b := bufio.NewWriter(w)
	for _, f := range findings {
		fmt.Fprintf(b, "%-4s  %-10s  %s\n", f.Verdict, f.Check, strings.ReplaceAll(f.Detail, "\n", fmt.Sprintf("\n%18s", "")))
		if f.Remedy != "" {
			fmt.Fprintf(b, "%18s-> %s\n", "", f.Remedy)
		}
	}
	return b.Flush()
}

func examine(ctx context.Context, cfg Config) []Finding {
	if cfg.machine == nil {
		defer cfg.openMachine(existing(cfg.Data))()
	}
	info := cfg.machine.Info()
	class, unknown := cfg.classify(ctx, info)
	profile := class.Profile
	findings := append(checkRuntime(ctx, cfg, profile), examineMachine(cfg, profile)...)
	findings = append(findings, checkClass(info, class, unknown))
	if unknown == nil {
		findings = append(findings, checkMemory(cfg, profile))
	}
	findings = append(findings, checkDisk(cfg.Data, uint64(profile.Storage.ReserveBytes)))
	findings = append(findings, checkWeights(ctx, cfg), checkProfiles(cfg.Data))
	id, store, err := storedIdentity(ctx, cfg)
	if err != nil {
		remedy := "what is missing can only be put back, or the device joins again"
		if errors.Is(err, fs.ErrPermission) {
			remedy = "run the doctor as the user that the agent runs as"
		}
		return append(findings, Finding{"identity", Fail, err.Error(), remedy})
	}
	if store != nil {
		defer store.Close()
		findings = append(findings, checkStoodDown(ctx, store, time.Now())...)
	}
	controller := cfg.Controller
	if id.Joined() {
		controller = id.Stored().ControllerURL
	}
	return append(findings, checkIdentity(id, time.Now()), checkClock(ctx, controller, id.Stranger, time.Now), checkBroker(ctx, id), checkRegistry(ctx, id))
}

const joinRemedy = "start the agent with --controller and --join-token @FILE"

// checkIdentity says who the device is, and whether it will stay so.
func checkIdentity(id *identity.Device, now time.Time) Finding {
	c := id.Certificate()
	if c == nil {
		return Finding{"identity", Warn, "the device has not joined a controller", joinRemedy}
	}
	var roots []string
	for _, r := range id.Roots() {
		roots = append(roots, pki.CertificateID(r)[:16])
	}
	f := Finding{Check: "identity", Verdict: Pass, Detail: fmt.Sprintf("%s; key %s; certificate until %s, by %s; roots %s",
		id.Stored().Device, id.Key(), c.NotAfter.UTC().Format(time.RFC3339), c.Issuer.CommonName, strings.Join(roots, ", "))}
	if version := id.TrustVersion(); version > 0 {
		f.Detail += fmt.Sprintf("; trust document %d", version)
	}
	switch left := c.NotAfter.Sub(now); {
	case left < 0:
		f.Verdict, f.Remedy = Fail, "it has expired: start the agent where it reaches the controller, which renews it within the controller's grace period; later, join again with an empty --data folder"
	case left < c.NotAfter.Sub(c.NotBefore)/4:
		f.Verdict, f.Remedy = Warn, "its renewal is overdue: see the agent's log, and that the agent reaches "+id.Stored().ControllerURL
	}
	return f
}

// checkStoodDown says that another agent has the device's identity; nothing
// where that is not so.
func checkStoodDown(ctx context.Context, s *state.Store, now time.Time) []Finding {
	until, cause, err := s.StoodDown(ctx)
	if err != nil || !now.Before(until) {
		return nil
	}
	return []Finding{{"link", Fail, fmt.Sprintf("quiet until %s: %s", until.Format(time.RFC3339), cause),
		"two agents run with one identity, as after copying a data folder: stop one, empty its --data folder, and let it join by itself; then start this one again"}}
}

// storedIdentity reads who the device is, where it has an identity, and gives
// the store, which is nil where there is none. It makes no file.
func storedIdentity(ctx context.Context, cfg Config) (id *identity.Device, s *state.Store, err error) {
	path := filepath.Join(cfg.Data, stateFile)
	if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
		return identity.New(cfg.identity(nil)), nil, nil
	}
	if s, err = state.Open(ctx, path, state.Limits{}); err != nil {
		return nil, nil, err
	}
	c := cfg.identity(s)
	trust, err := s.Trust(ctx)
	if err == nil {
		c.TrustVersion = trust.Version
	} else if errors.Is(err, state.ErrNone) {
		err = nil
	}
	if err == nil {
		id, err = identity.Open(ctx, c)
	}
	if err != nil {
		return nil, nil, errors.Join(err, s.Close())
	}
	return id, s, nil
}

func checkRuntime(ctx context.Context, cfg Config, profile profiles.Profile) []Finding {
	const remedy = "install ONNX Runtime 1.24 or newer and give its path by --runtime-lib or DUNLIN_ORT_LIB; in a checkout, `make runtime` fetches it"
	if cfg.RuntimeLib == "" {
		return []Finding{{"runtime", Fail, "no ONNX Runtime library is named", remedy}}
	}
	ctx, cancel := context.WithTimeout(ctx, doctorTimeout)
	defer cancel()
	found, err := worker.Probe(ctx, worker.Config{Command: cfg.Worker, RuntimeLib: cfg.RuntimeLib, Log: cfg.Log})
	if err != nil {
		return []Finding{{"runtime", Fail, err.Error(), remedy}}
	}
	findings := []Finding{{Check: "runtime", Verdict: Pass, Detail: fmt.Sprintf("ONNX Runtime %s at %s", found.Version, cfg.RuntimeLib)}}
	findings = append(findings, sandboxFinding(found.Sandbox))
	if profile.Name == "" {
		return findings // its check says why
	}
	providers := Finding{Check: "providers", Verdict: Pass, Detail: fmt.Sprintf("%s, by firmware profile %s", strings.Join(usable(profile, found.Providers), ", "), profile.Name)}
	for _, p := range profile.Providers {
		if !slices.Contains(found.Providers, p.Name) {
			providers.Verdict, providers.Detail = Warn, providers.Detail+"; the library lacks "+p.Name
			providers.Remedy = "install an ONNX Runtime that was built with it"
		}
	}
	return append(findings, providers)
}

// sandboxFinding says what holds the processes that open models.
func sandboxFinding(s worker.Sandbox) Finding {
	missing := s.Missing()
	if len(missing) == 0 {
		return Finding{Check: "sandbox", Verdict: Pass, Detail: s.String()}
	}
	return Finding{"sandbox", Warn, fmt.Sprintf("the processes that open models are held without %s; there is %s", strings.Join(missing, " and "), s),
		"use Linux 5.13 or newer with Landlock and seccomp switched on, and no container that refuses them"}
}

// checkMemory compares what models may take with what the device has.
func checkMemory(cfg Config, profile profiles.Profile) Finding {
	budget, err := cfg.memoryBudget(profile)
	if err != nil {
		return Finding{"memory", Warn, err.Error(), "give a budget by --memory-mib"}
	}
	available, total, err := cfg.memory()
	if err != nil {
		return Finding{"memory", Warn, err.Error(), ""}
	}
	f := Finding{Check: "memory", Verdict: Pass, Detail: fmt.Sprintf("models may take %s; %s of %s available", megabytes(uint64(budget)), megabytes(available), megabytes(total))}
	switch {
	case uint64(budget) > total:
		f.Verdict, f.Remedy = Fail, "lower --memory-mib: the device has less"
	case available < uint64(spareFraction*float64(total)):
		f.Verdict, f.Remedy = Warn, "stop what else takes memory: models leave until there is more"
	}
	return f
}

// checkWeights says how weights leave the memory and come back.
func checkWeights(ctx context.Context, cfg Config) Finding {
	const remedy = "install ONNX Runtime 1.24 or newer, with its CUDA provider where there is a GPU"
	if cfg.RuntimeLib == "" {
		return Finding{"weights", Warn, "not examined: no ONNX Runtime library is named", remedy}
	}
	ctx, cancel := context.WithTimeout(ctx, doctorTimeout)
	defer cancel()
	pooling, err := worker.ProbePooling(ctx, worker.Config{Command: cfg.Worker, RuntimeLib: cfg.RuntimeLib, Log: cfg.Log})
	switch {
	case err != nil:
		return Finding{"weights", Warn, "not examined: " + err.Error(), remedy}
	case !pooling.Works:
		return Finding{"weights", Warn, "they do not stay at their addresses, so that models are opened anew from compiled files: " + pooling.Reason, remedy}
	case pooling.Device == "":
		return Finding{Check: "weights", Verdict: Pass, Detail: "no GPU: models are opened anew from compiled files; the runtime would put weights into pools"}
	}
	return Finding{Check: "weights", Verdict: Pass, Detail: "the runtime puts them into pools on " + pooling.Device + ", from where they leave and come back"}
}

// existing gives a folder, or the one that it is to be made in.
func existing(dir string) string {
	for {
		if _, err := os.Stat(dir); err == nil || dir == filepath.Dir(dir) {
			return dir
		}
		dir = filepath.Dir(dir)
	}
}

func checkDisk(data string, reserve uint64) Finding {
	free, size, err := device.Disk(existing(data))
	if err != nil {
		return Finding{"disk", Fail, err.Error(), "choose another folder by --data"}
	}
	f := Finding{Check: "disk", Verdict: Pass, Detail: fmt.Sprintf("%s: %s of %s free, %s kept in reserve", data, megabytes(free), megabytes(size), megabytes(reserve))}
	switch {
	case free < reserve:
		f.Verdict, f.Remedy = Fail, "free some space, or choose another disk by --data: nothing is downloaded before"
	case free < 2*reserve:
		f.Verdict, f.Remedy = Warn, "free some space: only small models can be downloaded"
	}
	return f
}

func megabytes(n uint64) string { return fmt.Sprintf("%d MB", n/1e6) }

// checkClock compares the clock with the controller's, where that answers over
// HTTPS.
func checkClock(ctx context.Context, controller string, by func(host string) *tls.Config, now func() time.Time) Finding {
	const remedy = "set the clock, best by NTP"
	f := Finding{Check: "clock", Verdict: Pass, Detail: now().UTC().Format(time.RFC3339)}
	if y := now().Year(); y < 2025 || y > 2100 {
		return Finding{"clock", Fail, f.Detail + " cannot be", remedy}
	}
	if controller == "" || strings.HasPrefix(controller, "mqtts://") {
		return f
	}
	u, err := url.Parse(controller)
	if err != nil {
		return Finding{"clock", Warn, err.Error(), "correct --controller"}
	}
	client := &http.Client{Transport: &http.Transport{Proxy: http.ProxyFromEnvironment, TLSClientConfig: by(u.Hostname()), DisableKeepAlives: true}}
	resp, err := httpGet(ctx, client, strings.TrimSuffix(controller, "/")+"/healthz")
	if err != nil {
		return Finding{"clock", Warn, f.Detail + ", not compared with the controller's: " + err.Error(), "start the controller, or correct --controller"}
	}
	theirs, err := http.ParseTime(resp.Header.Get("Date"))
	if err != nil {
		return f
	}
	// The header counts whole seconds.
	if skew := now().Sub(theirs).Abs() - time.Second; skew > maxSkew {
		return Finding{"clock", Warn, fmt.Sprintf("%s, %s from the controller's", f.Detail, skew.Round(time.Second)), remedy}
	}
	f.Detail += ", as the controller's"
	return f
}

func httpGet(ctx context.Context, client *http.Client, url string) (*http.Response, error) {
	ctx, cancel := context.WithTimeout(ctx, doctorTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	resp, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	return resp, resp.Body.Close()
}

// checkBroker connects to the broker as a stranger: as the device itself it
// would end the session of an agent that runs.
func checkBroker(ctx context.Context, id *identity.Device) Finding {
	if !id.Joined() {
		return Finding{"broker", Warn, "the device has not joined a controller", joinRemedy}
	}
	const remedy = "start the controller, or see that nothing is between this device and its MQTT port"
	broker := id.Stored().BrokerURL
	u, err := url.Parse(broker)
	if err != nil {
		return Finding{"broker", Fail, err.Error(), "join again with an empty --data folder"}
	}
	dialing, cancel := context.WithTimeout(ctx, doctorTimeout)
	defer cancel()
	conn, err := (&tls.Dialer{Config: id.Stranger(u.Hostname())}).DialContext(dialing, "tcp", u.Host)
	if err != nil {
		return Finding{"broker", Fail, err.Error(), remedy}
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(doctorTimeout))
	connect := packets.NewControlPacket(packets.Connect).(*packets.ConnectPacket)
	connect.ProtocolName, connect.ProtocolVersion, connect.CleanSession, connect.Keepalive = "MQTT", 4, true, 10
	connect.ClientIdentifier = "doctor"
	if err := connect.Write(conn); err != nil {
		return Finding{"broker", Fail, fmt.Sprintf("%s does not take a CONNECT: %v", broker, err), remedy}
	}
	answer, err := packets.ReadPacket(conn)
	if err != nil {
		// Brokers may refuse a stranger by closing the connection.
		return Finding{Check: "broker", Verdict: Pass, Detail: broker + " answers, and refuses clients without credentials"}
	}
	if ack, ok := answer.(*packets.ConnackPacket); !ok {
		return Finding{"broker", Fail, broker + " does not speak MQTT 3.1.1", remedy}
	} else if ack.ReturnCode == packets.Accepted {
		return Finding{"broker", Warn, broker + " lets clients in without credentials", "configure the broker to refuse them"}
	}
	return Finding{Check: "broker", Verdict: Pass, Detail: broker + " answers, and refuses clients without credentials"}
}

func checkRegistry(ctx context.Context, id *identity.Device) Finding {
	registry, client := id.Registry()
	if registry == "" {
		return Finding{"registry", Warn, "the device has not joined a controller", joinRemedy}
	}
	defer client.CloseIdleConnections()
	resp, err := httpGet(ctx, client, strings.TrimSuffix(registry, "/")+"/v2/")
	if reason, refused := pki.Refusal(err); refused {
		return Finding{"registry", Fail, registry + ": " + reason, refusedRemedy}
	} else if err != nil {
		return Finding{"registry", Fail, err.Error(), "start the controller, or see that nothing is between this device and its HTTP port"}
	}
	switch resp.StatusCode {
	case http.StatusOK:
		return Finding{Check: "registry", Verdict: Pass, Detail: registry + " answers and accepts this device"}
	case http.StatusUnauthorized, http.StatusForbidden:
		return Finding{"registry", Fail, registry + " refuses this device's certificate", refusedRemedy}
	default:
		return Finding{"registry", Fail, fmt.Sprintf("%s/v2/ answers %s", registry, resp.Status), "see the controller's log"}
	}
}

const refusedRemedy = "where the device was removed, or its certificate revoked: join again with an empty --data folder"

// usable gives the execution providers that models run on here: those of the
// firmware profile, in its order, that the library was built with.
func usable(profile profiles.Profile, built []string) []string {
	var names []string
	for _, p := range profile.Providers {
		if slices.Contains(built, p.Name) {
			names = append(names, p.Name)
		}
	}
	return names
}
