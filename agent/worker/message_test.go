package worker

import (
	"bytes"
	"errors"
	"math"
	"reflect"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/dunlin/dunlin/models/tensor"
)

var messages = []*message{
	{kind: kindInit, seq: 1, number: 2, strings: []string{"/lib/libonnxruntime.so"}},
	{kind: kindActivate, seq: 2, session: 3, strings: []string{"/models/digits", "model.onnx"}},
	{kind: kindActivate, seq: 3, session: 4, number: 1, threads: 2, strings: []string{"/cache/model.ort"}},
	{kind: kindDone, seq: math.MaxUint64, number: 123456, memory: 1 << 40, batch: true,
		inputs:  []tensor.Info{{Name: "x", Type: tensor.Bool, Shape: []int64{-1, math.MaxInt64}}},
		outputs: []tensor.Info{{Name: "any", Type: tensor.Float32}, {Name: "scalar", Type: tensor.Int8, Shape: []int64{}}}},
	{kind: kindFailed, seq: 2, strings: []string{"no such file", ""}},
	{kind: kindOutOfMemory, seq: 3, strings: []string{"no room"}},
	{kind: kindCancel, seq: 9},
	{kind: kindLane, number: 63},
	{kind: kindCancelRun, number: 63, seq: 9},
}

func TestMessages(t *testing.T) {
	for _, m := range messages {
		b := m.encode()
		got, err := decode(b)
		if err != nil || !reflect.DeepEqual(got, m) {
			t.Errorf("%+v came back as %+v, %v", m, got, err)
		}
		for n := range b {
			if _, err := decode(b[:n]); !errors.Is(err, errMalformed) {
				t.Errorf("%d of the %d bytes of kind %d: %v", n, len(b), m.kind, err)
			}
		}
		if _, err := decode(append(bytes.Clone(b), 0)); !errors.Is(err, errMalformed) {
			t.Errorf("a byte too many: %v", err)
		}
	}
}

// FuzzMessage holds for both ends: they decode with the same code.
func FuzzMessage(f *testing.F) {
	for _, m := range messages {
		f.Add(m.encode())
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := decode(b)
		if err != nil {
			if !errors.Is(err, errMalformed) {
				t.Errorf("error %v", err)
			}
			return
		}
		again, err := decode(m.encode())
		if err != nil || !reflect.DeepEqual(m, again) {
			t.Errorf("%+v came back as %+v, %v", m, again, err)
		}
	})
}

// TestDescriptorsNobodyAskedFor sends two in one packet: none stays open.
func TestDescriptorsNobodyAskedFor(t *testing.T) {
	ours, theirs, err := socketPair()
	if err != nil {
		t.Fatal(err)
	}
	defer theirs.Close()
	s, err := newSocket(ours)
	if err != nil {
		t.Fatal(err)
	}
	defer s.close()
	before := descriptors(t)
	lane := (&message{kind: kindLane}).encode()
	done := (&message{kind: kindDone}).encode()
	for _, tt := range []struct {
		packet []byte
		fds    []int
	}{{lane, []int{0, 1}}, {done, []int{0}}, {lane[:3], []int{0}}, {lane, nil}} {
		var oob []byte
		if tt.fds != nil {
			oob = unix.UnixRights(tt.fds...)
		}
		if err := unix.Sendmsg(int(theirs.Fd()), tt.packet, oob, nil, 0); err != nil {
			t.Fatal(err)
		}
		if _, _, err := s.receive(); !errors.Is(err, errMalformed) {
			t.Errorf("receive of %d bytes with descriptors %v: %v", len(tt.packet), tt.fds, err)
		}
	}
	if after := descriptors(t); after != before {
		t.Errorf("%d descriptors before, %d after", before, after)
	}
}
