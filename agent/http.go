package agent

import (
	"net/http"

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
