package link

import (
	"context"
	"errors"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// openData opens a line at a controller that says whether there may be a
// second connection.
func openData(t *testing.T, b *testBroker, l *running, second bool) *DataLine {
	t.Helper()
	type opened struct {
		line *DataLine
		err  error
	}
	done := make(chan opened, 1)
	go func() {
		line, err := l.OpenData(t.Context())
		done <- opened{line, err}
	}()
	if how := next(t, b, Fetch, new(dunlinv1.FetchRequest)); len(how.Wanted) > 0 {
		t.Fatalf("asked %v at first", how)
	}
	b.send(t, Down("dev", Data), &dunlinv1.FetchData{SecondConnection: second})
	o := within(t, done, "line")
	if o.err != nil {
		t.Fatal(o.err)
	}
	if o.line.Shared() == second {
		t.Errorf("the line is shared: %t", o.line.Shared())
	}
	return o.line
}

// TestDataLine fetches by either kind of line, beside the session's messages,
// until it is cut.
func TestDataLine(t *testing.T) {
	for name, second := range map[string]bool{"second": true, "shared": false} {
		t.Run(name, func(t *testing.T) {
			b := startBroker(t, "127.0.0.1:0")
			l := start(t, b.site, b.address, nil)
			within(t, l.Connected(), "signal of a new session")
			next(t, b, Hello, new(dunlinv1.Hello))
			line := openData(t, b, l, second)
			if !second {
				if _, err := l.OpenData(t.Context()); err == nil || !strings.Contains(err.Error(), "another line is open") {
					t.Errorf("a second line: %v", err)
				}
			}
			request := &dunlinv1.FetchRequest{Id: 3, Model: "m", Sha256: make([]byte, 32), BlockBytes: 4096, Wanted: []byte{1}}
			if err := line.Ask(request); err != nil {
				t.Fatal(err)
			}
			if got := next(t, b, Fetch, new(dunlinv1.FetchRequest)); !proto.Equal(got, request) {
				t.Errorf("asked %v", got)
			}
			block := &dunlinv1.FetchData{Id: 3, Data: []byte("block"), BlobBytes: 5}
			b.send(t, Down("dev", Data), &dunlinv1.FetchData{Id: 3, Data: []byte("x"), Error: "both"}) // dropped
			b.send(t, Down("dev", Data), block)
			if got := within(t, line.Answers(), "block"); !proto.Equal(got, block) {
				t.Errorf("got %v", got)
			}
			b.send(t, Down("dev", Desired), desired(3))
			if m := within(t, l.Inbox(), "desired document"); !proto.Equal(m, desired(3)) {
				t.Errorf("inbox gave %v", m)
			}
			select {
			case got := <-line.Answers():
				t.Errorf("a block came twice: %v", got)
			default:
			}
			id := "dev"
			if second {
				id = DataClient("dev")
			}
			c, ok := b.Clients.Get(id)
			if !ok {
				t.Fatalf("the broker does not know %s", id)
			}
			c.Net.Conn.Close()
			within(t, line.Done(), "end of the line")
			if line.Err() == nil {
				t.Error("the line ended without a cause")
			}
			line.Close()
			if err := line.Ask(request); err == nil {
				t.Error("asked after the end")
			}
			if second {
				if s, err := l.State(); s != Connected {
					t.Errorf("the session ended with the line: %s, %v", s, err)
				}
				return
			}
			within(t, l.Connected(), "signal of the session after")
			next(t, b, Gone, new(dunlinv1.Gone))
			next(t, b, Hello, new(dunlinv1.Hello))
			openData(t, b, l, false).Close()
		})
	}
}

// TestNoDataWithoutAnAnswer: where the controller does not say how, there is no
// line, and nothing stays of it.
func TestNoDataWithoutAnAnswer(t *testing.T) {
	if _, err := new(Link).OpenData(t.Context()); !errors.Is(err, ErrNotConnected) {
		t.Errorf("without a session: %v", err)
	}
	b := startBroker(t, "127.0.0.1:0")
	l := start(t, b.site, b.address, nil)
	within(t, l.Connected(), "signal of a new session")
	next(t, b, Hello, new(dunlinv1.Hello))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := l.OpenData(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("no answer: %v", err)
	}
	next(t, b, Fetch, new(dunlinv1.FetchRequest))
	openData(t, b, l, true).Close()
}

func TestDataTopics(t *testing.T) {
	for filter, want := range map[string]bool{
		Down("a", Data): true, Down("a", "+"): false, Down("a", "#"): false, Down("a", Desired): false, Down("b", Data): false, EpochTopic: false,
	} {
		if got := DataMaySubscribe("a", filter); got != want {
			t.Errorf("DataMaySubscribe(a, %q) = %t", filter, got)
		}
	}
	for topic, want := range map[string]bool{Up("a", Fetch): true, Up("a", Hello): false, Up("b", Fetch): false, Down("a", Data): false} {
		if got := DataMayPublish("a", topic); got != want {
			t.Errorf("DataMayPublish(a, %q) = %t", topic, got)
		}
	}
	if CheckDevice(DataClient("a")) == nil {
		t.Error("a device may have the name of another one's second connection")
	}
}

func TestCheckFetch(t *testing.T) {
	good := &dunlinv1.FetchRequest{Sha256: make([]byte, 32), BlockBytes: MinFetchBlock, Wanted: make([]byte, MaxWanted/8), First: maxFirst}
	if err := CheckFetch(good); err != nil {
		t.Error(err)
	}
	for name, change := range map[string]func(*dunlinv1.FetchRequest){
		"sha256":      func(m *dunlinv1.FetchRequest) { m.Sha256 = m.Sha256[1:] },
		"block_bytes": func(m *dunlinv1.FetchRequest) { m.BlockBytes-- },
		"wanted":      func(m *dunlinv1.FetchRequest) { m.Wanted = append(m.Wanted, 0) },
		"first":       func(m *dunlinv1.FetchRequest) { m.First++ },
	} {
		m := proto.CloneOf(good)
		change(m)
		if err := CheckFetch(m); err == nil || !strings.HasPrefix(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
