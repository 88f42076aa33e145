package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/dunlin/dunlin/agent/state"
	"github.com/dunlin/dunlin/agent/update"
	"github.com/dunlin/dunlin/internal/program"
	"github.com/dunlin/dunlin/internal/strictyaml"
)

// launch becomes the release of the agent that is to run, or gives nil where
// that is this program. What goes wrong is said on warn, and no reason not to
// run.
func launch(ctx context.Context, args []string, getenv func(string) string, warn io.Writer) error {
	say := func(format string, args ...any) { fmt.Fprintf(warn, "dunlin-agent: "+format+"\n", args...) }
	started, err := update.From(getenv, program.Version())
	if err != nil {
		say("the installed program runs: %v", err)
		return nil
	}
	data, err := filepath.Abs(peek("data", args, getenv))
	if err != nil || started.Slot != "" || peek("sim-device", args, getenv) != "" {
		return nil
	}
	dir := filepath.Join(data, update.Folder)
	if _, err := os.Stat(dir); err != nil {
		return nil
	}
	lock, err := program.LockFolder(data) // released by exec
	if err != nil {
		return nil // whoever runs next says so
	}
	defer lock.Close()
	probation, err := strconv.Atoi(peek("update-probation", args, getenv))
	if err != nil || probation < 1 || probation > maxProbation {
		probation = defaultProbation
	}
	return update.Launcher{
		Dir: dir, Started: started, Warn: say,
		Admit: func(file string) error {
			store, err := state.Open(ctx, filepath.Join(data, stateFile), state.Limits{})
			if err != nil {
				return err
			}
			defer store.Close()
			_, err = verifyBinary(ctx, store, file, time.Now())
			return err
		},
		Limit: probationLimit * time.Duration(probation) * time.Second, Watch: []string{started.Launcher, "watch"},
	}.Launch(append([]string{started.Launcher}, os.Args[1:]...), os.Environ())
}

// peek gives one setting without judging the others: there may be some that
// only the release knows which is to be started.
func peek(name string, args []string, getenv func(string) string) string {
	value := getenv("DUNLIN_AGENT_" + strings.ToUpper(strings.ReplaceAll(name, "-", "_")))
	config := getenv("DUNLIN_AGENT_CONFIG")
	for i, arg := range args {
		flag, text, ok := strings.Cut(strings.TrimPrefix(strings.TrimPrefix(arg, "-"), "-"), "=")
		if !strings.HasPrefix(arg, "-") || flag != name && flag != "config" {
			continue
		}
		if !ok {
			if i+1 == len(args) {
				break
			}
			text = args[i+1]
		}
		if flag == name {
			value = text
		} else {
			config = text
		}
	}
	if value == "" && config != "" {
		file := map[string]any{}
		if raw, err := os.ReadFile(config); err == nil && strictyaml.Decode(raw, &file) == nil && file[name] != nil {
			value = fmt.Sprint(file[name])
		}
	}
	if value == "" && name == "data" {
		return defaultData(getenv)
	}
	return value
}

// relaunch becomes the installed program, which decides anew what runs. The
// sockets of the ports stay open.
func relaunch(getenv func(string) string, kept []socket) error {
	started, err := update.From(getenv, program.Version())
	if err != nil {
		return err
	}
	env, err := handOver(os.Environ(), kept)
	if err != nil {
		return err
	}
	if err := syscall.Exec(started.Launcher, append([]string{started.Launcher}, os.Args[1:]...), env); err != nil {
		return fmt.Errorf("start %s again: %w", started.Launcher, err)
	}
	return errors.New("unreachable")
}

// Watch looks after a release that is tried; the launcher starts it. It keeps no
// socket open that was handed over to the release.
func Watch(args []string) error {
	for _, s := range inherited() {
		s.file.Close()
	}
	return update.Watch(args)
}
