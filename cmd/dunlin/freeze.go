package main

import (
	"fmt"
	"strings"
	"time"

	"github.com/goccy/go-yaml"
	"github.com/spf13/cobra"

	"github.com/dunlin/dunlin/models"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// wholeFleet is the name of a freeze that is given none and is of all devices.
const wholeFleet = "fleet"

func (c *cli) freezeCommand() *cobra.Command {
	var selector []string
	var reason, until string
	cmd := &cobra.Command{
		Use:   "freeze [NAME]",
		Short: "Let no change begin on some devices, or on all",
		Long: `freeze applies a Freeze: no change begins on the devices that it is of, and
rollouts that touch them say that they wait for it. What has begun goes on, and
devices go on serving. Without -l it is of the whole fleet. Without NAME it is
called "fleet", or after its labels. "dunlin unfreeze NAME" ends it.`,
		Example: "  dunlin freeze -l site=demo --reason 'stocktaking' --until 12h\n  dunlin freeze --reason 'end of the year' --until 2027-01-04T06:00:00Z",
		Args:    arguments(0, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			labels, err := parseLabels(selector)
			if err != nil {
				return err
			}
			if reason == "" {
				return usagef("--reason is missing: why, for those who wonder")
			}
			name := freezeName(labels)
			if len(args) == 1 {
				name = args[0]
			}
			if err := models.CheckName(name); err != nil {
				return usagef("%v; give it another NAME", err)
			}
			end, err := parseUntil(time.Now(), until)
			if err != nil {
				return err
			}
			document, err := freezeDocument(name, labels, reason, end)
			if err != nil {
				return err
			}
			ctl, err := c.client()
			if err != nil {
				return err
			}
			if len(labels) == 0 {
				if err := c.confirm(cmd.Context(), name, "this freezes the whole fleet"); err != nil {
					return err
				}
			}
			res, err := call(cmd.Context(), ctl.objects().Apply, &dunlinv1.ApplyRequest{Documents: document})
			if err != nil {
				return fmt.Errorf("freeze: %w", err)
			}
			for _, ch := range res.GetChanges() {
				c.printChange(ch, false)
			}
			return nil
		},
	}
	cmd.Flags().StringArrayVarP(&selector, "selector", "l", nil, "only devices with this label, KEY=VALUE (repeat for more)")
	cmd.Flags().StringVar(&reason, "reason", "", "why; at most 200 characters")
	cmd.Flags().StringVar(&until, "until", "", "when it ends by itself: a time like 2027-01-04T06:00:00Z, or so long from now, like 12h")
	return cmd
}

func (c *cli) unfreezeCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "unfreeze NAME",
		Short: "End a freeze",
		Args:  arguments(1, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctl, err := c.client()
			if err != nil {
				return err
			}
			if err := c.confirm(cmd.Context(), args[0], "this ends freeze %s: changes that wait for it begin", args[0]); err != nil {
				return err
			}
			res, err := call(cmd.Context(), ctl.objects().Delete, &dunlinv1.DeleteRequest{Kind: "Freeze", Name: args[0]})
			if err != nil {
				return fmt.Errorf("unfreeze: %w\nrun: dunlin get freezes", err)
			}
			c.printChange(res.GetChange(), false)
			return nil
		},
	}
}

// freezeName makes a name of labels: that of the values, or of the fleet.
func freezeName(labels map[string]string) string {
	if len(labels) == 0 {
		return wholeFleet
	}
	return strings.ToLower(strings.NewReplacer("=", "-", ",", "-", "/", "-").Replace(labelsText(labels)))
}

// parseUntil reads a time, or a duration from now on; "" is the zero time.
func parseUntil(now time.Time, text string) (time.Time, error) {
	if text == "" {
		return time.Time{}, nil
	}
	end, err := time.Parse(time.RFC3339, text)
	if d, derr := time.ParseDuration(text); derr == nil {
		end, err = now.Add(d), nil
	}
	switch {
	case err != nil:
		return end, usagef("--until %q is neither a time like 2027-01-04T06:00:00Z nor a duration like 12h", text)
	case !end.After(now):
		return end, usagef("--until %q has passed", text)
	}
	return end.UTC().Truncate(time.Second), nil
}

// freezeDocument writes what apply takes.
func freezeDocument(name string, labels map[string]string, reason string, until time.Time) (string, error) {
	spec := map[string]any{"selector": labels, "reason": reason}
	if !until.IsZero() {
		spec["until"] = until.Format(time.RFC3339)
	}
	b, err := yaml.MarshalWithOptions(map[string]any{
		"apiVersion": "dunlin/v1", "kind": "Freeze", "metadata": map[string]any{"name": name}, "spec": spec,
	}, yaml.JSON())
	return string(b), err
}
