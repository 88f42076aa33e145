package profile

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math"
	"slices"

	"github.com/dunlin/dunlin/models/tensor"
)

// Tolerance is how far outputs may be from the reference: by Absolute, and by
// Relative of the reference's value, together.
type Tolerance struct{ Relative, Absolute float64 }

// Tolerances of models that bring none along. Sums of many FP32 products differ
// by their order in the fifth digit, and fused operators round less often; a
// wrong operator is off in the first. FP16 has eleven bits, BF16 eight, and
// quantised operators round at the eighth.
var (
	ForFP32  = Tolerance{Relative: 1e-3, Absolute: 1e-4}
	ForLower = Tolerance{Relative: 5e-2, Absolute: 1e-2}
)

// Check is how the outputs of a provider compare with the reference.
type Check struct {
	Provider         string
	Accepted         bool
	Reason           string // why not; or why nothing was compared
	Absolute         float64
	Relative         float64 // where the reference is more than the absolute tolerance
	compared, beyond int
}

// Compare compares outputs with those of the reference, by name.
func Compare(provider string, want, got []tensor.Tensor, t Tolerance) Check {
	c := Check{Provider: provider}
	for _, w := range want {
		i := slices.IndexFunc(got, func(g tensor.Tensor) bool { return g.Name == w.Name })
		if i < 0 {
			c.Reason = fmt.Sprintf("output %q is missing", w.Name)
			return c
		}
		if reason := c.compare(w, got[i], t); reason != "" {
			c.Reason = fmt.Sprintf("output %q: %s", w.Name, reason)
			return c
		}
	}
	if c.beyond > 0 {
		c.Reason = fmt.Sprintf("%d of %d values differ by more than %g + %g of the reference: by %.3g at most", c.beyond, c.compared, t.Absolute, t.Relative, c.Absolute)
		return c
	}
	c.Accepted = true
	return c
}

// compare compares one output and says what is wrong with it but its values.
func (c *Check) compare(want, got tensor.Tensor, t Tolerance) string {
	if want.Type != got.Type || !slices.Equal(want.Shape, got.Shape) || want.Type.Size() > 0 && len(want.Data) != len(got.Data) {
		return fmt.Sprintf("is %s %v instead of %s %v", got.Type, got.Shape, want.Type, want.Shape)
	}
	value := valueOf(want.Type)
	if value == nil {
		if !bytes.Equal(want.Data, got.Data) {
			return "differs from the reference"
		}
		return ""
	}
	size := want.Type.Size()
	for at := 0; at+size <= len(want.Data); at += size {
		a, b := value(want.Data[at:]), value(got.Data[at:])
		c.compared++
		if math.IsNaN(a) && math.IsNaN(b) || a == b {
			continue
		}
		by := math.Abs(a - b)
		if math.IsNaN(by) || math.IsInf(by, 0) {
			return fmt.Sprintf("has %v where the reference has %v", b, a)
		}
		c.Absolute = max(c.Absolute, by)
		if math.Abs(a) > t.Absolute {
			c.Relative = max(c.Relative, by/math.Abs(a))
		}
		if by > t.Absolute+t.Relative*math.Abs(a) {
			c.beyond++
		}
	}
	return ""
}

// valueOf gives what reads an element; nil where elements are equal or not.
func valueOf(t tensor.Type) func([]byte) float64 {
	switch t {
	case tensor.Float32:
		return func(b []byte) float64 { return float64(math.Float32frombits(binary.LittleEndian.Uint32(b))) }
	case tensor.Float64:
		return func(b []byte) float64 { return math.Float64frombits(binary.LittleEndian.Uint64(b)) }
	case tensor.BFloat16:
		return func(b []byte) float64 {
			return float64(math.Float32frombits(uint32(binary.LittleEndian.Uint16(b)) << 16))
		}
	case tensor.Float16:
		return func(b []byte) float64 { return half(binary.LittleEndian.Uint16(b)) }
	}
	return nil
}

// half gives the value of an IEEE 754 binary16.
func half(h uint16) float64 {
	sign, exponent, fraction := 1.0, int(h>>10&31), float64(h&1023)
	if h>>15 == 1 {
		sign = -1
	}
	switch exponent {
	case 0:
		return sign * math.Ldexp(fraction, -24)
	case 31:
		if fraction != 0 {
			return math.NaN()
		}
		return math.Inf(int(sign))
	}
	return sign * math.Ldexp(1024+fraction, exponent-25)
}
