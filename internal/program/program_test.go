package program

import (
	"crypto/rand"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

type config struct {
	First  string `yaml:"first"`
	Second string `yaml:"second-one"`
	Third  string `yaml:"third"`
	Fourth string `yaml:"fourth"`
}

func load(t *testing.T, yaml string, env map[string]string, args ...string) (config, error) {
	t.Helper()
	c := config{First: "default", Second: "default", Third: "default", Fourth: "default"}
	if yaml != "" {
		path := filepath.Join(t.TempDir(), "config.yaml")
		if err := os.WriteFile(path, []byte(yaml), 0o600); err != nil {
			t.Fatal(err)
		}
		args = append(args, "--config", path)
	}
	from := Source{Program: "test", Prefix: "TEST_", Args: args, Getenv: func(name string) string { return env[name] }, Help: io.Discard}
	err := from.Load([]Setting{
		{Name: "first", Value: &c.First}, {Name: "second-one", Value: &c.Second},
		{Name: "third", Value: &c.Third, Environment: "OTHER"}, {Name: "fourth", Value: &c.Fourth},
	}, &c, nil)
	if err != nil && !errors.Is(err, flag.ErrHelp) && !errors.Is(err, ErrUsage) {
		t.Errorf("%v is no usage error", err)
	}
	return c, err
}

func TestPrecedence(t *testing.T) {
	got, err := load(t, "first: file\nsecond-one: file\nthird: file\n", map[string]string{"TEST_SECOND_ONE": "env", "OTHER": "env", "TEST_FIRST": "env"}, "--first", "flag")
	if want := (config{"flag", "env", "env", "default"}); err != nil || got != want {
		t.Errorf("got %+v, %v, want %+v", got, err, want)
	}
	got, err = load(t, "", map[string]string{"TEST_THIRD": "by name", "OTHER": "other"}, "--first", "")
	if want := (config{"", "default", "by name", "default"}); err != nil || got != want {
		t.Errorf("got %+v, %v, want %+v", got, err, want)
	}
}

func TestFaults(t *testing.T) {
	if _, err := load(t, "", nil, "--first", "a", "surplus"); err == nil || !strings.Contains(err.Error(), `"surplus"`) {
		t.Errorf("a surplus argument is not named: %v", err)
	}
	_, err := load(t, "first: a\nunknown: b\n", nil)
	if err == nil || !strings.Contains(err.Error(), `unknown`) || !strings.Contains(err.Error(), "2") {
		t.Errorf("an unknown key is not named with its line: %v", err)
	}
	if _, err := load(t, strings.Repeat("#", maxFile+1), nil); err == nil {
		t.Error("a file above the limit is read")
	}
	if _, err := load(t, "", nil, "--help"); !errors.Is(err, flag.ErrHelp) {
		t.Errorf("help: %v", err)
	}
	if _, err := load(t, "", nil, "--config", "/does/not/exist"); err == nil {
		t.Error("a missing file is no error")
	}
}

func TestSecrets(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string, mode os.FileMode) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		return path
	}
	file := write("token", "from-file\n", 0o600)
	for name, c := range map[string]struct {
		args  []string
		env   string
		want  string
		fault string
	}{
		"none":              {},
		"file":              {args: []string{"--token", "@" + file}, want: "from-file"},
		"environment":       {env: "s3cret", want: "s3cret"},
		"environment, file": {env: "@" + file, want: "from-file"},
		"yaml":              {args: []string{"--config", write("private.yaml", "token: s3cret", 0o600)}, want: "s3cret"},
		"yaml, file":        {args: []string{"--config", write("file.yaml", "token: '@"+file+"'", 0o644)}, want: "from-file"},
		"yaml, nothing":     {args: []string{"--config", write("public.yaml", "name: x", 0o644)}},
		"empty":             {args: []string{"--token", ""}, env: "s3cret"},
		"line":              {args: []string{"--token", "s3cret"}, fault: "token: everybody on this machine can read command lines: give --token @FILE, or set TOKEN"},
		"line, with =":      {args: []string{"--token=s3cret"}, env: "other", fault: "give --token @FILE"},
		"yaml for others":   {args: []string{"--config", write("shared.yaml", "token: s3cret", 0o640)}, fault: "shared.yaml holds token and others can read it, its mode is 0640: run chmod 600 " + dir},
		"no file":           {args: []string{"--token", "@" + dir + "/missing"}, fault: "token: open "},
		"large file":        {args: []string{"--token", "@" + write("large", strings.Repeat("s3cret", maxSecret), 0o600)}, fault: "has more than the 65536 bytes"},
		"yaml fault":        {args: []string{"--config", write("bad.yaml", "token: s3cret\nnome: x", 0o600)}, fault: "nome"},
	} {
		got := struct {
			Token string `yaml:"token"`
			Name  string `yaml:"name"`
		}{}
		env := map[string]string{"TOKEN": c.env}
		err := Source{Program: "test", Prefix: "TEST_", Args: c.args, Getenv: func(name string) string { return env[name] }, Help: io.Discard}.Load(
			[]Setting{{Name: "token", Value: &got.Token, Environment: "TOKEN", Secret: true}, {Name: "name", Value: &got.Name}}, &got, nil)
		if c.fault == "" && (err != nil || got.Token != c.want) {
			t.Errorf("%s: got %q, %v, want %q", name, got.Token, err, c.want)
		}
		if c.fault != "" && (err == nil || !strings.Contains(err.Error(), c.fault) || strings.Contains(err.Error(), "s3cret")) {
			t.Errorf("%s: got %v, want %s", name, err, c.fault)
		}
	}
}

// TestHideMemory hides the memory of a process of its own: this one stays open
// to debuggers.
func TestHideMemory(t *testing.T) {
	if os.Getenv("PROGRAM_HIDES") != "" {
		if err := HideMemory(); err != nil {
			t.Fatal(err)
		}
		// What a program reads of itself stays readable.
		for _, name := range []string{"maps", "status", "stat", "statm", "limits", "cmdline", "smaps"} {
			if _, err := os.ReadFile("/proc/self/" + name); err != nil {
				t.Error(err)
			}
		}
		for _, name := range []string{"fd", "task"} {
			if _, err := os.ReadDir("/proc/self/" + name); err != nil {
				t.Error(err)
			}
		}
		if _, err := os.Readlink("/proc/self/exe"); err != nil {
			t.Error(err)
		}
		other := exec.Command("cat", fmt.Sprintf("/proc/%d/environ", os.Getpid()))
		err := other.Run()
		limits, _ := os.ReadFile("/proc/self/limits")
		fmt.Printf("environ readable: %t\n%s", err == nil, limits)
		return
	}
	cmd := exec.Command(os.Args[0], "-test.run=TestHideMemory")
	cmd.Env = append(os.Environ(), "PROGRAM_HIDES=1")
	if os.Getuid() == 0 { // who may read everything
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		cmd.Dir = "/"
		// The test's own program lies where only root may go.
		path := filepath.Join(os.TempDir(), "program.test."+rand.Text())
		raw, err := os.ReadFile(os.Args[0])
		if err != nil {
			t.Fatal(err)
		}
		defer os.Remove(path)
		if err := os.WriteFile(path, raw, 0o755); err != nil {
			t.Fatal(err)
		}
		cmd.Path = path
	}
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "environ readable: false") || !strings.Contains(strings.Join(strings.Fields(string(out)), " "), "Max core file size 0 0 bytes") {
		t.Errorf("%v\n%s", err, out)
	}
}

func TestCheckAddress(t *testing.T) {
	for address, ok := range map[string]bool{
		"127.0.0.1:80": true, "[::1]:80": true, "localhost:http": true, "127.1.2.3:0": true,
		"0.0.0.0:80": false, ":80": false, "[::]:80": false, "example.com:80": false, "127.0.0.1": false, "127.0.0.1:x": false, "192.168.0.1:80": false,
	} {
		if err := CheckAddress(address); (err == nil) != ok {
			t.Errorf("CheckAddress(%q) = %v", address, err)
		}
	}
	for url, ok := range map[string]bool{
		"http://localhost": true, "http://127.0.0.1:8080/": true,
		"https://localhost": false, "http://": false, "http://user:secret@localhost": false, "http://localhost?a": false, "http://10.0.0.1": false, "http://a\x7f": false, "http://localhost:99999": false,
	} {
		err := CheckURL(url, "http")
		if (err == nil) != ok {
			t.Errorf("CheckURL(%q) = %v", url, err)
		}
		if err != nil && strings.Contains(err.Error(), "secret") {
			t.Errorf("the error shows a password: %v", err)
		}
	}
	if err := CheckURL("tcp://127.0.0.1:1883", "mqtt", "tcp"); err != nil {
		t.Error(err)
	}
	if err := CheckURL("tcp://127.0.0.1", "mqtt", "tcp"); err == nil {
		t.Error("a broker without a port is taken")
	}
	for url, ok := range map[string]bool{
		"https://example.com": true, "mqtts://example.com:8883": true, "mqtts://10.0.0.1:8883": true,
		"mqtts://example.com": false, "http://127.0.0.1": false, "tcp://127.0.0.1:1883": false, "https://:443": false,
	} {
		if err := CheckURL(url, "https", "mqtts"); (err == nil) != ok {
			t.Errorf("CheckURL(%q) = %v", url, err)
		}
	}
}

func TestLockFolder(t *testing.T) {
	dir := t.TempDir()
	first, err := LockFolder(dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := LockFolder(dir); err == nil {
		t.Error("a folder was locked twice")
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	again, err := LockFolder(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := again.Close(); err != nil {
		t.Fatal(err)
	}
}
