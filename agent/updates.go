package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/dunlin/dunlin/agent/update"
	"github.com/dunlin/dunlin/internal/link"
	"github.com/dunlin/dunlin/internal/program"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// Bounds of Config.UpdateProbation, in seconds, and what it is where nobody
// says.
const (
	maxProbation     = 3600
	defaultProbation = 60
	// probationLimit is how many times as long as that a release may take to
	// prove itself.
	probationLimit = 10
	// simulatedTake is how long a simulated device takes for each half of an
	// update.
	simulatedTake = 2 * time.Second
)

// updater is what brings the agent program to the release that is wanted.
type updater interface {
	Want(*dunlinv1.DesiredAgent)
	Retry()
	TrustChanged()
	Status() *dunlinv1.AgentStatus
	Changed() <-chan struct{}
	Run(context.Context) error
}

// newUpdater gives the device's.
func (a *agent) newUpdater() (updater, error) {
	if d := a.cfg.sim; d != nil {
		u := update.NewSimulated(program.Version())
		u.Take, u.Event = simulatedTake, a.event
		u.Became = func(version string) {
			a.follow.Describe(func(info *dunlinv1.DeviceInfo) { info.AgentVersion = version })
		}
		u.Bad = func(string) string {
			if d.BadRelease() {
				return "the script of the simulated device says so"
			}
			return ""
		}
		return u, nil
	}
	started, err := update.From(os.Getenv, program.Version())
	if err != nil {
		return nil, fmt.Errorf("how the agent was started: %w", err)
	}
	probation := time.Duration(a.cfg.UpdateProbation) * time.Second
	u := update.New(update.Config{
		Dir: filepath.Join(a.cfg.Data, update.Folder), Started: started, Version: program.Version(),
		Fetch: func(ctx context.Context, want *dunlinv1.DesiredAgent, folder string, reuse []string, progress func(present, total uint64)) error {
			return a.follow.Reconcile.FetchProgram(ctx, want, folder, reuse, progress)
		},
		Admit: func(file string) (string, error) {
			b, err := admitBinary(a.follow.Trust(), file, a.follow.Identity.Now())
			return b.Version, err
		},
		Health: a.health, Event: a.event, Probation: probation, Limit: probationLimit * probation, Log: a.cfg.Log,
	})
	a.before = u.Served()
	return u, nil
}

// health says how the agent does, for a release that is tried.
func (a *agent) health() update.Health {
	var h update.Health
	if l := a.follow.Link(); l != nil {
		s, _ := l.State()
		h.Linked = s == link.Connected
	}
	for _, v := range a.follow.Reconcile.Report().GetVersions() {
		if v.Serving {
			h.Served = append(h.Served, v.Model)
		}
		if v.Deployment != "" {
			h.Wanted = append(h.Wanted, v.Model)
		}
	}
	h.Worker = len(h.Wanted) == 0 || a.loads.Load() && a.worker.PID() != 0
	return h
}

// restart is the error of an agent that stops for another program to run.
type restart struct {
	kept []socket // its ports
}

func (*restart) Error() string { return update.ErrRestart.Error() }

// runUpdates follows which release is wanted; its error is a *restart.
func (a *agent) runUpdates(ctx context.Context) error {
	err := a.update.Run(ctx)
	if errors.Is(err, update.ErrRestart) {
		return &restart{}
	}
	return err
}

// awaitServed waits until the models are served that were before the agent
// changed its program, and are still wanted.
func (a *agent) awaitServed(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, holdTime)
	defer cancel()
	for ctx.Err() == nil {
		h := a.health()
		missing := slices.ContainsFunc(a.before, func(m string) bool {
			return slices.Contains(h.Wanted, m) && !slices.Contains(h.Served, m)
		})
		if a.follow.Reconcile.Report() != nil && !missing {
			return
		}
		sleep(ctx, holdEvery)
	}
}

// holdEvery is how often awaitServed looks.
const holdEvery = 5 * time.Millisecond
