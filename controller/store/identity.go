package store

import (
	"context"
	"crypto/subtle"
	"database/sql"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/dunlin/dunlin/controller/identity"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// TokenOwner implements identity.Credentials.
func (s *Store) TokenOwner(ctx context.Context, hash [32]byte) (name string, role identity.Role, err error) {
	err = s.reader.QueryRowContext(ctx, "SELECT users.name, users.role FROM tokens JOIN users ON users.name = tokens.user WHERE hash = ?", hash[:]).Scan(&name, &role)
	if errors.Is(err, sql.ErrNoRows) {
		return "", "", identity.ErrUnknown
	}
	return name, role, err
}

// DeviceSecret implements identity.Credentials.
func (s *Store) DeviceSecret(ctx context.Context, device string) (hash [32]byte, err error) {
	var b []byte
	err = s.reader.QueryRowContext(ctx, "SELECT secret_hash FROM devices WHERE name = ?", device).Scan(&b)
	if errors.Is(err, sql.ErrNoRows) {
		return hash, identity.ErrUnknown
	}
	copy(hash[:], b)
	return hash, err
}

// AddToken gives a user, who is made where there is none, one more token.
func (s *Store) AddToken(ctx context.Context, user string, role identity.Role, hash [32]byte) error {
	return s.write(ctx, "token", func(tx *sql.Tx) error {
		now := s.now().UnixNano()
		var before string
		if err := tx.QueryRowContext(ctx, "SELECT role FROM users WHERE name = ?", user).Scan(&before); err != nil && !errors.Is(err, sql.ErrNoRows) {
			return err
		}
		if _, err := tx.ExecContext(ctx, "INSERT INTO users (name, role, created_at) VALUES (?, ?, ?) ON CONFLICT (name) DO UPDATE SET role = excluded.role", user, role, now); err != nil {
			return fmt.Errorf("add user %s: %w", user, err)
		}
		if _, err := tx.ExecContext(ctx, "INSERT INTO tokens (hash, id, user, created_at) VALUES (?, ?, ?, ?)", hash[:], hex.EncodeToString(hash[:6]), user, now); err != nil {
			return fmt.Errorf("add token of %s: %w", user, err)
		}
		return s.audit(ctx, tx, AuditRecord{Who: "controller", Action: "token.create", Object: "user/" + user, Before: before, After: string(role)})
	})
}

// JoinToken lets devices join. Its ID is the start of its hash.
type JoinToken struct {
	ID        string
	UsesLeft  uint32
	ExpiresAt time.Time
	Labels    map[string]string
}

// CreateJoinToken keeps the token under its hash and gives it its ID.
func (s *Store) CreateJoinToken(ctx context.Context, by string, hash [32]byte, t JoinToken) (JoinToken, error) {
	t.ID = hex.EncodeToString(hash[:6])
	err := s.write(ctx, "join token", func(tx *sql.Tx) error {
		now := s.now().UnixNano()
		if _, err := tx.ExecContext(ctx, "DELETE FROM join_tokens WHERE uses_left = 0 OR expires_at <= ?", now); err != nil {
			return err
		}
		if _, err := tx.ExecContext(ctx, "INSERT INTO join_tokens (hash, id, uses_left, expires_at, labels) VALUES (?, ?, ?, ?, ?)",
			hash[:], t.ID, t.UsesLeft, nanos(t.ExpiresAt), jsonText(t.Labels)); err != nil {
			return fmt.Errorf("create join token: %w", err)
		}
		return s.audit(ctx, tx, AuditRecord{Who: by, Action: "join-token.create", Object: "join-token/" + t.ID, After: fmt.Sprintf("%d uses until %s, labels %s", t.UsesLeft, t.ExpiresAt.UTC().Format(time.RFC3339), jsonText(t.Labels))})
	})
	return t, err
}

// JoinTokens gives those that can still be used, the first to expire first.
func (s *Store) JoinTokens(ctx context.Context) (tokens []JoinToken, err error) {
	err = s.read(ctx, func(tx *sql.Tx) error {
		query := "SELECT id, uses_left, expires_at, labels FROM join_tokens WHERE uses_left > 0 AND expires_at > ? ORDER BY expires_at, id"
		return each(ctx, tx, query, []any{s.now().UnixNano()}, func(scan func(...any) error) error {
			var t JoinToken
			var expires int64
			var labels string
			if err := scan(&t.ID, &t.UsesLeft, &expires, &labels); err != nil {
				return err
			}
			t.ExpiresAt = instant(expires)
			tokens = append(tokens, t)
			return fromJSON(labels, &tokens[len(tokens)-1].Labels)
		})
	})
	return tokens, err
}

// Join is a device that wants to be known.
type Join struct {
	Token  [32]byte // hash of its join token
	Device string
	Secret [32]byte // hash of its secret
	Broker string   // hash of its secret as an external broker keeps it
	Labels map[string]string
	Info   *dunlinv1.DeviceInfo
}

// Join makes a device known and uses its join token once; the token's labels
// win over the device's own. A device that is known with the same secret is
// joined already, whatever became of the token; with another secret it is
// ErrExists. A token that is unknown, used up or expired is ErrRefused.
func (s *Store) Join(ctx context.Context, j Join) error {
	return s.write(ctx, "join", func(tx *sql.Tx) error {
		var have []byte
		err := tx.QueryRowContext(ctx, "SELECT secret_hash FROM devices WHERE name = ?", j.Device).Scan(&have)
		switch {
		case err == nil && subtle.ConstantTimeCompare(have, j.Secret[:]) == 1:
			return nil
		case err != nil && !errors.Is(err, sql.ErrNoRows):
			return err
		}
		taken := err == nil
		now := s.now().UnixNano()
		var id, labels string
		err = tx.QueryRowContext(ctx, "UPDATE join_tokens SET uses_left = uses_left - 1 WHERE hash = ? AND uses_left > 0 AND expires_at > ? RETURNING id, labels", j.Token[:], now).Scan(&id, &labels)
		if errors.Is(err, sql.ErrNoRows) {
			return fmt.Errorf("join token is unknown, used up or expired: %w", ErrRefused)
		}
		if err != nil {
			return err
		}
		if taken { // told only to one who may join; the token is not used
			return fmt.Errorf("device %s: %w", j.Device, ErrExists)
		}
		info, err := proto.Marshal(j.Info)
		if err != nil {
			return fmt.Errorf("encode device info: %w", err)
		}
		if info == nil {
			info = []byte{}
		}
		if j.Labels == nil {
			j.Labels = map[string]string{}
		}
		if _, err := tx.ExecContext(ctx, "INSERT INTO devices (name, secret_hash, broker_hash, own_labels, token_labels, info, joined_at) VALUES (?, ?, ?, ?, ?, ?, ?)",
			j.Device, j.Secret[:], j.Broker, jsonText(j.Labels), labels, info, now); err != nil {
			return fmt.Errorf("add device %s: %w", j.Device, err)
		}
		return s.audit(ctx, tx, AuditRecord{Who: "device:" + j.Device, Action: "device.join", Object: "device/" + j.Device, After: fmt.Sprintf("join token %s, labels %s, its own %s", id, labels, jsonText(j.Labels))})
	})
}

// RemoveDevice forgets a device, its credentials and its events.
func (s *Store) RemoveDevice(ctx context.Context, by, device string) error {
	return s.write(ctx, "remove device", func(tx *sql.Tx) error {
		var own, token string
		var joined int64
		err := tx.QueryRowContext(ctx, "DELETE FROM devices WHERE name = ? RETURNING own_labels, token_labels, joined_at", device).Scan(&own, &token, &joined)
		if errors.Is(err, sql.ErrNoRows) {
			return fmt.Errorf("device %s: %w", device, ErrNotFound)
		}
		if err != nil {
			return err
		}
		return s.audit(ctx, tx, AuditRecord{Who: by, Action: "device.remove", Object: "device/" + device,
			Before: fmt.Sprintf("joined %s, labels %s, its own %s", instant(joined).Format(time.RFC3339), token, own)})
	})
}

// BrokerAccounts gives the hash of each device's secret as an external broker keeps it.
func (s *Store) BrokerAccounts(ctx context.Context) (map[string]string, error) {
	accounts := map[string]string{}
	err := s.read(ctx, func(tx *sql.Tx) error {
		return each(ctx, tx, "SELECT name, broker_hash FROM devices", nil, func(scan func(...any) error) error {
			var name, hash string
			if err := scan(&name, &hash); err != nil {
				return err
			}
			accounts[name] = hash
			return nil
		})
	})
	return accounts, err
}

// merge lays a join token's labels over the device's own.
func merge(own, token string) (map[string]string, error) {
	labels, fixed := map[string]string{}, map[string]string{}
	if err := errors.Join(fromJSON(own, &labels), fromJSON(token, &fixed)); err != nil {
		return nil, err
	}
	if labels == nil {
		labels = map[string]string{}
	}
	maps.Copy(labels, fixed)
	return labels, nil
}
