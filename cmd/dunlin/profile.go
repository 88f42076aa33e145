package main

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"html/template"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/proto"

	"github.com/dunlin/dunlin/internal/plot"
	"github.com/dunlin/dunlin/models"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// figureFormat is how a profile is written: the value of its -o.
type figureFormat string

func (f *figureFormat) String() string { return string(*f) }
func (f *figureFormat) Type() string   { return "table|json|svg|html" }

func (f *figureFormat) Set(s string) error {
	switch s {
	case "table", "json", "svg", "html":
		*f = figureFormat(s)
		return nil
	}
	return fmt.Errorf("%q is none of table, json, svg, html", s)
}

func (c *cli) profileCommand() *cobra.Command {
	var device, file string
	out := figureFormat("table")
	cmd := &cobra.Command{
		Use:   "profile MODEL[:VERSION] --device D",
		Short: "Show what a device measured of a model",
		Long: `profile shows what a device has measured of a version of a model, the newest one
that it measured unless VERSION says otherwise: what it takes of the memory, how
long its runs last and how many rows it does in a second by batch and setting,
and the setting that is recommended, marked with *.

-o svg draws it, -o html writes a page with the drawing and the figures that
needs nothing else.`,
		Example: "  dunlin profile digits --device cam-1\n  dunlin profile digits:2 --device cam-1 -o html -f digits.html",
		Args:    arguments(1, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			model, version, err := models.ParseRef(args[0])
			if err != nil {
				return usagef("%v", err)
			}
			if device == "" {
				return usagef("--device is missing: the device that measured")
			}
			ctl, err := c.client()
			if err != nil {
				return err
			}
			p, err := findProfile(cmd.Context(), ctl, model, version, device)
			if err != nil {
				return fmt.Errorf("profile %s: %w", args[0], err)
			}
			b, err := renderProfile(out, device, p)
			if err != nil {
				return err
			}
			if file != "" && file != "-" {
				if err := os.WriteFile(file, b, 0o666); err != nil {
					return fmt.Errorf("write the profile: %w", err)
				}
				return nil
			}
			_, err = c.out.Write(b)
			return err
		},
	}
	cmd.Flags().StringVar(&device, "device", "", "the device that measured")
	cmd.Flags().VarP(&out, "output", "o", "how to write it")
	cmd.Flags().StringVarP(&file, "file", "f", "", "write it to this file instead of standard output")
	return cmd
}

// findProfile gives the profile of the newest version that the device has measured.
func findProfile(ctx context.Context, ctl *client, model string, version int64, device string) (*dunlinv1.ModelProfile, error) {
	res, err := call(ctx, ctl.profiles().ListProfiles, &dunlinv1.ListProfilesRequest{Model: model, Version: version, Device: device})
	if err != nil {
		return nil, err
	}
	var found *dunlinv1.ModelProfile
	for _, p := range res.GetProfiles() {
		if found == nil || p.GetProfile().GetVersion() >= found.GetVersion() {
			found = p.GetProfile()
		}
	}
	if found == nil {
		return nil, fmt.Errorf("device %s has not measured it\nrun: dunlin get profiles %s", device, model)
	}
	return found, nil
}

func renderProfile(f figureFormat, device string, p *dunlinv1.ModelProfile) ([]byte, error) {
	var b bytes.Buffer
	switch f {
	case "json":
		return messageJSON(&dunlinv1.DeviceProfile{Device: device, Profile: p})
	case "svg":
		return plot.Profile(device, p).SVG(), nil
	case "html":
		err := page.Execute(&b, struct {
			Title  string
			Figure template.HTML // of plot, which escapes all text in it
			Facts  [][2]string
			Points *table
		}{fmt.Sprintf("%s:%d on %s", p.GetModel(), p.GetVersion(), device), template.HTML(plot.Profile(device, p).SVG()), profileFacts(device, p), pointsTable(p)})
		if err != nil {
			return nil, fmt.Errorf("write the page: %w", err)
		}
		return b.Bytes(), nil
	}
	for _, f := range profileFacts(device, p) {
		fmt.Fprintf(&b, "%-13s %s\n", f[0], plain(f[1]))
	}
	b.WriteByte('\n')
	if err := pointsTable(p).write(&b); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}

var page = template.Must(template.New("profile").Funcs(template.FuncMap{"header": func(t *table) []string { return t.header }, "rows": func(t *table) [][]string { return t.rows }}).Parse(`<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{.Title}}</title>
<style>
body { font-family: system-ui, sans-serif; color: #222; background: #fff; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; }
svg { max-width: 100%; height: auto; }
figure { margin: 1rem 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; }
th, td { text-align: left; padding: .25rem .75rem .25rem 0; border-bottom: 1px solid #ddd; white-space: nowrap; }
</style>
</head>
<body>
<h1>{{.Title}}</h1>
<figure>
{{.Figure}}</figure>
<h2>What was measured</h2>
<div class="wide"><table>
{{range .Facts}}<tr><th scope="row">{{index . 0}}</th><td>{{index . 1}}</td></tr>
{{end}}</table></div>
<h2>By setting</h2>
<div class="wide"><table>
<tr>{{range header .Points}}<th scope="col">{{.}}</th>{{end}}</tr>
{{range rows .Points}}<tr>{{range .}}<td>{{.}}</td>{{end}}</tr>
{{end}}</table></div>
</body>
</html>
`))

// profileFacts are a profile's figures that are not by setting.
func profileFacts(device string, p *dunlinv1.ModelProfile) [][2]string {
	var facts [][2]string
	add := func(name, value string) {
		if value != "" {
			facts = append(facts, [2]string{name, value})
		}
	}
	add("model", fmt.Sprintf("%s:%d", p.GetModel(), p.GetVersion()))
	add("device", strings.TrimSpace(device+" "+p.GetCpuModel()))
	add("class", p.GetFirmwareProfile())
	runtime := p.GetRuntimeVersion()
	if p.GetDriverVersion() != "" {
		runtime += ", driver " + p.GetDriverVersion()
	}
	add("runtime", runtime)
	if p.GetMeasuredAt() != nil {
		add("measured", fmt.Sprintf("%s, in %.3g s", p.GetMeasuredAt().AsTime().UTC().Format(time.DateTime+" UTC"), p.GetMeasuredSeconds()))
	}
	add("weights", bytesText(int64(p.GetWeightBytes())))
	add("session", bytesText(int64(p.GetSessionBytes())))
	if n := p.GetPrepackedBytes(); n > 0 {
		add("prepacked", bytesText(int64(n)))
	}
	add("workspace", fmt.Sprintf("%s, and %s for each row", bytesText(int64(p.GetWorkspaceFixedBytes())), bytesText(int64(p.GetWorkspaceRowBytes()))))
	if cold, warm := secondsText(p.GetActivationColdSeconds()), secondsText(p.GetActivationWarmSeconds()); cold+warm != "" {
		add("activation", fmt.Sprintf("%s from disk, %s from memory", cmp.Or(cold, "unknown"), cmp.Or(warm, "unknown")))
	}
	if r := p.GetRecommended(); r != nil {
		add("recommended", fmt.Sprintf("batch %d, %d at a time, %s, %s", r.GetBatch(), max(r.GetInstances(), 1), threadsText(r), r.GetProvider()))
	}
	for _, check := range p.GetProviders() {
		verdict := "accepted"
		if !check.GetAccepted() {
			verdict = "refused: " + check.GetReason()
		}
		add("outputs", fmt.Sprintf("%s %s, off by %.3g at most", check.GetProvider(), verdict, check.GetMaxAbsoluteError()))
	}
	add("unmeasured", p.GetUnmeasured())
	return facts
}

func threadsText(s *dunlinv1.ModelSetting) string {
	switch s.GetThreads() {
	case 0:
		return "shared threads"
	case 1:
		return "1 thread"
	}
	return fmt.Sprintf("%d threads", s.GetThreads())
}

func pointsTable(p *dunlinv1.ModelProfile) *table {
	t := &table{header: []string{"", "PROVIDER", "BATCH", "INSTANCES", "THREADS", "PREPACKED", "RUNS", "P50", "P95", "P99", "ROWS/S", "PEAK", "ENERGY/ROW"}}
	for _, q := range p.GetPoints() {
		s := q.GetSetting()
		mark := " "
		if proto.Equal(s, p.GetRecommended()) {
			mark = "*"
		}
		threads, peak := fmt.Sprint(s.GetThreads()), ""
		if s.GetThreads() == 0 {
			threads = "shared"
		}
		if q.PeakBytes != nil {
			peak = bytesText(int64(min(q.GetPeakBytes(), 1<<62)))
		}
		t.add(mark, s.GetProvider(), fmt.Sprint(s.GetBatch()), fmt.Sprint(max(s.GetInstances(), 1)), threads, map[bool]string{true: "yes", false: "no"}[s.GetPrepacked()],
			fmt.Sprint(q.GetRuns()), secondsText(q.GetP50Seconds()), secondsText(q.GetP95Seconds()), secondsText(q.GetP99Seconds()), fmt.Sprintf("%.4g", q.GetRowsPerSecond()), peak, joulesText(q.GetJoulesPerRow()))
	}
	return t
}

func listProfiles(ctx context.Context, ctl *client, q query) (view, error) {
	req := &dunlinv1.ListProfilesRequest{Device: q.device, FirmwareProfile: q.class}
	if q.name != "" {
		var err error
		if req.Model, req.Version, err = models.ParseRef(q.name); err != nil {
			return view{}, usagef("%v", err)
		}
	}
	res, err := call(ctx, ctl.profiles().ListProfiles, req)
	if err != nil {
		return view{}, err
	}
	v := viewOf(res, func() *table { return profilesTable(time.Now(), res.GetProfiles()) })
	for _, d := range res.GetProfiles() {
		v.keys = append(v.keys, fmt.Sprintf("%s:%d on %s", d.GetProfile().GetModel(), d.GetProfile().GetVersion(), d.GetDevice()))
	}
	return v, nil
}

func profilesTable(now time.Time, profiles []*dunlinv1.DeviceProfile) *table {
	t := &table{header: []string{"MODEL", "DEVICE", "CLASS", "WEIGHTS", "SESSION", "WORKSPACE/ROW", "BATCH", "INSTANCES", "PROVIDER", "P50", "P99", "ROWS/S", "ENERGY/ROW", "MEASURED"}}
	for _, d := range profiles {
		p := d.GetProfile()
		r := p.GetRecommended()
		batch, instances, rate := "", "", ""
		if r != nil {
			batch, instances = fmt.Sprint(r.GetBatch()), fmt.Sprint(max(r.GetInstances(), 1))
		}
		var best *dunlinv1.ProfilePoint // measured with the recommended setting
		for _, q := range p.GetPoints() {
			if proto.Equal(q.GetSetting(), r) {
				best = q
			}
		}
		if best != nil {
			rate = fmt.Sprintf("%.4g", best.GetRowsPerSecond())
		}
		t.add(fmt.Sprintf("%s:%d", p.GetModel(), p.GetVersion()), d.GetDevice(), p.GetFirmwareProfile(), bytesText(int64(p.GetWeightBytes())), bytesText(int64(p.GetSessionBytes())),
			bytesText(int64(p.GetWorkspaceRowBytes())), batch, instances, r.GetProvider(), secondsText(best.GetP50Seconds()), secondsText(best.GetP99Seconds()), rate,
			joulesText(best.GetJoulesPerRow()), ago(now, p.GetMeasuredAt()))
	}
	return t
}
