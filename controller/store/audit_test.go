package store

import (
	"context"
	"crypto/sha256"
	"database/sql"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"

	"github.com/dunlin/dunlin/controller/fleet"
	"github.com/dunlin/dunlin/controller/identity"
	"github.com/dunlin/dunlin/internal/audit"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// Audit gives the newest records, newest first.
func (s *Store) Audit(ctx context.Context, limit int) (records []AuditRecord, err error) {
	page, err := s.ListAudit(ctx, 0, limit, true)
	for _, r := range page.Records {
		records = append([]AuditRecord{{
			At: r.GetAt().AsTime(), Who: r.GetWho(), Action: r.GetAction(), Object: r.GetObject(), Before: r.GetBefore(), After: r.GetAfter(),
			Refused: r.GetRefused(), Reason: r.GetReason(), From: r.GetFrom(), Count: r.GetCount(),
		}}, records...)
	}
	return records, err
}

// verify checks the whole log, page by page, and gives its head.
func verify(t *testing.T, s *Store, known ...audit.Point) (anchor, head audit.Point, err error) {
	t.Helper()
	page, err := s.ListAudit(t.Context(), 0, 7, false)
	must(t, err)
	anchor = page.Anchor
	head, err = audit.Verify(anchor, func(yield func(*dunlinv1.AuditRecord, error) bool) {
		for len(page.Records) > 0 {
			for _, r := range page.Records {
				if !yield(r, nil) {
					return
				}
			}
			page, err = s.ListAudit(t.Context(), page.Records[len(page.Records)-1].Number, 7, false)
			must(t, err)
		}
	}, known...)
	if err == nil && head != page.Head {
		t.Errorf("verified up to %v, the head is %v", head, page.Head)
	}
	return anchor, head, err
}

func TestAuditOfEachChange(t *testing.T) {
	s, _ := fresh(t)
	vouch(t, s)
	ctx := identity.WithPrincipal(t.Context(), identity.Principal{Kind: identity.User, Name: "op", From: "192.0.2.1:99"})
	_, hash := identity.NewToken("")
	jt, err := s.CreateJoinToken(ctx, "user:op", hash, JoinToken{UsesLeft: 1, ExpiresAt: s.now().Add(time.Hour), Labels: map[string]string{"site": "x"}})
	must(t, err)
	j := joins(t, hash, "cam-1", map[string]string{"a": "b"})
	cert, err := s.Join(ctx, j)
	must(t, err)
	_, err = s.Join(ctx, j) // no change
	must(t, err)
	_, _, err = s.CreateVersion(ctx, Version{Model: "digits", Digest: "d1", CreatedBy: "user:op"})
	must(t, err)
	_, _, err = s.CreateVersion(ctx, Version{Model: "digits", Digest: "d1", CreatedBy: "user:op"}) // no change
	must(t, err)
	_, _, err = s.CreateVersion(ctx, Version{Model: "digits", Digest: "d2", CreatedBy: "user:op"})
	must(t, err)
	one, two := parse(t, deployment("a", "digits", 1, "")), parse(t, deployment("a", "digits", 2, ""))
	for range 2 {
		_, err = s.Apply(ctx, "user:op", one, false)
		must(t, err)
	}
	_, err = s.Apply(ctx, "user:op", two, true) // a dry run
	must(t, err)
	_, err = s.Apply(ctx, "user:op", two, false)
	must(t, err)
	before, err := s.Rollout(ctx, "a-2")
	must(t, err)
	after := before
	after.State, after.Reason = fleet.Failed, "too late"
	must(t, s.SaveRollout(t.Context(), before, after, nil))
	_, err = s.Delete(ctx, "user:op", fleet.KindDeployment, "a")
	must(t, err)
	must(t, s.RemoveDevice(ctx, "user:op", "cam-1"))

	from := "192.0.2.1:99"
	want := []AuditRecord{
		{Who: "user:op", Action: "join-token.create", Object: "join-token/" + jt.ID, After: `1 uses until 2026-01-01T01:00:00Z, labels {"site":"x"}`, From: from},
		{Who: "device:cam-1", Action: "device.join", Object: "device/cam-1", After: "join token " + jt.ID + `, labels {"site":"x"}, its own {"a":"b"}, certificate ` + fmt.Sprintf("%x until %s", cert.SerialNumber, cert.NotAfter.Format(time.RFC3339)), From: from},
		{Who: "user:op", Action: "version.create", Object: "model/digits:1", After: "d1", From: from},
		{Who: "user:op", Action: "version.create", Object: "model/digits:2", After: "d2", From: from},
		{Who: "user:op", Action: "object.apply", Object: "Deployment/a", After: one[0].YAML(), From: from},
		{Who: "user:op", Action: "rollout.start", Object: "rollout/a-1", After: "digits:1", From: from},
		{Who: "user:op", Action: "object.apply", Object: "Deployment/a", Before: one[0].YAML(), After: two[0].YAML(), From: from},
		{Who: "user:op", Action: "rollout.end", Object: "rollout/a-1", Before: "running", After: "superseded", Reason: "a newer rollout took over", From: from},
		{Who: "user:op", Action: "rollout.start", Object: "rollout/a-2", After: "digits:2", From: from},
		{Who: "controller", Action: "rollout.end", Object: "rollout/a-2", Before: "running", After: "failed", Reason: "too late"},
		{Who: "user:op", Action: "object.delete", Object: "Deployment/a", Before: two[0].YAML(), From: from},
		{Who: "user:op", Action: "device.remove", Object: "device/cam-1", Before: `joined 2026-01-01T00:00:00Z, labels {"site":"x"}, its own {"a":"b"}`, From: from},
	}
	got, err := s.Audit(ctx, 100)
	must(t, err)
	for i := range max(len(got), len(want)) {
		var g, w AuditRecord
		if i < len(got) {
			g = got[len(got)-1-i]
		}
		if i < len(want) {
			w = want[i]
			w.At, w.Count = s.now(), 1
		}
		if g != w {
			t.Errorf("record %d:\n got %+v\nwant %+v", i+1, g, w)
		}
	}
	if _, _, err := verify(t, s); err != nil {
		t.Error(err)
	}
}

func TestAuditChain(t *testing.T) {
	s, _ := fresh(t)
	for i := range 20 {
		push(t, s, "m", fmt.Sprint(i))
	}
	anchor, head, err := verify(t, s)
	if err != nil || anchor != (audit.Point{}) || head.Number != 20 {
		t.Fatalf("got %v to %v, %v", anchor, head, err)
	}
	for edit, want := range map[string]string{
		"UPDATE audit_log SET after = 'x' WHERE number = 7":                              "record 7 ",
		"UPDATE audit_log SET at = at + 1 WHERE number = 7":                              "record 7 ",
		"UPDATE audit_log SET count = 2 WHERE number = 20":                               "record 20 ",
		"DELETE FROM audit_log WHERE number = 7":                                         "record 7 ",
		"DELETE FROM audit_log WHERE number = 1":                                         "record 1 ",
		"DELETE FROM audit_log WHERE number > 12":                                        "record 13 ",
		"UPDATE audit_log SET number = 100 - number WHERE number IN (7)":                 "record 7 ",
		"DELETE FROM audit_log":                                                          "record 1 ",
		"INSERT INTO meta VALUES ('audit_anchor', '0:" + strings.Repeat("11", 32) + "')": "record 1 ",
	} {
		must(t, s.write(t.Context(), "edit", func(tx *sql.Tx) error {
			_, err := tx.Exec("CREATE TABLE copy AS SELECT * FROM audit_log; " + edit)
			return err
		}))
		if _, _, err := verify(t, s, head); err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("%s: got %v", edit, err)
		}
		_, err := s.writer.Exec("DELETE FROM meta WHERE key = 'audit_anchor'; DELETE FROM audit_log; INSERT INTO audit_log SELECT * FROM copy; DROP TABLE copy")
		must(t, err)
		if _, _, err := verify(t, s, head); err != nil {
			t.Fatal(err)
		}
	}
}

func TestAuditIsBounded(t *testing.T) {
	s, _ := fresh(t)
	// Most of them are left out: what counts are their numbers.
	_, err := s.writer.Exec(`WITH n (i) AS (VALUES (1), (2), (3), (4), (5), (6), (7), (8), (9), (10), (?))
		INSERT INTO audit_log SELECT i, 0, '', '', '', 0, '', '', '', '', 1, randomblob(32) FROM n`, MaxAudit)
	must(t, err)
	var third []byte
	must(t, s.reader.QueryRow("SELECT hash FROM audit_log WHERE number = 3").Scan(&third))
	for i := range 3 {
		push(t, s, "m", fmt.Sprint(i))
	}
	var n, least int
	must(t, s.reader.QueryRow("SELECT count(*), min(number) FROM audit_log").Scan(&n, &least))
	page, err := s.ListAudit(t.Context(), MaxAudit-1, 10, false)
	must(t, err)
	if n != 7+4 || least != 4 || page.Anchor != (audit.Point{Number: 3, Hash: [32]byte(third)}) || page.Head.Number != MaxAudit+3 || len(page.Records) != 4 {
		t.Errorf("%d records from %d are kept, the anchor is %v, the head %v", n, least, page.Anchor, page.Head)
	}
	first := page.Records[0]
	if _, err := audit.Verify(audit.Point{Number: first.Number, Hash: [32]byte(first.Hash)}, func(yield func(*dunlinv1.AuditRecord, error) bool) {
		for _, r := range page.Records[1:] {
			yield(r, nil)
		}
	}, page.Head); err != nil {
		t.Error(err)
	}
	// A record that somebody took away does not stop what comes.
	_, err = s.writer.Exec("DELETE FROM audit_log WHERE number <= 4")
	must(t, err)
	push(t, s, "m", "3")
	if page, err := s.ListAudit(t.Context(), 0, 1, false); err != nil || page.Anchor.Number != 3 {
		t.Errorf("the anchor is %v, %v", page.Anchor, err)
	}
}

// Texts come back as they were hashed, whatever they hold and however long.
func TestAuditTexts(t *testing.T) {
	s, _ := fresh(t)
	long := strings.Repeat("é", maxAuditText)
	for _, text := range []string{"", "\x00", "a\x00b", "\xff\xfe", "é\xc3", long, long[1:], strings.Repeat("\xff", maxAuditText), strings.Repeat("x", maxAuditText), strings.Repeat("x", maxAuditText+1)} {
		must(t, s.write(t.Context(), "x", func(tx *sql.Tx) error {
			return s.audit(t.Context(), tx, AuditRecord{Who: text, Action: text, Object: text, Before: text, After: text, Reason: text, From: text})
		}))
		records, err := s.Audit(t.Context(), 1)
		must(t, err)
		r := records[0]
		valid := strings.ToValidUTF8(text, string(utf8.RuneError))
		if len(r.Before) > maxAuditText || len(r.Object) > maxAuditName || !utf8.ValidString(r.Before) || r.Before != r.After {
			t.Errorf("%.20q: %d bytes before, object %q", text, len(r.Before), r.Object)
		}
		if sum := fmt.Sprintf("%x", sha256.Sum256([]byte(text))); (len(valid) > maxAuditText) != strings.Contains(r.Before, sum) || (len(valid) > maxAuditName) != strings.Contains(r.Object, sum) {
			t.Errorf("%.20q: the SHA-256 is not as wanted in %.99q", text, r.Before)
		}
		if again := cut(r.Before, maxAuditText); again != r.Before {
			t.Errorf("%.20q is cut twice", text)
		}
	}
	if _, _, err := verify(t, s); err != nil {
		t.Error(err)
	}
	// Pages are bounded in bytes, and hold one record at least.
	seen := map[uint64]bool{}
	for i := range 80 {
		must(t, s.write(t.Context(), "x", func(tx *sql.Tx) error {
			return s.audit(t.Context(), tx, AuditRecord{Before: strings.Repeat("x", maxAuditText), After: fmt.Sprint(i)})
		}))
	}
	for after := uint64(0); after < 90; {
		page, err := s.ListAudit(t.Context(), after, 1000, false)
		must(t, err)
		size := 0
		for _, r := range page.Records {
			seen[r.Number] = true
			size += len(r.Before)
			after = r.Number
		}
		if size > maxAuditPage || len(page.Records) == 0 {
			t.Fatalf("a page of %d records with %d bytes", len(page.Records), size)
		}
	}
	if len(seen) != 90 {
		t.Errorf("the pages have %d records", len(seen))
	}
	if page, err := s.ListAudit(t.Context(), 5, 1000, true); err != nil || page.Records[len(page.Records)-1].Number != 90 || len(page.Records) < 10 {
		t.Errorf("the newest are %d records, %v", len(page.Records), err)
	}
}

// The records of a store from before the chain are carried over.
func TestAuditOfOlderStore(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a.db")
	released := migrations
	defer func() { migrations = released }()
	migrations = released[:2]
	old := open(t, path, Options{})
	_, err := old.writer.Exec(`WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 2500)
		INSERT INTO audit (id, at, who, action, object, detail) SELECT 10 + i, 1000000000 + i, 'user:ada', 'object.apply', 'Route/r', 'detail ' || i FROM n`)
	must(t, err)
	must(t, old.Close())
	migrations = released
	s := open(t, path, Options{})
	push(t, s, "m", "d")
	anchor, head, err := verify(t, s)
	if err != nil || anchor.Number != 0 || head.Number != 2501 {
		t.Errorf("got %v to %v, %v", anchor, head, err)
	}
	page, err := s.ListAudit(t.Context(), 2498, 1000, false)
	must(t, err)
	if len(page.Records) != 3 || page.Records[2].Action != "version.create" {
		t.Fatalf("got %v", page.Records)
	}
	if r := page.Records[1]; r.Number != 2500 || r.Who != "user:ada" || r.Action != "object.apply" || r.Object != "Route/r" || r.After != "detail 2500" || r.Before != "" || r.Count != 1 || r.At.AsTime().UnixNano() != 1000002500 {
		t.Errorf("got %v", r)
	}
}

func refusal(i int) identity.Refusal {
	return identity.Refusal{Who: "nobody", From: fmt.Sprintf("192.0.2.%d:%d", i%3, 1000+i), Action: "call.refused", Object: fmt.Sprint("/", i%4)}
}

func TestRefusedLike(t *testing.T) {
	s, clock := fresh(t)
	ctx := identity.WithPrincipal(t.Context(), identity.Principal{Kind: identity.User, Name: "eve", From: "[2001:db8::1]:99"})
	s.Refused(ctx, identity.Refusal{Action: "call.refused", Object: "/x", Reason: "first"})
	began := clock.now
	for i := range 120 {
		clock.now = clock.now.Add(time.Second / 10)
		s.Refused(t.Context(), refusal(i))
	}
	s.Refused(ctx, identity.Refusal{Action: "call.refused", Object: "/x", Reason: "second"})
	if records, err := s.Audit(t.Context(), 100); err != nil || len(records) != 0 {
		t.Errorf("written at once: %v, %v", records, err)
	}
	must(t, s.writeRefusals(t.Context(), false))
	must(t, s.writeRefusals(t.Context(), false)) // nothing is left
	records, err := s.Audit(t.Context(), 100)
	must(t, err)
	if len(records) != 13 {
		t.Fatalf("%d records: %+v", len(records), records)
	}
	want := AuditRecord{At: began, Who: "user:eve", Action: "call.refused", Object: "/x", Refused: true, Reason: "first", From: "[2001:db8::1]:99", Count: 2}
	if records[12] != want {
		t.Errorf("got %+v", records[12])
	}
	for _, r := range records[:12] {
		if r.Count != 10 || r.Who != "nobody" || !r.Refused {
			t.Errorf("got %+v", r)
		}
	}
}

// A flood of refusals costs little memory, and few records.
func TestRefusalFlood(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	s, clock := fresh(t)
	push(t, s, "m", "d")
	total := uint64(0)
	flood := func(n int) {
		for i := range n {
			object := fmt.Sprint(random.Uint64())
			if i%100 == 0 {
				object += strings.Repeat("x", 5000)
			}
			s.Refused(t.Context(), identity.Refusal{From: fmt.Sprintf("192.0.2.1:%d", random.IntN(1<<16)), Action: "call.refused", Object: object})
		}
		total += uint64(n)
	}
	flood(100_000)
	if n := len(s.refusals.waiting); n != maxRefusals || len(s.refusals.like) != n {
		t.Errorf("%d refusals wait", n)
	}
	must(t, s.writeRefusals(t.Context(), false))
	records, err := s.Audit(t.Context(), 1000)
	must(t, err)
	if r := records[0]; len(records) != 1+maxRefusals+1 || r.Action != "audit.overflow" || r.Count != 100_000-maxRefusals || r.Who != "controller" || !r.Refused {
		t.Errorf("%d records, the newest %+v", len(records), r)
	}
	// A day of it, and two hours.
	for range 26 * 60 {
		clock.now = clock.now.Add(time.Minute)
		flood(60)
		must(t, s.writeRefusals(t.Context(), false))
	}
	must(t, s.writeRefusals(t.Context(), true))
	var n, oldest int
	var counted uint64
	must(t, s.reader.QueryRow("SELECT count(*), sum(count), min(number) FROM audit_log").Scan(&n, &counted, &oldest))
	if limit := 2*maxRefusalsADay + 2*maxRefusalsADay/maxRefusals + 2*24; n > limit || oldest != 1 {
		t.Errorf("%d records, more than %d", n, limit)
	}
	if counted != total+1 {
		t.Errorf("%d refusals are counted, there were %d", counted-1, total)
	}
	if _, _, err := verify(t, s); err != nil {
		t.Error(err)
	}
	// Another day, and each is recorded again.
	clock.now = clock.now.Add(24 * time.Hour)
	must(t, s.writeRefusals(t.Context(), false))
	flood(1)
	must(t, s.writeRefusals(t.Context(), false))
	if records, err := s.Audit(t.Context(), 1); err != nil || records[0].Action != "call.refused" {
		t.Errorf("got %+v, %v", records, err)
	}
}

func TestRefusalsCannotBeWritten(t *testing.T) {
	s, _ := fresh(t)
	for range 3 {
		s.Refused(t.Context(), refusal(0))
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	is(t, s.writeRefusals(ctx, false), context.Canceled)
	must(t, s.writeRefusals(t.Context(), false))
	records, err := s.Audit(t.Context(), 10)
	if err != nil || len(records) != 1 || records[0].Action != "audit.overflow" || records[0].Count != 3 {
		t.Errorf("got %+v, %v", records, err)
	}
}

// The loop writes each minute, and what is left at the end.
func TestRunRefusals(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s := open(t, filepath.Join(dir, "a.db"), Options{})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- s.RunRefusals(ctx, slog.New(slog.DiscardHandler)) }()
		count := func(want int) {
			t.Helper()
			synctest.Wait()
			if records, err := s.Audit(t.Context(), 10); err != nil || len(records) != want {
				t.Errorf("got %+v, %v, want %d", records, err, want)
			}
		}
		s.Refused(t.Context(), refusal(0))
		time.Sleep(refusalInterval - time.Second)
		count(0)
		time.Sleep(time.Second)
		count(1)
		s.Refused(t.Context(), refusal(0))
		time.Sleep(refusalInterval)
		count(2)
		s.Refused(t.Context(), refusal(0))
		cancel()
		must(t, <-done)
		count(3)
	})
}
