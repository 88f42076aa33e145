package models

import (
	"encoding/json"
	"fmt"
	"math"
	"slices"

	"github.com/dunlin/dunlin/models/serving"
	"github.com/dunlin/dunlin/models/tensor"
)

const configFormat = 1

// Config is the config blob of a bundle: what there is to know about the
// model without opening it.
type Config struct {
	// Format is 1. It is raised when readers must not ignore what is new;
	// properties that they may ignore come without.
	Format int `json:"format"`
	// Entry is the path of the ONNX file in the bundle.
	Entry   string        `json:"entry"`
	Inputs  []tensor.Info `json:"inputs"`
	Outputs []tensor.Info `json:"outputs"`
	// Opset, Opsets, Operators and WeightBytes are as in Graph.
	Opset       int64            `json:"opset"`
	Opsets      map[string]int64 `json:"opsets,omitempty"`
	IRVersion   int64            `json:"irVersion"`
	Producer    string           `json:"producer,omitempty"`
	Operators   []string         `json:"operators"`
	WeightBytes uint64           `json:"weightBytes"`
	// Labels are the names of the classes, by index; none where the model
	// has none.
	Labels []string `json:"labels,omitempty"`
	// Serving says how requests for the model are scheduled; nil leaves that
	// to the device.
	Serving *serving.Options `json:"serving,omitempty"`
	// Reference is the path of the file with inputs and the outputs that they
	// have: ReferenceFile; empty where there is none.
	Reference string `json:"reference,omitempty"`
	// Costs is what the graph's shapes tell of its runs; nil where nobody has
	// looked at them. Pack does not write them into the bundle, whose digest
	// would then change when the way of counting gets better: who needs them
	// calls EstimateCosts.
	Costs *Costs `json:"costs,omitempty"`
	// Release is set in bundles of AgentModel only, which hold no model: all
	// else but Format is empty then.
	Release *Release `json:"release,omitempty"`
}

// LabelsByOutput gives the labels to the outputs that they fit: the only one,
// or those whose last dimension is as long.
func (c *Config) LabelsByOutput() map[string][]string {
	if len(c.Labels) == 0 {
		return nil
	}
	by := map[string][]string{}
	for _, o := range c.Outputs {
		if n := len(o.Shape); len(c.Outputs) == 1 || n > 0 && o.Shape[n-1] == int64(len(c.Labels)) {
			by[o.Name] = c.Labels
		}
	}
	return by
}

func newConfig(g *Graph, opts PackOptions) Config {
	return Config{
		Format:      configFormat,
		Entry:       entryName,
		Inputs:      g.Inputs,
		Outputs:     g.Outputs,
		Opset:       g.Opset,
		Opsets:      g.Opsets,
		IRVersion:   g.IRVersion,
		Producer:    g.Producer,
		Operators:   g.Operators,
		WeightBytes: g.WeightBytes,
		Labels:      opts.Labels,
		Serving:     opts.Serving,
	}
}

// ParseConfig reads the config of a bundle. Whether the bundle has the file
// that Entry names is for the caller to look up in the manifest.
func ParseConfig(b []byte) (*Config, error) {
	if len(b) > MaxConfigBytes {
		return nil, invalid("config has %d bytes, allowed are %d", len(b), MaxConfigBytes)
	}
	var format struct{ Format int }
	if err := json.Unmarshal(b, &format); err != nil {
		return nil, invalid("config is not valid JSON: %v", err)
	}
	if format.Format != configFormat {
		return nil, invalid("config has format %d, this program reads %d", format.Format, configFormat)
	}
	c := &Config{}
	if err := json.Unmarshal(b, c); err != nil {
		return nil, invalid("config is not valid JSON: %v", err)
	}
	if err := c.check(); err != nil {
		return nil, fmt.Errorf("config: %w", err)
	}
	return c, nil
}

func (c *Config) check() error {
	if c.Release != nil {
		if c.Entry != "" || c.Inputs != nil || c.Outputs != nil || c.Serving != nil || c.Reference != "" || c.Labels != nil {
			return invalid("a release of the agent has no model")
		}
		return c.Release.check()
	}
	if err := checkPath(c.Entry); err != nil {
		return fmt.Errorf("entry: %w", err)
	}
	if err := checkInfos("input", c.Inputs); err != nil {
		return err
	}
	if err := checkInfos("output", c.Outputs); err != nil {
		return err
	}
	switch {
	case len(c.Outputs) == 0:
		return invalid("model has no outputs")
	case c.Opset < 0 || c.Opset > math.MaxInt32:
		return invalid("opset is %d, allowed are 0 to %d", c.Opset, math.MaxInt32)
	case c.Opset == 0 && len(c.Opsets) == 0:
		return invalid("model imports no opset")
	case len(c.Opsets) > maxOpsets:
		return invalid("model imports %d opsets, allowed are %d", len(c.Opsets), maxOpsets)
	case c.IRVersion < 1 || c.IRVersion > math.MaxInt32:
		return invalid("irVersion is %d, allowed are 1 to %d", c.IRVersion, math.MaxInt32)
	case len(c.Operators) > maxOperators:
		return invalid("model uses %d operators, allowed are %d", len(c.Operators), maxOperators)
	case len(c.Labels) > maxLabels:
		return invalid("%d labels, allowed are %d", len(c.Labels), maxLabels)
	}
	if err := checkString("producer", c.Producer); err != nil {
		return err
	}
	for domain, v := range c.Opsets {
		if v < 1 || v > math.MaxInt32 {
			return invalid("opset of domain %q is %d, allowed are 1 to %d", shorten(domain), v, math.MaxInt32)
		}
		if err := checkString("domain", domain); err != nil {
			return err
		}
	}
	for i, op := range c.Operators {
		if err := checkString("operator", op); err != nil {
			return err
		}
		if i > 0 && c.Operators[i-1] >= op {
			return invalid("operator %q is not in order", shorten(op))
		}
	}
	if c.Serving != nil {
		if err := c.Serving.Check(); err != nil {
			return invalid("serving: %v", err)
		}
	}
	if c.Costs != nil {
		if err := checkCosts(c.Costs); err != nil {
			return err
		}
	}
	if c.Reference != "" && c.Reference != ReferenceFile {
		return invalid("reference is %q, allowed is %q", shorten(c.Reference), ReferenceFile)
	}
	for _, l := range c.Labels {
		if err := checkString("label", l); err != nil {
			return err
		}
	}
	return nil
}

// checkInfos bounds the inputs or outputs of a model.
func checkInfos(kind string, infos []tensor.Info) error {
	if len(infos) > maxValues {
		return invalid("model has %d %ss, allowed are %d", len(infos), kind, maxValues)
	}
	seen := map[string]bool{}
	for i, info := range infos {
		if info.Name == "" {
			return invalid("%s %d has no name", kind, i)
		}
		if err := checkString(kind, info.Name); err != nil {
			return err
		}
		if seen[info.Name] {
			return invalid("%s %q is there twice", kind, shorten(info.Name))
		}
		seen[info.Name] = true
		if !info.Type.Known() {
			return invalid("%s %q has no type that can be served", kind, shorten(info.Name))
		}
		if len(info.Shape) > maxRank {
			return invalid("%s %q has %d dimensions, allowed are %d", kind, shorten(info.Name), len(info.Shape), maxRank)
		}
		if slices.Min(append(info.Shape[:len(info.Shape):len(info.Shape)], 0)) < -1 {
			return invalid("%s %q has shape %v with a dimension below -1", kind, shorten(info.Name), info.Shape)
		}
	}
	return nil
}
