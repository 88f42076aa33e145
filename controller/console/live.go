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

	v1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// The limits of live streams.
const (
	liveEvery  = 250 * time.Millisecond // between two updates at least
	maxShare   = 4                      // asking for the fleet takes a fourth of the time at most
	maxStreams = 256
	maxOfUser  = 16
	writeFor   = 10 * time.Second // until a viewer who takes nothing is let go
	beatEvery  = 15 * time.Second
)

// live has the newest list of devices for those who look. The answer of the
// API depends on nothing of the caller but the scope, so that all who have the
// same scope share one; who they are is asked of the API each time before.
type live struct {
	now func() time.Time

	mu      sync.Mutex // guards what follows
	fleets  map[string]*snapshot
	streams map[string]int // by user
	all     int
}

// snapshot is one list of devices. Its mutex is held while it is asked for: who
// comes meanwhile waits for that answer.
type snapshot struct {
	mu      sync.Mutex
	at      time.Time // of the answer
	took    time.Duration
	devices []*v1.Device
}

func newLive(now func() time.Time) *live {
	return &live{now: now, fleets: map[string]*snapshot{}, streams: map[string]int{}}
}

// maxScopes bounds the lists that are kept.
const maxScopes = 16

// devices gives what a session sees, not older than what the limits make it. The
// caller has asked who it is.
func (l *live) devices(ctx context.Context, in session) ([]*v1.Device, error) {
	key := labelText(in.Who.Scope)
	l.mu.Lock()
	s := l.fleets[key]
	if s == nil {
		if len(l.fleets) >= maxScopes {
			clear(l.fleets)
		}
		s = &snapshot{}
		l.fleets[key] = s
	}
	l.mu.Unlock()

	s.mu.Lock()
	defer s.mu.Unlock()
	began := l.now()
	if !s.at.IsZero() && began.Sub(s.at) < max(liveEvery, maxShare*s.took) {
		return s.devices, nil
	}
	devices, err := in.list(ctx, "")
	if err != nil {
		return nil, err
	}
	s.at, s.devices = l.now(), devices
	s.took = s.at.Sub(began)
	return devices, nil
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

// leave forgets the lists with the last viewer.
func (l *live) leave(user string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.all--
	if l.streams[user]--; l.streams[user] == 0 {
		delete(l.streams, user)
	}
	if l.all == 0 {
		clear(l.fleets)
	}
}

// liveFleet streams the rows of the fleet's page that change. At each look it
// asks anew whose session it is: one that was taken back ends the stream.
func (s *console) liveFleet(w http.ResponseWriter, r *http.Request, in session) {
	f, err := parseFilter(r.URL.Query())
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	user := in.Who.Name
	if !s.live.enter(user) {
		w.Header().Set("Retry-After", "30")
		http.Error(w, fmt.Sprintf("too many live pages are open: up to %d of one user, and %d in all", maxOfUser, maxStreams), http.StatusServiceUnavailable)
		return
	}
	defer s.live.leave(user)
	w.Header().Set("Content-Type", "text/event-stream")
	out := stream{w, http.NewResponseController(w)}
	if out.send("", nil) != nil {
		return
	}
	last := fleetParts{sum: r.URL.Query().Get("seen")}
	beat := s.Now()
	for {
		devices, err := s.live.devices(r.Context(), in)
		if err != nil {
			return
		}
		v := s.fleetFor(in, devices, f)
		parts, err := s.partsOf(v)
		if err != nil {
			s.Log.Error("cannot make a live page", "error", err)
			return
		}
		switch now := s.Now(); {
		case parts.sum != last.sum:
			if out.send("fleet", changes(last, parts)) != nil {
				return
			}
			last, beat = parts, now
		case last.rows == nil:
			last = parts
		case now.Sub(beat) >= beatEvery:
			if out.send("", nil) != nil {
				return
			}
			beat = now
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
			_ = out.send("bye", []byte("signed out"))
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
