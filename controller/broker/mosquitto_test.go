package broker

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/dunlin/dunlin/internal/link"
)

func TestMosquittoLearnsOfAccounts(t *testing.T) {
	m := newMosquitto(t, "a")
	m.start()
	a := mustDial(t, m.address(), credentials{device: "a"})
	if _, err := dial(t, m.address(), credentials{device: "b"}); err == nil {
		t.Fatal("b connected without an account")
	}
	m.account("b", secretOf("b"))
	m.write()
	var b *client
	eventually(t, "b connects", func() bool {
		var err error
		b, err = dial(t, m.address(), credentials{device: "b"})
		return err == nil
	})
	a.subscribe(link.Down("a", "+")) // still connected

	m.account("b", "a new secret")
	m.write()
	b.wantCut()
	mustDial(t, m.address(), credentials{device: "b", secret: "a new secret"})
	if _, err := dial(t, m.address(), credentials{device: "b"}); err == nil {
		t.Error("the old secret is still taken")
	}
	a.subscribe(link.Down("a", "+"))
}

func TestWriteAccounts(t *testing.T) {
	hash, err := HashPassword("x")
	if err != nil {
		t.Fatal(err)
	}
	other, err := HashPassword("x")
	if err != nil || hash == other {
		t.Errorf("two hashes are the same: %v", err)
	}
	parts := strings.Split(hash, "$")
	if len(parts) != 5 || parts[1] != "7" || parts[2] != strconv.Itoa(mosquittoIterations) || len(parts[3]) != 16 || len(parts[4]) != 88 {
		t.Errorf("hash %s is not of the form $7$<iterations>$<12 bytes>$<64 bytes>", hash)
	}

	dir := t.TempDir()
	m := Mosquitto{PasswordFile: filepath.Join(dir, "passwords")}
	if err := m.Write(map[string]string{"b": hash, "a": other, ControllerUser: hash}); err != nil {
		t.Fatal(err)
	}
	want := "a:" + other + "\nb:" + hash + "\n" + ControllerUser + ":" + hash + "\n"
	check := func(mode os.FileMode) {
		t.Helper()
		got, err := os.ReadFile(m.PasswordFile)
		if err != nil || string(got) != want {
			t.Errorf("got %q, want %q: %v", got, want, err)
		}
		if st, err := os.Stat(m.PasswordFile); err != nil || st.Mode().Perm() != mode {
			t.Errorf("mode %v, want %v: %v", st.Mode(), mode, err)
		}
		if files, err := os.ReadDir(dir); err != nil || len(files) != 1 {
			t.Errorf("files %v: %v", files, err)
		}
	}
	check(0o640)
	for name, hash := range map[string]string{"": hash, "a:b": hash, "a\nb": hash, "a b": hash, "é": hash, "dunlin.other": hash,
		"c": "plain", "d": "", "e": hash + "\nx:" + hash, "f": hash + ":"} {
		if err := m.Write(map[string]string{name: hash}); err == nil {
			t.Errorf("account %q: %q was written", name, hash)
		}
	}
	check(0o640)
	if err := os.Chmod(m.PasswordFile, 0o604); err != nil {
		t.Fatal(err)
	}
	want = ""
	if err := m.Write(nil); err != nil {
		t.Fatal(err)
	}
	check(0o604)
	if err := (Mosquitto{PasswordFile: filepath.Join(dir, "no", "passwords")}).Write(nil); err == nil {
		t.Error("written into a folder that is not there")
	}
}

// TestReloadIsForMosquittoOnly: SIGHUP would end this very test.
func TestReloadIsForMosquittoOnly(t *testing.T) {
	dir := t.TempDir()
	m := Mosquitto{PasswordFile: filepath.Join(dir, "passwords"), PIDFile: filepath.Join(dir, "pid")}
	if err := m.Write(nil); err == nil {
		t.Error("no PID file: no error")
	}
	for name, pid := range map[string]string{"this process": strconv.Itoa(os.Getpid()) + "\n", "empty": "", "words": "mosquitto", "a group": "-1",
		"all": "0", "init": "1", "nobody": "999999999", "long": strings.Repeat("1", 100)} {
		if err := os.WriteFile(m.PIDFile, []byte(pid), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := m.Write(nil); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	if _, err := os.Stat(m.PasswordFile); err != nil {
		t.Errorf("the accounts are not written: %v", err)
	}
}

func TestControllerUserIsNoDevice(t *testing.T) {
	if link.CheckDevice(ControllerUser) == nil {
		t.Errorf("a device can be called %s", ControllerUser)
	}
}
