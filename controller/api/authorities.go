package api

import (
	"context"
	"errors"

	"connectrpc.com/connect"

	"github.com/dunlin/dunlin/controller/identity"
	"github.com/dunlin/dunlin/internal/pki"
	v1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

func (s *server) GetAuthorities(ctx context.Context, _ *connect.Request[v1.GetAuthoritiesRequest]) (*connect.Response[v1.GetAuthoritiesResponse], error) {
	counts, err := s.Store.AuthorityDevices(ctx)
	if err != nil {
		return nil, err
	}
	resp := &v1.GetAuthoritiesResponse{}
	all, active := s.Authorities.All()
	for _, a := range all {
		resp.Authorities = append(resp.Authorities, authority(a, a == active, counts))
	}
	return connect.NewResponse(resp), nil
}

func authority(a *pki.Authority, active bool, counts map[string]uint32) *v1.Authority {
	return &v1.Authority{Id: a.ID(), Certificate: a.Certificate.Raw, Active: active, Devices: counts[a.Certificate.Subject.CommonName]}
}

// RotateAuthority has devices say hello again: those that do not know the new
// authority are then told to renew.
func (s *server) RotateAuthority(ctx context.Context, _ *connect.Request[v1.RotateAuthorityRequest]) (*connect.Response[v1.RotateAuthorityResponse], error) {
	a, err := s.Authorities.Rotate(ctx, caller(ctx))
	if errors.Is(err, identity.ErrAuthorities) {
		err = connect.NewError(connect.CodeFailedPrecondition, err)
	}
	if err != nil {
		return nil, err
	}
	if err := s.accountsChanged(ctx); err != nil {
		return nil, err
	}
	s.Dispatch.Resumed()
	return connect.NewResponse(&v1.RotateAuthorityResponse{Authority: authority(a, true, nil)}), nil
}

// RetireAuthority has devices say hello again: those that know the old one are
// then told to renew. By force all connect again, whatever certificate they
// have shown: of those that somebody made with a stolen key nobody knows.
func (s *server) RetireAuthority(ctx context.Context, req *connect.Request[v1.RetireAuthorityRequest]) (*connect.Response[v1.RetireAuthorityResponse], error) {
	if err := s.Authorities.Retire(ctx, caller(ctx), req.Msg.GetId(), req.Msg.GetForce()); err != nil {
		return nil, err
	}
	err := s.accountsChanged(ctx)
	if req.Msg.GetForce() {
		devices, e := s.Store.Devices(ctx)
		err = errors.Join(err, e)
		for _, d := range devices {
			s.Dispatch.CutOff(d.Name)
		}
	}
	s.Dispatch.Resumed()
	return connect.NewResponse(&v1.RetireAuthorityResponse{}), err
}

func (s *server) RevokeDevice(ctx context.Context, req *connect.Request[v1.RevokeDeviceRequest]) (*connect.Response[v1.RevokeDeviceResponse], error) {
	if n := len(req.Msg.GetReason()); n > maxReason {
		return nil, invalid("reason has %d bytes, the limit is %d", n, maxReason)
	}
	device := req.Msg.GetDevice()
	if _, err := s.seen(ctx, device); err != nil {
		return nil, err
	}
	if err := s.Store.RevokeDevice(ctx, caller(ctx), device, req.Msg.GetReason()); err != nil {
		return nil, err
	}
	err := s.accountsChanged(ctx)
	s.Dispatch.CutOff(device)
	s.list.forget()
	return connect.NewResponse(&v1.RevokeDeviceResponse{}), err
}
