package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/timestamppb"

	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// query says what of a kind is asked for.
type query struct {
	name          string // narrows it down, as the kind has it; "": all
	selector      map[string]string
	limit         uint32
	device, class string
}

// kind is something that get lists.
type kind struct {
	name string
	list func(ctx context.Context, ctl *client, q query) (view, error)
	// journal says that it is a list of what happened, the newest first: items
	// come, and leave only because there are too many.
	journal bool
}

// kinds are all that get knows, in the order in which it names them.
var kinds = []kind{
	{name: "devices", list: listDevices}, {name: "models", list: listModels}, {name: "deployments", list: listDeployments}, {name: "routes", list: listRoutes},
	{name: "freezes", list: objectsLister("Freeze", freezesTable)}, {name: "maintenances", list: objectsLister("Maintenance", maintenancesTable)},
	{name: "rollouts", list: listRollouts}, {name: "events", list: listEvents, journal: true}, {name: "alarms", list: listAlarms}, {name: "profiles", list: listProfiles},
	{name: "join-tokens", list: listJoinTokens},
}

func kindNames() (names []string) {
	for _, k := range kinds {
		names = append(names, k.name)
	}
	return names
}

// findKind gives the kind of a name, which may be in the singular.
func findKind(name string) (kind, error) {
	lower := strings.ToLower(name)
	for _, k := range kinds {
		if k.name == lower || k.name == lower+"s" {
			return k, nil
		}
	}
	return kind{}, usagef("unknown kind %q, kinds are %s", name, strings.Join(kindNames(), ", "))
}

func (c *cli) getCommand() *cobra.Command {
	out := format("table")
	var q query
	var selector []string
	var watch bool
	every := watchEvery
	cmd := &cobra.Command{
		Use:   "get KIND [NAME]",
		Short: "Show " + strings.Join(kindNames(), ", "),
		Long: "KIND is one of " + strings.Join(kindNames(), ", ") + `.
NAME narrows it down: to a device, model, deployment, route, freeze or
maintenance of that name, the rollouts of a deployment, the events or alarms of a
device, the profiles of a model (NAME or NAME:VERSION).

With -o yaml, deployments, routes, freezes and maintenances are written as
documents for apply.

With --watch it goes on and writes what is new or has changed: rows of which
another column than a time differs, or, with -o jsonl, what differs at all. What
is gone, and that the controller is away or back, is told on stderr. It asks every
2 s or --every so long, and less often where answers take longer than a tenth of
that. An interrupt ends it, with exit code 0.`,
		Example: "  dunlin get devices\n  dunlin get models digits -o json\n  dunlin get rollouts --watch",
		Args:    arguments(1, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			k, err := findKind(args[0])
			if err != nil {
				return err
			}
			if q.selector, err = parseLabels(selector); err != nil {
				return err
			}
			switch {
			case watch && (out == "json" || out == "yaml"):
				return usagef("--watch goes with -o table, wide, name or jsonl, not with %s", out)
			case cmd.Flags().Changed("every") && !watch:
				return usagef("--every goes with --watch")
			case every < minWatchEvery || every > maxWatchEvery:
				return usagef("--every is %s, allowed are %s to %s", every, minWatchEvery, maxWatchEvery)
			}
			if len(args) == 2 {
				q.name = args[1]
			}
			ctl, err := c.client()
			if err != nil {
				return err
			}
			list := func(ctx context.Context) (view, error) { return k.list(ctx, ctl, q) }
			if watch {
				err = c.watchList(cmd.Context(), list, newWatched(out, k.journal), every)
			} else if v, listErr := list(cmd.Context()); listErr != nil {
				err = listErr
			} else {
				err = c.show(out, v)
			}
			if err != nil {
				return fmt.Errorf("get %s: %w", strings.Join(args, " "), err)
			}
			return nil
		},
	}
	cmd.Flags().VarP(&out, "output", "o", "how to write it")
	cmd.Flags().StringArrayVarP(&selector, "selector", "l", nil, "only devices with this label, KEY=VALUE (repeat for more)")
	cmd.Flags().StringVar(&q.device, "device", "", "only profiles of this device")
	cmd.Flags().StringVar(&q.class, "class", "", "only profiles of this class of devices, a firmware profile")
	cmd.Flags().Uint32Var(&q.limit, "limit", 0, "the most events to show, 1 to 10000 (default 100)")
	cmd.Flags().BoolVarP(&watch, "watch", "w", false, "go on, and write what is new or has changed")
	cmd.Flags().DurationVar(&every, "every", every, "with --watch: how often to ask, 100ms to 1h")
	return cmd
}

// errNotFound is that nothing has a name.
var errNotFound = errors.New("not found")

type notFoundError struct{ what, name string }

func (e notFoundError) Error() string        { return fmt.Sprintf("no %s is called %q", e.what, e.name) }
func (e notFoundError) Is(target error) bool { return target == errNotFound }

func notFound(what, name string) error { return notFoundError{what, name} }

func listDevices(ctx context.Context, ctl *client, q query) (view, error) {
	res, err := call(ctx, ctl.devices().ListDevices, &dunlinv1.ListDevicesRequest{Device: q.name, Selector: q.selector})
	if err != nil {
		return view{}, err
	}
	if q.name != "" && len(res.GetDevices()) == 0 {
		return view{}, notFound("device", q.name)
	}
	return viewOf(res, func() *table { return devicesTable(time.Now(), res.GetDevices()) }), nil
}

// soonExpired is the time before a certificate's end in which a device should
// have renewed long ago.
const soonExpired = 30 * 24 * time.Hour

func devicesTable(now time.Time, devices []*dunlinv1.Device) *table {
	t := &table{header: []string{"NAME", "STATE", "SERVING", "TROUBLE", "ARCH", "CLASS", "RUNTIME", "LAST HEARD", "LABELS"},
		wide: []string{"AGENT", "BOARD", "CPUS", "MEMORY", "PROVIDERS", "GPUS", "SERVES AT", "JOINED", "CERTIFICATE UNTIL"}}
	for _, d := range devices {
		state := "offline"
		if d.GetConnected() {
			state = "online"
		}
		var serving, trouble []string
		known := d.GetIdentity()
		if known.GetRevokedAt() != nil {
			state = "revoked"
			trouble = append(trouble, strings.TrimSuffix("revoked: "+known.GetRevokedReason(), ": "))
		}
		if twins := known.GetTwins(); len(twins) > 0 {
			var hosts []string
			for _, t := range twins {
				hosts = append(hosts, t.GetHostname())
			}
			trouble = append(trouble, fmt.Sprintf("%d agents use its identity: %s", len(twins), strings.Join(hosts, " and ")))
		}
		if end := known.GetNotAfter(); end != nil && known.GetRevokedAt() == nil && end.AsTime().Sub(now) < soonExpired {
			trouble = append(trouble, "certificate expires "+end.AsTime().Format(time.DateOnly))
		}
		for _, v := range d.GetReported().GetVersions() {
			ref := fmt.Sprintf("%s:%d", v.GetModel(), v.GetVersion())
			if v.GetServing() && d.GetConnected() {
				serving = append(serving, ref)
			} else if v.GetServing() {
				serving = append(serving, "("+ref+")") // when it was last heard
			}
			if v.GetState() == dunlinv1.VersionState_VERSION_STATE_QUARANTINED {
				trouble = append(trouble, ref+" quarantined")
			}
		}
		for _, r := range d.GetReported().GetRoutes() {
			if !r.GetReady() {
				trouble = append(trouble, "route "+r.GetName()+" not ready")
			}
		}
		if r := d.GetReported().GetRefused(); r != nil {
			trouble = append(trouble, fmt.Sprintf("refuses generation %d: %s", r.GetGeneration().GetNumber(), r.GetReason()))
		}
		for _, a := range d.GetTelemetry().GetAlarms() {
			trouble = append(trouble, "alarm "+strings.TrimSpace(a.GetKind()+" "+a.GetSubject()))
		}
		info := d.GetInfo()
		class := info.GetFirmwareProfile()
		if info.GetSimulated() {
			class += " (simulated)"
		}
		t.add(d.GetName(), state, strings.Join(serving, ","), strings.Join(trouble, ", "), info.GetArch(), class, info.GetRuntimeVersion(), ago(now, d.GetLastHeardAt()), labelsText(d.GetLabels()),
			info.GetAgentVersion(), info.GetBoard(), countText(info.GetCpuCount()), sizeText(info.GetMemoryBytes()), strings.Join(info.GetProviders(), ","), countText(uint32(len(info.GetGpus()))),
			info.GetServingUrl(), ago(now, d.GetJoinedAt()), dayText(known.GetNotAfter()))
	}
	return t
}

func listModels(ctx context.Context, ctl *client, q query) (view, error) {
	res, err := call(ctx, ctl.models().ListModels, &dunlinv1.ListModelsRequest{Model: q.name})
	if err != nil {
		return view{}, err
	}
	if q.name != "" && len(res.GetVersions()) == 0 {
		return view{}, notFound("model", q.name)
	}
	return viewOf(res, func() *table { return modelsTable(time.Now(), res.GetVersions()) }), nil
}

func modelsTable(now time.Time, versions []*dunlinv1.ModelVersion) *table {
	t := &table{header: []string{"MODEL", "VERSION", "SIZE", "OPSET", "INPUTS", "OUTPUTS", "CREATED", "BY", "DIGEST"}, wide: []string{"SIGNERS", "WHOLE DIGEST"}}
	for _, v := range versions {
		digest := v.GetDigest()
		if i := strings.IndexByte(digest, ':') + 13; len(digest) > i {
			digest = digest[:i]
		}
		t.add(v.GetModel(), fmt.Sprint(v.GetVersion()), bytesText(int64(v.GetSizeBytes())), fmt.Sprint(v.GetOpset()),
			strings.Join(v.GetInputs(), " "), strings.Join(v.GetOutputs(), " "), ago(now, v.GetCreatedAt()), v.GetCreatedBy(), digest,
			strings.Join(v.GetSigners(), ", "), v.GetDigest())
	}
	return t
}

func listDeployments(ctx context.Context, ctl *client, q query) (view, error) {
	res, err := call(ctx, ctl.objects().ListDeployments, &dunlinv1.ListDeploymentsRequest{})
	if err != nil {
		return view{}, err
	}
	if q.name != "" {
		res.Deployments = only(res.GetDeployments(), q.name)
		if len(res.Deployments) == 0 {
			return view{}, notFound("deployment", q.name)
		}
	}
	v := viewOf(res, func() *table { return deploymentsTable(time.Now(), res.GetDeployments()) })
	v.documents = documentsOf(res.GetDeployments())
	return v, nil
}

func deploymentsTable(now time.Time, deployments []*dunlinv1.Deployment) *table {
	t := &table{header: []string{"NAME", "MODEL", "DEVICES", "READY", "FAILED", "SELECTOR", "UPDATED"}}
	for _, d := range deployments {
		t.add(d.GetName(), fmt.Sprintf("%s:%d", d.GetModel(), d.GetVersion()), fmt.Sprint(d.GetDevices()), fmt.Sprint(d.GetReady()), fmt.Sprint(d.GetFailed()), selectorText(d.GetSelector()), ago(now, d.GetUpdatedAt()))
	}
	return t
}

func listRoutes(ctx context.Context, ctl *client, q query) (view, error) {
	res, err := call(ctx, ctl.objects().ListRoutes, &dunlinv1.ListRoutesRequest{})
	if err != nil {
		return view{}, err
	}
	if q.name != "" {
		res.Routes = only(res.GetRoutes(), q.name)
		if len(res.Routes) == 0 {
			return view{}, notFound("route", q.name)
		}
	}
	v := viewOf(res, func() *table { return routesTable(time.Now(), res.GetRoutes()) })
	v.documents = documentsOf(res.GetRoutes())
	return v, nil
}

func routesTable(now time.Time, routes []*dunlinv1.Route) *table {
	t := &table{header: []string{"NAME", "TARGETS", "UPDATED"}, wide: []string{"FALLBACK", "SHADOW", "CASCADE"}}
	for _, r := range routes {
		var targets []string
		for _, target := range r.GetTargets() {
			s := target.GetModel()
			if target.GetVersion() > 0 {
				s += fmt.Sprintf(":%d", target.GetVersion())
			}
			targets = append(targets, fmt.Sprintf("%s=%d", s, target.GetWeight()))
		}
		text := strings.Join(targets, ",")
		switch n := len(r.GetRules()); n {
		case 0:
		case 1:
			text += " after 1 rule"
		default:
			text += fmt.Sprintf(" after %d rules", n)
		}
		fallback, shadow, cascade := companions(r)
		for _, rule := range r.GetRules() {
			f, s, c := companions(rule)
			for _, more := range []struct{ to, of *string }{{&fallback, &f}, {&shadow, &s}, {&cascade, &c}} {
				if *more.of != "" {
					*more.to = strings.TrimPrefix(*more.to+"; "+rule.GetName()+" "+*more.of, "; ")
				}
			}
		}
		t.add(r.GetName(), text, ago(now, r.GetUpdatedAt()), fallback, shadow, cascade)
	}
	return t
}

// companions says what a route, or a rule, has beside its targets: its fallbacks in
// their order, its shadow with the share, its cascade with the expression.
func companions(r interface {
	GetFallback() []*dunlinv1.RouteFallback
	GetShadow() *dunlinv1.RouteShadow
	GetCascade() *dunlinv1.RouteCascade
}) (fallback, shadow, cascade string) {
	name := func(t interface {
		GetModel() string
		GetVersion() int64
	}) string {
		if t.GetVersion() == 0 {
			return t.GetModel()
		}
		return fmt.Sprintf("%s:%d", t.GetModel(), t.GetVersion())
	}
	var names []string
	for _, f := range r.GetFallback() {
		names = append(names, name(f))
	}
	if s := r.GetShadow(); s != nil {
		shadow = fmt.Sprintf("%s at %.4g", name(s), s.GetRate())
	}
	if c := r.GetCascade(); c != nil {
		cascade = fmt.Sprintf("%s when %s", name(c), c.GetWhen())
	}
	return strings.Join(names, ","), shadow, cascade
}

// objectsLister lists the objects of a kind.
func objectsLister(kind string, t func(time.Time, []*dunlinv1.Object) *table) func(context.Context, *client, query) (view, error) {
	return func(ctx context.Context, ctl *client, q query) (view, error) {
		res, err := call(ctx, ctl.objects().ListObjects, &dunlinv1.ListObjectsRequest{Kind: kind})
		if err != nil {
			return view{}, err
		}
		if q.name != "" {
			res.Objects = only(res.GetObjects(), q.name)
			if len(res.Objects) == 0 {
				return view{}, notFound(strings.ToLower(kind), q.name)
			}
		}
		v := viewOf(res, func() *table { return t(time.Now(), res.GetObjects()) })
		v.documents = documentsOf(res.GetObjects())
		return v, nil
	}
}

func selectorText(labels map[string]string) string {
	if len(labels) == 0 {
		return "(all)"
	}
	return labelsText(labels)
}

func freezesTable(now time.Time, freezes []*dunlinv1.Object) *table {
	t := &table{header: []string{"NAME", "SELECTOR", "REASON", "ENDS", "UPDATED"}}
	for _, o := range freezes {
		ends := ""
		if o.GetUntil() != nil {
			ends = "over"
			if left := o.GetUntil().AsTime().Sub(now); left > 0 {
				ends = "in " + durationText(left)
			}
		}
		t.add(o.GetName(), selectorText(o.GetSelector()), o.GetReason(), ends, ago(now, o.GetUpdatedAt()))
	}
	return t
}

func maintenancesTable(now time.Time, all []*dunlinv1.Object) *table {
	t := &table{header: []string{"NAME", "SELECTOR", "WINDOWS", "TIMEZONE", "UPDATED"}}
	for _, o := range all {
		t.add(o.GetName(), selectorText(o.GetSelector()), strings.Join(o.GetWindows(), ", "), o.GetTimezone(), ago(now, o.GetUpdatedAt()))
	}
	return t
}

// only keeps the item of a name.
func only[T interface{ GetName() string }](items []T, name string) []T {
	for _, i := range items {
		if i.GetName() == name {
			return []T{i}
		}
	}
	return nil
}

func documentsOf[T interface{ GetYaml() string }](items []T) []string {
	var documents []string
	for _, i := range items {
		documents = append(documents, i.GetYaml())
	}
	return documents
}

func (c *cli) printDocuments(documents []string) error {
	for i, d := range documents {
		if i > 0 {
			d = "---\n" + d
		}
		if !strings.HasSuffix(d, "\n") {
			d += "\n"
		}
		if _, err := fmt.Fprint(c.out, d); err != nil {
			return err
		}
	}
	return nil
}

func listRollouts(ctx context.Context, ctl *client, q query) (view, error) {
	res, err := call(ctx, ctl.rollouts().ListRollouts, &dunlinv1.ListRolloutsRequest{Deployment: q.name})
	if err != nil {
		return view{}, err
	}
	if q.name != "" && len(res.GetRollouts()) == 0 {
		return view{}, fmt.Errorf("no deployment %q has had a rollout", q.name)
	}
	return viewOf(res, func() *table { return rolloutsTable(time.Now(), res.GetRollouts()) }), nil
}

func rolloutsTable(now time.Time, rollouts []*dunlinv1.Rollout) *table {
	t := &table{header: []string{"ID", "DEPLOYMENT", "MODEL", "FROM", "TO", "STATE", "READY", "STARTED", "REASON"}, wide: []string{"ENDED", "WAVE", "FROM MODEL"}}
	for _, r := range rollouts {
		wave := ""
		if n := len(r.GetWaves()); n > 0 {
			wave = fmt.Sprintf("%d/%d", r.GetWave(), n)
		}
		t.add(r.GetId(), r.GetDeployment(), r.GetModel(), versionText(r.GetFromVersion()), versionText(r.GetToVersion()),
			rolloutState(r), readyText(r), ago(now, r.GetStartedAt()), r.GetReason(),
			ago(now, r.GetEndedAt()), wave, r.GetFromModel())
	}
	return t
}

// sizeText is "" where a size is not known.
func sizeText(n uint64) string {
	if n == 0 {
		return ""
	}
	return bytesText(int64(n))
}

func dayText(t *timestamppb.Timestamp) string {
	if t == nil {
		return ""
	}
	return t.AsTime().Format(time.DateOnly)
}

func versionText(v int64) string {
	if v == 0 {
		return "-"
	}
	return fmt.Sprint(v)
}

func readyText(r *dunlinv1.Rollout) string {
	ready := 0
	for _, d := range r.GetDevices() {
		if d.GetPhase() == dunlinv1.RolloutDevice_PHASE_READY {
			ready++
		}
	}
	return fmt.Sprintf("%d/%d", ready, len(r.GetDevices()))
}

func listEvents(ctx context.Context, ctl *client, q query) (view, error) {
	res, err := call(ctx, ctl.devices().ListEvents, &dunlinv1.ListEventsRequest{Device: q.name, Limit: q.limit})
	if err != nil {
		return view{}, err
	}
	if q.name != "" && len(res.GetEvents()) == 0 {
		// The device has raised none, or does not exist.
		if _, err := call(ctx, ctl.devices().ListDevices, &dunlinv1.ListDevicesRequest{Device: q.name}); err != nil {
			return view{}, err
		}
	}
	return viewOf(res, func() *table { return eventsTable(time.Now(), res.GetEvents()) }), nil
}

func eventsTable(now time.Time, events []*dunlinv1.DeviceEvent) *table {
	t := &table{header: []string{"WHEN", "DEVICE", "SEVERITY", "KIND", "MODEL", "MESSAGE"}}
	for _, e := range events {
		ev := e.GetEvent()
		model := ev.GetModel()
		if model != "" && ev.GetVersion() > 0 {
			model += fmt.Sprintf(":%d", ev.GetVersion())
		}
		t.add(ago(now, ev.GetAt()), e.GetDevice(), enumText(ev.GetSeverity(), "SEVERITY_"), ev.GetKind(), model, ev.GetMessage())
	}
	return t
}

func listAlarms(ctx context.Context, ctl *client, q query) (view, error) {
	res, err := call(ctx, ctl.devices().ListDevices, &dunlinv1.ListDevicesRequest{Device: q.name})
	if err != nil {
		return view{}, err
	}
	res.Devices = slices.DeleteFunc(res.GetDevices(), func(d *dunlinv1.Device) bool { return len(d.GetTelemetry().GetAlarms()) == 0 })
	// Alarms have no list of their own on the wire.
	for i, d := range res.GetDevices() {
		res.Devices[i] = &dunlinv1.Device{Name: d.GetName(), Telemetry: &dunlinv1.Telemetry{At: d.GetTelemetry().GetAt(), Alarms: d.GetTelemetry().GetAlarms()}}
	}
	v := viewOf(res, func() *table { return alarmsTable(time.Now(), res.GetDevices()) })
	for _, d := range res.GetDevices() {
		for _, a := range d.GetTelemetry().GetAlarms() {
			v.keys = append(v.keys, strings.TrimSpace(d.GetName()+" "+a.GetKind()+" "+a.GetSubject()))
		}
	}
	return v, nil
}

func alarmsTable(now time.Time, devices []*dunlinv1.Device) *table {
	t := &table{header: []string{"DEVICE", "SEVERITY", "ALARM", "SUBJECT", "SINCE", "ACTION", "MESSAGE", "EVIDENCE"}}
	for _, d := range devices {
		for _, a := range d.GetTelemetry().GetAlarms() {
			t.add(d.GetName(), enumText(a.GetSeverity(), "SEVERITY_"), a.GetKind(), a.GetSubject(), ago(now, a.GetRaisedAt()), a.GetAction(), a.GetMessage(), evidence(a))
		}
	}
	return t
}

// evidence says in short what an alarm rests on.
func evidence(a *dunlinv1.Alarm) string {
	var parts []string
	add := func(format string, args ...any) { parts = append(parts, fmt.Sprintf(format, args...)) }
	unit := ""
	if a.GetUnit() != "" {
		unit = " " + a.GetUnit()
	}
	if s := a.GetSamples(); len(s) > 0 {
		add("%.4g%s", s[len(s)-1].GetValue(), unit)
	}
	if a.Threshold != nil {
		add("threshold %.4g%s", a.GetThreshold(), unit)
	}
	if a.SlopePerHour != nil {
		add("%+.3g%s an hour", a.GetSlopePerHour(), unit)
	}
	if a.HoursToThreshold != nil {
		add("%.3g h to the threshold", a.GetHoursToThreshold())
	}
	if n := len(a.GetSamples()); a.GetMethod() != "" && n > 0 {
		add("%s over %d samples", a.GetMethod(), n)
	} else if a.GetMethod() != "" && a.Threshold == nil {
		add("%s", a.GetMethod())
	}
	return strings.Join(parts, ", ")
}

func listJoinTokens(ctx context.Context, ctl *client, q query) (view, error) {
	if q.name != "" {
		return view{}, usagef("join tokens have no q.name")
	}
	res, err := call(ctx, ctl.enrollment().ListJoinTokens, &dunlinv1.ListJoinTokensRequest{})
	if err != nil {
		return view{}, err
	}
	return viewOf(res, func() *table { return joinTokensTable(time.Now(), res.GetJoinTokens()) }), nil
}

func joinTokensTable(now time.Time, tokens []*dunlinv1.JoinToken) *table {
	t := &table{header: []string{"ID", "USES LEFT", "EXPIRES", "DEVICE", "LABELS"}}
	for _, j := range tokens {
		expires := "expired"
		if left := j.GetExpiresAt().AsTime().Sub(now); left > 0 {
			expires = "in " + durationText(left)
		}
		t.add(j.GetId(), fmt.Sprint(j.GetUsesLeft()), expires, j.GetDevice(), labelsText(j.GetLabels()))
	}
	return t
}
