package profiles

import (
	"encoding/json"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"
	"github.com/santhosh-tekuri/jsonschema/v6"
)

// schema is what the test knows of JSON Schema.
type schema struct {
	Type                 any // a string, or several
	Properties           map[string]*schema
	AdditionalProperties any
	Required             []string
	Items                *schema
	Enum                 []string
	Pattern              string
	Minimum, Maximum     *float64
	AnyOf                []*schema
	Const                *float64
	MaxItems             int
}

// compare goes through the variables of a profile and the schema side by side.
func compare(t *testing.T, s *schema, typ reflect.Type, kind string, seen map[string]bool) {
	t.Helper()
	if s == nil {
		t.Errorf("%s is not in the schema", kind)
		return
	}
	seen[kind] = true
	want := map[reflect.Kind]string{
		reflect.Struct: "object", reflect.Map: "object", reflect.Slice: "array", reflect.String: "string", reflect.Bool: "boolean",
		reflect.Int: "integer", reflect.Int64: "integer", reflect.Float64: "number",
	}[typ.Kind()]
	if s.Type != want {
		t.Errorf("%s is of type %v in the schema, it is %s", kind, s.Type, want)
	}
	switch typ.Kind() {
	case reflect.Struct:
		if s.AdditionalProperties != false {
			t.Errorf("%s may have any keys in the schema", kind)
		}
		for f := range typ.Fields() {
			key := f.Tag.Get("yaml")
			field := join(kind, key)
			if slices.Contains(required, field) != slices.Contains(s.Required, key) {
				t.Errorf("%s is required by one of profile and schema", field)
			}
			compare(t, s.Properties[key], f.Type, field, seen)
		}
		for key := range s.Properties {
			if field := join(kind, key); !seen[field] {
				t.Errorf("%s is not in the profile", field)
			}
		}
	case reflect.Slice:
		if s.MaxItems != maxList {
			t.Errorf("%s may have %d entries in the schema, allowed are %d", kind, s.MaxItems, maxList)
		}
		compare(t, s.Items, typ.Elem(), kind+"[]", seen)
	case reflect.String:
		if !slices.Equal(s.Enum, choices[kind]) {
			t.Errorf("%s is one of %v in the schema, of %v here", kind, s.Enum, choices[kind])
		}
		pattern := ""
		if f, ok := forms[kind]; ok {
			pattern = f.pattern.String()
		}
		if s.Pattern != pattern {
			t.Errorf("%s matches %q in the schema, %q here", kind, s.Pattern, pattern)
		}
	case reflect.Int, reflect.Int64, reflect.Float64:
		b, ok := bounds[kind]
		if !ok {
			t.Errorf("%s has no bounds", kind)
		}
		if b.orZero {
			if len(s.AnyOf) != 2 || s.AnyOf[0].Const == nil || *s.AnyOf[0].Const != 0 {
				t.Errorf("%s may be 0, which the schema does not say", kind)
				return
			}
			s = s.AnyOf[1]
		}
		if s.Minimum == nil || s.Maximum == nil || *s.Minimum != b.least || *s.Maximum != b.most {
			t.Errorf("%s: the schema's bounds are not %s", kind, b)
		}
	}
}

func TestSchemaIsTheProfile(t *testing.T) {
	raw, err := os.ReadFile("schema.json")
	if err != nil {
		t.Fatal(err)
	}
	var s schema
	if err := json.Unmarshal(raw, &s); err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	compare(t, &s, reflect.TypeFor[Profile](), "", seen)
	for kind := range bounds {
		if !seen[kind] {
			t.Errorf("bounds of %s, which is not in the profile", kind)
		}
	}
	for kind := range forms {
		if !seen[kind] {
			t.Errorf("form of %s, which is not in the profile", kind)
		}
	}
	for kind := range choices {
		if !seen[kind] {
			t.Errorf("choices of %s, which is not in the profile", kind)
		}
	}
	for _, kind := range required {
		if !seen[kind] {
			t.Errorf("%s is required, which is not in the profile", kind)
		}
	}
}

// compiled gives the schema, which is one by its own schema.
func compiled(t *testing.T) *jsonschema.Schema {
	t.Helper()
	s, err := jsonschema.NewCompiler().Compile("schema.json")
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestFilesAgainstSchema(t *testing.T) {
	s := compiled(t)
	entries, err := builtIn.ReadDir(".")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		b, err := builtIn.ReadFile(e.Name())
		if err != nil {
			t.Fatal(err)
		}
		if err := validate(s, b); err != nil {
			t.Errorf("%s: %v", e.Name(), err)
		}
	}
}

func validate(s *jsonschema.Schema, text []byte) error {
	raw, err := yaml.YAMLToJSON(text)
	if err != nil {
		return err
	}
	value, err := jsonschema.UnmarshalJSON(strings.NewReader(string(raw)))
	if err != nil {
		return err
	}
	return s.Validate(value)
}

// What one file's fields say by themselves, schema and reader see alike.
func TestSchemaRefusesWhatTheReaderDoes(t *testing.T) {
	good, err := builtIn.ReadFile("raspberry-pi-5.yaml")
	if err != nil {
		t.Fatal(err)
	}
	s := compiled(t)
	for _, tt := range []struct {
		old, new string
		refused  bool
	}{
		{"threads: 4", "threads: 8", false}, {"threads: 4", "affinity: 0-3", false}, {"threads: 4", "threads: -1", true}, {"threads: 4", "thread: 4", true},
		{"threads: 4", "threads: many", true}, {"arch: arm64", "arch: aarch64", true}, {"host_fraction: 0.6", "host_fraction: 60", true},
		{"host_fraction: 0.6", "host_bytes: 1073741824", true}, {"limit_watts: 12", "limit_watts: 12W", true}, {"limit_watts: 12", "limit_watts: 12000000", true},
		{"FP16", "half", true}, {"name: CPUExecutionProvider", "name: CPU", true}, {"- name: CPUExecutionProvider", "[]", true},
		{"outbox_events: 10000", "outbox_events: 0", true}, {"reserve_bytes: 536870912", "reserve_bytes: 0", false}, {"reserve_bytes: 536870912", "reserve_bytes: 512", true},
		{"telemetry: [hwmon", "telemetry: [ipmi", true}, {"name: raspberry-pi-5", "name: Raspberry_Pi", true}, {"warn_celsius: 75", "warn_celsius: 5", true},
		{"description:", "sources: []\ndescribed:", true},
	} {
		text := strings.Replace(string(good), tt.old, tt.new, 1)
		if text == string(good) {
			t.Fatalf("%q is not in the file", tt.old)
		}
		err := validate(s, []byte(text))
		var f file
		faults := f.parse(text)
		if (err != nil) != tt.refused || (len(faults) > 0) != tt.refused {
			t.Errorf("%q for %q: schema %v, reader %v", tt.new, tt.old, err, faults)
		}
	}
}
