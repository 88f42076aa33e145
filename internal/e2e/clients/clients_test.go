// Package clients runs the clients that people use for Triton, tritonclient and
// perf_analyzer, against an agent that serves without a controller.
package clients

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/dunlin/dunlin/internal/e2e"
	"github.com/dunlin/dunlin/internal/pki"
)

// Keys of the guarded agent.
const (
	apiKey     = "0123456789abcdef"
	limitedKey = "a-key-for-one-model-only"
	slowKey    = "a-key-for-one-request-an-hour"
)

// limit bounds what any single program may take, on a machine that is busy
// with the other packages' tests.
const limit = 3 * time.Minute

var (
	// open serves all models under explicit control; guarded is the one that
	// test_secure.py describes.
	open, guarded *e2e.Alone
	cache         string   // folder that setup.sh fills
	env           []string // for the Python programs
)

func TestMain(m *testing.M) {
	code, err := run(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

func run(m *testing.M) (code int, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	// The race detector otherwise sleeps for a second at the end of each process.
	if err := os.Setenv("GORACE", "atexit_sleep_ms=0"); err != nil {
		return 1, err
	}
	root, err := e2e.Root()
	if err != nil {
		return 1, err
	}
	cache = filepath.Join(root, ".cache/clients")
	if _, err := os.Stat(filepath.Join(cache, "stamp")); err != nil {
		return 1, fmt.Errorf("%w: run sh internal/e2e/clients/setup.sh", err)
	}
	defer func() { err = errors.Join(err, touch()) }()
	library, err := e2e.RuntimeLibrary(ctx, root, os.Stderr)
	if err != nil {
		return 1, err
	}
	dir, err := os.MkdirTemp("", "dunlin-clients-")
	if err != nil {
		return 1, err
	}
	defer os.RemoveAll(dir)
	program := filepath.Join(dir, "dunlin-agent")
	if _, err := e2e.Run(ctx, []string{"CGO_ENABLED=1"}, "go", "build", "-C", root, "-race", "-o", program, "./cmd/dunlin-agent"); err != nil {
		return 1, err
	}
	models := filepath.Join(dir, "models")
	load, err := writeRepository(models)
	if err != nil {
		return 1, err
	}
	keys, cert, certKey := filepath.Join(dir, "keys"), filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	rules := "# tests\n" + apiKey + "\n" + limitedKey + " name=limited models=identity_*\n" + slowKey + " name=slow rate=1/h burst=1\ncert=camera-* models=identity_*\n"
	if err := os.WriteFile(keys, []byte(rules), 0o600); err != nil {
		return 1, err
	}
	clientCA, clientCert, clientKey := filepath.Join(dir, "client-ca.pem"), filepath.Join(dir, "client.pem"), filepath.Join(dir, "client-key.pem")
	if err := writeClient(clientCA, clientCert, clientKey); err != nil {
		return 1, err
	}
	trusted, err := writeCertificate(cert, certKey)
	if err != nil {
		return 1, err
	}
	trace := filepath.Join(dir, "trace.json")
	args := []string{"--model-repository", models, "--model-control", "explicit", "--shared-memory", "--trace-file", trace}
	for _, name := range load {
		args = append(args, "--load-model", name)
	}
	if open, err = e2e.Serve(ctx, program, dir, "open", library, args...); err != nil {
		return 1, err
	}
	defer func() { err = errors.Join(err, end(open)) }()
	if err := open.Ready(ctx); err != nil {
		return 1, err
	}

	only := filepath.Join(dir, "only")
	if err := os.CopyFS(filepath.Join(only, "identity_fp32"), os.DirFS(filepath.Join(models, "identity_fp32"))); err != nil {
		return 1, err
	}
	guarded, err = e2e.Serve(ctx, program, dir, "guarded", library, "--model-repository", only, "--tls-cert", cert, "--tls-key", certKey, "--api-keys", keys, "--client-ca", clientCA)
	if err != nil {
		return 1, err
	}
	defer func() { err = errors.Join(err, end(guarded)) }()
	if err := guarded.Wait(ctx, func(ctx context.Context) error { return ready(ctx, guarded, trusted) }); err != nil {
		return 1, err
	}

	env = []string{
		"HTTP=" + address(open), "GRPC=" + open.GRPC, "SECURE_HTTP=" + address(guarded), "SECURE_GRPC=" + guarded.GRPC,
		"MODELS=" + models, "TRACE=" + trace, "CA=" + cert, "KEY=" + apiKey, "LIMITED_KEY=" + limitedKey, "SLOW_KEY=" + slowKey,
		"CLIENT_CERT=" + clientCert, "CLIENT_KEY=" + clientKey, "PYTHONDONTWRITEBYTECODE=1",
	}
	return m.Run(), nil
}

// touch keeps go test from taking an earlier result for this one's, as it does
// not know that it depends on the agent and on Python programs: it keeps none
// where a test opened a file that is new when all is done.
func touch() error { return os.WriteFile(filepath.Join(cache, "ran"), nil, 0o600) }

// address gives host and port of REST.
func address(a *e2e.Alone) string { return a.URL[strings.Index(a.URL, "://")+len("://"):] }

// ready asks an agent that speaks TLS whether all its models can be used.
func ready(ctx context.Context, a *e2e.Alone, trusted *x509.CertPool) error {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, a.URL+"/v2/health/ready", nil)
	if err != nil {
		return err
	}
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: trusted}, DisableKeepAlives: true}}
	resp, err := client.Do(r)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return errors.New(resp.Status)
	}
	return nil
}

// end stops an agent and looks through its log.
func end(a *e2e.Alone) error {
	err := a.Stop()
	b, readErr := os.ReadFile(a.Log)
	err = errors.Join(err, readErr)
	for _, bad := range []string{"WARNING: DATA RACE", "panic:", "fatal error:"} {
		if bytes.Contains(b, []byte(bad)) {
			err = errors.Join(err, fmt.Errorf("the log holds %q", bad))
		}
	}
	if err != nil {
		return fmt.Errorf("agent %s: %w\n%s", a.Name, err, a.LogTail(60))
	}
	return nil
}

// writeCertificate writes one for 127.0.0.1 that vouches for itself, and gives
// those to trust.
func writeCertificate(cert, key string) (*x509.CertPool, error) {
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "dunlin test"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	if err != nil {
		return nil, err
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		return nil, err
	}
	certPEM := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(certPEM)
	return pool, errors.Join(
		os.WriteFile(cert, certPEM, 0o600),
		os.WriteFile(key, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8}), 0o600),
	)
}

// writeClient writes the certificate of a client, with its key, and of who
// vouches for it.
func writeClient(authority, cert, key string) error {
	caKey, err := pki.NewKey()
	if err != nil {
		return err
	}
	ca, err := pki.NewAuthority(caKey, time.Now(), time.Hour)
	if err != nil {
		return err
	}
	own, err := pki.NewKey()
	if err != nil {
		return err
	}
	client, err := ca.IssueDevice("camera-1", own.Public(), time.Now(), time.Hour)
	if err != nil {
		return err
	}
	return errors.Join(
		os.WriteFile(authority, pki.EncodeCertificates(ca.Certificate), 0o600),
		os.WriteFile(cert, pki.EncodeCertificates(client), 0o600),
		pki.WriteKey(key, own),
	)
}

// TestCurl asks as the documents show it.
func TestCurl(t *testing.T) {
	if err := touch(); err != nil {
		t.Fatal(err)
	}
	if _, err := exec.LookPath("curl"); err != nil {
		t.Skip("curl is not installed")
	}
	value := func(name string) string {
		return env[slices.IndexFunc(env, func(s string) bool { return strings.HasPrefix(s, name+"=") })][len(name)+1:]
	}
	for _, tt := range []struct {
		path string
		args []string
		want string
	}{
		{"/v2/models/identity_fp32", []string{"-H", "Authorization: Bearer " + apiKey}, "200 1.1"},
		{"/v2/models/identity_fp32", []string{"--http2", "-u", "me:" + apiKey}, "200 2"},
		{"/v2/models/identity_fp32", []string{"--cert", value("CLIENT_CERT"), "--key", value("CLIENT_KEY")}, "200 2"},
		{"/v2/models/other", []string{"--cert", value("CLIENT_CERT"), "--key", value("CLIENT_KEY")}, "403 2"},
		{"/v2/models/identity_fp32", nil, "401 2"},
		{"/v2/health/ready", nil, "200 2"},
		{"/healthz", []string{"--tls-max", "1.2"}, "000 0"},
	} {
		if tt.want == "200 1.1" {
			tt.args = append(tt.args, "--http1.1")
		}
		args := append([]string{"-sS", "-o", filepath.Join(t.TempDir(), "body"), "-w", "%{http_code} %{http_version}", "--cacert", value("CA")}, tt.args...)
		out, _ := exec.CommandContext(t.Context(), "curl", append(args, "https://"+value("SECURE_HTTP")+tt.path)...).Output()
		if string(out) != tt.want {
			t.Errorf("%s with %q: %q, want %q", tt.path, tt.args, out, tt.want)
		}
	}
}

// TestPython runs the tests of each Python module, as subtests.
func TestPython(t *testing.T) {
	if err := touch(); err != nil {
		t.Fatal(err)
	}
	modules, err := filepath.Glob("test_*.py")
	if err != nil || len(modules) == 0 {
		t.Fatalf("no modules: %v", err)
	}
	for _, file := range modules {
		module := strings.TrimSuffix(file, ".py")
		t.Run(strings.TrimPrefix(module, "test_"), func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), limit)
			defer cancel()
			out, err := e2e.Run(ctx, env, filepath.Join(cache, "python/bin/python"), "-W", "error::DeprecationWarning:__main__", "run.py", module)
			ran := 0
			for lines := bufio.NewScanner(strings.NewReader(out)); lines.Scan(); {
				var r struct {
					Test    string
					Seconds float64
					Fault   string
				}
				if err := json.Unmarshal(lines.Bytes(), &r); err != nil {
					t.Logf("it printed: %s", lines.Text())
					continue
				}
				ran++
				t.Run(r.Test, func(t *testing.T) {
					if t.Logf("%.2f s", r.Seconds); r.Fault != "" {
						t.Errorf("%s", r.Fault)
					}
				})
			}
			if err != nil {
				t.Errorf("%v", err)
			}
			if ran == 0 {
				t.Error("no test ran")
			}
			if t.Failed() {
				t.Logf("--- end of the agent's log ---\n%s", open.LogTail(40))
			}
		})
	}
}

// TestPerfAnalyzer runs the load generator.
func TestPerfAnalyzer(t *testing.T) {
	if err := touch(); err != nil {
		t.Fatal(err)
	}
	const (
		windows = " --measurement-mode count_windows --measurement-request-count 50 --stability-percentage 999 --max-trials 3"
		few     = " --request-count 50"
	)
	report := filepath.Join(t.TempDir(), "report.csv")
	trust := env[slices.IndexFunc(env, func(s string) bool { return strings.HasPrefix(s, "CA=") })][len("CA="):]
	for _, test := range []struct{ name, args string }{
		{"http", windows},
		{"http async", "-a --concurrency-range 4" + windows},
		{"http batch", "-b 4 --concurrency-range 1:3:2" + windows},
		{"http memory", "--shared-memory system" + windows},
		{"http JSON", "--input-tensor-format json --output-tensor-format json" + few},
		{"http rate", "--request-rate-range 50" + few},
		{"http version", "-x 1" + few},
		{"http strings", "-m identity_bytes --shape x:3,2" + few},
		{"http trace", "--trace-level TIMESTAMPS --trace-rate 10 --trace-count 3" + few},
		{"http metrics", "--collect-metrics --verbose-csv --metrics-interval 100 --metrics-url " + open.URL + "/metrics -f " + report + windows},
		{"grpc", windows},
		{"grpc async", "-a --concurrency-range 4" + windows},
		{"grpc batch", "-b 8 --concurrency-range 1:3:2" + windows},
		{"grpc memory", "--shared-memory system" + windows},
		{"grpc stream", "--streaming --concurrency-range 8" + windows},
		{"grpc stream batch", "-b 4 --streaming --concurrency-range 2" + few},
		{"grpc gzip", "--grpc-compression-algorithm gzip" + few},
		{"grpc deflate", "--grpc-compression-algorithm deflate" + few},
		{"grpc no batches", "-m versions --shape x:1000" + few},
		{"https", "-m identity_fp32 --shape x:3,2 -u " + guarded.URL + " --ssl-https-ca-certificates-file " + trust + few},
		{"grpcs", "-m identity_fp32 --shape x:3,2 -u " + guarded.GRPC + " --ssl-grpc-use-ssl true --ssl-grpc-root-certifications-file " + trust + few},
	} {
		t.Run(test.name, func(t *testing.T) {
			if !strings.Contains(test.args, "--shared-memory") { // which begins by unregistering all
				t.Parallel()
			}
			protocol, address := "http", open.URL
			if strings.HasPrefix(test.name, "grpc") {
				protocol, address = "grpc", open.GRPC
			}
			args := append([]string{"-i", protocol}, strings.Fields(test.args)...)
			if strings.HasSuffix(strings.Fields(test.name)[0], "s") {
				args = append(args, "-H", "authorization: Bearer "+apiKey)
			} else {
				args = append(args, "-u", address)
			}
			if !slices.Contains(args, "-m") {
				args = append(args, "-m", "add_sub")
			}
			ctx, cancel := context.WithTimeout(t.Context(), limit)
			defer cancel()
			out, err := e2e.Run(ctx, nil, filepath.Join(cache, "bin/perf_analyzer"), args...)
			if err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			// What it measured itself, and what the agent's statistics told it.
			for _, figure := range []*regexp.Regexp{throughput, executions} {
				found := figure.FindAllStringSubmatch(out, -1)
				if len(found) == 0 {
					t.Errorf("nothing matches %s:\n%s", figure, out)
				}
				for _, m := range found {
					if n, err := strconv.ParseFloat(m[1], 64); err != nil || n <= 0 {
						t.Errorf("%s: %v\n%s", m[0], err, out)
					}
				}
			}
			if regexp.MustCompile(`(?i)\b(error|failed)\b`).MatchString(out) {
				t.Errorf("it reports errors:\n%s", out)
			}
		})
	}
}

var (
	throughput = regexp.MustCompile(`(?m)^\s*Throughput: ([0-9.]+) infer/sec`)
	executions = regexp.MustCompile(`(?m)^\s*Execution count: ([0-9]+)`)
)
