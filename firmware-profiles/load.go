package profiles

import (
	"cmp"
	"embed"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// Limits of profiles that are read.
const (
	maxFileBytes = 64 << 10
	maxFiles     = 256 // in a folder
	maxFaults    = 100 // that are reported of all files
)

//go:embed *.yaml
var builtIn embed.FS

// Fault is one thing that is wrong with a profile.
type Fault struct {
	File         string // as it was given, or "built-in/NAME.yaml"
	Line, Column int    // from 1; 0: the file as a whole
	Field        string // "memory.host_fraction"; "": none
	Problem      string
}

// Error writes "file:line:column: field: problem".
func (f Fault) Error() string {
	s := f.File
	if f.Line > 0 {
		s += fmt.Sprintf(":%d:%d", f.Line, f.Column)
	}
	if f.Field != "" {
		s += ": " + f.Field
	}
	return s + ": " + f.Problem
}

// Faults are what is wrong with profiles, by file and place.
type Faults []Fault

// Error gives each fault a line.
func (f Faults) Error() string {
	lines := make([]string, len(f))
	for i, fault := range f {
		lines[i] = fault.Error()
	}
	return strings.Join(lines, "\n")
}

// Set holds profiles of different names. It does not change.
type Set struct {
	all []Profile // by name
}

// Load gives the built-in profiles and those of folders, where each file
// *.yaml holds one. A folder's profile takes the place of the built-in one of
// its name. All that is wrong with the files is reported together, as Faults.
func Load(dirs ...string) (*Set, error) {
	r := &loader{}
	r.folder(builtIn, "built-in", false)
	for _, dir := range dirs {
		info, err := os.Stat(dir)
		if err == nil && !info.IsDir() {
			err = errors.New("is not a folder")
		}
		if err != nil {
			r.faults = append(r.faults, Fault{File: dir, Problem: problemOf(err)})
			continue
		}
		r.folder(os.DirFS(dir), dir, true)
	}
	return r.finish()
}

// loader reads files and collects what is wrong with them.
type loader struct {
	read   []file
	faults Faults
}

// file is a profile as it was read.
type file struct {
	name    string
	site    bool
	profile Profile
	at      map[string]position // of fields
}

func (l *loader) folder(files fs.FS, dir string, site bool) {
	names, err := fs.Glob(files, "*.yaml")
	if err != nil {
		l.faults = append(l.faults, Fault{File: dir, Problem: problemOf(err)})
	}
	if len(names) > maxFiles {
		l.faults = append(l.faults, Fault{File: dir, Problem: fmt.Sprintf("has %d profiles, allowed are %d", len(names), maxFiles)})
		return
	}
	for _, name := range names {
		f := file{name: filepath.Join(dir, name), site: site}
		text, err := readAtMost(files, name)
		if err != nil {
			l.faults = append(l.faults, Fault{File: f.name, Problem: problemOf(err)})
			continue
		}
		faults := f.parse(text)
		if stem := strings.TrimSuffix(name, ".yaml"); len(faults) == 0 && f.profile.Name != stem {
			faults = append(faults, f.fault("name", "is %q, the file's is %q", f.profile.Name, stem))
		}
		l.faults = append(l.faults, faults...)
		l.read = append(l.read, f)
	}
}

func readAtMost(files fs.FS, name string) (string, error) {
	f, err := files.Open(name)
	if err != nil {
		return "", err
	}
	defer f.Close()
	if info, err := f.Stat(); err == nil && !info.Mode().IsRegular() {
		return "", errors.New("is not a regular file")
	}
	b, err := io.ReadAll(io.LimitReader(f, maxFileBytes+1))
	if err == nil && len(b) > maxFileBytes {
		err = fmt.Errorf("has more than %d bytes", maxFileBytes)
	}
	return string(b), err
}

// problemOf leaves out the path that an error names: a fault has it.
func problemOf(err error) string {
	if e, ok := errors.AsType[*fs.PathError](err); ok {
		return e.Err.Error()
	}
	return err.Error()
}

// finish puts the folders' profiles in the place of built-in ones, and looks
// for what no file by itself tells.
func (l *loader) finish() (*Set, error) {
	var kept []file
	for _, f := range l.read {
		if f.profile.Name == "" {
			continue // it has a fault
		}
		i := slices.IndexFunc(kept, func(k file) bool { return k.profile.Name == f.profile.Name })
		switch {
		case i < 0:
			kept = append(kept, f)
		case f.site && !kept[i].site:
			kept[i] = f
		default:
			l.faults = append(l.faults, f.fault("name", "%q is that of %s too", f.profile.Name, kept[i].name))
		}
	}
	if len(l.faults) == 0 { // a rule that is not whole overlaps with too much
		l.overlaps(kept)
	}
	if len(l.faults) > 0 {
		slices.SortStableFunc(l.faults, func(a, b Fault) int {
			return cmp.Or(strings.Compare(a.File, b.File), cmp.Compare(a.Line, b.Line), cmp.Compare(a.Column, b.Column))
		})
		if more := len(l.faults) - maxFaults; more > 0 {
			last := l.faults[maxFaults]
			l.faults = append(l.faults[:maxFaults], Fault{File: last.File, Problem: fmt.Sprintf("and %d faults more", more)})
		}
		return nil, l.faults
	}
	s := &Set{}
	for _, f := range kept {
		s.all = append(s.all, f.profile)
	}
	slices.SortFunc(s.all, func(a, b Profile) int { return strings.Compare(a.Name, b.Name) })
	return s, nil
}

// overlaps reports each two profiles that may match one device of which
// neither is more specific; see Set.Match.
func (l *loader) overlaps(files []file) {
	for i, a := range files {
		for _, b := range files[:i] {
			what, overlap := overlap(a.profile.Match, b.profile.Match)
			if !overlap {
				continue
			}
			if !a.site && b.site { // the fault is that of the file that may be changed
				a, b = b, a
			}
			l.faults = append(l.faults, a.fault("match", "may match the same devices as that of %s, of which neither is more specific: %s", b.name, what))
		}
	}
}

// Names gives the names of all profiles, sorted.
func (s *Set) Names() []string {
	names := make([]string, len(s.all))
	for i, p := range s.all {
		names[i] = p.Name
	}
	return names
}

// Named gives the profile of a name; the error lists those that there are.
func (s *Set) Named(name string) (Profile, error) {
	for _, p := range s.all {
		if p.Name == name {
			return p, nil
		}
	}
	return Profile{}, fmt.Errorf("no firmware profile %q, there are %s", name, strings.Join(s.Names(), ", "))
}
