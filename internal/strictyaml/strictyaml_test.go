package strictyaml

import (
	"strings"
	"testing"
)

type settings struct {
	Name  string   `yaml:"name"`
	Ports []int    `yaml:"ports"`
	Sub   struct{} `yaml:"sub"`
}

func TestDecode(t *testing.T) {
	var s settings
	if err := Decode([]byte("name: a\nports: [1, 2]\n"), &s); err != nil || s.Name != "a" || len(s.Ports) != 2 {
		t.Errorf("%+v, %v", s, err)
	}
	for _, empty := range []string{"", "# name: b\n", "\n---\n# nothing\n", "null\n"} {
		if err := Decode([]byte(empty), &s); err != nil || s.Name != "a" {
			t.Errorf("%q: %+v, %v", empty, s, err)
		}
	}
	for text, want := range map[string]string{
		"name: a\ncolour: hunter2": `[2:1] unknown field "colour"`,
		"ports: ! 0000":            "cannot be read", // the decoder panics
		"name: [hunter2":           "[1:7]",
	} {
		err := Decode([]byte(text), new(settings))
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%q: %v, want %q in it", text, err, want)
		}
	}
}

func FuzzDecode(f *testing.F) {
	f.Add([]byte("name: a\nports: [1, 2]\nsub: {}"))
	f.Add([]byte("ports: ! 0"))
	f.Add([]byte("a: &a [*a]\n"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		_ = Decode(raw, new(settings))
		_ = Decode(raw, new([]settings))
		_ = Decode(raw, new(map[string]string))
	})
}
