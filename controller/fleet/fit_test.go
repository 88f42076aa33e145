package fleet

import (
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	"github.com/dunlin/dunlin/internal/estimate"
	"github.com/dunlin/dunlin/models"
	"github.com/dunlin/dunlin/models/serving"
	"github.com/dunlin/dunlin/models/tensor"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

const mib = 1 << 20

// net is a version of a model with so many MiB of weights and of workspace for
// each row.
func net(model string, weights, row int) Version {
	return Version{Model: model, Version: 1, Digest: "sha256:" + model, SizeBytes: uint64(weights) * mib, Bundle: &Bundle{
		WeightBytes: uint64(weights) * mib, Opset: 17, Precisions: []string{"FP32"},
		Costs: &models.Costs{Workspace: models.Linear{PerRow: float64(row) * mib}, FLOPs: models.Linear{PerRow: 2e9}, Traffic: models.Linear{Fixed: 4e6, PerRow: 1e6}},
	}}
}

func limited(budget int) Device {
	return Device{Name: "d", Class: "board", Limits: &dunlinv1.DeviceLimits{HostMemoryBytes: uint64(budget) * mib}}
}

func TestFit(t *testing.T) {
	measurement := func(device string, weights uint64, at int) Measurement {
		return Measurement{
			Device: device, Class: "board", Model: "m", Digest: "sha256:m", ReceivedAt: time.Unix(int64(at), 0),
			Weights: weights * mib, Session: 1 * mib, Fixed: 1 * mib, Row: 2 * mib, Batch: 4, Latency: 5 * time.Millisecond, Joules: 0.25,
		}
	}
	// What the estimate adds for a session, in as many versions.
	with := func(n, sessions uint64) string {
		return size(n*mib + sessions*uint64(estimate.Memory(0, models.Costs{}, 1).Session))
	}
	free := func(n uint64) *uint64 { n *= mib; return &n }
	tests := []struct {
		name     string
		measured []Measurement
		device   Device
		edit     func(*Device, *Version)
		others   []Version
		want     Verdict
		reason   []string
		memory   Source
		peak     uint64 // MiB; 0: not looked at
	}{
		{name: "it fits", device: limited(200), want: Fits, memory: Estimated},
		{name: "its weights alone are too much", device: limited(90), want: DoesNotFit, memory: Estimated,
			reason: []string{"needs " + with(110, 1) + " of memory", "weights 100.0 MiB", "a run of 1 row 10.0 MiB", "the budget is 90.0 MiB"}},
		{name: "its run is too much", device: limited(105), want: DoesNotFit, memory: Estimated},
		{name: "its largest run is too much", device: limited(200), edit: func(_ *Device, v *Version) { v.Bundle.MaxBatch = 16 }, want: DoesNotFit,
			memory: Estimated, reason: []string{"a run of 16 rows 160.0 MiB"}},
		{name: "measured here counts more than the class", device: limited(200), want: DoesNotFit, memory: MeasuredHere, peak: 310,
			measured: []Measurement{measurement("other", 100, 2), measurement("d", 300, 1)}},
		{name: "the class counts more than the graph", device: limited(200), want: DoesNotFit, memory: MeasuredOnClass, peak: 410,
			measured: []Measurement{measurement("other", 400, 1), measurement("third", 20, 2), measurement("broken", 9000, 3)}},
		{name: "one that measured as another class tells nothing", device: limited(200), want: Fits, memory: Estimated,
			measured: []Measurement{{Device: "d", Class: "desk", Model: "m", Digest: "sha256:m", Weights: 900 * mib}}},
		{name: "another class tells nothing", device: limited(200), edit: func(d *Device, _ *Version) { d.Class = "desk" }, want: Fits, memory: Estimated,
			measured: []Measurement{measurement("other", 400, 2)}},
		{name: "other bytes tell nothing", device: limited(200), edit: func(_ *Device, v *Version) { v.Digest = "sha256:new" }, want: Fits, memory: Estimated,
			measured: []Measurement{measurement("d", 400, 2)}},
		{name: "no class is no class", device: limited(200), edit: func(d *Device, _ *Version) { d.Class = "" }, want: Fits, memory: Estimated,
			measured: []Measurement{{Device: "other", Model: "m", Digest: "sha256:m", Weights: 900 * mib}}},
		{name: "a GPU's memory is the budget", device: limited(64), edit: func(d *Device, _ *Version) { d.Limits.DeviceMemoryBytes = 500 * mib }, want: Fits, memory: Estimated},
		{name: "the weights may stay in the file", device: limited(50), edit: func(d *Device, _ *Version) { d.Limits.Oversize = true }, want: FitsWithSwapping,
			memory: Estimated, reason: []string{"weights of 100.0 MiB stay in their file"}},
		{name: "but the run may not", device: limited(9), edit: func(d *Device, _ *Version) { d.Limits.Oversize = true }, want: DoesNotFit, memory: Estimated},
		{name: "together they are too much", device: limited(200), others: []Version{net("a", 60, 1), net("b", 60, 20)}, want: FitsWithSwapping, memory: Estimated,
			reason: []string{"together with a:1, b:1 it needs " + with(240, 3) + ", " + with(40, 3) + " more than the budget"}},
		{name: "what does not fit is not there", device: limited(200), others: []Version{net("a", 900, 1)}, want: Fits, memory: Estimated},
		{name: "an opset that is too new", device: limited(200), edit: func(d *Device, _ *Version) { d.Limits.MaxOpset = 16 }, want: DoesNotFit, memory: Estimated,
			reason: []string{"its opset is 17, the device takes 16 at most"}},
		{name: "a precision that it refuses", device: limited(200), edit: func(d *Device, _ *Version) { d.Limits.Precisions = []string{"FP16", "INT8"} }, want: DoesNotFit,
			memory: Estimated, reason: []string{"computes in FP32, the device takes FP16, INT8"}},
		{name: "no limits", device: Device{Name: "d"}, want: Unknown, memory: Estimated, reason: []string{"does not say what it takes"}},
		{name: "no budget", device: limited(0), want: Unknown, memory: Estimated, reason: []string{"no budget"}},
		{name: "an old bundle", device: limited(200), edit: func(_ *Device, v *Version) { v.Bundle = nil }, want: Unknown, memory: SourceUnknown,
			reason: []string{"its bundle does not say"}},
		{name: "an old bundle that was measured", device: limited(200), edit: func(_ *Device, v *Version) { v.Bundle = nil }, want: Fits, memory: MeasuredHere, peak: 110,
			measured: []Measurement{measurement("d", 100, 1)}},
		{name: "measured but never run", device: limited(200), edit: func(_ *Device, v *Version) { v.Bundle.MaxBatch = 4 }, want: Fits, memory: MeasuredHere, peak: 160,
			measured: []Measurement{{Device: "d", Class: "board", Model: "m", Digest: "sha256:m", Weights: 100 * mib, Session: 20 * mib}}},
		{name: "nothing was measured", device: limited(105), want: DoesNotFit, memory: Estimated,
			measured: []Measurement{{Device: "d", Class: "board", Model: "m", Digest: "sha256:m"}}},
		{name: "some shapes are not known", device: limited(200), edit: func(_ *Device, v *Version) { v.Bundle.Costs.Unknown = []string{"Loop"} }, want: Fits, memory: Estimated,
			reason: []string{"it may need more"}},
		{name: "no costs", device: limited(90), edit: func(_ *Device, v *Version) { v.Bundle.Costs = nil }, want: DoesNotFit, memory: Estimated},
		{name: "resident though too large", device: limited(100), want: Fits, memory: MeasuredHere, reason: []string{"is resident there"},
			edit:     func(d *Device, v *Version) { d.Has = map[string]Holding{v.Digest: {Resident: true, Bytes: 1}} },
			measured: []Measurement{measurement("d", 100, 1)}},
		{name: "the disk is too small", device: limited(200), edit: func(d *Device, _ *Version) { d.DiskBytes, d.Limits.DiskReserveBytes = 110*mib, 20*mib }, want: DoesNotFit,
			memory: Estimated, reason: []string{"files have 100.0 MiB", "disk has 110.0 MiB", "20.0 MiB stay free"}},
		{name: "the disk is too full", device: limited(200), edit: func(d *Device, _ *Version) { d.DiskFree = free(99) }, want: DoesNotFit, memory: Estimated,
			reason: []string{"99.0 MiB free"}},
		{name: "the disk has room", device: limited(200), edit: func(d *Device, _ *Version) { d.DiskFree = free(100) }, want: Fits, memory: Estimated},
		{name: "its files are there already", device: limited(200), want: Fits, memory: Estimated,
			edit: func(d *Device, v *Version) {
				d.DiskFree, d.Has = free(1), map[string]Holding{v.Digest: {Bytes: 100 * mib}}
			}},
		{name: "the rest of another's files comes first", device: limited(400), others: []Version{net("z", 50, 1)}, want: DoesNotFit, memory: Estimated,
			edit: func(d *Device, _ *Version) {
				d.DiskFree, d.Has = free(120), map[string]Holding{"sha256:z": {Bytes: 10 * mib}}
			}, reason: []string{"other versions take 40.0 MiB"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			v := net("m", 100, 10)
			d := tt.device
			d.Limits = proto.CloneOf(d.Limits)
			if tt.edit != nil {
				tt.edit(&d, &v)
			}
			got := NewFitter(tt.measured).Fit(d, append([]Version{v}, tt.others...))[0]
			if got.Verdict != tt.want || got.Need.Memory != tt.memory || tt.peak > 0 && got.Need.Peak() != tt.peak*mib {
				t.Errorf("got %+v", got)
			}
			if (got.Verdict == DoesNotFit || got.Verdict == Unknown) && got.Reason == "" {
				t.Error("no reason")
			}
			for _, part := range tt.reason {
				if !strings.Contains(got.Reason, part) {
					t.Errorf("%q is not in %q", part, got.Reason)
				}
			}
		})
	}
}

// Latency and energy come from the best source that has them, each by itself.
func TestNeed(t *testing.T) {
	v, d := net("m", 100, 10), limited(200)
	if n := new(Fitter).Need(d, v); n.LatencyFrom != SourceUnknown || n.JoulesFrom != SourceUnknown || n.Latency != 0 {
		t.Errorf("without the class's figures: %+v", n)
	}
	d.Limits.Fp32Gflops, d.Limits.MemoryGbPerSecond, d.Limits.ActiveWatts, d.Limits.RunOverheadSeconds = 100, 10, 5, 1e-3
	n := new(Fitter).Need(d, v)
	if n.LatencyFrom != Estimated || n.Latency != 21*time.Millisecond || n.JoulesFrom != Estimated || math.Abs(n.Joules-0.105) > 1e-9 {
		t.Errorf("estimated: %+v", n)
	}
	m := Measurement{Device: "other", Class: "board", Model: "m", Digest: v.Digest, Weights: mib, Latency: 40 * time.Millisecond}
	n = NewFitter([]Measurement{m}).Need(d, v)
	if n.LatencyFrom != MeasuredOnClass || n.Latency != 40*time.Millisecond || n.JoulesFrom != Estimated || math.Abs(n.Joules-0.2) > 1e-9 || n.MeasuredOn != "other" {
		t.Errorf("measured on the class: %+v", n)
	}
	m.Device, m.Latency, m.Joules = "d", 0, 7
	n = NewFitter([]Measurement{m}).Need(d, v)
	if n.Memory != MeasuredHere || n.LatencyFrom != Estimated || n.JoulesFrom != MeasuredHere || n.Joules != 7 {
		t.Errorf("memory and energy measured here: %+v", n)
	}
}

func TestBundleOf(t *testing.T) {
	c := &models.Config{
		Inputs:      []tensor.Info{{Name: "image", Type: tensor.Uint8}, {Name: "x", Type: tensor.Float16}},
		Outputs:     []tensor.Info{{Name: "y", Type: tensor.Float32}, {Name: "label", Type: tensor.Int64}},
		WeightBytes: 5, Opset: 13, Serving: &serving.Options{MaxBatchSize: 8},
	}
	b := BundleOf(c, []tensor.Type{tensor.Int8, tensor.Int64, 77})
	if got := strings.Join(b.Precisions, " "); got != "FP16 FP32 INT8" || b.MaxBatch != 8 || b.WeightBytes != 5 || b.Opset != 13 || b.Costs != nil {
		t.Errorf("got %+v", b)
	}
	if got := strings.Join(BundleOf(c, nil).Precisions, " "); got != "FP16 FP32" {
		t.Errorf("got %s", got)
	}
}

func drawWorld(t *rapid.T) (Device, []Version, []Measurement) {
	d := limited(rapid.IntRange(0, 300).Draw(t, "budget"))
	d.Limits.Oversize = rapid.Bool().Draw(t, "oversize")
	if rapid.Bool().Draw(t, "disk known") {
		free := uint64(rapid.IntRange(0, 400).Draw(t, "free")) * mib
		d.DiskFree, d.DiskBytes = &free, 1000*mib
		d.Limits.DiskReserveBytes = uint64(rapid.IntRange(0, 50).Draw(t, "reserve")) * mib
	}
	d.Has = map[string]Holding{}
	var versions []Version
	var measured []Measurement
	for i := range rapid.IntRange(1, 5).Draw(t, "versions") {
		v := net(string(rune('a'+i)), rapid.IntRange(1, 250).Draw(t, "weights"), rapid.IntRange(0, 50).Draw(t, "row"))
		if rapid.IntRange(0, 5).Draw(t, "old") == 0 {
			v.Bundle = nil
		}
		if rapid.Bool().Draw(t, "has") {
			d.Has[v.Digest] = Holding{Resident: rapid.Bool().Draw(t, "resident"), Bytes: uint64(rapid.IntRange(1, 250).Draw(t, "bytes")) * mib}
		}
		for _, device := range []string{"d", "e", "f"} {
			if rapid.IntRange(0, 3).Draw(t, "measured") == 0 {
				measured = append(measured, Measurement{Device: device, Class: "board", Model: v.Model, Digest: v.Digest, ReceivedAt: time.Unix(int64(len(measured)), 0),
					Weights: uint64(rapid.IntRange(1, 300).Draw(t, "w")) * mib, Row: uint64(rapid.IntRange(0, 40).Draw(t, "r")) * mib})
			}
		}
		versions = append(versions, v)
	}
	return d, versions, measured
}

// The order of versions and measurements changes nothing, more memory and more
// disk never make a verdict worse, what is resident is never refused, and each
// verdict is what its figures say.
func TestFitHolds(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		d, versions, measured := drawWorld(t)
		fits := NewFitter(measured).Fit(d, versions)
		for i, f := range fits {
			if f.Version.Model != versions[i].Model {
				t.Fatalf("fits[%d] is of %s", i, f.Version.Model)
			}
			if f.Verdict == DoesNotFit && d.Has[f.Version.Digest].Resident {
				t.Fatalf("resident, and %s", f.Reason)
			}
			if f.Verdict != Fits && f.Reason == "" {
				t.Fatalf("no reason: %+v", f)
			}
			if f.Verdict == Fits && f.Total > f.Budget && len(versions) > 1 && !d.Has[f.Version.Digest].Resident && f.Total > f.Need.Peak() {
				t.Fatalf("fits, and %d is more than %d", f.Total, f.Budget)
			}
			if f.Need.Memory != SourceUnknown && f.Total < min(f.Need.Peak(), f.Budget) && !d.Limits.GetOversize() {
				t.Fatalf("the total of %d lacks its own %d", f.Total, f.Need.Peak())
			}
		}
		shuffledV, shuffledM := slices.Clone(versions), slices.Clone(measured)
		random := rand.New(rand.NewPCG(uint64(rapid.IntRange(0, 1<<30).Draw(t, "seed")), 0))
		random.Shuffle(len(shuffledV), func(i, j int) { shuffledV[i], shuffledV[j] = shuffledV[j], shuffledV[i] })
		random.Shuffle(len(shuffledM), func(i, j int) { shuffledM[i], shuffledM[j] = shuffledM[j], shuffledM[i] })
		for _, f := range NewFitter(shuffledM).Fit(d, shuffledV) {
			i := slices.IndexFunc(fits, func(o Fit) bool { return o.Version.Model == f.Version.Model })
			if o := fits[i]; o.Verdict != f.Verdict || o.Reason != f.Reason || o.Total != f.Total || o.Need != f.Need {
				t.Fatalf("order counts: %+v and %+v", o, f)
			}
		}
		more := d
		more.Limits = proto.CloneOf(d.Limits)
		more.Limits.HostMemoryBytes = 1 << 50
		if d.DiskFree != nil {
			more.DiskFree, more.DiskBytes = new(uint64(1<<50)), 1<<51
		}
		for i, f := range NewFitter(measured).Fit(more, versions) {
			if f.Verdict == DoesNotFit || f.Verdict == FitsWithSwapping || f.Verdict == Unknown && f.Need.Memory != SourceUnknown {
				t.Fatalf("with all the memory of the world: %+v, before %+v", f, fits[i])
			}
		}
	})
}

// What does not fit leaves the device what it had, and once it has it, keeps it.
func TestCompileRefuses(t *testing.T) {
	small, large := net("m", 20, 1), net("m", 200, 1)
	large.Version, large.Digest = 2, "sha256:large"
	small.Signatures, large.Signatures = []string{"sha256:s"}, []string{"sha256:l"}
	objects := func(version int64, measured ...Measurement) Objects {
		return Objects{Deployments: []Deployment{{Name: "dep", Model: "m", Version: version}}, Versions: []Version{small, large}, Measured: measured,
			Routes: []Route{{Name: "r", Targets: []Target{{Model: "m", Weight: 1}}}}}
	}
	d := limited(100)
	versionOf := func(doc *dunlinv1.DesiredDocument) int64 {
		if len(doc.GetVersions()) == 0 {
			return 0
		}
		v := doc.GetVersions()[0]
		if want := map[int64]string{1: small.Digest, 2: large.Digest}[v.GetVersion()]; v.GetDigest() != want || v.GetDeployment() != "dep" || v.GetSizeBytes() == 0 ||
			!slices.Equal(v.GetSignatures(), map[int64][]string{1: small.Signatures, 2: large.Signatures}[v.GetVersion()]) {
			t.Errorf("got %v", v)
		}
		return v.GetVersion()
	}
	first, refused := NewCompiler(objects(1)).Compile(d, nil)
	if versionOf(first) != 1 || len(refused) > 0 {
		t.Fatalf("got %v, refused %v", first, refused)
	}
	doc, refused := NewCompiler(objects(2)).Compile(d, first)
	if versionOf(doc) != 1 || len(refused) != 1 || refused[0].Deployment != "dep" || refused[0].Version != 2 || !strings.HasPrefix(refused[0].Reason, "does not fit: it needs ") {
		t.Fatalf("got %v, refused %v", doc, refused)
	}
	if again, _ := NewCompiler(objects(2)).Compile(d, doc); !proto.Equal(again, doc) {
		t.Errorf("it becomes %v", again)
	}
	doc, refused = NewCompiler(objects(2)).Compile(d, nil)
	if versionOf(doc) != 0 || len(refused) != 1 || len(doc.GetRoutes()) != 1 {
		t.Errorf("without any before: got %v, refused %v", doc, refused)
	}
	d.Limits.HostMemoryBytes = 300 * mib
	given, refused := NewCompiler(objects(2)).Compile(d, first)
	if versionOf(given) != 2 || len(refused) > 0 {
		t.Fatalf("with more memory: got %v, refused %v", given, refused)
	}
	// It measures a little more than the budget.
	m := Measurement{Device: "d", Class: "board", Model: "m", Digest: large.Digest, Weights: 301 * mib}
	if doc, refused := NewCompiler(objects(2, m)).Compile(d, given); !proto.Equal(doc, given) || len(refused) > 0 {
		t.Errorf("what it was given is taken away: got %v, refused %v", doc, refused)
	}
	other := d
	other.Name = "e"
	if doc, refused := NewCompiler(objects(2, m)).Compile(other, first); versionOf(doc) != 1 || len(refused) != 1 {
		t.Errorf("another of the class: got %v, refused %v", doc, refused)
	}
}
