// Package access tries what everybody may and may not do against running
// programs, and holds it against the rules that say so.
package access

import (
	"context"

	"github.com/dunlin/dunlin/internal/e2e"
)

// Result is how it came out.
type Result struct {
	Tried int      // cells of the matrix
	Wrong []string // those that came out other than the rules say
}

// Try is to come.
func Try(ctx context.Context, fleet *e2e.Fleet) (Result, error) { return Result{}, nil }
