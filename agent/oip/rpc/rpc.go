// Package rpc is the gRPC transport of the Open Inference Protocol, with
// Triton's extensions and the standard health service.
package rpc

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net"
	"slices"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/protobuf/proto"

	"github.com/dunlin/dunlin/agent/oip"
	"github.com/dunlin/dunlin/proto/inference"
)

// The limits of a connection.
const (
	maxStreams      = 256      // calls at a time
	maxHeaders      = 16 << 10 // bytes of the headers of a call
	streamWindow    = 1 << 20  // bytes of a call that arrive before somebody reads them
	connWindow      = 1 << 20
	connectTimeout  = 10 * time.Second // for the handshake
	pingAfter       = time.Minute      // without traffic; a peer that is gone does not answer
	pingTimeout     = 20 * time.Second
	minPingInterval = 10 * time.Second // of a client
)

// A client must send and take what it began to: a message whose tensors have
// more than transferAbove bytes has transferGrace and a second for each
// transferRate bytes. A call whose message does not arrive in that time is
// ended; a connection on which an answer is not taken is closed.
const (
	transferAbove = 16 << 10
	transferGrace = 30 * time.Second
	transferRate  = 64 << 10
)

// transferTime is how long n bytes may take.
func (s *service) transferTime(n int64) time.Duration {
	return s.grace + time.Duration(n/transferRate)*time.Second
}

const (
	// maxControl is how many bytes a message other than that of an inference
	// or of RepositoryModelLoad has.
	maxControl = 1 << 20
	// stopGrace is how long calls at work may go on when the server stops.
	stopGrace = 10 * time.Second
	// maxSend is how many bytes a message may have that clients in all
	// languages can take.
	maxSend = math.MaxInt32
	// workers is how many goroutines wait for calls, so that their stacks are
	// large enough already. More calls have goroutines of their own. For small
	// calls it gave 10 to 15 % of throughput; shared write buffers, buffers of
	// other sizes and larger windows gave nothing.
	workers = 16
)

// Config configures a Server.
type Config struct {
	// Options are for credentials and interceptors. The interceptor of a unary
	// call sees a nil request, as the call's message is not read before all
	// interceptors have let it through.
	Options []grpc.ServerOption
	Gate    Gate // nil: everybody is let in
}

// Gate lets calls in.
type Gate interface {
	// Enter comes before the message of a call is read, and gives the context
	// of the call.
	Enter(ctx context.Context, method string) (context.Context, error)
	// Message comes for each message of a stream of inferences that was let in.
	Message(ctx context.Context) error
}

// Server serves the protocol over gRPC.
type Server struct {
	options []grpc.ServerOption
	service *service
}

// New gives the transport of a server.
func New(s *oip.Server, cfg Config) *Server {
	options := []grpc.ServerOption{
		grpc.ForceServerCodecV2(newCodec()),
		grpc.MaxSendMsgSize(maxSend),
		grpc.MaxConcurrentStreams(maxStreams),
		grpc.MaxHeaderListSize(maxHeaders),
		grpc.StaticStreamWindowSize(streamWindow),
		grpc.StaticConnWindowSize(connWindow),
		grpc.ConnectionTimeout(connectTimeout),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: pingAfter, Timeout: pingTimeout}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: minPingInterval, PermitWithoutStream: true}),
		grpc.NumStreamWorkers(workers),
		grpc.WaitForHandlers(true),
	}
	return &Server{
		options: append(options, cfg.Options...),
		service: &service{oip: s, gate: cfg.Gate, grace: transferGrace, stopping: make(chan struct{})},
	}
}

// Run serves the connections of a listener until ctx is done. Calls at work
// then have a while to end; it returns when all of them have. It may be called
// once.
func (s *Server) Run(ctx context.Context, l net.Listener) error {
	server := grpc.NewServer(s.options...)
	sv := s.service
	server.RegisterService(sv.describe(inference.GRPCInferenceService_ServiceDesc, "ModelInfer", sv.modelInfer, sv.modelStreamInfer), sv)
	server.RegisterService(sv.describe(healthpb.Health_ServiceDesc, "", nil, sv.watch), health{service: sv})
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(listener{l}) }()
	select {
	case err := <-ended:
		server.Stop()
		return fmt.Errorf("serve gRPC on %s: %w", l.Addr(), err)
	case <-ctx.Done():
	}
	close(sv.stopping)
	stopped := make(chan struct{})
	go func() {
		server.GracefulStop()
		close(stopped)
	}()
	select {
	case <-stopped:
	case <-time.After(stopGrace):
		server.Stop()
		<-stopped
	}
	if err := <-ended; err != nil && !errors.Is(err, grpc.ErrServerStopped) {
		return fmt.Errorf("serve gRPC on %s: %w", l.Addr(), err)
	}
	return nil
}

// service answers the calls.
type service struct {
	inference.UnimplementedGRPCInferenceServiceServer
	oip      *oip.Server
	gate     Gate         // nil: everybody is let in
	lent     atomic.Int64 // bytes of outputs that are sent from where they are
	grace    time.Duration
	stopping chan struct{} // closed when no more calls are wanted
}

// describe gives the description of a service whose messages are read with a
// receiver, and whose stream and method special, if any, have other handlers.
func (s *service) describe(d grpc.ServiceDesc, special string, handler grpc.MethodHandler, stream grpc.StreamHandler) *grpc.ServiceDesc {
	d.Methods = slices.Clone(d.Methods)
	for i := range d.Methods {
		m := &d.Methods[i]
		if m.MethodName == special {
			m.Handler = handler
		} else {
			m.Handler = s.unary("/"+d.ServiceName+"/"+m.MethodName, m.Handler)
		}
	}
	d.Streams = slices.Clone(d.Streams)
	for i := range d.Streams {
		d.Streams[i].Handler = stream
	}
	return &d
}

// enter lets a call in.
func (s *service) enter(ctx context.Context, method string) (context.Context, error) {
	if s.gate == nil {
		return ctx, nil
	}
	return s.gate.Enter(ctx, method)
}

// unary gives a handler that reads the message after the interceptors, and
// makes a status of an error.
func (s *service) unary(method string, handler grpc.MethodHandler) grpc.MethodHandler {
	return func(srv any, ctx context.Context, _ func(any) error, interceptor grpc.UnaryServerInterceptor) (any, error) {
		call := func(ctx context.Context, _ any) (any, error) {
			ctx, err := s.enter(ctx, method)
			if err != nil {
				return nil, statusOf(ctx, err)
			}
			in := share{server: s.oip}
			defer in.release()
			reply, err := handler(srv, ctx, func(m any) error {
				limit := int64(maxControl)
				if _, ok := m.(*inference.RepositoryModelLoadRequest); ok {
					limit = s.oip.MaxBody()
				}
				return s.unmarshal(ctx, m.(proto.Message), limit, &in)
			}, nil)
			return reply, statusOf(ctx, err)
		}
		if interceptor == nil {
			return call(ctx, nil)
		}
		return interceptor(ctx, nil, &grpc.UnaryServerInfo{Server: srv, FullMethod: method}, call)
	}
}

// unmarshal reads the one message of a call.
func (s *service) unmarshal(ctx context.Context, m proto.Message, limit int64, in *share) error {
	data, err := s.message(ctx, limit, in)
	if err != nil {
		return err
	}
	if err := in.take(int64(len(data))); err != nil { // the message has copies
		return err
	}
	if err := proto.Unmarshal(data, m); err != nil {
		return oip.Errorf(oip.InvalidArgument, "decode %s: %w", m.ProtoReflect().Descriptor().Name(), err)
	}
	return nil
}
