package store

import (
	"database/sql"
	"fmt"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/dunlin/dunlin/controller/fleet"
	"github.com/dunlin/dunlin/controller/identity"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// released are the schemas that there have been in a release.
const released = 3

// older makes a store as the program of a released schema left it, with a row
// in each table.
func older(t *testing.T, path string, schema int) {
	t.Helper()
	db, err := sql.Open("sqlite", dsn(path, "_txlock", "immediate"))
	must(t, err)
	db.SetMaxOpenConns(1)
	defer func() { must(t, db.Close()) }()
	exec := func(query string, args ...any) {
		t.Helper()
		if _, err := db.ExecContext(t.Context(), query, args...); err != nil {
			t.Fatalf("schema %d: %s: %v", schema, query, err)
		}
	}
	encode := func(m proto.Message) []byte {
		t.Helper()
		b, err := proto.Marshal(m)
		must(t, err)
		return b
	}
	for v := range schema {
		exec(migrations[v])
		if more := alongside[v]; more != nil {
			tx, err := db.BeginTx(t.Context(), nil)
			must(t, err)
			must(t, more(t.Context(), tx))
			must(t, tx.Commit())
		}
	}
	at := time.Date(2026, 3, 1, 0, 0, 0, 0, time.UTC).UnixNano()
	hash := identity.Hash("user-token")
	exec("INSERT INTO meta (key, value) VALUES ('incarnation', 'older'), ('generation', '7')")
	exec("INSERT INTO users (name, role, created_at) VALUES ('ada', 'operator', ?)", at)
	if schema < 3 {
		exec("INSERT INTO audit (at, who, action, object, detail) VALUES (?, 'user:ada', 'object.apply', 'Deployment/digits', 'before')", at)
		exec("INSERT INTO tokens (hash, user, created_at) VALUES (?, 'ada', ?)", hash[:], at)
		exec("INSERT INTO devices (name, secret_hash, broker_hash, own_labels, token_labels, info, joined_at, last_heard_at, session, report_number) VALUES ('cam-1', ?, 'x', '{\"floor\":\"2\"}', '{\"site\":\"demo\"}', ?, ?, ?, 's', 4)",
			hash[:], encode(&dunlinv1.DeviceInfo{Arch: "arm64", FirmwareProfile: "board"}), at, at)
	} else {
		exec("INSERT INTO tokens (hash, user, created_at, id) VALUES (?, 'ada', ?, 'abc')", hash[:], at)
		exec("INSERT INTO devices (name, own_labels, token_labels, info, joined_at, last_heard_at, session, report_number) VALUES ('cam-1', '{\"floor\":\"2\"}', '{\"site\":\"demo\"}', ?, ?, ?, 's', 4)",
			encode(&dunlinv1.DeviceInfo{Arch: "arm64", FirmwareProfile: "board"}), at, at)
		tx, err := db.BeginTx(t.Context(), nil)
		must(t, err)
		s := &Store{now: func() time.Time { return time.Unix(0, at) }}
		must(t, s.audit(t.Context(), tx, AuditRecord{Who: "user:ada", Action: "object.apply", Object: "Deployment/digits", After: "before"}))
		must(t, tx.Commit())
		exec("INSERT INTO authorities (id, certificate, cross_certs, active, created_at) VALUES ('a', x'00', x'', 0, ?)", at)
		exec("INSERT INTO certificates (serial, device, authority, key, der, not_after, issued_at) VALUES (x'01', 'cam-1', 'a', 'k', x'00', ?, ?)", at, at)
		exec("INSERT INTO trust (version, signed) VALUES (1, ?)", encode(&dunlinv1.SignedTrust{Document: []byte("d")}))
		exec("INSERT INTO signatures (model, digest, manifest, size, signer, created_at) VALUES ('digits', 'sha256:1', 'sha256:9', 3, 'k', ?)", at)
	}
	exec("INSERT INTO join_tokens (hash, id, uses_left, expires_at, labels) VALUES (?, 'j', 2, ?, '{\"site\":\"demo\"}')", hash[:], time.Now().Add(time.Hour).UnixNano())
	doc := encode(&dunlinv1.DesiredDocument{Versions: []*dunlinv1.DesiredVersion{{Model: "digits", Version: 1, Digest: "sha256:1"}}})
	exec("INSERT INTO desired (device, number, sha256, document) VALUES ('cam-1', 7, ?, ?)", hash[:], doc)
	for n := 1; n <= 2; n++ {
		exec("INSERT INTO versions (model, version, digest, source, size, inputs, outputs, opset, created_at, created_by) VALUES ('digits', ?, ?, ?, 10, '[\"image:FP32[1]\"]', '[]', 17, ?, 'user:ada')", n, fmt.Sprint("sha256:", n), fmt.Sprint("sha256:s", n), at)
	}
	exec("INSERT INTO objects (kind, name, yaml, updated_at) VALUES ('Deployment', 'digits', ?, ?)",
		"apiVersion: dunlin/v1\nkind: Deployment\nmetadata:\n  name: digits\nspec:\n  model: digits\n  version: 2\n  selector:\n    site: demo\n  rollout:\n    maxFailed: 1\n    deadline: 10m\n", at)
	exec("INSERT INTO objects (kind, name, yaml, updated_at) VALUES ('Route', 'digits', ?, ?)",
		"apiVersion: dunlin/v1\nkind: Route\nmetadata:\n  name: digits\nspec:\n  targets:\n    - model: digits\n      weight: 100\n", at)
	exec("INSERT INTO rollouts (deployment, model, from_version, to_version, max_failed, deadline, state, reason, started_at, ended_at) VALUES ('digits', 'digits', 0, 1, 0, 60000000000, 2, '1 device of 1 ready', ?, ?), ('digits', 'digits', 1, 2, 1, 600000000000, 1, 'waits', ?, 0)", at, at, at)
	exec("INSERT INTO rollout_devices (rollout, device, phase, reason, bytes_present, bytes_total) VALUES (2, 'cam-1', 2, '', 5, 10)")
	exec("INSERT INTO outboxes (device, outbox, last_sequence, heard_at) VALUES ('cam-1', 'box', 3, ?)", at)
	exec("INSERT INTO events (device, outbox, sequence, received_at, event) VALUES ('cam-1', 'box', 3, ?, ?)", at, encode(&dunlinv1.Event{Sequence: 3, Kind: "worker.died"}))
	if schema >= 2 {
		exec("INSERT INTO profiles (device, model, version, digest, firmware_profile, received_at, weights, session, fixed, row, batch, latency, joules, profile) VALUES ('cam-1', 'digits', 1, 'sha256:1', 'board', ?, 1, 2, 3, 4, 5, 6, 0.5, ?)",
			at, encode(&dunlinv1.ModelProfile{Model: "digits", Version: 1, Digest: "sha256:1"}))
	}
	exec(fmt.Sprintf("PRAGMA user_version = %d", schema))
	for table, n := range counts(t, db) {
		if n == 0 && !(table == "audit_log" && schema < 3) {
			t.Errorf("schema %d: the test has no row in %s", schema, table)
		}
	}
}

// counts gives the rows of each table.
func counts(t *testing.T, db *sql.DB) map[string]int {
	t.Helper()
	rows, err := db.QueryContext(t.Context(), "SELECT name FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE 'sqlite_%'")
	must(t, err)
	var tables []string
	for rows.Next() {
		var name string
		must(t, rows.Scan(&name))
		tables = append(tables, name)
	}
	must(t, rows.Err())
	must(t, rows.Close())
	all := map[string]int{}
	for _, name := range tables {
		var n int
		must(t, db.QueryRowContext(t.Context(), "SELECT count(*) FROM "+name).Scan(&n))
		all[name] = n
	}
	return all
}

// TestMigrations opens stores of each released schema: all that was in them is
// there, and what follows from it goes on.
func TestMigrations(t *testing.T) {
	for schema := 1; schema <= released; schema++ {
		t.Run(fmt.Sprint(schema), func(t *testing.T) {
			ctx := t.Context()
			path := filepath.Join(t.TempDir(), "store.db")
			older(t, path, schema)
			copied, err := Copy(ctx, path, filepath.Join(t.TempDir(), "copy.db"))
			must(t, err)
			if copied.Schema != schema || copied.Incarnation != "older" || len(copied.Manifests) < 4 {
				t.Errorf("copied %+v", copied)
			}
			raw, err := openPlain(path)
			must(t, err)
			before := counts(t, raw)
			must(t, raw.Close())
			s := open(t, path, Options{})
			after := counts(t, s.reader)
			for table, n := range before {
				if table == "audit" {
					table = "audit_log"
				}
				if after[table] < n {
					t.Errorf("%s has %d rows, had %d", table, after[table], n)
				}
			}
			if s.Incarnation() != "older" {
				t.Errorf("incarnation %s", s.Incarnation())
			}
			d, err := s.Device(ctx, "cam-1")
			must(t, err)
			if d.Labels["site"] != "demo" || d.Labels["floor"] != "2" || d.Info.GetFirmwareProfile() != "board" || d.Desired != 7 {
				t.Errorf("device %+v", d)
			}
			owner, err := s.TokenOwner(ctx, identity.Hash("user-token"))
			must(t, err)
			if owner.User != "ada" || owner.UserRole != identity.Operator {
				t.Errorf("token of %+v", owner)
			}
			snap, err := s.Snapshot(ctx)
			must(t, err)
			if len(snap.Objects.Deployments) != 1 || len(snap.Objects.Routes) != 1 || len(snap.Devices) != 1 {
				t.Errorf("snapshot %+v", snap)
			}
			rollouts, err := s.Rollouts(ctx, "digits", 10)
			must(t, err)
			if len(rollouts) != 2 || rollouts[0].State != fleet.Running || rollouts[0].To != 2 || rollouts[0].Strategy.MaxFailed != 1 || rollouts[0].Strategy.Deadline != 10*time.Minute ||
				len(rollouts[0].Devices) != 1 || rollouts[0].Devices[0].BytesPresent != 5 || rollouts[1].State != fleet.Succeeded {
				t.Errorf("rollouts %+v", rollouts)
			}
			if decisions, err := s.Decisions(ctx, rollouts[0].ID()); err != nil || len(decisions) != 0 {
				t.Errorf("decisions %v, %v", decisions, err)
			}
			versions, err := s.Versions(ctx, "digits")
			if err != nil || len(versions) != 2 || versions[1].Source != "sha256:s2" || versions[0].Inputs[0] != "image:FP32[1]" {
				t.Errorf("versions %+v, %v", versions, err)
			}
			if tokens, err := s.JoinTokens(ctx); err != nil || len(tokens) != 1 || tokens[0].UsesLeft != 2 || tokens[0].Labels["site"] != "demo" {
				t.Errorf("join tokens %+v, %v", tokens, err)
			}
			users, err := s.Users(ctx)
			if err != nil || !slices.ContainsFunc(users, func(u User) bool { return u.Name == "ada" && u.Role == identity.Operator }) {
				t.Errorf("users %+v, %v", users, err)
			}
			page, err := s.ListAudit(ctx, 0, 10, false)
			if err != nil || len(page.Records) != 1 || page.Records[0].GetAfter() != "before" || page.Records[0].GetNumber() != page.Head.Number {
				t.Errorf("audit %+v, %v", page, err)
			}
			if schema >= 2 {
				if profiles, err := s.Profiles(ctx, ProfileFilter{}); err != nil || len(profiles) != 1 {
					t.Errorf("profiles %v, %v", profiles, err)
				}
			}
			if schema >= 3 {
				if signatures, err := s.Signatures(ctx, "digits", "sha256:1"); err != nil || len(signatures) != 1 {
					t.Errorf("signatures %v, %v", signatures, err)
				}
				if _, err := s.Trust(ctx); err != nil {
					t.Error(err)
				}
			}
			// The outbox goes on where it was, and a hole is waited for.
			for sequence, want := range map[uint64]uint64{3: 3, 5: 3} {
				stored, _, err := s.AddEvents(ctx, "cam-1", "box", []*dunlinv1.Event{{Sequence: sequence, Kind: "x"}})
				if err != nil || stored != want {
					t.Errorf("event %d: stored %d, %v", sequence, stored, err)
				}
			}
			if stored, _, err := s.AddEvents(ctx, "cam-1", "box", []*dunlinv1.Event{{Sequence: 4, Kind: "x"}}); err != nil || stored != 4 {
				t.Errorf("the next event: stored %d, %v", stored, err)
			}
			must(t, s.AddTelemetry(ctx, []Sample{{"cam-1", time.Now(), &dunlinv1.Telemetry{}}}))
			if next, _, err := s.CreateVersion(ctx, Version{Model: "digits", Digest: "sha256:3", CreatedBy: "user:ada"}); err != nil || next.Version != 3 {
				t.Errorf("the next version is %+v, %v", next, err)
			}
			must(t, s.Close())
			open(t, path, Options{}) // and once more, with nothing to do
		})
	}
}
