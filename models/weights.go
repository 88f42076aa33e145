package models

import (
	"errors"
	"fmt"
	"io/fs"
	"math"
	"path"
	"strconv"
	"strings"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/dunlin/dunlin/models/tensor"
)

// The fields of TensorProto that hold elements.
const (
	floatData  protowire.Number = 4
	int32Data  protowire.Number = 5
	stringData protowire.Number = 6
	int64Data  protowire.Number = 7
	doubleData protowire.Number = 10
	uint64Data protowire.Number = 11
)

// encoding says how TensorProto holds the elements of a data type.
type encoding struct {
	bits   int64            // of an element in raw_data and in memory
	typed  protowire.Number // the field that holds them else
	values int64            // of an element in that field; elements below 8 bits share a value a byte
}

// encodings are those of TensorProto.DataType. A type that is not here is
// newer than this program; the sizes of its tensors are not checked.
var encodings = map[int64]encoding{
	1: {32, floatData, 1}, 2: {8, int32Data, 1}, 3: {8, int32Data, 1}, 4: {16, int32Data, 1},
	5: {16, int32Data, 1}, 6: {32, int32Data, 1}, 7: {64, int64Data, 1}, 8: {0, stringData, 1},
	9: {8, int32Data, 1}, 10: {16, int32Data, 1}, 11: {64, doubleData, 1}, 12: {32, uint64Data, 1},
	13: {64, uint64Data, 1}, 14: {64, floatData, 2}, 15: {128, doubleData, 2}, 16: {16, int32Data, 1},
	17: {8, int32Data, 1}, 18: {8, int32Data, 1}, 19: {8, int32Data, 1}, 20: {8, int32Data, 1},
	21: {4, int32Data, 1}, 22: {4, int32Data, 1}, 23: {4, int32Data, 1}, 24: {8, int32Data, 1},
	25: {2, int32Data, 1}, 26: {2, int32Data, 1},
}

// maxWeightTypes bounds the types that are kept: ONNX has fewer.
const maxWeightTypes = 64

// weight is what a TensorProto says about its data.
type weight struct {
	name     string
	dims     []int64
	dataType int64
	raw      int64                      // bytes of raw_data, -1 where it has none
	values   map[protowire.Number]int64 // in the typed fields
	stored   int64                      // bytes in the typed fields
	external bool
	location map[string]string
}

// tensor reads a TensorProto without its data, and checks that it is whole.
func (in *inspector) tensor(f field, what string) (name string, err error) {
	s, err := f.message()
	if err != nil {
		return "", err
	}
	if in.tensors++; in.tensors > maxTensors {
		return "", invalid("more than %d tensors", maxTensors)
	}
	w := weight{raw: -1, values: map[protowire.Number]int64{}}
	err = in.file.each(s, func(f field) error { return in.tensorField(f, &w) })
	if err != nil {
		return "", err
	}
	size, err := in.checkWeight(&w)
	if err != nil {
		return "", fmt.Errorf("%s %q: %w", what, shorten(w.name), err)
	}
	in.weights += uint64(size)
	if len(in.weightTypes) < maxWeightTypes && w.dataType > 0 && w.dataType <= math.MaxInt32 {
		in.weightTypes[tensor.Type(w.dataType)] = true
	}
	return w.name, nil
}

func (in *inspector) tensorField(f field, w *weight) (err error) {
	var n int64
	switch f.num {
	case 1:
		return in.file.varints(f, func(d int64) error {
			if w.dims = append(w.dims, d); len(w.dims) > maxRank {
				return invalid("tensor has more than %d dimensions", maxRank)
			}
			return nil
		})
	case 2:
		w.dataType, err = f.integer()
		return err
	case 8:
		w.name, err = in.name(f, "name of a tensor")
		return err
	case 9:
		s, err := f.message()
		w.raw = s.len()
		return err
	case 13:
		return in.locationEntry(f, w)
	case 14:
		v, err := f.integer()
		w.external = v == 1
		return err
	case floatData:
		n, err = f.fixed(4)
	case doubleData:
		n, err = f.fixed(8)
	case int32Data, int64Data, uint64Data:
		err = in.file.varints(f, func(int64) error { n++; return nil })
	case stringData:
		n = 1
		_, err = f.message()
	default:
		return nil
	}
	w.values[f.num] += n
	w.stored += f.content.len()
	return err
}

// locationEntry reads one key and value of external_data.
func (in *inspector) locationEntry(f field, w *weight) error {
	s, err := f.message()
	if err != nil {
		return err
	}
	var key, val string
	err = in.file.each(s, func(f field) (err error) {
		switch f.num {
		case 1:
			key, err = in.file.text(f, "key of external_data")
		case 2:
			val, err = in.file.text(f, "value of external_data")
		}
		return err
	})
	if err != nil {
		return err
	}
	switch key {
	case "location", "offset", "length":
		if _, ok := w.location[key]; ok {
			return invalid("external_data has two entries %q", key)
		}
		if w.location == nil {
			w.location = map[string]string{}
		}
		w.location[key] = val
	}
	return nil
}

// checkWeight compares the data with the type and shape, and gives the bytes
// that it has in memory.
func (in *inspector) checkWeight(w *weight) (int64, error) {
	n, err := tensor.Elements(w.dims)
	if err != nil {
		return 0, invalid("%v", err)
	}
	enc, known := encodings[w.dataType]
	switch {
	case w.dataType <= 0:
		return 0, invalid("has no data type")
	case known && n > math.MaxInt64/128:
		return 0, invalid("has %d elements", n)
	}
	need := (n*enc.bits + 7) / 8
	if w.external {
		if w.dataType == int64(tensor.String) {
			return 0, invalid("holds strings, which cannot be external data")
		}
		return in.checkExternal(w, need, known)
	}
	if !known {
		return max(w.raw, 0) + w.stored, nil
	}
	if enc.typed != stringData && w.raw >= 0 {
		if w.raw != need {
			return 0, invalid("truncated or damaged: it has %d bytes of raw_data, its type and shape %v need %d", w.raw, w.dims, need)
		}
		return need, nil
	}
	values := n * enc.values
	if enc.bits > 0 && enc.bits < 8 {
		values = need
	}
	if got := w.values[enc.typed]; got != values {
		return 0, invalid("truncated or damaged: it has %d values, its type and shape %v need %d", got, w.dims, values)
	}
	if enc.typed == stringData {
		return w.stored, nil
	}
	return need, nil
}

// checkExternal finds the file that holds the data, and checks that it is in
// the model's folder and long enough.
func (in *inspector) checkExternal(w *weight, need int64, known bool) (int64, error) {
	location, ok := w.location["location"]
	if !ok || location == "" {
		return 0, invalid("external data has no location")
	}
	if strings.HasPrefix(location, "/") {
		return 0, invalid("external data location %q is absolute", shorten(location))
	}
	for element := range strings.SplitSeq(location, "/") {
		if element == ".." {
			return 0, invalid("external data location %q leaves the model's folder", shorten(location))
		}
	}
	location = path.Clean(location)
	if err := checkPath(location); err != nil {
		return 0, fmt.Errorf("external data location: %w", err)
	}
	size, err := in.externalSize(location)
	if err != nil {
		return 0, err
	}
	offset, err := w.position("offset", 0)
	if err != nil {
		return 0, err
	}
	length, err := w.position("length", need)
	if err != nil {
		return 0, err
	}
	if known && length != need {
		return 0, invalid("external data has a length of %d bytes, its type and shape %v need %d", length, w.dims, need)
	}
	if offset > size || length > size-offset {
		return 0, invalid("external data file %q is too short: %d bytes from byte %d on are needed, the file has %d", location, length, offset, size)
	}
	return length, nil
}

// position reads an offset or length of external_data.
func (w *weight) position(key string, absent int64) (int64, error) {
	s, ok := w.location[key]
	if !ok {
		return absent, nil
	}
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil || n < 0 {
		return 0, invalid("external data has %s %q, which is not a number of bytes", key, shorten(s))
	}
	return n, nil
}

// externalSize gives the size of a file in the model's folder.
func (in *inspector) externalSize(location string) (int64, error) {
	if size, ok := in.external[location]; ok {
		return size, nil
	}
	if len(in.external) == MaxFiles-1 {
		return 0, invalid("more than %d files of external data", MaxFiles-1)
	}
	info, err := in.folder.Stat(location)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return 0, invalid("external data file %q does not exist", location)
	case err != nil:
		// Among others: a link that leads out of the folder.
		return 0, invalid("external data file %q cannot be used: %v", location, err)
	case !info.Mode().IsRegular():
		return 0, invalid("external data file %q is not a regular file", location)
	}
	in.external[location] = info.Size()
	return info.Size(), nil
}
