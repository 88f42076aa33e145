package identity

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	v1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

var update = flag.Bool("update", false, "write docs/access.md")

// procedures lists those of the protocol.
func procedures() (all []string) {
	services := v1.File_dunlin_v1_api_proto.Services()
	for i := range services.Len() {
		s := services.Get(i)
		for j := range s.Methods().Len() {
			all = append(all, fmt.Sprintf("/%s/%s", s.FullName(), s.Methods().Get(j).Name()))
		}
	}
	return all
}

// Each procedure has a rule, and each rule that is a procedure's has one.
func TestEveryProcedureHasARule(t *testing.T) {
	all := procedures()
	for _, p := range all {
		if _, ok := RuleOf(p); !ok {
			t.Errorf("there is no rule for %s", p)
		}
	}
	for _, a := range Actions() {
		name, _, _ := strings.Cut(a, ":")
		if strings.HasPrefix(a, "/") && !slices.Contains(all, name) {
			t.Errorf("the rule for %s is of no procedure", a)
		}
	}
}

// TestMatrix asks every rule for every kind of caller.
func TestMatrix(t *testing.T) {
	berlin := map[string]string{"site": "berlin"}
	callers := map[string]Principal{
		"nobody": {}, "device": {Kind: Device, Name: "cam-1"}, "device with a role": {Kind: Device, Name: "cam-1", Role: Admin},
		"no such role": {Kind: User, Name: "eve", Role: "root"},
	}
	for _, r := range []Role{Viewer, Operator, Admin} {
		callers[string(r)] = Principal{Kind: User, Name: "ada", Role: r}
		callers[string(r)+" of berlin"] = Principal{Kind: User, Name: "ada", Role: r, Scope: berlin}
	}
	cells := 0
	for _, action := range append(Actions(), "/dunlin.v1.Nothing/There") {
		rule, known := RuleOf(action)
		for name, p := range callers {
			for about, labels := range map[string]map[string]string{"nothing": nil, "berlin": {"site": "berlin", "a": "b"}, "rome": {"site": "rome"}, "all": {}} {
				cells++
				want := known && rule.Least == Anyone || known && rule.Devices && p.Kind == Device
				if known && rule.Least != Anyone && p.Kind == User && ranks[p.Role] >= ranks[rule.Least] {
					switch {
					case p.Scope == nil, rule.Scoping == Ignored:
						want = true
					case rule.Scoping == Within:
						want = about == "berlin" || about == "nothing"
					}
				}
				var err error
				if about == "nothing" {
					err = Allow(p, action)
				} else {
					err = Allow(p, action, labels)
				}
				if (err == nil) != want {
					t.Errorf("%s, %s, about %s: %v", action, name, about, err)
				}
				if err != nil && errors.Is(err, ErrUnauthenticated) != (p.Kind == 0) {
					t.Errorf("%s, %s: %v", action, name, err)
				}
			}
		}
	}
	t.Logf("%d cells", cells)
}

// TestAccessPage holds docs/access.md to the rules; -update writes it.
func TestAccessPage(t *testing.T) {
	const path = "../../docs/access.md"
	var page strings.Builder
	page.WriteString(`# Who may do what

Each line is a rule of the controller, and there are no others: what is not here nobody may do. The roles are viewer, operator and admin; each may do what the one before it may. See [users.md](users.md) for roles and scopes.

| action | least role | devices | users with a scope | |
| --- | --- | --- | --- | --- |
`)
	scoping := map[Scoping]string{Ignored: "as without", Within: "within it", Whole: "no"}
	for _, action := range Actions() {
		rule, _ := RuleOf(action)
		least, devices, scope := string(rule.Least), "no", scoping[rule.Scoping]
		if rule.Devices {
			devices = "yes"
		}
		if rule.Least == Anyone {
			least, devices, scope = "none", "yes", "as without"
		}
		name := strings.TrimPrefix(action, "/dunlin.v1.")
		fmt.Fprintf(&page, "| %s | %s | %s | %s | %s |\n", name, least, devices, scope, rule.Note)
	}
	page.WriteString("\nThis page is written by `go test ./controller/identity -run TestAccessPage -update`.\n")
	if *update {
		if err := os.WriteFile(path, []byte(page.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	have, err := os.ReadFile(path)
	if err != nil || string(have) != page.String() {
		t.Errorf("%s is not what the rules say (%v); run: go test ./controller/identity -run TestAccessPage -update", path, err)
	}
}
