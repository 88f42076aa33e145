package store

import (
	"context"
	"database/sql"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"time"
)

// TokenID names a token by the start of its hash.
func TokenID(hash [32]byte) string { return hex.EncodeToString(hash[:6]) }

// JoinToken lets devices join. Its ID is the start of its hash.
type JoinToken struct {
	ID        string
	UsesLeft  uint32
	ExpiresAt time.Time
	Labels    map[string]string
	Device    string // the only one that may join with it; "": any
	Broker    string // hash of the token as an external broker keeps it
}

// CreateJoinToken keeps the token under its hash and gives it its ID.
func (s *Store) CreateJoinToken(ctx context.Context, by string, hash [32]byte, t JoinToken) (JoinToken, error) {
	t.ID = TokenID(hash)
	err := s.write(ctx, "join token", func(tx *sql.Tx) error {
		now := s.now().UnixNano()
		if _, err := tx.ExecContext(ctx, "DELETE FROM join_tokens WHERE expires_at <= ?", now); err != nil {
			return err
		}
		if _, err := tx.ExecContext(ctx, "INSERT INTO join_tokens (hash, id, uses_left, expires_at, labels, device, broker_hash) VALUES (?, ?, ?, ?, ?, ?, ?)",
			hash[:], t.ID, t.UsesLeft, nanos(t.ExpiresAt), jsonText(t.Labels), t.Device, t.Broker); err != nil {
			return fmt.Errorf("create join token: %w", err)
		}
		return s.audit(ctx, tx, AuditRecord{Who: by, Action: "join-token.create", Object: "join-token/" + t.ID, After: fmt.Sprintf("%d uses until %s, labels %s", t.UsesLeft, t.ExpiresAt.UTC().Format(time.RFC3339), jsonText(t.Labels))})
	})
	return t, err
}

// JoinTokens gives those that can still be used, the first to expire first.
func (s *Store) JoinTokens(ctx context.Context) (tokens []JoinToken, err error) {
	err = s.read(ctx, func(tx *sql.Tx) error {
		query := "SELECT id, uses_left, expires_at, labels, device FROM join_tokens WHERE uses_left > 0 AND expires_at > ? ORDER BY expires_at, id"
		return each(ctx, tx, query, []any{s.now().UnixNano()}, func(scan func(...any) error) error {
			var t JoinToken
			var expires int64
			var labels string
			if err := scan(&t.ID, &t.UsesLeft, &expires, &labels, &t.Device); err != nil {
				return err
			}
			t.ExpiresAt = instant(expires)
			tokens = append(tokens, t)
			return fromJSON(labels, &tokens[len(tokens)-1].Labels)
		})
	})
	return tokens, err
}

// DeleteJoinToken takes a join token back.
func (s *Store) DeleteJoinToken(ctx context.Context, by, id string) error {
	return s.write(ctx, "delete join token", func(tx *sql.Tx) error { return s.deleteJoinToken(ctx, tx, by, id) })
}

// takeJoinTokens takes back the join tokens that are for a device.
func (s *Store) takeJoinTokens(ctx context.Context, tx *sql.Tx, by, device string) error {
	var ids []string
	err := each(ctx, tx, "SELECT id FROM join_tokens WHERE device = ? ORDER BY id", []any{device}, func(scan func(...any) error) error {
		var id string
		err := scan(&id)
		ids = append(ids, id)
		return err
	})
	for _, id := range ids {
		err = errors.Join(err, s.deleteJoinToken(ctx, tx, by, id))
	}
	return err
}

func (s *Store) deleteJoinToken(ctx context.Context, tx *sql.Tx, by, id string) error {
	var uses uint32
	var expires int64
	var labels string
	err := tx.QueryRowContext(ctx, "DELETE FROM join_tokens WHERE id = ? RETURNING uses_left, expires_at, labels", id).Scan(&uses, &expires, &labels)
	if errors.Is(err, sql.ErrNoRows) {
		return fmt.Errorf("join token %s: %w", id, ErrNotFound)
	}
	if err != nil {
		return err
	}
	return s.audit(ctx, tx, AuditRecord{Who: by, Action: "join-token.delete", Object: "join-token/" + id,
		Before: fmt.Sprintf("%d uses until %s, labels %s", uses, instant(expires).Format(time.RFC3339), labels)})
}

// JoinTokenKnown says whether there is such a join token. One that is used up
// is known until it expires: the last device may ask again for its answer.
func (s *Store) JoinTokenKnown(ctx context.Context, hash [32]byte) (bool, error) {
	var n int
	err := s.reader.QueryRowContext(ctx, "SELECT count(*) FROM join_tokens WHERE hash = ? AND expires_at > ?", hash[:], s.now().UnixNano()).Scan(&n)
	return n > 0, err
}

// BrokerTokens gives the hash of each known join token, as an external broker
// keeps it, by the token's id.
func (s *Store) BrokerTokens(ctx context.Context) (map[string]string, error) {
	tokens := map[string]string{}
	err := s.read(ctx, func(tx *sql.Tx) error {
		return each(ctx, tx, "SELECT id, broker_hash FROM join_tokens WHERE expires_at > ? AND broker_hash <> ''", []any{s.now().UnixNano()}, func(scan func(...any) error) error {
			var id, hash string
			err := scan(&id, &hash)
			tokens[id] = hash
			return err
		})
	})
	return tokens, err
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
