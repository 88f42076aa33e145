package device

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/NVIDIA/go-nvml/pkg/nvml"
	"github.com/NVIDIA/go-nvml/pkg/nvml/mock"
	"github.com/NVIDIA/go-nvml/pkg/nvml/mock/dgxa100"
	"github.com/NVIDIA/go-nvml/pkg/nvml/mock/server"
	"golang.org/x/sys/unix"

	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// tree is a folder with proc and sys, as a board has them.
type tree struct {
	t   *testing.T
	dir string
}

func plant(t *testing.T, parts ...string) tree {
	tr := tree{t, t.TempDir()}
	for _, part := range parts {
		for line := range strings.Lines(strings.TrimSpace(part)) {
			if name, content, ok := strings.Cut(strings.TrimSpace(line), " = "); ok {
				tr.write(name, strings.ReplaceAll(content, `\n`, "\n")+"\n")
			}
		}
	}
	return tr
}

func (tr tree) write(name, content string) {
	tr.t.Helper()
	path := filepath.Join(tr.dir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		tr.t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(strings.ReplaceAll(content, `\0`, "\x00")), 0o644); err != nil {
		tr.t.Fatal(err)
	}
}

func (tr tree) remove(name string) {
	tr.t.Helper()
	if err := os.RemoveAll(filepath.Join(tr.dir, name)); err != nil {
		tr.t.Fatal(err)
	}
}

// open opens a device of the tree, without NVML.
func (tr tree) open(sources ...string) *Device {
	library := &mock.Interface{InitFunc: func() nvml.Return { return nvml.ERROR_LIBRARY_NOT_FOUND }}
	return Open(Config{Dir: tr.dir, Root: tr.dir, NVML: library, Sources: sources})
}

const common = `
proc/stat = cpu  1000 0 500 8000 100 0 0 0 0 0\ncpu0 1 2 3 4
proc/meminfo = MemTotal:        7802856 kB\nMemFree:         1223344 kB\nMemAvailable:    5401228 kB
proc/self/status = Name:	dunlin-agent\nRssAnon:	   20480 kB
proc/self/task/10/children = 11
proc/self/task/12/children =
proc/11/status = Name:	dunlin-agent\nRssAnon:	   30720 kB
`

// orin has the files of a Jetson Orin Nano with JetPack 6, whose engine for
// vision is off.
const orin = `
proc/device-tree/model = NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0
proc/cpuinfo = processor	: 0\nBogoMIPS	: 62.50\nCPU implementer	: 0x41
sys/class/thermal/thermal_zone0/type = cpu-thermal
sys/class/thermal/thermal_zone0/temp = 48562
sys/class/thermal/thermal_zone1/type = gpu-thermal
sys/class/thermal/thermal_zone1/temp = 47312
sys/class/thermal/thermal_zone2/type = cv0-thermal
sys/class/thermal/thermal_zone2/temp = -256000
sys/class/thermal/thermal_zone8/type = tj-thermal
sys/class/thermal/thermal_zone8/temp = 48562
sys/class/hwmon/hwmon0/name = cpu_thermal
sys/class/hwmon/hwmon0/temp1_input = 48562
sys/class/hwmon/hwmon1/name = ina3221
sys/class/hwmon/hwmon1/in1_label = VDD_IN
sys/class/hwmon/hwmon1/in1_input = 5072
sys/class/hwmon/hwmon1/curr1_input = 1250
sys/class/hwmon/hwmon1/in2_label = VDD_CPU_GPU_CV
sys/class/hwmon/hwmon1/in2_input = 5064
sys/class/hwmon/hwmon1/curr2_input = 240
sys/class/hwmon/hwmon1/in3_label = VDD_SOC
sys/class/hwmon/hwmon1/in3_input = 5064
sys/class/hwmon/hwmon1/curr3_input = 400
sys/devices/platform/bus@0/17000000.gpu/load = 436
sys/devices/platform/bus@0/17000000.gpu/of_node/compatible = nvidia,ga10b\0
sys/devices/platform/bus@0/17000000.gpu/devfreq/17000000.gpu/cur_freq = 624750000
sys/block/mmcblk0/device/life_time = 0x01 0x02
sys/block/nvme0n1/size = 1000215216
`

const pi5 = `
proc/device-tree/model = Raspberry Pi 5 Model B Rev 1.0\0
proc/cpuinfo = processor	: 0\nRevision	: d04170\nModel		: Raspberry Pi 5 Model B Rev 1.0
sys/class/thermal/thermal_zone0/type = cpu-thermal
sys/class/thermal/thermal_zone0/temp = 51900
sys/class/hwmon/hwmon0/name = cpu_thermal
sys/class/hwmon/hwmon0/temp1_input = 51900
sys/class/hwmon/hwmon1/name = rp1_adc
sys/class/hwmon/hwmon1/in1_input = 1465
sys/class/hwmon/hwmon1/temp1_input = 46231
sys/class/hwmon/hwmon2/name = rpi_volt
sys/class/hwmon/hwmon2/in0_lcrit_alarm = 0
sys/class/hwmon/hwmon3/name = pwmfan
sys/class/hwmon/hwmon3/fan1_input = 2310
sys/block/mmcblk0/device/type = SD
`

// xeon has two processors, whose counters begin anew at 262143328850 uJ.
const xeon = `
sys/class/dmi/id/sys_vendor = Dell Inc.
sys/class/dmi/id/product_name = PowerEdge R750
proc/cpuinfo = processor	: 0\nmodel name	: Intel(R) Xeon(R) Gold 6330 CPU @ 2.00GHz
sys/class/thermal/thermal_zone0/type = x86_pkg_temp
sys/class/thermal/thermal_zone0/temp = 45000
sys/class/hwmon/hwmon0/name = nvme
sys/class/hwmon/hwmon0/temp1_label = Composite
sys/class/hwmon/hwmon0/temp1_input = 38850
sys/class/hwmon/hwmon10/name = coretemp
sys/class/hwmon/hwmon10/temp1_label = Package id 1
sys/class/hwmon/hwmon10/temp1_input = 44000
sys/class/hwmon/hwmon2/name = coretemp
sys/class/hwmon/hwmon2/temp1_label = Package id 0
sys/class/hwmon/hwmon2/temp1_input = 45000
sys/class/hwmon/hwmon2/temp2_label = Core 0
sys/class/hwmon/hwmon2/temp2_input = 43000
sys/class/powercap/intel-rapl:0/name = package-0
sys/class/powercap/intel-rapl:0/energy_uj = 262142328850
sys/class/powercap/intel-rapl:0/max_energy_range_uj = 262143328850
sys/class/powercap/intel-rapl:0:0/name = dram
sys/class/powercap/intel-rapl:0:0/energy_uj = 77
sys/class/powercap/intel-rapl:0:0/max_energy_range_uj = 65712999613
sys/class/powercap/intel-rapl:1/name = package-1
sys/class/powercap/intel-rapl:1/energy_uj = 5000000
sys/class/powercap/intel-rapl:1/max_energy_range_uj = 262143328850
sys/class/powercap/intel-rapl:2/name = psys
sys/class/powercap/intel-rapl:2/energy_uj = 77
sys/class/powercap/intel-rapl:2/max_energy_range_uj = 262143328850
`

func celsius(t *dunlinv1.Telemetry) (all []string) {
	for _, c := range t.Temperatures {
		all = append(all, fmt.Sprintf("%s %g", c.Sensor, c.Celsius))
	}
	return all
}

func TestOrin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tr := plant(t, common, orin)
		d := tr.open()
		defer d.Close()
		info := d.Info()
		if info.Board != "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super" || info.CpuModel != info.Board || info.MemoryBytes != 7802856<<10 {
			t.Errorf("inventory: %v", info)
		}
		differ(t, "GPU", info.Gpus, []*dunlinv1.GpuInfo{{Name: "nvidia,ga10b", ComputeCapability: "8.7", UnifiedMemory: true, MemoryBytes: 7802856 << 10}})
		got := d.Sample()
		differ(t, "temperatures", celsius(got), []string{"cpu-thermal 48.562", "gpu-thermal 47.312", "tj-thermal 48.562"})
		differ(t, "GPU", got.Gpus, []*dunlinv1.GpuTelemetry{{Utilisation: new(0.436), SmClockMhz: new(uint32(624)), Celsius: new(47.312)}})
		if got.PowerWatts == nil || math.Abs(*got.PowerWatts-6.34) > 1e-9 || got.PowerSource != "ina3221 VDD_IN" || got.EnergyJoules != nil {
			t.Errorf("power %v of %q, energy %v", got.PowerWatts, got.PowerSource, got.EnergyJoules)
		}
		if got.DiskWear == nil || *got.DiskWear != 0.1 || *got.AgentAnonymousBytes != 50<<20 || *got.MemoryUsedBytes != (7802856-5401228)<<10 || len(got.Faults) > 0 {
			t.Errorf("sample: %v", got)
		}
		// A sensor that has answered and does not any more is a fault, and none
		// of the next scan.
		tr.remove("sys/class/hwmon/hwmon1")
		got = sampleAfter(d, time.Second)
		if got.PowerWatts != nil || got.PowerSource != "" || len(got.Faults) != 1 || !strings.HasPrefix(got.Faults[0], "hwmon ina3221 VDD_IN: ") {
			t.Errorf("without rails: %v", got)
		}
		if got := sampleAfter(d, time.Second); len(got.Faults) > 0 {
			t.Errorf("later: %v", got.Faults)
		}
		// What is not asked for is not there.
		d.Use([]string{})
		if got := sampleAfter(d, time.Second); len(got.Temperatures) > 0 || len(got.Gpus) > 0 || got.PowerWatts != nil {
			t.Errorf("of no source: %v", got)
		}
		d.Use([]string{"thermal"})
		if got := sampleAfter(d, time.Second); len(got.Temperatures) != 3 || len(got.Gpus) > 0 {
			t.Errorf("of thermal zones: %v", got)
		}
	})
}

// TestAGXOrin: the whole is the sum of the rails that stand side by side.
func TestAGXOrin(t *testing.T) {
	tr := plant(t, common, `
sys/class/hwmon/hwmon3/name = ina3221
sys/class/hwmon/hwmon3/in1_label = VDD_GPU_SOC
sys/class/hwmon/hwmon3/in1_input = 19000
sys/class/hwmon/hwmon3/curr1_input = 200
sys/class/hwmon/hwmon3/in2_label = VDD_CPU_CV
sys/class/hwmon/hwmon3/in2_input = 19000
sys/class/hwmon/hwmon3/curr2_input = 100
sys/class/hwmon/hwmon3/in3_label = VIN_SYS_5V0
sys/class/hwmon/hwmon3/in3_input = 5000
sys/class/hwmon/hwmon3/curr3_input = 800
sys/class/hwmon/hwmon4/name = ina3221
sys/class/hwmon/hwmon4/in2_label = VDDQ_VDD2_1V8AO
sys/class/hwmon/hwmon4/in2_input = 5000
sys/class/hwmon/hwmon4/curr2_input = 100`)
	d := tr.open()
	defer d.Close()
	got := d.Sample()
	if got.PowerWatts == nil || math.Abs(*got.PowerWatts-9.7) > 1e-9 || got.PowerSource != "ina3221 VDD_GPU_SOC+VDD_CPU_CV+VIN_SYS_5V0" {
		t.Errorf("power %v of %q", got.PowerWatts, got.PowerSource)
	}
	tr.write("sys/class/hwmon/hwmon3/curr2_input", "rubbish\n")
	if got := d.sample(time.Now()); got.PowerWatts != nil || len(got.Faults) != 1 {
		t.Errorf("without one of them: %v", got)
	}
}

// TestPartialNVML: the kernel adds what NVML does not say of a Jetson's GPU,
// and does not take the figures of a GPU on a card for its own.
func TestPartialNVML(t *testing.T) {
	for _, unified := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			tr := plant(t, common, orin)
			r := newRig(dgxa100.New(), 1)
			g := r.Devices[0].(*server.Device)
			if unified {
				r.fails["GetMemoryInfo"] = nvml.ERROR_NOT_SUPPORTED
			}
			for _, name := range []string{"GetUtilizationRates", "GetTemperature", "GetPowerUsage", "GetClockInfo"} {
				r.fails[name] = nvml.ERROR_NOT_SUPPORTED
			}
			d := Open(Config{Dir: tr.dir, Root: tr.dir, NVML: r})
			defer d.Close()
			got, info := d.Sample(), d.Info()
			if unified {
				if len(info.Gpus) != 1 || !info.Gpus[0].UnifiedMemory || info.Gpus[0].MemoryBytes != 7802856<<10 || info.Gpus[0].Uuid != g.UUID {
					t.Errorf("inventory: %v", info.Gpus)
				}
				if len(got.Gpus) != 1 || got.Gpus[0].Utilisation == nil || *got.Gpus[0].Utilisation != 0.436 || *got.Gpus[0].Celsius != 47.312 || *got.Gpus[0].EccCorrected != 11 {
					t.Errorf("figures: %v", got.Gpus)
				}
			} else if len(info.Gpus) != 2 || info.Gpus[0].UnifiedMemory || info.Gpus[1].Index != 1 || len(got.Gpus) != 2 || got.Gpus[0].Utilisation != nil || got.Gpus[1].Index != 1 || *got.Gpus[1].Utilisation != 0.436 {
				t.Errorf("%v; %v", info.Gpus, got.Gpus)
			}
		})
	}
}

func TestPi5(t *testing.T) {
	d := plant(t, common, pi5).open()
	defer d.Close()
	if info := d.Info(); info.Board != "Raspberry Pi 5 Model B Rev 1.0" || info.CpuModel != info.Board || len(info.Gpus) > 0 || info.DriverVersion != "" {
		t.Errorf("inventory: %v", info)
	}
	got := d.Sample()
	differ(t, "temperatures", celsius(got), []string{"cpu-thermal 51.9", "rp1_adc temp1 46.231"})
	if got.PowerWatts != nil || got.EnergyJoules != nil || got.DiskWear != nil || len(got.Gpus) > 0 || len(got.Faults) > 0 {
		t.Errorf("of nothing there is %v", got)
	}
}

func TestXeon(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tr := plant(t, common, xeon)
		d := tr.open()
		defer d.Close()
		if info := d.Info(); info.Board != "Dell Inc. PowerEdge R750" || info.CpuModel != "Intel(R) Xeon(R) Gold 6330 CPU @ 2.00GHz" {
			t.Errorf("inventory: %v", info)
		}
		first := d.Sample()
		differ(t, "temperatures", celsius(first), []string{"x86_pkg_temp 45", "nvme Composite 38.85", "coretemp Package id 0 45", "coretemp Package id 1 44"})
		if first.PowerWatts != nil || first.PowerSource != "rapl package-0+package-1" || math.Abs(*first.EnergyJoules-262147.328850) > 1e-6 {
			t.Errorf("first: power %v of %q, energy %v", first.PowerWatts, first.PowerSource, *first.EnergyJoules)
		}
		// One counter begins anew: 1 J until then, 199 J since, and 100 J of the
		// other make 300 J in 2 s.
		tr.write("sys/class/powercap/intel-rapl:0/energy_uj", "199000000\n")
		tr.write("sys/class/powercap/intel-rapl:1/energy_uj", "105000000\n")
		tr.write("proc/stat", "cpu  1100 0 500 8300 100 0 0 0 0 0\n")
		got := sampleAfter(d, 2*time.Second)
		if got.PowerWatts == nil || math.Abs(*got.PowerWatts-150) > 1e-6 || math.Abs(*got.EnergyJoules-*first.EnergyJoules-300) > 1e-6 {
			t.Errorf("power %v, energy %v after %v", got.PowerWatts, *got.EnergyJoules, *first.EnergyJoules)
		}
		if *got.CpuUtilisation != 0.25 {
			t.Errorf("use of the processor %v", *got.CpuUtilisation)
		}
		// A counter that is not its own range's is none, and a scan forgets
		// nothing.
		tr.write("sys/class/powercap/intel-rapl:1/energy_uj", "999999999999999\n")
		if got := sampleAfter(d, time.Second); got.PowerWatts != nil || got.EnergyJoules != nil {
			t.Errorf("with rubbish: %v", got)
		}
		tr.write("sys/class/powercap/intel-rapl:1/energy_uj", "205000000\n")
		if got := sampleAfter(d, scanEvery); math.Abs(*got.EnergyJoules-*first.EnergyJoules-400) > 1e-6 {
			t.Errorf("after a scan: %v", *got.EnergyJoules)
		}
		// Within a moment it is the same sample, of which each has a copy.
		a := sampleAfter(d, time.Second)
		a.Temperatures = nil
		if b := d.Sample(); len(b.Temperatures) != 4 || !b.At.AsTime().Equal(a.At.AsTime()) {
			t.Errorf("again: %v", b)
		}
	})
}

func TestLifeTime(t *testing.T) {
	for text, want := range map[string]float64{"0x01 0x03\n": 0.2, "0x01 0x01\n": 0, "0x0a 0x01\n": 0.9, "0x0b 0x00\n": 1, "0x00 0x00\n": -1, "": -1, "0x0c 0x01": -1, "x": -1} {
		if got, ok := parseLifeTime(text); ok != (want >= 0) || ok && math.Abs(got-want) > 1e-9 {
			t.Errorf("%q: %v, %v", text, got, ok)
		}
	}
}

// The wear is that of the disk that the data lies on, where that can be told.
func TestDisk(t *testing.T) {
	for device, want := range map[string]float64{
		"": 0.5,
		"../../devices/platform/soc/mmc0:0001/block/mmcblk0/mmcblk0p2":           0.2,
		"../../devices/pci0000:00/0000:00:1d.0/nvme/nvme0/nvme0n1/block/nvme0n1": -1,
		"../../devices/virtual/block/dm-0":                                       0.5,
	} {
		tr := plant(t, common, `
sys/block/mmcblk0/device/life_time = 0x03 0x01
sys/block/mmcblk1/device/life_time = 0x06 0x06
`)
		var st unix.Stat_t
		if err := unix.Stat(tr.dir, &st); err != nil {
			t.Fatal(err)
		}
		if device != "" {
			link := fmt.Sprintf("%s/sys/dev/block/%d:%d", tr.dir, unix.Major(st.Dev), unix.Minor(st.Dev))
			if err := errors.Join(os.MkdirAll(filepath.Dir(link), 0o755), os.Symlink(device, link)); err != nil {
				t.Fatal(err)
			}
		}
		d := tr.open()
		if got := d.Sample().DiskWear; (got != nil) != (want >= 0) || got != nil && math.Abs(*got-want) > 1e-9 {
			t.Errorf("%q: wear %v, want %v", device, got, want)
		}
		d.Close()
	}
}

// Energy reads the counters at any time, and nothing that Sample gives changes
// by that; nor does it matter for the use of the processor and the power who
// else samples.
func TestEnergy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tr := plant(t, common, xeon)
		d := tr.open()
		defer d.Close()
		d.Sample()
		joules, busy, total, ok := d.Energy()
		if !ok || math.Abs(joules-262147.328850) > 1e-6 || busy != 1500 || total != 9600 {
			t.Errorf("%v J, %d of %d ticks, %v", joules, busy, total, ok)
		}
		time.Sleep(10 * time.Millisecond)
		tr.write("sys/class/powercap/intel-rapl:1/energy_uj", "5300000\n")
		tr.write("proc/stat", "cpu  1001 0 500 8003 100 0 0 0 0 0\n")
		after, busy, total, ok := d.Energy()
		if !ok || math.Abs(after-joules-0.3) > 1e-6 || busy != 1501 || total != 9604 {
			t.Errorf("10 ms later %v J more, %d of %d ticks, %v", after-joules, busy, total, ok)
		}
		tr.write("sys/class/powercap/intel-rapl:1/energy_uj", "1005000000\n")
		tr.write("proc/stat", "cpu  1250 0 500 8750 100 0 0 0 0 0\n")
		if got := sampleAfter(d, 10*time.Second-10*time.Millisecond); math.Abs(*got.PowerWatts-100) > 1e-6 || *got.CpuUtilisation != 0.25 {
			t.Errorf("power %v, use of the processor %v", *got.PowerWatts, *got.CpuUtilisation)
		}
		// Others sample shortly before the next that counts.
		tr.write("sys/class/powercap/intel-rapl:1/energy_uj", "1905000000\n")
		tr.write("proc/stat", "cpu  2150 0 500 8850 100 0 0 0 0 0\n")
		if got := sampleAfter(d, 9*time.Second); math.Abs(*got.PowerWatts-100) > 1e-6 || *got.CpuUtilisation != 0.9 {
			t.Errorf("power %v, use of the processor %v", *got.PowerWatts, *got.CpuUtilisation)
		}
		tr.write("proc/stat", "cpu  2150 0 500 8950 100 0 0 0 0 0\n")
		if got := sampleAfter(d, time.Second); math.Abs(*got.PowerWatts-100) > 1e-6 || *got.CpuUtilisation != 0.9 {
			t.Errorf("a second later: power %v, use of the processor %v", *got.PowerWatts, *got.CpuUtilisation)
		}
		tr.write("sys/class/powercap/intel-rapl:0/energy_uj", "999999999999999\n")
		if joules, _, _, ok := d.Energy(); ok || joules != 0 {
			t.Errorf("of a counter that is none: %v J", joules)
		}
	})
	d := plant(t, common, orin).open()
	defer d.Close()
	if joules, busy, _, ok := d.Energy(); ok || joules != 0 || busy == 0 {
		t.Errorf("of a board without a counter: %v J, %d ticks", joules, busy)
	}
}

// TestMemory: what a control group allows is all there is.
func TestMemory(t *testing.T) {
	d := plant(t, common, `
proc/self/cgroup = 0::/system.slice/dunlin-agent.service
sys/fs/cgroup/system.slice/dunlin-agent.service/memory.max = 1073741824
sys/fs/cgroup/system.slice/dunlin-agent.service/memory.current = 419430400
sys/fs/cgroup/system.slice/dunlin-agent.service/memory.stat = anon 209715200\nfile 209715200
sys/fs/cgroup/system.slice/memory.max = max`).open()
	defer d.Close()
	if available, total, err := d.Memory(); err != nil || total != 1<<30 || available != 1<<30-209715200 {
		t.Errorf("%d of %d, %v", available, total, err)
	}
}

// FuzzSensors has every file of a sensor say the same, one thing and then
// another: no figure leaves its range.
func FuzzSensors(f *testing.F) {
	f.Add("48500\n", "49000\n")
	f.Add("-256000", "9223372036854775807")
	f.Add("4", "")
	f.Add("262143328850", "1")
	f.Fuzz(func(t *testing.T, first, second string) {
		tr := plant(t, common, orin, xeon)
		d := tr.open()
		defer d.Close()
		at := time.Now()
		for i, content := range []string{first, second} {
			for _, file := range []string{
				"class/thermal/thermal_zone0/temp", "class/hwmon/hwmon0/temp1_input", "class/hwmon/hwmon1/in1_input", "class/hwmon/hwmon1/curr1_input",
				"class/powercap/intel-rapl:0/energy_uj", "devices/platform/bus@0/17000000.gpu/load", "devices/platform/bus@0/17000000.gpu/devfreq/17000000.gpu/cur_freq", "block/mmcblk0/device/life_time",
			} {
				tr.write("sys/"+file, content)
			}
			if i == 1 {
				tr.remove("sys/class/hwmon/hwmon1") // then RAPL has the power
			}
			got := d.sample(at.Add(time.Duration(i+1) * time.Second))
			for _, c := range got.Temperatures {
				if !(c.Celsius > -100 && c.Celsius < 250) {
					t.Errorf("%q: %v", content, c)
				}
			}
			if w := got.PowerWatts; w != nil && !(*w >= 0 && *w <= maxPackage) {
				t.Errorf("%q: %v W", content, *w)
			}
			if j := got.EnergyJoules; j != nil && !(*j >= 0) {
				t.Errorf("%q: %v J", content, *j)
			}
			if w := got.DiskWear; w != nil && !(*w >= 0 && *w <= 1) {
				t.Errorf("%q: wear %v", content, *w)
			}
			for _, g := range got.Gpus {
				if u := g.Utilisation; u != nil && !(*u >= 0 && *u <= 1) {
					t.Errorf("%q: utilisation %v", content, *u)
				}
			}
		}
	})
}

// FuzzField: a field of any type and value gives a figure of 0 or more, or none.
func FuzzField(f *testing.F) {
	f.Add(uint32(0), uint64(0x7ff0000000000000))
	f.Add(uint32(4), uint64(1)<<63)
	f.Fuzz(func(t *testing.T, kind uint32, bits uint64) {
		field := nvml.FieldValue{ValueType: kind}
		binary.NativeEndian.PutUint64(field.Value[:], bits)
		if v, ok := fieldValue(field); ok && !(v >= 0 && v <= math.MaxFloat64) {
			t.Errorf("type %d of %#x gives %v", kind, bits, v)
		}
	})
}

// BenchmarkSample is of this machine, and must stay below 5 ms.
func BenchmarkSample(b *testing.B) {
	d := Open(Config{Dir: b.TempDir()})
	defer d.Close()
	b.ReportAllocs()
	for b.Loop() {
		d.sample(time.Now())
	}
}
