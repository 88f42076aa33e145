package store

import (
	"context"
	"database/sql"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/dunlin/dunlin/controller/fleet"
	"github.com/dunlin/dunlin/controller/identity"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

func TestUsers(t *testing.T) {
	s, clock := fresh(t)
	ctx := t.Context()
	made, err := s.CreateUser(ctx, "user:admin", User{Name: "ada", Role: identity.Operator, Scope: map[string]string{"site": "berlin"}, Password: "$argon2id$x"})
	must(t, err)
	got, err := s.User(ctx, "ada")
	if diff := cmp.Diff(made, got); err != nil || diff != "" || got.CreatedAt.IsZero() {
		t.Errorf("%v %s", err, diff)
	}
	_, err = s.CreateUser(ctx, "user:admin", User{Name: "ada"})
	is(t, err, ErrExists)
	_, err = s.UpdateUser(ctx, "user:admin", "eve", func(*User) {})
	is(t, err, ErrNotFound)
	_, err = s.UpdateUser(ctx, "user:admin", "ada", func(u *User) { u.Scope = nil })
	must(t, err)
	if got, err = s.User(ctx, "ada"); err != nil || len(got.Scope) != 0 || got.Password == "" || got.Role != identity.Operator {
		t.Errorf("got %+v, %v", got, err)
	}

	_, hash := identity.NewToken("")
	until := clock.now.Add(time.Hour)
	token, err := s.CreateToken(ctx, "user:ada", hash, Token{User: "ada", Role: identity.Viewer, Scope: map[string]string{"env": "prod"}, Comment: "c", ExpiresAt: until})
	must(t, err)
	_, err = s.CreateToken(ctx, "user:ada", identity.Hash("x"), Token{User: "eve"})
	is(t, err, ErrNotFound)
	grant, err := s.TokenOwner(ctx, hash)
	want := identity.Grant{User: "ada", UserRole: identity.Operator, UserScope: map[string]string{}, Role: identity.Viewer, Scope: map[string]string{"env": "prod"}, ExpiresAt: until.UTC()}
	if diff := cmp.Diff(want, grant); err != nil || diff != "" {
		t.Errorf("%v %s", err, diff)
	}
	used := clock.now.Truncate(time.Hour)
	must(t, s.TokenUsed(ctx, hash, used))
	must(t, s.TokenUsed(ctx, hash, used.Add(-time.Hour)))
	if all, err := s.Tokens(ctx, "ada"); err != nil || len(all) != 1 || !all[0].LastUsedAt.Equal(used) || all[0].ID != token.ID || all[0].Comment != "c" {
		t.Errorf("got %+v, %v", all, err)
	}
	is(t, s.DeleteToken(ctx, "user:eve", token.ID, "eve"), ErrNotFound)
	must(t, s.DeleteToken(ctx, "user:ada", token.ID, "ada"))
	is(t, s.DeleteToken(ctx, "user:ada", token.ID, ""), ErrNotFound)

	// Expired tokens go when the next one is made, and a user's go with it.
	_, err = s.CreateToken(ctx, "user:ada", hash, Token{User: "ada", ExpiresAt: until})
	must(t, err)
	clock.now = clock.now.Add(time.Hour)
	_, err = s.CreateToken(ctx, "user:ada", identity.Hash("next"), Token{User: "ada"})
	must(t, err)
	_, err = s.TokenOwner(ctx, hash)
	is(t, err, identity.ErrUnknown)
	must(t, s.DeleteUser(ctx, "user:admin", "ada"))
	is(t, s.DeleteUser(ctx, "user:admin", "ada"), ErrNotFound)
	_, err = s.TokenOwner(ctx, identity.Hash("next"))
	is(t, err, identity.ErrUnknown)
}

// The first administrator is one of the whole fleet again, whatever became of
// it, and keeps its password.
func TestAddTokenRestores(t *testing.T) {
	s, _ := fresh(t)
	ctx := t.Context()
	must(t, s.AddToken(ctx, "admin", identity.Admin, identity.Hash("1")))
	_, err := s.UpdateUser(ctx, "user:admin", "admin", func(u *User) {
		u.Role, u.Scope, u.Password = identity.Viewer, map[string]string{"site": "berlin"}, "$argon2id$x"
	})
	must(t, err)
	must(t, s.AddToken(ctx, "admin", identity.Admin, identity.Hash("2")))
	if u, err := s.User(ctx, "admin"); err != nil || u.Role != identity.Admin || len(u.Scope) != 0 || u.Password == "" || u.CreatedAt.IsZero() {
		t.Errorf("got %+v, %v", u, err)
	}
}

func TestMaxTokens(t *testing.T) {
	s, _ := fresh(t)
	ctx := t.Context()
	_, err := s.CreateUser(ctx, "user:admin", User{Name: "ada", Role: identity.Viewer})
	must(t, err)
	must(t, s.write(ctx, "tokens", func(tx *sql.Tx) error {
		_, err := tx.ExecContext(ctx, `WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?)
			INSERT INTO tokens (hash, id, user, created_at) SELECT randomblob(32), i, 'ada', 0 FROM n`, MaxTokens-1)
		return err
	}))
	_, err = s.CreateToken(ctx, "user:ada", identity.Hash("last"), Token{User: "ada"})
	must(t, err)
	_, err = s.CreateToken(ctx, "user:ada", identity.Hash("one more"), Token{User: "ada"})
	is(t, err, ErrRefused)
	if !strings.Contains(err.Error(), "user ada has 1000 tokens, the limit is 1000") {
		t.Error(err)
	}
}

// What may not be changed stays, with all that was to change along with it.
func TestPermit(t *testing.T) {
	s, _ := fresh(t)
	ctx := t.Context()
	push(t, s, "digits", "d1")
	push(t, s, "digits", "d2")
	_, err := s.Apply(ctx, "user:op", parse(t, deployment("a", "digits", 1, "site: berlin")), false)
	must(t, err)
	var asked []string
	never := func(o fleet.Object) error {
		asked = append(asked, fmt.Sprint(o.Kind(), "/", o.Name(), " ", o.Deployment.Selector))
		return ErrRefused
	}
	both := parse(t, deployment("b", "digits", 1, "site: rome")+deployment("a", "digits", 2, "site: berlin"))
	_, err = s.Apply(ctx, "user:op", both, false, never)
	is(t, err, ErrRefused)
	_, err = s.Delete(ctx, "user:op", fleet.KindDeployment, "a", never)
	is(t, err, ErrRefused)
	if diff := cmp.Diff([]string{"Deployment/a map[site:berlin]", "Deployment/a map[site:berlin]"}, asked); diff != "" {
		t.Error(diff)
	}
	objects, err := s.Objects(ctx, fleet.KindDeployment)
	if err != nil || len(objects) != 1 || objects[0].Deployment.Version != 1 {
		t.Errorf("got %v, %v", objects, err)
	}
}

func TestOfDevices(t *testing.T) {
	s, _ := fresh(t)
	ctx := t.Context()
	for _, d := range []string{"a", "b", "c"} {
		join(t, s, d, map[string]string{"site": d})
		_, _, err := s.AddEvents(ctx, d, "o", []*dunlinv1.Event{{Sequence: 1, Kind: d}, {Sequence: 2, Kind: d}})
		must(t, err)
	}
	labels, err := s.DeviceLabels(ctx)
	if diff := cmp.Diff(map[string]map[string]string{"a": {"site": "a"}, "b": {"site": "b"}, "c": {"site": "c"}}, labels); err != nil || diff != "" {
		t.Errorf("%v %s", err, diff)
	}
	for _, test := range []struct {
		devices []string
		limit   int
		want    string
	}{{nil, 9, ""}, {[]string{"a", "c"}, 3, "c2 c1 a2"}, {[]string{"b", "none"}, 9, "b2 b1"}} {
		events, err := s.EventsOf(context.WithoutCancel(ctx), test.devices, test.limit)
		must(t, err)
		var got []string
		for _, e := range events {
			got = append(got, fmt.Sprint(e.Device, e.Event.Sequence))
		}
		if strings.Join(got, " ") != test.want {
			t.Errorf("%v: got %v, want %s", test.devices, got, test.want)
		}
	}
}
