package access

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/dynamicpb"

	agentaccess "github.com/dunlin/dunlin/agent/access"
	"github.com/dunlin/dunlin/internal/e2e/byhand"
	"github.com/dunlin/dunlin/internal/pki"
	"github.com/dunlin/dunlin/proto/inference"
)

// Agent is one that serves a model by itself, with the keys that NewAgent has
// written.
type Agent struct {
	Model     string
	URL, GRPC string // where it answers, once it does
	args      []string
	roots     []*x509.Certificate
	callers   []asker
}

// asker is one identity at an agent.
type asker struct {
	name string
	key  string
	cert *tls.Certificate
	dead bool // its certificate ends every connection
	// What it may: nothing, something, ask for the model, for all models.
	known, model, models bool
}

// NewAgent writes the files of an agent with keys, and a repository with a
// model, to dir.
func NewAgent(dir, modelFile string) (*Agent, error) {
	a := &Agent{Model: "digits"}
	now := time.Now()
	key, err := pki.NewKey()
	if err != nil {
		return nil, err
	}
	other, err := pki.NewKey()
	if err != nil {
		return nil, err
	}
	foreignKey, err := pki.NewKey()
	if err != nil {
		return nil, err
	}
	ca, err := pki.NewAuthority(key, now, lifetime)
	if err != nil {
		return nil, err
	}
	foreign, err := pki.NewAuthority(foreignKey, now, lifetime)
	if err != nil {
		return nil, err
	}
	a.roots = []*x509.Certificate{ca.Certificate}
	server, err := ca.IssueController([]string{host}, other.Public(), now, lifetime)
	if err != nil {
		return nil, err
	}
	certificate := func(of *pki.Authority, name string, at time.Time) *tls.Certificate {
		leaf, e := of.IssueDevice(name, other.Public(), at, lifetime)
		if e != nil {
			err = errors.Join(err, e)
			return nil
		}
		return &tls.Certificate{Certificate: pki.Raw(of.Chain(leaf)), PrivateKey: other, Leaf: leaf}
	}
	all, one, another, expired := rand.Text(), rand.Text(), rand.Text(), rand.Text()
	a.callers = []asker{
		{name: "no key"},
		{name: "wrong key", key: rand.Text()},
		{name: "key for all models", key: all, known: true, model: true, models: true},
		{name: "key for the model", key: one, known: true, model: true},
		{name: "key for another model", key: another, known: true},
		{name: "expired key", key: expired},
		{name: "certificate for all models", cert: certificate(ca, "gateway", now), known: true, model: true, models: true},
		{name: "certificate for another model", cert: certificate(ca, "camera-1", now), known: true},
		{name: "certificate that no line is for", cert: certificate(ca, "stranger", now)},
		{name: "certificate of another authority", cert: certificate(foreign, "gateway", now), dead: true},
		{name: "expired certificate", cert: certificate(ca, "gateway", now.Add(-2*lifetime)), dead: true},
	}
	if err != nil {
		return nil, err
	}
	rules := fmt.Sprintf("%s\n%s name=one models=%s\n%s name=another models=other\n%s name=expired expires=2020-01-31\ncert=gateway\ncert=camera-* models=other\n",
		all, one, a.Model, another, expired)
	der, err := x509.MarshalPKCS8PrivateKey(other)
	if err != nil {
		return nil, err
	}
	model, err := os.ReadFile(modelFile)
	if err != nil {
		return nil, err
	}
	version := filepath.Join(dir, "models", a.Model, "1")
	if err := os.MkdirAll(version, 0o700); err != nil {
		return nil, err
	}
	path := func(name string) string { return filepath.Join(dir, name) }
	for file, content := range map[string][]byte{
		filepath.Join(version, "model.onnx"): model,
		path("keys"):                         []byte(rules),
		path("clients.pem"):                  pki.EncodeCertificates(ca.Certificate),
		path("cert.pem"):                     pki.EncodeCertificates(ca.Chain(server)...),
		path("key.pem"):                      pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}),
	} {
		if err := os.WriteFile(file, content, 0o600); err != nil {
			return nil, err
		}
	}
	a.args = []string{"--model-repository", path("models"), "--model-control", "explicit", "--load-model", a.Model, "--api-keys", path("keys"),
		"--client-ca", path("clients.pem"), "--tls-cert", path("cert.pem"), "--tls-key", path("key.pem")}
	return a, nil
}

// Args are those of dunlin-agent serve.
func (a *Agent) Args() []string { return slices.Clone(a.args) }

// Ready says whether the agent answers with its model.
func (a *Agent) Ready(ctx context.Context) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, a.URL+"/v2/health/ready", nil)
	if err != nil {
		return err
	}
	resp, err := byhand.User("", byhand.TLS(a.roots, nil, host)).Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return errors.New(resp.Status)
	}
	return nil
}

// Try tries everything at the agent.
func (a *Agent) Try(ctx context.Context) (r Result, err error) {
	methods := grpcMethods()
	for _, route := range agentaccess.Routes {
		if _, ok := methods[route.Call]; route.Call != "" && !ok {
			return r, fmt.Errorf("there is no %s", route.Call)
		}
	}
	for name := range methods {
		if !slices.ContainsFunc(agentaccess.Routes, func(r agentaccess.Route) bool { return r.Call == name }) {
			r.cell("everybody", name, false, true, "agent/access.Routes does not have it")
		}
	}
	for i, c := range a.callers {
		// An address of its own: wrong keys count against the one they come from.
		dial := byhand.DialFrom(net.IPv4(127, 0, 2, byte(1+i)))
		client := byhand.UserFrom(net.IPv4(127, 0, 2, byte(1+i)), c.key, byhand.TLS(a.roots, c.cert, host))
		conn, err := grpc.NewClient("passthrough:///"+a.GRPC, grpc.WithTransportCredentials(credentials.NewTLS(byhand.TLS(a.roots, c.cert, host))),
			grpc.WithContextDialer(func(ctx context.Context, address string) (net.Conn, error) { return dial(ctx, "tcp", address) }))
		if err != nil {
			return r, err
		}
		for _, route := range agentaccess.Routes {
			allowed, detail, err := false, "", error(nil)
			if route.Call != "" {
				allowed, detail, err = a.call(ctx, conn, c, route.Call, methods[route.Call])
			} else {
				allowed, detail, err = a.request(ctx, client, route)
			}
			if err != nil {
				return r, errors.Join(fmt.Errorf("%s: %s: %w", c.name, routeName(route), err), conn.Close())
			}
			r.cell(c.name, "agent: "+routeName(route), allowed, c.may(route), detail)
		}
		if err := conn.Close(); err != nil {
			return r, err
		}
	}
	return r, nil
}

// may is what agent/access.Routes says.
func (c asker) may(route agentaccess.Route) bool {
	switch route.Need {
	case agentaccess.Nothing:
		shows := c.key != "" || c.cert != nil
		return !c.dead && (route.Call == "" || !shows || c.known)
	case agentaccess.Known:
		return c.known
	case agentaccess.OfModel:
		return c.model
	}
	return c.models
}

func routeName(r agentaccess.Route) string {
	if r.Call != "" {
		return "gRPC " + r.Call[strings.LastIndex(r.Call, ".")+1:]
	}
	return r.Method + " " + r.Path
}

// request asks by REST. What is asked for may be off, or make no sense: that
// is no refusal.
func (a *Agent) request(ctx context.Context, client *http.Client, route agentaccess.Route) (allowed bool, detail string, err error) {
	var body io.Reader
	if route.Method == http.MethodPost {
		body = strings.NewReader(`{}`)
		for suffix, text := range map[string]string{
			"/trace/setting": `{"trace_rate":"1"}`, "/logging": `{"log_verbose_level":0}`,
			"/infer": `{"inputs":[{"name":"x","shape":[1],"datatype":"FP32","data":[0]}]}`,
		} {
			if strings.HasSuffix(route.Path, suffix) {
				body = strings.NewReader(text)
			}
		}
	}
	req, err := http.NewRequestWithContext(ctx, route.Method, a.URL+strings.ReplaceAll(route.Path, "{model}", a.Model), body)
	if err != nil {
		return false, "", err
	}
	resp, err := client.Do(req)
	if err != nil {
		return false, err.Error(), ctx.Err()
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err != nil {
		return false, "", err
	}
	refused := resp.StatusCode == http.StatusUnauthorized || resp.StatusCode == http.StatusForbidden || resp.StatusCode == http.StatusTooManyRequests
	return !refused, fmt.Sprintf("%d %.200s", resp.StatusCode, answer), nil
}

// grpcMethods are all that the descriptors of an agent's services have.
func grpcMethods() map[string]protoreflect.MethodDescriptor {
	all := map[string]protoreflect.MethodDescriptor{}
	for _, file := range []protoreflect.FileDescriptor{inference.File_inference_grpc_service_proto, healthpb.File_grpc_health_v1_health_proto} {
		for i := range file.Services().Len() {
			service := file.Services().Get(i)
			for j := range service.Methods().Len() {
				m := service.Methods().Get(j)
				all["/"+string(service.FullName())+"/"+string(m.Name())] = m
			}
		}
	}
	return all
}

// call asks by gRPC, about the model where the request has a field for its name.
func (a *Agent) call(ctx context.Context, conn *grpc.ClientConn, c asker, name string, m protoreflect.MethodDescriptor) (allowed bool, detail string, err error) {
	ctx, cancel := context.WithTimeout(ctx, settle)
	defer cancel()
	if c.key != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+c.key)
	}
	request, answer := dynamicpb.NewMessage(m.Input()), dynamicpb.NewMessage(m.Output())
	for _, field := range []protoreflect.Name{"model_name", "name"} {
		if f := m.Input().Fields().ByName(field); f != nil && !strings.Contains(name, "SharedMemory") {
			request.Set(f, protoreflect.ValueOfString(a.Model))
		}
	}
	if m.IsStreamingServer() {
		err = first(ctx, conn, name, m, request, answer)
	} else {
		err = conn.Invoke(ctx, name, request, answer)
	}
	// A stream of requests goes on where one of them is refused.
	if f := m.Output().Fields().ByName("error_message"); err == nil && f != nil {
		if text := answer.Get(f).String(); strings.Contains(text, "may not ask") {
			return false, text, nil
		}
	}
	switch status.Code(err) {
	case codes.DeadlineExceeded, codes.Canceled:
		return false, "", err
	case codes.Unauthenticated, codes.PermissionDenied, codes.ResourceExhausted, codes.Unavailable: // the connection ended
		return false, fmt.Sprint(err), nil
	}
	return true, fmt.Sprint(err), nil
}

// first gives the first answer of a stream.
func first(ctx context.Context, conn *grpc.ClientConn, name string, m protoreflect.MethodDescriptor, request, answer proto.Message) error {
	stream, err := conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true, ClientStreams: m.IsStreamingClient()}, name)
	if err != nil {
		return err
	}
	if err := stream.SendMsg(request); err != nil && !errors.Is(err, io.EOF) { // RecvMsg says why
		return err
	}
	if err := stream.CloseSend(); err != nil {
		return err
	}
	return stream.RecvMsg(answer)
}
