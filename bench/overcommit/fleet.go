package main

import (
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"

	"github.com/dunlin/dunlin/agent/engine"
	"github.com/dunlin/dunlin/bench/zoo"
	"github.com/dunlin/dunlin/models/tensor"
)

// model is one of the fleet's.
type model struct {
	spec  engine.Spec
	input tensor.Tensor
	size  int64 // of the file
}

// writeFleet writes the models, in the order of how often they are asked for:
// a random one, so that no shape is a favourite.
func writeFleet(p plan) ([]model, error) {
	var fleet []model
	for n := range p.copies {
		for _, net := range zoo.Nets(p.seed + uint64(n)) {
			if !slices.Contains(p.nets, net.Name) {
				continue
			}
			name := fmt.Sprintf("%s-%d", net.Name, n)
			dir := filepath.Join(absolute(p.dir), "models", name)
			if err := os.MkdirAll(dir, 0o700); err != nil {
				return nil, err
			}
			path := filepath.Join(dir, "model.onnx")
			info, err := os.Stat(path)
			if err != nil {
				if err := net.WriteFile(path + ".part"); err != nil {
					return nil, err
				}
				if err := os.Rename(path+".part", path); err != nil {
					return nil, err
				}
				info, err = os.Stat(path)
			}
			if err != nil {
				return nil, err
			}
			shape := slices.Clone(net.Input().Shape)
			shape[0] = 1
			fleet = append(fleet, model{
				spec:  engine.Spec{ID: engine.VersionID{Model: name, Version: 1}, Dir: dir, Entry: "model.onnx"},
				input: random(net.Input().Name, shape, p.seed), size: info.Size(),
			})
		}
	}
	order := rand.New(rand.NewPCG(p.seed, 7))
	order.Shuffle(len(fleet), func(i, j int) { fleet[i], fleet[j] = fleet[j], fleet[i] })
	return fleet, nil
}

func random(name string, shape []int64, seed uint64) tensor.Tensor {
	n := int64(4)
	for _, d := range shape {
		n *= d
	}
	r := rand.New(rand.NewPCG(seed, 3))
	data := make([]byte, n)
	for i := range data {
		if i%4 == 3 {
			data[i] = 0x3e // between 1/8 and 1/2
		} else {
			data[i] = byte(r.Uint32()) & 0x7f
		}
	}
	return tensor.Tensor{Name: name, Type: tensor.Float32, Shape: shape, Data: data}
}

// zipf draws models: the k-th is asked for 1/k times as often as the first.
func zipf(seed uint64, n int) func() int {
	r := rand.New(rand.NewPCG(seed, 5))
	sums := make([]float64, n)
	sum := 0.0
	for i := range sums {
		sum += 1 / float64(i+1)
		sums[i] = sum
	}
	return func() int {
		i, _ := slices.BinarySearch(sums, r.Float64()*sum)
		return min(i, n-1)
	}
}

// drop has the kernel forget the contents of all files below a folder.
func drop(dir string) error {
	return filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		return forget(path)
	})
}
