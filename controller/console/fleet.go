package console

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"connectrpc.com/connect"

	v1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// The limits of the fleet's page.
const (
	pageRows   = 50
	maxFilter  = 200 // characters of one value
	maxLabels  = 8   // that are filtered by
	facetTop   = 8   // values that a facet lists
	staleAfter = 90 * time.Second
)

// state is how a device is, worst things first.
type state string

const (
	revoked state = "revoked" // its certificate was taken back
	offline state = "offline"
	stale   state = "stale"   // connected, and silent: telemetry comes every minute
	trouble state = "trouble" // a version is quarantined, a route is not ready, an alarm is an error, or two agents are it
	working state = "working" // on its way to what it should have
	ok      state = "ok"
)

var states = []state{trouble, stale, offline, revoked, working, ok}

var stateNames = map[state]string{ok: "OK", working: "Working", trouble: "Trouble", stale: "Stale", offline: "Offline", revoked: "Revoked"}

// Name is what people read.
func (s state) Name() string { return stateNames[s] }

func stateOf(d *v1.Device, now time.Time) state {
	switch {
	case d.GetIdentity().GetRevokedAt() != nil:
		return revoked
	case !d.GetConnected():
		return offline
	case now.Sub(d.GetLastHeardAt().AsTime()) > staleAfter:
		return stale
	case len(d.GetIdentity().GetTwins()) > 0:
		return trouble
	}
	for _, a := range d.GetTelemetry().GetAlarms() {
		if a.GetSeverity() == v1.Severity_SEVERITY_ERROR {
			return trouble
		}
	}
	how := ok
	for _, v := range d.GetReported().GetVersions() {
		switch {
		case v.GetState() == v1.VersionState_VERSION_STATE_QUARANTINED:
			return trouble
		case v.GetState() != v1.VersionState_VERSION_STATE_RESIDENT:
			how = working
		}
	}
	for _, r := range d.GetReported().GetRoutes() {
		if !r.GetReady() {
			return trouble
		}
	}
	if g := d.GetDesired(); g != nil && (g.GetIncarnation() != d.GetReported().GetObserved().GetIncarnation() || g.GetNumber() != d.GetReported().GetObserved().GetNumber()) {
		return working
	}
	return how
}

// filter is which devices are shown; the URL has it.
type filter struct {
	Text   string
	Labels []string // "key=value", or "key"
	State  string
	Model  string // "model", or "model:version"
	Class  string
	Sort   string // "", "heard", "state"
	Page   int    // from 1
}

func parseFilter(q url.Values) (f filter, err error) {
	for name, to := range map[string]*string{"q": &f.Text, "state": &f.State, "model": &f.Model, "class": &f.Class, "sort": &f.Sort} {
		*to = strings.TrimSpace(q.Get(name))
		if n := len([]rune(*to)); n > maxFilter {
			return f, fmt.Errorf("%s has %d characters, the limit is %d", name, n, maxFilter)
		}
	}
	for _, l := range q["label"] {
		if l = strings.TrimSpace(l); l != "" && !slices.Contains(f.Labels, l) {
			f.Labels = append(f.Labels, l)
		}
		if n := len([]rune(l)); n > maxFilter {
			return f, fmt.Errorf("label has %d characters, the limit is %d", n, maxFilter)
		}
	}
	slices.Sort(f.Labels)
	if n := len(f.Labels); n > maxLabels {
		return f, fmt.Errorf("label is given %d times, the limit is %d", n, maxLabels)
	}
	if f.State != "" && stateNames[state(f.State)] == "" {
		return f, fmt.Errorf("state %q is none of trouble, stale, offline, revoked, working, ok", f.State)
	}
	if f.Sort != "" && f.Sort != "heard" && f.Sort != "state" {
		return f, fmt.Errorf("sort %q is none of heard, state", f.Sort)
	}
	f.Page = 1
	if p := q.Get("page"); p != "" {
		if f.Page, err = strconv.Atoi(p); err != nil || f.Page < 1 {
			return f, fmt.Errorf("page is %q, it must be a number from 1", clip(p, 20))
		}
	}
	return f, nil
}

// query writes the filter in its one form.
func (f filter) query() string {
	q := url.Values{}
	for name, v := range map[string]string{"q": f.Text, "state": f.State, "model": f.Model, "class": f.Class, "sort": f.Sort} {
		if v != "" {
			q.Set(name, v)
		}
	}
	if len(f.Labels) > 0 {
		q["label"] = f.Labels
	}
	if f.Page > 1 {
		q.Set("page", strconv.Itoa(f.Page))
	}
	return q.Encode()
}

// URL is that of the page.
func (f filter) URL() string {
	if q := f.query(); q != "" {
		return "/?" + q
	}
	return "/"
}

// Empty says whether all devices are shown.
func (f filter) Empty() bool {
	return f.Text == "" && len(f.Labels) == 0 && f.State == "" && f.Model == "" && f.Class == ""
}

// The facets by which devices are counted.
const (
	byState = iota
	byModel
	byClass
	byLabel
	facets
)

// matches says for each facet whether a device matches its part of the filter;
// text: whether it matches the rest.
func (f filter) matches(d *v1.Device, s state) (each [facets]bool, text bool) {
	each[byState] = f.State == "" || f.State == string(s)
	each[byClass] = f.Class == "" || f.Class == d.GetInfo().GetFirmwareProfile()
	each[byModel] = f.Model == "" || slices.ContainsFunc(d.GetReported().GetVersions(), func(v *v1.VersionStatus) bool {
		return f.Model == v.GetModel() || f.Model == reference(v)
	})
	each[byLabel] = !slices.ContainsFunc(f.Labels, func(l string) bool {
		k, want, exact := strings.Cut(l, "=")
		have, has := d.GetLabels()[k]
		return !has || exact && have != want
	})
	if text = f.Text == ""; !text {
		part := strings.ToLower(f.Text)
		has := func(s string) bool { return strings.Contains(strings.ToLower(s), part) }
		text = has(d.GetName()) || has(d.GetInfo().GetHostname())
		for k, v := range d.GetLabels() {
			text = text || has(k+"="+v)
		}
	}
	return each, text
}

func reference(v *v1.VersionStatus) string {
	return v.GetModel() + ":" + strconv.FormatInt(v.GetVersion(), 10)
}

// row is one device in the table.
type row struct {
	Name, Hostname, Class string
	State                 state
	Why                   string
	Versions              []chip
	Alarms                int
	Labels                []chip
	More                  int // labels that are not shown
	Heard                 time.Time
	Simulated             bool
	Now                   time.Time
}

type chip struct {
	Text, Title, URL string
	Bad, Waits       bool
}

// choice is one value of a facet, with how many devices have it.
type choice struct {
	Name, URL string
	State     state // of the facet of states
	Count     int
	On        bool
}

type facet struct {
	Name    string
	Choices []choice
	Hidden  int // values that are not listed
}

// fleetView is what the page of the fleet shows.
type fleetView struct {
	Filter      filter
	Rows        []row
	Facets      []facet
	All, Found  int
	First, Last int // of the rows, from 1
	Pages       int
	Prev, Next  string // URLs
	ByHeard     string
	ByState     string
	ByName      string
	Live        string // URL of the stream
	Admin       bool
	Controller  string // URL for devices
	Scope       string
	Now         time.Time
}

// viewOf gives what a filter shows of devices.
func viewOf(devices []*v1.Device, f filter, now time.Time) fleetView {
	v := fleetView{Filter: f, All: len(devices), Now: now}
	type found struct {
		d *v1.Device
		s state
	}
	var all []found
	var counts [facets]map[string]int
	for i := range counts {
		counts[i] = map[string]int{}
	}
	for _, d := range devices {
		s := stateOf(d, now)
		each, text := f.matches(d, s)
		if !text {
			continue
		}
		// What a facet counts is what would be found if it alone were changed.
		others := func(but int) bool {
			for i, m := range each {
				if i != but && !m {
					return false
				}
			}
			return true
		}
		if others(byState) {
			counts[byState][string(s)]++
		}
		if others(byClass) {
			if c := d.GetInfo().GetFirmwareProfile(); c != "" {
				counts[byClass][c]++
			}
		}
		if others(byModel) {
			for _, one := range d.GetReported().GetVersions() {
				counts[byModel][reference(one)]++
			}
		}
		if others(-1) { // labels narrow further
			for k, l := range d.GetLabels() {
				counts[byLabel][k+"="+l]++
			}
			all = append(all, found{d, s})
		}
	}
	v.Found = len(all)
	slices.SortStableFunc(all, func(a, b found) int {
		switch f.Sort {
		case "heard":
			if c := b.d.GetLastHeardAt().AsTime().Compare(a.d.GetLastHeardAt().AsTime()); c != 0 {
				return c
			}
		case "state":
			if c := cmp.Compare(slices.Index(states, a.s), slices.Index(states, b.s)); c != 0 {
				return c
			}
		}
		return strings.Compare(a.d.GetName(), b.d.GetName())
	})
	v.Pages = max(1, (v.Found+pageRows-1)/pageRows)
	f.Page = min(f.Page, v.Pages)
	v.Filter = f
	from, to := (f.Page-1)*pageRows, min(f.Page*pageRows, v.Found)
	for _, one := range all[from:to] {
		v.Rows = append(v.Rows, rowOf(one.d, one.s, f, now))
	}
	v.First, v.Last = min(from+1, to), to
	at := func(change func(*filter)) string {
		g := f
		g.Labels = slices.Clone(f.Labels)
		g.Page = 1
		change(&g)
		return g.URL()
	}
	if f.Page > 1 {
		v.Prev = at(func(g *filter) { g.Page = f.Page - 1 })
	}
	if f.Page < v.Pages {
		v.Next = at(func(g *filter) { g.Page = f.Page + 1 })
	}
	v.ByName, v.ByHeard, v.ByState = at(func(g *filter) { g.Sort = "" }), at(func(g *filter) { g.Sort = "heard" }), at(func(g *filter) { g.Sort = "state" })
	v.Facets = facetsOf(f, counts, at)
	return v
}

func facetsOf(f filter, counts [facets]map[string]int, at func(func(*filter)) string) []facet {
	var all []facet
	one := facet{Name: "State"}
	for _, s := range states {
		on := f.State == string(s)
		if n := counts[byState][string(s)]; n > 0 || on {
			c := choice{Name: s.Name(), State: s, Count: n, On: on, URL: at(func(g *filter) { g.State = string(s) })}
			if on {
				c.URL = at(func(g *filter) { g.State = "" })
			}
			one.Choices = append(one.Choices, c)
		}
	}
	all = append(all, one)
	for _, kind := range []struct {
		name string
		by   int
		is   func(string) bool
		set  func(*filter, string, bool)
	}{
		{"Model", byModel, func(s string) bool { return f.Model == s }, func(g *filter, s string, on bool) { g.Model = either(on, s) }},
		{"Class", byClass, func(s string) bool { return f.Class == s }, func(g *filter, s string, on bool) { g.Class = either(on, s) }},
		{"Label", byLabel, func(s string) bool { return slices.Contains(f.Labels, s) }, func(g *filter, s string, on bool) {
			g.Labels = slices.DeleteFunc(g.Labels, func(l string) bool { return l == s })
			if on {
				g.Labels = append(g.Labels, s)
				slices.Sort(g.Labels)
			}
		}},
	} {
		names := slices.SortedFunc(maps.Keys(counts[kind.by]), func(a, b string) int {
			return cmp.Or(cmp.Compare(counts[kind.by][b], counts[kind.by][a]), strings.Compare(a, b))
		})
		// What is chosen is always there, so that it can be taken back.
		chosen := []string{f.Model, f.Class}
		if kind.by == byLabel {
			chosen = f.Labels
		}
		for _, c := range chosen {
			if c != "" && kind.is(c) && !slices.Contains(names[:min(len(names), facetTop)], c) {
				names = append([]string{c}, slices.DeleteFunc(names, func(n string) bool { return n == c })...)
			}
		}
		one := facet{Name: kind.name, Hidden: max(0, len(names)-facetTop)}
		for _, n := range names[:min(len(names), facetTop)] {
			on := kind.is(n)
			one.Choices = append(one.Choices, choice{Name: n, Count: counts[kind.by][n], On: on, URL: at(func(g *filter) { kind.set(g, n, !on) })})
		}
		if len(one.Choices) > 0 {
			all = append(all, one)
		}
	}
	return all
}

func either(on bool, s string) string {
	if on {
		return s
	}
	return ""
}

func rowOf(d *v1.Device, s state, f filter, now time.Time) row {
	r := row{
		Name: d.GetName(), Hostname: d.GetInfo().GetHostname(), Class: d.GetInfo().GetFirmwareProfile(), State: s, Simulated: d.GetInfo().GetSimulated(),
		Heard: d.GetLastHeardAt().AsTime(), Alarms: len(d.GetTelemetry().GetAlarms()), Now: now,
	}
	if r.Heard.Unix() == 0 {
		r.Heard = time.Time{}
	}
	for _, v := range d.GetReported().GetVersions() {
		c := chip{Text: reference(v), Title: stateWord(v.GetState()), URL: filter{Model: reference(v), Page: 1}.URL()}
		c.Bad = v.GetState() == v1.VersionState_VERSION_STATE_QUARANTINED
		c.Waits = !c.Bad && v.GetState() != v1.VersionState_VERSION_STATE_RESIDENT
		r.Versions = append(r.Versions, c)
	}
	const shown = 3
	for i, k := range slices.Sorted(maps.Keys(d.GetLabels())) {
		if i == shown {
			r.More = len(d.GetLabels()) - shown
			break
		}
		l := k + "=" + d.GetLabels()[k]
		r.Labels = append(r.Labels, chip{Text: clip(l, 32), Title: l, URL: filter{Labels: []string{l}, Page: 1}.URL()})
	}
	return r
}

func stateWord(s v1.VersionState) string {
	return strings.ToLower(strings.TrimPrefix(s.String(), "VERSION_STATE_"))
}

func (s *console) fleet(w http.ResponseWriter, r *http.Request, in session) {
	f, err := parseFilter(r.URL.Query())
	if err != nil {
		s.fail(w, r, in, http.StatusBadRequest, err.Error())
		return
	}
	devices, err := s.live.devices(r.Context(), in)
	if err != nil {
		s.failed(w, r, in, err)
		return
	}
	v := s.fleetFor(in, devices, f)
	parts, err := s.partsOf(v)
	if err != nil {
		s.failed(w, r, in, err)
		return
	}
	v.Live = "/live/fleet?" + v.Filter.query() + "&seen=" + parts.sum
	if r.Header.Get("HX-Request") != "" {
		w.Header().Set("HX-Push-Url", v.Filter.URL())
	}
	s.pages.write(w, r, http.StatusOK, "fleet", page{Session: in, Title: "Fleet", Data: v, Now: v.Now})
}

func (s *console) fleetFor(in session, devices []*v1.Device, f filter) fleetView {
	v := viewOf(devices, f, s.Now())
	v.Admin, v.Scope, v.Controller = in.Who.Role == "admin", labelText(in.Who.Scope), s.DeviceURL
	return v
}

func labelText(l map[string]string) string {
	var all []string
	for _, k := range slices.Sorted(maps.Keys(l)) {
		all = append(all, k+"="+l[k])
	}
	return strings.Join(all, ", ")
}

// list asks for all devices that the caller sees.
func (in session) list(ctx context.Context, name string) ([]*v1.Device, error) {
	resp, err := in.calls.devices().ListDevices(ctx, connect.NewRequest(&v1.ListDevicesRequest{Device: name}))
	if err != nil {
		return nil, err
	}
	return resp.Msg.GetDevices(), nil
}

// fleetParts are those of the page that change: each row, and what is around.
type fleetParts struct {
	names  []string
	rows   map[string]string
	around string
	sum    string // of all
}

func (s *console) partsOf(v fleetView) (fleetParts, error) {
	p := fleetParts{rows: map[string]string{}}
	sum := sha256.New()
	for _, r := range v.Rows {
		quiet := r
		quiet.Now = r.Heard // how long ago is not news: the page counts by itself
		b, err := s.pages.render("fleet", "row", quiet)
		if err != nil {
			return p, err
		}
		p.names = append(p.names, r.Name)
		p.rows[r.Name] = string(b)
		sum.Write(b)
	}
	b, err := s.pages.render("fleet", "around", v)
	p.around = string(b)
	sum.Write(b)
	p.sum = hex.EncodeToString(sum.Sum(nil)[:12])
	return p, err
}
