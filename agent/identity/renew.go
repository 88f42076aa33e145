package identity

import (
	"cmp"
	"context"
	"crypto/rand"
	"fmt"
	mathrand "math/rand/v2"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/dunlin/dunlin/agent/state"
	"github.com/dunlin/dunlin/internal/pki"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// lookEvery bounds how long the clock is not looked at: it may be set, and a
// device may sleep.
const lookEvery = time.Hour

// firstTimeWait bounds the wait before the time is asked for again; it doubles
// up to lookEvery.
const firstTimeWait = 5 * time.Second

// Changed receives when the device has a new certificate, or knows the time
// now: connections should be made anew. Signals that nobody took merge into
// one.
func (d *Device) Changed() <-chan struct{} { return d.changed }

// RenewWithin has the certificate renewed after a random part of a time.
func (d *Device) RenewWithin(within time.Duration) {
	d.mu.Lock()
	d.plan = d.plan.ask(d.clock.now(d.cfg.Now(), d.own.chain...), within, mathrand.Float64())
	d.mu.Unlock()
	signal(d.asked)
}

// Reached has what failed before tried again: the network is back.
func (d *Device) Reached() {
	d.mu.Lock()
	d.plan = d.plan.again(d.clock.now(d.cfg.Now(), d.own.chain...))
	d.mu.Unlock()
	signal(d.asked)
}

// Run keeps the certificate of a device that has joined valid, and its clock
// known, until ctx is done.
func (d *Device) Run(ctx context.Context) {
	if err := d.settle(); err != nil { // the next renewal tries it again
		d.cfg.Log.Error("the key is not where it belongs", "error", err)
	}
	timeWait := firstTimeWait
	for {
		wait := lookEvery
		if lost := d.lost(); lost {
			err := d.learnTime(ctx)
			if ctx.Err() != nil {
				return
			}
			if err != nil {
				wait = mathrand.N(timeWait)
				timeWait = min(2*timeWait, lookEvery)
				d.cfg.Log.Warn("cannot learn the time yet; trying on", "error", messageOf(err), "in", wait.Round(time.Millisecond))
			} else {
				signal(d.changed)
				continue
			}
		} else {
			timeWait = firstTimeWait
			d.noteClock(ctx)
			now := d.Now()
			d.mu.Lock()
			due := d.plan.due(now)
			d.mu.Unlock()
			if due.After(now) {
				wait = min(wait, due.Sub(now))
			} else {
				d.attempt(ctx, now)
				wait = 0
			}
		}
		select {
		case <-time.After(wait):
		case <-d.asked:
		case <-ctx.Done():
			return
		}
	}
}

// attempt renews, and says how that came out.
func (d *Device) attempt(ctx context.Context, now time.Time) {
	err := d.renew(ctx)
	if ctx.Err() != nil {
		return
	}
	id := d.Stored()
	if err == nil {
		d.cfg.Log.Info("certificate renewed", "device", id.Device, "until", d.Certificate().NotAfter)
		signal(d.changed)
		return
	}
	d.mu.Lock()
	d.plan = d.plan.fail(now, mathrand.Float64())
	due, end := d.plan.due(now), d.plan.end
	d.mu.Unlock()
	d.cfg.Log.Warn("cannot renew the certificate yet; trying on", "device", id.Device, "controller", id.ControllerURL,
		"error", messageOf(err), "until", end, "in", due.Sub(now).Round(time.Second))
}

// renew gets a new certificate for a new key, by the key of the old one. What
// it was cut short in is done by the next attempt, or the next start.
func (d *Device) renew(ctx context.Context) error {
	if err := d.settle(); err != nil {
		return err
	}
	d.mu.Lock()
	id, own := d.stored, d.own
	d.mu.Unlock()
	next, csr, err := d.nextKey(id.Device)
	if err != nil {
		return err
	}
	request := &dunlinv1.RenewRequest{Certificate: own.chain[0].Raw, Csr: csr, TrustVersion: d.TrustVersion()}
	if request.Signature, err = pki.Sign(own.key, pki.RenewalMessage(request.Certificate, request.Csr)); err != nil {
		return err
	}
	answer, err := d.service(d.Stranger).renew(ctx, request)
	if err != nil {
		return err
	}
	g, err := check(id.Device, next.Public(), d.Now(), answer.Identity, cmp.Or(answer.BrokerUrl, id.BrokerURL), cmp.Or(answer.RegistryUrl, id.RegistryURL))
	if err != nil {
		return fmt.Errorf("the controller's answer: %w", err)
	}
	hold := askedEvery
	if d.cfg.TakeTrust != nil {
		if err := d.cfg.TakeTrust(ctx, answer.Identity.Trust); err != nil {
			d.cfg.Log.Error("trust document refused", "device", id.Device, "error", err)
			hold = refusedEvery
		}
	}
	if err := d.take(ctx, g, next); err != nil {
		return err
	}
	now := d.Now()
	d.mu.Lock()
	d.plan = d.plan.hold(now, hold)
	d.mu.Unlock()
	d.noteTime(ctx, answer.Identity.Now)
	return d.settle()
}

// lost says whether it is not known what time it is.
func (d *Device) lost() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.clock.lost(d.cfg.Now(), d.own.chain...)
}

// learnTime asks the controller what time it is, where that is not known.
func (d *Device) learnTime(ctx context.Context) error {
	if !d.lost() {
		return nil
	}
	nonce := make([]byte, timeNonce)
	rand.Read(nonce) // never fails
	answer, err := d.service(d.timeless).time(ctx, &dunlinv1.GetTimeRequest{Nonce: nonce})
	if err != nil {
		return err
	}
	t := d.trust()
	now, end, err := timeOf(answer, nonce, t.Roots, t.Pin)
	if err != nil {
		return fmt.Errorf("the controller's answer about the time: %w", err)
	}
	d.mu.Lock()
	d.clock, err = d.clock.hear(now, d.cfg.Now(), end)
	d.mu.Unlock()
	if err != nil {
		return err
	}
	d.cfg.Log.Warn("the clock of this device is wrong; going by the controller's", "clock", d.cfg.Now().UTC(), "controller", now)
	d.storeClock(ctx)
	return nil
}

// noteTime keeps a time that the controller said over a connection that was
// verified.
func (d *Device) noteTime(ctx context.Context, said *timestamppb.Timestamp) {
	if said.CheckValid() != nil {
		return
	}
	d.mu.Lock()
	if at := said.AsTime(); at.After(d.clock.floor) && at.Before(d.own.chain[0].NotAfter) {
		d.clock.floor = at
	}
	d.mu.Unlock()
	d.storeClock(ctx)
}

// noteClock keeps what time it is.
func (d *Device) noteClock(ctx context.Context) {
	d.mu.Lock()
	now := d.clock.now(d.cfg.Now(), d.own.chain...)
	note := now.Sub(d.clock.seen) >= lookEvery && now.Before(d.plan.end)
	if note {
		d.clock.seen = now
	}
	d.mu.Unlock()
	if note {
		d.storeClock(ctx)
	}
}

func (d *Device) storeClock(ctx context.Context) {
	d.mu.Lock()
	c := state.Clock{Answered: d.clock.floor, Seen: d.clock.seen}
	d.mu.Unlock()
	if err := d.cfg.State.SetClock(ctx, c); err != nil && ctx.Err() == nil {
		d.cfg.Log.Error("the time is not kept", "error", err)
	}
}
