package controller

import (
	"crypto/x509"
	"errors"
	"flag"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/dunlin/dunlin/controller/store"
	"github.com/dunlin/dunlin/internal/pki"
	"github.com/dunlin/dunlin/internal/program"
)

// TestSetUpMosquitto: the controller keeps the files that the command makes.
func TestSetUpMosquitto(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "mosquitto")
	none := func(string) string { return "" }
	c, err := LoadMosquittoConfig([]string{"--dir", dir, "--host", "127.0.0.1", "--port", "1", "--enrol-port", "2"}, none, io.Discard)
	must(t, err)
	trust := testTrust(t)
	must(t, setUpMosquitto(t.Context(), c, trust))
	read := func(name string) string {
		t.Helper()
		b, err := os.ReadFile(filepath.Join(dir, name))
		must(t, err)
		return string(b)
	}
	if text := read("mosquitto.conf"); !strings.Contains(text, "\nlistener 1\n") || !strings.Contains(text, "\nlistener 2\n") || !strings.Contains(text, "\nacl_file "+dir+"/acl\n") {
		t.Errorf("got %s", text)
	}
	before := read("acl")
	if !strings.Contains(before, "\nuser gone\n") {
		t.Errorf("got %s", before)
	}
	if err := os.WriteFile(filepath.Join(dir, "acl"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	b, err := openBus(t.Context(), c.Config, trust, slog.New(slog.DiscardHandler))
	must(t, err)
	if b.url != "mqtts://127.0.0.1:1" || read("acl") != before {
		t.Errorf("url %s, acl %s", b.url, read("acl"))
	}
	c.Host = "example.com"
	if err := setUpMosquitto(t.Context(), c, trust); err == nil || !strings.Contains(err.Error(), "example.com") {
		t.Errorf("a host that is not in the certificate: %v", err)
	}

	for _, tt := range []struct {
		args []string
		want string
	}{
		{[]string{"--host", "h"}, "dir is missing"},
		{[]string{"--dir", "d"}, "host is missing"},
		{[]string{"--dir", "d", "--host", "h", "--port", "70000"}, "broker-url"},
		{[]string{"--dir", "d", "--host", "h", "--enrol-port", "8883"}, "enrol-port is 8883"},
		{[]string{"--dir", "d", "--host", "h", "x"}, "unexpected argument"},
	} {
		if _, err := LoadMosquittoConfig(tt.args, none, io.Discard); !errors.Is(err, program.ErrUsage) || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%v: %v, want %q", tt.args, err, tt.want)
		}
	}
	if _, err := LoadMosquittoConfig([]string{"--help"}, none, io.Discard); !errors.Is(err, flag.ErrHelp) {
		t.Errorf("got %v", err)
	}
}

// TestDeviceTLS: to a broker the controller is the device, for some minutes.
func TestDeviceTLS(t *testing.T) {
	st, err := store.Open(t.Context(), filepath.Join(t.TempDir(), storeFile), store.Options{})
	must(t, err)
	defer st.Close()
	c := DefaultConfig()
	c.Data = t.TempDir()
	trust, err := openTrust(t.Context(), c, st)
	must(t, err)
	config, err := trust.DeviceTLS("cam-1", "broker")
	must(t, err)
	own, err := config.GetClientCertificate(nil)
	must(t, err)
	chain, err := pki.ParseCertificates(own.Certificate)
	must(t, err)
	must(t, pki.VerifyChain(chain, trust.Roots(), time.Now(), x509.ExtKeyUsageClientAuth))
	if name, ok := pki.DeviceOf(chain[0]); !ok || name != "cam-1" || time.Until(chain[0].NotAfter) > 10*time.Minute || config.ServerName != "broker" {
		t.Errorf("%q until %v, for %s", name, chain[0].NotAfter, config.ServerName)
	}
}
