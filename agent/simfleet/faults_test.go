package simfleet

import (
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/dunlin/dunlin/internal/netem"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// seeds are those of a random test: DUNLIN_SEED's, or new ones, which are
// printed: DUNLIN_SEEDS, or n.
func seeds(t *testing.T, n int) []uint64 {
	t.Helper()
	if text := os.Getenv("DUNLIN_SEED"); text != "" {
		seed, err := strconv.ParseUint(text, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		return []uint64{seed}
	}
	if text := os.Getenv("DUNLIN_SEEDS"); text != "" {
		var err error
		if n, err = strconv.Atoi(text); err != nil {
			t.Fatal(err)
		}
	}
	all := make([]uint64, n)
	for i := range all {
		all[i] = rand.Uint64()
	}
	return all
}

// randomFaults are faults that all end before the end.
func randomFaults(random *rand.Rand, n int, end time.Duration) []Fault {
	ms := func(most int) *time.Duration { return new(time.Duration(random.IntN(most)) * time.Millisecond) }
	var all []Fault
	for range n {
		f := Fault{At: time.Duration(random.Int64N(int64(end) / 2)), Part: random.Float64(), For: time.Duration(random.Int64N(int64(end) / 4)), Over: time.Duration(random.Int64N(int64(end) / 8))}
		f.For = max(f.For, time.Second)
		switch random.IntN(9) {
		case 0:
			f.RTT, f.Loss = ms(2000), new(random.Float64()*0.4)
		case 1:
			f.BitsPerSecond = new(50e3 + random.Int64N(1e6))
		case 2:
			f.Down = true
		case 3:
			f.Cut = true
		case 4:
			f.Reboot, f.Off = true, *ms(60e3)
		case 5:
			f.Crash, f.Off = true, *ms(60e3)
		case 6:
			f.DiskWrite = ms(3000)
		case 7:
			f.DiskFull = true
		case 8:
			f.Skew = new(time.Duration(random.Int64N(int64(48*time.Hour))) - 24*time.Hour)
		}
		all = append(all, f)
	}
	return all
}

// Whatever befalls devices, network and broker while documents come and go: the
// devices come to run what is wanted, no event is lost, and no request fails on
// an agent that is up.
func TestRandomFaults(t *testing.T) {
	for _, seed := range seeds(t, 1) {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				const devices, end = 6, 10 * time.Minute
				random := rand.New(rand.NewPCG(seed, 0))
				c := newCloud(t)
				f := newFleet(t, c, devices, func(cfg *Config) {
					cfg.Seed, cfg.Faults, cfg.Net, cfg.RequestsPerSecond = seed, append(randomFaults(random, 20, end), Fault{At: end / 3, Over: time.Minute, Part: 1, Crash: true}), netem.Conditions{RTT: 50 * time.Millisecond}, 0.2
				})
				var versions []*dunlinv1.DesiredVersion
				for i := range int64(4) {
					versions = append(versions, c.push("m", i+1, 200e3), c.push("n", i+1, 20e3))
				}
				defer run(t, f)()
				number := uint64(0)
				for began := time.Now(); time.Since(began) < end; {
					number++
					at := 2 * random.IntN(len(versions)/2)
					c.want(f, number, versions[at:][:1+random.IntN(2)]...)
					time.Sleep(time.Duration(random.Int64N(int64(2 * time.Minute))))
					if random.IntN(4) == 0 {
						c.stopBroker()
						time.Sleep(time.Duration(random.Int64N(int64(30 * time.Second))))
						c.startBroker()
					}
				}
				number++
				c.want(f, number, versions[6:]...)
				within(t, 10*time.Minute, "all serve what is wanted", func() bool {
					_, n := c.knows(number)
					return n == devices
				})
				starts, asked := uint64(0), uint64(0)
				within(t, 5*time.Minute, "all events have come", func() bool {
					for _, d := range f.Devices() {
						if left, err := d.store.Pending(t.Context(), 1); err != nil || len(left) > 0 {
							return false
						}
					}
					return true
				})
				for _, d := range f.Devices() {
					if err := d.Converged(); err != nil {
						t.Errorf("%s: %v", d.Name, err)
					}
					answered, failed := d.Requests()
					if failed > 0 {
						t.Errorf("%s: %d requests failed, %d were answered", d.Name, failed, answered)
					}
					starts, asked = starts+d.Starts(), asked+answered
				}
				if starts <= devices || asked == 0 {
					t.Errorf("%d starts of %d devices, %d requests", starts, devices, asked)
				}
				t.Logf("%d starts, %d requests, %d documents", starts, asked, number)
			})
		})
	}
}

// The same seed gives the same faults.
func TestStrokes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCloud(t)
		f := newFleet(t, c, 100, func(cfg *Config) {
			cfg.Faults = []Fault{{At: time.Minute, For: time.Second, Part: 0.3, Down: true}, {At: time.Second, Part: 1, Over: time.Minute, Cut: true, Class: "raspberry-pi-5"}, {At: 0, Part: 1, Class: "other", Cut: true}}
		})
		all := f.strokes()
		if n := len(all); n < 100+2*20 || n > 100+2*40 {
			t.Errorf("%d strokes", n)
		}
		for i, s := range f.strokes() {
			if s != all[i] {
				t.Fatalf("stroke %d is %v, was %v", i, s, all[i])
			}
			if i > 0 && s.at < all[i-1].at || s.fault == 2 || s.fault == 1 && (s.at < time.Second || s.at > 61*time.Second) {
				t.Errorf("stroke %d: %+v", i, s)
			}
		}
	})
}

func TestParseScript(t *testing.T) {
	got, err := ParseScript("f", []byte(`
- {at: 1m, for: 2m, part: 0.3, class: raspberry-pi-5, over: 10s, rtt: 200ms, loss: 0.3, kbit_per_second: 100}
- {at: 3m, network: down, for: 30s}
- {at: 3m, power: crash, off: 1m}
- {at: 0s, clock_skew: -1h, disk_write: 300ms, disk: full}
`))
	if err != nil || len(got) != 4 {
		t.Fatalf("%v %v", got, err)
	}
	if f := got[0]; f.At != time.Minute || f.For != 2*time.Minute || f.Part != 0.3 || *f.RTT != 200*time.Millisecond || *f.Loss != 0.3 || *f.BitsPerSecond != 100e3 || f.Class != "raspberry-pi-5" || f.Over != 10*time.Second || !f.network() {
		t.Errorf("%+v", f)
	}
	if !got[1].Down || got[1].Part != 1 || !got[2].Crash || got[2].Off != time.Minute || *got[3].Skew != -time.Hour || *got[3].DiskWrite != 300*time.Millisecond || !got[3].DiskFull {
		t.Errorf("%+v", got)
	}
	for text, want := range map[string]string{
		"- {loss: 0.1}":                                      "entry 1: at: is missing",
		"- {at: soon, loss: 0.1}":                            `at: is "soon", it must be a duration`,
		"- {at: 1s}":                                         "no fault is named",
		"- {at: 1s, loss: 2}":                                "loss: is 2, allowed are 0 to 1",
		"- {at: 1s, part: 0, loss: 0}":                       "part: is 0",
		"- {at: 1s, network: up}":                            `network: is "up", it must be down or cut`,
		"- {at: 1s, network: cut, off: 1s}":                  "off: has a meaning with power only",
		"- {at: 1s, colour: red}":                            "unknown field",
		"- {at: 1s, kbit_per_second: -1}":                    "kbit_per_second: is -1",
		strings.Repeat(" ", MaxScript+1):                     "the limit is",
		strings.Repeat("- {at: 1s, loss: 0}\n", maxFaults+1): "the limit is 1000",
	} {
		if _, err := ParseScript("f", []byte(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.60q: %v, want %q in it", text, err, want)
		}
	}
}

func FuzzParseScript(f *testing.F) {
	f.Add([]byte("! 0000")) // the decoder panics
	f.Add([]byte("- {at: 1m, for: 2m, part: 0.3, loss: 0.3}\n- {at: 3m, power: crash}"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		faults, err := ParseScript("f", raw)
		if err != nil {
			return
		}
		for _, f := range faults {
			if f.At < 0 || f.For < 0 || !(f.Part > 0 && f.Part <= 1) || f.Loss != nil && !(*f.Loss >= 0 && *f.Loss <= 1) {
				t.Errorf("%+v", f)
			}
		}
	})
}
