package store

import (
	"context"
	"database/sql"
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	"github.com/dunlin/dunlin/controller/identity"
)

// MaxTokens bounds the tokens of one user that are kept; a further one is
// ErrRefused.
const MaxTokens = 1000

// User is somebody who may call the controller.
type User struct {
	Name      string
	Role      identity.Role
	Scope     map[string]string
	Password  string // hashed, in the PHC string format; "": none
	External  bool   // OpenID Connect names it, and says role and scope
	CreatedAt time.Time
}

// text is what the audit log says of u.
func (u User) text() string {
	s := string(u.Role)
	if scope := identity.LabelsText(u.Scope); scope != "" {
		s += " of " + scope
	}
	if u.Password != "" {
		s += ", with a password"
	}
	return s
}

const selectUsers = "SELECT name, role, scope, password, external, created_at FROM users "

func scanUser(scan func(...any) error) (u User, err error) {
	var scope string
	var created int64
	if err := scan(&u.Name, &u.Role, &scope, &u.Password, &u.External, &created); err != nil {
		return u, err
	}
	u.CreatedAt = instant(created)
	return u, fromJSON(scope, &u.Scope)
}

// user gives one, or ErrNotFound.
func user(ctx context.Context, tx *sql.Tx, name string) (User, error) {
	u, err := scanUser(tx.QueryRowContext(ctx, selectUsers+"WHERE name = ?", name).Scan)
	if errors.Is(err, sql.ErrNoRows) {
		return u, fmt.Errorf("user %q: %w", name, ErrNotFound)
	}
	return u, err
}

func putUser(ctx context.Context, tx *sql.Tx, u User) error {
	if u.Scope == nil {
		u.Scope = map[string]string{}
	}
	_, err := tx.ExecContext(ctx, `INSERT INTO users (name, role, scope, password, external, created_at) VALUES (?, ?, ?, ?, ?, ?)
		ON CONFLICT (name) DO UPDATE SET role = excluded.role, scope = excluded.scope, password = excluded.password, external = excluded.external`,
		u.Name, u.Role, jsonText(u.Scope), u.Password, u.External, nanos(u.CreatedAt))
	if err != nil {
		return fmt.Errorf("put user %s: %w", u.Name, err)
	}
	return nil
}

// CreateUser adds a user; one of that name that is there is ErrExists.
func (s *Store) CreateUser(ctx context.Context, by string, u User) (User, error) {
	err := s.write(ctx, "user", func(tx *sql.Tx) error {
		if _, err := user(ctx, tx, u.Name); !errors.Is(err, ErrNotFound) {
			return errors.Join(err, fmt.Errorf("user %s: %w", u.Name, ErrExists))
		}
		u.CreatedAt = s.now().UTC()
		if err := putUser(ctx, tx, u); err != nil {
			return err
		}
		return s.audit(ctx, tx, AuditRecord{Who: by, Action: "user.create", Object: "user/" + u.Name, After: u.text()})
	})
	return u, err
}

// UpdateUser changes a user, or gives ErrNotFound. Another password takes back
// the tokens that were given for the one before.
func (s *Store) UpdateUser(ctx context.Context, by, name string, change func(*User)) (u User, err error) {
	err = s.write(ctx, "user", func(tx *sql.Tx) error {
		before, err := user(ctx, tx, name)
		if err != nil {
			return err
		}
		u = before
		change(&u)
		if err := putUser(ctx, tx, u); err != nil {
			return err
		}
		r := AuditRecord{Who: by, Action: "user.update", Object: "user/" + name, Before: before.text(), After: u.text()}
		if u.Password != before.Password {
			r.After += ", which is new"
			if _, err := tx.ExecContext(ctx, "DELETE FROM tokens WHERE user = ? AND login", name); err != nil {
				return err
			}
		}
		return s.audit(ctx, tx, r)
	})
	return u, err
}

// External keeps what OpenID Connect says of a user, by which its tokens are
// bounded. One who has no tokens is not kept, unless add.
func (s *Store) External(ctx context.Context, p identity.Principal, add bool) error {
	u := User{Name: p.Name, Role: p.Role, Scope: p.Scope, External: true}
	same := func(tx *sql.Tx) (before User, same bool, err error) {
		before, err = user(ctx, tx, u.Name)
		if errors.Is(err, ErrNotFound) {
			return before, !add, nil
		}
		return before, before.text() == u.text(), err
	}
	done := false
	err := s.read(ctx, func(tx *sql.Tx) (err error) {
		_, done, err = same(tx)
		return err
	})
	if err != nil || done {
		return err
	}
	return s.write(ctx, "user", func(tx *sql.Tx) error {
		before, done, err := same(tx)
		if err != nil || done {
			return err
		}
		r := AuditRecord{Who: p.String(), Action: "user.update", Object: "user/" + u.Name, Before: before.text(), After: u.text()}
		if before.Name == "" {
			r.Action, r.Before = "user.create", ""
		}
		if u.CreatedAt = before.CreatedAt; u.CreatedAt.IsZero() {
			u.CreatedAt = s.now().UTC()
		}
		if err := putUser(ctx, tx, u); err != nil {
			return err
		}
		return s.audit(ctx, tx, r)
	})
}

// DeleteUser takes a user and all of its tokens away, or gives ErrNotFound.
func (s *Store) DeleteUser(ctx context.Context, by, name string) error {
	return s.write(ctx, "user", func(tx *sql.Tx) error {
		before, err := user(ctx, tx, name)
		if err != nil {
			return err
		}
		if _, err := tx.ExecContext(ctx, "DELETE FROM users WHERE name = ?", name); err != nil {
			return err
		}
		return s.audit(ctx, tx, AuditRecord{Who: by, Action: "user.delete", Object: "user/" + name, Before: before.text()})
	})
}

// Users gives all users by name.
func (s *Store) Users(ctx context.Context) (users []User, err error) {
	err = s.read(ctx, func(tx *sql.Tx) error {
		return each(ctx, tx, selectUsers+"ORDER BY name", nil, func(scan func(...any) error) error {
			u, err := scanUser(scan)
			users = append(users, u)
			return err
		})
	})
	return users, err
}

// User gives one user, or ErrNotFound.
func (s *Store) User(ctx context.Context, name string) (u User, err error) {
	err = s.read(ctx, func(tx *sql.Tx) error {
		u, err = user(ctx, tx, name)
		return err
	})
	return u, err
}

// Token is an API token of a user. Its ID is the start of its hash.
type Token struct {
	ID, User, Comment string
	Role              identity.Role // "": the user's
	Scope             map[string]string
	CreatedAt         time.Time
	ExpiresAt         time.Time // zero: never
	LastUsedAt        time.Time // to the hour; zero: never
	Login             bool      // given for a password
}

// text is what the audit log says of t.
func (t Token) text() string {
	s := "token " + t.ID
	if t.Role != "" {
		s += ", " + string(t.Role)
	}
	if scope := identity.LabelsText(t.Scope); scope != "" {
		s += " of " + scope
	}
	if !t.ExpiresAt.IsZero() {
		s += ", until " + t.ExpiresAt.UTC().Format(time.RFC3339)
	}
	if t.Comment != "" {
		s += fmt.Sprintf(", %q", t.Comment)
	}
	return s
}

// CreateToken keeps a token of a user under its hash, and gives it its ID. A
// user who is not there is ErrNotFound, and one with too many tokens
// ErrRefused. Tokens that have expired are forgotten.
func (s *Store) CreateToken(ctx context.Context, by string, hash [32]byte, t Token) (Token, error) {
	err := s.write(ctx, "token", func(tx *sql.Tx) error {
		if _, err := user(ctx, tx, t.User); err != nil {
			return err
		}
		var err error
		t, err = s.addToken(ctx, tx, by, hash, t)
		return err
	})
	return t, err
}

func (s *Store) addToken(ctx context.Context, tx *sql.Tx, by string, hash [32]byte, t Token) (Token, error) {
	t.ID, t.CreatedAt = hex.EncodeToString(hash[:6]), s.now().UTC()
	if t.Scope == nil {
		t.Scope = map[string]string{}
	}
	if _, err := tx.ExecContext(ctx, "DELETE FROM tokens WHERE expires_at > 0 AND expires_at <= ?", nanos(t.CreatedAt)); err != nil {
		return t, err
	}
	var have int
	if err := tx.QueryRowContext(ctx, "SELECT count(*) FROM tokens WHERE user = ?", t.User).Scan(&have); err != nil {
		return t, err
	}
	if have >= MaxTokens {
		return t, fmt.Errorf("user %s has %d tokens, the limit is %d: %w", t.User, have, MaxTokens, ErrRefused)
	}
	if _, err := tx.ExecContext(ctx, "INSERT INTO tokens (hash, id, user, comment, role, scope, created_at, expires_at, login) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
		hash[:], t.ID, t.User, t.Comment, t.Role, jsonText(t.Scope), nanos(t.CreatedAt), nanos(t.ExpiresAt), t.Login); err != nil {
		return t, fmt.Errorf("add token of %s: %w", t.User, err)
	}
	return t, s.audit(ctx, tx, AuditRecord{Who: by, Action: "token.create", Object: "user/" + t.User, After: t.text()})
}

// AddToken gives a user, who is made where there is none, a role for the whole
// fleet and one more token, which does not expire.
func (s *Store) AddToken(ctx context.Context, name string, role identity.Role, hash [32]byte) error {
	return s.write(ctx, "token", func(tx *sql.Tx) error {
		const by = "controller"
		before, err := user(ctx, tx, name)
		if err != nil && !errors.Is(err, ErrNotFound) {
			return err
		}
		u := User{Name: name, Role: role, Password: before.Password, CreatedAt: before.CreatedAt}
		if r := (AuditRecord{Who: by, Action: "user.update", Object: "user/" + name, Before: before.text(), After: u.text()}); r.Before != r.After {
			if err != nil {
				r.Action, r.Before, u.CreatedAt = "user.create", "", s.now().UTC()
			}
			if err := errors.Join(putUser(ctx, tx, u), s.audit(ctx, tx, r)); err != nil {
				return err
			}
		}
		_, err = s.addToken(ctx, tx, by, hash, Token{User: name})
		return err
	})
}

const selectTokens = `SELECT id, user, comment, coalesce(nullif(tokens.role, ''), users.role), tokens.scope, tokens.created_at, expires_at, last_used_at
	FROM tokens JOIN users ON users.name = tokens.user `

func scanToken(scan func(...any) error) (t Token, err error) {
	var scope string
	var created, expires, used int64
	if err := scan(&t.ID, &t.User, &t.Comment, &t.Role, &scope, &created, &expires, &used); err != nil {
		return t, err
	}
	t.CreatedAt, t.ExpiresAt, t.LastUsedAt = instant(created), instant(expires), instant(used)
	return t, fromJSON(scope, &t.Scope)
}

// Tokens gives the tokens of a user, or of all where user is empty, by user,
// the oldest first. Those that have expired are among them until the next one
// is made.
func (s *Store) Tokens(ctx context.Context, user string) (tokens []Token, err error) {
	err = s.read(ctx, func(tx *sql.Tx) error {
		return each(ctx, tx, selectTokens+"WHERE ? IN ('', user) ORDER BY user, tokens.created_at, id", []any{user}, func(scan func(...any) error) error {
			t, err := scanToken(scan)
			tokens = append(tokens, t)
			return err
		})
	})
	return tokens, err
}

// DeleteToken takes a token back, which must be of user where user is not
// empty; one that is not there is ErrNotFound.
func (s *Store) DeleteToken(ctx context.Context, by, id, user string) error {
	return s.write(ctx, "token", func(tx *sql.Tx) error {
		t, err := scanToken(tx.QueryRowContext(ctx, selectTokens+"WHERE id = ? AND ? IN ('', user)", id, user).Scan)
		if errors.Is(err, sql.ErrNoRows) {
			return fmt.Errorf("token %q: %w", id, ErrNotFound)
		}
		if err != nil {
			return err
		}
		if _, err := tx.ExecContext(ctx, "DELETE FROM tokens WHERE id = ?", id); err != nil {
			return err
		}
		return s.audit(ctx, tx, AuditRecord{Who: by, Action: "token.delete", Object: "user/" + t.User, Before: t.text()})
	})
}

// DeviceLabels gives the labels of each device by its name.
func (s *Store) DeviceLabels(ctx context.Context) (map[string]map[string]string, error) {
	all := map[string]map[string]string{}
	err := s.read(ctx, func(tx *sql.Tx) error {
		return each(ctx, tx, "SELECT name, own_labels, token_labels FROM devices", nil, func(scan func(...any) error) (err error) {
			var name, own, token string
			if err := scan(&name, &own, &token); err != nil {
				return err
			}
			all[name], err = merge(own, token)
			return err
		})
	})
	return all, err
}

// TokenOwner implements identity.Credentials.
func (s *Store) TokenOwner(ctx context.Context, hash [32]byte) (g identity.Grant, err error) {
	var userScope, scope string
	var expires, used int64
	err = s.reader.QueryRowContext(ctx, `SELECT users.name, users.role, users.scope, tokens.role, tokens.scope, expires_at, last_used_at, login
		FROM tokens JOIN users ON users.name = tokens.user WHERE hash = ?`, hash[:]).Scan(&g.User, &g.UserRole, &userScope, &g.Role, &scope, &expires, &used, &g.Login)
	if errors.Is(err, sql.ErrNoRows) {
		return g, identity.ErrUnknown
	}
	if err != nil {
		return g, err
	}
	g.ExpiresAt, g.LastUsed = instant(expires), instant(used)
	return g, errors.Join(fromJSON(userScope, &g.UserScope), fromJSON(scope, &g.Scope))
}

// TokenUsed implements identity.Credentials.
func (s *Store) TokenUsed(ctx context.Context, hash [32]byte, at time.Time) error {
	return s.write(ctx, "token used", func(tx *sql.Tx) error {
		_, err := tx.ExecContext(ctx, "UPDATE tokens SET last_used_at = max(last_used_at, ?) WHERE hash = ?", nanos(at), hash[:])
		return err
	})
}
