package profiles

import (
	"errors"
	"fmt"
	"math"
	"path"
	"slices"
	"strconv"
	"strings"
	"unicode"
)

// element is a part of a pattern: any number of characters, or one of a class.
type element struct {
	star   bool
	negate bool
	ranges []rune // pairs
}

// elements reads a pattern that path.Match takes, folded.
func elements(pattern string) []element {
	var all []element
	for rest := []rune(fold(pattern)); len(rest) > 0; {
		c := rest[0]
		rest = rest[1:]
		switch c {
		case '*':
			all = append(all, element{star: true})
		case '?':
			all = append(all, element{negate: true}) // of nothing
		case '[':
			e := element{}
			if len(rest) > 0 && rest[0] == '^' {
				e.negate, rest = true, rest[1:]
			}
			for first := true; len(rest) > 0 && (first || rest[0] != ']'); first = false {
				var low rune
				low, rest = char(rest)
				high := low
				if len(rest) > 0 && rest[0] == '-' {
					high, rest = char(rest[1:])
				}
				e.ranges = append(e.ranges, low, high)
			}
			if len(rest) > 0 {
				rest = rest[1:]
			}
			all = append(all, e)
		default:
			if c == '\\' && len(rest) > 0 {
				c, rest = rest[0], rest[1:]
			}
			all = append(all, element{ranges: []rune{c, c}})
		}
	}
	return all
}

// char takes a character of a class, which may be escaped.
func char(rest []rune) (rune, []rune) {
	if len(rest) > 1 && rest[0] == '\\' {
		rest = rest[1:]
	}
	if len(rest) == 0 {
		return 0, nil
	}
	return rest[0], rest[1:]
}

func (e element) literal() bool {
	return !e.star && !e.negate && len(e.ranges) == 2 && e.ranges[0] == e.ranges[1]
}

// has says whether c is of the class. Stars and question marks do not stand for
// a slash.
func (e element) has(c rune) bool {
	if e.negate && len(e.ranges) == 0 {
		return c != '/'
	}
	in := false
	for i := 0; i+1 < len(e.ranges); i += 2 {
		in = in || e.ranges[i] <= c && c <= e.ranges[i+1]
	}
	return in != e.negate
}

// literals counts the characters of a pattern that stand for themselves.
func literals(pattern string) int {
	n := 0
	for _, e := range elements(pattern) {
		if e.literal() {
			n++
		}
	}
	return n
}

// bothMatch says whether there is a string that two patterns match.
func bothMatch(a, b string) bool {
	x, y := elements(a), elements(b)
	seen := make(map[[2]int]bool)
	var from func(i, j int) bool
	from = func(i, j int) bool {
		at := [2]int{i, j}
		if seen[at] {
			return false // it was false, or is being tried
		}
		seen[at] = true
		if i == len(x) && j == len(y) {
			return true
		}
		// A star may stand for nothing, or for a character more of the other.
		if i < len(x) && x[i].star && from(i+1, j) || j < len(y) && y[j].star && from(i, j+1) {
			return true
		}
		if i == len(x) || j == len(y) {
			return false
		}
		switch {
		case x[i].star && y[j].star:
			return false // one of them has stood for nothing
		case x[i].star:
			return shares(element{negate: true}, y[j]) && from(i, j+1)
		case y[j].star:
			return shares(x[i], element{negate: true}) && from(i+1, j)
		}
		return shares(x[i], y[j]) && from(i+1, j+1)
	}
	return from(0, 0)
}

// shares says whether a character is of both classes. One that is, if any, is
// next to an end of a range, or the first or last of all.
func shares(a, b element) bool {
	ends := []rune{0, 'a', unicode.MaxRune}
	for _, r := range slices.Concat(a.ranges, b.ranges) {
		ends = append(ends, r-1, r, r+1)
	}
	return slices.ContainsFunc(ends, func(c rune) bool { return c >= 0 && c <= unicode.MaxRune && a.has(c) && b.has(c) })
}

// overlap says whether two rules may match the same device with neither being
// more specific, and by what: they name the same fields, and for each of these
// something is right for both, by as literal patterns.
func overlap(a, b Rule) (what string, ok bool) {
	if a.Arch != b.Arch {
		return "", false
	}
	var by []string
	if a.Arch != "" {
		by = append(by, "arch "+a.Arch)
	}
	for _, l := range []struct {
		field string
		a, b  []string
	}{{"device_tree", a.DeviceTree, b.DeviceTree}, {"dmi", a.DMI, b.DMI}, {"gpu", a.GPU, b.GPU}} {
		if (len(l.a) == 0) != (len(l.b) == 0) {
			return "", false
		}
		if len(l.a) == 0 {
			continue
		}
		shared := ""
		for _, p := range l.a {
			for _, q := range l.b {
				if shared == "" && literals(p) == literals(q) && bothMatch(p, q) {
					shared = l.field + " " + p
					if p != q {
						shared += " and " + q
					}
				}
			}
		}
		if shared == "" {
			return "", false
		}
		by = append(by, shared)
	}
	for _, v := range []struct{ field, a, b string }{
		{"compute_capability", a.ComputeCapability, b.ComputeCapability}, {"driver", a.Driver, b.Driver}, {"runtime", a.Runtime, b.Runtime},
	} {
		if (v.a == "") != (v.b == "") {
			return "", false
		}
		if v.a == "" {
			continue
		}
		x, errX := parseVersions(v.a)
		y, errY := parseVersions(v.b)
		if errX != nil || errY != nil || x.and(y).empty() {
			return "", false
		}
		by = append(by, v.field+" "+v.a+" and "+v.b)
	}
	return strings.Join(by, ", "), true
}

// version is the numbers of one.
type version []int

func (v version) compare(w version) int {
	n := max(len(v), len(w))
	return slices.Compare(v.padded(n), w.padded(n))
}

func (v version) padded(n int) version { return append(slices.Clone(v), make(version, n-len(v))...) }

// maxParts bounds the parts of a version that count.
const maxParts = 8

// parseVersion reads the numbers that text begins with; what follows them, as
// in "1.31.0-dev", does not count.
func parseVersion(text string) (v version, rest string) {
	for len(v) < maxParts {
		n := 0
		for n < len(text) && text[n] >= '0' && text[n] <= '9' {
			n++
		}
		part, err := strconv.ParseInt(text[:n], 10, 32)
		if err != nil {
			break
		}
		v = append(v, int(part))
		if text = text[n:]; len(text) < 2 || text[0] != '.' || text[1] < '0' || text[1] > '9' {
			break
		}
		text = text[1:]
	}
	return v, text
}

// versions are those of a range.
type versions struct {
	low, high          version // nil: no bound
	above, notIncluded bool    // the bound itself is not of the range
}

// parseVersions reads a version pattern; see Rule.
func parseVersions(pattern string) (versions, error) {
	r := versions{}
	for bound := range strings.SplitSeq(pattern, ",") {
		bound = strings.TrimSpace(bound)
		number := strings.TrimLeft(bound, "<>=")
		v, rest := parseVersion(strings.TrimSpace(number))
		if len(v) == 0 || rest != "" {
			return r, fmt.Errorf("%q is no version, or one with >=, >, <= or < before it", bound)
		}
		switch bound[:len(bound)-len(number)] {
		case ">=":
			r = r.and(versions{low: v})
		case ">":
			r = r.and(versions{low: v, above: true})
		case "<=":
			r = r.and(versions{high: v})
		case "<":
			r = r.and(versions{high: v, notIncluded: true})
		case "", "=":
			next := slices.Clone(v)
			if next[len(next)-1]++; next[len(next)-1] > math.MaxInt32 {
				return r, fmt.Errorf("%q has a part above %d", bound, math.MaxInt32-1)
			}
			r = r.and(versions{low: v, high: next, notIncluded: true})
		default:
			return r, fmt.Errorf("%q is no version, or one with >=, >, <= or < before it", bound)
		}
	}
	if r.empty() {
		return r, fmt.Errorf("no version is %s", pattern)
	}
	return r, nil
}

// and gives what is of both ranges.
func (r versions) and(s versions) versions {
	if s.low != nil {
		if c := s.low.compare(r.low); r.low == nil || c > 0 {
			r.low, r.above = s.low, s.above
		} else if c == 0 {
			r.above = r.above || s.above
		}
	}
	if s.high != nil {
		if c := s.high.compare(r.high); r.high == nil || c < 0 {
			r.high, r.notIncluded = s.high, s.notIncluded
		} else if c == 0 {
			r.notIncluded = r.notIncluded || s.notIncluded
		}
	}
	return r
}

// empty says whether no version is of the range. Between two versions there is
// always another, with a part more.
func (r versions) empty() bool {
	if r.low == nil || r.high == nil {
		return false
	}
	c := r.low.compare(r.high)
	return c > 0 || c == 0 && (r.above || r.notIncluded)
}

func (r versions) has(v version) bool {
	if r.low != nil {
		if c := v.compare(r.low); c < 0 || c == 0 && r.above {
			return false
		}
	}
	if r.high != nil {
		if c := v.compare(r.high); c > 0 || c == 0 && r.notIncluded {
			return false
		}
	}
	return true
}

func matchVersion(pattern, text string) bool {
	r, err := parseVersions(pattern)
	v, _ := parseVersion(text)
	return err == nil && len(v) > 0 && r.has(v)
}

// maxPattern bounds a pattern: two are compared by all of their places.
const maxPattern = 128

// checkPattern says what is wrong with a pattern of path.Match.
func checkPattern(pattern string) error {
	if pattern == "" {
		return errors.New("is empty")
	}
	if len(pattern) > maxPattern {
		return fmt.Errorf("has %d bytes, allowed are %d", len(pattern), maxPattern)
	}
	if _, err := path.Match(fold(pattern), ""); err != nil {
		return fmt.Errorf("%q is no pattern: %w", pattern, err)
	}
	return nil
}
