package dunlin

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// exposure is the most that systemd may find wrong with a unit, in tenths: 0
// is best, 100 worst, and 20 is "OK".
const exposure = "20"

// TestUnits holds the systemd units against what systemd itself says of them,
// where it is installed.
func TestUnits(t *testing.T) {
	if _, err := exec.LookPath("systemd-analyze"); err != nil {
		t.Skip("systemd is not installed: its units are not verified")
	}
	for _, name := range []string{"dunlin-agent", "dunlin-controller"} {
		t.Run(name, func(t *testing.T) {
			unit := filepath.Join("cmd", name, name+".service")
			text, err := os.ReadFile(unit)
			if err != nil {
				t.Fatal(err)
			}
			for _, line := range []string{"User=" + name, "LimitCORE=0", "NoNewPrivileges=yes", "ProtectSystem=strict", "CapabilityBoundingSet=", "MemoryDenyWriteExecute=yes"} {
				if !strings.Contains(string(text), "\n"+line+"\n") {
					t.Errorf("%s does not say %s", unit, line)
				}
			}
			// The program need not be installed here.
			installed := strings.Replace(string(text), "ExecStart=/usr/bin/"+name+" ", "ExecStart=/bin/true ", 1)
			if installed == string(text) {
				t.Fatalf("%s does not start /usr/bin/%s", unit, name)
			}
			there := filepath.Join(t.TempDir(), name+".service")
			if err := os.WriteFile(there, []byte(installed), 0o600); err != nil {
				t.Fatal(err)
			}
			out, err := exec.CommandContext(t.Context(), "systemd-analyze", "verify", "--man=no", there).CombinedOutput()
			if err != nil || strings.Contains(string(out), there) { // it warns of lines that it leaves out
				t.Errorf("systemd-analyze verify: %v\n%s", err, out)
			}
			out, err = exec.CommandContext(t.Context(), "systemd-analyze", "security", "--no-pager", "--offline=true", "--threshold="+exposure, there).CombinedOutput()
			if strings.Contains(string(out), "unrecognized option") {
				t.Skip("this systemd does not judge units that are not loaded")
			}
			if err != nil {
				t.Errorf("systemd-analyze security: %v\n%s", err, out)
			}
			lines := strings.Split(strings.TrimSpace(string(out)), "\n")
			t.Log(lines[len(lines)-1])
		})
	}
	for _, name := range []string{"dunlin-agent", "dunlin-controller"} {
		text, err := os.ReadFile(filepath.Join("cmd", name, name+".sysusers"))
		if err != nil || !strings.HasPrefix(string(text), "u "+name+" - ") {
			t.Errorf("sysusers of %s: %q, %v", name, text, err)
		}
	}
}
