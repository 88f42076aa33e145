package rest

import (
	"iter"
	"net/http"
	"strings"
)

// parameters are the JSON object of a request's parameters, which has been read
// once and is well formed.
type parameters []byte

// Get implements oip.Values.
func (ps parameters) Get(name string) (value string, found bool) {
	p := &parser{b: ps}
	_ = p.object(func(key []byte) error {
		if string(key) != name {
			return p.skip()
		}
		text, ok, err := p.scalar()
		value, found = string(text), ok
		return err
	})
	return value, found
}

// All implements oip.Values.
func (ps parameters) All() iter.Seq2[string, string] {
	return func(yield func(string, string) bool) {
		p := &parser{b: ps}
		over := false
		_ = p.object(func(key []byte) error {
			text, ok, err := p.scalar()
			if ok && !over {
				over = !yield(string(key), string(text))
			}
			return err
		})
	}
}

// scalar reads a value, and gives the text of one that is a string, a number
// or a boolean. What it gives may share memory with the input.
func (p *parser) scalar() (text []byte, ok bool, err error) {
	switch c := p.next(); {
	case c == '"':
		text, err = p.str()
		return text, err == nil, err
	case c == '{' || c == '[' || p.null():
		if c == '{' || c == '[' {
			err = p.skip()
		}
		return nil, false, err
	}
	start := p.i
	if err := p.skip(); err != nil {
		return nil, false, err
	}
	return p.b[start:p.i], true, nil
}

// headers are those of a request.
type headers http.Header

// Get implements oip.Values. Of a header that is there more than once it gives
// all values, separated by commas.
func (h headers) Get(name string) (string, bool) {
	// In the form that HTTP's own headers are kept in, without allocating.
	var room [128]byte
	if len(name) > len(room) {
		return joined(h[http.CanonicalHeaderKey(name)])
	}
	upper := true
	for i := range len(name) {
		c := name[i]
		switch {
		case upper && 'a' <= c && c <= 'z':
			c -= 'a' - 'A'
		case !upper && 'A' <= c && c <= 'Z':
			c += 'a' - 'A'
		}
		room[i] = c
		upper = c == '-'
	}
	return joined(h[string(room[:len(name)])])
}

func joined(values []string) (string, bool) {
	if len(values) == 0 {
		return "", false
	}
	return strings.Join(values, ", "), true
}

// All implements oip.Values.
func (h headers) All() iter.Seq2[string, string] {
	return func(yield func(string, string) bool) {
		for name, values := range h {
			if v, ok := joined(values); ok && !yield(strings.ToLower(name), v) {
				return
			}
		}
	}
}
