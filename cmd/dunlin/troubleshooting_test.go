package main

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// sources calls f with each Go file below a folder that is no test.
func sources(t *testing.T, folder string, f func(path string, file *ast.File)) {
	t.Helper()
	err := filepath.WalkDir(folder, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return err
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ParseComments)
		if err == nil {
			f(path, file)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// text gives the string that an expression is, if it is a literal.
func text(e ast.Expr) string {
	l, ok := e.(*ast.BasicLit)
	if !ok || l.Kind != token.STRING {
		return ""
	}
	s, _ := strconv.Unquote(l.Value)
	return s
}

// eventKinds gives the kinds of events that agents make.
func eventKinds(t *testing.T) []string {
	kind := regexp.MustCompile(`^[a-z-]+\.[a-z]+$`)
	var kinds []string
	sources(t, "../../agent", func(_ string, file *ast.File) {
		ast.Inspect(file, func(n ast.Node) bool {
			var at []ast.Expr
			switch n := n.(type) {
			case *ast.KeyValueExpr: // Kind: "a.b"
				if k, ok := n.Key.(*ast.Ident); ok && k.Name == "Kind" {
					at = []ast.Expr{n.Value}
				}
			case *ast.AssignStmt: // kind := "a.b", e.Kind = "a.b"
				for i, l := range n.Lhs {
					name, ok := l.(*ast.Ident)
					if s, is := l.(*ast.SelectorExpr); is {
						name, ok = s.Sel, true
					}
					if ok && strings.EqualFold(name.Name, "kind") {
						at = append(at, n.Rhs[min(i, len(n.Rhs)-1)])
					}
				}
			case *ast.CallExpr: // r.event("a.b", ...)
				if s, ok := n.Fun.(*ast.SelectorExpr); ok && s.Sel.Name == "event" {
					at = n.Args
				}
			}
			for _, e := range at {
				if s := text(e); kind.MatchString(s) && !slices.Contains(kinds, s) {
					kinds = append(kinds, s)
				}
			}
			return true
		})
	})
	slices.Sort(kinds)
	return kinds
}

// alarmKinds gives the constants below "Kinds of alarms." in agent/alarm.
func alarmKinds(t *testing.T) (kinds []string) {
	sources(t, "../../agent/alarm", func(_ string, file *ast.File) {
		for _, d := range file.Decls {
			g, ok := d.(*ast.GenDecl)
			if !ok || g.Tok != token.CONST || !strings.HasPrefix(g.Doc.Text(), "Kinds of alarms.") {
				continue
			}
			for _, s := range g.Specs {
				for _, v := range s.(*ast.ValueSpec).Values {
					kinds = append(kinds, text(v))
				}
			}
		}
	})
	return kinds
}

// section gives what a page has below a heading of the second level.
func section(t *testing.T, page, heading string) string {
	t.Helper()
	_, rest, ok := strings.Cut(page, "\n## "+heading+"\n")
	if !ok {
		t.Fatalf("no heading %q", heading)
	}
	rest, _, _ = strings.Cut(rest, "\n## ")
	return rest
}

// rowsOf gives the names in code in the first column of the tables of a section.
func rowsOf(section string) (names []string) {
	for line := range strings.Lines(section) {
		first, ok := strings.CutPrefix(line, "| `")
		if !ok {
			continue
		}
		first, _, _ = strings.Cut(first, " |")
		for name := range strings.SplitSeq("`"+first, "`, `") {
			names = append(names, strings.Trim(name, "`"))
		}
	}
	return names
}

// TestTroubleshooting: docs/troubleshooting.md has each kind of alarm and of
// event, and no other, and the messages in it are those of the programs.
func TestTroubleshooting(t *testing.T) {
	b, err := os.ReadFile("../../docs/troubleshooting.md")
	if err != nil {
		t.Fatal(err)
	}
	page := string(b)
	events := append(eventKinds(t), "gap") // made by the outbox
	slices.Sort(events)
	for heading, want := range map[string][]string{"Alarms": alarmKinds(t), "Events": events} {
		have := rowsOf(section(t, page, heading))
		if len(want) < 10 {
			t.Errorf("%s: found only %q in the code", heading, want)
		}
		for _, kind := range want {
			if !slices.Contains(have, kind) {
				t.Errorf("docs/troubleshooting.md: %s: %q is missing", heading, kind)
			}
		}
		for _, kind := range have {
			if !slices.Contains(want, kind) {
				t.Errorf("docs/troubleshooting.md: %s: no agent makes %q", heading, kind)
			}
		}
	}
	var said strings.Builder
	for _, folder := range []string{"../../agent", "../../controller", "../../internal"} {
		sources(t, folder, func(_ string, file *ast.File) {
			ast.Inspect(file, func(n ast.Node) bool {
				if l, ok := n.(*ast.BasicLit); ok {
					said.WriteString(text(l) + "\n")
				}
				return true
			})
		})
	}
	for _, heading := range []string{"A device does not come", "A version does not serve", "Requests are refused"} {
		messages := rowsOf(section(t, page, heading))
		if len(messages) < 4 {
			t.Errorf("%s: found only %q", heading, messages)
		}
		for _, m := range messages {
			if m == "--listen chooses another address" {
				continue // tested where the address is taken
			}
			if !strings.Contains(said.String(), m) {
				t.Errorf("docs/troubleshooting.md: %s: no program says %q", heading, m)
			}
		}
	}
}

// anchors gives those of a page's headings.
func anchors(page string) (all []string) {
	for line := range strings.Lines(page) {
		if level, heading, ok := strings.Cut(strings.TrimSpace(line), " "); ok && level != "" && strings.Trim(level, "#") == "" {
			clean := regexp.MustCompile(`[^\p{L}\p{N}_ -]`).ReplaceAllString(strings.ToLower(heading), "")
			all = append(all, strings.ReplaceAll(clean, " ", "-"))
		}
	}
	return all
}

// TestDocsLinks: pages link to pages and headings that there are.
func TestDocsLinks(t *testing.T) {
	link := regexp.MustCompile(`\]\(([^)#\s]*)(?:#([^)\s]*))?\)`)
	for _, p := range readPages(t) {
		for _, m := range link.FindAllStringSubmatch(p.text, -1) {
			if strings.Contains(m[1], "://") {
				continue
			}
			to := p.path
			if m[1] != "" {
				to = filepath.Join(filepath.Dir(p.path), m[1])
			}
			if _, err := os.Stat(to); err != nil {
				t.Errorf("%s: %s: there is no %s", p.path, m[0], to)
				continue
			}
			if m[2] == "" {
				continue
			}
			page, err := os.ReadFile(to)
			if err != nil {
				t.Errorf("%s: %v", p.path, err)
			} else if !slices.Contains(anchors(string(page)), m[2]) {
				t.Errorf("%s: %s: %s has no such heading", p.path, m[0], to)
			}
		}
	}
}
