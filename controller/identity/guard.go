package identity

import (
	"fmt"
	"math"
	"net/netip"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	"golang.org/x/time/rate"
)

// How many wrong credentials an address, and a user's password, may see at
// once, and in how much time another one is granted.
const (
	addressWrong = 20
	addressEvery = 3 * time.Second
	nameWrong    = 10
	nameEvery    = 30 * time.Second
)

// guarded bounds the addresses, the names and the tokens that a Guard
// remembers, each; beyond it the one of which nothing was heard for longest is
// forgotten.
const guarded = 16384

// Guard slows guessing: who shows too many wrong credentials waits. Wrong ones
// count against the address that they come from and, if they are passwords,
// against the user, wherever they come from. A token that was right from an
// address goes on being looked at from there, so that somebody who guesses
// behind the same proxy locks out nobody who is in. A Guard is safe for
// concurrent use.
type Guard struct {
	now       func() time.Time
	addresses *lru.Cache[string, *rate.Limiter]
	names     *lru.Cache[string, *rate.Limiter]
	right     *lru.Cache[[32]byte, struct{}]
}

// NewGuard gives a Guard with a clock.
func NewGuard(now func() time.Time) *Guard {
	return &Guard{now: now, addresses: cache[string, *rate.Limiter](), names: cache[string, *rate.Limiter](), right: cache[[32]byte, struct{}]()}
}

func cache[K comparable, V any]() *lru.Cache[K, V] {
	c, err := lru.New[K, V](guarded)
	if err != nil {
		panic(err) // the size is above 0
	}
	return c
}

// Attempt is one try to show who one is.
type Attempt struct {
	// From is the address that it comes from, host:port. Addresses of IPv6
	// count by their /64.
	From string
	// Name is that of the user whose password it is; empty for a token or a
	// secret, which nobody guesses in parts.
	Name       string
	Credential string
}

func (a Attempt) address() string {
	at, err := netip.ParseAddrPort(a.From)
	if err != nil {
		return a.From
	}
	ip := at.Addr().Unmap().WithZone("")
	if ip.Is6() {
		return netip.PrefixFrom(ip, 64).Masked().String()
	}
	return ip.String()
}

func (a Attempt) key() [32]byte { return Hash(a.address() + " " + a.Credential) }

// LimitedError says that too many credentials were wrong, and how long to wait.
type LimitedError struct {
	Wait time.Duration
	Busy bool // it is not that: too many passwords wait to be hashed
}

func (e *LimitedError) Error() string {
	if e.Busy {
		return fmt.Sprintf("too many sign in at once; try again in %d s", e.Seconds())
	}
	return fmt.Sprintf("too many wrong credentials; try again in %d s", e.Seconds())
}

// Seconds is the wait in whole seconds, as Retry-After has it.
func (e *LimitedError) Seconds() int { return max(1, int(math.Ceil(e.Wait.Seconds()))) }

// Check says whether an attempt may be looked at: if not, with a LimitedError.
func (g *Guard) Check(a Attempt) error {
	now := g.now()
	var wait time.Duration
	if l, ok := g.addresses.Get(a.address()); ok && !(a.Name == "" && g.right.Contains(a.key())) {
		wait = waitOf(l, now)
	}
	if a.Name != "" {
		if l, ok := g.names.Get(a.Name); ok {
			wait = max(wait, waitOf(l, now))
		}
	}
	if wait > 0 {
		return &LimitedError{Wait: wait}
	}
	return nil
}

func waitOf(l *rate.Limiter, now time.Time) time.Duration {
	missing := 1 - l.TokensAt(now)
	if missing <= 0 {
		return 0
	}
	return max(1, time.Duration(missing/float64(l.Limit())*float64(time.Second)))
}

// Wrong counts an attempt whose credential was wrong.
func (g *Guard) Wrong(a Attempt) {
	now := g.now()
	count(g.addresses, a.address(), addressEvery, addressWrong, now)
	if a.Name != "" {
		count(g.names, a.Name, nameEvery, nameWrong, now)
	} else {
		g.right.Remove(a.key()) // it was taken back
	}
}

func count(limiters *lru.Cache[string, *rate.Limiter], key string, every time.Duration, burst int, now time.Time) {
	l := rate.NewLimiter(rate.Every(every), burst)
	if have, ok, _ := limiters.PeekOrAdd(key, l); ok {
		l = have
		limiters.Get(key) // it is the newest now
	}
	l.AllowN(now, 1)
}

// Right remembers an attempt whose credential was right.
func (g *Guard) Right(a Attempt) {
	if a.Name == "" {
		g.right.Add(a.key(), struct{}{})
	}
}
