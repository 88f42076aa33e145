package access

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"errors"
	"fmt"
	"math"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/time/rate"
)

// Limits of a file of rules.
const (
	minKey   = 16 // characters
	maxRules = 1024
	maxFile  = 1 << 20
	maxName  = 63
	maxRate  = 1_000_000
)

// Rule says what those may ask for who have a key, or a certificate of a name.
type Rule struct {
	Name    string    // in metrics and errors; of a certificate "" for its own
	Models  []string  // patterns of path.Match; nil: all
	Rate    Rate      // of requests; a count of 0: as many as they want
	Burst   int       // requests at once
	Expires time.Time // zero: never

	sum         [sha256.Size]byte // of the key
	certificate string            // pattern of common names; "": it is a key
	line        int
}

// Rate is so many requests in a unit of time.
type Rate struct {
	Count int
	Per   byte // 's', 'm' or 'h'
}

var units = map[byte]time.Duration{'s': time.Second, 'm': time.Minute, 'h': time.Hour}

func (r Rate) String() string { return fmt.Sprintf("%d/%c", r.Count, r.Per) }

func (r Rate) limit() rate.Limit { return rate.Limit(float64(r.Count) / units[r.Per].Seconds()) }

// allows says whether a model may be asked for; "" stands for all of them.
func (r *Rule) allows(model string) bool {
	return r.Models == nil || model != "" && slices.ContainsFunc(r.Models, func(pattern string) bool {
		ok, _ := path.Match(pattern, model) // it was checked
		return ok
	})
}

// what names who the rule is for in an error.
func (r *Rule) what(name string) string {
	if r.certificate != "" {
		return fmt.Sprintf("certificate %q", name)
	}
	return fmt.Sprintf("API key %q", name)
}

// rules are those of a file, in its order.
type rules []*Rule

// key gives the rule of a key by its sum, nil where there is none. How long it
// takes says nothing of the keys that there are.
func (rs rules) key(sum [sha256.Size]byte) (found *Rule) {
	for _, r := range rs {
		if r.certificate == "" && subtle.ConstantTimeCompare(sum[:], r.sum[:]) == 1 {
			found = r
		}
	}
	return found
}

// certificateOf gives the first rule for certificates of a common name.
func (rs rules) certificateOf(name string) *Rule {
	for _, r := range rs {
		if ok, _ := path.Match(r.certificate, name); ok && r.certificate != "" {
			return r
		}
	}
	return nil
}

const (
	sumPrefix         = "sha256:"
	certificatePrefix = "cert="
)

var namePattern = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9._@/-]*[A-Za-z0-9])?$`)

// parseRules reads a file of rules, one on each line, none on empty lines and
// those that begin with #:
//
//	KEY|sha256:HEX|cert=NAME [name=NAME] [models=A,B*] [rate=50/s] [burst=100] [expires=2027-01-31]
//
// All faults are reported together, with file and line.
func parseRules(file string, text []byte) (rules, error) {
	var all rules
	var faults []error
	lines := bufio.NewScanner(bytes.NewReader(text))
	for n := 1; lines.Scan(); n++ {
		fields := strings.Fields(lines.Text())
		if len(fields) == 0 || fields[0][0] == '#' {
			continue
		}
		if len(all) == maxRules {
			faults = append(faults, fmt.Errorf("%s:%d: more than %d keys", file, n, maxRules))
			break
		}
		r, err := parseRule(fields)
		if err == nil {
			r.line = n
			err = all.clash(r)
		}
		if err != nil {
			faults = append(faults, fmt.Errorf("%s:%d: %w", file, n, err))
			continue
		}
		all = append(all, r)
	}
	if err := lines.Err(); err != nil {
		faults = append(faults, fmt.Errorf("%s: %w", file, err))
	}
	if len(all) == 0 && faults == nil {
		faults = append(faults, fmt.Errorf("%s holds no key", file))
	}
	return all, errors.Join(faults...)
}

// clash says why a rule cannot stand beside those before it. Two keys may have
// one name, so that one can take the place of the other, but not two rates.
func (rs rules) clash(r *Rule) error {
	for _, other := range rs {
		switch {
		case r.certificate == "" && other.certificate == "" && r.sum == other.sum:
			return fmt.Errorf("the key is that of line %d", other.line)
		case r.certificate != "" && r.certificate == other.certificate:
			return fmt.Errorf("certificate %s has line %d", r.certificate, other.line)
		case r.Name != "" && r.Name == other.Name && (r.Rate != other.Rate || r.Burst != other.Burst):
			return fmt.Errorf("name %s has another rate or burst on line %d", r.Name, other.line)
		}
	}
	return nil
}

func parseRule(fields []string) (*Rule, error) {
	r := &Rule{}
	who := fields[0]
	switch {
	case strings.HasPrefix(who, sumPrefix):
		sum, err := hex.DecodeString(who[len(sumPrefix):])
		if err != nil || len(sum) != len(r.sum) {
			return nil, fmt.Errorf("%s has to be followed by the %d hexadecimal digits of a key's SHA-256", sumPrefix, 2*len(r.sum))
		}
		r.sum = [sha256.Size]byte(sum)
	case strings.HasPrefix(who, certificatePrefix):
		r.certificate = who[len(certificatePrefix):]
		if _, err := path.Match(r.certificate, ""); err != nil || r.certificate == "" {
			return nil, fmt.Errorf("%s%s is not the common name of a certificate, or a pattern of names", certificatePrefix, r.certificate)
		}
	case len(who) < minKey:
		return nil, fmt.Errorf("the key has %d characters, at least %d are needed", len(who), minKey)
	default:
		r.sum = sha256.Sum256([]byte(who))
	}
	given := map[string]bool{}
	for i, field := range fields[1:] {
		option, value, ok := strings.Cut(field, "=")
		if !ok { // it may be a part of a key
			return nil, fmt.Errorf("word %d is not option=value; a key has no spaces", i+2)
		}
		if given[option] {
			return nil, fmt.Errorf("%s is given twice", option)
		}
		given[option] = true
		if err := r.set(option, value); err != nil {
			return nil, err
		}
	}
	if r.Rate.Count == 0 && r.Burst > 0 {
		return nil, errors.New("burst has a meaning with rate only")
	}
	if r.Rate.Count > 0 && r.Burst == 0 {
		r.Burst = max(1, int(math.Ceil(float64(r.Rate.limit()))))
	}
	if r.Name == "" && r.certificate == "" {
		r.Name = "key-" + hex.EncodeToString(r.sum[:4])
	}
	return r, nil
}

// set takes one option.
func (r *Rule) set(option, value string) (err error) {
	switch option {
	case "name":
		if len(value) > maxName || !namePattern.MatchString(value) {
			return fmt.Errorf("name %.80q is not 1 to %d letters, digits and . _ @ / - between them", value, maxName)
		}
		r.Name = value
	case "models":
		r.Models = strings.Split(value, ",")
		for _, pattern := range r.Models {
			if _, err := path.Match(pattern, ""); err != nil || pattern == "" {
				return fmt.Errorf("models: %.80q is not the name of a model, or a pattern of names", pattern)
			}
		}
	case "rate":
		count, per, _ := strings.Cut(value, "/")
		r.Rate.Count, err = strconv.Atoi(count)
		if err != nil || r.Rate.Count < 1 || r.Rate.Count > maxRate || len(per) != 1 || units[per[0]] == 0 {
			return fmt.Errorf("rate %.80q is not N/s, N/m or N/h with N from 1 to %d", value, maxRate)
		}
		r.Rate.Per = per[0]
	case "burst":
		r.Burst, err = strconv.Atoi(value)
		if err != nil || r.Burst < 1 || r.Burst > maxRate {
			return fmt.Errorf("burst is %.80q, allowed are 1 to %d", value, maxRate)
		}
	case "expires":
		if day, err := time.Parse(time.DateOnly, value); err == nil {
			r.Expires = day.AddDate(0, 0, 1) // it is good through that day
		} else if r.Expires, err = time.Parse(time.RFC3339, value); err != nil {
			return fmt.Errorf("expires %.80q is not a day as 2027-01-31, or a time as 2027-01-31T12:00:00Z", value)
		}
	default:
		return fmt.Errorf("unknown option %.80q: there are name, models, rate, burst, expires", option)
	}
	return nil
}
