package models

import (
	"encoding/binary"
	"io"
	"math"
	"slices"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/dunlin/dunlin/models/graph"
	"github.com/dunlin/dunlin/models/tensor"
)

// Limits of ReadGraph, below those of Inspect: it keeps what that only counts.
const (
	maxGraphNodes  = 1 << 16
	maxGraphLinks  = 1 << 20 // inputs and outputs of all nodes
	maxGraphValues = 1 << 18 // initialisers, and values that have a type stated
	maxList        = 1024    // elements of an attribute or of a constant that are kept
)

// ReadGraph reads the main graph of the ONNX file at path: its nodes and the
// small constants among them, and of weights the types and shapes. It reads no
// other file. A file that Inspect refuses may pass; its errors are ErrInvalid
// or those of reading.
func ReadGraph(path string) (*graph.Graph, error) {
	f, size, err := openRegular(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return readGraph(f, size)
}

func readGraph(src io.ReaderAt, size int64) (*graph.Graph, error) {
	if size > maxONNXBytes {
		return nil, invalid("ONNX file has %d bytes, allowed are %d", size, maxONNXBytes)
	}
	r := &graphReader{file: &protoFile{src: src, size: size}, graph: &graph.Graph{Stated: map[string]graph.Value{}, Constants: map[string]graph.Constant{}}}
	graphs := 0
	err := r.file.each(span{0, size}, func(f field) error {
		switch f.num {
		case 7:
			if graphs++; graphs > 1 {
				return invalid("more than one graph")
			}
			return r.main(f)
		case 8:
			return r.opset(f)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	if graphs == 0 {
		return nil, invalid("ONNX model has no graph")
	}
	g := r.graph
	g.Inputs = slices.DeleteFunc(g.Inputs, func(v graph.Value) bool { _, ok := g.Constants[v.Name]; return ok })
	return g, nil
}

type graphReader struct {
	file   *protoFile
	graph  *graph.Graph
	kept   int // bytes of strings
	links  int
	values int
}

// name reads a string that is kept.
func (r *graphReader) name(f field, what string) (string, error) {
	s, err := r.file.text(f, what)
	if r.kept += len(s); err == nil && r.kept > maxKept {
		return "", invalid("names have more than %d bytes", maxKept)
	}
	return s, err
}

func (r *graphReader) opset(f field) error {
	s, err := f.message()
	if err != nil {
		return err
	}
	var domain string
	var version int64
	err = r.file.each(s, func(f field) (err error) {
		switch f.num {
		case 1:
			domain, err = r.name(f, "domain of an opset_import")
		case 2:
			version, err = f.integer()
		}
		return err
	})
	if canonical(domain) == "" {
		r.graph.Opset = version
	}
	return err
}

// main reads the GraphProto.
func (r *graphReader) main(f field) error {
	s, err := f.message()
	if err != nil {
		return err
	}
	return r.file.each(s, func(f field) error {
		switch f.num {
		case 1:
			return r.node(f)
		case 5:
			c, name, err := r.tensor(f)
			if err != nil {
				return err
			}
			r.graph.Constants[name] = c
			return r.count()
		case 15:
			return r.sparse(f)
		case 11, 12, 13:
			v, err := r.value(f)
			if err != nil {
				return err
			}
			switch f.num {
			case 11:
				r.graph.Inputs = append(r.graph.Inputs, v)
			case 12:
				if r.graph.Outputs = append(r.graph.Outputs, v); len(r.graph.Outputs) > maxValues {
					return invalid("graph has more than %d outputs", maxValues)
				}
			case 13:
				r.graph.Stated[v.Name] = v
			}
			return r.count()
		}
		return nil
	})
}

func (r *graphReader) count() error {
	if r.values++; r.values > maxGraphValues {
		return invalid("graph has more than %d initialisers and values", maxGraphValues)
	}
	return nil
}

// sparse reads a sparse initialiser, of which its values stand for the size.
func (r *graphReader) sparse(f field) error {
	s, err := f.message()
	if err != nil {
		return err
	}
	var c graph.Constant
	var name string
	var dims []int64
	err = r.file.each(s, func(f field) (err error) {
		switch f.num {
		case 1:
			c, name, err = r.tensor(f)
		case 3:
			dims, err = r.list(f, dims)
		}
		return err
	})
	if err != nil {
		return err
	}
	r.graph.Constants[name] = graph.Constant{Type: c.Type, Dims: dims, Bytes: c.Bytes}
	return r.count()
}

// list appends the integers of a field, as many as are kept.
func (r *graphReader) list(f field, to []int64) ([]int64, error) {
	n := 0
	err := r.file.varints(f, func(v int64) error {
		if len(to) <= maxList { // one more says that there were too many
			to = append(to, v)
			n++
		}
		return nil
	})
	if r.kept += 8 * n; err == nil && r.kept > maxKept {
		return nil, invalid("numbers have more than %d bytes", maxKept)
	}
	return to, err
}

// node reads a NodeProto.
func (r *graphReader) node(f field) error {
	s, err := f.message()
	if err != nil {
		return err
	}
	var n graph.Node
	link := func(to *[]string, f field, what string) error {
		name, err := r.name(f, what)
		if *to = append(*to, name); err == nil {
			if r.links++; r.links > maxGraphLinks {
				return invalid("nodes have more than %d inputs and outputs", maxGraphLinks)
			}
		}
		return err
	}
	err = r.file.each(s, func(f field) (err error) {
		switch f.num {
		case 1:
			return link(&n.Inputs, f, "input of a node")
		case 2:
			return link(&n.Outputs, f, "output of a node")
		case 3:
			n.Name, err = r.name(f, "name of a node")
		case 4:
			n.Op, err = r.name(f, "op_type of a node")
		case 5:
			return r.attribute(f, &n)
		case 7:
			n.Domain, err = r.name(f, "domain of a node")
			n.Domain = canonical(n.Domain)
		}
		return err
	})
	if err != nil {
		return err
	}
	if r.graph.Nodes = append(r.graph.Nodes, n); len(r.graph.Nodes) > maxGraphNodes {
		return invalid("graph has more than %d nodes", maxGraphNodes)
	}
	return nil
}

// attribute reads an AttributeProto of a node.
func (r *graphReader) attribute(f field, n *graph.Node) error {
	s, err := f.message()
	if err != nil {
		return err
	}
	var name string
	var a graph.Attribute
	err = r.file.each(s, func(f field) (err error) {
		switch f.num {
		case 1:
			name, err = r.name(f, "name of an attribute")
		case 2:
			a.Float = float64(math.Float32frombits(uint32(f.number)))
		case 3:
			a.Int, err = f.integer()
		case 4:
			// Bytes, of which some are no text.
			var s span
			if s, err = f.message(); err == nil && s.len() <= 64 {
				var b []byte
				if b, err = r.file.bytes(s.start, int(s.len())); err == nil && printable(string(b)) == nil {
					a.Text = string(b)
				}
			}
		case 5:
			var c graph.Constant
			if c, _, err = r.tensor(f); err == nil {
				a.Tensor = &c
			}
		case 6, 11:
			n.Graphs = true
		case 7:
			err = r.floats(f, &a.Floats)
		case 8:
			a.Ints, err = r.list(f, a.Ints)
		}
		return err
	})
	if err != nil {
		return err
	}
	if n.Attributes == nil {
		n.Attributes = map[string]graph.Attribute{}
	}
	n.Attributes[name] = a
	return r.count()
}

// floats appends the numbers of a repeated float, as many as are kept.
func (r *graphReader) floats(f field, to *[]float64) error {
	n, err := f.fixed(4)
	if err != nil {
		return err
	}
	if f.wire == protowire.Fixed32Type {
		if len(*to) < maxList {
			*to = append(*to, float64(math.Float32frombits(uint32(f.number))))
			r.kept += 8
		}
		return nil
	}
	n = min(n, int64(maxList-len(*to)))
	b, err := r.file.bytes(f.content.start, int(4*n))
	if err != nil {
		return err
	}
	for ; len(b) >= 4; b = b[4:] {
		*to = append(*to, float64(math.Float32frombits(binary.LittleEndian.Uint32(b))))
		r.kept += 8
	}
	if r.kept > maxKept {
		return invalid("numbers have more than %d bytes", maxKept)
	}
	return nil
}

// tensor reads a TensorProto, and its elements where those are few.
func (r *graphReader) tensor(f field) (c graph.Constant, name string, err error) {
	s, err := f.message()
	if err != nil {
		return c, "", err
	}
	var dataType int64
	var raw span
	var ints []int64
	var floats []float64
	external, stored := false, int64(0)
	c.Dims = []int64{}
	err = r.file.each(s, func(f field) (err error) {
		switch f.num {
		case 1:
			return r.file.varints(f, func(d int64) error {
				if c.Dims = append(c.Dims, d); len(c.Dims) > maxRank {
					return invalid("tensor has more than %d dimensions", maxRank)
				}
				return nil
			})
		case 2:
			dataType, err = f.integer()
		case 8:
			name, err = r.name(f, "name of a tensor")
		case 9:
			raw, err = f.message()
		case 14:
			var v int64
			v, err = f.integer()
			external = v == 1
		case floatData:
			stored += f.content.len()
			if f.content.len() <= 4*maxList {
				err = r.floats(f, &floats)
			}
		case int32Data, int64Data:
			stored += f.content.len()
			if f.content.len() <= 10*maxList {
				ints, err = r.list(f, ints)
			}
		case stringData, doubleData, uint64Data:
			stored += f.content.len()
		}
		return err
	})
	if err != nil {
		return c, "", err
	}
	n, err := tensor.Elements(c.Dims)
	if err != nil || n > math.MaxInt64/128 {
		return c, "", invalid("tensor %q has dimensions %v", shorten(name), c.Dims)
	}
	c.Type = tensor.Type(dataType)
	if enc, ok := encodings[dataType]; ok && enc.bits > 0 {
		c.Bytes = (n*enc.bits + 7) / 8
	} else {
		c.Bytes = raw.len() + stored
	}
	if n > maxList || external {
		return c, name, nil
	}
	if raw.len() > 0 && raw.len() <= 8*maxList {
		b, err := r.file.bytes(raw.start, int(raw.len()))
		if err != nil {
			return c, "", err
		}
		ints, floats = decode(c.Type, b)
	}
	switch c.Type {
	case tensor.Float32, tensor.Float64:
		if int64(len(floats)) == n {
			c.Floats = floats
		}
	case tensor.Float16, tensor.BFloat16, tensor.String:
	default:
		if int64(len(ints)) == n {
			c.Ints = ints
		}
	}
	if r.kept += 8 * (len(c.Ints) + len(c.Floats)); r.kept > maxKept {
		return c, "", invalid("numbers have more than %d bytes", maxKept)
	}
	return c, name, nil
}

// decode reads the little-endian elements of some types.
func decode(typ tensor.Type, b []byte) (ints []int64, floats []float64) {
	size := typ.Size()
	if size == 0 {
		return nil, nil
	}
	for ; len(b) >= size; b = b[size:] {
		switch typ {
		case tensor.Float32:
			floats = append(floats, float64(math.Float32frombits(binary.LittleEndian.Uint32(b))))
		case tensor.Float64:
			floats = append(floats, math.Float64frombits(binary.LittleEndian.Uint64(b)))
		case tensor.Int64, tensor.Uint64:
			ints = append(ints, int64(binary.LittleEndian.Uint64(b)))
		case tensor.Int32:
			ints = append(ints, int64(int32(binary.LittleEndian.Uint32(b))))
		case tensor.Uint32:
			ints = append(ints, int64(binary.LittleEndian.Uint32(b)))
		case tensor.Int8:
			ints = append(ints, int64(int8(b[0])))
		case tensor.Uint8, tensor.Bool:
			ints = append(ints, int64(b[0]))
		case tensor.Int16:
			ints = append(ints, int64(int16(binary.LittleEndian.Uint16(b))))
		case tensor.Uint16:
			ints = append(ints, int64(binary.LittleEndian.Uint16(b)))
		default:
			return nil, nil
		}
	}
	return ints, floats
}

// value reads a ValueInfoProto.
func (r *graphReader) value(f field) (v graph.Value, err error) {
	s, err := f.message()
	if err != nil {
		return v, err
	}
	return v, r.file.each(s, func(f field) (err error) {
		switch f.num {
		case 1:
			v.Name, err = r.name(f, "name of a value")
		case 2:
			var s span
			if s, err = f.message(); err == nil {
				err = r.file.each(s, func(f field) error { return r.tensorType(f, &v) })
			}
		}
		return err
	})
}

// tensorType reads the member of a TypeProto that says the type of a tensor.
func (r *graphReader) tensorType(f field, v *graph.Value) error {
	if f.num != 1 {
		return nil
	}
	s, err := f.message()
	if err != nil {
		return err
	}
	return r.file.each(s, func(f field) error {
		switch f.num {
		case 1:
			n, err := f.integer()
			v.Type = tensor.Type(int32(n))
			return err
		case 2:
			s, err := f.message()
			if err != nil {
				return err
			}
			v.Dims = []graph.Dim{}
			return r.file.each(s, func(f field) error { return r.dim(f, v) })
		}
		return nil
	})
}

func (r *graphReader) dim(f field, v *graph.Value) error {
	if f.num != 1 {
		return nil
	}
	s, err := f.message()
	if err != nil {
		return err
	}
	if len(v.Dims) == graph.MaxRank {
		return invalid("value %q has more than %d dimensions", shorten(v.Name), graph.MaxRank)
	}
	d := graph.Dim{Size: -1}
	err = r.file.each(s, func(f field) (err error) {
		switch f.num {
		case 1:
			d.Size, err = f.integer()
			d.Size = max(d.Size, -1)
		case 2:
			d.Name, err = r.name(f, "name of a dimension")
		}
		return err
	})
	v.Dims = append(v.Dims, d)
	return err
}
