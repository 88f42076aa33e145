package console

import (
	"bytes"
	"context"
	"fmt"
	"html/template"
	"net/http"
	"slices"
	"sync"
	"time"
)

// The limits of live streams.
const (
	liveEvery  = 250 * time.Millisecond // between two updates at least
	maxShare   = 4                      // making a page takes a fourth of the time at most,
	slowest    = 500 * time.Millisecond // unless it is older than that
	maxStreams = 256
	maxOfUser  = 16
	writeFor   = 10 * time.Second // until a viewer who takes nothing is let go
	beatEvery  = 15 * time.Second
)

// live has what live pages show, rendered once for all who look at the same.
// The answer of the API depends on nothing of the caller but the scope, so that
// all who have the same scope and filter share one; who they are is asked of the
// API each time before.
type live struct {
	now func() time.Time

	mu      sync.Mutex // guards what follows
	shares  map[string]*share
	streams map[string]int // by user
	all     int
}

// share is one page. Its mutex is held while it is made: who comes meanwhile
// waits for that.
type share struct {
	mu   sync.Mutex
	at   time.Time // when it was made
	took time.Duration
	made *shared
}

// shared is one state of a page of the fleet; it is never changed.
type shared struct {
	view  fleetView
	parts fleetParts
}

func newLive(now func() time.Time) *live {
	return &live{now: now, shares: map[string]*share{}, streams: map[string]int{}}
}

// maxShares bounds the pages that are kept, of some 100 kB each: one for each
// stream, and some that are looked at without one.
const maxShares = maxStreams + 32

// share gives the page that key stands for, not older than what the limits make
// it. The caller has asked who it is.
func (l *live) share(ctx context.Context, key string, do func(context.Context, *shared) (*shared, error)) (*shared, error) {
	l.mu.Lock()
	s := l.shares[key]
	if s == nil {
		if len(l.shares) >= maxShares {
			clear(l.shares)
		}
		s = &share{}
		l.shares[key] = s
	}
	l.mu.Unlock()

	s.mu.Lock()
	defer s.mu.Unlock()
	began := l.now()
	if s.made != nil && began.Sub(s.at) < max(liveEvery, min(maxShare*s.took, slowest)) {
		return s.made, nil
	}
	made, err := do(ctx, s.made)
	if err != nil {
		return nil, err
	}
	s.at, s.made = l.now(), made
	s.took = s.at.Sub(began)
	return made, nil
}

// enter counts a stream of a user; false: there are too many.
func (l *live) enter(user string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.all >= maxStreams || l.streams[user] >= maxOfUser {
		return false
	}
	l.all++
	l.streams[user]++
	return true
}

// leave forgets the pages with the last viewer.
func (l *live) leave(user string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.all--
	if l.streams[user]--; l.streams[user] == 0 {
		delete(l.streams, user)
	}
	if l.all == 0 {
		clear(l.shares)
	}
}

// liveFleet streams the rows of the fleet's page that change.
func (s *console) liveFleet(w http.ResponseWriter, r *http.Request, in session) {
	f, err := parseFilter(r.URL.Query())
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	last := fleetParts{sum: r.URL.Query().Get("seen")}
	s.follow(w, r, in, func(ctx context.Context, out func(name string, data []byte)) error {
		shared, err := s.fleetOf(ctx, in, f)
		if err != nil {
			return err
		}
		switch parts := shared.parts; {
		case parts.sum != last.sum:
			out("fleet", changes(last, parts))
			last = parts
		case last.rows == nil:
			last = parts
		}
		return nil
	})
}

// follow streams what step gives out, which is asked every liveEvery. Before
// each time it asks anew whose session it is: one that was taken back ends the
// stream.
func (s *console) follow(w http.ResponseWriter, r *http.Request, in session, step func(ctx context.Context, out func(name string, data []byte)) error) {
	user := in.Who.Name
	if !s.live.enter(user) {
		w.Header().Set("Retry-After", "30")
		http.Error(w, fmt.Sprintf("too many live pages are open: up to %d of one user, and %d in all", maxOfUser, maxStreams), http.StatusServiceUnavailable)
		return
	}
	defer s.live.leave(user)
	w.Header().Set("Content-Type", "text/event-stream")
	to := stream{w, http.NewResponseController(w)}
	if to.send("", nil) != nil {
		return
	}
	beat := s.Now()
	for {
		var sent error
		err := step(r.Context(), func(name string, data []byte) {
			if sent == nil {
				sent, beat = to.send(name, data), s.Now()
			}
		})
		if err != nil {
			s.Log.Debug("a live page ends", "error", err)
			return
		}
		if now := s.Now(); sent == nil && now.Sub(beat) >= beatEvery {
			sent, beat = to.send("", nil), now
		}
		if sent != nil {
			return
		}
		next := time.NewTimer(liveEvery)
		select {
		case <-r.Context().Done():
			next.Stop()
			return
		case <-s.Stopping:
			next.Stop()
			return
		case <-next.C:
		}
		if err := in.who(r.Context()); err != nil {
			_ = to.send("bye", []byte("signed out"))
			return
		}
	}
}

// changes writes what has to be swapped for a page to be the new one: single
// rows where the same devices are shown in the same order.
func changes(before, now fleetParts) []byte {
	var b bytes.Buffer
	if slices.Equal(before.names, now.names) && before.rows != nil {
		for _, name := range now.names {
			if before.rows[name] != now.rows[name] {
				fmt.Fprintf(&b, `<template><tr id="%s" hx-swap-oob="true">%s</tr></template>`, rowID(name), now.rows[name])
			}
		}
	} else {
		b.WriteString(`<template><tbody id="rows" hx-swap-oob="true">`)
		for _, name := range now.names {
			fmt.Fprintf(&b, `<tr id="%s">%s</tr>`, rowID(name), now.rows[name])
		}
		b.WriteString(`</tbody></template>`)
	}
	if before.around != now.around {
		b.WriteString(now.around)
	}
	return b.Bytes()
}

// rowID is the id of a device's row.
func rowID(name string) string { return "row-" + template.HTMLEscapeString(name) }

// stream writes server-sent events.
type stream struct {
	w http.ResponseWriter
	c *http.ResponseController
}

// send writes one event; one without a name only keeps the connection.
func (s stream) send(name string, data []byte) error {
	_ = s.c.SetWriteDeadline(time.Now().Add(writeFor)) // tests have none
	var b bytes.Buffer
	if name == "" {
		b.WriteString(":\n\n")
	} else {
		fmt.Fprintf(&b, "event: %s\n", name)
		for line := range bytes.SplitSeq(data, []byte("\n")) {
			fmt.Fprintf(&b, "data: %s\n", line)
		}
		b.WriteString("\n")
	}
	if _, err := s.w.Write(b.Bytes()); err != nil {
		return err
	}
	return s.c.Flush()
}
