package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/dunlin/dunlin/controller/fleet"
	"github.com/dunlin/dunlin/internal/policy"
	"github.com/dunlin/dunlin/models/tensor"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// Bounds of a simulation.
const (
	maxSimulated     = 1000000
	maxExplained     = 10000 // requests that are shown one by one
	maxRequestLine   = 1 << 20
	maxRequestInputs = 1000
)

func (c *cli) routeCommand() *cobra.Command {
	return group("route", "Try out the policies of routes", c.routeSimulateCommand())
}

// simulateFlags are what a simulation is made of.
type simulateFlags struct {
	files      []string
	device     string
	labels     []string
	requests   string
	make       int
	seed       uint64
	live       []string
	onlyTotals bool
}

func (c *cli) routeSimulateCommand() *cobra.Command {
	var f simulateFlags
	out := format("table")
	cmd := &cobra.Command{
		Use:   "simulate -f FILE|- (--requests FILE|- | --make N)",
		Short: "Show where requests would go, and why",
		Long: `simulate shows for each request which rule of a route would decide on it, which
target it would get and why, and how many each target gets. Nothing is applied
and no model runs. The documents must have one Route.

--requests has one request on each line, as JSON; all of it may be left out:

  {"id": "a", "parameters": {"tier": "gold"}, "headers": {"x-session": "s1"},
   "inputs": {"image": [1, 28, 28]}, "live": {"queue_depth": 60}}

--make makes up so many, which differ in the parameters, headers and inputs that
the route looks at. They are no forecast: all values are alike likely.

The labels are those of --device, as the controller has them, or --labels. Live
figures are not known but for those of --live and of each request:
queue_depth, predicted_wait_ms, temperature_celsius, on_battery.

Where a request goes by chance, --seed gives the chance.`,
		Example: "  dunlin route simulate -f vision.yaml --labels site=berlin --make 20 --live queue_depth=60\n" +
			"  dunlin route simulate -f vision.yaml --device cam-1 --requests requests.jsonl -o json",
		Args: arguments(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.routeSimulate(cmd.Context(), f, cmd.Flags().Changed("make"), out)
		},
	}
	cmd.Flags().StringArrayVarP(&f.files, "file", "f", nil, "file, - or folder with YAML documents")
	cmd.Flags().StringVar(&f.device, "device", "", "the device whose labels count")
	cmd.Flags().StringSliceVar(&f.labels, "labels", nil, "labels of a device, KEY=VALUE,KEY=VALUE")
	cmd.Flags().StringVar(&f.requests, "requests", "", "file with requests, or -")
	cmd.Flags().IntVar(&f.make, "make", 0, fmt.Sprintf("how many requests to make up, 1 to %d", maxSimulated))
	cmd.Flags().Uint64Var(&f.seed, "seed", 1, "the requests that are made up, and the chance")
	cmd.Flags().StringSliceVar(&f.live, "live", nil, "live figures, NAME=VALUE,NAME=VALUE")
	cmd.Flags().BoolVar(&f.onlyTotals, "totals", false, "show only how many each target gets")
	cmd.Flags().VarP(&out, "output", "o", "how to write it")
	return cmd
}

func (c *cli) routeSimulate(ctx context.Context, f simulateFlags, made bool, out format) error {
	switch {
	case f.device != "" && len(f.labels) > 0:
		return usagef("--device and --labels exclude each other")
	case made == (f.requests != ""):
		return usagef("either --requests or --make must be given")
	case made && (f.make < 1 || f.make > maxSimulated):
		return usagef("--make is %d, allowed are 1 to %d", f.make, maxSimulated)
	case made && f.make > maxExplained && !f.onlyTotals:
		return usagef("--make is %d: more than %d requests are only shown with --totals", f.make, maxExplained)
	case f.requests == "-" && slices.Contains(f.files, "-"):
		return usagef("only one of -f and --requests can be standard input")
	}
	labels, err := parseLabels(f.labels)
	if err != nil {
		return err
	}
	figures, err := parseLive(f.live)
	if err != nil {
		return err
	}
	route, err := c.oneRoute(f.files)
	if err != nil {
		return err
	}
	p, err := policy.Compile(route)
	if err != nil {
		return err
	}
	if f.device != "" {
		if labels, err = c.labelsOf(ctx, f.device); err != nil {
			return err
		}
	}
	s := simulation{policy: p, labels: labels, figures: figures, explain: !f.onlyTotals, totals: newTotals(p)}
	s.Route, s.Requests = route.GetName(), []simulated{}
	if made {
		err = s.makeUp(ctx, policy.MakeUp(route, f.seed), f.make)
	} else {
		err = c.readRequests(ctx, f.requests, f.seed, &s)
	}
	if err != nil {
		return err
	}
	s.Totals = s.totals.list()
	items := make([]any, len(s.Requests))
	for i := range s.Requests {
		items[i] = s.Requests[i]
	}
	if f.onlyTotals {
		items = items[:0]
		for _, t := range s.Totals {
			items = append(items, t)
		}
	}
	if out.tabular() && !f.onlyTotals {
		if err := s.requestsTable().write(c.out); err != nil {
			return err
		}
		fmt.Fprintln(c.out)
	}
	return c.show(out, view{whole: s, items: items, table: s.totalsTable})
}

// oneRoute gives the route of the documents, which must have one.
func (c *cli) oneRoute(files []string) (*dunlinv1.DesiredRoute, error) {
	text, where, err := c.readDocuments(files)
	if err != nil {
		return nil, err
	}
	objects, err := fleet.Parse(text)
	if err != nil {
		if len(where) > 1 {
			return nil, fmt.Errorf("%w\n(%s)", err, strings.Join(where, ", "))
		}
		return nil, err
	}
	var routes []*dunlinv1.DesiredRoute
	for _, o := range objects {
		if o.Route != nil {
			routes = append(routes, o.Route.Desired())
		}
	}
	if len(routes) != 1 {
		return nil, fmt.Errorf("the documents have %d routes, they must have one", len(routes))
	}
	return routes[0], nil
}

func (c *cli) labelsOf(ctx context.Context, device string) (map[string]string, error) {
	ctl, err := c.client()
	if err != nil {
		return nil, err
	}
	res, err := call(ctx, ctl.devices().ListDevices, &dunlinv1.ListDevicesRequest{Device: device})
	if err != nil {
		return nil, fmt.Errorf("look up the device: %w", err)
	}
	if len(res.GetDevices()) == 0 {
		return nil, notFound("device", device)
	}
	return res.GetDevices()[0].GetLabels(), nil
}

// liveFigures are the figures of a device, by the names that expressions have
// for them.
type liveFigures struct {
	QueueDepth         *int64   `json:"queue_depth,omitempty"`
	PredictedWaitMS    *float64 `json:"predicted_wait_ms,omitempty"`
	TemperatureCelsius *float64 `json:"temperature_celsius,omitempty"`
	OnBattery          *bool    `json:"on_battery,omitempty"`
}

// parseLive reads the values of --live.
func parseLive(flags []string) (liveFigures, error) {
	var l liveFigures
	given, err := parseLabels(flags)
	if err != nil {
		return l, usagef("--live %q is not of the form NAME=VALUE,NAME=VALUE, each once", strings.Join(flags, ","))
	}
	names := slices.Sorted(maps.Keys(given))
	object := make([]string, len(names))
	for i, name := range names {
		object[i] = strconv.Quote(name) + ":" + given[name]
	}
	if err := strictJSON([]byte("{"+strings.Join(object, ",")+"}"), &l); err != nil {
		return l, usagef("--live %s: %v", strings.Join(flags, ","), err)
	}
	return l, l.check("--live")
}

func (l *liveFigures) check(at string) error {
	switch {
	case l.QueueDepth != nil && *l.QueueDepth < 0:
		return fmt.Errorf("%s: queue_depth is %d, it must not be below 0", at, *l.QueueDepth)
	case l.PredictedWaitMS != nil && *l.PredictedWaitMS < 0:
		return fmt.Errorf("%s: predicted_wait_ms is %v, it must not be below 0", at, *l.PredictedWaitMS)
	}
	return nil
}

// over takes from l what it has, and the rest from other.
func (l liveFigures) over(other liveFigures) policy.Figures {
	var f policy.Figures
	if v := either(l.QueueDepth, other.QueueDepth); v != nil {
		f.QueueDepth = policy.Figure{Value: float64(*v), Known: true}
	}
	if v := either(l.PredictedWaitMS, other.PredictedWaitMS); v != nil {
		f.PredictedWait = policy.Figure{Value: *v, Known: true}
	}
	if v := either(l.TemperatureCelsius, other.TemperatureCelsius); v != nil {
		f.Temperature = policy.Figure{Value: *v, Known: true}
	}
	if v := either(l.OnBattery, other.OnBattery); v != nil {
		f.OnBattery.Known = true
		if *v {
			f.OnBattery.Value = 1
		}
	}
	return f
}

// either is the first that is there.
func either[T any](a, b *T) *T {
	if a != nil {
		return a
	}
	return b
}

func strictJSON(b []byte, to any) error {
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(to); err != nil {
		return err
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return errors.New("there is more after the value")
	}
	return nil
}

// requestLine is a line of --requests.
type requestLine struct {
	ID         string                     `json:"id"`
	Parameters map[string]json.RawMessage `json:"parameters"`
	Headers    map[string]string          `json:"headers"`
	Inputs     map[string][]int64         `json:"inputs"`
	Live       liveFigures                `json:"live"`
}

// readRequests simulates the requests of a file.
func (c *cli) readRequests(ctx context.Context, path string, seed uint64, s *simulation) error {
	in := c.in
	if path != "-" {
		f, err := os.Open(path)
		if err != nil {
			return fmt.Errorf("read requests: %w", err)
		}
		defer f.Close()
		in = f
	}
	lines := bufio.NewScanner(in)
	lines.Buffer(nil, maxRequestLine)
	rng := rand.New(rand.NewPCG(seed, 0))
	n, line := 0, 0
	for lines.Scan() {
		line++
		if len(bytes.TrimSpace(lines.Bytes())) == 0 {
			continue
		}
		if n++; n > maxSimulated || n > maxExplained && s.explain {
			return fmt.Errorf("%s has more than %d requests; with --totals, %d are allowed", path, n-1, maxSimulated)
		}
		at := fmt.Sprintf("%s: line %d", path, line)
		var r requestLine
		if err := strictJSON(lines.Bytes(), &r); err != nil {
			return fmt.Errorf("%s: %w", at, err)
		}
		if err := r.Live.check(at + ": live"); err != nil {
			return err
		}
		if len(r.Inputs) > maxRequestInputs {
			return fmt.Errorf("%s: inputs has %d entries, the limit is %d", at, len(r.Inputs), maxRequestInputs)
		}
		headers := texts{}
		for name, v := range r.Headers {
			headers[strings.ToLower(name)] = v
		}
		var inputs []tensor.Tensor
		for _, name := range slices.Sorted(maps.Keys(r.Inputs)) {
			inputs = append(inputs, tensor.Tensor{Name: name, Shape: r.Inputs[name]})
		}
		if r.ID == "" {
			r.ID = strconv.Itoa(n)
		}
		s.decide(r.ID, parameterTexts(r.Parameters), headers, inputs, r.Live, rng.Uint64())
		if err := ctx.Err(); err != nil {
			return err
		}
	}
	if err := lines.Err(); err != nil {
		return fmt.Errorf("%s: after line %d: %w (a line has %d bytes at most)", path, line, err, maxRequestLine)
	}
	if n == 0 {
		return fmt.Errorf("%s has no requests", path)
	}
	return nil
}

// parameterTexts gives parameters as rules see them: numbers as they are
// written, and no lists or objects.
func parameterTexts(all map[string]json.RawMessage) texts {
	texts := texts{}
	for name, raw := range all {
		switch raw[0] {
		case '{', '[', 'n':
		case '"':
			var s string
			if json.Unmarshal(raw, &s) == nil {
				texts[name] = s
			}
		default:
			texts[name] = string(raw)
		}
	}
	return texts
}

// texts are policy.Values in a map; names of headers are in lower case.
type texts map[string]string

func (w texts) Get(name string) (string, bool) { v, ok := w[name]; return v, ok }
func (w texts) All() iter.Seq2[string, string] { return maps.All(w) }

// simulation is what came out of one.
type simulation struct {
	Route    string      `json:"route"`
	Requests []simulated `json:"requests"`
	Totals   []total     `json:"totals"`

	policy  *policy.Policy
	labels  map[string]string
	figures liveFigures
	explain bool
	totals  totals
}

// simulated is one request, and where it would go.
type simulated struct {
	ID      string        `json:"id"`
	Rule    string        `json:"rule"`
	Target  string        `json:"target"`
	Why     string        `json:"why"`
	Seen    []seenRule    `json:"seen"`
	Request simulatedSeen `json:"request"`
}

func (s simulated) GetName() string { return s.ID }

// simulatedSeen is what rules could see of the request.
type simulatedSeen struct {
	Parameters map[string]string  `json:"parameters"`
	Headers    map[string]string  `json:"headers"`
	Inputs     map[string][]int64 `json:"inputs"`
}

type seenRule struct {
	Rule       string          `json:"rule"`
	Conditions []seenCondition `json:"conditions"`
}

type seenCondition struct {
	Kind  string   `json:"kind"`
	Name  string   `json:"name"`
	Value *string  `json:"value"` // null: it is not there
	Want  []string `json:"want,omitempty"`
	Holds bool     `json:"holds"`
	Fault string   `json:"fault,omitempty"`
}

func (s *simulation) makeUp(ctx context.Context, made *policy.Made, n int) error {
	for i := range n {
		parameters, headers, inputs, random := made.Next()
		s.decide(strconv.Itoa(i+1), parameters, headers, inputs, liveFigures{}, random)
		if err := ctx.Err(); err != nil {
			return err
		}
	}
	return nil
}

func (s *simulation) decide(id string, parameters, headers texts, inputs []tensor.Tensor, live liveFigures, random uint64) {
	q := &policy.Request{
		Parameters: parameters, Headers: headers, Inputs: inputs, Labels: s.labels,
		Live: func() policy.Figures { return live.over(s.figures) },
	}
	if !s.explain {
		s.totals.count(s.policy.Decide(q, random))
		return
	}
	e := s.policy.Explain(q, random)
	s.totals.count(e.Decision)
	r := simulated{
		ID: id, Rule: s.policy.RuleName(e.Rule), Target: targetText(e.Target), Why: why(e), Seen: []seenRule{},
		Request: simulatedSeen{parameters, headers, map[string][]int64{}},
	}
	for i := range inputs {
		r.Request.Inputs[inputs[i].Name] = inputs[i].Shape
	}
	for _, rule := range e.Rules {
		seen := seenRule{Rule: rule.Rule}
		for _, c := range rule.Conditions {
			to := seenCondition{Kind: c.Kind, Name: c.Name, Want: c.Want, Holds: c.Holds, Fault: c.Fault}
			if c.There {
				to.Value = new(c.Value)
			}
			seen.Conditions = append(seen.Conditions, to)
		}
		r.Seen = append(r.Seen, seen)
	}
	s.Requests = append(s.Requests, r)
}

func targetText(t policy.Target) string {
	if t.Version == 0 {
		return t.Model
	}
	return fmt.Sprintf("%s:%d", t.Model, t.Version)
}

// why says in short what a decision rests on: of each rule that was looked at
// what did not hold, of the one that decides all that does, and how one of its
// targets was chosen.
func why(e *policy.Explanation) string {
	var parts []string
	for i, rule := range e.Rules {
		if i == e.Rule {
			var all []string
			for _, c := range rule.Conditions {
				all = append(all, conditionText(c))
			}
			parts = append(parts, rule.Rule+": "+strings.Join(all, ", "))
			continue
		}
		parts = append(parts, "not "+rule.Rule+": "+conditionText(rule.Conditions[len(rule.Conditions)-1]))
	}
	if c := e.Choice; len(c.Options) > 1 {
		switch {
		case c.Stuck:
			parts = append(parts, fmt.Sprintf("by key: %s %s=%q", c.KeyKind, c.KeyName, c.Key))
		case c.KeyKind != "":
			parts = append(parts, fmt.Sprintf("no %s %s, by chance: %d of %d", c.KeyKind, c.KeyName, c.Point, c.Sum))
		default:
			parts = append(parts, fmt.Sprintf("by chance: %d of %d", c.Point, c.Sum))
		}
	}
	return strings.Join(parts, "; ")
}

func conditionText(c policy.Condition) string {
	switch {
	case c.Kind == "cel" && c.Fault != "":
		return "cel faults: " + c.Fault
	case c.Kind == "cel":
		return "cel is " + c.Value
	case !c.There:
		return "no " + c.Kind + " " + c.Name
	case c.Kind == "input":
		return "input " + c.Name + " has rows=" + c.Value
	}
	return fmt.Sprintf("%s %s=%q", c.Kind, c.Name, c.Value)
}

// totals count what each rule sent to each of its targets.
type totals struct {
	policy   *policy.Policy
	requests [][]int // by rule, the default first, and target
	faults   []int
	sum      int
}

// total is one line of them.
type total struct {
	Rule     string  `json:"rule"`
	Target   string  `json:"target"`
	Requests int     `json:"requests"`
	Share    float64 `json:"share"`
	// Faults are requests for which the rule could not be evaluated.
	Faults int `json:"faults"`
}

func newTotals(p *policy.Policy) totals {
	t := totals{policy: p, faults: make([]int, p.Rules()+1)}
	for i := -1; i < p.Rules(); i++ {
		t.requests = append(t.requests, make([]int, len(p.Targets(i))))
	}
	return t
}

func (t *totals) count(d policy.Decision) {
	t.sum++
	t.requests[d.Rule+1][slices.Index(t.policy.Targets(d.Rule), d.Target)]++
	for i := range t.policy.Rules() {
		if d.Faulted>>i&1 == 1 {
			t.faults[i+1]++
		}
	}
}

// list gives them in the order of the rules, the default last, those without
// requests too.
func (t *totals) list() []total {
	var all []total
	add := func(i int) {
		for j, to := range t.policy.Targets(i) {
			n := t.requests[i+1][j]
			all = append(all, total{t.policy.RuleName(i), targetText(to), n, float64(n) / float64(max(t.sum, 1)), t.faults[i+1]})
		}
	}
	for i := range t.policy.Rules() {
		add(i)
	}
	add(-1)
	return all
}

func (s *simulation) requestsTable() *table {
	t := &table{header: []string{"REQUEST", "RULE", "TARGET", "WHY"}}
	for _, r := range s.Requests {
		t.add(r.ID, r.Rule, r.Target, r.Why)
	}
	return t
}

func (s simulation) totalsTable() *table {
	t := &table{header: []string{"RULE", "TARGET", "REQUESTS", "SHARE", "FAULTS"}}
	for _, x := range s.Totals {
		t.add(x.Rule, x.Target, strconv.Itoa(x.Requests), fmt.Sprintf("%.2f%%", 100*x.Share), strconv.Itoa(x.Faults))
	}
	return t
}
