package main

import (
	"context"
	"net/http"
	"net/url"
	"time"

	"connectrpc.com/connect"

	"github.com/dunlin/dunlin/internal/pki"
	"github.com/dunlin/dunlin/proto/dunlin/v1/dunlinv1connect"
)

// callTimeout bounds a call that only looks something up or changes a record.
const callTimeout = 30 * time.Second

// client is the API of the controller that the settings name.
type client struct {
	settings
	http *http.Client
	opts []connect.ClientOption
}

// client gives the API of the controller in use.
func (c *cli) client() (*client, error) {
	s, err := c.settings()
	if err != nil {
		return nil, err
	}
	return newClient(s)
}

// newClient gives the client of a controller. Over TLS it believes the
// controller's certificate authorities and those of the system.
func newClient(s settings) (*client, error) {
	u, err := url.Parse(s.URL)
	if err != nil {
		return nil, err
	}
	roots, err := s.roots()
	if err != nil {
		return nil, err
	}
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.TLSClientConfig = pki.ClientConfig(pki.Client{Trust: func() pki.Trust { return pki.Trust{Roots: roots, System: true} }}, u.Hostname())
	return &client{
		settings: s,
		http: &http.Client{
			Transport: transport,
			// A redirect could carry the token to where it does not belong.
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
		opts: []connect.ClientOption{connect.WithInterceptors(bearer(s.Token))},
	}, nil
}

func (c *client) auth() dunlinv1connect.AuthServiceClient {
	return dunlinv1connect.NewAuthServiceClient(c.http, c.URL, c.opts...)
}
func (c *client) audit() dunlinv1connect.AuditServiceClient {
	return dunlinv1connect.NewAuditServiceClient(c.http, c.URL, c.opts...)
}
func (c *client) users() dunlinv1connect.UserServiceClient {
	return dunlinv1connect.NewUserServiceClient(c.http, c.URL, c.opts...)
}
func (c *client) enrollment() dunlinv1connect.EnrollmentServiceClient {
	return dunlinv1connect.NewEnrollmentServiceClient(c.http, c.URL, c.opts...)
}
func (c *client) models() dunlinv1connect.ModelServiceClient {
	return dunlinv1connect.NewModelServiceClient(c.http, c.URL, c.opts...)
}
func (c *client) objects() dunlinv1connect.ObjectServiceClient {
	return dunlinv1connect.NewObjectServiceClient(c.http, c.URL, c.opts...)
}
func (c *client) profiles() dunlinv1connect.ProfileServiceClient {
	return dunlinv1connect.NewProfileServiceClient(c.http, c.URL, c.opts...)
}
func (c *client) rollouts() dunlinv1connect.RolloutServiceClient {
	return dunlinv1connect.NewRolloutServiceClient(c.http, c.URL, c.opts...)
}
func (c *client) devices() dunlinv1connect.DeviceServiceClient {
	return dunlinv1connect.NewDeviceServiceClient(c.http, c.URL, c.opts...)
}

// call makes a unary call within callTimeout and gives the answer's message.
func call[Req, Res any](ctx context.Context, f func(context.Context, *connect.Request[Req]) (*connect.Response[Res], error), req *Req) (*Res, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	return callLong(ctx, f, req)
}

// callLong makes a unary call that may take as long as ctx allows.
func callLong[Req, Res any](ctx context.Context, f func(context.Context, *connect.Request[Req]) (*connect.Response[Res], error), req *Req) (*Res, error) {
	res, err := f(ctx, connect.NewRequest(req))
	if err != nil {
		return nil, err
	}
	return res.Msg, nil
}

// bearer sends a token with every call; "" sends none.
type bearer string

func (b bearer) header() string { return "Bearer " + string(b) }

func (b bearer) WrapUnary(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
		if b != "" {
			req.Header().Set("Authorization", b.header())
		}
		return next(ctx, req)
	}
}

func (b bearer) WrapStreamingClient(next connect.StreamingClientFunc) connect.StreamingClientFunc {
	return func(ctx context.Context, spec connect.Spec) connect.StreamingClientConn {
		conn := next(ctx, spec)
		conn.RequestHeader().Set("Authorization", b.header())
		return conn
	}
}

func (b bearer) WrapStreamingHandler(next connect.StreamingHandlerFunc) connect.StreamingHandlerFunc {
	return next
}
