package state

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"go.uber.org/goleak"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/timestamppb"
	"pgregory.net/rapid"

	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func openFile(t *testing.T, path string, limits Limits) *Store {
	t.Helper()
	s, err := Open(t.Context(), path, limits)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// stores is what Store and Memory have in common.
type stores interface {
	Identity(context.Context) (Identity, error)
	SetIdentity(context.Context, Identity) error
	Clock(context.Context) (Clock, error)
	SetClock(context.Context, Clock) error
	StoodDown(context.Context) (time.Time, string, error)
	SetStoodDown(context.Context, time.Time, string) error
	Desired(context.Context) (Desired, error)
	SetDesired(context.Context, Desired) error
	Versions(context.Context) ([]Version, error)
	PutVersion(context.Context, Version) error
	DeleteVersion(context.Context, string, int64) error
	OutboxID() string
	Append(context.Context, *dunlinv1.Event) (uint64, error)
	Pending(context.Context, int) ([]*dunlinv1.Event, error)
	Ack(context.Context, string, uint64) error
}

// contract tests a new store of each kind; again gives what the next start of
// the program finds.
func contract(t *testing.T, limits Limits, test func(t *testing.T, s stores, again func() stores)) {
	t.Run("file", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "state.db")
		s := openFile(t, path, limits)
		test(t, s, func() stores {
			s.Close()
			s = openFile(t, path, limits)
			return s
		})
	})
	t.Run("memory", func(t *testing.T) {
		s := must(NewMemory(limits, nil))(t)
		test(t, s, func() stores {
			s = s.Crash()
			return s
		})
	})
}

// must fails the test on an error.
func must[T any](v T, err error) func(testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func event(message string) *dunlinv1.Event {
	return &dunlinv1.Event{
		At: timestamppb.New(time.Unix(1, 2)), Kind: "version.resident", Severity: dunlinv1.Severity_SEVERITY_INFO,
		Model: "digits", Version: 3, Message: message,
	}
}

func TestIdentityAndDesired(t *testing.T) {
	contract(t, Limits{}, func(t *testing.T, s stores, _ func() stores) {
		ctx := t.Context()
		if _, err := s.Identity(ctx); !errors.Is(err, ErrNone) {
			t.Errorf("identity of a new file: %v", err)
		}
		if _, err := s.Desired(ctx); !errors.Is(err, ErrNone) {
			t.Errorf("desired document of a new file: %v", err)
		}
		for _, id := range []Identity{{Device: "a"}, {"b", "https://c", "mqtts://b", "https://r", []byte{1, 2}, []byte{3}}} {
			if err := s.SetIdentity(ctx, id); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(id, must(s.Identity(ctx))(t), cmpopts.EquateEmpty()); diff != "" {
				t.Error(diff)
			}
		}
		for _, d := range []Desired{
			{"i", 1, []byte{1}, []byte("document")}, {"j", 1<<63 + 1, []byte{2}, []byte{}}, {"k", 2, []byte{3}, make([]byte, MaxDocument)},
		} {
			if err := s.SetDesired(ctx, d); err != nil {
				t.Fatal(err)
			}
			got := must(s.Desired(ctx))(t)
			if got.Incarnation != d.Incarnation || got.Number != d.Number || !bytes.Equal(got.SHA256, d.SHA256) || !bytes.Equal(got.Document, d.Document) {
				t.Errorf("document %s/%d of %d bytes, want %s/%d", got.Incarnation, got.Number, len(got.Document), d.Incarnation, d.Number)
			}
		}
		if err := s.SetDesired(ctx, Desired{Document: make([]byte, MaxDocument+1)}); err == nil || !strings.Contains(err.Error(), fmt.Sprint(MaxDocument)) {
			t.Errorf("a document above the limit: %v", err)
		}
		if d := must(s.Desired(ctx))(t); d.Incarnation != "k" {
			t.Errorf("a refused document took the place of another: %+v", d)
		}
		if err := s.SetDesired(ctx, Desired{Incarnation: "l", SHA256: []byte{4}}); err != nil {
			t.Errorf("a nil document: %v", err)
		}
	})
}

func TestVersions(t *testing.T) {
	contract(t, Limits{}, func(t *testing.T, s stores, _ func() stores) {
		ctx := t.Context()
		version := func(model string, n int64, good bool) Version {
			return Version{
				Model: model, Version: n, Digest: "sha256:x", State: dunlinv1.VersionState_VERSION_STATE_QUARANTINED,
				Reason: "r", Since: time.Unix(5, 7).UTC(), LastGood: good, Signatures: []string{"sha256:y", "sha256:z"}[:n%3],
			}
		}
		for _, v := range []Version{version("b", 1, true), version("a", 2, true), version("a", 1, false), version("a", 10, true)} {
			if err := s.PutVersion(ctx, v); err != nil {
				t.Fatal(err)
			}
		}
		want := []Version{version("a", 1, false), version("a", 2, false), version("a", 10, true), version("b", 1, true)}
		if diff := cmp.Diff(want, must(s.Versions(ctx))(t)); diff != "" {
			t.Error(diff)
		}
		changed := version("a", 10, false)
		changed.Reason = "another"
		if err := errors.Join(s.PutVersion(ctx, changed), s.DeleteVersion(ctx, "a", 2), s.DeleteVersion(ctx, "a", 99)); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff([]Version{want[0], changed, want[3]}, must(s.Versions(ctx))(t)); diff != "" {
			t.Error(diff)
		}
	})
}

func TestFileMode(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.db")
	if err := os.WriteFile(path, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	s := openFile(t, path, Limits{})
	must(s.Append(t.Context(), event("x")))(t)
	files := must(os.ReadDir(filepath.Dir(path)))(t)
	if len(files) < 2 {
		t.Errorf("found %v, no write-ahead log", files)
	}
	for _, f := range files {
		if mode := must(f.Info())(t).Mode(); mode.Perm() != 0o600 {
			t.Errorf("%s has mode %v", f.Name(), mode)
		}
	}
	if err := errors.Join(s.Close(), s.Close()); err != nil {
		t.Errorf("Close, twice: %v", err)
	}
}

func TestOpenRefuses(t *testing.T) {
	newer := filepath.Join(t.TempDir(), "state.db")
	s := openFile(t, newer, Limits{})
	if _, err := s.db.ExecContext(t.Context(), `PRAGMA user_version = 99; PRAGMA application_id = 99`); err != nil {
		t.Fatal(err)
	}
	s.Close()
	before := must(os.ReadFile(newer))(t)
	garbage := filepath.Join(t.TempDir(), "garbage.db")
	if err := os.WriteFile(garbage, []byte(strings.Repeat("no database. ", 1000)), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		path   string
		limits Limits
		want   string
	}{
		{newer, Limits{}, fmt.Sprintf("schema version 99, this program knows up to %d", len(migrations))},
		{garbage, Limits{}, "not a database"},
		{filepath.Join(t.TempDir(), "none", "state.db"), Limits{}, "no such file"},
		{filepath.Join(t.TempDir(), "a.db"), Limits{Events: 1}, "outbox events: 1 is below 2"},
		{filepath.Join(t.TempDir(), "b.db"), Limits{Bytes: 1}, "outbox bytes: 1 is below"},
	} {
		s, err := Open(t.Context(), tt.path, tt.limits)
		if err == nil {
			s.Close()
		}
		if err == nil || !strings.Contains(err.Error(), tt.want) || !strings.Contains(err.Error(), tt.path) {
			t.Errorf("Open(%s): %v, want %q", tt.path, err, tt.want)
		}
	}
	if after := must(os.ReadFile(newer))(t); string(after) != string(before) {
		t.Error("a refused file was changed")
	}
}

// A file of every earlier schema version becomes one of the present.
func TestMigrations(t *testing.T) {
	ctx := t.Context()
	all := migrations
	defer func() { migrations = all }()
	path := filepath.Join(t.TempDir(), "state.db")
	s := openFile(t, path, Limits{})
	id := s.OutboxID()
	must(s.Append(ctx, event("kept")))(t)
	s.Close()

	migrations = append(append([]string{}, all...), `CREATE TABLE later (x INTEGER) STRICT`, `no SQL`)
	if s, err := Open(ctx, path, Limits{}); err == nil || !strings.Contains(err.Error(), fmt.Sprintf("migrate to schema version %d", len(migrations))) {
		t.Errorf("a migration that fails: %v, %v", s, err)
	}
	migrations[len(migrations)-1] = `INSERT INTO later VALUES (7)`
	s = openFile(t, path, Limits{})
	var version, x int
	if err := s.db.QueryRowContext(ctx, `SELECT x FROM later`).Scan(&x); err != nil || x != 7 {
		t.Errorf("after the migrations: %d, %v", x, err)
	}
	if err := s.db.QueryRowContext(ctx, `PRAGMA user_version`).Scan(&version); err != nil || version != len(migrations) {
		t.Errorf("schema version %d, %v", version, err)
	}
	if e := must(s.Pending(ctx, 10))(t); s.OutboxID() != id || len(e) != 1 || e[0].Message != "kept" {
		t.Errorf("after the migrations: outbox %s with %v", s.OutboxID(), e)
	}
	s.Close()

	// The release before opens the file, which was only added to, and writes.
	migrations = all
	s = openFile(t, path, Limits{})
	must(s.Append(ctx, event("by the older one")))(t)
	s.Close()
	migrations = append(append([]string{}, all...), `CREATE TABLE later (x INTEGER) STRICT`, `INSERT INTO later VALUES (7)`)
	s = openFile(t, path, Limits{})
	if e := must(s.Pending(ctx, 10))(t); s.OutboxID() != id || len(e) != 2 {
		t.Errorf("after the way back and forth: outbox %s with %v", s.OutboxID(), e)
	}
}

// copyFiles copies the state file and its log as a crash would leave them.
func copyFiles(t testing.TB, path string) string {
	t.Helper()
	to := t.TempDir()
	for _, suffix := range []string{"", "-wal"} { // -shm is only a cache
		b, err := os.ReadFile(path + suffix)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err == nil {
			err = os.WriteFile(filepath.Join(to, "state.db"+suffix), b, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return filepath.Join(to, "state.db")
}

// After a crash behind any step the file opens and holds all of that step;
// one in the middle of a step's last write holds the step before.
func TestCrash(t *testing.T) {
	ctx := t.Context()
	limits := Limits{Events: 4}
	path := filepath.Join(t.TempDir(), "state.db")
	s := openFile(t, path, limits)
	snapshot := func(s *Store) string {
		events := must(s.Pending(ctx, 100))(t)
		versions := must(s.Versions(ctx))(t)
		d, err := s.Desired(ctx)
		if err != nil && !errors.Is(err, ErrNone) {
			t.Fatal(err)
		}
		return fmt.Sprint(s.OutboxID(), events, versions, d.Number, len(d.Document))
	}
	steps := []func() error{}
	for i := range int64(12) {
		steps = append(steps,
			func() error { _, err := s.Append(ctx, event(fmt.Sprint(i))); return err },
			func() error {
				return s.SetDesired(ctx, Desired{Incarnation: "i", Number: uint64(i), SHA256: []byte{0}, Document: make([]byte, 1000*i)})
			},
			func() error { return s.PutVersion(ctx, Version{Model: "m", Version: i, LastGood: true}) },
		)
		if i%3 == 2 {
			steps = append(steps, func() error { return s.Ack(ctx, s.OutboxID(), uint64(i)) })
		}
	}
	walSize := func() int64 { return must(os.Stat(path + "-wal"))(t).Size() }
	before, size := snapshot(s), walSize()
	torn := 0
	for n, step := range steps {
		if err := step(); err != nil {
			t.Fatalf("step %d: %v", n, err)
		}
		after := snapshot(s)
		whole := openFile(t, copyFiles(t, path), limits)
		if got := snapshot(whole); got != after {
			t.Errorf("after a crash behind step %d: %s, want %s", n, got, after)
		}
		whole.Close()

		if grown := walSize(); grown > size { // else the log began anew, over its old content
			torn++
			cut := copyFiles(t, path)
			if err := os.Truncate(cut+"-wal", size+(grown-size)/2); err != nil {
				t.Fatal(err)
			}
			c := openFile(t, cut, limits)
			if got := snapshot(c); got != before {
				t.Errorf("after a crash in step %d: %s, want %s", n, got, before)
			}
			must(c.Append(ctx, event("goes on")))(t)
			c.Close()
		}
		before, size = after, walSize()
	}
	if torn < len(steps)/4 {
		t.Errorf("of %d steps only %d could be cut short", len(steps), torn)
	}
}

func TestOutbox(t *testing.T) {
	contract(t, Limits{}, func(t *testing.T, s stores, again func() stores) {
		ctx := t.Context()
		given := event("original")
		for i := range uint64(5) {
			if seq := must(s.Append(ctx, given))(t); seq != i+1 {
				t.Errorf("event %d has sequence %d", i+1, seq)
			}
		}
		if given.Sequence != 0 {
			t.Error("Append changed the caller's event")
		}
		if got := must(s.Pending(ctx, 2))(t); len(got) != 2 || got[0].Sequence != 1 || got[1].Sequence != 2 {
			t.Errorf("Pending(2) = %v", got)
		}
		want := event("original")
		want.Sequence = 1
		if diff := cmp.Diff(want, must(s.Pending(ctx, 1))(t)[0], protocmp.Transform()); diff != "" {
			t.Error(diff)
		}
		if got := must(s.Pending(ctx, 0))(t); len(got) != 0 {
			t.Errorf("Pending(0) = %v", got)
		}
		if err := s.Ack(ctx, "another", 3); err == nil {
			t.Error("an acknowledgement for another outbox was taken")
		}
		if err := s.Ack(ctx, s.OutboxID(), 6); err == nil {
			t.Error("an acknowledgement of a sequence that was never given was taken")
		}
		for range 2 { // the second time changes nothing
			if err := s.Ack(ctx, s.OutboxID(), 3); err != nil {
				t.Fatal(err)
			}
			if got := must(s.Pending(ctx, 9))(t); len(got) != 2 || got[0].Sequence != 4 {
				t.Errorf("after Ack(3): %v", got)
			}
		}
		if err := s.Ack(ctx, s.OutboxID(), 5); err != nil {
			t.Fatal(err)
		}
		id := s.OutboxID()
		s = again()
		if s.OutboxID() != id {
			t.Error("the outbox has another id after it was opened again")
		}
		// Sequences go on, although the outbox is empty.
		e := event(strings.Repeat("é", MaxMessage))
		e.At = nil
		if seq := must(s.Append(ctx, e))(t); seq != 6 {
			t.Errorf("sequence %d after the file was opened again, want 6", seq)
		}
		got := must(s.Pending(ctx, 1))(t)[0]
		if len(got.Message) > MaxMessage || !strings.HasSuffix(got.Message, "é...") || got.At == nil {
			t.Errorf("a long message became one of %d bytes, at %v", len(got.Message), got.At)
		}
		e.Kind = strings.Repeat("k", MaxEvent)
		if _, err := s.Append(ctx, e); err == nil || !strings.Contains(err.Error(), fmt.Sprint(MaxEvent)) {
			t.Errorf("an event above the limit: %v", err)
		}
		if seq := must(s.Append(ctx, event("x")))(t); seq != 7 {
			t.Errorf("a refused event took a sequence: the next is %d", seq)
		}
	})
}

func TestPendingFitsOneMessage(t *testing.T) {
	contract(t, Limits{}, func(t *testing.T, s stores, _ func() stores) {
		for range 40 {
			must(s.Append(t.Context(), event(strings.Repeat("m", MaxMessage))))(t)
		}
		events := must(s.Pending(t.Context(), 40))(t)
		size := proto.Size(&dunlinv1.EventBatch{OutboxId: s.OutboxID(), Events: events})
		if len(events) >= 40 || size > MaxBatchBytes+100 || size < MaxBatchBytes-2*MaxMessage {
			t.Errorf("Pending gave %d events in %d bytes", len(events), size)
		}
	})
}

// model is what the outbox must hold, kept in the plainest way.
type model struct {
	last  uint64
	first []uint64 // first lost sequence of each event; its own where it is no gap
	seqs  []uint64
}

func (m *model) collapse() {
	m.first = append([]uint64{m.first[0]}, m.first[2:]...)
	m.seqs = m.seqs[1:]
}

// Whatever is appended, acknowledged and lost, each sequence is pending once,
// as an event or in the range of the gap at the front, and the bounds hold.
func TestOutboxBounds(t *testing.T) {
	t.Run("file", func(t *testing.T) {
		dir := t.TempDir()
		n := 0
		testOutboxBounds(t, func(limits Limits) (stores, func() (stores, error), error) {
			n++
			path := filepath.Join(dir, fmt.Sprint(n))
			s, err := Open(t.Context(), path, limits)
			return s, func() (stores, error) {
				if err := s.Close(); err != nil {
					return nil, err
				}
				s, err = Open(t.Context(), path, limits)
				return s, err
			}, err
		})
	})
	t.Run("memory", func(t *testing.T) {
		testOutboxBounds(t, func(limits Limits) (stores, func() (stores, error), error) {
			s, err := NewMemory(limits, nil)
			return s, func() (stores, error) { s = s.Crash(); return s, nil }, err
		})
	})
}

func testOutboxBounds(t *testing.T, open func(Limits) (s stores, again func() (stores, error), err error)) {
	rapid.Check(t, func(t *rapid.T) {
		limits := Limits{Events: rapid.IntRange(2, 6).Draw(t, "limit")}
		ctx := context.Background()
		s, again, err := open(limits)
		if err != nil {
			t.Fatal(err)
		}
		defer func() {
			if file, ok := s.(*Store); ok {
				file.Close()
			}
		}()
		var m model
		for range rapid.IntRange(1, 12).Draw(t, "steps") {
			switch rapid.SampledFrom([]string{"append", "append", "append", "ack", "reopen"}).Draw(t, "step") {
			case "append":
				if _, err := s.Append(ctx, event("x")); err != nil {
					t.Fatal(err)
				}
				m.last++
				m.first, m.seqs = append(m.first, m.last), append(m.seqs, m.last)
				if len(m.seqs) > limits.Events {
					m.collapse()
				}
			case "ack":
				seq := rapid.Uint64Range(0, m.last).Draw(t, "sequence")
				if err := s.Ack(ctx, s.OutboxID(), seq); err != nil {
					t.Fatal(err)
				}
				for len(m.seqs) > 0 && m.seqs[0] <= seq {
					m.first, m.seqs = m.first[1:], m.seqs[1:]
				}
				if len(m.first) > 0 {
					m.first[0] = max(m.first[0], seq+1)
				}
			case "reopen":
				if s, err = again(); err != nil {
					t.Fatal(err)
				}
			}
			checkOutbox(t, s, &m)
		}
	})
}

func checkOutbox(t *rapid.T, s stores, m *model) {
	events, err := s.Pending(context.Background(), 100)
	if err != nil {
		t.Fatal(err)
	}
	if len(events) != len(m.seqs) {
		t.Fatalf("%d events are pending, want %v", len(events), m.seqs)
	}
	var bytes int
	for i, e := range events {
		bytes += proto.Size(e)
		lost := strings.Contains(e.Message, fmt.Sprintf("events %d to %d were lost", m.first[i], m.seqs[i]))
		single := e.Kind != GapKind && m.first[i] == m.seqs[i]
		if e.Sequence != m.seqs[i] || !single && (e.Kind != GapKind || !lost) {
			t.Fatalf("event %d is %v, want %d from %d", i, e, m.seqs[i], m.first[i])
		}
	}
	var have struct{ last, events, bytes int }
	switch s := s.(type) {
	case *Store:
		if err := s.db.QueryRow(`SELECT last, events, bytes FROM outbox_meta`).Scan(&have.last, &have.events, &have.bytes); err != nil {
			t.Fatal(err)
		}
	case *Memory:
		have.last, have.events, have.bytes = int(s.kept.last), len(s.kept.waiting), int(s.kept.bytes)
	}
	if have.last != int(m.last) || have.events != len(events) || have.bytes != bytes {
		t.Fatalf("counted %+v, want %d events of %d bytes", have, len(events), bytes)
	}
}

func TestOutboxBytes(t *testing.T) {
	contract(t, Limits{Bytes: 10 * MaxEvent}, func(t *testing.T, s stores, _ func() stores) {
		ctx := t.Context()
		for range 60 {
			must(s.Append(ctx, event(strings.Repeat("m", MaxMessage))))(t)
		}
		events := must(s.Pending(ctx, 100))(t)
		size := 0
		for _, e := range events {
			size += proto.Size(e)
		}
		if size > 10*MaxEvent || size < 9*MaxEvent {
			t.Errorf("%d bytes are kept of %d allowed", size, 10*MaxEvent)
		}
		if events[0].Kind != GapKind || events[0].Sequence+uint64(len(events))-1 != 60 {
			t.Errorf("of 60 events %d are pending, the first is %v", len(events), events[0])
		}
	})
}

func BenchmarkAppend(b *testing.B) {
	s, err := Open(b.Context(), filepath.Join(b.TempDir(), "state.db"), Limits{})
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	for b.Loop() {
		must(s.Append(b.Context(), event("x")))(b)
	}
}

// A file of the time of secrets: the device keeps its name, its events and its
// document, and has to join again.
func TestMigrateSecret(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.db")
	all := migrations
	defer func() { migrations = all }()
	migrations = all[:1]
	old := must(Open(t.Context(), path, Limits{}))(t)
	for _, q := range []string{
		`INSERT INTO identity VALUES (1, 'cam-1', 'secret', 'http://c', 'tcp://b', 'http://r')`, `INSERT INTO desired VALUES (1, 'i', 7, x'01', x'02')`,
	} {
		if _, err := old.db.ExecContext(t.Context(), q); err != nil {
			t.Fatal(err)
		}
	}
	if err := old.Close(); err != nil {
		t.Fatal(err)
	}
	migrations = all
	s := must(Open(t.Context(), path, Limits{}))(t)
	defer s.Close()
	if id := must(s.Identity(t.Context()))(t); id.Device != "cam-1" || len(id.Certificates)+len(id.Roots) != 0 {
		t.Errorf("identity %+v", id)
	}
	if d := must(s.Desired(t.Context()))(t); d.Number != 7 {
		t.Errorf("desired document %+v", d)
	}
}

func TestClockAndStoodDown(t *testing.T) {
	contract(t, Limits{}, func(t *testing.T, s stores, _ func() stores) {
		ctx := t.Context()
		if c := must(s.Clock(ctx))(t); c != (Clock{}) {
			t.Errorf("clock of a new file: %v", c)
		}
		want := Clock{time.Unix(1, 2).UTC(), time.Unix(3, 4).UTC()}
		for range 2 {
			if err := s.SetClock(ctx, want); err != nil {
				t.Fatal(err)
			}
		}
		if c := must(s.Clock(ctx))(t); c != want {
			t.Errorf("clock %v, want %v", c, want)
		}
		for _, until := range []time.Time{{}, time.Unix(5, 6).UTC(), {}} {
			if err := s.SetStoodDown(ctx, until, "why"); err != nil {
				t.Fatal(err)
			}
			if got, cause, err := s.StoodDown(ctx); err != nil || !got.Equal(until) || !until.IsZero() && cause != "why" {
				t.Errorf("stood down until %v (%s), %v, want %v", got, cause, err, until)
			}
		}
	})
}
