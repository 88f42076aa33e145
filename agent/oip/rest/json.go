package rest

import (
	"encoding/json"
	"fmt"
	"unicode/utf8"

	"github.com/dunlin/dunlin/agent/oip"
)

// maxNesting bounds how deep arrays and objects may be nested.
const maxNesting = 64

// parser reads JSON in place, without copying: a request's data may have
// millions of elements. Its one extension are the literals NaN, Infinity and
// -Infinity.
type parser struct {
	b     []byte
	i     int
	depth int
}

func (p *parser) errorf(format string, args ...any) error {
	return oip.Errorf(oip.InvalidArgument, "JSON at byte %d: %w", p.i, fmt.Errorf(format, args...))
}

// next skips white space and gives the byte that follows, 0 at the end.
func (p *parser) next() byte {
	for ; p.i < len(p.b); p.i++ {
		switch c := p.b[p.i]; c {
		case ' ', '\t', '\r', '\n':
		default:
			return c
		}
	}
	return 0
}

func (p *parser) unexpected(want string) error {
	if p.next() == 0 && p.i == len(p.b) {
		return p.errorf("ends where %s should be", want)
	}
	return p.errorf("has %q where %s should be", p.b[p.i], want)
}

// end says whether nothing but white space is left.
func (p *parser) end() error {
	if p.next(); p.i < len(p.b) {
		return p.unexpected("the end")
	}
	return nil
}

// list reads what stands between open and close, separated by commas.
func (p *parser) list(open, close byte, want string, item func() error) error {
	if p.next() != open {
		return p.unexpected(want)
	}
	if p.depth++; p.depth > maxNesting {
		return p.errorf("is nested deeper than %d", maxNesting)
	}
	p.i++
	if p.next() == close {
		p.i++
		p.depth--
		return nil
	}
	for {
		if err := item(); err != nil {
			return err
		}
		switch p.next() {
		case ',':
			p.i++
		case close:
			p.i++
			p.depth--
			return nil
		default:
			return p.unexpected(fmt.Sprintf("',' or '%c'", close))
		}
	}
}

// object reads an object; member must read the value of the key that it gets,
// which may share memory with the input.
func (p *parser) object(member func(key []byte) error) error {
	return p.list('{', '}', "an object", func() error {
		key, err := p.str()
		if err != nil {
			return err
		}
		if p.next() != ':' {
			return p.unexpected("':'")
		}
		p.i++
		return member(key)
	})
}

// array reads an array; element must read the element at an index.
func (p *parser) array(element func(i int) error) error {
	i := -1
	return p.list('[', ']', "an array", func() error {
		i++
		return element(i)
	})
}

// str reads a string. The result may share memory with the input.
func (p *parser) str() ([]byte, error) {
	if p.next() != '"' {
		return nil, p.unexpected("a string")
	}
	start := p.i
	escaped := false
	for p.i++; p.i < len(p.b); p.i++ {
		switch c := p.b[p.i]; {
		case c == '"':
			p.i++
			content := p.b[start+1 : p.i-1]
			if !utf8.Valid(content) {
				return nil, p.errorf("has a string that is not UTF-8")
			}
			if !escaped {
				return content, nil
			}
			var s string
			if err := json.Unmarshal(p.b[start:p.i], &s); err != nil {
				return nil, p.errorf("has a string with a bad escape: %w", err)
			}
			return []byte(s), nil
		case c == '\\':
			escaped = true
			p.i++
		case c < ' ':
			return nil, p.errorf("has the control character %#02x in a string", c)
		}
	}
	p.i = len(p.b)
	return nil, p.errorf("ends inside a string")
}

// number reads a number and gives it as it is written.
func (p *parser) number() ([]byte, error) {
	c := p.next()
	start := p.i
	if c == '-' {
		p.i++
	}
	if p.word("Infinity") || c != '-' && p.word("NaN") {
		return p.b[start:p.i], nil
	}
	if p.i < len(p.b) && p.b[p.i] == '0' {
		p.i++
	} else if p.digits() == 0 {
		return nil, p.unexpected("a number")
	}
	if p.i < len(p.b) && p.b[p.i] == '.' {
		p.i++
		if p.digits() == 0 {
			return nil, p.unexpected("a digit")
		}
	}
	if p.i < len(p.b) && p.b[p.i]|0x20 == 'e' {
		p.i++
		if p.i < len(p.b) && (p.b[p.i] == '+' || p.b[p.i] == '-') {
			p.i++
		}
		if p.digits() == 0 {
			return nil, p.unexpected("a digit")
		}
	}
	return p.b[start:p.i], nil
}

func (p *parser) digits() int {
	start := p.i
	for p.i < len(p.b) && p.b[p.i] >= '0' && p.b[p.i] <= '9' {
		p.i++
	}
	return p.i - start
}

// word reads w, where it comes next.
func (p *parser) word(w string) bool {
	if len(p.b)-p.i < len(w) || string(p.b[p.i:p.i+len(w)]) != w {
		return false
	}
	p.i += len(w)
	return true
}

func (p *parser) bool() (bool, error) {
	p.next()
	if p.word("true") {
		return true, nil
	}
	if p.word("false") {
		return false, nil
	}
	return false, p.unexpected("true or false")
}

// null reads null, where it comes next.
func (p *parser) null() bool {
	p.next()
	return p.word("null")
}

// skip reads any value.
func (p *parser) skip() error {
	switch p.next() {
	case '{':
		return p.object(func([]byte) error { return p.skip() })
	case '[':
		return p.array(func(int) error { return p.skip() })
	case '"':
		_, err := p.str()
		return err
	case 't', 'f':
		_, err := p.bool()
		return err
	case 'n':
		if p.null() {
			return nil
		}
		return p.unexpected("a value")
	default:
		_, err := p.number()
		return err
	}
}
