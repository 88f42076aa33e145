package api

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"connectrpc.com/connect"

	"github.com/dunlin/dunlin/controller/store"
	"github.com/dunlin/dunlin/models/signing"
	v1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// maxAhead is how far ahead of the controller's clock a trust document may be
// issued: the next one cannot be issued before it.
const maxAhead = time.Hour

func (s *server) GetTrust(ctx context.Context, req *connect.Request[v1.GetTrustRequest]) (*connect.Response[v1.GetTrustResponse], error) {
	chain, err := s.Store.TrustSince(ctx, req.Msg.GetAfter())
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&v1.GetTrustResponse{Trust: chain}), nil
}

// trust gives the trust document in force.
func (s *server) trust(ctx context.Context) (*signing.Trust, error) {
	signed, err := s.Store.Trust(ctx)
	if err != nil {
		return nil, err
	}
	return signing.Advance(nil, []*v1.SignedTrust{signed})
}

func (s *server) PutTrust(ctx context.Context, req *connect.Request[v1.PutTrustRequest]) (*connect.Response[v1.PutTrustResponse], error) {
	signed := req.Msg.GetTrust()
	have, err := s.trust(ctx)
	if err != nil {
		return nil, err
	}
	next, err := signing.Advance(have, []*v1.SignedTrust{signed})
	if err != nil {
		return nil, invalid("%w", err)
	}
	now := time.Now()
	switch {
	case next == have:
		return connect.NewResponse(&v1.PutTrustResponse{}), nil
	case next.IssuedAt().After(now.Add(maxAhead)):
		return nil, invalid("trust document %d is issued on %s, which is not yet", next.Version(), next.IssuedAt().Format(time.RFC3339))
	case next.Expired(now):
		return nil, invalid("trust document %d has expired on %s", next.Version(), next.ExpiresAt().Format(time.RFC3339))
	case !slices.ContainsFunc(next.Controllers(), func(k signing.Key) bool { return k.ID == s.SigningKey }):
		return nil, invalid("trust document %d lacks this controller's key %s: devices would take nothing that it registers", next.Version(), s.SigningKey)
	}
	err = s.Store.AddTrust(ctx, caller(ctx), signed)
	if errors.Is(err, store.ErrStale) {
		err = connect.NewError(connect.CodeFailedPrecondition, err)
	}
	if err != nil {
		return nil, err
	}
	s.Dispatch.Resumed() // devices say hello, and are told to renew, with which it comes
	return connect.NewResponse(&v1.PutTrustResponse{}), nil
}

// signers gives who has signed the bundles of a model, or of all: publishers of
// the trust document in force, by model and digest.
func (s *server) signers(ctx context.Context, model string) (map[[2]string][]string, error) {
	trust, err := s.trust(ctx)
	if err != nil {
		return nil, err
	}
	names := map[string]string{}
	for _, k := range trust.Publishers() {
		name := k.ID
		if k.Comment != "" {
			name = fmt.Sprintf("%s (%s)", k.Comment, k.ID)
		}
		names[k.ID] = name
		if k.Hint() != "" { // as signatures that came before the key did name it
			names[k.Hint()] = name
		}
	}
	found, err := s.Store.Signatures(ctx, model, "")
	if err != nil {
		return nil, err
	}
	all := map[[2]string][]string{}
	for _, f := range found {
		at := [2]string{f.Model, f.Digest}
		if name := names[f.Signer]; name != "" && !slices.Contains(all[at], name) {
			all[at] = append(all[at], name)
		}
	}
	return all, nil
}

// withSigners adds who has signed their bundles to the versions of a model, or
// of all.
func (s *server) withSigners(ctx context.Context, model string, versions []*v1.ModelVersion) error {
	by, err := s.signers(ctx, model)
	for _, v := range versions {
		v.Signers = by[[2]string{v.GetModel(), v.GetDigest()}]
	}
	return err
}
