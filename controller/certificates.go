package controller

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/dunlin/dunlin/internal/pki"
)

const (
	// certificatesEvery is how often certificates are looked at.
	certificatesEvery = time.Minute
	// A certificate is warned of so long before its end, or when a quarter of
	// its time is left where that is less: those of a week are renewed late.
	warnBefore = 14 * day
	// Devices must have learned of another authority before one ends.
	warnBeforeAuthority = 365 * day
	warnAgain           = day
)

// use is a certificate and what the controller does by it.
type use struct {
	is   string // "authority", "own", "tls-cert" or "acme"
	name string // tells several of the same use apart
	leaf *x509.Certificate
}

// uses gives the certificates that count; the leaf is nil where there is none
// yet.
func (t *trust) uses() []use {
	var uses []use
	for _, root := range t.Roots() {
		uses = append(uses, use{"authority", root.Subject.CommonName, root})
	}
	if c, err := t.ServerCertificate(); err == nil {
		uses = append(uses, use{"own", "", c.Leaf})
	}
	if t.files != nil {
		if c, err := t.files.Certificate(); err == nil {
			uses = append(uses, use{"tls-cert", "", c.Leaf})
		}
	}
	if t.acme != nil {
		for _, d := range t.acme.domains {
			u := use{"acme", d, nil}
			if c := t.acme.certificate(d); c != nil {
				u.leaf = c.Leaf
			}
			uses = append(uses, u)
		}
	}
	return uses
}

// unread says why what is in use is not what stands in the configured files.
func (t *trust) unread() error {
	var errs []error
	if t.files != nil {
		errs = append(errs, t.files.Err())
	}
	if t.extra != nil {
		errs = append(errs, t.extra.Err())
	}
	return errors.Join(errs...)
}

// certificateWatch says what must be known about certificates: by metrics, and
// in the log where somebody has to do something.
type certificateWatch struct {
	uses   func() []use
	unread func() error
	extra  func() []*x509.Certificate // that devices must know
	log    *slog.Logger

	expiry, failed *prometheus.Desc

	// What look has said.
	serials map[string]string    // of the certificates, by use and name
	said    map[string]time.Time // warnings, by their subject

	known []*x509.Certificate // what extra gave last
}

// watchCertificates looks once, at what there is at the start.
func watchCertificates(t *trust, metrics prometheus.Registerer, log *slog.Logger) *certificateWatch {
	w := newCertificateWatch(t.uses, t.unread, t.extraRoots, log)
	metrics.MustRegister(w)
	w.look(time.Now())
	return w
}

func newCertificateWatch(uses func() []use, unread func() error, extra func() []*x509.Certificate, log *slog.Logger) *certificateWatch {
	return &certificateWatch{
		uses: uses, unread: unread, extra: extra, known: extra(), log: log, serials: map[string]string{}, said: map[string]time.Time{},
		expiry: prometheus.NewDesc("dunlin_controller_certificate_expiry_seconds",
			"End of a certificate in seconds since 1970, 0 until there is one.", []string{"use", "name"}, nil),
		failed: prometheus.NewDesc("dunlin_controller_certificate_unreadable",
			"1 while files of the configured certificate cannot be read and what they held before stays in use.", nil, nil),
	}
}

// Describe implements prometheus.Collector.
func (w *certificateWatch) Describe(c chan<- *prometheus.Desc) {
	c <- w.expiry
	c <- w.failed
}

// Collect implements prometheus.Collector.
func (w *certificateWatch) Collect(c chan<- prometheus.Metric) {
	for _, u := range w.uses() {
		end := 0.0
		if u.leaf != nil {
			end = float64(u.leaf.NotAfter.Unix())
		}
		c <- prometheus.MustNewConstMetric(w.expiry, prometheus.GaugeValue, end, u.is, u.name)
	}
	failed := 0.0
	if w.unread() != nil {
		failed = 1
	}
	c <- prometheus.MustNewConstMetric(w.failed, prometheus.GaugeValue, failed)
}

// run looks until ctx is done, and calls changed where devices and users must
// learn of other authorities.
func (w *certificateWatch) run(ctx context.Context, changed func(context.Context)) error {
	tick := time.NewTicker(certificatesEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			w.look(time.Now())
			if extra := w.extra(); !pki.Same(extra, w.known) {
				w.known = extra
				w.log.Info("devices are told of the authorities in tls-ca", "authorities", len(extra))
				changed(ctx)
			}
		case <-ctx.Done():
			return nil
		}
	}
}

// look says what is new, and once a day what is wrong.
func (w *certificateWatch) look(now time.Time) {
	uses := w.uses()
	w.warn(now, "clock", wrongClock(uses, now), "the clock of this machine is wrong: set it, or devices and users refuse the controller")
	w.warn(now, "files", w.unread(), "tls-cert, tls-key or tls-ca cannot be read; what they held before stays in use")
	for _, u := range uses {
		key := u.is + " " + u.name
		if u.leaf == nil {
			w.serials[key] = ""
			continue
		}
		serial := u.leaf.SerialNumber.Text(16)
		if before, known := w.serials[key]; known && before != serial {
			w.log.Info("a new certificate is in use", "use", u.is, "name", u.name, "serial", serial, "until", u.leaf.NotAfter)
		}
		w.serials[key] = serial
		w.warn(now, key+" "+serial, ending(u, now), "a certificate must be replaced")
	}
}

// warn logs an error when it comes up, and again as long as it lasts.
func (w *certificateWatch) warn(now time.Time, subject string, err error, text string) {
	last, known := w.said[subject]
	switch {
	case err == nil:
		delete(w.said, subject)
	case !known || now.Before(last) || now.Sub(last) >= warnAgain:
		w.said[subject] = now
		w.log.Warn(text, "error", err)
	}
}

// ending says of a certificate that it ends soon, or has ended.
func ending(u use, now time.Time) error {
	end := u.leaf.NotAfter
	notice := min(warnBefore, end.Sub(u.leaf.NotBefore)/4)
	if u.is == "authority" {
		notice = warnBeforeAuthority
	}
	if left := end.Sub(now); left > notice {
		return nil
	}
	name := u.is
	if u.name != "" {
		name += " " + u.name
	}
	verb := "ends"
	if now.After(end) {
		verb = "has ended"
	}
	return fmt.Errorf("%s %s %s, and it is %s", name, verb, end.UTC().Format(time.DateTime), now.UTC().Format(time.DateTime))
}

// wrongClock says of a time that it is before an authority was made. One that
// is too late shows as authorities that have ended.
func wrongClock(uses []use, now time.Time) error {
	for _, u := range uses {
		if u.is == "authority" && now.Before(u.leaf.NotBefore) {
			return fmt.Errorf("it says %s, which is before this controller's authority %q was made, %s",
				now.UTC().Format(time.DateTime), u.name, u.leaf.NotBefore.UTC().Format(time.DateTime))
		}
	}
	return nil
}
