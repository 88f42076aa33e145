package update

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// startedEnv says to the program of a slot who has become it.
const startedEnv = "DUNLIN_AGENT_STARTED"

// Started is how the program of this process was started.
type Started struct {
	Slot      string // "": it is the installed one
	Launcher  string // path of the installed program
	Installed string // its version
	Watcher   int    // process that watches a release that is tried; 0: none
}

// String writes what From reads.
func (s Started) String() string {
	return fmt.Sprintf("%d %s %d %s %s", os.Getpid(), s.Slot, s.Watcher, s.Installed, s.Launcher)
}

// From reads how this process was started; version is that of its program.
// What another process was told does not count.
func From(getenv func(string) string, version string) (Started, error) {
	self, err := os.Executable()
	parts := strings.SplitN(getenv(startedEnv), " ", 5)
	// The process stays when it becomes the launcher again.
	if len(parts) == 5 && parts[0] == strconv.Itoa(os.Getpid()) && slices.Contains(slotNames, parts[1]) && parts[4] != self {
		watcher, err := strconv.Atoi(parts[2])
		return Started{Slot: parts[1], Watcher: watcher, Installed: parts[3], Launcher: parts[4]}, err
	}
	return Started{Launcher: self, Installed: version}, err
}

// Launcher is the installed program at its start.
type Launcher struct {
	Dir string // Folder in the data folder
	// Started is how this process was started.
	Started Started
	// Admit says whether the device may run a file as its agent.
	Admit func(file string) error
	// Limit is how long a release that is tried may take to prove itself, and
	// Watch the command of a process that looks after that; none: nobody does.
	Limit time.Duration
	Watch []string
	// Exec becomes a program; syscall.Exec where nil.
	Exec func(path string, args, env []string) error
	Warn func(format string, args ...any)
}

// Launch becomes the program that is to run, with args and env. It gives nil
// where that is the installed one: the caller goes on.
func (l Launcher) Launch(args, env []string) error {
	if l.Started.Slot != "" {
		return nil // it has happened
	}
	if _, err := os.Stat(l.Dir); err != nil {
		return nil
	}
	s, err := Read(l.Dir)
	if err != nil {
		l.Warn("the state of updates counts as lost, and the installed program runs: %v", err)
		return nil
	}
	if l.Exec == nil {
		l.Exec = syscall.Exec
	}
	may := func(slot string, trying bool) error {
		err := l.check(s.Slots[slot], filepath.Join(l.Dir, slot, program), trying)
		if err != nil {
			l.Warn("release %s in slot %s is not started: %v", s.Slots[slot].Version, slot, err)
		}
		return err
	}
	stuck := filepath.Join(l.Dir, stuckFile)
	_, missing := os.Stat(stuck)
	before := s.clone()
	slot := s.start(l.Started.Installed, missing == nil, may, time.Now())
	// The try counts before it begins. Where it cannot be counted, as on a disk
	// that is full, what has proved itself runs.
	written := true
	if !reflect.DeepEqual(before, s) {
		if err := s.Write(l.Dir); err != nil {
			l.Warn("nothing new is tried: %v", err)
			s, written = before, false
			s.Trying = ""
			slot = s.start(l.Started.Installed, false, may, time.Now())
		}
	}
	if missing == nil && written {
		if err := os.Remove(stuck); err != nil {
			l.Warn("%v", err)
		}
	}
	if slot == "" {
		return nil
	}
	started := l.Started
	started.Slot = slot
	if slot == s.Trying {
		started.Watcher = l.watch()
	}
	env = append(slices.DeleteFunc(slices.Clone(env), func(e string) bool { return strings.HasPrefix(e, startedEnv+"=") }), startedEnv+"="+started.String())
	err = l.Exec(filepath.Join(l.Dir, slot, program), args, env)
	l.Warn("release %s in slot %s is not started: %v", s.Slots[slot].Version, slot, err)
	if slot == s.Trying {
		s.revert(fmt.Sprintf("it cannot be started: %v", err), time.Now())
		if err := s.Write(l.Dir); err != nil {
			return err
		}
		return l.Launch(args, env)
	}
	return nil // another start may be luckier
}

// check says why a program must not be started: what is tried must count still,
// what has proved itself must be what it was.
func (l Launcher) check(have Slot, file string, trying bool) error {
	sum, err := sumOf(file)
	if err != nil {
		return err
	}
	if sum != have.SHA256 {
		return fmt.Errorf("the file has SHA-256 %s, %s was put there", sum, have.SHA256)
	}
	if trying {
		return l.Admit(file)
	}
	return nil
}

func sumOf(file string) (string, error) {
	f, err := os.Open(file)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// watch starts the process that ends a release which is stuck.
func (l Launcher) watch() int {
	if len(l.Watch) == 0 {
		return 0
	}
	// Later than the release itself gives up.
	cmd := exec.Command(l.Watch[0], append(l.Watch[1:], l.Dir, strconv.Itoa(os.Getpid()), (2*l.Limit).String())...)
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		l.Warn("nobody watches the release that is tried: %v", err)
		return 0
	}
	return cmd.Process.Pid
}

// watchEvery is how often a watcher looks.
const watchEvery = 200 * time.Millisecond

// Watch ends the parent of this process, and leaves a note for the launcher,
// where the release that it tries has neither proved itself nor been left
// within a time. Its arguments are those that Launcher.Watch is called with.
func Watch(args []string) error {
	if len(args) != 3 {
		return errors.New("watch: it is for dunlin-agent itself to start")
	}
	dir := args[0]
	parent, err := strconv.Atoi(args[1])
	if err != nil {
		return err
	}
	limit, err := time.ParseDuration(args[2])
	if err != nil {
		return err
	}
	tick := time.NewTicker(watchEvery)
	defer tick.Stop()
	for end := time.Now().Add(limit); os.Getppid() == parent; <-tick.C {
		s, err := Read(dir)
		if err == nil && s.Trying == "" {
			return nil
		}
		if time.Now().After(end) {
			note, err := os.Create(filepath.Join(dir, stuckFile))
			if err == nil {
				err = errors.Join(note.Sync(), note.Close(), syncFolder(dir))
			}
			return errors.Join(err, syscall.Kill(parent, syscall.SIGKILL))
		}
	}
	return nil
}
