// Package update keeps releases of the agent program in two slots beside the
// installed one, decides at each start which of them runs, and goes back by
// itself from one that does not prove itself.
//
// The installed program is the launcher: at each start it reads the state file,
// verifies the program of the slot that is to run, and becomes it by exec. A
// release that is new is tried: it stays when it has been healthy for a while,
// and is left for the one before when it ends too often before that, or is not
// healthy in time. Whatever is cut short, the next start continues.
package update

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/dunlin/dunlin/models"
)

// What there is in the folder of an agent's programs.
const (
	Folder    = "agent" // in the data folder
	stateFile = "state" // JSON, replaced as a whole
	fetchDir  = "fetch" // of what is on its way
	stuckFile = "stuck" // its watcher ended the program that was tried
	program   = models.ReleaseFile
	signature = models.ReleaseSignature
)

// Limits of the state file.
const (
	maxState  = 256 << 10 // bytes; a larger file counts as none
	maxBad    = 8         // releases; the oldest are forgotten
	maxModels = 1024      // that served before
	maxReason = 1024      // bytes
)

// MaxTries is how often a release is started before it has proved itself.
const MaxTries = 3

// Slot is what is in a slot.
type Slot struct {
	Version string `json:"version"` // of the program
	SHA256  string `json:"sha256"`  // of the program, hexadecimal
	Release int64  `json:"release"` // version of models.AgentModel
	Digest  string `json:"digest"`  // of the release's bundle
}

// Bad is a release that was tried and left.
type Bad struct {
	Slot
	Reason string    `json:"reason"`
	At     time.Time `json:"at"`
	Told   bool      `json:"told"` // there has been an event of it
}

// State is what is known of the agent's programs across starts.
type State struct {
	Format int    `json:"format"` // 1
	Good   string `json:"good"`   // slot that has proved itself; "": the installed program
	Trying string `json:"trying"` // slot that is to prove itself; "": none
	Tries  int    `json:"tries"`  // starts of that one
	// How it was before the last change of programs.
	Linked bool     `json:"linked"` // the controller was reached
	Served []string `json:"served"` // models that were served

	Slots map[string]Slot `json:"slots"` // by name: "a" and "b"
	Bad   []Bad           `json:"bad"`   // oldest first
}

const stateFormat = 1

var slotNames = []string{"a", "b"}

// Read reads the state in a folder of programs. A file that is not there, or
// is not one of this program's, is a state in which the installed one runs.
func Read(dir string) (*State, error) {
	fresh := &State{Format: stateFormat, Slots: map[string]Slot{}}
	info, err := os.Stat(filepath.Join(dir, stateFile))
	if errors.Is(err, fs.ErrNotExist) {
		return fresh, nil
	} else if err != nil {
		return fresh, err
	}
	if info.Size() > maxState {
		return fresh, fmt.Errorf("%s has %d bytes, the limit is %d", stateFile, info.Size(), maxState)
	}
	raw, err := os.ReadFile(filepath.Join(dir, stateFile))
	if err != nil {
		return fresh, err
	}
	s, err := parse(raw)
	if err != nil {
		return fresh, fmt.Errorf("%s: %w", stateFile, err)
	}
	return s, nil
}

// parse reads a state and refuses one that does not hold together.
func parse(raw []byte) (*State, error) {
	s := &State{}
	if err := json.Unmarshal(raw, s); err != nil {
		return nil, err
	}
	if s.Format != stateFormat {
		return nil, fmt.Errorf("has format %d, this program reads %d", s.Format, stateFormat)
	}
	if s.Slots == nil {
		s.Slots = map[string]Slot{}
	}
	for name := range s.Slots {
		if !slices.Contains(slotNames, name) {
			return nil, fmt.Errorf("names slot %.20q, there are a and b", name)
		}
	}
	for _, name := range []string{s.Good, s.Trying} {
		if _, ok := s.Slots[name]; name != "" && !ok {
			return nil, fmt.Errorf("has nothing in slot %.20q", name)
		}
	}
	if s.Trying != "" && s.Trying == s.Good {
		return nil, fmt.Errorf("tries slot %s, which has proved itself", s.Trying)
	}
	if len(s.Bad) > maxBad || len(s.Served) > maxModels || s.Tries < 0 {
		return nil, fmt.Errorf("has %d bad releases, %d models and %d tries, the limits are %d, %d and none below 0", len(s.Bad), len(s.Served), s.Tries, maxBad, maxModels)
	}
	return s, nil
}

// Write makes s the state of the folder, on disk when it returns.
func (s *State) Write(dir string) error {
	s.Format = stateFormat
	raw, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	next := filepath.Join(dir, stateFile+".new")
	f, err := os.OpenFile(next, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(append(raw, '\n'))
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(next, filepath.Join(dir, stateFile))
	}
	if err == nil {
		err = syncFolder(dir)
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", stateFile, err)
	}
	return nil
}

// clone gives a copy that can be changed.
func (s *State) clone() *State {
	c := *s
	c.Served, c.Slots, c.Bad = slices.Clone(s.Served), maps.Clone(s.Slots), slices.Clone(s.Bad)
	return &c
}

// syncFolder makes the names in a folder durable.
func syncFolder(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// bad finds the release with a bundle's digest among those that were left.
func (s *State) bad(digest string) (Bad, bool) {
	i := slices.IndexFunc(s.Bad, func(b Bad) bool { return b.Digest == digest })
	if i < 0 {
		return Bad{}, false
	}
	return s.Bad[i], true
}

// revert leaves the release that is tried, for good.
func (s *State) revert(reason string, now time.Time) {
	left := s.Slots[s.Trying]
	s.Bad = slices.DeleteFunc(s.Bad, func(b Bad) bool { return b.SHA256 == left.SHA256 })
	s.Bad = append(s.Bad, Bad{Slot: left, Reason: clip(reason), At: now.UTC()})
	s.Bad = s.Bad[max(0, len(s.Bad)-maxBad):]
	s.Trying, s.Tries = "", 0
}

// confirm has the release that is tried stay.
func (s *State) confirm() { s.Good, s.Trying, s.Tries = s.Trying, "", 0 }

// free gives the slot that a release may be put into: not the one that has
// proved itself. Nothing may be tried then.
func (s *State) free() string {
	if s.Good == slotNames[0] {
		return slotNames[1]
	}
	return slotNames[0]
}

// forgive forgets what was left, but the release that is wanted: one that is
// wanted anew is tried anew.
func (s *State) forgive(digest string) {
	s.Bad = slices.DeleteFunc(s.Bad, func(b Bad) bool { return b.Digest != digest && b.Told })
}

func clip(reason string) string { return reason[:min(len(reason), maxReason)] }

// start decides what the installed program, of the given version, starts: a
// slot, or "" for itself. May says why the program in a slot must not be
// started; stuck, that the last start of the one that is tried was ended by its
// watcher.
func (s *State) start(installed string, stuck bool, may func(slot string, trying bool) error, now time.Time) string {
	newer := func(slot string) bool { return models.CompareReleases(s.Slots[slot].Version, installed) > 0 }
	if s.Trying != "" {
		switch {
		case !newer(s.Trying): // a package has been installed meanwhile
			s.Trying, s.Tries = "", 0
		case stuck:
			s.revert("it neither proved itself in time nor ended", now)
		case s.Tries >= MaxTries:
			s.revert(fmt.Sprintf("it ended %d times before it had proved itself", s.Tries), now)
		default:
			err := may(s.Trying, true)
			if err == nil {
				s.Tries++
				return s.Trying
			}
			s.revert(fmt.Sprintf("it cannot be started: %v", err), now)
		}
	}
	if s.Good != "" {
		err := may(s.Good, false)
		if err == nil && newer(s.Good) {
			return s.Good
		}
		if err != nil { // it is fetched again where it is wanted
			delete(s.Slots, s.Good)
		}
		s.Good = ""
	}
	return ""
}
