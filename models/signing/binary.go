package signing

import (
	"cmp"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"time"
)

const binaryPredicate = "https://github.com/dunlin/dunlin/agent-binary/v1"

// Binary describes an agent binary.
type Binary struct {
	Version string `json:"version"` // "0.7.0"
	OS      string `json:"os"`
	Arch    string `json:"arch"`
}

// binaryName is the subject of agent binaries' signatures.
const binaryName = "dunlin-agent"

// SignBinary signs an agent binary with the SHA-256 sum.
func SignBinary(by Signer, b Binary, sum [32]byte) ([]byte, error) {
	if err := b.check(); err != nil {
		return nil, err
	}
	return seal(by, subject{Name: binaryName, Digest: map[string]string{"sha256": hex.EncodeToString(sum[:])}}, binaryPredicate, b)
}

func (b Binary) check() error {
	if _, err := parseRelease(b.Version); err != nil {
		return fmt.Errorf("version: %w", err)
	}
	if b.OS == "" || b.Arch == "" || len(b.OS)+len(b.Arch) > 64 {
		return fmt.Errorf("architecture %.80q is not OS/ARCH, as linux/amd64", b.OS+"/"+b.Arch)
	}
	return nil
}

// AdmitBinary says whether a device with this system takes the agent binary
// with the SHA-256 sum, and which version it is. Its error is a *RefusedError.
func (t *Trust) AdmitBinary(sum [32]byte, os, arch string, signature []byte, now time.Time) (Binary, error) {
	var b Binary
	s, err := Parse(signature)
	if err != nil {
		return b, refused("%v", err)
	}
	if s.statement.PredicateType != binaryPredicate {
		return b, refused("what is signed is %.80q, not an agent binary (%q)", s.statement.PredicateType, binaryPredicate)
	}
	if t.Expired(now) {
		return b, refused("trust document %d has expired on %s: nothing new is taken until there is a newer one", t.Version(), t.expires.Format(time.RFC3339))
	}
	if _, err := s.Verify(t.agents, now); err != nil {
		return b, refused("the binary is signed by no agent key of trust document %d: %v", t.Version(), err)
	}
	if err := json.Unmarshal(s.statement.Predicate, &b); err != nil {
		return b, refused("the statement of an agent binary is malformed: %v", err)
	}
	if err := b.check(); err != nil {
		return b, refused("the statement of an agent binary is malformed: %v", err)
	}
	if got, want := s.statement.Subject[0].Digest["sha256"], hex.EncodeToString(sum[:]); got != want || s.statement.Subject[0].Name != binaryName {
		return b, refused("the signature is of %.80q with SHA-256 %.64q, the file has %s", s.statement.Subject[0].Name, got, want)
	}
	if b.OS != os || b.Arch != arch {
		return b, refused("the binary is for %s/%s, this device is %s/%s", b.OS, b.Arch, os, arch)
	}
	if t.agentFloor != "" && compareReleases(b.Version, t.agentFloor) < 0 {
		return b, refused("version %s is below the floor %s of trust document %d", b.Version, t.agentFloor, t.Version())
	}
	return b, nil
}

// parseRelease reads "0.7.0".
func parseRelease(s string) (numbers [3]uint64, err error) {
	parts := strings.Split(s, ".")
	for i := range numbers {
		if len(parts) == len(numbers) {
			numbers[i], err = strconv.ParseUint(parts[i], 10, 32)
		}
		if len(parts) != len(numbers) || err != nil || strconv.FormatUint(numbers[i], 10) != parts[i] {
			return numbers, fmt.Errorf("%.80q is not three numbers, as 0.7.0", s)
		}
	}
	return numbers, nil
}

// compareReleases orders two versions of the form "0.7.0"; what has another
// form is below all that have it.
func compareReleases(a, b string) int {
	x, errX := parseRelease(a)
	y, errY := parseRelease(b)
	switch {
	case errX != nil && errY != nil:
		return 0
	case errX != nil:
		return -1
	case errY != nil:
		return 1
	}
	return cmp.Or(cmp.Compare(x[0], y[0]), cmp.Compare(x[1], y[1]), cmp.Compare(x[2], y[2]))
}
