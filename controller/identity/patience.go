package identity

import (
	"context"
	"net/http"
	"time"
)

// patienceKey has the func that lets the body of a request take its time.
type patienceKey struct{}

// Impatient gives h requests whose body must come within a time, until
// FromRequest finds that they are somebody's: nobody holds connections open.
func Impatient(h http.Handler, within time.Duration) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c := http.NewResponseController(w)
		// Where there are no deadlines, as in tests, there is nothing to hold.
		_ = c.SetReadDeadline(time.Now().Add(within))
		patient := func() { _ = c.SetReadDeadline(time.Time{}) }
		h.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), patienceKey{}, patient)))
	})
}

// known says that a request is somebody's.
func known(r *http.Request) {
	if f, ok := r.Context().Value(patienceKey{}).(func()); ok {
		f()
	}
}
