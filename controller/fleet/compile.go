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
	Measured    []Measurement
}

// Compiler gives each device its desired document. It is safe for concurrent use.
type Compiler struct {
	deployments []Deployment
	routes      []Route
	versions    map[[2]any]Version
	fitter      *Fitter
}

// NewCompiler takes objects as they are: a deployment whose version is not
// among them is left out of every document.
func NewCompiler(o Objects) *Compiler {
	c := &Compiler{versions: make(map[[2]any]Version, len(o.Versions)), fitter: NewFitter(o.Measured)}
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

// Refusal is a version that a device is not given because it does not fit.
type Refusal struct {
	Deployment string
	Model      string
	Version    int64
	Reason     string
	Disk       bool // there may be room on the disk again
}

// Plan says of each version that the device should have whether it fits
// there, by model, and gives the deployment of each.
func (c *Compiler) Plan(d Device) ([]Fit, []Deployment) {
	assigned := Assign(d, c.deployments)
	var versions []Version
	var deployments []Deployment
	for _, model := range slices.Sorted(maps.Keys(assigned)) {
		dep := assigned[model]
		versions = append(versions, c.versions[[2]any{dep.Model, dep.Version}])
		deployments = append(deployments, dep)
	}
	return c.fitter.Fit(d, versions), deployments
}

// Compile gives the device's whole desired document: the versions of its
// deployments by model, and the routes, by name, that have at least one
// target whose model is deployed on it. A target that is not there stays in
// its route: the device reports that it is not ready.
//
// A version that does not fit is refused, and the device keeps the one of its
// model that had, its present document, gives it, where there is one. What had
// gives it already is not refused any more: whether it runs is for the device
// to say. Where nothing is refused, the answer does not depend on had.
func (c *Compiler) Compile(d Device, had *dunlinv1.DesiredDocument) (*dunlinv1.DesiredDocument, []Refusal) {
	doc := &dunlinv1.DesiredDocument{}
	var refused []Refusal
	fits, deployments := c.Plan(d)
	here := make(map[string]bool, len(fits))
	for i, fit := range fits {
		v, dep := fit.Version, deployments[i]
		here[v.Model] = true
		give := &dunlinv1.DesiredVersion{Deployment: dep.Name, Model: v.Model, Version: v.Version, Digest: v.Digest, SizeBytes: v.SizeBytes, Signatures: v.Signatures}
		if fit.Verdict == DoesNotFit {
			j := slices.IndexFunc(had.GetVersions(), func(h *dunlinv1.DesiredVersion) bool { return h.GetModel() == v.Model })
			var kept *dunlinv1.DesiredVersion
			if j >= 0 {
				kept = had.GetVersions()[j]
			}
			if kept.GetVersion() != v.Version || kept.GetDigest() != v.Digest {
				refused = append(refused, Refusal{Deployment: dep.Name, Model: v.Model, Version: v.Version, Reason: "does not fit: " + fit.Reason, Disk: fit.Disk})
				if kept == nil {
					continue
				}
				give.Version, give.Digest, give.SizeBytes, give.Signatures = kept.GetVersion(), kept.GetDigest(), kept.GetSizeBytes(), kept.GetSignatures()
			}
		}
		doc.Versions = append(doc.Versions, give)
	}
	for _, r := range c.routes {
		if !slices.ContainsFunc(r.Targets, func(t Target) bool { return here[t.Model] }) {
			continue
		}
		route := &dunlinv1.DesiredRoute{Name: r.Name}
		for _, t := range r.Targets {
			route.Targets = append(route.Targets, &dunlinv1.RouteTarget{Model: t.Model, Version: t.Version, Weight: t.Weight})
		}
		doc.Routes = append(doc.Routes, route)
	}
	return doc, refused
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
