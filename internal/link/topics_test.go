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
