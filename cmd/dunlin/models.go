package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/dunlin/dunlin/models"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

func (c *cli) modelCommand() *cobra.Command {
	remove := &cobra.Command{
		Use:   "delete NAME:VERSION",
		Short: "Delete a version of a model",
		Long: `delete takes a version away that nothing may come back to: it is refused while a
deployment or a route names it, the newest rollout of a deployment leads to it or
away from it, or a device should have it. Its number is not given again. Its files
leave the registry after the controller's --registry-grace-days, unless another
version has them too.`,
		Example: "  dunlin model delete digits:3",
		Args:    arguments(1, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			name, version, err := models.ParseRef(args[0])
			if err != nil {
				return usagef("%v", err)
			}
			if version == 0 {
				return usagef("%q names no version: NAME:VERSION", args[0])
			}
			ctl, err := c.client()
			if err != nil {
				return err
			}
			if err := c.confirm(cmd.Context(), args[0], "this deletes %s", args[0]); err != nil {
				return err
			}
			if _, err := call(cmd.Context(), ctl.models().DeleteVersion, &dunlinv1.DeleteVersionRequest{Model: name, Version: version}); err != nil {
				return fmt.Errorf("delete: %w", err)
			}
			fmt.Fprintf(c.out, "model/%s:%d deleted\n", name, version)
			return nil
		},
	}
	return group("model", "Manage models", remove)
}
