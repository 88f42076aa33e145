package dispatch

import (
	"context"
	"fmt"
	"log/slog"
	"math"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/proto"

	"github.com/dunlin/dunlin/controller/fleet"
	"github.com/dunlin/dunlin/controller/identity"
	"github.com/dunlin/dunlin/controller/store"
	"github.com/dunlin/dunlin/internal/link"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

func TestHelloAnswers(t *testing.T) {
	timing := defaultTiming
	timing.resend, timing.resendMost = time.Hour, time.Hour // nothing is observed here
	w := fresh(t, timing)
	w.join("dev")
	w.hello("dev", "s1", nil)
	m, at := w.desired("dev", 0, anything)
	current := m.Generation
	for i, have := range []*dunlinv1.Generation{nil, {Incarnation: "other", Number: current.Number}, {Incarnation: current.Incarnation, Number: current.Number + 1}} {
		w.hello("dev", fmt.Sprint("t", i), have)
		m, at = w.desired("dev", at, anything)
		if !proto.Equal(m.Generation, current) {
			t.Errorf("have %v: got %v", have, m.Generation)
		}
	}
	// One that is up to date gets nothing: the ack of an event, which comes
	// after, is the next message.
	w.hello("dev", "u", current)
	w.up("dev", link.Events, &dunlinv1.EventBatch{OutboxId: "o"})
	if next, _ := w.bus.wait(t, "message", at, func(m message) bool { return m.device == "dev" }); next.kind != link.Command {
		t.Errorf("got %s", next.kind)
	}
	w.hello("unknown", "s", nil)
	w.ignored(link.Hello, 1)
	waitFor(t, func() bool {
		w.bus.mu.Lock()
		defer w.bus.mu.Unlock()
		return slices.Equal(w.bus.cut, []string{"unknown"})
	}, "cut off")
}

func TestStaleMessages(t *testing.T) {
	w := fresh(t, defaultTiming)
	w.join("dev")
	w.hello("dev", "s1", nil)
	w.hello("dev", "s2", nil)
	_, at := w.desired("dev", 0, anything)
	w.up("dev", link.Reported, &dunlinv1.Reported{Session: "s1", Sequence: 9})
	w.ignored(link.Reported, 1)
	w.up("dev", link.Gone, &dunlinv1.Gone{Session: "s1"})
	w.ignored(link.Gone, 1)
	w.up("dev", link.Reported, &dunlinv1.Reported{Session: "s2", Sequence: 1})
	w.up("dev", link.Reported, &dunlinv1.Reported{Session: "s2", Sequence: 1})
	w.ignored(link.Reported, 2)
	d, err := w.store.Device(t.Context(), "dev")
	w.must(err)
	if !d.Connected || d.Reported.GetSession() != "s2" {
		t.Errorf("got %+v", d)
	}
	w.up("dev", link.Telemetry, &dunlinv1.Telemetry{Dropped: 7})
	waitFor(t, func() bool { return w.d.Telemetry("dev").GetDropped() == 7 }, "telemetry")
	w.up("dev", link.Gone, &dunlinv1.Gone{Session: "s2"})
	waitFor(t, func() bool { return w.d.Telemetry("dev") == nil }, "gone")
	// A report of a session whose hello was lost asks for it.
	w.up("dev", link.Reported, &dunlinv1.Reported{Session: "s3", Sequence: 1})
	w.bus.wait(t, "question", at, func(m message) bool {
		return isCommand(m, "dev", func(c *dunlinv1.Command) bool { return c.GetHelloAgain() != nil })
	})
}

func TestEventsAcknowledged(t *testing.T) {
	w := fresh(t, defaultTiming)
	w.join("dev")
	at := 0
	send := func(want uint64, sequences ...uint64) {
		t.Helper()
		b := &dunlinv1.EventBatch{OutboxId: "o"}
		for _, n := range sequences {
			b.Events = append(b.Events, &dunlinv1.Event{Sequence: n, Kind: "x"})
		}
		w.up("dev", link.Events, b)
		_, at = w.bus.wait(t, "ack", at, func(m message) bool {
			return isCommand(m, "dev", func(c *dunlinv1.Command) bool {
				return c.GetEventAck().GetOutboxId() == "o" && c.GetEventAck().GetSequence() == want
			})
		})
	}
	send(2, 1, 2)
	send(2, 1, 2)
	send(2, 4)
	send(4, 3, 4)
	got, err := w.store.Events(t.Context(), "dev", 10)
	if err != nil || len(got) != 4 {
		t.Errorf("got %v, %v", got, err)
	}
}

func TestLargeDocument(t *testing.T) {
	w := fresh(t, defaultTiming)
	w.join("dev")
	w.push("digits")
	var text strings.Builder
	text.WriteString("apiVersion: dunlin/v1\nkind: Deployment\nmetadata: {name: d}\nspec: {model: digits, version: 1, selector: {}}\n")
	for i := range 999 {
		fmt.Fprintf(&text, "---\napiVersion: dunlin/v1\nkind: Route\nmetadata: {name: %s%d}\nspec: {targets: [{model: digits, weight: 1}, {model: digits, version: 1, weight: 9}]}\n", strings.Repeat("r", 50), i)
	}
	objects, err := fleet.Parse(text.String())
	w.must(err)
	_, err = w.store.Apply(t.Context(), "user:test", objects, false)
	w.must(err)
	w.d.Replan()
	w.hello("dev", "s1", nil)
	m, at := w.desired("dev", 0, func(m *dunlinv1.Desired, _ *dunlinv1.DesiredDocument) bool {
		return m.SizeBytes > link.MaxInlineDocument
	})
	if len(m.Document) != 0 {
		t.Errorf("%d bytes travel inline", len(m.Document))
	}
	ask := func(sum []byte, offset uint64) *dunlinv1.Block {
		t.Helper()
		w.up("dev", link.Request, &dunlinv1.BlockRequest{Sha256: sum, Offset: offset, Length: link.MaxBlock})
		var in message
		in, at = w.bus.wait(t, "block", at, func(m message) bool { return m.kind == link.Block })
		var b dunlinv1.Block
		w.must(proto.Unmarshal(in.payload, &b))
		if string(b.Sha256) != string(sum) || b.Offset != offset || len(in.payload) > link.MaxPayload {
			t.Errorf("block of %d bytes at %d", len(in.payload), b.Offset)
		}
		return &b
	}
	var whole []byte
	for uint64(len(whole)) < m.SizeBytes {
		b := ask(m.Sha256, uint64(len(whole)))
		if len(b.Data) == 0 {
			t.Fatal("empty block")
		}
		whole = append(whole, b.Data...)
	}
	if sum := identity.Hash(string(whole)); string(sum[:]) != string(m.Sha256) {
		t.Error("other bytes than announced")
	}
	if b := ask(m.Sha256, m.SizeBytes); len(b.Data) != 0 {
		t.Error("data beyond the end")
	}
	if b := ask(make([]byte, 32), 0); len(b.Data) != 0 {
		t.Error("data that nobody knows")
	}
	if b := ask(m.Sha256, 1<<63); len(b.Data) != 0 {
		t.Error("data far beyond the end")
	}
}

func TestMalformed(t *testing.T) {
	w := fresh(t, defaultTiming)
	w.join("dev")
	id := strings.Repeat("x", maxID+1)
	marshal := func(m proto.Message) []byte {
		b, err := proto.Marshal(m)
		w.must(err)
		return b
	}
	tests := []struct {
		kind    string
		payload []byte
	}{
		{link.Hello, []byte{0xff}}, {link.Hello, nil}, {link.Hello, marshal(&dunlinv1.Hello{Session: id, BootId: "b"})},
		{link.Hello, marshal(&dunlinv1.Hello{Session: "s", BootId: "b", Labels: map[string]string{"": "x"}})},
		{link.Hello, make([]byte, link.MaxPayload+1)},
		{link.Reported, nil}, {link.Reported, marshal(&dunlinv1.Reported{Session: "s"})},
		{link.Reported, marshal(&dunlinv1.Reported{Session: "s", Sequence: 1 << 63})},
		{link.Reported, marshal(&dunlinv1.Reported{Session: "s", Sequence: 1, Versions: make([]*dunlinv1.VersionStatus, maxVersions+1)})},
		{link.Events, nil}, {link.Events, marshal(&dunlinv1.EventBatch{OutboxId: "o", Events: []*dunlinv1.Event{{Kind: "x"}}})},
		{link.Events, marshal(&dunlinv1.EventBatch{OutboxId: "o", Events: []*dunlinv1.Event{{Kind: "x", Sequence: 2}, {Kind: "x", Sequence: 2}}})},
		{link.Events, marshal(&dunlinv1.EventBatch{OutboxId: "o", Events: []*dunlinv1.Event{{Sequence: 1}}})},
		{link.Telemetry, []byte{0x09}}, {link.Request, nil}, {link.Request, marshal(&dunlinv1.BlockRequest{Sha256: make([]byte, 32), Length: link.MaxBlock + 1})},
		{link.Request, marshal(&dunlinv1.BlockRequest{Sha256: make([]byte, 31), Length: 1})},
		{link.Gone, nil},
		{link.Reported, marshal(&dunlinv1.Reported{Session: "s", Sequence: 1, Drifts: make([]*dunlinv1.Drift, maxVersions+1)})},
		{link.Telemetry, marshal(&dunlinv1.Telemetry{BootId: id})},
		{link.Telemetry, marshal(&dunlinv1.Telemetry{Models: make([]*dunlinv1.ModelTelemetry, maxModels+1)})},
		{link.Telemetry, marshal(&dunlinv1.Telemetry{Models: []*dunlinv1.ModelTelemetry{{Succeeded: maxCounted + 1}}})},
	}
	for _, f := range []*dunlinv1.VersionFigures{
		{Rows: maxCounted + 1}, {Joules: new(-1.)}, {Joules: new(math.Inf(1))}, {Joules: new(math.MaxFloat64)}, {Latency: &dunlinv1.Buckets{First: 128, Counts: []uint64{1}}},
		{Latency: &dunlinv1.Buckets{First: math.MaxUint32, Counts: []uint64{1}}}, {Confidence: &dunlinv1.Buckets{Counts: make([]uint64, 21)}},
		{Confidence: &dunlinv1.Buckets{Counts: []uint64{maxCounted, 1}}}, {Latency: &dunlinv1.Buckets{Counts: []uint64{math.MaxUint64}}},
	} {
		tests = append(tests, struct {
			kind    string
			payload []byte
		}{link.Telemetry, marshal(&dunlinv1.Telemetry{Models: []*dunlinv1.ModelTelemetry{{Model: "digits", Version: 1, Figures: f}}})})
	}
	want := map[string]float64{}
	for _, tt := range tests {
		w.d.Handle(link.Up("dev", tt.kind), tt.payload)
		want[tt.kind]++
	}
	for _, topic := range []string{"", "x", "dunlin/v1/0/dev/up/hello", link.Up("dev", "other"), link.Down("dev", link.Desired)} {
		w.d.Handle(topic, nil)
		want["topic"]++
	}
	for kind, n := range want {
		waitFor(t, func() bool { return count(t, w.metrics, "dunlin_controller_malformed_total", kind) == n }, "%v malformed of kind %s", n, kind)
	}
	d, err := w.store.Device(t.Context(), "dev")
	if err != nil || d.Connected || d.Reported != nil {
		t.Errorf("something reached the store: %+v, %v", d, err)
	}
}

func TestHandleAfterEnd(t *testing.T) {
	w := fresh(t, defaultTiming)
	w.stop()
	for range queueLimit + 1 {
		w.d.Handle(link.Up("dev", link.Gone), nil)
	}
}

func TestOrder(t *testing.T) {
	w := fresh(t, defaultTiming)
	const devices, reports = 8, 40
	var wg sync.WaitGroup
	for i := range devices {
		w.join(fmt.Sprint("d", i))
	}
	for i := range devices {
		wg.Go(func() {
			name := fmt.Sprint("d", i)
			w.hello(name, "s", nil)
			for n := range reports {
				w.up(name, link.Reported, &dunlinv1.Reported{Session: "s", Sequence: uint64(n + 1)})
			}
		})
	}
	wg.Wait()
	for i := range devices {
		waitFor(t, func() bool {
			d, err := w.store.Device(t.Context(), fmt.Sprint("d", i))
			return err == nil && d.Reported.GetSequence() == reports
		}, "the last report of device %d", i)
	}
	if n := count(t, w.metrics, "dunlin_controller_ignored_total", link.Reported); n != 0 {
		t.Errorf("%v reports came out of order", n)
	}
}

func FuzzTake(f *testing.F) {
	kinds := []string{link.Hello, link.Reported, link.Events, link.Telemetry, link.Request, link.Gone, link.Sources}
	seeds := []proto.Message{
		&dunlinv1.Hello{BootId: "b", Session: "s", Labels: map[string]string{"a": "b"}, HaveGeneration: &dunlinv1.Generation{Incarnation: "i", Number: 3}},
		&dunlinv1.Reported{Session: "s", Sequence: 1, Observed: &dunlinv1.Generation{Number: 1}, Versions: []*dunlinv1.VersionStatus{{Model: "m", Version: 1, Serving: true}}},
		&dunlinv1.EventBatch{OutboxId: "o", Events: []*dunlinv1.Event{{Sequence: 1, Kind: "gap"}}},
		&dunlinv1.Telemetry{CpuUtilisation: new(0.5), BootId: "b", Models: []*dunlinv1.ModelTelemetry{{Model: "m", Version: 1, Succeeded: 3, Figures: &dunlinv1.VersionFigures{Rows: 3, Latency: &dunlinv1.Buckets{First: 9, Counts: []uint64{3}}, Joules: new(1.5)}}}},
		&dunlinv1.BlockRequest{Sha256: make([]byte, 32), Length: 1},
		&dunlinv1.Gone{Session: "s"},
		&dunlinv1.SourcesRequest{Model: "m", Digest: "sha256:" + strings.Repeat("0", 64)},
	}
	for i, m := range seeds {
		b, err := proto.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(uint8(i), b)
		f.Add(uint8(i), b[:len(b)/2])
	}
	s, err := store.Open(context.Background(), filepath.Join(f.TempDir(), "store.db"), store.Options{})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { _ = s.Close() })
	_, hash := identity.NewToken("")
	if _, err := s.CreateJoinToken(context.Background(), "user:test", hash, store.JoinToken{UsesLeft: 1, ExpiresAt: time.Now().Add(time.Hour)}); err != nil {
		f.Fatal(err)
	}
	if err := joinDevice(context.Background(), s, hash, "dev"); err != nil {
		f.Fatal(err)
	}
	metrics := prometheus.NewRegistry()
	d := New(Config{Store: s, Bus: newRecorder(), Log: slog.New(slog.DiscardHandler), Metrics: metrics})
	f.Fuzz(func(t *testing.T, kind uint8, payload []byte) {
		k := kinds[int(kind)%len(kinds)]
		before := count(t, metrics, "dunlin_controller_malformed_total", k)
		_, err := decode(k, payload)
		d.take(t.Context(), []message{{"dev", k, payload}})
		if counted := count(t, metrics, "dunlin_controller_malformed_total", k) > before; counted != (err != nil) {
			t.Errorf("error %v, counted %v", err, counted)
		}
		if _, err := s.Device(t.Context(), "dev"); err != nil {
			t.Fatalf("the store cannot be read any more: %v", err)
		}
	})
}
