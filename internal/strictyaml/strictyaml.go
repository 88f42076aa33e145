// Package strictyaml reads settings and scripts in YAML into structs.
package strictyaml

import (
	"bytes"
	"errors"
	"fmt"
	"io"

	"github.com/goccy/go-yaml"
)

// Decode reads one YAML document into the value that into points to. A key
// that into does not have is an error, an empty document is none. Errors give
// line and column, and nothing of the text around, which may hold a secret.
func Decode(raw []byte, into any) (err error) {
	// The decoder panics on some documents that YAML allows, such as a list
	// that is a scalar with a tag.
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("the document cannot be read: %v", p)
		}
	}()
	// It also clears what it is given where there is nothing to decode.
	var content any
	if err := yaml.NewDecoder(bytes.NewReader(raw)).Decode(&content); content == nil && (err == nil || errors.Is(err, io.EOF)) {
		return nil
	}
	if err = yaml.NewDecoder(bytes.NewReader(raw), yaml.Strict()).Decode(into); err == nil {
		return nil
	}
	return errors.New(yaml.FormatError(err, false, false))
}
