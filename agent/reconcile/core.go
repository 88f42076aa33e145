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
	serving     // requests for the model go to this version from now on
	withdrawing // requests for the model are refused from now on
	routing     // the routes in force have changed
	cancelling  // what the version is busy with is not wanted any more
)

func (o op) String() string {
	return [...]string{"idle", "fetch", "check", "load", "unload", "remove", "serve", "withdraw", "route", "cancel"}[o]
}

// How many versions may be busy with one thing at a time; the others wait.
var busyLimit = map[op]int{fetching: 2, checking: 1, loading: 2}

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
	good       bool            // served last of its model
	broken     bool            // was loaded, and cannot run any more
	admitted   bool            // its signatures have been verified, as those of this name
	signatures []digest.Digest // of the manifests that hold them
	quarantine string
	refused    bool   // the quarantine is for its signatures
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
	cramped  bool       // the last fetch that ended found too little room on disk
	waiting  []*version // to be fetched, in this call of next
}

func newCore() *core {
	return &core{
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
			v.forgive()
		}
	}
	c.desired = desired
	c.routes = map[string]*dunlinv1.DesiredRoute{}
	for _, r := range doc.Routes {
		c.routes[r.Name] = r
	}
}

// forgive forgets what the version has failed with.
func (v *version) forgive() {
	v.quarantine, v.refused, v.failure, v.failures, v.notBefore, v.waitsFor = "", false, "", 0, time.Time{}, ""
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
		acts = c.serve(acts, m, byModel[m])
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
		acts = c.discard(acts, m, byModel[m], now)
	}
	acts = c.admitFetches(acts, c.waiting)
	c.waiting = nil
	return acts
}

func (c *core) sorted() []*version {
	return slices.SortedFunc(maps.Values(c.versions), func(a, b *version) int { return compareKeys(a.key, b.key) })
}

// lost takes in that a loaded version cannot run any more. It is unloaded,
// and checked before it is loaded again, or it goes into quarantine where a
// reason for that is given. That may be heard of before the end of its load.
func (c *core) lost(id engine.VersionID, quarantine string, now time.Time) (condemned *version) {
	for _, v := range c.versions {
		if v.id == id && (v.stage == resident || v.busy == loading) {
			v.broken = true
			if quarantine != "" {
				v.quarantine, v.failure, v.since = quarantine, "", now
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
	delete(c.serving, model)
	return append(acts, action{op: withdrawing, key: have.key})
}

// serve switches a model over to the version that it should be answered by,
// of those that can run: the wanted one, else whichever serves already, else
// whichever there is.
func (c *core) serve(acts []action, model string, versions []*version) []action {
	want, have := c.desired[model], c.serving[model]
	if want == nil || have == want {
		return acts
	}
	to := want
	if !want.ready() {
		if have != nil {
			return acts
		}
		i := slices.IndexFunc(versions, (*version).ready)
		if i < 0 {
			return acts
		}
		to = versions[i]
	}
	c.serving[model] = to
	for _, v := range versions {
		v.good = v == to
	}
	return append(acts, action{op: serving, key: to.key})
}

// ready says whether requests can be given to the version.
func (v *version) ready() bool { return v.stage == resident && v.busy == idle && !v.broken }

// advance takes a model's wanted version one step further, or brings back
// the one that served last while that takes time.
func (c *core) advance(acts []action, model string, versions []*version, now time.Time) []action {
	want, have := c.desired[model], c.serving[model]
	for _, v := range versions {
		if v.busy != fetching && v.busy != checking && v.busy != loading {
			continue
		}
		// One at a time for a model; one that is not wanted is given up.
		if v != want && !(v.good && want != nil && have == nil) && !v.cancelled {
			v.cancelled = true
			acts = append(acts, action{op: cancelling, key: v.key})
		}
		return acts
	}
	if want == nil || want.busy != idle || (want.stage == resident && !want.broken) {
		return acts
	}
	if want.broken {
		if now.Before(want.notBefore) {
			return acts
		}
		return c.begin(acts, unloading, want)
	}
	due := want.due(now)
	if due && want.stage == stored && (want.checked || want.good) {
		if other := c.inTheWay(want, versions); other == nil {
			return c.begin(acts, loading, want)
		} else if other.busy == idle {
			// The same name for other bytes: both cannot be loaded.
			if other == have {
				delete(c.serving, model)
				acts = append(acts, action{op: withdrawing, key: other.key})
			}
			return c.begin(acts, unloading, other)
		}
		return acts
	}
	if have == nil {
		for _, v := range versions {
			if v != want && v.good && v.stage == stored && v.busy == idle && v.due(now) && c.inTheWay(v, versions) == nil {
				return c.begin(acts, loading, v)
			}
		}
	}
	switch {
	case !due:
	case want.stage == absent && !c.bundleBusy(want):
		c.waiting = append(c.waiting, want)
	case want.stage == stored:
		return c.begin(acts, checking, want)
	}
	return acts
}

// due says whether a try may be made.
func (v *version) due(now time.Time) bool { return v.quarantine == "" && !now.Before(v.notBefore) }

// inTheWay gives a loaded version of the same name.
func (c *core) inTheWay(v *version, versions []*version) *version {
	i := slices.IndexFunc(versions, func(o *version) bool {
		return o != v && o.id == v.id && (o.stage == resident || o.busy == loading)
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
		if o != v && o.digest == v.digest && (o.busy == fetching || o.busy == removing) {
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
// runs, or is what the model falls back to.
func (c *core) needed(v *version) bool {
	want := c.desired[v.id.Model]
	return v == want || v == c.serving[v.id.Model] || v.stage == resident || v.busy != idle || (v.good && want != nil)
}

// discard unloads what neither serves nor should, and removes what is not
// needed, once the model's wanted version has had its use of their chunks, or
// the room is.
func (c *core) discard(acts []action, model string, versions []*version, now time.Time) []action {
	want, have := c.desired[model], c.serving[model]
	settled := want == nil || want == have || want.quarantine != "" || c.cramped
	for _, v := range versions {
		switch {
		case v.busy != idle || v == want || v == have || now.Before(v.notBefore):
		case v.stage == resident:
			if !c.pinned(v.id) {
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
	case was == fetching:
		c.cramped = result.noRoom
	case was == loading && result.err != nil:
		v.broken = false
	}
	if result.lost {
		v.stage, v.since, v.checked, v.good = absent, now, false, false
	}
	if result.err != nil {
		if cancelled {
			return
		}
		if result.waits != nil {
			v.hold(result.waits, now)
			return
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
			v.broken, v.checked, v.good = false, false, false
		}
		v.stage, v.since = stored, now
	case fetching:
		v.stage, v.since, v.admitted = stored, now, true
	case checking:
		v.checked = true
	case loading:
		v.stage, v.since = resident, now
	case removing:
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

// wake gives when something that waits after a failure becomes due; zero for
// never.
func (c *core) wake(now time.Time) time.Time {
	var at time.Time
	for _, v := range c.versions {
		if v.busy == idle && v.notBefore.After(now) && (at.IsZero() || v.notBefore.Before(at)) {
			at = v.notBefore
		}
	}
	return at
}
