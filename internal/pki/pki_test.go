package pki

import (
	"crypto/tls"
	"crypto/x509"
	"net"
	"slices"
	"testing"
	"time"
)

func authority(t *testing.T, now time.Time) *Authority {
	t.Helper()
	key, err := NewKey()
	if err != nil {
		t.Fatal(err)
	}
	a, err := NewAuthority(key, now, 10*365*24*time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// A device and a controller meet over TLS, also where the authority was
// rotated and one side knows only the old one.
func TestConnect(t *testing.T) {
	now := time.Now()
	first, second := authority(t, now), authority(t, now)
	cross, err := first.Vouch(second.Certificate, now)
	if err != nil {
		t.Fatal(err)
	}
	second.Cross = []*x509.Certificate{cross}
	pin := PinOf(first.Certificate)
	for name, test := range map[string]struct {
		server, client *Authority
		trust          Trust
		host           string
		works          bool
	}{
		"same":           {first, first, Trust{Roots: []*x509.Certificate{first.Certificate}}, "localhost", true},
		"rotated":        {second, first, Trust{Roots: []*x509.Certificate{first.Certificate}}, "localhost", true},
		"rotated, new":   {second, second, Trust{Roots: []*x509.Certificate{second.Certificate}}, "localhost", true},
		"pinned":         {first, first, Trust{Pin: &pin}, "localhost", true},
		"pinned, wrong":  {authority(t, now), first, Trust{Pin: &pin}, "localhost", false},
		"other name":     {first, first, Trust{Roots: []*x509.Certificate{first.Certificate}}, "example.com", false},
		"nobody trusted": {first, first, Trust{}, "localhost", false},
	} {
		t.Run(name, func(t *testing.T) {
			serverKey, _ := NewKey()
			leaf, err := test.server.IssueController([]string{"localhost", "127.0.0.1"}, serverKey.Public(), now, time.Hour)
			if err != nil {
				t.Fatal(err)
			}
			deviceKey, _ := NewKey()
			own, err := test.client.IssueDevice("d1", deviceKey.Public(), now, time.Hour)
			if err != nil {
				t.Fatal(err)
			}
			serverSide, clientSide := net.Pipe()
			server := tls.Server(serverSide, ServerConfig(func() (*tls.Certificate, error) {
				return &tls.Certificate{Certificate: Raw(test.server.Chain(leaf)), PrivateKey: serverKey}, nil
			}, func() []*x509.Certificate { return []*x509.Certificate{first.Certificate, second.Certificate} }, tls.RequireAndVerifyClientCert))
			client := tls.Client(clientSide, ClientConfig(Client{
				Trust: func() Trust { return test.trust },
				Certificate: func() *tls.Certificate {
					return &tls.Certificate{Certificate: Raw(test.client.Chain(own)), PrivateKey: deviceKey}
				},
			}, test.host))
			defer serverSide.Close()
			defer clientSide.Close()
			done := make(chan error, 1)
			go func() { done <- server.Handshake() }()
			err = client.Handshake()
			if !test.works {
				if err == nil {
					t.Fatal("connected")
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if err := <-done; err != nil {
				t.Fatal(err)
			}
			if d, ok := DeviceOf(server.ConnectionState().PeerCertificates[0]); !ok || d != "d1" {
				t.Errorf("the server sees %q, %v", d, ok)
			}
			if c := client.ConnectionState().PeerCertificates[0]; !IsController(c) {
				t.Error("the client does not see a controller")
			}
		})
	}
}

// What connections keep must not be made anew for each: there are thousands.
func TestServersShareTheirRoots(t *testing.T) {
	now := time.Now()
	roots := []*x509.Certificate{authority(t, now).Certificate}
	config := ServerConfig(func() (*tls.Certificate, error) { return &tls.Certificate{}, nil },
		func() []*x509.Certificate { return slices.Clone(roots) }, tls.RequireAndVerifyClientCert)
	get := func() *x509.CertPool {
		t.Helper()
		c, err := config.GetConfigForClient(&tls.ClientHelloInfo{})
		if err != nil {
			t.Fatal(err)
		}
		if !c.ClientCAs.Equal(Pool(roots)) {
			t.Error("clients are verified by other roots than there are")
		}
		return c.ClientCAs
	}
	first := get()
	if get() != first {
		t.Error("two connections have a pool each of the same roots")
	}
	roots = append(roots, authority(t, now).Certificate)
	if get() == first {
		t.Error("new roots do not count")
	}
	roots = roots[1:]
	get()
	roots = nil
	get()
}

func TestRequest(t *testing.T) {
	key, _ := NewKey()
	csr, err := Request(key, "d1")
	if err != nil {
		t.Fatal(err)
	}
	public, err := ParseRequest(csr)
	if err != nil {
		t.Fatal(err)
	}
	want, _ := ID(key.Public())
	if got, _ := ID(public); got != want {
		t.Errorf("key %s, want %s", got, want)
	}
	csr[len(csr)-1] ^= 1
	if _, err := ParseRequest(csr); err == nil {
		t.Error("a request with a wrong signature counts")
	}
}

func TestPinInToken(t *testing.T) {
	pin := PinOf(authority(t, time.Now()).Certificate)
	if got, ok := PinIn(AppendPin("dunlin_join_x", pin)); !ok || got != pin {
		t.Errorf("%v, %v", got, ok)
	}
	if _, ok := PinIn("dunlin_join_x"); ok {
		t.Error("a token without a pin has one")
	}
}

func FuzzParseRequest(f *testing.F) {
	key, _ := NewKey()
	csr, _ := Request(key, "d1")
	f.Add(csr)
	f.Fuzz(func(t *testing.T, b []byte) {
		if public, err := ParseRequest(b); err == nil && CheckPublicKey(public) != nil {
			t.Error("a key that is not allowed")
		}
	})
}
