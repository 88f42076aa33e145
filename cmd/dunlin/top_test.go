package main

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"connectrpc.com/connect"
)

// TestTop: outside a terminal it writes once; on one it goes on until the
// interrupt, says that the controller is away, and ends well.
func TestTop(t *testing.T) {
	page := func(text string) tables { return tables{{header: []string{text}}} }
	away := connect.NewError(connect.CodeUnavailable, errors.New("refused"))
	for _, test := range []struct {
		live bool
		want string
	}{
		{false, "one\n"},
		{true, "one\n\x1b[1A\r\x1b[JThe controller is away\n\none\n\x1b[3A\r\x1b[Jtwo\n"},
	} {
		synctest.Test(t, func(t *testing.T) {
			ctx, stop := context.WithCancel(t.Context())
			defer stop()
			var out bytes.Buffer
			var live *livePage
			if test.live {
				live = &livePage{w: &out, size: func() (int, int) { return len("The controller is away") + 1, 24 }}
			}
			n := 0
			look := func(ctx context.Context) (tables, error) {
				switch n++; n {
				case 1:
					return page("one"), nil
				case 2:
					return nil, away
				case 3:
					return page("two"), nil
				}
				stop()
				return nil, ctx.Err()
			}
			if err := top(ctx, &out, live, watchEvery, look); err != nil {
				t.Fatal(err)
			}
			if out.String() != test.want {
				t.Errorf("got %q, want %q", out.String(), test.want)
			}
		})
	}
	if err := top(t.Context(), &bytes.Buffer{}, nil, time.Second, func(context.Context) (tables, error) { return nil, away }); err == nil || !strings.Contains(err.Error(), "refused") {
		t.Errorf("a controller that was never there: %v", err)
	}
}
