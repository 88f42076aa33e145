package reconcile

import (
	"bytes"
	"context"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/dunlin/dunlin/models"
	"github.com/dunlin/dunlin/models/signing"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// testRelease packs a release of programs by their architectures.
func testRelease(t *testing.T, programs map[string][]byte) (*testBundle, *dunlinv1.DesiredAgent) {
	t.Helper()
	var binaries []models.ReleaseBinary
	b := &testBundle{blobs: map[digest.Digest][]byte{}, files: map[string][]byte{}}
	for arch, content := range programs {
		path := filepath.Join(t.TempDir(), "agent")
		if err := errors.Join(os.WriteFile(path, content, 0o600), os.WriteFile(path+".sig", []byte("signature for "+arch), 0o600)); err != nil {
			t.Fatal(err)
		}
		binaries = append(binaries, models.ReleaseBinary{OS: "linux", Arch: arch, Source: path, Signature: path + ".sig"})
	}
	packed, err := models.PackRelease(t.Context(), "0.8.0", binaries)
	if err != nil {
		t.Fatal(err)
	}
	for _, raw := range [][]byte{packed.ConfigBytes, packed.IndexBytes, packed.ManifestBytes} {
		b.blobs[digest.FromBytes(raw)] = raw
	}
	for _, f := range packed.Files {
		raw, err := os.ReadFile(f.Source)
		if err != nil {
			t.Fatal(err)
		}
		b.blobs[f.Digest], b.files[f.Path] = raw, raw
	}
	b.digest = packed.Digest
	return b, &dunlinv1.DesiredAgent{AgentVersion: "0.8.0", Version: 1, Digest: packed.Digest.String()}
}

// lacking gives the bytes of a file's chunks that another file does not have.
func lacking(t *testing.T, other, file string) (n int64) {
	t.Helper()
	have := map[string]bool{}
	for _, path := range []string{other, file} {
		index, err := models.ChunkFile(t.Context(), path, "x")
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range index.Chunks {
			if path == file && !have[string(c.Sha256)] {
				n += int64(c.Length)
			}
			have[string(c.Sha256)] = true
		}
	}
	return n
}

func TestFetchProgram(t *testing.T) {
	rng := seeded(t)
	have := slices.Concat(blocks(rng, 40)...)
	other := slices.Concat(blocks(rng, 40)...)
	// A program with a part in the middle that is new.
	program := slices.Concat(have[:len(have)/2], block(rng), have[len(have)/2:])
	b, want := testRelease(t, map[string][]byte{runtime.GOARCH: program, "riscv64": other})
	reg := serveBundles(t, b)
	d := startDevice(t, reg)
	installed := filepath.Join(t.TempDir(), "dunlin-agent")
	if err := os.WriteFile(installed, have, 0o755); err != nil {
		t.Fatal(err)
	}
	folder := filepath.Join(t.TempDir(), "fetch")
	var seen uint64
	told := func(present, total uint64) { seen = max(seen, total) }

	// It is cut short twice, and goes on.
	for range 2 {
		ctx, cancel := context.WithCancel(t.Context())
		n := 0
		reg.setFault(func(of digest.Digest, _ int64, _ []byte) verdict {
			if n++; n == 8 {
				cancel()
			}
			return pass
		})
		_ = d.FetchProgram(ctx, want, folder, nil, told)
		cancel()
	}
	reg.setFault(nil)
	if err := d.FetchProgram(t.Context(), want, folder, []string{filepath.Join(folder, "nothing"), installed}, told); err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string][]byte{models.ReleaseFile: program, models.ReleaseSignature: []byte("signature for " + runtime.GOARCH)} {
		got, err := os.ReadFile(filepath.Join(folder, name))
		if err != nil || !bytes.Equal(got, content) {
			t.Errorf("%s has %d bytes, want %d (%v)", name, len(got), len(content), err)
		}
	}
	if entries, err := os.ReadDir(folder); err != nil || len(entries) != 2 {
		t.Errorf("left in the folder: %v, %v", entries, err)
	}
	if seen == 0 {
		t.Error("nobody was told how large it is")
	}
	if asked := reg.take(b.blobOf("linux-riscv64/" + models.ReleaseFile)); len(asked) > 0 {
		t.Error("another system's program was fetched")
	}

	// Only what changed travels.
	before := reg.servedBytes()
	again := filepath.Join(t.TempDir(), "fetch")
	if err := d.FetchProgram(t.Context(), want, again, []string{installed}, told); err != nil {
		t.Fatal(err)
	}
	lacks := lacking(t, installed, filepath.Join(again, models.ReleaseFile))
	if n := reg.servedBytes() - before; lacks >= int64(len(program)) || n > lacks+64<<10 { // and the documents
		t.Errorf("%d of %d bytes travelled, %d are in chunks that are new", n, len(program), lacks)
	}

	// What is not what its digest says is refused, and nothing of it stays.
	reg.setFault(func(of digest.Digest, _ int64, p []byte) verdict {
		if of == b.blobOf("linux-"+runtime.GOARCH+"/"+models.ReleaseFile) {
			p[0] ^= 1
		}
		return pass
	})
	bad := filepath.Join(t.TempDir(), "fetch")
	err := d.FetchProgram(t.Context(), want, bad, nil, told)
	if r, ok := errors.AsType[*signing.RefusedError](err); !ok || !strings.Contains(r.Reason, "SHA-256") {
		t.Errorf("wrong bytes: %v", err)
	}
	if entries, err := os.ReadDir(bad); err != nil || len(entries) != 0 {
		t.Errorf("left of it: %v, %v", entries, err)
	}
	reg.setFault(nil)

	none, wantNone := testRelease(t, map[string][]byte{"riscv64": other})
	maps.Copy(reg.blobs, none.blobs)
	err = d.FetchProgram(t.Context(), wantNone, bad, nil, told)
	if r, ok := errors.AsType[*signing.RefusedError](err); !ok || !strings.Contains(r.Reason, "no binary for linux-"+runtime.GOARCH) {
		t.Errorf("a release without this system's binary: %v", err)
	}
	model := pack(t, map[string][][]byte{"model.onnx": blocks(rng, 2)})
	maps.Copy(reg.blobs, model.blobs)
	err = d.FetchProgram(t.Context(), &dunlinv1.DesiredAgent{AgentVersion: "0.8.0", Version: 1, Digest: model.digest.String()}, bad, nil, told)
	if r, ok := errors.AsType[*signing.RefusedError](err); !ok || !strings.Contains(r.Reason, "not one of a release") {
		t.Errorf("a model: %v", err)
	}
}

// A release comes by the way that bundles come.
func TestFetchProgramByAnotherWay(t *testing.T) {
	rng := seeded(t)
	program := block(rng)
	b, want := testRelease(t, map[string][]byte{runtime.GOARCH: program})
	d := startDevice(t, serveBundles(t)) // the registry cannot give it
	by := serveBundles(t, b)
	d.cfg.Origin = func(Source, Registry) Source { return NewRemote(by.registry()) }
	folder := filepath.Join(t.TempDir(), "fetch")
	if err := d.FetchProgram(t.Context(), want, folder, nil, func(uint64, uint64) {}); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(filepath.Join(folder, models.ReleaseFile)); err != nil || !bytes.Equal(got, program) {
		t.Errorf("it has %d bytes, want %d (%v)", len(got), len(program), err)
	}
}
