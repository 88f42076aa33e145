package profile

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/timestamppb"

	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

func digest(n int) string { return fmt.Sprintf("sha256:%064x", n) }

var noon = time.Date(2026, 11, 29, 12, 0, 0, 0, time.UTC)

func example(k Key) *dunlinv1.ModelProfile {
	p := &dunlinv1.ModelProfile{
		Model: "digits", Version: 2, MeasuredAt: timestamppb.New(noon), MeasuredSeconds: 1.5, WeightBytes: 1 << 20,
		Points: []*dunlinv1.ProfilePoint{{
			Setting: &dunlinv1.ModelSetting{Provider: CPU, Batch: 4, Instances: 1, Threads: 2}, Runs: 9, P50Seconds: 0.01, P95Seconds: 0.02, P99Seconds: 0.02,
			RowsPerSecond: 400, PeakBytes: new(uint64(3 << 20)),
		}},
		Recommended: &dunlinv1.ModelSetting{Provider: CPU, Batch: 4, Instances: 1},
		Latency:     []*dunlinv1.LatencyPoint{{Rows: 1, Seconds: 0.004}, {Rows: 4, Seconds: 0.01}},
		Providers:   []*dunlinv1.ProviderCheck{{Provider: CPU, Accepted: true, MaxAbsoluteError: 1e-7}},
	}
	k.Name(p)
	return p
}

func openStore(t *testing.T, dir string) *Store {
	t.Helper()
	s, err := OpenStore(dir)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestStore(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "profiles")
	s := openStore(t, dir)
	k := Key{ModelDigest: digest(1), RuntimeVersion: "1.30.0", DriverVersion: "580.1", FirmwareProfile: "l4", CPUModel: "EPYC"}
	if _, err := s.Get(k, noon); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("from an empty store: %v", err)
	}
	want := example(k)
	if err := s.Put(want); err != nil {
		t.Fatal(err)
	}
	// What a crash leaves.
	if err := os.WriteFile(filepath.Join(dir, temporary+"1"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	s = openStore(t, dir)
	if _, err := os.Stat(filepath.Join(dir, temporary+"1")); err == nil {
		t.Error("what a crash has left is still there")
	}
	got, err := s.Get(k, noon)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, got, protocmp.Transform()); d != "" {
		t.Errorf("not what was kept: %s", d)
	}
	for name, change := range map[string]func(*Key){
		"runtime": func(k *Key) { k.RuntimeVersion = "1.31.0" }, "driver": func(k *Key) { k.DriverVersion = "" },
		"firmware profile": func(k *Key) { k.FirmwareProfile = "t4" }, "processor": func(k *Key) { k.CPUModel = "Xeon" },
		"model": func(k *Key) { k.ModelDigest = digest(2) }, "digest": func(k *Key) { k.ModelDigest = "sha256:../1" },
	} {
		other := k
		change(&other)
		if _, err := s.Get(other, noon); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("with another %s: %v", name, err)
		}
	}
	if n, err := Count(s.dir); n != 1 || err != nil {
		t.Errorf("%d profiles, %v", n, err)
	}
	path := s.path(k.ModelDigest)
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(whole), `"modelDigest"`) {
		t.Errorf("nobody can read %s", whole)
	}
	for _, n := range []int{0, 1, len(whole) / 2, len(whole) - 3} {
		if err := os.WriteFile(path, whole[:n], 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Get(k, noon); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("cut to %d bytes: %v", n, err)
		}
	}
	bad := example(k)
	bad.Recommended.Batch = 0
	if err := s.Put(bad); err == nil {
		t.Error("a batch of none is kept")
	}
	bad = example(k)
	bad.ModelDigest = "sha256:../../x"
	if err := s.Put(bad); err == nil {
		t.Error("a path is kept")
	}
}

func TestStoreTriesAgain(t *testing.T) {
	s := openStore(t, t.TempDir())
	k := Key{ModelDigest: digest(1)}
	p := Unmeasured(Subject{}, ErrGivenUp, noon)
	k.Name(p)
	if err := s.Put(p); err != nil {
		t.Fatal(err)
	}
	if got, err := s.Get(k, noon.Add(time.Hour)); err != nil || got.Unmeasured == "" {
		t.Errorf("after an hour: %v, %v", got, err)
	}
	for _, later := range []time.Duration{7 * time.Hour, -time.Hour} { // the clock may have been set
		if _, err := s.Get(k, noon.Add(later)); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("after %v: %v", later, err)
		}
	}
}

func TestStoreIsBounded(t *testing.T) {
	s := openStore(t, t.TempDir())
	old := time.Now().Add(-24 * time.Hour)
	for n := range maxFiles + 3 {
		path := s.path(digest(n))
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(path, old, old.Add(time.Duration(n)*time.Second)); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Put(example(Key{ModelDigest: digest(maxFiles + 3)})); err != nil {
		t.Fatal(err)
	}
	if n, err := Count(s.dir); n != maxFiles || err != nil {
		t.Errorf("%d profiles, %v", n, err)
	}
	for n, want := range map[int]bool{0: false, 3: false, 4: true, maxFiles + 3: true} {
		if _, err := os.Stat(s.path(digest(n))); (err == nil) != want {
			t.Errorf("number %d: %v", n, err)
		}
	}
}

func TestTold(t *testing.T) {
	dir := t.TempDir()
	s := openStore(t, dir)
	if told := s.Told(); told == nil || len(told) != 0 {
		t.Errorf("%v", told)
	}
	if err := s.SetTold(map[string]string{"digits:1": "one"}, nil); err != nil {
		t.Fatal(err)
	}
	if told := openStore(t, dir).Told(); told["digits:1"] != "one" || len(told) != 1 {
		t.Errorf("%v", told)
	}
	for _, text := range []string{"", "null", "{", "[1]"} {
		if err := os.WriteFile(filepath.Join(dir, toldFile), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if told := s.Told(); told == nil || len(told) != 0 {
			t.Errorf("%q: %v", text, told)
		}
	}
	many := map[string]string{}
	for n := range maxFiles + 10 {
		many[fmt.Sprint(n)] = "x"
	}
	all := func(string) bool { return true }
	if err := s.SetTold(many, all); err != nil || len(many) != maxFiles+10 || len(s.Told()) != maxFiles {
		t.Errorf("%d are kept, %v", len(many), err)
	}
	if err := s.SetTold(many, func(version string) bool { return version == "7" }); err != nil || len(many) != 1 || s.Told()["7"] != "x" {
		t.Errorf("%d are kept, %v", len(many), err)
	}
}

// FuzzDecode: what is read is what the engine may be given, and is the same
// when it is kept again.
func FuzzDecode(f *testing.F) {
	s, err := OpenStore(f.TempDir())
	if err != nil {
		f.Fatal(err)
	}
	k := Key{ModelDigest: digest(1)}
	if err := s.Put(example(k)); err != nil {
		f.Fatal(err)
	}
	b, err := os.ReadFile(s.path(k.ModelDigest))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte(`{"measuredAt":"2026-11-29T12:00:00Z","unmeasured":"no"}`))
	f.Add([]byte(`{"measuredAt":"2026-11-29T12:00:00Z","recommended":{"batch":1,"instances":1},"latency":[{"rows":1,"seconds":"Infinity"}]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := decode(b)
		if err != nil {
			return
		}
		if r := p.Recommended; r == nil && p.Unmeasured == "" || r != nil && (r.Batch == 0 || r.Instances == 0) {
			t.Fatalf("recommended: %v", r)
		}
		for _, l := range p.Latency {
			if !(l.Seconds > 0) || l.Rows == 0 {
				t.Fatalf("latency: %v", l)
			}
		}
		p.ModelDigest = digest(2)
		if err := s.Put(p); err != nil {
			t.Fatal(err)
		}
		b, err = os.ReadFile(s.path(p.ModelDigest))
		if err != nil {
			t.Fatal(err)
		}
		again, err := decode(b)
		if err != nil || !proto.Equal(p, again) {
			t.Fatalf("%v, %v, before %v", again, err, p)
		}
	})
}
