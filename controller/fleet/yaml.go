package fleet

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/lexer"
	"github.com/goccy/go-yaml/parser"
	"github.com/goccy/go-yaml/token"
)

// maxNesting bounds how deep flow collections nest, and how many block
// collections begin on one line. The parser recurses, documents need 4.
const maxNesting = 16

// maxFaults bounds the faults of one document that are reported.
const maxFaults = 100

type node = ast.Node

type position struct{ line, column int }

type chunk struct {
	text string
	line int // lines before it
}

// split cuts text at the document markers and leaves empty documents out.
// Within quoted scalars YAML forbids the markers, so no parser is needed.
func split(text string) []chunk {
	var chunks []chunk
	var current strings.Builder
	start, line, blank := 0, 0, true
	flush := func() {
		if !blank {
			chunks = append(chunks, chunk{current.String(), start})
		}
		current.Reset()
		blank = true
	}
	text = strings.TrimPrefix(text, "\ufeff")
	for l := range strings.Lines(text) {
		if rest, ok := strings.CutPrefix(l, "---"); ok && (rest == "" || strings.ContainsRune(" \t\r\n", rune(rest[0]))) {
			flush()
			start = line
			l = "   " + rest
		}
		if t := strings.TrimSpace(l); t != "" && t[0] != '#' {
			blank = false
		}
		current.WriteString(l)
		line++
	}
	flush()
	return chunks
}

// reader walks the syntax tree of one document and collects its faults.
type reader struct {
	document int
	line     int // lines before the document
	faults   Faults
	at       map[string]position
}

func (r *reader) fault(field, format string, args ...any) {
	at := r.at[field]
	r.add(at, field, fmt.Sprintf(format, args...))
}

func (r *reader) add(at position, field, problem string) {
	switch {
	case len(r.faults) < maxFaults:
		r.faults = append(r.faults, Fault{Document: r.document, Line: at.line, Column: at.column, Field: field, Problem: problem})
	case len(r.faults) == maxFaults:
		r.faults = append(r.faults, Fault{Document: r.document, Problem: fmt.Sprintf("and more: only the first %d faults are shown", maxFaults)})
	}
}

func (r *reader) position(t *token.Token) position {
	if t == nil || t.Position == nil {
		return position{line: r.line + 1, column: 1}
	}
	return position{line: r.line + t.Position.Line, column: t.Position.Column}
}

// parse gives the one value of the document.
func (r *reader) parse(text string) (value node, ok bool) {
	if len(text) > MaxDocumentBytes {
		r.add(position{r.line + 1, 1}, "", fmt.Sprintf("the document has %d bytes, the limit is %d", len(text), MaxDocumentBytes))
		return nil, false
	}
	tokens := lexer.Tokenize(text)
	if len(tokens) > MaxTokens {
		r.add(position{r.line + 1, 1}, "", fmt.Sprintf("the document has %d tokens, the limit is %d", len(tokens), MaxTokens))
		return nil, false
	}
	if at, problem := checkTokens(tokens); problem != "" {
		r.add(r.position(at), "", problem)
		return nil, false
	}
	file, err := parser.ParseBytes([]byte(text), 0, parser.AllowDuplicateMapKey())
	if err != nil {
		if e, ok := errors.AsType[yaml.Error](err); ok {
			r.add(r.position(e.GetToken()), "", e.GetMessage())
		} else {
			r.add(position{r.line + 1, 1}, "", err.Error())
		}
		return nil, false
	}
	docs := slices.DeleteFunc(slices.Clone(file.Docs), func(d *ast.DocumentNode) bool { return d == nil || d.Body == nil })
	if len(docs) != 1 {
		r.add(position{r.line + 1, 1}, "", fmt.Sprintf("holds %d values, it must hold one mapping", len(docs)))
		return nil, false
	}
	return docs[0].Body, true
}

// checkTokens refuses what documents do not need and what would make the
// parser recurse without bound.
func checkTokens(tokens token.Tokens) (*token.Token, string) {
	depth, line, begun := 0, 0, 0
	for _, t := range tokens {
		if t.Position != nil && t.Position.Line != line {
			line, begun = t.Position.Line, 0
		}
		switch t.Type {
		case token.AnchorType, token.AliasType, token.TagType, token.MergeKeyType, token.DirectiveType, token.MappingKeyType:
			return t, fmt.Sprintf("%q: anchors, aliases, tags, merge keys, directives and complex keys are not allowed", clip(t.Value))
		case token.InvalidType:
			if t.Error != "" {
				return t, t.Error
			}
			return t, fmt.Sprintf("%q is not YAML", clip(t.Value))
		case token.MappingStartType, token.SequenceStartType:
			depth++
		case token.MappingEndType, token.SequenceEndType:
			depth--
		case token.SequenceEntryType, token.MappingValueType:
			if depth <= 0 {
				begun++
			}
		}
		if depth > maxNesting || begun > maxNesting {
			return t, fmt.Sprintf("collections nest deeper than %d", maxNesting)
		}
	}
	return nil, ""
}

// describe names a node's type and value in a message.
func describe(n node) string {
	switch n := n.(type) {
	case nil, *ast.NullNode:
		return "nothing"
	case *ast.MappingNode, *ast.MappingValueNode:
		return "a mapping"
	case *ast.SequenceNode:
		return "a sequence"
	case *ast.IntegerNode, *ast.FloatNode, *ast.InfinityNode, *ast.NanNode:
		return "the number " + clip(n.GetToken().Value)
	case *ast.BoolNode:
		return "the boolean " + clip(n.GetToken().Value)
	case *ast.StringNode:
		return fmt.Sprintf("the string %q", clip(n.Value))
	default:
		return "a " + strings.ToLower(n.Type().String())
	}
}

// entries gives the values of a mapping by key and notes their places.
func (r *reader) entries(n node, path string) map[string]node {
	var pairs []*ast.MappingValueNode
	switch m := n.(type) {
	case *ast.MappingNode:
		pairs = m.Values
	case *ast.MappingValueNode:
		pairs = []*ast.MappingValueNode{m}
	default:
		r.note(n, path)
		r.fault(path, "is %s, it must be a mapping", describe(n))
		return nil
	}
	values := make(map[string]node, len(pairs))
	for _, p := range pairs {
		at := r.position(p.Key.GetToken())
		key, ok := p.Key.(*ast.StringNode)
		if !ok {
			r.add(at, path, fmt.Sprintf("key %q must be a string; write it in quotes", clip(p.Key.GetToken().Value)))
			continue
		}
		field := join(path, key.Value)
		if _, ok := values[key.Value]; ok {
			r.add(at, field, "is there twice")
			continue
		}
		r.at[field] = at
		values[key.Value] = p.Value
	}
	return values
}

// mapping gives the values of a mapping by path, and a fault for each key
// that is not known.
func (r *reader) mapping(n node, path string, known ...string) map[string]node {
	values := r.entries(n, path)
	if values == nil {
		return nil
	}
	fields := make(map[string]node, len(values))
	for key, v := range values {
		if field := join(path, key); slices.Contains(known, key) {
			fields[field] = v
		}
	}
	var unknown []string
	for key := range values {
		if !slices.Contains(known, key) {
			unknown = append(unknown, key)
		}
	}
	slices.Sort(unknown)
	for _, key := range unknown {
		at := r.at[join(path, key)]
		r.add(at, join(path, clip(key)), "is not known, known are "+strings.Join(known, ", "))
	}
	// A missing field's fault points at the mapping that lacks it.
	for _, key := range known {
		if field := join(path, key); fields[field] == nil {
			r.at[field] = r.position(firstToken(n))
		}
	}
	return fields
}

func firstToken(n node) *token.Token {
	if m, ok := n.(*ast.MappingNode); ok && len(m.Values) > 0 {
		return m.Values[0].Key.GetToken()
	}
	if m, ok := n.(*ast.MappingValueNode); ok {
		return m.Key.GetToken()
	}
	return n.GetToken()
}

func join(path, key string) string {
	if path == "" {
		return key
	}
	return path + "." + key
}

// note keeps the place of a node that is no mapping's value.
func (r *reader) note(n node, path string) {
	if _, ok := r.at[path]; !ok && n != nil {
		r.at[path] = r.position(firstToken(n))
	}
}

// required gives a field's value, or a fault. A mapping that had faults
// itself gives no fault for each field that it lacks.
func (r *reader) required(fields map[string]node, path string) (node, bool) {
	if fields == nil {
		return nil, false
	}
	n, ok := fields[path]
	if !ok {
		r.fault(path, "is missing")
		return nil, false
	}
	if _, null := n.(*ast.NullNode); null || n == nil {
		r.fault(path, "has no value")
		return nil, false
	}
	return n, true
}

func (r *reader) text(fields map[string]node, path string) (string, bool) {
	n, ok := r.required(fields, path)
	if !ok {
		return "", false
	}
	return r.scalar(n, path)
}

func (r *reader) scalar(n node, path string) (string, bool) {
	switch s := n.(type) {
	case *ast.StringNode:
		return s.Value, true
	case *ast.LiteralNode:
		return s.Value.Value, true
	}
	r.fault(path, "is %s, it must be a string%s", describe(n), quoteHint(n))
	return "", false
}

func quoteHint(n node) string {
	switch n.(type) {
	case *ast.IntegerNode, *ast.FloatNode, *ast.BoolNode:
		return "; write it in quotes"
	}
	return ""
}

func (r *reader) integer(n node, path string, least, most int64) int64 {
	i, ok := n.(*ast.IntegerNode)
	if !ok {
		r.fault(path, "is %s, it must be a whole number of %d to %d", describe(n), least, most)
		return 0
	}
	var v int64
	switch x := i.Value.(type) {
	case int64:
		v = x
	case uint64:
		if x > uint64(most) {
			r.fault(path, "is %d, allowed are %d to %d", x, least, most)
			return 0
		}
		v = int64(x)
	}
	if v < least || v > most {
		r.fault(path, "is %d, allowed are %d to %d", v, least, most)
		return 0
	}
	return v
}

func (r *reader) duration(n node, path string, least, most time.Duration) time.Duration {
	s, ok := n.(*ast.StringNode)
	if !ok {
		r.fault(path, "is %s, it must be a duration like 10m or 1h30m", describe(n))
		return 0
	}
	d, err := time.ParseDuration(s.Value)
	if err != nil {
		r.fault(path, "is %q, it must be a duration like 10m or 1h30m", clip(s.Value))
		return 0
	}
	if d < least || d > most {
		r.fault(path, "is %s, allowed are %s to %s", d, least, most)
		return 0
	}
	return d
}

func (r *reader) sequence(n node, path string) ([]node, bool) {
	s, ok := n.(*ast.SequenceNode)
	if !ok {
		r.fault(path, "is %s, it must be a sequence", describe(n))
		return nil, false
	}
	for i, v := range s.Values {
		r.note(v, fmt.Sprintf("%s[%d]", path, i))
	}
	return s.Values, true
}
