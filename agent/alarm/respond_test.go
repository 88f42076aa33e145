package alarm

import (
	"testing"
	"time"
)

func TestDecide(t *testing.T) {
	type at struct {
		minutes       float64
		pressing, hot bool
		want          string
	}
	tests := map[string]struct {
		reaction Reaction
		looks    []at
	}{
		"none":   {None, []at{{0, true, true, ""}, {10, true, true, ""}}},
		"cordon": {Cordon, []at{{0, false, false, ""}, {1, true, true, "cordon"}, {2, true, false, "cordon"}, {3, false, false, ""}}},
		"throttle while it stays hot": {Throttle, []at{
			{0, true, true, "duty 0.5, batch 4"}, {2.9, true, true, "duty 0.5, batch 4"}, {3, true, true, "duty 0.25, batch 1"}, {60, true, true, "duty 0.25, batch 1"}, {61, false, false, ""},
		}},
		"throttle that helps": {Throttle, []at{
			{0, true, true, "duty 0.5, batch 4"}, {1, true, false, "duty 0.5, batch 4"}, {10, true, false, "duty 0.5, batch 4"}, {20, true, true, "duty 0.5, batch 4"}, {22, true, true, "duty 0.5, batch 4"}, {23, true, true, "duty 0.25, batch 1"},
		}},
		"memory errors": {Throttle, []at{{0, true, false, "duty 0.5, batch 4"}, {600, true, false, "duty 0.5, batch 4"}, {601, false, false, ""}}},
	}
	for name, tt := range tests {
		r := NewResponder(tt.reaction)
		for _, l := range tt.looks {
			if got := r.Decide(time.Duration(l.minutes*float64(time.Minute)), l.pressing, l.hot).String(); got != l.want {
				t.Errorf("%s, minute %g: %q, want %q", name, l.minutes, got, l.want)
			}
		}
	}
}
