package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

func (c *cli) topCommand() *cobra.Command {
	var selector []string
	every := watchEvery
	cmd := &cobra.Command{
		Use:   "top [DEVICE]",
		Short: "Show what the fleet, or one device, does now",
		Long: `top shows the fleet by its figures: those with alarms first, then those with the
most requests; or of DEVICE its figures, GPUs and models: state, whether the
weights are in memory and what they take, requests and mean run time since the
agent's start. On a terminal it goes on, in place, as --every says, until an
interrupt; elsewhere it writes once, all of it. Figures of devices that are not
connected are not shown.`,
		Example: "  dunlin top\n  dunlin top -l site=demo\n  dunlin top cam-1",
		Args:    arguments(0, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			labels, err := parseLabels(selector)
			if err != nil {
				return err
			}
			if every < minWatchEvery || every > maxWatchEvery {
				return usagef("--every is %s, allowed are %s to %s", every, minWatchEvery, maxWatchEvery)
			}
			req := &dunlinv1.ListDevicesRequest{Selector: labels}
			if len(args) == 1 {
				req.Device = args[0]
			}
			ctl, err := c.client()
			if err != nil {
				return err
			}
			look := func(ctx context.Context) (tables, error) {
				res, err := call(ctx, ctl.devices().ListDevices, req)
				switch {
				case err != nil:
					return nil, err
				case req.Device == "":
					return fleetPage(time.Now(), res.GetDevices()), nil
				case len(res.GetDevices()) == 0:
					return nil, notFound("device", req.Device)
				}
				return devicePage(time.Now(), res.GetDevices()[0]), nil
			}
			if err := top(cmd.Context(), c.out, newLivePage(c.out), every, look); err != nil {
				return fmt.Errorf("top: %w", err)
			}
			return nil
		},
	}
	cmd.Flags().StringArrayVarP(&selector, "selector", "l", nil, "only devices with this label, KEY=VALUE (repeat for more)")
	cmd.Flags().DurationVar(&every, "every", every, "on a terminal: how often to look, 100ms to 1h")
	return cmd
}

// top shows what look gives, again and again until ctx ends where live is not
// nil. It outlives a controller that is away, and says so on the page.
func top(ctx context.Context, w io.Writer, live *livePage, every time.Duration, look func(context.Context) (tables, error)) error {
	var last tables
	for {
		begin := time.Now()
		p, err := look(ctx)
		took := time.Since(begin)
		switch {
		case live != nil && ctx.Err() != nil:
			return nil
		case err != nil && (last == nil || !away(err)):
			return err
		case live == nil:
			return p.write(w)
		case err != nil:
			live.show(append(tables{{header: []string{"The controller is away; this is what it said last."}}}, last...))
		default:
			last = p
			live.show(p)
		}
		t := time.NewTimer(max(every, watchShare*took))
		select {
		case <-ctx.Done():
			t.Stop()
			return nil
		case <-t.C:
		}
	}
}

func deviceState(d *dunlinv1.Device) string {
	switch {
	case d.GetIdentity().GetRevokedAt() != nil:
		return "revoked"
	case d.GetConnected():
		return "online"
	}
	return "offline"
}

// fleetPage sums devices up, and shows each: with alarms first, then by
// requests.
func fleetPage(now time.Time, devices []*dunlinv1.Device) tables {
	states := map[string]int{}
	alarms, requests, failures := 0, 0.0, 0.0
	for _, d := range devices {
		states[deviceState(d)]++
		if d.GetConnected() {
			alarms += len(d.GetTelemetry().GetAlarms())
			requests += d.GetTelemetry().GetRequestsPerSecond()
			failures += d.GetTelemetry().GetFailuresPerSecond()
		}
	}
	sum := &table{header: []string{"DEVICES", "ONLINE", "OFFLINE", "REVOKED", "ALARMS", "REQUESTS/S", "FAILURES/S"}}
	sum.add(fmt.Sprint(len(devices)), fmt.Sprint(states["online"]), fmt.Sprint(states["offline"]), fmt.Sprint(states["revoked"]), fmt.Sprint(alarms), fmt.Sprintf("%.3g", requests), fmt.Sprintf("%.3g", failures))
	sorted := slices.SortedStableFunc(slices.Values(devices), func(a, b *dunlinv1.Device) int {
		alarms := func(d *dunlinv1.Device) int {
			if !d.GetConnected() {
				return -1
			}
			return len(d.GetTelemetry().GetAlarms())
		}
		return cmp.Or(alarms(b)-alarms(a), cmp.Compare(b.GetTelemetry().GetRequestsPerSecond(), a.GetTelemetry().GetRequestsPerSecond()), cmp.Compare(a.GetName(), b.GetName()))
	})
	t := &table{header: append([]string{"NAME", "STATE", "LAST HEARD"}, figureHeader...)}
	for _, d := range sorted {
		t.add(append([]string{d.GetName(), deviceState(d), ago(now, d.GetLastHeardAt())}, figureCells(d)...)...)
	}
	return tables{sum, t}
}

var figureHeader = []string{"CPU", "MEMORY", "MODELS", "GPUS", "HOTTEST", "POWER", "REQUESTS/S", "FAILURES/S", "P99", "ALARMS"}

// figureCells are the newest figures of a device that is connected.
func figureCells(d *dunlinv1.Device) []string {
	cells := make([]string, len(figureHeader))
	s := d.GetTelemetry()
	if !d.GetConnected() || s == nil {
		return cells
	}
	of := func(used, total *uint64) string {
		switch {
		case used == nil:
			return ""
		case total == nil || *total == 0:
			return bytesText(int64(*used))
		}
		return bytesText(int64(*used)) + " of " + bytesText(int64(*total))
	}
	number := func(v *float64, format string) string {
		if v == nil {
			return ""
		}
		return fmt.Sprintf(format, *v)
	}
	if s.CpuUtilisation != nil {
		cells[0] = fmt.Sprintf("%.0f%%", 100*s.GetCpuUtilisation())
	}
	cells[1], cells[2] = of(s.MemoryUsedBytes, s.MemoryTotalBytes), of(s.ModelMemoryUsedBytes, s.ModelMemoryBudgetBytes)
	var gpus []string
	for _, g := range s.GetGpus() {
		if g.Utilisation != nil {
			gpus = append(gpus, fmt.Sprintf("%.0f%%", 100*g.GetUtilisation()))
		}
	}
	cells[3] = strings.Join(gpus, " ")
	if len(s.GetTemperatures()) > 0 {
		hot := slices.MaxFunc(s.GetTemperatures(), func(a, b *dunlinv1.Temperature) int { return cmp.Compare(a.GetCelsius(), b.GetCelsius()) })
		cells[4] = fmt.Sprintf("%.0f °C", hot.GetCelsius())
	}
	cells[5], cells[6], cells[7] = number(s.PowerWatts, "%.1f W"), number(s.RequestsPerSecond, "%.3g"), number(s.FailuresPerSecond, "%.3g")
	if s.RequestP99Seconds != nil {
		cells[8] = secondsText(s.GetRequestP99Seconds())
	}
	cells[9] = countText(uint32(len(s.GetAlarms())))
	return cells
}

// devicePage shows one device: its figures, GPUs, models and alarms.
func devicePage(now time.Time, d *dunlinv1.Device) tables {
	head := &table{header: append([]string{"NAME", "STATE", "LAST HEARD"}, figureHeader...)}
	head.add(append([]string{d.GetName(), deviceState(d), ago(now, d.GetLastHeardAt())}, figureCells(d)...)...)
	p := tables{head}
	s := d.GetTelemetry()
	if !d.GetConnected() {
		s = nil
	}
	if len(s.GetGpus()) > 0 {
		t := &table{header: []string{"GPU", "USE", "MEMORY", "POWER", "TEMPERATURE", "THROTTLED BY"}}
		for _, g := range s.GetGpus() {
			use, memory, power, heat := "", "", "", ""
			if g.Utilisation != nil {
				use = "[" + bar(10, 100, uint32(100*min(max(g.GetUtilisation(), 0), 1)), 0, 0) + "] " + fmt.Sprintf("%.0f%%", 100*g.GetUtilisation())
			}
			if g.MemoryUsedBytes != nil {
				memory = bytesText(int64(g.GetMemoryUsedBytes())) + " of " + bytesText(int64(g.GetMemoryTotalBytes()))
			}
			if g.PowerWatts != nil {
				power = fmt.Sprintf("%.1f W", g.GetPowerWatts())
			}
			if g.Celsius != nil {
				heat = fmt.Sprintf("%.0f °C", g.GetCelsius())
			}
			t.add(fmt.Sprint(g.GetIndex()), use, memory, power, heat, strings.Join(g.GetThrottleReasons(), ", "))
		}
		p = append(p, t)
	}
	figures := map[string]*dunlinv1.ModelTelemetry{}
	for _, m := range s.GetModels() {
		figures[fmt.Sprintf("%s:%d", m.GetModel(), m.GetVersion())] = m
	}
	t := &table{header: []string{"MODEL", "STATE", "SERVES", "WEIGHTS", "MEMORY", "NEEDS", "REQUESTS", "FAILED", "MEAN RUN", "REASON"}}
	for _, v := range d.GetReported().GetVersions() {
		ref := fmt.Sprintf("%s:%d", v.GetModel(), v.GetVersion())
		serves, weights, memory, needs, requests, failed, mean := "", "", "", "", "", "", ""
		if v.GetServing() {
			serves = "yes"
		}
		if m := figures[ref]; m != nil {
			weights = "out"
			if m.GetResident() {
				weights = "in memory"
			}
			memory, needs = sizeText(m.GetMemoryBytes()), sizeText(m.GetNeedBytes())
			requests, failed = fmt.Sprint(m.GetSucceeded()+m.GetFailed()), fmt.Sprint(m.GetFailed())
			if n := m.GetSucceeded(); n > 0 {
				mean = secondsText(float64(m.GetRunNanoseconds()) / float64(n) / 1e9)
			}
		}
		t.add(ref, enumText(v.GetState(), "VERSION_STATE_"), serves, weights, memory, needs, requests, failed, mean, v.GetReason())
	}
	p = append(p, t)
	if a := alarmsTable(now, []*dunlinv1.Device{{Name: d.GetName(), Telemetry: s}}); len(a.rows) > 0 {
		p = append(p, a)
	}
	return p
}
