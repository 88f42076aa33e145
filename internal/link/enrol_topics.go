package link

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"strings"
)

// Enrolment is the conversation of a device that has no certificate yet, or
// none that counts any more. Its MQTT user is RenewUser, with itself as the
// password, or JoinUser of its join token, with the token as the password; the
// nonce tells the conversations of one user apart.
const (
	joinRoot = root + "join/"
	// JoinUpFilter matches everything that enrolling devices send.
	JoinUpFilter = joinRoot + "+/+/up"
	// RenewUser is the MQTT user of devices that renew a certificate: the
	// request proves who they are. It is no name of a device: brokers that go
	// by the user name let in everybody under it.
	RenewUser  = "dunlin.renew"
	joinPrefix = "join."
	joinID     = 6 // bytes of a join token's hash that are its id
	// maxNonce bounds the nonce in a topic, and the id in a user name.
	maxNonce = 64
)

// TokenUser gives the MQTT user of a device that holds a join token.
func TokenUser(token string) string {
	sum := sha256.Sum256([]byte(token))
	return JoinUser(hex.EncodeToString(sum[:joinID]))
}

// JoinUser gives the MQTT user of a join token by the token's id.
func JoinUser(id string) string { return joinPrefix + id }

// CheckEnrolUser says whether a name can be the MQTT user of an enrolment.
func CheckEnrolUser(user string) error {
	if user == RenewUser {
		return nil
	}
	id, ok := strings.CutPrefix(user, joinPrefix)
	if !ok || id == "" || len(id) > maxNonce || strings.Trim(id, "0123456789abcdef") != "" {
		return fmt.Errorf("user %q is not %s or %s<id>", user, RenewUser, joinPrefix)
	}
	return nil
}

// JoinUp gives the topic of a device's dunlinv1.EnrolRequest.
func JoinUp(user, nonce string) string { return joinRoot + user + "/" + nonce + "/up" }

// JoinDown gives the topic of the dunlinv1.EnrolResponse.
func JoinDown(user, nonce string) string { return joinRoot + user + "/" + nonce + "/down" }

// ParseJoinUp takes the topic of an EnrolRequest apart, and refuses others.
func ParseJoinUp(topic string) (user, nonce string, err error) { return parseJoin(topic, "up") }

// ParseJoinDown takes the topic of an EnrolResponse apart, and refuses others.
func ParseJoinDown(topic string) (user, nonce string, err error) { return parseJoin(topic, "down") }

func parseJoin(topic, direction string) (user, nonce string, err error) {
	rest, ok := strings.CutPrefix(topic, joinRoot)
	parts := strings.Split(rest, "/")
	if !ok || len(parts) != 3 || parts[2] != direction {
		return "", "", fmt.Errorf("topic %q is not %s<user>/<nonce>/%s", topic, joinRoot, direction)
	}
	if err := CheckEnrolUser(parts[0]); err != nil {
		return "", "", fmt.Errorf("topic %q: %w", topic, err)
	}
	if n := parts[1]; len(n) > maxNonce || CheckDevice(n) != nil {
		return "", "", fmt.Errorf("topic %q: the nonce is not 1 to %d of A-Z a-z 0-9 _ -", topic, maxNonce)
	}
	return parts[0], parts[1], nil
}

// EnrollingMayPublish says whether an enrolling user may publish on a topic.
func EnrollingMayPublish(user, topic string) bool {
	u, _, err := ParseJoinUp(topic)
	return err == nil && u == user
}

// EnrollingMaySubscribe says whether an enrolling user may subscribe to a
// filter: the answers of one conversation, whose nonce it must know.
func EnrollingMaySubscribe(user, filter string) bool {
	u, _, err := ParseJoinDown(filter)
	return err == nil && u == user
}
