package link

import "testing"

func TestJoinTopics(t *testing.T) {
	const user, nonce = "join.0a1b2c3d4e5f", "n-1"
	if u, n, err := ParseJoinUp(JoinUp(user, nonce)); u != user || n != nonce || err != nil {
		t.Errorf("%q, %q, %v", u, n, err)
	}
	if u, n, err := ParseJoinDown(JoinDown(RenewUser, nonce)); u != RenewUser || n != nonce || err != nil {
		t.Errorf("%q, %q, %v", u, n, err)
	}
	for _, bad := range []string{
		"", "dunlin/v1/join", JoinDown(user, nonce), JoinUp("device", nonce), JoinUp("join.", nonce), JoinUp("join.x", nonce),
		JoinUp(user, ""), JoinUp(user, "+"), JoinUp(user, "a/b"), JoinUp("+", nonce), "x" + JoinUp(user, nonce), JoinUp(user, nonce) + "/x",
	} {
		if _, _, err := ParseJoinUp(bad); err == nil {
			t.Errorf("%q counts", bad)
		}
	}
	if !EnrollingMayPublish(user, JoinUp(user, nonce)) || EnrollingMayPublish(user, JoinUp(RenewUser, nonce)) || EnrollingMayPublish(user, Up("d", Hello)) {
		t.Error("wrong topics to publish on")
	}
	if !EnrollingMaySubscribe(user, JoinDown(user, nonce)) || EnrollingMaySubscribe(user, JoinDown(user, "+")) || EnrollingMaySubscribe(user, JoinDown(user, "#")) || EnrollingMaySubscribe(user, Down("d", Desired)) {
		t.Error("wrong filters to subscribe to")
	}
}
