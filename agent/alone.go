package agent

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/dunlin/dunlin/agent/engine"
	"github.com/dunlin/dunlin/agent/repository"
	"github.com/dunlin/dunlin/agent/worker"
	"github.com/dunlin/dunlin/internal/program"
)

// Alone configures an agent that serves without a controller.
type Alone struct {
	Serving    `yaml:",inline"`
	Data       string   `yaml:"data"`             // folder for what is given over the network; a temporary one where empty
	File       string   `yaml:"model"`            // the one model; or
	Repository string   `yaml:"model-repository"` // a folder of models in Triton's layout
	Control    string   `yaml:"model-control"`    // none, explicit or poll
	Load       []string `yaml:"load-model"`       // explicit: what to load at start; "*": everything
	Poll       int      `yaml:"poll-seconds"`     // how often the repository is looked at
}

// controls are the ways in which a repository is followed.
var controls = map[string]repository.Control{"none": repository.None, "explicit": repository.Explicit, "poll": repository.Poll}

// maxPoll bounds Alone.Poll.
const maxPoll = 24 * 60 * 60

// ParseAlone is ParseConfig for an agent without a controller.
func ParseAlone(args []string, getenv func(string) string, help io.Writer) (Alone, error) {
	cfg := Alone{Control: "none", Poll: 15}
	var load []string
	err := program.Source{
		Program: "dunlin-agent serve", Synopsis: "[model.onnx]", Notes: "Serves one model, or a folder of models in Triton's layout, without a controller.\n" + commands, Prefix: "DUNLIN_AGENT_",
		Args: args, Getenv: getenv, Help: help,
		Arguments: func(files []string) error {
			if len(files) > 1 {
				return fmt.Errorf("unexpected argument %q: one model, or --model-repository", files[1])
			}
			if len(files) == 1 {
				cfg.File = files[0]
			}
			return nil
		},
	}.Load(append([]program.Setting{
		{Name: "model-repository", Usage: "`folder` of models in Triton's layout", Value: &cfg.Repository},
		{Name: "model-control", Usage: "`mode`: none loads everything at start; explicit, what --load-model names and clients ask for; poll, what is in the folder", Value: &cfg.Control},
		{Name: "poll-seconds", Usage: "`seconds` between two looks at the folder, where it is polled", Value: &cfg.Poll},
		{Name: "data", Usage: "`folder` for models that clients bring along; without one, a temporary one", Value: &cfg.Data},
	}, cfg.settings()...), &cfg, func(flags *flag.FlagSet) {
		flags.Func("load-model", "`name` of a model to load at start, where control is explicit; * for all; may be repeated", func(s string) error {
			load = append(load, s)
			return nil
		})
	})
	if errors.Is(err, flag.ErrHelp) {
		return cfg, err
	}
	if load != nil {
		cfg.Load = load
	}
	if faults := cfg.check(); faults != nil {
		err = errors.Join(err, fmt.Errorf("%w: %w", program.ErrUsage, faults))
	}
	return cfg, err
}

// check completes the settings and reports what is wrong with them.
func (cfg *Alone) check() error {
	var errs []error
	add := func(name string, err error) {
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", name, err))
		}
	}
	cfg.Serving.check(add)
	if (cfg.File == "") == (cfg.Repository == "") {
		errs = append(errs, errors.New("name one model file, or a folder by --model-repository"))
	}
	if _, ok := controls[cfg.Control]; !ok {
		add("model-control", fmt.Errorf("%q is not none, explicit or poll", cfg.Control))
	}
	if len(cfg.Load) > 0 && cfg.Control != "explicit" {
		add("load-model", errors.New("has a meaning with --model-control explicit only"))
	}
	if cfg.Poll < 1 || cfg.Poll > maxPoll {
		add("poll-seconds", fmt.Errorf("is %d, allowed are 1 to %d", cfg.Poll, maxPoll))
	}
	for name, path := range map[string]*string{"model": &cfg.File, "model-repository": &cfg.Repository, "data": &cfg.Data} {
		if *path != "" {
			var err error
			*path, err = filepath.Abs(*path)
			add(name, err)
		}
	}
	return errors.Join(errs...)
}

// ServeMain parses args and serves without a controller.
func ServeMain(ctx context.Context, args []string, getenv func(string) string, help io.Writer) error {
	cfg, err := ParseAlone(args, getenv, help)
	if errors.Is(err, flag.ErrHelp) {
		return nil
	} else if err != nil {
		return err
	}
	tune(getenv)
	return Serve(ctx, cfg)
}

// Serve serves the models of a folder, or one model, without a controller,
// until ctx is done, and gives nil then, or until a part of it fails.
func Serve(ctx context.Context, cfg Alone) (err error) {
	if cfg.Data == "" {
		var err error
		if cfg.Data, err = os.MkdirTemp("", "dunlin-agent-*"); err != nil {
			return fmt.Errorf("data folder: %w", err)
		}
		defer func() { err = errors.Join(err, os.RemoveAll(cfg.Data)) }()
	} else if err := os.MkdirAll(cfg.Data, 0o700); err != nil {
		return fmt.Errorf("data folder: %w", err)
	}
	lock, err := program.LockFolder(cfg.Data)
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := cfg.simulate(); err != nil {
		return err
	}
	defer cfg.openMachine(cfg.Data)()
	class, err := cfg.classify(ctx, cfg.machine.Info())
	if err != nil {
		return err
	}
	profile := class.Profile
	cfg.sampleBy(profile)
	l, err := listen(&cfg.Serving)
	if err != nil {
		return err
	}
	defer l.close()
	w := cfg.Serving.workerConfig(profile.Threads)
	staging := filepath.Join(cfg.Data, "overrides")
	w.Folders = []string{staging}
	if cfg.Repository != "" {
		w.Folders = append(w.Folders, cfg.Repository)
	}
	w.OnDeath = func(d worker.Death) { cfg.Log.Error("worker process died", "error", d.Err, "in_flight", d.InFlight) }
	var models *repository.Repository
	w.OnLost = func(id engine.VersionID, reason error) { models.Lost(id, reason) }
	h, err := newHost(cfg.Serving, profile, cfg.Data, w)
	if err != nil {
		return err
	}
	models, err = repository.New(repository.Config{
		Dir: cfg.Repository, File: cfg.File, Control: controls[cfg.Control], Startup: cfg.Load, Poll: time.Duration(cfg.Poll) * time.Second,
		Staging: staging, Engine: h.engine, Check: h.check, Front: h.front, Log: cfg.Log,
	})
	if err != nil {
		return err
	}
	h.source = models
	watch := h.newWatch(cfg.machine, profile, nil)
	return h.run(ctx, l, h.metrics(l, watch), part{"alarms", watch.run}, part{"models", models.Run})
}
