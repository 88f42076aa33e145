package identity

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"slices"
	"time"

	"connectrpc.com/connect"

	"github.com/dunlin/dunlin/internal/pki"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

const (
	firstJoinWait = time.Second
	lastJoinWait  = time.Minute
)

// Join gets the device's certificate, where it has none, for as long as the
// controller is away. The key is on disk before it is used, so that a repeated
// join is the same join.
func (d *Device) Join(ctx context.Context, info *dunlinv1.DeviceInfo) error {
	cfg, id := d.cfg, d.Stored()
	if d.Joined() {
		if cfg.Controller != "" && cfg.Controller != id.ControllerURL {
			cfg.Log.Warn("the device has joined another controller already and stays there", "device", id.Device, "controller", id.ControllerURL)
		}
		return nil
	}
	if cfg.JoinToken == "" {
		return fmt.Errorf("join %s: no join token: make one with `dunlin join-token create` and pass it by --join-token @FILE or DUNLIN_JOIN_TOKEN", cfg.Controller)
	}
	key, err := d.makeKey(keyFile)
	if err != nil {
		return err
	}
	id.Device, id.ControllerURL = cfg.Name, cfg.Controller
	if err := cfg.State.SetIdentity(ctx, id); err != nil {
		return err
	}
	d.mu.Lock()
	d.stored = id
	d.mu.Unlock()
	csr, err := pki.Request(key, id.Device)
	if err != nil {
		return err
	}
	request := &dunlinv1.JoinRequest{JoinToken: cfg.JoinToken, Name: id.Device, Labels: cfg.Labels, Info: info, Csr: csr}
	bound := firstJoinWait
	for {
		var answer *dunlinv1.JoinResponse
		err := d.learnTime(ctx)
		if err == nil {
			answer, err = d.service(d.Stranger).join(ctx, request)
		}
		if err == nil {
			g, err := check(id.Device, key.Public(), d.Now(), answer.Identity, answer.BrokerUrl, answer.RegistryUrl)
			if err == nil && d.pin != nil && !slices.ContainsFunc(g.roots, func(c *x509.Certificate) bool { return pki.PinOf(c) == *d.pin }) {
				err = errors.New("the authority that the join token names is not among its roots")
			}
			if err != nil {
				return fmt.Errorf("join %s: the controller's answer: %w", cfg.Controller, err)
			}
			if d.cfg.TakeTrust != nil {
				if err := d.cfg.TakeTrust(ctx, answer.Identity.Trust); err != nil {
					return fmt.Errorf("join %s: the controller's answer: %w", cfg.Controller, err)
				}
			}
			if err := d.take(ctx, g, key); err != nil {
				return err
			}
			d.noteTime(ctx, answer.Identity.Now)
			cfg.Log.Info("joined", "device", id.Device, "controller", cfg.Controller)
			return nil
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if refused(err) {
			hint := ""
			if connect.CodeOf(err) == connect.CodePermissionDenied {
				hint = "; make a new one with `dunlin join-token create`"
			}
			return fmt.Errorf("join %s as %s: %s%s", cfg.Controller, id.Device, messageOf(err), hint)
		}
		wait := mathrand.N(bound)
		cfg.Log.Warn("cannot join yet; trying on", "device", id.Device, "controller", cfg.Controller, "error", messageOf(err), "in", wait.Round(time.Millisecond))
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return ctx.Err()
		}
		bound = min(2*bound, lastJoinWait)
	}
}
