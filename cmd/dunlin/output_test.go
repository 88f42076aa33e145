package main

import (
	"bytes"
	"strings"
	"testing"

	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// TestFormats: each format of a list, and of one thing.
func TestFormats(t *testing.T) {
	two := &table{header: []string{"A", "B"}, wide: []string{"C"}}
	two.add("1", "", "3")
	models := &dunlinv1.ListModelsResponse{Versions: []*dunlinv1.ModelVersion{{Model: "digits", Version: 1}, {Model: "fa\x1bces", Version: 2}}}
	for _, test := range []struct {
		f    format
		v    view
		want string // its beginning
	}{
		{"table", view{table: func() *table { return two }}, "A  B\n1  -\n"},
		{"wide", view{table: func() *table { return two }}, "A  B  C\n1  -  3\n"},
		{"name", viewOf(models, nil), "digits:1\nfa\ufffdces:2\n"},
		{"jsonl", viewOf(models, nil), `{"model":"digits","version":"1",`},
		{"json", viewOf(models, nil), "{\n  \"versions\": [\n"},
		{"yaml", viewOf(models, nil), "versions:\n- model: digits\n"},
		{"yaml", view{whole: models, documents: []string{"a: 1", "b: 2\n"}}, "a: 1\n---\nb: 2\n"},
		{"name", viewOf(&dunlinv1.Rollout{Id: "digits-1"}, nil), "digits-1\n"},
		{"jsonl", viewOf(&dunlinv1.ListDevicesResponse{}, nil), ""},
		{"name", viewOf(&dunlinv1.ListAuditResponse{Records: []*dunlinv1.AuditRecord{{Number: 7}}}, nil), "7\n"},
	} {
		var out bytes.Buffer
		c := &cli{out: &out}
		if err := c.show(test.f, test.v); err != nil {
			t.Errorf("%s: %v", test.f, err)
		}
		if !strings.HasPrefix(out.String(), test.want) || test.want == "" && out.Len() > 0 {
			t.Errorf("%s: got %q, want %q", test.f, out.String(), test.want)
		}
		if test.f == "jsonl" {
			for line := range strings.Lines(out.String()) {
				if !strings.HasPrefix(line, "{") || !strings.HasSuffix(line, "}\n") {
					t.Errorf("a line of jsonl is %q", line)
				}
			}
		}
	}
	c := &cli{out: &bytes.Buffer{}}
	if err := c.show("name", viewOf(&dunlinv1.ListEventsResponse{Events: []*dunlinv1.DeviceEvent{{}}}, nil)); exitCode(err) != exitUsage {
		t.Errorf("names of events: %v", err)
	}
}
