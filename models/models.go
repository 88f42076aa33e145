// Package models reads ONNX files and packs them into bundles: the OCI
// artifacts, one for each version of a model, that Dunlin stores and delivers.
package models

import (
	"errors"
	"fmt"
	"path"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

// What a bundle and its parts are called in a registry.
const (
	ArtifactType    = "application/vnd.dunlin.model.v1"
	MediaTypeConfig = "application/vnd.dunlin.model.config.v1+json"
	// MediaTypeFile is the type of a layer that holds one file of the bundle.
	// Its annotation org.opencontainers.image.title is the file's path.
	MediaTypeFile       = "application/vnd.dunlin.model.file.v1"
	MediaTypeChunkIndex = "application/vnd.dunlin.model.chunks.v1+protobuf"
)

// Limits of a bundle. What goes beyond one is refused with an error that
// names it.
const (
	MaxManifestBytes = 1 << 20
	MaxConfigBytes   = 4 << 20
	MaxIndexBytes    = 64 << 20
	MaxFiles         = 1024
	MaxBundleBytes   = 64 << 30 // sum of the sizes of the files
)

const (
	maxModelName = 63
	maxPath      = 255  // bytes of a path in a bundle
	maxString    = 4096 // bytes of any other string that is kept
	maxValues    = 1024 // inputs, and outputs, of a model
	maxRank      = 64   // dimensions of a tensor
	maxOperators = 4096 // different operators of a model
	maxOpsets    = 256  // operator sets that a model imports
	maxLabels    = 1 << 16
)

// ErrInvalid is what every error is about the content of a file, a bundle or
// a name, as opposed to one of reading it. Its text says what is wrong
// without saying where the content came from: that is for the caller to add.
var ErrInvalid = errors.New("invalid")

type invalidError string

func (e invalidError) Error() string        { return string(e) }
func (e invalidError) Is(target error) bool { return target == ErrInvalid }

func invalid(format string, args ...any) error {
	return invalidError(fmt.Sprintf(format, args...))
}

var namePattern = regexp.MustCompile(`^[a-z0-9]+([._-][a-z0-9]+)*$`)

// CheckName says whether name can be the name of a model, a deployment or a
// route: at most 63 characters of a-z, 0-9 and single . _ - between them,
// which makes it a valid name of an OCI repository.
func CheckName(name string) error {
	if name == "" || len(name) > maxModelName {
		return invalid("name %q has %d characters, allowed are 1 to %d", shorten(name), len(name), maxModelName)
	}
	if !namePattern.MatchString(name) {
		return invalid("name %q is not made of a-z and 0-9, with single . _ or - between them", name)
	}
	return nil
}

// MaxVersion bounds the number of a version: it is exact as a number in JSON,
// and there is always a next one.
const MaxVersion = 1<<53 - 1

// ParseRef takes "digits:3" apart, or "digits", whose version is 0: whichever
// version the context gives.
func ParseRef(s string) (name string, version int64, err error) {
	name, v, tagged := strings.Cut(s, ":")
	if err := CheckName(name); err != nil {
		return "", 0, fmt.Errorf("model: %w", err)
	}
	if !tagged {
		return name, 0, nil
	}
	version, err = strconv.ParseInt(v, 10, 64)
	if err != nil || version < 1 || version > MaxVersion || strconv.FormatInt(version, 10) != v {
		return "", 0, invalid("model %q: version %q is not a whole number of 1 to %d", shorten(s), shorten(v), int64(MaxVersion))
	}
	return name, version, nil
}

// checkPath says whether p can be the path of a file in a bundle: relative,
// slash-separated, clean, and inside the bundle on every system.
func checkPath(p string) error {
	switch {
	case p == "" || len(p) > maxPath:
		return invalid("path %q has %d bytes, allowed are 1 to %d", shorten(p), len(p), maxPath)
	case strings.HasPrefix(p, "/"):
		return invalid("path %q is absolute", p)
	// An asterisk could be taken for a marker of ONNX Runtime's by which a
	// location means an address in memory.
	case strings.ContainsAny(p, `\*`) || printable(p) != nil:
		return invalid(`path %q holds a character that is not allowed (control characters, \ and *)`, p)
	case p == "." || path.Clean(p) != p:
		return invalid("path %q is not in its shortest form", p)
	case !filepath.IsLocal(p):
		return invalid("path %q leaves its folder", p)
	}
	return nil
}

// checkString bounds a name that is kept and shown.
func checkString(what, s string) error {
	if len(s) > maxString {
		return invalid("%s has %d bytes, allowed are %d", what, len(s), maxString)
	}
	if err := printable(s); err != nil {
		return invalid("%s %q %v", what, shorten(s), err)
	}
	return nil
}

func printable(s string) error {
	if !utf8.ValidString(s) {
		return errors.New("is not valid UTF-8")
	}
	if strings.ContainsFunc(s, unicode.IsControl) {
		return errors.New("holds a control character")
	}
	return nil
}

// shorten bounds what an error message repeats of its input.
func shorten(s string) string {
	const most = 80
	if len(s) <= most {
		return s
	}
	return s[:most] + "..."
}
