package reconcile

import (
	"crypto"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/dunlin/dunlin/internal/pki"
	"github.com/dunlin/dunlin/models"
	"github.com/dunlin/dunlin/models/signing"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// site is a key that signs bundles and trust documents.
type site struct {
	t        testing.TB
	key      crypto.Signer
	document *dunlinv1.TrustDocument
	trust    *signing.Trust
}

func newSite(t testing.TB) *site {
	t.Helper()
	key := newKey(t)
	s := &site{t: t, key: key, document: &dunlinv1.TrustDocument{
		IssuedAt: timestamppb.New(time.Now().Add(-time.Hour)), ExpiresAt: timestamppb.New(time.Now().Add(time.Hour)),
		RootKeys: keysOf(t, key), ControllerKeys: keysOf(t, key),
	}}
	s.next(func(*dunlinv1.TrustDocument) {})
	return s
}

func newKey(t testing.TB) crypto.Signer {
	t.Helper()
	key, err := pki.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func keysOf(t testing.TB, key crypto.Signer) []*dunlinv1.TrustKey {
	t.Helper()
	k, err := signing.NewTrustKey(key.Public(), nil, "")
	if err != nil {
		t.Fatal(err)
	}
	return []*dunlinv1.TrustKey{k}
}

// next makes the next trust document.
func (s *site) next(change func(*dunlinv1.TrustDocument)) *signing.Trust {
	s.t.Helper()
	s.document.Version++
	change(s.document)
	signed, err := signing.NewTrust(s.document)
	if err == nil {
		err = signing.SignTrust(signed, s.key)
	}
	if err == nil {
		s.trust, err = signing.Advance(s.trust, []*dunlinv1.SignedTrust{signed})
	}
	if err != nil {
		s.t.Fatal(err)
	}
	return s.trust
}

// sign puts a key's signature of a bundle into the registry, and gives the
// digests of its manifest and its blob.
func (r *testRegistry) sign(key crypto.Signer, b *testBundle, model string, version int64) (manifest, blob digest.Digest) {
	m, err := models.ParseManifest(b.blobs[b.digest])
	if err != nil {
		panic(err)
	}
	signature, err := signing.SignBundle(signing.Signer{Key: key}, model, version, m)
	if err != nil {
		panic(err)
	}
	raw, err := signing.NewManifest(b.digest, int64(len(b.blobs[b.digest])), signature)
	if err != nil {
		panic(err)
	}
	manifest, blob = digest.FromBytes(raw), digest.FromBytes(signature)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.blobs[manifest], r.blobs[blob] = raw, signature
	return manifest, blob
}

func (b *testBundle) wantSigned(model string, version int64, signatures ...digest.Digest) *dunlinv1.DesiredVersion {
	w := b.want(model, version)
	for _, s := range signatures {
		w.Signatures = append(w.Signatures, s.String())
	}
	return w
}

// untilRefused waits until a version is in quarantine for a reason, and says so
// by an event.
func (d *testDevice) untilRefused(model string, version int64, reason string) {
	d.t.Helper()
	d.until("refuses it because "+reason, func(r *dunlinv1.Reported) bool {
		s := status(r, model, version)
		return s != nil && s.State == dunlinv1.VersionState_VERSION_STATE_QUARANTINED && strings.Contains(s.Reason, reason)
	})
	d.simulated.mu.Lock()
	defer d.simulated.mu.Unlock()
	var last *dunlinv1.Event // of the version
	for _, e := range d.events {
		if e.Model == model && e.Version == version {
			last = e
		}
	}
	if last.GetKind() != "bundle.refused" || last.Severity != dunlinv1.Severity_SEVERITY_ERROR || !strings.Contains(last.Message, reason) {
		d.t.Errorf("last event %v", last)
	}
}

// trusting starts a device that trusts a site.
func trusting(t testing.TB, reg *testRegistry, s *site) *testDevice {
	d := startDevice(t, reg)
	d.trust.Store(s.trust)
	return d
}

// onDisk lists what a device has of a bundle, but its documents.
func (d *testDevice) onDisk(b *testBundle) (names []string) {
	for _, suffix := range []string{"", partSuffix} {
		found, _ := filepath.Glob(filepath.Join(d.dir, "bundles", b.digest.Encoded()+suffix, filesFolder, "*"))
		names = append(names, found...)
		for _, document := range []string{configFile, indexFile} {
			if path := filepath.Join(d.dir, "bundles", b.digest.Encoded()+suffix, document); exists(path) {
				names = append(names, path)
			}
		}
	}
	return names
}

func exists(path string) bool { _, err := os.Stat(path); return err == nil }

func TestSignedBundle(t *testing.T) {
	b := pack(t, map[string][][]byte{"m.onnx": blocks(seeded(t), 2)})
	reg := serveBundles(t, b)
	s := newSite(t)
	signature, _ := reg.sign(s.key, b, "digits", 1)
	d := trusting(t, reg, s)
	d.Desire(desired(1, nil, b.wantSigned("digits", 1, signature)))
	d.untilServing("digits", 1)
	// What was verified serves without network and after its trust is gone.
	reg.Close()
	d.trust.Store(s.next(func(d *dunlinv1.TrustDocument) { d.ExpiresAt = timestamppb.New(d.IssuedAt.AsTime().Add(time.Second)) }))
	d.restart()
	d.untilServing("digits", 1)
}

// Nothing but the manifest of what is refused reaches the disk.
func TestRefusedBundle(t *testing.T) {
	rng := seeded(t)
	b := pack(t, map[string][][]byte{"m.onnx": blocks(rng, 2)})
	another := pack(t, map[string][][]byte{"m.onnx": blocks(rng, 2)})
	stranger := newKey(t)
	for name, test := range map[string]struct {
		prepare func(s *site, reg *testRegistry) (signatures []digest.Digest)
		reason  string
	}{
		"no signature": {func(*site, *testRegistry) []digest.Digest { return nil }, "by no controller's key"},
		"by a stranger": {func(_ *site, reg *testRegistry) []digest.Digest {
			manifest, _ := reg.sign(stranger, b, "digits", 1)
			return []digest.Digest{manifest}
		}, "a key that does not count"},
		"by a removed key": {func(s *site, reg *testRegistry) []digest.Digest {
			manifest, _ := reg.sign(s.key, b, "digits", 1)
			s.next(func(d *dunlinv1.TrustDocument) { d.ControllerKeys = keysOf(t, stranger) })
			return []digest.Digest{manifest}
		}, "a key that does not count"},
		"for another name": {func(s *site, reg *testRegistry) []digest.Digest {
			manifest, _ := reg.sign(s.key, b, "letters", 1)
			return []digest.Digest{manifest}
		}, `it is of "letters:1"`},
		"for another version": {func(s *site, reg *testRegistry) []digest.Digest {
			manifest, _ := reg.sign(s.key, b, "digits", 2)
			return []digest.Digest{manifest}
		}, `it is of "digits:2"`},
		"for another bundle": {func(s *site, reg *testRegistry) []digest.Digest {
			manifest, _ := reg.sign(s.key, another, "digits", 1)
			return []digest.Digest{manifest}
		}, "it is of manifest"},
		"no publisher": {func(s *site, reg *testRegistry) []digest.Digest {
			s.next(func(d *dunlinv1.TrustDocument) { d.RequirePublisher = true })
			manifest, _ := reg.sign(s.key, b, "digits", 1)
			return []digest.Digest{manifest}
		}, "by no publisher's key"},
		"below the floor": {func(s *site, reg *testRegistry) []digest.Digest {
			s.next(func(d *dunlinv1.TrustDocument) { d.ModelFloors = []*dunlinv1.ModelFloor{{Model: "digits", Version: 2}} })
			manifest, _ := reg.sign(s.key, b, "digits", 1)
			return []digest.Digest{manifest}
		}, "below the floor 2"},
		"expired document": {func(s *site, reg *testRegistry) []digest.Digest {
			s.next(func(d *dunlinv1.TrustDocument) { d.ExpiresAt = timestamppb.New(d.IssuedAt.AsTime().Add(time.Second)) })
			manifest, _ := reg.sign(s.key, b, "digits", 1)
			return []digest.Digest{manifest}
		}, "has expired"},
		"signature altered on the way": {func(s *site, reg *testRegistry) []digest.Digest {
			manifest, blob := reg.sign(s.key, b, "digits", 1)
			reg.setFault(func(d digest.Digest, _ int64, p []byte) verdict {
				if d == blob {
					p[len(p)/2] ^= 1
				}
				return pass
			})
			return []digest.Digest{manifest}
		}, "verify signature"},
		"signature's manifest altered": {func(s *site, reg *testRegistry) []digest.Digest {
			manifest, _ := reg.sign(s.key, b, "digits", 1)
			reg.setFault(func(d digest.Digest, _ int64, p []byte) verdict {
				if d == manifest {
					p[len(p)/2] ^= 1
				}
				return pass
			})
			return []digest.Digest{manifest}
		}, "verify signature's manifest"},
		"signature lost": {func(s *site, reg *testRegistry) []digest.Digest {
			manifest, blob := reg.sign(s.key, b, "digits", 1)
			delete(reg.blobs, blob)
			return []digest.Digest{manifest}
		}, "the registry does not have it"},
		"not a signature": {func(_ *site, reg *testRegistry) []digest.Digest { return []digest.Digest{b.digest} }, "has no subject"},
	} {
		t.Run(name, func(t *testing.T) {
			s, reg := newSite(t), serveBundles(t, b)
			signatures := test.prepare(s, reg)
			d := trusting(t, reg, s)
			d.Desire(desired(1, nil, b.wantSigned("digits", 1, signatures...)))
			d.untilRefused("digits", 1, test.reason)
			if found := d.onDisk(b); found != nil {
				t.Errorf("on disk: %q", found)
			}
			// A start tries once more.
			d.restart()
			d.untilRefused("digits", 1, test.reason)
		})
	}
}

// One byte changed anywhere on the way to the device leads to nothing served.
func TestAlteredOnTheWay(t *testing.T) {
	rng := seeded(t)
	b := pack(t, map[string][][]byte{"m.onnx": blocks(rng, 1)})
	s, reg := newSite(t), serveBundles(t, b)
	signature, blob := reg.sign(s.key, b, "digits", 1)
	for _, dg := range []digest.Digest{b.digest, signature, blob, b.blobOf("m.onnx")} {
		at := rng.IntN(len(reg.blobs[dg]))
		reg.setFault(func(d digest.Digest, offset int64, p []byte) verdict {
			if i := int64(at) - offset; d == dg && i >= 0 && i < int64(len(p)) {
				p[i] ^= 1 << rng.IntN(8)
			}
			return pass
		})
		d := trusting(t, reg, s)
		d.Desire(desired(1, nil, b.wantSigned("digits", 1, signature)))
		d.until("is in quarantine", func(r *dunlinv1.Reported) bool {
			v := status(r, "digits", 1)
			return v != nil && v.State == dunlinv1.VersionState_VERSION_STATE_QUARANTINED
		})
		if d.answers("digits") != 0 {
			t.Error("it serves")
		}
		d.stop()
	}
}

// A device without a trust document takes nothing, and all of it as soon as it
// has one; what is refused by a document gets another try by the next one.
func TestTrustComes(t *testing.T) {
	rng := seeded(t)
	b, other := pack(t, map[string][][]byte{"m.onnx": blocks(rng, 2)}), pack(t, map[string][][]byte{"m.onnx": blocks(rng, 2)})
	s, reg := newSite(t), serveBundles(t, b, other)
	coming := newKey(t)
	signature, _ := reg.sign(s.key, b, "digits", 1)
	d := startDevice(t, reg)
	d.trust.Store(nil)
	d.Desire(desired(1, nil, b.wantSigned("digits", 1, signature)))
	d.until("waits", func(r *dunlinv1.Reported) bool {
		v := status(r, "digits", 1)
		return v != nil && strings.Contains(v.Reason, errNoTrust.Error())
	})
	d.trust.Store(s.trust)
	d.TrustChanged()
	d.untilServing("digits", 1)

	early, _ := reg.sign(coming, other, "digits", 2)
	d.Desire(desired(2, nil, other.wantSigned("digits", 2, early)))
	d.untilRefused("digits", 2, "a key that does not count")
	d.trust.Store(s.next(func(d *dunlinv1.TrustDocument) { d.ControllerKeys = append(d.ControllerKeys, keysOf(t, coming)...) }))
	d.TrustChanged()
	d.untilServing("digits", 2)
}

// A signature that comes later is looked at.
func TestSignatureComes(t *testing.T) {
	b := pack(t, map[string][][]byte{"m.onnx": blocks(seeded(t), 2)})
	s, reg := newSite(t), serveBundles(t, b)
	d := trusting(t, reg, s)
	d.Desire(desired(1, nil, b.wantSigned("digits", 1)))
	d.untilRefused("digits", 1, "by no controller's key")
	signature, _ := reg.sign(s.key, b, "digits", 1)
	d.Desire(desired(2, nil, b.wantSigned("digits", 1, signature)))
	d.untilServing("digits", 1)
}

// What is refused while other signatures, or another trust document, come is
// looked at again.
func TestRefusedMeanwhile(t *testing.T) {
	b := pack(t, map[string][][]byte{"m.onnx": blocks(seeded(t), 2)})
	stranger := newKey(t)
	for name, meanwhile := range map[string]func(s *site, d *testDevice, first, second digest.Digest){
		"signatures": func(_ *site, d *testDevice, _, second digest.Digest) {
			d.Desire(desired(2, nil, b.wantSigned("digits", 1, second)))
			d.until("has generation 2", func(r *dunlinv1.Reported) bool { return r.Observed.GetNumber() == 2 })
		},
		"trust document": func(s *site, d *testDevice, first, _ digest.Digest) {
			d.trust.Store(s.next(func(d *dunlinv1.TrustDocument) { d.ControllerKeys = append(d.ControllerKeys, keysOf(t, stranger)...) }))
			d.TrustChanged()
			d.Desire(desired(2, nil, b.wantSigned("digits", 1, first), b.wantSigned("other", 1)))
			d.until("has generation 2", func(r *dunlinv1.Reported) bool { return r.Observed.GetNumber() == 2 })
		},
	} {
		t.Run(name, func(t *testing.T) {
			s, reg := newSite(t), serveBundles(t, b)
			first, blob := reg.sign(stranger, b, "digits", 1)
			second, _ := reg.sign(s.key, b, "digits", 1)
			d := trusting(t, reg, s)
			asked, resume := make(chan struct{}), make(chan struct{})
			once := sync.OnceFunc(func() { close(asked); <-resume })
			reg.setFault(func(dg digest.Digest, _ int64, _ []byte) verdict {
				if dg == blob {
					once()
				}
				return pass
			})
			d.Desire(desired(1, nil, b.wantSigned("digits", 1, first)))
			<-asked
			meanwhile(s, d, first, second)
			close(resume)
			d.untilServing("digits", 1)
		})
	}
}

// Bytes that are on the device as one version are not another one without a
// signature that says so, however often the agent starts.
func TestOtherNameOfWhatIsThere(t *testing.T) {
	b := pack(t, map[string][][]byte{"m.onnx": blocks(seeded(t), 2)})
	s, reg := newSite(t), serveBundles(t, b)
	one, _ := reg.sign(s.key, b, "digits", 1)
	d := trusting(t, reg, s)
	d.Desire(desired(1, nil, b.wantSigned("digits", 1, one)))
	d.untilServing("digits", 1)
	d.Desire(desired(2, nil, b.wantSigned("digits", 1, one), b.wantSigned("letters", 5, one)))
	for range 2 {
		d.untilRefused("letters", 5, `it is of "digits:1"`)
		d.restart()
	}
	two, _ := reg.sign(s.key, b, "letters", 5)
	d.Desire(desired(3, nil, b.wantSigned("digits", 1, one), b.wantSigned("letters", 5, two)))
	d.untilServing("letters", 5)
	d.untilServing("digits", 1)
}

// An old version whose bundle is still on the device does not come back below
// a new floor; what serves goes on serving.
func TestFloorRises(t *testing.T) {
	rng := seeded(t)
	b1, b2 := pack(t, map[string][][]byte{"m.onnx": blocks(rng, 2)}), pack(t, map[string][][]byte{"m.onnx": blocks(rng, 2)})
	s, reg := newSite(t), serveBundles(t, b1, b2)
	one, _ := reg.sign(s.key, b1, "digits", 1)
	two, _ := reg.sign(s.key, b2, "digits", 2)
	d := trusting(t, reg, s)
	d.Desire(desired(1, nil, b1.wantSigned("digits", 1, one)))
	d.untilServing("digits", 1)
	d.trust.Store(s.next(func(d *dunlinv1.TrustDocument) { d.ModelFloors = []*dunlinv1.ModelFloor{{Model: "digits", Version: 2}} }))
	d.TrustChanged()
	d.restart()
	d.untilServing("digits", 1)
	d.Desire(desired(2, nil, b2.wantSigned("digits", 2, two)))
	d.untilServing("digits", 2)
	d.Desire(desired(3, nil, b1.wantSigned("digits", 1, one)))
	d.untilRefused("digits", 1, "version 1 of model digits is below the floor 2")
	if got := d.answers("digits"); got != 2 {
		t.Errorf("version %d answers", got)
	}
}

// What stands by for a version on probation is not served below a floor because
// it is loaded.
func TestFloorOfWhatStandsBy(t *testing.T) {
	rng := seeded(t)
	b1, b2 := pack(t, map[string][][]byte{"m.onnx": blocks(rng, 2)}), pack(t, map[string][][]byte{"m.onnx": blocks(rng, 2)})
	s, reg := newSite(t), serveBundles(t, b1, b2)
	one, _ := reg.sign(s.key, b1, "digits", 1)
	two, _ := reg.sign(s.key, b2, "digits", 2)
	d := trusting(t, reg, s)
	d.try(Probation{Runs: 1, Most: time.Hour})
	d.Desire(desired(1, nil, b1.wantSigned("digits", 1, one)))
	d.untilServing("digits", 1)
	d.Desire(desired(2, nil, b2.wantSigned("digits", 2, two)))
	d.untilServing("digits", 2)
	d.trust.Store(s.next(func(d *dunlinv1.TrustDocument) { d.ModelFloors = []*dunlinv1.ModelFloor{{Model: "digits", Version: 2}} }))
	for n := range uint64(2) {
		d.TrustChanged()
		d.Desire(desired(3+n, nil, b1.wantSigned("digits", 1, one)))
		d.untilRefused("digits", 1, "version 1 of model digits is below the floor 2")
		if got := d.answers("digits"); got != 2 {
			t.Errorf("version %d answers", got)
		}
	}
}

// The core gives what waits below a floor no way around the check at its load.
func TestLoadChecksFloor(t *testing.T) {
	s := newSite(t)
	s.next(func(d *dunlinv1.TrustDocument) { d.ModelFloors = []*dunlinv1.ModelFloor{{Model: "m", Version: 2}} })
	r := &Reconciler{cfg: Config{Trust: func() *signing.Trust { return s.trust }}}
	err := r.load(t.Context(), action{op: loading, key: keyOf(wantVersion("m", 1, "x"))}, false)
	if _, ok := errors.AsType[*signing.RefusedError](err); !ok {
		t.Errorf("error %v", err)
	}
}

// What was admitted once and is kept to go back to can be repaired after a power
// cut, though no document says its signatures any more: those are kept. They must
// count by the present trust document.
func TestRepairsWhatIsKept(t *testing.T) {
	for name, test := range map[string]struct {
		revoked bool
	}{"its key counts": {}, "its key has been revoked": {true}} {
		t.Run(name, func(t *testing.T) {
			rng := seeded(t)
			b1, b2 := pack(t, map[string][][]byte{"m.onnx": blocks(rng, 2)}), pack(t, map[string][][]byte{"m.onnx": blocks(rng, 2)})
			s, reg := newSite(t), serveBundles(t, b1, b2)
			later := newKey(t)
			one, _ := reg.sign(s.key, b1, "digits", 1)
			two, _ := reg.sign(later, b2, "digits", 2)
			s.next(func(d *dunlinv1.TrustDocument) { d.ControllerKeys = append(d.ControllerKeys, keysOf(t, later)...) })
			d := trusting(t, reg, s)
			d.try(Probation{Runs: 1, Most: time.Hour})
			d.Desire(desired(1, nil, b1.wantSigned("digits", 1, one)))
			d.untilServing("digits", 1)
			d.Desire(desired(2, nil, b2.wantSigned("digits", 2, two)))
			d.untilServing("digits", 2)
			if test.revoked {
				d.trust.Store(s.next(func(d *dunlinv1.TrustDocument) { d.ControllerKeys = keysOf(t, later) }))
			}
			d.inspect = 5 * time.Millisecond
			d.cut()
			d.untilServing("digits", 2)
			file := filepath.Join(d.dir, "bundles", b1.digest.Encoded(), filesFolder, "m.onnx")
			if err := os.Truncate(file, 100); err != nil {
				t.Fatal(err)
			}
			if test.revoked {
				d.untilRefused("digits", 1, "a key that does not count")
				if got := d.answers("digits"); got != 2 {
					t.Errorf("version %d answers", got)
				}
				return
			}
			d.until("repairs it", func(r *dunlinv1.Reported) bool {
				v := status(r, "digits", 1)
				if v != nil && v.State == dunlinv1.VersionState_VERSION_STATE_QUARANTINED {
					t.Fatal(v.Reason)
				}
				return strings.HasSuffix(d.kinds(), "drift.found drift.repaired")
			})
			if raw, err := os.ReadFile(file); err != nil || digest.FromBytes(raw) != b1.blobOf("m.onnx") {
				t.Errorf("it is repaired to %d bytes, %v", len(raw), err)
			}
		})
	}
}
