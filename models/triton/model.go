package triton

import (
	"fmt"
	"slices"

	"github.com/dunlin/dunlin/models/tensor"
	"github.com/dunlin/dunlin/proto/inference"
)

// declared is what an input and an output of a configuration have in common.
type declared interface {
	GetName() string
	GetDataType() inference.DataType
	GetDims() []int64
	GetReshape() *inference.ModelTensorReshape
}

// CheckModel compares the inputs and outputs of a configuration with those of
// the model. The configuration may leave all inputs out, or all outputs, and
// any output; what it names must be the model's, with its type and, where both
// say one, its shape. The error names every difference.
func CheckModel(c *inference.ModelConfig, inputs, outputs []tensor.Info) error {
	var errs []error
	seen := map[string]bool{}
	for _, in := range c.GetInput() {
		errs = append(errs, check(c, "input", in, inputs, seen))
	}
	if len(c.GetInput()) > 0 {
		for _, in := range inputs {
			if !seen[in.Name] {
				errs = append(errs, fmt.Errorf("input %q of the model is not in the configuration, which has %s", in.Name, names(c.GetInput())))
			}
		}
	}
	clear(seen)
	for _, out := range c.GetOutput() {
		errs = append(errs, check(c, "output", out, outputs, seen))
	}
	if c.GetMaxBatchSize() > 0 {
		errs = append(errs, checkBatch(c, "input", inputs), checkBatch(c, "output", outputs))
	}
	return join(errs)
}

// check compares one input or output.
func check(c *inference.ModelConfig, kind string, d declared, all []tensor.Info, seen map[string]bool) error {
	name := d.GetName()
	at := slices.IndexFunc(all, func(i tensor.Info) bool { return i.Name == name })
	switch {
	case name == "":
		return fmt.Errorf("%s without a name", kind)
	case seen[name]:
		return fmt.Errorf("%s %q is there twice", kind, name)
	case at < 0:
		return fmt.Errorf("%s %q is not one of the model, which has %s", kind, name, names(all))
	}
	seen[name] = true
	info := all[at]
	if want := DataType(info.Type); d.GetDataType() != inference.DataType_TYPE_INVALID && d.GetDataType() != want {
		return fmt.Errorf("%s %q has data_type %v, the model has %v", kind, name, d.GetDataType(), want)
	}
	dims := d.GetDims()
	if r := d.GetReshape(); r != nil {
		dims = r.GetShape()
	} else if len(dims) == 0 {
		return nil // left to the model
	}
	if info.Shape == nil {
		return nil
	}
	if c.GetMaxBatchSize() > 0 {
		dims = append([]int64{-1}, dims...)
	}
	if !slices.EqualFunc(dims, info.Shape, func(a, b int64) bool { return a == b || a < 0 || b < 0 }) {
		how := ""
		if c.GetMaxBatchSize() > 0 {
			how = ", with the batch that max_batch_size puts first"
		}
		return fmt.Errorf("%s %q has dims %v%s, the model has %v", kind, name, dims, how, info.Shape)
	}
	return nil
}

// checkBatch says which of the model's inputs or outputs have no first
// dimension that could be a batch.
func checkBatch(c *inference.ModelConfig, kind string, all []tensor.Info) error {
	var errs []error
	for _, info := range all {
		if info.Shape != nil && (len(info.Shape) == 0 || info.Shape[0] >= 0) {
			errs = append(errs, fmt.Errorf("max_batch_size is %d, but %s %q of the model has the shape %v, whose first dimension is not open", c.GetMaxBatchSize(), kind, info.Name, info.Shape))
		}
	}
	return join(errs)
}

// maxNames bounds how many names an error lists.
const maxNames = 8

// names lists the names of inputs or outputs.
func names[T any](all []T) string {
	var list []string
	for i := range all {
		switch v := any(all[i]).(type) {
		case declared:
			list = append(list, fmt.Sprintf("%q", v.GetName()))
		case tensor.Info:
			list = append(list, fmt.Sprintf("%q", v.Name))
		}
	}
	switch {
	case len(list) == 0:
		return "none"
	case len(list) > maxNames:
		return fmt.Sprintf("%v and %d more", list[:maxNames], len(list)-maxNames)
	}
	return fmt.Sprint(list)
}
