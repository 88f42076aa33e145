package plot

import (
	"bytes"
	"encoding/xml"
	"errors"
	"flag"
	"io"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

var update = flag.Bool("update", false, "write the golden files again")

func point(provider string, batch uint32, p50, rate float64) *dunlinv1.ProfilePoint {
	return &dunlinv1.ProfilePoint{Setting: &dunlinv1.ModelSetting{Provider: provider, Batch: batch, Instances: 1, Prepacked: true}, Runs: 50,
		P50Seconds: p50, P95Seconds: p50 * 1.25, P99Seconds: p50 * 1.75, RowsPerSecond: rate}
}

func profile() *dunlinv1.ModelProfile {
	return &dunlinv1.ModelProfile{
		Model: "resnet50", Version: 3,
		Points: []*dunlinv1.ProfilePoint{
			point("CPUExecutionProvider", 4, 0.105, 38.1), point("CPUExecutionProvider", 1, 0.0314, 31.8), point("CPUExecutionProvider", 2, 0.058, 34.5),
			point("CPUExecutionProvider", 8, 0.198, 40.4), point("CPUExecutionProvider", 16, 0.392, 40.8), point("Other", 1, 0.9, 1),
		},
		Recommended: &dunlinv1.ModelSetting{Provider: "CPUExecutionProvider", Batch: 8, Instances: 1, Prepacked: true},
		Latency:     []*dunlinv1.LatencyPoint{{Rows: 1, Seconds: 0.032}, {Rows: 8, Seconds: 0.2}, {Rows: 16, Seconds: 0.393}},
	}
}

func TestGolden(t *testing.T) {
	few := profile()
	few.Points, few.Latency, few.Recommended = few.Points[1:2], nil, nil
	few.Points[0].P50Seconds, few.Points[0].P95Seconds, few.Points[0].P99Seconds = 2e-5, 3e-5, 4e-5
	for name, p := range map[string]*dunlinv1.ModelProfile{
		"profile": profile(), "one-point": few,
		"unmeasured": {Model: "net", Version: 1, Unmeasured: "inputs <unknown> & strange"},
	} {
		t.Run(name, func(t *testing.T) {
			got := Profile("cam-1", p).SVG()
			path := filepath.Join("testdata", name+".svg")
			if *update {
				if err := os.WriteFile(path, got, 0o666); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, want) {
				t.Errorf("not as %s", path)
			}
		})
	}
}

// Whatever the values and names are, the figure is well-formed, complete and
// stays within its frame.
func TestSVGIsWellFormed(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		value := rapid.OneOf(rapid.Float64Range(0, 1e6), rapid.SampledFrom([]float64{0, -1, math.NaN(), math.Inf(1), 1e-300, 1e300, math.MaxFloat64}))
		name := rapid.String()
		f := Figure{Title: name.Draw(t, "title"), Description: name.Draw(t, "description")}
		for range rapid.IntRange(0, 3).Draw(t, "panels") {
			p := Panel{Title: name.Draw(t, "panel"), X: Axis{Label: name.Draw(t, "x"), Doubling: rapid.Bool().Draw(t, "doubling")}, Mark: &Mark{value.Draw(t, "mark"), name.Draw(t, "mark name")}}
			for range rapid.IntRange(0, 7).Draw(t, "lines") {
				l := Line{Name: name.Draw(t, "line"), Dashed: rapid.Bool().Draw(t, "dashed")}
				for range rapid.IntRange(0, 5).Draw(t, "points") {
					l.Points = append(l.Points, Point{value.Draw(t, "px"), value.Draw(t, "py")})
				}
				p.Lines = append(p.Lines, l)
			}
			f.Panels = append(f.Panels, p)
		}
		svg := f.SVG()
		if bytes.Contains(svg, []byte("NaN")) && !strings.Contains(f.Title+f.Description, "NaN") || bytes.Contains(svg, []byte("+Inf")) {
			t.Fatalf("a coordinate is no number:\n%s", svg)
		}
		d := xml.NewDecoder(bytes.NewReader(svg))
		titles := 0
		for {
			token, err := d.Token()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatalf("%v\n%s", err, svg)
			}
			if e, ok := token.(xml.StartElement); ok && e.Name.Local == "desc" {
				titles++
			}
		}
		if titles != 1 {
			t.Fatal("no description")
		}
	})
}

func TestTicks(t *testing.T) {
	for most, want := range map[float64]string{0: "0 1", 0.9: "0 0.2 0.4 0.6 0.8 1", 6.5: "0 1 2 3 4 5 6 7", 40.8: "0 10 20 30 40 50", 686: "0 100 200 300 400 500 600 700"} {
		var got []string
		for _, v := range ticks(most) {
			got = append(got, number(v))
		}
		if strings.Join(got, " ") != want {
			t.Errorf("%v: got %v, want %s", most, got, want)
		}
	}
	rapid.Check(t, func(t *rapid.T) {
		most := rapid.Float64Range(1e-9, 1e12).Draw(t, "most")
		steps := ticks(most)
		if last := steps[len(steps)-1]; len(steps) < 4 || len(steps) > 9 || last < most*(1-1e-6) || steps[len(steps)-2] >= most || !slices.IsSorted(steps) {
			t.Fatalf("%v: %v", most, steps)
		}
	})
}
