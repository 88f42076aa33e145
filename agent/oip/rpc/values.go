package rpc

import (
	"context"
	"iter"
	"math"
	"strconv"
	"strings"

	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/encoding/protowire"
)

// parameters are the whole of a ModelInferRequest, of which they are read; it
// has been read once and is well formed.
type parameters []byte

// Get implements oip.Values.
func (ps *parameters) Get(name string) (value string, found bool) {
	for key, v := range ps.All() {
		if key == name {
			value, found = v, true
		}
	}
	return value, found
}

// All implements oip.Values.
func (ps *parameters) All() iter.Seq2[string, string] {
	return func(yield func(string, string) bool) {
		over := false
		_ = eachField(*ps, func(f field) error {
			if over || !f.is(4, protowire.BytesType) {
				return nil
			}
			var key string
			var p param
			if err := decodeParam(f.bytes, func(k string) *param { key = k; return &p }); err != nil {
				return err
			}
			if text, ok := p.value(); ok {
				over = !yield(key, text)
			}
			return nil
		})
	}
}

// value gives the text of a parameter; false where it has none.
func (p *param) value() (string, bool) {
	switch p.kind {
	case "bool_param":
		return strconv.FormatBool(p.number != 0), true
	case "int64_param":
		return strconv.FormatInt(int64(p.number), 10), true
	case "uint64_param":
		return strconv.FormatUint(p.number, 10), true
	case "double_param":
		return strconv.FormatFloat(math.Float64frombits(p.number), 'g', -1, 64), true
	case "string_param":
		return p.text, true
	}
	return "", false
}

// headers are the metadata of a call, by its context: most calls are never
// asked for them, and to copy them costs more than to decode the request.
type headers struct{ of context.Context }

// Get implements oip.Values. Of a header that is there more than once it gives
// all values, separated by commas.
func (h *headers) Get(name string) (string, bool) {
	return joined(metadata.ValueFromIncomingContext(h.of, name))
}

func joined(values []string) (string, bool) {
	if len(values) == 0 {
		return "", false
	}
	return strings.Join(values, ", "), true
}

// All implements oip.Values.
func (h *headers) All() iter.Seq2[string, string] {
	return func(yield func(string, string) bool) {
		md, _ := metadata.FromIncomingContext(h.of)
		for name, values := range md {
			if v, ok := joined(values); ok && !strings.HasPrefix(name, ":") && !yield(name, v) {
				return
			}
		}
	}
}
