package policy

import (
	"errors"
	"fmt"
	"iter"
	"regexp"
	"slices"
	"strings"
	"sync"

	"cel.dev/cel-go/cel"
	celast "cel.dev/cel-go/common/ast"
	"cel.dev/cel-go/common/cost"
	"cel.dev/cel-go/common/types"
	"cel.dev/cel-go/common/types/ref"
	"cel.dev/cel-go/interpreter"

	"github.com/dunlin/dunlin/models/tensor"
)

// secretHeaders are not shown to rules, so that no credential gets into a
// document, a figure or a choice.
var secretHeaders = []string{"authorization", "cookie", "proxy-authorization"}

// expression is a compiled CEL expression.
type expression struct {
	program cel.Program
	text    string
}

// The names that expressions know.
const (
	parametersName = "request.parameters"
	headersName    = "request.headers"
	inputsName     = "request.inputs"
	labelsName     = "device.labels"
	liveName       = "device.live"
	liveType       = "dunlin.Live"
)

// liveFields are the figures of device.live.
var liveFields = map[string]*types.FieldType{
	"queue_depth":       figure(cel.IntType, func(f *Figures) *Figure { return &f.QueueDepth }),
	"predicted_wait_ms": figure(cel.DoubleType, func(f *Figures) *Figure { return &f.PredictedWait }),
	"temperature_celsius": figure(cel.DoubleType, func(f *Figures) *Figure {
		return &f.Temperature
	}),
	"on_battery": figure(cel.BoolType, func(f *Figures) *Figure { return &f.OnBattery }),
}

var errNotKnown = errors.New("the figure is not known")

func figure(t *cel.Type, of func(*Figures) *Figure) *types.FieldType {
	return &types.FieldType{
		Type: t,
		IsSet: func(target any) bool {
			f, ok := target.(*Figures)
			return ok && of(f).Known
		},
		GetFrom: func(target any) (any, error) {
			f, ok := target.(*Figures)
			if !ok || !of(f).Known {
				return nil, errNotKnown
			}
			switch v := of(f).Value; t {
			case cel.IntType:
				return types.Int(v), nil
			case cel.BoolType:
				return types.Bool(v != 0), nil
			default:
				return types.Double(v), nil
			}
		},
	}
}

// provider adds the type of device.live to those that CEL knows.
type provider struct{ types.Provider }

func (p provider) FindStructType(name string) (*types.Type, bool) {
	if name == liveType {
		return types.NewTypeTypeWithParam(types.NewObjectType(liveType)), true
	}
	return p.Provider.FindStructType(name)
}

func (p provider) FindStructFieldNames(name string) ([]string, bool) {
	if name != liveType {
		return p.Provider.FindStructFieldNames(name)
	}
	var names []string
	for field := range liveFields {
		names = append(names, field)
	}
	slices.Sort(names)
	return names, true
}

func (p provider) FindStructFieldType(name, field string) (*types.FieldType, bool) {
	if name != liveType {
		return p.Provider.FindStructFieldType(name, field)
	}
	t, ok := liveFields[field]
	return t, ok
}

// environment is what expressions are compiled in.
var environment = sync.OnceValues(func() (*cel.Env, error) {
	registry, err := types.NewRegistry()
	if err != nil {
		return nil, err
	}
	words := cel.MapType(cel.StringType, cel.StringType)
	return cel.NewEnv(
		cel.CustomTypeAdapter(registry),
		cel.CustomTypeProvider(provider{registry}),
		cel.ParserRecursionLimit(32),
		cel.ParserErrorRecoveryLimit(4),
		cel.ParserExpressionSizeLimit(MaxExpression),
		cel.Variable(parametersName, words),
		cel.Variable(headersName, words),
		cel.Variable(inputsName, cel.MapType(cel.StringType, cel.ListType(cel.IntType))),
		cel.Variable(labelsName, words),
		cel.Variable(liveName, cel.ObjectType(liveType)),
	)
})

// sizes bounds what an expression can find in a request, for the estimate of
// its cost.
type sizes struct{}

func (sizes) EstimateCallCost(function, _ string, _ *cost.AstNode, _ []cost.AstNode) *cost.CallEstimate {
	return lookCost(function)
}

func (sizes) EstimateSize(n cost.AstNode) *cost.SizeEstimate {
	if len(n.Path()) == 0 {
		return nil
	}
	switch n.Type().Kind() {
	case types.StringKind:
		return &cost.SizeEstimate{Max: MaxEntryText}
	case types.MapKind, types.ListKind:
		return &cost.SizeEstimate{Max: MaxEntries}
	}
	return nil
}

// untracked is the estimate up to which an expression is so far from the limit
// that its cost is not counted when it runs, which takes as long as the
// expression itself.
const untracked = MaxCost / 10

// compileExpression gives an expression that is a bool and costs little.
func compileExpression(text string) (*expression, error) {
	env, err := environment()
	if err != nil {
		return nil, err
	}
	return compileIn(env, text)
}

func compileIn(env *cel.Env, text string) (*expression, error) {
	if len(text) > MaxExpression {
		return nil, fmt.Errorf("has %d bytes, the limit is %d", len(text), MaxExpression)
	}
	checked, issues := env.Compile(text)
	if issues.Err() != nil {
		first := issues.Errors()[0]
		message := strings.TrimSpace(strings.ReplaceAll(strings.ReplaceAll(first.Message, " (in container '')", ""), "\n", " "))
		if line := first.Location.Line(); line > 1 {
			return nil, fmt.Errorf("line %d, column %d of the expression: %s", line, first.Location.Column()+1, message)
		}
		return nil, fmt.Errorf("column %d of the expression: %s", first.Location.Column()+1, message)
	}
	if t := checked.OutputType(); !t.IsExactType(cel.BoolType) {
		return nil, fmt.Errorf("the expression is of type %s, it must be a bool", t)
	}
	if err := checkPatterns(checked.NativeRep()); err != nil {
		return nil, err
	}
	estimate, err := env.EstimateCost(checked, sizes{})
	if err != nil {
		return nil, fmt.Errorf("estimate the cost: %w", err)
	}
	if estimate.Max > MaxCost {
		return nil, fmt.Errorf("the expression may cost %d, the limit is %d", estimate.Max, MaxCost)
	}
	options := []cel.ProgramOption{cel.EvalOptions(cel.OptOptimize)}
	if estimate.Max > untracked {
		options = append(options, cel.CostLimit(MaxCost))
	}
	program, err := env.Program(checked, options...)
	if err != nil {
		return nil, err
	}
	return &expression{program, text}, nil
}

// checkPatterns bounds regular expressions: they are written out, so that
// they are compiled once.
func checkPatterns(a *celast.AST) error {
	var problem error
	celast.PostOrderVisit(a.Expr(), celast.NewExprVisitor(func(e celast.Expr) {
		if problem != nil || e.Kind() != celast.CallKind || e.AsCall().FunctionName() != "matches" {
			return
		}
		args := e.AsCall().Args()
		last := args[len(args)-1]
		if last.Kind() != celast.LiteralKind {
			problem = errors.New("the pattern of matches() must be a literal string")
			return
		}
		pattern, ok := last.AsLiteral().(types.String)
		switch {
		case !ok:
			problem = errors.New("the pattern of matches() must be a literal string")
		case len(pattern) > MaxPattern:
			problem = fmt.Errorf("the pattern of matches() has %d bytes, the limit is %d", len(pattern), MaxPattern)
		default:
			if _, err := regexp.Compile(string(pattern)); err != nil {
				problem = fmt.Errorf("the pattern of matches(): %w", err)
			}
		}
	}))
	return problem
}

// matches evaluates the expression.
func (e *expression) matches(a *activation) (bool, error) {
	out, _, err := e.program.Eval(a)
	if err != nil {
		return false, err
	}
	return out == types.True, nil
}

// activation shows a request to the expressions of a policy. What they do not
// ask for is not made.
type activation struct {
	request                             Request
	parameters, headers, inputs, labels ref.Val
	live                                *Figures
	outputs                             []tensor.Tensor // of an answer, for a cascade
}

var _ interpreter.Activation = (*activation)(nil)

func (a *activation) Parent() interpreter.Activation { return nil }

func (a *activation) ResolveName(name string) (any, bool) {
	switch name {
	case parametersName:
		return a.words(&a.parameters, a.request.Parameters, nil)
	case headersName:
		return a.words(&a.headers, a.request.Headers, secretHeaders)
	case inputsName:
		if a.inputs == nil {
			shapes := make(map[string][]int64, min(len(a.request.Inputs), MaxEntries+1))
			for i := range a.request.Inputs {
				if t := &a.request.Inputs[i]; len(t.Name) <= MaxEntryText {
					shapes[t.Name] = t.Shape
				}
				if len(shapes) > MaxEntries {
					a.inputs = types.NewErr("the request has more than %d inputs", MaxEntries)
					return a.inputs, true
				}
			}
			a.inputs = types.DefaultTypeAdapter.NativeToValue(shapes)
		}
		return a.inputs, true
	case labelsName:
		if a.labels == nil {
			a.labels = types.NewStringStringMap(types.DefaultTypeAdapter, a.request.Labels)
		}
		return a.labels, true
	case liveName:
		if a.live == nil {
			a.live = new(Figures)
			if a.request.Live != nil {
				*a.live = a.request.Live()
			}
		}
		return a.live, true
	case outputName:
		return a.output(), true
	case outputsName:
		return a.allOutputs(), true
	}
	return nil, false
}

// words makes the map of what a request carries, once.
func (a *activation) words(at *ref.Val, values Values, without []string) (any, bool) {
	if *at != nil {
		return *at, true
	}
	var all iter.Seq2[string, string] = func(func(string, string) bool) {}
	if values != nil {
		all = values.All()
	}
	m := map[string]string{}
	for name, value := range all {
		if len(name) > MaxEntryText || len(value) > MaxEntryText || slices.Contains(without, name) {
			continue
		}
		m[name] = value
		if len(m) > MaxEntries {
			*at = types.NewErr("the request has more than %d entries", MaxEntries)
			return *at, true
		}
	}
	*at = types.NewStringStringMap(types.DefaultTypeAdapter, m)
	return *at, true
}
