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
	"google.golang.org/protobuf/proto"

	v1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// The limits of the fleet's page.
const (
	pageRows  = 50
	maxFilter = 200 // characters of one value
	maxLabels = 8   // that are filtered by
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

// stateOf gives the state that the API says.
func stateOf(d *v1.Device) state { return state(d.GetState()) }

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

// request asks for the page that a filter shows.
func (f filter) request() *v1.ListDevicesRequest {
	return &v1.ListDevicesRequest{
		Limit: pageRows, Offset: uint32((f.Page - 1) * pageRows), Order: f.Sort, Facets: true, Brief: true,
		Filter: &v1.DeviceFilter{Text: f.Text, Labels: f.Labels, State: f.State, Model: f.Model, Class: f.Class},
	}
}

// viewOf gives what a filter shows, of the answer to its request.
func viewOf(m *v1.ListDevicesResponse, f filter, now time.Time) fleetView {
	v := fleetView{All: int(m.GetCounts().GetAll()), Found: int(m.GetCounts().GetFound()), Now: now}
	v.Pages = max(1, (v.Found+pageRows-1)/pageRows)
	v.Filter = f
	for _, d := range m.GetDevices() {
		v.Rows = append(v.Rows, rowOf(d, stateOf(d), now))
	}
	from := (f.Page - 1) * pageRows
	v.Last = from + len(v.Rows)
	v.First = min(from+1, v.Last)
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
	v.Facets = facetsOf(f, m.GetCounts().GetFacets(), at)
	return v
}

func facetsOf(f filter, facets []*v1.Facet, at func(func(*filter)) string) []facet {
	var all []facet
	counts, hidden := map[string]map[string]int{}, map[string]int{}
	for _, one := range facets {
		n := map[string]int{}
		for _, v := range one.GetValues() {
			n[v.GetValue()] = int(v.GetCount())
		}
		counts[one.GetName()], hidden[one.GetName()] = n, int(one.GetMore())
	}
	one := facet{Name: "State"}
	for _, s := range states {
		on := f.State == string(s)
		if n := counts["state"][string(s)]; n > 0 || on {
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
		by   string
		is   func(string) bool
		set  func(*filter, string, bool)
	}{
		{"Model", "model", func(s string) bool { return f.Model == s }, func(g *filter, s string, on bool) { g.Model = either(on, s) }},
		{"Class", "class", func(s string) bool { return f.Class == s }, func(g *filter, s string, on bool) { g.Class = either(on, s) }},
		{"Label", "label", func(s string) bool { return slices.Contains(f.Labels, s) }, func(g *filter, s string, on bool) {
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
		if kind.by == "label" {
			chosen = f.Labels
		}
		for _, c := range chosen {
			if c != "" && kind.is(c) && !slices.Contains(names, c) {
				names = append([]string{c}, names...)
			}
		}
		one := facet{Name: kind.name, Hidden: hidden[kind.by]}
		for _, n := range names {
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

func rowOf(d *v1.Device, s state, now time.Time) row {
	r := row{
		Name: d.GetName(), Hostname: d.GetInfo().GetHostname(), Class: d.GetInfo().GetFirmwareProfile(), State: s, Simulated: d.GetInfo().GetSimulated(),
		Heard: d.GetLastHeardAt().AsTime(), Alarms: int(d.GetAlarms()), Now: now,
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
	shared, err := s.fleetOf(r.Context(), in, f)
	if err != nil {
		s.failed(w, r, in, err)
		return
	}
	v, parts := shared.view, shared.parts
	v.Admin, v.Controller = in.Who.Role == "admin", s.DeviceURL
	v.Live = "/live/fleet?" + v.Filter.query() + "&seen=" + parts.sum
	if r.Header.Get("HX-Request") != "" {
		w.Header().Set("HX-Push-Url", v.Filter.URL())
	}
	s.pages.write(w, r, http.StatusOK, "fleet", page{Session: in, Title: "Fleet", Data: v, Now: v.Now})
}

// fleetOf gives what a filter shows to a session, and what of it changes.
func (s *console) fleetOf(ctx context.Context, in session, f filter) (*shared, error) {
	return s.live.share(ctx, labelText(in.Who.Scope)+"\n"+f.query(), func(ctx context.Context, before *shared) (*shared, error) {
		resp, err := in.calls.devices().ListDevices(ctx, connect.NewRequest(f.request()))
		if err != nil {
			return nil, err
		}
		if pages := max(1, (int(resp.Msg.GetCounts().GetFound())+pageRows-1)/pageRows); f.Page > pages { // the last one
			f.Page = pages
			if resp, err = in.calls.devices().ListDevices(ctx, connect.NewRequest(f.request())); err != nil {
				return nil, err
			}
		}
		v := viewOf(resp.Msg, f, s.Now())
		v.Scope = labelText(in.Who.Scope)
		parts, err := s.partsOf(v, resp.Msg.GetDevices(), before)
		return &shared{view: v, parts: parts}, err
	})
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
	of     map[string]*v1.Device // that the rows show
	around string
	sum    string // of all
}

// partsOf renders them. Rows of devices that are as they were are those from
// before.
func (s *console) partsOf(v fleetView, devices []*v1.Device, before *shared) (fleetParts, error) {
	p := fleetParts{rows: map[string]string{}, of: map[string]*v1.Device{}}
	sum := sha256.New()
	for i, r := range v.Rows {
		d := devices[i]
		text, same := "", false
		if before != nil && proto.Equal(before.parts.of[r.Name], d) {
			text, same = before.parts.rows[r.Name]
		}
		if !same {
			quiet := r
			quiet.Now = r.Heard // how long ago is not news: the page counts by itself
			b, err := s.pages.render("fleet", "row", quiet)
			if err != nil {
				return p, err
			}
			text = string(b)
		}
		p.names = append(p.names, r.Name)
		p.rows[r.Name], p.of[r.Name] = text, d
		sum.Write([]byte(text))
	}
	b, err := s.pages.render("fleet", "around", v)
	p.around = string(b)
	sum.Write(b)
	p.sum = hex.EncodeToString(sum.Sum(nil)[:12])
	return p, err
}
