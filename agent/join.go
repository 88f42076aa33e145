package agent

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"net/http"
	"time"

	"connectrpc.com/connect"

	"github.com/dunlin/dunlin/agent/state"
	"github.com/dunlin/dunlin/internal/program"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
	"github.com/dunlin/dunlin/proto/dunlin/v1/dunlinv1connect"
)

const (
	joinTimeout   = 30 * time.Second
	firstJoinWait = time.Second
	lastJoinWait  = time.Minute
	maxJoinAnswer = 64 << 10
)

// join gives the device's identity. Until the device has one it asks the
// controller for it, for as long as the controller is away. The secret is on
// disk before it is sent, so that a repeated join is the same join. take gets
// the trust documents that come with the identity.
func join(ctx context.Context, cfg Config, store *state.Store, info *dunlinv1.DeviceInfo, take func(context.Context, []*dunlinv1.SignedTrust) error) (state.Identity, error) {
	id, err := store.Identity(ctx)
	if err != nil && !errors.Is(err, state.ErrNone) {
		return id, err
	}
	if joined(id) {
		if cfg.Controller != "" && cfg.Controller != id.ControllerURL {
			cfg.Log.Warn("the device has joined another controller already and stays there", "device", id.Device, "controller", id.ControllerURL)
		}
		return id, nil
	}
	if cfg.JoinToken == "" {
		return id, fmt.Errorf("join %s: no join token: make one with `dunlin join-token create` and pass it by --join-token or DUNLIN_JOIN_TOKEN", cfg.Controller)
	}
	if id.Secret == "" {
		raw := make([]byte, 32)
		if _, err := rand.Read(raw); err != nil {
			return id, err
		}
		id.Secret = base64.RawURLEncoding.EncodeToString(raw)
	}
	id.Device, id.ControllerURL = cfg.Name, cfg.Controller
	if err := store.SetIdentity(ctx, id); err != nil {
		return id, err
	}
	request := &dunlinv1.JoinRequest{JoinToken: cfg.JoinToken, Name: id.Device, Secret: id.Secret, Labels: cfg.Labels, Info: info}
	client := dunlinv1connect.NewEnrollmentServiceClient(&http.Client{Timeout: joinTimeout}, cfg.Controller, connect.WithReadMaxBytes(maxJoinAnswer))
	bound := firstJoinWait
	for {
		answer, err := client.Join(ctx, connect.NewRequest(request))
		if err == nil {
			id.BrokerURL, id.RegistryURL = answer.Msg.BrokerUrl, answer.Msg.RegistryUrl
			if err := errors.Join(program.CheckURL(id.BrokerURL, "tcp"), program.CheckURL(id.RegistryURL, "http")); err != nil {
				return id, fmt.Errorf("join %s: the controller's answer: %w", cfg.Controller, err)
			}
			if err := take(ctx, answer.Msg.Identity.GetTrust()); err != nil {
				return id, fmt.Errorf("join %s: %w", cfg.Controller, err)
			}
			cfg.Log.Info("joined", "device", id.Device, "controller", cfg.Controller)
			return id, store.SetIdentity(ctx, id)
		}
		if ctx.Err() != nil {
			return id, ctx.Err()
		}
		switch connect.CodeOf(err) {
		case connect.CodeUnauthenticated, connect.CodePermissionDenied, connect.CodeInvalidArgument, connect.CodeAlreadyExists, connect.CodeFailedPrecondition:
			hint := ""
			if connect.CodeOf(err) == connect.CodePermissionDenied {
				hint = "; make a new one with `dunlin join-token create`"
			}
			return id, fmt.Errorf("join %s as %s: %s%s", cfg.Controller, id.Device, messageOf(err), hint)
		}
		wait := mathrand.N(bound)
		cfg.Log.Warn("cannot join yet; trying on", "device", id.Device, "controller", cfg.Controller, "error", messageOf(err), "in", wait.Round(time.Millisecond))
		if !sleep(ctx, wait) {
			return id, ctx.Err()
		}
		bound = min(2*bound, lastJoinWait)
	}
}

// messageOf gives what an error of a call says, without the name of its code.
func messageOf(err error) string {
	if e, ok := errors.AsType[*connect.Error](err); ok && e.Message() != "" {
		return e.Message()
	}
	return err.Error()
}

func joined(id state.Identity) bool { return id.BrokerURL != "" }

// sleep waits, and says whether ctx lasted that long.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
