// Package broker is the controller's end of MQTT: a broker of its own inside
// the process, or a connection to another one.
package broker

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"

	"github.com/dunlin/dunlin/internal/link"
)

// A Handler takes one message that a device sent: on one of the device's own
// up topics, with at most link.MaxPayload bytes, or on a link.JoinUp topic,
// from nobody in particular, with at most MaxEnrolPayload. The bytes are the
// handler's to keep. It is called from many goroutines, in order for each
// sender. While it runs, the sender is not read from: a slow handler slows its
// devices down.
type Handler func(topic string, payload []byte)

// MaxEnrolPayload bounds a message of an enrolling device.
const MaxEnrolPayload = 64 << 10

// A Bus carries messages between the controller and its devices at QoS 0:
// each arrives once or not at all.
type Bus interface {
	// Run carries messages until ctx is done, then ends every connection
	// and returns nil. It gives handle every message on link.UpFilter, wills
	// among them, and on link.JoinUpFilter, and does not call it again after
	// it returned. It is called once.
	Run(ctx context.Context, handle Handler) error
	// Publish sends a message on a down topic of a device, on a link.JoinDown
	// topic or on link.EpochTopic. No error says only that the broker took it: a device
	// that is away or too slow misses it. Publish may be called at any time,
	// by many goroutines.
	Publish(topic string, payload []byte) error
	// Disconnect ends the session of a device that was removed or revoked
	// before.
	Disconnect(device string)
}

var (
	_ Bus = (*Embedded)(nil)
	_ Bus = (*External)(nil)
)

// Authenticator says who may connect.
type Authenticator interface {
	// Device gives the device that may connect with a certificate, which TLS
	// has verified. The error says why none may: the certificate is revoked,
	// or its device unknown.
	Device(ctx context.Context, cert *x509.Certificate) (device string, err error)
	// Enrolling says whether a user, link.RenewUser or link.JoinUser of a join
	// token, may hold an enrolment conversation, from an address.
	Enrolling(ctx context.Context, user, password, from string) bool
}

// ErrNotConnected is returned by Publish while there is no connection to an
// external broker.
var ErrNotConnected = errors.New("not connected to the broker")

// isUp says whether a message can be one that a device sent.
func isUp(topic string, size int) bool {
	if _, _, err := link.ParseUp(topic); err == nil {
		return size <= link.MaxPayload
	}
	_, _, err := link.ParseJoinUp(topic)
	return err == nil && size <= MaxEnrolPayload
}

// checkPublish says whether the controller may send a message.
func checkPublish(topic string, payload []byte) error {
	if topic != link.EpochTopic {
		if _, _, err := link.ParseJoinDown(topic); err != nil {
			if _, _, err := link.ParseDown(topic); err != nil {
				return err
			}
		}
	}
	if len(payload) > link.MaxPayload {
		return fmt.Errorf("payload for topic %s has %d bytes, the limit is %d", topic, len(payload), link.MaxPayload)
	}
	return nil
}
