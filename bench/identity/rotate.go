package main

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	mathrand "math/rand/v2"
	"slices"
	"sync"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/dunlin/dunlin/internal/e2e"
	"github.com/dunlin/dunlin/internal/e2e/byhand"
	"github.com/dunlin/dunlin/internal/link"
	"github.com/dunlin/dunlin/internal/pki"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
	"github.com/dunlin/dunlin/proto/dunlin/v1/dunlinv1connect"
)

// rotation is how a change of the certificate authority went.
type rotation struct {
	took   time.Duration // until all devices had renewed and were heard again
	events uint64        // that were acknowledged
	lost   int           // devices
	// Renewals by all devices, of which each owes two: one to the new authority,
	// one after the old one is retired.
	renewals int
}

const (
	// sendEvery is how often a device sends an event.
	sendEvery = time.Second
	// rotationLimit bounds the wait for all devices: they renew within a minute.
	rotationLimit = 3 * time.Minute
)

// sender is a device that sends one event after the other, renews when it is
// told to, and connects again with the new certificate.
type sender struct {
	link   *link.Link
	enrol  dunlinv1connect.EnrollmentServiceClient
	spread time.Duration
	outbox string

	mu      sync.Mutex // guards what follows
	device  *byhand.Device
	sent    uint64
	acked   uint64
	renewed uint64 // sent before the renewal; 0: not renewed
	times   int    // that it renewed
	err     error
}

func newSender(fleet *e2e.Fleet, d *byhand.Device, spread time.Duration) (*sender, error) {
	s := &sender{device: d, spread: spread, outbox: rand.Text()}
	s.enrol = dunlinv1connect.NewEnrollmentServiceClient(byhand.User("", byhand.TLS(d.Roots, nil, host)), fleet.DeviceURL())
	var err error
	s.link, err = link.New(link.Config{
		BrokerURL: "mqtts://" + fleet.MQTT, Device: d.Name, BootID: rand.Text(), Log: slog.New(slog.DiscardHandler), MaxBackoff: 2 * time.Second,
		TLS: func() *tls.Config { return s.now().TLS(host) },
		Hello: func() *dunlinv1.Hello {
			d := s.now()
			h := &dunlinv1.Hello{CertificateSerial: d.Chain[0].SerialNumber.Bytes(), TrustVersion: d.Trust}
			for _, root := range d.Roots {
				pin := pki.PinOf(root)
				h.RootIds = append(h.RootIds, pin[:])
			}
			return h
		},
	})
	return s, err
}

func (s *sender) now() *byhand.Device {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.device
}

// run sends and renews until ctx is done.
func (s *sender) run(ctx context.Context, broker string) {
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { _ = s.link.Run(ctx) })
	tick := time.NewTicker(sendEvery)
	defer tick.Stop()
	renew := time.NewTimer(time.Hour)
	defer renew.Stop()
	told := false
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			s.mu.Lock()
			s.sent++
			s.mu.Unlock()
			s.send()
		case <-s.link.Connected():
			s.send()
		case m := <-s.link.Inbox():
			command, _ := m.(*dunlinv1.Command)
			if ack := command.GetEventAck(); ack != nil {
				s.mu.Lock()
				s.acked = max(s.acked, ack.GetSequence())
				s.mu.Unlock()
			}
			if now := command.GetRenewNow(); now != nil && !told {
				told = true
				within := time.Duration(now.GetWithinMs()) * time.Millisecond
				if s.spread > 0 {
					within = min(within, s.spread)
				}
				renew.Reset(mathrand.N(within + 1))
			}
		case <-renew.C:
			next, err := s.now().Renew(ctx, s.enrol)
			if err != nil {
				s.mu.Lock()
				s.err = err
				s.mu.Unlock()
				renew.Reset(sendEvery)
				continue
			}
			s.mu.Lock()
			s.device, s.renewed, told = next, s.sent, false
			s.times++
			s.mu.Unlock()
			if err := s.link.Reconnect(broker); err != nil {
				panic(err) // it was parsed before
			}
		}
	}
}

// send sends what is not acknowledged; what is lost on the way is sent with the next.
func (s *sender) send() {
	s.mu.Lock()
	batch := &dunlinv1.EventBatch{OutboxId: s.outbox}
	for n := s.acked + 1; n <= s.sent && len(batch.Events) < 50; n++ {
		batch.Events = append(batch.Events, &dunlinv1.Event{Sequence: n, Kind: "bench.tick", At: timestamppb.Now(), Severity: dunlinv1.Severity_SEVERITY_INFO})
	}
	s.mu.Unlock()
	if len(batch.Events) > 0 {
		_ = s.link.Send(link.Events, batch)
	}
}

// rotate changes the authority under connected devices, retires the old one
// when all have renewed, and counts those that are not heard then.
func rotate(ctx context.Context, fleet *e2e.Fleet, devices []*byhand.Device, spread time.Duration) (r rotation, err error) {
	ctx, cancel := context.WithCancel(ctx)
	var running sync.WaitGroup
	defer running.Wait()
	defer cancel()
	broker := "mqtts://" + fleet.MQTT
	var senders []*sender
	for _, d := range devices {
		s, err := newSender(fleet, d, spread)
		if err != nil {
			return r, err
		}
		senders = append(senders, s)
		running.Go(func() { s.run(ctx, broker) })
	}
	trust := dunlinv1connect.NewTrustServiceClient(byhand.User(fleet.Token, nil), fleet.URL)
	before, err := trust.GetAuthorities(ctx, connect.NewRequest(&dunlinv1.GetAuthoritiesRequest{}))
	if err != nil {
		return r, err
	}
	all := func(done func(*sender) bool) func() int {
		return func() (missing int) {
			for _, s := range senders {
				s.mu.Lock()
				if !done(s) {
					missing++
				}
				s.mu.Unlock()
			}
			return missing
		}
	}
	if n := await(ctx, all(func(s *sender) bool { return s.acked > 0 })); n > 0 {
		return r, fmt.Errorf("%d of %d devices are not heard", n, len(senders))
	}
	began := time.Now()
	rotated, err := trust.RotateAuthority(ctx, connect.NewRequest(&dunlinv1.RotateAuthorityRequest{}))
	if err != nil {
		return r, err
	}
	r.lost = await(ctx, all(func(s *sender) bool { return s.renewed > 0 && s.acked > s.renewed }))
	r.took = time.Since(began)
	// From here on the old certificates count for nothing. Devices that are not
	// connected still have them.
	for _, a := range before.Msg.GetAuthorities() {
		if _, err := trust.RetireAuthority(ctx, connect.NewRequest(&dunlinv1.RetireAuthorityRequest{Id: a.GetId(), Force: true})); err != nil {
			return r, err
		}
	}
	want := rotated.Msg.GetAuthority().GetId()
	sent := map[*sender]uint64{}
	for _, s := range senders {
		s.mu.Lock()
		sent[s] = s.sent
		s.mu.Unlock()
		if err := s.link.Reconnect(broker); err != nil {
			return r, err
		}
	}
	r.lost = max(r.lost, await(ctx, all(func(s *sender) bool { return s.acked > sent[s] })))
	var causes []error
	for _, s := range senders {
		s.mu.Lock()
		r.events += s.acked
		r.renewals += s.times
		device, err := s.device, s.err
		s.mu.Unlock()
		if err != nil {
			causes = append(causes, err)
		}
		issuer := device.Chain[0].Issuer.CommonName
		if !slices.ContainsFunc(device.Roots, func(c *x509.Certificate) bool {
			return pki.CertificateID(c) == want && c.Subject.CommonName == issuer
		}) {
			causes = append(causes, fmt.Errorf("%s has a certificate of %s", device.Name, issuer))
		}
	}
	return r, errors.Join(causes...)
}

// await waits until nothing is missing, and gives how much is at the end.
func await(ctx context.Context, missing func() int) int {
	ctx, cancel := context.WithTimeout(ctx, rotationLimit)
	defer cancel()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		n := missing()
		if n == 0 {
			return 0
		}
		select {
		case <-ctx.Done():
			return n
		case <-tick.C:
		}
	}
}
