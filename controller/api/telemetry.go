package api

import (
	"context"
	"time"

	"connectrpc.com/connect"

	v1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// The limits of ListTelemetry.
const (
	maxSamples     = 2000
	defaultSamples = 500
	defaultHistory = 24 * time.Hour
)

func (s *server) ListTelemetry(ctx context.Context, req *connect.Request[v1.ListTelemetryRequest]) (*connect.Response[v1.ListTelemetryResponse], error) {
	m := req.Msg
	limit := int(m.GetLimit())
	if limit > maxSamples {
		return nil, invalid("limit is %d, allowed are 1 to %d", limit, maxSamples)
	}
	if limit == 0 {
		limit = defaultSamples
	}
	until := time.Now()
	if m.GetUntil() != nil {
		until = m.GetUntil().AsTime()
	}
	from := until.Add(-defaultHistory)
	if m.GetFrom() != nil {
		from = m.GetFrom().AsTime()
	}
	if !from.Before(until) {
		return nil, invalid("from is %s, it must be before until, %s", from.Format(time.RFC3339), until.Format(time.RFC3339))
	}
	if _, err := s.seen(ctx, m.GetDevice()); err != nil {
		return nil, err
	}
	samples, err := s.Store.Telemetry(ctx, m.GetDevice(), from, until, limit)
	if err != nil {
		return nil, err
	}
	if m.GetLook() {
		s.Dispatch.Look(m.GetDevice())
	}
	return connect.NewResponse(&v1.ListTelemetryResponse{Samples: samples}), nil
}
