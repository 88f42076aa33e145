package webhook

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/dunlin/dunlin/controller/fleet"
	"github.com/dunlin/dunlin/controller/store"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// The headers of a delivery.
const (
	// SignatureHeader is "t=SECONDS,v1=HEX": the time, and the HMAC-SHA256 with
	// the hook's secret of the time, a dot and the body.
	SignatureHeader = "Dunlin-Signature"
	// DeliveryHeader names what is told, the same again when it is told again.
	DeliveryHeader = "Dunlin-Delivery"
)

const (
	// batch bounds what is read from the store at once.
	batch = 100
	// maxAnswer is how much of an answer is read.
	maxAnswer = 64 << 10
	// maxText bounds a text in a message, in bytes.
	maxText = 4 << 10
)

// timing is how often things happen.
type timing struct {
	look    time.Duration // between two looks for news
	call    time.Duration // a delivery takes at most
	retry   time.Duration // before the second try; doubles
	longest time.Duration // between two tries
	giveUp  time.Duration // what has been tried for so long is dropped
}

var defaultTiming = timing{look: 2 * time.Second, call: 10 * time.Second, retry: time.Second, longest: 5 * time.Minute, giveUp: 24 * time.Hour}

// Message is what an endpoint is told.
type Message struct {
	ID       string            `json:"id"`
	Kind     string            `json:"kind"`
	Severity string            `json:"severity"`
	At       time.Time         `json:"at"`
	Device   string            `json:"device,omitempty"`
	Labels   map[string]string `json:"labels,omitempty"`
	Rollout  string            `json:"rollout,omitempty"`
	// Of the rollout, or the event.
	Deployment  string   `json:"deployment,omitempty"`
	Model       string   `json:"model,omitempty"`
	Version     int64    `json:"version,omitempty"`
	FromVersion int64    `json:"fromVersion,omitempty"`
	Wave        int      `json:"wave,omitempty"`
	By          string   `json:"by,omitempty"`
	Devices     []string `json:"devices,omitempty"`
	Subject     string   `json:"subject,omitempty"` // of an alarm
	Message     string   `json:"message,omitempty"`
}

// Source is where news come from; store implements it.
type Source interface {
	News(ctx context.Context, after store.Cursor, limit int) ([]store.News, error)
	Cursor(ctx context.Context, name string) (store.Cursor, error)
	SetCursor(ctx context.Context, name string, c store.Cursor) error
}

// Sender tells hooks what happens: each in order, at least once, from where it
// stopped. It is safe for concurrent use.
type Sender struct {
	source Source
	hooks  []Hook
	log    *slog.Logger
	timing timing
	now    func() time.Time
	client *http.Client

	delivered, failed, dropped *prometheus.CounterVec
}

// New makes a Sender; Run starts it.
func New(source Source, hooks []Hook, metrics prometheus.Registerer, log *slog.Logger) *Sender {
	counter := func(name, help string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Name: "dunlin_controller_webhook_" + name + "_total", Help: help}, []string{"webhook"})
	}
	s := &Sender{
		source: source, hooks: hooks, log: log, timing: defaultTiming, now: time.Now,
		client: &http.Client{
			Transport: http.DefaultTransport.(*http.Transport).Clone(),
			// Somebody else may stand at the other end.
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
		delivered: counter("delivered", "Messages that webhooks took."),
		failed:    counter("failed", "Tries to tell webhooks that failed."),
		dropped:   counter("dropped", "Messages that webhooks refused, or did not take for a day."),
	}
	if metrics != nil {
		metrics.MustRegister(s.delivered, s.failed, s.dropped)
	}
	for _, h := range hooks { // so that they are there from the start
		for _, c := range []*prometheus.CounterVec{s.delivered, s.failed, s.dropped} {
			c.WithLabelValues(h.Name)
		}
	}
	return s
}

// Run tells hooks until ctx is done. No hook waits for another.
func (s *Sender) Run(ctx context.Context) error {
	defer s.client.CloseIdleConnections()
	var wg sync.WaitGroup
	defer wg.Wait()
	for i := range s.hooks {
		wg.Go(func() { s.follow(ctx, &s.hooks[i]) })
	}
	<-ctx.Done()
	return nil
}

// follow tells one hook.
func (s *Sender) follow(ctx context.Context, h *Hook) {
	key := "webhook " + h.Name
	var cursor store.Cursor
	known := false
	for ctx.Err() == nil {
		err := error(nil)
		if !known {
			cursor, err = s.source.Cursor(ctx, key)
			known = err == nil
		}
		var news []store.News
		if known {
			news, err = s.source.News(ctx, cursor, batch)
		}
		if err != nil && ctx.Err() == nil {
			s.log.Error("cannot read what webhooks are to be told", "webhook", h.Name, "error", err)
		}
		before := cursor
		for _, n := range news {
			if m, within := messageOf(n); h.wants(m, within) {
				if !s.deliver(ctx, h, m) {
					return // it is told again after a restart
				}
				// At once: what has been told is not told again after a crash.
				if err := s.source.SetCursor(context.WithoutCancel(ctx), key, n.Cursor); err != nil {
					s.log.Error("cannot keep what a webhook was told", "webhook", h.Name, "error", err)
				}
				before = n.Cursor
			}
			cursor = n.Cursor
		}
		if cursor != before {
			if err := s.source.SetCursor(ctx, key, cursor); err != nil && ctx.Err() == nil {
				s.log.Error("cannot keep what a webhook was told", "webhook", h.Name, "error", err)
			}
		}
		if len(news) == 0 {
			pause(ctx, s.timing.look)
		}
	}
}

// pause waits; false: ctx was done first.
func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}

// errFinal is the error of a delivery that is not tried again.
var errFinal = errors.New("not tried again")

// deliver tells one message until the hook takes it, refuses it, or has not
// taken it for too long; false: ctx was done first.
func (s *Sender) deliver(ctx context.Context, h *Hook, m *Message) bool {
	body, err := json.Marshal(m)
	if err != nil { // strings, numbers and a time
		s.log.Error("cannot encode a message", "webhook", h.Name, "error", err)
		return true
	}
	begun, wait := s.now(), s.timing.retry
	for {
		err := s.post(ctx, h, m.ID, body)
		if err == nil {
			s.delivered.WithLabelValues(h.Name).Inc()
			return true
		}
		if ctx.Err() != nil {
			return false
		}
		s.failed.WithLabelValues(h.Name).Inc()
		if errors.Is(err, errFinal) || s.now().Sub(begun) >= s.timing.giveUp {
			s.dropped.WithLabelValues(h.Name).Inc()
			s.log.Warn("a webhook did not take a message, which is dropped", "webhook", h.Name, "id", m.ID, "error", err)
			return true
		}
		s.log.Warn("a webhook did not take a message, will try again", "webhook", h.Name, "id", m.ID, "error", err)
		if !pause(ctx, wait/2+rand.N(wait/2+1)) {
			return false
		}
		wait = min(2*wait, s.timing.longest)
	}
}

// post makes one try.
func (s *Sender) post(ctx context.Context, h *Hook, id string, body []byte) error {
	ctx, cancel := context.WithTimeout(ctx, s.timing.call)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, h.URL, bytes.NewReader(body))
	if err != nil {
		return fmt.Errorf("%w: %w", errFinal, err)
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("User-Agent", "dunlin-controller")
	req.Header.Set(DeliveryHeader, id)
	req.Header.Set(SignatureHeader, Sign(h.Secret, s.now(), body))
	resp, err := s.client.Do(req)
	if err != nil {
		return errors.New(strings.ReplaceAll(err.Error(), h.URL, "its URL")) // which may hold a secret
	}
	defer resp.Body.Close()
	_, _ = io.Copy(io.Discard, io.LimitReader(resp.Body, maxAnswer)) // so that the connection is used again
	switch code := resp.StatusCode; {
	case code >= 200 && code < 300:
		return nil
	case code >= 500, code == http.StatusRequestTimeout, code == http.StatusTooManyRequests, code == http.StatusTooEarly:
		return fmt.Errorf("it answers %s", resp.Status)
	default: // redirects too: the message is for whom the file names
		return fmt.Errorf("%w: it answers %s", errFinal, resp.Status)
	}
}

// Sign gives the value of SignatureHeader.
func Sign(secret string, at time.Time, body []byte) string {
	t := strconv.FormatInt(at.Unix(), 10)
	mac := hmac.New(sha256.New, []byte(secret))
	mac.Write([]byte(t + "."))
	mac.Write(body)
	return "t=" + t + ",v1=" + hex.EncodeToString(mac.Sum(nil))
}

// messageOf says what is told of news, and whether that is about devices that
// a selector may match.
func messageOf(n store.News) (*Message, func(selector map[string]string) bool) {
	if n.Decision != nil {
		r, d := n.Rollout, n.Decision
		m := &Message{
			ID: fmt.Sprintf("decision-%d", n.Cursor.Decision), Kind: "rollout." + strings.ReplaceAll(string(d.Kind), " ", "_"), Severity: severityOf(d.Kind), At: d.At,
			Rollout: r.ID(), Deployment: r.Deployment, Model: r.Model, Version: r.To, FromVersion: r.From, Wave: d.Wave, By: d.By, Devices: d.Devices, Message: cut(d.Reason),
		}
		return m, func(selector map[string]string) bool {
			for k, v := range selector { // unless no device can have both
				if is, ok := n.Selector[k]; ok && is != v {
					return false
				}
			}
			return true
		}
	}
	e := n.Event
	m := &Message{
		ID: fmt.Sprintf("event-%d", n.Cursor.Event), Kind: e.GetKind(), Severity: strings.ToLower(strings.TrimPrefix(e.GetSeverity().String(), "SEVERITY_")), At: e.GetAt().AsTime(),
		Device: n.Device, Labels: n.Labels, Model: e.GetModel(), Version: e.GetVersion(), Message: cut(e.GetMessage()),
	}
	if e.GetSeverity() == dunlinv1.Severity_SEVERITY_UNSPECIFIED {
		m.Severity = "info"
	}
	if a := e.GetAlarm(); a != nil {
		m.Subject = strings.TrimSpace(a.GetKind() + " " + a.GetSubject())
	}
	return m, func(selector map[string]string) bool {
		for k, v := range selector {
			if is, ok := n.Labels[k]; !ok || is != v {
				return false
			}
		}
		return true
	}
}

func severityOf(k fleet.DecisionKind) string {
	switch k {
	case fleet.DecideHalt, fleet.DecideRollBack, fleet.DecideFail:
		return "error"
	case fleet.DecideAbort, fleet.DecidePause, fleet.DecideSupersede:
		return "warning"
	}
	return "info"
}

// cut makes a text valid UTF-8 of at most maxText bytes.
func cut(s string) string {
	if len(s) > maxText {
		s = s[:maxText-len("...")] + "..."
	}
	return strings.ToValidUTF8(s, "�")
}
