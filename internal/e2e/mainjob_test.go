package e2e

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/dunlin/dunlin/models/examples/digits"
	"github.com/dunlin/dunlin/models/onnxwriter"
)

// TestMainJob takes two versions of the digits from the command line to a
// device, and counts what the device reads rightly.
func TestMainJob(t *testing.T) {
	onEachBroker(t, func(t *testing.T, f *Fleet) {
		a := startAgent(t, f, "device-1", "--label", "site=here")
		var got [3]float64
		for v := 1; v <= 2; v++ {
			out := cli(t, f, "push", digitsFile(fmt.Sprintf("v%d", v)), "digits")
			if want := fmt.Sprintf("digits:%d", v); !strings.HasPrefix(out, want) {
				t.Fatalf("push printed %q, want %s", out, want)
			}
			apply(t, f, "digits", v)
			cli(t, f, "rollout", "status", "digits", "--wait")
			if problem := serves(t, a, v); problem != "" {
				t.Fatal(problem)
			}
			got[v] = accuracy(t, a.URL)
		}
		if got[1] < 0.9 || got[2] < got[1]+0.03 {
			t.Errorf("accuracy %.3f, then %.3f; the model card says 0.922 and 0.982", got[1], got[2])
		}
		if out := cli(t, f, "infer", "digits-route", "--device", "device-1", "--input", "image=@"+oneImage(t)); !strings.Contains(out, "label") {
			t.Errorf("infer printed %q", out)
		}
		d := devices(t, f)
		if len(d) != 1 || d[0].Name != "device-1" || !d[0].Connected {
			t.Errorf("devices %+v", d)
		}
	})
}

// accuracy gives the share of the held-out digits that a device's digits-route
// reads rightly.
func accuracy(t *testing.T, url string) float64 {
	t.Helper()
	images, labels := digits.HeldOut()
	answer, err := Classify(within(t), url, "digits-route", images)
	if err != nil {
		t.Fatal(err)
	}
	right := 0
	for i, l := range labels {
		if int(answer.Labels[i]) == l {
			right++
		}
	}
	return float64(right) / float64(len(labels))
}

// oneImage writes one held-out image as a .npy file of FP32.
func oneImage(t *testing.T) string {
	t.Helper()
	images, _ := digits.HeldOut()
	header := "{'descr': '<f4', 'fortran_order': False, 'shape': (1, 1, 8, 8), }"
	header += strings.Repeat(" ", 128-10-len(header)-1) + "\n"
	b := append([]byte("\x93NUMPY\x01\x00"), byte(len(header)), byte(len(header)>>8))
	b = append(b, header...)
	return write(t, "image.npy", appendFloats(b, images[0][:]))
}

// TestVersionsAreImmutable pushes the same and other bytes under a version.
func TestVersionsAreImmutable(t *testing.T) {
	f := newFleet(t) // no device takes part
	first := cli(t, f, "push", digitsFile("v1"), "digits:1")
	if again := cli(t, f, "push", digitsFile("v1"), "digits:1"); again != first {
		t.Errorf("the same bytes again: %q, first %q", again, first)
	}
	if again := cli(t, f, "push", digitsFile("v1"), "digits"); again != first {
		t.Errorf("the same bytes again without a version: %q, first %q", again, first)
	}
	if said := fails(t, f, 1, "push", digitsFile("v2"), "digits:1"); !strings.Contains(said, "digits:1") || !strings.Contains(said, "sha256:") {
		t.Errorf("other bytes under a version: the error names not both: %s", said)
	}
}

// TestBadModels deploys, one after the other, models that must be refused,
// while the version before goes on answering.
func TestBadModels(t *testing.T) {
	onEachBroker(t, badModels)
}

func badModels(t *testing.T, f *Fleet) {
	a := startAgent(t, f, "device-1")
	cli(t, f, "push", digitsFile("v1"), "digits:1")
	apply(t, f, "digits", 1)
	cli(t, f, "rollout", "status", "digits", "--wait")
	load := startLoad(t, a.URL, "digits-route")

	good, err := os.ReadFile(digitsFile("v2"))
	if err != nil {
		t.Fatal(err)
	}
	atPush := map[string]struct {
		data []byte
		says string
	}{
		"truncated":   {good[:len(good)/2], "truncated"},
		"not ONNX":    {[]byte("#!/bin/sh\necho this is no model\n"), "ONNX"},
		"0 bytes":     {nil, "empty"},
		"empty graph": {protowire.AppendBytes(protowire.AppendTag(nil, 7, protowire.BytesType), nil), ""},
	}
	for name, m := range atPush {
		said := fails(t, f, 1, "push", write(t, "model.onnx", m.data), "digits")
		if !strings.Contains(said, m.says) {
			t.Errorf("%s: the error does not say %q: %s", name, m.says, said)
		}
	}

	x, y := []onnxwriter.Value{onnxwriter.Float("x", 1)}, []onnxwriter.Value{onnxwriter.Float("y", 1)}
	onDevice := []struct {
		name  string
		model onnxwriter.Model
		says  string
	}{
		{"opset above the runtime's", onnxwriter.Model{Opset: 99, Inputs: x, Outputs: y,
			Nodes: []onnxwriter.Node{{Op: "Relu", In: []string{"x"}, Out: []string{"y"}}}}, "pset 99"},
		{"unknown operator", onnxwriter.Model{Opset: 17, Inputs: x, Outputs: y,
			Nodes: []onnxwriter.Node{{Op: "Frobnicate", In: []string{"x"}, Out: []string{"y"}}}}, "Frobnicate"},
	}
	version := 1
	for _, m := range onDevice {
		version++
		cli(t, f, "push", write(t, "model.onnx", m.model.Marshal()), fmt.Sprintf("digits:%d", version))
		refusedOnDevice(t, f, version, m.says)
	}

	// A bit of the weights flips where the registry keeps them.
	version++
	bent := bigModel(t, 7, 1<<20)
	cli(t, f, "push", bent, fmt.Sprintf("digits:%d", version))
	flipBlob(t, f, bent)
	refusedOnDevice(t, f, version, "model.onnx")

	load.stop()
	if problem := serves(t, a, 1); problem != "" {
		t.Error(problem)
	}
	t.Logf("%d requests succeeded meanwhile", load.count())
}

// refusedOnDevice deploys a version of digits, whose rollout must fail with a
// report that names model, version and reason.
func refusedOnDevice(t *testing.T, f *Fleet, version int, says string) {
	t.Helper()
	// Halted and not rolled back: the device goes on saying what it refused.
	path := document(t, f, "digits", version)
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	halting := bytes.Replace(text, []byte("selector: {}}"), []byte("selector: {}, rollout: {onFailure: halt}}"), 1)
	if err := os.WriteFile(path, halting, 0o600); err != nil {
		t.Fatal(err)
	}
	cli(t, f, "apply", "-f", path)
	said := fails(t, f, 5, "rollout", "status", "digits", "--wait")
	if !strings.Contains(said, says) {
		t.Errorf("version %d: the rollout does not say %q: %s", version, says, said)
	}
	for _, v := range devices(t, f)[0].Reported.Versions {
		if v.Model == "digits" && v.Version == fmt.Sprint(version) {
			if v.State != "VERSION_STATE_QUARANTINED" || !strings.Contains(v.Reason, says) || v.Serving {
				t.Errorf("version %d is reported as %+v, want quarantined because of %q", version, v, says)
			}
			return
		}
	}
	t.Errorf("version %d is not reported", version)
}

// flipBlob flips one bit in the middle of the registry's copy of a file.
func flipBlob(t *testing.T, f *Fleet, path string) {
	t.Helper()
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	flipped := 0
	err = filepath.WalkDir(filepath.Join(f.Dir, "controller", "registry"), func(p string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		got, err := os.ReadFile(p)
		if err != nil || !bytes.Equal(got, want) {
			return err
		}
		flipped++
		got[len(got)/2] ^= 1
		return os.WriteFile(p, got, 0o600)
	})
	if err != nil || flipped != 1 {
		t.Fatalf("%d copies of the file in the registry, want 1 (%v)", flipped, err)
	}
}
