package inband

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/opencontainers/go-digest"
	"google.golang.org/protobuf/proto"

	"github.com/dunlin/dunlin/internal/link"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// bus keeps what is sent, and has room as the test says.
type bus struct {
	mu      sync.Mutex
	sent    []sent
	full    map[string]bool
	drained chan struct{}
}

type sent struct {
	device string
	m      *dunlinv1.FetchData
}

func newBus() *bus { return &bus{full: map[string]bool{}, drained: make(chan struct{}, 1)} }

func (b *bus) Publish(topic string, payload []byte) error {
	device, kind, err := link.ParseDown(topic)
	m := new(dunlinv1.FetchData)
	if err == nil {
		err = proto.Unmarshal(payload, m)
	}
	if err != nil || kind != link.Data {
		panic(fmt.Sprint(topic, err))
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.sent = append(b.sent, sent{device, m})
	return nil
}

func (b *bus) SecondConnections() bool { return true }
func (b *bus) Room(device string) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return !b.full[device]
}
func (b *bus) Drained() <-chan struct{} { return b.drained }

func (b *bus) fill(device string, full bool) {
	b.mu.Lock()
	b.full[device] = full
	b.mu.Unlock()
	signal(b.drained)
}

func (b *bus) take() []sent {
	b.mu.Lock()
	defer b.mu.Unlock()
	all := b.sent
	b.sent = nil
	return all
}

// shelf is a registry that gives "model" to every device but "stranger".
type shelf struct {
	blob []byte

	mu           sync.Mutex
	opened, open int
}

type file struct {
	io.ReaderAt
	shelf *shelf
}

func (f file) Close() error {
	f.shelf.mu.Lock()
	defer f.shelf.mu.Unlock()
	f.shelf.open--
	return nil
}

func (s *shelf) Open(_ context.Context, device, model string, d digest.Digest, manifest bool) (Blob, int64, error) {
	if device == "stranger" {
		return nil, 0, ErrRefused
	}
	if model != "model" || d != digest.FromBytes(s.blob) || manifest {
		return nil, 0, ErrUnknown
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.opened++
	s.open++
	return file{bytes.NewReader(s.blob), s}, int64(len(s.blob)), nil
}

func content(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i * i >> 7)
	}
	return b
}

// world runs a server in a bubble of time of its own.
func world(t *testing.T, size int, test func(s *Server, b *bus, r *shelf, malformed *[]string)) {
	synctest.Test(t, func(t *testing.T) {
		b, r := newBus(), &shelf{blob: content(size)}
		var mu sync.Mutex
		var malformed []string
		s := New(Config{Bus: b, Registry: r, Log: slog.New(slog.DiscardHandler), Malformed: func(device string, err error) {
			mu.Lock()
			defer mu.Unlock()
			malformed = append(malformed, device+": "+err.Error())
		}})
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() {
			if err := s.Run(ctx); err != nil {
				t.Error(err)
			}
		})
		test(s, b, r, &malformed)
		cancel()
		wg.Wait()
		if r.open != 0 {
			t.Errorf("%d blobs stay open", r.open)
		}
	})
}

// ask asks for blocks of 4 KiB from first on.
func ask(s *Server, device string, id, first uint64, wanted ...byte) {
	sum := sha256.Sum256(s.cfg.Registry.(*shelf).blob)
	askAs(s, device, &dunlinv1.FetchRequest{Id: id, Model: "model", Sha256: sum[:], BlockBytes: 4096, First: first, Wanted: wanted})
}

func askAs(s *Server, device string, m *dunlinv1.FetchRequest) {
	payload, err := proto.Marshal(m)
	if err != nil {
		panic(err)
	}
	s.Handle(device, payload)
	synctest.Wait()
}

func TestBlocksThatAreWanted(t *testing.T) {
	world(t, 10_000, func(s *Server, b *bus, r *shelf, malformed *[]string) {
		ask(s, "a", 7, 1, 0b101)
		got := b.take()
		if len(got) != 2 {
			t.Fatalf("%d answers, want the block that is there, and one for that which is not", len(got))
		}
		slices.SortFunc(got, func(x, y sent) int { return int(x.m.Block) - int(y.m.Block) })
		if m := got[0].m; m.Id != 7 || m.Block != 1 || !bytes.Equal(m.Data, r.blob[4096:8192]) || m.BlobBytes != 10_000 || m.Error != "" {
			t.Errorf("block 1: %v", m)
		}
		if m := got[1].m; m.Block != 3 || m.Error != Unknown || m.BlobBytes != 10_000 {
			t.Errorf("a block behind the end: %v", m)
		}
		ask(s, "a", 8, 2, 1)
		if got := b.take(); len(got) != 1 || !bytes.Equal(got[0].m.Data, r.blob[8192:]) {
			t.Errorf("the last block: %v", got)
		}
		if r.opened != 1 {
			t.Errorf("the blob was opened %d times", r.opened)
		}
		ask(s, "stranger", 9, 0, 1)
		if got := b.take(); len(got) != 1 || got[0].device != "stranger" || got[0].m.Error != Refused || got[0].m.Id != 9 {
			t.Errorf("a device that is not given the model: %v", got)
		}
		sum := sha256.Sum256([]byte("other"))
		askAs(s, "a", &dunlinv1.FetchRequest{Id: 10, Model: "model", Sha256: sum[:], BlockBytes: 4096, Wanted: []byte{1}})
		if got := b.take(); len(got) != 1 || got[0].m.Error != Unknown || got[0].m.BlobBytes != 0 {
			t.Errorf("a blob that is not there: %v", got)
		}
		askAs(s, "a", &dunlinv1.FetchRequest{Id: 11})
		if got := b.take(); len(got) != 1 || got[0].m.Id != 11 || !got[0].m.SecondConnection {
			t.Errorf("how to fetch: %v", got)
		}
		for _, m := range []*dunlinv1.FetchRequest{
			{Wanted: []byte{1}, BlockBytes: 4096, Sha256: sum[:], Model: "../x"}, {Wanted: []byte{1}, BlockBytes: 4095, Sha256: sum[:], Model: "model"},
			{Wanted: []byte{1}, BlockBytes: 65537, Sha256: sum[:], Model: "model"}, {Wanted: []byte{1}, BlockBytes: 4096, Sha256: sum[:31], Model: "model"},
			{Wanted: make([]byte, 33), BlockBytes: 4096, Sha256: sum[:], Model: "model"}, {Wanted: []byte{1}, First: 1 << 63, BlockBytes: 4096, Sha256: sum[:], Model: "model"},
		} {
			before := len(*malformed)
			askAs(s, "a", m)
			if len(*malformed) != before+1 || len(b.take()) != 0 {
				t.Errorf("not dropped: %v", m)
			}
		}
	})
}

// TestTurns: devices take turns, whoever asked first and for how much; one that
// takes nothing is passed over, and goes on when it does.
func TestTurns(t *testing.T) {
	world(t, 100*4096, func(s *Server, b *bus, r *shelf, _ *[]string) {
		for _, d := range []string{"greedy", "small", "stuck"} {
			b.fill(d, true)
		}
		ask(s, "greedy", 1, 0, 0xff, 0xff, 0xff, 0xff)
		ask(s, "stuck", 2, 0, 0xff)
		ask(s, "small", 3, 0, 0b111)
		if got := b.take(); len(got) != 0 {
			t.Fatalf("%d blocks were sent without room", len(got))
		}
		b.mu.Lock()
		b.full = map[string]bool{"stuck": true}
		b.mu.Unlock()
		signal(b.drained)
		synctest.Wait()
		var order strings.Builder
		for _, x := range b.take() {
			order.WriteString(x.device[:1])
			if x.device == "stuck" {
				t.Error("a block was sent to a device without room")
			}
		}
		// "small" has its three blocks among the first of "greedy".
		if len(order.String()) != 32+3 || bytes.Count([]byte(order.String()[:7]), []byte("s")) != 3 {
			t.Errorf("sent in the order %s", order.String())
		}
		b.fill("stuck", false)
		synctest.Wait()
		if got := b.take(); len(got) != 8 {
			t.Errorf("%d blocks after there was room, want 8", len(got))
		}
	})
}

// TestBounds: a block that is asked for twice is sent once; beyond the limits a
// device is told to come again.
func TestBounds(t *testing.T) {
	world(t, 4096*(maxBlocks+300), func(s *Server, b *bus, r *shelf, _ *[]string) {
		b.fill("a", true)
		all := bytes.Repeat([]byte{0xff}, link.MaxWanted/8)
		ask(s, "a", 1, 0, all...)
		ask(s, "a", 2, link.MaxWanted, all...)
		if got := b.take(); len(got) != 0 {
			t.Fatalf("%d answers", len(got))
		}
		ask(s, "a", 3, 2*link.MaxWanted, 1)
		if got := b.take(); len(got) != 1 || got[0].m.Error != Busy || got[0].m.Id != 3 || got[0].m.RetryMs < uint32(busyLeast.Milliseconds()) || got[0].m.RetryMs > uint32(busyMost.Milliseconds()) {
			t.Errorf("above %d blocks: %v", maxBlocks, got)
		}
		b.fill("a", false)
		synctest.Wait()
		if got := b.take(); len(got) != maxBlocks {
			t.Errorf("%d blocks, want %d", len(got), maxBlocks)
		}
		b.fill("a", true)
		ask(s, "a", 4, 0, 0b11)
		ask(s, "a", 5, 0, 0b111)
		b.fill("a", false)
		synctest.Wait()
		if got := b.take(); len(got) != 3 {
			t.Errorf("%d blocks, want each of 3 once", len(got))
		} else if slices.ContainsFunc(got, func(x sent) bool { return x.m.Id != 5 }) {
			t.Errorf("%v: a block answers a request that was given up, not the one that was made instead", got)
		}

		for i := range maxDevices {
			d := fmt.Sprint("dev-", i)
			b.fill(d, true)
			ask(s, d, 1, 0, 1)
		}
		ask(s, "late", 1, 0, 1)
		if got := b.take(); len(got) != 1 || got[0].device != "late" || got[0].m.Error != Busy {
			t.Errorf("above %d devices: %v", maxDevices, got)
		}
		b.fill("dev-0", false)
		synctest.Wait()
		ask(s, "late", 2, 0, 1)
		if got := b.take(); len(got) != 2 || got[1].device != "late" || got[1].m.Error != "" {
			t.Errorf("when there is room again: %v", got)
		}
		if r.open > maxDevices+10 {
			t.Errorf("%d blobs are open", r.open)
		}
	})
}

func FuzzHandle(f *testing.F) {
	f.Add([]byte{}, "a")
	f.Fuzz(func(t *testing.T, payload []byte, device string) {
		if link.CheckDevice(device) != nil {
			return
		}
		s := New(Config{Bus: newBus(), Registry: &shelf{blob: content(100)}, Log: slog.New(slog.DiscardHandler), Malformed: func(string, error) {}})
		s.take(t.Context(), request{device, payload})
	})
}
