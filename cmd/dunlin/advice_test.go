package main

import (
	"slices"
	"testing"
)

func TestNearest(t *testing.T) {
	names := []string{"cam-1", "cam-2", "cam-10", "door-1", "a"}
	for name, want := range map[string][]string{
		"cam1":   {"cam-1"},
		"cma-2":  {"cam-2"},
		"CAM-2":  {"cam-2", "cam-1"},
		"cam-3":  {"cam-1", "cam-2"},
		"teapot": nil,
		"b":      {"a"},
		"":       {"a"},
	} {
		if got := nearest(name, names); !slices.Equal(got, want) {
			t.Errorf("%q: got %q, want %q", name, got, want)
		}
	}
	for _, c := range []struct {
		a, b string
		want int
	}{{"", "", 0}, {"abc", "", 3}, {"", "ab", 2}, {"abc", "acb", 1}, {"kitten", "sitting", 3}, {"ü", "u", 1}} {
		if got, back := distance(c.a, c.b), distance(c.b, c.a); got != c.want || back != c.want {
			t.Errorf("%q to %q: %d and %d, want %d", c.a, c.b, got, back, c.want)
		}
	}
}
