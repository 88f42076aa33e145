package main

import (
	"fmt"
	"runtime"

	"github.com/spf13/cobra"

	"github.com/dunlin/dunlin/internal/program"
)

func buildText() string {
	revision := program.Revision()
	if revision != "" {
		revision = " " + revision
	}
	return fmt.Sprintf("dunlin %s%s %s %s/%s", program.Version(), revision, runtime.Version(), runtime.GOOS, runtime.GOARCH)
}

func (c *cli) versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version of this program",
		Args:  arguments(0, 0),
		Run:   func(*cobra.Command, []string) { fmt.Fprintln(c.out, buildText()) },
	}
}
