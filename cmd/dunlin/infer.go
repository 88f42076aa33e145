package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/dunlin/dunlin/models"
	"github.com/dunlin/dunlin/models/tensor"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

const (
	// headerLength says how long the JSON before the binary tensors is.
	headerLength = "Inference-Header-Content-Length"
	// maxTensorFile and maxInferResponse bound what is read into memory.
	maxTensorFile    = 1 << 30
	maxInferResponse = 1 << 30
)

type inferFlags struct {
	url, device, file, save        string
	inputs, shapes, types, outputs []string
	timeout                        time.Duration
}

func (c *cli) inferCommand() *cobra.Command {
	var f inferFlags
	cmd := &cobra.Command{
		Use:   "infer NAME[:VERSION]",
		Short: "Ask a device for an inference",
		Long: `infer sends a request in the Open Inference Protocol to an agent and prints its
answer. NAME is a route or a model.

An input is an .npy file, or raw little-endian elements with --shape and
--type. -f sends a request that is JSON already.`,
		Example: "  dunlin infer digits --input image=@digit.npy\n" +
			"  dunlin infer digits --device cam-1 --input image=@digit.bin --shape image=1,1,8,8 --type image=FP32\n" +
			"  dunlin infer digits -f request.json",
		Args: arguments(1, 1),
		RunE: func(cmd *cobra.Command, args []string) error { return c.infer(cmd.Context(), args[0], f) },
	}
	fl := cmd.Flags()
	fl.StringVar(&f.url, "url", "http://127.0.0.1:8000", "the agent's inference port")
	fl.StringVar(&f.device, "device", "", "the device whose agent to ask, in place of --url")
	fl.StringArrayVar(&f.inputs, "input", nil, "input NAME=@FILE (repeat for more)")
	fl.StringArrayVar(&f.shapes, "shape", nil, "shape of a raw input, NAME=D,D,...")
	fl.StringArrayVar(&f.types, "type", nil, "data type of a raw input, NAME=FP32")
	fl.StringArrayVar(&f.outputs, "output-name", nil, "only this output (repeat for more)")
	fl.StringVarP(&f.file, "file", "f", "", "request as JSON, - for standard input")
	fl.StringVar(&f.save, "save", "", "folder to write each output to, as NAME.npy")
	fl.DurationVar(&f.timeout, "timeout", time.Minute, "give up after this time")
	return cmd
}

// inferRequest is the JSON of a request; its fields are the protocol's.
type inferRequest struct {
	Parameters map[string]any `json:"parameters,omitempty"`
	Inputs     []inferTensor  `json:"inputs"`
	Outputs    []inferOutput  `json:"outputs,omitempty"`
}

type inferOutput struct {
	Name       string         `json:"name"`
	Parameters map[string]any `json:"parameters,omitempty"`
}

type inferTensor struct {
	Name       string         `json:"name"`
	Datatype   string         `json:"datatype"`
	Shape      []int64        `json:"shape"`
	Parameters map[string]any `json:"parameters,omitempty"`
}

func (c *cli) infer(ctx context.Context, ref string, f inferFlags) error {
	name, version, err := models.ParseRef(ref)
	if err != nil {
		return usagef("%v", err)
	}
	if (f.file == "") == (len(f.inputs) == 0) {
		return usagef("either --input or -f is needed")
	}
	if f.file != "" && (f.save != "" || len(f.outputs) > 0) {
		return usagef("--save and --output-name do not go with -f")
	}
	header, binary, err := c.inferBody(f)
	if err != nil {
		return err
	}
	base, err := c.agentURL(ctx, f)
	if err != nil {
		return err
	}
	path := base + "/v2/models/" + url.PathEscape(name)
	if version > 0 {
		path += "/versions/" + strconv.FormatInt(version, 10)
	}
	ctx, cancel := context.WithTimeout(ctx, f.timeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, path+"/infer", io.MultiReader(bytes.NewReader(header), bytes.NewReader(binary)))
	if err != nil {
		return usagef("%v", err)
	}
	req.ContentLength = int64(len(header) + len(binary))
	req.Header.Set("Content-Type", "application/json")
	if len(binary) > 0 {
		req.Header.Set("Content-Type", "application/octet-stream")
		req.Header.Set(headerLength, strconv.Itoa(len(header)))
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		if errors.Is(err, context.DeadlineExceeded) {
			return codeError{code: exitTimeout, err: fmt.Errorf("infer %s: no answer from %s after %s", ref, base, f.timeout)}
		}
		return fmt.Errorf("infer %s: %w\nIs the agent running there? See: dunlin get devices", ref, err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(io.LimitReader(res.Body, maxInferResponse+1))
	if err != nil {
		return fmt.Errorf("infer %s: read the answer: %w", ref, err)
	}
	if len(body) > maxInferResponse {
		return fmt.Errorf("infer %s: the answer has more than %d bytes", ref, maxInferResponse)
	}
	if res.StatusCode != http.StatusOK {
		var e struct{ Error string }
		if json.Unmarshal(body, &e) != nil || e.Error == "" {
			e.Error = strings.TrimSpace(string(body[:min(len(body), maxErrorBody)]))
		}
		return fmt.Errorf("infer %s: the agent answers %d: %s", ref, res.StatusCode, e.Error)
	}
	if f.save != "" {
		return c.saveOutputs(f.save, res.Header.Get(headerLength), body)
	}
	if res.Header.Get(headerLength) == "" { // else there is more than JSON
		body = append(indentAnswer(body), '\n')
	}
	_, err = c.out.Write(body)
	return err
}

// indentAnswer breaks lines in objects and in lists of objects, and leaves
// lists of elements on one line. It knows NaN and Infinity no better than any
// other element, and changes no bytes but spaces.
func indentAnswer(body []byte) []byte {
	var out []byte
	depth, flat, quoted := 0, 0, false // flat: lists that the byte is in on one line
	line := func() { out = append(append(out, '\n'), strings.Repeat("  ", depth)...) }
	body = bytes.TrimSpace(body)
	for i := 0; i < len(body); i++ {
		b := body[i]
		if quoted {
			out = append(out, b)
			if b == '\\' && i+1 < len(body) {
				i++
				out = append(out, body[i])
			}
			quoted = b != '"'
			continue
		}
		inner := bytes.TrimLeft(body[i+1:], " \t\r\n")
		switch {
		case b == ' ' || b == '\t' || b == '\r' || b == '\n':
			continue
		case b == '"':
			quoted = true
		case b == '[' && (flat > 0 || !bytes.HasPrefix(inner, []byte("{"))):
			flat++
		case b == ']' && flat > 0:
			flat--
		case (b == '{' || b == '[') && flat == 0:
			depth++
			out = append(out, b)
			line()
			continue
		case (b == '}' || b == ']') && flat == 0:
			depth = max(depth-1, 0)
			line()
		case b == ',' && flat == 0:
			out = append(out, b)
			line()
			continue
		case b == ',' || b == ':':
			out = append(out, b, ' ')
			continue
		}
		out = append(out, b)
	}
	return out
}

// agentURL gives the base URL of the agent to ask. No token goes there.
func (c *cli) agentURL(ctx context.Context, f inferFlags) (string, error) {
	if f.device == "" {
		u, err := url.Parse(f.url)
		if err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
			return "", usagef("--url %q is not of the form http://HOST:PORT", f.url)
		}
		return strings.TrimRight(f.url, "/"), nil
	}
	ctl, err := c.client()
	if err != nil {
		return "", err
	}
	res, err := call(ctx, ctl.devices().ListDevices, &dunlinv1.ListDevicesRequest{Device: f.device})
	if err != nil {
		return "", fmt.Errorf("look up the device: %w", err)
	}
	if len(res.GetDevices()) == 0 {
		return "", notFound("device", f.device)
	}
	u := res.GetDevices()[0].GetInfo().GetServingUrl()
	if u == "" {
		return "", fmt.Errorf("device %s has not said where it serves", f.device)
	}
	return strings.TrimRight(u, "/"), nil
}

// inferBody makes the request: JSON, and the binary tensors after it.
func (c *cli) inferBody(f inferFlags) (header, binary []byte, err error) {
	if f.file != "" {
		in := c.in
		if f.file != "-" {
			file, err := os.Open(f.file)
			if err != nil {
				return nil, nil, fmt.Errorf("read request: %w", err)
			}
			defer file.Close()
			in = file
		}
		header, err = readLimited(in, f.file)
		if err == nil && !json.Valid(header) {
			err = fmt.Errorf("read request: %s is not JSON", f.file)
		}
		return header, nil, err
	}
	shapes, err := named("--shape", f.shapes)
	if err != nil {
		return nil, nil, err
	}
	types, err := named("--type", f.types)
	if err != nil {
		return nil, nil, err
	}
	req := inferRequest{}
	for _, in := range f.inputs {
		name, path, ok := strings.Cut(in, "=@")
		if !ok || name == "" || path == "" {
			return nil, nil, usagef("--input %q is not of the form NAME=@FILE", in)
		}
		t, err := readTensor(name, path, shapes[name], types[name])
		if err != nil {
			return nil, nil, err
		}
		delete(shapes, name)
		delete(types, name)
		req.Inputs = append(req.Inputs, inferTensor{name, t.Type.String(), t.Shape, map[string]any{"binary_data_size": len(t.Data)}})
		binary = append(binary, t.Data...)
	}
	for _, left := range []map[string]string{shapes, types} {
		for name := range left {
			return nil, nil, usagef("there is no raw input %q for its --shape or --type", name)
		}
	}
	for _, o := range f.outputs {
		req.Outputs = append(req.Outputs, inferOutput{Name: o, Parameters: map[string]any{"binary_data": f.save != ""}})
	}
	if f.save != "" && len(req.Outputs) == 0 {
		req.Parameters = map[string]any{"binary_data_output": true}
	}
	header, err = json.Marshal(req)
	return header, binary, err
}

// named reads NAME=VALUE flags.
func named(flag string, values []string) (map[string]string, error) {
	m := map[string]string{}
	for _, v := range values {
		name, value, ok := strings.Cut(v, "=")
		if !ok || name == "" || value == "" {
			return nil, usagef("%s %q is not of the form NAME=VALUE", flag, v)
		}
		m[name] = value
	}
	return m, nil
}

func readLimited(r io.Reader, name string) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(r, maxTensorFile+1))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", name, err)
	}
	if len(b) > maxTensorFile {
		return nil, fmt.Errorf("read %s: more than %d bytes", name, maxTensorFile)
	}
	return b, nil
}

// readTensor reads an input's file: .npy, or raw with a shape and a type.
func readTensor(name, path, shape, typ string) (tensor.Tensor, error) {
	f, err := os.Open(path)
	if err != nil {
		return tensor.Tensor{}, fmt.Errorf("input %s: %w", name, err)
	}
	defer f.Close()
	b, err := readLimited(f, path)
	if err != nil {
		return tensor.Tensor{}, fmt.Errorf("input %s: %w", name, err)
	}
	if isNPY(b) {
		if shape != "" || typ != "" {
			return tensor.Tensor{}, usagef("input %s: an .npy file says its shape and type itself", name)
		}
		t, err := parseNPY(b)
		t.Name = name
		if err != nil {
			return t, fmt.Errorf("input %s: %s: %w", name, path, err)
		}
		return t, nil
	}
	if shape == "" || typ == "" {
		return tensor.Tensor{}, usagef("input %s: %s is not an .npy file, so it needs --shape %s=D,D,... and --type %s=FP32", name, path, name, name)
	}
	t := tensor.Tensor{Name: name, Shape: []int64{}, Data: b}
	if t.Type, err = tensor.ParseType(typ); err != nil {
		return t, usagef("--type %s=%s: %v", name, typ, err)
	}
	for d := range strings.SplitSeq(shape, ",") {
		n, err := strconv.ParseInt(strings.TrimSpace(d), 10, 64)
		if err != nil || n < 0 {
			return t, usagef("--shape %s=%s: %q is not a size", name, shape, d)
		}
		t.Shape = append(t.Shape, n)
	}
	if err := t.Check(); err != nil {
		return t, fmt.Errorf("%s: %w", path, err)
	}
	return t, nil
}

// saveOutputs writes the binary outputs of an answer as .npy files.
func (c *cli) saveOutputs(dir, length string, body []byte) error {
	outputs, err := parseOutputs(length, body)
	if err != nil {
		return fmt.Errorf("read the answer: %w", err)
	}
	if err := os.MkdirAll(dir, 0o777); err != nil {
		return fmt.Errorf("save outputs: %w", err)
	}
	root, err := os.OpenRoot(dir) // outputs are named by the model
	if err != nil {
		return fmt.Errorf("save outputs: %w", err)
	}
	defer root.Close()
	for _, t := range outputs {
		b, err := formatNPY(&t)
		if err != nil {
			return fmt.Errorf("save outputs: %w", err)
		}
		name := strings.NewReplacer("/", "_", `\`, "_", ":", "_").Replace(t.Name) + ".npy"
		if err := root.WriteFile(name, b, 0o666); err != nil {
			return fmt.Errorf("save outputs: %w", err)
		}
		fmt.Fprintln(c.out, filepath.Join(dir, name))
	}
	return nil
}

// parseOutputs reads an answer whose outputs are all binary.
func parseOutputs(length string, body []byte) ([]tensor.Tensor, error) {
	n, err := strconv.Atoi(length)
	if err != nil || n < 0 || n > len(body) {
		return nil, fmt.Errorf("%s %q does not fit an answer of %d bytes", headerLength, length, len(body))
	}
	var res struct {
		Outputs []inferTensor `json:"outputs"`
	}
	if err := json.Unmarshal(body[:n], &res); err != nil {
		return nil, err
	}
	data := body[n:]
	var outputs []tensor.Tensor
	for _, o := range res.Outputs {
		size, ok := o.Parameters["binary_data_size"].(float64)
		if !ok || size < 0 || size > float64(len(data)) || size != float64(int(size)) {
			return nil, fmt.Errorf("output %q: binary_data_size %v does not fit, %d bytes are left", o.Name, o.Parameters["binary_data_size"], len(data))
		}
		t := tensor.Tensor{Name: o.Name, Shape: o.Shape, Data: data[:int(size)]}
		data = data[int(size):]
		if t.Type, err = tensor.ParseType(o.Datatype); err != nil {
			return nil, fmt.Errorf("output %q: %w", o.Name, err)
		}
		if err := t.Check(); err != nil {
			return nil, err
		}
		outputs = append(outputs, t)
	}
	return outputs, nil
}
