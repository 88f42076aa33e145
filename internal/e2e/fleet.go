package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
)

// Programs are the paths of the three programs.
type Programs struct {
	Agent, Controller, CLI string
}

// Build builds the programs into dir with the given build flags. The agent
// needs cgo; the others are built without it unless a flag needs it (-race).
func Build(ctx context.Context, root, dir string, flags ...string) (Programs, error) {
	p := Programs{Agent: filepath.Join(dir, "dunlin-agent"), Controller: filepath.Join(dir, "dunlin-controller"), CLI: filepath.Join(dir, "dunlin")}
	cgo := "CGO_ENABLED=0"
	for _, f := range flags {
		if f == "-race" {
			cgo = "CGO_ENABLED=1"
		}
	}
	for path, env := range map[string]string{p.Agent: "CGO_ENABLED=1", p.Controller: cgo, p.CLI: cgo} {
		args := append(append([]string{"build", "-C", root}, flags...), "-o", path, "./cmd/"+filepath.Base(path))
		if _, err := Run(ctx, []string{env}, "go", args...); err != nil {
			return Programs{}, err
		}
	}
	return p, nil
}

// RuntimeLibrary gives the path of the ONNX Runtime shared library, which it
// fetches where the machine does not have it. Progress goes to progress.
func RuntimeLibrary(ctx context.Context, root string, progress io.Writer) (string, error) {
	cmd := exec.CommandContext(ctx, "sh", filepath.Join(root, "agent/ort/fetch-runtime.sh"))
	cmd.Dir, cmd.Stderr = root, progress
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("fetch the ONNX Runtime library: %w", err)
	}
	return strings.TrimSpace(string(out)), nil
}

// Fleet is one controller and its agents on loopback, with their data in one
// folder. Its methods are for one goroutine.
type Fleet struct {
	Programs Programs
	Dir      string // holds data and logs
	Runtime  string // ONNX Runtime shared library

	// ControllerArgs are given to the controller beside those that say where
	// it keeps and serves things.
	ControllerArgs []string

	URL        string // of the controller
	MQTT       string // host:port of the broker
	EnrolMQTT  string // of the broker for devices that enrol, where it has a port of its own for them
	Token      string // the administrator's
	Controller *Process
	Agents     []*Agent
}

// Agent is one device.
type Agent struct {
	*Process
	Name string
	URL  string // of its inference port
	Data string
	args []string
}

// NewFleet chooses addresses; it starts nothing.
func NewFleet(programs Programs, dir, runtimeLibrary string) (*Fleet, error) {
	api, err := FreeAddress()
	if err != nil {
		return nil, err
	}
	mqtt, err := FreeAddress()
	if err != nil {
		return nil, err
	}
	return &Fleet{Programs: programs, Dir: dir, Runtime: runtimeLibrary, URL: "http://" + api, MQTT: mqtt}, nil
}

// DeviceURL is the controller's URL for devices, which always speak TLS.
func (f *Fleet) DeviceURL() string { return "https://" + strings.TrimPrefix(f.URL, "http://") }

// StartController starts the controller, the first time and after each end,
// with the same data, and waits until it answers.
func (f *Fleet) StartController(ctx context.Context) error {
	return f.startController(ctx, f.Programs.Controller, nil)
}

func (f *Fleet) controllerData() string { return filepath.Join(f.Dir, "controller") }

func (f *Fleet) startController(ctx context.Context, program string, env []string) error {
	data := f.controllerData()
	args := append([]string{"--data", data, "--listen", strings.TrimPrefix(f.URL, "http://"), "--mqtt-listen", f.MQTT}, f.ControllerArgs...)
	p, err := Start("controller", filepath.Join(f.Dir, "controller.log"), env, program, args...)
	if err != nil {
		return err
	}
	f.Controller = p
	if err := p.Wait(ctx, func(ctx context.Context) error { return get(ctx, f.URL+"/healthz") }); err != nil {
		return err
	}
	token, err := os.ReadFile(filepath.Join(data, "admin-token"))
	if err != nil {
		return err
	}
	f.Token = strings.TrimSpace(string(token))
	return nil
}

// JoinToken makes a join token for one device.
func (f *Fleet) JoinToken(ctx context.Context) (string, error) {
	out, err := f.CLI(ctx, "join-token", "create", "-o", "json")
	if err != nil {
		return "", err
	}
	var v struct {
		JoinToken string `json:"joinToken"`
	}
	if err := json.Unmarshal([]byte(out), &v); err != nil || v.JoinToken == "" {
		return "", fmt.Errorf("no join token in %q: %w", out, err)
	}
	return v.JoinToken, nil
}

// JoinTokenFile makes a file with a join token for one device, which an agent
// takes as --join-token @FILE.
func (f *Fleet) JoinTokenFile(ctx context.Context, device string) (string, error) {
	token, err := f.JoinToken(ctx)
	if err != nil {
		return "", err
	}
	path := filepath.Join(f.Dir, device+".join-token")
	return path, os.WriteFile(path, []byte(token+"\n"), 0o600)
}

// StartAgent starts a new device and waits until its port answers.
func (f *Fleet) StartAgent(ctx context.Context, name string, args ...string) (*Agent, error) {
	token, err := f.JoinTokenFile(ctx, name)
	if err != nil {
		return nil, err
	}
	listen, err := FreeAddress()
	if err != nil {
		return nil, err
	}
	a := &Agent{Name: name, URL: "http://" + listen, Data: filepath.Join(f.Dir, name)}
	a.args = append([]string{"--data", a.Data, "--controller", f.DeviceURL(), "--join-token", "@" + token, "--name", name,
		"--listen", listen, "--grpc-listen", "127.0.0.1:0", "--runtime-lib", f.Runtime}, args...)
	f.Agents = append(f.Agents, a)
	return a, f.RestartAgent(ctx, a)
}

// RestartAgent starts a device's agent again, which has ended, and waits until its port answers.
func (f *Fleet) RestartAgent(ctx context.Context, a *Agent) (err error) {
	if a.Process, err = Start(a.Name, filepath.Join(f.Dir, a.Name+".log"), nil, f.Programs.Agent, a.args...); err != nil {
		return err
	}
	return a.Wait(ctx, func(ctx context.Context) error { return get(ctx, a.URL+"/v2/health/live") })
}

// CLI runs the command line as the administrator and gives its stdout.
func (f *Fleet) CLI(ctx context.Context, args ...string) (string, error) {
	return Run(ctx, []string{"DUNLIN_URL=" + f.URL, "DUNLIN_TOKEN=" + f.Token, "XDG_CONFIG_HOME=" + f.Dir}, f.Programs.CLI, args...)
}

// Stop stops all processes, agents first.
func (f *Fleet) Stop() error {
	var errs []error
	for _, a := range f.Agents {
		if a.Process != nil {
			errs = append(errs, a.Stop())
		}
	}
	if f.Controller != nil {
		errs = append(errs, f.Controller.Stop())
	}
	return errors.Join(errs...)
}

func get(ctx context.Context, url string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("GET %s: %s", url, resp.Status)
	}
	return nil
}

// Machine describes this machine in one line, for benchmarks.
func Machine() string {
	cpu := "unknown processor"
	if b, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(b)) {
			if name, ok := strings.CutPrefix(line, "model name"); ok {
				cpu = strings.TrimSpace(strings.TrimLeft(name, "\t :"))
				break
			}
		}
	}
	return fmt.Sprintf("%d cores of %s, %s/%s, %s", runtime.NumCPU(), cpu, runtime.GOOS, runtime.GOARCH, runtime.Version())
}
