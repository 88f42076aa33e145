package e2e

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestImportFromStick has a device that cannot reach the registry get the
// version that it is to have from an OCI layout: not from an altered one, nor
// from one of another controller.
func TestImportFromStick(t *testing.T) {
	f, err := NewFleet(programs, t.TempDir(), library)
	if err != nil {
		t.Fatal(err)
	}
	f.ControllerArgs = []string{"--hosts", pathHost + ",127.0.0.1"}
	t.Cleanup(func() { stop(t, f) })
	if err := f.StartController(within(t)); err != nil {
		t.Fatal(err)
	}
	newNarrow(t, f.MQTT, 10_000_000) // and none to the registry
	a := startAgent(t, f, "device-1", "--delivery", "https", "--controller", "mqtts://"+strings.Replace(f.MQTT, "127.0.0.1", pathHost, 1))
	cli(t, f, "push", digitsFile("v1"), "digits:1")
	cli(t, f, "push", digitsFile("v2"), "digits:2")
	apply(t, f, "digits", 1)
	stick, tarred := filepath.Join(f.Dir, "stick"), filepath.Join(f.Dir, "stick.tar")
	cli(t, f, "bundle", "export", "digits:1", "-o", stick)
	cli(t, f, "bundle", "export", "digits:2", "-o", tarred)

	take := func(path string) error {
		_, err := Run(within(t), nil, f.Programs.Agent, "import", "--data", a.Data, path)
		return err
	}
	eventually(t, func() string {
		for _, d := range devices(t, f) {
			if d.Name == "device-1" && d.Connected {
				return ""
			}
		}
		return "device-1 is not connected"
	})
	// One byte of the model is another one.
	altered := filepath.Join(f.Dir, "altered")
	if err := os.CopyFS(altered, os.DirFS(stick)); err != nil {
		t.Fatal(err)
	}
	alterModel(t, altered, digitsFile("v1"))
	if err := take(altered); err == nil || !strings.Contains(err.Error(), "is damaged or was altered") {
		t.Fatalf("an altered stick: %v", err)
	}
	// Another controller's signatures count for nothing here.
	foreign := newFleet(t)
	cli(t, foreign, "push", digitsFile("v1"), "digits:1")
	cli(t, foreign, "bundle", "export", "digits:1", "-o", filepath.Join(f.Dir, "foreign"))
	if err := take(filepath.Join(f.Dir, "foreign")); err == nil || !strings.Contains(err.Error(), "trust document") {
		t.Fatalf("another controller's stick: %v", err)
	}
	if why := serves(t, a, 1); why == "" {
		t.Fatal("the device serves already: the registry is reached")
	}

	if err := take(stick); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() string { return serves(t, a, 1) })

	// The other form, while the agent is away.
	a.Kill()
	if err := take(tarred); err != nil {
		t.Fatal(err)
	}
	if err := f.RestartAgent(within(t), a); err != nil {
		t.Fatal(err)
	}
	apply(t, f, "digits", 2)
	eventually(t, func() string { return serves(t, a, 2) })
	eventually(t, func() string {
		left, err := os.ReadDir(filepath.Join(a.Data, "imports", "blobs", "sha256"))
		if err != nil {
			t.Fatal(err)
		}
		if len(left) > 0 {
			return "what is installed takes room among the imports"
		}
		return ""
	})
}

// alterModel changes the blob of a layout that is the file.
func alterModel(t *testing.T, layout, file string) {
	t.Helper()
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	paths, err := filepath.Glob(filepath.Join(layout, "blobs", "sha256", "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range paths {
		raw, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if bytes.Equal(raw, want) {
			raw[len(raw)/2] ^= 1
			if err := os.WriteFile(path, raw, 0o600); err != nil {
				t.Fatal(err)
			}
			return
		}
	}
	t.Fatalf("%s holds no blob that is %s", layout, file)
}
