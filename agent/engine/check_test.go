package engine

import (
	"errors"
	"math"
	"strings"
	"testing"

	"github.com/dunlin/dunlin/models/serving"
	"github.com/dunlin/dunlin/models/tensor"
)

func TestCheck(t *testing.T) {
	info := digits
	info.Options = serving.Options{PriorityLevels: 2, DefaultPriority: 2}
	change := func(f func(in []tensor.Tensor)) []tensor.Tensor { in := request1(); f(in); return in }
	for name, tt := range map[string]struct {
		q    Request
		want string // "" where it is fine
	}{
		"fine":             {Request{Inputs: request1()}, ""},
		"one output":       {Request{Inputs: request1(), Outputs: []string{"y"}}, ""},
		"any rank":         {Request{Inputs: change(func(in []tensor.Tensor) { in[0].Shape, in[0].Data = nil, in[0].Data[:5] })}, ""},
		"empty batch":      {Request{Inputs: change(func(in []tensor.Tensor) { in[1].Shape, in[1].Data = []int64{0, 2}, nil })}, ""},
		"missing":          {Request{Inputs: request1()[:1]}, `invalid input "x": missing`},
		"unknown":          {Request{Inputs: append(request1(), tensor.Tensor{Name: "z"})}, `invalid input "z": the model has no input of this name`},
		"twice":            {Request{Inputs: append(request1(), request1()...)}, `invalid input "any": given twice`},
		"type":             {Request{Inputs: change(func(in []tensor.Tensor) { in[1].Type = tensor.Int32 })}, `invalid input "x": has type INT32, the model takes FP32`},
		"dimension":        {Request{Inputs: change(func(in []tensor.Tensor) { in[1].Shape = []int64{2, 3} })}, `invalid input "x": has shape [2 3], the model takes [-1 2]`},
		"rank":             {Request{Inputs: change(func(in []tensor.Tensor) { in[1].Shape = []int64{6} })}, `invalid input "x": has shape [6], the model takes [-1 2]`},
		"negative":         {Request{Inputs: change(func(in []tensor.Tensor) { in[1].Shape = []int64{-1, 2} })}, `tensor "x"`},
		"overflow":         {Request{Inputs: change(func(in []tensor.Tensor) { in[1].Shape = []int64{math.MaxInt64, 2} })}, `tensor "x"`},
		"data":             {Request{Inputs: change(func(in []tensor.Tensor) { in[1].Data = in[1].Data[1:] })}, "has 23 bytes of data"},
		"strings":          {Request{Inputs: change(func(in []tensor.Tensor) { in[0].Data = in[0].Data[1:] })}, `tensor "any"`},
		"unknown output":   {Request{Inputs: request1(), Outputs: []string{"w"}}, `the model has no output "w"`},
		"output twice":     {Request{Inputs: request1(), Outputs: []string{"y", "y"}}, `output "y" is asked for twice`},
		"none of anything": {Request{}, `invalid input "x": missing`},
		"priority":         {Request{Inputs: request1(), Priority: 3}, "priority is 3, allowed are 1 to 2"},
		"no priority":      {Request{Inputs: request1(), Priority: -1}, "priority is -1, allowed are 1 to 2"},
		"timeout":          {Request{Inputs: request1(), Timeout: -1}, "timeout is -1ns"},
	} {
		_, err := info.request(one, tt.q)
		if tt.want == "" && err != nil || tt.want != "" && (!errors.Is(err, ErrInvalidInput) || !strings.Contains(err.Error(), tt.want)) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Which requests run alone, and how many rows they have.
func TestRows(t *testing.T) {
	info := Info{Inputs: []tensor.Info{{Name: "a", Type: tensor.Uint8}, {Name: "b", Type: tensor.Uint8}}}
	for name, tt := range map[string]struct {
		a, b  []int64
		max   int
		rows  int
		alone bool
	}{
		"one row":           {[]int64{1, 2}, []int64{1}, 4, 1, false},
		"many rows":         {[]int64{4, 2}, []int64{4, 3, 3}, 4, 4, false},
		"too many":          {[]int64{5, 2}, []int64{5}, 4, 5, true},
		"none":              {[]int64{0, 2}, []int64{0}, 4, 0, true},
		"not the same":      {[]int64{2, 2}, []int64{1}, 4, 2, true},
		"a scalar":          {[]int64{1, 2}, []int64{}, 4, 1, true},
		"rows mean nothing": {[]int64{7, 2}, []int64{3}, 0, 1, true},
	} {
		info.Options.MaxBatchSize = tt.max
		size := func(shape []int64) []byte { n, _ := tensor.Elements(shape); return make([]byte, n) }
		r, err := info.request(one, Request{Inputs: []tensor.Tensor{
			{Name: "b", Type: tensor.Uint8, Shape: tt.b, Data: size(tt.b)}, {Name: "a", Type: tensor.Uint8, Shape: tt.a, Data: size(tt.a)},
		}})
		if err != nil || r.rows != tt.rows || r.alone != tt.alone || r.inputs[0].Name != "a" {
			t.Errorf("%s: %+v, %v", name, r, err)
		}
	}
}
