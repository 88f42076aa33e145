package plot

import (
	"cmp"
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"

	"github.com/dunlin/dunlin/internal/estimate"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// Profile is the figure of a model's profile: latency and throughput by the
// rows of a run. It shows the setting that was measured with the most batches,
// of several the recommended one.
func Profile(device string, p *dunlinv1.ModelProfile) Figure {
	shown, points := series(p)
	name := fmt.Sprintf("%s:%d on %s", p.GetModel(), p.GetVersion(), device)
	f := Figure{Title: name, Subtitle: settingText(shown), Description: describe(name, p, shown, points)}
	if len(points) == 0 {
		f.Subtitle = p.GetUnmeasured()
	}
	most := 0.0
	for _, q := range points {
		most = max(most, q.GetP99Seconds())
	}
	for _, l := range p.GetLatency() {
		most = max(most, l.GetSeconds())
	}
	unit, each := "ms", 1e3
	switch {
	case most >= 10:
		unit, each = "s", 1
	case most < 1e-3:
		unit, each = "µs", 1e6
	}
	line := func(name string, value func(*dunlinv1.ProfilePoint) float64) Line {
		l := Line{Name: name}
		for _, q := range points {
			l.Points = append(l.Points, Point{float64(rows(q.GetSetting())), value(q)})
		}
		return l
	}
	latency := Panel{
		Title: "Latency", X: Axis{Label: "batch (rows of a run)", Doubling: true}, Y: Axis{Label: "time of a run (" + unit + ")"},
		Lines: []Line{
			line("p50", func(q *dunlinv1.ProfilePoint) float64 { return q.GetP50Seconds() * each }),
			line("p95", func(q *dunlinv1.ProfilePoint) float64 { return q.GetP95Seconds() * each }),
			line("p99", func(q *dunlinv1.ProfilePoint) float64 { return q.GetP99Seconds() * each }),
		},
	}
	if len(p.GetLatency()) > 0 {
		var fit []estimate.Point
		last := uint32(1)
		for _, l := range p.GetLatency() {
			fit, last = append(fit, estimate.Point{Rows: int(l.GetRows()), Seconds: l.GetSeconds()}), max(last, l.GetRows())
		}
		model := Line{Name: "predicted", Dashed: true}
		// Steps of an eighth of a doubling: between its points the prediction
		// is straight, and no line on this axis.
		at := estimate.FitLatency(fit)
		for x := 0; x <= 8*20; x++ {
			n := uint32(math.Round(math.Pow(2, float64(x)/8)))
			if q := (Point{float64(n), at.At(int(n)).Seconds() * each}); n <= last && (len(model.Points) == 0 || model.Points[len(model.Points)-1].X < q.X) {
				model.Points = append(model.Points, q)
			}
		}
		latency.Lines = append(latency.Lines, model)
	}
	throughput := Panel{
		Title: "Throughput", X: latency.X, Y: Axis{Label: "rows per second"},
		Lines: []Line{line("rows per second", (*dunlinv1.ProfilePoint).GetRowsPerSecond)},
	}
	if b := p.GetRecommended().GetBatch(); b > 0 {
		mark := &Mark{float64(b), fmt.Sprintf("recommended: %d", b)}
		latency.Mark, throughput.Mark = mark, mark
	}
	f.Panels = []Panel{latency, throughput}
	return f
}

func rows(s *dunlinv1.ModelSetting) uint32 { return max(s.GetBatch(), 1) }

// key is a setting without its batch.
type key struct {
	provider           string
	instances, threads uint32
	prepacked          bool
}

func keyOf(s *dunlinv1.ModelSetting) key {
	return key{s.GetProvider(), s.GetInstances(), s.GetThreads(), s.GetPrepacked()}
}

// series gives the setting that is shown, and its points by batch, one of each.
func series(p *dunlinv1.ModelProfile) (shown key, points []*dunlinv1.ProfilePoint) {
	byKey := map[key]map[uint32]*dunlinv1.ProfilePoint{}
	for _, q := range p.GetPoints() {
		k := keyOf(q.GetSetting())
		if byKey[k] == nil {
			byKey[k] = map[uint32]*dunlinv1.ProfilePoint{}
		}
		byKey[k][rows(q.GetSetting())] = q // of several the last
	}
	shown = keyOf(p.GetRecommended())
	better := func(a, b key) int {
		text := func(k key) string { return fmt.Sprint(k != keyOf(p.GetRecommended()), k) }
		return cmp.Or(cmp.Compare(len(byKey[b]), len(byKey[a])), cmp.Compare(text(a), text(b)))
	}
	if keys := slices.SortedFunc(maps.Keys(byKey), better); len(keys) > 0 {
		shown = keys[0]
	}
	for _, b := range slices.Sorted(maps.Keys(byKey[shown])) {
		points = append(points, byKey[shown][b])
	}
	return shown, points
}

func settingText(k key) string {
	threads := fmt.Sprintf("%d threads", k.threads)
	switch k.threads {
	case 0:
		threads = "shared threads"
	case 1:
		threads = "1 thread"
	}
	s := fmt.Sprintf("%s, %d at a time, %s", cmp.Or(k.provider, "no provider"), max(k.instances, 1), threads)
	if k.prepacked {
		s += ", prepacked"
	}
	return s
}

func describe(name string, p *dunlinv1.ModelProfile, shown key, points []*dunlinv1.ProfilePoint) string {
	if len(points) == 0 {
		return fmt.Sprintf("Nothing was measured of %s. %s", name, p.GetUnmeasured())
	}
	var s strings.Builder
	fmt.Fprintf(&s, "Measured of %s with %s.", name, settingText(shown))
	for _, q := range slices.Compact([]*dunlinv1.ProfilePoint{points[0], points[len(points)-1]}) {
		fmt.Fprintf(&s, " A batch of %d takes %.3g ms (p50), %.3g ms (p95) and %.3g ms (p99), and gives %.3g rows per second.",
			rows(q.GetSetting()), q.GetP50Seconds()*1e3, q.GetP95Seconds()*1e3, q.GetP99Seconds()*1e3, q.GetRowsPerSecond())
	}
	if b := p.GetRecommended().GetBatch(); b > 0 {
		fmt.Fprintf(&s, " Recommended are %d rows.", b)
	}
	return s.String()
}
