package store

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/dunlin/dunlin/controller/identity"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

func TestIdentity(t *testing.T) {
	s, _ := fresh(t)
	ctx := t.Context()
	token, hash := identity.NewToken("x")
	must(t, s.AddToken(ctx, "admin", identity.Admin, hash))
	g, err := s.TokenOwner(ctx, identity.Hash(token))
	if g.User != "admin" || g.UserRole != identity.Admin || err != nil {
		t.Errorf("got %+v, %v", g, err)
	}
	_, err = s.TokenOwner(ctx, identity.Hash("other"))
	is(t, err, identity.ErrUnknown)
}

func TestJoin(t *testing.T) {
	s, clock := fresh(t)
	ctx := t.Context()
	vouch(t, s)
	_, hash := identity.NewToken("")
	token, err := s.CreateJoinToken(ctx, "user:a", hash, JoinToken{UsesLeft: 2, ExpiresAt: clock.now.Add(time.Hour), Labels: map[string]string{"site": "token"}})
	must(t, err)
	j := joins(t, hash, "d", map[string]string{"site": "own", "a": "b"})
	j.Info = &dunlinv1.DeviceInfo{Arch: "amd64"}
	first, err := s.Join(ctx, j)
	must(t, err)
	if again, err := s.Join(ctx, j); err != nil || !again.Equal(first) {
		t.Errorf("the same join again gives %v, %v", again, err)
	}
	d, err := s.Device(ctx, "d")
	must(t, err)
	if d.Labels["site"] != "token" || d.Labels["a"] != "b" || d.Info.Arch != "amd64" || !d.JoinedAt.Equal(clock.now) || d.Connected || d.Reported != nil {
		t.Errorf("got %+v", d)
	}
	refused := func(j Join, want error) {
		t.Helper()
		_, err := s.Join(ctx, j)
		is(t, err, want)
	}
	other := joins(t, hash, "d", nil)
	refused(other, ErrExists)
	other.Token = identity.Hash("unknown")
	refused(other, ErrRefused) // which names are taken is nobody's business
	tokens, err := s.JoinTokens(ctx)
	if err != nil || len(tokens) != 1 || tokens[0].UsesLeft != 1 || tokens[0].ID != token.ID {
		t.Errorf("got %v, %v", tokens, err)
	}
	_, err = s.Join(ctx, joins(t, hash, "e", nil))
	must(t, err)
	refused(joins(t, hash, "f", nil), ErrRefused) // used up
	_, err = s.Join(ctx, j)                       // and yet the same answer for one that is in
	must(t, err)
	_, late := identity.NewToken("")
	_, err = s.CreateJoinToken(ctx, "user:a", late, JoinToken{UsesLeft: 1, ExpiresAt: clock.now.Add(time.Minute)})
	must(t, err)
	clock.now = clock.now.Add(time.Minute)
	refused(joins(t, late, "f", nil), ErrRefused) // expired
	refused(joins(t, identity.Hash("unknown"), "f", nil), ErrRefused)

	must(t, s.RemoveDevice(ctx, "user:a", "d"))
	is(t, s.RemoveDevice(ctx, "user:a", "d"), ErrNotFound)
	_, err = s.Device(ctx, "d")
	is(t, err, ErrNotFound)
	refused(j, ErrRefused) // its token is used up
	records, err := s.Audit(ctx, 100)
	must(t, err)
	if r := records[0]; r.Who != "user:a" || r.Action != "device.remove" || r.Object != "device/d" {
		t.Errorf("audit has %+v", r)
	}
}

func TestSession(t *testing.T) {
	s, _ := fresh(t)
	ctx := t.Context()
	join(t, s, "d", map[string]string{"a": "1"})
	_, _, err := s.Hello(ctx, "unknown", &dunlinv1.Hello{Session: "s1"})
	is(t, err, ErrNotFound)
	d, relabelled, err := s.Hello(ctx, "d", &dunlinv1.Hello{Session: "s1", Info: &dunlinv1.DeviceInfo{Hostname: "h"}})
	must(t, err)
	if relabelled || !d.Connected || d.Info.Hostname != "h" || d.Labels["a"] != "1" {
		t.Errorf("got %+v, %v", d, relabelled)
	}
	report := func(session string, n uint64) error {
		return s.Report(ctx, "d", &dunlinv1.Reported{Session: session, Sequence: n})
	}
	must(t, report("s1", 1))
	is(t, report("s1", 1), ErrStale)
	is(t, report("s0", 9), ErrStale)
	must(t, report("s1", 3))
	is(t, report("s1", 2), ErrStale)
	// The same session says hello again: the numbers go on.
	_, _, err = s.Hello(ctx, "d", &dunlinv1.Hello{Session: "s1"})
	must(t, err)
	is(t, report("s1", 3), ErrStale)
	d, relabelled, err = s.Hello(ctx, "d", &dunlinv1.Hello{Session: "s2", Labels: map[string]string{"a": "2"}})
	must(t, err)
	if !relabelled || d.Labels["a"] != "2" || d.Info.Hostname != "h" || d.Reported.GetSequence() != 3 {
		t.Errorf("got %+v, %v", d, relabelled)
	}
	must(t, report("s2", 1))
	is(t, s.Gone(ctx, "d", "s1"), ErrStale)
	must(t, s.Gone(ctx, "d", "s2"))
	d, err = s.Device(ctx, "d")
	if err != nil || d.Connected {
		t.Errorf("got %+v, %v", d, err)
	}
}

func TestDesired(t *testing.T) {
	s, _ := fresh(t)
	ctx := t.Context()
	join(t, s, "a", nil)
	join(t, s, "b", nil)
	doc := func(device, text string) Desired {
		return Desired{Device: device, SHA256: identity.Hash(text), Document: []byte(text)}
	}
	saved, err := s.SaveDesired(ctx, []Desired{doc("a", ""), doc("b", "x"), doc("removed", "x")})
	if err != nil || len(saved) != 2 || saved[0].Number != 1 || saved[1].Number != 2 {
		t.Fatalf("got %+v, %v", saved, err)
	}
	saved, err = s.SaveDesired(ctx, []Desired{doc("a", ""), doc("b", "y")})
	if err != nil || len(saved) != 1 || saved[0].Number != 3 {
		t.Fatalf("got %+v, %v", saved, err)
	}
	got, err := s.Desired(ctx, "b")
	if err != nil || got.Number != 3 || string(got.Document) != "y" || got.SHA256 != identity.Hash("y") {
		t.Errorf("got %+v, %v", got, err)
	}
	must(t, s.RemoveDevice(ctx, "user:a", "b"))
	_, err = s.Desired(ctx, "b")
	is(t, err, ErrNotFound)
	join(t, s, "b", nil)
	if saved, err := s.SaveDesired(ctx, []Desired{doc("b", "y")}); err != nil || saved[0].Number != 4 {
		t.Errorf("a device that came back got a number again: %+v, %v", saved, err)
	}
}

func events(sequences ...uint64) (batch []*dunlinv1.Event) {
	for _, n := range sequences {
		batch = append(batch, &dunlinv1.Event{Sequence: n, Kind: "test", Message: fmt.Sprint(n)})
	}
	return batch
}

func TestEvents(t *testing.T) {
	s, _ := fresh(t)
	ctx := t.Context()
	join(t, s, "d", nil)
	add := func(outbox string, batch []*dunlinv1.Event, want uint64) {
		t.Helper()
		if got, _, err := s.AddEvents(ctx, "d", outbox, batch); got != want || err != nil {
			t.Fatalf("stored up to %d, %v, want %d", got, err, want)
		}
	}
	add("o", events(1, 2, 3), 3)
	add("o", events(2, 3, 4), 4)
	add("o", events(6), 4)
	add("o", nil, 4)
	add("p", events(1), 1)
	gap := events(9, 10)
	gap[0].Kind = GapKind
	add("o", gap, 10)
	add("o", gap, 10)
	got, err := s.Events(ctx, "d", 100)
	must(t, err)
	var order []string
	for _, e := range got {
		order = append(order, e.OutboxID+e.Event.Message)
	}
	if want := "o10 o9 p1 o4 o3 o2 o1"; strings.Join(order, " ") != want {
		t.Errorf("got %v", order)
	}
	if all, err := s.Events(ctx, "", 2); err != nil || len(all) != 2 {
		t.Errorf("got %v, %v", all, err)
	}
	_, _, err = s.AddEvents(ctx, "unknown", "o", events(1))
	is(t, err, ErrNotFound)
	for i := range 2 * MaxOutboxes {
		add(fmt.Sprint("many", i), events(1), 1)
	}
	var n int
	must(t, s.reader.QueryRow("SELECT count(*) FROM outboxes").Scan(&n))
	if n != MaxOutboxes {
		t.Errorf("%d outboxes are kept", n)
	}
	// One whose position is forgotten goes on where its events end.
	add("o", events(10, 11), 11)
}

// The events of an outbox that another store acknowledged up to some point go
// on from there: when the store was made anew, and when the device joined again.
func TestEventsOfUnknownOutbox(t *testing.T) {
	s, _ := fresh(t)
	ctx := t.Context()
	join(t, s, "d", nil)
	add := func(batch []*dunlinv1.Event, want uint64) {
		t.Helper()
		if got, _, err := s.AddEvents(ctx, "d", "o", batch); got != want || err != nil {
			t.Fatalf("stored up to %d, %v, want %d", got, err, want)
		}
	}
	add(events(501, 502, 504), 502)
	add(events(501, 502, 503), 503)
	add(events(505), 503) // one was lost on the way
	add(events(504, 505), 505)
	must(t, s.RemoveDevice(ctx, "user:test", "d"))
	join(t, s, "d", nil)
	add(events(506), 506)
	got, err := s.Events(ctx, "d", 100)
	if err != nil || len(got) != 1 {
		t.Errorf("got %v, %v", got, err)
	}
}

// A device that was heard again while it was found away is not away.
func TestHeardMeanwhile(t *testing.T) {
	s, clock := fresh(t)
	ctx := t.Context()
	join(t, s, "a", nil)
	_, _, err := s.Hello(ctx, "a", &dunlinv1.Hello{Session: "s"})
	must(t, err)
	before := clock.now
	clock.now = clock.now.Add(time.Hour)
	must(t, s.Report(ctx, "a", &dunlinv1.Reported{Session: "s", Sequence: 1}))
	must(t, s.Heard(ctx, nil, map[string]time.Time{"a": before}, nil))
	if d, err := s.Device(ctx, "a"); err != nil || !d.Connected {
		t.Errorf("got %+v, %v", d, err)
	}
}

func TestPrune(t *testing.T) {
	s, _ := fresh(t)
	join(t, s, "d", nil)
	join(t, s, "e", nil)
	var batch []uint64
	for i := range MaxEvents + 5 {
		batch = append(batch, uint64(i+1))
	}
	_, _, err := s.AddEvents(t.Context(), "d", "o", events(batch...))
	must(t, err)
	_, _, err = s.AddEvents(t.Context(), "e", "o", events(1))
	must(t, err)
	must(t, s.Prune(t.Context()))
	var n, least int
	must(t, s.reader.QueryRow("SELECT count(*), min(sequence) FROM events WHERE device = 'd'").Scan(&n, &least))
	if n != MaxEvents || least != 6 {
		t.Errorf("%d events from %d are kept", n, least)
	}
	if got, _, err := s.AddEvents(t.Context(), "d", "o", events(1, 2)); err != nil || got != MaxEvents+5 {
		t.Errorf("forgotten events came again: %d, %v", got, err)
	}
}

func TestHeard(t *testing.T) {
	s, clock := fresh(t)
	ctx := t.Context()
	join(t, s, "a", nil)
	_, _, err := s.Hello(ctx, "a", &dunlinv1.Hello{Session: "s"})
	must(t, err)
	later := clock.now.Add(time.Hour)
	must(t, s.Heard(ctx, map[string]time.Time{"a": later}, map[string]time.Time{"a": later}, nil))
	must(t, s.Heard(ctx, map[string]time.Time{"a": clock.now}, nil, nil))
	d, err := s.Device(ctx, "a")
	if err != nil || d.Connected || !d.LastHeardAt.Equal(later) {
		t.Errorf("got %+v, %v", d, err)
	}
}
