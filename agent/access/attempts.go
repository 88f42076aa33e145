package access

import (
	"crypto/sha256"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// An address may show wrongBurst wrong keys, and one more each wrongEvery.
// After that it is not told whether a key is right, unless it has shown that
// key before: who shares an address with somebody who guesses goes on.
const (
	wrongBurst = 10
	wrongEvery = 5 * time.Second
	// maxPlaces bounds the addresses of which something is known.
	maxPlaces = 4096
)

// attempts knows from where wrong keys came. The zero value knows of none.
type attempts struct {
	mu    sync.Mutex
	wrong map[netip.Addr]*rate.Limiter
	right map[placeKey]struct{}
}

type placeKey struct {
	from netip.Addr
	key  [sha256.Size]byte
}

// place is what counts as one address: of IPv6, a whole network of a customer.
func place(a netip.Addr) netip.Addr {
	a = a.Unmap().WithZone("")
	if p, err := a.Prefix(64); err == nil && a.Is6() {
		return p.Addr()
	}
	return a
}

// wait says for how long a key is not looked at; 0: it may be.
func (a *attempts) wait(from netip.Addr, key [sha256.Size]byte, now time.Time) time.Duration {
	a.mu.Lock()
	defer a.mu.Unlock()
	l := a.wrong[from]
	if l == nil || l.TokensAt(now) >= 1 {
		return 0
	}
	if _, known := a.right[placeKey{from, key}]; known {
		return 0
	}
	return untilOne(l, now)
}

// failed notes a wrong key.
func (a *attempts) failed(from netip.Addr, now time.Time) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.wrong == nil {
		a.wrong = make(map[netip.Addr]*rate.Limiter)
	}
	l := a.wrong[from]
	if l == nil {
		makeRoom(a.wrong, maxPlaces)
		l = rate.NewLimiter(rate.Every(wrongEvery), wrongBurst)
		a.wrong[from] = l
	}
	l.AllowN(now, 1)
}

// passed notes a right key.
func (a *attempts) passed(from netip.Addr, key [sha256.Size]byte) {
	a.mu.Lock()
	defer a.mu.Unlock()
	at := placeKey{from, key}
	if _, known := a.right[at]; known {
		return
	}
	if a.right == nil {
		a.right = make(map[placeKey]struct{})
	}
	makeRoom(a.right, maxPlaces)
	a.right[at] = struct{}{}
}
