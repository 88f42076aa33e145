package oip

import (
	"context"
	"errors"
	"fmt"
	"math"
	"time"

	"github.com/dunlin/dunlin/models/tensor"
)

// Infer answers a request. A nil error comes with a response that must be
// released.
func (s *Server) Infer(ctx context.Context, r *Request) (*Response, error) {
	if err := s.permit(ctx, r.Model); err != nil {
		return nil, err
	}
	sampled := s.tracer.sample(r.Model)
	if sampled == nil {
		response, _, err := s.infer(ctx, r)
		return response, err
	}
	start := time.Now()
	response, times, err := s.infer(ctx, r)
	s.tracer.write(sampled, r, response, start, times, time.Now())
	return response, err
}

// spent is where the time of an inference went, from when the backend began.
type spent struct {
	begun time.Time
	Times
}

func (s *Server) infer(ctx context.Context, r *Request) (*Response, spent, error) {
	if err := r.check(); err != nil {
		return nil, spent{}, err
	}
	memory := use{server: s}
	defer memory.end()
	call := Call{
		Model: r.Model, Version: r.Version, Priority: r.Priority, Timeout: r.Timeout,
		Parameters: r.Parameters, Headers: r.Headers,
		Inputs: make([]tensor.Tensor, len(r.Inputs)),
	}
	for i := range r.Inputs {
		in := &r.Inputs[i]
		call.Inputs[i] = in.Tensor
		if in.Memory != nil {
			data, err := memory.read(in.Memory)
			if err != nil {
				return nil, spent{}, prefix(err, "inputs[%d] %q", i, in.Name)
			}
			call.Inputs[i].Data = data
		}
		if err := call.Inputs[i].Check(); err != nil {
			return nil, spent{}, Errorf(InvalidArgument, "inputs[%d]: %w", i, err)
		}
	}
	if len(r.Outputs) > 0 {
		call.Outputs = make([]string, len(r.Outputs))
	}
	for i := range r.Outputs {
		out := &r.Outputs[i]
		call.Outputs[i] = out.Name
		if out.Memory != nil {
			if err := memory.open(out.Memory); err != nil {
				return nil, spent{}, prefix(err, "outputs[%d] %q", i, out.Name)
			}
		}
	}
	times := spent{begun: time.Now()}
	answer, err := s.cfg.Backend.Infer(ctx, call)
	if err != nil {
		return nil, times, err
	}
	times.Times = answer.Times
	response, err := s.respond(ctx, r, &memory, &answer)
	if err != nil && answer.Release != nil {
		answer.Release()
	}
	return response, times, err
}

// check says what is wrong with a request before its data are looked at.
func (r *Request) check() error {
	switch {
	case r.Model == "":
		return Errorf(InvalidArgument, "the model's name is empty")
	case len(r.ID) > MaxName:
		return Errorf(InvalidArgument, "id has %d bytes, allowed are %d", len(r.ID), MaxName)
	case len(r.Inputs) > MaxTensors:
		return Errorf(InvalidArgument, "request has %d inputs, allowed are %d", len(r.Inputs), MaxTensors)
	case len(r.Outputs) > MaxTensors:
		return Errorf(InvalidArgument, "request has %d outputs, allowed are %d", len(r.Outputs), MaxTensors)
	case r.Version < 0:
		return Errorf(InvalidArgument, "version %d of model %q is not a number from 1 on", r.Version, r.Model)
	case r.Priority < 0 || r.Priority > math.MaxInt32:
		return Errorf(InvalidArgument, "priority is %d, allowed are 0 to %d", r.Priority, math.MaxInt32)
	case r.Timeout < 0:
		return Errorf(InvalidArgument, "timeout is %s, allowed are times from 0 on", r.Timeout)
	}
	for i := range r.Inputs {
		in := &r.Inputs[i]
		if err := checkName(in.Name, "inputs", i); err != nil {
			return err
		}
		if !in.Type.Known() {
			return Errorf(InvalidArgument, "inputs[%d] %q: unknown data type %s", i, in.Name, in.Type)
		}
		if len(in.Shape) > MaxDims {
			return Errorf(InvalidArgument, "inputs[%d] %q: shape has %d dimensions, allowed are %d", i, in.Name, len(in.Shape), MaxDims)
		}
	}
	for i := range r.Outputs {
		out := &r.Outputs[i]
		if err := checkName(out.Name, "outputs", i); err != nil {
			return err
		}
		if out.Classes < 0 {
			return Errorf(InvalidArgument, "outputs[%d] %q: classification is %d, allowed are numbers from 0 on", i, out.Name, out.Classes)
		}
		if out.Classes > 0 && out.Memory != nil {
			return Errorf(InvalidArgument, "outputs[%d] %q: asks for both classification and shared memory", i, out.Name)
		}
	}
	return nil
}

func checkName(name, list string, i int) error {
	if name == "" {
		return Errorf(InvalidArgument, "%s[%d]: name is missing", list, i)
	}
	if len(name) > MaxName {
		return Errorf(InvalidArgument, "%s[%d].name has %d bytes, allowed are %d", list, i, len(name), MaxName)
	}
	return nil
}

// respond makes the response of an answer. The response releases the answer;
// where there is an error, the caller does.
func (s *Server) respond(ctx context.Context, r *Request, memory *use, a *Answer) (*Response, error) {
	if len(r.Outputs) > 0 && len(a.Outputs) != len(r.Outputs) {
		return nil, Errorf(Internal, "%s:%d gave %d outputs, asked for were %d", a.Model, a.Version, len(a.Outputs), len(r.Outputs))
	}
	response := &Response{
		Model: a.Model, Version: a.Version, ID: r.ID, Header: a.Header, release: a.Release,
		Outputs: make([]OutputTensor, len(a.Outputs)),
	}
	for i := range a.Outputs {
		t := &a.Outputs[i]
		if err := t.Check(); err != nil {
			return nil, Errorf(Internal, "output of %s:%d: %w", a.Model, a.Version, err)
		}
		response.Outputs[i].Tensor = *t
		if len(r.Outputs) == 0 {
			continue
		}
		switch out := &r.Outputs[i]; {
		case out.Classes > 0:
			batched, err := s.batched(ctx, a)
			if err == nil {
				response.Outputs[i].Tensor, err = classify(t, out.Classes, batched, a.Labels[t.Name])
			}
			if err != nil {
				return nil, prefix(err, "outputs[%d] %q", i, out.Name)
			}
		case out.Memory != nil:
			written, err := memory.write(out.Memory, t.Data)
			if err != nil {
				return nil, prefix(err, "outputs[%d] %q", i, out.Name)
			}
			response.Outputs[i].Data, response.Outputs[i].Memory = nil, written
		}
	}
	return response, nil
}

// batched says whether the first dimension of the outputs of what answered
// counts the rows of a batch.
func (s *Server) batched(ctx context.Context, a *Answer) (bool, error) {
	m, err := s.cfg.Backend.Model(ctx, a.Model, a.Version)
	return m.Config.GetMaxBatchSize() > 0, err
}

// prefix says where an error happened, and leaves its code.
func prefix(err error, format string, args ...any) error {
	e := &Error{Code: CodeOf(err), Err: fmt.Errorf(format+": %w", append(args, err)...)}
	if cause, ok := errors.AsType[*Error](err); ok {
		e.RetryAfter = cause.RetryAfter
	}
	return e
}
