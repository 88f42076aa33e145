package update

import (
	"context"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

func TestSimulated(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := NewSimulated("0.7.0")
		u.Take = time.Minute
		var versions, events []string
		u.Became = func(v string) { versions = append(versions, v) }
		u.Event = func(e *dunlinv1.Event) { events = append(events, e.Kind) }
		u.Bad = func(v string) string {
			if v == "0.9.0" {
				return "scripted"
			}
			return ""
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() {
			defer close(done)
			if err := u.Run(ctx); err != nil {
				t.Error(err)
			}
		}()
		m := newMachine(t, "")
		state := func(want dunlinv1.AgentStatus_State, version string, release int64) {
			t.Helper()
			synctest.Wait()
			if s := u.Status(); s.State != want || s.AgentVersion != version || s.Version != release {
				t.Errorf("the status is %v, want %v of %s", s, want, version)
			}
		}
		u.Want(m.release(1, "0.8.0 good"))
		state(dunlinv1.AgentStatus_STATE_FETCHING, "0.7.0", 1)
		time.Sleep(time.Minute)
		state(dunlinv1.AgentStatus_STATE_TRYING, "0.8.0", 1)
		time.Sleep(time.Minute)
		state(current, "0.8.0", 1)
		bad := m.release(2, "0.9.0 bad")
		u.Want(bad)
		time.Sleep(2 * time.Minute)
		state(reverted, "0.8.0", 2)
		time.Sleep(time.Hour)
		state(reverted, "0.8.0", 2)
		if !strings.Contains(u.Status().Reason, "scripted") {
			t.Errorf("the status is %v", u.Status())
		}
		u.Want(m.release(1, "0.8.0 good"))
		state(current, "0.8.0", 1)
		u.Want(nil)
		state(current, "0.7.0", 0)
		cancel()
		<-done
		if want := []string{"0.8.0", "0.9.0", "0.8.0", "0.7.0"}; !slices.Equal(versions, want) {
			t.Errorf("versions %v, want %v", versions, want)
		}
		if want := []string{"agent.updated", "agent.reverted"}; !slices.Equal(events, want) {
			t.Errorf("events %v, want %v", events, want)
		}
	})
}
