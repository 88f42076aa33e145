package oip

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/dunlin/dunlin/models/tensor"
	"github.com/dunlin/dunlin/proto/inference"
)

// fake is a backend with one model, "m", which gives back its inputs.
type fake struct {
	batch    int32
	labels   map[string][]string
	times    Times
	answer   func(Call, *Answer) error // changes the answer
	got      Call
	lent     int // answers not released
	released int
}

func (f *fake) Ready(context.Context) error { return errors.New("something is missing") }

func (f *fake) Model(_ context.Context, name string, _ int64) (Model, error) {
	switch name {
	case "m":
		return Model{Name: name, Config: &inference.ModelConfig{MaxBatchSize: f.batch}}, nil
	case "loading":
		return Model{Name: name, NotReady: "it is being loaded"}, nil
	}
	return Model{}, Errorf(NotFound, "no model %q", name)
}

func (f *fake) Infer(_ context.Context, c Call) (Answer, error) {
	f.got = c
	a := Answer{
		Model: "m", Version: 3, Labels: f.labels, Times: f.times, Header: map[string]string{"H": "v"},
		Outputs: c.Inputs, Release: func() { f.lent--; f.released++ },
	}
	if c.Outputs != nil {
		a.Outputs = nil
		for _, name := range c.Outputs {
			for _, t := range c.Inputs {
				if t.Name == name {
					a.Outputs = append(a.Outputs, t)
				}
			}
		}
	}
	if f.answer != nil {
		if err := f.answer(c, &a); err != nil {
			return Answer{}, err
		}
	}
	f.lent++
	return a, nil
}

func (f *fake) Statistics(context.Context, string, int64) ([]*inference.ModelStatistics, error) {
	return []*inference.ModelStatistics{{Name: "m"}}, nil
}

// input is an input of bytes.
func input(name, data string) Input {
	return Input{Tensor: tensor.Tensor{Name: name, Type: tensor.Uint8, Shape: []int64{int64(len(data))}, Data: []byte(data)}}
}

func TestInfer(t *testing.T) {
	f := &fake{}
	s := New(Config{Backend: f})
	r := &Request{
		Model: "m", Version: 2, ID: "i", Priority: 4, Timeout: time.Second,
		Inputs: []Input{input("x", "abc"), input("y", "")}, Outputs: []Output{{Name: "y"}, {Name: "x"}},
	}
	response, err := s.Infer(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	want := &Response{
		Model: "m", Version: 3, ID: "i", Header: map[string]string{"H": "v"},
		Outputs: []OutputTensor{{Tensor: r.Inputs[1].Tensor}, {Tensor: r.Inputs[0].Tensor}},
	}
	if diff := cmp.Diff(want, response, cmpopts.IgnoreUnexported(Response{})); diff != "" {
		t.Error(diff)
	}
	call := Call{Model: "m", Version: 2, Priority: 4, Timeout: time.Second, Outputs: []string{"y", "x"}, Inputs: []tensor.Tensor{r.Inputs[0].Tensor, r.Inputs[1].Tensor}}
	if diff := cmp.Diff(call, f.got); diff != "" {
		t.Error(diff)
	}
	if &response.Outputs[1].Data[0] != &r.Inputs[0].Data[0] {
		t.Error("the data were copied")
	}
	if f.lent != 1 {
		t.Errorf("%d answers are lent before the response is released", f.lent)
	}
	response.Release()
	if f.lent != 0 {
		t.Errorf("%d answers are lent after the response is released", f.lent)
	}
	if _, err := s.Infer(t.Context(), &Request{Model: "m", Inputs: r.Inputs}); err != nil || f.got.Outputs != nil {
		t.Errorf("all outputs: %v, asked for %q", err, f.got.Outputs)
	}
}

func TestInferRefuses(t *testing.T) {
	f := &fake{}
	s := New(Config{Backend: f})
	long := strings.Repeat("n", MaxName+1)
	shaped := func(shape ...int64) []Input {
		return []Input{{Tensor: tensor.Tensor{Name: "x", Type: tensor.Float32, Shape: shape}}}
	}
	for want, r := range map[string]*Request{
		"the model's name is empty":                        {},
		"id has 1025 bytes, allowed are 1024":              {Model: "m", ID: long},
		"request has 1025 inputs, allowed are 1024":        {Model: "m", Inputs: make([]Input, MaxTensors+1)},
		"request has 1025 outputs":                         {Model: "m", Outputs: make([]Output, MaxTensors+1)},
		`version -1 of model "m"`:                          {Model: "m", Version: -1},
		"priority is -1":                                   {Model: "m", Priority: -1},
		"timeout is -1ns":                                  {Model: "m", Timeout: -1},
		"inputs[1]: name is missing":                       {Model: "m", Inputs: []Input{input("x", ""), input("", "")}},
		"inputs[0].name has 1025 bytes":                    {Model: "m", Inputs: []Input{input(long, "")}},
		`inputs[0] "x": unknown data type type(14)`:        {Model: "m", Inputs: []Input{{Tensor: tensor.Tensor{Name: "x", Type: 14}}}},
		`inputs[0] "x": shape has 33 dimensions`:           {Model: "m", Inputs: shaped(make([]int64, MaxDims+1)...)},
		`inputs[0]: tensor "x": invalid shape [-1]`:        {Model: "m", Inputs: shaped(-1)},
		`inputs[0]: tensor "x": invalid shape [4294967296`: {Model: "m", Inputs: shaped(1<<32, 1<<32)},
		`inputs[0]: tensor "x": has 0 bytes of data`:       {Model: "m", Inputs: shaped(2)},
		"outputs[0]: name is missing":                      {Model: "m", Outputs: []Output{{}}},
		"outputs[0].name has 1025 bytes":                   {Model: "m", Outputs: []Output{{Name: long}}},
		`outputs[0] "y": classification is -1`:             {Model: "m", Outputs: []Output{{Name: "y", Classes: -1}}},
		`outputs[0] "y": asks for both`:                    {Model: "m", Outputs: []Output{{Name: "y", Classes: 1, Memory: &Slice{}}}},
	} {
		_, err := s.Infer(t.Context(), r)
		if err == nil || CodeOf(err) != InvalidArgument || !strings.Contains(err.Error(), want) || len(err.Error()) > 400 {
			t.Errorf("%v, want %q", err, want)
		}
	}
	if f.got.Model != "" {
		t.Error("the backend was asked")
	}
}

// An answer that cannot be given is released, and errors keep their code.
func TestInferFails(t *testing.T) {
	for name, tt := range map[string]struct {
		answer func(Call, *Answer) error
		out    Output
		code   Code
		want   string
	}{
		"backend": {func(Call, *Answer) error {
			return &Error{Code: Unavailable, Err: errors.New("busy"), RetryAfter: time.Minute}
		}, Output{Name: "x"}, Unavailable, "busy"},
		"no code":   {func(Call, *Answer) error { return errors.New("broken") }, Output{Name: "x"}, Internal, "broken"},
		"too late":  {func(Call, *Answer) error { return fmt.Errorf("run: %w", context.DeadlineExceeded) }, Output{Name: "x"}, Expired, "deadline"},
		"too few":   {func(_ Call, a *Answer) error { a.Outputs = nil; return nil }, Output{Name: "x"}, Internal, "m:3 gave 0 outputs, asked for were 1"},
		"cut short": {func(_ Call, a *Answer) error { a.Outputs[0].Shape = []int64{4}; return nil }, Output{Name: "x"}, Internal, "output of m:3"},
		"class of str": {func(_ Call, a *Answer) error {
			a.Outputs[0] = tensor.Tensor{Name: "x", Type: tensor.String, Shape: []int64{0}}
			return nil
		}, Output{Name: "x", Classes: 1}, InvalidArgument, `outputs[0] "x": BYTES outputs cannot be classified`},
		"model left": {func(_ Call, a *Answer) error { a.Model = "gone"; return nil }, Output{Name: "x", Classes: 1}, NotFound, `no model "gone"`},
	} {
		f := &fake{answer: tt.answer}
		_, err := New(Config{Backend: f}).Infer(t.Context(), &Request{Model: "m", Inputs: []Input{input("x", "ab")}, Outputs: []Output{tt.out}})
		if CodeOf(err) != tt.code || !strings.Contains(fmt.Sprint(err), tt.want) {
			t.Errorf("%s: %v (code %d), want %q (code %d)", name, err, CodeOf(err), tt.want, tt.code)
		}
		if f.lent != 0 {
			t.Errorf("%s: %d answers are still lent", name, f.lent)
		}
	}
}

func TestPrefixKeepsTheCause(t *testing.T) {
	err := prefix(fmt.Errorf("run: %w", &Error{Code: Expired, Err: context.DeadlineExceeded, RetryAfter: time.Minute}), "inputs[%d]", 2)
	if e, ok := errors.AsType[*Error](err); !ok || e.Code != Expired || e.RetryAfter != time.Minute || !errors.Is(err, context.DeadlineExceeded) || !strings.HasPrefix(err.Error(), "inputs[2]: ") {
		t.Errorf("%+v", err)
	}
}

func TestModels(t *testing.T) {
	s := New(Config{Backend: &fake{}})
	if err := s.Ready(t.Context()); CodeOf(err) != NotReady || err.Error() != "not ready: something is missing" {
		t.Error(err)
	}
	// Everybody may ask that; who may not ask for all models is not told of any.
	s.cfg.Access = nobody{}
	if err := s.Ready(t.Context()); CodeOf(err) != NotReady || err.Error() != "not ready" {
		t.Errorf("to nobody: %v", err)
	}
	s.cfg.Access = nil
	if _, err := s.Model(t.Context(), "loading", 0); CodeOf(err) != Unavailable {
		t.Error(err)
	}
	if err := s.ModelReady(t.Context(), "loading", 0); CodeOf(err) != NotReady {
		t.Error(err)
	}
	if err := s.ModelReady(t.Context(), "other", 0); CodeOf(err) != NotFound {
		t.Error(err)
	}
}

func TestClassify(t *testing.T) {
	fp32 := tensor.Tensor{Name: "p", Type: tensor.Float32, Shape: []int64{2, 3}, Data: []byte{
		0xcd, 0xcc, 0xcc, 0x3d /* 0.1 */, 0, 0, 0x80, 0x3f /* 1 */, 0, 0, 0xc0, 0xbf, /* -1.5 */
		0, 0, 0xc0, 0x7f /* NaN */, 0, 0, 0x80, 0x7f /* Inf */, 0, 0, 0x80, 0x7f, /* Inf */
	}}
	labels := []string{"cat", "", "dog"}
	for name, tt := range map[string]struct {
		in      tensor.Tensor
		k       int
		batched bool
		shape   []int64
		want    []string
	}{
		"rows":          {fp32, 2, true, []int64{2, 2}, []string{"1.000000:1", "0.100000:0:cat", "inf:1", "inf:2:dog"}},
		"one row":       {fp32, 3, false, []int64{3}, []string{"inf:4", "inf:5", "1.000000:1"}},
		"more than all": {fp32, 9, true, []int64{2, 3}, []string{"1.000000:1", "0.100000:0:cat", "-1.500000:2:dog", "inf:1", "inf:2:dog", "nan:0:cat"}},
		"bytes":         {tensor.Tensor{Type: tensor.Int8, Shape: []int64{3}, Data: []byte{0xff, 0x80, 0x7f}}, 3, false, []int64{3}, []string{"127:2:dog", "-1:0:cat", "-128:1"}},
		"unsigned":      {tensor.Tensor{Type: tensor.Uint64, Shape: []int64{2}, Data: append(make([]byte, 8), 255, 255, 255, 255, 255, 255, 255, 255)}, 1, false, []int64{1}, []string{"18446744073709551615:1"}},
		"double":        {tensor.Tensor{Type: tensor.Float64, Shape: []int64{1, 1}, Data: []byte{0, 0, 0, 0, 0, 0, 0xf8, 0x3f}}, 1, true, []int64{1, 1}, []string{"1.500000:0:cat"}},
		"scalar":        {tensor.Tensor{Type: tensor.Uint8, Data: []byte{7}}, 1, true, []int64{1}, []string{"7:0:cat"}},
		"equal":         {tensor.Tensor{Type: tensor.Uint16, Shape: []int64{3}, Data: make([]byte, 6)}, 2, false, []int64{2}, []string{"0:0:cat", "0:1"}},
		"no rows":       {tensor.Tensor{Type: tensor.Uint8, Shape: []int64{0, 3}}, 2, true, []int64{0, 2}, nil},
		"no classes":    {tensor.Tensor{Type: tensor.Uint8, Shape: []int64{3, 0}}, 2, true, []int64{3, 0}, nil},
	} {
		got, err := classify(&tt.in, tt.k, tt.batched, labels)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		var elements []string
		for e := range tensor.Strings(got.Data) {
			elements = append(elements, string(e))
		}
		if diff := cmp.Diff(tt.want, elements); diff != "" || got.Type != tensor.String || got.Check() != nil {
			t.Errorf("%s: %+v: %s", name, got, diff)
		}
		if diff := cmp.Diff(tt.shape, got.Shape); diff != "" {
			t.Errorf("%s: shape %s", name, diff)
		}
	}
	for _, typ := range []tensor.Type{tensor.Bool, tensor.String, tensor.Float16, tensor.BFloat16} {
		if _, err := classify(&tensor.Tensor{Type: typ, Shape: []int64{0}}, 1, false, nil); CodeOf(err) != InvalidArgument {
			t.Errorf("%s: %v", typ, err)
		}
	}
	if _, err := classify(&tensor.Tensor{Type: tensor.Uint8, Shape: []int64{maxClasses + 1}, Data: make([]byte, maxClasses+1)}, 1, false, nil); CodeOf(err) != InvalidArgument {
		t.Errorf("too many classes: %v", err)
	}
}

// Classification goes by the batching and the labels of what answered.
func TestInferClassifies(t *testing.T) {
	for batch, want := range map[int32][]int64{0: {2}, 8: {2, 2}} {
		f := &fake{batch: batch, labels: map[string][]string{"x": {"a"}}}
		in := Input{Tensor: tensor.Tensor{Name: "x", Type: tensor.Uint8, Shape: []int64{2, 2}, Data: []byte{4, 3, 2, 1}}}
		r, err := New(Config{Backend: f}).Infer(t.Context(), &Request{Model: "m", Inputs: []Input{in}, Outputs: []Output{{Name: "x", Classes: 2}}})
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, r.Outputs[0].Shape); diff != "" || !strings.Contains(string(r.Outputs[0].Data), "4:0:a") {
			t.Errorf("batch of %d: %+v: %s", batch, r.Outputs[0], diff)
		}
	}
}

// nobody may ask for anything.
type nobody struct{}

func (nobody) Model(context.Context, string) error {
	return Errorf(Unauthenticated, "who are you?")
}
func (nobody) Sees(context.Context, string) bool { return false }
