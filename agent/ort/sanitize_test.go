package ort

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"math"
	"math/rand/v2"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/dunlin/dunlin/models/tensor"
)

// TestSanitized reads packets with the lanes' decoder, built with the address
// and the undefined behaviour sanitizers: good ones, each cut short at each
// byte, and each with words changed.
func TestSanitized(t *testing.T) {
	const seed, changes = 5, 3000
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	exe := filepath.Join(t.TempDir(), "packets")
	build := exec.Command("cc", "-std=gnu11", "-g", "-O1", "-Wall", "-Wextra", "-Werror", "-fsanitize=address,undefined", "-fno-sanitize-recover=all",
		"-o", exe, "testdata/packets.c", "packet.c")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	const shared = 1 << 12
	text := sample("", tensor.String, []int64{7})
	inline := Question{Kind: AskRun, Sequence: 1, Session: 2, Inline: true, Room: 1024, Base: 64, From: 128,
		Outputs: []Place{{Index: 1}, {Index: 2, Type: tensor.Float16, At: 8, Size: 12, Shape: []int64{2, 3}}},
		Inputs: []Place{
			{Index: 0, Type: tensor.String, Size: uint64(len(text.Data)), Shape: text.Shape},
			{Index: 1, Type: tensor.Float64, Shape: []int64{1, 0, 5}},
			{Index: 2, Type: tensor.Bool, Size: 1, Shape: []int64{}},
		}}
	at := inline.Size()
	for i := range inline.Inputs {
		inline.Inputs[i].At = at
		at += (inline.Inputs[i].Size + 7) &^ 7
	}
	packet := inline.Append(nil)
	packet = append(packet, text.Data...)
	for uint64(len(packet)) < at {
		packet = append(packet, 1)
	}
	inMemory := Question{Kind: AskRun, Sequence: math.MaxUint64, Base: 1024, Room: shared - 1024, From: 512,
		Outputs: []Place{{Index: 0, Type: tensor.Int32, At: 512, Size: 4 * 60, Shape: []int64{60}}},
		Inputs:  []Place{{Index: 0, Type: tensor.BFloat16, Size: 400, Shape: []int64{2, 100}}}}
	attached := inMemory
	attached.Attached, attached.Base = true, 0
	good := [][]byte{
		packet, inMemory.Append(nil), attached.Append(nil),
		(&Question{Kind: AskStore, Sequence: 1, Room: shared}).Append(nil),
		(&Question{Kind: AskDrop, Sequence: 1}).Append(nil),
	}
	var in bytes.Buffer
	add := func(packet []byte) {
		var sizes []byte
		sizes = binary.NativeEndian.AppendUint64(sizes, uint64(len(packet)))
		in.Write(binary.NativeEndian.AppendUint64(sizes, shared))
		in.Write(packet)
	}
	for _, packet := range good {
		add(packet)
	}
	odd := []uint64{0, 1, 7, 8, 9, 63, 64, shared - 1, shared, shared + 1, 1 << 31, 1 << 32, 1 << 61, 1 << 62, math.MaxInt64, 1 << 63, math.MaxUint64}
	for _, packet := range good {
		for n := range packet {
			add(packet[:n])
		}
		for range changes {
			changed := bytes.Clone(packet)
			for range 1 + r.IntN(3) {
				word := changed[8*r.IntN(len(changed)/8):]
				if r.IntN(4) == 0 {
					word[r.IntN(8)] = byte(r.Uint32())
				} else {
					binary.NativeEndian.PutUint64(word, odd[r.IntN(len(odd))]+uint64(r.IntN(3))-1)
				}
			}
			add(changed)
		}
	}
	run := exec.Command(exe)
	run.Stdin = &in
	var stderr bytes.Buffer
	run.Stderr = &stderr
	out, err := run.Output()
	if err != nil {
		t.Fatalf("%v\n%s", err, &stderr)
	}
	verdicts := make(map[string]int)
	for n, lines := 0, bufio.NewScanner(bytes.NewReader(out)); lines.Scan(); n++ {
		if n < len(good) && lines.Text() != "ok" {
			t.Errorf("packet %d is good, and yet: %s", n, lines.Text())
		}
		verdicts[lines.Text()]++
	}
	t.Log(verdicts)
	if len(verdicts) < 8 || strings.Count(string(out), "\n") < len(good)*changes {
		t.Errorf("only %d verdicts", len(verdicts))
	}
}

// TestSanitizedPools has threads allocate weights from memories of their own,
// and free each other's, built with the sanitizers.
func TestSanitizedPools(t *testing.T) {
	for _, sanitizers := range []string{"address,undefined", "thread"} {
		exe := filepath.Join(t.TempDir(), "pools")
		build := exec.CommandContext(t.Context(), "cc", "-std=gnu11", "-g", "-O1", "-Wall", "-Wextra", "-Werror", "-fsanitize="+sanitizers, "-fno-sanitize-recover=all",
			"-o", exe, "testdata/pools.c", "readonly.c", "-lpthread")
		if out, err := build.CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		if out, err := exec.CommandContext(t.Context(), exe).CombinedOutput(); err != nil {
			t.Errorf("%s: %v\n%s", sanitizers, err, out)
		}
	}
}
