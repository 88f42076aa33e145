package identity

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	v1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

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
