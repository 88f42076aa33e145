package main

import (
	"cmp"
	"context"
	"errors"
	"os"
	"slices"
	"strings"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
)

// mostNear is how many names are offered in place of one that is unknown.
const mostNear = 3

// advice says what to do next after an error, as further lines, or "".
func (c *cli) advice(ctx context.Context, cmd *cobra.Command, err error) string {
	switch code := connect.CodeOf(err); {
	case code == connect.CodeUnauthenticated && c.context == "" && os.Getenv("DUNLIN_TOKEN") != "":
		return "\nThe token is that of DUNLIN_TOKEN, which counts before what login stores."
	case code == connect.CodePermissionDenied:
		return "\nWhat you may do: dunlin whoami"
	case code == connect.CodeNotFound, errors.Is(err, errNotFound):
		return c.near(ctx, cmd)
	}
	return ""
}

// near offers names like those arguments of a verb that are unknown.
func (c *cli) near(ctx context.Context, cmd *cobra.Command) string {
	lists := argumentNames[strings.TrimPrefix(cmd.CommandPath(), cmd.Root().Name()+" ")]
	ctx, cancel := context.WithTimeout(ctx, completeTimeout)
	defer cancel()
	args := cmd.Flags().Args()
	for i, arg := range args[:min(len(args), len(lists))] {
		names := lists[i](c, ctx, args[:i])
		if i < len(lists)-1 || slices.Contains(names, arg) {
			continue
		}
		if close := nearest(arg, names); len(close) > 0 {
			return "\nDid you mean " + plain(strings.Join(close, ", ")) + "?"
		}
	}
	return ""
}

// nearest gives the names that differ least from one, if by no more than a
// third of it, the nearest first.
func nearest(name string, names []string) []string {
	type found struct {
		name     string
		distance int
	}
	var all []found
	for _, n := range slices.Compact(slices.Sorted(slices.Values(names))) {
		if d := distance(strings.ToLower(name), strings.ToLower(n)); d <= max(1, len([]rune(name))/3) {
			all = append(all, found{n, d})
		}
	}
	slices.SortStableFunc(all, func(a, b found) int { return cmp.Compare(a.distance, b.distance) })
	var close []string
	for _, f := range all[:min(len(all), mostNear)] {
		close = append(close, f.name)
	}
	return close
}

// distance is how many runes must be put in, taken out, replaced or swapped with
// the next to make b of a (optimal string alignment).
func distance(a, b string) int {
	x, y := []rune(a), []rune(b)
	var before []int // the row before the last
	last := make([]int, len(y)+1)
	for j := range last {
		last[j] = j
	}
	for i := range x {
		row := make([]int, len(y)+1)
		row[0] = i + 1
		for j := range y {
			cost := 1
			if x[i] == y[j] {
				cost = 0
			}
			row[j+1] = min(last[j+1]+1, row[j]+1, last[j]+cost)
			if i > 0 && j > 0 && x[i] == y[j-1] && x[i-1] == y[j] {
				row[j+1] = min(row[j+1], before[j-1]+1)
			}
		}
		before, last = last, row
	}
	return last[len(y)]
}
