// Package api answers the controller's Connect services.
package api

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"strconv"
	"strings"

	"connectrpc.com/connect"

	"github.com/dunlin/dunlin/controller/dispatch"
	"github.com/dunlin/dunlin/controller/fleet"
	"github.com/dunlin/dunlin/controller/identity"
	"github.com/dunlin/dunlin/controller/registry"
	"github.com/dunlin/dunlin/controller/store"
	v1connect "github.com/dunlin/dunlin/proto/dunlin/v1/dunlinv1connect"
)

// maxRequest bounds a request: the documents of one Apply and their envelope.
const maxRequest = fleet.MaxDocumentsBytes + 64<<10

// Registry makes pushed bundles versions.
type Registry interface {
	Ingest(ctx context.Context, model, digest string, want int64, by string) (version int64, created bool, err error)
}

// Config is what the services work with.
type Config struct {
	Store    *store.Store
	Dispatch *dispatch.Dispatcher
	Registry Registry
	Auth     *identity.Authenticator
	Log      *slog.Logger

	Version   string // of the controller
	BrokerURL string // that devices connect to
	// HashPassword gives a device's secret the form of an external broker.
	HashPassword func(secret string) (string, error)
	// AccountsChanged tells an external broker of new and removed devices
	// before the call that changed them answers; nil where there is none.
	AccountsChanged func(ctx context.Context) error
	// Stopping is closed when streams are to end.
	Stopping <-chan struct{}
}

type server struct {
	v1connect.UnimplementedAuditServiceHandler
	v1connect.UnimplementedTrustServiceHandler
	v1connect.UnimplementedEnrollmentServiceHandler
	v1connect.UnimplementedDeviceServiceHandler
	Config
}

// New gives the handler of all services.
func New(c Config) http.Handler {
	s := &server{Config: c}
	options := connect.WithHandlerOptions(connect.WithInterceptors(gate{c.Log}), connect.WithReadMaxBytes(maxRequest))
	mux := http.NewServeMux()
	mux.Handle(v1connect.NewAuthServiceHandler(s, options))
	mux.Handle(v1connect.NewUserServiceHandler(s, options))
	mux.Handle(v1connect.NewAuditServiceHandler(s, options))
	mux.Handle(v1connect.NewTrustServiceHandler(s, options))
	mux.Handle(v1connect.NewEnrollmentServiceHandler(s, options))
	mux.Handle(v1connect.NewModelServiceHandler(s, options))
	mux.Handle(v1connect.NewObjectServiceHandler(s, options))
	mux.Handle(v1connect.NewProfileServiceHandler(s, options))
	mux.Handle(v1connect.NewRolloutServiceHandler(s, options))
	mux.Handle(v1connect.NewDeviceServiceHandler(s, options))
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		p, err := c.Auth.FromRequest(r)
		if err == nil && p.External {
			err = c.Store.External(r.Context(), p, false)
		}
		ctx := identity.WithPrincipal(r.Context(), p)
		if _, limited := errors.AsType[*identity.LimitedError](err); limited || errors.Is(err, identity.ErrUnauthenticated) {
			ctx = context.WithValue(ctx, whyKey{}, err)
		} else if err != nil {
			c.Log.Error("cannot authenticate", "error", err)
			http.Error(w, "cannot authenticate", http.StatusInternalServerError)
			return
		}
		mux.ServeHTTP(w, r.WithContext(context.WithValue(ctx, baseKey{}, baseOf(r))))
	})
}

// whyKey has the error by which a caller is nobody.
type whyKey struct{}

type baseKey struct{}

// registryURL gives the registry's base URL as this caller reaches it: both
// are on one port, which may have other names behind a proxy.
func registryURL(ctx context.Context) string {
	base, _ := ctx.Value(baseKey{}).(string)
	return base
}

func baseOf(r *http.Request) string {
	if r.TLS != nil {
		return "https://" + r.Host
	}
	return "http://" + r.Host
}

// gate authorises each call and gives its error a code.
type gate struct{ log *slog.Logger }

// authorise asks the rules. Of a caller who is nobody it says why, as far as
// that may be said.
func authorise(ctx context.Context, procedure string) error {
	err := identity.Allow(identity.FromContext(ctx), procedure)
	if why, ok := ctx.Value(whyKey{}).(error); ok && err != nil {
		return why
	}
	return err
}

func (g gate) WrapUnary(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
		if err := authorise(ctx, req.Spec().Procedure); err != nil {
			return nil, g.coded(ctx, req.Spec().Procedure, err)
		}
		resp, err := next(ctx, req)
		return resp, g.coded(ctx, req.Spec().Procedure, err)
	}
}

func (g gate) WrapStreamingHandler(next connect.StreamingHandlerFunc) connect.StreamingHandlerFunc {
	return func(ctx context.Context, conn connect.StreamingHandlerConn) error {
		if err := authorise(ctx, conn.Spec().Procedure); err != nil {
			return g.coded(ctx, conn.Spec().Procedure, err)
		}
		return g.coded(ctx, conn.Spec().Procedure, next(ctx, conn))
	}
}

func (g gate) WrapStreamingClient(next connect.StreamingClientFunc) connect.StreamingClientFunc {
	return next
}

// invalidError is a request that cannot be served as it is.
type invalidError struct{ error }

func (e invalidError) Unwrap() error { return e.error }

// coded maps errors to codes, the only place that does. What is not the
// caller's fault is logged and not shown.
func (g gate) coded(ctx context.Context, procedure string, err error) error {
	if err == nil {
		return nil
	}
	if _, ok := errors.AsType[*connect.Error](err); ok {
		return err
	}
	if limited, ok := errors.AsType[*identity.LimitedError](err); ok {
		coded := connect.NewError(connect.CodeResourceExhausted, limited)
		coded.Meta().Set("Retry-After", strconv.Itoa(limited.Seconds()))
		return coded
	}
	code := connect.CodeInternal
	_, denied := errors.AsType[*identity.DeniedError](err)
	_, invalid := errors.AsType[invalidError](err)
	_, faults := errors.AsType[fleet.Faults](err)
	_, taken := errors.AsType[registry.ErrVersionExists](err)
	switch {
	case errors.Is(ctx.Err(), context.DeadlineExceeded):
		code = connect.CodeDeadlineExceeded
	case ctx.Err() != nil:
		code = connect.CodeCanceled
	case invalid, faults, errors.Is(err, registry.ErrInvalid):
		code = connect.CodeInvalidArgument
	case errors.Is(err, store.ErrNotFound), errors.Is(err, registry.ErrNotFound):
		code = connect.CodeNotFound
	case taken, errors.Is(err, store.ErrExists):
		code = connect.CodeAlreadyExists
	case errors.Is(err, identity.ErrUnauthenticated):
		return connect.NewError(connect.CodeUnauthenticated, errors.New(strings.TrimPrefix(err.Error(), identity.ErrUnauthenticated.Error()+": ")))
	case denied, errors.Is(err, store.ErrRefused):
		code = connect.CodePermissionDenied
	}
	if code == connect.CodeInternal {
		g.log.Error("call failed", "procedure", procedure, "error", err)
		err = errors.New("internal error; the controller's log says more")
	}
	return connect.NewError(code, err)
}
