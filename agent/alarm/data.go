package alarm

import (
	"math"

	"github.com/dunlin/dunlin/agent/datadrift"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// dataDrift lasts as datadrift.Watch has it, and does not count time: what is
// over between two samples was there all the same.
var dataDrift = rule{name: "drift", severity: dunlinv1.Severity_SEVERITY_WARNING}

// drifting is what is known of a version's data.
type drifting struct {
	times, looks uint64 // as of the last sample
	recent       []point
}

// judgeData judges how the data of a version differs from its reference.
func (d *Detector) judgeData(s *served, f *datadrift.Finding) {
	if f.Looks == 0 {
		return
	}
	x := &s.data
	began := f.Times > x.times
	if f.Looks != x.looks {
		psi := f.Now.PSI
		if began {
			psi = max(psi, f.Worst.PSI)
		}
		x.recent = push(x.recent, point{d.now, psi}, maxSamples)
	}
	x.times, x.looks = f.Times, f.Looks
	d.judge(d.cause(DataDrift, s.name), &dataDrift, f.Drifted || began, !f.Drifted, func() finding {
		worst := f.Worst
		worst.Tensor = named(worst.Tensor)
		return finding{bySamples, "psi", worst.String(), datadrift.Threshold, math.NaN(), math.NaN(), x.recent}
	})
}
