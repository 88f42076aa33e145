package pki

import (
	"crypto/x509"
	"errors"
	"net"
	"strings"
)

// Refusal says whether an error of a connection is that one side does not
// take the other's certificate, which no new attempt changes, and which side.
// With TLS 1.3 a server's refusal comes with the first bytes that the client
// reads.
func Refusal(err error) (reason string, ok bool) {
	if e, ok := errors.AsType[*net.OpError](err); ok && e.Op == "remote error" {
		text := strings.TrimPrefix(e.Err.Error(), "tls: ")
		switch text {
		case "bad certificate":
			// Servers give no other reason for a certificate that is revoked.
			return "the server does not take this device's certificate: it is revoked, or not meant for this server", true
		case "expired certificate":
			return "the server does not take this device's certificate: it has expired", true
		case "unknown certificate authority":
			return "the server does not take this device's certificate: it does not know its authority", true
		case "unsupported certificate", "revoked certificate", "unknown certificate", "access denied", "certificate required":
			return "the server does not take this device's certificate: " + text, true
		}
		return "", false
	}
	invalid, isInvalid := errors.AsType[x509.CertificateInvalidError](err)
	_, unknown := errors.AsType[x509.UnknownAuthorityError](err)
	_, name := errors.AsType[x509.HostnameError](err)
	switch {
	case isInvalid && invalid.Reason == x509.Expired:
		return "the server's certificate does not count now: " + invalid.Detail, true
	case isInvalid, name:
		return "the server's certificate is not for it: " + err.Error(), true
	case unknown:
		return "the server's certificate is of an authority that is not trusted: " + err.Error(), true
	}
	return "", false
}
