package registry

import (
	"context"
	"crypto"
	"crypto/sha256"
	"debug/elf"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/dunlin/dunlin/internal/pki"
	"github.com/dunlin/dunlin/models"
	"github.com/dunlin/dunlin/models/signing"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// emptyProgram is an ELF file with nothing in it.
func emptyProgram(machine elf.Machine, kind elf.Type) []byte {
	b := append([]byte("\x7fELF\x02\x01\x01"), make([]byte, 57)...)
	b[16], b[18], b[20], b[52] = byte(kind), byte(machine), byte(elf.EV_CURRENT), 64
	return b
}

// trusting has the registry believe an agent key.
func (f *fixture) trusting(key crypto.Signer) {
	f.t.Helper()
	k, err := signing.NewTrustKey(key.Public(), nil, "agent")
	if err != nil {
		f.t.Fatal(err)
	}
	signed, err := signing.NewTrust(&dunlinv1.TrustDocument{
		Version: 1, IssuedAt: timestamppb.Now(), ExpiresAt: timestamppb.New(time.Now().Add(time.Hour)),
		RootKeys: []*dunlinv1.TrustKey{k}, AgentKeys: []*dunlinv1.TrustKey{k}, AgentFloor: "0.7.0",
	})
	if err == nil {
		err = signing.SignTrust(signed, key)
	}
	if err != nil {
		f.t.Fatal(err)
	}
	trust, err := signing.Advance(nil, []*dunlinv1.SignedTrust{signed})
	if err != nil {
		f.t.Fatal(err)
	}
	f.registry.trust = func(context.Context) (*signing.Trust, error) { return trust, nil }
}

// binary is one that is signed as b, and packed as of arch.
func (f *fixture) binary(key crypto.Signer, content []byte, b signing.Binary, arch string) models.ReleaseBinary {
	f.t.Helper()
	path := filepath.Join(f.t.TempDir(), "agent")
	signature, err := signing.SignBinary(signing.Signer{Key: key}, b, sha256.Sum256(content))
	if err == nil {
		err = errors.Join(os.WriteFile(path, content, 0o600), os.WriteFile(path+".sig", signature, 0o600))
	}
	if err != nil {
		f.t.Fatal(err)
	}
	return models.ReleaseBinary{OS: "linux", Arch: arch, Source: path, Signature: path + ".sig"}
}

// release pushes a release, and has it become a version of a model.
func (f *fixture) release(model, version string, binaries ...models.ReleaseBinary) (int64, error) {
	f.t.Helper()
	b, err := models.PackRelease(f.t.Context(), version, binaries)
	if err != nil {
		f.t.Fatal(err)
	}
	f.putBlob(model, b.ConfigBytes)
	f.putBlob(model, b.IndexBytes)
	for _, file := range b.Files {
		raw, err := os.ReadFile(file.Source)
		if err != nil {
			f.t.Fatal(err)
		}
		f.putBlob(model, raw)
	}
	f.putManifest(model, b.ManifestBytes)
	n, _, err := f.registry.Ingest(f.t.Context(), model, b.Digest.String(), 0, "ada")
	return n, err
}

func TestRelease(t *testing.T) {
	f := start(t)
	key, err := pki.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	other, err := pki.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	amd64, arm64 := emptyProgram(elf.EM_X86_64, elf.ET_DYN), emptyProgram(elf.EM_AARCH64, elf.ET_EXEC)
	signed := func(version, arch string) signing.Binary {
		return signing.Binary{Version: version, OS: "linux", Arch: arch}
	}
	good := f.binary(key, amd64, signed("0.8.0", "amd64"), "amd64")
	if _, err := f.release(models.AgentModel, "0.8.0", good); !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), "no trust document") {
		t.Errorf("without a trust document: %v", err)
	}
	f.trusting(key)
	if n, err := f.release(models.AgentModel, "0.8.0", good, f.binary(key, arm64, signed("0.8.0", "arm64"), "arm64")); err != nil || n != 1 {
		t.Fatal(n, err)
	}
	if r := f.versions.last.Config.Release; r == nil || r.Version != "0.8.0" || len(r.Binaries) != 2 {
		t.Errorf("the release is registered as %+v", r)
	}
	for name, c := range map[string]struct {
		model, version string
		binary         models.ReleaseBinary
		says           string
	}{
		"another name":      {"digits", "0.8.0", good, "goes by the name dunlin-agent"},
		"another key":       {models.AgentModel, "0.8.0", f.binary(other, amd64, signed("0.8.0", "amd64"), "amd64"), "signed by no agent key"},
		"another version":   {models.AgentModel, "0.8.1", good, "is signed as version 0.8.0"},
		"another machine":   {models.AgentModel, "0.8.0", f.binary(key, amd64, signed("0.8.0", "arm64"), "arm64"), "not for arm64"},
		"signed for others": {models.AgentModel, "0.8.0", f.binary(key, arm64, signed("0.8.0", "amd64"), "arm64"), "the binary is for linux/amd64"},
		"below the floor":   {models.AgentModel, "0.6.9", f.binary(key, amd64, signed("0.6.9", "amd64"), "amd64"), "below the floor"},
		"no program":        {models.AgentModel, "0.8.0", f.binary(key, []byte("#!/bin/sh\n"), signed("0.8.0", "amd64"), "amd64"), "is not an ELF file"},
		"an object file":    {models.AgentModel, "0.8.0", f.binary(key, emptyProgram(elf.EM_X86_64, elf.ET_REL), signed("0.8.0", "amd64"), "amd64"), "not a program"},
		"unknown machine":   {models.AgentModel, "0.8.0", f.binary(key, amd64, signed("0.8.0", "riscv64"), "riscv64"), "there are no agents for linux/riscv64"},
	} {
		before := f.versions.count()
		if _, err := f.release(c.model, c.version, c.binary); !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v, want %q", name, err, c.says)
		}
		if f.versions.count() != before {
			t.Errorf("%s: it became a version", name)
		}
	}
	// A model does not become a release.
	b := f.bundle(models.AgentModel, digits("v1.onnx"))
	f.putManifest(models.AgentModel, b.ManifestBytes)
	if _, _, err := f.registry.Ingest(t.Context(), models.AgentModel, b.Digest.String(), 0, "ada"); !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), "is for releases of the agent") {
		t.Errorf("a model under the name of the agent: %v", err)
	}
}
