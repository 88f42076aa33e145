package main

import (
	"context"
	"encoding/binary"
	"fmt"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"sync"

	"github.com/dunlin/dunlin/agent/engine"
	"github.com/dunlin/dunlin/agent/oip"
	"github.com/dunlin/dunlin/agent/serve"
	"github.com/dunlin/dunlin/agent/worker"
	"github.com/dunlin/dunlin/internal/e2e"
	"github.com/dunlin/dunlin/models/examples/digits"
	"github.com/dunlin/dunlin/models/tensor"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// cascade gives the share of the held-out digits that the small model of a
// cascade answers, and the cascade's accuracy over that of the large model.
func cascade(ctx context.Context) (share, ratio float64, err error) {
	root, err := e2e.Root()
	if err != nil {
		return 0, 0, err
	}
	library, err := e2e.RuntimeLibrary(ctx, root, os.Stderr)
	if err != nil {
		return 0, 0, err
	}
	exe, err := os.Executable()
	if err != nil {
		return 0, 0, err
	}
	log := slog.New(slog.DiscardHandler)
	w := worker.New(worker.Config{Command: []string{exe, "worker"}, RuntimeLib: library, Threads: 1, Log: log})
	e := engine.New(engine.Config{Runtime: w, Log: log})
	var running sync.WaitGroup
	below, stop := context.WithCancel(ctx)
	running.Go(func() { _ = w.Supervise(below) })
	running.Go(func() { _ = e.Run(below) })
	defer running.Wait()
	defer stop()

	dir, err := os.MkdirTemp("", "route")
	if err != nil {
		return 0, 0, err
	}
	defer os.RemoveAll(dir)
	for version, file := range map[int64]string{1: "v1.onnx", 2: "v2.onnx"} {
		b, err := digits.Models.ReadFile(file)
		if err != nil {
			return 0, 0, err
		}
		if err := os.WriteFile(filepath.Join(dir, file), b, 0o600); err != nil {
			return 0, 0, err
		}
		id := engine.VersionID{Model: "digits", Version: version}
		if _, err := e.Load(ctx, engine.Spec{ID: id, Dir: dir, Entry: file}); err != nil {
			return 0, 0, err
		}
	}
	s := serve.New(e, nil)
	s.SetServing(map[string]int64{"digits": 2})
	s.SetRoutes("bench", []*dunlinv1.DesiredRoute{{
		Name: "vision", Targets: []*dunlinv1.RouteTarget{{Model: "digits", Version: 1, Weight: 1}},
		Cascade: &dunlinv1.RouteCascade{Model: "digits", Version: 2, When: fmt.Sprintf("max(output) < %v", digits.CascadeBound)},
	}}, nil)
	images, labels := digits.HeldOut()
	right := map[string]int{}
	small := 0
	for i := range images {
		in := tensor.Tensor{Name: "image", Type: tensor.Float32, Shape: []int64{1, 1, 8, 8}}
		for _, x := range images[i] {
			in.Data = binary.LittleEndian.AppendUint32(in.Data, math.Float32bits(x))
		}
		for _, model := range []string{"digits", "vision"} {
			a, err := s.Infer(ctx, oip.Call{Model: model, Inputs: []tensor.Tensor{in}, Outputs: []string{"label"}})
			if err != nil {
				return 0, 0, err
			}
			if int(a.Outputs[0].Type.Number(a.Outputs[0].Data)) == labels[i] {
				right[model]++
			}
			if a.Header[serve.HeaderCascade] == serve.CascadeSmall.String() {
				small++
			}
			if a.Release != nil {
				a.Release()
			}
		}
	}
	fmt.Printf("cascade on %d held-out digits: the large model has %d right, the cascade %d; the small one answers %d\n", len(images), right["digits"], right["vision"], small)
	return float64(small) / float64(len(images)), float64(right["vision"]) / float64(right["digits"]), nil
}
