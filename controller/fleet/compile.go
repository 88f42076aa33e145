package fleet

import (
	"cmp"
	"crypto/sha256"
	"fmt"
	"maps"
	"slices"

	"google.golang.org/protobuf/proto"

	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// Objects is everything that desired documents are compiled from.
type Objects struct {
	Deployments []Deployment
	Routes      []Route
	Versions    []Version // at least those that the deployments name
}

// Compiler gives each device its desired document. It is safe for concurrent use.
type Compiler struct {
	deployments []Deployment
	routes      []Route
	versions    map[[2]any]Version
}

// NewCompiler takes objects as they are: a deployment whose version is not
// among them is left out of every document.
func NewCompiler(o Objects) *Compiler {
	c := &Compiler{versions: make(map[[2]any]Version, len(o.Versions))}
	for _, v := range o.Versions {
		c.versions[[2]any{v.Model, v.Version}] = v
	}
	for _, d := range o.Deployments {
		if _, ok := c.versions[[2]any{d.Model, d.Version}]; ok {
			c.deployments = append(c.deployments, d)
		}
	}
	c.routes = slices.SortedFunc(slices.Values(o.Routes), func(a, b Route) int { return cmp.Compare(a.Name, b.Name) })
	return c
}

// Compile gives the device's whole desired document: the versions of its
// deployments by model, and the routes, by name, that have at least one
// target whose model is deployed on it. A target that is not there stays in
// its route: the device reports that it is not ready.
func (c *Compiler) Compile(d Device) *dunlinv1.DesiredDocument {
	doc := &dunlinv1.DesiredDocument{}
	assigned := Assign(d, c.deployments)
	for _, model := range slices.Sorted(maps.Keys(assigned)) {
		dep := assigned[model]
		v := c.versions[[2]any{dep.Model, dep.Version}]
		doc.Versions = append(doc.Versions, &dunlinv1.DesiredVersion{
			Deployment: dep.Name, Model: v.Model, Version: v.Version, Digest: v.Digest, SizeBytes: v.SizeBytes,
		})
	}
	for _, r := range c.routes {
		here := func(t Target) bool { _, ok := assigned[t.Model]; return ok }
		if !slices.ContainsFunc(r.Targets, here) {
			continue
		}
		route := &dunlinv1.DesiredRoute{Name: r.Name}
		for _, t := range r.Targets {
			route.Targets = append(route.Targets, &dunlinv1.RouteTarget{Model: t.Model, Version: t.Version, Weight: t.Weight})
		}
		doc.Routes = append(doc.Routes, route)
	}
	return doc
}

// Encode gives the bytes of a document and their SHA-256: equal documents have
// equal bytes.
func Encode(doc *dunlinv1.DesiredDocument) (data []byte, sum [sha256.Size]byte, err error) {
	data, err = proto.MarshalOptions{Deterministic: true}.Marshal(doc)
	if err != nil {
		return nil, sum, fmt.Errorf("encode desired document: %w", err)
	}
	return data, sha256.Sum256(data), nil
}
