package identity

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"testing"
	"testing/synctest"
	"time"
)

// pipes is a listener to which tests connect without a network.
type pipes chan net.Conn

func (p pipes) Accept() (net.Conn, error) {
	if c, ok := <-p; ok {
		return c, nil
	}
	return nil, net.ErrClosed
}

func (p pipes) Close() error   { return nil }
func (p pipes) Addr() net.Addr { return &net.TCPAddr{} }

// Whoever is known takes as long as a body needs, nobody else does.
func TestImpatient(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		token, hash := NewToken("")
		a := New(&credentials{tokens: map[[32]byte]Grant{hash: {User: "ada", UserRole: Operator}}}, Options{})
		const within = time.Minute
		listener := make(pipes)
		server := &http.Server{Handler: Impatient(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			_, _ = a.FromRequest(r)
			if _, err := io.ReadAll(r.Body); err != nil {
				w.WriteHeader(http.StatusRequestTimeout)
			}
		}), within)}
		done := make(chan error, 1)
		go func() { done <- server.Serve(listener) }()
		for credential, want := range map[string]int{token: http.StatusOK, "x": http.StatusRequestTimeout} {
			ours, theirs := net.Pipe()
			listener <- theirs
			began := time.Now()
			_, err := fmt.Fprintf(ours, "POST / HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer %s\r\nContent-Length: 2\r\n\r\na", credential)
			if err != nil {
				t.Fatal(err)
			}
			if want == http.StatusOK {
				time.Sleep(2 * within)
				if _, err := ours.Write([]byte("b")); err != nil {
					t.Fatal(err)
				}
			}
			resp, err := http.ReadResponse(bufio.NewReader(ours), nil)
			if err != nil {
				t.Fatal(err)
			}
			if waited := time.Since(began); resp.StatusCode != want || want != http.StatusOK && waited != within {
				t.Errorf("%s after %s, want %d", resp.Status, waited, want)
			}
			ours.Close()
		}
		close(listener)
		server.Close()
		<-done
	})
}
