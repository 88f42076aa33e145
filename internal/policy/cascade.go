package policy

import (
	"errors"
	"fmt"
	"math"
	"reflect"
	"slices"
	"sync"

	"cel.dev/cel-go/cel"
	"cel.dev/cel-go/common/cost"
	"cel.dev/cel-go/common/types"
	"cel.dev/cel-go/common/types/ref"

	"github.com/dunlin/dunlin/models"
	"github.com/dunlin/dunlin/models/tensor"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// MaxOutputNumbers bounds the numbers of an output that an expression of a
// cascade looks at; it faults where there are more.
const MaxOutputNumbers = 16384

// outputCost is what one look at an output costs at its most: four of them are
// what an expression may have.
const outputCost = 2400

// Cascade sends a request on to a larger model where the output of its target
// is not sure enough.
type Cascade struct {
	Target
	when *expression
}

// Cascade is that of a rule, or with -1 of the requests that no rule matches;
// nil where there is none.
func (p *Policy) Cascade(rule int) *Cascade {
	if rule < 0 {
		return p.unmatched.cascade
	}
	return p.rules[rule].choice.cascade
}

// SendsOn says whether a request goes on, whose target has given these
// outputs, all that the model has and in its order. Where it cannot be said,
// the request does not go on.
func (c *Cascade) SendsOn(q *Request, outputs []tensor.Tensor) (bool, error) {
	return c.when.matches(&activation{request: *q, outputs: outputs})
}

func (c *compiler) cascade(to *choice, at string, cascade *dunlinv1.RouteCascade) {
	if cascade == nil {
		return
	}
	s := &Cascade{Target: Target{cascade.GetModel(), cascade.GetVersion()}}
	if err := models.CheckName(s.Model); err != nil {
		c.fault(at+".model", "%v", err)
	}
	if s.Version < 0 {
		c.fault(at+".version", "%d is below 0", s.Version)
	}
	if len(to.targets) == 1 && to.targets[0] == s.Target {
		c.fault(at, "is circular: it is the only target that gets requests")
	}
	env, err := outputEnvironment()
	if err == nil {
		s.when, err = compileIn(env, cascade.GetWhen())
	}
	if err != nil {
		c.fault(at+".when", "%v", err)
	}
	to.cascade = s
}

// The names that expressions of cascades know beside the others.
const (
	outputName  = "output"
	outputsName = "outputs"
)

var tensorType = cel.OpaqueType("dunlin.Tensor")

// output shows a tensor to an expression, which can only pass it on.
type output struct{ *tensor.Tensor }

var errOutput = errors.New("an output is no value of its own, ask one of the functions about it")

func (o output) ConvertToNative(reflect.Type) (any, error) { return nil, errOutput }
func (o output) ConvertToType(ref.Type) ref.Val            { return types.WrapErr(errOutput) }
func (o output) Equal(ref.Val) ref.Val                     { return types.WrapErr(errOutput) }
func (o output) Type() ref.Type                            { return tensorType }
func (o output) Value() any                                { return o.Tensor }

// looks are the functions over an output. Each gives its figure of the row
// that is the least sure.
var looks = map[string]struct {
	of    func(row []float64) float64
	worst func(a, b float64) float64
	least int // numbers that a row must have
}{
	"max":             {largestOf, lower, 1},
	"margin":          {marginOf, lower, 2},
	"entropy":         {entropyOf, higher, 1},
	"softmax_max":     {func(row []float64) float64 { return largestOf(softmax(row)) }, lower, 1},
	"softmax_margin":  {func(row []float64) float64 { return marginOf(softmax(row)) }, lower, 2},
	"softmax_entropy": {func(row []float64) float64 { return entropyOf(softmax(row)) }, higher, 1},
}

func lower(a, b float64) float64  { return min(a, b) }
func higher(a, b float64) float64 { return max(a, b) }

func largestOf(row []float64) float64 { return slices.Max(row) }

// marginOf is how far the largest is above the second.
func marginOf(row []float64) float64 {
	first, second := math.Inf(-1), math.Inf(-1)
	for _, x := range row {
		if x > first {
			first, second = x, first
		} else if x > second {
			second = x
		}
	}
	return first - second
}

// entropyOf is that of a distribution, in nats; the numbers are its weights.
func entropyOf(row []float64) float64 {
	sum, h := 0., 0.
	for _, x := range row {
		if x < 0 {
			return math.NaN()
		}
		sum += x
	}
	for _, x := range row {
		if x > 0 {
			h -= x / sum * math.Log(x/sum)
		}
	}
	if sum == 0 {
		return math.NaN()
	}
	return h
}

// softmax takes the place of the row.
func softmax(row []float64) []float64 {
	top, sum := slices.Max(row), 0.
	for i, x := range row {
		row[i] = math.Exp(x - top)
		sum += row[i]
	}
	for i := range row {
		row[i] /= sum
	}
	return row
}

// look gives the figure of the least sure row. The first dimension counts the
// rows where there is more than one.
func look(name string, t *tensor.Tensor) (float64, error) {
	how := looks[name]
	size := t.Type.Size()
	if size == 0 {
		return 0, fmt.Errorf("%s: output %s has no numbers", name, clip(t.Name))
	}
	n, rows := len(t.Data)/size, 1
	if n > MaxOutputNumbers {
		return 0, fmt.Errorf("%s: output %s has %d numbers, the limit is %d", name, clip(t.Name), n, MaxOutputNumbers)
	}
	if len(t.Shape) > 1 {
		rows = int(t.Shape[0])
	}
	if n == 0 || rows < 1 || n/rows < how.least {
		return 0, fmt.Errorf("%s: output %s of shape %v has no rows of %d numbers", name, clip(t.Name), t.Shape, how.least)
	}
	row := make([]float64, n/rows)
	var worst float64
	for i := range rows {
		for j := range row {
			row[j] = t.Type.Number(t.Data[(i*len(row)+j)*size:])
			if math.IsNaN(row[j]) || math.IsInf(row[j], 0) {
				return 0, fmt.Errorf("%s: row %d of output %s has a number that is not finite", name, i, clip(t.Name))
			}
		}
		x := how.of(row)
		switch {
		case math.IsNaN(x):
			return 0, fmt.Errorf("%s: row %d of output %s is no distribution", name, i, clip(t.Name))
		case i == 0:
			worst = x
		default:
			worst = how.worst(worst, x)
		}
	}
	return worst, nil
}

// outputEnvironment is what expressions of cascades are compiled in.
var outputEnvironment = sync.OnceValues(func() (*cel.Env, error) {
	env, err := environment()
	if err != nil {
		return nil, err
	}
	options := []cel.EnvOption{
		cel.Variable(outputName, tensorType),
		cel.Variable(outputsName, cel.MapType(cel.StringType, tensorType)),
	}
	for name := range looks {
		options = append(options, cel.Function(name, cel.Overload(name+"_output", []*cel.Type{tensorType}, cel.DoubleType,
			cel.UnaryBinding(func(v ref.Val) ref.Val {
				o, ok := v.(output)
				if !ok {
					return types.MaybeNoSuchOverloadErr(v)
				}
				x, err := look(name, o.Tensor)
				if err != nil {
					return types.WrapErr(err)
				}
				return types.Double(x)
			}))))
	}
	return env.Extend(options...)
})

// lookCost is the cost of a function over an output, nil of another function.
func lookCost(function string) *cost.CallEstimate {
	if _, ok := looks[function]; !ok {
		return nil
	}
	return &cost.CallEstimate{CostEstimate: cost.Estimate{Min: 1, Max: outputCost}}
}

// output shows the first output of floating-point numbers.
func (a *activation) output() ref.Val {
	for i := range a.outputs {
		switch a.outputs[i].Type {
		case tensor.Float16, tensor.BFloat16, tensor.Float32, tensor.Float64:
			return output{&a.outputs[i]}
		}
	}
	return types.NewErr("the answer has no output of floating-point numbers")
}

func (a *activation) allOutputs() ref.Val {
	m := make(map[ref.Val]ref.Val, len(a.outputs))
	for i := range a.outputs {
		m[types.String(a.outputs[i].Name)] = output{&a.outputs[i]}
	}
	return types.NewRefValMap(types.DefaultTypeAdapter, m)
}
