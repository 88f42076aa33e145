package worker

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"testing"

	"github.com/dunlin/dunlin/agent/ort"
	"github.com/dunlin/dunlin/bench/zoo"
	predict "github.com/dunlin/dunlin/internal/estimate"
	"github.com/dunlin/dunlin/models"
)

// measureNet is a process that opens a compiled model and runs so many rows, with
// nothing else in it and nothing that trims meanwhile, and writes what that
// took. Its arguments are the library, the file and the rows.
func measureNet(args []string) {
	need, err := func() (need predict.Need, err error) {
		rows, err := strconv.ParseInt(args[2], 10, 64)
		if err != nil {
			return need, err
		}
		if err := ort.Init(args[0], 1); err != nil {
			return need, err
		}
		start := ownBytes()
		s, err := ort.OpenCompiled(context.Background(), args[1], false)
		if err != nil {
			return need, err
		}
		defer s.Close()
		need.Weights, need.Session = s.Mapped(), ownBytes()-start
		need.Workspace, err = workspace(context.Background(), s, rows, 1)
		return need, err
	}()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	json.NewEncoder(os.Stdout).Encode(need)
}

// TestPredicted holds what the graph says of memory against what runs take:
// workspace and peak within 15 % or 4 MiB, weights but for what the file
// says of the graph itself.
func TestPredicted(t *testing.T) {
	lib, err := library()
	if err != nil {
		t.Fatal(err)
	}
	if err := ort.Init(lib, 0); err != nil {
		t.Fatal(err)
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	const mb = 1 << 20
	within := func(predicted, measured int64) bool {
		return max(predicted-measured, measured-predicted) <= max(measured*15/100, 4*mb)
	}
	for _, net := range zoo.Nets(1) {
		s := write(t, net)
		path := s.Dir + "/" + s.Entry
		g, err := models.Inspect(path)
		if err != nil {
			t.Fatal(err)
		}
		costs, err := models.EstimateCosts(path)
		if err != nil || costs == nil || len(costs.Unknown) > 0 {
			t.Fatal(costs, err)
		}
		if err := ort.Compile(t.Context(), s.Dir, s.Entry, image(s)); err != nil {
			t.Fatal(err)
		}
		for _, rows := range []int{1, 4, 16} {
			cmd := exec.CommandContext(t.Context(), exe, "measure", lib, image(s), strconv.Itoa(rows))
			cmd.Stderr = t.Output()
			out, err := cmd.Output()
			if err != nil {
				t.Fatal(err)
			}
			var is predict.Need
			if err := json.Unmarshal(out, &is); err != nil {
				t.Fatal(err)
			}
			p := predict.Memory(g.WeightBytes, *costs, rows)
			t.Logf("%-9s %2d rows, predicted/measured MiB: weights %6.1f/%6.1f session %4.1f/%4.1f workspace %5.1f/%5.1f peak %5.1f/%5.1f", net.Name, rows,
				float64(p.Weights)/mb, float64(is.Weights)/mb, float64(p.Session)/mb, float64(is.Session)/mb,
				float64(p.Workspace)/mb, float64(is.Workspace)/mb, float64(p.Peak())/mb, float64(is.Peak())/mb)
			if !within(p.Workspace, is.Workspace) || !within(p.Peak(), is.Peak()) {
				t.Errorf("%s, %d rows: predicted %+v, measured %+v", net.Name, rows, p, is)
			}
			// The weights as the file has them; a compiled one has the graph too,
			// and fills blocks of channels up.
			if w := net.Parameters() * 4; p.Weights < w || p.Weights > w+64<<10 || is.Weights < w || is.Weights > w+w/100+256<<10 {
				t.Errorf("%s: %d bytes of weights, predicted %d, a compiled file of %d", net.Name, w, p.Weights, is.Weights)
			}
		}
	}
}
