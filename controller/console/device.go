package console

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	v1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// deviceView is what the page of one device shows.
type deviceView struct {
	D                     *v1.Device
	State                 state
	Heard                 time.Time
	Desired, Observed     string // generations
	Behind                bool
	Versions              []versionRow
	Routes                []*v1.RouteStatus
	Agent                 *v1.AgentStatus
	Alarms                []alarmView
	Bars                  []memoryBar
	Labels                []chip
	Drifts                []*v1.Drift
	Now                   time.Time
	Sampled               time.Time // zero: there is no telemetry
	Cpu, Power, Disk, P99 string
}

// versionRow holds a version that the device should have, or has, against what
// it says of it.
type versionRow struct {
	Ref, Deployment, Digest string
	Wanted                  bool
	Status                  *v1.VersionStatus // nil: it has said nothing
	Word                    string
	Share                   string // of the bytes, while they come
	Bad                     bool
}

// versionsOf joins what a device should have with what it reports.
func versionsOf(d *v1.Device) []versionRow {
	rows := map[string]*versionRow{}
	for _, w := range d.GetDesiredDocument().GetVersions() {
		ref := w.GetModel() + ":" + strconv.FormatInt(w.GetVersion(), 10)
		rows[ref] = &versionRow{Ref: ref, Deployment: w.GetDeployment(), Digest: w.GetDigest(), Wanted: true, Word: "not reported"}
	}
	for _, s := range d.GetReported().GetVersions() {
		ref := reference(s)
		r := rows[ref]
		if r == nil {
			r = &versionRow{Ref: ref, Deployment: s.GetDeployment(), Digest: s.GetDigest()}
			rows[ref] = r
		}
		r.Status, r.Word = s, stateWord(s.GetState())
		r.Bad = s.GetState() == v1.VersionState_VERSION_STATE_QUARANTINED
		if t := s.GetBytesTotal(); t > 0 && s.GetBytesPresent() < t {
			r.Share = fmt.Sprintf("%s of %s", bytesText(s.GetBytesPresent()), bytesText(t))
		}
	}
	var all []versionRow
	for _, ref := range slices.Sorted(maps.Keys(rows)) {
		all = append(all, *rows[ref])
	}
	return all
}

// segment is a part of a memory, in bytes, and in thousandths of its bar.
type segment struct {
	Name   string
	Class  string
	Bytes  uint64
	X, W   string
	Detail string
}

// memoryBar is one memory and what is in it.
type memoryBar struct {
	Name     string
	Total    uint64
	Segments []segment
	Split    bool // by model
}

// barOf lays segments beside each other; what is left is free.
func barOf(name string, total, used uint64, models []*v1.ModelTelemetry) memoryBar {
	bar := memoryBar{Name: name, Total: total, Split: models != nil}
	used = min(used, total)
	left := used
	at := 0.0
	add := func(name, class string, n uint64, detail string) {
		if n == 0 {
			return
		}
		w := 1000 * float64(n) / float64(total)
		bar.Segments = append(bar.Segments, segment{name, class, n, strconv.FormatFloat(at, 'f', 2, 64), strconv.FormatFloat(w, 'f', 2, 64), detail})
		at += w
	}
	models = slices.SortedFunc(slices.Values(models), func(a, b *v1.ModelTelemetry) int {
		return cmp.Or(cmp.Compare(b.GetMemoryBytes(), a.GetMemoryBytes()), strings.Compare(a.GetModel(), b.GetModel()))
	})
	for i, m := range models {
		n := min(m.GetMemoryBytes(), left)
		how := "estimated"
		if m.GetMeasured() {
			how = "measured"
		}
		add(fmt.Sprintf("%s:%d", m.GetModel(), m.GetVersion()), fmt.Sprintf("seg-%d", (i+1)%4), n, how)
		left -= n
	}
	other := "Used"
	if bar.Split {
		other = "Other"
	}
	add(other, "seg-other", left, "")
	add("Free", "seg-free", total-used, "")
	return bar
}

// barsOf gives the memories of a device. Models are in that of the GPU that
// their weights leave and come back to, else in the host's.
func barsOf(d *v1.Device) []memoryBar {
	t := d.GetTelemetry()
	models := slices.DeleteFunc(slices.Clone(t.GetModels()), func(m *v1.ModelTelemetry) bool { return m.GetMemoryBytes() == 0 })
	if models == nil {
		models = []*v1.ModelTelemetry{}
	}
	pool := -1
	if rest, ok := strings.CutPrefix(d.GetInfo().GetWeightPools(), "cuda:"); ok {
		index, _, _ := strings.Cut(rest, " ")
		if n, err := strconv.Atoi(index); err == nil {
			pool = n
		}
	}
	var bars []memoryBar
	for _, g := range t.GetGpus() {
		if g.MemoryTotalBytes == nil || g.MemoryUsedBytes == nil || g.GetMemoryTotalBytes() == 0 {
			continue
		}
		name := fmt.Sprintf("GPU %d", g.GetIndex())
		same := func(i *v1.GpuInfo) bool { return i.GetIndex() == g.GetIndex() && i.GetName() != "" }
		if at := slices.IndexFunc(d.GetInfo().GetGpus(), same); at >= 0 {
			name += ", " + d.GetInfo().GetGpus()[at].GetName()
		}
		var inside []*v1.ModelTelemetry
		if int(g.GetIndex()) == pool {
			inside = models
		}
		bars = append(bars, barOf(name, g.GetMemoryTotalBytes(), g.GetMemoryUsedBytes(), inside))
	}
	if t != nil && t.MemoryTotalBytes != nil && t.MemoryUsedBytes != nil && t.GetMemoryTotalBytes() > 0 {
		var inside []*v1.ModelTelemetry
		if pool < 0 || len(bars) == 0 {
			inside = models
		}
		bars = append(bars, barOf("Host memory", t.GetMemoryTotalBytes(), t.GetMemoryUsedBytes(), inside))
	}
	return bars
}

// alarmView is an alarm with its samples as a curve.
type alarmView struct {
	A     *v1.Alarm
	Error bool
	Curve string // points in a box of 1000 by 100
	Bound string // height of the threshold in it; "": outside, or none
}

func alarmOf(a *v1.Alarm) alarmView {
	v := alarmView{A: a, Error: a.GetSeverity() == v1.Severity_SEVERITY_ERROR}
	s := a.GetSamples()
	if len(s) < 2 {
		return v
	}
	low, high := s[0].GetValue(), s[0].GetValue()
	for _, one := range s {
		low, high = min(low, one.GetValue()), max(high, one.GetValue())
	}
	if a.Threshold != nil {
		low, high = min(low, a.GetThreshold()), max(high, a.GetThreshold())
	}
	from, to := s[0].GetAt().AsTime(), s[len(s)-1].GetAt().AsTime()
	if !(high > low) || !to.After(from) {
		return v
	}
	y := func(f float64) string { return strconv.FormatFloat(95-90*(f-low)/(high-low), 'f', 1, 64) }
	var points []string
	for _, one := range s {
		x := 1000 * float64(one.GetAt().AsTime().Sub(from)) / float64(to.Sub(from))
		points = append(points, strconv.FormatFloat(x, 'f', 1, 64)+","+y(one.GetValue()))
	}
	v.Curve = strings.Join(points, " ")
	if a.Threshold != nil {
		v.Bound = y(a.GetThreshold())
	}
	return v
}

func generation(g *v1.Generation) string {
	if g == nil {
		return "none"
	}
	return strconv.FormatUint(g.GetNumber(), 10)
}

func deviceViewOf(d *v1.Device, drifts []*v1.DeviceDrift, now time.Time) deviceView {
	t := d.GetTelemetry()
	v := deviceView{
		D: d, State: stateOf(d), Heard: timeOf(d.GetLastHeardAt()), Desired: generation(d.GetDesired()), Observed: generation(d.GetReported().GetObserved()),
		Behind:   d.GetDesired() != nil && (d.GetDesired().GetNumber() != d.GetReported().GetObserved().GetNumber() || d.GetDesired().GetIncarnation() != d.GetReported().GetObserved().GetIncarnation()),
		Versions: versionsOf(d), Routes: d.GetReported().GetRoutes(), Agent: d.GetReported().GetAgent(), Bars: barsOf(d), Now: now, Sampled: timeOf(t.GetAt()),
		Cpu: percent(nil), Power: "not known", Disk: "not known", P99: "not known",
	}
	if t != nil {
		v.Cpu = percent(t.CpuUtilisation)
		if t.PowerWatts != nil {
			v.Power = fmt.Sprintf("%.1f W", t.GetPowerWatts())
		}
		if t.DiskFreeBytes != nil {
			v.Disk = bytesText(t.GetDiskFreeBytes())
		}
		if t.RequestP99Seconds != nil {
			v.P99 = fmt.Sprintf("%.1f ms", 1000*t.GetRequestP99Seconds())
		}
	}
	for _, a := range t.GetAlarms() {
		v.Alarms = append(v.Alarms, alarmOf(a))
	}
	for _, k := range slices.Sorted(maps.Keys(d.GetLabels())) {
		l := k + "=" + d.GetLabels()[k]
		v.Labels = append(v.Labels, chip{Text: clip(l, 60), Title: l, URL: filter{Labels: []string{l}, Page: 1}.URL()})
	}
	for _, one := range drifts {
		v.Drifts = append(v.Drifts, one.GetDrift())
	}
	return v
}

var errNoDevice = errors.New("there is no such device")

func (s *console) device(w http.ResponseWriter, r *http.Request, in session) {
	name := r.PathValue("device")
	d, drifts, err := in.deviceNow(r.Context(), name)
	if err != nil {
		s.failed(w, r, in, err)
		return
	}
	now := s.Now()
	s.pages.write(w, r, http.StatusOK, "device", page{Session: in, Title: name, Data: deviceViewOf(d, drifts, now), Now: now})
}
