package agent

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/dunlin/dunlin/proto/inference"
)

func TestAloneConfig(t *testing.T) {
	file := filepath.Join(t.TempDir(), "serve.yaml")
	if err := os.WriteFile(file, []byte("model-repository: models\nmodel-control: explicit\nload-model: [a, b]\nthreads: 2\nshared-memory: true\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	cfg, err := ParseAlone([]string{"--config", file, "--threads=3", "--load-model", "c"}, env("DUNLIN_AGENT_POLL_SECONDS", "7"), io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	if cfg.Threads != 3 || !cfg.SharedMemory || cfg.Poll != 7 || fmt.Sprint(cfg.Load) != "[c]" || cfg.Control != "explicit" || !filepath.IsAbs(cfg.Repository) || cfg.File != "" {
		t.Errorf("%+v", cfg)
	}
	cfg, err = ParseAlone([]string{"model.onnx", "--grpc-listen", "off"}, env(), io.Discard)
	if err != nil || filepath.Base(cfg.File) != "model.onnx" || cfg.GRPCListen != "" {
		t.Errorf("flags behind the model: %+v, %v", cfg, err)
	}
	for want, args := range map[string][]string{
		"name one model file, or a folder":                                                            {},
		"name one model file, or a folder by":                                                         {"a.onnx", "--model-repository", "b"},
		`unexpected argument "b.onnx"`:                                                                {"a.onnx", "b.onnx"},
		`model-control: "sometimes" is not none, explicit`:                                            {"a.onnx", "--model-control", "sometimes"},
		"load-model: has a meaning with":                                                              {"--model-repository", "b", "--load-model", "a"},
		"poll-seconds: is 0, allowed are 1 to 86400":                                                  {"a.onnx", "--poll-seconds", "0"},
		`"x" is not a whole number`:                                                                   {"a.onnx", "--threads", "x"},
		"threads: is -1, allowed are 0 to 1024":                                                       {"a.onnx", "--threads", "-1"},
		"tls-cert, tls-key: one is not enough":                                                        {"a.onnx", "--tls-cert", "c"},
		`listen: "0.0.0.0:1" is not on loopback: other addresses need --tls-cert`:                     {"a.onnx", "--listen", "0.0.0.0:1"},
		"grpc-listen: \"0.0.0.0:1\" is not on loopback":                                               {"a.onnx", "--grpc-listen", "0.0.0.0:1"},
		`grpc-listen: "0.0.0.0:2" is not on loopback: other addresses need --api-keys or --client-ca`: {"a.onnx", "--grpc-listen", "0.0.0.0:2", "--tls-cert", "c", "--tls-key", "k"},
		"client-ca: needs --tls-cert and --tls-key":                                                   {"a.onnx", "--client-ca", "c"},
		"shared-memory: needs listen and grpc-listen on loopback":                                     {"a.onnx", "--shared-memory", "--listen", "0.0.0.0:1", "--tls-cert", "c", "--tls-key", "k"},
	} {
		if _, err := ParseAlone(args, env(), io.Discard); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", args, err, want)
		}
	}
	if _, err := ParseAlone([]string{"a.onnx", "--listen", "0.0.0.0:1", "--tls-cert", "c", "--tls-key", "k", "--api-keys", "f"}, env(), io.Discard); err != nil {
		t.Errorf("off loopback with TLS: %v", err)
	}
}

// addresses keeps what the agent logs of where it answers.
type addresses struct {
	slog.Handler
	found chan [2]string // URL, gRPC
}

func (a addresses) Handle(ctx context.Context, r slog.Record) error {
	if r.Message == "agent started" {
		var at [2]string
		r.Attrs(func(attr slog.Attr) bool {
			switch attr.Key {
			case "url":
				at[0] = attr.Value.String()
			case "grpc":
				at[1] = attr.Value.String()
			}
			return true
		})
		a.found <- at
	}
	return a.Handler.Handle(ctx, r)
}

// startAlone serves without a controller and gives where it answers.
func startAlone(t *testing.T, cfg Alone) (url, grpcAddress string) {
	t.Helper()
	at := addresses{slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}), make(chan [2]string, 1)}
	cfg.Listen, cfg.GRPCListen, cfg.RuntimeLib, cfg.Log, cfg.Worker = "127.0.0.1:0", "127.0.0.1:0", runtimeLibrary(t), slog.New(at), []string{os.Args[0], "worker"}
	if cfg.Control == "" {
		cfg.Control = "none"
	}
	cfg.Poll = 1
	if err := cfg.check(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- Serve(ctx, cfg) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("the agent ended: %v", err)
		}
	})
	select {
	case a := <-at.found:
		return a[0], a[1]
	case err := <-done:
		t.Fatalf("the agent ended: %v", err)
		panic("not reached")
	}
}

func digitsFile(t *testing.T) string {
	t.Helper()
	raw, err := os.ReadFile(digits + "v2.onnx")
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "digits.onnx")
	if err := os.WriteFile(path, raw, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestServeOneModel(t *testing.T) {
	url, address := startAlone(t, Alone{File: digitsFile(t)})
	until(t, "ready", func() error { return status200(http.DefaultClient, url+"/v2/health/ready", "") })
	if version, err := classify(url, "digits"); err != nil || version != "1" {
		t.Errorf("REST: version %q, %v", version, err)
	}
	conn, err := grpc.NewClient(address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	client := inference.NewGRPCInferenceServiceClient(conn)
	answer, err := client.ModelInfer(t.Context(), digitRequest())
	if err != nil || len(answer.RawOutputContents) != 2 || len(answer.RawOutputContents[0]) != 40 {
		t.Errorf("gRPC: %v, %v", answer, err)
	}
	stats, err := client.ModelStatistics(t.Context(), &inference.ModelStatisticsRequest{Name: "digits"})
	if err != nil || len(stats.ModelStats) != 1 || stats.ModelStats[0].InferenceCount != 2 {
		t.Errorf("statistics: %v, %v", stats, err)
	}
	resp, err := http.Get(url + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		`dunlin_requests_total{model="digits",outcome="success",version="1"} 2`, `nv_inference_request_success{model="digits",version="1"} 2`,
		`nv_inference_count{model="digits",version="1"} 2`, `dunlin_request_seconds_count{model="digits",version="1"} 2`,
		`dunlin_run_rows_sum{model="digits",version="1"} 2`, `nv_inference_request_failure{model="digits",reason="REJECTED",version="1"} 0`,
	} {
		if !bytes.Contains(raw, []byte(want+"\n")) {
			t.Errorf("metrics lack %s:\n%s", want, raw)
		}
	}
}

func digitRequest() *inference.ModelInferRequest {
	return &inference.ModelInferRequest{
		ModelName: "digits", Inputs: []*inference.ModelInferRequest_InferInputTensor{{Name: "image", Datatype: "FP32", Shape: []int64{1, 1, 8, 8}}},
		RawInputContents: [][]byte{make([]byte, 256)},
	}
}

func status200(client *http.Client, url, key string) error {
	r, err := http.NewRequest(http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	if key != "" {
		r.Header.Set("Authorization", "Bearer "+key)
	}
	resp, err := client.Do(r)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s", url, resp.Status)
	}
	return nil
}

// certificate makes a certificate for 127.0.0.1 and gives its files and the
// pool that holds it.
func certificate(t *testing.T) (cert, key string, pool *x509.CertPool) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test"}, NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &private.PublicKey, private)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	cert, key = filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	pool = x509.NewCertPool()
	for path, block := range map[string]*pem.Block{cert: {Type: "CERTIFICATE", Bytes: der}, key: {Type: "PRIVATE KEY", Bytes: secret}} {
		if err := os.WriteFile(path, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	parsed, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	pool.AddCert(parsed)
	return cert, key, pool
}

func TestServeTLSAndKeys(t *testing.T) {
	cert, key, pool := certificate(t)
	url, address := startAlone(t, Alone{File: digitsFile(t), Serving: Serving{TLSCert: cert, TLSKey: key, APIKeys: keyFile(t, goodKey)}})
	if !strings.HasPrefix(url, "https://") {
		t.Fatalf("answers at %s", url)
	}
	trust := &tls.Config{RootCAs: pool}
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: trust}}
	defer client.CloseIdleConnections()
	until(t, "ready", func() error { return status200(client, url+"/v2/health/ready", "") })
	for path, keyless := range map[string]bool{"/v2/models/digits": false, "/metrics": false, "/v2/health/live": true} {
		if err := status200(client, url+path, ""); (err == nil) != keyless {
			t.Errorf("%s without a key: %v", path, err)
		}
		if err := status200(client, url+path, goodKey); err != nil {
			t.Errorf("%s with a key: %v", path, err)
		}
	}
	conn, err := grpc.NewClient(address, grpc.WithTransportCredentials(credentials.NewTLS(trust)))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	service := inference.NewGRPCInferenceServiceClient(conn)
	withKey := metadata.AppendToOutgoingContext(t.Context(), "authorization", "Bearer "+goodKey)
	if _, err := service.ModelInfer(withKey, digitRequest()); err != nil {
		t.Errorf("gRPC with a key: %v", err)
	}
	if _, err := service.ModelInfer(t.Context(), digitRequest()); status.Code(err) != codes.Unauthenticated {
		t.Errorf("gRPC without a key: %v", err)
	}
	stream, err := service.ModelStreamInfer(t.Context())
	if err == nil {
		_, err = stream.Recv()
	}
	if status.Code(err) != codes.Unauthenticated {
		t.Errorf("gRPC stream without a key: %v", err)
	}
	if _, err := service.ServerReady(t.Context(), &inference.ServerReadyRequest{}); err != nil {
		t.Errorf("gRPC health without a key: %v", err)
	}
	if err := status200(http.DefaultClient, "http://"+strings.TrimPrefix(url, "https://")+"/v2/health/live", ""); err == nil {
		t.Error("answers without TLS")
	}
}

// A client that leaves in the middle of a batch of work stops costing, and
// others go on.
func TestClientsThatLeave(t *testing.T) {
	url, _ := startAlone(t, Alone{File: digitsFile(t)})
	until(t, "ready", func() error { return status200(http.DefaultClient, url+"/v2/health/ready", "") })
	var wg sync.WaitGroup
	for range 50 {
		wg.Go(func() {
			conn, err := net.Dial("tcp", strings.TrimPrefix(url, "http://"))
			if err != nil {
				t.Error(err)
				return
			}
			defer conn.Close()
			fmt.Fprintf(conn, "POST /v2/models/digits/infer HTTP/1.1\r\nHost: x\r\nInference-Header-Content-Length: 0\r\nContent-Length: %d\r\n\r\n", 256)
			_, _ = conn.Write(make([]byte, 100)) // and no more
		})
	}
	wg.Wait()
	if version, err := classify(url, "digits"); err != nil || version != "1" {
		t.Errorf("version %q, %v", version, err)
	}
}
