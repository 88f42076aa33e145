// Package dunlin holds the rules that the structure of this module keeps.
package dunlin

import (
	"bytes"
	"encoding/json"
	"errors"
	"go/parser"
	"go/token"
	"io"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/dunlin/dunlin"

type pkg struct {
	ImportPath, Dir   string
	Standard          bool
	Deps              []string
	GoFiles, CgoFiles []string
}

// load lists every package of the module and everything that they import.
func load(t *testing.T) map[string]*pkg {
	t.Helper()
	var stderr bytes.Buffer
	cmd := exec.CommandContext(t.Context(), "go", "list", "-deps", "-json=ImportPath,Dir,Standard,Deps,GoFiles,CgoFiles", "./...")
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v\n%s", err, &stderr)
	}
	all := map[string]*pkg{}
	for dec := json.NewDecoder(bytes.NewReader(out)); ; {
		p := new(pkg)
		if err := dec.Decode(p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		all[p.ImportPath] = p
	}
	return all
}

// within says whether path is the package root, or lies below it.
func within(path, root string) bool {
	return path == module+"/"+root || strings.HasPrefix(path, module+"/"+root+"/")
}

// A rule forbids packages below one of from to depend, even indirectly, on
// what bad matches.
type rule struct {
	from   []string
	bad    func(*pkg) bool
	what   string
	reason string
}

func below(roots ...string) func(*pkg) bool {
	return func(p *pkg) bool {
		return slices.ContainsFunc(roots, func(r string) bool { return within(p.ImportPath, r) })
	}
}

func cgo(p *pkg) bool { return !p.Standard && len(p.CgoFiles) > 0 }

func netOrSQL(p *pkg) bool {
	return p.ImportPath == "net" || p.ImportPath == "net/http" || p.ImportPath == "database/sql" || strings.HasPrefix(p.ImportPath, "modernc.org/sqlite")
}

var rules = []rule{
	{[]string{"agent", "cmd/dunlin-agent", "bench/footprint"}, below("controller"), "controller",
		"a device must build, start and serve without anything of the cloud side"},
	{[]string{"controller", "cmd/dunlin-controller", "cmd/dunlin"}, below("agent"), "agent",
		"the cloud side knows devices by their messages only"},
	{[]string{"controller", "cmd/dunlin-controller", "cmd/dunlin"}, cgo, "cgo",
		"controller and command line are static binaries"},
	{[]string{"agent/engine", "agent/alarm", "agent/datadrift", "agent/profile", "internal/policy", "internal/estimate", "internal/sketch", "internal/audit", "controller/fleet"}, cgo, "cgo",
		"decisions are pure functions that run in simulated time"},
	{[]string{"agent/engine", "agent/alarm", "agent/datadrift", "agent/profile", "internal/policy", "internal/estimate", "internal/sketch", "internal/audit", "controller/fleet"}, netOrSQL, "net or SQL",
		"decisions are pure functions that run in simulated time"},
	{[]string{"agent/follow", "agent/identity", "agent/inband", "agent/reconcile", "agent/site", "agent/state", "agent/update", "agent/sim", "agent/simfleet", "internal/link", "internal/netem"}, cgo, "cgo",
		"the control half of an agent runs by the thousand in one process of a simulated fleet"},
	{[]string{"agent/compiled"}, cgo, "cgo",
		"the process that keeps compiled models never opens one"},
	{[]string{"internal/audit", "internal/link", "internal/pki", "internal/policy", "internal/estimate", "internal/sketch", "internal/strictyaml", "internal/program", "internal/telemetry"}, below("agent", "controller", "cmd"), "a side",
		"what both sides share cannot lean on one of them"},
	{[]string{"internal/plot"}, below("agent", "controller", "cmd"), "a side",
		"the command line and the controller draw the same figures"},
	{[]string{"internal/plot"}, netOrSQL, "net or SQL",
		"a figure is a pure function of what it shows"},
	{[]string{"models", "proto", "firmware-profiles"}, below("agent", "controller", "cmd", "internal"), "anything above",
		"formats and the wire are the ground that everything stands on"},
	{[]string{"agent", "controller", "internal/link", "internal/policy", "internal/program", "internal/telemetry", "cmd"}, below("internal/e2e"), "internal/e2e",
		"the programs do not contain their tests"},
}

func TestImports(t *testing.T) {
	all := load(t)
	for _, r := range rules {
		for _, root := range r.from {
			found := false
			for _, p := range all {
				if !within(p.ImportPath, root) {
					continue
				}
				found = true
				for _, d := range append(slices.Clone(p.Deps), p.ImportPath) {
					if dep := all[d]; dep != nil && r.bad(dep) {
						t.Errorf("%s depends on %s: no %s there, because %s", p.ImportPath, d, r.what, r.reason)
					}
				}
			}
			if !found {
				t.Errorf("a rule speaks of %s, where there is no package", root)
			}
		}
	}
}

func TestEveryPackageHasOneComment(t *testing.T) {
	for _, p := range load(t) {
		if p.ImportPath != module && !strings.HasPrefix(p.ImportPath, module+"/") {
			continue
		}
		var in []string
		for _, f := range append(slices.Clone(p.GoFiles), p.CgoFiles...) {
			file, err := parser.ParseFile(token.NewFileSet(), filepath.Join(p.Dir, f), nil, parser.PackageClauseOnly|parser.ParseComments)
			if err != nil {
				t.Fatal(err)
			}
			if file.Doc != nil {
				in = append(in, f)
			}
		}
		if len(p.GoFiles)+len(p.CgoFiles) > 0 && len(in) != 1 {
			t.Errorf("%s has %d package comments %v, want one", p.ImportPath, len(in), in)
		}
	}
}
