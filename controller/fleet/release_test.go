package fleet

import "testing"

func TestSkew(t *testing.T) {
	for _, c := range []struct {
		controller, agent, made string
		outside                 bool
	}{
		{"0.7.0", "0.7.0", "0.6 to 0.8", false},
		{"0.7.3", "0.6.9", "0.6 to 0.8", false},
		{"0.7.0", "0.8.0", "0.6 to 0.8", false},
		{"0.7.0", "0.8.12", "0.6 to 0.8", false},
		{"0.7.0", "0.5.9", "0.6 to 0.8", true},
		{"0.7.0", "0.9.0", "0.6 to 0.8", true},
		{"0.7.0", "1.7.0", "0.6 to 0.8", true},
		{"1.0.0", "0.9.0", "1.0 to 1.1", true},
		{"1.0.0", "1.1.0", "1.0 to 1.1", false},
		{"0.7.0", "(devel)", "0.6 to 0.8", false},
		{"0.7.0", "", "0.6 to 0.8", false},
		{"(devel)", "0.1.0", "", false},
	} {
		if made, outside := Skew(c.controller, c.agent); made != c.made || outside != c.outside {
			t.Errorf("controller %s, agent %q: %s, %t, want %s, %t", c.controller, c.agent, made, outside, c.made, c.outside)
		}
	}
}
