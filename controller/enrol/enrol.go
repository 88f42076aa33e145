// Package enrol makes devices known: it gives certificates for join tokens and
// for older certificates, and says what time it is.
package enrol

import (
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/dunlin/dunlin/controller/dispatch"
	"github.com/dunlin/dunlin/controller/fleet"
	"github.com/dunlin/dunlin/controller/identity"
	"github.com/dunlin/dunlin/controller/store"
	"github.com/dunlin/dunlin/internal/link"
	"github.com/dunlin/dunlin/internal/pki"
	v1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// The limits of requests.
const (
	maxInfoBytes = 16 << 10
	minNonce     = 16
	maxNonce     = 64
	maxSignature = 256
	maxDER       = 8 << 10
	// maxTrust bounds the trust documents of one answer, which has to fit into
	// a message over MQTT: at least one of any size, and room for certificates.
	maxTrust = 96 << 10
	// MaxRequest bounds a request that comes over MQTT.
	MaxRequest = 64 << 10
)

// InvalidError is a request that cannot be served as it is.
type InvalidError struct{ error }

func (e InvalidError) Unwrap() error { return e.error }

// Invalid makes an InvalidError.
func Invalid(format string, args ...any) error { return InvalidError{fmt.Errorf(format, args...)} }

// Config is what a Service works with.
type Config struct {
	Store       *store.Store
	Authorities *identity.Authorities
	// Lifetime of a device's certificate, and how long after its end it can
	// be renewed.
	Lifetime, Grace time.Duration
	BrokerURL       string // that devices connect to
	RegistryURL     string // for those that ask over MQTT
	// Roots gives those under which the servers are that devices connect to.
	Roots func() []*x509.Certificate
	// Trust gives the signed trust documents from a version on.
	Trust func(ctx context.Context, from uint64) ([]*v1.SignedTrust, error)
	// AccountsChanged tells an external broker before a device is answered;
	// nil where there is none.
	AccountsChanged func(ctx context.Context) error
	// CutOff ends the session of a device whose place another one took; nil
	// where there are none.
	CutOff func(device string)
	// Joined is called when there is a new device, or one was made anew.
	Joined   func(device string)
	Refusals identity.Refusals
	Now      func() time.Time
	Log      *slog.Logger
}

// The work that comes over MQTT: what finds the queue full is dropped, and the
// device asks again.
const (
	workers = 4
	queue   = 4096
)

// Service is safe for concurrent use.
type Service struct {
	Config
	queue chan request
}

// request is one that came over MQTT.
type request struct {
	user, nonce string
	payload     []byte
}

// New gives a Service.
func New(c Config) *Service { return &Service{Config: c, queue: make(chan request, queue)} }

// Take takes in a request that came over MQTT; Run answers it.
func (s *Service) Take(user, nonce string, payload []byte) {
	select {
	case s.queue <- request{user, nonce, payload}:
	default:
		s.Log.Warn("an enrolling device has to ask again: too many do at a time", "user", user)
	}
}

// Run answers what Take took, until ctx is done.
func (s *Service) Run(ctx context.Context, publish func(topic string, payload []byte) error) error {
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			for {
				select {
				case <-ctx.Done():
					return
				case r := <-s.queue:
					if err := publish(link.JoinDown(r.user, r.nonce), s.Handle(ctx, r.user, r.payload)); err != nil {
						s.Log.Debug("answer to an enrolling device not published", "user", r.user, "error", err)
					}
				}
			}
		})
	}
	wg.Wait()
	return nil
}

// Join makes a device known; see store.Join for its errors. registryURL is
// where the device finds the registry.
func (s *Service) Join(ctx context.Context, m *v1.JoinRequest, registryURL string) (*v1.JoinResponse, error) {
	if err := link.CheckDevice(m.GetName()); err != nil {
		return nil, Invalid("name: %w", err)
	}
	if err := fleet.CheckLabels(m.GetLabels()); err != nil {
		return nil, Invalid("labels: %w", err)
	}
	if n := proto.Size(m.GetInfo()); n > maxInfoBytes {
		return nil, Invalid("info has %d bytes, the limit is %d", n, maxInfoBytes)
	}
	if err := dispatch.CheckNumbers(m.GetInfo()); err != nil {
		return nil, Invalid("info: %w", err)
	}
	key, id, err := requested(m.GetCsr())
	if err != nil {
		return nil, err
	}
	replaced := false
	cert, err := s.Store.Join(ctx, store.Join{
		Replaced: func() { replaced = true },
		Token:    identity.Hash(m.GetJoinToken()), Device: m.GetName(), Key: id, Labels: m.GetLabels(), Info: m.GetInfo(),
		Issue: s.issue(m.GetName(), key),
	})
	if err != nil {
		return nil, err
	}
	if s.AccountsChanged != nil {
		err = s.AccountsChanged(ctx)
	}
	if replaced && s.CutOff != nil {
		s.CutOff(m.GetName())
	}
	if err != nil {
		return nil, err
	}
	s.Joined(m.GetName())
	issued, err := s.identity(ctx, cert, 0)
	if err != nil {
		return nil, err
	}
	return &v1.JoinResponse{
		Device: m.GetName(), Shard: link.Shard(m.GetName()), BrokerUrl: s.BrokerURL, RegistryUrl: registryURL, Identity: issued,
	}, nil
}

// requested gives the key of a certificate request, and its name.
func requested(csr []byte) (crypto.PublicKey, string, error) {
	key, err := pki.ParseRequest(csr)
	if err != nil {
		return nil, "", InvalidError{err}
	}
	id, err := pki.ID(key)
	return key, id, err
}

func (s *Service) issue(device string, key crypto.PublicKey) func() (*x509.Certificate, error) {
	return func() (*x509.Certificate, error) { return s.Authorities.IssueDevice(device, key, s.Lifetime) }
}

// identity is what a device is told of itself and of those it trusts.
func (s *Service) identity(ctx context.Context, cert *x509.Certificate, trust uint64) (*v1.Identity, error) {
	documents, err := s.Trust(ctx, trust)
	if err != nil {
		return nil, fmt.Errorf("trust documents: %w", err)
	}
	return &v1.Identity{
		Certificates: pki.Raw(s.Authorities.Chain(cert)), Roots: pki.Raw(s.Roots()),
		Trust: part(documents, trust == 0), Now: timestamppb.New(s.Now()),
	}, nil
}

// part gives the documents of a chain that one answer holds: the first of them,
// after which the device asks again, as it still trusts too little; or, for one
// that has none, which takes any for its first, the newest.
func part(chain []*v1.SignedTrust, none bool) []*v1.SignedTrust {
	if none && len(chain) > 0 {
		return chain[len(chain)-1:]
	}
	size := 0
	for i, signed := range chain {
		if size += proto.Size(signed); size > maxTrust && i > 0 {
			return chain[:i]
		}
	}
	return chain
}

// Renew gives a device a new certificate for the one it has, which may have
// expired no longer than Grace ago. What proves that it is the device's own is
// the signature of its key.
func (s *Service) Renew(ctx context.Context, m *v1.RenewRequest, registryURL string) (*v1.RenewResponse, error) {
	for name, part := range map[string][]byte{"certificate": m.GetCertificate(), "signature": m.GetSignature()} {
		limit := map[string]int{"certificate": maxDER, "signature": maxSignature}[name]
		if n := len(part); n == 0 || n > limit {
			return nil, Invalid("%s has %d bytes, allowed are 1 to %d", name, n, limit)
		}
	}
	old, err := x509.ParseCertificate(m.GetCertificate())
	if err != nil {
		return nil, Invalid("certificate is not one in DER")
	}
	device, ok := pki.DeviceOf(old)
	if !ok {
		return nil, Invalid("certificate is not a device's")
	}
	key, id, err := requested(m.GetCsr())
	if err != nil {
		return nil, err
	}
	if err := s.proves(old, m); err != nil {
		return nil, err
	}
	cert, err := s.Store.Renew(ctx, store.Renewal{Device: device, Old: old, Key: id, Issue: s.issue(device, key)})
	if errors.Is(err, identity.ErrUnknown) || errors.Is(err, identity.ErrRevoked) {
		err = fmt.Errorf("%w: %w", identity.ErrUnauthenticated, err)
	}
	if err != nil {
		return nil, err
	}
	issued, err := s.identity(ctx, cert, m.GetTrustVersion())
	if err != nil {
		return nil, err
	}
	return &v1.RenewResponse{Identity: issued, BrokerUrl: s.BrokerURL, RegistryUrl: registryURL}, nil
}

// proves says whether a renewal is the owner's of a certificate that counts,
// or has until recently.
func (s *Service) proves(old *x509.Certificate, m *v1.RenewRequest) error {
	now := s.Now()
	if over := now.Sub(old.NotAfter); over > s.Grace {
		return fmt.Errorf("%w: the certificate expired %s ago, it could be renewed for %s; join again", identity.ErrUnauthenticated, over.Round(time.Hour), s.Grace)
	}
	at := pki.Within(now, []*x509.Certificate{old})
	if err := pki.VerifyChain([]*x509.Certificate{old}, s.Authorities.Roots(), at, x509.ExtKeyUsageClientAuth); err != nil {
		return fmt.Errorf("%w: certificate: %w", identity.ErrUnauthenticated, err)
	}
	if err := pki.Verify(old.PublicKey, pki.RenewalMessage(m.GetCertificate(), m.GetCsr()), m.GetSignature()); err != nil {
		return fmt.Errorf("%w: %w", identity.ErrUnauthenticated, err)
	}
	return nil
}

// Time says what time it is.
func (s *Service) Time(_ context.Context, m *v1.GetTimeRequest) (*v1.GetTimeResponse, error) {
	if n := len(m.GetNonce()); n < minNonce || n > maxNonce {
		return nil, Invalid("nonce has %d bytes, allowed are %d to %d", n, minNonce, maxNonce)
	}
	now, signature, chain, err := s.Authorities.SignTime(m.GetNonce())
	if err != nil {
		return nil, err
	}
	return &v1.GetTimeResponse{Now: timestamppb.New(now), Signature: signature, Certificates: chain}, nil
}

// Handle answers a request that came over MQTT from a user: the encoded
// v1.EnrolResponse. A user that holds a join token can join with that token
// only.
func (s *Service) Handle(ctx context.Context, user string, payload []byte) []byte {
	answer := &v1.EnrolResponse{}
	switch m, err := s.handle(ctx, user, payload); {
	case err != nil:
		s.refused(ctx, user, payload, err)
		answer.Response = &v1.EnrolResponse_Error{Error: s.errorOf(err)}
	default:
		answer = m
	}
	b, err := proto.Marshal(answer)
	if err != nil {
		s.Log.Error("cannot encode an answer to an enrolling device", "error", err)
	}
	return b
}

func (s *Service) handle(ctx context.Context, user string, payload []byte) (*v1.EnrolResponse, error) {
	m := &v1.EnrolRequest{}
	if len(payload) > MaxRequest {
		return nil, Invalid("the request has %d bytes, the limit is %d", len(payload), MaxRequest)
	}
	if err := proto.Unmarshal(payload, m); err != nil {
		return nil, Invalid("the request is not an EnrolRequest")
	}
	switch r := m.GetRequest().(type) {
	case *v1.EnrolRequest_Join:
		if user != link.TokenUser(r.Join.GetJoinToken()) {
			return nil, Invalid("join_token is not that of the user %s", user)
		}
		answer, err := s.Join(ctx, r.Join, s.RegistryURL)
		return &v1.EnrolResponse{Response: &v1.EnrolResponse_Join{Join: answer}}, err
	case *v1.EnrolRequest_Renew:
		answer, err := s.Renew(ctx, r.Renew, s.RegistryURL)
		return &v1.EnrolResponse{Response: &v1.EnrolResponse_Renew{Renew: answer}}, err
	case *v1.EnrolRequest_Time:
		answer, err := s.Time(ctx, r.Time)
		return &v1.EnrolResponse{Response: &v1.EnrolResponse_Time{Time: answer}}, err
	default:
		return nil, Invalid("the request asks for nothing")
	}
}

// Code gives the code of an error of this package and of the store's, or
// CodeInternal.
func Code(err error) connect.Code {
	_, bad := errors.AsType[InvalidError](err)
	switch {
	case bad:
		return connect.CodeInvalidArgument
	case errors.Is(err, identity.ErrUnauthenticated):
		return connect.CodeUnauthenticated
	case errors.Is(err, store.ErrRefused):
		return connect.CodePermissionDenied
	case errors.Is(err, store.ErrExists):
		return connect.CodeAlreadyExists
	case errors.Is(err, store.ErrNotFound):
		return connect.CodeNotFound
	case errors.Is(err, store.ErrState):
		return connect.CodeFailedPrecondition
	case errors.Is(err, store.ErrLimit):
		return connect.CodeResourceExhausted
	}
	return connect.CodeInternal
}

// refused tells the audit log of a request over MQTT that was refused for who
// made it; of those over HTTPS the API tells.
func (s *Service) refused(ctx context.Context, user string, payload []byte, err error) {
	if code := Code(err); code != connect.CodeUnauthenticated && code != connect.CodePermissionDenied {
		return
	}
	r := identity.Refusal{Action: "device.enrol", Object: "mqtt/" + user, Reason: err.Error()}
	m := &v1.EnrolRequest{}
	if proto.Unmarshal(payload, m) == nil && m.GetJoin() != nil {
		r.Action, r.Object = "device.join", "device/"+m.GetJoin().GetName()
	}
	s.Refusals.Refused(ctx, r)
}

func (s *Service) errorOf(err error) *v1.EnrolError {
	code := Code(err)
	if code == connect.CodeInternal {
		s.Log.Error("cannot answer an enrolling device", "error", err)
		err = errors.New("internal error; the controller's log says more")
	}
	return &v1.EnrolError{Code: uint32(code), Message: err.Error()}
}
