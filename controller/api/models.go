package api

import (
	"context"

	"connectrpc.com/connect"
	"github.com/opencontainers/go-digest"

	"github.com/dunlin/dunlin/models"
	v1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

func (s *server) DeleteVersion(ctx context.Context, req *connect.Request[v1.DeleteVersionRequest]) (*connect.Response[v1.DeleteVersionResponse], error) {
	m := req.Msg
	if err := models.CheckName(m.GetModel()); err != nil {
		return nil, invalid("model: %w", err)
	}
	if m.GetVersion() < 1 || m.GetVersion() > models.MaxVersion {
		return nil, invalid("version is %d, allowed are 1 to %d", m.GetVersion(), int64(models.MaxVersion))
	}
	v, err := s.Store.Version(ctx, m.GetModel(), m.GetVersion())
	if err != nil {
		return nil, err
	}
	manifests := []digest.Digest{digest.Digest(v.Digest)}
	if v.Source != "" {
		manifests = append(manifests, digest.Digest(v.Source))
	}
	// First, so that its files stay for the grace time whatever happens then.
	for _, d := range manifests {
		if err := s.Registry.LetGo(ctx, v.Model, d); err != nil {
			return nil, err
		}
	}
	if _, err := s.Store.DeleteVersion(ctx, caller(ctx), v.Model, v.Version); err != nil {
		return nil, err
	}
	for _, d := range manifests {
		if err := s.Registry.Untag(ctx, v.Model, d); err != nil {
			s.Log.Warn("cannot take the tags of a deleted version away", "model", v.Model, "version", v.Version, "error", err)
		}
	}
	return connect.NewResponse(&v1.DeleteVersionResponse{}), nil
}
