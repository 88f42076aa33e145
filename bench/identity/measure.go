package main

import (
	"context"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"slices"
	"sync"
	"time"

	"connectrpc.com/connect"

	"github.com/dunlin/dunlin/internal/e2e"
	"github.com/dunlin/dunlin/internal/e2e/byhand"
	"github.com/dunlin/dunlin/internal/pki"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
	"github.com/dunlin/dunlin/proto/dunlin/v1/dunlinv1connect"
)

// host is where everything listens.
const host = "127.0.0.1"

// figures are what was measured.
type figures struct {
	size                                             size
	enrolPerSecond, connectPerSecond, bareConnection float64
	enrol, connect                                   []time.Duration // of each
	revoke                                           []time.Duration
	rotation
}

func (f *figures) print() {
	fmt.Printf("%d devices joined at once, %d at a time: %.1f a second; each p50 %.0f ms, p99 %.0f ms\n",
		f.size.devices, f.size.clients, f.enrolPerSecond, ms(percentile(f.enrol, 50)), ms(percentile(f.enrol, 99)))
	fmt.Printf("they connected to the broker, %d at a time: %.1f a second; each p50 %.0f ms, p99 %.0f ms; bare TLS with the same certificates and an echo: %.1f a second\n",
		f.size.clients, f.connectPerSecond, ms(percentile(f.connect, 50)), ms(percentile(f.connect, 99)), f.bareConnection)
	fmt.Printf("%d were revoked, one after the other; from the call to the end of the connection: p50 %.1f ms, p99 %.1f ms, longest %.1f ms; all were refused after a restart\n",
		len(f.revoke), ms(percentile(f.revoke, 50)), ms(percentile(f.revoke, 99)), ms(percentile(f.revoke, 100)))
	fmt.Printf("the certificate authority changed while %d were connected and sent %d events: all had renewed and were heard again after %.1f s, %d are lost\n",
		f.size.rotating, f.events, f.took.Seconds(), f.lost)
}

// measure runs everything but the access against one controller, whose data is in dir.
func measure(ctx context.Context, s size, programs e2e.Programs, dir string, progress io.Writer) (f *figures, err error) {
	if s.revoked+s.rotating > s.devices {
		return nil, fmt.Errorf("%d revoked and %d rotating are more than the %d devices", s.revoked, s.rotating, s.devices)
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, err
	}
	fleet, err := e2e.NewFleet(programs, dir, "")
	if err != nil {
		return nil, err
	}
	defer func() {
		if err = errors.Join(err, fleet.Stop()); err != nil && fleet.Controller != nil {
			err = fmt.Errorf("%w\n%s", err, fleet.Controller.LogTail(20))
		}
	}()
	if err := fleet.StartController(ctx); err != nil {
		return nil, err
	}
	f = &figures{size: s}
	fmt.Fprintln(progress, "joining")
	devices, err := f.join(ctx, fleet)
	if err != nil {
		return nil, err
	}
	fmt.Fprintln(progress, "connecting")
	conns, err := f.connectAll(ctx, fleet, devices)
	defer func() {
		for _, c := range conns {
			if c != nil {
				c.Close()
			}
		}
	}()
	if err != nil {
		return nil, err
	}
	if f.bareConnection, err = bare(ctx, s, devices); err != nil {
		return nil, err
	}
	fmt.Fprintln(progress, "revoking")
	if err := f.revokeSome(ctx, fleet, devices[:s.revoked], conns); err != nil {
		return nil, err
	}
	fmt.Fprintln(progress, "changing the authority")
	f.rotation, err = rotate(ctx, fleet, devices[s.revoked:][:s.rotating], s.spread)
	return f, err
}

// each calls do for each number below n, some at one time, until one fails.
func each(ctx context.Context, n, atOnce int, do func(ctx context.Context, i int) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	next := make(chan int)
	var wg sync.WaitGroup
	for range min(n, atOnce) {
		wg.Go(func() {
			for i := range next {
				if err := do(ctx, i); err != nil {
					cancel(err)
				}
			}
		})
	}
	for i := 0; i < n && ctx.Err() == nil; i++ {
		select {
		case next <- i:
		case <-ctx.Done():
		}
	}
	close(next)
	wg.Wait()
	return context.Cause(ctx)
}

// join has all devices join over HTTPS, each by a connection of its own. Their
// keys and requests are made before.
func (f *figures) join(ctx context.Context, fleet *e2e.Fleet) ([]*byhand.Device, error) {
	s := f.size
	made, err := dunlinv1connect.NewEnrollmentServiceClient(byhand.User(fleet.Token, nil), fleet.URL).
		CreateJoinToken(ctx, connect.NewRequest(&dunlinv1.CreateJoinTokenRequest{Uses: uint32(s.devices)}))
	if err != nil {
		return nil, err
	}
	token := made.Msg.GetJoinToken()
	pin, ok := pki.PinIn(token)
	if !ok {
		return nil, errors.New("the join token has no pin")
	}
	secure := pki.ClientConfig(pki.Client{Trust: func() pki.Trust { return pki.Trust{Pin: &pin} }}, host)
	enrolment := dunlinv1connect.NewEnrollmentServiceClient(byhand.User("", secure), fleet.DeviceURL())
	keys, requests := make([]crypto.Signer, s.devices), make([][]byte, s.devices)
	name := func(i int) string { return fmt.Sprintf("device-%d", i) }
	for i := range s.devices {
		if keys[i], err = pki.NewKey(); err == nil {
			requests[i], err = pki.Request(keys[i], name(i))
		}
		if err != nil {
			return nil, err
		}
	}
	devices := make([]*byhand.Device, s.devices)
	f.enrol = make([]time.Duration, s.devices)
	began := time.Now()
	err = each(ctx, s.devices, s.clients, func(ctx context.Context, i int) (err error) {
		began := time.Now()
		devices[i], err = byhand.JoinBy(ctx, enrolment, token, name(i), keys[i], requests[i])
		f.enrol[i] = time.Since(began)
		return err
	})
	f.enrolPerSecond = float64(s.devices) / time.Since(began).Seconds()
	return devices, err
}

// connectAll connects all devices, which stay connected.
func (f *figures) connectAll(ctx context.Context, fleet *e2e.Fleet, devices []*byhand.Device) ([]*byhand.Conn, error) {
	conns := make([]*byhand.Conn, len(devices))
	f.connect = make([]time.Duration, len(devices))
	began := time.Now()
	err := each(ctx, len(devices), f.size.clients, func(ctx context.Context, i int) (err error) {
		began := time.Now()
		conns[i], err = byhand.Connect(ctx, fleet.MQTT, devices[i].TLS(host), byhand.Login{ClientID: devices[i].Name}, nil)
		f.connect[i] = time.Since(began)
		return err
	})
	f.connectPerSecond = float64(len(devices)) / time.Since(began).Seconds()
	return conns, err
}

// bare gives how many connections a second a server takes that does nothing
// but TLS, with certificates like the devices', and an echo.
func bare(ctx context.Context, s size, devices []*byhand.Device) (perSecond float64, err error) {
	key, err := pki.NewKey()
	if err != nil {
		return 0, err
	}
	now, day := time.Now(), 24*time.Hour
	authority, err := pki.NewAuthority(key, now, day)
	if err != nil {
		return 0, err
	}
	leaf, err := authority.IssueController([]string{host}, key.Public(), now, day)
	if err != nil {
		return 0, err
	}
	own := &tls.Certificate{Certificate: pki.Raw(authority.Chain(leaf)), PrivateKey: key, Leaf: leaf}
	roots := append([]*x509.Certificate{authority.Certificate}, devices[0].Roots...)
	secure := pki.ServerConfig(func() (*tls.Certificate, error) { return own, nil }, func() []*x509.Certificate { return roots }, tls.RequireAndVerifyClientCert)
	listener, err := tls.Listen("tcp", host+":0", secure)
	if err != nil {
		return 0, err
	}
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			c, err := listener.Accept()
			if err != nil {
				return // the listener is closed
			}
			serving.Go(func() {
				defer c.Close()
				_, _ = io.CopyN(c, c, 1)
			})
		}
	})
	defer serving.Wait()
	defer listener.Close()
	began := time.Now()
	err = each(ctx, len(devices), s.clients, func(ctx context.Context, i int) error {
		c, err := (&tls.Dialer{Config: byhand.TLS(roots, devices[i].Certificate(), host)}).DialContext(ctx, "tcp", listener.Addr().String())
		if err != nil {
			return err
		}
		defer c.Close()
		b := []byte{1}
		if _, err := c.Write(b); err != nil {
			return err
		}
		_, err = io.ReadFull(c, b)
		return err
	})
	return float64(len(devices)) / time.Since(began).Seconds(), err
}

// revokeSome revokes devices one after the other, and has the controller start
// again: none may come back.
func (f *figures) revokeSome(ctx context.Context, fleet *e2e.Fleet, devices []*byhand.Device, conns []*byhand.Conn) error {
	client := dunlinv1connect.NewDeviceServiceClient(byhand.User(fleet.Token, nil), fleet.URL)
	for i, d := range devices {
		began := time.Now()
		if _, err := client.RevokeDevice(ctx, connect.NewRequest(&dunlinv1.RevokeDeviceRequest{Device: d.Name, Reason: "measured"})); err != nil {
			return err
		}
		select {
		case <-conns[i].Done():
		case <-time.After(time.Minute):
			return fmt.Errorf("%s is revoked and still connected after a minute", d.Name)
		}
		f.revoke = append(f.revoke, time.Since(began))
	}
	for i, c := range conns[len(devices):] {
		select {
		case <-c.Done():
			return fmt.Errorf("%s is not revoked, and lost its connection", fmt.Sprint("device-", len(devices)+i))
		default:
		}
	}
	if err := fleet.Controller.Stop(); err != nil {
		return err
	}
	if err := fleet.StartController(ctx); err != nil {
		return err
	}
	for _, d := range devices {
		c, err := byhand.Connect(ctx, fleet.MQTT, d.TLS(host), byhand.Login{ClientID: d.Name}, nil)
		if err == nil {
			c.Close()
			return fmt.Errorf("%s is revoked and connects after a restart", d.Name)
		}
		if _, refused := errors.AsType[*byhand.RefusedError](err); !refused {
			return fmt.Errorf("%s: want a refusal of the broker: %w", d.Name, err)
		}
		if status, err := pull(ctx, fleet, d); err != nil || status != http.StatusUnauthorized {
			return fmt.Errorf("%s is revoked, the registry answers %d, %w", d.Name, status, err)
		}
	}
	return nil
}

// pull asks the registry as a device.
func pull(ctx context.Context, fleet *e2e.Fleet, d *byhand.Device) (status int, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, fleet.DeviceURL()+"/v2/", nil)
	if err != nil {
		return 0, err
	}
	resp, err := byhand.User("", d.TLS(host)).Do(req)
	if err != nil {
		return 0, err
	}
	return resp.StatusCode, resp.Body.Close()
}

// percentile gives the smallest that so many percent do not exceed; it sorts d.
func percentile(d []time.Duration, percent int) time.Duration {
	if len(d) == 0 {
		return 0
	}
	slices.Sort(d)
	return d[(len(d)*percent+99)/100-1]
}

func ms(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
