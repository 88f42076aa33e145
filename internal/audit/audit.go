// Package audit chains audit records by their hashes, such that a record that
// was removed, edited, moved or put in shows to whoever knows a later hash.
package audit

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"iter"
	"strconv"
	"strings"

	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// Point is a place in a chain: a record's number and its hash. The zero Point
// is before the first record of all.
type Point struct {
	Number uint64
	Hash   [sha256.Size]byte
}

// String writes NUMBER:HASH, the hash in hexadecimal.
func (p Point) String() string { return fmt.Sprintf("%d:%x", p.Number, p.Hash) }

// ParsePoint reads what String writes.
func ParsePoint(s string) (p Point, err error) {
	number, hash, _ := strings.Cut(s, ":")
	if p.Number, err = strconv.ParseUint(number, 10, 64); err == nil && len(hash) == 2*len(p.Hash) {
		if _, err = hex.Decode(p.Hash[:], []byte(hash)); err == nil {
			return p, nil
		}
	}
	return Point{}, fmt.Errorf("%q is not NUMBER:HASH, the hash in %d hexadecimal digits", s, 2*len(p.Hash))
}

// Message is what a record's hash is over: the hash before, and all fields but
// the hash itself. Numbers have a fixed length and texts their length before
// them, so that no two records give the same bytes.
func Message(previous [sha256.Size]byte, r *dunlinv1.AuditRecord) []byte {
	b := append([]byte("dunlin/v1 audit\x00"), previous[:]...)
	number := func(n uint64) { b = binary.BigEndian.AppendUint64(b, n) }
	flag := func(set bool) {
		if set {
			b = append(b, 1)
		} else {
			b = append(b, 0)
		}
	}
	text := func(s string) {
		number(uint64(len(s)))
		b = append(b, s...)
	}
	number(r.GetNumber())
	flag(r.GetAt() != nil)
	number(uint64(r.GetAt().GetSeconds()))
	number(uint64(r.GetAt().GetNanos()))
	text(r.GetWho())
	text(r.GetAction())
	text(r.GetObject())
	flag(r.GetRefused())
	text(r.GetBefore())
	text(r.GetAfter())
	text(r.GetReason())
	text(r.GetFrom())
	number(r.GetCount())
	return b
}

// Hash gives a record's hash, given that of the record before it.
func Hash(previous [sha256.Size]byte, r *dunlinv1.AuditRecord) [sha256.Size]byte {
	return sha256.Sum256(Message(previous, r))
}

// Fault is the first record of a chain that is not what was written.
type Fault struct {
	Number  uint64
	Problem string
}

func (f *Fault) Error() string { return fmt.Sprintf("record %d %s", f.Number, f.Problem) }

// Verify checks that records follow anchor one by one, and gives the newest
// point. Each known point from the anchor on must be a point of the chain.
// The error is a *Fault, or the first that records gives; the point is then
// the last one that was good.
//
// Records can be edited and all later hashes made to fit: only a known point
// after them shows that.
func Verify(anchor Point, records iter.Seq2[*dunlinv1.AuditRecord, error], known ...Point) (Point, error) {
	head := anchor
	check := func(p Point) error {
		for _, k := range known {
			if k.Number == p.Number && k.Hash != p.Hash {
				return &Fault{k.Number, "is not the one that was seen before: it, or one before it, was replaced"}
			}
		}
		return nil
	}
	if err := check(anchor); err != nil {
		return head, err
	}
	for r, err := range records {
		if err != nil {
			return head, err
		}
		next := Point{Number: head.Number + 1}
		switch n := r.GetNumber(); {
		case n > next.Number:
			return head, &Fault{next.Number, fmt.Sprintf("was removed or moved: record %d is in its place", n)}
		case n < next.Number:
			return head, &Fault{n, fmt.Sprintf("was put in or moved: it stands after record %d", head.Number)}
		}
		next.Hash = Hash(head.Hash, r)
		if !bytes.Equal(next.Hash[:], r.GetHash()) {
			return head, &Fault{next.Number, "does not fit its hash: it, or the one before it, was edited"}
		}
		if err := check(next); err != nil {
			return head, err
		}
		head = next
	}
	for _, k := range known {
		if k.Number > head.Number {
			return head, &Fault{head.Number + 1, fmt.Sprintf("was removed, as were all after it: there was a record %d", k.Number)}
		}
	}
	return head, nil
}
