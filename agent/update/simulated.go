package update

import (
	"context"
	"fmt"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/dunlin/dunlin/models"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// Simulated is the Updater of a simulated device: it reports what a real one
// would, and no program changes. Its methods are those of an Updater.
type Simulated struct {
	// Take is how long a release takes to be fetched, and as long again to
	// prove itself.
	Take time.Duration
	// Bad says why a release is left; "" has it stay. nil: all stay.
	Bad func(version string) string
	// Became is told of each version that the device has then.
	Became func(version string)
	// Event keeps an event for the controller.
	Event func(*dunlinv1.Event)

	wake    chan struct{}
	changed chan struct{}

	installed string

	mu     sync.Mutex // guards what follows
	want   *dunlinv1.DesiredAgent
	status *dunlinv1.AgentStatus
}

// NewSimulated gives one whose program has a version.
func NewSimulated(version string) *Simulated {
	return &Simulated{
		installed: version,
		wake:      make(chan struct{}, 1), changed: make(chan struct{}, 1),
		status: &dunlinv1.AgentStatus{AgentVersion: version, State: dunlinv1.AgentStatus_STATE_CURRENT},
	}
}

// Want is Updater.Want.
func (u *Simulated) Want(want *dunlinv1.DesiredAgent) {
	u.mu.Lock()
	u.want = want
	u.mu.Unlock()
	signal(u.wake)
}

// Retry is Updater.Retry: nothing fails here that could be tried again.
func (u *Simulated) Retry() {}

// TrustChanged is Updater.TrustChanged.
func (u *Simulated) TrustChanged() {}

// Changed is Updater.Changed.
func (u *Simulated) Changed() <-chan struct{} { return u.changed }

// Status is Updater.Status.
func (u *Simulated) Status() *dunlinv1.AgentStatus {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.status
}

// become changes the status.
func (u *Simulated) become(change func(*dunlinv1.AgentStatus)) {
	u.mu.Lock()
	next := proto.CloneOf(u.status)
	change(next)
	u.status = next
	u.mu.Unlock()
	signal(u.changed)
}

// Run follows what is wanted until ctx is done, and gives nil then.
func (u *Simulated) Run(ctx context.Context) error {
	for {
		u.mu.Lock()
		want, have := u.want, u.status
		u.mu.Unlock()
		switch {
		case want == nil && have.Version != 0:
			u.tell(u.installed)
			u.become(func(s *dunlinv1.AgentStatus) {
				proto.Reset(s)
				s.AgentVersion, s.State = u.installed, dunlinv1.AgentStatus_STATE_CURRENT
			})
		case want == nil || have.Digest == want.Digest:
		case have.AgentVersion == want.AgentVersion:
			u.become(func(s *dunlinv1.AgentStatus) {
				s.State, s.Reason, s.Version, s.Digest = dunlinv1.AgentStatus_STATE_CURRENT, "", want.Version, want.Digest
			})
		default:
			if !u.try(ctx, want) {
				return nil
			}
			continue
		}
		select {
		case <-u.wake:
		case <-ctx.Done():
			return nil
		}
	}
}

// try takes a release as far as it comes, and says whether ctx lasted.
func (u *Simulated) try(ctx context.Context, want *dunlinv1.DesiredAgent) bool {
	before := u.Status().AgentVersion
	for _, state := range []dunlinv1.AgentStatus_State{dunlinv1.AgentStatus_STATE_FETCHING, dunlinv1.AgentStatus_STATE_TRYING} {
		version := before
		if state == dunlinv1.AgentStatus_STATE_TRYING {
			version = want.AgentVersion
			u.tell(version)
		}
		u.become(func(s *dunlinv1.AgentStatus) {
			s.AgentVersion, s.State, s.Reason, s.Version, s.Digest, s.BytesTotal = version, state, "", want.Version, want.Digest, want.SizeBytes
		})
		t := time.NewTimer(u.Take)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return false
		}
	}
	reason := ""
	if u.Bad != nil {
		reason = u.Bad(want.AgentVersion)
	}
	e := &dunlinv1.Event{Kind: "agent.updated", Severity: dunlinv1.Severity_SEVERITY_INFO, Model: models.AgentModel, Version: want.Version, Message: "runs " + want.AgentVersion}
	if reason != "" {
		u.tell(before)
		e.Kind, e.Severity = "agent.reverted", dunlinv1.Severity_SEVERITY_ERROR
		e.Message = fmt.Sprintf("release %s was tried and left: %s", want.AgentVersion, reason)
	}
	u.become(func(s *dunlinv1.AgentStatus) {
		s.State, s.Reason = dunlinv1.AgentStatus_STATE_CURRENT, reason
		if reason != "" {
			s.AgentVersion, s.State = before, dunlinv1.AgentStatus_STATE_REVERTED
		}
	})
	if u.Event != nil {
		u.Event(e)
	}
	return true
}

func (u *Simulated) tell(version string) {
	if u.Became != nil {
		u.Became(version)
	}
}
