package update

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/dunlin/dunlin/agent/reconcile"
	"github.com/dunlin/dunlin/models"
	"github.com/dunlin/dunlin/models/signing"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// The wait before a release is fetched again after a failure doubles from
// firstRetry to lastRetry; a random part of it, at least half, is waited.
const (
	firstRetry = time.Second
	lastRetry  = 5 * time.Minute
	// healthEvery is how often a release that is tried looks at itself.
	healthEvery = 200 * time.Millisecond
)

// ErrRestart is the error of Run when another program is to run: the agent
// stops in good order, and becomes the launcher.
var ErrRestart = errors.New("another release of the agent is started")

// Config is what an Updater needs.
type Config struct {
	Dir     string // Folder in the data folder
	Started Started
	Version string // of the program that runs
	// Fetch brings the program for this device and its signature into a
	// folder, under the names of a release's files. It goes on where it was
	// cut short, and may copy what it lacks from the files of reuse.
	Fetch func(ctx context.Context, want *dunlinv1.DesiredAgent, folder string, reuse []string, progress func(present, total uint64)) error
	// Admit says which version a file is, or by a *signing.RefusedError why
	// the device must not run it.
	Admit func(file string) (version string, err error)
	// Health says how the agent does. It must not wait.
	Health func() Health
	// Event keeps an event for the controller.
	Event func(*dunlinv1.Event)
	// Probation is how long a release must be healthy to stay, and Limit how
	// long it may take until it has been.
	Probation, Limit time.Duration
	Log              *slog.Logger

	step func(string) // called after each step that is on disk; for tests
}

// Updater brings the agent program to the release that is wanted. Run runs it;
// the other methods may be called concurrently with it and never wait for it.
type Updater struct {
	cfg     Config
	wake    chan struct{}
	changed chan struct{}
	status  atomic.Pointer[dunlinv1.AgentStatus]

	served []string

	mu    sync.Mutex // guards what follows
	want  *dunlinv1.DesiredAgent
	told  bool // what is wanted
	again bool // what waits is due
	anew  bool // what was refused is to be looked at again

	// What follows is Run's.
	state    *State
	last     string            // digest of the release that was wanted last
	refused  map[string]string // by the digest of a release
	failures int
	due      time.Time // of the next try to fetch
	failure  string
}

// New reads what is known. The status is that of an agent that is as it
// should be, until Run looks.
func New(cfg Config) *Updater {
	if cfg.step == nil {
		cfg.step = func(string) {}
	}
	u := &Updater{cfg: cfg, wake: make(chan struct{}, 1), changed: make(chan struct{}, 1), refused: map[string]string{}}
	var err error
	if u.state, err = Read(cfg.Dir); err != nil {
		cfg.Log.Error("the state of updates counts as lost", "error", err)
	}
	if _, ok := u.state.Slots[cfg.Started.Slot]; cfg.Started.Slot != "" && !ok {
		u.cfg.Started.Slot = "" // nothing is known of what runs
	}
	u.served = slices.Clone(u.state.Served)
	u.status.Store(u.standing())
	return u
}

// Want says which release is to run; nil: the installed program. Until the
// first call what runs stays.
func (u *Updater) Want(want *dunlinv1.DesiredAgent) {
	u.mu.Lock()
	u.want, u.told = want, true
	u.mu.Unlock()
	signal(u.wake)
}

// Retry has a fetch that failed tried again now: the network is back.
func (u *Updater) Retry() {
	u.mu.Lock()
	u.again = true
	u.mu.Unlock()
	signal(u.wake)
}

// TrustChanged has what was refused looked at again.
func (u *Updater) TrustChanged() {
	u.mu.Lock()
	u.again, u.anew = true, true
	u.mu.Unlock()
	signal(u.wake)
}

// Changed receives when Status has changed.
func (u *Updater) Changed() <-chan struct{} { return u.changed }

// Status says how far the update is; the caller must not change it.
func (u *Updater) Status() *dunlinv1.AgentStatus { return u.status.Load() }

// Served are the models that were served before the last change of programs.
func (u *Updater) Served() []string { return u.served }

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

func (u *Updater) publish(s *dunlinv1.AgentStatus) {
	if !proto.Equal(s, u.status.Load()) {
		u.status.Store(s)
		signal(u.changed)
	}
}

// standing is the status of what runs.
func (u *Updater) standing() *dunlinv1.AgentStatus {
	have := u.state.Slots[u.cfg.Started.Slot]
	return &dunlinv1.AgentStatus{AgentVersion: u.cfg.Version, State: dunlinv1.AgentStatus_STATE_CURRENT, Version: have.Release, Digest: have.Digest}
}

// todo is what is to be done for a release.
type todo int

const (
	nothing  todo = iota
	bring         // fetch it, and try it
	switchTo      // the other slot has it: try it
	goBack        // to the installed program, which it is
)

// decide says what is to be done for the release that is wanted, and how the
// update stands until then.
func (u *Updater) decide(want *dunlinv1.DesiredAgent) (todo, *dunlinv1.AgentStatus) {
	st := u.standing()
	slot := u.cfg.Started.Slot
	if want == nil {
		if slot != "" {
			return goBack, st
		}
		return nothing, st
	}
	installed := u.cfg.Started.Installed
	st.Version, st.Digest = want.Version, want.Digest
	switch {
	case slot != "" && u.state.Slots[slot].Digest == want.Digest, slot == "" && want.AgentVersion == u.cfg.Version:
		return nothing, st
	case models.CompareReleases(want.AgentVersion, installed) < 0:
		st.State = dunlinv1.AgentStatus_STATE_REFUSED
		st.Reason = fmt.Sprintf("the installed program is version %s, which is newer than %s and runs: install the older one", installed, want.AgentVersion)
		return nothing, st
	}
	if bad, ok := u.state.bad(want.Digest); ok {
		st.State, st.Reason = dunlinv1.AgentStatus_STATE_REVERTED, bad.Reason
		return nothing, st
	}
	if reason, ok := u.refused[want.Digest]; ok {
		st.State, st.Reason = dunlinv1.AgentStatus_STATE_REFUSED, reason
		return nothing, st
	}
	st.State, st.Reason = dunlinv1.AgentStatus_STATE_FETCHING, u.failure
	if models.CompareReleases(want.AgentVersion, installed) == 0 {
		return goBack, st
	}
	if other := u.state.free(); other != slot && u.state.Slots[other].Digest == want.Digest {
		return switchTo, st
	}
	return bring, st
}

// Run works until ctx is done, or gives ErrRestart when another program is to
// run.
func (u *Updater) Run(ctx context.Context) error {
	u.tell()
	if u.cfg.Started.Slot != "" && u.cfg.Started.Slot == u.state.Trying {
		if err := u.prove(ctx); err != nil || ctx.Err() != nil {
			return err
		}
	}
	for {
		u.mu.Lock()
		want, told, again, anew := u.want, u.told, u.again, u.anew
		u.again, u.anew = false, false
		u.mu.Unlock()
		if anew {
			clear(u.refused)
		}
		if again {
			u.due = time.Time{}
		}
		if d := want.GetDigest(); d != u.last {
			u.last, u.due, u.failures, u.failure = d, time.Time{}, 0, ""
			maps.DeleteFunc(u.refused, func(digest, _ string) bool { return digest != d })
		}
		if want != nil && slices.ContainsFunc(u.state.Bad, func(b Bad) bool { return b.Told && b.Digest != want.Digest }) {
			if err := u.commit(func(s *State) { s.forgive(want.Digest) }); err != nil {
				u.cfg.Log.Error("releases that were left are not forgotten", "error", err)
			}
		}
		do, status := u.decide(want)
		if !told {
			do = nothing
		}
		wait := time.Hour
		if do != nothing && time.Now().Before(u.due) {
			do, wait = nothing, time.Until(u.due)
		}
		u.publish(status)
		if do != nothing {
			err := u.carryOut(ctx, do, want)
			if ctx.Err() != nil {
				return nil
			}
			if errors.Is(err, ErrRestart) {
				return err
			}
			u.failed(want, err)
			continue
		}
		t := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			t.Stop()
			return nil
		case <-u.wake:
		case <-t.C:
		}
		t.Stop()
	}
}

// tell says of what was left, once.
func (u *Updater) tell() {
	told := false
	for _, b := range u.state.Bad {
		if b.Told {
			continue
		}
		u.cfg.Log.Error("a release of the agent was left", "agent_version", b.Version, "reason", b.Reason)
		u.cfg.Event(&dunlinv1.Event{
			Kind: "agent.reverted", Severity: dunlinv1.Severity_SEVERITY_ERROR, Model: models.AgentModel, Version: b.Release,
			Message: fmt.Sprintf("release %s was tried and left: %s", b.Version, b.Reason),
		})
		told = true
	}
	if !told {
		return
	}
	if err := u.commit(func(s *State) {
		for i := range s.Bad {
			s.Bad[i].Told = true
		}
	}); err != nil {
		u.cfg.Log.Error("the next start says of it again", "error", err)
	}
}

// prove waits until the release that is tried stays, or is to be left.
func (u *Updater) prove(ctx context.Context) error {
	trial := &Probation{For: u.cfg.Probation, Limit: u.cfg.Limit, Linked: u.state.Linked, Served: u.state.Served}
	tick := time.NewTicker(healthEvery)
	defer tick.Stop()
	for {
		verdict, reason := trial.Step(time.Now(), u.cfg.Health())
		have := u.state.Slots[u.state.Trying]
		var err error
		switch verdict {
		case Proved:
			if err = u.commit((*State).confirm); err == nil {
				u.stays(have)
				return nil
			}
		case Failed:
			u.cfg.Log.Error("this release of the agent is left", "agent_version", have.Version, "reason", reason)
			if err = u.restart(false, func(s *State) { s.revert(reason, time.Now()) }); errors.Is(err, ErrRestart) {
				return err
			}
		}
		if err != nil { // as of a disk that is full
			reason = err.Error()
		}
		st := u.standing()
		st.State, st.Reason = dunlinv1.AgentStatus_STATE_TRYING, reason
		u.publish(st)
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// stays says that the release that was tried stays.
func (u *Updater) stays(have Slot) {
	u.cfg.step("confirmed")
	if pid := u.cfg.Started.Watcher; pid > 0 {
		go syscall.Wait4(pid, nil, 0, nil) // it ends within watchEvery
	}
	u.cfg.Log.Info("this release of the agent stays", "agent_version", have.Version)
	u.cfg.Event(&dunlinv1.Event{
		Kind: "agent.updated", Severity: dunlinv1.Severity_SEVERITY_INFO, Model: models.AgentModel, Version: have.Release, Message: "runs " + have.Version,
	})
	u.publish(u.standing())
}

// commit changes the state, on disk first.
func (u *Updater) commit(change func(*State)) error {
	next := u.state.clone()
	change(next)
	if err := next.Write(u.cfg.Dir); err != nil {
		return err
	}
	u.state = next
	return nil
}

// restart changes the state that the launcher goes by, and has it start. Where
// this program does well, how it does is kept, for the next one to be held
// against.
func (u *Updater) restart(well bool, change func(*State)) error {
	h := u.cfg.Health()
	err := u.commit(func(s *State) {
		if well {
			s.Linked, s.Served = h.Linked, h.Served[:min(len(h.Served), maxModels)]
		}
		change(s)
	})
	if err != nil {
		return err
	}
	u.cfg.step("ready to restart")
	return ErrRestart
}

// failed takes in that a release was not brought.
func (u *Updater) failed(want *dunlinv1.DesiredAgent, err error) {
	if r, ok := errors.AsType[*signing.RefusedError](err); ok {
		u.refused[want.Digest] = r.Reason
		u.cfg.Log.Error("a release of the agent is refused", "agent_version", want.AgentVersion, "reason", r.Reason)
		u.cfg.Event(&dunlinv1.Event{
			Kind: "agent-binary.refused", Severity: dunlinv1.Severity_SEVERITY_ERROR, Model: models.AgentModel, Version: want.Version, Message: r.Reason,
		})
		return
	}
	if w, ok := errors.AsType[*reconcile.WaitError](err); ok {
		u.due, u.failure = w.Until, w.Cause
		return
	}
	bound := min(firstRetry<<min(u.failures, 10), lastRetry)
	u.failures++
	wait := bound/2 + rand.N(bound/2)
	u.due = time.Now().Add(wait)
	u.failure = fmt.Sprintf("try %d failed: %v", u.failures, err)
	u.cfg.Log.Warn("a release of the agent is not here yet, trying again", "agent_version", want.GetAgentVersion(), "error", err, "in", wait.Round(time.Millisecond))
}

// carryOut brings a release as far as to the restart that tries it.
func (u *Updater) carryOut(ctx context.Context, do todo, want *dunlinv1.DesiredAgent) error {
	if do == goBack {
		return u.restart(true, func(s *State) { s.Good = "" })
	}
	slot := u.state.free()
	if slot == u.cfg.Started.Slot {
		return fmt.Errorf("slot %s runs and has not proved itself", slot)
	}
	if do == switchTo {
		file := filepath.Join(u.cfg.Dir, slot, program)
		if sum, err := sumOf(file); err != nil || sum != u.state.Slots[slot].SHA256 {
			return errors.Join(fmt.Errorf("slot %s does not hold %s any more", slot, want.AgentVersion), err, u.commit(func(s *State) { delete(s.Slots, slot) }))
		}
		if _, err := u.cfg.Admit(file); err != nil {
			return err
		}
		return u.try(slot, u.state.Slots[slot])
	}
	from, err := u.fetch(ctx, want)
	if err != nil {
		return err
	}
	version, err := u.cfg.Admit(filepath.Join(from, program))
	if err == nil && version != want.AgentVersion {
		err = &signing.RefusedError{Reason: fmt.Sprintf("the binary is version %s, the release is %s", version, want.AgentVersion)}
	}
	if err != nil {
		return errors.Join(err, os.RemoveAll(from))
	}
	sum, err := sumOf(filepath.Join(from, program))
	if err != nil {
		return err
	}
	// From here on the slot holds nothing that counts, until it is whole.
	if _, there := u.state.Slots[slot]; there {
		if err := u.commit(func(s *State) { delete(s.Slots, slot) }); err != nil {
			return err
		}
		u.cfg.step("slot emptied")
	}
	if err := u.put(slot, from); err != nil {
		return err
	}
	return u.try(slot, Slot{Version: version, SHA256: sum, Release: want.Version, Digest: want.Digest})
}

// try has the launcher try what is in a slot.
func (u *Updater) try(slot string, has Slot) error {
	return u.restart(true, func(s *State) { s.Slots[slot], s.Trying, s.Tries = has, slot, 0 })
}

// fetch brings a release's files into a folder of their own, and removes those
// of others.
func (u *Updater) fetch(ctx context.Context, want *dunlinv1.DesiredAgent) (string, error) {
	_, name, _ := strings.Cut(want.Digest, ":")
	all := filepath.Join(u.cfg.Dir, fetchDir)
	entries, err := os.ReadDir(all)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	for _, e := range entries {
		if e.Name() != name {
			if err := os.RemoveAll(filepath.Join(all, e.Name())); err != nil {
				return "", err
			}
		}
	}
	folder := filepath.Join(all, name)
	if err := os.MkdirAll(folder, 0o700); err != nil {
		return "", err
	}
	var reuse []string
	if self, err := os.Executable(); err == nil {
		reuse = append(reuse, self)
	}
	reuse = append(reuse, u.cfg.Started.Launcher)
	for _, slot := range slotNames {
		reuse = append(reuse, filepath.Join(u.cfg.Dir, slot, program))
	}
	slices.Sort(reuse)
	err = u.cfg.Fetch(ctx, want, folder, slices.Compact(reuse), func(present, total uint64) {
		st := u.standing()
		st.State, st.Version, st.Digest, st.BytesPresent, st.BytesTotal = dunlinv1.AgentStatus_STATE_FETCHING, want.Version, want.Digest, present, total
		u.publish(st)
	})
	if err == nil {
		u.cfg.step("fetched")
	}
	return folder, err
}

// put moves a fetched program and its signature into a slot, for good.
func (u *Updater) put(slot, from string) error {
	to := filepath.Join(u.cfg.Dir, slot)
	if err := os.MkdirAll(to, 0o700); err != nil {
		return err
	}
	for name, mode := range map[string]fs.FileMode{signature: 0o644, program: 0o755} {
		f, err := os.Open(filepath.Join(from, name))
		if err != nil {
			return err
		}
		if err := errors.Join(f.Chmod(mode), f.Sync(), f.Close()); err != nil {
			return err
		}
	}
	for _, name := range []string{signature, program} {
		if err := os.Rename(filepath.Join(from, name), filepath.Join(to, name)); err != nil {
			return err
		}
		u.cfg.step("moved " + name)
	}
	if err := errors.Join(syncFolder(to), syncFolder(u.cfg.Dir), os.RemoveAll(from)); err != nil {
		return err
	}
	u.cfg.step("slot filled")
	return nil
}
