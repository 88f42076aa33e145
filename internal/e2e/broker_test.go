package e2e

import (
	"context"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"

	"github.com/dunlin/dunlin/controller/broker"
)

// onEachBroker runs a test with the embedded broker, and with Mosquitto as an
// external one.
func onEachBroker(t *testing.T, test func(*testing.T, *Fleet)) {
	t.Run("embedded", func(t *testing.T) { test(t, newFleet(t)) })
	t.Run("mosquitto", func(t *testing.T) { test(t, newMosquittoFleet(t)) })
}

// newMosquittoFleet starts Mosquitto with a configuration, a password file and
// an ACL file of its own, and a controller that uses it.
func newMosquittoFleet(t *testing.T) *Fleet {
	t.Helper()
	path, err := exec.LookPath("mosquitto")
	if err != nil {
		path = "/usr/sbin/mosquitto" // not on everybody's path
	}
	if _, err := os.Stat(path); err != nil {
		t.Fatal("no mosquitto: run make test, which installs it")
	}
	dir := t.TempDir()
	address, err := FreeAddress()
	if err != nil {
		t.Fatal(err)
	}
	_, portText, _ := net.SplitHostPort(address)
	port, err := strconv.Atoi(portText)
	if err != nil {
		t.Fatal(err)
	}
	accounts := broker.Mosquitto{PasswordFile: filepath.Join(dir, "passwords"), PIDFile: filepath.Join(dir, "pid")}
	acl, config := filepath.Join(dir, "acl"), filepath.Join(dir, "mosquitto.conf")
	text := accounts.Config(port, acl)
	if os.Getuid() == 0 {
		text += "user root\n" // it could not read its files otherwise
	}
	for path, text := range map[string]string{acl: broker.MosquittoACL, config: text, accounts.PasswordFile: ""} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	p, err := Start("mosquitto", filepath.Join(dir, "log"), nil, path, "-c", config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		p.Kill()
		if t.Failed() {
			t.Logf("--- end of mosquitto's log ---\n%s", p.LogTail(60))
		}
	})
	if err := p.Wait(within(t), func(ctx context.Context) error {
		c, err := new(net.Dialer).DialContext(ctx, "tcp", address)
		if err != nil {
			return err
		}
		return c.Close()
	}); err != nil {
		t.Fatal(err)
	}
	f, err := NewFleet(programs, t.TempDir(), library)
	if err != nil {
		t.Fatal(err)
	}
	f.MQTT = address
	f.ControllerArgs = []string{"--broker-url", "mqtt://" + address,
		"--mosquitto-password-file", accounts.PasswordFile, "--mosquitto-pid-file", accounts.PIDFile}
	t.Cleanup(func() { stop(t, f) })
	if err := f.StartController(within(t)); err != nil {
		t.Fatalf("%v\n%s", err, f.Controller.LogTail(50))
	}
	return f
}
