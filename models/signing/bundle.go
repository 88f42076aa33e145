package signing

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/dunlin/dunlin/models"
)

const (
	bundlePredicate = "https://model_signing/signature/v1.0"
	// manifestAnnotation, of the subject, is the digest of the bundle's
	// manifest: it binds all that is not a file of the model.
	manifestAnnotation = "vnd.dunlin.manifest"
)

// bundleBody is the predicate of OpenSSF Model Signing.
type bundleBody struct {
	Serialization serialization `json:"serialization"`
	Resources     []resource    `json:"resources"`
}

type serialization struct {
	Method        string `json:"method"`
	HashType      string `json:"hash_type"`
	AllowSymlinks bool   `json:"allow_symlinks"`
}

type resource struct {
	Name      string `json:"name"`
	Algorithm string `json:"algorithm"`
	Digest    string `json:"digest"`
}

// Statement is what the signature of a model says.
type Statement struct {
	// "MODEL:VERSION"; the name of the folder where another tool signed it.
	Name string
	// Digest of the bundle's manifest; empty where another tool signed.
	Manifest digest.Digest
	Files    map[string]digest.Digest // by path
}

// SignBundle signs a bundle as a version of a model.
func SignBundle(by Signer, model string, version int64, m *models.Manifest) ([]byte, error) {
	files := slices.SortedFunc(slices.Values(m.Files), func(a, b models.File) int { return strings.Compare(a.Path, b.Path) })
	body := bundleBody{Serialization: serialization{Method: "files", HashType: "sha256"}}
	for _, f := range files {
		body.Resources = append(body.Resources, resource{f.Path, "sha256", f.Digest.Encoded()})
	}
	root, err := rootOf(body.Resources)
	if err != nil {
		return nil, err
	}
	s := subject{Name: refOf(model, version), Digest: map[string]string{"sha256": root}, Annotations: map[string]any{manifestAnnotation: m.Digest.String()}}
	return seal(by, s, bundlePredicate, body)
}

func refOf(model string, version int64) string { return fmt.Sprintf("%s:%d", model, version) }

// rootOf is the digest of all resources: SHA-256 over theirs.
func rootOf(resources []resource) (string, error) {
	h := sha256.New()
	for _, r := range resources {
		sum, err := hex.DecodeString(r.Digest)
		if err != nil || len(sum) != sha256.Size {
			return "", fmt.Errorf("resource %.80q: digest %.80q is not 64 hexadecimal digits", r.Name, r.Digest)
		}
		h.Write(sum)
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// Statement reads what is signed, where that is a model.
func (s *Signature) Statement() (Statement, error) {
	if s.statement.PredicateType != bundlePredicate {
		return Statement{}, fmt.Errorf("what is signed is %.80q, not a model (%q)", s.statement.PredicateType, bundlePredicate)
	}
	var body bundleBody
	if err := json.Unmarshal(s.statement.Predicate, &body); err != nil {
		return Statement{}, fmt.Errorf("the statement of a model is malformed: %w", err)
	}
	if z := body.Serialization; z.Method != "files" || z.HashType != "sha256" {
		return Statement{}, fmt.Errorf("files are signed by method %.80q and hash %.80q, allowed are files and sha256", z.Method, z.HashType)
	}
	if n := len(body.Resources); n < 1 || n > models.MaxFiles {
		return Statement{}, fmt.Errorf("the statement has %d files, allowed are 1 to %d", n, models.MaxFiles)
	}
	root, err := rootOf(body.Resources)
	if err != nil {
		return Statement{}, err
	}
	sub := s.statement.Subject[0]
	if sub.Digest["sha256"] != root {
		return Statement{}, fmt.Errorf("the subject's digest is %.80q, that of its files is %q", sub.Digest["sha256"], root)
	}
	st := Statement{Name: sub.Name, Files: make(map[string]digest.Digest, len(body.Resources))}
	for _, r := range body.Resources {
		if _, twice := st.Files[r.Name]; twice {
			return Statement{}, fmt.Errorf("file %.80q is in the statement twice", r.Name)
		}
		if r.Algorithm != "sha256" {
			return Statement{}, fmt.Errorf("file %.80q is signed by %.80q instead of sha256", r.Name, r.Algorithm)
		}
		st.Files[r.Name] = digest.NewDigestFromEncoded(digest.SHA256, r.Digest)
	}
	if d, ok := sub.Annotations[manifestAnnotation].(string); ok {
		st.Manifest = digest.Digest(d)
	}
	return st, nil
}

// Fits says whether the statement is of these files and this manifest.
func (s *Statement) Fits(m *models.Manifest) error {
	if s.Manifest != m.Digest {
		return fmt.Errorf("it is of manifest %.80q instead of %s", s.Manifest, m.Digest)
	}
	if len(s.Files) != len(m.Files) {
		return fmt.Errorf("it is of %d files, the bundle has %d", len(s.Files), len(m.Files))
	}
	for _, f := range m.Files {
		if s.Files[f.Path] != f.Digest {
			return fmt.Errorf("file %q has digest %s, it is of %.80q", f.Path, f.Digest, s.Files[f.Path])
		}
	}
	return nil
}

// Admit says whether a device takes a bundle as a version of a model, of which
// there are signatures. Its error is a *RefusedError.
func (t *Trust) Admit(model string, version int64, m *models.Manifest, signatures [][]byte, now time.Time) error {
	if t.all {
		return nil
	}
	if t.Expired(now) {
		return refused("trust document %d has expired on %s: nothing new is taken until there is a newer one", t.Version(), t.expires.Format(time.RFC3339))
	}
	if err := t.CheckFloor(model, version); err != nil {
		return err
	}
	var controller, publisher bool
	var why bytes.Buffer
	for i, raw := range signatures {
		byController, byPublisher, err := t.judge(model, version, m, raw, now)
		controller, publisher = controller || byController, publisher || byPublisher
		if err != nil {
			fmt.Fprintf(&why, "; signature %d: %v", i+1, err)
		}
	}
	switch {
	case !controller:
		return refused("%s of digest %s is signed by no controller's key of trust document %d%s", refOf(model, version), m.Digest, t.Version(), &why)
	case !publisher && t.requirePublisher:
		return refused("%s of digest %s is signed by no publisher's key of trust document %d, which requires one%s", refOf(model, version), m.Digest, t.Version(), &why)
	}
	return nil
}

// judge says as whose a signature counts; the error says why as nobody's.
func (t *Trust) judge(model string, version int64, m *models.Manifest, raw []byte, now time.Time) (controller, publisher bool, err error) {
	s, err := Parse(raw)
	if err != nil {
		return false, false, err
	}
	st, err := s.Statement()
	if err == nil && st.Name != refOf(model, version) {
		err = fmt.Errorf("it is of %.80q", st.Name)
	}
	if err == nil {
		err = st.Fits(m)
	}
	if err != nil {
		return false, false, err
	}
	_, noController := s.Verify(t.controllers, now)
	_, noPublisher := s.Verify(t.publishers, now)
	if noController != nil && noPublisher != nil {
		// Both say the same of a key that neither has.
		if noController.Error() == noPublisher.Error() {
			return false, false, noController
		}
		return false, false, fmt.Errorf("as a controller's: %w; as a publisher's: %w", noController, noPublisher)
	}
	return noController == nil, noPublisher == nil, nil
}

// CheckFloor refuses versions below their model's floor.
func (t *Trust) CheckFloor(model string, version int64) error {
	if floor := t.floors[model]; version < floor {
		return refused("version %d of model %s is below the floor %d of trust document %d", version, model, floor, t.Version())
	}
	return nil
}
