package api

import (
	"cmp"
	"context"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/dunlin/dunlin/controller/dispatch"
	"github.com/dunlin/dunlin/controller/fleet"
	"github.com/dunlin/dunlin/controller/identity"
	"github.com/dunlin/dunlin/controller/store"
	v1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// The limits of pages of devices.
const (
	maxPage      = 1000
	maxWord      = 800 // bytes of a value of a filter
	maxLabels    = 8   // that are filtered by
	facetTop     = 8   // values that a facet lists, beside those of the filter
	staleAfter   = 90 * time.Second
	listEvery    = 200 * time.Millisecond // between two looks at the fleet at least
	suspectEvery = 2 * time.Second        // between two looks at who is revoked, or doubled
	maxInterned  = 1 << 20                // texts that the list remembers until it begins anew
)

// states of devices, worst first.
var states = []string{"trouble", "stale", "offline", "revoked", "working", "ok"}

// stateOf says how a device is.
func stateOf(connected bool, heard time.Time, known *v1.DeviceIdentity, desired *v1.Generation, r *v1.Reported, t *v1.Telemetry, now time.Time) string {
	switch {
	case known.GetRevokedAt() != nil:
		return "revoked"
	case !connected:
		return "offline"
	case now.Sub(heard) > staleAfter:
		return "stale"
	case len(known.GetTwins()) > 0:
		return "trouble"
	}
	for _, a := range t.GetAlarms() {
		if a.GetSeverity() == v1.Severity_SEVERITY_ERROR {
			return "trouble"
		}
	}
	how := "ok"
	for _, v := range r.GetVersions() {
		switch v.GetState() {
		case v1.VersionState_VERSION_STATE_QUARANTINED:
			return "trouble"
		case v1.VersionState_VERSION_STATE_RESIDENT:
		default:
			how = "working"
		}
	}
	for _, one := range r.GetRoutes() {
		if !one.GetReady() {
			return "trouble"
		}
	}
	if g := r.GetObserved(); desired != nil && (desired.GetIncarnation() != g.GetIncarnation() || desired.GetNumber() != g.GetNumber()) {
		how = "working"
	}
	return how
}

func stateOfDevice(d *v1.Device, now time.Time) string {
	return stateOf(d.GetConnected(), d.GetLastHeardAt().AsTime(), d.GetIdentity(), d.GetDesired(), d.GetReported(), d.GetTelemetry(), now)
}

// list has what pages of devices show of the whole fleet, in memory: some
// hundred bytes a device beside what the dispatcher has. It is brought up to date
// when somebody asks, for all who ask at that time, and only for the devices
// that changed.
type list struct {
	now         func() time.Time
	fleet       func(context.Context) ([]dispatch.Seen, error)
	suspects    func(context.Context) (map[string]*v1.DeviceIdentity, error)
	incarnation string

	mu       sync.Mutex // guards what follows; who comes while it is held waits for the same answer
	at, told time.Time  // when the fleet, and when suspects were looked at last
	known    map[string]*v1.DeviceIdentity
	entries  map[string]*listed
	sorted   []*listed // by name; never changed
	texts    interned
}

func newList(c Config) *list {
	return &list{now: time.Now, suspects: c.Store.Suspects, incarnation: c.Store.Incarnation(), fleet: func(ctx context.Context) ([]dispatch.Seen, error) {
		seen, known := c.Dispatch.Fleet()
		if known {
			return seen, nil
		}
		devices, err := c.Store.Devices(ctx) // the controller has just begun
		seen = convert(devices, func(d *store.Device) dispatch.Seen { return dispatch.Seen{Device: d, Heard: d.LastHeardAt} })
		return seen, err
	}}
}

// listed is one device; it is never changed.
type listed struct {
	dispatch.Seen
	known *v1.DeviceIdentity
	text  string // what is searched, in lower case
	fresh int    // its state, while it is not stale; in states
	// Numbers of texts, beside each other, as looking through 10,000 devices
	// waits for memory: its class or noClass, its labels as "key=value", its
	// versions as "model:version".
	marks  []int32
	labels int // how many
}

const noClass = -1

func (e *listed) class() int32        { return e.marks[0] }
func (e *listed) labelMarks() []int32 { return e.marks[1 : 1+e.labels] }
func (e *listed) modelMarks() []int32 { return e.marks[1+e.labels:] }

// interned gives texts numbers from 0, which counting goes by.
type interned struct {
	numbers map[string]int32
	texts   []string
}

func (t *interned) number(s string) int32 {
	n, ok := t.numbers[s]
	if !ok {
		n = int32(len(t.texts))
		t.numbers[s], t.texts = n, append(t.texts, s)
	}
	return n
}

// look is one state of the list. What it has is never changed; texts of it may
// grow, of which it has its part.
type look struct {
	all   []*listed
	texts []string
	now   time.Time
}

// look gives the fleet as it is, or was at most listEvery ago.
func (l *list) look(ctx context.Context) (look, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := l.now()
	if l.sorted != nil && now.Sub(l.at) < listEvery {
		return look{l.sorted, l.texts.texts, now}, nil
	}
	if l.known == nil || now.Sub(l.told) >= suspectEvery {
		known, err := l.suspects(ctx)
		if err != nil {
			return look{}, err
		}
		for name, i := range known { // what is as it was is the same
			if was := l.known[name]; was != nil && proto.Equal(was, i) {
				known[name] = was
			}
		}
		l.known, l.told = known, now
	}
	seen, err := l.fleet(ctx)
	if err != nil {
		return look{}, err
	}
	if l.entries == nil || len(l.texts.texts) > maxInterned {
		l.entries, l.texts = map[string]*listed{}, interned{numbers: map[string]int32{}}
	}
	same := l.sorted != nil && len(seen) == len(l.entries)
	next := make(map[string]*listed, len(seen))
	for _, s := range seen {
		e := l.entries[s.Name]
		if e == nil {
			same = false
		}
		if e == nil || e.Seen != s || e.known != l.known[s.Name] {
			e = l.entry(s, e)
		}
		next[s.Name] = e
	}
	sorted := make([]*listed, 0, len(next))
	if same {
		for _, e := range l.sorted {
			sorted = append(sorted, next[e.Name])
		}
	} else {
		sorted = slices.SortedFunc(maps.Values(next), func(a, b *listed) int { return strings.Compare(a.Name, b.Name) })
	}
	l.entries, l.sorted, l.at = next, sorted, now
	return look{sorted, l.texts.texts, now}, nil
}

// forget has the next look ask anew who is revoked.
func (l *list) forget() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.known, l.sorted = nil, nil
}

func (l *list) entry(s dispatch.Seen, before *listed) *listed {
	e := &listed{Seen: s, known: l.known[s.Name]}
	var desired *v1.Generation
	if s.Desired > 0 {
		desired = &v1.Generation{Incarnation: l.incarnation, Number: s.Desired}
	}
	e.fresh = slices.Index(states, stateOf(s.Connected, s.Heard, e.known, desired, s.Reported, s.Telemetry, s.Heard))
	if before != nil && before.Device == s.Device {
		e.text, e.marks, e.labels = before.text, before.marks, before.labels
		return e
	}
	e.marks = []int32{noClass}
	if c := s.Info.GetFirmwareProfile(); c != "" {
		e.marks[0] = l.texts.number(c)
	}
	var text strings.Builder
	text.WriteString(strings.ToLower(s.Name + "\n" + s.Info.GetHostname()))
	for k, v := range s.Labels {
		label := k + "=" + v
		text.WriteString("\n" + strings.ToLower(label))
		e.marks = append(e.marks, l.texts.number(label))
	}
	e.text, e.labels = text.String(), len(s.Labels)
	for _, v := range s.Reported.GetVersions() {
		e.marks = append(e.marks, l.texts.number(reference(v)))
	}
	return e
}

var stale, revoked, offline = slices.Index(states, "stale"), slices.Index(states, "revoked"), slices.Index(states, "offline")

// state gives it in states.
func (e *listed) state(now time.Time) int {
	if e.fresh != revoked && e.fresh != offline && now.Sub(e.Heard) > staleAfter {
		return stale
	}
	return e.fresh
}

func reference(v *v1.VersionStatus) string {
	return v.GetModel() + ":" + strconv.FormatInt(v.GetVersion(), 10)
}

// checkPage says what is wrong with a request for a page.
func checkPage(m *v1.ListDevicesRequest) error {
	f := m.GetFilter()
	if m.GetLimit() > maxPage {
		return invalid("limit is %d, allowed are 1 to %d, or 0 for all devices", m.GetLimit(), maxPage)
	}
	if m.GetLimit() == 0 {
		if f != nil || m.GetOffset() != 0 || m.GetOrder() != "" || m.GetFacets() || m.GetUses() || m.GetBrief() {
			return invalid("limit is 0: filter, offset, order, facets, uses and brief need a limit of 1 to %d", maxPage)
		}
		return nil
	}
	if m.GetDevice() != "" {
		return invalid("device is %q: with a limit it must be empty", m.GetDevice())
	}
	if o := m.GetOrder(); o != "" && o != "name" && o != "heard" && o != "state" {
		return invalid("order is %q, allowed are name, heard and state", o)
	}
	if f.GetState() != "" && !slices.Contains(states, f.GetState()) {
		return invalid("filter.state is %q, allowed are %s", f.GetState(), strings.Join(states, ", "))
	}
	if n := len(f.GetLabels()); n > maxLabels {
		return invalid("filter.labels has %d entries, the limit is %d", n, maxLabels)
	}
	for field, v := range map[string]string{"text": f.GetText(), "model": f.GetModel(), "class": f.GetClass(), "labels": slices.MaxFunc(append(f.GetLabels(), ""), func(a, b string) int { return len(a) - len(b) })} {
		if len(v) > maxWord {
			return invalid("filter.%s has %d bytes, the limit is %d", field, len(v), maxWord)
		}
	}
	return nil
}

// The facets by which devices are counted.
const (
	byState = iota
	byModel
	byClass
	byLabel
	facets
)

var facetNames = [facets]string{"state", "model", "class", "label"}

// wanted is a filter by the numbers of texts.
type wanted struct {
	text    string
	alarmed bool
	state   int     // -1: any
	class   []int32 // nil: any; else one of these
	models  []int32
	labels  [][]int32 // one of each
}

// wanted looks up what a filter names.
func (l look) wanted(f *v1.DeviceFilter) wanted {
	w := wanted{text: strings.ToLower(f.GetText()), alarmed: f.GetAlarmed(), state: slices.Index(states, f.GetState())}
	those := func(is func(text string) bool) []int32 {
		found := []int32{}
		for i, t := range l.texts {
			if is(t) {
				found = append(found, int32(i))
			}
		}
		return found
	}
	if c := f.GetClass(); c != "" {
		w.class = those(func(t string) bool { return t == c })
	}
	if m := f.GetModel(); m != "" {
		w.models = those(func(t string) bool {
			at := strings.LastIndexByte(t, ':')
			return t == m || at >= 0 && t[:at] == m
		})
	}
	for _, label := range f.GetLabels() {
		k, _, exact := strings.Cut(label, "=")
		w.labels = append(w.labels, those(func(t string) bool { return t == label || !exact && strings.HasPrefix(t, k+"=") }))
	}
	return w
}

// matches says for each facet whether a device matches its part of a filter;
// rest: whether it matches what is no facet.
func (e *listed) matches(w *wanted, state int) (each [facets]bool, rest bool) {
	each[byState] = w.state < 0 || w.state == state
	each[byClass] = w.class == nil || slices.Contains(w.class, e.class())
	each[byModel] = w.models == nil || slices.ContainsFunc(e.modelMarks(), func(n int32) bool { return slices.Contains(w.models, n) })
	each[byLabel] = true
	for _, l := range w.labels {
		each[byLabel] = each[byLabel] && slices.ContainsFunc(e.labelMarks(), func(n int32) bool { return slices.Contains(l, n) })
	}
	return each, (w.text == "" || strings.Contains(e.text, w.text)) && (!w.alarmed || len(e.Telemetry.GetAlarms()) > 0)
}

// page gives one page of the devices within the caller's scope.
func (l look) page(m *v1.ListDevicesRequest, p identity.Principal) (*v1.ListDevicesResponse, []*listed) {
	resp := &v1.ListDevicesResponse{Counts: &v1.DeviceCounts{}}
	f := m.GetFilter()
	w := l.wanted(f)
	selected := func(e *listed) bool {
		return (len(p.Scope) == 0 || p.Covers(e.Labels)) && (len(m.GetSelector()) == 0 || fleet.Matches(m.GetSelector(), fleet.Device{Name: e.Name, Labels: e.Labels}))
	}
	counts := make([][facets]uint32, len(l.texts))
	inState := make([]uint32, len(states))
	uses := map[int32]*v1.VersionUse{}
	var found []*listed
	for _, e := range l.all {
		if !selected(e) {
			continue
		}
		resp.Counts.All++
		if m.GetUses() {
			e.use(uses)
		}
		state := e.state(l.now)
		each, rest := e.matches(&w, state)
		if !rest {
			continue
		}
		missed, which := 0, -1
		for i, ok := range each {
			if !ok {
				missed, which = missed+1, i
			}
		}
		// What a facet counts is what would be found if it alone were changed.
		others := func(facet int) bool { return missed == 0 || missed == 1 && which == facet }
		if others(byState) {
			inState[state]++
		}
		if c := e.class(); c != noClass && others(byClass) {
			counts[c][byClass]++
		}
		if others(byModel) {
			for _, r := range e.modelMarks() {
				counts[r][byModel]++
			}
		}
		if missed == 0 { // labels narrow further
			for _, label := range e.labelMarks() {
				counts[label][byLabel]++
			}
			found = append(found, e)
		}
	}
	switch m.GetOrder() {
	case "heard":
		slices.SortStableFunc(found, func(a, b *listed) int { return b.Heard.Compare(a.Heard) })
	case "state":
		slices.SortStableFunc(found, func(a, b *listed) int {
			return cmp.Compare(a.state(l.now), b.state(l.now))
		})
	}
	resp.Counts.Found = uint32(len(found))
	if m.GetFacets() {
		resp.Counts.Facets = l.facets(f, inState, counts)
	}
	for _, u := range uses {
		resp.Counts.Uses = append(resp.Counts.Uses, u)
	}
	slices.SortFunc(resp.Counts.Uses, func(a, b *v1.VersionUse) int {
		return cmp.Or(strings.Compare(a.GetModel(), b.GetModel()), cmp.Compare(a.GetVersion(), b.GetVersion()))
	})
	from := min(int(m.GetOffset()), len(found))
	return resp, found[from:min(len(found), from+int(m.GetLimit()))]
}

// use counts the versions that a device has.
func (e *listed) use(uses map[int32]*v1.VersionUse) {
	for i, v := range e.Reported.GetVersions() {
		u := uses[e.modelMarks()[i]]
		if u == nil {
			u = &v1.VersionUse{Model: v.GetModel(), Version: v.GetVersion()}
			uses[e.modelMarks()[i]] = u
		}
		switch v.GetState() {
		case v1.VersionState_VERSION_STATE_RESIDENT:
			u.Resident++
		case v1.VersionState_VERSION_STATE_QUARANTINED:
			u.Quarantined++
		default:
			u.Waiting++
		}
		if v.GetServing() {
			u.Serving++
		}
	}
}

func (l look) facets(f *v1.DeviceFilter, inState []uint32, counts [][facets]uint32) (all []*v1.Facet) {
	for facet, name := range facetNames {
		var values []*v1.FacetValue
		if facet == byState {
			for i, n := range inState {
				if n > 0 {
					values = append(values, &v1.FacetValue{Value: states[i], Count: n})
				}
			}
		}
		for number, n := range counts {
			if n[facet] > 0 {
				values = append(values, &v1.FacetValue{Value: l.texts[number], Count: n[facet]})
			}
		}
		slices.SortFunc(values, func(a, b *v1.FacetValue) int {
			return cmp.Or(cmp.Compare(b.GetCount(), a.GetCount()), strings.Compare(a.GetValue(), b.GetValue()))
		})
		shown := values[:min(len(values), facetTop)]
		left := values[len(shown):]
		for _, v := range [facets][]string{{f.GetState()}, {f.GetModel()}, {f.GetClass()}, f.GetLabels()}[facet] {
			is := func(one *v1.FacetValue) bool { return one.GetValue() == v }
			if at := slices.IndexFunc(left, is); at >= 0 {
				shown = append(slices.Clone(shown), left[at])
				left = slices.DeleteFunc(slices.Clone(left), is)
			}
		}
		all = append(all, &v1.Facet{Name: name, Values: shown, More: uint32(len(left))})
	}
	return all
}

// brief gives what lists show of a device.
func (e *listed) brief(now time.Time) *v1.Device {
	d := &v1.Device{
		Name: e.Name, Labels: e.Labels, Connected: e.Connected, LastHeardAt: timestamp(e.Heard), State: states[e.state(now)], Alarms: uint32(len(e.Telemetry.GetAlarms())),
		Info: &v1.DeviceInfo{Hostname: e.Info.GetHostname(), FirmwareProfile: e.Info.GetFirmwareProfile(), Simulated: e.Info.GetSimulated()},
	}
	if len(e.Reported.GetVersions()) > 0 {
		d.Reported = &v1.Reported{}
		for _, v := range e.Reported.GetVersions() {
			d.Reported.Versions = append(d.Reported.Versions, &v1.VersionStatus{Model: v.GetModel(), Version: v.GetVersion(), State: v.GetState(), Serving: v.GetServing()})
		}
	}
	return d
}

// pageOf answers for a page of devices.
func (s *server) pageOf(ctx context.Context, m *v1.ListDevicesRequest) (*v1.ListDevicesResponse, error) {
	l, err := s.list.look(ctx)
	if err != nil {
		return nil, err
	}
	resp, page := l.page(m, identity.FromContext(ctx))
	var known map[string]*v1.DeviceIdentity
	if !m.GetBrief() && len(page) > 0 {
		if known, err = s.Store.Identities(ctx, convert(page, func(e *listed) string { return e.Name })...); err != nil {
			return nil, err
		}
	}
	for _, e := range page {
		if m.GetBrief() {
			resp.Devices = append(resp.Devices, e.brief(l.now))
			continue
		}
		resp.Devices = append(resp.Devices, s.deviceOf(e.Device, known[e.Name], l.now))
	}
	return resp, nil
}

// deviceOf gives all that is known of a device.
func (s *server) deviceOf(d *store.Device, known *v1.DeviceIdentity, now time.Time) *v1.Device {
	m := device(d, s.Store.Incarnation(), s.Dispatch.Telemetry(d.Name), known)
	if heard := s.Dispatch.Heard(d.Name); heard.After(d.LastHeardAt) {
		m.LastHeardAt = timestamp(heard)
	}
	m.State = stateOfDevice(m, now)
	return m
}
