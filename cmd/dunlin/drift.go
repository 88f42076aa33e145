package main

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/timestamppb"

	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

func (c *cli) driftCommand() *cobra.Command {
	out := format("table")
	var selector []string
	cmd := &cobra.Command{
		Use:   "drift [DEVICE]",
		Short: "Show what devices run that they should not",
		Long: `drift shows, for each device or only DEVICE, what is other than it should be:
versions, files, routes, settings, the agent and the runtime; since when, and what
is done about it. What shows "-" under REPAIR is reported only.`,
		Example: "  dunlin drift\n  dunlin drift -l site=demo -o json",
		Args:    arguments(0, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			labels, err := parseLabels(selector)
			if err != nil {
				return err
			}
			ctl, err := c.client()
			if err != nil {
				return err
			}
			req := &dunlinv1.ListDriftRequest{Selector: labels}
			if len(args) == 1 {
				req.Device = args[0]
			}
			res, err := call(cmd.Context(), ctl.devices().ListDrift, req)
			if err != nil {
				return fmt.Errorf("drift: %w", err)
			}
			return c.print(out, res, func() *table { return driftTable(time.Now(), res.GetDrifts()) })
		},
	}
	cmd.Flags().StringArrayVarP(&selector, "selector", "l", nil, "only devices with this label, KEY=VALUE (repeat for more)")
	cmd.Flags().VarP(&out, "output", "o", "how to write it")
	return cmd
}

func driftTable(now time.Time, drifts []*dunlinv1.DeviceDrift) *table {
	t := &table{header: []string{"DEVICE", "KIND", "SUBJECT", "WANT", "HAVE", "SINCE", "REPAIR"}}
	for _, d := range drifts {
		w := d.GetDrift()
		t.add(d.GetDevice(), w.GetKind(), w.GetSubject(), w.GetWant(), w.GetHave(), ago(now, w.GetSince()), w.GetRepair())
	}
	return t
}

func (c *cli) telemetryCommand() *cobra.Command {
	out := format("table")
	var since time.Duration
	var limit uint32
	cmd := &cobra.Command{
		Use:   "telemetry DEVICE",
		Short: "Show the kept samples of a device's figures",
		Long: `telemetry shows the samples of a device's figures that the controller keeps,
oldest first: of the last day, or --since so long ago. They get fewer as they get
older, and more than --limit are thinned out evenly. -o json and yaml have all
figures.`,
		Example: "  dunlin telemetry cam-1 --since 168h --limit 50",
		Args:    arguments(1, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if since <= 0 {
				return usagef("--since is a time above 0")
			}
			ctl, err := c.client()
			if err != nil {
				return err
			}
			res, err := call(cmd.Context(), ctl.devices().ListTelemetry, &dunlinv1.ListTelemetryRequest{
				Device: args[0], From: timestamppb.New(time.Now().Add(-since)), Limit: limit,
			})
			if err != nil {
				return fmt.Errorf("telemetry: %w", err)
			}
			return c.print(out, res, func() *table { return telemetryTable(res.GetSamples()) })
		},
	}
	cmd.Flags().DurationVar(&since, "since", 24*time.Hour, "samples of so long ago and later")
	cmd.Flags().Uint32Var(&limit, "limit", 0, "the most samples to show, 1 to 2000 (default 500)")
	cmd.Flags().VarP(&out, "output", "o", "how to write it")
	return cmd
}

func telemetryTable(samples []*dunlinv1.Telemetry) *table {
	t := &table{header: []string{"AT", "CPU", "MEMORY", "MODELS", "DISK FREE", "HOTTEST", "POWER", "REQUESTS/S", "FAILURES/S", "P99", "ALARMS"}}
	text := func(v *float64, format string) string {
		if v == nil {
			return ""
		}
		return fmt.Sprintf(format, *v)
	}
	bytes := func(n *uint64) string {
		if n == nil {
			return ""
		}
		return bytesText(int64(*n))
	}
	for _, s := range samples {
		share := ""
		if s.CpuUtilisation != nil {
			share = fmt.Sprintf("%.0f%%", 100*s.GetCpuUtilisation())
		}
		hottest, p99, alarms := "", "", ""
		if len(s.GetTemperatures()) > 0 {
			hot := slices.MaxFunc(s.GetTemperatures(), func(a, b *dunlinv1.Temperature) int { return cmp.Compare(a.GetCelsius(), b.GetCelsius()) })
			hottest = fmt.Sprintf("%.0f °C", hot.GetCelsius())
		}
		if s.RequestP99Seconds != nil {
			p99 = secondsText(s.GetRequestP99Seconds())
		}
		if n := len(s.GetAlarms()); n > 0 {
			alarms = fmt.Sprint(n)
		}
		t.add(s.GetAt().AsTime().Local().Format(time.DateTime), share, bytes(s.MemoryUsedBytes), bytes(s.ModelMemoryUsedBytes), bytes(s.DiskFreeBytes), hottest,
			text(s.PowerWatts, "%.1f W"), text(s.RequestsPerSecond, "%.3g"), text(s.FailuresPerSecond, "%.3g"), p99, alarms)
	}
	return t
}
