package repository

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"github.com/dunlin/dunlin/agent/engine"
	"github.com/dunlin/dunlin/agent/oip"
)

// step is one thing that happens.
type step struct {
	Do      string // see perform
	Model   string
	Version int64
	Text    string // configuration
	Content byte   // of a model
	Files   bool   // a load brings files along
	Call    string // that fails
	Times   int    // that it fails
	Passing bool   // the runtime is at fault
	Alone   bool   // nothing else happens until it is over
	Wait    time.Duration
}

func steps(control Control) *rapid.Generator[step] {
	do := []string{"write", "break", "configure", "remove version", "remove model", "fail", "lose", "wait"}
	if control == Explicit {
		do = append(do, "load", "load", "bring", "unload")
	}
	return rapid.Custom(func(t *rapid.T) step {
		s := step{
			Do: rapid.SampledFrom(do).Draw(t, "do"), Model: rapid.SampledFrom([]string{"a", "b"}).Draw(t, "model"),
			Version: rapid.Int64Range(1, 3).Draw(t, "version"), Alone: rapid.Bool().Draw(t, "alone"),
		}
		switch s.Do {
		case "write":
			s.Content = rapid.Byte().Draw(t, "content")
		case "configure":
			s.Text = rapid.SampledFrom([]string{
				"", "version_policy { all {} }", "version_policy { latest { num_versions: 2 } } max_batch_size: 4",
				"version_policy { specific { versions: [ 1, 2 ] } }", "backend: \"python\"", "broken",
			}).Draw(t, "configuration")
		case "bring":
			s.Files, s.Content = rapid.Bool().Draw(t, "files"), rapid.Byte().Draw(t, "content")
			s.Text = rapid.SampledFrom([]string{`{}`, `{"max_batch_size": 8}`, `{"version_policy": {"all": {}}}`, `{"foo": 1}`}).Draw(t, "configuration")
		case "fail":
			s.Call, s.Times = rapid.SampledFrom([]string{"check", "load", "replace", "unload"}).Draw(t, "call"), rapid.IntRange(1, 3).Draw(t, "times")
			s.Passing = rapid.Bool().Draw(t, "passing")
		case "wait":
			s.Wait = rapid.SampledFrom([]time.Duration{time.Millisecond, 10 * time.Second, time.Minute}).Draw(t, "time")
		}
		return s
	})
}

// TestRandom changes the folder, loads, unloads, brings files, loses versions
// and lets the engine fail, at random and several at a time. Whenever all is
// quiet, the index, what serves and the folders of callers agree with what the
// engine holds; and never is what serves not loaded.
func TestRandom(t *testing.T) {
	for control, what := range map[Control]string{Explicit: "explicit", Poll: "poll"} {
		t.Run(what, func(t *testing.T) {
			rapid.Check(t, func(rt *rapid.T) {
				all := rapid.SliceOfN(steps(control), 1, 40).Draw(rt, "steps")
				var err error
				synctest.Test(t, func(*testing.T) { err = random(control, newFake(), all) })
				if err != nil {
					rt.Fatal(err)
				}
			})
		})
	}
}

func random(control Control, fake *fake, all []step) (err error) {
	top, err := os.MkdirTemp("", "repository-*")
	if err != nil {
		return err
	}
	defer os.RemoveAll(top)
	dir := filepath.Join(top, "models")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	r, err := New(Config{
		Dir: dir, Control: control, Poll: 10 * time.Second, Staging: filepath.Join(top, "staging"),
		Engine: fake, Check: fake.Check, Front: fake,
	})
	if err != nil {
		return err
	}
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	<-r.running
	p := &performer{Repository: r, fake: fake, dir: dir}
	defer func() {
		p.calls.Wait()
		stop()
		err = errors.Join(err, <-done)
	}()
	for n, s := range all {
		err := p.perform(ctx, s)
		synctest.Wait()
		if err == nil {
			err = settled(r, fake)
		}
		if err != nil {
			return fmt.Errorf("step %d, %+v: %w", n, s, err)
		}
	}
	fake.setFail(nil)
	p.calls.Wait()
	time.Sleep(2 * lastRetry)
	synctest.Wait()
	return settled(r, fake)
}

// performer carries out steps.
type performer struct {
	*Repository
	fake  *fake
	dir   string
	calls sync.WaitGroup
}

func (p *performer) perform(ctx context.Context, s step) error {
	id := engine.VersionID{Model: s.Model, Version: s.Version}
	version := filepath.Join(p.dir, s.Model, strconv.FormatInt(s.Version, 10))
	switch s.Do {
	case "write":
		return place(filepath.Join(version, "model.onnx"), modelBytes(s.Content))
	case "break":
		return place(filepath.Join(version, "model.onnx"), []byte("broken"))
	case "configure":
		return place(filepath.Join(p.dir, s.Model, "config.pbtxt"), []byte(s.Text))
	case "remove version":
		return os.RemoveAll(version)
	case "remove model":
		return os.RemoveAll(filepath.Join(p.dir, s.Model))
	case "fail":
		failure := errors.New("failure")
		if s.Passing {
			failure = engine.ErrUnavailable
		}
		p.fake.mu.Lock()
		defer p.fake.mu.Unlock()
		next, times := p.fake.fail, s.Times
		p.fake.fail = func(op string, i engine.VersionID) error {
			p.fake.mu.Lock()
			fails := op == s.Call && i == id && times > 0
			if fails {
				times--
			}
			p.fake.mu.Unlock()
			switch {
			case fails:
				return failure
			case next != nil:
				return next(op, i)
			}
			return nil
		}
	case "lose":
		p.fake.mu.Lock()
		if c, ok := p.fake.loaded[id]; ok {
			id = c.id
		}
		p.fake.mu.Unlock()
		p.Lost(id, errors.New("lost"))
	case "wait":
		time.Sleep(s.Wait)
	case "load":
		p.call(s, func() error { return p.Load(ctx, s.Model, oip.Override{}) })
	case "bring":
		o := oip.Override{Config: []byte(s.Text)}
		if s.Files {
			o.Files = map[string][]byte{fmt.Sprintf("%d/model.onnx", s.Version): modelBytes(s.Content)}
		}
		p.call(s, func() error { return p.Load(ctx, s.Model, o) })
	case "unload":
		p.call(s, func() error { return p.Unload(ctx, s.Model) })
	}
	return nil
}

// call makes a call, whose failures are expected but for internal ones.
func (p *performer) call(s step, f func() error) {
	p.calls.Go(func() {
		if err := f(); err != nil && oip.CodeOf(err) == oip.Internal {
			p.fake.mu.Lock()
			defer p.fake.mu.Unlock()
			p.fake.faults = append(p.fake.faults, "an internal error: "+err.Error())
		}
	})
	if s.Alone {
		p.calls.Wait()
	}
}

// settled compares what the repository says with what the engine holds, where
// nothing is at work or waits to try again.
func settled(r *Repository, fake *fake) error {
	fake.mu.Lock()
	if fake.faults != nil {
		defer fake.mu.Unlock()
		return errors.New(strings.Join(fake.faults, "; "))
	}
	serving := maps.Clone(fake.serving)
	brought := map[string]bool{}
	for _, c := range fake.loaded {
		if strings.HasPrefix(c.spec.Dir, r.cfg.Staging) {
			brought[filepath.Dir(c.spec.Dir)] = true
		}
	}
	fake.mu.Unlock()
	r.mu.Lock()
	for name, m := range r.models {
		switch {
		case m.busy || len(m.turn) > 0 || m.calls > 0:
			r.mu.Unlock()
			return nil
		case m.wanted && m.serves == 0 && m.why() == "is not loaded":
			r.mu.Unlock()
			return fmt.Errorf("%s does not serve, for no reason", name)
		}
	}
	r.mu.Unlock()
	list, err := r.Index(context.Background())
	if err != nil {
		return err
	}
	var ready []string
	highest := map[string]int64{}
	for _, m := range list {
		switch m.State {
		case stateReady:
			ready = append(ready, m.Name+":"+m.Version)
			n, _ := strconv.ParseInt(m.Version, 10, 64)
			highest[m.Name] = max(highest[m.Name], n)
		case stateUnavailable:
			if m.Reason == "" {
				return fmt.Errorf("%s:%s is unavailable for no reason", m.Name, m.Version)
			}
		case stateLoading, stateUnloading:
			return fmt.Errorf("%s:%s is %s, and nothing is at work", m.Name, m.Version, m.State)
		}
	}
	if got := fake.versions(); got != strings.Join(ready, " ") {
		return fmt.Errorf("ready are %v, the engine holds %s", ready, got)
	}
	if fmt.Sprint(serving) != fmt.Sprint(highest) {
		return fmt.Errorf("%v serves, ready are %v", serving, ready)
	}
	entries, err := os.ReadDir(r.cfg.Staging)
	if err != nil {
		return err
	}
	if len(entries) != len(brought) {
		return fmt.Errorf("%d folders of callers are there, %d are needed", len(entries), len(brought))
	}
	if n := r.pending.Load(); n != 0 {
		return fmt.Errorf("%d calls are pending", n)
	}
	return nil
}
