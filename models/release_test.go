package models

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func releaseFiles(t *testing.T) (binary, signature string) {
	t.Helper()
	dir := t.TempDir()
	binary, signature = filepath.Join(dir, "agent"), filepath.Join(dir, "agent.sig")
	for path, size := range map[string]int{binary: 300 << 10, signature: 700} {
		if err := os.WriteFile(path, []byte(strings.Repeat("x", size)), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return binary, signature
}

func TestPackRelease(t *testing.T) {
	binary, signature := releaseFiles(t)
	both := []ReleaseBinary{{"linux", "arm64", binary, signature}, {"linux", "amd64", binary, signature}}
	b, err := PackRelease(t.Context(), "0.8.0", both)
	if err != nil {
		t.Fatal(err)
	}
	slices.Reverse(both)
	if again, err := PackRelease(t.Context(), "0.8.0", both); err != nil || again.Digest != b.Digest {
		t.Errorf("the same binaries in another order: %v, %v", again, err)
	}
	c, err := ParseConfig(b.ConfigBytes)
	if err != nil {
		t.Fatal(err)
	}
	if c.Release == nil || c.Release.Version != "0.8.0" || !slices.Equal(c.Release.Binaries, []string{"linux-amd64", "linux-arm64"}) {
		t.Errorf("the config says %+v", c.Release)
	}
	m, err := ParseManifest(b.ManifestBytes)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Release.Fits(m); err != nil {
		t.Error(err)
	}
	m.Files = m.Files[1:]
	if err := c.Release.Fits(m); err == nil {
		t.Error("a release fits a bundle without one of its files")
	}
	m.Files = append(m.Files, File{Path: "linux-amd64/other"})
	if err := c.Release.Fits(m); err == nil {
		t.Error("a release fits a bundle with another file")
	}

	for name, bad := range map[string]struct {
		version  string
		binaries []ReleaseBinary
		says     string
	}{
		"version":  {"0.8", both, "is not three numbers"},
		"nothing":  {"0.8.0", nil, "has 0 binaries"},
		"twice":    {"0.8.0", append(both, both[0]), "is there twice"},
		"platform": {"0.8.0", []ReleaseBinary{{"linux", "../x", binary, signature}}, "is not OS-ARCH"},
		"no file":  {"0.8.0", []ReleaseBinary{{"linux", "amd64", binary, binary + ".none"}}, "no such file"},
	} {
		if _, err := PackRelease(t.Context(), bad.version, bad.binaries); err == nil || !strings.Contains(err.Error(), bad.says) {
			t.Errorf("%s: %v, want %q", name, err, bad.says)
		}
	}
	if _, err := ParseConfig([]byte(`{"format":1,"entry":"model.onnx","release":{"version":"0.8.0","binaries":["linux-amd64"]}}`)); err == nil {
		t.Error("a release with a model is taken")
	}
}

func TestCompareReleases(t *testing.T) {
	ordered := []string{"(devel)", "0.6.9", "0.7.0", "0.7.10", "0.10.0", "1.0.0"}
	for i, a := range ordered {
		for j, b := range ordered {
			if got := CompareReleases(a, b); (got < 0) != (i < j) || (got > 0) != (i > j) {
				t.Errorf("%s and %s: %d", a, b, got)
			}
		}
	}
}
