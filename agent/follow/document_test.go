package follow

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"testing"

	"github.com/dunlin/dunlin/agent/state"
	"github.com/dunlin/dunlin/internal/link"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

func large(n int, fill byte) ([]byte, *dunlinv1.Desired) {
	raw := bytes.Repeat([]byte{fill}, n)
	sum := sha256.Sum256(raw)
	return raw, &dunlinv1.Desired{Generation: &dunlinv1.Generation{Incarnation: "one", Number: uint64(fill)}, Sha256: sum[:], SizeBytes: uint64(n)}
}

func TestAssembly(t *testing.T) {
	raw, d := large(3*link.MaxBlock+10, 1)
	var a assembly
	if a.next() != nil {
		t.Error("asks without a document")
	}
	if err := a.begin(d); err != nil {
		t.Fatal(err)
	}
	for blocks := 1; ; blocks++ {
		r := a.next()
		b := &dunlinv1.Block{Sha256: r.Sha256, Offset: r.Offset, Data: raw[r.Offset : r.Offset+uint64(r.Length)]}
		whole, err := a.add(b)
		if err != nil {
			t.Fatal(err)
		}
		if again, err := a.add(b); again != nil || err != nil { // sent twice
			t.Errorf("a block for the second time gives %v, %v", again, err)
		}
		if whole == nil {
			if err := a.begin(d); err != nil { // the controller repeats itself
				t.Fatal(err)
			}
			continue
		}
		if blocks != 4 || !bytes.Equal(whole.Document, raw) || a.next() != nil {
			t.Errorf("after %d blocks %d bytes", blocks, len(whole.Document))
		}
		break
	}
}

func TestAssemblyRefuses(t *testing.T) {
	raw, d := large(link.MaxBlock+10, 1)
	_, newer := large(link.MaxBlock+10, 2)
	first := &dunlinv1.Block{Sha256: d.Sha256, Data: raw[:link.MaxBlock]}
	var a assembly
	if err := a.begin(d); err != nil {
		t.Fatal(err)
	}
	if _, err := a.add(first); err != nil {
		t.Fatal(err)
	}
	if err := a.begin(newer); err != nil {
		t.Fatal(err)
	}
	if r := a.next(); r.Offset != 0 || !bytes.Equal(r.Sha256, newer.Sha256) {
		t.Errorf("a newer document is asked for from %d", r.Offset)
	}
	if _, err := a.add(first); err != nil || a.next().Offset != 0 {
		t.Error("took in a block of the older document")
	}
	if _, err := a.add(&dunlinv1.Block{Sha256: newer.Sha256}); !errors.Is(err, errUnknownBlock) || a.next() != nil {
		t.Errorf("unknown document: %v", err)
	}
	for _, b := range [][]byte{make([]byte, link.MaxBlock+11), make([]byte, link.MaxBlock+10)} {
		if err := a.begin(d); err != nil {
			t.Fatal(err)
		}
		if whole, err := a.add(&dunlinv1.Block{Sha256: d.Sha256, Data: b}); err == nil || whole != nil || a.next() != nil {
			t.Errorf("%d wrong bytes: %v, %v", len(b), whole, err)
		}
	}
	if err := a.begin(&dunlinv1.Desired{SizeBytes: state.MaxDocument + 1}); err == nil {
		t.Error("takes any size")
	}
}

func FuzzAssembly(f *testing.F) {
	_, d := large(link.MaxBlock+1, 1)
	f.Add(uint64(0), []byte{1, 2, 3})
	f.Add(uint64(1<<63), []byte{})
	f.Fuzz(func(t *testing.T, offset uint64, data []byte) {
		var a assembly
		if err := a.begin(d); err != nil {
			t.Fatal(err)
		}
		for range 3 {
			whole, err := a.add(&dunlinv1.Block{Sha256: d.Sha256, Offset: offset, Data: data})
			if whole != nil && err == nil && sha256.Sum256(whole.Document) != [32]byte(d.Sha256) {
				t.Error("gave another document")
			}
			if uint64(len(a.data)) > d.SizeBytes {
				t.Errorf("holds %d bytes", len(a.data))
			}
			offset += uint64(len(data))
		}
	})
}
