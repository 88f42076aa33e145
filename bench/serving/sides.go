package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/dunlin/dunlin/bench/zoo"
	"github.com/dunlin/dunlin/internal/e2e"
	"github.com/dunlin/dunlin/models/tensor"
	"github.com/dunlin/dunlin/proto/inference"
)

// Limits of how long things may take.
const (
	readyLimit = 60 * time.Second
	loadGrace  = 30 * time.Second // beyond the time that a load is to run
)

// tokens is the length of the sequences of the encoder that is batched: a
// short question.
const tokens = 8

const weightsSeed = 1

// bench is one run of the benchmark.
type bench struct {
	plan
	dir, root string
	library   string
	self      string // this program
	nets      map[string]zoo.Net
	processes []*e2e.Process
	figures   map[string]float64
	versions  map[string]string
	main      *e2e.Alone // serves all models with all processors; nil until it is needed
}

func prepare(ctx context.Context, p plan, dir string) (*bench, error) {
	b := &bench{plan: p, dir: dir, nets: map[string]zoo.Net{}, figures: map[string]float64{}, versions: map[string]string{}}
	var err error
	if b.root, err = e2e.Root(); err != nil {
		return nil, err
	}
	if b.self, err = os.Executable(); err != nil {
		return nil, err
	}
	if b.library, err = e2e.RuntimeLibrary(ctx, b.root, os.Stderr); err != nil {
		return nil, err
	}
	if b.agent == "" {
		progress("building the agent")
		b.agent = filepath.Join(dir, "dunlin-agent")
		args := []string{"build", "-C", b.root, "-trimpath", "-ldflags=-s -w", "-o", b.agent, "./cmd/dunlin-agent"}
		if _, err := e2e.Run(ctx, []string{"CGO_ENABLED=1"}, "go", args...); err != nil {
			return nil, err
		}
	}
	progress("writing the nets")
	for _, n := range []zoo.Net{zoo.MLP(weightsSeed), zoo.ResNet50(weightsSeed), zoo.Encoder(weightsSeed, tokens)} {
		b.nets[n.Name] = n
		if err := n.WriteFile(b.net(n.Name)); err != nil {
			return nil, err
		}
	}
	return b, nil
}

func progress(what string) { fmt.Fprintln(os.Stderr, what) }

// net is the path of a net's file.
func (b *bench) net(name string) string { return filepath.Join(b.dir, name+".onnx") }

func (b *bench) stop() error {
	var errs []error
	for _, p := range slices.Backward(b.processes) {
		if err := p.Stop(); err != nil {
			errs = append(errs, fmt.Errorf("stop %s: %w\n%s", p.Name, err, p.LogTail(20)))
		}
	}
	return errors.Join(errs...)
}

// logs gives the ends of the logs of the processes that run.
func (b *bench) logs() string {
	var all strings.Builder
	for _, p := range b.processes {
		fmt.Fprintf(&all, "--- %s\n%s\n", p.Name, p.LogTail(10))
	}
	return all.String()
}

// start starts a process and waits until ready gives no error.
func (b *bench) start(ctx context.Context, name string, env []string, ready func(context.Context) error, program string, args ...string) (*e2e.Process, error) {
	log := filepath.Join(b.dir, fmt.Sprintf("%s-%d.log", name, len(b.processes)))
	p, err := e2e.Start(name, log, env, program, args...)
	if err != nil {
		return nil, err
	}
	b.processes = append(b.processes, p)
	ctx, cancel := context.WithTimeout(ctx, readyLimit)
	defer cancel()
	if err := p.Wait(ctx, ready); err != nil {
		return nil, fmt.Errorf("%w\n%s", err, p.LogTail(20))
	}
	return p, nil
}

// startAgent starts an agent with a model repository, on one processor only
// where cpu names it, and waits until all models are ready.
func (b *bench) startAgent(ctx context.Context, name, repository, cpu string, threads int) (*e2e.Alone, error) {
	program := b.agent
	if cpu != "" {
		program = filepath.Join(b.dir, name+".sh")
		script := fmt.Sprintf("#!/bin/sh\nexec '%s' pin %s '%s' \"$@\"\n", b.self, cpu, b.agent)
		if err := os.WriteFile(program, []byte(script), 0o700); err != nil {
			return nil, err
		}
	}
	ctx, cancel := context.WithTimeout(ctx, readyLimit)
	defer cancel()
	a, err := e2e.Serve(ctx, program, b.dir, name, b.library, "--model-repository", repository, "--threads", strconv.Itoa(threads),
		"--data", filepath.Join(b.dir, name))
	if err != nil {
		return nil, err
	}
	b.processes = append(b.processes, a.Process)
	return a, a.Ready(ctx)
}

// batching asks for it; with single each request runs alone, as everything
// does for which a configuration names a size and no batcher.
const (
	single   = "backend: \"onnxruntime\"\nmax_batch_size: 16\n"
	batching = single + "dynamic_batching {}\n"
)

// repository makes a model repository of files; a model whose config is ""
// has none.
func (b *bench) repository(name string, models map[string]struct{ file, config string }) (string, error) {
	root := filepath.Join(b.dir, name+"-models")
	for model, m := range models {
		dir := filepath.Join(root, model)
		if err := os.MkdirAll(filepath.Join(dir, "1"), 0o755); err != nil {
			return "", err
		}
		if err := copyFile(filepath.Join(dir, "1", "model.onnx"), m.file); err != nil {
			return "", err
		}
		if m.config != "" {
			if err := os.WriteFile(filepath.Join(dir, "config.pbtxt"), []byte(m.config), 0o644); err != nil {
				return "", err
			}
		}
	}
	return root, nil
}

func copyFile(to, from string) (err error) {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.Create(to)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	_, err = io.Copy(out, in)
	return err
}

// mainAgent gives the agent that serves everything but the overload.
func (b *bench) mainAgent(ctx context.Context) (*e2e.Alone, error) {
	if b.main != nil {
		return b.main, nil
	}
	digits := filepath.Join(b.root, "models/examples/digits/v2.onnx")
	repository, err := b.repository("main", map[string]struct{ file, config string }{
		"resnet50":       {b.net("resnet50"), ""},
		"mlp":            {b.net("mlp"), ""},
		"encoder":        {b.net("encoder"), batching},
		"encoder-single": {b.net("encoder"), single},
		"digits":         {digits, batching},
		"digits-single":  {digits, single},
	})
	if err != nil {
		return nil, err
	}
	progress("starting the agent")
	b.main, err = b.startAgent(ctx, "agent", repository, "", 0)
	return b.main, err
}

// load gives a load of one row of a net.
func (b *bench) load(address, net string) Load {
	n := b.nets[net]
	out := n.Output().Shape
	size := int64(4)
	for _, d := range out[1:] {
		size *= d
	}
	in := n.Input()
	in.Shape = slices.Clone(in.Shape)
	in.Shape[0] = 1
	return Load{Address: address, Model: net, Input: in, Bytes: int(size), For: b.slice, Concurrency: 1, Seed: 1}
}

// digits gives a load of one image of the digits net.
func (b *bench) digits(address, model string) Load {
	const probabilities, label = 10 * 4, 8
	return Load{Address: address, Model: model, Input: tensor.Info{Name: "image", Type: tensor.Float32, Shape: []int64{1, 1, 8, 8}},
		Bytes: probabilities + label, For: b.slice, Concurrency: 1, Seed: 1}
}

// client runs a load in a process of its own, on some processors only where
// cpus names them.
func (b *bench) client(ctx context.Context, l Load, cpus string) (r Result, err error) {
	arg, err := json.Marshal(l)
	if err != nil {
		return r, err
	}
	ctx, cancel := context.WithTimeout(ctx, l.For+loadGrace)
	defer cancel()
	command := []string{b.self, "load", string(arg)}
	if cpus != "" {
		command = append([]string{b.self, "pin", cpus}, command...)
	}
	out, err := e2e.Run(ctx, nil, command[0], command[1:]...)
	if err != nil {
		return r, err
	}
	if err := json.Unmarshal([]byte(out), &r); err != nil {
		return r, fmt.Errorf("read the result of a load: %w", err)
	}
	if r.Failed > 0 {
		return r, fmt.Errorf("%d calls of %s failed, the last one: %s", r.Failed, l.Model, r.Error)
	}
	if l.Rate == 0 && r.Refused > 0 {
		return r, fmt.Errorf("%d calls of %s were refused: %v", r.Refused, l.Model, r.RefusedWhy)
	}
	return r, nil
}

// startRaw starts the bare loop for a net and gives what runs it.
func (b *bench) startRaw(ctx context.Context, net string) (func(context.Context) (Result, error), error) {
	address, err := e2e.FreeAddress()
	if err != nil {
		return nil, err
	}
	load, err := json.Marshal(b.load("", net))
	if err != nil {
		return nil, err
	}
	ready := func(ctx context.Context) error {
		version, err := get(ctx, "http://"+address+"/version")
		b.versions["runtime"] = "ONNX Runtime " + string(version)
		return err
	}
	if _, err := b.start(ctx, "raw", nil, ready, b.self, "raw", address, b.library, "0", b.net(net), string(load)); err != nil {
		return nil, err
	}
	return func(ctx context.Context) (r Result, err error) {
		out, err := get(ctx, "http://"+address+"/run?"+url.Values{"for": {b.slice.String()}}.Encode())
		if err == nil {
			err = json.Unmarshal(out, &r)
		}
		return r, err
	}, nil
}

// startEcho starts the bare gRPC server, whose answers have so many bytes.
func (b *bench) startEcho(ctx context.Context, size int) (address string, err error) {
	if address, err = e2e.FreeAddress(); err != nil {
		return "", err
	}
	_, err = b.start(ctx, "echo", nil, func(ctx context.Context) error { return answers(ctx, address, "mlp") },
		b.self, "echo", address, strconv.Itoa(size))
	return address, err
}

// startMLServer starts MLServer with the tiny net and so many worker
// processes; with 0, it runs the net in the process that listens.
func (b *bench) startMLServer(ctx context.Context, workers int) (address string, err error) {
	if b.mlserver == "" {
		progress("installing MLServer where it is not there")
		out, err := e2e.Run(ctx, nil, "sh", filepath.Join(b.root, "bench/serving/mlserver/setup.sh"))
		if err != nil {
			return "", err
		}
		b.mlserver = strings.TrimSpace(out)
	}
	version, err := e2e.Run(ctx, nil, filepath.Join(filepath.Dir(b.mlserver), "python"), "-c",
		"import importlib.metadata as m; print('MLServer', m.version('mlserver'), 'with onnxruntime', m.version('onnxruntime'))")
	if err != nil {
		return "", err
	}
	b.versions["mlserver"] = strings.TrimSpace(version)
	name := fmt.Sprintf("mlserver-%d", workers)
	dir := filepath.Join(b.dir, name)
	if err := os.CopyFS(dir, os.DirFS(filepath.Join(b.root, "bench/serving/mlserver"))); err != nil {
		return "", err
	}
	if err := copyFile(filepath.Join(dir, "mlp.onnx"), b.net("mlp")); err != nil {
		return "", err
	}
	env := []string{"PYTHONPATH=" + dir, "MLSERVER_HOST=127.0.0.1", "MLSERVER_DEBUG=false", "MLSERVER_METRICS_DIR=" + dir, fmt.Sprintf("MLSERVER_PARALLEL_WORKERS=%d", workers)}
	for _, port := range []string{"HTTP", "METRICS", "GRPC"} {
		if address, err = e2e.FreeAddress(); err != nil {
			return "", err
		}
		_, number, err := net.SplitHostPort(address)
		if err != nil {
			return "", err
		}
		env = append(env, "MLSERVER_"+port+"_PORT="+number)
	}
	_, err = b.start(ctx, name, env, func(ctx context.Context) error { return answers(ctx, address, "mlp") }, b.mlserver, "start", dir)
	return address, err
}

// answers says whether a gRPC server answers for a model.
func answers(ctx context.Context, address, model string) error {
	c, err := grpc.NewClient(address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer c.Close()
	r, err := inference.NewGRPCInferenceServiceClient(c).ModelReady(ctx, &inference.ModelReadyRequest{Name: model})
	if err == nil && !r.Ready {
		err = fmt.Errorf("model %s is not ready", model)
	}
	return err
}

// get gives the body of a page.
func get(ctx context.Context, url string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("GET %s: %s: %s", url, resp.Status, body)
	}
	return body, err
}
