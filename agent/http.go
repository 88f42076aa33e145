package agent

import (
	"net/http"
	"time"

	"github.com/dunlin/dunlin/agent/oip/rest"
)

// handler answers inference, and /healthz and /metrics beside it.
func (h *host) handler(metrics http.Handler) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/", rest.New(h.oip))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		_, _ = w.Write([]byte("ok\n"))
	})
	mux.Handle("GET /metrics", metrics)
	return mux
}

// parting has callers connect anew while another program takes the place of
// this one.
func (h *host) parting(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if h.leaving.Load() {
			w.Header().Set("Connection", "close")
		}
		next.ServeHTTP(w, r)
	})
}

// hurried bounds the wait for bodies that next does not read: the server reads
// them itself before it answers, and waits for them without end. What reads a
// body has a bound of its own.
func hurried(next http.Handler, unread time.Duration) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.ContentLength != 0 {
			// A reader without deadlines has nobody slow at its end.
			_ = http.NewResponseController(w).SetReadDeadline(time.Now().Add(unread))
		}
		next.ServeHTTP(w, r)
	})
}
