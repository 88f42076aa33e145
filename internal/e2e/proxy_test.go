package e2e

import (
	"io"
	"net/http"
	"net/http/httputil"
	"net/url"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/dunlin/dunlin/internal/pki"
	"github.com/dunlin/dunlin/internal/pki/pkitest"
)

// blobProxy stands between a device and the controller's HTTPS port, counts
// the bytes of blobs that pass, and can hold them up. It has a certificate of
// the controller's authority, and asks the controller in the administrator's
// name.
type blobProxy struct {
	url string

	mu     sync.Mutex
	bytes  int64
	ranges []string // the Range headers of requests for blobs
	at     int64    // where bytes stop to pass, while hit is not nil
	hit    chan struct{}
	resume chan struct{}
}

func newBlobProxy(t *testing.T, f *Fleet) *blobProxy {
	t.Helper()
	to, err := url.Parse(f.URL)
	if err != nil {
		t.Fatal(err)
	}
	p := &blobProxy{}
	reverse := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(to)
			r.Out.Host = r.In.Host // the controller gives devices the address that they called
			r.Out.Header.Set("Authorization", "Bearer "+f.Token)
		},
		FlushInterval: -1,
		ErrorHandler:  func(w http.ResponseWriter, _ *http.Request, _ error) { w.WriteHeader(http.StatusBadGateway) },
		ModifyResponse: func(r *http.Response) error {
			if strings.Contains(r.Request.URL.Path, "/blobs/") {
				p.mu.Lock()
				p.ranges = append(p.ranges, r.Request.Header.Get("Range"))
				p.mu.Unlock()
				r.Body = &countedBody{r.Body, p}
			}
			return nil
		},
	}
	listen, err := FreeAddress()
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Addr: listen, Handler: reverse, TLSConfig: pkitest.ServerTLS(t, authority(t, f))}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = server.ListenAndServeTLS("", "")
	}()
	t.Cleanup(func() {
		_ = server.Close()
		<-done
	})
	p.url = "https://" + listen
	return p
}

// authority is the controller's own.
func authority(t *testing.T, f *Fleet) *pki.Authority {
	t.Helper()
	certs, err := pki.ReadCertificates(filepath.Join(f.Dir, "controller", "ca.pem"))
	if err != nil {
		t.Fatal(err)
	}
	key, err := pki.ReadKey(filepath.Join(f.Dir, "controller", "ca", pki.CertificateID(certs[0])+".key"))
	if err != nil {
		t.Fatal(err)
	}
	a, err := pki.LoadAuthority(certs[0], nil, key)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// passed gives how many bytes of blobs have passed.
func (p *blobProxy) passed() int64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.bytes
}

// hold lets n more bytes pass and no more: the channel that it gives is closed
// then. Calling release lets the rest pass.
func (p *blobProxy) hold(n int64) (held <-chan struct{}, release func()) {
	hit, resume := make(chan struct{}), make(chan struct{})
	p.mu.Lock()
	defer p.mu.Unlock()
	p.at, p.hit, p.resume = p.bytes+n, hit, resume
	return hit, sync.OnceFunc(func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.hit = nil
		close(resume)
	})
}

// requested gives the Range headers of the requests for blobs since the last call.
func (p *blobProxy) requested() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	all := p.ranges
	p.ranges = nil
	return all
}

// countedBody is the body of a blob on its way.
type countedBody struct {
	io.ReadCloser
	proxy *blobProxy
}

func (b *countedBody) Read(buf []byte) (int, error) {
	p := b.proxy
	p.mu.Lock()
	if p.hit != nil && p.bytes >= p.at {
		select {
		case <-p.hit:
		default:
			close(p.hit)
		}
		resume := p.resume
		p.mu.Unlock()
		<-resume
		p.mu.Lock()
	}
	p.mu.Unlock()
	n, err := b.ReadCloser.Read(buf[:min(len(buf), 16<<10)])
	p.mu.Lock()
	p.bytes += int64(n)
	p.mu.Unlock()
	return n, err
}
