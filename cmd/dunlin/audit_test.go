package main

import (
	"bytes"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/dunlin/dunlin/internal/audit"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// TestExportEveryBit: an exported log of which one bit was flipped is either
// found out, or says the same.
func TestExportEveryBit(t *testing.T) {
	log := &auditLog{anchor: audit.Point{Number: 6, Hash: [32]byte{1}}}
	log.head = log.anchor
	var records []*dunlinv1.AuditRecord
	for _, text := range []string{"", "a\x00<é>\U0001f600\n"} {
		r := &dunlinv1.AuditRecord{
			Number: log.head.Number + 1, At: timestamppb.New(time.Unix(1764423962, 120)), Who: "user:ada", Action: "object.apply",
			Object: "Route/r", Refused: text != "", Before: text, After: "b", Reason: text, From: "[::1]:9", Count: 1,
		}
		log.head = audit.Point{Number: r.Number, Hash: audit.Hash(log.head.Hash, r)}
		r.Hash = bytes.Clone(log.head.Hash[:])
		records = append(records, r)
	}
	log.records = func(yield func(*dunlinv1.AuditRecord, error) bool) {
		for _, r := range records {
			if !yield(r, nil) {
				return
			}
		}
	}
	var file bytes.Buffer
	if err := log.write(&file); err != nil {
		t.Fatal(err)
	}
	check := func(b []byte) error {
		read, err := readLog(bytes.NewReader(b))
		if err != nil {
			return err
		}
		return (&cli{out: new(bytes.Buffer)}).verify("x", read, []audit.Point{log.anchor, log.head})
	}
	if err := check(file.Bytes()); err != nil {
		t.Fatal(err)
	}
	for bit := range 8 * file.Len() {
		b := bytes.Clone(file.Bytes())
		b[bit/8] ^= 1 << (bit % 8)
		if check(b) != nil {
			continue
		}
		// The chain is over what the lines say, not over how.
		read, err := readLog(bytes.NewReader(b))
		if err != nil || read.anchor != log.anchor || read.head != log.head {
			t.Fatalf("byte %d as %q is not found out: %s", bit/8, b[bit/8], b)
		}
		n := 0
		for r, err := range read.records {
			if err != nil || n == len(records) || !proto.Equal(r, records[n]) {
				t.Errorf("byte %d as %q is not found out: %v, %v", bit/8, b[bit/8], r, err)
			}
			n++
		}
		if n != len(records) {
			t.Errorf("byte %d as %q: %d records", bit/8, b[bit/8], n)
		}
	}
}
