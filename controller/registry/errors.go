package registry

import (
	"encoding/json"
	"errors"
	"log/slog"
	"net/http"
	"strconv"

	"github.com/dunlin/dunlin/controller/identity"
)

// apiError is an error of the OCI distribution API.
type apiError struct {
	status  int
	code    string
	message string
}

func (e apiError) Error() string { return e.message }

// toAPI gives the answer that an error becomes.
func toAPI(err error) apiError {
	if e, ok := errors.AsType[apiError](err); ok {
		return e
	}
	if e, ok := errors.AsType[ErrVersionExists](err); ok {
		return apiError{http.StatusConflict, "DENIED", e.Error()}
	}
	if e, ok := errors.AsType[*identity.DeniedError](err); ok {
		return apiError{http.StatusForbidden, "DENIED", e.Error()}
	}
	if e, ok := errors.AsType[*identity.LimitedError](err); ok {
		return apiError{http.StatusTooManyRequests, "TOOMANYREQUESTS", e.Error()}
	}
	var tooLarge *http.MaxBytesError
	switch {
	case errors.Is(err, identity.ErrUnauthenticated):
		return apiError{http.StatusUnauthorized, "UNAUTHORIZED", err.Error()}
	case errors.As(err, &tooLarge):
		return apiError{http.StatusRequestEntityTooLarge, "SIZE_INVALID", err.Error()}
	case errors.Is(err, ErrNotFound):
		return apiError{http.StatusBadRequest, "MANIFEST_BLOB_UNKNOWN", err.Error()}
	case errors.Is(err, ErrInvalid):
		return apiError{http.StatusBadRequest, "MANIFEST_INVALID", err.Error()}
	default:
		return apiError{http.StatusInternalServerError, "UNKNOWN", "internal error; the controller's log has it"}
	}
}

// fail answers with an error in the shape of the OCI distribution API.
func (r *Registry) fail(w http.ResponseWriter, req *http.Request, err error) {
	e := toAPI(err)
	if e.status == http.StatusInternalServerError && req.Context().Err() == nil {
		r.log.ErrorContext(req.Context(), "registry request failed", slog.String("method", req.Method), slog.String("path", req.URL.Path), slog.Any("error", err))
	}
	if e.status == http.StatusUnauthorized || e.status == http.StatusForbidden || e.status == http.StatusTooManyRequests {
		r.refusals.Refused(req.Context(), identity.Refusal{Action: "registry.refused", Object: req.Method + " " + req.URL.Path, Reason: e.message})
	}
	type item struct {
		Code    string `json:"code"`
		Message string `json:"message"`
	}
	w.Header().Set("Content-Type", "application/json")
	if e.status == http.StatusUnauthorized {
		w.Header().Set("WWW-Authenticate", `Basic realm="dunlin"`)
	}
	if limited, ok := errors.AsType[*identity.LimitedError](err); ok {
		w.Header().Set("Retry-After", strconv.Itoa(limited.Seconds()))
	}
	w.WriteHeader(e.status)
	if req.Method == http.MethodHead {
		return
	}
	json.NewEncoder(w).Encode(struct {
		Errors []item `json:"errors"`
	}{[]item{{e.code, e.message}}}) // an error here is the client's going away
}
