package dispatch

import (
	"context"
	"math/big"
	"slices"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/dunlin/dunlin/internal/link"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// renewWithin is the time over which devices that trust others than they should
// renew.
const renewWithin = time.Minute

// identify takes in who says hello. It says whether the device is to be
// served: not while another agent has its identity.
func (d *Dispatcher) identify(ctx context.Context, device string, h *dunlinv1.Hello) (bool, error) {
	d.mu.Lock()
	t := d.twins[device]
	if t == nil {
		t = &twins{}
		d.twins[device] = t
	}
	down, kept, changed := t.hello(h.GetBootId(), h.GetInfo().GetHostname(), d.now())
	all, proven := t.seen(), t.proven
	d.mu.Unlock()
	if changed {
		var told []*dunlinv1.Twin
		if proven {
			for _, one := range all {
				told = append(told, &dunlinv1.Twin{BootId: one.boot, Hostname: one.hostname, LastHeardAt: timestamppb.New(one.last), Kept: !one.down})
			}
			d.log.Error("several agents use the identity of one device: revoke it, or let one of them join anew", "device", device, "agents", told)
		}
		if err := d.store.SetTwins(ctx, device, told); err != nil {
			return false, err
		}
	}
	if down {
		d.command(device, &dunlinv1.Command{Command: &dunlinv1.Command_StandDown{StandDown: &dunlinv1.StandDown{BootId: h.GetBootId(), KeptHostname: kept.hostname}}})
		return false, nil
	}
	if serial := h.GetCertificateSerial(); len(serial) > 0 && len(serial) <= 20 {
		superseded, err := d.store.Used(ctx, device, new(big.Int).SetBytes(serial))
		if err != nil {
			return false, err
		}
		if superseded {
			d.superseded()
		}
	}
	version, roots := d.trusted()
	// Without roots it is not known whom the device should trust.
	if h.GetTrustVersion() < version || lacks(h.GetRootIds(), roots) || len(roots) > 0 && lacks(roots, h.GetRootIds()) {
		d.command(device, &dunlinv1.Command{Command: &dunlinv1.Command_RenewNow{RenewNow: &dunlinv1.RenewNow{WithinMs: uint32(renewWithin.Milliseconds())}}})
	}
	return true, nil
}

// lacks says whether one of want is not among have.
func lacks(have, want [][]byte) bool {
	return slices.ContainsFunc(want, func(id []byte) bool {
		return !slices.ContainsFunc(have, func(has []byte) bool { return slices.Equal(has, id) })
	})
}

func (d *Dispatcher) command(device string, c *dunlinv1.Command) {
	d.send(link.Down(device, link.Command), link.Command, c)
}
