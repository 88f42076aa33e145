package apidoc

import (
	"bytes"
	"maps"
	"os"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"
	"github.com/santhosh-tekuri/jsonschema/v6"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// plain gives a document as JSON has it.
func plain(t *testing.T, doc object) map[string]any {
	t.Helper()
	text, err := yaml.MarshalWithOptions(doc, yaml.JSON())
	if err != nil {
		t.Fatal(err)
	}
	v, err := jsonschema.UnmarshalJSON(bytes.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	return v.(map[string]any)
}

// official: a document is as the published schema of OpenAPI 3.1 says.
func official(t *testing.T, doc map[string]any) {
	t.Helper()
	text, err := os.ReadFile("testdata/openapi-3.1.yaml")
	if err != nil {
		t.Fatal(err)
	}
	text, err = yaml.YAMLToJSON(text)
	if err != nil {
		t.Fatal(err)
	}
	schema, err := jsonschema.UnmarshalJSON(bytes.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	c := jsonschema.NewCompiler()
	if err := c.AddResource("mem:///openapi", schema); err != nil {
		t.Fatal(err)
	}
	s, err := c.Compile("mem:///openapi")
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Validate(doc); err != nil {
		t.Error(err)
	}
	bad := maps.Clone(doc)
	delete(bad, "info")
	if s.Validate(bad) == nil {
		t.Error("a document without info was taken")
	}
}

// references: each leads to something in the document.
func references(t *testing.T, doc map[string]any) {
	t.Helper()
	n := 0
	var walk func(any)
	walk = func(v any) {
		switch v := v.(type) {
		case []any:
			for _, e := range v {
				walk(e)
			}
		case map[string]any:
			for key, e := range v {
				to, ok := e.(string)
				if key != "$ref" || !ok {
					walk(e)
					continue
				}
				n++
				var at any = doc
				for part := range strings.SplitSeq(strings.TrimPrefix(to, "#/"), "/") {
					in, _ := at.(map[string]any)
					at = in[part]
				}
				if at == nil {
					t.Errorf("%s leads nowhere", to)
				}
			}
		}
	}
	walk(doc)
	if n < 50 {
		t.Errorf("only %d references", n)
	}
}

// compile compiles all schemas of a document, as those of JSON Schema 2020-12,
// which is what OpenAPI 3.1 has.
func compile(t *testing.T, doc map[string]any) map[string]*jsonschema.Schema {
	t.Helper()
	c := jsonschema.NewCompiler()
	c.DefaultDraft(jsonschema.Draft2020)
	c.AssertFormat()
	if err := c.AddResource("mem:///doc", doc); err != nil {
		t.Fatal(err)
	}
	all := map[string]*jsonschema.Schema{}
	for key := range doc["components"].(map[string]any)["schemas"].(map[string]any) {
		s, err := c.Compile("mem:///doc#/components/schemas/" + key)
		if err != nil {
			t.Errorf("%s: %v", key, err)
			continue
		}
		all[key] = s
	}
	return all
}

// samples are messages of every kind of field.
func samples() []proto.Message {
	now := timestamppb.Now()
	return []proto.Message{
		&dunlinv1.LoginRequest{Name: "a", Password: "b"},
		&dunlinv1.LoginResponse{Token: "t", ExpiresAt: now},
		&dunlinv1.CreateJoinTokenRequest{Uses: 3, ValidFor: durationpb.New(1500e6), Labels: map[string]string{"site": "a"}},
		&dunlinv1.Event{Kind: "worker.died", Severity: dunlinv1.Severity_SEVERITY_ERROR, Version: -1, Sequence: 1 << 60, Alarm: &dunlinv1.Alarm{Kind: "xid"}},
		&dunlinv1.Telemetry{CpuUtilisation: new(0.5), MemoryUsedBytes: new(uint64(1) << 63), At: now, Gpus: []*dunlinv1.GpuTelemetry{{Index: 1, RemapPending: new(false)}}},
	}
}

// valid: a message in protobuf's JSON is as its schema says, and with a field
// more is not.
func valid(t *testing.T, all map[string]*jsonschema.Schema, m proto.Message) {
	t.Helper()
	key := name(m.ProtoReflect().Descriptor())
	s := all[key]
	if s == nil {
		t.Errorf("%s has no schema", key)
		return
	}
	text, err := protojson.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	v, err := jsonschema.UnmarshalJSON(bytes.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Validate(v); err != nil {
		t.Errorf("%s: %s: %v", key, text, err)
	}
	v.(map[string]any)["teapot"] = true
	if s.Validate(v) == nil {
		t.Errorf("%s: a field that is not there was taken", key)
	}
}
