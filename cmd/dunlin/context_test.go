package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"
	"github.com/google/go-cmp/cmp"
)

func TestParseContexts(t *testing.T) {
	one := settings{URL: "https://dunlin.example.com:8443", Token: "t", TokenID: "i"}
	for name, test := range map[string]struct {
		text string
		want *contexts // nil: it is refused
	}{
		"nothing": {"", &contexts{Contexts: map[string]settings{}}},
		"old":     {"url: https://dunlin.example.com:8443\ntoken: t\ntoken-id: i\n", &contexts{"dunlin.example.com-8443", map[string]settings{"dunlin.example.com-8443": one}}},
		"new": {"current: a\ncontexts:\n  a:\n    url: https://dunlin.example.com:8443\n    token: t\n    token-id: i\n  b: {url: x, token: y}\n",
			&contexts{"a", map[string]settings{"a": one, "b": {URL: "x", Token: "y"}}}},
		"both":      {"url: x\ncontexts: {a: {url: x, token: y}}\n", nil},
		"bad name":  {"contexts: {A b: {url: x, token: y}}\n", nil},
		"bad CA":    {"contexts: {a: {url: x, token: y, ca: z}}\n", nil},
		"a stray":   {"urls: x\n", nil},
		"not a map": {"one two", nil},
	} {
		got, err := parseContexts([]byte(test.text))
		if test.want == nil {
			if err == nil {
				t.Errorf("%s was taken", name)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if d := cmp.Diff(test.want, got); d != "" {
			t.Errorf("%s: %s", name, d)
		}
		// What is written is read back.
		b, err := yaml.Marshal(got)
		if err != nil {
			t.Fatal(err)
		}
		again, err := parseContexts(b)
		if err != nil || !cmp.Equal(got, again) {
			t.Errorf("%s: written %s, read %v, %v", name, b, again, err)
		}
	}
}

// TestContextsAreBounded: the login that is one too many says what to do, and
// leaves the others as they are.
func TestContextsAreBounded(t *testing.T) {
	nobody(t)
	all := &contexts{Contexts: map[string]settings{}}
	for i := range maxContexts {
		all.Contexts[fmt.Sprintf("c%d", i)] = settings{URL: fmt.Sprintf("https://h%d", i), Token: "t"}
	}
	if err := all.write(); err != nil {
		t.Fatal(err)
	}
	if _, err := new(cli).store(settings{URL: "https://other", Token: "t"}); err == nil || !strings.Contains(err.Error(), "there are 64 contexts stored, allowed are 64") {
		t.Errorf("got %v", err)
	}
	again, err := readContexts()
	if err != nil || !cmp.Equal(all, again) {
		t.Errorf("read %v, %v", again, err)
	}
	path, err := settingsPath()
	if err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(filepath.Clean(path))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
}

func TestHostName(t *testing.T) {
	for url, want := range map[string]string{
		"https://Dunlin.Example.com":         "dunlin.example.com",
		"http://127.0.0.1:8080":              "127.0.0.1-8080",
		"https://[::1]:8443":                 "1--8443",
		"https://bücher.example":             "b-cher.example",
		"":                                   "default",
		"https://" + strings.Repeat("a", 99): strings.Repeat("a", 59),
	} {
		if got := hostName(url); got != want || checkContextName(got) != nil {
			t.Errorf("%s: got %q, want %q", url, got, want)
		}
	}
	c, all := new(cli), &contexts{Contexts: map[string]settings{"h": {URL: "https://h"}, "h-2": {URL: "http://h"}}}
	for url, want := range map[string]string{"https://h/": "h", "http://h": "h-2", "https://h/x": "h-3"} {
		if got := c.place(all, url); got != want {
			t.Errorf("%s: got %q, want %q", url, got, want)
		}
	}
}
