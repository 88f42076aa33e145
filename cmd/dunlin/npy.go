package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/dunlin/dunlin/models/tensor"
)

// The NPY format is NumPy's (numpy.lib.format): a magic, a version, a header
// that is a Python dictionary, and the raw elements.
const npyMagic = "\x93NUMPY"

// maxNPYHeader bounds the header of an .npy file.
const maxNPYHeader = 64 << 10

// npyTypes are the element types that NPY and the Open Inference Protocol
// share, by NPY's kind and size.
var npyTypes = map[string]tensor.Type{
	"f4": tensor.Float32, "f8": tensor.Float64, "f2": tensor.Float16, "b1": tensor.Bool,
	"i1": tensor.Int8, "i2": tensor.Int16, "i4": tensor.Int32, "i8": tensor.Int64,
	"u1": tensor.Uint8, "u2": tensor.Uint16, "u4": tensor.Uint32, "u8": tensor.Uint64,
}

var (
	npyDescr   = regexp.MustCompile(`'descr'\s*:\s*'([^']*)'`)
	npyFortran = regexp.MustCompile(`'fortran_order'\s*:\s*(True|False)`)
	npyShape   = regexp.MustCompile(`'shape'\s*:\s*\(([0-9, ]*)\)`)
)

func isNPY(b []byte) bool { return bytes.HasPrefix(b, []byte(npyMagic)) }

// parseNPY reads an .npy file into a tensor without a name.
func parseNPY(b []byte) (tensor.Tensor, error) {
	var t tensor.Tensor
	if !isNPY(b) || len(b) < 10 {
		return t, errors.New("not an .npy file")
	}
	headerLen, start := int(binary.LittleEndian.Uint16(b[8:])), 10
	if major := b[6]; major > 1 {
		if len(b) < 12 {
			return t, errors.New(".npy file is cut short in its header")
		}
		n := binary.LittleEndian.Uint32(b[8:])
		if n > maxNPYHeader {
			return t, fmt.Errorf(".npy header has %d bytes, allowed are %d", n, maxNPYHeader)
		}
		headerLen, start = int(n), 12
	}
	if len(b)-start < headerLen {
		return t, errors.New(".npy file is cut short in its header")
	}
	header, data := string(b[start:start+headerLen]), b[start+headerLen:]
	descr, fortran, shape := npyDescr.FindStringSubmatch(header), npyFortran.FindStringSubmatch(header), npyShape.FindStringSubmatch(header)
	if descr == nil || fortran == nil || shape == nil {
		return t, fmt.Errorf(".npy header %.200q has no plain descr, fortran_order and shape", header)
	}
	order, kind := byte('|'), descr[1]
	if kind != "" && strings.IndexByte("<>|=", kind[0]) >= 0 {
		order, kind = kind[0], kind[1:]
	}
	var ok bool
	if t.Type, ok = npyTypes[kind]; !ok {
		return t, fmt.Errorf(".npy elements of type %q cannot be sent", descr[1])
	}
	t.Shape = []int64{}
	for d := range strings.SplitSeq(shape[1], ",") {
		if d = strings.TrimSpace(d); d == "" {
			continue
		}
		n, err := strconv.ParseInt(d, 10, 64)
		if err != nil {
			return t, fmt.Errorf(".npy shape (%s): %w", shape[1], err)
		}
		t.Shape = append(t.Shape, n)
	}
	if fortran[1] == "True" && len(t.Shape) > 1 {
		return t, errors.New(".npy array is in Fortran order: save numpy.ascontiguousarray(array)")
	}
	if order == '>' && t.Type.Size() > 1 {
		data = slices.Clone(data)
		for e := range slices.Chunk(data, t.Type.Size()) {
			slices.Reverse(e)
		}
	}
	t.Data = data
	return t, t.Check()
}

// formatNPY writes a tensor as an .npy file of version 1.
func formatNPY(t *tensor.Tensor) ([]byte, error) {
	kind := ""
	for k, typ := range npyTypes {
		if typ == t.Type {
			kind = k
		}
	}
	if kind == "" {
		return nil, fmt.Errorf("output %q of type %s cannot be saved as .npy", t.Name, t.Type)
	}
	if err := t.Check(); err != nil {
		return nil, err
	}
	var shape strings.Builder
	for _, d := range t.Shape {
		fmt.Fprintf(&shape, "%d, ", d)
	}
	s := shape.String()
	if len(t.Shape) > 1 {
		s = strings.TrimSuffix(s, ", ")
	}
	order := "<"
	if t.Type.Size() == 1 {
		order = "|"
	}
	header := fmt.Sprintf("{'descr': '%s%s', 'fortran_order': False, 'shape': (%s), }", order, kind, strings.TrimSuffix(s, " "))
	// The elements start at a multiple of 64 bytes.
	pad := 63 - (10+len(header))%64
	header += strings.Repeat(" ", pad) + "\n"
	b := append([]byte(npyMagic), 1, 0, byte(len(header)), byte(len(header)>>8))
	return append(append(b, header...), t.Data...), nil
}
