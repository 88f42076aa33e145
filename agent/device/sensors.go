package device

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

const (
	// scanEvery is how often sensors are looked for: drivers come and go.
	scanEvery = 10 * time.Minute
	// maxSensors bounds those of one kind.
	maxSensors = 64
	// A temperature outside of these, in thousandths of a degree Celsius, is
	// what drivers say of a sensor that is off.
	coldest, hottest = -100_000, 250_000
	// maxRail bounds the power of a rail in watts, and maxPackage that of a
	// processor.
	maxRail, maxPackage = 1000, 5000
)

// sensors are the files below /sys that have figures.
type sensors struct {
	dir          string    // of the data
	at           time.Time // when they were looked for
	temperatures []sensor
	rails        []rail
	total        []string // labels of the rails that are the whole device's power together
	packages     []*domain
	spent        spent
	tegra        tegraGPU
	wear         []string
}

// sensor is a file with one temperature.
type sensor struct {
	source, name, path string
	answered           bool
}

// rail is a channel of an ina3221, which has volts and amperes of it.
type rail struct {
	label, voltage, current string
	answered                bool
}

// domain is a processor package whose energy RAPL counts.
type domain struct {
	name, path string
	wrap       uint64 // the largest value of the counter, in microjoules
	last       uint64
	answered   bool
	joules     float64 // since it was first read, and what it showed then
}

// spent is what the packages had spent when their power was last taken.
type spent struct {
	names  string // of the packages; "": they have not been read
	joules float64
	at     time.Time
	watts  *float64 // since the time before; nil: not known
}

// tegraGPU has the files of a Jetson's GPU.
type tegraGPU struct{ load, clock string }

// scan looks for sensors. What has been counted so far stays.
func (s *sensors) scan(r root, use sources) {
	before := s.packages
	*s = sensors{dir: s.dir, at: time.Now(), spent: s.spent}
	if use.thermal {
		s.zones(r)
	}
	if use.hwmon {
		s.chips(r)
	}
	if use.jetson {
		s.jetson(r)
	}
	if use.rapl {
		s.domains(r, before)
	}
	data := r.disk(s.dir)
	for _, disk := range r.entries("/sys/block") {
		if strings.HasPrefix(disk, "mmcblk") && (data == "" || disk == data) {
			s.wear = append(s.wear, "/sys/block/"+disk+"/device/life_time")
		}
	}
}

// disk names the disk that a folder lies on; "" where that cannot be told, as
// of what is encrypted or in a container.
func (r root) disk(dir string) string {
	var st unix.Stat_t
	if unix.Stat(dir, &st) != nil {
		return ""
	}
	device, err := os.Readlink(fmt.Sprintf("%s/sys/dev/block/%d:%d", r, unix.Major(uint64(st.Dev)), unix.Minor(uint64(st.Dev))))
	if err != nil || strings.Contains(device, "/virtual/") {
		return ""
	}
	_, names, _ := strings.Cut(device, "/block/") // mmcblk0/mmcblk0p2
	name, _, _ := strings.Cut(names, "/")
	return name
}

// zones are the kernel's thermal zones.
func (s *sensors) zones(r root) {
	const dir = "/sys/class/thermal/"
	for _, zone := range r.entries(dir) {
		if !strings.HasPrefix(zone, "thermal_zone") || len(s.temperatures) == maxSensors {
			continue
		}
		s.temperatures = append(s.temperatures, sensor{source: "thermal", name: cmp.Or(r.line(dir+zone+"/type"), zone), path: dir + zone + "/temp"})
	}
}

// chips are the temperatures of hwmon's chips, but for those that are a thermal
// zone's once more, and for those of single cores.
func (s *sensors) chips(r root) {
	const dir = "/sys/class/hwmon/"
	zones := s.temperatures
	for _, chip := range r.entries(dir) {
		name := r.line(dir + chip + "/name")
		if slices.ContainsFunc(zones, func(z sensor) bool { return strings.ReplaceAll(z.name, "-", "_") == strings.ReplaceAll(name, "-", "_") }) {
			continue
		}
		for _, file := range r.entries(dir + chip) {
			input, ok := strings.CutSuffix(file, "_input")
			if !ok || !strings.HasPrefix(input, "temp") || len(s.temperatures)-len(zones) == maxSensors {
				continue
			}
			label := cmp.Or(r.line(dir+chip+"/"+input+"_label"), input)
			if strings.HasPrefix(label, "Core ") {
				continue
			}
			s.temperatures = append(s.temperatures, sensor{source: "hwmon", name: cmp.Or(name, chip) + " " + label, path: dir + chip + "/" + file})
		}
	}
}

// wholes are the rails of which the power of a whole module is the sum: the
// first whose labels all exist. From the chapters on power of the Jetson Linux
// Developer Guide; VDDQ_VDD2_1V8AO of the AGX Orin hangs behind VIN_SYS_5V0.
var wholes = [][]string{
	{"VDD_IN"}, {"POM_5V_IN"}, {"VIN"},
	{"VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"},
	{"GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"},
}

// jetson looks for the rails of a Jetson, and for its GPU.
func (s *sensors) jetson(r root) {
	const dir = "/sys/class/hwmon/"
	for _, chip := range r.entries(dir) {
		if r.line(dir+chip+"/name") != "ina3221" {
			continue
		}
		for _, n := range []string{"1", "2", "3"} {
			label := r.line(dir + chip + "/in" + n + "_label")
			if label != "" && len(s.rails) < maxSensors {
				s.rails = append(s.rails, rail{label: label, voltage: dir + chip + "/in" + n + "_input", current: dir + chip + "/curr" + n + "_input"})
			}
		}
	}
	for _, labels := range wholes {
		if !slices.ContainsFunc(labels, func(l string) bool {
			return !slices.ContainsFunc(s.rails, func(r rail) bool { return r.label == l })
		}) {
			s.total = labels
			break
		}
	}
	gpu := r.tegraFolder()
	if gpu == "" {
		return
	}
	s.tegra.load = gpu + "/load"
	if names := r.entries(gpu + "/devfreq"); len(names) > 0 {
		s.tegra.clock = gpu + "/devfreq/" + names[0] + "/cur_freq"
	}
}

// tegraFolder gives the folder of the GPU of NVIDIA's system on a chip: the one
// that has its load; "" where there is none.
func (r root) tegraFolder() string {
	for _, dir := range []string{"/sys/devices/platform", "/sys/devices/platform/bus@0", "/sys/devices"} {
		for _, name := range r.entries(dir) {
			if name != "gpu.0" && !hasSuffix(name, ".gpu", ".ga10b", ".gv11b", ".gp10b", ".gm20b") {
				continue
			}
			if _, err := r.number(dir + "/" + name + "/load"); err == nil || passing(err) {
				return dir + "/" + name
			}
		}
	}
	return ""
}

func hasSuffix(s string, suffixes ...string) bool {
	return slices.ContainsFunc(suffixes, func(suffix string) bool { return strings.HasSuffix(s, suffix) })
}

// domains are the processor packages that RAPL counts. Their parts, and the
// platform's counter, which few boards have right, are left out.
func (s *sensors) domains(r root, before []*domain) {
	const dir = "/sys/class/powercap/"
	for _, entry := range r.entries(dir) {
		number, ok := strings.CutPrefix(entry, "intel-rapl:")
		name := r.line(dir + entry + "/name")
		if !ok || strings.Contains(number, ":") || !strings.HasPrefix(name, "package-") || len(s.packages) == maxSensors {
			continue
		}
		path := dir + entry + "/energy_uj"
		if i := slices.IndexFunc(before, func(d *domain) bool { return d.path == path }); i >= 0 {
			s.packages = append(s.packages, before[i])
			continue
		}
		wrap, err := r.number(dir + entry + "/max_energy_range_uj")
		if err == nil && wrap > 0 {
			s.packages = append(s.packages, &domain{name: name, path: path, wrap: uint64(wrap)})
		}
	}
}

// sample adds the figures of the sensors to t. integrated describes the GPU
// that NVML has of a system on a chip; nil where it has none.
func (s *sensors) sample(r root, use sources, now time.Time, integrated *dunlinv1.GpuInfo, t *dunlinv1.Telemetry) {
	if now.Sub(s.at) >= scanEvery {
		s.scan(r, use)
	}
	fault := func(name string, err error) {
		t.Faults = append(t.Faults, name+": "+err.Error())
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODEV) {
			s.at = time.Time{} // it has gone: look for the sensors anew
		}
	}
	for i := range s.temperatures {
		z := &s.temperatures[i]
		v, err := r.number(z.path)
		if err == nil {
			z.answered = true
			if v > coldest && v < hottest {
				t.Temperatures = append(t.Temperatures, &dunlinv1.Temperature{Sensor: z.name, Celsius: float64(v) / 1e3})
			}
		} else if z.answered && !passing(err) {
			fault(z.source+" "+z.name, err)
		}
	}
	s.power(r, now, t, fault)
	if s.tegra.load != "" {
		s.sampleTegra(r, integrated, t)
	}
	for _, path := range s.wear {
		var buf [64]byte
		if raw, err := r.read(path, buf[:]); err == nil {
			if worn, ok := parseLifeTime(string(raw)); ok && (t.DiskWear == nil || *t.DiskWear < worn) {
				t.DiskWear = new(worn)
			}
		}
	}
}

// power adds the power of the whole device, or that of its processor.
func (s *sensors) power(r root, now time.Time, t *dunlinv1.Telemetry, fault func(string, error)) {
	watts := 0.0
	for _, label := range s.total {
		w, err := s.watts(r, label)
		if err != nil {
			if !passing(err) {
				fault("hwmon ina3221 "+label, err)
			}
			watts = math.NaN()
			break
		}
		watts += w
	}
	if len(s.total) > 0 && !math.IsNaN(watts) {
		t.PowerWatts, t.PowerSource = new(watts), "ina3221 "+strings.Join(s.total, "+")
	}
	joules, names, ok := s.energy(r, fault)
	if !ok || t.PowerWatts != nil { // one figure would be the device's, the other the processor's
		s.spent = spent{}
		return
	}
	t.EnergyJoules, t.PowerSource = new(joules), "rapl "+names
	l := &s.spent
	if l.names != names {
		*l = spent{names: names, joules: joules, at: now}
	}
	since := now.Sub(l.at)
	if since >= rateEvery || l.watts == nil {
		l.watts = nil
		if w := (joules - l.joules) / since.Seconds(); since > 0 && w >= 0 && w <= maxPackage {
			l.watts = new(w)
		}
	}
	if since >= rateEvery {
		l.joules, l.at = joules, now
	}
	if l.watts != nil {
		t.PowerWatts = new(*l.watts)
	}
}

// energy gives what the packages have spent since they were first read, and
// their names; false where one does not say.
func (s *sensors) energy(r root, fault func(string, error)) (joules float64, names string, ok bool) {
	var all []string
	ok = len(s.packages) > 0
	for _, d := range s.packages {
		again := d.answered
		if err := d.read(r); err != nil {
			if again && !passing(err) {
				fault("rapl "+d.name, err)
			}
			ok = false
			continue
		}
		joules += d.joules
		all = append(all, d.name)
	}
	return joules, strings.Join(all, "+"), ok
}

// watts gives the power of the rail of that label.
func (s *sensors) watts(r root, label string) (float64, error) {
	i := slices.IndexFunc(s.rails, func(r rail) bool { return r.label == label })
	if i < 0 {
		return 0, unix.EAGAIN
	}
	millivolts, err := r.number(s.rails[i].voltage)
	if err != nil {
		return 0, s.rails[i].fault(err)
	}
	milliamperes, err := r.number(s.rails[i].current)
	if err != nil {
		return 0, s.rails[i].fault(err)
	}
	s.rails[i].answered = true
	w := float64(millivolts) * float64(milliamperes) / 1e6
	if millivolts < 0 || milliamperes < 0 || w > maxRail {
		return 0, unix.EAGAIN
	}
	return w, nil
}

// fault is an error of a rail, which is a passing one until it has answered.
func (r *rail) fault(err error) error {
	if r.answered {
		return err
	}
	return unix.EAGAIN
}

// read counts the joules since the last time. A counter that has become smaller
// has begun anew behind its largest value.
func (d *domain) read(r root) error {
	v, err := r.number(d.path)
	if err != nil {
		return err
	}
	count := uint64(v)
	if v < 0 || count > d.wrap {
		return unix.ERANGE
	}
	gained := count - d.last // the first time all that it shows
	if count < d.last {
		gained = d.wrap - d.last + count
	}
	d.answered, d.joules, d.last = true, d.joules+float64(gained)/1e6, count
	return nil
}

// sampleTegra adds what the kernel knows of a Jetson's GPU to what NVML says of
// it, if it says anything.
func (s *sensors) sampleTegra(r root, integrated *dunlinv1.GpuInfo, t *dunlinv1.Telemetry) {
	var g *dunlinv1.GpuTelemetry
	if integrated != nil {
		if i := slices.IndexFunc(t.Gpus, func(g *dunlinv1.GpuTelemetry) bool { return g.Uuid == integrated.Uuid && g.Index == integrated.Index }); i >= 0 {
			g = t.Gpus[i]
		} else {
			g = &dunlinv1.GpuTelemetry{Index: integrated.Index, Uuid: integrated.Uuid}
		}
	} else {
		g = &dunlinv1.GpuTelemetry{Index: uint32(len(t.Gpus))}
	}
	if v, err := r.number(s.tegra.load); err == nil && v >= 0 && v <= 1000 && g.Utilisation == nil {
		g.Utilisation = new(float64(v) / 1000)
	}
	if s.tegra.clock != "" && g.SmClockMhz == nil {
		if v, err := r.number(s.tegra.clock); err == nil && v > 0 && v < 1e11 {
			g.SmClockMhz = new(uint32(v / 1e6))
		}
	}
	if g.Celsius == nil {
		for _, z := range t.Temperatures {
			if name := strings.ToLower(z.Sensor); name == "gpu-thermal" || name == "gpu-therm" {
				g.Celsius = new(z.Celsius)
			}
		}
	}
	if g.PowerWatts == nil {
		for _, label := range []string{"VDD_GPU", "POM_5V_GPU", "GPU"} {
			if w, err := s.watts(r, label); err == nil {
				g.PowerWatts = new(w)
				break
			}
		}
	}
	if !slices.Contains(t.Gpus, g) {
		t.Gpus = append(t.Gpus, g)
	}
}

// parseLifeTime reads the life_time of an eMMC: two estimates, for two kinds of
// its cells, in tenths of what it is good for: 1 is less than a tenth, 10 is 90 to
// 100 %, and 11 that more is used up; 0 says nothing (JEDEC JESD84-B51, DEVICE_LIFE_TIME_EST_TYP_A and _B).
func parseLifeTime(text string) (worn float64, ok bool) {
	for field := range strings.FieldsSeq(text) {
		n, err := strconv.ParseUint(field, 0, 8)
		if err != nil || n > 11 {
			return 0, false
		}
		if n > 0 {
			worn, ok = max(worn, float64(n-1)/10), true
		}
	}
	return worn, ok
}

// number reads a file that has one whole number.
func (r root) number(name string) (int64, error) {
	var buf [64]byte
	raw, err := r.read(name, buf[:])
	if err != nil {
		return 0, err
	}
	return parseNumber(string(raw))
}

// errNumber is the error of a file that has no whole number.
var errNumber = errors.New("is not a whole number")

func parseNumber(text string) (int64, error) {
	n, err := strconv.ParseInt(strings.TrimSpace(text), 10, 64)
	if err != nil {
		return 0, errNumber
	}
	return n, nil
}

// passing says whether an error of a sensor only means that it has no figure
// now: what it belongs to is switched off, or asleep.
func passing(err error) bool {
	for _, e := range []error{unix.EAGAIN, unix.EINVAL, unix.ENODATA, unix.ENXIO, unix.EBUSY, unix.EACCES, unix.EPERM} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// sortNatural sorts names by the number at their end where the rest is the
// same, so that hwmon10 comes after hwmon2.
func sortNatural(names []string) {
	slices.SortFunc(names, func(a, b string) int {
		return cmp.Or(cmp.Compare(strings.TrimRight(a, "0123456789"), strings.TrimRight(b, "0123456789")), cmp.Compare(len(a), len(b)), cmp.Compare(a, b))
	})
}
