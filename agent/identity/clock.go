package identity

import (
	"crypto/x509"
	"errors"
	"fmt"
	"runtime/debug"
	"time"

	"github.com/dunlin/dunlin/internal/pki"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// built is a moment before which no device has run this program.
var built = func() time.Time {
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, s := range info.Settings {
			if at, err := time.Parse(time.RFC3339, s.Value); s.Key == "vcs.time" && err == nil {
				return at
			}
		}
	}
	return time.Date(2026, time.November, 1, 0, 0, 0, 0, time.UTC)
}()

// slack is how far clocks may be behind each other without one being wrong. It
// is less than certificates allow for, see pki.Issued.
const slack = 30 * time.Minute

// clock says what time it is on a device whose own clock may have begun in
// 1970. It decides by what it is told and reads no clock.
type clock struct {
	floor time.Time // a time that was certain: this program's, or the controller's last answer
	seen  time.Time // the last time by the device's own clock, which may have been ahead
	// answer is what the controller said when the own clock was at heard.
	answer, heard time.Time
}

// wrong says whether the device's own clock cannot be right; issued are
// certificates that are there already.
func (c clock) wrong(own time.Time, issued ...*x509.Certificate) bool {
	if late := own.Add(slack); late.Before(c.floor) || late.Before(c.seen) {
		return true
	}
	for _, i := range issued {
		if own.Before(i.NotBefore) {
			return true
		}
	}
	return false
}

// lost says whether it is not known what time it is.
func (c clock) lost(own time.Time, issued ...*x509.Certificate) bool {
	return c.wrong(own, issued...) && c.answer.IsZero()
}

// now gives the time: the device's own, or, where that cannot be right, the
// controller's answer and what has passed since.
func (c clock) now(own time.Time, issued ...*x509.Certificate) time.Time {
	if c.answer.IsZero() || !c.wrong(own, issued...) {
		return own
	}
	return c.answer.Add(max(own.Sub(c.heard), 0))
}

// hear takes in what the controller says, whose authority ends at end.
func (c clock) hear(answer, own, end time.Time) (clock, error) {
	if answer.Add(slack).Before(c.floor) {
		return c, fmt.Errorf("the controller says that it is %s, which is over: it was %s already", answer.UTC().Format(time.RFC3339), c.floor.UTC().Format(time.RFC3339))
	}
	if answer.After(end) {
		return c, fmt.Errorf("the controller says that it is %s, when its authority has ended: that was at %s", answer.UTC().Format(time.RFC3339), end.UTC().Format(time.RFC3339))
	}
	return clock{floor: later(answer, c.floor), seen: answer, answer: answer, heard: own}, nil
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// timeNonce is the length of the nonce of a question for the time.
const timeNonce = 32

// timeOf gives the time that an answer to nonce says, signed by one of roots,
// or by an authority that pin names, and when that authority ends.
func timeOf(a *dunlinv1.GetTimeResponse, nonce []byte, roots []*x509.Certificate, pin *pki.Pin) (now, end time.Time, err error) {
	if err := a.GetNow().CheckValid(); err != nil {
		return now, end, fmt.Errorf("now: %w", err)
	}
	now = a.Now.AsTime()
	chain, err := pki.ParseCertificates(a.Certificates)
	if err != nil {
		return now, end, err
	}
	if len(chain) == 0 {
		return now, end, errors.New("it has no certificate")
	}
	// A device has a certificate of the same authority, and must not say what
	// time it is for others.
	if signer := chain[0]; !signer.IsCA && !pki.IsController(signer) {
		return now, end, fmt.Errorf("it is signed by %q, who is not the controller", signer.Subject.CommonName)
	}
	if err := pki.Verify(chain[0].PublicKey, pki.TimeMessage(nonce, now), a.Signature); err != nil {
		return now, end, err
	}
	if pin != nil {
		for _, c := range chain {
			if c.IsCA && pki.PinOf(c) == *pin {
				roots = append(roots[:len(roots):len(roots)], c)
			}
		}
	}
	chains, err := chain[0].Verify(x509.VerifyOptions{
		Roots: pki.Pool(roots), Intermediates: pki.Pool(chain[1:]), CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
	})
	if err != nil {
		return now, end, err
	}
	for _, c := range chains {
		if root := c[len(c)-1]; root.NotAfter.After(end) {
			end = root.NotAfter
		}
	}
	return now, end, nil
}
