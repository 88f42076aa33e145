package registry

import (
	"context"
	"crypto/sha256"
	"debug/elf"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/dunlin/dunlin/models"
)

// machines are the architectures that an agent's binary may be for, by Go's
// names of them.
var machines = map[string]elf.Machine{"amd64": elf.EM_X86_64, "arm64": elf.EM_AARCH64}

// checkRelease says whether the files in dir are a release of the agent: a
// program for each system that it names, signed for that system and as that
// version by an agent key of the trust document. Devices look at it again.
func (r *Registry) checkRelease(ctx context.Context, dir string, m *models.Manifest, release *models.Release) error {
	if err := release.Fits(m); err != nil {
		return invalid(err)
	}
	if r.trust == nil {
		return fmt.Errorf("%w: this registry has no trust document, so no agent key counts", ErrInvalid)
	}
	trust, err := r.trust(ctx)
	if err != nil {
		return fmt.Errorf("the trust document: %w", err)
	}
	for _, platform := range release.Binaries {
		system, arch, _ := strings.Cut(platform, "-")
		path := platform + "/" + models.ReleaseFile
		file := filepath.Join(dir, filepath.FromSlash(path))
		if err := checkProgram(file, system, arch); err != nil {
			return fmt.Errorf("%w: %s: %w", ErrInvalid, path, err)
		}
		binary, _ := m.File(path)
		signature, err := os.ReadFile(file + strings.TrimPrefix(models.ReleaseSignature, models.ReleaseFile))
		if err != nil {
			return fmt.Errorf("read the signature of %s: %w", path, err)
		}
		sum, err := sumOf(binary)
		if err != nil {
			return err
		}
		b, err := trust.AdmitBinary(sum, system, arch, signature, time.Now())
		if err != nil {
			return fmt.Errorf("%w: %s: %w", ErrInvalid, path, err)
		}
		if b.Version != release.Version {
			return fmt.Errorf("%w: %s is signed as version %s, the release is %s", ErrInvalid, path, b.Version, release.Version)
		}
	}
	return nil
}

func sumOf(f models.File) (sum [sha256.Size]byte, err error) {
	raw, err := hex.DecodeString(f.Digest.Encoded())
	if err != nil || len(raw) != len(sum) {
		return sum, fmt.Errorf("digest %q is not one of SHA-256", f.Digest)
	}
	return [sha256.Size]byte(raw), nil
}

// checkProgram says whether a file is a program for a system.
func checkProgram(file, system, arch string) error {
	want, known := machines[arch]
	if system != "linux" || !known {
		return fmt.Errorf("there are no agents for %s/%s, only for linux on amd64 and arm64", system, arch)
	}
	f, err := elf.Open(file)
	if err != nil {
		return fmt.Errorf("is not an ELF file: %w", err)
	}
	defer f.Close()
	if f.Class != elf.ELFCLASS64 || f.Machine != want {
		return fmt.Errorf("is for %s %s, not for %s", f.Class, f.Machine, arch)
	}
	if f.Type != elf.ET_EXEC && f.Type != elf.ET_DYN {
		return fmt.Errorf("is an ELF file of type %s, not a program", f.Type)
	}
	return nil
}
