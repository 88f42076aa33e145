package console

import (
	"cmp"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"connectrpc.com/connect"

	"github.com/dunlin/dunlin/controller/identity"
	v1 "github.com/dunlin/dunlin/proto/dunlin/v1"
	v1connect "github.com/dunlin/dunlin/proto/dunlin/v1/dunlinv1connect"
)

// use is where a version, or a model, is: what gives it to devices, and how
// many of those have it.
type use struct {
	Deployments []string
	Routes      []string // those that name it
	Resident    int
	Waits       int // on their way to it, or asleep
	Bad         int // quarantined
	Serving     int
	URL         string // of the devices
}

// Devices is how many say something of it.
func (u use) Devices() int { return u.Resident + u.Waits + u.Bad }

func (u *use) add(v *v1.VersionUse) {
	u.Resident += int(v.GetResident())
	u.Bad += int(v.GetQuarantined())
	u.Waits += int(v.GetWaiting())
	u.Serving += int(v.GetServing())
}

// usesOf gives the uses of each model, and of each "model:version". Devices
// that have several versions of a model count once for each.
func usesOf(versions []*v1.VersionUse, deployments []*v1.Deployment, routes []*v1.Route) map[string]*use {
	uses := map[string]*use{}
	of := func(ref string) *use {
		u := uses[ref]
		if u == nil {
			u = &use{URL: filter{Model: ref, Page: 1}.URL()}
			uses[ref] = u
		}
		return u
	}
	for _, v := range versions {
		of(v.GetModel()).add(v)
		of(versionRef(v.GetModel(), v.GetVersion())).add(v)
	}
	for _, d := range deployments {
		for _, ref := range []string{d.GetModel(), versionRef(d.GetModel(), d.GetVersion())} {
			u := of(ref)
			u.Deployments = append(u.Deployments, d.GetName())
		}
	}
	for _, r := range routes {
		named := map[string]bool{}
		for model, version := range namedBy(r) {
			named[model] = true
			for _, v := range version {
				if v > 0 {
					named[versionRef(model, v)] = true
				}
			}
		}
		for ref := range named {
			u := of(ref)
			u.Routes = append(u.Routes, r.GetName())
		}
	}
	return uses
}

// namedBy gives the versions of each model that a route names; 0: whichever a
// device has.
func namedBy(r *v1.Route) map[string][]int64 {
	named := map[string][]int64{}
	add := func(model string, version int64) { named[model] = append(named[model], version) }
	part := func(targets []*v1.RouteTarget, fallback []*v1.RouteFallback, shadow *v1.RouteShadow, cascade *v1.RouteCascade) {
		for _, t := range targets {
			add(t.GetModel(), t.GetVersion())
		}
		for _, f := range fallback {
			add(f.GetModel(), f.GetVersion())
		}
		if shadow != nil {
			add(shadow.GetModel(), shadow.GetVersion())
		}
		if cascade != nil {
			add(cascade.GetModel(), cascade.GetVersion())
		}
	}
	part(r.GetTargets(), r.GetFallback(), r.GetShadow(), r.GetCascade())
	for _, rule := range r.GetRules() {
		part(rule.GetTargets(), rule.GetFallback(), rule.GetShadow(), rule.GetCascade())
	}
	return named
}

// versionRef writes "model:version", or the model alone for version 0.
func versionRef(model string, version int64) string {
	if version == 0 {
		return model
	}
	return model + ":" + strconv.FormatInt(version, 10)
}

// modelRow is one model in the list.
type modelRow struct {
	Name     string
	Versions int
	Newest   *v1.ModelVersion
	Use      use
}

type modelsView struct {
	Text   string
	Rows   []modelRow
	All    int // models
	Found  int
	Pager  pager
	Now    time.Time
	Pushes bool // the viewer may push
}

// modelsOf puts versions, which come by model, then version, together.
func modelsOf(versions []*v1.ModelVersion, uses map[string]*use, text string) (rows []modelRow, all int) {
	for from := 0; from < len(versions); {
		to := from
		for to < len(versions) && versions[to].GetModel() == versions[from].GetModel() {
			to++
		}
		r := modelRow{Name: versions[from].GetModel(), Versions: to - from, Newest: versions[to-1]}
		if u := uses[r.Name]; u != nil {
			r.Use = *u
		}
		all++
		if text == "" || contains(text, r.Name, r.Newest.GetCreatedBy(), r.Newest.GetDigest(), strings.Join(r.Newest.GetSigners(), "\n")) {
			rows = append(rows, r)
		}
		from = to
	}
	return rows, all
}

// stock asks for versions, of one model or all, and what they are used for.
func (s *console) stock(r *http.Request, in session, model string) ([]*v1.ModelVersion, map[string]*use, error) {
	versions, err := in.calls.models().ListModels(r.Context(), connect.NewRequest(&v1.ListModelsRequest{Model: model}))
	if err != nil {
		return nil, nil, err
	}
	deployments, err := in.calls.objects().ListDeployments(r.Context(), connect.NewRequest(&v1.ListDeploymentsRequest{}))
	if err != nil {
		return nil, nil, err
	}
	routes, err := in.calls.objects().ListRoutes(r.Context(), connect.NewRequest(&v1.ListRoutesRequest{}))
	if err != nil {
		return nil, nil, err
	}
	devices, err := in.calls.devices().ListDevices(r.Context(), connect.NewRequest(&v1.ListDevicesRequest{Limit: 1, Uses: true, Brief: true}))
	if err != nil {
		return nil, nil, err
	}
	return versions.Msg.GetVersions(), usesOf(devices.Msg.GetCounts().GetUses(), deployments.Msg.GetDeployments(), routes.Msg.GetRoutes()), nil
}

func (s *console) models(w http.ResponseWriter, r *http.Request, in session) {
	q := r.URL.Query()
	words, err := wordsOf(q, "q")
	if err != nil {
		s.fail(w, r, in, http.StatusBadRequest, err.Error())
		return
	}
	versions, uses, err := s.stock(r, in, "")
	if err != nil {
		s.failed(w, r, in, err)
		return
	}
	v := modelsView{Text: words["q"], Now: s.Now(), Pushes: in.Who.May(identity.Operator)}
	v.Rows, v.All = modelsOf(versions, uses, v.Text)
	v.Found = len(v.Rows)
	if v.Rows, v.Pager, err = pageOf(v.Rows, "/models", q); err != nil {
		s.fail(w, r, in, http.StatusBadRequest, err.Error())
		return
	}
	s.pages.write(w, r, http.StatusOK, "models", page{Session: in, Title: "Models", Data: v, Now: v.Now})
}

// versionView is one version on the page of its model.
type versionView struct {
	V       *v1.ModelVersion
	Use     use
	Growth  string // its size against that of the version before
	Changed []string
}

// profileRow is what is known of a version on a class of devices.
type profileRow struct {
	Version int64
	Class   string
	Devices int
	P       *v1.DeviceProfile // the newest of them
	Run     string            // time of one run of the fewest rows that were measured
	Setting string
	Energy  string
}

type modelView struct {
	Name     string
	Versions []versionView // newest first
	Profiles []profileRow
	Pager    pager
	All      int
	Fault    string
	Deletes  bool // the viewer may delete versions
	Now      time.Time
}

// signature is an input or output. Its name may be written from right to left;
// what comes after it is not.
type signature struct{ Name, Type string }

// signatureOf takes "name:TYPE[dims]" apart, before the colon of the type.
func signatureOf(text string) signature {
	at := strings.LastIndexByte(text, ':')
	if at < 0 {
		return signature{Name: text}
	}
	return signature{text[:at], text[at:]}
}

// growth says how much larger a version is than the one before.
func growth(now, before uint64) string {
	switch {
	case now > before:
		return "+" + bytesText(now-before)
	case now < before:
		return "−" + bytesText(before-now)
	}
	return "the same size"
}

// changesOf says what callers have to know that have used the version before.
func changesOf(now, before *v1.ModelVersion) []string {
	var all []string
	if !slices.Equal(now.GetInputs(), before.GetInputs()) {
		all = append(all, "other inputs")
	}
	if !slices.Equal(now.GetOutputs(), before.GetOutputs()) {
		all = append(all, "other outputs")
	}
	if now.GetOpset() != before.GetOpset() {
		all = append(all, fmt.Sprintf("opset %d before", before.GetOpset()))
	}
	return all
}

func versionsViewOf(versions []*v1.ModelVersion, uses map[string]*use) []versionView {
	var all []versionView
	for i, v := range slices.Backward(versions) {
		one := versionView{V: v}
		if u := uses[versionRef(v.GetModel(), v.GetVersion())]; u != nil {
			one.Use = *u
		}
		if i > 0 {
			one.Growth, one.Changed = growth(v.GetSizeBytes(), versions[i-1].GetSizeBytes()), changesOf(v, versions[i-1])
		}
		all = append(all, one)
	}
	return all
}

// profilesOf gives a row for each version and class, newest versions first.
func profilesOf(profiles []*v1.DeviceProfile) []profileRow {
	type key struct {
		version int64
		class   string
	}
	rows := map[key]*profileRow{}
	for _, p := range profiles {
		k := key{p.GetProfile().GetVersion(), p.GetProfile().GetFirmwareProfile()}
		r := rows[k]
		if r == nil {
			r = &profileRow{Version: k.version, Class: k.class, P: p}
			rows[k] = r
		}
		r.Devices++
		if p.GetProfile().GetMeasuredAt().AsTime().After(r.P.GetProfile().GetMeasuredAt().AsTime()) {
			r.P = p
		}
	}
	keys := slices.SortedFunc(maps.Keys(rows), func(a, b key) int {
		return cmp.Or(cmp.Compare(b.version, a.version), strings.Compare(a.class, b.class))
	})
	var all []profileRow
	for _, k := range keys {
		r := rows[k]
		p := r.P.GetProfile()
		if l := p.GetLatency(); len(l) > 0 {
			fewest := slices.MinFunc(l, func(a, b *v1.LatencyPoint) int { return cmp.Compare(a.GetRows(), b.GetRows()) })
			r.Run = fmt.Sprintf("%s for %d row%s", secondsText(fewest.GetSeconds()), fewest.GetRows(), plural(int(fewest.GetRows())))
		}
		if g := p.GetRecommended(); g != nil {
			r.Setting = fmt.Sprintf("%s, %d row%s a run, %d at a time", g.GetProvider(), g.GetBatch(), plural(int(g.GetBatch())), g.GetInstances())
			for _, point := range p.GetPoints() {
				if s := point.GetSetting(); point.JoulesPerRow != nil && s.GetProvider() == g.GetProvider() && s.GetBatch() == g.GetBatch() && s.GetInstances() == g.GetInstances() && s.GetThreads() == g.GetThreads() && s.GetPrepacked() == g.GetPrepacked() {
					r.Energy = fmt.Sprintf("%.3g J a row", point.GetJoulesPerRow())
				}
			}
		}
		all = append(all, *r)
	}
	return all
}

func plural(n int) string {
	if n == 1 {
		return ""
	}
	return "s"
}

func (s *console) model(w http.ResponseWriter, r *http.Request, in session) {
	s.writeModel(w, r, in, nil)
}

// writeModel answers with the page of a model, and with why a change of it
// failed.
func (s *console) writeModel(w http.ResponseWriter, r *http.Request, in session, fault error) {
	name := r.PathValue("model")
	versions, uses, err := s.stock(r, in, name)
	if err != nil {
		s.failed(w, r, in, err)
		return
	}
	if len(versions) == 0 {
		if fault != nil {
			s.failed(w, r, in, fault)
			return
		}
		s.fail(w, r, in, http.StatusNotFound, "There is no such model.")
		return
	}
	profiles, err := in.calls.profiles().ListProfiles(r.Context(), connect.NewRequest(&v1.ListProfilesRequest{Model: name}))
	if err != nil {
		s.failed(w, r, in, err)
		return
	}
	v := modelView{
		Name: name, Versions: versionsViewOf(versions, uses), All: len(versions), Profiles: profilesOf(profiles.Msg.GetProfiles()), Now: s.Now(),
		Deletes: identity.Allow(in.Who, v1connect.ModelServiceDeleteVersionProcedure) == nil,
	}
	if v.Versions, v.Pager, err = pageOf(v.Versions, "/models/"+name, r.URL.Query()); err != nil {
		s.fail(w, r, in, http.StatusBadRequest, err.Error())
		return
	}
	status := http.StatusOK
	if fault != nil {
		status, v.Fault = statusOf(fault), messageOf(fault)
	}
	s.pages.write(w, r, status, "model", page{Session: in, Title: name, Data: v, Now: v.Now})
}

// changeModel deletes a version.
func (s *console) changeModel(w http.ResponseWriter, r *http.Request, in session) {
	f, ok := s.form(w, r, in, maxForm)
	if !ok {
		return
	}
	name := r.PathValue("model")
	version, err := numberOf("version", f.Get("version"), 0, 1, 1<<53-1)
	if err == nil {
		_, err = in.calls.models().DeleteVersion(r.Context(), connect.NewRequest(&v1.DeleteVersionRequest{Model: name, Version: version}))
	} else {
		err = connect.NewError(connect.CodeInvalidArgument, err)
	}
	if err != nil {
		s.writeModel(w, r, in, err)
		return
	}
	left, err := in.calls.models().ListModels(r.Context(), connect.NewRequest(&v1.ListModelsRequest{Model: name}))
	if err == nil && len(left.Msg.GetVersions()) == 0 {
		http.Redirect(w, r, "/models", http.StatusSeeOther)
		return
	}
	http.Redirect(w, r, "/models/"+name, http.StatusSeeOther)
}
