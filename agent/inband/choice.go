package inband

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"sync"
	"time"

	"github.com/dunlin/dunlin/agent/reconcile"
)

// Mode says by which way bundles come.
type Mode string

// The modes.
const (
	Auto  Mode = "auto"  // by HTTPS, and over MQTT while the registry cannot be reached
	HTTPS Mode = "https" // by HTTPS only
	MQTT  Mode = "mqtt"  // over MQTT only
)

// Modes are all of them.
var Modes = []Mode{Auto, HTTPS, MQTT}

const (
	// After fallAfter without an answer of the registry, in fallTries tries or
	// more, bundles come over MQTT.
	fallAfter = 15 * time.Second
	fallTries = 2
	// Then the registry is tried again after firstProbe, and after a time that
	// doubles up to lastProbe.
	firstProbe = time.Minute
	lastProbe  = 30 * time.Minute
	// probeTimeout bounds such a try.
	probeTimeout = 5 * time.Second
)

// choice decides by which way the next part comes. It is pure.
type choice struct {
	over    bool      // MQTT, that is
	failing time.Time // since when the registry does not answer; zero: it does
	tries   int
	probe   time.Time // when the registry is to be tried again, while over
	wait    time.Duration
}

// fall goes over to MQTT.
func (c *choice) fall(now time.Time) {
	c.over, c.wait = true, firstProbe
	c.probe = now.Add(c.wait)
}

// failed says that the registry did not answer. It gives true where that makes
// the way another one; connected says whether MQTT works.
func (c *choice) failed(now time.Time, connected bool) bool {
	if c.failing.IsZero() {
		c.failing, c.tries = now, 0
	}
	c.tries++
	if c.over || !connected || c.tries < fallTries || now.Sub(c.failing) < fallAfter {
		return false
	}
	c.fall(now)
	return true
}

// answered says that the registry did. It gives true where that makes the way
// another one.
func (c *choice) answered() bool {
	changed := c.over
	*c = choice{}
	return changed
}

// due says whether the registry is to be tried now, and that it is.
func (c *choice) due(now time.Time) bool {
	if !c.over || now.Before(c.probe) {
		return false
	}
	c.wait = min(2*c.wait, lastProbe)
	c.probe = now.Add(c.wait)
	return true
}

// Delivery chooses between the registry and a Fetcher, part for part: a
// download goes on by the other way from where it is.
type Delivery struct {
	cfg DeliveryConfig

	mu     sync.Mutex // guards choice
	choice choice
}

// DeliveryConfig configures a Delivery.
type DeliveryConfig struct {
	Mode Mode
	// Only says that the device joined over MQTT, because it reaches nothing
	// else: it does not try the registry first.
	Only bool
	MQTT reconcile.Source
	// Connected says whether there is a session with the broker.
	Connected func() bool
	// Event is told when the way has changed.
	Event func(over bool, why string)
	Log   *slog.Logger
}

// NewDelivery makes a Delivery.
func NewDelivery(cfg DeliveryConfig) *Delivery {
	d := &Delivery{cfg: cfg}
	if cfg.Mode == Auto && cfg.Only {
		d.choice.fall(time.Now())
	}
	return d
}

// Over gives what stands in for the registry.
func (d *Delivery) Over(registry reconcile.Source, at reconcile.Registry) reconcile.Source {
	switch d.cfg.Mode {
	case HTTPS:
		return registry
	case MQTT:
		return d.cfg.MQTT
	}
	return &either{d, registry, at}
}

// either is the way that works.
type either struct {
	*Delivery
	registry reconcile.Source
	at       reconcile.Registry
}

func (e *either) over() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.choice.over
}

// String implements reconcile.Source.
func (e *either) String() string {
	if e.over() {
		return e.cfg.MQTT.String()
	}
	return e.registry.String()
}

// Streams implements reconcile.Source.
func (e *either) Streams() int {
	if e.over() {
		return e.cfg.MQTT.Streams()
	}
	return e.registry.Streams()
}

// Get implements reconcile.Source.
func (e *either) Get(ctx context.Context, r reconcile.Ref, offset, length int64) (*reconcile.Body, error) {
	e.mu.Lock()
	probe := e.choice.due(time.Now())
	over := e.choice.over
	e.mu.Unlock()
	if probe && e.reachable(ctx) {
		e.answered()
		over = false
	}
	if over {
		return e.cfg.MQTT.Get(ctx, r, offset, length)
	}
	b, err := e.registry.Get(ctx, r, offset, length)
	if err != nil {
		return nil, e.judge(ctx, err)
	}
	return &reconcile.Body{ReadCloser: &watched{b.ReadCloser, e, ctx}, Offset: b.Offset, Whole: b.Whole}, nil
}

// reachable says whether the registry's host answers HTTPS, whatever it says.
func (e *either) reachable(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, e.at.URL+"/healthz", nil)
	if err != nil {
		return false
	}
	resp, err := e.at.Client.Do(req)
	if err != nil {
		e.cfg.Log.Debug("the registry is still not reached", "registry", e.at.URL, "error", err)
		return false
	}
	_ = resp.Body.Close()
	return true
}

// judge takes in how an attempt to read from the registry ended.
func (e *either) judge(ctx context.Context, err error) error {
	switch {
	case ctx.Err() != nil: // given up here
	case reconcile.Answered(err):
		e.answered()
	default:
		connected := e.cfg.Connected()
		e.mu.Lock()
		fell := e.choice.failed(time.Now(), connected)
		e.mu.Unlock()
		if fell {
			e.cfg.Log.Warn("the registry cannot be reached: bundles come over MQTT", "registry", e.at.URL, "error", err)
			e.cfg.Event(true, err.Error())
			return fmt.Errorf("%w; going on over MQTT", err)
		}
	}
	return err
}

func (e *either) answered() {
	e.mu.Lock()
	back := e.choice.answered()
	e.mu.Unlock()
	if back {
		e.cfg.Log.Info("the registry can be reached again: bundles come from it", "registry", e.at.URL)
		e.cfg.Event(false, "")
	}
}

// watched is a body of the registry.
type watched struct {
	io.ReadCloser
	of  *either
	ctx context.Context // of the one request
}

func (w *watched) Read(p []byte) (int, error) {
	n, err := w.ReadCloser.Read(p)
	if errors.Is(err, io.EOF) {
		w.of.answered()
	} else if err != nil {
		err = w.of.judge(w.ctx, err)
	}
	return n, err
}
