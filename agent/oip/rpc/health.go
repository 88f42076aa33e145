package rpc

import (
	"context"
	"time"

	"google.golang.org/grpc"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/dunlin/dunlin/agent/oip"
)

// watchInterval is how often a watched state is looked at.
const watchInterval = time.Second

// health answers the standard health service: for the server, which has the
// empty name, and for models, by name.
type health struct {
	healthpb.UnimplementedHealthServer // of Watch, for which there is watch
	*service
}

func (h health) Check(ctx context.Context, q *healthpb.HealthCheckRequest) (*healthpb.HealthCheckResponse, error) {
	status, err := h.state(ctx, q.Service)
	if err != nil {
		return nil, err
	}
	return &healthpb.HealthCheckResponse{Status: status}, nil
}

// List gives the state of the server only; models have the repository index.
func (h health) List(ctx context.Context, _ *healthpb.HealthListRequest) (*healthpb.HealthListResponse, error) {
	status, err := h.state(ctx, "")
	if err != nil {
		return nil, err
	}
	return &healthpb.HealthListResponse{Statuses: map[string]*healthpb.HealthCheckResponse{"": {Status: status}}}, nil
}

func (s *service) state(ctx context.Context, model string) (healthpb.HealthCheckResponse_ServingStatus, error) {
	var err error
	if model == "" {
		err = s.oip.Ready(ctx)
	} else {
		err = s.oip.ModelReady(ctx, model, 0)
	}
	switch {
	case err == nil:
		return healthpb.HealthCheckResponse_SERVING, nil
	case oip.CodeOf(err) == oip.NotReady:
		return healthpb.HealthCheckResponse_NOT_SERVING, nil
	default:
		return 0, err
	}
}

// watch sends the state of what is watched, and again whenever it changes.
func (s *service) watch(_ any, stream grpc.ServerStream) error {
	ctx, err := s.enter(stream.Context(), healthpb.Health_Watch_FullMethodName)
	if err != nil {
		return statusOf(ctx, err)
	}
	q := new(healthpb.HealthCheckRequest)
	in := share{server: s.oip}
	err = s.unmarshal(ctx, q, maxControl, &in)
	in.release()
	if err != nil {
		return statusOf(ctx, err)
	}
	last := healthpb.HealthCheckResponse_ServingStatus(-1)
	ticker := time.NewTicker(watchInterval)
	defer ticker.Stop()
	for {
		now, err := s.state(ctx, q.Service)
		if oip.CodeOf(err) == oip.NotFound {
			now = healthpb.HealthCheckResponse_SERVICE_UNKNOWN
		} else if err != nil {
			return statusOf(ctx, err)
		}
		if now != last {
			if err := stream.SendMsg(&healthpb.HealthCheckResponse{Status: now}); err != nil {
				return err
			}
			last = now
		}
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return statusOf(ctx, ctx.Err())
		case <-s.stopping:
			return statusOf(ctx, oip.Errorf(oip.Unavailable, "the server stops"))
		}
	}
}
