package agent

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/dunlin/dunlin/agent/engine"
	"github.com/dunlin/dunlin/internal/link"
	"github.com/dunlin/dunlin/models"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// Twenty switches from one version to another and back, under requests that do
// not stop, fail none; a version whose answer to its reference input is wrong is
// refused before it serves, and one that comes with a right one serves.
func TestTwentySwitches(t *testing.T) {
	c := startControl(t)
	cfg := testConfig(t, c)
	l, err := net.Listen("tcp", cfg.Listen)
	if err != nil {
		t.Fatal(err)
	}
	cfg.Listen = l.Addr().String()
	l.Close()
	startAgent(t, cfg)
	c.until("says hello", func(m proto.Message) bool { _, ok := m.(*dunlinv1.Hello); return ok })
	versions := []*dunlinv1.DesiredVersion{c.push(digits+"v1.onnx", "digits", 1), c.push(digits+"v2.onnx", "digits", 2)}
	c.send("edge-1", link.Desired, desired(t, 1, nil, versions[0]))
	c.until("serves version 1", serves("digits", 1))

	ctx, cancel := context.WithCancel(t.Context())
	var clients sync.WaitGroup
	defer clients.Wait()
	defer cancel()
	var mu sync.Mutex
	answered, last := map[string]int{}, ""
	for range 2 {
		clients.Go(func() {
			for ctx.Err() == nil {
				version, err := classify("http://"+cfg.Listen, "digits")
				if err != nil {
					t.Errorf("a request failed: %v", err)
					return
				}
				mu.Lock()
				answered[version]++
				last = version
				mu.Unlock()
			}
		})
	}
	for n := range 20 {
		next := versions[(n+1)%2]
		c.send("edge-1", link.Desired, desired(t, uint64(n+2), nil, next))
		until(t, fmt.Sprintf("answered by version %d", next.Version), func() error {
			mu.Lock()
			defer mu.Unlock()
			if last != strconv.FormatInt(next.Version, 10) && !t.Failed() {
				return fmt.Errorf("version %s answers", last)
			}
			return nil
		})
	}
	mu.Lock()
	if answered["1"] == 0 || answered["2"] == 0 || len(answered) != 2 {
		t.Errorf("answered by %v", answered)
	}
	mu.Unlock()

	reference := func(y string) models.PackOptions {
		path := filepath.Join(t.TempDir(), "reference.json")
		text := `{"inputs":[{"name":"image","datatype":"FP32","shape":[1,1,8,8],"data":[` + strings.TrimSuffix(strings.Repeat("0,", 64), ",") + `]}],"outputs":[` + y + `]}`
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return models.PackOptions{Reference: path}
	}
	right := `{"name":"probabilities","datatype":"FP32","shape":[1,10],"data":[` + answerTo(t, cfg.Listen) + `]}`
	wrong := `{"name":"probabilities","datatype":"FP32","shape":[1,10],"data":[1,1,1,1,1,1,1,1,1,1]}`
	c.send("edge-1", link.Desired, desired(t, 30, nil, c.pushWith(digits+"v1.onnx", "digits", 4, reference(wrong))))
	c.until("refuses version 4", func(m proto.Message) bool {
		r, _ := m.(*dunlinv1.Reported)
		return slices.ContainsFunc(r.GetVersions(), func(v *dunlinv1.VersionStatus) bool {
			return v.Version == 4 && v.State == dunlinv1.VersionState_VERSION_STATE_QUARANTINED && !v.Reverted &&
				strings.Contains(v.Reason, "its answer to the reference input is wrong: 10 of 10 values differ") && serves("digits", 1)(m)
		})
	})
	c.send("edge-1", link.Desired, desired(t, 31, nil, c.pushWith(digits+"v1.onnx", "digits", 5, reference(right))))
	c.until("serves version 5", serves("digits", 5))
}

func TestSlower(t *testing.T) {
	id := func(version int64) engine.VersionID { return engine.VersionID{Model: "m", Version: version} }
	runs := func(version int64, n uint64, each time.Duration) engine.Status {
		return engine.Status{ID: id(version), Figures: engine.Figures{Run: engine.Total{Count: n, Time: time.Duration(n) * each}}}
	}
	old := []engine.Status{runs(1, 100, 100*time.Millisecond), runs(3, 10, time.Microsecond), {ID: engine.VersionID{Model: "other", Version: 1}, Figures: runs(1, 1000, time.Microsecond).Figures}}
	for _, tt := range []struct {
		run    time.Duration
		loaded []engine.Status
		want   string
	}{
		{0, old, ""},
		{time.Second, old, ""},
		{2 * time.Second, old, ""},
		{2001 * time.Millisecond, old, "a run of one row takes 2.001s, one of m:1 takes 100ms: allowed are 1s and 20 times that"},
		{999 * time.Millisecond, []engine.Status{runs(1, 100, time.Microsecond)}, ""},
		{time.Hour, nil, ""},
		{time.Hour, []engine.Status{runs(1, 9, time.Microsecond), runs(2, 100, time.Microsecond)}, ""},
	} {
		got := ""
		if err := slower(id(2), tt.run, tt.loaded); err != nil {
			got = err.Error()
		}
		if got != tt.want {
			t.Errorf("%v: %q, want %q", tt.run, got, tt.want)
		}
	}
}

// answerTo gives the probabilities for an image without a stroke.
func answerTo(t *testing.T, address string) string {
	t.Helper()
	body := `{"inputs":[{"name":"image","datatype":"FP32","shape":[1,1,8,8],"data":[` + strings.TrimSuffix(strings.Repeat("0,", 64), ",") + `]}],"outputs":[{"name":"probabilities"}]}`
	resp, err := http.Post("http://"+address+"/v2/models/digits/infer", "", strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var answer struct {
		Outputs []struct{ Data []json.Number }
	}
	if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil || len(answer.Outputs) != 1 {
		t.Fatalf("%s: %+v, %v", resp.Status, answer, err)
	}
	var all []string
	for _, n := range answer.Outputs[0].Data {
		all = append(all, n.String())
	}
	return strings.Join(all, ",")
}
