package serve

import (
	"context"
	"encoding/binary"
	"errors"
	"math"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/dunlin/dunlin/agent/engine"
	"github.com/dunlin/dunlin/models/tensor"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// unsure is an Engine whose versions give a label, and how sure they are.
type unsure struct {
	stage
	sure  map[int64]float32
	asked [][]string
}

func (u *unsure) Info(id engine.VersionID) (engine.Info, bool) {
	return engine.Info{Outputs: []tensor.Info{{Name: "label", Type: tensor.Uint8}, {Name: "p", Type: tensor.Float32}}}, true
}

func (u *unsure) Infer(ctx context.Context, id engine.VersionID, q engine.Request) (engine.Result, error) {
	if _, err := u.stage.Infer(ctx, id, q); err != nil {
		return engine.Result{}, err
	}
	u.asked = append(u.asked, q.Outputs)
	names := q.Outputs
	if names == nil {
		names = []string{"label", "p"}
	}
	var r engine.Result
	for _, name := range names {
		t := tensor.Tensor{Name: name, Type: tensor.Uint8, Shape: []int64{1}, Data: []byte{byte(id.Version)}}
		if name == "p" {
			t.Type, t.Data = tensor.Float32, binary.LittleEndian.AppendUint32(nil, math.Float32bits(u.sure[id.Version]))
		}
		r.Outputs = append(r.Outputs, t)
	}
	return r, nil
}

func TestCascade(t *testing.T) {
	broken := errors.New("broken")
	for _, tt := range []struct {
		name    string
		when    string
		sure    float32
		outputs []string
		errs    map[int64]error
		serving int64
		ran     string
		version int64
		header  string
		outcome CascadeOutcome
	}{
		{"the small one is sure", "max(output) < 0.5", 0.9, nil, nil, 2, "m:1", 1, "small", CascadeSmall},
		{"the large one is asked", "max(output) < 0.5", 0.4, nil, nil, 2, "m:1, m:2", 2, "large", CascadeLarge},
		{"also where the caller wants no probabilities", "max(output) < 0.5", 0.4, []string{"label"}, nil, 2, "m:1, m:2", 2, "large", CascadeLarge},
		{"and gets only what it asks for", "max(output) < 0.5", 0.9, []string{"label"}, nil, 2, "m:1", 1, "small", CascadeSmall},
		{"the large one fails", "max(output) < 0.5", 0.4, []string{"label"}, map[int64]error{2: broken}, 2, "m:1, m:2", 1, "failed", CascadeFailed},
		{"there is no large one", "max(output) < 0.5", 0.4, nil, nil, 0, "m:1", 1, "failed", CascadeFailed},
		{"a fault", `max(outputs["gone"]) < 0.5`, 0.4, nil, nil, 2, "m:1", 1, "fault", CascadeFault},
		{"it is the large one itself", "max(output) < 0.5", 0.4, nil, nil, 1, "m:1", 1, "", CascadeOutcomes},
		{"a fallback's answer stands", "max(output) < 0.5", 0.4, nil, map[int64]error{1: broken}, 2, "m:1, n:9", 9, "", CascadeOutcomes},
	} {
		t.Run(tt.name, func(t *testing.T) {
			e := &unsure{sure: map[int64]float32{1: tt.sure, 2: 0.1}}
			e.infer = func(_ context.Context, id engine.VersionID, _ engine.Request) error { return tt.errs[id.Version] }
			s := New(e, nil)
			s.SetServing(map[string]int64{"m": tt.serving, "n": 9})
			live := r("live", "m:1", "k=0")
			live.Fallback = fallbacks("n")
			live.Cascade = &dunlinv1.RouteCascade{Model: "m", When: tt.when}
			s.SetRoutes("g", []*dunlinv1.DesiredRoute{live}, nil)
			q := request("live", 0)
			q.Outputs = tt.outputs
			a, err := s.Infer(t.Context(), q)
			if err != nil {
				t.Fatal(err)
			}
			if ran := strings.Join(e.ran, ", "); ran != tt.ran || a.Version != tt.version || a.Header[HeaderCascade] != tt.header {
				t.Errorf("%s ran, want %s; headers %v", ran, tt.ran, a.Header)
			}
			if want := max(len(tt.outputs), 1); tt.outputs != nil && len(a.Outputs) != want || a.Outputs[0].Name != "label" || a.Outputs[0].Data[0] != byte(tt.version) {
				t.Errorf("outputs %v", a.Outputs)
			}
			if tt.outputs != nil && (len(e.asked[0]) != 2 || len(e.asked) > 1 && len(e.asked[1]) != 1) {
				t.Errorf("asked for %v", e.asked)
			}
			figures := s.Rules()[0].Cascade
			for o, n := range figures.Requests {
				if want := CascadeOutcome(o) == tt.outcome; (n == 1) != want {
					t.Errorf("%d of %v", n, CascadeOutcome(o))
				}
			}
			// The figures go on where the cascade stays.
			s.SetRoutes("g2", []*dunlinv1.DesiredRoute{live}, nil)
			if again := s.Rules()[0].Cascade; *again != *figures {
				t.Errorf("%v, before %v", again, figures)
			}
		})
	}
}

// Random policies on versions that fail at random: each request ends once, by
// the larger model only where the target was not sure, by a fallback only where
// the target has failed, and no version runs it twice.
func TestRandomCascades(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		models := []string{"m0", "m1", "m2", "m3"}
		live := r("live", "m0=2", "m1=1")
		live.Fallback = fallbacks(rapid.SliceOfNDistinct(rapid.SampledFrom(models), 0, 3, rapid.ID[string]).Draw(rt, "fallback")...)
		live.Cascade = &dunlinv1.RouteCascade{
			Model: rapid.SampledFrom(models).Draw(rt, "larger"),
			When:  rapid.SampledFrom([]string{"max(output) < 0.5", `max(outputs["gone"]) < 0.5`}).Draw(rt, "when"),
		}
		fails := map[string]bool{}
		for _, m := range models {
			fails[m] = rapid.Bool().Draw(rt, m+" fails")
		}
		sure := rapid.Bool().Draw(rt, "sure")
		e := &unsure{sure: map[int64]float32{1: 0.1}}
		if sure {
			e.sure[1] = 0.9
		}
		e.infer = func(_ context.Context, id engine.VersionID, _ engine.Request) error {
			if fails[id.Model] {
				return errors.New("broken")
			}
			return nil
		}
		s := New(e, nil)
		s.SetServing(map[string]int64{"m0": 1, "m1": 1, "m2": 1, "m3": 1})
		s.SetRoutes("g", []*dunlinv1.DesiredRoute{live}, nil)
		q := request("live", 0)
		a, err := s.Infer(t.Context(), q)
		ran := map[string]int{}
		for _, id := range e.ran {
			if ran[id]++; ran[id] > 1 {
				rt.Fatalf("%v ran", e.ran)
			}
		}
		target := strings.TrimSuffix(e.ran[0], ":1")
		fault := strings.Contains(live.Cascade.When, "gone")
		var want, outcome string
		switch larger := live.Cascade.Model; {
		case fails[target]:
			for _, f := range live.Fallback {
				if !fails[f.Model] {
					want = f.Model
					break
				}
			}
		case larger == target:
			want = target
		case fault:
			want, outcome = target, "fault"
		case sure:
			want, outcome = target, "small"
		case fails[larger]:
			want, outcome = target, "failed"
		default:
			want, outcome = larger, "large"
		}
		if (err == nil) != (want != "") || err == nil && (a.Model != want || a.Header[HeaderCascade] != outcome) {
			rt.Fatalf("%s has answered, %v, %v; want %s, %s; %v ran", a.Model, a.Header, err, want, outcome, e.ran)
		}
	})
}
