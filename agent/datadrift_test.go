package agent

import (
	"context"
	"encoding/json"
	"log/slog"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/dunlin/dunlin/agent/alarm"
	"github.com/dunlin/dunlin/agent/datadrift"
	"github.com/dunlin/dunlin/agent/engine"
	profiles "github.com/dunlin/dunlin/firmware-profiles"
	"github.com/dunlin/dunlin/models"
	heldout "github.com/dunlin/dunlin/models/examples/digits"
	"github.com/dunlin/dunlin/models/tensor"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// plain is a machine of which nothing is known but the time.
type plain struct{ at time.Time }

func (p *plain) Sample() *dunlinv1.Telemetry { return &dunlinv1.Telemetry{At: timestamppb.New(p.at)} }

// pixels gives an input of images.
func pixels(images ...[64]float32) []tensor.Tensor {
	x := tensor.Tensor{Name: "image", Type: tensor.Float32, Shape: []int64{int64(len(images)), 1, 8, 8}, Data: make([]byte, 0, 256*len(images))}
	for i := range images {
		for _, v := range images[i] {
			bits := math.Float32bits(v)
			x.Data = append(x.Data, byte(bits), byte(bits>>8), byte(bits>>16), byte(bits>>24))
		}
	}
	return []tensor.Tensor{x}
}

// rows gives row n of each tensor.
func rows(all []tensor.Tensor, n int) (one []tensor.Tensor) {
	for _, t := range all {
		size := len(t.Data) / int(t.Shape[0])
		t.Shape = append([]int64{1}, t.Shape[1:]...)
		t.Data = t.Data[n*size : (n+1)*size]
		one = append(one, t)
	}
	return one
}

// Version 2 of the digits, with its answers to all held-out images as the
// reference: the real model answers requests, the alarm comes with rotated ones
// and ends after them. Then 20,000 requests bootstrapped from the held-out images
// for each seed, with what it answered to them, raise none; and images that are
// rotated or noisy do within 500.
func TestDataDrift(t *testing.T) {
	dir := t.TempDir()
	raw, err := heldout.Models.ReadFile("v2.onnx")
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "v2.onnx"), raw, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	var log strings.Builder
	serving := Serving{RuntimeLib: runtimeLibrary(t), Worker: []string{os.Args[0], "worker"}, CacheMiB: 64, Log: slog.New(slog.NewTextHandler(&log, nil))}
	h, err := newHost(serving, profiles.Profile{Memory: profiles.Memory{HostFraction: 0.5}}, t.TempDir(), serving.workerConfig(1))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	wg.Go(func() { h.worker.Supervise(ctx) })
	wg.Go(func() { h.engine.Run(ctx) })
	id := engine.VersionID{Model: "digits", Version: 2}
	load := func() {
		t.Helper()
		if _, err := h.engine.Load(ctx, engine.Spec{ID: id, Dir: dir, Entry: "v2.onnx"}); err != nil {
			t.Fatal(err)
		}
	}
	ask := func(in []tensor.Tensor) []tensor.Tensor {
		t.Helper()
		got, err := h.engine.Infer(ctx, id, engine.Request{Inputs: in})
		if err != nil {
			t.Fatal(err)
		}
		defer got.Release()
		out := slices.Clone(got.Outputs) // the engine looks at its own still
		for i := range out {
			out[i].Data = append([]byte(nil), out[i].Data...)
		}
		return out
	}

	load()
	all, _ := heldout.HeldOut()
	rotated := make([][64]float32, len(all))
	for i := range all {
		for p := range all[i] {
			rotated[i][p] = all[i][(7-p%8)*8+p/8]
		}
	}
	answers := ask(pixels(all...))
	if err := os.WriteFile(filepath.Join(dir, models.ReferenceFile), referenceFile(t, pixels(all...), answers), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := h.engine.Unload(ctx, id); err != nil {
		t.Fatal(err)
	}
	load()
	if !strings.Contains(log.String(), "data is compared with the reference that came with the version") {
		t.Fatalf("log: %s", &log)
	}

	var events []*dunlinv1.Event
	machine := &plain{time.Date(2026, 6, 1, 12, 0, 0, 0, time.UTC)}
	w := &watch{
		machine: machine, engine: h.engine, limit: h.limit, log: slog.New(slog.DiscardHandler), sampled: make(chan struct{}),
		event: func(e *dunlinv1.Event) { events = append(events, e) }, detector: alarm.New(alarm.Config{}), respond: alarm.NewResponder(alarm.None),
	}
	now := time.Duration(0)
	look := func(apart time.Duration) {
		now += apart
		machine.at = machine.at.Add(apart)
		w.look(ctx, now)
	}
	// seen waits until so many looks have been taken: the last rows are looked at
	// when they have been answered.
	seen := func(looks uint64) (f datadrift.Finding) {
		t.Helper()
		until(t, "looked", func() error {
			if f = h.engine.Versions()[0].Data; f.Looks < looks {
				return context.DeadlineExceeded
			}
			return nil
		})
		return f
	}
	// Fewer in all than are looked at in a second.
	r := rand.New(rand.NewPCG(8, 1))
	t.Log("seed 8, 1")
	for range 448 {
		ask(pixels(all[r.IntN(len(all))]))
	}
	if f := seen(3 * 4); f.Drifted {
		t.Errorf("held-out images drift: %v", f.Worst)
	}
	if look(10 * time.Second); len(events) != 0 {
		t.Errorf("events %v", events)
	}
	for range 500 {
		ask(pixels(rotated[r.IntN(len(all))]))
	}
	if f := seen(3 * 11); !f.Drifted {
		t.Errorf("rotated images do not drift: %+v", f)
	}
	look(10 * time.Second)
	if len(events) != 1 || events[0].Kind != "alarm.raised" || events[0].Alarm.Kind != alarm.DataDrift || events[0].Alarm.Subject != "digits:2" || len(events[0].Alarm.Samples) == 0 || !strings.Contains(events[0].Message, `PSI`) {
		t.Fatalf("events %v", events)
	}
	t.Log(events[0].Message)
	if got := gathered(t, w); got != "data_drift digits:2" {
		t.Errorf("metrics %q", got)
	}
	before := h.engine.Versions()[0].Data.Looks
	for range 14 * 64 {
		ask(pixels(all[r.IntN(len(all))]))
	}
	// What is above the rate is not looked at.
	until(t, "over", func() error {
		ask(pixels(all[r.IntN(len(all))]))
		if f := h.engine.Versions()[0].Data; f.Drifted || f.Looks <= before {
			return context.DeadlineExceeded
		}
		return nil
	})
	for range 70 {
		look(10 * time.Second)
	}
	if len(events) != 2 || events[1].Kind != "alarm.cleared" {
		t.Errorf("events %v", events)
	}

	info, _ := h.engine.Info(id)
	changed := map[string][][64]float32{"rotated": rotated, "upside down": make([][64]float32, len(all)), "noise of 1 of 16": make([][64]float32, len(all)), "noise of 3 of 16": make([][64]float32, len(all))}
	for i := range all {
		for p := range all[i] {
			changed["upside down"][i][p] = all[i][63-p]
			changed["noise of 1 of 16"][i][p] = min(max(all[i][p]+float32(r.NormFloat64()), 0), 16)
			changed["noise of 3 of 16"][i][p] = min(max(all[i][p]+3*float32(r.NormFloat64()), 0), 16)
		}
	}
	whole := pixels(all...)
	for name, images := range changed {
		other, given := pixels(images...), ask(pixels(images...))
		for seed := range uint64(3) {
			r := rand.New(rand.NewPCG(seed, 2))
			w, at := datadrift.New(info.Inputs, info.Outputs, true), machine.at
			if !w.Refer(whole, answers) {
				t.Fatal("600 rows are no reference")
			}
			see := func(in, out []tensor.Tensor) bool {
				i := r.IntN(len(all))
				at = at.Add(time.Second)
				w.Look(at, [][]tensor.Tensor{rows(in, i)}, [][]tensor.Tensor{rows(out, i)})
				return w.Finding().Drifted
			}
			for n := range 20000 {
				if see(whole, answers) {
					t.Fatalf("seed %d: request %d of those drawn from the reference raises %v", seed, n+1, w.Finding().Worst)
				}
			}
			n := 1
			for ; n <= 500 && !see(other, given); n++ {
			}
			if n > 500 {
				t.Errorf("seed %d: %s: nothing in 500 requests: %+v", seed, name, w.Finding())
				continue
			}
			t.Logf("seed %d: none in 20,000 bootstrapped requests; %s after %d: %v", seed, name, n, w.Finding().Worst)
		}
	}
}

// referenceFile writes a bundle's reference.
func referenceFile(t *testing.T, inputs, outputs []tensor.Tensor) []byte {
	t.Helper()
	type one struct {
		Name     string      `json:"name"`
		Datatype tensor.Type `json:"datatype"`
		Shape    []int64     `json:"shape"`
		Data     []float64   `json:"data"`
	}
	write := func(all []tensor.Tensor) (to []one) {
		for _, x := range all {
			o := one{x.Name, x.Type, x.Shape, nil}
			for data := x.Data; len(data) > 0; data = data[x.Type.Size():] {
				o.Data = append(o.Data, x.Type.Number(data))
			}
			to = append(to, o)
		}
		return to
	}
	raw, err := json.Marshal(map[string][]one{"inputs": write(inputs), "outputs": write(outputs)})
	if err != nil {
		t.Fatal(err)
	}
	return raw
}
