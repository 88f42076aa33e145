package policy

import (
	"math"
	"strconv"

	"github.com/cespare/xxhash/v2"
)

// hash is the same on every machine and in every release: keys keep their
// targets by it.
func hash(s string) uint64 { return xxhash.Sum64String(s) }

func (t Target) hash() uint64 { return hash(t.Model + ":" + strconv.FormatInt(t.Version, 10)) }

// mix makes every bit of the result depend on every bit of x: the finalizer of
// MurmurHash3.
func mix(x uint64) uint64 {
	x ^= x >> 33
	x *= 0xff51afd7ed558ccd
	x ^= x >> 33
	x *= 0xc4ceb9fe1a85ec53
	return x ^ x>>33
}

// stick gives the target of a key by weighted rendezvous: each target draws a
// time, exponentially distributed with its weight as the rate, from the key
// and its own name, and the first in time has the key. So each gets its share
// of the keys, and a key changes its target only where one of the two draws
// has changed: when one weight changes and the share of its target by x, so
// much of the keys moves; when x moves from one of several targets to another,
// 2x/(1+x) at most, which is the least that a choice without a memory can
// promise.
func (c *choice) stick(seed uint64, key string) Target {
	if len(c.targets) == 1 {
		return c.targets[0]
	}
	k := mix(hash(key) ^ seed)
	best, first := 0, math.Inf(1)
	for i := range c.hashes {
		if t := c.draw(k, i); t < first {
			best, first = i, t
		}
	}
	return c.targets[best]
}

// draw is the time that a target draws from the hash of a key.
func (c *choice) draw(key uint64, i int) float64 {
	// In (0, 1): 53 bits, and a half.
	u := (float64(mix(key^c.hashes[i])>>11) + 0.5) / (1 << 53)
	return -math.Log(u) / c.weights[i]
}
