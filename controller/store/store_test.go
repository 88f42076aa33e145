package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/protobuf/proto"

	"github.com/dunlin/dunlin/controller/fleet"
	"github.com/dunlin/dunlin/controller/identity"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// clock is a hand-set time.
type clock struct{ now time.Time }

func (c *clock) Now() time.Time { return c.now }

func open(t *testing.T, path string, o Options) *Store {
	t.Helper()
	s, err := Open(t.Context(), path, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func fresh(t *testing.T) (*Store, *clock) {
	c := &clock{time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)}
	return open(t, filepath.Join(t.TempDir(), "store ?#%.db"), Options{Now: c.Now}), c
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func is(t *testing.T, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Fatalf("got error %v, want %v", err, want)
	}
}

// join makes a device known.
func join(t *testing.T, s *Store, device string, labels map[string]string) {
	t.Helper()
	_, hash := identity.NewToken("")
	_, err := s.CreateJoinToken(t.Context(), "user:test", hash, JoinToken{UsesLeft: 1, ExpiresAt: s.now().Add(time.Hour)})
	must(t, err)
	_, err = s.Join(t.Context(), joins(t, hash, device, labels))
	must(t, err)
}

// push makes the next version of a model.
func push(t *testing.T, s *Store, model, digest string) Version {
	t.Helper()
	v, _, err := s.CreateVersion(t.Context(), Version{Model: model, Digest: digest, Size: 10, CreatedBy: "user:test"})
	must(t, err)
	return v
}

func parse(t *testing.T, text string) []fleet.Object {
	t.Helper()
	o, err := fleet.Parse(text)
	must(t, err)
	return o
}

func deployment(name, model string, version int, selector string) string {
	return fmt.Sprintf("apiVersion: dunlin/v1\nkind: Deployment\nmetadata: {name: %s}\nspec: {model: %s, version: %d, selector: {%s}}\n---\n", name, model, version, selector)
}

func TestOpen(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a.db")
	s := open(t, path, Options{})
	first := s.Incarnation()
	if len(first) < 20 {
		t.Errorf("incarnation %q", first)
	}
	info, err := os.Stat(path)
	must(t, err)
	if info.Mode().Perm() != 0o600 {
		t.Errorf("mode %o", info.Mode().Perm())
	}
	for pragma, want := range map[string]string{"journal_mode": "wal", "synchronous": "2", "foreign_keys": "1"} {
		var got string
		must(t, s.writer.QueryRow("PRAGMA "+pragma).Scan(&got))
		if got != want {
			t.Errorf("%s is %s", pragma, got)
		}
	}
	if _, err := s.reader.Exec("DELETE FROM meta"); err == nil {
		t.Error("a reader wrote")
	}
	must(t, s.Close())
	must(t, s.Close())
	s = open(t, path, Options{})
	if s.Incarnation() != first {
		t.Error("another incarnation after opening again")
	}
	_, err = s.writer.Exec(fmt.Sprintf("PRAGMA user_version = %d", len(migrations)+1))
	must(t, err)
	must(t, s.Close())
	_, err = Open(t.Context(), path, Options{})
	is(t, err, ErrNewer)
	other := open(t, filepath.Join(t.TempDir(), "b.db"), Options{})
	if other.Incarnation() == first {
		t.Error("two stores of one incarnation")
	}
}

// A migration that fails in the middle leaves the version before it whole,
// and the next start carries on.
func TestMigrationFails(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a.db")
	first := open(t, path, Options{})
	join(t, first, "d", nil)
	must(t, first.Close())
	released := migrations
	defer func() { migrations = released }()
	migrations = append(slices.Clone(released), "CREATE TABLE one (a TEXT) STRICT; CREATE TABLE two (bad")
	_, err := Open(t.Context(), path, Options{})
	if err == nil || !strings.Contains(err.Error(), fmt.Sprintf("migration %d", len(migrations))) {
		t.Fatalf("got %v", err)
	}
	migrations[len(released)] = "CREATE TABLE one (a TEXT) STRICT; ALTER TABLE devices ADD COLUMN extra TEXT NOT NULL DEFAULT 'x'"
	s := open(t, path, Options{})
	var extra string
	var version int
	must(t, s.reader.QueryRow("SELECT extra FROM devices WHERE name = 'd'").Scan(&extra))
	must(t, s.reader.QueryRow("PRAGMA user_version").Scan(&version))
	if extra != "x" || version != len(migrations) {
		t.Errorf("extra %q, version %d", extra, version)
	}
}

// What a released store looks like never changes: its migrations are pinned
// by what SQLite makes of them.
func TestSchemaTables(t *testing.T) {
	s, _ := fresh(t)
	var tables []string
	must(t, s.read(t.Context(), func(tx *sql.Tx) error {
		return each(t.Context(), tx, "SELECT name FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE 'sqlite_%' ORDER BY name", nil, func(scan func(...any) error) error {
			var name string
			err := scan(&name)
			tables = append(tables, name)
			return err
		})
	}))
	want := "audit_log authorities certificates decided decisions deleted_versions desired devices events join_tokens meta objects outboxes profiles rollout_devices rollouts signatures telemetry tokens trust users versions"
	if got := strings.Join(tables, " "); got != want {
		t.Errorf("got %s", got)
	}
}

func TestVersions(t *testing.T) {
	s, _ := fresh(t)
	ctx := t.Context()
	tests := []struct {
		give    Version
		version int64
		created bool
		exists  bool
	}{
		{Version{Digest: "d1"}, 1, true, false},
		{Version{Digest: "d1"}, 1, false, false},
		{Version{Digest: "d1", Version: 1}, 1, false, false},
		{Version{Digest: "d2", Version: 1}, 0, false, true},
		{Version{Digest: "d5", Version: 5, Source: "plain"}, 5, true, false},
		{Version{Digest: "plain"}, 5, false, false},                // what was pushed
		{Version{Digest: "d5b", Source: "plain"}, 5, false, false}, // the same source
		{Version{Digest: "d6"}, 6, true, false},
		{Version{Digest: "d1", Version: 9}, 1, false, false},
		{Version{Digest: "d1", Version: 5}, 0, false, true},
	}
	for _, tt := range tests {
		tt.give.Model, tt.give.Inputs = "m", []string{"x:FP32[1]"}
		v, created, err := s.CreateVersion(ctx, tt.give)
		if v.Version != tt.version || created != tt.created || errors.Is(err, ErrExists) != tt.exists || (err != nil) != tt.exists {
			t.Errorf("%+v: got %+v, %v, %v", tt.give, v, created, err)
		}
	}
	v, _, err := s.CreateVersion(ctx, Version{Model: "other", Digest: "d1"})
	if err != nil || v.Version != 1 {
		t.Errorf("another model: got %+v, %v", v, err)
	}
	all, err := s.Versions(ctx, "m")
	if err != nil || len(all) != 3 || all[2].Version != 6 || all[0].Inputs[0] != "x:FP32[1]" {
		t.Errorf("got %+v, %v", all, err)
	}
	if all, err := s.Versions(ctx, ""); err != nil || len(all) != 4 {
		t.Errorf("got %+v, %v", all, err)
	}
	_, err = s.Version(ctx, "m", 2)
	is(t, err, ErrNotFound)
}

func TestApply(t *testing.T) {
	s, _ := fresh(t)
	ctx := t.Context()
	push(t, s, "digits", "d1")
	push(t, s, "digits", "d2")
	join(t, s, "dev", map[string]string{"site": "demo"})
	route := "apiVersion: dunlin/v1\nkind: Route\nmetadata: {name: r}\nspec: {targets: [{model: digits, weight: 1}]}\n"
	first := parse(t, deployment("a", "digits", 1, "site: demo")+route)

	dry, err := s.Apply(ctx, "user:op", first, true)
	must(t, err)
	if len(dry) != 2 || dry[0].Before != "" || dry[0].After == "" || dry[0].Rollout != "" {
		t.Errorf("dry run: %+v", dry)
	}
	if all, err := s.Objects(ctx, fleet.KindDeployment); err != nil || len(all) != 0 {
		t.Fatalf("a dry run left %v, %v", all, err)
	}
	changes, err := s.Apply(ctx, "user:op", first, false)
	must(t, err)
	if changes[0].Rollout != "a-1" || changes[1].Rollout != "" {
		t.Errorf("got %+v", changes)
	}
	again, err := s.Apply(ctx, "user:op", first, false)
	must(t, err)
	if again[0].Before != again[0].After || again[0].Rollout != "" {
		t.Errorf("the same again: %+v", again)
	}
	strategy := strings.Replace(deployment("a", "digits", 1, "site: demo"), "selector", "rollout: {maxFailed: 3}, selector", 1)
	if c, err := s.Apply(ctx, "user:op", parse(t, strategy), false); err != nil || c[0].Rollout != "" || c[0].Before == c[0].After {
		t.Errorf("another strategy: %+v, %v", c, err)
	}
	next, err := s.Apply(ctx, "user:op", parse(t, deployment("a", "digits", 2, "site: demo")), false)
	must(t, err)
	rollouts, err := s.Rollouts(ctx, "a", 10)
	must(t, err)
	if len(rollouts) != 2 || rollouts[0].ID() != next[0].Rollout || rollouts[0].From != 0 || rollouts[0].To != 2 || rollouts[0].State != fleet.Running {
		t.Errorf("got %+v", rollouts)
	}
	if rollouts[1].State != fleet.Superseded || rollouts[1].EndedAt.IsZero() {
		t.Errorf("the older: %+v", rollouts[1])
	}
	is(t, s.SaveRollout(ctx, rollouts[1], rollouts[1], nil), ErrStale)

	before, err := s.Audit(ctx, 100)
	must(t, err)
	// All faults of the second, and nothing of the first document.
	_, err = s.Apply(ctx, "user:op", parse(t, deployment("b", "other", 1, "x: y")+deployment("c", "digits", 9, "x: y")+deployment("d", "digits", 1, "")), false)
	if faults, ok := errors.AsType[fleet.Faults](err); !ok || len(faults) != 3 {
		t.Fatalf("got %v", err)
	}
	for _, want := range []string{
		`document 1, line 4:8: spec.model: there is no model "other"`, `document 2, line 9:23: spec.version: model digits has no version 9`,
		`document 3, line 14:35: spec.selector: deployment a of the same model digits matches device dev too`,
	} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q is not in:\n%v", want, err)
		}
	}
	_, err = s.Apply(ctx, "user:op", parse(t, strings.Replace(route, "}]}", "}], rules: [{name: a, match: {cel: 'true'}, targets: [{model: digits, weight: 1}, {model: other, weight: 1}, {model: digits, version: 9, weight: 1}]}]}", 1)), false)
	if faults, ok := errors.AsType[fleet.Faults](err); !ok || len(faults) != 2 || faults[0].Field != "spec.rules[0].targets[1].model" || faults[1].Field != "spec.rules[0].targets[2].version" || faults[1].Line != 4 {
		t.Errorf("targets of a rule: %v", err)
	}
	// A move of the model from one deployment to another in one apply.
	_, err = s.Apply(ctx, "user:op", parse(t, deployment("a", "digits", 2, "site: none")+deployment("d", "digits", 1, "site: demo")), false)
	must(t, err)
	c, err := s.Delete(ctx, "user:op", fleet.KindDeployment, "d")
	if err != nil || c.Before == "" || c.After != "" {
		t.Errorf("got %+v, %v", c, err)
	}
	_, err = s.Delete(ctx, "user:op", fleet.KindDeployment, "d")
	is(t, err, ErrNotFound)
	if r, err := s.Rollouts(ctx, "d", 1); err != nil || r[0].State != fleet.Superseded || r[0].Reason != "the deployment was deleted" {
		t.Errorf("got %+v, %v", r, err)
	}
	after, err := s.Audit(ctx, 100)
	must(t, err)
	var got []string
	for _, r := range after[:len(after)-len(before)] {
		got = append(got, r.Who+" "+r.Action+" "+r.Object)
	}
	want := []string{
		"user:op object.delete Deployment/d", "user:op rollout.end rollout/d-4",
		"user:op rollout.start rollout/d-4", "user:op object.apply Deployment/d",
		"user:op rollout.start rollout/a-3", "user:op rollout.end rollout/a-2", "user:op object.apply Deployment/a",
	}
	if !slices.Equal(got, want) {
		t.Errorf("the audit log has %q", got)
	}
}

func TestRolloutDevices(t *testing.T) {
	s, clock := fresh(t)
	ctx := t.Context()
	push(t, s, "digits", "d1")
	_, err := s.Apply(ctx, "user:op", parse(t, deployment("a", "digits", 1, "")), false)
	must(t, err)
	before, err := s.Rollout(ctx, "a-1")
	must(t, err)
	for _, devices := range [][]fleet.RolloutDevice{
		{{Device: "x", Phase: fleet.DevicePending}, {Device: "y", Phase: fleet.DeviceWorking, BytesPresent: 1, BytesTotal: 9}},
		{{Device: "y", Phase: fleet.DeviceFailed, Reason: "no"}, {Device: "z", Phase: fleet.DeviceReady}},
	} {
		after := before
		after.Devices, after.Reason = devices, "because"
		must(t, s.SaveRollout(ctx, before, after, nil))
		got, err := s.Rollout(ctx, "a-1")
		must(t, err)
		if !got.Equal(after) {
			t.Errorf("got %+v, want %+v", got, after)
		}
		before = got
	}
	after := before
	after.State, after.EndedAt = fleet.Failed, clock.now
	must(t, s.SaveRollout(ctx, before, after, nil))
	after.State = fleet.Running
	is(t, s.SaveRollout(ctx, before, after, nil), ErrStale)
	_, err = s.Rollout(ctx, "a-2")
	is(t, err, ErrNotFound)
}

var errCrash = errors.New("crash")

// A process that ends at any moment of a transaction leaves a file that
// opens with all of it or nothing. The file is copied, as a crash would leave
// it, before and after each commit.
func TestCrash(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	dir := t.TempDir()
	path := filepath.Join(dir, "live.db")
	type copied struct {
		path, step string
	}
	var copies []copied
	s := open(t, path, Options{OnStep: func(step string) {
		to := filepath.Join(dir, fmt.Sprintf("copy%d.db", len(copies)))
		for _, suffix := range []string{"", "-wal"} {
			b, err := os.ReadFile(path + suffix)
			if err != nil {
				t.Error(err)
				return
			}
			if suffix != "" && random.IntN(2) == 0 { // a torn write at the end of the log
				b = append(b, make([]byte, random.IntN(5000))...)
			}
			if err := os.WriteFile(to+suffix, b, 0o600); err != nil {
				t.Error(err)
			}
		}
		copies = append(copies, copied{to, step})
	}})
	push(t, s, "digits", "d1")
	join(t, s, "d", nil)
	_, err := s.Apply(t.Context(), "user:op", parse(t, deployment("a", "digits", 1, "")), false)
	must(t, err)
	_, _, err = s.AddEvents(t.Context(), "d", "o", events(1, 2))
	must(t, err)
	must(t, s.Close())
	seen := map[string]int{}
	for _, c := range copies {
		if strings.HasSuffix(c.step, "migration") {
			continue
		}
		s := open(t, c.path, Options{})
		var objects, rollouts, events, audits int
		must(t, s.reader.QueryRow(`SELECT (SELECT count(*) FROM objects), (SELECT count(*) FROM rollouts),
			(SELECT count(*) FROM events), (SELECT count(*) FROM audit_log WHERE action = 'object.apply')`).Scan(&objects, &rollouts, &events, &audits))
		if objects != rollouts || objects != audits || events != 0 && events != 2 {
			t.Errorf("%s: %d objects, %d rollouts, %d audits, %d events", c.step, objects, rollouts, audits, events)
		}
		seen[c.step] = objects*10 + events
		must(t, s.Close())
	}
	for step, want := range map[string]int{"before apply": 0, "after apply": 10, "before events": 10, "after events": 12} {
		if got, ok := seen[step]; !ok || got != want {
			t.Errorf("%s: %d, %v, want %d", step, got, ok, want)
		}
	}
}

// An error inside a transaction undoes all of it.
func TestRollback(t *testing.T) {
	s, _ := fresh(t)
	err := s.write(t.Context(), "x", func(tx *sql.Tx) error {
		if err := s.audit(t.Context(), tx, AuditRecord{Who: "a", Action: "b", Object: "c", After: "d"}); err != nil {
			return err
		}
		return errCrash
	})
	is(t, err, errCrash)
	if records, err := s.Audit(t.Context(), 10); err != nil || len(records) != 0 {
		t.Errorf("got %v, %v", records, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	is(t, s.Heard(ctx, map[string]time.Time{"a": time.Now()}, nil, nil), context.Canceled)
	push(t, s, "m", "d") // and the writer is free again
}

// A panic, which the HTTP server survives, leaves the writer to the next one.
func TestPanic(t *testing.T) {
	s, _ := fresh(t)
	func() {
		defer func() {
			if recover() == nil {
				t.Error("no panic")
			}
		}()
		_ = s.write(t.Context(), "step", func(*sql.Tx) error { panic("bug") })
	}()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	must(t, s.AddToken(ctx, "ada", identity.Admin, identity.Hash("x")))
}

// TestDeleteVersion: what something may come back to stays, and a number is
// never given to other bytes.
func TestDeleteVersion(t *testing.T) {
	s, _ := fresh(t)
	join(t, s, "dev", nil)
	for n := range 5 {
		push(t, s, "m", fmt.Sprint("sha256:", n+1))
	}
	apply := func(text string) {
		t.Helper()
		_, err := s.Apply(t.Context(), "user:test", parse(t, text), false)
		must(t, err)
	}
	deployment := func(version int) string {
		return fmt.Sprintf("apiVersion: dunlin/v1\nkind: Deployment\nmetadata: {name: d}\nspec: {model: m, version: %d, selector: {}}\n", version)
	}
	apply(deployment(1))
	running, err := s.Rollout(t.Context(), "d-1")
	must(t, err)
	succeeded := running
	succeeded.State, succeeded.EndedAt = fleet.Succeeded, s.now()
	must(t, s.SaveRollout(t.Context(), running, succeeded, nil))
	apply(deployment(2))
	apply("apiVersion: dunlin/v1\nkind: Route\nmetadata: {name: r}\nspec: {targets: [{model: m, version: 3, weight: 1}]}\n")
	doc, err := proto.Marshal(&dunlinv1.DesiredDocument{Versions: []*dunlinv1.DesiredVersion{{Model: "m", Version: 4}}})
	must(t, err)
	_, err = s.SaveDesired(t.Context(), []Desired{{Device: "dev", Document: doc}})
	must(t, err)
	refused := func(version int64, why string) {
		t.Helper()
		if _, err := s.DeleteVersion(t.Context(), "user:test", "m", version); !errors.Is(err, ErrState) || !strings.Contains(err.Error(), why) {
			t.Errorf("version %d: %v, want %q", version, err, why)
		}
	}
	refused(1, "rollout d-2 may come back to it")
	refused(2, "Deployment d names it")
	refused(3, "Route r names it")
	apply("apiVersion: dunlin/v1\nkind: Route\nmetadata: {name: r}\nspec: {targets: [{model: m, weight: 1}], rules: [{name: a, match: {cel: 'true'}, targets: [{model: m, version: 3, weight: 1}]}]}\n")
	refused(3, "Route r names it")
	refused(4, "device dev should have it")
	_, err = s.DeleteVersion(t.Context(), "user:test", "m", 9)
	is(t, err, ErrNotFound)
	gone, err := s.DeleteVersion(t.Context(), "user:ada", "m", 5)
	must(t, err)
	if gone.Digest != "sha256:5" {
		t.Errorf("deleted %+v", gone)
	}
	_, err = s.Version(t.Context(), "m", 5)
	is(t, err, ErrNotFound)
	if got := push(t, s, "m", "sha256:6"); got.Version != 6 {
		t.Errorf("the next version is %d", got.Version)
	}
	_, _, err = s.CreateVersion(t.Context(), Version{Model: "m", Version: 5, Digest: "sha256:7", CreatedBy: "user:test"})
	is(t, err, ErrExists)
	back, created, err := s.CreateVersion(t.Context(), Version{Model: "m", Version: 5, Digest: "sha256:5", CreatedBy: "user:test"})
	if err != nil || !created || back.Version != 5 {
		t.Errorf("the same bytes again: %+v, %v", back, err)
	}
	page, err := s.ListAudit(t.Context(), 0, 1000, false)
	must(t, err)
	if !slices.ContainsFunc(page.Records, func(r *dunlinv1.AuditRecord) bool {
		return r.GetAction() == "version.delete" && r.GetWho() == "user:ada" && r.GetObject() == "model/m:5"
	}) {
		t.Error("the deletion is not in the audit log")
	}
	// Once the deployment is gone, nothing comes back to its versions.
	_, err = s.Delete(t.Context(), "user:test", fleet.KindDeployment, "d")
	must(t, err)
	_, err = s.DeleteVersion(t.Context(), "user:test", "m", 1)
	must(t, err)

	// A release of the agent that only a document names, as that of a device
	// which a freeze covers.
	push(t, s, fleet.AgentModel, "sha256:a1")
	doc, err = proto.Marshal(&dunlinv1.DesiredDocument{Agent: &dunlinv1.DesiredAgent{Version: 1}})
	must(t, err)
	_, err = s.SaveDesired(t.Context(), []Desired{{Device: "dev", SHA256: [32]byte{1}, Document: doc}})
	must(t, err)
	if _, err := s.DeleteVersion(t.Context(), "user:test", fleet.AgentModel, 1); !errors.Is(err, ErrState) || !strings.Contains(err.Error(), "device dev should have it") {
		t.Errorf("a release that a device should run: %v", err)
	}
}
