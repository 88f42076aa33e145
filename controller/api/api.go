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
	"github.com/opencontainers/go-digest"

	"github.com/dunlin/dunlin/controller/dispatch"
	"github.com/dunlin/dunlin/controller/enrol"
	"github.com/dunlin/dunlin/controller/fleet"
	"github.com/dunlin/dunlin/controller/identity"
	"github.com/dunlin/dunlin/controller/registry"
	"github.com/dunlin/dunlin/controller/store"
	v1connect "github.com/dunlin/dunlin/proto/dunlin/v1/dunlinv1connect"
)

// maxRequest bounds a request: the documents of one Apply and their envelope.
const maxRequest = fleet.MaxDocumentsBytes + 64<<10

// Registry makes pushed bundles versions, and keeps what they hold.
type Registry interface {
	Ingest(ctx context.Context, model, digest string, want int64, by string) (version int64, created bool, err error)
	LetGo(ctx context.Context, model string, manifest digest.Digest) error
	Untag(ctx context.Context, model string, manifest digest.Digest) error
}

// Config is what the services work with.
type Config struct {
	Store    *store.Store
	Dispatch *dispatch.Dispatcher
	Registry Registry
	Auth     *identity.Authenticator
	Log      *slog.Logger

	Enrol *enrol.Service
	// Authorities vouch for devices.
	Authorities *identity.Authorities

	Version string // of the controller
	// SigningKey is the id of the key by which the controller signs versions.
	SigningKey string
	// AccountsChanged tells an external broker of revoked devices, join tokens
	// and authorities before the call that changed them answers; nil where there is none.
	AccountsChanged func(ctx context.Context) error
	// Stopping is closed when streams are to end.
	Stopping <-chan struct{}
}

type server struct {
	Config
	list *list
}

// New gives the handler of all services.
func New(c Config) http.Handler {
	s := &server{Config: c, list: newList(c)}
	options := connect.WithHandlerOptions(connect.WithInterceptors(gate{c.Log, c.Store}), connect.WithReadMaxBytes(maxRequest))
	mux := http.NewServeMux()
	mux.Handle(v1connect.NewAuthServiceHandler(s, options))
	mux.Handle(v1connect.NewUserServiceHandler(s, options))
	mux.Handle(v1connect.NewEnrollmentServiceHandler(s, options))
	mux.Handle(v1connect.NewModelServiceHandler(s, options))
	mux.Handle(v1connect.NewObjectServiceHandler(s, options))
	mux.Handle(v1connect.NewProfileServiceHandler(s, options))
	mux.Handle(v1connect.NewRolloutServiceHandler(s, options))
	mux.Handle(v1connect.NewDeviceServiceHandler(s, options))
	mux.Handle(v1connect.NewTrustServiceHandler(s, options))
	mux.Handle(v1connect.NewAuditServiceHandler(s, options))
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		p, err := s.principal(r)
		ctx := identity.WithPrincipal(r.Context(), p)
		if _, limited := errors.AsType[*identity.LimitedError](err); limited || errors.Is(err, identity.ErrUnauthenticated) {
			ctx = context.WithValue(ctx, whyKey{}, err)
		} else if err != nil {
			c.Log.Error("cannot authenticate", "error", err)
			http.Error(w, "cannot authenticate", http.StatusInternalServerError)
			return
		}
		ctx = context.WithValue(ctx, requestKey{}, r)
		mux.ServeHTTP(w, r.WithContext(context.WithValue(ctx, baseKey{}, baseOf(r))))
	})
}

// principal gives who makes a request.
func (s *server) principal(r *http.Request) (identity.Principal, error) {
	p, err := s.Auth.FromRequest(r)
	if err == nil && p.External {
		err = s.Store.External(r.Context(), p, false)
	}
	return p, err
}

// requestKey has the request of a call.
type requestKey struct{}

// again asks once more who makes a call that goes on for long, and whether
// they may: what they showed may have been taken back.
func (s *server) again(ctx context.Context, procedure string) (context.Context, error) {
	p, err := s.principal(ctx.Value(requestKey{}).(*http.Request))
	if err != nil {
		return ctx, err
	}
	return identity.WithPrincipal(ctx, p), identity.Allow(p, procedure)
}

// whyKey has the error by which a caller is nobody.
type whyKey struct{}

type baseKey struct{}

// deviceURL is the registry's base URL for the device that calls: devices
// always speak TLS.
func deviceURL(ctx context.Context) string {
	return "https://" + strings.TrimPrefix(strings.TrimPrefix(registryURL(ctx), "http://"), "https://")
}

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
type gate struct {
	log      *slog.Logger
	refusals identity.Refusals
}

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
		err := authorise(ctx, req.Spec().Procedure)
		var resp connect.AnyResponse
		if err == nil {
			resp, err = next(ctx, req)
		}
		err = g.coded(ctx, req.Spec().Procedure, err)
		g.note(ctx, req.Spec().Procedure, req.Any(), err)
		return resp, err
	}
}

func (g gate) WrapStreamingHandler(next connect.StreamingHandlerFunc) connect.StreamingHandlerFunc {
	return func(ctx context.Context, conn connect.StreamingHandlerConn) error {
		err := authorise(ctx, conn.Spec().Procedure)
		if err == nil {
			err = next(ctx, conn)
		}
		err = g.coded(ctx, conn.Spec().Procedure, err)
		g.note(ctx, conn.Spec().Procedure, nil, err)
		return err
	}
}

func (g gate) WrapStreamingClient(next connect.StreamingClientFunc) connect.StreamingClientFunc {
	return next
}

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
	_, faults := errors.AsType[fleet.Faults](err)
	_, taken := errors.AsType[registry.ErrVersionExists](err)
	switch {
	case errors.Is(ctx.Err(), context.DeadlineExceeded):
		code = connect.CodeDeadlineExceeded
	case ctx.Err() != nil:
		code = connect.CodeCanceled
	case faults, errors.Is(err, registry.ErrInvalid):
		code = connect.CodeInvalidArgument
	case errors.Is(err, registry.ErrNotFound):
		code = connect.CodeNotFound
	case taken:
		code = connect.CodeAlreadyExists
	case errors.Is(err, identity.ErrUnauthenticated):
		return connect.NewError(connect.CodeUnauthenticated, errors.New(strings.TrimPrefix(err.Error(), identity.ErrUnauthenticated.Error()+": ")))
	case denied:
		code = connect.CodePermissionDenied
	default:
		code = enrol.Code(err)
	}
	if code == connect.CodeInternal {
		g.log.Error("call failed", "procedure", procedure, "error", err)
		err = errors.New("internal error; the controller's log says more")
	}
	return connect.NewError(code, err)
}
