// Package console serves the web console: pages made on the server from the same
// calls that the command line makes, in the name of who has signed in.
//
// A session is an API token that ends by itself: the store has its hash, the
// browser has it in a cookie that no script reads, and taking it back ends the
// session at once. The console has no other way to the store than the calls, so
// the rules and scopes of package identity hold here as they do there. Pages
// have no inline script or style and ask nothing of other sites.
package console

import (
	"errors"
	"log/slog"
	"net/http"
	"strings"
	"time"

	"connectrpc.com/connect"
)

// Config is what the console works with.
type Config struct {
	// API answers the Connect services. The console calls it within this process.
	API http.Handler
	Log *slog.Logger
	Now func() time.Time // nil: time.Now
	// DeviceURL is what devices are told that the controller is at.
	DeviceURL string
	// Stopping is closed when streams are to end.
	Stopping <-chan struct{}
}

type console struct {
	Config
	assets *assets
	pages  *pages
	live   *live
}

// New gives the handler of the console's routes.
func New(c Config) http.Handler {
	if c.Now == nil {
		c.Now = time.Now
	}
	s := &console{Config: c, assets: newAssets()}
	s.pages = newPages(s.assets, c.Log)
	s.live = newLive(c.Now)
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", s.signedIn(s.fleet))
	mux.HandleFunc("GET /devices/{device}", s.signedIn(s.device))
	mux.HandleFunc("GET /live/fleet", s.signedIn(s.liveFleet))
	mux.HandleFunc("GET /live/devices/{device}", s.signedIn(s.liveDevice))
	mux.HandleFunc("GET /sign-in", s.signInPage)
	mux.HandleFunc("POST /sign-in", s.signIn)
	mux.HandleFunc("POST /sign-out", s.signOut)
	mux.HandleFunc("POST /theme", s.setTheme)
	s.inventory(mux)
	mux.Handle("GET /assets/{name}", s.assets)
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		s.fail(w, r, session{}, http.StatusNotFound, "There is no such page.")
	})
	return headers(http.NewCrossOriginProtection().Handler(mux))
}

// policy lets pages load what this server has, and nothing else.
const policy = "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; object-src 'none'"

func headers(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		set := w.Header().Set
		set("Content-Security-Policy", policy)
		set("X-Content-Type-Options", "nosniff")
		set("Referrer-Policy", "same-origin")
		set("Cross-Origin-Opener-Policy", "same-origin")
		set("Cross-Origin-Resource-Policy", "same-origin")
		set("Cache-Control", "no-store") // assets say otherwise
		h.ServeHTTP(w, r)
	})
}

// statusOf gives the HTTP status of a call's error.
func statusOf(err error) int {
	switch connect.CodeOf(err) {
	case connect.CodeInvalidArgument:
		return http.StatusBadRequest
	case connect.CodeUnauthenticated:
		return http.StatusUnauthorized
	case connect.CodePermissionDenied:
		return http.StatusForbidden
	case connect.CodeNotFound:
		return http.StatusNotFound
	case connect.CodeFailedPrecondition, connect.CodeAlreadyExists:
		return http.StatusConflict
	case connect.CodeResourceExhausted:
		return http.StatusTooManyRequests
	case connect.CodeUnavailable:
		return http.StatusServiceUnavailable
	}
	return http.StatusInternalServerError
}

// messageOf gives what a call's error says, without its code.
func messageOf(err error) string {
	if e, ok := errors.AsType[*connect.Error](err); ok {
		return e.Message()
	}
	return err.Error()
}

// failed answers with a page that says what a call's error does.
func (s *console) failed(w http.ResponseWriter, r *http.Request, in session, err error) {
	if e, ok := errors.AsType[*connect.Error](err); ok {
		if after := e.Meta().Get("Retry-After"); after != "" {
			w.Header().Set("Retry-After", after)
		}
	}
	s.fail(w, r, in, statusOf(err), messageOf(err))
}

type failure struct {
	Status int
	Title  string
	Text   string
}

func (s *console) fail(w http.ResponseWriter, r *http.Request, in session, status int, text string) {
	s.pages.write(w, r, status, "error", page{Session: in, Title: http.StatusText(status), Data: failure{status, http.StatusText(status), text}, Now: s.Now()})
}

// localPath gives a path of this server that a form names, else "/": nobody is
// led elsewhere.
func localPath(s string) string {
	if !strings.HasPrefix(s, "/") || strings.HasPrefix(s, "//") || strings.ContainsAny(s, "\\\r\n\t") {
		return "/"
	}
	return s
}
