package api

import (
	"errors"
	"log/slog"
	"net"
	"net/http"
	"strconv"

	"github.com/dunlin/dunlin/controller/identity"
	"github.com/dunlin/dunlin/internal/program"
)

// Protect gives h to those who may do an action, and to everybody on this
// machine itself.
func Protect(auth *identity.Authenticator, log *slog.Logger, action string, h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if local(r) {
			h.ServeHTTP(w, r)
			return
		}
		p, err := auth.FromRequest(r)
		if err == nil {
			err = identity.Allow(p, action)
		}
		limited, tooMany := errors.AsType[*identity.LimitedError](err)
		denied, refused := errors.AsType[*identity.DeniedError](err)
		switch {
		case err == nil:
			h.ServeHTTP(w, r)
		case tooMany:
			w.Header().Set("Retry-After", strconv.Itoa(limited.Seconds()))
			http.Error(w, limited.Error(), http.StatusTooManyRequests)
		case refused:
			http.Error(w, denied.Error(), http.StatusForbidden)
		case errors.Is(err, identity.ErrUnauthenticated):
			w.Header().Set("WWW-Authenticate", `Bearer realm="dunlin"`)
			http.Error(w, err.Error(), http.StatusUnauthorized)
		default:
			log.Error("cannot authenticate", "error", err)
			http.Error(w, "cannot authenticate", http.StatusInternalServerError)
		}
	})
}

// local says whether a request is of this machine itself, and not handed on by
// a proxy here.
func local(r *http.Request) bool {
	host, _, err := net.SplitHostPort(r.RemoteAddr)
	return err == nil && program.Loopback(host) && r.Header.Get("Forwarded") == "" && r.Header.Get("X-Forwarded-For") == ""
}
