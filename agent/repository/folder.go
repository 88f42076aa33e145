package repository

import (
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"unicode/utf8"

	"github.com/dunlin/dunlin/agent/engine"
	"github.com/dunlin/dunlin/models"
	"github.com/dunlin/dunlin/models/serving"
	"github.com/dunlin/dunlin/models/triton"
	"github.com/dunlin/dunlin/proto/inference"
)

// Limits of the folder.
const (
	maxModels     = 4096 // folders that are looked at
	maxName       = 255  // bytes of the name of a model
	maxVersions   = 64   // of a model, loaded at a time
	maxLabelBytes = 4 << 20
	maxLabels     = 1 << 16 // classes of an output
	maxFiles      = 4096    // in the folder of a version
	maxDepth      = 8       // of folders in the folder of a version

	configFile = "config.pbtxt"
)

var errNoModel = errors.New("the model repository has no such model")

var namePattern = regexp.MustCompile(`^[A-Za-z0-9_-][A-Za-z0-9._-]*$`)

// checkName says whether a folder can be a model's.
func checkName(name string) error {
	if len(name) > maxName || !namePattern.MatchString(name) {
		return fmt.Errorf("name %.80q is not made of 1 to %d characters A-Z, a-z, 0-9, _, - and . which is not the first", name, maxName)
	}
	return nil
}

// folder is where models come from: a folder, or one file.
type folder struct {
	dir  string
	file string
	name string // of the model in file
}

func newFolder(dir, file string) (*folder, error) {
	if (dir == "") == (file == "") {
		return nil, errors.New("a model repository is one folder or one file")
	}
	info, err := os.Stat(dir + file)
	switch {
	case err != nil:
		return nil, fmt.Errorf("model repository: %w", err)
	case dir != "" && !info.IsDir():
		return nil, fmt.Errorf("model repository: %s is not a folder", dir)
	case file != "" && !info.Mode().IsRegular():
		return nil, fmt.Errorf("model: %s is not a file", file)
	}
	return &folder{dir, file, modelName(file)}, nil
}

// modelName makes the name of a model from that of its file.
func modelName(file string) string {
	stem := strings.TrimSuffix(filepath.Base(file), filepath.Ext(file))
	name := strings.Map(func(r rune) rune {
		if r < utf8.RuneSelf && namePattern.MatchString("a"+string(r)) {
			return r
		}
		return '_'
	}, stem)
	name = strings.TrimLeft(name, ".")
	return name[:min(len(name), maxName)]
}

// names lists the models, sorted, and the folders that are left alone for
// their names.
func (f *folder) names() (names, bad []string, err error) {
	if f.file != "" {
		return []string{f.name}, nil, nil
	}
	entries, err := os.ReadDir(f.dir)
	if err != nil {
		return nil, nil, fmt.Errorf("model repository: %w", err)
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), ".") {
			continue
		}
		info, err := os.Stat(filepath.Join(f.dir, e.Name())) // of what a link leads to
		if err != nil || !info.IsDir() {
			continue
		}
		if checkName(e.Name()) != nil {
			bad = append(bad, e.Name())
			continue
		}
		names = append(names, e.Name())
	}
	if len(names) > maxModels {
		return nil, nil, fmt.Errorf("model repository: %d models, allowed are %d", len(names), maxModels)
	}
	return names, bad, nil
}

// has says whether there is a model of this name.
func (f *folder) has(name string) bool {
	if f.file != "" {
		return name == f.name
	}
	info, err := os.Stat(filepath.Join(f.dir, name))
	return err == nil && info.IsDir()
}

// plan is what should be loaded of a model.
type plan struct {
	items    []*item  // by version; at least one, or err says why not
	warnings []string // about the configuration
	notes    []string
	err      error
}

// key tells plans apart that lead to different loads.
func (p *plan) key() string {
	h := sha256.New()
	if p.err != nil {
		fmt.Fprintf(h, "error %v", p.err)
	}
	enc := json.NewEncoder(h)
	for _, i := range p.items {
		_ = enc.Encode(struct {
			Spec  engine.Spec
			Stamp string
		}{i.spec, i.stamp}) // of strings, numbers and bools
	}
	return fmt.Sprintf("%x", h.Sum(nil))
}

// plan reads what should be loaded of a model: the folder's, or, where over
// brings something, that instead.
func (f *folder) plan(name string, over *override) *plan {
	p := &plan{}
	if p.err = p.read(f, name, over); p.err != nil {
		p.items = nil
	}
	return p
}

func (p *plan) read(f *folder, name string, over *override) error {
	if f.file != "" && (over == nil || over.staged == nil) {
		return p.single(f, name, over)
	}
	dir, source := filepath.Join(f.dir, name), configFile
	var config *inference.ModelConfig
	var from *staged
	if over != nil {
		config, source = over.config, "parameter config"
		if over.staged != nil {
			from, dir = over.staged, over.staged.dir()
		}
	}
	real, err := filepath.EvalSymlinks(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return errNoModel
	} else if err != nil {
		return err
	}
	if from == nil {
		p.link(f, "the folder of the model", real)
	}
	root, err := os.OpenRoot(real)
	if err != nil {
		return err
	}
	defer root.Close()
	if over == nil {
		if config, err = readConfig(root); err != nil {
			return fmt.Errorf("%s:%w", configFile, err)
		}
	}
	options, labels, err := p.configure(name, source, config, root)
	if err != nil {
		return err
	}
	there, err := versions(real)
	if err != nil {
		return err
	}
	chosen, missing := triton.Versions(config, there)
	for _, v := range missing {
		p.warnings = append(p.warnings, fmt.Sprintf("%s: version_policy names version %d, which is not there", source, v))
	}
	switch {
	case len(there) == 0:
		return errors.New("the folder of the model has no folder of a version, which is a number from 1 on")
	case len(chosen) == 0:
		return fmt.Errorf("%s: version_policy names none of the versions that are there, %v", source, there)
	case len(chosen) > maxVersions:
		return fmt.Errorf("%s: version_policy asks for %d versions, allowed are %d", source, len(chosen), maxVersions)
	}
	for _, v := range chosen {
		i := &item{config: config, staged: from, spec: engine.Spec{ID: engine.VersionID{Model: name, Version: v}, Options: options, Labels: labels}}
		if err := p.locate(f, i, filepath.Join(real, strconv.FormatInt(v, 10)), triton.Filename(config)); err != nil {
			return fmt.Errorf("version %d: %w", v, err)
		}
		p.items = append(p.items, i)
	}
	return nil
}

// single is read for one file.
func (p *plan) single(f *folder, name string, over *override) error {
	if name != f.name {
		return errNoModel
	}
	i := &item{spec: engine.Spec{ID: engine.VersionID{Model: name, Version: 1}, Dir: filepath.Dir(f.file), Entry: filepath.Base(f.file)}}
	if over != nil {
		root, err := os.OpenRoot(i.spec.Dir)
		if err != nil {
			return err
		}
		defer root.Close()
		i.config = over.config
		if i.spec.Options, i.spec.Labels, err = p.configure(name, "parameter config", over.config, root); err != nil {
			return err
		}
	}
	i.files = func() (string, error) {
		info, err := os.Stat(f.file)
		if err != nil {
			return "", err
		}
		return stampOf("", info), nil
	}
	p.items = []*item{i}
	var err error
	i.stamp, err = i.files()
	return err
}

// configure gives what a configuration says.
func (p *plan) configure(name, source string, c *inference.ModelConfig, root *os.Root) (*serving.Options, map[string][]string, error) {
	if c.GetName() != "" && c.GetName() != name {
		return nil, nil, fmt.Errorf("%s: name is %q, the model is called %q", source, c.GetName(), name)
	}
	options, warnings, err := triton.Options(c)
	for _, w := range warnings {
		p.warnings = append(p.warnings, source+": "+w)
	}
	if err != nil {
		return nil, nil, fmt.Errorf("%s: %w", source, err)
	}
	var labels map[string][]string
	for _, o := range c.GetOutput() {
		if o.GetLabelFilename() == "" {
			continue
		}
		names, err := readLabels(root, o.GetLabelFilename())
		if err != nil {
			return nil, nil, fmt.Errorf("%s: label_filename %q of output %q: %w", source, o.GetLabelFilename(), o.GetName(), err)
		}
		if labels == nil {
			labels = map[string][]string{}
		}
		labels[o.GetName()] = names
	}
	return options, labels, nil
}

// locate finds the files of a version.
func (p *plan) locate(f *folder, i *item, dir, entry string) error {
	real, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return err
	}
	info, err := os.Stat(filepath.Join(real, entry))
	if errors.Is(err, fs.ErrNotExist) {
		hint := ""
		if found, _ := filepath.Glob(filepath.Join(real, "*.onnx")); len(found) == 1 {
			hint = fmt.Sprintf("; there is %s, which default_model_filename can name", filepath.Base(found[0]))
		}
		return fmt.Errorf("there is no %s%s", entry, hint)
	} else if err != nil {
		return err
	}
	if info.IsDir() { // a folder of this name holds the model and its external data
		real, entry = filepath.Join(real, entry), triton.DefaultFilename
		if _, err := os.Stat(filepath.Join(real, entry)); err != nil {
			return err
		}
	}
	if i.staged == nil {
		file, err := filepath.EvalSymlinks(filepath.Join(real, entry))
		if err != nil {
			return err
		}
		p.link(f, fmt.Sprintf("the file of version %d", i.spec.ID.Version), file)
	}
	i.spec.Dir, i.spec.Entry = real, entry
	i.files = func() (string, error) { return stamp(real) }
	i.stamp, err = i.files()
	return err
}

// link notes what lies outside of the folder.
func (p *plan) link(f *folder, what, real string) {
	root, err := filepath.EvalSymlinks(f.dir)
	if err != nil {
		return // the folder has gone: reading on will say so
	}
	if rel, err := filepath.Rel(root, real); err != nil || !filepath.IsLocal(rel) {
		p.notes = append(p.notes, fmt.Sprintf("%s is a link out of the model repository, to %s", what, real))
	}
}

// versions lists the folders of versions: whole numbers from 1 on, without
// leading zeros. What else there is, is left alone.
func versions(dir string) ([]int64, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var found []int64
	for _, e := range entries {
		v, err := strconv.ParseInt(e.Name(), 10, 64)
		if err != nil || v < 1 || v > models.MaxVersion || strconv.FormatInt(v, 10) != e.Name() {
			continue
		}
		if info, err := os.Stat(filepath.Join(dir, e.Name())); err == nil && info.IsDir() {
			found = append(found, v)
		}
	}
	slices.Sort(found)
	return found, nil
}

// read reads a file that has at most limit bytes. Its errors do not name it.
func read(root *os.Root, name string, limit int) ([]byte, error) {
	info, err := root.Stat(name) // before it is opened: opening a pipe would wait
	if err != nil {
		return nil, nameless(err)
	}
	if !info.Mode().IsRegular() {
		return nil, errors.New("not a regular file")
	}
	file, err := root.Open(name)
	if err != nil {
		return nil, nameless(err)
	}
	defer file.Close()
	b, err := io.ReadAll(io.LimitReader(file, int64(limit)+1))
	if err == nil && len(b) > limit {
		err = fmt.Errorf("has more than %d bytes", limit)
	}
	return b, nameless(err)
}

func nameless(err error) error {
	if e, ok := errors.AsType[*fs.PathError](err); ok {
		return e.Err
	}
	return err
}

// readConfig reads config.pbtxt; nil where there is none. Its error begins
// with a space, or with where in the file it is.
func readConfig(root *os.Root) (*inference.ModelConfig, error) {
	text, err := read(root, configFile, triton.MaxConfigBytes)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, fmt.Errorf(" %w", err)
	}
	return triton.Parse(text)
}

// readLabels reads the names of classes, one on each line.
func readLabels(root *os.Root, name string) ([]string, error) {
	text, err := read(root, name, maxLabelBytes)
	if err != nil {
		return nil, err
	}
	if !utf8.Valid(text) {
		return nil, errors.New("not UTF-8")
	}
	labels := []string{}
	for line := range strings.Lines(string(text)) {
		labels = append(labels, strings.TrimRight(line, "\r\n"))
	}
	if len(labels) > maxLabels {
		return nil, fmt.Errorf("has %d lines, allowed are %d", len(labels), maxLabels)
	}
	return labels, nil
}

// stamp changes when the files in a folder do, by what can be known without
// reading them.
func stamp(dir string) (string, error) {
	h := sha256.New()
	files := 0
	err := filepath.WalkDir(dir, func(p string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, p)
		if err != nil {
			return err
		}
		if strings.Count(rel, string(filepath.Separator)) >= maxDepth {
			return fmt.Errorf("folder with more than %d levels of folders", maxDepth)
		}
		if e.IsDir() {
			return nil
		}
		if files++; files > maxFiles {
			return fmt.Errorf("folder with more than %d files", maxFiles)
		}
		info, err := os.Stat(p) // of what a link leads to
		if errors.Is(err, fs.ErrNotExist) {
			fmt.Fprintf(h, "%q is not there\n", rel)
			return nil
		} else if err != nil {
			return err
		}
		io.WriteString(h, stampOf(rel, info))
		return nil
	})
	return fmt.Sprintf("%x", h.Sum(nil)), err
}

func stampOf(name string, info fs.FileInfo) string {
	var inode uint64
	if s, ok := info.Sys().(*syscall.Stat_t); ok {
		inode = s.Ino
	}
	return fmt.Sprintf("%q %d %d %d\n", name, info.Size(), info.ModTime().UnixNano(), inode)
}
