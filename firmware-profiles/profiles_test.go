package profiles

import (
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/dunlin/dunlin/models/tensor"
)

func loaded(t *testing.T, dirs ...string) *Set {
	t.Helper()
	s, err := Load(dirs...)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// folder writes files, by name.
func folder(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestBuiltIn(t *testing.T) {
	s := loaded(t)
	entries, err := builtIn.ReadDir(".")
	if err != nil || len(s.Names()) != len(entries) {
		t.Errorf("%v of %d files, %v", s.Names(), len(entries), err)
	}
	for _, name := range []string{
		"generic-x86-64", "generic-arm64", "raspberry-pi-5", "jetson-orin-nano-8gb", "jetson-agx-orin", "jetson-thor",
		"rtx-4000-sff-ada", "nvidia-l4", "nvidia-t4", "nvidia-h200",
	} {
		p, err := s.Named(name)
		if err != nil {
			t.Error(err)
			continue
		}
		if generic := strings.HasPrefix(name, "generic-"); !generic && (len(p.Sources) == 0 || p.Hardware.FP32GFLOPS == 0 || p.Power.LimitWatts == 0) {
			t.Errorf("%s has no sources or figures: %+v", name, p)
		}
		if last := p.Providers[len(p.Providers)-1].Name; last != "CPUExecutionProvider" {
			t.Errorf("%s: the last provider is %s", name, last)
		}
	}
	if _, err := s.Named("jetson"); err == nil || !strings.Contains(err.Error(), "jetson-thor, nvidia-h200") {
		t.Errorf("unknown name: %v", err)
	}
	for _, name := range Precisions {
		if _, err := tensor.ParseType(name); err != nil {
			t.Error(err)
		}
	}
}

// The strings are those that devices of these kinds show.
func TestRecognition(t *testing.T) {
	gpu := func(name, capability string) []GPU { return []GPU{{name, capability}} }
	tests := []struct {
		name string
		f    Facts
		want string
		also string
	}{
		{"Raspberry Pi 5", Facts{Arch: "arm64", DeviceTree: []string{"raspberrypi,5-model-b", "brcm,bcm2712", "Raspberry Pi 5 Model B Rev 1.0"}}, "raspberry-pi-5", "generic-arm64"},
		{"Compute Module 5", Facts{Arch: "arm64", DeviceTree: []string{"raspberrypi,5-compute-module", "brcm,bcm2712", "Raspberry Pi Compute Module 5 Rev 1.0"}}, "raspberry-pi-5", "generic-arm64"},
		{"Raspberry Pi 4", Facts{Arch: "arm64", DeviceTree: []string{"raspberrypi,4-model-b", "brcm,bcm2711", "Raspberry Pi 4 Model B Rev 1.5"}}, "generic-arm64", ""},
		{"Raspberry Pi 5, 32-bit system", Facts{Arch: "arm", DeviceTree: []string{"raspberrypi,5-model-b", "brcm,bcm2712"}}, "", ""},
		{"Orin Nano module", Facts{Arch: "arm64", DeviceTree: []string{"nvidia,p3768-0000+p3767-0003", "nvidia,p3767-0003", "nvidia,tegra234", "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit"}}, "jetson-orin-nano-8gb", "generic-arm64"},
		{"Orin Nano developer kit", Facts{Arch: "arm64", DeviceTree: []string{"nvidia,p3768-0000+p3767-0005", "nvidia,p3767-0005", "nvidia,tegra234", "NVIDIA Jetson Orin Nano Developer Kit"}}, "jetson-orin-nano-8gb", "generic-arm64"},
		{"Orin Nano Super", Facts{Arch: "arm64", DeviceTree: []string{"nvidia,p3768-0000+p3767-0005-super", "nvidia,p3767-0005", "nvidia,tegra234", "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super"}, GPUs: gpu("Orin (nvgpu)", "8.7")}, "jetson-orin-nano-8gb", "generic-nvidia-gpu generic-arm64"},
		{"Orin Nano 4GB", Facts{Arch: "arm64", DeviceTree: []string{"nvidia,p3768-0000+p3767-0004", "nvidia,p3767-0004", "nvidia,tegra234"}}, "generic-arm64", ""},
		{"AGX Orin", Facts{Arch: "arm64", DeviceTree: []string{"nvidia,p3737-0000+p3701-0005", "nvidia,p3701-0005", "nvidia,tegra234", "NVIDIA Jetson AGX Orin Developer Kit"}}, "jetson-agx-orin", "generic-arm64"},
		{"AGX Orin, an older system", Facts{Arch: "arm64", DeviceTree: []string{"nvidia,p3737-0000+p3701-0000", "nvidia,tegra234", "nvidia,tegra23x"}}, "jetson-agx-orin", "generic-arm64"},
		{"AGX Orin of the kernel", Facts{Arch: "arm64", DeviceTree: []string{"nvidia,p3737-0000+p3701-0000", "nvidia,p3701-0000", "nvidia,tegra234", "NVIDIA Jetson AGX Orin Developer Kit"}}, "jetson-agx-orin", "generic-arm64"},
		{"Thor", Facts{Arch: "arm64", DeviceTree: []string{"nvidia,p4071-0000+p3834-0008", "nvidia,p3834-0008", "nvidia,tegra264", "NVIDIA Jetson AGX Thor Developer Kit"}, GPUs: gpu("NVIDIA Thor", "11.0"), Driver: "580.00"}, "jetson-thor", "generic-nvidia-gpu generic-arm64"},
		{"Thor of the kernel", Facts{Arch: "arm64", DeviceTree: []string{"nvidia,p3971-0089+p3834-0008", "nvidia,p3834-0008", "nvidia,tegra264", "NVIDIA P3971-0089+P3834-0008 Engineering Reference Platform"}}, "jetson-thor", "generic-arm64"},
		{"L4 in a Dell", Facts{Arch: "amd64", DMI: "Dell Inc./PowerEdge R7615", GPUs: gpu("NVIDIA L4", "8.9"), Driver: "550.54.14"}, "nvidia-l4", "generic-nvidia-gpu generic-x86-64"},
		{"L4 in an Arm server", Facts{Arch: "arm64", DMI: "GIGABYTE/G242-P33-00", GPUs: gpu("NVIDIA L4", "8.9"), Driver: "550.54.14"}, "nvidia-l4", "generic-nvidia-gpu generic-arm64"},
		{"L40S is no L4", Facts{Arch: "amd64", GPUs: gpu("NVIDIA L40S", "8.9")}, "generic-nvidia-gpu", "generic-x86-64"},
		{"T4 in a Supermicro", Facts{Arch: "amd64", DMI: "Supermicro/SYS-1029GP-TR", GPUs: gpu("Tesla T4", "7.5"), Driver: "535.161.07"}, "nvidia-t4", "generic-nvidia-gpu generic-x86-64"},
		{"H200 in an HPE", Facts{Arch: "amd64", DMI: "HPE/ProLiant XD685", GPUs: gpu("NVIDIA H200", "9.0"), Driver: "570.124.06"}, "nvidia-h200", "generic-nvidia-gpu generic-x86-64"},
		{"H200 NVL, of which the figures differ", Facts{Arch: "amd64", GPUs: gpu("NVIDIA H200 NVL", "9.0")}, "generic-nvidia-gpu", "generic-x86-64"},
		{"RTX 4000 SFF", Facts{Arch: "amd64", DMI: "LENOVO/30E1S00A00", GPUs: gpu("NVIDIA RTX 4000 SFF Ada Generation", "8.9")}, "rtx-4000-sff-ada", "generic-nvidia-gpu generic-x86-64"},
		{"RTX 4000 Ada", Facts{Arch: "amd64", GPUs: gpu("NVIDIA RTX 4000 Ada Generation", "8.9")}, "generic-nvidia-gpu", "generic-x86-64"},
		{"case does not count", Facts{Arch: "amd64", GPUs: gpu("nvidia l4", "8.9")}, "nvidia-l4", "generic-nvidia-gpu generic-x86-64"},
		{"two GPUs", Facts{Arch: "amd64", GPUs: []GPU{{"Tesla T4", "7.5"}, {"NVIDIA L4", "8.9"}}}, "nvidia-l4", "nvidia-t4 generic-nvidia-gpu generic-x86-64"},
		{"the name of one GPU, the capability of another", Facts{Arch: "amd64", GPUs: []GPU{{"NVIDIA L4", "7.0"}, {"Tesla V100-SXM2-16GB", "8.9"}}}, "generic-nvidia-gpu", "generic-x86-64"},
		{"a GPU that is too old", Facts{Arch: "amd64", GPUs: gpu("Tesla P4", "6.1"), Driver: "535.161.07"}, "generic-x86-64", ""},
		{"a desktop", Facts{Arch: "amd64", DMI: "To Be Filled By O.E.M./To Be Filled By O.E.M."}, "generic-x86-64", ""},
		{"a virtual machine", Facts{Arch: "amd64", DMI: "QEMU/Standard PC (Q35 + ICH9, 2009)"}, "generic-x86-64", ""},
		{"an Arm server", Facts{Arch: "arm64", DMI: "Ampere(R)/Mt. Jade"}, "generic-arm64", ""},
		{"nothing is known", Facts{Arch: "riscv64"}, "", ""},
	}
	s := loaded(t)
	for _, tt := range tests {
		m, err := s.Match(tt.f)
		if (err != nil) != (tt.want == "") || m.Profile.Name != tt.want || strings.Join(m.Also, " ") != tt.also {
			t.Errorf("%s: %q, also %v, %v; want %q, also %s", tt.name, m.Profile.Name, m.Also, err, tt.want, tt.also)
		}
	}
}

const minimal = `name: %s
description: A test's
match: %s
providers: [{name: CPUExecutionProvider}]
memory: {host_fraction: 0.5}
storage: {outbox_events: 10}
`

func site(rules ...string) map[string]string {
	files := map[string]string{}
	for i, rule := range rules {
		name := fmt.Sprintf("site-%d", i)
		files[name+".yaml"] = fmt.Sprintf(minimal, name, rule)
	}
	return files
}

func TestSite(t *testing.T) {
	files := site(
		`{dmi: ["Dell Inc./PowerEdge *"]}`,
		`{dmi: ["Dell Inc./PowerEdge R7615"]}`,
		`{gpu: [NVIDIA L4], compute_capability: ">=8.9", driver: ">=550, <560"}`,
		`{gpu: [NVIDIA L4], compute_capability: ">=8.9", driver: ">=560"}`,
		`{arch: amd64, runtime: ">=1.30"}`,
	)
	files["nvidia-l4.yaml"] = fmt.Sprintf(minimal, "nvidia-l4", `{gpu: [NVIDIA L4]}`)
	s := loaded(t, folder(t, files))
	if !s.NeedsRuntime() || loaded(t).NeedsRuntime() {
		t.Error("only the site's rules name the runtime")
	}
	l4 := []GPU{{"NVIDIA L4", "8.9"}}
	for _, tt := range []struct {
		f            Facts
		want, reason string
	}{
		{Facts{Arch: "amd64", DMI: "Dell Inc./PowerEdge R650"}, "site-0", `dmi "Dell Inc./PowerEdge R650" (Dell Inc./PowerEdge *)`},
		{Facts{Arch: "amd64", DMI: "Dell Inc./PowerEdge R7615"}, "site-1", `dmi "Dell Inc./PowerEdge R7615"`},
		{Facts{Arch: "amd64", GPUs: l4, Driver: "550.54.14"}, "site-2", `gpu "NVIDIA L4", compute_capability "8.9" (>=8.9), driver "550.54.14" (>=550, <560)`},
		{Facts{Arch: "amd64", GPUs: l4, Driver: "1000.1"}, "site-3", `gpu "NVIDIA L4", compute_capability "8.9" (>=8.9), driver "1000.1" (>=560)`},
		{Facts{Arch: "amd64", GPUs: l4, Driver: "535.1"}, "nvidia-l4", `gpu "NVIDIA L4"`},
		{Facts{Arch: "amd64", Runtime: "1.30.0"}, "site-4", `arch amd64, runtime "1.30.0" (>=1.30)`},
		{Facts{Arch: "amd64", Runtime: "1.9.0"}, "generic-x86-64", "arch amd64"},
	} {
		m, err := s.Match(tt.f)
		if err != nil || m.Profile.Name != tt.want || m.Reason != tt.reason {
			t.Errorf("%+v: %q because of %s, %v; want %q because of %s", tt.f, m.Profile.Name, m.Reason, err, tt.want, tt.reason)
		}
	}
	if p, err := s.Named("nvidia-l4"); err != nil || p.Description != "A test's" {
		t.Errorf("the site's profile does not take the built-in one's place: %+v, %v", p, err)
	}
}

func faults(t *testing.T, dirs ...string) []string {
	t.Helper()
	_, err := Load(dirs...)
	if err == nil {
		return nil
	}
	all, ok := errors.AsType[Faults](err)
	if !ok {
		t.Fatalf("%T: %v", err, err)
	}
	var lines []string
	for _, f := range all {
		line := f.Error()
		for _, d := range dirs {
			line = strings.TrimPrefix(line, d+"/")
		}
		lines = append(lines, line)
	}
	return lines
}

// Each fault of a file is found, with its place.
func TestFaults(t *testing.T) {
	text := `name: bad
descripton: A typo
match:
  arch: x86_64
  device_tree: raspberrypi,5-model-b
  gpu: ["NVIDIA [L4"]
  driver: ">=five"
  compute_capability: 8.9
providers:
  - name: CUDA
    options: {device_id: [0]}
threads: many
affinity: 3-0
memory:
  host_fraction: 50
  host_bytes: 4GB
  device_bytes: 8
  pinned_bytes: 1.5
  unified: "yes"
  host_fraction: 0.5
storage:
  outbox_events:
  reserve_bytes: -1
telemetry: [nvml, ipmi]
power: {limit_watts: 70000}
thermal:
  warn_celsius: 185
  slowdown_celsius: .nan
link:
  bytes_per_day: 99999999999999999999
  windows: ["1:00-5:00"]
limits:
  max_opset: 3
  precisions: [fp32]
hardware: [1]
7: seven
`
	want := strings.Split(`bad.yaml:1:1: description: is missing
bad.yaml:2:1: descripton: is not known, known are name, description, sources, match, providers, threads, affinity, memory, storage, telemetry, power, thermal, link, limits, hardware
bad.yaml:4:3: match.arch: "x86_64" is not one of 386, amd64, arm, arm64, loong64, mips64le, ppc64le, riscv64, s390x
bad.yaml:5:3: match.device_tree: is the text "raspberrypi,5-model-b", it must be a list
bad.yaml:6:9: match.gpu[0]: "NVIDIA [L4" is no pattern: syntax error in pattern
bad.yaml:7:3: match.driver: ">=five" is not a version pattern, as 550 or >=525.60
bad.yaml:8:3: match.compute_capability: is the number 8.9, it must be a text; write it in quotes
bad.yaml:10:5: providers[0].name: "CUDA" is not the name of an execution provider, as CPUExecutionProvider
bad.yaml:11:15: providers[0].options.device_id: is a list, it must be a text
bad.yaml:12:1: threads: is the text "many", it must be a whole number of threads
bad.yaml:13:1: affinity: "3-0": allowed are 0 to 1023, the lower one first
bad.yaml:15:3: memory.host_fraction: is 50, allowed are 0.01 to 1
bad.yaml:16:3: memory.host_bytes: is the text "4GB", it must be a whole number of bytes
bad.yaml:17:3: memory.device_bytes: is 8, allowed are 0 and 1048576 to 17592186044416 bytes
bad.yaml:18:3: memory.pinned_bytes: is the number 1.5, it must be a whole number of bytes
bad.yaml:19:3: memory.unified: is the text "yes", it must be true or false
bad.yaml:20:3: memory.host_fraction: is there twice
bad.yaml:22:3: storage.outbox_events: has no value
bad.yaml:23:3: storage.reserve_bytes: is -1, allowed are 0 and 1048576 to 17592186044416 bytes
bad.yaml:24:19: telemetry[1]: "ipmi" is not one of nvml, jetson, hwmon, thermal, rapl
bad.yaml:25:9: power.limit_watts: is 70000, allowed are 0 to 20000 watts
bad.yaml:27:3: thermal.warn_celsius: is 185, allowed are 0 and 20 to 150 degrees Celsius
bad.yaml:28:3: thermal.slowdown_celsius: is .nan, allowed are 0 and 20 to 150 degrees Celsius
bad.yaml:30:3: link.bytes_per_day: is the text "99999999999999999999", it must be a whole number of bytes
bad.yaml:31:13: link.windows[0]: "1:00-5:00" is not times of day, as 01:00-05:30
bad.yaml:33:3: limits.max_opset: is 3, allowed are 0 and 7 to 1000
bad.yaml:34:16: limits.precisions[0]: "fp32" is not one of FP64, FP32, FP16, BF16, INT8, UINT8
bad.yaml:35:1: hardware: is a list, it must be a mapping
bad.yaml:36:1: key "7" must be a text; write it in quotes`, "\n")
	if diff := cmp.Diff(want, faults(t, folder(t, map[string]string{"bad.yaml": text}))); diff != "" {
		t.Error(diff)
	}
}

func TestFaultsOfWholes(t *testing.T) {
	good := fmt.Sprintf(minimal, "good", `{dmi: ["Site/One"]}`)
	deep := strings.Repeat("[", 20) + strings.Repeat("]", 20)
	for _, tt := range []struct {
		name  string
		files map[string]string
		want  string
	}{
		{"fields that contradict each other", map[string]string{"good.yaml": good + "power: {idle_watts: 20, limit_watts: 10}\nthermal:\n  warn_celsius: 90\n  slowdown_celsius: 85\n"},
			"good.yaml:7:9: power.idle_watts: is 20, power.limit_watts is 10\ngood.yaml:9:3: thermal.warn_celsius: is 90, thermal.slowdown_celsius is 85"},
		{"a budget beyond what there is", map[string]string{"good.yaml": strings.Replace(good, "0.5", "0.5, host_bytes: 2147483648", 1) + "hardware: {host_bytes: 1073741824}\n"},
			"good.yaml:5:30: memory.host_bytes: is 2147483648, hardware.host_bytes is 1073741824"},
		{"a provider twice", map[string]string{"good.yaml": strings.Replace(good, "[{", "[{name: CPUExecutionProvider}, {", 1)},
			"good.yaml:4:44: providers[1].name: CPUExecutionProvider is there twice"},
		{"no provider", map[string]string{"good.yaml": strings.Replace(good, "{name: CPUExecutionProvider}", "", 1)}, "good.yaml:4:1: providers: has no entries, there must be one at least"},
		{"a rule for everything", map[string]string{"good.yaml": fmt.Sprintf(minimal, "good", "{}")}, "good.yaml:3:1: match: names nothing: it would match every device"},
		{"another file's name", map[string]string{"other.yaml": good}, `other.yaml:1:1: name: is "good", the file's is "other"`},
		{"the rule of a built-in profile", site(`{arch: arm64}`), "site-0.yaml:3:1: match: may match the same devices as that of built-in/generic-arm64.yaml, of which neither is more specific: arch arm64"},
		{"rules that overlap", site(`{gpu: ["NVIDIA A?0"], driver: ">=550"}`, `{gpu: ["NVIDIA A1*"], driver: "<550.60"}`),
			"site-1.yaml:3:1: match: may match the same devices as that of DIR/site-0.yaml, of which neither is more specific: gpu NVIDIA A1* and NVIDIA A?0, driver <550.60 and >=550"},
		{"rules apart", site(`{gpu: ["NVIDIA A?0"], driver: ">=550"}`, `{gpu: ["NVIDIA A1*"], driver: "<550"}`, `{dmi: ["a/*"]}`, `{dmi: ["*"]}`, `{dmi: ["*/a"], driver: "550"}`, `{device_tree: ["a,b*"]}`), ""},
		{"two documents", map[string]string{"good.yaml": good + "---\n" + good}, "good.yaml:8:5: more than one document"},
		{"nothing", map[string]string{"good.yaml": "# nothing\n"}, "good.yaml:1:1: holds nothing, it must hold one mapping"},
		{"no mapping", map[string]string{"good.yaml": "[1, 2]\n"}, "good.yaml:1:1: is a list, it must be a mapping"},
		{"a syntax error", map[string]string{"good.yaml": "name: good\n  match: [\n"}, "good.yaml:1:7: mapping value is not allowed in this context"},
		{"an anchor", map[string]string{"good.yaml": "name: &a good\n"}, `good.yaml:1:7: "&": anchors, aliases, tags, merge keys, directives and complex keys are not allowed`},
		{"depth", map[string]string{"good.yaml": "name: " + deep + "\n"}, "good.yaml:1:23: collections nest deeper than 16"},
		{"size", map[string]string{"good.yaml": strings.Repeat("#", maxFileBytes+1)}, "good.yaml: has more than 65536 bytes"},
		{"no UTF-8", map[string]string{"good.yaml": "name: \xff\n"}, "good.yaml:1:1: is not UTF-8"},
	} {
		dir := folder(t, tt.files)
		got := strings.ReplaceAll(strings.Join(faults(t, dir), "\n"), dir, "DIR")
		if got != tt.want {
			t.Errorf("%s:\n%s\nwant\n%s", tt.name, got, tt.want)
		}
	}
	a, b := folder(t, site(`{dmi: ["a/a"]}`)), folder(t, site(`{dmi: ["b/b"]}`))
	if got := faults(t, a, b); len(got) != 1 || got[0] != fmt.Sprintf(`site-0.yaml:1:1: name: "site-0" is that of %s/site-0.yaml too`, a) {
		t.Errorf("two folders: %v", got)
	}
	if got := faults(t, filepath.Join(a, "missing"), filepath.Join(a, "site-0.yaml")); len(got) != 2 || !strings.HasSuffix(got[0], "missing: no such file or directory") {
		t.Errorf("no folders: %v", got)
	}
}

func TestVersions(t *testing.T) {
	for _, tt := range []struct {
		pattern, version string
		want             bool
	}{
		{">=8.0", "8.9", true}, {">=8.0", "10.0", true}, {">=8.0", "7.5", false}, {">=8", "8", true}, {">8", "8.0", false}, {">8", "8.0.1", true},
		{"8.9", "8.9", true}, {"8.9", "8.9.1", true}, {"8.9", "8.90", false}, {"8", "8.9", true}, {"= 8", "9", false},
		{"<9", "8.99", true}, {"<9", "9.0", false}, {"<=9", "9.0.0", true}, {"<=9", "9.0.1", false},
		{">=550.54.14", "550.54.9", false}, {">=550, <560", "555.42", true}, {">=550, <560", "560", false},
		{">=1.24", "1.30.0", true}, {">=1.24", "1.31.0-dev", true}, {">=1.24", "1.9", false}, {">=1", "", false}, {">=1", "x", false}, {"99999999999", "1", false},
	} {
		if got := matchVersion(tt.pattern, tt.version); got != tt.want {
			t.Errorf("%q matches %q: %v", tt.pattern, tt.version, got)
		}
	}
	for _, bad := range []string{"", ">=", "x", ">=8.x", "8..9", "==8", "8 9", ">9, <8", "8,", ">8, <=8", "<8, 8.1"} {
		if r, err := parseVersions(bad); err == nil {
			t.Errorf("%q is %+v", bad, r)
		}
	}
}

func TestProcessors(t *testing.T) {
	for text, want := range map[string]string{"": "[]", "3": "[3]", "4-6,0,5": "[0 4 5 6]", "1023": "[1023]", "1024": "!", "3-1": "!", "a": "!", "1-": "!", "-1": "!", ",": "!"} {
		got := "!"
		if all, err := Processors(text); err == nil {
			got = fmt.Sprint(all)
		}
		if got != want {
			t.Errorf("%q: %s, want %s", text, got, want)
		}
	}
}

// Two patterns that match the same string are said to, for any string and
// pattern of a few characters; and those that are said to share one do.
func TestBothMatch(t *testing.T) {
	var words []string
	level := []string{""}
	for range 4 {
		var next []string
		for _, w := range level {
			for _, c := range []string{"a", "b", "/"} {
				next = append(next, w+c)
			}
		}
		words, level = append(words, level...), next
	}
	words = append(words, level...)
	pattern := rapid.StringOfN(rapid.SampledFrom([]rune("ab/*?")), 0, 4, -1)
	class := rapid.SampledFrom([]string{"", "[a-b]", "[^a]", "[b]", `\a`})
	rapid.Check(t, func(t *rapid.T) {
		p := pattern.Draw(t, "p") + class.Draw(t, "class of p")
		q := pattern.Draw(t, "q") + class.Draw(t, "class of q")
		shared := slices.ContainsFunc(words, func(w string) bool {
			a, _ := path.Match(p, w)
			b, _ := path.Match(q, w)
			return a && b
		})
		got := bothMatch(p, q)
		if shared && !got {
			t.Fatalf("%q and %q share no string", p, q)
		}
		// The shortest string that two patterns match has no more characters
		// than both have elements that are no stars.
		if elements := len(elements(p)) + len(elements(q)); got && !shared && elements <= 4 && !strings.Contains(p+q, "[^") {
			t.Fatalf("%q and %q share a string", p, q)
		}
	})
}

func FuzzParse(f *testing.F) {
	entries, err := builtIn.ReadDir(".")
	if err != nil {
		f.Fatal(err)
	}
	for _, e := range entries {
		b, err := builtIn.ReadFile(e.Name())
		if err != nil {
			f.Fatal(err)
		}
		f.Add(string(b))
	}
	f.Add("a: {b: [c, {d: e}]}\n? x\n: y\n")
	f.Fuzz(func(t *testing.T, text string) {
		if len(text) > maxFileBytes {
			return
		}
		var a file
		faults := a.parse(text)
		for _, fault := range faults {
			if fault.Line < 1 || fault.Column < 1 || fault.Problem == "" {
				t.Errorf("fault without a place: %+v", fault)
			}
		}
		if len(faults) == 0 {
			l := &loader{read: []file{a}}
			s, err := l.finish()
			if err != nil {
				t.Fatal(err)
			}
			s.Match(Facts{Arch: "arm64", DeviceTree: []string{"a,b"}, DMI: "a/b", GPUs: []GPU{{"NVIDIA L4", "8.9"}}, Driver: "550.1", Runtime: "1.30.0"})
		}
	})
}
