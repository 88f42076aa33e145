package main

import (
	"cmp"
	"fmt"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

const (
	roleUsage  = "viewer, operator or admin"
	scopeUsage = "label KEY=VALUE that devices must have (repeat for more)"
)

func (c *cli) userCommand() *cobra.Command {
	return group("user", "Manage the users of the controller", c.userCreate(), c.userUpdate(), c.userDelete(), c.userList())
}

func (c *cli) userCreate() *cobra.Command {
	var role string
	var scopeFlags []string
	var withPassword bool
	cmd := &cobra.Command{
		Use:   "create NAME --role ROLE",
		Short: "Add a user",
		Long: `create adds a user with a role and, by --scope, for a part of the fleet only.

With --password the user has a password, of 12 characters or more, which comes
from standard input or a prompt. Without it the user has tokens only.`,
		Example: "  dunlin user create ada --role operator --scope site=berlin --password",
		Args:    arguments(1, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if role == "" {
				return usagef("--role is missing: %s", roleUsage)
			}
			scope, err := parseLabels(scopeFlags)
			if err != nil {
				return err
			}
			ctl, err := c.client()
			if err != nil {
				return err
			}
			req := &dunlinv1.CreateUserRequest{Name: args[0], Role: role, Scope: scope}
			if withPassword {
				if req.Password, err = c.newPassword(cmd.Context(), "Password of "+args[0]+": "); err != nil {
					return err
				}
			}
			if _, err := call(cmd.Context(), ctl.users().CreateUser, req); err != nil {
				return fmt.Errorf("create user: %w", err)
			}
			fmt.Fprintf(c.out, "user/%s created\n", args[0])
			return nil
		},
	}
	cmd.Flags().StringVar(&role, "role", "", roleUsage)
	cmd.Flags().StringArrayVar(&scopeFlags, "scope", nil, scopeUsage)
	cmd.Flags().BoolVar(&withPassword, "password", false, "read a password for the user")
	return cmd
}

func (c *cli) userUpdate() *cobra.Command {
	var role string
	var scopeFlags []string
	var withPassword, noPassword, wholeFleet bool
	cmd := &cobra.Command{
		Use:     "update NAME",
		Short:   "Change the role, scope or password of a user",
		Long:    "update changes what is given and leaves the rest. Tokens never allow more than\ntheir user may, from now on.",
		Example: "  dunlin user update ada --role viewer --whole-fleet",
		Args:    arguments(1, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			req := &dunlinv1.UpdateUserRequest{Name: args[0]}
			err := cmp.Or(exclusive(cmd, "scope", "whole-fleet"), exclusive(cmd, "password", "no-password"))
			if err != nil {
				return err
			}
			if req.Scope, err = parseLabels(scopeFlags); err != nil {
				return err
			}
			req.SetScope = wholeFleet || len(req.Scope) > 0
			if cmd.Flags().Changed("role") {
				req.Role = &role
			}
			if req.Role == nil && !req.SetScope && !withPassword && !noPassword {
				return usagef("nothing to change: give --role, --scope, --whole-fleet, --password or --no-password")
			}
			ctl, err := c.client()
			if err != nil {
				return err
			}
			switch {
			case noPassword:
				req.Password = new("")
			case withPassword:
				password, err := c.newPassword(cmd.Context(), "New password of "+args[0]+": ")
				if err != nil {
					return err
				}
				req.Password = &password
			}
			if _, err := call(cmd.Context(), ctl.users().UpdateUser, req); err != nil {
				return fmt.Errorf("update user: %w", err)
			}
			fmt.Fprintf(c.out, "user/%s changed\n", args[0])
			return nil
		},
	}
	cmd.Flags().StringVar(&role, "role", "", roleUsage)
	cmd.Flags().StringArrayVar(&scopeFlags, "scope", nil, scopeUsage)
	cmd.Flags().BoolVar(&wholeFleet, "whole-fleet", false, "take the scope away")
	cmd.Flags().BoolVar(&withPassword, "password", false, "read a new password")
	cmd.Flags().BoolVar(&noPassword, "no-password", false, "take the password away")
	return cmd
}

func (c *cli) userDelete() *cobra.Command {
	return &cobra.Command{
		Use:   "delete NAME",
		Short: "Take a user and all of its tokens away",
		Args:  arguments(1, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctl, err := c.client()
			if err != nil {
				return err
			}
			if err := c.confirm(cmd.Context(), args[0], "this deletes user %s and all tokens of it", args[0]); err != nil {
				return err
			}
			if _, err := call(cmd.Context(), ctl.users().DeleteUser, &dunlinv1.DeleteUserRequest{Name: args[0]}); err != nil {
				return fmt.Errorf("delete user: %w", err)
			}
			fmt.Fprintf(c.out, "user/%s deleted\n", args[0])
			return nil
		},
	}
}

func (c *cli) userList() *cobra.Command {
	out := format("table")
	cmd := &cobra.Command{
		Use:   "list",
		Short: "Show the users",
		Args:  arguments(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctl, err := c.client()
			if err != nil {
				return err
			}
			res, err := call(cmd.Context(), ctl.users().ListUsers, &dunlinv1.ListUsersRequest{})
			if err != nil {
				return fmt.Errorf("list users: %w", err)
			}
			return c.print(out, res, func() *table {
				t := &table{header: []string{"NAME", "ROLE", "SCOPE", "SIGNS IN BY", "CREATED"}}
				for _, u := range res.GetUsers() {
					by := "token"
					switch {
					case u.GetExternal():
						by = "OpenID Connect"
					case u.GetHasPassword():
						by = "password"
					}
					t.add(u.GetName(), u.GetRole(), labelsText(u.GetScope()), by, dateText(u.GetCreatedAt()))
				}
				return t
			})
		},
	}
	cmd.Flags().VarP(&out, "output", "o", "how to write it")
	return cmd
}

func (c *cli) tokenCommand() *cobra.Command {
	return group("token", "Manage API tokens", c.tokenCreate(), c.tokenDelete(), c.tokenList())
}

func (c *cli) tokenCreate() *cobra.Command {
	var req dunlinv1.CreateTokenRequest
	var scopeFlags []string
	var validFor time.Duration
	out := format("table")
	cmd := &cobra.Command{
		Use:   "create",
		Short: "Make an API token",
		Long: `create prints a token, once: the controller keeps only its hash. It is for
programs that call the API, in DUNLIN_TOKEN or as "Authorization: Bearer TOKEN".
It allows no more than its user may, by --role and --scope less.`,
		Example: "  dunlin token create --role viewer --valid-for 720h --comment grafana",
		Args:    arguments(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			var err error
			if req.Scope, err = parseLabels(scopeFlags); err != nil {
				return err
			}
			if cmd.Flags().Changed("valid-for") {
				req.ValidFor = durationpb.New(validFor)
			}
			ctl, err := c.client()
			if err != nil {
				return err
			}
			res, err := call(cmd.Context(), ctl.users().CreateToken, &req)
			if err != nil {
				return fmt.Errorf("create token: %w", err)
			}
			if !out.tabular() {
				return c.print(out, res, nil)
			}
			info := res.GetInfo()
			fmt.Fprintf(c.err, "Token %s of %s, good until %s. It is shown only now.\n", info.GetId(), plain(info.GetUser()), dateText(info.GetExpiresAt()))
			fmt.Fprintln(c.out, res.GetToken())
			return nil
		},
	}
	cmd.Flags().StringVar(&req.User, "user", "", "whose it is; you, where it is not given")
	cmd.Flags().StringVar(&req.Role, "role", "", roleUsage+"; the user's, where it is not given")
	cmd.Flags().StringArrayVar(&scopeFlags, "scope", nil, scopeUsage)
	cmd.Flags().DurationVar(&validFor, "valid-for", 90*24*time.Hour, "how long it is valid, up to 8760h")
	cmd.Flags().StringVar(&req.Comment, "comment", "", "what it is for")
	cmd.Flags().VarP(&out, "output", "o", "how to write it")
	return cmd
}

func (c *cli) tokenDelete() *cobra.Command {
	return &cobra.Command{
		Use:   "delete ID",
		Short: "Take an API token back",
		Args:  arguments(1, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctl, err := c.client()
			if err != nil {
				return err
			}
			if err := c.confirm(cmd.Context(), args[0], "this takes token %s back", args[0]); err != nil {
				return err
			}
			if _, err := call(cmd.Context(), ctl.users().DeleteToken, &dunlinv1.DeleteTokenRequest{Id: args[0]}); err != nil {
				return fmt.Errorf("delete token: %w", err)
			}
			fmt.Fprintf(c.out, "token/%s deleted\n", args[0])
			return nil
		},
	}
}

func (c *cli) tokenList() *cobra.Command {
	var user string
	out := format("table")
	cmd := &cobra.Command{
		Use:   "list",
		Short: "Show your API tokens, or, for an administrator, everybody's",
		Args:  arguments(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctl, err := c.client()
			if err != nil {
				return err
			}
			res, err := call(cmd.Context(), ctl.users().ListTokens, &dunlinv1.ListTokensRequest{User: user})
			if err != nil {
				return fmt.Errorf("list tokens: %w", err)
			}
			return c.print(out, res, func() *table {
				t := &table{header: []string{"ID", "USER", "ROLE", "SCOPE", "EXPIRES", "LAST USED", "COMMENT"}}
				for _, k := range res.GetTokens() {
					expires := dateText(k.GetExpiresAt())
					if k.GetExpiresAt() == nil {
						expires = "never"
					}
					t.add(k.GetId(), k.GetUser(), k.GetRole(), labelsText(k.GetScope()), expires, dateText(k.GetLastUsedAt()), k.GetComment())
				}
				return t
			})
		},
	}
	cmd.Flags().StringVar(&user, "user", "", "only those of this user")
	cmd.Flags().VarP(&out, "output", "o", "how to write it")
	return cmd
}

// dateText writes a time as this machine's clock shows it; unset is "".
func dateText(t *timestamppb.Timestamp) string {
	if t == nil {
		return ""
	}
	return t.AsTime().Local().Format(time.DateTime)
}
