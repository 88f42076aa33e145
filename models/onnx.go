package models

import (
	"errors"
	"io"
	"maps"
	"math"
	"os"
	"path/filepath"
	"slices"

	"github.com/dunlin/dunlin/models/tensor"
)

// Limits of an ONNX file.
const (
	// maxONNXBytes is where protobuf ends; larger models keep their weights
	// in files of their own.
	maxONNXBytes = math.MaxInt32
	maxDepth     = 32      // graphs inside graphs
	maxNodes     = 1 << 20 // in all graphs and functions
	maxTensors   = 1 << 20 // in all graphs and functions
	maxInputs    = 1 << 17 // of a graph, those with an initialiser included
	// maxKept bounds the bytes of all strings that are kept from a file.
	maxKept = 64 << 20
)

// Graph is what an ONNX file says about its model.
type Graph struct {
	// Inputs are those that a request gives: without those that have an
	// initialiser. The shape of a value of unknown rank is nil, that of a
	// scalar is empty.
	Inputs, Outputs []tensor.Info
	// Opset is the version of the default operator set that the model
	// imports, 0 where it imports only others.
	Opset int64
	// Opsets has the versions of the other operator sets by domain.
	Opsets    map[string]int64
	IRVersion int64
	Producer  string
	// Operators are those that the model's graphs and functions use, sorted,
	// each with its domain before it unless that is the default one. The
	// model's own functions are not among them.
	Operators []string
	// WeightBytes is the size of all initialisers and constants in memory.
	WeightBytes uint64
	// WeightTypes are their element types, ascending; some may be newer than
	// this program.
	WeightTypes []tensor.Type
	// External are the files beside the model that hold weights, sorted, by
	// their slash-separated paths relative to the model's folder.
	External []string
}

// Inspect reads the ONNX file at path, without its weights and in little
// memory, and refuses one that cannot run: damaged, incomplete, without what
// a model must have, or with external data that is not where the file says.
func Inspect(path string) (*Graph, error) {
	f, size, err := openRegular(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	folder, err := os.OpenRoot(filepath.Dir(path))
	if err != nil {
		return nil, err
	}
	defer folder.Close()
	return inspect(f, size, folder)
}

func openRegular(path string) (*os.File, int64, error) {
	info, err := os.Stat(path) // before it is opened: opening a pipe would wait
	if err != nil {
		return nil, 0, err
	}
	if !info.Mode().IsRegular() {
		return nil, 0, invalid("not a regular file")
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, 0, err
	}
	return f, info.Size(), nil
}

// operator names an operator or a function.
type operator struct{ domain, name string }

func (o operator) String() string {
	if o.domain == "" {
		return o.name
	}
	return o.domain + "." + o.name
}

type inspector struct {
	file           *protoFile
	folder         *os.Root
	external       map[string]int64 // size by location
	operators      map[operator]bool
	functions      map[operator]bool
	imports        map[string]int64
	inputs         []value // of the main graph
	outputs        []value
	initialisers   map[string]bool // of the main graph
	nodes, tensors int
	kept           int
	weights        uint64
	weightTypes    map[tensor.Type]bool
}

func inspect(src io.ReaderAt, size int64, folder *os.Root) (*Graph, error) {
	if size == 0 {
		return nil, invalid("empty file")
	}
	if size > maxONNXBytes {
		return nil, invalid("ONNX file has %d bytes, allowed are %d: store the weights as external data", size, maxONNXBytes)
	}
	in := &inspector{
		file:         &protoFile{src: src, size: size},
		folder:       folder,
		external:     map[string]int64{},
		operators:    map[operator]bool{},
		functions:    map[operator]bool{},
		imports:      map[string]int64{},
		initialisers: map[string]bool{},
		weightTypes:  map[tensor.Type]bool{},
	}
	return in.model(size)
}

// model reads a ModelProto.
func (in *inspector) model(size int64) (*Graph, error) {
	g := &Graph{Opsets: map[string]int64{}, Operators: []string{}}
	var producer, version string
	graphs := 0
	for at := int64(0); at < size; {
		f, next, err := in.file.next(at, size)
		// Writers put the fields in order, ir_version first: a file that
		// has none before it breaks off is something else.
		if short, ok := errors.AsType[shortError](err); ok && g.IRVersion > 0 {
			return nil, invalid("truncated: %s", string(short))
		}
		if err != nil {
			return nil, err
		}
		switch f.num {
		case 1:
			g.IRVersion, err = f.integer()
		case 2:
			producer, err = in.file.text(f, "producer_name")
		case 3:
			version, err = in.file.text(f, "producer_version")
		case 7:
			if graphs++; graphs > 1 {
				return nil, invalid("more than one graph")
			}
			err = in.graph(f, 1)
		case 8:
			err = in.opset(f)
		case 25:
			err = in.function(f)
		}
		if err != nil {
			return nil, err
		}
		at = next
	}
	switch {
	case g.IRVersion < 1 || g.IRVersion > math.MaxInt32:
		return nil, malformed("it has no ir_version")
	case graphs == 0:
		return nil, invalid("ONNX model has no graph")
	case len(in.imports) == 0:
		return nil, invalid("ONNX model has no opset_import")
	case len(in.outputs) == 0:
		return nil, invalid("graph has no outputs")
	}
	g.Producer = producer
	if version != "" {
		g.Producer += " " + version
	}
	if err := checkString("producer", g.Producer); err != nil {
		return nil, err
	}
	for domain, v := range in.imports {
		if domain == "" {
			g.Opset = v
		} else {
			g.Opsets[domain] = v
		}
	}
	in.inputs = slices.DeleteFunc(in.inputs, func(v value) bool { return in.initialisers[v.Name] })
	var err error
	if g.Inputs, err = served("input", in.inputs); err != nil {
		return nil, err
	}
	if g.Outputs, err = served("output", in.outputs); err != nil {
		return nil, err
	}
	for op := range in.operators {
		if in.functions[op] {
			continue
		}
		if err := checkString("operator", op.String()); err != nil {
			return nil, err
		}
		g.Operators = append(g.Operators, op.String())
	}
	slices.Sort(g.Operators)
	g.Operators = slices.Compact(g.Operators)
	if len(g.Operators) > maxOperators {
		return nil, invalid("model uses %d operators, allowed are %d", len(g.Operators), maxOperators)
	}
	g.WeightBytes = in.weights
	g.WeightTypes = slices.Sorted(maps.Keys(in.weightTypes))
	g.External = slices.Sorted(maps.Keys(in.external))
	return g, nil
}

// opset reads an OperatorSetIdProto.
func (in *inspector) opset(f field) error {
	s, err := f.message()
	if err != nil {
		return err
	}
	var domain string
	var version int64
	err = in.file.each(s, func(f field) (err error) {
		switch f.num {
		case 1:
			domain, err = in.name(f, "domain of an opset_import")
		case 2:
			version, err = f.integer()
		}
		return err
	})
	if err != nil {
		return err
	}
	domain = canonical(domain)
	if version < 1 || version > math.MaxInt32 {
		return invalid("opset_import of domain %q has version %d, allowed are 1 to %d", shorten(domain), version, math.MaxInt32)
	}
	if v, ok := in.imports[domain]; ok && v != version {
		return invalid("opset_import of domain %q has two versions, %d and %d", shorten(domain), v, version)
	}
	if in.imports[domain] = version; len(in.imports) > maxOpsets {
		return invalid("more than %d opset_imports", maxOpsets)
	}
	return nil
}

// canonical gives the default domain its shorter name.
func canonical(domain string) string {
	if domain == "ai.onnx" {
		return ""
	}
	return domain
}

// name reads a string that is kept.
func (in *inspector) name(f field, what string) (string, error) {
	s, err := in.file.text(f, what)
	if in.kept += len(s); err == nil && in.kept > maxKept {
		return "", invalid("names have more than %d bytes", maxKept)
	}
	return s, err
}

// function reads a FunctionProto.
func (in *inspector) function(f field) error {
	s, err := f.message()
	if err != nil {
		return err
	}
	var id operator
	err = in.file.each(s, func(f field) (err error) {
		switch f.num {
		case 1:
			id.name, err = in.name(f, "name of a function")
		case 10:
			id.domain, err = in.name(f, "domain of a function")
		case 7:
			err = in.node(f, 1)
		case 11:
			err = in.attribute(f, 1)
		}
		return err
	})
	id.domain = canonical(id.domain)
	in.functions[id] = true
	return err
}

// graph reads a GraphProto. The main graph has depth 1.
func (in *inspector) graph(f field, depth int) error {
	s, err := f.message()
	if err != nil {
		return err
	}
	if depth > maxDepth {
		return invalid("graphs are nested more than %d deep", maxDepth)
	}
	main := depth == 1
	return in.file.each(s, func(f field) (err error) {
		var name string
		switch f.num {
		case 1:
			return in.node(f, depth)
		case 5:
			name, err = in.tensor(f, "initialiser")
		case 15:
			name, err = in.sparse(f)
		case 11:
			if main {
				return in.value(f, "input", &in.inputs)
			}
		case 12:
			if main {
				return in.value(f, "output", &in.outputs)
			}
		}
		if main && name != "" {
			in.initialisers[name] = true
		}
		return err
	})
}

// node reads a NodeProto.
func (in *inspector) node(f field, depth int) error {
	s, err := f.message()
	if err != nil {
		return err
	}
	if in.nodes++; in.nodes > maxNodes {
		return invalid("more than %d nodes", maxNodes)
	}
	var op operator
	err = in.file.each(s, func(f field) (err error) {
		switch f.num {
		case 4:
			op.name, err = in.file.text(f, "op_type of a node")
		case 7:
			op.domain, err = in.file.text(f, "domain of a node")
		case 5:
			err = in.attribute(f, depth)
		}
		return err
	})
	if err != nil {
		return err
	}
	if op.name == "" {
		return invalid("node at byte %d has no op_type", s.start)
	}
	op.domain = canonical(op.domain)
	if !in.operators[op] {
		in.operators[op] = true
		if in.kept += len(op.name) + len(op.domain); in.kept > maxKept {
			return invalid("names have more than %d bytes", maxKept)
		}
	}
	return nil
}

// attribute reads an AttributeProto, whose tensors and graphs count like
// those of the graph at depth.
func (in *inspector) attribute(f field, depth int) error {
	s, err := f.message()
	if err != nil {
		return err
	}
	return in.file.each(s, func(f field) (err error) {
		switch f.num {
		case 5, 10:
			_, err = in.tensor(f, "constant")
		case 6, 11:
			err = in.graph(f, depth+1)
		case 22, 23:
			_, err = in.sparse(f)
		}
		return err
	})
}

// sparse reads a SparseTensorProto. Its name is that of its values.
func (in *inspector) sparse(f field) (name string, err error) {
	s, err := f.message()
	if err != nil {
		return "", err
	}
	err = in.file.each(s, func(f field) (err error) {
		switch f.num {
		case 1:
			name, err = in.tensor(f, "values of sparse tensor")
		case 2:
			_, err = in.tensor(f, "indices of sparse tensor")
		}
		return err
	})
	return name, err
}
