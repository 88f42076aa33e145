package dispatch

import (
	"context"
	"errors"
	"math/big"
	"slices"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/dunlin/dunlin/controller/store"
	"github.com/dunlin/dunlin/internal/link"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// renewWithin is the time over which devices that trust others than they should
// renew.
const renewWithin = time.Minute

// said is what came of a look at who says hello.
type said struct {
	serve bool // not while another agent has the device's identity
	err   error
}

// identify takes in who said hello, of messages that were taken in. The
// certificates that count from now on are kept in one transaction: when all
// devices come with new ones, as a fleet does that joins, nobody waits for one
// of each.
func (d *Dispatcher) identify(ctx context.Context, kept []store.Inbound, taken []store.Taken) map[*dunlinv1.Hello]said {
	who := map[*dunlinv1.Hello]said{}
	var uses []store.Use
	for i, m := range kept {
		if m.Hello == nil || taken[i].Err != nil {
			continue
		}
		serve, err := d.alone(ctx, m.Device, m.Hello)
		who[m.Hello] = said{serve, err}
		if serial := m.Hello.GetCertificateSerial(); serve && err == nil && len(serial) > 0 && len(serial) <= 20 {
			uses = append(uses, store.Use{Device: m.Device, Serial: new(big.Int).SetBytes(serial)})
		}
	}
	superseded, err := d.store.Used(ctx, uses...)
	if superseded {
		d.superseded()
	}
	if err != nil { // as if their hellos had not come
		for h, one := range who {
			who[h] = said{err: errors.Join(one.err, err)}
		}
	}
	return who
}

// alone takes in which agent said hello as a device, and says whether it is to
// be served.
func (d *Dispatcher) alone(ctx context.Context, device string, h *dunlinv1.Hello) (bool, error) {
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
	return true, nil
}

// renew tells a device that trusts others than it should to renew.
func (d *Dispatcher) renew(device string, h *dunlinv1.Hello) {
	version, roots := d.trusted()
	// Without roots it is not known whom the device should trust.
	if h.GetTrustVersion() < version || lacks(h.GetRootIds(), roots) || len(roots) > 0 && lacks(roots, h.GetRootIds()) {
		d.command(device, &dunlinv1.Command{Command: &dunlinv1.Command_RenewNow{RenewNow: &dunlinv1.RenewNow{WithinMs: uint32(renewWithin.Milliseconds())}}})
	}
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
