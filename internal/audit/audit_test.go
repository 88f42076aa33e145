package audit

import (
	"bytes"
	"errors"
	"fmt"
	"iter"
	"reflect"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/timestamppb"
	"pgregory.net/rapid"

	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

type record = dunlinv1.AuditRecord

// generate draws a record without its place in a chain.
func generate(t *rapid.T) *record {
	text := rapid.StringN(-1, 12, -1)
	return &record{
		At:  &timestamppb.Timestamp{Seconds: rapid.Int64().Draw(t, "seconds"), Nanos: rapid.Int32().Draw(t, "nanos")},
		Who: text.Draw(t, "who"), Action: text.Draw(t, "action"), Object: text.Draw(t, "object"), Refused: rapid.Bool().Draw(t, "refused"),
		Before: text.Draw(t, "before"), After: text.Draw(t, "after"), Reason: text.Draw(t, "reason"), From: text.Draw(t, "from"),
		Count: rapid.Uint64().Draw(t, "count"),
	}
}

// chain numbers and hashes records after anchor.
func chain(anchor Point, records []*record) (head Point) {
	head = anchor
	for _, r := range records {
		head.Number++
		r.Number = head.Number
		head.Hash = Hash(head.Hash, r)
		r.Hash = bytes.Clone(head.Hash[:])
	}
	return head
}

func generateChain(t *rapid.T, least int) (anchor, head Point, records []*record) {
	for range rapid.IntRange(least, 8).Draw(t, "records") {
		records = append(records, generate(t))
	}
	if rapid.Bool().Draw(t, "forgotten") {
		anchor.Number = rapid.Uint64Range(1, 1<<40).Draw(t, "anchor")
		copy(anchor.Hash[:], rapid.SliceOfN(rapid.Byte(), 32, 32).Draw(t, "hash"))
	}
	return anchor, chain(anchor, records), records
}

func all(records []*record) iter.Seq2[*record, error] {
	return func(yield func(*record, error) bool) {
		for _, r := range records {
			if !yield(r, nil) {
				return
			}
		}
	}
}

func clone(records []*record) (c []*record) {
	for _, r := range records {
		c = append(c, proto.CloneOf(r))
	}
	return c
}

// wantFault wants the record number to be named.
func wantFault(t *rapid.T, err error, number uint64) {
	t.Helper()
	if f, ok := errors.AsType[*Fault](err); !ok || f.Number != number {
		t.Fatalf("got %v, want a fault of record %d", err, number)
	}
}

func TestVerify(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		anchor, head, records := generateChain(t, 0)
		known := []Point{anchor, head, {Number: anchor.Number / 2}} // the last is forgotten, or the anchor
		if anchor.Number == 0 {
			known = known[:2]
		}
		got, err := Verify(anchor, all(records), known...)
		if err != nil || got != head {
			t.Fatalf("got %v, %v, want %v", got, err, head)
		}
	})
}

// TestEveryBit flips each bit of each record, one at a time: its texts and
// hash bit by bit, its numbers too.
func TestEveryBit(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		anchor, head, records := generateChain(t, 1)
		i := rapid.IntRange(0, len(records)-1).Draw(t, "which")
		at := records[i].Number
		try := func(what string, edit func(*record)) {
			edited := clone(records)
			edit(edited[i])
			got, err := Verify(anchor, all(edited), head)
			f, ok := errors.AsType[*Fault](err)
			if !ok || got.Number >= at || what != "number" && f.Number != at {
				t.Fatalf("%s of record %d: %v, good up to %v", what, at, err, got)
			}
		}
		fields := records[i].ProtoReflect().Descriptor().Fields()
		for n := range fields.Len() {
			d := fields.Get(n)
			name := string(d.Name())
			value := records[i].ProtoReflect().Get(d)
			set := func(v protoreflect.Value) { try(name, func(r *record) { r.ProtoReflect().Set(d, v) }) }
			switch d.Kind() {
			case protoreflect.BoolKind:
				set(protoreflect.ValueOfBool(!value.Bool()))
			case protoreflect.Uint64Kind:
				for bit := range 64 {
					set(protoreflect.ValueOfUint64(value.Uint() ^ 1<<bit))
				}
			case protoreflect.StringKind:
				for bit := range 8 * len(value.String()) {
					b := []byte(value.String())
					b[bit/8] ^= 1 << (bit % 8)
					set(protoreflect.ValueOfString(string(b)))
				}
				set(protoreflect.ValueOfString(value.String() + "\x00"))
			case protoreflect.BytesKind:
				for bit := range 8 * len(value.Bytes()) {
					b := bytes.Clone(value.Bytes())
					b[bit/8] ^= 1 << (bit % 8)
					set(protoreflect.ValueOfBytes(b))
				}
				set(protoreflect.ValueOfBytes(nil))
			case protoreflect.MessageKind:
				for bit := range 64 {
					try(name, func(r *record) { r.At.Seconds ^= 1 << bit })
				}
				for bit := range 32 {
					try(name, func(r *record) { r.At.Nanos ^= 1 << bit })
				}
				if records[i].At.Seconds == 0 && records[i].At.Nanos == 0 {
					try(name, func(r *record) { r.At = nil })
				}
			default:
				t.Fatalf("field %s of kind %s is not tried", name, d.Kind())
			}
		}
	})
}

// TestOrder takes records away, swaps, repeats and inserts them.
func TestOrder(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		anchor, head, records := generateChain(t, 2)
		i := rapid.IntRange(0, len(records)-1).Draw(t, "i")
		j := rapid.IntRange(0, len(records)-1).Filter(func(j int) bool { return j != i }).Draw(t, "j")
		first := anchor.Number + 1

		_, err := Verify(anchor, all(slices.Delete(clone(records), i, i+1)), head)
		wantFault(t, err, first+uint64(i))

		_, err = Verify(anchor, all(records[:i]), head) // truncated
		wantFault(t, err, first+uint64(i))
		if got, err := Verify(anchor, all(records[:i])); err != nil || got.Number != anchor.Number+uint64(i) {
			t.Fatalf("no head is known: got %v, %v", got, err)
		}

		swapped := clone(records)
		swapped[i], swapped[j] = swapped[j], swapped[i]
		_, err = Verify(anchor, all(swapped), head)
		wantFault(t, err, first+uint64(min(i, j)))

		_, err = Verify(anchor, all(slices.Insert(clone(records), i+1, records[i])), head)
		wantFault(t, err, first+uint64(i))

		// With a number and a hash that fit, what is put in shows at the one
		// after it; and so does the last one that was removed before it.
		put := generate(t)
		before := anchor
		if i > 0 {
			before = Point{records[i-1].Number, [32]byte(records[i-1].Hash)}
		}
		chain(before, []*record{put})
		if proto.Equal(put, records[i]) {
			t.Skip("the same record")
		}
		_, err = Verify(anchor, all(slices.Insert(clone(records), i, put)), head)
		wantFault(t, err, records[i].Number)
	})
}

// TestRewritten: a chain that was written anew from some record on is good by
// itself, and bad to those who have seen its head, or any later record.
func TestRewritten(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		anchor, head, records := generateChain(t, 1)
		i := rapid.IntRange(0, len(records)-1).Draw(t, "which")
		edited := clone(records)
		edited[i].Who += "x"
		chain(anchor, edited)
		if _, err := Verify(anchor, all(edited)); err != nil {
			t.Fatal(err)
		}
		_, err := Verify(anchor, all(edited), head)
		wantFault(t, err, head.Number)
		_, err = Verify(anchor, all(edited), Point{records[i].Number, [32]byte(records[i].Hash)})
		wantFault(t, err, records[i].Number)
		other := anchor
		other.Hash[0] ^= 1
		_, err = Verify(other, all(records), anchor)
		wantFault(t, err, anchor.Number)
	})
}

func TestReadFails(t *testing.T) {
	broken := errors.New("broken")
	if _, err := Verify(Point{}, func(yield func(*record, error) bool) { yield(nil, broken) }); !errors.Is(err, broken) {
		t.Errorf("got %v", err)
	}
}

// TestMessageHasAllFields fails when the record gets a field that Message does
// not know.
func TestMessageHasAllFields(t *testing.T) {
	if n := (&record{}).ProtoReflect().Descriptor().Fields().Len(); n != 12 {
		t.Errorf("AuditRecord has %d fields, Message covers 11 and the hash", n)
	}
	// What has been written must stay verifiable.
	r := &record{
		Number: 1, At: &timestamppb.Timestamp{Seconds: 1764423962, Nanos: 5}, Who: "user:ada", Action: "object.apply", Object: "Route/r",
		Refused: true, Before: "a", After: "b", Reason: "c", From: "127.0.0.1:9", Count: 2,
	}
	if got := fmt.Sprintf("%x", Hash([32]byte{1}, r)); got != golden {
		t.Errorf("the hash is %s now", got)
	}
}

const golden = "d72c6d7c941234c619f9e3401b6e6bca0ff03eff388196be0cfaafac6374d92d"

func TestPoint(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		p := Point{Number: rapid.Uint64().Draw(t, "number")}
		copy(p.Hash[:], rapid.SliceOfN(rapid.Byte(), 32, 32).Draw(t, "hash"))
		if got, err := ParsePoint(p.String()); err != nil || got != p {
			t.Errorf("%v: got %v, %v", p, got, err)
		}
	})
	zero := Point{}.String()
	for _, bad := range []string{"", ":", "1", "1:", "x" + zero, zero + "0", zero[:len(zero)-1], zero[:len(zero)-1] + "g", "-" + zero, " " + zero} {
		if p, err := ParsePoint(bad); err == nil {
			t.Errorf("%q gives %v", bad, p)
		}
	}
}

// FuzzMessage: records that differ have messages that differ.
func FuzzMessage(f *testing.F) {
	seed := func(r *record) []byte {
		b, err := proto.Marshal(r)
		if err != nil {
			f.Fatal(err)
		}
		return b
	}
	f.Add(seed(&record{Who: "ab"}), seed(&record{Who: "a", Action: "b"}))
	f.Add(seed(&record{Before: "a"}), seed(&record{After: "a"}))
	f.Add(seed(&record{At: &timestamppb.Timestamp{}}), seed(&record{}))
	f.Add(seed(&record{Number: 1, Count: 1 << 56}), seed(&record{Number: 1 << 56, Count: 1}))
	f.Fuzz(func(t *testing.T, x, y []byte) {
		var a, b record
		if proto.Unmarshal(x, &a) != nil || proto.Unmarshal(y, &b) != nil {
			return
		}
		for _, r := range []*record{&a, &b} { // the hash, and what no field holds
			r.Hash = nil
			r.ProtoReflect().SetUnknown(nil)
			if r.At != nil {
				r.At.ProtoReflect().SetUnknown(nil)
			}
		}
		if same := bytes.Equal(Message([32]byte{}, &a), Message([32]byte{}, &b)); same != proto.Equal(&a, &b) {
			t.Errorf("%v and %v: same message: %t", &a, &b, same)
		}
	})
}

// FuzzParsePoint: what is read is written the same, but for capitals and zeros.
func FuzzParsePoint(f *testing.F) {
	f.Add(Point{}.String())
	f.Add("1:")
	f.Fuzz(func(t *testing.T, s string) {
		p, err := ParsePoint(s)
		if err != nil {
			if !reflect.DeepEqual(p, Point{}) {
				t.Errorf("%q: %v with an error", s, p)
			}
			return
		}
		if got := strings.TrimLeft(strings.ToLower(s), "0+"); got != strings.TrimLeft(p.String(), "0") {
			t.Errorf("%q gives %v", s, p)
		}
	})
}
