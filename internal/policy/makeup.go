package policy

import (
	"fmt"
	"maps"
	"math"
	"math/rand/v2"
	"slices"

	celast "cel.dev/cel-go/common/ast"
	"cel.dev/cel-go/common/types"

	"github.com/dunlin/dunlin/models/tensor"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// Made makes up requests that differ in what the rules of a route look at:
// each parameter and header has one of the values that a rule names, another
// one, or is not there; each input has as many rows as a bound says, one more
// or one less, or is not there; each key is one of a thousand. What an
// expression names varies as well, with the texts and numbers that stand in it.
// The requests are no forecast of real ones: all values are alike likely.
type Made struct {
	rng                 *rand.Rand
	parameters, headers []varied
	inputs              []variedInput
}

// varied is a name and the values that it can have.
type varied struct {
	name   string
	values []string
	key    bool // it has a thousand values instead
}

type variedInput struct {
	name string
	rows []int64
}

// makeKeys is how many values a key has.
const makeKeys = 1000

// MakeUp makes up requests to a route that compiles. The same route and seed
// give the same requests.
func MakeUp(route *dunlinv1.DesiredRoute, seed uint64) *Made {
	parameters, headers := map[string]*varied{}, map[string]*varied{}
	inputs := map[string][]int64{}
	at := func(in map[string]*varied, name string) *varied {
		if in[name] == nil {
			in[name] = &varied{name: name}
		}
		return in[name]
	}
	sticky := func(s *dunlinv1.RouteSticky) {
		if name := s.GetHeader(); name != "" {
			at(headers, name).key = true
		}
		if name := s.GetParameter(); name != "" {
			at(parameters, name).key = true
		}
	}
	sticky(route.GetSticky())
	for _, rule := range route.GetRules() {
		sticky(rule.GetSticky())
		m := rule.GetMatch()
		for _, c := range m.GetParameters() {
			v := at(parameters, c.GetName())
			v.values = append(v.values, c.GetValues()...)
		}
		for _, c := range m.GetHeaders() {
			v := at(headers, c.GetName())
			v.values = append(v.values, c.GetValues()...)
		}
		for _, in := range m.GetInputs() {
			rows := []int64{1, max(in.GetMinRows()-1, 1), max(in.GetMinRows(), 1)}
			if most := in.GetMaxRows(); most > 0 {
				rows = append(rows, most, most+1)
			} else {
				rows = append(rows, in.GetMinRows()+1)
			}
			inputs[in.GetName()] = append(inputs[in.GetName()], rows...)
		}
		named := namedIn(m.GetCel())
		for _, name := range named.parameters {
			v := at(parameters, name)
			v.values = append(v.values, named.texts...)
		}
		for _, name := range named.headers {
			v := at(headers, name)
			v.values = append(v.values, named.texts...)
		}
		for _, name := range named.inputs {
			inputs[name] = append(inputs[name], 1)
			for _, n := range named.numbers {
				if n > 0 && n <= MaxRows {
					inputs[name] = append(inputs[name], max(n-1, 1), n, n+1)
				}
			}
		}
	}
	made := &Made{rng: rand.New(rand.NewPCG(seed, 0))}
	list := func(in map[string]*varied) (all []varied) {
		for _, name := range slices.Sorted(maps.Keys(in)) {
			v := *in[name]
			slices.Sort(v.values)
			v.values = slices.Compact(v.values)
			all = append(all, v)
		}
		return all
	}
	made.parameters, made.headers = list(parameters), list(headers)
	for _, name := range slices.Sorted(maps.Keys(inputs)) {
		rows := inputs[name]
		slices.Sort(rows)
		made.inputs = append(made.inputs, variedInput{name, slices.Compact(rows)})
	}
	return made
}

// Next makes up the next request: its parameters, headers and inputs, and the
// number by which it is decided where that goes by chance.
func (m *Made) Next() (parameters, headers map[string]string, inputs []tensor.Tensor, random uint64) {
	choose := func(from []varied) map[string]string {
		all := map[string]string{}
		for i := range from {
			v := &from[i]
			n := len(v.values)
			if v.key {
				n = 1
			}
			switch k := m.rng.IntN(n + 2); {
			case k < n && v.key:
				all[v.name] = fmt.Sprint("key-", m.rng.IntN(makeKeys))
			case k < n:
				all[v.name] = v.values[k]
			case k == n && v.key:
				if len(v.values) > 0 {
					all[v.name] = v.values[m.rng.IntN(len(v.values))]
				} else {
					all[v.name] = fmt.Sprint("key-", m.rng.IntN(makeKeys))
				}
			case k == n:
				all[v.name] = "other"
			}
		}
		return all
	}
	parameters, headers = choose(m.parameters), choose(m.headers)
	for _, in := range m.inputs {
		if k := m.rng.IntN(len(in.rows) + 1); k < len(in.rows) {
			inputs = append(inputs, tensor.Tensor{Name: in.name, Shape: []int64{in.rows[k]}})
		}
	}
	return parameters, headers, inputs, m.rng.Uint64()
}

// named is what an expression speaks of.
type named struct {
	parameters, headers, inputs, texts []string
	numbers                            []int64
}

// namedIn finds the names that an expression asks the request for, and the
// texts and numbers that it has.
func namedIn(text string) (n named) {
	if text == "" {
		return n
	}
	env, err := environment()
	if err != nil {
		return n
	}
	checked, issues := env.Compile(text)
	if issues.Err() != nil {
		return n
	}
	references := checked.NativeRep()
	of := func(e celast.Expr) *[]string {
		ref := references.ReferenceMap()[e.ID()]
		if ref == nil {
			return nil
		}
		switch ref.Name {
		case parametersName:
			return &n.parameters
		case headersName:
			return &n.headers
		case inputsName:
			return &n.inputs
		}
		return nil
	}
	names := map[int64]bool{} // literals that are names
	literal := func(e celast.Expr) (string, bool) {
		if e.Kind() != celast.LiteralKind {
			return "", false
		}
		s, ok := e.AsLiteral().(types.String)
		return string(s), ok
	}
	celast.PreOrderVisit(references.Expr(), celast.NewExprVisitor(func(e celast.Expr) {
		switch e.Kind() {
		case celast.SelectKind:
			if to := of(e.AsSelect().Operand()); to != nil {
				*to = append(*to, e.AsSelect().FieldName())
			}
		case celast.CallKind:
			args := e.AsCall().Args()
			if len(args) != 2 {
				return
			}
			for _, pair := range [][2]celast.Expr{{args[0], args[1]}, {args[1], args[0]}} { // a[b], b in a
				if name, ok := literal(pair[1]); ok {
					if to := of(pair[0]); to != nil {
						*to = append(*to, name)
						names[pair[1].ID()] = true
					}
				}
			}
		case celast.LiteralKind:
			switch v := e.AsLiteral().(type) {
			case types.String:
				if !names[e.ID()] {
					n.texts = append(n.texts, string(v))
				}
			case types.Int:
				if v < math.MaxInt64 {
					n.numbers = append(n.numbers, int64(v))
				}
			}
		}
	}))
	return n
}
