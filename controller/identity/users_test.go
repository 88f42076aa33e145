package identity

import (
	"context"
	"errors"
	"fmt"
	"net/http/httptest"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"
)

// clock is set by hand.
type clock struct {
	mu sync.Mutex
	at time.Time
}

func newClock() *clock { return &clock{at: time.Date(2026, 11, 29, 12, 30, 0, 0, time.UTC)} }

func (c *clock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.at
}

func (c *clock) add(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.at = c.at.Add(d)
}

func TestGrant(t *testing.T) {
	now := time.Date(2026, 11, 29, 12, 0, 0, 0, time.UTC)
	labels := func(kv ...string) map[string]string {
		m := map[string]string{}
		for i := 0; i < len(kv); i += 2 {
			m[kv[i]] = kv[i+1]
		}
		return m
	}
	for name, test := range map[string]struct {
		grant Grant
		want  Principal
		err   error
	}{
		"the user's role":     {Grant{User: "u", UserRole: Admin}, Principal{Kind: User, Name: "u", Role: Admin}, nil},
		"the token's role":    {Grant{User: "u", UserRole: Admin, Role: Viewer}, Principal{Kind: User, Name: "u", Role: Viewer}, nil},
		"no more than user's": {Grant{User: "u", UserRole: Viewer, Role: Admin}, Principal{Kind: User, Name: "u", Role: Viewer}, nil},
		"both scopes":         {Grant{User: "u", UserRole: Viewer, UserScope: labels("site", "berlin"), Scope: labels("env", "prod")}, Principal{Kind: User, Name: "u", Role: Viewer, Scope: labels("site", "berlin", "env", "prod")}, nil},
		"no common scope":     {Grant{User: "u", UserRole: Viewer, UserScope: labels("site", "berlin"), Scope: labels("site", "rome")}, Principal{}, ErrUnauthenticated},
		"valid":               {Grant{User: "u", UserRole: Viewer, ExpiresAt: now.Add(1)}, Principal{Kind: User, Name: "u", Role: Viewer, Expires: now.Add(1)}, nil},
		"expired":             {Grant{User: "u", UserRole: Viewer, ExpiresAt: now}, Principal{}, errExpired},
	} {
		got, err := test.grant.principal(now)
		if !reflect.DeepEqual(got, test.want) || !errors.Is(err, test.err) {
			t.Errorf("%s: got %+v, %v, want %+v, %v", name, got, err, test.want, test.err)
		}
	}
}

// The use of a token is kept once an hour, and who may come in does so where
// it cannot be.
func TestLastUse(t *testing.T) {
	token, hash := NewToken("")
	c, clock := &credentials{tokens: map[[32]byte]Grant{hash: {User: "ada", UserRole: Viewer}}, usedErr: errors.New("disk full")}, newClock()
	a := New(c, Options{Now: clock.now})
	r := httptest.NewRequest("GET", "/", nil)
	r.Header.Set("Authorization", "Bearer "+token)
	for i, after := range []time.Duration{0, 29 * time.Minute, time.Minute, 59 * time.Minute, time.Minute} {
		clock.add(after)
		if p, err := a.FromRequest(r); err != nil || p.Name != "ada" {
			t.Errorf("request %d: %v, %v", i, p, err)
		}
	}
	if want := time.Date(2026, 11, 29, 14, 0, 0, 0, time.UTC); c.used != 3 || !c.tokens[hash].LastUsed.Equal(want) {
		t.Errorf("kept %d times, last %s, want 3, %s", c.used, c.tokens[hash].LastUsed, want)
	}
}

func TestCovers(t *testing.T) {
	p := Principal{Scope: map[string]string{"site": "berlin", "env": ""}}
	for _, test := range []struct {
		labels map[string]string
		covers bool
		narrow map[string]string
	}{
		{map[string]string{"site": "berlin", "env": "", "x": "y"}, true, map[string]string{"site": "berlin", "env": "", "x": "y"}},
		{map[string]string{"site": "berlin"}, false, map[string]string{"site": "berlin", "env": ""}},
		{map[string]string{"site": "rome", "env": ""}, false, nil},
		{nil, false, map[string]string{"site": "berlin", "env": ""}},
	} {
		narrow, ok := p.Narrow(test.labels)
		if p.Covers(test.labels) != test.covers || !reflect.DeepEqual(narrow, test.narrow) || ok != (test.narrow != nil) {
			t.Errorf("%v: covers %v, narrow %v, %v", test.labels, p.Covers(test.labels), narrow, ok)
		}
	}
	if !(Principal{}).Covers(nil) {
		t.Error("no scope does not cover everything")
	}
}

func TestCheckUser(t *testing.T) {
	for name, ok := range map[string]bool{
		"ada": true, "ada.l@example.com": true, "7": true, strings.Repeat("a", 64): true,
		"": false, "oidc:ada": false, ".ada": false, "a b": false, "a\n": false, "ä": false, strings.Repeat("a", 65): false,
	} {
		if err := CheckUser(name); (err == nil) != ok {
			t.Errorf("%q: %v", name, err)
		}
	}
}

func TestPassword(t *testing.T) {
	a := New(&credentials{}, Options{})
	const right = "correct horse battery"
	kept, err := a.HashPassword(t.Context(), right)
	if err != nil || !strings.HasPrefix(kept, "$argon2id$v=19$m=32768,t=2,p=1$") || strings.Contains(kept, right) {
		t.Fatalf("got %s, %v", kept, err)
	}
	if again, _ := a.HashPassword(t.Context(), right); again == kept {
		t.Error("two hashes have the same salt")
	}
	at := func(name, password string) Attempt {
		return Attempt{From: "192.0.2.1:1", Name: name, Credential: password}
	}
	if err := a.Login(t.Context(), at("ada", right), kept); err != nil {
		t.Error(err)
	}
	for name, try := range map[string]struct {
		attempt Attempt
		kept    string
	}{
		"wrong":          {at("ada", "correct horse batterY"), kept},
		"empty":          {at("ada", ""), kept},
		"none kept":      {at("ada", right), ""},
		"none at all":    {at("ada", ""), ""},
		"too long":       {at("ada", strings.Repeat("x", 1<<16)), kept},
		"no user's name": {at("ada lovelace", right), kept},
	} {
		if err := a.Login(t.Context(), try.attempt, try.kept); !errors.Is(err, errWrong) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := a.Login(t.Context(), at("ada", right), "plain"); err == nil || errors.Is(err, ErrUnauthenticated) {
		t.Errorf("a kept password that cannot be read: %v", err)
	}
	for password, ok := range map[string]bool{
		"short": false, "12 character": true, "zwölf Zeiche": true, strings.Repeat("ö", 512): true, strings.Repeat("o", 513): false,
	} {
		if err := CheckPassword(password); (err == nil) != ok {
			t.Errorf("%q: %v", password, err)
		}
	}
}

// Known and unknown users cost the same: the same hash with the same settings.
func TestUnknownUserCostsTheSame(t *testing.T) {
	a := New(&credentials{}, Options{})
	kept, err := a.HashPassword(t.Context(), "correct horse battery")
	if err != nil {
		t.Fatal(err)
	}
	p, err := parsePHC(kept)
	if err != nil || p.memory != nobodys.memory || p.passes != nobodys.passes || p.threads != nobodys.threads || len(p.salt) != len(nobodys.salt) {
		t.Errorf("kept with %+v, compared for nobody with %+v, %v", p, nobodys, err)
	}
}

// Logins beyond those that are hashed at once wait, and beyond those they are
// refused; one who goes away leaves the line.
func TestLoginFlood(t *testing.T) {
	p := newPasswords()
	var free []func()
	for range hashing {
		f, err := p.take(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		free = append(free, f)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var line sync.WaitGroup
	for range waiting {
		line.Go(func() {
			if _, err := p.take(ctx); !errors.Is(err, context.Canceled) {
				t.Errorf("got %v", err)
			}
		})
	}
	for len(p.line) < hashing+waiting { // until all stand in line
		select {
		case <-t.Context().Done():
			t.Fatal("the line does not fill")
		default:
		}
	}
	if _, err := p.take(t.Context()); !errors.Is(err, error(errBusy)) {
		t.Errorf("beyond the line: %v", err)
	}
	cancel()
	line.Wait()
	for _, f := range free {
		f()
	}
	if len(p.line) != 0 || len(p.slots) != 0 {
		t.Errorf("%d stand in line and %d hash after all are done", len(p.line), len(p.slots))
	}
}

func FuzzParsePHC(f *testing.F) {
	f.Add("$argon2id$v=19$m=32768,t=2,p=1$AAAAAAAAAAAAAAAAAAAAAA$AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA")
	f.Add("$argon2id$v=19$m=4294967295,t=2,p=1$AAAAAAAAAAAAAAAAAAAAAA$AAAA")
	f.Add("$argon2id$v=19$m=+8,t=2,p=1 $$")
	f.Fuzz(func(t *testing.T, s string) {
		if p, err := parsePHC(s); err == nil && (p.String() != s || p.memory > maxMemory || p.passes > maxPasses || p.threads < 1) {
			t.Errorf("%q: took %+v", s, p)
		}
	})
}

func BenchmarkLogin(b *testing.B) {
	a := New(&credentials{}, Options{})
	kept, err := a.HashPassword(b.Context(), "correct horse battery")
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if err := a.Login(b.Context(), Attempt{Name: "ada", Credential: "correct horse battery"}, kept); err != nil {
			b.Fatal(err)
		}
	}
}

func wait(err error) time.Duration {
	if limited, ok := errors.AsType[*LimitedError](err); ok {
		return limited.Wait
	}
	return 0
}

func TestGuardAddress(t *testing.T) {
	clock := newClock()
	g := NewGuard(clock.now)
	guess := func(n int) Attempt { return Attempt{From: "192.0.2.1:5", Credential: fmt.Sprint("guess ", n)} }
	mine := Attempt{From: "192.0.2.1:9", Credential: "right"}
	g.Right(mine)
	for n := range addressWrong {
		if err := g.Check(guess(n)); err != nil {
			t.Fatalf("guess %d: %v", n, err)
		}
		g.Wrong(guess(n))
	}
	if w := wait(g.Check(guess(0))); w <= 0 || w > addressEvery {
		t.Errorf("one guess too many waits %s", w)
	}
	for name, a := range map[string]Attempt{
		"from elsewhere":      {From: "192.0.2.2:5", Credential: "right"},
		"in before, the same": mine,
	} {
		if err := g.Check(a); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if g.Check(Attempt{From: "192.0.2.1:5", Name: "ada", Credential: "right"}) == nil {
		t.Error("a password passes where a token was right")
	}
	// What was right and is wrong now is a guess.
	g.Wrong(mine)
	if g.Check(mine) == nil {
		t.Error("a token that was taken back passes")
	}
	clock.add(addressEvery + time.Millisecond)
	if err := g.Check(guess(0)); err != nil {
		t.Errorf("after its time: %v", err)
	}
	g.Wrong(guess(0))
	if g.Check(guess(0)) == nil {
		t.Error("more than one guess is granted at a time")
	}
}

func TestGuardName(t *testing.T) {
	clock := newClock()
	g := NewGuard(clock.now)
	for n := range nameWrong { // from everywhere
		a := Attempt{From: fmt.Sprintf("192.0.2.%d:1", n), Name: "ada"}
		if err := g.Check(a); err != nil {
			t.Fatalf("guess %d: %v", n, err)
		}
		g.Wrong(a)
	}
	if w := wait(g.Check(Attempt{From: "198.51.100.1:1", Name: "ada"})); w <= addressEvery || w > nameEvery {
		t.Errorf("one guess too many waits %s", w)
	}
	if err := errors.Join(g.Check(Attempt{From: "198.51.100.1:1", Name: "eve"}), g.Check(Attempt{From: "198.51.100.1:1", Credential: "ada's token"})); err != nil {
		t.Errorf("others wait too: %v", err)
	}
	clock.add(nameEvery + time.Millisecond)
	if err := g.Check(Attempt{From: "198.51.100.1:1", Name: "ada"}); err != nil {
		t.Errorf("after its time: %v", err)
	}
}

func TestGuardAddresses(t *testing.T) {
	for from, want := range map[string]string{
		"192.0.2.1:80": "192.0.2.1", "[::ffff:192.0.2.1]:80": "192.0.2.1", "[2001:db8:1:2:3:4:5:6]:80": "2001:db8:1:2::/64",
		"[fe80::1%eth0]:80": "fe80::/64", "@": "@",
	} {
		if got := (Attempt{From: from}).address(); got != want {
			t.Errorf("%s: got %s, want %s", from, got, want)
		}
	}
}

// Memory is bounded, and who goes on guessing is not forgotten for others.
func TestGuardForgets(t *testing.T) {
	g := NewGuard(newClock().now)
	busy := Attempt{From: "192.0.2.1:1", Name: "ada"}
	for n := range 2 * guarded {
		a := Attempt{From: fmt.Sprintf("10.%d.%d.%d:1", n>>16, n>>8&255, n&255), Name: fmt.Sprint("user", n)}
		g.Wrong(a)
		g.Right(Attempt{From: a.From, Credential: "x"})
		if n%1000 == 0 {
			g.Wrong(busy)
		}
	}
	if g.addresses.Len() != guarded || g.names.Len() != guarded || g.right.Len() != guarded {
		t.Errorf("remembers %d addresses, %d names, %d tokens", g.addresses.Len(), g.names.Len(), g.right.Len())
	}
	if g.Check(busy) == nil {
		t.Error("who guessed most was forgotten")
	}
}

// Every way in is guarded: a wrong token too many is not looked at.
func TestFromRequestIsGuarded(t *testing.T) {
	token, hash := NewToken("")
	clock := newClock()
	c := &credentials{tokens: map[[32]byte]Grant{hash: {User: "ada", UserRole: Viewer, ExpiresAt: clock.now().Add(time.Hour)}}}
	a := New(c, Options{Now: clock.now})
	try := func(from, token string) error {
		r := httptest.NewRequest("GET", "/", nil)
		r.RemoteAddr = from
		r.SetBasicAuth("cam-1", token)
		_, err := a.FromRequest(r)
		return err
	}
	for n := range addressWrong {
		if err := try("192.0.2.1:1", "guess"); !errors.Is(err, ErrUnauthenticated) {
			t.Fatalf("guess %d: %v", n, err)
		}
	}
	if err := try("192.0.2.1:2", token); wait(err) == 0 || errors.Is(err, ErrUnauthenticated) {
		t.Errorf("a token among guesses: %v", err)
	}
	if err := try("192.0.2.2:1", token); err != nil {
		t.Errorf("a token from elsewhere: %v", err)
	}
	// One that has expired is no guess.
	clock.add(time.Hour)
	for range 2 * addressWrong {
		if err := try("192.0.2.3:1", token); !errors.Is(err, errExpired) {
			t.Fatalf("an expired token: %v", err)
		}
	}
}
