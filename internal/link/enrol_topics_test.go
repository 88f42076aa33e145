package link

import (
	"strings"
	"testing"
)

func TestJoinTopics(t *testing.T) {
	const nonce = "0123456789abcdef"
	user := TokenUser("dunlin_join_x.pin")
	if user != JoinUser("d9d55006776d") {
		t.Errorf("user %q", user)
	}
	for _, user := range []string{user, RenewUser} {
		u, n, err := ParseJoinUp(JoinUp(user, nonce))
		if err != nil || u != user || n != nonce {
			t.Errorf("ParseJoinUp(JoinUp()) = %q %q %v", u, n, err)
		}
		if u, n, err := ParseJoinDown(JoinDown(user, nonce)); err != nil || u != user || n != nonce {
			t.Errorf("ParseJoinDown(JoinDown()) = %q %q %v", u, n, err)
		}
	}
	for _, topic := range []string{
		"", JoinDown(user, nonce), JoinUp("join.", nonce), JoinUp("join.6BB55A4CE5D5", nonce), JoinUp("dev", nonce), JoinUp(user, "+"),
		JoinUp(user, nonce+"/"), JoinUp(user, strings.Repeat("a", 65)), JoinUp("+", nonce), Up("a", Hello), JoinUp(user, nonce) + "/hello",
	} {
		if u, n, err := ParseJoinUp(topic); err == nil {
			t.Errorf("ParseJoinUp(%q) = %q %q", topic, u, n)
		}
	}
	if !EnrollingMayPublish(user, JoinUp(user, nonce)) || EnrollingMayPublish(user, JoinUp(RenewUser, nonce)) || EnrollingMayPublish(user, Up("d", Hello)) {
		t.Error("wrong topics to publish on")
	}
	if !EnrollingMaySubscribe(user, JoinDown(user, nonce)) || EnrollingMaySubscribe(user, JoinDown(user, "+")) || EnrollingMaySubscribe(user, JoinDown(user, "#")) || EnrollingMaySubscribe(user, Down("d", Desired)) {
		t.Error("wrong filters to subscribe to")
	}
	// A broker goes by the user name alone: what everybody can say to be must not
	// be a device.
	for _, user := range []string{user, RenewUser} {
		if CheckDevice(user) == nil {
			t.Errorf("a device may have the name %q", user)
		}
	}
	// No device's topic is one of these, and the other way round.
	if d, k, err := ParseUp(JoinUp(user, nonce)); err == nil {
		t.Errorf("a topic of a stranger is of device %s, kind %s", d, k)
	}
	if DeviceMayPublish("a", JoinUp(RenewUser, nonce)) || DeviceMaySubscribe("a", JoinDown(RenewUser, nonce)) {
		t.Error("a device may use the topics of strangers")
	}
}

func FuzzParseJoinUp(f *testing.F) {
	f.Add(JoinUp(RenewUser, "0123456789abcdef"))
	f.Add(JoinUp(TokenUser("x"), "0123456789abcdef"))
	f.Fuzz(func(t *testing.T, topic string) {
		u, n, err := ParseJoinUp(topic)
		if err == nil && JoinUp(u, n) != topic {
			t.Errorf("ParseJoinUp(%q) = %q %q", topic, u, n)
		}
	})
}
