package fleet

import (
	"cmp"
	"crypto/sha256"
	"fmt"
	"maps"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"

	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// AgentModel is the reserved model whose versions are releases of the agent
// program: a deployment of it updates agents, by the same rollouts.
const AgentModel = "dunlin-agent"

// Objects is everything that desired documents are compiled from.
type Objects struct {
	Deployments  []Deployment
	Routes       []Route
	Freezes      []Freeze
	Maintenances []Maintenance
	Versions     []Version // at least those that the deployments name, and those before of the rollouts
	Measured     []Measurement
	Rollouts     []Rollout // at least the newest of each deployment, ended or not
}

// Compiler gives each device its desired document. It is safe for concurrent
// use. Making one costs as much as there are objects; what it does for a device
// costs as much as match that one.
type Compiler struct {
	deployments  []deployment
	everywhere   []int               // those without a selector
	byLabel      map[[2]string][]int // those with one, by one of its labels
	routes       []Route
	versions     map[versionKey]Version
	fitter       *Fitter
	freezes      []Freeze
	maintenances []zoned
}

type versionKey struct {
	model   string
	version int64
}

// deployment is a Deployment with its newest rollout.
type deployment struct {
	Deployment
	rollout *Rollout // nil: there is none, or it is about another version
	// The version before, of the same model: what has to be in memory beside
	// the deployed one for a moment. 0: none.
	before int64
}

// NewCompiler takes objects as they are, and keeps them: a deployment whose
// version is not among them is left out of every document. One without a
// rollout gives its version to all its devices.
func NewCompiler(o Objects) *Compiler {
	c := &Compiler{versions: make(map[versionKey]Version, len(o.Versions)), fitter: NewFitter(o.Measured), byLabel: map[[2]string][]int{}}
	for _, v := range o.Versions {
		c.versions[versionKey{v.Model, v.Version}] = v
	}
	newest := newestRollouts(o.Rollouts)
	shared := map[[2]string]int{}
	for _, d := range o.Deployments {
		for k, v := range d.Selector {
			shared[[2]string{k, v}]++
		}
	}
	for _, d := range o.Deployments {
		if _, ok := c.versions[versionKey{d.Model, d.Version}]; !ok {
			continue
		}
		dep := deployment{Deployment: d}
		if r := newest[d.Name]; r != nil && r.Model == d.Model && r.To == d.Version {
			dep.rollout = r
			if r.Back() == d.Model && !r.same() {
				dep.before = r.From
			}
		} else if r != nil { // it is only supposed that it is applied
			if model, version := LastGood([]Rollout{*r}); model == d.Model && version != d.Version {
				dep.before = version
			}
		}
		i := len(c.deployments)
		c.deployments = append(c.deployments, dep)
		if len(d.Selector) == 0 {
			c.everywhere = append(c.everywhere, i)
			continue
		}
		// The label that the fewest share leaves the fewest to look at.
		var label [2]string
		for k, v := range d.Selector {
			l := [2]string{k, v}
			if label[0] == "" || cmp.Or(cmp.Compare(shared[l], shared[label]), cmp.Compare(k, label[0])) < 0 {
				label = l
			}
		}
		c.byLabel[label] = append(c.byLabel[label], i)
	}
	c.routes = slices.SortedFunc(slices.Values(o.Routes), func(a, b Route) int { return cmp.Compare(a.Name, b.Name) })
	c.freezes = slices.SortedFunc(slices.Values(o.Freezes), func(a, b Freeze) int { return cmp.Compare(a.Name, b.Name) })
	for _, m := range slices.SortedFunc(slices.Values(o.Maintenances), func(a, b Maintenance) int { return cmp.Compare(a.Name, b.Name) }) {
		zone, err := time.LoadLocation(m.TimeZone)
		if err != nil { // Parse takes none of these
			zone = time.UTC
		}
		c.maintenances = append(c.maintenances, zoned{m, zone})
	}
	return c
}

func newestRollouts(all []Rollout) map[string]*Rollout {
	newest := make(map[string]*Rollout, len(all))
	for i := range all {
		r := &all[i]
		if have := newest[r.Deployment]; have == nil || r.Number > have.Number {
			newest[r.Deployment] = r
		}
	}
	return newest
}

// assigned gives, as Assign does, the deployments that count for a device, by
// model.
func (c *Compiler) assigned(d Device) []*deployment {
	byModel := map[string]*deployment{}
	take := func(some []int) {
		for _, i := range some {
			dep := &c.deployments[i]
			if !Matches(dep.Selector, d) {
				continue
			}
			if have, ok := byModel[dep.Model]; !ok || dep.Name < have.Name {
				byModel[dep.Model] = dep
			}
		}
	}
	take(c.everywhere)
	for k, v := range d.Labels {
		take(c.byLabel[[2]string{k, v}])
	}
	return slices.SortedFunc(maps.Values(byModel), func(a, b *deployment) int { return cmp.Compare(a.Model, b.Model) })
}

// Assigned gives the deployments that count for a device, by model: Assign
// without those whose version is not known, and sooner.
func (c *Compiler) Assigned(d Device) []Deployment {
	var all []Deployment
	for _, dep := range c.assigned(d) {
		all = append(all, dep.Deployment)
	}
	return all
}

// Refusal is a version that a device is not given because it does not fit.
type Refusal struct {
	Deployment string
	Model      string
	Version    int64
	Reason     string
	Disk       bool // there may be room on the disk again
}

// Plan says of each version that the device should have once all rollouts have
// succeeded whether it fits there, by model, and gives the deployment of each.
func (c *Compiler) Plan(d Device) ([]Fit, []Deployment) {
	var versions []Version
	var deployments []Deployment
	assigned := c.assigned(d)
	for _, dep := range assigned {
		versions = append(versions, c.versions[versionKey{dep.Model, dep.Version}])
		deployments = append(deployments, dep.Deployment)
	}
	fits := c.fitter.Fit(d, versions)
	for i, dep := range assigned {
		c.beside(d, dep, &fits[i])
	}
	return fits, deployments
}

// beside notes where a version has to take the place of the one before, and
// where it is no model.
func (c *Compiler) beside(d Device, dep *deployment, fit *Fit) {
	if fit.Version.Model == AgentModel {
		if fit.Verdict == Unknown {
			fit.Reason = "a release of the agent program takes no memory of models"
		}
		return
	}
	other := dep.before
	if fit.Version.Version == other {
		other = dep.Version
	}
	before, ok := c.versions[versionKey{fit.Version.Model, other}]
	if dep.before == 0 || !ok || fit.Verdict == DoesNotFit || fit.Verdict == Unknown {
		return
	}
	if reason, must := c.fitter.mustReplace(d, before, fit); must {
		fit.InPlace = true
		fit.Reason = reason + since(fit.Reason)
	}
}

func since(reason string) string {
	if reason == "" {
		return ""
	}
	return "; " + reason
}

// wanted is a version that a device should have by a deployment.
type wanted struct {
	*deployment
	version Version
}

// wants gives what a device should have now, by model, none twice: where a
// deployment that changes its model still gives the one before, and that is
// another deployment's, the other one counts.
func (c *Compiler) wants(d Device, assigned []*deployment) []wanted {
	byModel := make(map[string]wanted, len(assigned))
	for _, dep := range assigned {
		key := versionKey{dep.Model, dep.Version}
		if dep.rollout != nil {
			key.model, key.version = dep.rollout.Gives(d.Name)
		}
		v, ok := c.versions[key]
		if !ok {
			continue
		}
		own := func(dep *deployment) int {
			if dep.Model == key.model {
				return 0
			}
			return 1
		}
		if have, ok := byModel[key.model]; !ok || cmp.Or(cmp.Compare(own(dep), own(have.deployment)), cmp.Compare(dep.Name, have.Name)) < 0 {
			byModel[key.model] = wanted{dep, v}
		}
	}
	return slices.SortedFunc(maps.Values(byModel), func(a, b wanted) int { return cmp.Compare(a.version.Model, b.version.Model) })
}

// Compile gives the device's whole desired document: the versions of its
// deployments by model, each as its newest rollout gives it (Rollout.Gives),
// and the routes, by name, that have at least one target whose model is
// deployed on it. A target that is not there stays in its route: the device
// reports that it is not ready. A release of the agent program stands apart.
//
// A version that does not fit is refused, and the device keeps the one of its
// model, or of its deployment, that had, its present document, gives it, where
// there is one. What had gives it already is not refused any more: whether it
// runs is for the device to say. Where d.Closed is set, nothing changes of what
// had gives, except what a rollout has begun on the device or takes back; a
// device without a document gets one all the same. Where nothing is refused and
// the device is not closed, the answer does not depend on had.
func (c *Compiler) Compile(d Device, had *dunlinv1.DesiredDocument) (*dunlinv1.DesiredDocument, []Refusal) {
	assigned := c.assigned(d)
	wants := c.wants(d, assigned)
	closed := d.Closed != "" && had != nil
	if closed {
		wants = slices.DeleteFunc(wants, func(w wanted) bool { return !w.begun(d.Name) })
	}
	versions := make([]Version, len(wants))
	for i, w := range wants {
		versions[i] = w.version
	}
	doc := &dunlinv1.DesiredDocument{}
	var refused []Refusal
	here := make(map[string]bool, len(wants)) // by model
	for i, fit := range c.fitter.Fit(d, versions) {
		w := wants[i]
		v := w.version
		c.beside(d, w.deployment, &fit)
		var kept *dunlinv1.DesiredVersion
		if fit.Verdict == DoesNotFit || closed {
			kept = held(had, w.Name, v.Model)
		}
		same := kept.GetModel() == v.Model && kept.GetVersion() == v.Version && kept.GetDigest() == v.Digest
		give := &dunlinv1.DesiredVersion{
			Deployment: w.Name, Model: v.Model, Version: v.Version, Digest: v.Digest, SizeBytes: v.SizeBytes, Signatures: v.Signatures,
			Delivery: w.Delivery, InPlace: fit.InPlace,
		}
		switch {
		case closed && same:
			give = kept
		case fit.Verdict == DoesNotFit && !same:
			refused = append(refused, Refusal{Deployment: w.Name, Model: v.Model, Version: v.Version, Reason: "does not fit: " + fit.Reason, Disk: fit.Disk})
			if give = kept; kept == nil {
				here[v.Model] = true
				continue
			}
			if !closed {
				give = proto.CloneOf(kept)
				give.Deployment, give.Delivery = w.Name, w.Delivery
			}
		}
		if here[give.Model] = true; give.Model == AgentModel {
			doc.Agent = agentOf(give, c.versions[versionKey{give.Model, give.Version}], had)
			continue
		}
		doc.Versions = append(doc.Versions, give)
	}
	if closed {
		c.keep(doc, had, assigned, d)
		return doc, refused
	}
	slices.SortStableFunc(doc.Versions, func(a, b *dunlinv1.DesiredVersion) int { return cmp.Compare(a.Model, b.Model) })
	doc.Versions = slices.CompactFunc(doc.Versions, func(a, b *dunlinv1.DesiredVersion) bool { return a.Model == b.Model })
	c.addRoutes(doc, d, here)
	return doc, refused
}

// begun says whether the deployment's rollout has begun to change the device,
// or takes back what it changed: that goes on while the device is closed.
func (dep *deployment) begun(device string) bool {
	if dep.rollout == nil {
		return false
	}
	switch dep.rollout.State {
	case RollingBack, RolledBack:
		return true
	}
	d, ok := dep.rollout.Device(device)
	return ok && !d.AdmittedAt.IsZero()
}

// keep adds to the document of a closed device what it had and what did not
// change.
func (c *Compiler) keep(doc, had *dunlinv1.DesiredDocument, assigned []*deployment, d Device) {
	changed := func(name string) bool {
		return slices.ContainsFunc(assigned, func(dep *deployment) bool { return dep.Name == name && dep.begun(d.Name) })
	}
	for _, h := range had.GetVersions() {
		if !changed(h.GetDeployment()) && !slices.ContainsFunc(doc.Versions, func(v *dunlinv1.DesiredVersion) bool { return v.Model == h.Model }) {
			doc.Versions = append(doc.Versions, h)
		}
	}
	slices.SortStableFunc(doc.Versions, func(a, b *dunlinv1.DesiredVersion) int { return cmp.Compare(a.Model, b.Model) })
	doc.Versions = slices.CompactFunc(doc.Versions, func(a, b *dunlinv1.DesiredVersion) bool { return a.Model == b.Model })
	if doc.Agent == nil && !changed(had.GetAgent().GetDeployment()) {
		doc.Agent = had.GetAgent()
	}
	doc.Routes, doc.Labels = had.GetRoutes(), had.GetLabels()
}

// held gives what a document gives by a deployment, or else of a model; nil:
// nothing.
func held(had *dunlinv1.DesiredDocument, deployment, model string) *dunlinv1.DesiredVersion {
	if model == AgentModel {
		a := had.GetAgent()
		if a == nil {
			return nil
		}
		return &dunlinv1.DesiredVersion{Deployment: a.Deployment, Model: AgentModel, Version: a.Version, Digest: a.Digest, SizeBytes: a.SizeBytes, Signatures: a.Signatures, Delivery: a.Delivery}
	}
	var other *dunlinv1.DesiredVersion
	for _, h := range had.GetVersions() {
		switch {
		case h.GetModel() == model:
			return h
		case h.GetDeployment() == deployment:
			other = h
		}
	}
	return other
}

// agentOf makes what is given a release of the agent program.
func agentOf(v *dunlinv1.DesiredVersion, release Version, had *dunlinv1.DesiredDocument) *dunlinv1.DesiredAgent {
	name := release.AgentVersion
	if h := had.GetAgent(); name == "" && h.GetVersion() == v.GetVersion() {
		name = h.GetAgentVersion()
	}
	return &dunlinv1.DesiredAgent{
		Deployment: v.Deployment, AgentVersion: name, Version: v.Version, Digest: v.Digest, SizeBytes: v.SizeBytes, Signatures: v.Signatures, Delivery: v.Delivery,
	}
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
