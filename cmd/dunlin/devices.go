package main

import (
	"fmt"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"

	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

func (c *cli) deviceCommand() *cobra.Command {
	return group("device", "Manage devices", &cobra.Command{
		Use:   "remove NAME",
		Short: "Take a device's credentials back and forget it",
		Args:  arguments(1, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctl, err := connectClient()
			if err != nil {
				return err
			}
			if _, err := call(cmd.Context(), ctl.devices().RemoveDevice, &dunlinv1.RemoveDeviceRequest{Device: args[0]}); err != nil {
				return fmt.Errorf("remove: %w", err)
			}
			fmt.Fprintf(c.out, "device/%s removed\n", args[0])
			return nil
		},
	})
}

func (c *cli) joinTokenCommand() *cobra.Command {
	var uses uint32
	var validFor time.Duration
	var labelFlags []string
	out := format("table")
	create := &cobra.Command{
		Use:   "create",
		Short: "Make a token with which devices join",
		Long: `create prints a join token, once: the controller keeps only its hash. Give it to
the agent on the device:

  dunlin-agent --controller URL --join-token @FILE`,
		Example: "  (umask 077; dunlin join-token create --uses 20 --valid-for 24h --label site=demo > join-token)",
		Args:    arguments(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			labels, err := parseLabels(labelFlags)
			if err != nil {
				return err
			}
			if uses == 0 { // which the API takes for its default
				return usagef("--uses is 0, allowed are 1 to 10000")
			}
			ctl, err := connectClient()
			if err != nil {
				return err
			}
			req := &dunlinv1.CreateJoinTokenRequest{Uses: uses, Labels: labels}
			if cmd.Flags().Changed("valid-for") {
				req.ValidFor = durationpb.New(validFor)
			}
			res, err := call(cmd.Context(), ctl.enrollment().CreateJoinToken, req)
			if err != nil {
				return fmt.Errorf("create join token: %w", err)
			}
			if out != "table" {
				return c.print(out, res, nil)
			}
			info := res.GetInfo()
			fmt.Fprintf(c.err, "Good for %d %s, until %s. It is shown only now.\n", info.GetUsesLeft(), plural(info.GetUsesLeft(), "device"), info.GetExpiresAt().AsTime().Local().Format(time.DateTime))
			fmt.Fprintln(c.out, res.GetJoinToken())
			return nil
		},
	}
	create.Flags().Uint32Var(&uses, "uses", 1, "how many devices may join with it, 1 to 10000")
	create.Flags().DurationVar(&validFor, "valid-for", time.Hour, "how long it is valid, up to 720h")
	create.Flags().StringArrayVar(&labelFlags, "label", nil, "label KEY=VALUE that each device gets that joins with it (repeat for more)")
	create.Flags().VarP(&out, "output", "o", "how to write it")
	return group("join-token", "Let devices join", create)
}

func plural(n uint32, noun string) string {
	if n == 1 {
		return noun
	}
	return noun + "s"
}
