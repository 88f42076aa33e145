package identity

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/http"
	"strings"
	"time"

	"connectrpc.com/connect"

	"github.com/dunlin/dunlin/internal/link"
	"github.com/dunlin/dunlin/internal/pki"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
	"github.com/dunlin/dunlin/proto/dunlin/v1/dunlinv1connect"
)

const (
	callTimeout = 30 * time.Second
	maxAnswer   = 1 << 20
)

// service is how a device without a valid certificate asks the controller.
// The errors are Connect's.
type service interface {
	join(context.Context, *dunlinv1.JoinRequest) (*dunlinv1.JoinResponse, error)
	renew(context.Context, *dunlinv1.RenewRequest) (*dunlinv1.RenewResponse, error)
	time(context.Context, *dunlinv1.GetTimeRequest) (*dunlinv1.GetTimeResponse, error)
}

// service gives the controller's, by the TLS that by gives for its host.
func (d *Device) service(by func(host string) *tls.Config) service {
	controller := d.Stored().ControllerURL
	if strings.HasPrefix(controller, "mqtts://") {
		host := hostOf(controller)
		return overMQTT{controller, func() *tls.Config { return by(host) }, d.cfg.Dial}
	}
	c := d.client(controller, by)
	c.Timeout = callTimeout
	return overHTTPS{c, dunlinv1connect.NewEnrollmentServiceClient(c, controller, connect.WithReadMaxBytes(maxAnswer))}
}

type overHTTPS struct {
	http   *http.Client
	client dunlinv1connect.EnrollmentServiceClient
}

// call makes one call; there are months until the next.
func call[Q, A any](ctx context.Context, s overHTTPS, method func(context.Context, *connect.Request[Q]) (*connect.Response[A], error), q *Q) (*A, error) {
	defer s.http.CloseIdleConnections()
	a, err := method(ctx, connect.NewRequest(q))
	if err != nil {
		return nil, err
	}
	return a.Msg, nil
}

func (s overHTTPS) join(ctx context.Context, q *dunlinv1.JoinRequest) (*dunlinv1.JoinResponse, error) {
	return call(ctx, s, s.client.Join, q)
}

func (s overHTTPS) renew(ctx context.Context, q *dunlinv1.RenewRequest) (*dunlinv1.RenewResponse, error) {
	return call(ctx, s, s.client.Renew, q)
}

func (s overHTTPS) time(ctx context.Context, q *dunlinv1.GetTimeRequest) (*dunlinv1.GetTimeResponse, error) {
	return call(ctx, s, s.client.GetTime, q)
}

// overMQTT asks over the controller's broker.
type overMQTT struct {
	broker string
	tls    func() *tls.Config
	dial   func(ctx context.Context, network, address string) (net.Conn, error)
}

func (s overMQTT) ask(ctx context.Context, user, password string, q *dunlinv1.EnrolRequest) (*dunlinv1.EnrolResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	a, err := link.Enrol(ctx, link.Enrolment{BrokerURL: s.broker, User: user, Password: password, TLS: s.tls, Dial: s.dial}, q)
	if errors.Is(err, link.ErrStranger) {
		return nil, connect.NewError(connect.CodePermissionDenied, err)
	} else if err != nil {
		return nil, err
	}
	if e := a.GetError(); e != nil {
		return nil, connect.NewError(connect.Code(e.Code), errors.New(e.Message))
	}
	return a, nil
}

// errAnswer is the error of an answer to another question.
var errAnswer = errors.New("the controller's answer is not to what it was asked")

func (s overMQTT) join(ctx context.Context, q *dunlinv1.JoinRequest) (*dunlinv1.JoinResponse, error) {
	a, err := s.ask(ctx, link.TokenUser(q.JoinToken), q.JoinToken, &dunlinv1.EnrolRequest{Request: &dunlinv1.EnrolRequest_Join{Join: q}})
	if err == nil && a.GetJoin() == nil {
		err = errAnswer
	}
	return a.GetJoin(), err
}

func (s overMQTT) renew(ctx context.Context, q *dunlinv1.RenewRequest) (*dunlinv1.RenewResponse, error) {
	a, err := s.ask(ctx, link.RenewUser, link.RenewUser, &dunlinv1.EnrolRequest{Request: &dunlinv1.EnrolRequest_Renew{Renew: q}})
	if err == nil && a.GetRenew() == nil {
		err = errAnswer
	}
	return a.GetRenew(), err
}

func (s overMQTT) time(ctx context.Context, q *dunlinv1.GetTimeRequest) (*dunlinv1.GetTimeResponse, error) {
	a, err := s.ask(ctx, link.RenewUser, link.RenewUser, &dunlinv1.EnrolRequest{Request: &dunlinv1.EnrolRequest_Time{Time: q}})
	if err == nil && a.GetTime() == nil {
		err = errAnswer
	}
	return a.GetTime(), err
}

// refused says whether a controller has answered that it will not do what it
// was asked for.
func refused(err error) bool {
	switch connect.CodeOf(err) {
	case connect.CodeUnauthenticated, connect.CodePermissionDenied, connect.CodeInvalidArgument, connect.CodeAlreadyExists, connect.CodeFailedPrecondition:
		return true
	}
	return false
}

// messageOf gives what an error of a call says, without the name of its code.
func messageOf(err error) string {
	if e, ok := errors.AsType[*connect.Error](err); ok && e.Message() != "" {
		err = e.Unwrap()
	}
	if reason, ok := pki.Refusal(err); ok {
		return reason
	}
	return err.Error()
}
