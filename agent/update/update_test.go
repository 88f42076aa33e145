package update

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/dunlin/dunlin/models/signing"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// machine is a device on which programs run that are texts: "0.8.0 good". What
// a program does follows from its second word:
//
//	good   serves, and reaches the controller
//	dies   ends at once
//	lonely does not reach the controller
//	mute   does not serve the model
//	forged is signed by nobody
type machine struct {
	t         *testing.T
	dir       string
	installed string
	want      *dunlinv1.DesiredAgent
	releases  map[string]string // programs by the digest of their release
	events    []string
	starts    int
	offline   bool // nobody reaches the controller
	silent    bool // nobody says which release is wanted
	crashAt   int  // the step at which the power goes; 0: never
	steps     int
	fetches   int
}

// powerCut and execed are what ends a program in the middle.
type (
	powerCut struct{}
	execed   struct{ file string }
)

func (m *machine) step(string) {
	m.steps++
	if m.steps == m.crashAt {
		panic(powerCut{})
	}
}

// until runs f to where a program ends.
func until(f func()) (end any) {
	defer func() {
		end = recover()
		switch end.(type) {
		case nil, powerCut, execed:
		default:
			panic(end)
		}
	}()
	f()
	return nil
}

func (m *machine) admit(file string) (string, error) {
	raw, err := os.ReadFile(file)
	if err != nil {
		return "", err
	}
	version, kind, _ := strings.Cut(string(raw), " ")
	if kind == "forged" {
		return "", &signing.RefusedError{Reason: "signed by nobody"}
	}
	return version, nil
}

// run runs the device for a time, in a bubble: it starts its agent whenever
// that has ended, and gives the text of the program that runs at the end.
func (m *machine) run(d time.Duration) string {
	m.t.Helper()
	for end := time.Now().Add(d); ; m.starts++ {
		running, env := m.installed, []string(nil)
		became := until(func() {
			l := Launcher{
				Dir: filepath.Join(m.dir, Folder), Started: Started{Launcher: "/installed", Installed: m.version(m.installed)},
				Admit: func(file string) error { _, err := m.admit(file); return err },
				Exec: func(file string, _, e []string) error {
					env = e
					m.step("started")
					panic(execed{file})
				},
				Warn: func(format string, args ...any) { m.t.Logf(format, args...) },
			}
			if err := l.Launch(nil, nil); err != nil {
				m.t.Fatal(err)
			}
		})
		if x, ok := became.(execed); ok {
			raw, err := os.ReadFile(x.file)
			if err != nil {
				m.t.Fatal(err)
			}
			running = string(raw)
		}
		stopped := false
		if _, ok := became.(powerCut); !ok && !strings.HasSuffix(running, " dies") {
			stopped = m.agent(running, env, end)
		}
		if stopped || !time.Now().Before(end) {
			return running
		}
		time.Sleep(2 * time.Second) // until it is started again
	}
}

func (m *machine) version(text string) string { v, _, _ := strings.Cut(text, " "); return v }

// agent runs a program until it ends, or until the end, which it says.
func (m *machine) agent(running string, env []string, end time.Time) (stopped bool) {
	_, kind, _ := strings.Cut(running, " ")
	getenv := func(key string) string {
		for _, e := range env {
			if v, ok := strings.CutPrefix(e, key+"="); ok {
				return v
			}
		}
		return ""
	}
	started, err := From(getenv, m.version(running))
	if err != nil {
		m.t.Fatal(err)
	}
	if m.t.Failed() {
		m.t.FailNow()
	}
	u := New(Config{
		Dir: filepath.Join(m.dir, Folder), Started: started, Version: m.version(running), Log: slog.New(slog.DiscardHandler),
		Probation: time.Minute, Limit: 10 * time.Minute, step: m.step, Admit: m.admit,
		Health: func() Health {
			h := Health{Linked: kind != "lonely" && !m.offline, Worker: true, Wanted: []string{"digits"}}
			if kind != "mute" {
				h.Served = []string{"digits"}
			}
			return h
		},
		Event: func(e *dunlinv1.Event) { m.events = append(m.events, e.Kind) },
		Fetch: func(_ context.Context, want *dunlinv1.DesiredAgent, folder string, _ []string, progress func(uint64, uint64)) error {
			m.fetches++
			progress(1, 2)
			text, ok := m.releases[want.Digest]
			if !ok {
				return errors.New("the registry does not have it")
			}
			return errors.Join(os.WriteFile(filepath.Join(folder, program), []byte(text), 0o600), os.WriteFile(filepath.Join(folder, signature), []byte("signature"), 0o600))
		},
	})
	if !m.silent {
		u.Want(m.want)
	}
	ctx, cancel := context.WithDeadline(m.t.Context(), end)
	defer cancel()
	until(func() { err = u.Run(ctx) })
	m.status(u, running)
	if err != nil && !errors.Is(err, ErrRestart) {
		m.t.Fatal(err)
	}
	return ctx.Err() != nil
}

// status keeps what was reported last.
var lastStatus *dunlinv1.AgentStatus

func (m *machine) status(u *Updater, running string) {
	lastStatus = u.Status()
	if lastStatus.AgentVersion != m.version(running) {
		m.t.Errorf("%s says that it is %s", running, lastStatus.AgentVersion)
	}
}

// release makes a release of a text.
func (m *machine) release(n int64, text string) *dunlinv1.DesiredAgent {
	sum := sha256.Sum256([]byte(text))
	d := "sha256:" + hex.EncodeToString(sum[:])
	if m.releases == nil {
		m.releases = map[string]string{}
	}
	m.releases[d] = text
	return &dunlinv1.DesiredAgent{Deployment: "agents", AgentVersion: m.version(text), Version: n, Digest: d}
}

func newMachine(t *testing.T, installed string) *machine {
	return &machine{t: t, dir: t.TempDir(), installed: installed}
}

func (m *machine) expect(what, running, want string, state dunlinv1.AgentStatus_State) {
	m.t.Helper()
	if running != want {
		m.t.Errorf("%s: %q runs, want %q", what, running, want)
	}
	if lastStatus.State != state {
		m.t.Errorf("%s: the status is %v, want %v", what, lastStatus, state)
	}
}

const (
	current  = dunlinv1.AgentStatus_STATE_CURRENT
	reverted = dunlinv1.AgentStatus_STATE_REVERTED
	refused  = dunlinv1.AgentStatus_STATE_REFUSED
)

func TestUpdate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMachine(t, "0.7.0 good")
		m.expect("at first", m.run(time.Minute), "0.7.0 good", current)
		m.want = m.release(1, "0.8.0 good")
		m.expect("the first release", m.run(5*time.Minute), "0.8.0 good", current)
		m.want = m.release(2, "0.8.1 good")
		m.expect("the second", m.run(5*time.Minute), "0.8.1 good", current)
		if lastStatus.Version != 2 || lastStatus.Digest != m.want.Digest {
			t.Errorf("the status is %v", lastStatus)
		}
		fetches := m.fetches
		m.want = m.release(1, "0.8.0 good")
		m.expect("the first again", m.run(5*time.Minute), "0.8.0 good", current)
		if m.fetches != fetches {
			t.Error("what the other slot holds was fetched again")
		}
		m.silent = true
		m.expect("nobody says what is wanted", m.run(5*time.Minute), "0.8.0 good", current)
		m.silent, m.want = false, nil
		m.expect("nothing wanted", m.run(5*time.Minute), "0.7.0 good", current)
		if lastStatus.Version != 0 {
			t.Errorf("the status is %v", lastStatus)
		}
		m.want = m.release(3, "0.7.0 same as installed")
		m.expect("the installed one's version", m.run(5*time.Minute), "0.7.0 good", current)
		m.want = m.release(4, "0.6.0 good")
		m.expect("one below the installed one", m.run(5*time.Minute), "0.7.0 good", refused)
		m.want = m.release(2, "0.8.1 good")
		m.run(5 * time.Minute)
		m.installed = "0.9.0 good"
		m.expect("a package is installed", m.run(5*time.Minute), "0.9.0 good", refused)
		m.want = m.release(5, "0.10.0 good")
		m.expect("a release above it", m.run(5*time.Minute), "0.10.0 good", current)
		if slices.Contains(m.events, "agent.reverted") {
			t.Errorf("events: %v", m.events)
		}
	})
}

func TestRevert(t *testing.T) {
	for kind, c := range map[string]struct {
		says  string
		state dunlinv1.AgentStatus_State
	}{
		"dies":   {"ended 3 times", reverted},
		"lonely": {"the controller is not reached", reverted},
		"mute":   {"model digits is not served", reverted},
		"forged": {"signed by nobody", refused},
	} {
		for _, before := range []string{"0.7.0 good", "0.8.0 good"} {
			t.Run(kind+" after "+before, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					m := newMachine(t, "0.7.0 good")
					if before != m.installed {
						m.want = m.release(1, before)
					}
					m.expect("before", m.run(5*time.Minute), before, current)
					m.want = m.release(2, "0.9.0 "+kind)
					m.expect("after", m.run(time.Hour), before, c.state)
					if !strings.Contains(lastStatus.Reason, c.says) || lastStatus.Version != 2 {
						t.Errorf("the status is %v, want %q", lastStatus, c.says)
					}
					starts := m.starts
					m.expect("a day later", m.run(24*time.Hour), before, c.state)
					if m.starts != starts {
						t.Errorf("it was tried again: %d starts, %d before", m.starts, starts)
					}
					event := map[dunlinv1.AgentStatus_State]string{reverted: "agent.reverted", refused: "agent-binary.refused"}[c.state]
					n := 0
					for _, e := range m.events {
						if e == event {
							n++
						}
					}
					if n != 1 && (c.state == reverted || n == 0) { // what is refused is looked at again at each start
						t.Errorf("%d events %s in %v", n, event, m.events)
					}
					m.want = m.release(3, "0.9.1 good")
					m.expect("the next release", m.run(time.Hour), "0.9.1 good", current)
					m.want = m.release(2, "0.9.0 "+kind)
					m.expect("the bad one anew", m.run(time.Hour), "0.9.1 good", c.state)
				})
			})
		}
	}
}

// TestUnreachable: a device that did not reach its controller before need not
// reach it afterwards, and one whose release is bad goes back without it.
func TestUnreachable(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMachine(t, "0.7.0 good")
		m.offline = true
		m.want = m.release(1, "0.8.0 good")
		m.expect("good", m.run(time.Hour), "0.8.0 good", current)
		m.want = m.release(2, "0.9.0 mute")
		m.expect("bad", m.run(time.Hour), "0.8.0 good", reverted)
	})
}

// TestPowerCut cuts the power at each step of an update, good or bad: the next
// start goes on, and it ends as it would have.
func TestPowerCut(t *testing.T) {
	for kind, want := range map[string]string{"good": "0.9.0 good", "mute": "0.8.0 good", "dies": "0.8.0 good"} {
		t.Run(kind, func(t *testing.T) {
			for at := 1; ; at++ {
				cut := false
				synctest.Test(t, func(t *testing.T) {
					m := newMachine(t, "0.7.0 good")
					m.want = m.release(1, "0.8.0 good")
					m.run(5 * time.Minute)
					m.want = m.release(2, "0.8.5 good") // so that both slots are full
					m.run(5 * time.Minute)
					m.want = m.release(1, "0.8.0 good")
					m.run(5 * time.Minute)
					m.want = m.release(3, "0.9.0 "+kind)
					m.steps, m.crashAt = 0, at
					running := m.run(time.Hour)
					cut = m.steps >= at
					if running != want {
						t.Errorf("cut at step %d: %q runs, want %q", at, running, want)
					}
				})
				if t.Failed() {
					return
				}
				if !cut {
					if at < 5 {
						t.Errorf("an update has %d steps only", at)
					}
					return
				}
			}
		})
	}
}

// TestRandom has random releases wanted, packages installed and power cut, and
// looks that what runs is whole, admitted, and in the end what it should be.
func TestRandom(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	for i := range uint64(30) {
		if !t.Run(fmt.Sprint(seed+i), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { random(t, rand.New(rand.NewPCG(seed+i, 7))) })
		}) {
			return
		}
	}
}

func random(t *testing.T, r *rand.Rand) {
	m := newMachine(t, "0.1.0 good")
	kinds := []string{"good", "good", "dies", "lonely", "mute", "forged"}
	for n := range int64(8) {
		text := fmt.Sprintf("0.%d.%d %s", 2+r.IntN(5), n, kinds[r.IntN(len(kinds))])
		m.want = m.release(n+1, text)
		m.steps, m.crashAt = 0, r.IntN(20)
		if r.IntN(4) == 0 {
			m.installed = fmt.Sprintf("0.%d.0 good", 1+r.IntN(6))
		}
		running := m.run(time.Duration(r.IntN(120)) * time.Minute)
		// One that dies at once says nothing of itself: that it is tried is on disk. One that was just
		// left, when the power was cut, said so last.
		state, err := Read(filepath.Join(m.dir, Folder))
		if err != nil {
			t.Fatal(err)
		}
		if _, kind, _ := strings.Cut(running, " "); kind != "good" && state.Trying == "" && lastStatus.State != dunlinv1.AgentStatus_STATE_TRYING {
			t.Errorf("%q runs and is not tried: %v", running, lastStatus)
		}
	}
	m.crashAt = 0
	_, kind, _ := strings.Cut(m.releases[m.want.Digest], " ")
	above := cmp.Compare(m.version(m.releases[m.want.Digest])[2], m.version(m.installed)[2]) >= 0
	running := m.run(3 * time.Hour)
	if good := kind == "good" && above; good != (lastStatus.State == current && running == m.releases[m.want.Digest]) {
		t.Errorf("%q is wanted, %q installed, and %q runs: %v", m.releases[m.want.Digest], m.installed, running, lastStatus)
	}
}

func TestParseRefuses(t *testing.T) {
	for name, text := range map[string]string{
		"not JSON":        "a",
		"another format":  `{"format":2}`,
		"an empty slot":   `{"format":1,"good":"a"}`,
		"another slot":    `{"format":1,"slots":{"../c":{}}}`,
		"tries what is":   `{"format":1,"good":"a","trying":"a","slots":{"a":{}}}`,
		"tries below 0":   `{"format":1,"tries":-1}`,
		"too many models": `{"format":1,"served":["` + strings.Repeat(`a","`, maxModels) + `a"]}`,
	} {
		if _, err := parse([]byte(text)); err == nil {
			t.Errorf("%s: it is taken", name)
		}
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, stateFile), []byte("torn"), 0o600); err != nil {
		t.Fatal(err)
	}
	if s, err := Read(dir); err == nil || s.Good != "" || s.Trying != "" {
		t.Errorf("a file that cannot be read gives %+v, %v", s, err)
	}
}

func FuzzState(f *testing.F) {
	f.Add([]byte(`{"format":1,"good":"a","trying":"b","tries":2,"slots":{"a":{"version":"0.8.0"},"b":{"version":"0.9.0"}},"bad":[{"reason":"x"}]}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		s, err := parse(raw)
		if err != nil {
			return
		}
		for range MaxTries + 2 {
			slot := s.start("0.7.0", false, func(string, bool) error { return nil }, time.Now())
			if _, ok := s.Slots[slot]; slot != "" && !ok {
				t.Fatalf("slot %q is started and has nothing", slot)
			}
		}
		if s.Trying != "" && s.Tries < MaxTries {
			t.Fatalf("%d tries after %d starts", s.Tries, MaxTries+2)
		}
	})
}

// TestLaunch starts what is in the slots, and what must not be started.
func TestLaunch(t *testing.T) {
	for name, c := range map[string]struct {
		change    func(dir string, s *State)
		installed string
		want      string // slot that is started
		reverted  string // reason, or part of it
	}{
		"as it was":             {func(string, *State) {}, "0.7.0", "b", ""},
		"nothing is tried":      {func(_ string, s *State) { s.Trying = "" }, "0.7.0", "a", ""},
		"tried too often":       {func(_ string, s *State) { s.Tries = MaxTries }, "0.7.0", "a", "ended 3 times"},
		"altered on disk":       {func(dir string, _ *State) { fill(t, dir, "b", "0.9.0 altered") }, "0.7.0", "a", "the file has SHA-256"},
		"gone":                  {func(dir string, _ *State) { remove(t, dir, "b") }, "0.7.0", "a", "no such file"},
		"does not count":        {func(dir string, s *State) { s.Slots["b"] = fill(t, dir, "b", "0.9.0 forged") }, "0.7.0", "a", "signed by nobody"},
		"a package between":     {func(string, *State) {}, "0.8.5", "b", ""},
		"a package above":       {func(string, *State) {}, "0.9.0", "", ""},
		"both altered":          {func(dir string, _ *State) { remove(t, dir, "a"); remove(t, dir, "b") }, "0.7.0", "", "no such file"},
		"the watcher ended it":  {func(dir string, _ *State) { write(t, filepath.Join(dir, stuckFile), "") }, "0.7.0", "a", "nor ended"},
		"the state is torn":     {func(dir string, _ *State) { write(t, filepath.Join(dir, stateFile), "{") }, "0.7.0", "", ""},
		"cannot be executed":    {func(dir string, s *State) { s.Slots["b"] = fill(t, dir, "b", "0.9.0 broken") }, "0.7.0", "a", "exec format error"},
		"key is gone since":     {func(dir string, s *State) { s.Trying = ""; s.Slots["a"] = fill(t, dir, "a", "0.8.0 forged") }, "0.7.0", "a", ""},
		"version is no version": {func(string, *State) {}, "(devel)", "b", ""},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t, c.installed+" good")
			dir := filepath.Join(m.dir, Folder)
			s := &State{Good: "a", Trying: "b", Slots: map[string]Slot{"a": fill(t, dir, "a", "0.8.0 good"), "b": fill(t, dir, "b", "0.9.0 good")}}
			torn := name == "the state is torn"
			if !torn {
				c.change(dir, s)
			}
			if err := s.Write(dir); err != nil {
				t.Fatal(err)
			}
			if torn {
				c.change(dir, s)
			}
			l := Launcher{
				Dir: dir, Started: Started{Installed: c.installed}, Warn: t.Logf,
				Admit: func(file string) error { _, err := m.admit(file); return err },
				Exec: func(file string, _, env []string) error {
					if raw, err := os.ReadFile(file); err != nil || strings.HasSuffix(string(raw), "broken") {
						return errors.Join(errors.New("exec format error"), err)
					}
					panic(execed{filepath.Base(filepath.Dir(file))})
				},
			}
			slot := ""
			if x, ok := until(func() {
				if err := l.Launch(nil, nil); err != nil {
					t.Error(err)
				}
			}).(execed); ok {
				slot = x.file
			}
			if slot != c.want {
				t.Errorf("slot %q is started, want %q", slot, c.want)
			}
			if torn {
				return
			}
			after, err := Read(dir)
			if err != nil {
				t.Fatal(err)
			}
			if c.reverted == "" && len(after.Bad) > 0 || c.reverted != "" && (len(after.Bad) != 1 || !strings.Contains(after.Bad[0].Reason, c.reverted)) {
				t.Errorf("left: %+v, want %q", after.Bad, c.reverted)
			}
			if _, err := os.Stat(filepath.Join(dir, stuckFile)); err == nil {
				t.Error("the watcher's note is there still")
			}
		})
	}
}

// TestLaunchOnAFullDisk starts what has proved itself where no state can be
// written, and tries nothing.
func TestLaunchOnAFullDisk(t *testing.T) {
	for _, trying := range []string{"", "b"} {
		m := newMachine(t, "0.7.0 good")
		dir := filepath.Join(m.dir, Folder)
		s := &State{Good: "a", Trying: trying, Slots: map[string]Slot{"a": fill(t, dir, "a", "0.8.0 good"), "b": fill(t, dir, "b", "0.9.0 good")}}
		if err := s.Write(dir); err != nil {
			t.Fatal(err)
		}
		if err := os.Mkdir(filepath.Join(dir, stateFile+".new"), 0o700); err != nil {
			t.Fatal(err)
		}
		l := Launcher{
			Dir: dir, Started: Started{Installed: "0.7.0"}, Warn: t.Logf, Admit: func(string) error { return nil },
			Exec: func(file string, _, _ []string) error { panic(execed{filepath.Base(filepath.Dir(file))}) },
		}
		x, _ := until(func() {
			if err := l.Launch(nil, nil); err != nil {
				t.Error(err)
			}
		}).(execed)
		if x.file != "a" {
			t.Errorf("trying %q: slot %q is started, want a", trying, x.file)
		}
		after, err := Read(dir)
		if err != nil || after.Trying != trying || after.Tries != 0 {
			t.Errorf("trying %q: the state is %+v, %v", trying, after, err)
		}
	}
}

func TestFrom(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	slot := Started{Slot: "b", Launcher: "/usr/bin/dunlin-agent", Installed: "0.7.0", Watcher: 7}
	installed := Started{Launcher: self, Installed: "0.8.0"}
	for name, c := range map[string]struct {
		env  string
		want Started
	}{
		"nothing":             {"", installed},
		"the launcher":        {slot.String(), slot},
		"the launcher itself": {Started{Slot: "b", Launcher: self, Installed: "0.7.0"}.String(), installed},
		"another process":     {"1 b 7 0.7.0 /usr/bin/dunlin-agent", installed},
		"another slot":        {fmt.Sprintf("%d c 7 0.7.0 /usr/bin/dunlin-agent", os.Getpid()), installed},
		"too little":          {fmt.Sprintf("%d b", os.Getpid()), installed},
	} {
		got, err := From(func(string) string { return c.env }, "0.8.0")
		if err != nil || got != c.want {
			t.Errorf("%s: %+v, %v, want %+v", name, got, err, c.want)
		}
	}
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, []byte(text), 0o700)); err != nil {
		t.Fatal(err)
	}
}

func fill(t *testing.T, dir, slot, text string) Slot {
	t.Helper()
	write(t, filepath.Join(dir, slot, program), text)
	sum := sha256.Sum256([]byte(text))
	version, _, _ := strings.Cut(text, " ")
	return Slot{Version: version, SHA256: hex.EncodeToString(sum[:]), Release: 1, Digest: "sha256:" + hex.EncodeToString(sum[:])}
}

func remove(t *testing.T, dir, slot string) {
	t.Helper()
	if err := os.Remove(filepath.Join(dir, slot, program)); err != nil {
		t.Fatal(err)
	}
}

const (
	stuckEnv = "DUNLIN_TEST_STUCK"
	watchArg = "watch"
)

// TestMain lets the test's own program stand for one that hangs, and for its
// watcher.
func TestMain(m *testing.M) {
	if dir := os.Getenv(stuckEnv); dir != "" {
		if len(os.Args) > 1 && os.Args[1] == watchArg {
			if err := Watch(os.Args[2:]); err != nil {
				fmt.Fprintln(os.Stderr, err)
			}
			os.Exit(0)
		}
		self, err := os.Executable()
		if err == nil {
			l := Launcher{Dir: dir, Limit: 100 * time.Millisecond, Watch: []string{self, watchArg}, Warn: func(string, ...any) {}}
			fmt.Println(l.watch())
		}
		select {} // os/exec holds a goroutine of the child: no deadlock is seen
	}
	os.Exit(m.Run())
}

func TestWatch(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	s := &State{Trying: "a", Slots: map[string]Slot{"a": {}}}
	if err := s.Write(dir); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), self)
	cmd.Env = append(os.Environ(), stuckEnv+"="+dir)
	err = cmd.Run()
	if x, ok := errors.AsType[*exec.ExitError](err); !ok || x.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
		t.Errorf("a program that is stuck ends by %v", err)
	}
	if _, err := os.Stat(filepath.Join(dir, stuckFile)); err != nil {
		t.Error(err)
	}
}
