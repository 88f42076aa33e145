package store

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/dunlin/dunlin/models/signing"
)

func TestSignatures(t *testing.T) {
	s, clock := fresh(t)
	ctx := t.Context()
	push(t, s, "net", "d1")
	push(t, s, "other", "d1")
	_, err := s.Apply(ctx, "user:op", parse(t, deployment("dep", "net", 1, "")), false)
	must(t, err)
	records, err := s.Audit(ctx, 1000)
	must(t, err)
	before := len(records)
	for range 2 { // again, nothing changes
		must(t, s.AddSignature(ctx, "user:op", Signature{Model: "net", Digest: "d1", Manifest: "m1", Size: 7, Signer: "k1"}))
		clock.now = clock.now.Add(time.Second)
	}
	must(t, s.AddSignature(ctx, "controller", Signature{Model: "net", Digest: "d1", Manifest: "m2", Size: 8, Signer: "k2"}))
	records, err = s.Audit(ctx, 1000)
	must(t, err)
	if r := records[0]; len(records) != before+2 || r.Who != "controller" || r.Action != "signature.create" || r.Object != "model/net" || r.After != "m2 of d1 by key k2" {
		t.Errorf("%d records, last %+v", len(records)-before, r)
	}
	for query, want := range map[[2]string]int{{"net", "d1"}: 2, {"net", "d2"}: 0, {"other", "d1"}: 0, {"", ""}: 2, {"net", ""}: 2} {
		got, err := s.Signatures(ctx, query[0], query[1])
		must(t, err)
		if len(got) != want || want > 0 && (got[0].Manifest != "m1" || got[0].Size != 7 || got[1].Signer != "k2") {
			t.Errorf("%v: %+v", query, got)
		}
	}
	given := func() []string {
		t.Helper()
		snap, err := s.Snapshot(ctx)
		must(t, err)
		return snap.Objects.Versions[0].Signatures
	}
	if got := given(); !slices.Equal(got, []string{"m2", "m1"}) {
		t.Errorf("devices get %v", got)
	}
	// The newest are given, as many as devices look at.
	for i := range signing.MaxSignatures {
		clock.now = clock.now.Add(time.Second)
		must(t, s.AddSignature(ctx, "user:op", Signature{Model: "net", Digest: "d1", Manifest: fmt.Sprint("n", i), Signer: "k3"}))
	}
	if got := given(); len(got) != signing.MaxSignatures || slices.Contains(got, "m2") || got[0] != fmt.Sprint("n", signing.MaxSignatures-1) {
		t.Errorf("devices get %v", got)
	}
	unsigned, err := s.Unsigned(ctx, "k2")
	must(t, err)
	if len(unsigned) != 1 || unsigned[0].Model != "other" {
		t.Errorf("unsigned %v", unsigned)
	}
}
