package agent

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"os"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// Limits of a file of API keys.
const (
	minKey      = 16 // characters
	maxKeys     = 1024
	maxKeysFile = 1 << 20
)

// loadTLS gives nil where the listeners do not speak TLS.
func (s *Serving) loadTLS() (*tls.Config, error) {
	if s.TLSCert == "" {
		return nil, nil
	}
	cert, err := tls.LoadX509KeyPair(s.TLSCert, s.TLSKey)
	if err != nil {
		return nil, fmt.Errorf("tls-cert %s, tls-key %s: %w", s.TLSCert, s.TLSKey, err)
	}
	return &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS12}, nil
}

// keys are the API keys of which a request must have one. Its methods may be
// called on nil, which lets everybody in.
type keys struct{ sums [][sha256.Size]byte }

// loadKeys reads the file of API keys: one on each line, none on empty lines
// and those that begin with #. It gives nil where there is no such file.
func (s *Serving) loadKeys() (*keys, error) {
	if s.APIKeys == "" {
		return nil, nil
	}
	raw, err := os.ReadFile(s.APIKeys)
	if err != nil {
		return nil, fmt.Errorf("api-keys: %w", err)
	}
	if len(raw) > maxKeysFile {
		return nil, fmt.Errorf("api-keys: %s has %d bytes, allowed are %d", s.APIKeys, len(raw), maxKeysFile)
	}
	k := &keys{}
	lines := bufio.NewScanner(bytes.NewReader(raw))
	for n := 1; lines.Scan(); n++ {
		key := strings.TrimSpace(lines.Text())
		switch {
		case key == "" || key[0] == '#':
			continue
		case len(key) < minKey:
			return nil, fmt.Errorf("api-keys: %s:%d: the key has %d characters, at least %d are needed", s.APIKeys, n, len(key), minKey)
		case len(k.sums) == maxKeys:
			return nil, fmt.Errorf("api-keys: %s:%d: more than %d keys", s.APIKeys, n, maxKeys)
		}
		k.sums = append(k.sums, sha256.Sum256([]byte(key)))
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("api-keys: %s: %w", s.APIKeys, err)
	}
	if len(k.sums) == 0 {
		return nil, fmt.Errorf("api-keys: %s holds no key", s.APIKeys)
	}
	return k, nil
}

var errNoKey = errors.New("an API key is needed: Authorization: Bearer KEY")

// allow checks the value of an Authorization header: "Bearer KEY", or "Basic"
// with the key as the password.
func (k *keys) allow(authorization string) error {
	if k == nil {
		return nil
	}
	scheme, key, _ := strings.Cut(strings.TrimSpace(authorization), " ")
	key = strings.TrimSpace(key)
	if strings.EqualFold(scheme, "Basic") {
		pair, err := base64.StdEncoding.DecodeString(key)
		if err != nil {
			return errNoKey
		}
		_, key, _ = strings.Cut(string(pair), ":")
	} else if !strings.EqualFold(scheme, "Bearer") {
		return errNoKey
	}
	sum := sha256.Sum256([]byte(key))
	found := 0
	for i := range k.sums {
		found |= subtle.ConstantTimeCompare(sum[:], k.sums[i][:])
	}
	if found == 0 {
		return errors.New("the API key is not one of this agent's")
	}
	return nil
}

// open says whether a path is answered without a key: what orchestrators ask
// to see whether the agent lives.
func open(path string) bool {
	return path == "/healthz" || path == "/v2/health/live" || path == "/v2/health/ready"
}

// handler refuses requests without a key.
func (k *keys) handler(next http.Handler) http.Handler {
	if k == nil {
		return next
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if err := k.allow(r.Header.Get("Authorization")); err != nil && !open(r.URL.Path) {
			w.Header().Set("WWW-Authenticate", "Bearer")
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(http.StatusUnauthorized)
			fmt.Fprintf(w, "{\"error\":%q}", err) // both texts are plain ASCII
			return
		}
		next.ServeHTTP(w, r)
	})
}

// options refuse calls without a key.
func (k *keys) options() []grpc.ServerOption {
	if k == nil {
		return nil
	}
	check := func(ctx context.Context, method string) error {
		switch method {
		case "/inference.GRPCInferenceService/ServerLive", "/inference.GRPCInferenceService/ServerReady", "/grpc.health.v1.Health/Check":
			return nil
		}
		values := append(metadata.ValueFromIncomingContext(ctx, "authorization"), "")
		if err := k.allow(values[0]); err != nil {
			return status.Error(codes.Unauthenticated, err.Error())
		}
		return nil
	}
	return []grpc.ServerOption{
		grpc.ChainUnaryInterceptor(func(ctx context.Context, request any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
			if err := check(ctx, info.FullMethod); err != nil {
				return nil, err
			}
			return next(ctx, request)
		}),
		grpc.ChainStreamInterceptor(func(server any, stream grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) error {
			if err := check(stream.Context(), info.FullMethod); err != nil {
				return err
			}
			return next(server, stream)
		}),
	}
}
