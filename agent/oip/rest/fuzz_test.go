package rest

import (
	"bytes"
	"encoding/json"
	"log/slog"
	"net/http"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/dunlin/dunlin/agent/oip"
)

// fuzzed gives a server without a listener.
func fuzzed() *handler {
	return &handler{server: oip.New(oip.Config{
		Backend: &echo{}, Repository: &shelf{}, SharedMemory: true, MaxBody: 1 << 16, MaxBodies: 1 << 20,
		TraceFile: "never-written", LogLevel: new(slog.LevelVar),
	})}
}

// refusal says whether an error is one that a caller may get for what it sent.
func refusal(t *testing.T, err error) {
	t.Helper()
	switch oip.CodeOf(err) {
	case oip.InvalidArgument, oip.Unsupported, oip.NotFound, oip.TooLarge, oip.Unavailable:
	default:
		t.Errorf("error %q has code %d", err, oip.CodeOf(err))
	}
	if len(err.Error()) > 8<<10 {
		t.Errorf("an error of %d bytes", len(err.Error()))
	}
}

// A request is decoded, answered with its own inputs, encoded, and decoded
// again; none of it crashes, and none is of the wrong size.
func FuzzInfer(f *testing.F) {
	f.Add([]byte(in("FP32", "[2]", "[1,[-2.5e-3]]")), []byte(nil))
	f.Add([]byte(in("BYTES", "[2,1]", `[["a\u00e9"],[""]]`)), []byte(nil))
	f.Add([]byte(`{"id":"1","parameters":{"binary_data_output":true,"priority":1,"timeout":5},"inputs":[{"name":"y","datatype":"BOOL","shape":[1],"parameters":{"binary_data_size":1}}],"outputs":[{"name":"y","parameters":{"binary_data":true,"classification":0}}]}`), []byte{1})
	f.Add([]byte(`{"inputs":[{"name":"y","datatype":"FP32","shape":[1,2],"data":[1,2]}],"outputs":[{"name":"y","parameters":{"classification":1}}]}`), []byte(nil))
	f.Add([]byte(`{"inputs":[{"name":"y","datatype":"FP16","shape":[],"parameters":{"shared_memory_region":"r","shared_memory_byte_size":2,"shared_memory_offset":0}}],"outputs":[{"name":"y","parameters":{"shared_memory_region":"r"}}]}`), []byte(nil))
	h := fuzzed()
	f.Fuzz(func(t *testing.T, head, data []byte) {
		b := body{server: h.server}
		defer b.release()
		r := &inferRequest{Request: oip.Request{Model: "echo"}, hold: b.hold}
		if err := r.decode(head, data); err != nil {
			refusal(t, err)
			return
		}
		response, err := h.server.Infer(t.Context(), &r.Request)
		if err != nil {
			if oip.CodeOf(err) != oip.Internal || len(r.Outputs) == 0 { // the echo does not have the outputs
				refusal(t, err)
			}
			return
		}
		defer response.Release()
		for _, out := range response.Outputs {
			if err := out.Check(); err != nil && out.Memory == nil {
				t.Errorf("answered %v", err)
			}
		}
		answer, _, err := encodeResponse(r, response)
		if err != nil {
			refusal(t, err)
			return
		}
		p := &parser{b: answer}
		if err := p.skip(); err != nil || p.end() != nil {
			t.Errorf("answered %q: %v", answer, err)
		}
	})
}

func FuzzLoad(f *testing.F) {
	f.Add([]byte(`{"parameters":{"config":"{\"backend\":\"onnxruntime\"}","file:1/model.onnx":"TU9ERUw="}}`))
	f.Add([]byte(`{"parameters":{"unload_dependents":true,"file:../m":"","x":null}}`))
	h := fuzzed()
	f.Fuzz(func(t *testing.T, content []byte) {
		l := loadRequest{}
		if err := decodeObject(content, l.member); err != nil {
			refusal(t, err)
			return
		}
		if err := h.server.Load(t.Context(), "m", l.parameters); err != nil {
			refusal(t, err)
		}
		if err := h.server.Unload(t.Context(), "m", l.parameters); err != nil {
			refusal(t, err)
		}
	})
}

func FuzzRegister(f *testing.F) {
	f.Add("r", []byte(`{"key":"/dunlin-none","offset":0,"byte_size":18446744073709551615}`))
	f.Add("", []byte(`{"key":"../x","offset":1,"byte_size":1}`))
	h := fuzzed()
	f.Fuzz(func(t *testing.T, name string, content []byte) {
		m := memoryRequest{}
		err := decodeObject(content, m.member)
		if err == nil {
			err = m.register(h.server, name)
		}
		if err != nil {
			refusal(t, err)
			return
		}
		if err := h.server.UnregisterMemory(name); err != nil {
			t.Error(err)
		}
	})
}

func FuzzSettings(f *testing.F) {
	f.Add([]byte(`{"trace_level":["TIMESTAMPS"],"trace_rate":"1","trace_count":null,"log_frequency":"3"}`))
	f.Add([]byte(`{"log_info":true,"log_verbose_level":1,"log_format":"default"}`))
	h := fuzzed()
	f.Fuzz(func(t *testing.T, content []byte) {
		traces, logs := traceRequest{}, logRequest{}
		if err := decodeObject(content, traces.member); err != nil {
			refusal(t, err)
		} else if _, err := h.server.TraceSettings(t.Context(), "echo", traces); err != nil {
			refusal(t, err)
		}
		if err := decodeObject(content, logs.member); err != nil {
			refusal(t, err)
		} else if _, err := h.server.LogSettings(t.Context(), logs); err != nil {
			refusal(t, err)
		}
	})
}

// The headers of a request for inference.
func FuzzHeaders(f *testing.F) {
	f.Add("12", "gzip;q=0.5, deflate", []byte(small))
	h := fuzzed()
	f.Fuzz(func(t *testing.T, length, accept string, content []byte) {
		if e := acceptedEncoding([]string{accept}); e != "" && compressors[e] == nil {
			t.Errorf("encoding %q", e)
		}
		r := &http.Request{Header: http.Header{headerLength: {length}}}
		if _, err := h.decode(r.WithContext(t.Context()), content, "echo", 0, func(int64) error { return nil }); err != nil {
			refusal(t, err)
		}
	})
}

// The parser accepts what encoding/json accepts, but for its own limits and
// literals.
func FuzzParser(f *testing.F) {
	for _, seed := range []string{`{"a":[1,-0.5e+7,null,true,"\u00e9\ud800"],"b":{}}`, `[NaN,-Infinity]`, ` [ ] `, `01`, "\"\xff\""} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		p := &parser{b: b}
		err := p.skip()
		if err == nil {
			err = p.end()
		}
		if err != nil && strings.Contains(err.Error(), "nested deeper") {
			return
		}
		extended := bytes.Contains(b, []byte("NaN")) || bytes.Contains(b, []byte("Infinity"))
		if want := json.Valid(b) && utf8.Valid(b); (err == nil) != want && (!extended || want) {
			t.Errorf("%q: %v, encoding/json says %v", b, err, want)
		}
	})
}
