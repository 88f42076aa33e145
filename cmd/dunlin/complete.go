package main

import (
	"context"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// completeTimeout bounds how long a shell waits for names.
const completeTimeout = time.Second

// lister gives the names that an argument may have; before are those before it.
// It says nothing where it cannot.
type lister func(c *cli, ctx context.Context, before []string) []string

// listed are the names of the things of a kind that get knows.
func listed(kindName string) lister {
	return func(c *cli, ctx context.Context, _ []string) []string {
		k, err := findKind(kindName)
		if err != nil {
			return nil
		}
		ctl, err := c.client()
		if err != nil {
			return nil
		}
		v, err := k.list(ctx, ctl, query{})
		if err != nil {
			return nil
		}
		var names []string
		for _, item := range v.items {
			names = append(names, nameOf(item))
		}
		return names
	}
}

// modelNames are those of models, without versions.
func modelNames(c *cli, ctx context.Context, _ []string) []string {
	var names []string
	for _, ref := range listed("models")(c, ctx, nil) {
		name, _, _ := strings.Cut(ref, ":")
		names = append(names, name)
	}
	return names
}

// modelsAndVersions are both.
func modelsAndVersions(c *cli, ctx context.Context, _ []string) []string {
	var names []string
	for _, ref := range listed("models")(c, ctx, nil) {
		name, _, _ := strings.Cut(ref, ":")
		names = append(names, name, ref)
	}
	return names
}

// rolloutNames are the deployments that have had a rollout, and the rollouts.
func rolloutNames(c *cli, ctx context.Context, _ []string) []string {
	ctl, err := c.client()
	if err != nil {
		return nil
	}
	res, err := call(ctx, ctl.rollouts().ListRollouts, &dunlinv1.ListRolloutsRequest{})
	if err != nil {
		return nil
	}
	var names []string
	for _, r := range res.GetRollouts() {
		names = append(names, r.GetDeployment(), r.GetId())
	}
	return names
}

func contextNamesStored(*cli, context.Context, []string) []string {
	all, err := readContexts()
	if err != nil {
		return nil
	}
	return all.names()
}

func userNames(c *cli, ctx context.Context, _ []string) []string {
	ctl, err := c.client()
	if err != nil {
		return nil
	}
	res, err := call(ctx, ctl.users().ListUsers, &dunlinv1.ListUsersRequest{})
	if err != nil {
		return nil
	}
	var names []string
	for _, u := range res.GetUsers() {
		names = append(names, u.GetName())
	}
	return names
}

func tokenIDs(c *cli, ctx context.Context, _ []string) []string {
	ctl, err := c.client()
	if err != nil {
		return nil
	}
	res, err := call(ctx, ctl.users().ListTokens, &dunlinv1.ListTokensRequest{})
	if err != nil {
		return nil
	}
	var ids []string
	for _, k := range res.GetTokens() {
		ids = append(ids, k.GetId())
	}
	return ids
}

func authorityIDs(c *cli, ctx context.Context, _ []string) []string {
	ctl, err := c.client()
	if err != nil {
		return nil
	}
	res, err := call(ctx, ctl.trust().GetAuthorities, &dunlinv1.GetAuthoritiesRequest{})
	if err != nil {
		return nil
	}
	var ids []string
	for _, a := range res.GetAuthorities() {
		ids = append(ids, a.GetId())
	}
	return ids
}

func words(all ...string) lister {
	return func(*cli, context.Context, []string) []string { return all }
}

// ofKind are the names of things of the kind that the argument before names.
func ofKind(c *cli, ctx context.Context, before []string) []string {
	k, err := findKind(before[0])
	switch {
	case err != nil:
		return nil
	case k.name == "events" || k.name == "alarms":
		return listed("devices")(c, ctx, nil)
	case k.name == "profiles":
		return modelsAndVersions(c, ctx, nil)
	case k.name == "models":
		return modelNames(c, ctx, nil)
	case k.name == "rollouts":
		return listed("deployments")(c, ctx, nil)
	case k.name == "join-tokens":
		return nil // get takes no name of one
	}
	return listed(k.name)(c, ctx, nil)
}

// argumentNames has, by verb, what its arguments may be.
var argumentNames = map[string][]lister{
	"top":               {listed("devices")},
	"get":               {words(kindNames()...), ofKind},
	"delete":            {words("deployment", "route", "freeze", "maintenance"), ofKind},
	"unfreeze":          {listed("freezes")},
	"drift":             {listed("devices")},
	"telemetry":         {listed("devices")},
	"infer":             {modelsAndVersions},
	"profile":           {modelsAndVersions},
	"model delete":      {listed("models")},
	"device revoke":     {listed("devices")},
	"device remove":     {listed("devices")},
	"join-token delete": {listed("join-tokens")},
	"user update":       {userNames},
	"user delete":       {userNames},
	"token delete":      {tokenIDs},
	"authority retire":  {authorityIDs},
	"rollout status":    {rolloutNames},
	"rollout watch":     {rolloutNames},
	"rollout decisions": {rolloutNames},
	"rollout pause":     {rolloutNames},
	"rollout resume":    {rolloutNames},
	"rollout promote":   {rolloutNames},
	"rollout abort":     {rolloutNames},
	"rollout rollback":  {rolloutNames},
	"context use":       {contextNamesStored},
	"context show":      {contextNamesStored},
	"context rename":    {contextNamesStored},
	"context delete":    {contextNamesStored},
}

// flagNames has, by flag, what it may be; of flags that name things only.
var flagNames = map[string]lister{"context": contextNamesStored, "device": listed("devices"), "user": userNames}

// completes gives the function by which a shell completes with a lister.
func (c *cli) completes(names func(args []string) lister) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, begun string) ([]cobra.Completion, cobra.ShellCompDirective) {
		list := names(args)
		if list == nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		ctx := cmd.Context()
		if ctx == nil {
			ctx = context.Background()
		}
		ctx, cancel := context.WithTimeout(ctx, completeTimeout)
		defer cancel()
		var fit []string
		for _, name := range list(c, ctx, args) {
			// A name that a shell would read as more than one, or that moves the
			// cursor, is none to offer.
			if strings.HasPrefix(name, begun) && name == plain(name) && !strings.ContainsAny(name, " \t") {
				fit = append(fit, name)
			}
		}
		slices.Sort(fit)
		return slices.Compact(fit), cobra.ShellCompDirectiveNoFileComp
	}
}

// addCompletion has the verbs below root complete names.
func (c *cli) addCompletion(root *cobra.Command) error {
	for path, lists := range argumentNames {
		cmd, _, err := root.Find(strings.Fields(path))
		if err != nil {
			return err
		}
		cmd.ValidArgs = nil // it would be asked instead
		cmd.ValidArgsFunction = c.completes(func(args []string) lister {
			if len(args) < len(lists) {
				return lists[len(args)]
			}
			return nil
		})
	}
	var walk func(*cobra.Command) error
	walk = func(cmd *cobra.Command) error {
		for name, list := range flagNames {
			flags := cmd.LocalNonPersistentFlags()
			if cmd == root {
				flags = cmd.PersistentFlags()
			}
			if flags.Lookup(name) == nil || cmd.Name() == "login" || cmd.CommandPath() == "dunlin join-token create" {
				continue // what those name need not be known
			}
			if err := cmd.RegisterFlagCompletionFunc(name, c.completes(func([]string) lister { return list })); err != nil {
				return err
			}
		}
		for _, sub := range cmd.Commands() {
			if err := walk(sub); err != nil {
				return err
			}
		}
		return nil
	}
	return walk(root)
}
