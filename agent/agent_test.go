package agent

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/dunlin/dunlin/agent/state"
	profiles "github.com/dunlin/dunlin/firmware-profiles"
	"github.com/dunlin/dunlin/internal/link"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// startAgent runs an agent; stop ends it and checks that it ended well.
func startAgent(t *testing.T, cfg Config) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- Run(ctx, cfg) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("the agent ended: %v", err)
		}
	})
	t.Cleanup(stop)
	return stop
}

// lines gives what is written to it.
type lines chan string

func (l lines) Write(p []byte) (int, error) {
	l <- string(p)
	return len(p), nil
}

// saysAndServes has a device that cannot follow its controller say why, and go
// on until it is stopped.
func saysAndServes(t *testing.T, a *agent, log lines, why string) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	close(a.tried)
	ended := make(chan error, 1)
	go func() { ended <- a.follow.Run(ctx) }()
	for {
		select {
		case line := <-log:
			if strings.Contains(line, why) {
				cancel()
			}
		case err := <-ended:
			if err != nil || ctx.Err() == nil {
				t.Errorf("it ends: %v", err)
			}
			return
		}
	}
}

// A device that has models and cannot be who it was, as it is of the time of
// secrets and has no token, or as its key is lost, goes on serving them. One
// that has none ends.
func TestServesWhereItCannotJoin(t *testing.T) {
	c := startControl(t)
	cfg := testConfig(t, c)
	log := make(lines, 100)
	cfg.Log = slog.New(slog.NewTextHandler(log, nil))
	desired := state.Desired{Incarnation: "i", Number: 1, SHA256: []byte{1}, Document: []byte{}}

	cfg.JoinToken = ""
	a, store := openAgentAndStore(t, cfg)
	close(a.tried)
	if err := a.follow.Run(t.Context()); err == nil || !strings.Contains(err.Error(), "no join token") {
		t.Errorf("without models: %v", err)
	}
	if err := store.SetDesired(t.Context(), desired); err != nil {
		t.Fatal(err)
	}
	saysAndServes(t, openAgent(t, cfg), log, "no join token")

	cfg.JoinToken = c.Token
	a, _ = openAgentAndStore(t, cfg)
	if err := a.follow.Identity.Join(t.Context(), a.follow.Info()); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(cfg.Data, "device.key"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	calls := c.Calls("Join")
	saysAndServes(t, openAgent(t, cfg), log, "device.key holds no PEM block")
	if c.Calls("Join") != calls {
		t.Error("it joined as another")
	}
}

// openAgent puts the parts of an agent together, and starts none of them.
func openAgent(t *testing.T, cfg Config) *agent {
	t.Helper()
	a, _ := openAgentAndStore(t, cfg)
	return a
}

// openAgentAndStore is openAgent; it gives the store, too.
func openAgentAndStore(t *testing.T, cfg Config) (*agent, *state.Store) {
	t.Helper()
	if err := os.MkdirAll(cfg.Data, 0o700); err != nil {
		t.Fatal(err)
	}
	store, err := state.Open(t.Context(), filepath.Join(cfg.Data, stateFile), state.Limits{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { store.Close() })
	t.Cleanup(cfg.openMachine(cfg.Data))
	a, err := newAgent(t.Context(), cfg, profiles.Profile{}, &dunlinv1.DeviceInfo{}, store, "")
	if err != nil {
		t.Fatal(err)
	}
	return a, store
}

// until asks again and again until there is no error.
func until(t *testing.T, what string, try func() error) {
	t.Helper()
	for end := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		err := try()
		if err == nil {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("never %s: %v", what, err)
		}
	}
}

// classify sends an image without a stroke and gives the version that answered.
func classify(url, name string) (string, error) {
	body := `{"inputs":[{"name":"image","datatype":"FP32","shape":[1,1,8,8],"data":[` + strings.TrimSuffix(strings.Repeat("0,", 64), ",") + `]}]}`
	resp, err := http.Post(url+"/v2/models/"+name+"/infer", "", strings.NewReader(body))
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(resp.Body)
	if err != nil {
		return "", err
	}
	var answer struct {
		Version string `json:"model_version"`
		Outputs []any
	}
	if err := json.Unmarshal(raw, &answer); err != nil || resp.StatusCode != http.StatusOK || len(answer.Outputs) == 0 {
		return "", fmt.Errorf("%s: %s", resp.Status, raw)
	}
	return answer.Version, nil
}

func desired(t *testing.T, number uint64, routes []*dunlinv1.DesiredRoute, versions ...*dunlinv1.DesiredVersion) *dunlinv1.Desired {
	t.Helper()
	raw, err := proto.Marshal(&dunlinv1.DesiredDocument{Versions: versions, Routes: routes})
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(raw)
	return &dunlinv1.Desired{
		Generation: &dunlinv1.Generation{Incarnation: "one", Number: number}, Sha256: sum[:], SizeBytes: uint64(len(raw)), Document: raw,
	}
}

func serves(model string, version int64) func(proto.Message) bool {
	return func(m proto.Message) bool {
		r, _ := m.(*dunlinv1.Reported)
		return slices.ContainsFunc(r.GetVersions(), func(v *dunlinv1.VersionStatus) bool {
			return v.Model == model && v.Version == version && v.Serving && v.State == dunlinv1.VersionState_VERSION_STATE_RESIDENT
		})
	}
}

const digits = "../models/examples/digits/"

// The whole of a device's life: join, first version, next version without a
// failed request, a version that it refuses, a start without a controller.
func TestAgent(t *testing.T) {
	c := startControl(t)
	cfg := testConfig(t, c)
	l, err := net.Listen("tcp", cfg.Listen)
	if err != nil {
		t.Fatal(err)
	}
	cfg.Listen = l.Addr().String() // the same for both starts
	l.Close()
	url := "http://" + cfg.Listen
	stop := startAgent(t, cfg)
	c.until("says hello", func(m proto.Message) bool {
		h, ok := m.(*dunlinv1.Hello)
		if ok && (h.Info.RuntimeVersion == "" || !strings.HasPrefix(h.Info.FirmwareProfile, "generic-") || !strings.HasPrefix(h.Info.FirmwareProfileReason, "arch ") || h.Info.Limits.GetHostMemoryBytes() == 0 || h.Info.ServingUrl != url || h.Info.WeightPools != "none: models run on the CPU" || h.Labels["site"] != "test" || h.HaveGeneration != nil) {
			t.Errorf("hello: %v", h)
		}
		return ok
	})
	routes := []*dunlinv1.DesiredRoute{{Name: "classify", Targets: []*dunlinv1.RouteTarget{{Model: "digits", Weight: 1}}}}
	v1, v2 := c.push(digits+"v1.onnx", "digits", 1), c.push(digits+"v2.onnx", "digits", 2)
	bad := c.push("ort/testdata/unknown-operator.onnx", "digits", 3)
	c.send("edge-1", link.Desired, desired(t, 1, routes, v1))
	c.until("serves version 1", serves("digits", 1))

	ctx, cancel := context.WithCancel(t.Context())
	var load sync.WaitGroup
	answered := map[string]int{}
	load.Go(func() {
		for ctx.Err() == nil {
			version, err := classify(url, "classify")
			if err != nil {
				t.Errorf("a request failed: %v", err)
				return
			}
			answered[version]++
		}
	})
	c.send("edge-1", link.Desired, desired(t, 2, routes, v2))
	c.until("serves version 2", serves("digits", 2))
	c.send("edge-1", link.Desired, desired(t, 3, routes, bad))
	c.until("refuses version 3", func(m proto.Message) bool {
		r, _ := m.(*dunlinv1.Reported)
		return slices.ContainsFunc(r.GetVersions(), func(v *dunlinv1.VersionStatus) bool {
			return v.Version == 3 && v.State == dunlinv1.VersionState_VERSION_STATE_QUARANTINED && v.Reason != "" && serves("digits", 2)(m)
		})
	})
	cancel()
	load.Wait()
	if answered["1"] == 0 || answered["2"] == 0 || len(answered) != 2 {
		t.Errorf("answered by %v", answered)
	}
	for _, path := range []string{"/healthz", "/metrics", "/v2/health/live"} {
		resp, err := http.Get(url + path)
		if err != nil {
			t.Fatal(err)
		}
		raw, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || resp.StatusCode != http.StatusOK || path == "/metrics" && !(bytes.Contains(raw, []byte(`dunlin_requests_total{model="digits",outcome="success",version="2"}`)) &&
			bytes.Contains(raw, []byte("\ndunlin_agent_certificate_expiry_seconds 1.")) && bytes.Contains(raw, []byte("\ndunlin_agent_malformed_total 0\n")) && bytes.Contains(raw, []byte("\ndunlin_agent_dropped_total 0\n"))) {
			t.Errorf("%s: %s %v\n%s", path, resp.Status, err, raw)
		}
	}
	if err := Run(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), "another process uses it") {
		t.Errorf("a second agent on the same data: %v", err)
	}
	stop()
	c.until("says good-bye", func(m proto.Message) bool { _, ok := m.(*dunlinv1.Gone); return ok })

	c.stopBroker()
	c.http.Close()
	stop = startAgent(t, cfg)
	until(t, "serves without a controller", func() error {
		version, err := classify(url, "classify")
		if err == nil && version != "2" {
			t.Errorf("answered by version %s", version)
		}
		return err
	})
	stop()
}

func TestJoinIsRefused(t *testing.T) {
	c := startControl(t)
	for _, token := range []string{"", "x" + c.Token} {
		cfg := testConfig(t, c)
		cfg.JoinToken = token
		if err := Run(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), "join") {
			t.Errorf("token %q: %v", token, err)
		}
	}
	cfg := testConfig(t, c)
	c.http.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if err := Run(ctx, cfg); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("while the controller is away: %v", err)
	}
}

// An agent that is told to renew connects once more, with another
// certificate; one that is told that another agent has its identity is quiet,
// and the doctor says so.
func TestAgentRenewsAndStandsDown(t *testing.T) {
	c := startControl(t)
	cfg := simulatedConfig(t, c, "")
	startAgent(t, cfg)
	var hello *dunlinv1.Hello
	says := func(m proto.Message) bool {
		h, ok := m.(*dunlinv1.Hello)
		if ok {
			hello = h
		}
		return ok
	}
	c.until("says hello", says)
	first := hello
	if len(first.CertificateSerial) != 16 || len(first.RootIds) != 1 {
		t.Errorf("hello %v", first)
	}
	until(t, "renews", func() error { // this broker may forget the device for a moment
		c.send("edge-1", link.Command, &dunlinv1.Command{Command: &dunlinv1.Command_RenewNow{RenewNow: &dunlinv1.RenewNow{}}})
		if c.Calls("Renew") == 0 {
			return errors.New("no call")
		}
		return nil
	})
	c.until("says good-bye", func(m proto.Message) bool { _, ok := m.(*dunlinv1.Gone); return ok })
	c.until("says hello again", says)
	if bytes.Equal(hello.CertificateSerial, first.CertificateSerial) || hello.BootId != first.BootId {
		t.Errorf("hello %v after %v", hello, first)
	}
	c.until("reports", func(m proto.Message) bool { _, ok := m.(*dunlinv1.Reported); return ok })
	until(t, "told to the doctor", func() error {
		c.send("edge-1", link.Command, &dunlinv1.Command{Command: &dunlinv1.Command_StandDown{StandDown: &dunlinv1.StandDown{BootId: hello.BootId, KeptHostname: "twin"}}})
		found, _ := diagnose(t, "--data", cfg.Data)
		if f := found["link"]; f.Verdict != Fail || !strings.Contains(f.Detail, "twin") {
			return fmt.Errorf("%v", f)
		}
		return nil
	})
}

// A document that is being put together gives way to one that comes whole.
func TestWholeDocumentEndsAssembly(t *testing.T) {
	c := startControl(t)
	stop := startAgent(t, testConfig(t, c))
	defer stop()
	isHello := func(m proto.Message) bool { _, ok := m.(*dunlinv1.Hello); return ok }
	isRequest := func(m proto.Message) bool { _, ok := m.(*dunlinv1.BlockRequest); return ok }
	c.until("says hello", isHello)
	long := &dunlinv1.Desired{
		Generation: &dunlinv1.Generation{Incarnation: "one", Number: 1}, Sha256: make([]byte, sha256.Size), SizeBytes: 2 * link.MaxBlock,
	}
	c.send("edge-1", link.Desired, long)
	c.until("asks for a block", isRequest)
	whole := desired(t, 1, nil)
	whole.Generation.Incarnation = "two"
	c.send("edge-1", link.Desired, whole)
	c.until("observes the whole one", func(m proto.Message) bool {
		r, _ := m.(*dunlinv1.Reported)
		return r.GetObserved().GetIncarnation() == "two"
	})
	for range 3 { // each time it asks for what it lacks
		c.send("edge-1", link.Command, &dunlinv1.Command{Command: &dunlinv1.Command_HelloAgain{HelloAgain: &dunlinv1.HelloAgain{}}})
		c.until("says hello", isHello)
		c.until("reports", func(m proto.Message) bool {
			if isRequest(m) {
				t.Errorf("goes on with the long one: %v", m)
			}
			_, ok := m.(*dunlinv1.Reported)
			return ok
		})
	}
}

// Events that are raised while the broker comes and goes, and whose
// acknowledgements are lost at random, arrive exactly once each.
func TestEventsArriveOnce(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	const events, disconnects = 100, 10
	c := startControl(t)
	cfg := testConfig(t, c)
	cfg.maxBackoff = 50 * time.Millisecond
	a, store := openAgentAndStore(t, cfg)
	close(a.tried)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- a.follow.Run(ctx) }()
	raised := 0
	raise := func() {
		for range min(events/disconnects, events-raised) {
			raised++
			a.event(&dunlinv1.Event{Kind: "test", Message: fmt.Sprint(raised)})
		}
	}
	raise()
	var stored []*dunlinv1.Event // by sequence, once each
	cuts := 0
	for len(stored) < events || cuts < disconnects {
		select {
		case m := <-c.up:
			b, ok := m.(*dunlinv1.EventBatch)
			if !ok {
				continue
			}
			for _, e := range b.Events {
				switch n := uint64(len(stored)); {
				case e.Sequence == n+1:
					stored = append(stored, e)
				case e.Sequence > n+1:
					t.Fatalf("event %d after %d", e.Sequence, n)
				}
			}
			if cuts < disconnects {
				cuts++
				address := c.address
				c.stopBroker()
				raise()
				c.startBroker(address)
				continue // the acknowledgement is lost
			}
			if rng.IntN(2) == 0 {
				c.send("edge-1", link.Command, &dunlinv1.Command{Command: &dunlinv1.Command_EventAck{EventAck: &dunlinv1.EventAck{
					OutboxId: b.OutboxId, Sequence: b.Events[rng.IntN(len(b.Events))].Sequence,
				}}})
			}
		case <-time.After(patience):
			t.Fatalf("only %d events arrived", len(stored))
		}
	}
	for i, e := range stored {
		if e.Message != fmt.Sprint(i+1) {
			t.Errorf("event %d is %v", i+1, e)
		}
	}
	until(t, "forgets what was acknowledged", func() error {
		c.send("edge-1", link.Command, &dunlinv1.Command{Command: &dunlinv1.Command_EventAck{EventAck: &dunlinv1.EventAck{
			OutboxId: store.OutboxID(), Sequence: events,
		}}})
		left, err := store.Pending(t.Context(), events)
		if err == nil && len(left) > 0 {
			err = fmt.Errorf("%d events are left", len(left))
		}
		return err
	})
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}
