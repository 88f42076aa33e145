package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"
)

const (
	// watchEvery is how often a list that is watched is asked for.
	watchEvery    = 2 * time.Second
	minWatchEvery = 100 * time.Millisecond
	maxWatchEvery = time.Hour
	// watchShare is how many times the time that an answer takes lies at least
	// between two questions.
	watchShare = 10
)

// clockColumns change with time alone: a row that differs only in them is not
// written again.
var clockColumns = []string{"LAST HEARD", "UPDATED", "STARTED", "CREATED", "MEASURED", "SINCE", "WHEN", "ENDS", "EXPIRES", "EVIDENCE", "JOINED", "ENDED"}

// watched is what was written of a list that is looked at again and again.
type watched struct {
	out     format
	journal bool
	begun   bool
	seen    map[string]string // by key: what must differ to be written again
	widths  []int             // of the columns, which only grow
}

func newWatched(out format, journal bool) *watched {
	return &watched{out: out, journal: journal, seen: map[string]string{}}
}

// entry is one row or item.
type entry struct {
	key, mark string
	cells     []string // of a table
	text      string   // of any other format, with its line end
}

// see takes the list as it is now, and gives what is to be written and the keys
// of what is gone.
func (w *watched) see(v view) (text string, gone []string, err error) {
	entries, header, err := w.entries(v)
	if err != nil {
		return "", nil, err
	}
	if w.journal {
		slices.Reverse(entries) // the newest last, as they come
	}
	now := map[string]string{}
	var fresh []entry
	for _, e := range entries {
		for key := e.key; ; key += "'" { // two of one key are two
			if _, twice := now[key]; !twice {
				e.key = key
				break
			}
		}
		now[e.key] = e.mark
		if before, known := w.seen[e.key]; !known || before != e.mark {
			fresh = append(fresh, e)
		}
	}
	if !w.journal {
		for key := range w.seen {
			if _, there := now[key]; !there {
				gone = append(gone, key)
			}
		}
		slices.Sort(gone)
	}
	w.seen = now
	if header != nil && !w.begun {
		fresh = append([]entry{{cells: header}}, fresh...)
	}
	w.begun = true
	var b strings.Builder
	for _, e := range fresh {
		w.widen(e.cells)
	}
	for _, e := range fresh {
		b.WriteString(e.text)
		if e.cells != nil {
			b.WriteString(w.row(e.cells))
		}
	}
	return b.String(), gone, nil
}

func (w *watched) entries(v view) (entries []entry, header []string, err error) {
	if !w.out.tabular() {
		for _, item := range v.items {
			line, err := valueJSON(item, "")
			if err != nil {
				return nil, nil, err
			}
			e := entry{key: nameOf(item), mark: string(line), text: string(line)}
			if w.out == "name" {
				if e.key == "" {
					return nil, nil, usagef("these have no names: use another -o than name")
				}
				e.text, e.mark = plain(e.key)+"\n", updated(item)
			}
			if e.key == "" {
				e.key = string(line)
			}
			entries = append(entries, e)
		}
		return entries, nil, nil
	}
	t := v.table()
	if w.out == "wide" {
		t = t.widened()
	}
	for i, cells := range t.rows {
		e := entry{cells: cells[:min(len(cells), len(t.header))]}
		for j, cell := range e.cells {
			if !slices.Contains(clockColumns, t.header[j]) {
				e.mark += cell + "\t"
			}
		}
		switch {
		case v.keys != nil:
			e.key = v.keys[i]
		case len(v.items) == len(t.rows):
			e.key = nameOf(v.items[i])
			e.mark += updated(v.items[i])
		}
		if e.key == "" && i < len(v.items) {
			line, err := valueJSON(v.items[i], "")
			if err != nil {
				return nil, nil, err
			}
			e.key = string(line)
		}
		entries = append(entries, e)
	}
	return entries, t.header, nil
}

// updated is when an item was changed last, or "".
func updated(item any) string {
	if i, ok := item.(interface {
		GetUpdatedAt() *timestamppb.Timestamp
	}); ok && i.GetUpdatedAt() != nil {
		return i.GetUpdatedAt().AsTime().Format(time.RFC3339Nano)
	}
	return ""
}

func (w *watched) widen(cells []string) {
	for i, c := range cells {
		if i == len(w.widths) {
			w.widths = append(w.widths, 0)
		}
		w.widths[i] = max(w.widths[i], utf8.RuneCountInString(c))
	}
}

func (w *watched) row(cells []string) string {
	var b strings.Builder
	for i, c := range cells {
		b.WriteString(c)
		if i < len(cells)-1 {
			b.WriteString(strings.Repeat(" ", w.widths[i]-utf8.RuneCountInString(c)+2))
		}
	}
	return b.String() + "\n"
}

// away says whether an error is that the controller cannot be reached now.
func away(err error) bool {
	switch connect.CodeOf(err) {
	case connect.CodeUnavailable, connect.CodeDeadlineExceeded:
		return true
	}
	return errors.Is(err, io.ErrUnexpectedEOF)
}

// watchList writes what a list has, then what changes in it, until ctx ends,
// which is no error. Once it has begun it outlives a controller that is away.
func (c *cli) watchList(ctx context.Context, list func(context.Context) (view, error), w *watched, every time.Duration) error {
	lost := false
	for {
		begin := time.Now()
		v, err := list(ctx)
		took := time.Since(begin)
		if ctx.Err() != nil {
			return nil
		}
		if w.begun && (connect.CodeOf(err) == connect.CodeNotFound || errors.Is(err, errNotFound)) {
			// What was asked for by its name is gone; it may come again.
			v, err = view{table: func() *table { return &table{} }}, nil
		}
		switch {
		case err != nil && (!w.begun || !away(err)):
			return err
		case err != nil:
			if !lost {
				fmt.Fprintf(c.err, "The controller is away; trying again every %s.\n", every)
			}
			lost = true
		default:
			if lost {
				fmt.Fprintln(c.err, "The controller is back.")
			}
			lost = false
			text, gone, err := w.see(v)
			if err != nil {
				return err
			}
			if _, err := bytes.NewBufferString(text).WriteTo(c.out); err != nil {
				return err
			}
			for _, key := range gone {
				fmt.Fprintf(c.err, "%s is gone\n", plain(strings.TrimSpace(key)))
			}
		}
		t := time.NewTimer(max(every, watchShare*took))
		select {
		case <-ctx.Done():
			t.Stop()
			return nil
		case <-t.C:
		}
	}
}
