package state

import (
	"context"
	"fmt"

	"google.golang.org/protobuf/proto"

	"github.com/dunlin/dunlin/models/signing"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// Trust gives the stored trust document, or ErrNone.
func (s *Store) Trust(ctx context.Context) (*signing.Trust, error) {
	var raw []byte
	if err := s.db.QueryRowContext(ctx, `SELECT signed FROM trust`).Scan(&raw); err != nil {
		return nil, none("trust document", err)
	}
	signed := new(dunlinv1.SignedTrust)
	if err := proto.Unmarshal(raw, signed); err != nil {
		return nil, fmt.Errorf("read trust document: %w", err)
	}
	t, err := signing.Advance(nil, []*dunlinv1.SignedTrust{signed})
	return t, wrap("read trust document", err)
}

// SetTrust stores a trust document in place of an earlier one. Whether it may
// take its place is the caller's to decide, by signing.Advance.
func (s *Store) SetTrust(ctx context.Context, t *signing.Trust) error {
	raw, err := proto.Marshal(t.Signed())
	if err != nil {
		return wrap("store trust document", err)
	}
	_, err = s.db.ExecContext(ctx, `INSERT OR REPLACE INTO trust (one, version, signed) VALUES (1, ?, ?)`, int64(t.Version()), raw)
	return wrap("store trust document", err)
}
