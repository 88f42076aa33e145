package main

import (
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

func (c *cli) planCommand() *cobra.Command {
	var files []string
	out := format("table")
	cmd := &cobra.Command{
		Use:   "plan -f FILE|-|DIR",
		Short: "Show where deployments would fit",
		Long: `plan says for each deployment in the documents, and each device that it matches,
whether the version fits there, as if the documents were applied; nothing is.

  fits      in memory together with all else that the device should have
  swapping  in memory by itself, with all else by turns
  no        not at all: the device would not be given it
  unknown   the device, or the bundle, does not say

It shows what the version takes with its largest run, what all that the device
should have takes together, and the budget; the time and energy of a run of one
row; and where each comes from: measured here, measured on another device of
the same class, or estimated from the graph.

It exits 0 where nothing is refused, 1 where a version does not fit on a device,
2 on trouble.

` + documentsHelp,
		Example: "  dunlin plan -f digits.yaml",
		Args:    arguments(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			refused, err := c.plan(cmd, files, out)
			switch {
			case err != nil && exitCode(err) == exitError:
				return codeError{code: exitUsage, err: errors.New(message(err))}
			case err != nil:
				return err
			case refused:
				return codeError{code: exitError}
			}
			return nil
		},
	}
	cmd.Flags().StringArrayVarP(&files, "file", "f", nil, "file, - or folder with YAML documents")
	cmd.Flags().VarP(&out, "output", "o", "how to write it")
	return cmd
}

func (c *cli) plan(cmd *cobra.Command, files []string, f format) (refused bool, err error) {
	documents, _, err := c.readDocuments(files)
	if err != nil {
		return false, err
	}
	ctl, err := c.client()
	if err != nil {
		return false, err
	}
	res, err := call(cmd.Context(), ctl.profiles().Plan, &dunlinv1.PlanRequest{Documents: documents})
	if err != nil {
		return false, err
	}
	for _, p := range res.GetDevices() {
		refused = refused || p.GetVerdict() == dunlinv1.DevicePlan_VERDICT_DOES_NOT_FIT
	}
	return refused, c.print(f, res, func() *table { return planTable(res.GetDevices()) })
}

var verdictTexts = map[dunlinv1.DevicePlan_Verdict]string{
	dunlinv1.DevicePlan_VERDICT_UNSPECIFIED:        "unknown",
	dunlinv1.DevicePlan_VERDICT_FITS:               "fits",
	dunlinv1.DevicePlan_VERDICT_FITS_WITH_SWAPPING: "swapping",
	dunlinv1.DevicePlan_VERDICT_DOES_NOT_FIT:       "no",
}

var sourceTexts = map[dunlinv1.DevicePlan_Source]string{
	dunlinv1.DevicePlan_SOURCE_MEASURED_HERE:     "measured here",
	dunlinv1.DevicePlan_SOURCE_MEASURED_ON_CLASS: "measured on the class",
	dunlinv1.DevicePlan_SOURCE_ESTIMATED:         "estimated",
}

func planTable(plans []*dunlinv1.DevicePlan) *table {
	t := &table{header: []string{"DEPLOYMENT", "DEVICE", "MODEL", "FITS", "MEMORY", "TOGETHER", "BUDGET", "LATENCY", "ENERGY", "REASON"}}
	for _, p := range plans {
		from := func(value string, s dunlinv1.DevicePlan_Source) string {
			where := sourceTexts[s]
			if where == "" {
				return "" // nothing is known
			}
			if s == dunlinv1.DevicePlan_SOURCE_MEASURED_ON_CLASS && p.GetMeasuredOn() != "" {
				where = "measured on " + p.GetMeasuredOn()
			}
			return fmt.Sprintf("%s (%s)", value, where)
		}
		amount := func(n uint64) string {
			if n == 0 {
				return ""
			}
			return bytesText(int64(min(n, 1<<62)))
		}
		t.add(p.GetDeployment(), p.GetDevice(), fmt.Sprintf("%s:%d", p.GetModel(), p.GetVersion()), verdictTexts[p.GetVerdict()],
			from(amount(p.GetMemoryBytes()), p.GetMemorySource()), amount(p.GetTotalBytes()), amount(p.GetBudgetBytes()),
			from(secondsText(p.GetLatencySeconds()), p.GetLatencySource()), from(joulesText(p.GetJoules()), p.GetEnergySource()), p.GetReason())
	}
	return t
}

// secondsText writes a time with three digits: "1.25 ms".
func secondsText(s float64) string {
	if s <= 0 {
		return ""
	}
	for _, unit := range []struct {
		each float64
		name string
	}{{1, "s"}, {1e-3, "ms"}, {1e-6, "µs"}} {
		if s >= unit.each || unit.each == 1e-6 {
			return fmt.Sprintf("%.3g %s", s/unit.each, unit.name)
		}
	}
	return time.Duration(s * 1e9).String()
}

func joulesText(j float64) string {
	switch {
	case j <= 0:
		return ""
	case j < 1:
		return fmt.Sprintf("%.3g mJ", j*1e3)
	}
	return fmt.Sprintf("%.3g J", j)
}
