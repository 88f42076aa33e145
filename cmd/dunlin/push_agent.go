package main

import (
	"context"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"github.com/dunlin/dunlin/models"
	"github.com/dunlin/dunlin/models/signing"
)

func (c *cli) pushAgentCommand() *cobra.Command {
	var version int64
	cmd := &cobra.Command{
		Use:   "push-agent BINARY...",
		Short: "Push signed agent binaries and make them a release",
		Long: `push-agent packs the binaries of one version of the agent, one for each system,
with their signatures in BINARY.sig (see dunlin sign-agent), and makes them a
version of the model ` + models.AgentModel + `: a release, which a Deployment of that model rolls
out. The signatures say which version and which systems it is for; they must be
by an agent key of the trust document.

It prints "` + models.AgentModel + `:VERSION DIGEST".`,
		Example: "  dunlin push-agent bin/dunlin-agent bin/linux-arm64/dunlin-agent",
		Args:    arguments(1, 16),
		RunE: func(cmd *cobra.Command, args []string) error {
			if version < 0 || version > models.MaxVersion {
				return usagef("--number %d, allowed are 1 to %d", version, int64(models.MaxVersion))
			}
			return c.pushAgent(cmd.Context(), args, version)
		},
	}
	cmd.Flags().Int64Var(&version, "number", 0, "`VERSION` of the release in the registry; without it, the next one")
	return cmd
}

func (c *cli) pushAgent(ctx context.Context, files []string, number int64) error {
	version := ""
	var binaries []models.ReleaseBinary
	for _, file := range files {
		b, err := readBinary(file)
		if err != nil {
			return fmt.Errorf("push %s: %w", file, err)
		}
		if version != "" && b.Version != version {
			return fmt.Errorf("push %s: it is signed as version %s, %s as %s: a release has one", file, b.Version, files[0], version)
		}
		version = b.Version
		binaries = append(binaries, models.ReleaseBinary{OS: b.OS, Arch: b.Arch, Source: file, Signature: file + ".sig"})
	}
	ctl, err := c.client()
	if err != nil {
		return err
	}
	up, err := uploaderOf(ctx, ctl, models.AgentModel)
	if err != nil {
		return fmt.Errorf("push %s: %w", models.AgentModel, err)
	}
	bundle, err := models.PackRelease(ctx, version, binaries)
	if err != nil {
		return fmt.Errorf("pack release %s: %w", version, err)
	}
	if err := c.upload(ctx, up, bundle); err != nil {
		return fmt.Errorf("push %s: %w", models.AgentModel, err)
	}
	return c.register(ctx, ctl, models.AgentModel, number, bundle)
}

// readBinary reads from a binary's signature what it is, and refuses one that
// is of another file.
func readBinary(file string) (signing.Binary, error) {
	f, err := os.Open(file + ".sig")
	if err != nil {
		return signing.Binary{}, fmt.Errorf("%w: sign it with dunlin sign-agent", err)
	}
	defer f.Close()
	raw, err := io.ReadAll(io.LimitReader(f, signing.MaxSignatureBytes+1))
	if err != nil {
		return signing.Binary{}, err
	}
	s, err := signing.Parse(raw)
	if err != nil {
		return signing.Binary{}, fmt.Errorf("%s.sig: %w", file, err)
	}
	b, signed, err := s.Binary()
	if err != nil {
		return b, fmt.Errorf("%s.sig: %w", file, err)
	}
	sum, err := sumOf(file)
	if err == nil && sum != signed {
		err = fmt.Errorf("%s.sig is of a file with SHA-256 %x, this one has %x: sign it again", file, signed, sum)
	}
	return b, err
}
