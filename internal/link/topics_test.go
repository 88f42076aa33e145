package link

import (
	"strings"
	"testing"
)

func TestTopics(t *testing.T) {
	d, k, err := ParseUp(Up("shop-1_A", Hello))
	if err != nil || d != "shop-1_A" || k != Hello {
		t.Errorf("ParseUp(Up()) = %q %q %v", d, k, err)
	}
	for _, topic := range []string{
		"", "dunlin/v1/1/x/up/hello/more", "dunlin/v1//x/up/hello", Down("x", Desired),
		Up("x", "other"), strings.Replace(Up("x", Hello), "/x/", "/y/", 1), "dunlin/v1/1/+/up/hello", "dunlin/v1/1//up/hello",
	} {
		if d, k, err := ParseUp(topic); err == nil {
			t.Errorf("ParseUp(%q) = %q %q", topic, d, k)
		}
	}
}

func TestDeviceSubtree(t *testing.T) {
	for filter, want := range map[string]bool{
		Down("a", Desired): true, strings.TrimSuffix(Down("a", ""), "/") + "/#": true, Down("a", "+"): true, EpochTopic: true,
		Down("b", Desired): false, "#": false, "dunlin/v1/+/a/down/#": false, Up("a", Hello): false, "$SYS/#": false,
	} {
		if got := DeviceMaySubscribe("a", filter); got != want {
			t.Errorf("DeviceMaySubscribe(a, %q) = %v", filter, got)
		}
	}
	for topic, want := range map[string]bool{
		Up("a", Hello): true, Up("b", Hello): false, Down("a", Desired): false, EpochTopic: false, "$SYS/x": false,
	} {
		if got := DeviceMayPublish("a", topic); got != want {
			t.Errorf("DeviceMayPublish(a, %q) = %v", topic, got)
		}
	}
}

func FuzzParseUp(f *testing.F) {
	f.Add(Up("a", Hello))
	f.Fuzz(func(t *testing.T, topic string) {
		d, k, err := ParseUp(topic)
		if err == nil && Up(d, k) != topic {
			t.Errorf("ParseUp(%q) = %q %q", topic, d, k)
		}
	})
}

func TestJoinTopics(t *testing.T) {
	const nonce = "0123456789abcdef"
	user := JoinUser("dunlin_join_x.pin")
	if id, ok := JoinID(user); !ok || id != "d9d55006776d" {
		t.Errorf("id %q of %q", id, user)
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
		"", JoinDown(user, nonce), JoinUp("join.", nonce), JoinUp("join.6BB55A4CE5D5", nonce), JoinUp("dev", nonce), JoinUp(user, "up"), JoinUp(user, "+"),
		JoinUp(user, nonce+"/"), JoinUp(user, strings.Repeat("a", 65)), JoinUp("+", nonce), Up("a", Hello), JoinUp(user, nonce) + "/hello",
	} {
		if u, n, err := ParseJoinUp(topic); err == nil {
			t.Errorf("ParseJoinUp(%q) = %q %q", topic, u, n)
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
	f.Add(JoinUp(JoinUser("x"), "0123456789abcdef"))
	f.Fuzz(func(t *testing.T, topic string) {
		u, n, err := ParseJoinUp(topic)
		if err == nil && JoinUp(u, n) != topic {
			t.Errorf("ParseJoinUp(%q) = %q %q", topic, u, n)
		}
	})
}
