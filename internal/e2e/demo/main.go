// Command demo shows the main job on one machine: a model pushed from the
// command line answers on a device, and version 2 replaces version 1.
package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/dunlin/dunlin/internal/e2e"
	"github.com/dunlin/dunlin/models/examples/digits"
)

func main() {
	stay := flag.Bool("stay", false, "go on running, until interrupted, after the last step")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	d := &demo{out: os.Stdout, began: time.Now()}
	err := d.run(ctx, *stay)
	if d.fleet != nil {
		err = errors.Join(err, d.fleet.Stop())
	}
	if err != nil {
		d.explain(err)
		os.Exit(1)
	}
	_ = os.RemoveAll(d.dir)
}

type demo struct {
	out   io.Writer
	dir   string
	fleet *e2e.Fleet
	step  string
	began time.Time
	times []string
	show  []int // which images are drawn
}

// do runs one step, with a line before and the time it took after.
func (d *demo) do(name string, f func() error) error {
	d.step = name
	fmt.Fprintf(d.out, "==> %s\n", name)
	start := time.Now()
	err := f()
	d.times = append(d.times, fmt.Sprintf("%8.2f s  %s", time.Since(start).Seconds(), name))
	return err
}

// explain says which step failed, and why, with the ends of the logs.
func (d *demo) explain(err error) {
	fmt.Fprintf(os.Stderr, "\nFAILED at step %q: %v\n", d.step, err)
	if d.fleet == nil {
		return
	}
	processes := []*e2e.Process{d.fleet.Controller}
	for _, a := range d.fleet.Agents {
		processes = append(processes, a.Process)
	}
	for _, p := range processes {
		if p != nil {
			fmt.Fprintf(os.Stderr, "\n--- end of %s ---\n%s\n", p.Log, p.LogTail(20))
		}
	}
}

const documents = `apiVersion: dunlin/v1
kind: Deployment
metadata: {name: digits}
spec:
  model: digits
  version: %d
  selector: {site: demo}
---
apiVersion: dunlin/v1
kind: Route
metadata: {name: read-digit}
spec:
  targets:
    - {model: digits, weight: 100}
`

func (d *demo) run(ctx context.Context, stay bool) error {
	root, err := e2e.Root()
	if err != nil {
		return err
	}
	if d.dir, err = os.MkdirTemp("", "dunlin-demo-"); err != nil {
		return err
	}
	var runtime string
	var programs e2e.Programs
	var agent *e2e.Agent
	accuracy := map[int]float64{}

	steps := []struct {
		name string
		do   func() error
	}{
		{"get the ONNX Runtime library", func() error {
			runtime, err = e2e.RuntimeLibrary(ctx, root, os.Stderr)
			return err
		}},
		{"build dunlin, dunlin-controller and dunlin-agent", func() error {
			programs, err = e2e.Build(ctx, root, filepath.Join(root, "bin"), "-trimpath")
			return err
		}},
		{"start a controller (registry, MQTT broker, SQLite)", func() error {
			if d.fleet, err = e2e.NewFleet(programs, d.dir, runtime); err != nil {
				return err
			}
			return d.fleet.StartController(ctx)
		}},
		{"start an agent, which joins with a one-time token", func() error {
			agent, err = d.fleet.StartAgent(ctx, "demo-device", "--label", "site=demo")
			return err
		}},
		{"push digits version 1 (a linear classifier)", func() error {
			return d.cli(ctx, "push", filepath.Join(root, "models/examples/digits/v1.onnx"), "digits:1")
		}},
		{"apply a Deployment and a Route", func() error { return d.apply(ctx, 1) }},
		{"wait until the device serves version 1", func() error { return d.wait(ctx) }},
		{"classify 600 held-out images on the device", func() error { return d.classify(ctx, agent, 1, accuracy) }},
		{"push digits version 2 (a convolutional net)", func() error {
			return d.cli(ctx, "push", filepath.Join(root, "models/examples/digits/v2.onnx"), "digits:2")
		}},
		{"roll version 2 out", func() error { return cmp.Or(d.apply(ctx, 2), d.wait(ctx)) }},
		{"classify the same images again", func() error { return d.classify(ctx, agent, 2, accuracy) }},
	}
	for _, s := range steps {
		if err := d.do(s.name, s.do); err != nil {
			return err
		}
	}
	fmt.Fprintf(d.out, "\nHow long each step took:\n%s\n%8.2f s  in all\n", strings.Join(d.times, "\n"), time.Since(d.began).Seconds())
	fmt.Fprintf(d.out, "\nVersion 1 read %.1f %% of the held-out digits, version 2 reads %.1f %%.\n", 100*accuracy[1], 100*accuracy[2])
	if accuracy[2] <= accuracy[1] {
		return fmt.Errorf("version 2 is not better than version 1: %.4f <= %.4f", accuracy[2], accuracy[1])
	}
	if stay {
		return d.stay(ctx, agent)
	}
	return nil
}

// cli shows a command, runs it and shows what it prints.
func (d *demo) cli(ctx context.Context, args ...string) error {
	shown := strings.Join(args, " ")
	if root, err := e2e.Root(); err == nil {
		shown = strings.ReplaceAll(shown, root+"/", "")
	}
	fmt.Fprintf(d.out, "    $ dunlin %s\n", shown)
	out, err := d.fleet.CLI(ctx, args...)
	for line := range strings.Lines(out) {
		fmt.Fprintf(d.out, "    %s", line)
	}
	return err
}

func (d *demo) apply(ctx context.Context, version int) error {
	file := filepath.Join(d.dir, fmt.Sprintf("digits-%d.yaml", version))
	if err := os.WriteFile(file, fmt.Appendf(nil, documents, version), 0o600); err != nil {
		return err
	}
	return d.cli(ctx, "apply", "-f", file)
}

func (d *demo) wait(ctx context.Context) error {
	return d.cli(ctx, "rollout", "status", "digits", "--wait", "--timeout", "60s")
}

// classify sends the held-out images to the agent's own port, shows some and counts how many are right.
func (d *demo) classify(ctx context.Context, agent *e2e.Agent, version int, accuracy map[int]float64) error {
	images, labels := digits.HeldOut()
	answer, err := e2e.Classify(ctx, agent.URL, "read-digit", images)
	if err != nil {
		return err
	}
	if want := fmt.Sprint(version); answer.Model != "digits" || answer.Version != want {
		return fmt.Errorf("digits:%s should have answered, %s:%s did", want, answer.Model, answer.Version)
	}
	right := 0
	var easy, hard []int
	for i := range labels {
		if int(answer.Labels[i]) == labels[i] {
			right++
			easy = append(easy, i)
		} else {
			hard = append(hard, i)
		}
	}
	if d.show == nil { // the same images for both versions: some that the first one cannot read
		d.show = append(slices.Clone(hard[:min(len(hard), 3)]), easy[:min(len(easy), 3)]...)
	}
	d.draw(images, answer.Labels, labels)
	accuracy[version] = float64(right) / float64(len(labels))
	fmt.Fprintf(d.out, "    digits:%d read %d of %d images right: accuracy %.1f %%\n", version, right, len(labels), 100*accuracy[version])
	return nil
}

// draw shows images side by side, and below each what was predicted and what is true.
func (d *demo) draw(images [][64]float32, predicted []int64, labels []int) {
	const shades = " .:-=+*#%@"
	for row := range 8 {
		fmt.Fprint(d.out, "    ")
		for _, i := range d.show {
			for _, v := range images[i][row*8 : row*8+8] {
				c := shades[min(int(v)*len(shades)/17, len(shades)-1)]
				fmt.Fprintf(d.out, "%c%c", c, c)
			}
			fmt.Fprint(d.out, "  ")
		}
		fmt.Fprintln(d.out)
	}
	fmt.Fprint(d.out, "    ")
	for _, i := range d.show {
		mark := ' '
		if int(predicted[i]) != labels[i] {
			mark = '!'
		}
		fmt.Fprintf(d.out, "%-18s", fmt.Sprintf("said %d, is %d %c", predicted[i], labels[i], mark))
	}
	fmt.Fprintln(d.out)
}

// stay prints where everything listens, and waits until it is interrupted.
func (d *demo) stay(ctx context.Context, agent *e2e.Agent) error {
	fmt.Fprintf(d.out, `
Controller  %s
Registry    %s/v2/
Broker      mqtts://%s
Device      %s/v2/models/read-digit

To steer it from another terminal:
    export DUNLIN_URL=%s DUNLIN_TOKEN=%s
    bin/dunlin get devices

Press Ctrl-C to stop; all data in %s goes with it.
`, d.fleet.URL, d.fleet.URL, d.fleet.MQTT, agent.URL, d.fleet.URL, d.fleet.Token, d.dir)
	select {
	case <-ctx.Done():
		return nil
	case <-d.fleet.Controller.Done():
		return errors.New("the controller ended")
	case <-agent.Done():
		return errors.New("the agent ended")
	}
}
