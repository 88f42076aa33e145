// Package api answers the controller's Connect services.
package api

import (
	"context"
	"errors"
	"log/slog"
	"net/http"

	"connectrpc.com/connect"

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

	Enrol *enrol.Service
	// Authorities vouch for devices.
	Authorities *identity.Authorities

	Version string // of the controller
	// AccountsChanged tells an external broker of revoked devices, join tokens
	// and authorities before the call that changed them answers; nil where there is none.
	AccountsChanged func(ctx context.Context) error
	// Stopping is closed when streams are to end.
	Stopping <-chan struct{}
}

type server struct {
	v1connect.UnimplementedAuthServiceHandler
	v1connect.UnimplementedEnrollmentServiceHandler
	v1connect.UnimplementedTrustServiceHandler
	Config
}

// New gives the handler of all services.
func New(c Config) http.Handler {
	s := &server{Config: c}
	options := connect.WithHandlerOptions(connect.WithInterceptors(gate{c.Log, c.Store}), connect.WithReadMaxBytes(maxRequest))
	mux := http.NewServeMux()
	mux.Handle(v1connect.NewAuthServiceHandler(s, options))
	mux.Handle(v1connect.NewEnrollmentServiceHandler(s, options))
	mux.Handle(v1connect.NewModelServiceHandler(s, options))
	mux.Handle(v1connect.NewObjectServiceHandler(s, options))
	mux.Handle(v1connect.NewProfileServiceHandler(s, options))
	mux.Handle(v1connect.NewRolloutServiceHandler(s, options))
	mux.Handle(v1connect.NewDeviceServiceHandler(s, options))
	mux.Handle(v1connect.NewTrustServiceHandler(s, options))
	mux.Handle(v1connect.NewAuditServiceHandler(s, options))
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		p, err := c.Auth.FromRequest(r)
		if err != nil && !errors.Is(err, identity.ErrUnauthenticated) {
			c.Log.Error("cannot authenticate", "error", err)
			http.Error(w, "cannot authenticate", http.StatusInternalServerError)
			return
		}
		p.From = r.RemoteAddr
		ctx := identity.WithPrincipal(r.Context(), p)
		mux.ServeHTTP(w, r.WithContext(context.WithValue(ctx, hostKey{}, r.Host)))
	})
}

type hostKey struct{}

// deviceURL is the registry's base URL for the device that calls: devices
// always speak TLS.
func deviceURL(ctx context.Context) string {
	host, _ := ctx.Value(hostKey{}).(string)
	return "https://" + host
}

// registryURL gives the registry's base URL as this caller reaches it: both
// are on one port, which may have other names behind a proxy.
func registryURL(ctx context.Context) string {
	host, _ := ctx.Value(hostKey{}).(string)
	return "http://" + host
}

// anyone marks a procedure that needs no identity.
const anyone = identity.Role("")

// roles gives the least role for each procedure. One that is not here may be
// called by nobody; devices may call only what anyone may.
var roles = map[string]identity.Role{
	v1connect.AuthServiceWhoAmIProcedure:          identity.Viewer,
	v1connect.AuthServiceLoginProcedure:           anyone, // by name and password
	v1connect.AuthServiceGetLoginMethodsProcedure: anyone,

	v1connect.UserServiceCreateUserProcedure:  identity.Admin,
	v1connect.UserServiceUpdateUserProcedure:  identity.Admin,
	v1connect.UserServiceDeleteUserProcedure:  identity.Admin,
	v1connect.UserServiceListUsersProcedure:   identity.Admin,
	v1connect.UserServiceCreateTokenProcedure: identity.Viewer,
	v1connect.UserServiceListTokensProcedure:  identity.Viewer,
	v1connect.UserServiceDeleteTokenProcedure: identity.Viewer,

	v1connect.AuditServiceListAuditProcedure: identity.Admin,

	v1connect.TrustServiceGetTrustProcedure:        identity.Viewer,
	v1connect.TrustServicePutTrustProcedure:        identity.Admin,
	v1connect.TrustServiceGetAuthoritiesProcedure:  identity.Viewer,
	v1connect.TrustServiceRotateAuthorityProcedure: identity.Admin,
	v1connect.TrustServiceRetireAuthorityProcedure: identity.Admin,

	v1connect.EnrollmentServiceJoinProcedure:            anyone, // by its join token
	v1connect.EnrollmentServiceRenewProcedure:           anyone, // by the old key's signature
	v1connect.EnrollmentServiceGetTimeProcedure:         anyone,
	v1connect.EnrollmentServiceCreateJoinTokenProcedure: identity.Admin,
	v1connect.EnrollmentServiceDeleteJoinTokenProcedure: identity.Admin,
	v1connect.EnrollmentServiceListJoinTokensProcedure:  identity.Admin,

	v1connect.ModelServiceCreateVersionProcedure: identity.Operator,
	v1connect.ModelServiceListModelsProcedure:    identity.Viewer,

	v1connect.ObjectServiceApplyProcedure:           identity.Operator,
	v1connect.ObjectServiceDeleteProcedure:          identity.Operator,
	v1connect.ObjectServiceListDeploymentsProcedure: identity.Viewer,
	v1connect.ObjectServiceListRoutesProcedure:      identity.Viewer,

	v1connect.ProfileServiceListProfilesProcedure: identity.Viewer,
	v1connect.ProfileServicePlanProcedure:         identity.Viewer,

	v1connect.RolloutServiceListRolloutsProcedure: identity.Viewer,
	v1connect.RolloutServiceGetRolloutProcedure:   identity.Viewer,
	v1connect.RolloutServiceWatchRolloutProcedure: identity.Viewer,

	v1connect.DeviceServiceListDevicesProcedure:  identity.Viewer,
	v1connect.DeviceServiceRemoveDeviceProcedure: identity.Admin,
	v1connect.DeviceServiceRevokeDeviceProcedure: identity.Admin,
	v1connect.DeviceServiceListEventsProcedure:   identity.Viewer,
}

// gate authorises each call and gives its error a code.
type gate struct {
	log      *slog.Logger
	refusals identity.Refusals
}

func authorise(ctx context.Context, procedure string) error {
	role, ok := roles[procedure]
	p := identity.FromContext(ctx)
	switch {
	case ok && role == anyone, ok && p.May(role):
		return nil
	case p.Kind == 0:
		return connect.NewError(connect.CodeUnauthenticated, errors.New("credentials are missing or wrong"))
	default:
		return connect.NewError(connect.CodePermissionDenied, errors.New(p.String()+" lacks the role "+string(role)))
	}
}

func (g gate) WrapUnary(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
		err := authorise(ctx, req.Spec().Procedure)
		var resp connect.AnyResponse
		if err == nil {
			resp, err = next(ctx, req)
			err = g.coded(ctx, req.Spec().Procedure, err)
		}
		g.note(ctx, req.Spec().Procedure, req.Any(), err)
		return resp, err
	}
}

func (g gate) WrapStreamingHandler(next connect.StreamingHandlerFunc) connect.StreamingHandlerFunc {
	return func(ctx context.Context, conn connect.StreamingHandlerConn) error {
		err := authorise(ctx, conn.Spec().Procedure)
		if err == nil {
			err = g.coded(ctx, conn.Spec().Procedure, next(ctx, conn))
		}
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
	code := connect.CodeInternal
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
	default:
		code = enrol.Code(err)
	}
	if code == connect.CodeInternal {
		g.log.Error("call failed", "procedure", procedure, "error", err)
		err = errors.New("internal error; the controller's log says more")
	}
	return connect.NewError(code, err)
}
