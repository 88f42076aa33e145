package e2e

import (
	"context"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// onEachBroker runs a test with the embedded broker, and with Mosquitto as an
// external one.
func onEachBroker(t *testing.T, test func(*testing.T, *Fleet)) {
	t.Run("embedded", func(t *testing.T) { test(t, newFleet(t)) })
	t.Run("mosquitto", func(t *testing.T) { test(t, newMosquittoFleet(t)) })
}

// newMosquittoFleet starts Mosquitto with the files that the controller made
// for it, and a controller that uses it.
func newMosquittoFleet(t *testing.T) *Fleet {
	t.Helper()
	path, err := exec.LookPath("mosquitto")
	if err != nil {
		path = "/usr/sbin/mosquitto" // not on everybody's path
	}
	if _, err := os.Stat(path); err != nil {
		t.Fatal("no mosquitto: run make test, which installs it")
	}
	address, err := FreeAddress()
	if err != nil {
		t.Fatal(err)
	}
	enrol, err := FreeAddress()
	if err != nil {
		t.Fatal(err)
	}
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		t.Fatal(err)
	}
	_, enrolPort, err := net.SplitHostPort(enrol)
	if err != nil {
		t.Fatal(err)
	}
	f, err := NewFleet(programs, t.TempDir(), library)
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(f.Dir, "mosquitto")
	if _, err := Run(within(t), nil, f.Programs.Controller, "broker", "config", "mosquitto",
		"--data", f.controllerData(), "--dir", dir, "--host", host, "--port", port, "--enrol-port", enrolPort); err != nil {
		t.Fatal(err)
	}
	config := filepath.Join(dir, "mosquitto.conf")
	if os.Getuid() == 0 {
		text, err := os.ReadFile(config)
		if err == nil {
			err = os.WriteFile(config, append(text, "user root\n"...), 0o600) // it could not read its files otherwise
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	p, err := Start("mosquitto", filepath.Join(f.Dir, "mosquitto.log"), nil, path, "-c", config)
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
	f.MQTT, f.EnrolMQTT = address, enrol
	f.ControllerArgs = []string{"--broker-url", "mqtts://" + address, "--mosquitto-dir", dir}
	t.Cleanup(func() { stop(t, f) })
	if err := f.StartController(within(t)); err != nil {
		t.Fatalf("%v\n%s", err, f.Controller.LogTail(50))
	}
	return f
}
