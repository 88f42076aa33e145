package reconcile

import (
	"cmp"
	"maps"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
	"google.golang.org/protobuf/proto"

	"github.com/dunlin/dunlin/agent/engine"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// key names a version of a model by what it is called and what it is: a
// controller whose store was made anew may give a name to other bytes.
type key struct {
	id     engine.VersionID
	digest digest.Digest
}

func compareKeys(a, b key) int {
	return cmp.Or(cmp.Compare(a.id.Model, b.id.Model), cmp.Compare(a.id.Version, b.id.Version), cmp.Compare(a.digest, b.digest))
}

// stage is how far a version is.
type stage int

const (
	absent   stage = iota // not, or not completely, on disk
	stored                // verified on disk
	resident              // loaded
)

// op is something to be done. Those up to removing take time: the version
// is busy with one until done is called; the others are over at once.
type op int

const (
	idle op = iota
	fetching
	checking // loading in a process of its own, to see whether it can be
	loading
	unloading
	removing
	repairing   // fetching again what is wrong on the disk
	serving     // requests for the model go to this version from now on
	withdrawing // requests for the model are refused from now on
	routing     // the routes in force have changed
	cancelling  // what the version is busy with is not wanted any more
)

func (o op) String() string {
	return [...]string{"idle", "fetch", "check", "load", "unload", "remove", "repair", "serve", "withdraw", "route", "cancel"}[o]
}

// How many versions may be busy with one thing at a time; the others wait.
var busyLimit = map[op]int{fetching: 2, checking: 1, loading: 2, repairing: 1}

// action is an op on a version.
type action struct {
	op        op
	key       key
	keepFiles bool // removing: another version has the same bundle
}

// version is what the core knows of one version.
type version struct {
	key
	deployment string
	size       uint64 // of the bundle's files; 0 while it is not known
	stage      stage
	since      time.Time // in this stage, or in quarantine
	busy       op
	cancelled  bool            // what it is busy with has been cancelled
	checked    bool            // has passed the check in this run of the agent
	good       bool            // the last of its model that has proven itself, or the best there is
	doubtful   bool            // is checked before it is loaded again, though it is good
	serves     time.Time       // since when, while it serves
	trials     int             // starts of the agent in which it was on probation
	resumes    bool            // it was when the agent ended as it was asked to
	inPlace    bool            // may have the version before it unloaded first
	swaps      bool            // does so: the one before is unloaded, and it is not loaded yet
	swapped    bool            // has done so: the one before does not fit beside it
	broken     bool            // was loaded, and cannot run any more
	admitted   bool            // its signatures have been verified, as those of this name
	signatures []digest.Digest // of the manifests that hold them, as a document has said last
	damage     *damage         // of its bundle; nil: it is whole
	quarantine string
	refused    bool   // the quarantine is for its signatures
	reverted   bool   // the quarantine is for what it did in the place of a good one
	failure    string // what the last try failed with
	failures   int    // in a row
	notBefore  time.Time
	delivery   *dunlinv1.Delivery // how its bytes may travel
	waitsFor   string             // what its download waits for
	fetched    uint64             // bytes that travelled here for it, since the agent's start
}

// core decides what to do next. It is pure: next and the other methods only
// change its fields, and the caller carries out what next says, in order.
// One goroutine uses it.
type core struct {
	versions map[key]*version
	desired  map[string]*version // by model
	serving  map[string]*version // by model
	routes   map[string]*dunlinv1.DesiredRoute
	inForce  map[string]*dunlinv1.DesiredRoute
	labels   map[string]string // of the device, that rules look at
	cramped  bool              // the last fetch that ended found too little room on disk
	waiting  []*version        // to be fetched, in this call of next
	// changing has the models that nothing serves just now, since one version
	// takes the place of another.
	changing  map[string]bool
	probation Probation
}

func newCore() *core {
	return &core{
		changing: map[string]bool{}, probation: DefaultProbation,
		versions: map[key]*version{}, desired: map[string]*version{}, serving: map[string]*version{},
		routes: map[string]*dunlinv1.DesiredRoute{}, inForce: map[string]*dunlinv1.DesiredRoute{},
	}
}

// add gives the version of a key, which is absent where it was not known.
func (c *core) add(k key, now time.Time) *version {
	v := c.versions[k]
	if v == nil {
		v = &version{key: k, since: now}
		c.versions[k] = v
	}
	return v
}

// setDesired takes a checked document. A version in quarantine stays there
// while the same digest is wanted; one that is wanted anew begins anew.
func (c *core) setDesired(doc *dunlinv1.DesiredDocument, now time.Time) {
	desired := map[string]*version{}
	for _, w := range doc.Versions {
		v := c.add(key{engine.VersionID{Model: w.Model, Version: w.Version}, digest.Digest(w.Digest)}, now)
		v.deployment = w.Deployment
		v.size = cmp.Or(w.SizeBytes, v.size)
		signatures := make([]digest.Digest, len(w.Signatures))
		for i, s := range w.Signatures {
			signatures[i] = digest.Digest(s)
		}
		if v.refused && !slices.Equal(v.signatures, signatures) {
			v.forgive()
		}
		v.signatures = signatures
		v.inPlace = w.InPlace
		if !proto.Equal(v.delivery, w.Delivery) && v.waitsFor != "" {
			v.waitsFor, v.notBefore = "", time.Time{}
		}
		v.delivery = w.Delivery
		desired[w.Model] = v
		if c.desired[w.Model] != v {
			v.forgive()
		}
	}
	for model, v := range c.desired {
		if desired[model] != v {
			v.deployment = ""
			trials := v.trials
			if v.quarantine != "" {
				trials = 0
			}
			v.forgive()
			v.trials = trials // it may stand in
		}
	}
	c.desired = desired
	c.routes = map[string]*dunlinv1.DesiredRoute{}
	for _, r := range doc.Routes {
		c.routes[r.Name] = r
	}
	c.labels = map[string]string{}
	for _, l := range doc.Labels {
		c.labels[l.Name] = l.Value
	}
}

// gone takes in that the bundle is not on the disk any more. A good version
// stays one, which is fetched again, and checked before it is loaded.
func (v *version) gone() {
	v.stage, v.checked, v.doubtful, v.resumes = absent, false, v.good, false
	v.good = v.good && v.admitted // else it was here under another name only
}

// forgive forgets what the version has failed with.
func (v *version) forgive() {
	v.quarantine, v.refused, v.reverted, v.failure, v.failures, v.notBefore, v.waitsFor = "", false, false, "", 0, time.Time{}, ""
	v.trials, v.resumes, v.swaps = 0, false, false
}

// reconsider gives what was refused another try: other signatures count.
func (c *core) reconsider() {
	for _, v := range c.versions {
		if v.refused {
			v.forgive()
		}
	}
}

// retry makes what waits after a failure due at once.
func (c *core) retry() {
	for _, v := range c.versions {
		if v.waitsFor == "" {
			v.notBefore = time.Time{}
		}
	}
}

// next gives what is to be done now, in order, and counts it as begun.
func (c *core) next(now time.Time) []action {
	byModel := map[string][]*version{}
	for _, v := range c.sorted() {
		byModel[v.id.Model] = append(byModel[v.id.Model], v)
	}
	models := slices.Sorted(maps.Keys(byModel))
	var acts []action
	for _, m := range models {
		acts = c.withdrawBroken(acts, m)
		acts = c.serve(acts, m, byModel[m], now)
	}
	if c.settleRoutes() {
		acts = append(acts, action{op: routing})
	}
	for _, m := range models {
		if have := c.serving[m]; have != nil && c.desired[m] == nil && !c.held(m) {
			delete(c.serving, m)
			acts = append(acts, action{op: withdrawing, key: have.key})
		}
		acts = c.advance(acts, m, byModel[m], now)
		acts = c.repair(acts, byModel[m], now)
		c.bringBack(byModel[m], now)
		acts = c.discard(acts, m, byModel[m], now)
		if c.changing[m] && (c.desired[m] == nil || c.serving[m] != nil || !slices.ContainsFunc(byModel[m], (*version).coming)) {
			delete(c.changing, m)
		}
	}
	acts = c.admitFetches(acts, c.waiting)
	c.waiting = nil
	return acts
}

// coming says whether something goes on that may end with the version serving.
func (v *version) coming() bool {
	return v.busy == checking || v.busy == loading || v.busy == unloading || v.stage == stored && v.quarantine == "" && (v.swaps || v.good || v.resumes)
}

func (c *core) sorted() []*version {
	return slices.SortedFunc(maps.Values(c.versions), func(a, b *version) int { return compareKeys(a.key, b.key) })
}

// lost takes in that a loaded version cannot run any more. It is unloaded,
// and checked before it is loaded again, or it goes into quarantine. That may be heard of before the end of its load.
//
// From one on probation the device goes back, whatever the reason.
func (c *core) lost(id engine.VersionID, reason string, quarantine bool, now time.Time) (condemned *version) {
	for _, v := range c.versions {
		if v.id == id && (v.stage == resident || v.busy == loading) {
			v.broken = true
			switch {
			case v.quarantine != "":
			case c.serving[id.Model] == v && !v.good && c.fallback(v) != nil:
				c.revert(v, reason, now)
				condemned = v
			case quarantine:
				v.quarantine, v.failure, v.since = reason, "", now
				condemned = v
			}
		}
	}
	return condemned
}

func (c *core) withdrawBroken(acts []action, model string) []action {
	have := c.serving[model]
	if have == nil || !have.broken {
		return acts
	}
	return c.withdraw(acts, have)
}

// withdraw has nothing serve a model, for as long as it takes to bring in
// another version where that is on its way.
func (c *core) withdraw(acts []action, have *version) []action {
	delete(c.serving, have.id.Model)
	c.changing[have.id.Model] = true
	return append(acts, action{op: withdrawing, key: have.key})
}

// serve switches a model over to the version that it should be answered by, of
// those that can run: the wanted one, else whichever serves already, else the
// good one, else whichever there is. One in quarantine only goes on serving
// while there is no other.
func (c *core) serve(acts []action, model string, versions []*version, now time.Time) []action {
	want, have := c.desired[model], c.serving[model]
	if want == nil || have == want && want.quarantine == "" {
		return acts
	}
	to := want
	if !want.ready() || want.quarantine != "" {
		if have != nil && have.quarantine == "" {
			return acts
		}
		to = nil
		for _, v := range versions {
			if v != have && v.ready() && v.quarantine == "" && (to == nil || v.resumes || v.good && !to.good && !to.resumes) {
				to = v
			}
		}
		if to == nil {
			return acts
		}
	}
	if !to.good && c.proven(to) == nil {
		c.prove(to) // it is the best there is
	}
	c.serving[model] = to
	to.serves, to.swapped, to.swaps = now, to.swaps, false
	for _, v := range versions {
		v.resumes = false // what comes next may be a power cut
	}
	if !to.good {
		to.trials++
	}
	return append(acts, action{op: serving, key: to.key})
}

// ready says whether requests can be given to the version.
func (v *version) ready() bool {
	return v.stage == resident && (v.busy == idle || v.busy == repairing) && !v.broken
}

// standsIn says whether a version may serve because nothing better can for now:
// it has done so on probation, without a fault.
func (c *core) standsIn(v *version) bool {
	want, have := c.desired[v.id.Model], c.serving[v.id.Model]
	return v != want && want != nil && (have == nil || have.quarantine != "") && v.admitted && !v.good && v.quarantine == "" && v.trials > 0 && v.trials < maxTrials
}

// bringBack has a good version that is not on the disk any more be fetched again,
// once the wanted one has been, or that fails.
func (c *core) bringBack(versions []*version, now time.Time) {
	for _, v := range versions {
		want := c.desired[v.id.Model]
		if !v.good || v == want || want == nil || v.stage != absent || v.busy != idle || !v.due(now) || c.bundleBusy(v) {
			continue
		}
		if want.stage != absent || want.busy == idle && !want.due(now) {
			c.waiting = append(c.waiting, v)
		}
	}
}

// advance takes a model's wanted version one step further, or brings back
// the good one, or one that stands in, while that takes time, or where it has
// failed.
func (c *core) advance(acts []action, model string, versions []*version, now time.Time) []action {
	want, have := c.desired[model], c.serving[model]
	unserved := have == nil || have.quarantine != ""
	for _, v := range versions {
		if v.busy != fetching && v.busy != checking && v.busy != loading || v.busy == fetching && (v == want && unserved || v != want && v.good && want != nil) {
			continue // what can serve does not wait for a download
		}
		// One at a time for a model; one that is not wanted is given up.
		if v != want && !((v.good || v.resumes || c.standsIn(v)) && want != nil && unserved) && !v.cancelled {
			v.cancelled = true
			acts = append(acts, action{op: cancelling, key: v.key})
		}
		return acts
	}
	if want == nil || want.busy != idle && want.busy != repairing && want.busy != fetching || want.stage == resident && !want.broken && want.quarantine == "" {
		return acts
	}
	if want.broken && want.busy == idle {
		if now.Before(want.notBefore) {
			return acts
		}
		return c.begin(acts, unloading, want)
	}
	due := want.due(now)
	certain := want.checked || (want.good || want.resumes) && !want.doubtful
	if due && want.stage == stored && (certain || want.swaps) {
		if other := c.inTheWay(want, versions); other == nil {
			if !certain {
				return c.begin(acts, checking, want)
			}
			return c.begin(acts, loading, want)
		} else if other.busy == idle {
			if other == have {
				acts = c.withdraw(acts, other)
			}
			return c.begin(acts, unloading, other)
		}
		return acts
	}
	if unserved {
		for _, v := range slices.SortedStableFunc(slices.Values(versions), bestFirst) {
			if v == want || !v.good && !v.resumes && !c.standsIn(v) || v.stage != stored || v.busy != idle || !v.due(now) {
				continue
			}
			other := c.inTheWay(v, versions)
			if other == nil && have != nil && have.swapped {
				other = have // both do not fit
			}
			switch {
			case other == nil && !v.checked && (v.doubtful || !v.good && !v.resumes):
				return c.begin(acts, checking, v)
			case other == nil:
				return c.begin(acts, loading, v)
			case other.busy == idle && other.quarantine != "" && !now.Before(other.notBefore):
				if other == have {
					acts = c.withdraw(acts, other)
				}
				return c.begin(acts, unloading, other)
			}
		}
	}
	switch {
	case !due || want.busy == fetching:
	case want.stage == absent && !c.bundleBusy(want):
		c.waiting = append(c.waiting, want)
	case want.stage == stored:
		return c.begin(acts, checking, want)
	}
	return acts
}

// bestFirst orders versions by how well they can be served: those that resume,
// the good one, and the last that was loaded.
func bestFirst(a, b *version) int {
	rank := func(v *version) int {
		switch {
		case v.resumes:
			return 0
		case v.good:
			return 1
		}
		return 2
	}
	return cmp.Or(cmp.Compare(rank(a), rank(b)), b.since.Compare(a.since))
}

// due says whether a try may be made.
func (v *version) due(now time.Time) bool {
	return v.quarantine == "" && v.damage == nil && !now.Before(v.notBefore)
}

// inTheWay gives a loaded version of the same name, as both cannot be loaded, or
// any loaded one where v is to be loaded in place of it.
func (c *core) inTheWay(v *version, versions []*version) *version {
	i := slices.IndexFunc(versions, func(o *version) bool {
		return o != v && (o.id == v.id || v.swaps && !c.pinned(o.id)) && (o.stage == resident || o.busy == loading)
	})
	if i < 0 {
		return nil
	}
	return versions[i]
}

// bundleBusy says whether another version's bundle of the same digest is
// being written or removed.
func (c *core) bundleBusy(v *version) bool {
	for _, o := range c.versions {
		if o != v && o.digest == v.digest && (o.busy == fetching || o.busy == removing || o.busy == repairing) {
			return true
		}
	}
	return false
}

// begin counts an op as begun, unless as many as may be are under way.
func (c *core) begin(acts []action, o op, v *version) []action {
	if limit, bounded := busyLimit[o]; bounded {
		for _, other := range c.versions {
			if other.busy == o {
				limit--
			}
		}
		if limit <= 0 {
			return acts
		}
	}
	v.busy, v.cancelled = o, false
	return append(acts, action{op: o, key: v.key})
}

// needed says whether a version's bundle must stay: it is wanted, serves or
// runs, is what the model falls back to, or may stand in.
func (c *core) needed(v *version) bool {
	want := c.desired[v.id.Model]
	return v == want || v == c.serving[v.id.Model] || v.stage == resident || v.busy != idle || (v.good || v.resumes) && want != nil || c.standsIn(v)
}

// discard unloads what neither serves nor should, and removes what is not
// needed, once the model's wanted version has had its use of their chunks, or
// the room is.
func (c *core) discard(acts []action, model string, versions []*version, now time.Time) []action {
	want, have := c.desired[model], c.serving[model]
	settled := want == nil || want == have || want.quarantine != "" || c.cramped
	for _, v := range versions {
		switch {
		case v.busy != idle || v == want && v.quarantine == "" || v == have || now.Before(v.notBefore):
		case v.stage == resident:
			if !c.pinned(v.id) && !c.standsBy(v) || v.broken {
				acts = c.begin(acts, unloading, v)
			}
		case settled && !c.needed(v) && !c.bundleBusy(v):
			at := len(acts)
			acts = c.begin(acts, removing, v)
			acts[at].keepFiles = c.shared(v)
		}
	}
	return acts
}

// shared says whether another version has the same bundle.
func (c *core) shared(v *version) bool {
	for _, o := range c.versions {
		if o != v && o.digest == v.digest {
			return true
		}
	}
	return false
}

// outcome is how an op ended.
type outcome struct {
	err       error
	permanent bool // trying again would give the same: quarantine
	refused   bool // for its signatures
	progress  bool // something was achieved before the error
	lost      bool // the bundle is not on disk any more
	noRoom    bool // the disk has too little room
	noMemory  bool // there is too little memory for it beside what is loaded
	wait      time.Duration
	waits     *WaitError // the download waits for this, and nothing has failed
}

// done takes in that a version's op has ended. wait is how long to wait
// before another try.
func (c *core) done(k key, result outcome, now time.Time) {
	v := c.versions[k]
	was, cancelled := v.busy, v.cancelled
	v.busy, v.cancelled = idle, false
	switch {
	case was == fetching || was == repairing:
		c.cramped = result.noRoom
	case was == loading && result.err != nil:
		v.broken = false
	}
	if result.lost {
		v.damage = nil // there is nothing of it
		v.gone()
		v.since = now
	}
	if result.err != nil {
		if cancelled {
			v.swaps = false
			return
		}
		if result.waits != nil {
			v.hold(result.waits, now)
			return
		}
		back := c.fallback(v)
		switch {
		case !v.swaps && v.inPlace && result.noMemory && back != nil && c.desired[k.id.Model] == v:
			// The one before is unloaded first; there is nothing to wait for.
			v.swaps = true
			return
		case v.swaps:
			v.swaps = false
			if result.noMemory && back != nil {
				c.revert(v, "also in the place of the version before it: "+result.err.Error(), now)
				return
			}
			v.reverted = result.permanent && back != nil
		}
		v.failures++
		if result.progress {
			v.failures = 1
		}
		v.failure = result.err.Error()
		v.notBefore = now.Add(result.wait)
		if result.permanent {
			v.quarantine, v.refused, v.failure, v.since = v.failure, result.refused, "", now
		}
		return
	}
	v.failure, v.failures, v.notBefore, v.waitsFor = "", 0, time.Time{}, ""
	switch was {
	case unloading:
		if v.broken {
			v.broken, v.checked, v.doubtful = false, false, true
		}
		v.swapped = false
		v.stage, v.since = stored, now
	case fetching:
		v.stage, v.since, v.admitted = stored, now, true
	case repairing:
		c.repaired(v.digest)
	case checking:
		v.checked, v.doubtful = true, false
	case loading:
		v.stage, v.since = resident, now
	case removing:
		v.damage = nil
		if c.cramped {
			c.retry() // there is more room now
		}
		if c.desired[k.id.Model] != v {
			delete(c.versions, k)
			return
		}
		v.stage, v.since, v.checked, v.good = absent, now, false, false // wanted again since
	}
}

// wake gives when something that waits after a failure becomes due, or a
// version has proven itself; zero for never.
func (c *core) wake(now time.Time) time.Time {
	at := c.proved()
	for _, v := range c.versions {
		if v.busy == idle && v.notBefore.After(now) && (at.IsZero() || v.notBefore.Before(at)) {
			at = v.notBefore
		}
	}
	return at
}
