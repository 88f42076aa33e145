package policy

import (
	"encoding/binary"
	"math"
	"strings"
	"testing"

	"github.com/dunlin/dunlin/models/tensor"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

func floats(name string, shape []int64, numbers ...float32) tensor.Tensor {
	t := tensor.Tensor{Name: name, Type: tensor.Float32, Shape: shape}
	for _, x := range numbers {
		t.Data = binary.LittleEndian.AppendUint32(t.Data, math.Float32bits(x))
	}
	return t
}

func cascaded(when string) *dunlinv1.DesiredRoute {
	return &dunlinv1.DesiredRoute{
		Name: "r", Targets: []*dunlinv1.RouteTarget{{Model: "m", Version: 1, Weight: 1}},
		Cascade: &dunlinv1.RouteCascade{Model: "m", Version: 2, When: when},
	}
}

func TestCascade(t *testing.T) {
	label := tensor.Tensor{Name: "label", Type: tensor.Int64, Shape: []int64{2}, Data: make([]byte, 16)}
	sure := floats("p", []int64{2, 3}, 0.9, 0.1, 0, 0, 0, 1)
	unsure := floats("p", []int64{2, 3}, 0, 0, 1, 0.5, 0.4, 0.1) // in its second row
	for _, tt := range []struct {
		when    string
		outputs []tensor.Tensor
		on      bool
		fault   string
	}{
		{`max(output) < 0.8`, []tensor.Tensor{label, sure}, false, ""},
		{`max(output) < 0.8`, []tensor.Tensor{label, unsure}, true, ""},
		{`margin(output) < 0.2`, []tensor.Tensor{sure}, false, ""},
		{`margin(output) < 0.2`, []tensor.Tensor{unsure}, true, ""},
		{`entropy(output) > 0.9`, []tensor.Tensor{sure}, false, ""},
		{`entropy(output) > 0.9`, []tensor.Tensor{unsure}, true, ""},
		{`softmax_max(output) < 0.9`, []tensor.Tensor{floats("logits", []int64{3}, 10, 0, 0)}, false, ""},
		{`softmax_max(output) < 0.9`, []tensor.Tensor{floats("logits", []int64{3}, 1, 0, 0)}, true, ""},
		{`softmax_margin(output) < 0.5 || softmax_entropy(output) > 1.0`, []tensor.Tensor{floats("logits", []int64{3}, 1000, 0, 0)}, false, ""},
		{`max(outputs["p"]) < 0.8 && !("tier" in request.parameters)`, []tensor.Tensor{unsure}, true, ""},
		{`max(output) < 0.8`, []tensor.Tensor{label}, false, "no output of floating-point numbers"},
		{`max(outputs["q"]) < 0.8`, []tensor.Tensor{sure}, false, "no such key"},
		{`max(output) < 0.8`, []tensor.Tensor{floats("p", []int64{1, 2}, 0, float32(math.NaN()))}, false, "row 0 of output p has a number that is not finite"},
		{`max(output) < 0.8`, []tensor.Tensor{floats("p", []int64{0, 2})}, false, "has no rows of 1 numbers"},
		{`margin(output) < 0.8`, []tensor.Tensor{floats("p", []int64{2, 1}, 1, 1)}, false, "has no rows of 2 numbers"},
		{`entropy(output) > 0.8`, []tensor.Tensor{floats("p", []int64{2}, 1, -1)}, false, "row 0 of output p is no distribution"},
		{`max(outputs["s"]) > 0.8`, []tensor.Tensor{{Name: "s", Type: tensor.String}}, false, "output s has no numbers"},
		{`max(output) < 0.8`, []tensor.Tensor{floats("p", []int64{MaxOutputNumbers + 1}, make([]float32, MaxOutputNumbers+1)...)}, false, "has 16385 numbers, the limit is 16384"},
		{`max(output) < 0.8`, []tensor.Tensor{floats("p", []int64{MaxOutputNumbers}, make([]float32, MaxOutputNumbers)...)}, true, ""},
	} {
		p, err := Compile(cascaded(tt.when))
		if err != nil {
			t.Errorf("%s: %v", tt.when, err)
			continue
		}
		on, err := p.Cascade(-1).SendsOn(&Request{}, tt.outputs)
		if on != tt.on || (err == nil) != (tt.fault == "") || err != nil && !strings.Contains(err.Error(), tt.fault) {
			t.Errorf("%s of %v: %v, %v; want %v, %q", tt.when, tt.outputs[0].Shape, on, err, tt.on, tt.fault)
		}
	}
}

func TestCascadeFaults(t *testing.T) {
	for _, tt := range []struct{ when, fault string }{
		{"", "cascade.when: "},
		{"max(output)", "cascade.when: the expression is of type double, it must be a bool"},
		{"max(request) < 1.0", "cascade.when: column "},
		{"mean(output) < 1.0", "undeclared reference to 'mean'"},
		{strings.Repeat("max(output) < 0.1 || ", 4) + "max(output) < 0.2", "the expression may cost 1"},
		{"request.headers.all(a, max(output) < 0.5)", "the limit is 10000"},
	} {
		if _, err := Compile(cascaded(tt.when)); err == nil || !strings.Contains(err.Error(), tt.fault) {
			t.Errorf("%q: %v, want %q", tt.when, err, tt.fault)
		}
	}
	if _, err := Compile(cascaded(strings.Repeat("max(output) < 0.1 || ", 3) + "max(output) < 0.2")); err != nil {
		t.Error(err)
	}
	circular := cascaded("max(output) < 0.5")
	circular.Cascade.Version = 1
	if _, err := Compile(circular); err == nil || !strings.Contains(err.Error(), "cascade: is circular") {
		t.Error(err)
	}
	// What a match asks is not the output.
	match := cascaded("max(output) < 0.5")
	match.Rules = []*dunlinv1.RouteRule{{Name: "a", Targets: match.Targets, Match: &dunlinv1.RouteMatch{Cel: "max(output) < 0.5"}}}
	if _, err := Compile(match); err == nil || !strings.Contains(err.Error(), "rules[0].match.cel") {
		t.Error(err)
	}
}
