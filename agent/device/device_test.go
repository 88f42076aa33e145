package device

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unicode/utf8"
)

func TestInfo(t *testing.T) {
	d := Open(Config{Dir: t.TempDir()})
	defer d.Close()
	info := d.Info()
	if info.Hostname == "" || info.Kernel == "" || info.CpuCount == 0 || info.MemoryBytes == 0 || info.DiskBytes == 0 {
		t.Errorf("incomplete: %v", info)
	}
}

func TestSample(t *testing.T) {
	d := Open(Config{Dir: t.TempDir()})
	defer d.Close()
	got := d.Sample()
	if got.MemoryTotalBytes == nil || *got.MemoryUsedBytes == 0 || *got.MemoryUsedBytes > *got.MemoryTotalBytes {
		t.Errorf("memory: %v", got)
	}
	if got.AgentAnonymousBytes == nil || *got.AgentAnonymousBytes == 0 || got.DiskFreeBytes == nil {
		t.Errorf("absent: %v", got)
	}
	// A child counts as well.
	child := exec.CommandContext(t.Context(), "cat")
	in, err := child.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	own, err := Anonymous(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	if with := d.root.anonymous(); with == nil || *with <= own {
		t.Errorf("with a child %v bytes, %d without", with, own)
	}
	if err := errors.Join(in.Close(), child.Wait()); err != nil {
		t.Error(err)
	}
	d.dir = filepath.Join(d.dir, "missing")
	if got := d.sample(time.Now()); got.DiskFreeBytes != nil {
		t.Errorf("of a missing folder: %v", got)
	}
}

func TestUtilisation(t *testing.T) {
	tests := []struct {
		before, now processor
		want        float64 // below 0: absent
	}{
		{processor{10, 100}, processor{15, 120}, 0.25},
		{processor{10, 100}, processor{10, 120}, 0},
		{processor{10, 100}, processor{10, 100}, -1},
		{processor{10, 100}, processor{5, 120}, -1},
		{processor{10, 100}, processor{40, 120}, -1},
	}
	for _, tt := range tests {
		got := utilisation(tt.before, tt.now)
		if (got == nil) != (tt.want < 0) || (got != nil && *got != tt.want) {
			t.Errorf("from %v to %v: %v, want %v", tt.before, tt.now, got, tt.want)
		}
	}
}

func TestParse(t *testing.T) {
	p, err := parseProcessor("cpu  100 1 20 300 40 5 6 7 8 9\ncpu0 1 2 3\n")
	if err != nil || p != (processor{busy: 139, total: 479}) {
		t.Errorf("stat: %v, %v", p, err)
	}
	m, err := parseMemory("MemTotal:  1000 kB\nMemFree: 1 kB\nMemAvailable:     400 kB\n")
	if err != nil || m != (memory{total: 1000 << 10, used: 600 << 10}) {
		t.Errorf("meminfo: %v, %v", m, err)
	}
	for _, s := range []string{"", "cpu", "cpu 1 2 x 4", "intr 1 2 3 4 5"} {
		if p, err := parseProcessor(s); err == nil {
			t.Errorf("stat %q gives %v", s, p)
		}
	}
	for _, s := range []string{"", "MemTotal: 5 kB\n", "MemTotal: 5 kB\nMemAvailable: 6 kB\n", "MemTotal: 5\nMemAvailable: 1\n"} {
		if m, err := parseMemory(s); err == nil {
			t.Errorf("meminfo %q gives %v", s, m)
		}
	}
	if got := cpuModel("processor\t: 0\nmodel name\t: Fast CPU @ 3 GHz: yes\n"); got != "Fast CPU @ 3 GHz: yes" {
		t.Errorf("cpuinfo: %q", got)
	}
	if got := cpuModel("processor\t: 0\nHardware\t: BCM2835\nModel\t: Pi 4\n"); got != "Pi 4" {
		t.Errorf("cpuinfo of a board: %q", got)
	}
}

func FuzzParse(f *testing.F) {
	f.Add("0x01 0x0b\n")
	f.Add("  48500\n")
	f.Add("cpu  100 1 20 300 40 5 6 7 8 9\n")
	f.Add("MemTotal:  1000 kB\nMemAvailable:     400 kB\n")
	f.Add("model name\t: Fast CPU\n")
	f.Fuzz(func(t *testing.T, s string) {
		if p, err := parseProcessor(s); err == nil && p.busy > p.total {
			t.Errorf("stat %q gives %v", s, p)
		}
		if m, err := parseMemory(s); err == nil && m.used > m.total {
			t.Errorf("meminfo %q gives %v", s, m)
		}
		if worn, ok := parseLifeTime(s); ok && !(worn >= 0 && worn <= 1) {
			t.Errorf("life_time %q gives %v", s, worn)
		}
		if n, err := parseNumber(s); err == nil && strings.Trim(strings.TrimSpace(s), "+-0123456789") != "" {
			t.Errorf("number %q gives %d", s, n)
		}
		if line := firstLine([]byte(s)); strings.ContainsAny(line, "\x00\n") || !utf8.ValidString(line) {
			t.Errorf("first line of %q: %q", s, line)
		}
		cpuModel(s)
	})
}
