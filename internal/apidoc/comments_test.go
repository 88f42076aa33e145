// Package apidoc writes docs/protocol from what the programs speak, and holds
// it to that. It has tests only.
package apidoc

import (
	"bufio"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// comments gives the comment before each message, field, service, method, enum
// and value of the .proto files of dunlin.v1, by full name. Descriptors that are
// linked into a program have none.
func comments(t *testing.T) map[string]string {
	t.Helper()
	files, err := filepath.Glob("../../proto/dunlin/v1/*.proto")
	if err != nil || len(files) == 0 {
		t.Fatalf("no .proto files: %v", err)
	}
	all := map[string]string{}
	for _, path := range files {
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		readComments(f, all)
		f.Close()
	}
	return all
}

var (
	opens = regexp.MustCompile(`^(message|enum|service|oneof|rpc) (\w+)`)
	field = regexp.MustCompile(`^(?:(?:optional|repeated) )?(?:[\w.]+|map<[^>]*>) +(\w+) = \d+`)
	value = regexp.MustCompile(`^(\w+) = \d+`)
)

// readComments takes in one file. It knows the form that buf gives files:
// comments before what they speak of, a declaration to a line.
func readComments(f *os.File, all map[string]string) {
	const root = "dunlin.v1"
	type level struct{ kind, name string }
	at := []level{{"", root}}
	var text []string
	for in := bufio.NewScanner(f); in.Scan(); {
		line := strings.TrimSpace(in.Text())
		if c, ok := strings.CutPrefix(line, "//"); ok {
			text = append(text, strings.TrimSpace(c))
			continue
		}
		line, _, _ = strings.Cut(line, " //")
		here := at[len(at)-1]
		name := ""
		if m := opens.FindStringSubmatch(line); m != nil {
			name = here.name + "." + m[2]
			if strings.HasSuffix(line, "{") {
				at = append(at, level{m[1], name})
				if m[1] == "oneof" {
					at[len(at)-1].name = here.name // its fields are the message's
				}
			}
		} else if m := field.FindStringSubmatch(line); m != nil {
			name = here.name + "." + m[1]
		} else if m := value.FindStringSubmatch(line); m != nil && here.kind == "enum" {
			name = here.name + "." + m[1]
		}
		if name != "" && len(text) > 0 {
			all[name] = strings.Join(text, " ")
		}
		if line == "}" && len(at) > 1 {
			at = at[:len(at)-1]
		}
		text = nil
	}
}
