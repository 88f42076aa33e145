package main

import (
	"fmt"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"

	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

func (c *cli) deviceCommand() *cobra.Command {
	remove := &cobra.Command{
		Use:   "remove NAME",
		Short: "Revoke a device's certificates and forget it",
		Args:  arguments(1, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctl, err := c.client()
			if err != nil {
				return err
			}
			if err := c.confirm(cmd.Context(), args[0], "this revokes and forgets device %s", args[0]); err != nil {
				return err
			}
			if _, err := call(cmd.Context(), ctl.devices().RemoveDevice, &dunlinv1.RemoveDeviceRequest{Device: args[0]}); err != nil {
				return fmt.Errorf("remove: %w", err)
			}
			fmt.Fprintf(c.out, "device/%s removed\n", args[0])
			return nil
		},
	}
	var reason string
	revoke := &cobra.Command{
		Use:   "revoke NAME",
		Short: "Revoke a device's certificates and end its sessions",
		Long: `revoke ends what the device may do, at once. Its record, labels and history stay:
with a join token for it (dunlin join-token create --device NAME) it joins again.`,
		Example: "  dunlin device revoke cam-1 --reason 'stolen from the shop'",
		Args:    arguments(1, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctl, err := c.client()
			if err != nil {
				return err
			}
			if err := c.confirm(cmd.Context(), args[0], "this revokes device %s", args[0]); err != nil {
				return err
			}
			if _, err := call(cmd.Context(), ctl.devices().RevokeDevice, &dunlinv1.RevokeDeviceRequest{Device: args[0], Reason: reason}); err != nil {
				return fmt.Errorf("revoke: %w", err)
			}
			fmt.Fprintf(c.out, "device/%s revoked\n", args[0])
			return nil
		},
	}
	revoke.Flags().StringVar(&reason, "reason", "", "why, for those who ask later")
	return group("device", "Manage devices", remove, revoke)
}

func (c *cli) joinTokenCommand() *cobra.Command {
	var uses uint32
	var validFor time.Duration
	var labelFlags []string
	var device string
	out := format("table")
	create := &cobra.Command{
		Use:   "create",
		Short: "Make a token with which devices join",
		Long: `create prints a join token, once: the controller keeps only its hash. It ends
with the fingerprint of the controller's certificate authority, by which the
device knows the controller. Give it to the agent on the device in a file:

  dunlin-agent --controller https://HOST:PORT --join-token @FILE

With --device, only that device may join with it: where one is known by that
name, it takes its place, and keeps its labels and history.`,
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
			ctl, err := c.client()
			if err != nil {
				return err
			}
			req := &dunlinv1.CreateJoinTokenRequest{Uses: uses, Labels: labels, Device: device}
			if cmd.Flags().Changed("valid-for") {
				req.ValidFor = durationpb.New(validFor)
			}
			res, err := call(cmd.Context(), ctl.enrollment().CreateJoinToken, req)
			if err != nil {
				return fmt.Errorf("create join token: %w", err)
			}
			if !out.tabular() {
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
	create.Flags().StringVar(&device, "device", "", "name of the only device that may join with it, also again")
	create.Flags().VarP(&out, "output", "o", "how to write it")
	remove := &cobra.Command{
		Use:   "delete ID",
		Short: "Take a join token back",
		Args:  arguments(1, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctl, err := c.client()
			if err != nil {
				return err
			}
			if err := c.confirm(cmd.Context(), args[0], "this takes join token %s back", args[0]); err != nil {
				return err
			}
			if _, err := call(cmd.Context(), ctl.enrollment().DeleteJoinToken, &dunlinv1.DeleteJoinTokenRequest{Id: args[0]}); err != nil {
				return fmt.Errorf("delete join token: %w", err)
			}
			fmt.Fprintf(c.out, "join-token/%s deleted\n", args[0])
			return nil
		},
	}
	return group("join-token", "Let devices join", create, remove)
}

func plural(n uint32, noun string) string {
	if n == 1 {
		return noun
	}
	return noun + "s"
}
