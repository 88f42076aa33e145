// Package triton reads and writes the model configuration of Triton Inference
// Server, config.pbtxt, as far as it has a meaning here
// (https://github.com/triton-inference-server/server/blob/main/docs/user_guide/model_configuration.md).
package triton

import (
	"bytes"
	"fmt"
	"strings"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/encoding/prototext"

	"github.com/dunlin/dunlin/proto/inference"
)

// MaxConfigBytes bounds a configuration, as text and as JSON.
const MaxConfigBytes = 1 << 20

// Parse reads the text of a config.pbtxt. The errors of what cannot be
// read begin with line:column.
func Parse(pbtxt []byte) (*inference.ModelConfig, error) {
	return parse(pbtxt, func(c *inference.ModelConfig) error { return prototext.Unmarshal(pbtxt, c) })
}

// ParseJSON reads a configuration that was given as JSON, with the names of
// its fields in snake case or in camel case, and numbers as such or as text.
func ParseJSON(text []byte) (*inference.ModelConfig, error) {
	return parse(text, func(c *inference.ModelConfig) error { return protojson.Unmarshal(text, c) })
}

func parse(text []byte, unmarshal func(*inference.ModelConfig) error) (*inference.ModelConfig, error) {
	if len(text) > MaxConfigBytes {
		return nil, fmt.Errorf("has %d bytes, allowed are %d", len(text), MaxConfigBytes)
	}
	c := &inference.ModelConfig{}
	if err := unmarshal(c); err != nil {
		return nil, &syntaxError{err, text}
	}
	return c, nil
}

// maxMessage bounds what an error says, which may repeat what it is about.
const maxMessage = 500

// syntaxError writes an error of the protobuf library with its place first.
type syntaxError struct {
	err  error
	text []byte // that was parsed
}

func (e *syntaxError) Unwrap() error { return e.err }

func (e *syntaxError) Error() string {
	// What follows the colon is a space, or one that does not break.
	message := strings.TrimLeft(strings.TrimPrefix(e.err.Error(), "proto:"), " \u00a0")
	message = strings.TrimPrefix(message, "syntax error ")
	if rest, ok := strings.CutPrefix(message, "(line "); ok {
		message = strings.Replace(rest, "): ", ": ", 1)
	} else { // it ends too early
		line := bytes.Count(e.text, []byte("\n"))
		column := len(e.text) - (bytes.LastIndexByte(e.text, '\n') + 1)
		message = fmt.Sprintf("%d:%d: %s", line+1, column+1, message)
	}
	if len(message) > maxMessage {
		message = message[:maxMessage] + "..."
	}
	return strings.ToValidUTF8(message, "\ufffd")
}
