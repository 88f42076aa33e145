package api

import (
	"context"
	"errors"

	"connectrpc.com/connect"

	"github.com/dunlin/dunlin/controller/identity"
	v1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// maxAuditRecords bounds one page of the audit log.
const maxAuditRecords = 1000

// note has a call recorded that was refused for who made it: without
// credentials that are good, with a role that is too small, or after too many
// guesses.
func (g gate) note(ctx context.Context, procedure string, request any, err error) {
	e, ok := errors.AsType[*connect.Error](err)
	if !ok || e.Code() != connect.CodeUnauthenticated && e.Code() != connect.CodePermissionDenied && e.Code() != connect.CodeResourceExhausted {
		return
	}
	r := identity.Refusal{Action: "call.refused", Object: procedure, Reason: e.Message()}
	switch m := request.(type) { // what is known of those who are nobody yet
	case *v1.JoinRequest:
		r.Action, r.Object = "device.join", "device/"+m.GetName()
	case *v1.RenewRequest:
		r.Action = "device.renew"
	case *v1.LoginRequest:
		r.Action, r.Object = "user.login", "user/"+m.GetName()
	}
	g.refusals.Refused(ctx, r)
}

func (s *server) ListAudit(ctx context.Context, req *connect.Request[v1.ListAuditRequest]) (*connect.Response[v1.ListAuditResponse], error) {
	limit := req.Msg.GetLimit()
	if limit > maxAuditRecords {
		return nil, invalid("limit is %d, allowed are 1 to %d", limit, maxAuditRecords)
	}
	if limit == 0 {
		limit = maxAuditRecords
	}
	page, err := s.Store.ListAudit(ctx, req.Msg.GetAfter(), int(limit), req.Msg.GetNewest())
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&v1.ListAuditResponse{
		Records: page.Records,
		Anchor:  page.Anchor.Hash[:], AnchorNumber: page.Anchor.Number,
		Head: page.Head.Hash[:], HeadNumber: page.Head.Number,
	}), nil
}
