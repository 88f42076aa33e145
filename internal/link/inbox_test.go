package link

import (
	"bytes"
	"crypto/sha256"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/proto"

	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

func TestInboxBounds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newInbox()
		for i := range uint64(3) {
			b.put(desired(i))
		}
		for i := range inboxSize + 5 {
			b.put(&dunlinv1.Block{Offset: uint64(i)})
		}
		go b.run(t.Context())
		synctest.Wait() // desired 2 is offered; the next takes its place
		b.put(desired(3))
		synctest.Wait()
		if m := (<-b.out).(*dunlinv1.Desired); m.Generation.Number != 3 {
			t.Errorf("generation %d came, want the newest", m.Generation.Number)
		}
		for i := range inboxSize {
			if m := (<-b.out).(*dunlinv1.Block); m.Offset != uint64(i) {
				t.Fatalf("block %d came at place %d", m.Offset, i)
			}
		}
		synctest.Wait()
		select {
		case m := <-b.out:
			t.Errorf("a full inbox kept %v", m)
		default:
		}
		if n := b.dropped.Load(); n != 5 {
			t.Errorf("%d dropped, want 5", n)
		}
	})
}

func TestDecodeRefuses(t *testing.T) {
	encoded := func(change func(*dunlinv1.Desired)) []byte {
		d := desired(1)
		change(d)
		b, err := proto.Marshal(d)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	topic := Down("dev", Desired)
	for name, c := range map[string]struct {
		topic   string
		payload []byte
	}{
		"no generation":        {topic, encoded(func(d *dunlinv1.Desired) { d.Generation = nil })},
		"short digest":         {topic, encoded(func(d *dunlinv1.Desired) { d.Sha256 = d.Sha256[1:] })},
		"flipped bit":          {topic, encoded(func(d *dunlinv1.Desired) { d.Document[0] ^= 1 })},
		"wrong size":           {topic, encoded(func(d *dunlinv1.Desired) { d.SizeBytes++ })},
		"size above inline":    {topic, encoded(func(d *dunlinv1.Desired) { d.SizeBytes = MaxInlineDocument + 1 })},
		"too large":            {topic, make([]byte, MaxPayload+1)},
		"not protobuf":         {topic, []byte{0xff}},
		"empty":                {topic, nil},
		"another device":       {Down("other", Desired), encoded(func(*dunlinv1.Desired) {})},
		"a topic of the agent": {Up("dev", Hello), nil},
		"empty command":        {Down("dev", Command), nil},
		"block without digest": {Down("dev", Block), nil},
		"epoch without boot":   {EpochTopic, nil},
	} {
		if m, err := decode("dev", c.topic, c.payload); err == nil {
			t.Errorf("%s: gave %v", name, m)
		}
	}
	large, err := decode("dev", topic, encoded(func(d *dunlinv1.Desired) { d.SizeBytes, d.Document = MaxInlineDocument+1, nil }))
	if err != nil {
		t.Errorf("a desired document to ask for: %v, %v", large, err)
	}
}

func FuzzDecode(f *testing.F) {
	sum := sha256.Sum256(nil)
	for kind, m := range map[string]proto.Message{
		Desired: desired(1),
		Command: &dunlinv1.Command{Command: &dunlinv1.Command_HelloAgain{HelloAgain: &dunlinv1.HelloAgain{}}},
		Block:   &dunlinv1.Block{Sha256: sum[:], Data: []byte("x")},
	} {
		b, err := proto.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(Down("dev", kind), b)
	}
	f.Add(EpochTopic, []byte("\x0a\x01i\x12\x01b"))
	f.Fuzz(func(t *testing.T, topic string, payload []byte) {
		m, err := decode("dev", topic, payload)
		if (m == nil) == (err == nil) {
			t.Errorf("decode gave %v and %v", m, err)
		}
		if d, ok := m.(*dunlinv1.Desired); ok && (len(d.Sha256) != sha256.Size || len(d.Document) > MaxInlineDocument) {
			t.Errorf("accepted %v", d)
		}
	})
}

// follow must find the same packets however the stream is cut.
func FuzzFraming(f *testing.F) {
	f.Add([]byte{0x30, 3, 1, 2, 3, 0xd0, 0}, uint8(2))
	f.Add([]byte{0x30, 0xff, 0xff, 0xff, 0x7f}, uint8(1))
	f.Fuzz(func(t *testing.T, stream []byte, cut uint8) {
		var whole, parts framing
		want := whole.follow(stream)
		var got error
		for rest := stream; len(rest) > 0 && got == nil; {
			n := min(int(cut)+1, len(rest))
			got = parts.follow(rest[:n])
			rest = rest[n:]
		}
		if (want == nil) != (got == nil) || want == nil && whole != parts {
			t.Errorf("whole: %+v %v, in parts: %+v %v", whole, want, parts, got)
		}
		if want == nil && whole.left > maxPacket {
			t.Errorf("%d bytes are left of one packet", whole.left)
		}
	})
}

func TestFraming(t *testing.T) {
	packet := func(length int) []byte {
		return append([]byte{0x30, byte(length) | 0x80, byte(length>>7) | 0x80, byte(length >> 14)}, make([]byte, length)...)
	}
	var f framing
	if err := f.follow(bytes.Repeat(packet(maxPacket), 3)); err != nil || f != (framing{}) {
		t.Errorf("packets at the limit: %v, %+v", err, f)
	}
	if err := f.follow(packet(maxPacket + 1)); err == nil {
		t.Error("a packet above the limit passed")
	}
}

func TestBackoff(t *testing.T) {
	b := backoff{max: time.Minute}
	if d := b.next(); d > firstWait {
		t.Errorf("first wait %s", d)
	}
	var waited time.Duration
	for i, bound := range []time.Duration{1, 2, 4, 8, 16, 32, 60, 60, 60} {
		d := b.next()
		if d >= bound*time.Second {
			t.Errorf("wait %d is %s, not below %ds", i, d, bound)
		}
		waited += d
	}
	if waited == 0 {
		t.Error("no attempt waited")
	}
	b.lasted(time.Second)
	if b.bound != briefBackoff {
		t.Errorf("after a short session the bound is %s", b.bound)
	}
	b.lasted(time.Hour)
	if b.bound != baseBackoff {
		t.Errorf("after a long session the bound is %s", b.bound)
	}
	quick := backoff{max: time.Millisecond}
	for range 5 {
		if d := quick.next(); d >= time.Millisecond {
			t.Errorf("wait %s above the largest allowed", d)
		}
	}
}
