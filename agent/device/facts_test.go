package device

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"

	profiles "github.com/dunlin/dunlin/firmware-profiles"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// files makes a root folder with files in it.
func files(t *testing.T, all map[string]string) string {
	t.Helper()
	root := t.TempDir()
	for path, text := range all {
		path = filepath.Join(root, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

func TestFacts(t *testing.T) {
	l4 := &dunlinv1.GpuInfo{Name: "NVIDIA L4", ComputeCapability: "8.9"}
	for _, tt := range []struct {
		name  string
		files map[string]string
		info  *dunlinv1.DeviceInfo
		want  profiles.Facts
		board string
		class string
	}{
		{"Raspberry Pi 5", map[string]string{
			"proc/device-tree/compatible": "raspberrypi,5-model-b\x00brcm,bcm2712\x00",
			"proc/device-tree/model":      "Raspberry Pi 5 Model B Rev 1.0\x00",
		}, &dunlinv1.DeviceInfo{Arch: "arm64"},
			profiles.Facts{Arch: "arm64", DeviceTree: []string{"raspberrypi,5-model-b", "brcm,bcm2712", "Raspberry Pi 5 Model B Rev 1.0"}},
			"Raspberry Pi 5 Model B Rev 1.0", "raspberry-pi-5"},
		{"Orin Nano", map[string]string{
			"proc/device-tree/compatible":     "nvidia,p3768-0000+p3767-0005\x00nvidia,p3767-0005\x00nvidia,tegra234\x00",
			"proc/device-tree/model":          "NVIDIA Jetson Orin Nano Developer Kit\x00",
			"sys/class/dmi/id/sys_vendor":     "NVIDIA\n",
			"sys/class/dmi/id/product_name":   "NVIDIA Jetson Orin Nano Developer Kit\n",
			"sys/class/dmi/id/product_serial": "1424325050123\n",
		}, &dunlinv1.DeviceInfo{Arch: "arm64", RuntimeVersion: "1.30.0"},
			profiles.Facts{
				Arch: "arm64", DeviceTree: []string{"nvidia,p3768-0000+p3767-0005", "nvidia,p3767-0005", "nvidia,tegra234", "NVIDIA Jetson Orin Nano Developer Kit"},
				DMI: "NVIDIA/NVIDIA Jetson Orin Nano Developer Kit", Runtime: "1.30.0",
			}, "NVIDIA Jetson Orin Nano Developer Kit", "jetson-orin-nano-8gb"},
		{"a server with a GPU", map[string]string{
			"sys/class/dmi/id/sys_vendor":   "Dell Inc.\n",
			"sys/class/dmi/id/product_name": "PowerEdge R7615\n",
		}, &dunlinv1.DeviceInfo{Arch: "amd64", Gpus: []*dunlinv1.GpuInfo{l4}, DriverVersion: "550.54.14"},
			profiles.Facts{Arch: "amd64", DMI: "Dell Inc./PowerEdge R7615", GPUs: []profiles.GPU{{Name: "NVIDIA L4", ComputeCapability: "8.9"}}, Driver: "550.54.14"},
			"Dell Inc. PowerEdge R7615", "nvidia-l4"},
		{"a slash in a name", map[string]string{"sys/class/dmi/id/sys_vendor": "A/B", "sys/class/dmi/id/product_name": "C/D"}, &dunlinv1.DeviceInfo{Arch: "amd64"},
			profiles.Facts{Arch: "amd64", DMI: "A-B/C-D"}, "A/B C/D", "generic-x86-64"},
		{"nothing", nil, &dunlinv1.DeviceInfo{Arch: "amd64"}, profiles.Facts{Arch: "amd64"}, "", "generic-x86-64"},
	} {
		root := files(t, tt.files)
		got := factsAt(root, tt.info)
		if diff := cmp.Diff(tt.want, got); diff != "" {
			t.Errorf("%s: %s", tt.name, diff)
		}
		if b := readBoard(root).String(); b != tt.board {
			t.Errorf("%s: board %q, want %q", tt.name, b, tt.board)
		}
		set, err := profiles.Load()
		if err != nil {
			t.Fatal(err)
		}
		if m, err := set.Match(got); err != nil || m.Profile.Name != tt.class {
			t.Errorf("%s: class %q, %v, want %q", tt.name, m.Profile.Name, err, tt.class)
		}
	}
}

func TestFactsAreBounded(t *testing.T) {
	root := files(t, map[string]string{
		"proc/device-tree/compatible":   strings.Repeat("a\x00", 1<<20),
		"proc/device-tree/model":        strings.Repeat("m", 1<<20),
		"sys/class/dmi/id/product_name": "\x1b[31mred\xff\n",
	})
	b := readBoard(root)
	if len(b.compatible) != maxCompatible || len(b.model) != maxIdentity || b.product != "[31mred" {
		t.Errorf("%d entries, %d bytes, %q", len(b.compatible), len(b.model), b.product)
	}
}

func FuzzBoard(f *testing.F) {
	f.Add("nvidia,p3768-0000+p3767-0005\x00nvidia,p3767-0005\x00nvidia,tegra234\x00")
	f.Add("\x00\x00 \n\xff\x1b")
	f.Fuzz(func(t *testing.T, s string) {
		all := entries(s)
		if len(all) > maxCompatible {
			t.Errorf("%d entries", len(all))
		}
		for _, e := range append(all, printable(s)) {
			if strings.ContainsAny(e, "\x00\n\x1b") || !utf8.ValidString(e) || len(e) > len(s) {
				t.Errorf("%q of %q", e, s)
			}
		}
	})
}
