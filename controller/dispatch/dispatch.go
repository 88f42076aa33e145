// Package dispatch brings desired state to the devices and takes in what they
// send: it persists, then publishes, and steps the rollouts.
package dispatch

import (
	"context"
	"crypto/rand"
	"errors"
	"hash/fnv"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/proto"

	"github.com/dunlin/dunlin/controller/fleet"
	"github.com/dunlin/dunlin/controller/store"
	"github.com/dunlin/dunlin/internal/link"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// Bus sends to the devices; the broker implements it.
type Bus interface {
	Publish(topic string, payload []byte) error
	Disconnect(device string)
}

// Config is what a Dispatcher works with. OnStep and Metrics may be nil.
type Config struct {
	Store   *store.Store
	Bus     Bus
	Log     *slog.Logger
	Metrics prometheus.Registerer
	// OnStep is called with "before publish KIND" and "after publish KIND"
	// around each message to a device.
	OnStep func(step string)
	// Trusted gives the version of the newest trust document and the
	// fingerprints of the certificate authorities: a device that has less, or
	// knows one that is none of them, is told to renew. Nil: devices have all.
	Trusted func() (version uint64, roots [][]byte)
	// Superseded is called when a device has begun to use a new certificate,
	// and older ones count no more. May be nil.
	Superseded func()
}

const (
	// workers take in messages; those of one device go to one worker, in order.
	// The store has one writer: the fewer take turns at it, the more messages
	// each takes in with one transaction, and the sooner it is the planner's turn.
	workers = 2
	// queueLimit bounds the messages that wait for a worker. When its queue
	// is full, Handle blocks, and the broker stops reading from the device.
	queueLimit = 1024
	// gather bounds the messages that a worker takes in with one transaction:
	// those that have come while it was at the ones before.
	gather = queueLimit
)

// timing is how often things happen.
type timing struct {
	resend, resendMost time.Duration // backoff of an unobserved generation
	share              time.Duration // one device's share of the time that many have to answer before it is sent again
	ask                time.Duration // between two HelloAgain to a device
	pass               time.Duration // least time between two passes of the planner
	look               time.Duration // most time between two passes while a rollout runs
	beat               time.Duration // between two epochs
	silence            time.Duration // after which a device counts as away: it sends telemetry every minute
	sample             time.Duration // between two steps of a rollout that counts figures
	keep               time.Duration // between two times that figures are kept: so much of them is lost at most
	drift              time.Duration // between two times that devices are held against their documents
}

var defaultTiming = timing{
	resend: 2 * time.Second, resendMost: time.Minute, share: time.Millisecond / 2, ask: 30 * time.Second,
	pass: 20 * time.Millisecond, look: 10 * time.Second,
	beat: time.Minute, silence: 3 * time.Minute,
	sample: time.Second, keep: 3 * time.Second, drift: 2 * time.Second,
}

// Dispatcher is safe for concurrent use.
type Dispatcher struct {
	store  *store.Store
	bus    Bus
	log    *slog.Logger
	onStep func(string)
	timing timing
	now    func() time.Time

	trusted    func() (uint64, [][]byte)
	superseded func()

	queues  [workers]chan message
	stopped chan struct{} // closed when Run ends: queued messages are dropped
	kick    chan struct{} // capacity 1: the planner has something to do
	objects atomic.Bool   // objects, versions or rollouts changed
	planner planner
	view    *view

	sites            sites
	malformed, stale *prometheus.CounterVec
	drifting         *prometheus.GaugeVec

	mu      sync.Mutex // guards what follows; held for memory only
	live    map[string]*live
	twins   map[string]*twins
	refused map[string][]fleet.Refusal // by device, as of the last documents; the slices are never changed
	figures map[int64]*watched         // by rollout
	drifts  map[string][]*dunlinv1.Drift
	crowd   int                      // generations that were published together last, while any is not observed
	current map[string]fleet.Rollout // those that the planner has, by ID
	bootID  string
	changed chan struct{}
}

type message struct {
	device, kind string
	payload      []byte
}

// live is what is known of a connected device beside the store.
type live struct {
	// It said hello, or the store has it as connected: what it should have is
	// sent to it. One that is only heard is asked to say hello until it does.
	greeted   bool
	heard     time.Time
	saved     time.Time // heard as the store has it
	asked     time.Time // to say hello again, or given its desired state
	telemetry *dunlinv1.Telemetry
	kept      *dunlinv1.Telemetry // that Samples gave last
	free      *uint64             // bytes on its disk as the store has it; nil: not saved yet
	leased    time.Time           // until when it sends telemetry with figures
	looked    time.Time           // until when it sends telemetry each second, because somebody looks
	sent      uint64              // number of the generation that was sent since it last said hello; 0: none
	// A generation that the device has not reported as observed.
	pending uint64 // 0: none
	attempt int
	next    time.Time
}

// New makes a Dispatcher; Run starts it.
func New(c Config) *Dispatcher {
	if c.OnStep == nil {
		c.OnStep = func(string) {}
	}
	if c.Trusted == nil {
		c.Trusted = func() (uint64, [][]byte) { return 0, nil }
	}
	if c.Superseded == nil {
		c.Superseded = func() {}
	}
	d := &Dispatcher{
		trusted: c.Trusted, superseded: c.Superseded, twins: map[string]*twins{},
		store: c.Store, bus: c.Bus, log: c.Log, onStep: c.OnStep, timing: defaultTiming, now: time.Now,
		stopped: make(chan struct{}), kick: make(chan struct{}, 1), view: newView(),
		refused: map[string][]fleet.Refusal{}, figures: map[int64]*watched{}, drifts: map[string][]*dunlinv1.Drift{},
		live: map[string]*live{}, bootID: rand.Text(), changed: make(chan struct{}),
		malformed: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "dunlin_controller_malformed_total", Help: "Messages from devices that were dropped because they are malformed, by kind.",
		}, []string{"kind"}),
		stale: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "dunlin_controller_ignored_total", Help: "Well-formed messages that were ignored: of an older session, out of order, or of an unknown device.",
		}, []string{"kind"}),
	}
	d.drifting = prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "dunlin_controller_drift", Help: "What of connected devices is other than it should be, by kind.",
	}, []string{"kind"})
	for _, kind := range driftKinds {
		d.drifting.WithLabelValues(kind)
	}
	for i := range d.queues {
		d.queues[i] = make(chan message, queueLimit)
	}
	if c.Metrics != nil {
		c.Metrics.MustRegister(d.malformed, d.stale, d.drifting)
	}
	return d
}

// Run carries on where the store says that the last one stopped, until ctx is
// done. It may be called once.
func (d *Dispatcher) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	defer close(d.stopped)
	d.Replan()
	for i := range d.queues {
		wg.Go(func() { d.work(ctx, d.queues[i]) })
	}
	wg.Go(func() { d.beats(ctx) })
	wg.Go(func() { d.plan(ctx) })
	<-ctx.Done()
	return nil
}

// Handle takes a message in. It blocks while its worker has queueLimit
// messages to do, and drops the message once Run has ended. It keeps payload.
func (d *Dispatcher) Handle(topic string, payload []byte) {
	device, kind, err := link.ParseUp(topic)
	if err != nil {
		d.drop("topic", "", err)
		return
	}
	if len(payload) > link.MaxPayload {
		d.drop(kind, device, errTooLarge)
		return
	}
	h := fnv.New32a()
	h.Write([]byte(device))
	select {
	case d.queues[h.Sum32()%workers] <- message{device, kind, payload}:
	case <-d.stopped:
	}
}

var errTooLarge = errors.New("payload is above the limit")

// Malformed counts a message of a device that another part has dropped, for
// what is wrong with it.
func (d *Dispatcher) Malformed(kind, device string, err error) { d.drop(kind, device, err) }

func (d *Dispatcher) drop(kind, device string, err error) {
	d.malformed.WithLabelValues(kind).Inc()
	d.log.Debug("dropped a malformed message", "device", device, "kind", kind, "error", err)
}

func (d *Dispatcher) work(ctx context.Context, queue <-chan message) {
	for {
		select {
		case <-ctx.Done():
			return
		case m := <-queue:
			all := []message{m}
			for len(all) < gather && len(queue) > 0 { // this worker alone takes from it
				all = append(all, <-queue)
			}
			d.take(ctx, all)
		}
	}
}

// Replan says that objects, versions, rollouts or measurements changed: the
// desired documents that this touches are compiled anew.
func (d *Dispatcher) Replan() {
	d.objects.Store(true)
	d.wake()
}

func (d *Dispatcher) wake() {
	select {
	case d.kick <- struct{}{}:
	default: // a pass that has not begun yet will see it
	}
}

// Joined says that a device is new, or was made anew.
func (d *Dispatcher) Joined(device string) {
	d.view.stale(device)
	d.wake()
}

// Forget cuts a removed device off.
func (d *Dispatcher) Forget(device string) {
	d.mu.Lock()
	delete(d.live, device)
	delete(d.twins, device)
	d.mu.Unlock()
	d.bus.Disconnect(device)
	d.Joined(device) // the store says that it is not there
}

// dropped forgets what there was of a device that is gone from the store.
func (d *Dispatcher) dropped(device string) {
	d.mu.Lock()
	delete(d.refused, device)
	d.mu.Unlock()
	d.found(device, nil)
}

// CutOff ends the session of a device whose certificates were revoked before.
func (d *Dispatcher) CutOff(device string) { d.bus.Disconnect(device) }

// Telemetry gives the newest sample of a connected device, or nil.
func (d *Dispatcher) Telemetry(device string) *dunlinv1.Telemetry {
	d.mu.Lock()
	defer d.mu.Unlock()
	if l := d.live[device]; l != nil {
		return l.telemetry
	}
	return nil
}

// Heard says when a device was last heard, where the store was not told of it
// yet; zero: what the store has is the newest.
func (d *Dispatcher) Heard(device string) time.Time {
	d.mu.Lock()
	defer d.mu.Unlock()
	if l := d.live[device]; l != nil && l.heard.After(l.saved) {
		return l.heard
	}
	return time.Time{}
}

// Refused gives the versions that a device is not given because they do not
// fit, as of the newest desired documents.
func (d *Dispatcher) Refused(device string) []fleet.Refusal {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.refused[device]
}

// Rollout gives a rollout by its ID as it is now, where it has not ended or is
// the newest of its deployment. Its devices are not to be changed.
func (d *Dispatcher) Rollout(id string) (fleet.Rollout, bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	r, ok := d.current[id]
	return r, ok
}

// Changed gives a channel that is closed when a rollout changes next. To miss
// nothing, take it before reading the store.
func (d *Dispatcher) Changed() <-chan struct{} {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.changed
}

// Notify says that a rollout changed.
func (d *Dispatcher) Notify() {
	d.mu.Lock()
	close(d.changed)
	d.changed = make(chan struct{})
	d.mu.Unlock()
}

// Resumed says that messages from devices may have been lost, because the
// connection to the broker was: the devices are asked to say hello again.
func (d *Dispatcher) Resumed() {
	d.mu.Lock()
	d.bootID = rand.Text()
	d.mu.Unlock()
	d.epoch()
}

const (
	helloPerDevice = 10 * time.Millisecond // one device's share of the time within which all say hello
	helloLeast     = 200 * time.Millisecond
	helloMost      = time.Minute
)

func (d *Dispatcher) epoch() {
	d.mu.Lock()
	boot, n := d.bootID, len(d.live)
	d.mu.Unlock()
	within := min(max(time.Duration(n)*helloPerDevice, helloLeast), helloMost)
	d.send(link.EpochTopic, "epoch", &dunlinv1.Epoch{
		Incarnation: d.store.Incarnation(), BootId: boot, HelloWithinMs: uint32(within.Milliseconds()),
	})
}

// beats publishes the epoch, keeps when devices were last heard, and finds
// those that were not.
func (d *Dispatcher) beats(ctx context.Context) {
	d.epoch()
	tick := time.NewTicker(d.timing.beat)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			d.epoch()
			if err := d.sweep(ctx); err != nil && ctx.Err() == nil {
				d.log.Error("cannot keep when devices were heard", "error", err)
			}
		}
	}
}

// freeStep is the part of a device's free disk by which it has to change to be
// saved, where nothing depends on it.
const freeStep = 64

// refuses says whether any device lacks a version because it does not fit.
func (d *Dispatcher) refuses() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.refused) > 0
}

func (d *Dispatcher) sweep(ctx context.Context) error {
	now := d.now()
	heard := map[string]time.Time{}
	away := map[string]time.Time{}
	free := map[string]uint64{}
	room := map[string]bool{} // devices that lacked it on their disks
	d.mu.Lock()
	for device, l := range d.live {
		if l.heard.After(l.saved) {
			heard[device], l.saved = l.heard, l.heard
		}
		if now.Sub(l.heard) > d.timing.silence {
			away[device] = l.heard
		}
		if t := l.telemetry; t != nil && t.DiskFreeBytes != nil {
			now := t.GetDiskFreeBytes()
			lacks := slices.ContainsFunc(d.refused[device], func(r fleet.Refusal) bool { return r.Disk })
			if l.free == nil || lacks && now != *l.free || max(now, *l.free)-min(now, *l.free) > *l.free/freeStep {
				free[device] = now
				room[device] = lacks && (l.free == nil || now > *l.free)
			}
		}
	}
	d.mu.Unlock()
	// The store first: while it fails, they are found again.
	if err := d.store.Heard(ctx, heard, away, free); err != nil {
		return err
	}
	for device, at := range away {
		d.view.away(device, at)
	}
	for device, n := range free {
		d.view.free(device, n, room[device])
	}
	d.mu.Lock()
	for device, n := range free {
		if l := d.live[device]; l != nil {
			l.free = &n
		}
	}
	for device, at := range away {
		if l := d.live[device]; l != nil && l.heard.Equal(at) {
			delete(d.live, device)
		} else if l != nil {
			l.greeted = false // heard meanwhile: by now the store may have it as away
		}
	}
	d.mu.Unlock()
	if len(away) > 0 || len(room) > 0 {
		d.wake()
	}
	return d.store.Prune(ctx)
}

// send publishes a message. One that the broker does not take is lost, as any
// other may be: all of them are sent again until their effect is seen.
func (d *Dispatcher) send(topic, kind string, m proto.Message) {
	payload, err := proto.Marshal(m)
	if err != nil {
		d.log.Error("cannot encode a message", "kind", kind, "error", err)
		return
	}
	d.onStep("before publish " + kind)
	if err := d.bus.Publish(topic, payload); err != nil {
		d.log.Debug("message not published", "kind", kind, "topic", topic, "error", err)
	}
	d.onStep("after publish " + kind)
}

func (d *Dispatcher) sendDesired(g store.Desired) {
	m := &dunlinv1.Desired{
		Generation: &dunlinv1.Generation{Incarnation: d.store.Incarnation(), Number: g.Number},
		Sha256:     g.SHA256[:], SizeBytes: uint64(len(g.Document)),
	}
	if len(g.Document) <= link.MaxInlineDocument {
		m.Document = g.Document
	}
	d.send(link.Down(g.Device, link.Desired), link.Desired, m)
}
