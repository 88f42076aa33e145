package e2e

import (
	"bytes"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httputil"
	"net/url"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/dunlin/dunlin/internal/pki"
	"github.com/dunlin/dunlin/internal/pki/pkitest"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
	"github.com/dunlin/dunlin/proto/dunlin/v1/dunlinv1connect"
)

// blobProxy stands between a device and the controller's HTTPS port, counts
// the bytes of blobs that pass, and can hold them up or alter them. It has a
// certificate of the controller's authority, and asks the controller in the
// administrator's name.
type blobProxy struct {
	url string
	// broker is what devices that join are told of the broker, host:port; "":
	// what the controller says.
	broker string

	mu     sync.Mutex
	random *rand.Rand     // by which answers of the registry are altered
	part   float64        // of the answers of the registry in which a byte is another
	harmed map[string]int // how many were, by what was asked for
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
	p := &blobProxy{harmed: map[string]int{}}
	token := f.Token
	reverse := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(to)
			r.Out.Host = r.In.Host // the controller gives devices the address that they called
			r.Out.Header.Set("Authorization", "Bearer "+token)
			r.Out.Header.Set("Accept-Encoding", "identity") // what is altered is read as it is
		},
		FlushInterval: -1,
		ErrorHandler:  func(w http.ResponseWriter, _ *http.Request, _ error) { w.WriteHeader(http.StatusBadGateway) },
		ModifyResponse: func(r *http.Response) error {
			if p.broker != "" && r.Request.URL.Path == dunlinv1connect.EnrollmentServiceJoinProcedure && r.StatusCode == http.StatusOK {
				return p.redirect(r)
			}
			if strings.HasPrefix(r.Request.URL.Path, "/v2/") {
				p.harm(r)
			}
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

// redirect has a device that joins be told of another broker.
func (p *blobProxy) redirect(r *http.Response) error {
	defer r.Body.Close()
	raw, err := io.ReadAll(r.Body)
	if err != nil {
		return err
	}
	answer := new(dunlinv1.JoinResponse)
	if err := proto.Unmarshal(raw, answer); err != nil {
		return err
	}
	answer.BrokerUrl = "mqtts://" + p.broker
	if raw, err = proto.Marshal(answer); err != nil {
		return err
	}
	r.Body, r.ContentLength = io.NopCloser(bytes.NewReader(raw)), int64(len(raw))
	r.Header.Set("Content-Length", strconv.Itoa(len(raw)))
	return nil
}

// mostHarm is how often answers about one blob are altered at most: one that
// comes wrong more often is taken for wrong in the registry itself.
const mostHarm = 2

// alter has a byte be another in so large a part of the registry's answers.
func (p *blobProxy) alter(random *rand.Rand, part float64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.random, p.part = random, part
}

// altered counts the answers in which a byte was another.
func (p *blobProxy) altered() (n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, of := range p.harmed {
		n += of
	}
	return n
}

// harm alters an answer, or not, by chance.
func (p *blobProxy) harm(r *http.Response) {
	p.mu.Lock()
	defer p.mu.Unlock()
	path := r.Request.URL.Path
	if p.part > 0 && r.ContentLength > 0 && p.harmed[path] < mostHarm && p.random.Float64() < p.part {
		p.harmed[path]++
		r.Body = &harmedBody{r.Body, p.random.Int64N(r.ContentLength)}
	}
}

// harmedBody has one other byte than what it reads; -1 and less: it has passed.
type harmedBody struct {
	io.ReadCloser
	at int64
}

func (b *harmedBody) Read(buf []byte) (int, error) {
	n, err := b.ReadCloser.Read(buf)
	if b.at >= 0 && b.at < int64(n) {
		buf[b.at] ^= 1
	}
	b.at -= int64(n)
	return n, err
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
