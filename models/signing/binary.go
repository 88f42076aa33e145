package signing

import (
	"encoding/hex"
	"encoding/json"
	"fmt"
	"time"

	"github.com/dunlin/dunlin/models"
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
	if _, err := models.ParseRelease(b.Version); err != nil {
		return fmt.Errorf("version: %w", err)
	}
	if b.OS == "" || b.Arch == "" || len(b.OS)+len(b.Arch) > 64 {
		return fmt.Errorf("architecture %.80q is not OS/ARCH, as linux/amd64", b.OS+"/"+b.Arch)
	}
	return nil
}

// Binary reads what is signed, where that is an agent binary, and gives its
// SHA-256. It does not say by whom.
func (s *Signature) Binary() (b Binary, sum [32]byte, err error) {
	if s.statement.PredicateType != binaryPredicate {
		return b, sum, fmt.Errorf("what is signed is %.80q, not an agent binary (%q)", s.statement.PredicateType, binaryPredicate)
	}
	if err = json.Unmarshal(s.statement.Predicate, &b); err == nil {
		err = b.check()
	}
	if err != nil {
		return b, sum, fmt.Errorf("the statement of an agent binary is malformed: %w", err)
	}
	signed := s.statement.Subject[0]
	raw, err := hex.DecodeString(signed.Digest["sha256"])
	if err != nil || len(raw) != len(sum) || signed.Name != binaryName {
		return b, sum, fmt.Errorf("the signature is of %.80q with SHA-256 %.80q", signed.Name, signed.Digest["sha256"])
	}
	return b, [32]byte(raw), nil
}

// AdmitBinary says whether a device with this system takes the agent binary
// with the SHA-256 sum, and which version it is. Its error is a *RefusedError.
func (t *Trust) AdmitBinary(sum [32]byte, os, arch string, signature []byte, now time.Time) (Binary, error) {
	var b Binary
	s, err := Parse(signature)
	if err != nil {
		return b, refused("%v", err)
	}
	b, signed, err := s.Binary()
	if err != nil {
		return b, refused("%v", err)
	}
	if t.Expired(now) {
		return b, refused("trust document %d has expired on %s: nothing new is taken until there is a newer one", t.Version(), t.expires.Format(time.RFC3339))
	}
	if _, err := s.Verify(t.agents, now); err != nil {
		return b, refused("the binary is signed by no agent key of trust document %d: %v", t.Version(), err)
	}
	if signed != sum {
		return b, refused("the signature is of a file with SHA-256 %x, the file has %x", signed, sum)
	}
	if b.OS != os || b.Arch != arch {
		return b, refused("the binary is for %s/%s, this device is %s/%s", b.OS, b.Arch, os, arch)
	}
	if t.agentFloor != "" && models.CompareReleases(b.Version, t.agentFloor) < 0 {
		return b, refused("version %s is below the floor %s of trust document %d", b.Version, t.agentFloor, t.Version())
	}
	return b, nil
}
