// Package webhook tells others by HTTP what happens in the fleet.
package webhook

import (
	"errors"
	"fmt"
	"io"
	"net/netip"
	"net/url"
	"os"
	"path"
	"regexp"
	"slices"
	"strings"

	"github.com/dunlin/dunlin/internal/strictyaml"
)

// The limits of the file of webhooks.
const (
	maxFile      = 64 << 10
	maxHooks     = 16
	maxKinds     = 64
	minSecret    = 16 // characters
	maxSecret    = 1024
	maxURL       = 2048
	severityNone = ""
)

// Hook is one endpoint that is told.
type Hook struct {
	Name       string            `yaml:"name"`
	URL        string            `yaml:"url"`
	Secret     string            `yaml:"secret"`
	SecretFile string            `yaml:"secret-file"`
	Kinds      []string          `yaml:"kinds"`    // patterns as of path.Match; none: all
	Severity   string            `yaml:"severity"` // the least: info, warning or error
	Selector   map[string]string `yaml:"selector"` // labels
}

var namePattern = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)

var severities = []string{"info", "warning", "error"}

// Load reads the file of webhooks, which nobody but its owner may read, and
// the files of secrets that it names. Its error has every fault.
func Load(file string) ([]Hook, error) {
	raw, err := readSecret(file, maxFile)
	if err != nil {
		return nil, err
	}
	var all struct {
		Webhooks []Hook `yaml:"webhooks"`
	}
	if err := strictyaml.Decode(raw, &all); err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	var faults []error
	if n := len(all.Webhooks); n < 1 || n > maxHooks {
		faults = append(faults, fmt.Errorf("%s: webhooks has %d entries, allowed are 1 to %d", file, n, maxHooks))
	}
	seen := map[string]bool{}
	for i := range all.Webhooks {
		h := &all.Webhooks[i]
		for _, err := range h.check() {
			faults = append(faults, fmt.Errorf("%s: webhooks[%d].%w", file, i, err))
		}
		if seen[h.Name] {
			faults = append(faults, fmt.Errorf("%s: webhooks[%d].name: %q is there twice", file, i, h.Name))
		}
		seen[h.Name] = true
	}
	return all.Webhooks, errors.Join(faults...)
}

// check reads the secret and gives what is wrong with the hook.
func (h *Hook) check() (faults []error) {
	fault := func(format string, args ...any) { faults = append(faults, fmt.Errorf(format, args...)) }
	if !namePattern.MatchString(h.Name) {
		fault("name: %.80q is not made of 1 to 63 of a-z, 0-9 and -", h.Name)
	}
	if u, err := url.Parse(h.URL); err != nil || len(h.URL) > maxURL || u.Host == "" || u.User != nil || u.Scheme != "https" && u.Scheme != "http" {
		fault("url: it is not https://host[:port][/path] of at most %d characters", maxURL) // it may hold a secret
	} else if u.Scheme == "http" && !loopback(u.Hostname()) {
		fault("url: http:// is for this machine itself: use https://")
	}
	switch {
	case (h.Secret == "") == (h.SecretFile == ""):
		fault("secret: give either secret or secret-file")
	case h.SecretFile != "":
		b, err := readSecret(h.SecretFile, maxSecret+2)
		if err != nil {
			fault("secret-file: %w", err)
			break
		}
		h.Secret = strings.TrimRight(string(b), "\r\n")
	}
	if n := len(h.Secret); n > 0 && n < minSecret || n > maxSecret {
		fault("secret: it has %d characters, allowed are %d to %d", n, minSecret, maxSecret)
	}
	if len(h.Kinds) > maxKinds {
		fault("kinds: it has %d entries, the limit is %d", len(h.Kinds), maxKinds)
	}
	for _, k := range h.Kinds {
		if _, err := path.Match(k, ""); err != nil || k == "" {
			fault("kinds: %.80q is not a pattern like rollout.*", k)
		}
	}
	if h.Severity != severityNone && !slices.Contains(severities, h.Severity) {
		fault("severity: %.80q is not info, warning or error", h.Severity)
	}
	return faults
}

func loopback(host string) bool {
	ip, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && ip.IsLoopback()
}

// readSecret reads a file that others must not be able to read.
func readSecret(file string, limit int64) ([]byte, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if mode := info.Mode().Perm(); mode&0o077 != 0 {
		return nil, fmt.Errorf("%s has mode %04o: others may read it; run: chmod 600 %s", file, mode, file)
	}
	b, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err == nil && int64(len(b)) > limit {
		err = fmt.Errorf("%s has more than %d bytes", file, limit)
	}
	return b, err
}

// wants says whether the hook is to be told of a message.
func (h *Hook) wants(m *Message, within func(map[string]string) bool) bool {
	if len(h.Kinds) > 0 && !slices.ContainsFunc(h.Kinds, func(k string) bool { ok, _ := path.Match(k, m.Kind); return ok }) {
		return false
	}
	return slices.Index(severities, m.Severity) >= slices.Index(severities, h.Severity) && within(h.Selector)
}
