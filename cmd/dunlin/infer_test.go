package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"math"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/dunlin/dunlin/agent/oip"
	"github.com/dunlin/dunlin/agent/oip/rest"
	"github.com/dunlin/dunlin/models/tensor"
	"github.com/dunlin/dunlin/proto/inference"
)

// doubler is the model behind a real Open Inference Protocol server: it
// gives back each input, doubled where it is FP32, as an output of the same
// name.
type doubler struct{}

func (doubler) Ready(context.Context) error { return nil }

func (doubler) Statistics(context.Context, string, int64) ([]*inference.ModelStatistics, error) {
	return nil, nil
}

func (doubler) Model(_ context.Context, name string, _ int64) (oip.Model, error) {
	return oip.Model{Name: name}, nil
}

func (doubler) Infer(_ context.Context, r oip.Call) (oip.Answer, error) {
	if r.Model != "digits" {
		return oip.Answer{}, oip.Errorf(oip.NotFound, "no model or route is called %q", r.Model)
	}
	res := oip.Answer{Model: r.Model, Version: max(r.Version, 1)}
	for _, t := range r.Inputs {
		if len(r.Outputs) > 0 && !slices.Contains(r.Outputs, t.Name) {
			continue
		}
		if t.Type == tensor.Float32 {
			t.Data = slices.Clone(t.Data)
			for e := range slices.Chunk(t.Data, 4) {
				f := math.Float32frombits(binary.LittleEndian.Uint32(e))
				binary.LittleEndian.PutUint32(e, math.Float32bits(2*f))
			}
		}
		res.Outputs = append(res.Outputs, t)
	}
	return res, nil
}

func startDoubler(t *testing.T) (url string) {
	t.Helper()
	s := httptest.NewServer(rest.New(oip.New(oip.Config{Backend: doubler{}})))
	t.Cleanup(s.Close)
	return s.URL
}

func floats(f ...float32) []byte {
	var b []byte
	for _, v := range f {
		b = binary.LittleEndian.AppendUint32(b, math.Float32bits(v))
	}
	return b
}

func TestInfer(t *testing.T) {
	url := startDoubler(t)
	dir := t.TempDir()
	image := tensor.Tensor{Name: "image", Type: tensor.Float32, Shape: []int64{1, 2}, Data: floats(1.5, -3)}
	npy, err := formatNPY(&image)
	if err != nil {
		t.Fatal(err)
	}
	write := func(name string, b []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	npyFile, rawFile := write("image.npy", npy), write("image.bin", image.Data)
	request := write("request.json", []byte(`{"inputs":[{"name":"image","datatype":"FP32","shape":[1,2],"data":[1.5,-3]}]}`))
	count := write("count.npy", mustNPY(t, tensor.Tensor{Type: tensor.Int64, Shape: []int64{}, Data: []byte{7, 0, 0, 0, 0, 0, 0, 0}}))

	for name, args := range map[string][]string{
		"npy":  {"--input", "image=@" + npyFile},
		"raw":  {"--input", "image=@" + rawFile, "--shape", "image=1,2", "--type", "image=FP32"},
		"json": {"-f", request},
		"one":  {"--input", "image=@" + npyFile, "--input", "count=@" + count, "--output-name", "image"},
	} {
		t.Run(name, func(t *testing.T) {
			out := must(t, append([]string{"infer", "digits:3", "--url", url}, args...)...)
			var res struct {
				ModelName    string `json:"model_name"`
				ModelVersion string `json:"model_version"`
				Outputs      []struct {
					Name     string
					Datatype string
					Shape    []int64
					Data     []float64
				}
			}
			if err := json.Unmarshal([]byte(out), &res); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			if res.ModelName != "digits" || res.ModelVersion != "3" || len(res.Outputs) != 1 || !slices.Equal(res.Outputs[0].Data, []float64{3, -6}) {
				t.Errorf("got %s", out)
			}
		})
	}

	saved := filepath.Join(dir, "saved")
	out := must(t, "infer", "digits", "--url", url, "--input", "image=@"+npyFile, "--input", "count=@"+count, "--save", saved)
	if want := filepath.Join(saved, "image.npy") + "\n" + filepath.Join(saved, "count.npy") + "\n"; out != want {
		t.Errorf("wrote %q, want %q", out, want)
	}
	b, err := os.ReadFile(filepath.Join(saved, "image.npy"))
	if err != nil {
		t.Fatal(err)
	}
	got, err := parseNPY(b)
	if err != nil || !bytes.Equal(got.Data, floats(3, -6)) || !slices.Equal(got.Shape, image.Shape) {
		t.Errorf("saved %v, %v", got, err)
	}

	for name, c := range map[string]struct {
		args []string
		code int
		want string
	}{
		"no shape":        {[]string{"digits", "--input", "image=@" + rawFile}, exitUsage, "needs --shape"},
		"wrong shape":     {[]string{"digits", "--input", "image=@" + rawFile, "--shape", "image=3", "--type", "image=FP32"}, exitError, "need 12"},
		"wrong type":      {[]string{"digits", "--input", "image=@" + rawFile, "--shape", "image=2", "--type", "image=float"}, exitUsage, "float"},
		"shape of none":   {[]string{"digits", "--input", "image=@" + npyFile, "--shape", "other=2"}, exitUsage, `no raw input "other"`},
		"npy and shape":   {[]string{"digits", "--input", "image=@" + npyFile, "--shape", "image=2"}, exitUsage, "itself"},
		"no file":         {[]string{"digits", "--input", "image=@" + dir + "/absent"}, exitError, "no such file"},
		"no at":           {[]string{"digits", "--input", "image=" + npyFile}, exitUsage, "NAME=@FILE"},
		"both":            {[]string{"digits", "--input", "image=@" + npyFile, "-f", request}, exitUsage, "either"},
		"not JSON":        {[]string{"digits", "-f", rawFile}, exitError, "is not JSON"},
		"unknown":         {[]string{"faces", "--input", "image=@" + npyFile}, exitError, `404: no model or route is called "faces"`},
		"not a name":      {[]string{"Faces", "--input", "image=@" + npyFile}, exitUsage, "Faces"},
		"not a URL":       {[]string{"digits", "-f", request, "--url", "localhost:8000"}, exitUsage, "--url"},
		"nobody is there": {[]string{"digits", "-f", request, "--url", "http://127.0.0.1:1"}, exitError, "Is the agent running"},
	} {
		t.Run(name, func(t *testing.T) {
			args := append([]string{"infer", "--url", url}, c.args...)
			code, out, text := dunlin(t, args...)
			if code != c.code || !strings.Contains(text, c.want) || out != "" {
				t.Errorf("exit code %d, want %d; %q, want it to say %q", code, c.code, text, c.want)
			}
		})
	}
}

func mustNPY(t *testing.T, x tensor.Tensor) []byte {
	t.Helper()
	b, err := formatNPY(&x)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestIndentAnswer: only spaces change, and what JSON does not have passes.
func TestIndentAnswer(t *testing.T) {
	const in = `{"model_name":"a\"[{,","outputs": [{"name":"x","shape":[1, 2],"data":[[NaN,-Infinity],["]\\","é"]]},{"data":[]}],"id":"1"}`
	const want = `{
  "model_name": "a\"[{,",
  "outputs": [
    {
      "name": "x",
      "shape": [1, 2],
      "data": [[NaN, -Infinity], ["]\\", "é"]]
    },
    {
      "data": []
    }
  ],
  "id": "1"
}`
	if got := string(indentAnswer([]byte(in))); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	for _, broken := range []string{"", "}", "]]", `{"`, `"\`, "[[{"} {
		indentAnswer([]byte(broken))
	}
}

func TestNPY(t *testing.T) {
	// As numpy 2 writes numpy.arange(4, dtype='>i2').reshape(2, 2).
	header := "{'descr': '>i2', 'fortran_order': False, 'shape': (2, 2), }"
	file := func(header string, data ...byte) []byte {
		return append(append([]byte(npyMagic+"\x01\x00"), byte(len(header)), byte(len(header)>>8)), append([]byte(header), data...)...)
	}
	got, err := parseNPY(file(header, 0, 0, 0, 1, 0, 2, 0, 3))
	if err != nil || got.Type != tensor.Int16 || !slices.Equal(got.Shape, []int64{2, 2}) || !bytes.Equal(got.Data, []byte{0, 0, 1, 0, 2, 0, 3, 0}) {
		t.Errorf("got %v, %v", got, err)
	}
	for name, c := range map[string]struct {
		file []byte
		want string
	}{
		"not one":      {[]byte("\x93NUMPX\x01\x00\x00\x00"), "not an .npy"},
		"cut":          {file(header)[:20], "cut short"},
		"cut data":     {file(header, 0, 0), "need 8"},
		"long data":    {file(header, make([]byte, 9)...), "need 8"},
		"fortran":      {file("{'descr': '<i2', 'fortran_order': True, 'shape': (2, 2), }", make([]byte, 8)...), "Fortran"},
		"object":       {file("{'descr': '|O', 'fortran_order': False, 'shape': (2, 2), }"), `"|O"`},
		"record":       {file("{'descr': [('a', '<i2')], 'fortran_order': False, 'shape': (2,), }"), "no plain descr"},
		"huge shape":   {file("{'descr': '<i2', 'fortran_order': False, 'shape': (99999999999, 99999999999), }"), "shape"},
		"no int shape": {file("{'descr': '<i2', 'fortran_order': False, 'shape': (99999999999999999999,), }"), "range"},
		"huge header":  {[]byte(npyMagic + "\x02\x00\xff\xff\xff\xff"), "allowed are"},
	} {
		if _, err := parseNPY(c.file); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got %v, want it to say %q", name, err, c.want)
		}
	}
	for _, name := range []string{"heldout-images.npy", "heldout-labels.npy"} {
		b, err := os.ReadFile(filepath.Join("..", "..", "models", "examples", "digits", name))
		if err != nil {
			t.Fatal(err)
		}
		x, err := parseNPY(b)
		if err != nil || x.Shape[0] != 600 {
			t.Fatalf("%s: %v, %v", name, x.Shape, err)
		}
		// What we write is what numpy wrote.
		if again := mustNPY(t, x); !bytes.Equal(again, b) {
			t.Errorf("%s: written again it differs: %q", name, again[:min(len(again), 128)])
		}
	}
}

func FuzzParseNPY(f *testing.F) {
	for _, x := range []tensor.Tensor{
		{Type: tensor.Float32, Shape: []int64{1, 2}, Data: make([]byte, 8)},
		{Type: tensor.Bool, Shape: []int64{}, Data: []byte{1}},
		{Type: tensor.Int64, Shape: []int64{0, 3}},
	} {
		b, err := formatNPY(&x)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Add([]byte(npyMagic + "\x02\x00\x02\x00\x00\x00{}"))
	f.Fuzz(func(t *testing.T, b []byte) {
		x, err := parseNPY(b)
		if err != nil {
			return
		}
		again, err := formatNPY(&x)
		if err != nil {
			t.Fatal(err)
		}
		y, err := parseNPY(again)
		if err != nil || y.Type != x.Type || !slices.Equal(y.Shape, x.Shape) || !bytes.Equal(y.Data, x.Data) {
			t.Errorf("%v became %v, %v", x, y, err)
		}
	})
}

func FuzzParseOutputs(f *testing.F) {
	f.Add("2", []byte("{}"))
	head := `{"outputs":[{"name":"a","datatype":"FP32","shape":[1],"parameters":{"binary_data_size":4}}]}`
	f.Add("92", []byte(head+"\x00\x00\x00\x00"))
	f.Add("-1", []byte(head))
	f.Fuzz(func(t *testing.T, length string, body []byte) {
		outputs, err := parseOutputs(length, body)
		if err != nil {
			return
		}
		for _, o := range outputs {
			if err := errors.Join(o.Check()); err != nil {
				t.Error(err)
			}
		}
	})
}
