package dispatch

import (
	"context"
	"fmt"
	"log/slog"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/dunlin/dunlin/controller/fleet"
	"github.com/dunlin/dunlin/controller/identity"
	"github.com/dunlin/dunlin/controller/store"
	"github.com/dunlin/dunlin/internal/link"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// answering is a Bus whose devices answer at once, as agents do: a new
// generation is reported as taken in, then as served, each with an event.
type answering struct {
	d       *Dispatcher
	wg      sync.WaitGroup
	todo    chan message
	devices map[string]*answerer
	served  atomic.Int64 // generations
	acked   atomic.Int64
}

type answerer struct {
	mu               sync.Mutex
	sequence, events uint64
}

func (a *answering) Disconnect(string) {}

func (a *answering) Publish(topic string, payload []byte) error {
	device, kind, err := link.ParseDown(topic)
	switch {
	case err != nil:
	case kind == link.Desired:
		a.todo <- message{device, kind, payload}
	case kind == link.Command:
		var c dunlinv1.Command
		if proto.Unmarshal(payload, &c) == nil && c.GetEventAck() != nil {
			a.acked.Add(1)
		}
	}
	return nil
}

func (a *answering) up(device, kind string, m proto.Message) {
	payload, err := proto.Marshal(m)
	if err != nil {
		panic(err)
	}
	a.d.Handle(link.Up(device, kind), payload)
}

func (a *answering) answer() {
	for m := range a.todo {
		var desired dunlinv1.Desired
		var doc dunlinv1.DesiredDocument
		if proto.Unmarshal(m.payload, &desired) != nil || proto.Unmarshal(desired.Document, &doc) != nil {
			panic("not a document")
		}
		one := a.devices[m.device]
		one.mu.Lock()
		r := &dunlinv1.Reported{Session: "s", Observed: desired.Generation}
		for _, v := range doc.Versions {
			r.Versions = append(r.Versions, &dunlinv1.VersionStatus{Model: v.Model, Version: v.Version, Digest: v.Digest, State: dunlinv1.VersionState_VERSION_STATE_STORED})
		}
		one.sequence++
		r.Sequence = one.sequence
		a.up(m.device, link.Reported, r)
		for _, v := range r.Versions {
			v.State, v.Serving = dunlinv1.VersionState_VERSION_STATE_RESIDENT, true
		}
		one.sequence++
		r.Sequence = one.sequence
		a.up(m.device, link.Reported, r)
		one.events++
		a.up(m.device, link.Events, &dunlinv1.EventBatch{OutboxId: "o", Events: []*dunlinv1.Event{{Sequence: one.events, Kind: "version.resident", Message: "serves requests now"}}})
		one.mu.Unlock()
		a.served.Add(1)
	}
}

// fleetOf starts a dispatcher with so many connected devices that answer.
func fleetOf(tb testing.TB, n int) (*store.Store, *answering, func()) {
	tb.Helper()
	s, err := store.Open(context.Background(), filepath.Join(tb.TempDir(), "store.db"), store.Options{})
	if err != nil {
		tb.Fatal(err)
	}
	_, hash := identity.NewToken("")
	if _, err := s.CreateJoinToken(context.Background(), "user:test", hash, store.JoinToken{UsesLeft: uint32(n), ExpiresAt: time.Now().Add(time.Hour)}); err != nil {
		tb.Fatal(err)
	}
	a := &answering{todo: make(chan message, 2*n), devices: map[string]*answerer{}}
	a.d = New(Config{Store: s, Bus: a, Log: slog.New(slog.DiscardHandler)})
	names := make([]string, n)
	for i := range n {
		names[i] = fmt.Sprintf("device-%05d", i)
		a.devices[names[i]] = &answerer{}
		if err := joinDevice(context.Background(), s, hash, names[i]); err != nil {
			tb.Fatal(err)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { _ = a.d.Run(ctx) })
	for range runtime.GOMAXPROCS(0) {
		a.wg.Go(a.answer)
	}
	info := &dunlinv1.DeviceInfo{Hostname: "host", Arch: "arm64", FirmwareProfile: "raspberry-pi-4", CpuModel: "Cortex-A72", AgentVersion: "0.9.0", Limits: &dunlinv1.DeviceLimits{HostMemoryBytes: 1 << 30}}
	for _, name := range names {
		a.up(name, link.Hello, &dunlinv1.Hello{BootId: "b", Session: "s", Info: info, Labels: map[string]string{"site": "demo"}})
	}
	return s, a, func() {
		cancel()
		wg.Wait()
		close(a.todo)
		a.wg.Wait()
		if err := s.Close(); err != nil {
			tb.Error(err)
		}
	}
}

func (a *answering) wait(tb testing.TB, what string, done func() bool) {
	tb.Helper()
	deadline := time.Now().Add(2 * time.Minute)
	for !done() {
		if time.Now().After(deadline) {
			tb.Fatalf("not reached: %s; %d served, %d acked", what, a.served.Load(), a.acked.Load())
		}
		time.Sleep(time.Millisecond)
	}
}

// BenchmarkChange is one change of a deployment to 10,000 devices that answer
// at once: until the store has every report, and until the rollout has
// succeeded.
func BenchmarkChange(b *testing.B) {
	const devices = 10_000
	s, a, stop := fleetOf(b, devices)
	defer stop()
	a.wait(b, "first documents", func() bool { return a.acked.Load() >= devices })
	for range 2 {
		if _, _, err := s.CreateVersion(b.Context(), store.Version{Model: "digits", Digest: rnd(), Size: 10, CreatedBy: "user:test"}); err != nil {
			b.Fatal(err)
		}
	}
	change := 0
	var reported, succeeded time.Duration
	for b.Loop() {
		change++
		objects, err := fleet.Parse(fmt.Sprintf("apiVersion: dunlin/v1\nkind: Deployment\nmetadata: {name: digits}\nspec: {model: digits, version: %d, selector: {}}", 1+change%2))
		if err != nil {
			b.Fatal(err)
		}
		began, acked := time.Now(), a.acked.Load()
		changes, err := s.Apply(b.Context(), "user:test", objects, false)
		if err != nil {
			b.Fatal(err)
		}
		a.d.Replan()
		a.wait(b, "all events", func() bool { return a.acked.Load() >= acked+devices })
		reported += time.Since(began)
		a.wait(b, "success", func() bool {
			r, ok := a.d.Rollout(changes[0].Rollout)
			return ok && r.State == fleet.Succeeded
		})
		succeeded += time.Since(began)
	}
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	b.ReportMetric(reported.Seconds()/float64(change), "s/reported")
	b.ReportMetric(succeeded.Seconds()/float64(change), "s/succeeded")
	b.ReportMetric(float64(m.HeapInuse)/1e6, "heap-MB")
}

// BenchmarkReconnect is 10,000 devices that say hello anew at once and have
// their documents, as after a restart of the broker.
func BenchmarkReconnect(b *testing.B) {
	const devices = 10_000
	s, a, stop := fleetOf(b, devices)
	defer stop()
	a.wait(b, "first documents", func() bool { return a.acked.Load() >= devices })
	have := map[string]*dunlinv1.Generation{}
	all, err := s.Devices(b.Context())
	if err != nil {
		b.Fatal(err)
	}
	for _, d := range all {
		have[d.Name] = &dunlinv1.Generation{Incarnation: s.Incarnation(), Number: d.Desired}
	}
	for n := 0; b.Loop(); n++ {
		acked := a.acked.Load()
		for name, g := range have {
			a.up(name, link.Hello, &dunlinv1.Hello{BootId: "b", Session: fmt.Sprint("s", n), HaveGeneration: g, Labels: map[string]string{"site": "demo"}})
			a.up(name, link.Events, &dunlinv1.EventBatch{OutboxId: "o"})
		}
		a.wait(b, "all acknowledged", func() bool { return a.acked.Load() >= acked+devices })
	}
}
