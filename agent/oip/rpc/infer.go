package rpc

import (
	"context"
	"errors"
	"io"
	"strings"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/dunlin/dunlin/agent/oip"
	"github.com/dunlin/dunlin/proto/inference"
)

// maxPipelined is how many requests of one stream are worked on at a time.
// The sender of more is held by flow control.
const maxPipelined = 64

// infer answers a ModelInferRequest. The response must be marshalled or
// released.
func (s *service) infer(ctx context.Context, data []byte, in *share) (*response, *oip.Request, error) {
	q, err := decodeRequest(ctx, data, in)
	if err != nil {
		return nil, nil, err
	}
	out, err := s.oip.Infer(ctx, q)
	if err != nil {
		return nil, q, err
	}
	r := &response{Response: out, service: s, share: share{server: s.oip}}
	var large int64
	for i := range out.Outputs {
		if n := len(out.Outputs[i].Data); n > lendAbove {
			large += int64(n)
		}
	}
	if large > 0 {
		r.conn = connOf(ctx)
		if err := r.share.take(large); err != nil {
			r.release()
			return nil, q, err
		}
	}
	return r, q, nil
}

// modelInfer is the handler of ModelInfer.
func (s *service) modelInfer(_ any, ctx context.Context, _ func(any) error, interceptor grpc.UnaryServerInterceptor) (any, error) {
	if interceptor == nil {
		r, err := s.unaryInfer(ctx)
		if err != nil {
			return nil, err
		}
		return r, nil
	}
	var made *response
	info := &grpc.UnaryServerInfo{Server: s, FullMethod: inference.GRPCInferenceService_ModelInfer_FullMethodName}
	reply, err := interceptor(ctx, nil, info, func(ctx context.Context, _ any) (any, error) {
		r, err := s.unaryInfer(ctx)
		if err != nil {
			return nil, err
		}
		made = r
		return r, nil
	})
	if made != nil && (err != nil || reply != any(made)) {
		made.release() // it is not sent
	}
	return reply, err
}

func (s *service) unaryInfer(ctx context.Context) (*response, error) {
	ctx, err := s.enter(ctx, inference.GRPCInferenceService_ModelInfer_FullMethodName)
	if err != nil {
		return nil, statusOf(ctx, err)
	}
	in := share{server: s.oip}
	defer in.release()
	data, err := s.message(ctx, s.oip.MaxBody(), &in)
	if err != nil {
		return nil, statusOf(ctx, err)
	}
	r, _, err := s.infer(ctx, data, &in)
	if err != nil {
		return nil, statusOf(ctx, err)
	}
	if len(r.Header) > 0 {
		md := make(metadata.MD, len(r.Header))
		for k, v := range r.Header {
			md[strings.ToLower(k)] = []string{v}
		}
		_ = grpc.SetHeader(ctx, md) // fails where the call is over
	}
	return r, nil
}

// pending is a request of a stream that has its place among the answers.
type pending struct {
	done     chan struct{} // closed when one of the others is there
	response *response
	failed   *inference.ModelStreamInferResponse
	err      error // of failed
}

// modelStreamInfer is the handler of ModelStreamInfer. Requests are worked on
// at the same time and answered in their order.
func (s *service) modelStreamInfer(_ any, stream grpc.ServerStream) error {
	ctx, cancel := context.WithCancel(stream.Context())
	defer cancel()
	ctx, err := s.enter(ctx, inference.GRPCInferenceService_ModelStreamInfer_FullMethodName)
	if err != nil {
		return statusOf(ctx, err)
	}
	r, err := s.newReceiver(ctx, s.oip.MaxBody())
	if err != nil {
		return statusOf(ctx, err)
	}
	// A client can ask for the first error to end the stream.
	md, _ := metadata.FromIncomingContext(ctx)
	v := md.Get("triton_grpc_error")
	strict := len(v) > 0 && v[0] == "true"

	queue := make(chan *pending, maxPipelined-1)
	var work sync.WaitGroup
	var sendErr error
	work.Go(func() {
		sendErr = s.send(stream, queue, strict, func(err error) {
			cancel()
			_ = r.WriteStatus(status.Convert(statusOf(ctx, err))) // ends receiveAll
		})
	})
	err = s.receiveAll(ctx, r, queue, &work)
	if err != nil {
		cancel()
	}
	close(queue)
	work.Wait()
	if sendErr != nil {
		err = sendErr
	}
	return statusOf(ctx, err)
}

// receiveAll starts to work on each request of a stream until there are no
// more.
func (s *service) receiveAll(ctx context.Context, r *receiver, queue chan<- *pending, work *sync.WaitGroup) error {
	for {
		in := share{server: s.oip}
		data, err := r.next(&in)
		if errors.Is(err, io.EOF) {
			return nil
		}
		p := &pending{done: make(chan struct{})}
		if err == nil && s.gate != nil {
			if refused := s.gate.Message(ctx); refused != nil {
				in.release()
				err = refused
				p.fail(nil, err)
			}
		} else if err != nil {
			in.release()
			if oip.CodeOf(err) != oip.Unavailable {
				return err
			}
			if err := r.skip(); err != nil {
				return err
			}
			p.fail(nil, err)
		}
		select {
		case queue <- p:
		case <-ctx.Done():
			in.release()
			return context.Cause(ctx)
		}
		if err == nil {
			work.Go(func() {
				defer in.release()
				r, q, err := s.infer(ctx, data, &in)
				if err != nil {
					p.fail(q, err)
					return
				}
				r.stream = true
				p.response = r
				close(p.done)
			})
		}
	}
}

// fail makes the answer to a request, nil where it is not known, that tells an
// error.
func (p *pending) fail(q *oip.Request, err error) {
	p.err = err
	p.failed = &inference.ModelStreamInferResponse{ErrorMessage: messageOf(err), InferResponse: &inference.ModelInferResponse{
		Parameters: map[string]*inference.InferParameter{
			"triton_final_response": {ParameterChoice: &inference.InferParameter_BoolParam{BoolParam: true}},
		},
	}}
	if q != nil {
		p.failed.InferResponse.Id = q.ID
		p.failed.InferResponse.ModelName = q.Model
	}
	close(p.done)
}

// send sends the answers in the order of the queue until it is closed. After
// an error, which failed is told of, it only takes them off. When the server
// stops it sends those that are in the queue.
func (s *service) send(stream grpc.ServerStream, queue <-chan *pending, strict bool, failed func(error)) error {
	var err error
	stopping := s.stopping
	for {
		select {
		case p, ok := <-queue:
			if !ok {
				return err
			}
			<-p.done
			switch {
			case err != nil:
				if p.response != nil {
					p.response.release()
				}
				continue
			case p.response != nil:
				err = stream.SendMsg(p.response)
			case strict:
				err = p.err
			default:
				err = stream.SendMsg(p.failed)
			}
		case <-stopping:
			stopping = nil
		}
		if err == nil && stopping == nil && len(queue) == 0 {
			err = oip.Errorf(oip.Unavailable, "the server stops")
		}
		if err != nil {
			failed(err)
		}
	}
}
