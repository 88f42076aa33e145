package engine

import (
	"encoding/binary"
	"math"
	"sync"
	"time"

	"github.com/dunlin/dunlin/internal/sketch"
	"github.com/dunlin/dunlin/models/tensor"
)

// This file counts how sure a version is of its answers.
//
// The output that is looked at is the one whose rows are those of a classifier:
// of the outputs that are FP32 or FP16 with two dimensions, the second of which
// is 2 to maxClasses or open, the first that the bundle has labels for; without
// labels, the only one there is; of several none.
//
// Of a row of two values or more the largest is counted, where all lie between
// 0 and 1 and their sum is 1 but for a hundredth; else the values are taken for
// logits, and the largest of their softmax is. A row with a value that is no
// number counts as 0.
//
// It happens after the answers are on their way, for confidenceRows rows a
// second at most: the first of each second. That is a sample by time and not by
// content, so it has the distribution of all.

const (
	confidenceRows = 200
	maxClasses     = 4096
	// sumWithin is how far from 1 the sum of probabilities may be.
	sumWithin = 0.01
)

// confidence counts for one version.
type confidence struct {
	output string

	mu     sync.Mutex // guards what follows
	counts [20]uint64 // of sketch.Confidence
	second int64      // that left is of
	left   int        // rows that may be looked at in it
}

// newConfidence gives nil where no output is a classifier's.
func newConfidence(info *Info) *confidence {
	var found []string
	for _, o := range info.Outputs {
		if o.Type != tensor.Float32 && o.Type != tensor.Float16 || len(o.Shape) != 2 || o.Shape[1] >= 0 && (o.Shape[1] < 2 || o.Shape[1] > maxClasses) {
			continue
		}
		if len(info.Labels[o.Name]) > 0 {
			found = []string{o.Name}
			break
		}
		found = append(found, o.Name)
	}
	if len(found) != 1 {
		return nil
	}
	return &confidence{output: found[0]}
}

// look counts rows of the outputs of a run's requests.
func (c *confidence) look(requests [][]tensor.Tensor, now time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if s := now.Unix(); s != c.second {
		c.second, c.left = s, confidenceRows
	}
	for _, outputs := range requests {
		for i := range outputs {
			if c.left > 0 && outputs[i].Name == c.output {
				c.tensor(&outputs[i])
			}
		}
	}
}

func (c *confidence) tensor(t *tensor.Tensor) {
	if len(t.Shape) != 2 || t.Shape[1] < 2 || t.Shape[1] > maxClasses {
		return
	}
	n, size := int(t.Shape[1]), t.Type.Size()
	rows := int(min(t.Shape[0], int64(c.left)))
	if size == 0 || rows < 0 || len(t.Data) < rows*n*size {
		return
	}
	for row := range rows {
		c.counts[sketch.Confidence.Bucket(largest(t.Type, t.Data[row*n*size:(row+1)*n*size]))]++
	}
	c.left -= rows
}

// snapshot gives a copy of the counts; nil of nothing.
func (c *confidence) snapshot() sketch.Counts {
	if c == nil {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return append(sketch.Counts(nil), c.counts[:]...)
}

// largest gives the largest probability of a row.
func largest(typ tensor.Type, row []byte) float64 {
	sum, most, least := 0., math.Inf(-1), math.Inf(1)
	each := func(f func(x float64)) {
		if typ == tensor.Float16 {
			for ; len(row) >= 2; row = row[2:] {
				f(typ.Number(row))
			}
			return
		}
		for ; len(row) >= 4; row = row[4:] {
			f(float64(math.Float32frombits(binary.LittleEndian.Uint32(row))))
		}
	}
	whole := row
	each(func(x float64) {
		sum += x
		most, least = max(most, x), min(least, x) // both are NaN where one is
	})
	switch {
	case math.IsNaN(sum) || math.IsInf(most, 0):
		return 0
	case least >= 0 && most <= 1+sumWithin && math.Abs(sum-1) <= sumWithin:
		return min(most, 1)
	}
	row, sum = whole, 0
	each(func(x float64) { sum += math.Exp(x - most) })
	return 1 / sum
}
