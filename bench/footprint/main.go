// Command footprint measures what an agent without models and its controller
// cost a machine: memory, time to start, processor time while idle.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/dunlin/dunlin/internal/e2e"
)

func main() {
	starts := flag.Int("starts", 7, "how often the agent is started; the median counts")
	idle := flag.Duration("idle", 30*time.Second, "how long the idle agent is watched")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, *starts, *idle); err != nil {
		fmt.Fprintln(os.Stderr, "footprint:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, starts int, idle time.Duration) (err error) {
	root, err := e2e.Root()
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "dunlin-footprint-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	library, err := e2e.RuntimeLibrary(ctx, root, os.Stderr)
	if err != nil {
		return err
	}
	fmt.Fprintln(os.Stderr, "building the programs")
	programs, err := e2e.Build(ctx, root, dir)
	if err != nil {
		return err
	}
	fleet, err := e2e.NewFleet(programs, dir, library)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, fleet.Stop()) }()
	if err := fleet.StartController(ctx); err != nil {
		return err
	}
	token, err := fleet.JoinTokenFile(ctx, "footprint")
	if err != nil {
		return err
	}
	listen, err := e2e.FreeAddress()
	if err != nil {
		return err
	}
	args := []string{"--data", filepath.Join(dir, "agent"), "--controller", fleet.DeviceURL(), "--join-token", "@" + token, "--name", "footprint",
		"--listen", listen, "--grpc-listen", "127.0.0.1:0", "--runtime-lib", library}
	var took []time.Duration
	var agent *e2e.Process
	// The first start joins, and is not counted.
	for i := range starts + 1 {
		if agent != nil {
			if err := agent.Stop(); err != nil {
				return fmt.Errorf("stop the agent: %w\n%s", err, agent.LogTail(20))
			}
		}
		began := time.Now()
		agent, err = e2e.Start("agent", filepath.Join(dir, "agent.log"), nil, programs.Agent, args...)
		if err != nil {
			return err
		}
		ready := untilReady(ctx, agent, "http://"+listen+"/v2/health/ready")
		if ready == nil && i > 0 {
			took = append(took, time.Since(began))
		}
		if ready == nil {
			ready = untilConnected(ctx, fleet)
		}
		if ready != nil {
			return errors.Join(fmt.Errorf("%w\n%s", ready, agent.LogTail(20)), agent.Stop())
		}
	}
	defer func() { err = errors.Join(err, agent.Stop()) }()
	slices.Sort(took)

	fmt.Fprintf(os.Stderr, "watching the idle agent for %s\n", idle)
	if err := sleep(ctx, 5*time.Second); err != nil { // what follows a start dies down
		return err
	}
	pids, err := family(agent.PID())
	if err != nil {
		return err
	}
	if len(pids) != 2 {
		return fmt.Errorf("the agent has processes %v, want itself and one worker", pids)
	}
	before, err := processorTime(pids)
	if err != nil {
		return err
	}
	began := time.Now()
	if err := sleep(ctx, idle); err != nil {
		return err
	}
	after, err := processorTime(pids)
	if err != nil {
		return err
	}
	cpu := 100 * (after - before).Seconds() / time.Since(began).Seconds()
	agentMemory, err := measure(pids...)
	if err != nil {
		return err
	}
	controllerMemory, err := measure(fleet.Controller.PID())
	if err != nil {
		return err
	}

	fmt.Printf("machine: %s; %s\n", e2e.Machine(), time.Now().UTC().Format(time.DateOnly))
	for _, pid := range pids {
		m, err := measure(pid)
		if err != nil {
			return err
		}
		fmt.Printf("process %d (%s): RSS %s, anonymous %s\n", pid, command(pid), megabytes(m.rss()), megabytes(m.anonymous))
	}
	fmt.Printf("agent and worker together, pages of files that both map counted once: RSS %s\n", megabytes(agentMemory.rss()))
	fmt.Printf("exec to ready, %d starts: %s\n", len(took), took)
	fmt.Printf("footprint: agent_rss_mb=%.1f controller_rss_mb=%.1f agent_start_ms=%.0f agent_idle_cpu_pct=%.2f agent_anon_mb=%.1f\n",
		mb(agentMemory.rss()), mb(controllerMemory.rss()), float64(took[len(took)/2])/1e6, cpu, mb(agentMemory.anonymous))
	return nil
}

func mb(bytes int64) float64 { return float64(bytes) / 1e6 }

func megabytes(bytes int64) string { return fmt.Sprintf("%.1f MB", mb(bytes)) }

// untilReady asks every few milliseconds: the answer is as exact as that.
func untilReady(ctx context.Context, p *e2e.Process, url string) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	for {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
		if err != nil {
			return err
		}
		resp, err := http.DefaultClient.Do(req)
		if err == nil {
			resp.Body.Close()
			if resp.StatusCode == http.StatusOK {
				return nil
			}
			err = errors.New(resp.Status)
		}
		select {
		case <-p.Done():
			return errors.New("the agent ended")
		case <-ctx.Done():
			return fmt.Errorf("not ready: %w", err)
		case <-time.After(3 * time.Millisecond):
		}
	}
}

// untilConnected waits until the controller has the device's session.
func untilConnected(ctx context.Context, fleet *e2e.Fleet) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	for {
		out, err := fleet.CLI(ctx, "get", "devices", "-o", "json")
		if err == nil && strings.Contains(out, `"connected": true`) {
			return nil
		}
		if err := sleep(ctx, 50*time.Millisecond); err != nil {
			return fmt.Errorf("not connected: %w: %s", err, out)
		}
	}
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(d):
		return nil
	}
}
