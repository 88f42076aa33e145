package profiles

import (
	"strings"
	"testing"
	"testing/fstest"
)

func TestMatch(t *testing.T) {
	for arch, want := range map[string]string{"amd64": "generic-x86-64", "arm64": "generic-arm64"} {
		p, err := Match(arch)
		if err != nil || p.Name != want || p.Providers[0].Name != "CPUExecutionProvider" {
			t.Errorf("Match(%q) = %+v, %v", arch, p, err)
		}
	}
	if _, err := Match("riscv64"); err == nil || !strings.Contains(err.Error(), `"riscv64"`) || !strings.Contains(err.Error(), "amd64") {
		t.Errorf("unknown architecture: %v", err)
	}
}

func TestEveryFileLoads(t *testing.T) {
	all, err := parseAll(files)
	if err != nil {
		t.Fatal(err)
	}
	entries, err := files.ReadDir(".")
	if err != nil || len(all) != len(entries) {
		t.Errorf("%d profiles of %d files, %v", len(all), len(entries), err)
	}
}

func TestParseRefuses(t *testing.T) {
	good, err := files.ReadFile("generic-arm64.yaml")
	if err != nil {
		t.Fatal(err)
	}
	tests := []struct{ old, new, want string }{
		{"threads: 0", "thread: 0", "thread"},
		{"threads: 0", "threads: 0\nthreads: 1", "threads"},
		{"threads: 0", "threads: -1", "threads: -1"},
		{"threads: 0", "threads: many", "threads"},
		{"host_fraction: 0.5", "host_fraction: 1.5", "memory.host_fraction: 1.5"},
		{"host_fraction: 0.5", "host_fraction: .nan", "memory.host_fraction: NaN"},
		{"- name: CPUExecutionProvider", "[]", "providers"},
		{"arch: arm64", `arch: ""`, "match.arch"},
		{"Any 64-bit Arm machine without a known accelerator", "", "description"},
		{"reserve_bytes: 268435456", "reserve_bytes: -1", "storage.reserve_bytes: -1"},
		{"outbox_events: 10000", "outbox_events: 0", "storage.outbox_events: 0"},
		{"threads: 0", "threads: 0\n---\nname: b", "more than one document"},
		{"name: generic-arm64", "name: other", "name"},
	}
	for _, tt := range tests {
		bad := strings.Replace(string(good), tt.old, tt.new, 1)
		if bad == string(good) {
			t.Fatalf("%q is not in the file", tt.old)
		}
		_, err := parseAll(fstest.MapFS{"generic-arm64.yaml": {Data: []byte(bad)}})
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%q: error %v, want %q", tt.new, err, tt.want)
		}
	}
	twice := fstest.MapFS{
		"generic-arm64.yaml": {Data: good},
		"other.yaml":         {Data: []byte(strings.Replace(string(good), "generic-arm64", "other", 1))},
	}
	if _, err := parseAll(twice); err == nil || !strings.Contains(err.Error(), "match") {
		t.Errorf("two profiles for one architecture: %v", err)
	}
}
