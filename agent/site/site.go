// Package site lets the devices of a site fetch bundles from each other: a
// server of what a device has, and a client, each of which shows and demands a
// certificate of the fleet.
package site

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/dunlin/dunlin/internal/pki"
	"github.com/dunlin/dunlin/models"
)

// Identity is who the device is.
type Identity interface {
	// TLSCertificate gives the device's certificate; an error until it has one.
	TLSCertificate() (*tls.Certificate, error)
	Roots() []*x509.Certificate // of the fleet
	Now() time.Time
}

// Open gives a blob or manifest of a model, its size, and how to close it; the
// error is fs.ErrNotExist where the device does not have it.
type Open func(ctx context.Context, model string, d digest.Digest, manifest bool) (io.ReadSeeker, io.Closer, error)

const (
	// maxRequests bounds the answers under way, and maxWaiting those that wait
	// for their turn, for as long as waitTime; who comes then, or has waited for
	// so long, is told to ask elsewhere.
	maxRequests = 64
	maxWaiting  = 512
	waitTime    = 20 * time.Second
	// maxConnections bounds the connections; others wait until one ends.
	maxConnections = 1024
	// writeTime bounds how long a client may take no byte, and bodyTime how long
	// it may take to send the body of a request, which none should have.
	writeTime = 30 * time.Second
	bodyTime  = 10 * time.Second
	// stopTime is how long answers under way may take when the server stops.
	stopTime = time.Second
)

// Server answers the devices of its fleet.
type Server struct {
	listener net.Listener
	log      *slog.Logger
}

// Listen begins to listen at an address; Run answers.
func Listen(address string, log *slog.Logger) (*Server, error) {
	l, err := net.Listen("tcp", address)
	if err != nil {
		return nil, err
	}
	return &Server{&bounded{l, make(chan struct{}, maxConnections)}, log}, nil
}

// URL is where others of the site reach the server: the address that it
// listens at, or, where that is all of the host's, the host's first that is
// not for itself.
func (s *Server) URL() (string, error) {
	at := s.listener.Addr().(*net.TCPAddr)
	host := at.IP
	if host.IsUnspecified() {
		addresses, err := net.InterfaceAddrs()
		if err != nil {
			return "", err
		}
		i := slices.IndexFunc(addresses, func(a net.Addr) bool {
			n, ok := a.(*net.IPNet)
			return ok && n.IP.IsGlobalUnicast()
		})
		if i < 0 {
			return "", fmt.Errorf("%s: this host has no address that others reach", at)
		}
		host = addresses[i].(*net.IPNet).IP
	}
	return "https://" + net.JoinHostPort(host.String(), strconv.Itoa(at.Port)), nil
}

// server answers as a device, with what open gives.
func (s *Server) server(id Identity, open Open) *http.Server {
	secure := pki.ServerConfig(id.TLSCertificate, id.Roots, tls.RequireAndVerifyClientCert)
	choose := secure.GetConfigForClient
	secure.GetConfigForClient = func(h *tls.ClientHelloInfo) (*tls.Config, error) {
		c, err := choose(h)
		if err == nil {
			c.Time, c.NextProtos = id.Now, []string{"http/1.1"}
		}
		return c, err
	}
	return &http.Server{
		Handler: handler(open, s.log), TLSConfig: secure, ErrorLog: slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
		ReadHeaderTimeout: 10 * time.Second, IdleTimeout: time.Minute, MaxHeaderBytes: 16 << 10,
		TLSNextProto: map[string]func(*http.Server, *tls.Conn, http.Handler){},
	}
}

// Close stops a server that Run was not called for.
func (s *Server) Close() error { return s.listener.Close() }

// Run answers until ctx is done.
func (s *Server) Run(ctx context.Context, id Identity, open Open) error {
	server := s.server(id, open)
	ended := make(chan error, 1)
	go func() { ended <- server.ServeTLS(s.listener, "", "") }()
	select {
	case err := <-ended:
		return err
	case <-ctx.Done():
	}
	stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTime)
	defer cancel()
	if server.Shutdown(stop) != nil {
		server.Close()
	}
	<-ended
	return nil
}

// Routes are what a server answers, to every device of its fleet.
var Routes = []string{"GET /v2/{model}/manifests/{digest}", "GET /v2/{model}/blobs/{digest}"}

// handler answers as an OCI registry does.
func handler(open Open, log *slog.Logger) http.Handler {
	mux := http.NewServeMux()
	places, waiting := make(chan struct{}, maxRequests), make(chan struct{}, maxWaiting)
	for i, route := range Routes {
		manifest := i == 0
		mux.HandleFunc(route, func(w http.ResponseWriter, r *http.Request) {
			if _, ok := device(r.TLS); !ok {
				http.Error(w, "only devices are answered", http.StatusForbidden)
				return
			}
			model, d := r.PathValue("model"), digest.Digest(r.PathValue("digest"))
			if models.CheckName(model) != nil || d.Validate() != nil || d.Algorithm() != digest.SHA256 {
				http.Error(w, "no such model or digest", http.StatusNotFound)
				return
			}
			if !turn(r.Context(), places, waiting) {
				http.Error(w, fmt.Sprintf("%d answers are under way", maxRequests), http.StatusServiceUnavailable)
				return
			}
			defer func() { <-places }()
			content, closer, err := open(r.Context(), model, d, manifest)
			if err != nil {
				log.Debug("not given to the site", "model", model, "digest", d, "error", err)
				http.Error(w, "not here", http.StatusNotFound)
				return
			}
			defer closer.Close()
			w.Header().Set("Content-Type", "application/octet-stream")
			w.Header().Set("Docker-Content-Digest", d.String())
			w.Header().Set("ETag", `"`+d.String()+`"`)
			http.ServeContent(w, r, "", time.Time{}, content)
		})
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		p := &patient{w, http.NewResponseController(w)}
		if r.ContentLength != 0 {
			if err := p.control.SetReadDeadline(time.Now().Add(bodyTime)); err != nil {
				panic(http.ErrAbortHandler)
			}
		}
		mux.ServeHTTP(p, r)
	})
}

// bounded is a listener that has so many connections at a time; others wait.
type bounded struct {
	net.Listener
	places chan struct{}
}

func (b *bounded) Accept() (net.Conn, error) {
	b.places <- struct{}{} // a connection ends by itself when nothing comes
	c, err := b.Listener.Accept()
	if err != nil {
		<-b.places
		return nil, err
	}
	return &placed{Conn: c, leave: sync.OnceFunc(func() { <-b.places })}, nil
}

type placed struct {
	net.Conn
	leave func()
}

func (p *placed) Close() error {
	defer p.leave()
	return p.Conn.Close()
}

// turn waits for a place, and says whether there was one.
func turn(ctx context.Context, places, waiting chan struct{}) bool {
	select {
	case places <- struct{}{}:
		return true
	default:
	}
	select {
	case waiting <- struct{}{}:
		defer func() { <-waiting }()
	default:
		return false
	}
	late := time.NewTimer(waitTime)
	defer late.Stop()
	select {
	case places <- struct{}{}:
		return true
	case <-late.C:
	case <-ctx.Done():
	}
	return false
}

// device gives the name of the device at the other end.
func device(s *tls.ConnectionState) (string, bool) {
	if s == nil || len(s.PeerCertificates) == 0 {
		return "", false
	}
	return pki.DeviceOf(s.PeerCertificates[0])
}

// patient gives each write its time: that of the answer before does not count.
type patient struct {
	http.ResponseWriter
	control *http.ResponseController
}

func (p *patient) WriteHeader(status int) {
	if p.control.SetWriteDeadline(time.Now().Add(writeTime)) == nil { // else Write says so
		p.ResponseWriter.WriteHeader(status)
	}
}

func (p *patient) Write(b []byte) (int, error) {
	if err := p.control.SetWriteDeadline(time.Now().Add(writeTime)); err != nil {
		return 0, err
	}
	return p.ResponseWriter.Write(b)
}

// NewClient gives a client of the device of that name, wherever it is: what
// counts is its certificate. It keeps no connection for long.
func NewClient(id Identity, name string) *http.Client {
	secure := &tls.Config{
		MinVersion: tls.VersionTLS13, Time: id.Now,
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return id.TLSCertificate() },
		// VerifyConnection verifies: a device's certificate has its name, and no
		// address.
		InsecureSkipVerify: true,
		VerifyConnection: func(s tls.ConnectionState) error {
			if got, ok := device(&s); !ok || got != name {
				return fmt.Errorf("it is not the device %s that answers", name)
			}
			return pki.VerifyChain(s.PeerCertificates, id.Roots(), id.Now(), x509.ExtKeyUsageServerAuth)
		},
	}
	return &http.Client{
		Transport: &http.Transport{
			TLSClientConfig: secure, DialContext: (&net.Dialer{Timeout: 5 * time.Second}).DialContext, TLSHandshakeTimeout: 10 * time.Second,
			MaxIdleConnsPerHost: 2, MaxConnsPerHost: 4, IdleConnTimeout: 5 * time.Second, DisableCompression: true,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return errors.New("a redirect, which is not followed") },
	}
}
