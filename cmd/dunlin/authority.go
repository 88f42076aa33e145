package main

import (
	"context"
	"crypto/x509"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/dunlin/dunlin/internal/pki"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// authorityCommand manages the controller's certificate authorities.
func (c *cli) authorityCommand() *cobra.Command {
	out := format("table")
	list := &cobra.Command{
		Use:   "list",
		Short: "Show the controller's certificate authorities",
		Args:  arguments(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			res, err := c.listAuthorities(cmd.Context(), "list")
			if err != nil {
				return err
			}
			return c.print(out, res, func() *table { return authoritiesTable(res.GetAuthorities()) })
		},
	}
	list.Flags().VarP(&out, "output", "o", "how to write it")
	show := &cobra.Command{
		Use:   "show",
		Short: "Print the certificates of the authorities, PEM",
		Args:  arguments(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			res, err := c.listAuthorities(cmd.Context(), "show")
			if err != nil {
				return err
			}
			for _, a := range res.GetAuthorities() {
				cert, err := x509.ParseCertificate(a.GetCertificate())
				if err != nil {
					return fmt.Errorf("authority %s: %w", a.GetId(), err)
				}
				fmt.Fprintf(c.out, "%s", pki.EncodeCertificates(cert))
			}
			return nil
		},
	}
	rotate := &cobra.Command{
		Use:   "rotate",
		Short: "Make a new certificate authority, which issues from now on",
		Long: `rotate makes a new authority, for which the present ones vouch: devices that know
only those connect as before, and are told to renew. The old one counts until
it is retired.`,
		Args: arguments(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctl, err := c.client()
			if err != nil {
				return err
			}
			if err := c.confirm(cmd.Context(), hostName(ctl.URL), "this makes a new authority for all devices of %s", hostName(ctl.URL)); err != nil {
				return err
			}
			res, err := call(cmd.Context(), ctl.trust().RotateAuthority, &dunlinv1.RotateAuthorityRequest{})
			if err != nil {
				return fmt.Errorf("rotate: %w", err)
			}
			fmt.Fprintf(c.out, "authority/%s issues from now on\n", res.GetAuthority().GetId())
			return nil
		},
	}
	var force bool
	retire := &cobra.Command{
		Use:   "retire ID",
		Short: "Take an old certificate authority out",
		Long: `retire ends what an authority that issues no more vouches for. It is refused while
a device has a valid certificate of it, or does not know its successor; with
--force such devices have to join again.`,
		Args: arguments(1, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctl, err := c.client()
			if err != nil {
				return err
			}
			if err := c.confirm(cmd.Context(), args[0], "this takes authority %s out", args[0]); err != nil {
				return err
			}
			if _, err := call(cmd.Context(), ctl.trust().RetireAuthority, &dunlinv1.RetireAuthorityRequest{Id: args[0], Force: force}); err != nil {
				return fmt.Errorf("retire: %w", err)
			}
			fmt.Fprintf(c.out, "authority/%s retired\n", args[0])
			return nil
		},
	}
	retire.Flags().BoolVar(&force, "force", false, "also where devices have to join again")
	return group("authority", "Manage the controller's certificate authorities", list, show, rotate, retire)
}

// authorities asks for the controller's, for a verb.
func (c *cli) listAuthorities(ctx context.Context, verb string) (*dunlinv1.GetAuthoritiesResponse, error) {
	ctl, err := c.client()
	if err != nil {
		return nil, err
	}
	res, err := call(ctx, ctl.trust().GetAuthorities, &dunlinv1.GetAuthoritiesRequest{})
	if err != nil {
		return nil, fmt.Errorf("%s authorities: %w", verb, err)
	}
	return res, nil
}

func authoritiesTable(all []*dunlinv1.Authority) *table {
	t := &table{header: []string{"ID", "STATE", "DEVICES", "UNTIL"}}
	for _, a := range all {
		state := "counts"
		if a.GetActive() {
			state = "issues"
		}
		until := "?"
		if cert, err := x509.ParseCertificate(a.GetCertificate()); err == nil {
			until = cert.NotAfter.Format("2006-01-02")
		}
		t.add(strings.ToLower(a.GetId()), state, fmt.Sprint(a.GetDevices()), until)
	}
	return t
}
