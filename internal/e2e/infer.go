package e2e

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"net/http"
	"strconv"
)

// Answer is what a served digits model says of a batch of images.
type Answer struct {
	Model, Version string // what answered
	Labels         []int64
}

// Classify sends 8x8 images to a served name of digits models as one binary
// request of the Open Inference Protocol.
func Classify(ctx context.Context, url, name string, images [][64]float32) (Answer, error) {
	data := make([]byte, 0, len(images)*64*4)
	for _, image := range images {
		data = appendFloats(data, image[:])
	}
	header, err := json.Marshal(map[string]any{
		"inputs": []any{map[string]any{"name": "image", "datatype": "FP32", "shape": []int{len(images), 1, 8, 8},
			"parameters": map[string]any{"binary_data_size": len(data)}}},
	})
	if err != nil {
		return Answer{}, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, url+"/v2/models/"+name+"/infer", bytes.NewReader(append(header, data...)))
	if err != nil {
		return Answer{}, err
	}
	req.Header.Set("Inference-Header-Content-Length", strconv.Itoa(len(header)))
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return Answer{}, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 16<<20))
	if err != nil {
		return Answer{}, err
	}
	if resp.StatusCode != http.StatusOK {
		return Answer{}, fmt.Errorf("infer %s: %s: %s", name, resp.Status, bytes.TrimSpace(body))
	}
	var v struct {
		ModelName    string `json:"model_name"`
		ModelVersion string `json:"model_version"`
		Outputs      []struct {
			Name string          `json:"name"`
			Data json.RawMessage `json:"data"`
		} `json:"outputs"`
	}
	if err := json.Unmarshal(body, &v); err != nil {
		return Answer{}, fmt.Errorf("infer %s: %w", name, err)
	}
	// Probabilities come, too: they tell how sure the version is.
	answer := Answer{Model: v.ModelName, Version: v.ModelVersion}
	for _, o := range v.Outputs {
		if o.Name != "label" {
			continue
		}
		if err := json.Unmarshal(o.Data, &answer.Labels); err != nil {
			return Answer{}, fmt.Errorf("infer %s: labels: %w", name, err)
		}
	}
	if len(answer.Labels) != len(images) {
		return Answer{}, fmt.Errorf("infer %s: want %d labels, got %s", name, len(images), body)
	}
	return answer, nil
}

func appendFloats(b []byte, values []float32) []byte {
	for _, v := range values {
		b = binary.LittleEndian.AppendUint32(b, math.Float32bits(v))
	}
	return b
}
