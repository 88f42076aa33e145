package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"

	"github.com/dunlin/dunlin/agent/ort"
	"github.com/dunlin/dunlin/models/tensor"
	"github.com/dunlin/dunlin/proto/inference"
)

// pinProcess becomes a program that runs on some processors only:
// "pin 0 PROGRAM ARG ..." or "pin 1,2,3 PROGRAM ARG ...".
func pinProcess(args []string) error {
	if len(args) < 2 {
		return errors.New("usage: pin CPU[,CPU...] PROGRAM [ARG ...]")
	}
	var set unix.CPUSet
	for f := range strings.SplitSeq(args[0], ",") {
		cpu, err := strconv.Atoi(f)
		if err != nil {
			return err
		}
		set.Set(cpu)
	}
	runtime.LockOSThread() // the affinity is this thread's, and its program's
	if err := unix.SchedSetaffinity(0, &set); err != nil {
		return fmt.Errorf("run on processors %s: %w", args[0], err)
	}
	return syscall.Exec(args[1], args[1:], os.Environ())
}

// echo is a plain grpc-go server of the protocol's service whose answers have
// the size of the tiny net's: the payload comes back, cut to that size.
type echo struct {
	inference.UnimplementedGRPCInferenceServiceServer
	bytes int
}

func (e echo) ModelInfer(_ context.Context, r *inference.ModelInferRequest) (*inference.ModelInferResponse, error) {
	return &inference.ModelInferResponse{ModelName: r.ModelName, ModelVersion: "1",
		Outputs: []*inference.ModelInferResponse_InferOutputTensor{
			{Name: "output", Datatype: tensor.Float32.String(), Shape: []int64{1, int64(e.bytes / 4)}}},
		RawOutputContents: [][]byte{r.RawInputContents[0][:e.bytes]}}, nil
}

func (echo) ModelReady(context.Context, *inference.ModelReadyRequest) (*inference.ModelReadyResponse, error) {
	return &inference.ModelReadyResponse{Ready: true}, nil
}

// echoProcess is "echo ADDRESS BYTES".
func echoProcess(ctx context.Context, args []string) error {
	if len(args) != 2 {
		return errors.New("usage: echo ADDRESS BYTES")
	}
	size, err := strconv.Atoi(args[1])
	if err != nil {
		return err
	}
	l, err := net.Listen("tcp", args[0])
	if err != nil {
		return err
	}
	server := grpc.NewServer()
	inference.RegisterGRPCInferenceServiceServer(server, echo{bytes: size})
	defer context.AfterFunc(ctx, server.Stop)()
	return server.Serve(l)
}

// rawProcess is "raw ADDRESS LIBRARY THREADS MODEL INPUT": it loads a model
// and, for each GET /run?for=2s, runs it in a bare loop for that long. INPUT
// is a Load as JSON, whose input the runs have.
func rawProcess(ctx context.Context, args []string) error {
	if len(args) != 5 {
		return errors.New("usage: raw ADDRESS LIBRARY THREADS MODEL LOAD")
	}
	threads, err := strconv.Atoi(args[2])
	if err != nil {
		return err
	}
	var load Load
	if err := json.Unmarshal([]byte(args[4]), &load); err != nil {
		return fmt.Errorf("read the load: %w", err)
	}
	data, err := load.data()
	if err != nil {
		return err
	}
	if err := ort.Init(args[1], threads); err != nil {
		return err
	}
	session, err := ort.Open(ctx, filepath.Dir(args[3]), filepath.Base(args[3]), ort.Setting{})
	if err != nil {
		return err
	}
	defer session.Close()
	in := []tensor.Tensor{{Name: load.Input.Name, Type: load.Input.Type, Shape: load.Input.Shape, Data: data}}

	mux := http.NewServeMux()
	mux.HandleFunc("GET /version", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, ort.Version()) })
	mux.HandleFunc("GET /run", func(w http.ResponseWriter, r *http.Request) {
		d, err := time.ParseDuration(r.FormValue("for"))
		if err == nil {
			var result Result
			if result, err = loop(session, in, d, load.Bytes); err == nil {
				err = json.NewEncoder(w).Encode(result)
			}
		}
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
		}
	})
	server := http.Server{Addr: args[0], Handler: mux}
	defer context.AfterFunc(ctx, func() { server.Close() })()
	if err := server.ListenAndServe(); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// loop runs a session again and again for so long.
func loop(session *ort.Session, in []tensor.Tensor, d time.Duration, size int) (Result, error) {
	check := func(out []tensor.Tensor) error {
		got := 0
		for _, t := range out {
			got += len(t.Data)
		}
		return checkSize(got, size)
	}
	var took []time.Duration
	began := time.Now()
	for time.Since(began) < d {
		start := time.Now()
		if err := session.Run(context.Background(), in, nil, check); err != nil {
			return Result{}, err
		}
		took = append(took, time.Since(start))
	}
	r := Result{Elapsed: time.Since(began), OK: len(took)}
	slices.Sort(took)
	r.P50, r.P90, r.P99, r.Most = percentile(took, 50), percentile(took, 90), percentile(took, 99), percentile(took, 100)
	return r, nil
}
