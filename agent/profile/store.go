package profile

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/encoding/protojson"

	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// Format is the version of how profiles are measured: those of another one are
// measured again.
const Format = 1

// Bounds of what a Store keeps.
const (
	maxFiles = 1024
	maxFile  = 256 << 10
	// again is how long it takes until a version that could not be measured is
	// measured again.
	again = 6 * time.Hour
)

// Key is what a profile depends on.
type Key struct {
	ModelDigest     string // "sha256:" and 64 hexadecimal digits
	RuntimeVersion  string
	DriverVersion   string
	FirmwareProfile string
	CPUModel        string
	Cores           uint32 // that runs may have
}

// Valid says whether a profile is one for the key.
func (k Key) Valid(p *dunlinv1.ModelProfile) bool {
	return k == Key{p.GetModelDigest(), p.GetRuntimeVersion(), p.GetDriverVersion(), p.GetFirmwareProfile(), p.GetCpuModel(), p.GetCores()}
}

// Name writes what the key says into a profile.
func (k Key) Name(p *dunlinv1.ModelProfile) {
	p.ModelDigest, p.RuntimeVersion, p.DriverVersion, p.FirmwareProfile, p.CpuModel, p.Cores =
		k.ModelDigest, k.RuntimeVersion, k.DriverVersion, k.FirmwareProfile, k.CPUModel, k.Cores
}

// Store is a folder with one profile for each model, as JSON. It is for one
// process and one goroutine at a time.
type Store struct{ dir string }

// OpenStore opens the store in a folder, which it makes where there is none.
func OpenStore(dir string) (*Store, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("open store of model profiles: %w", err)
	}
	left, err := filepath.Glob(filepath.Join(dir, temporary+"*"))
	for _, path := range left {
		err = errors.Join(err, os.Remove(path))
	}
	if err != nil {
		return nil, fmt.Errorf("open store of model profiles: %w", err)
	}
	return &Store{dir}, nil
}

// temporary begins the name of what a crash may leave.
const temporary = "tmp-"

var digestPattern = regexp.MustCompile(`^sha256:[0-9a-f]{64}$`)

func (s *Store) path(digest string) string {
	return filepath.Join(s.dir, fmt.Sprintf("%s.v%d.json", strings.TrimPrefix(digest, "sha256:"), Format))
}

// Get gives the profile for a key; fs.ErrNotExist says that there is none. One
// that is damaged, or was measured on another device or with another runtime,
// is none.
func (s *Store) Get(k Key, now time.Time) (*dunlinv1.ModelProfile, error) {
	if !digestPattern.MatchString(k.ModelDigest) {
		return nil, fmt.Errorf("model profile: digest %q: %w", k.ModelDigest, fs.ErrNotExist)
	}
	f, err := os.Open(s.path(k.ModelDigest))
	if err != nil {
		return nil, fmt.Errorf("model profile: %w", err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, fmt.Errorf("model profile: %w", err)
	}
	p, err := decode(b)
	if err != nil {
		return nil, fmt.Errorf("model profile %s: %w: %w", k.ModelDigest, fs.ErrNotExist, err)
	}
	if !k.Valid(p) {
		return nil, fmt.Errorf("model profile %s: measured under other conditions: %w", k.ModelDigest, fs.ErrNotExist)
	}
	if Due(p, now) {
		return nil, fmt.Errorf("model profile %s: it is time to try again: %w", k.ModelDigest, fs.ErrNotExist)
	}
	return p, nil
}

// Due says that a version which could not be measured is to be tried again.
func Due(p *dunlinv1.ModelProfile, now time.Time) bool {
	age := now.Sub(p.MeasuredAt.AsTime())
	return p.Unmeasured != "" && (age > again || age < 0)
}

// decode reads a profile and checks what others rely on.
func decode(b []byte) (*dunlinv1.ModelProfile, error) {
	if len(b) > maxFile {
		return nil, fmt.Errorf("more than %d bytes", maxFile)
	}
	p := new(dunlinv1.ModelProfile)
	if err := protojson.Unmarshal(b, p); err != nil {
		return nil, err
	}
	if len(p.Points) > maxPoints || len(p.Latency) > maxPoints || len(p.Providers) > maxPoints {
		return nil, fmt.Errorf("%d points, %d of latency, %d providers: more than %d", len(p.Points), len(p.Latency), len(p.Providers), maxPoints)
	}
	if p.MeasuredAt.CheckValid() != nil {
		return nil, errors.New("measuredAt is not a time")
	}
	for _, l := range p.Latency {
		if l == nil || l.Rows == 0 || l.Rows > math.MaxInt32 || !(l.Seconds > 0) || math.IsInf(l.Seconds, 0) {
			return nil, fmt.Errorf("latency of %d rows is %v s", l.GetRows(), l.GetSeconds())
		}
	}
	if r := p.Recommended; r == nil && p.Unmeasured == "" {
		return nil, errors.New("nothing is recommended")
	} else if r != nil && (r.Batch == 0 || r.Batch > 1<<16 || r.Instances == 0 || r.Instances > 1<<10 || r.Threads > 1<<12) {
		return nil, fmt.Errorf("recommended are batch %d, %d instances, %d threads", r.Batch, r.Instances, r.Threads)
	}
	return p, nil
}

// Put keeps a profile in place of an older one of the same model. It is there
// whole or not at all.
func (s *Store) Put(p *dunlinv1.ModelProfile) error {
	if err := s.put(p); err != nil {
		return fmt.Errorf("keep model profile: %w", err)
	}
	return nil
}

func (s *Store) put(p *dunlinv1.ModelProfile) error {
	if !digestPattern.MatchString(p.ModelDigest) {
		return fmt.Errorf("digest %q is not sha256: and 64 hexadecimal digits", p.ModelDigest)
	}
	b, err := protojson.MarshalOptions{Multiline: true, Indent: "  "}.Marshal(p)
	if err != nil {
		return err
	}
	if _, err := decode(b); err != nil {
		return err
	}
	if err := s.write(s.path(p.ModelDigest), append(b, '\n')); err != nil {
		return err
	}
	return s.tidy()
}

// write writes a file that is there whole or not at all.
func (s *Store) write(path string, b []byte) error {
	f, err := os.CreateTemp(s.dir, temporary)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err = errors.Join(err, f.Sync(), f.Close()); err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	dir, err := os.Open(s.dir)
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// Count gives how many profiles there are in the folder of a Store, which need
// not exist.
func Count(dir string) (int, error) {
	all, err := (&Store{dir}).list()
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	return len(all), err
}

func (s *Store) list() ([]fs.FileInfo, error) {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return nil, err
	}
	var all []fs.FileInfo
	for _, e := range entries {
		if info, err := e.Info(); err == nil && strings.HasSuffix(e.Name(), ".json") {
			all = append(all, info)
		}
	}
	return all, nil
}

// tidy removes the oldest files beyond what is kept.
func (s *Store) tidy() error {
	all, err := s.list()
	if err != nil || len(all) <= maxFiles {
		return err
	}
	slices.SortFunc(all, func(a, b fs.FileInfo) int { return a.ModTime().Compare(b.ModTime()) })
	for _, old := range all[:len(all)-maxFiles] {
		err = errors.Join(err, os.Remove(filepath.Join(s.dir, old.Name())))
	}
	return err
}

// toldFile notes what others were told of the profiles.
const toldFile = "told"

// Told gives what SetTold has kept; an empty map where that cannot be read.
func (s *Store) Told() map[string]string {
	told := map[string]string{}
	b, err := os.ReadFile(filepath.Join(s.dir, toldFile))
	if err != nil || json.Unmarshal(b, &told) != nil || told == nil {
		return map[string]string{}
	}
	return told
}

// SetTold keeps what was told of each version. Of too many it takes those out
// of the map that are not there any more; of too many that are, it keeps some.
func (s *Store) SetTold(told map[string]string, there func(version string) bool) error {
	kept := told
	if len(told) > maxFiles {
		maps.DeleteFunc(told, func(version, _ string) bool { return !there(version) })
		kept = make(map[string]string, maxFiles)
		for _, version := range slices.Sorted(maps.Keys(told))[:min(len(told), maxFiles)] {
			kept[version] = told[version]
		}
	}
	b, err := json.Marshal(kept)
	if err == nil {
		err = s.write(filepath.Join(s.dir, toldFile), b)
	}
	if err != nil {
		return fmt.Errorf("keep what was told of model profiles: %w", err)
	}
	return nil
}
