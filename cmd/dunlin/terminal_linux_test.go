package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// openTerminal gives both ends of a new pseudo-terminal.
func openTerminal(t *testing.T) (user, program *os.File) {
	t.Helper()
	user, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { user.Close() })
	if err := unix.IoctlSetPointerInt(int(user.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(user.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	program, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { program.Close() })
	return user, program
}

func echoes(t *testing.T, terminal *os.File) bool {
	t.Helper()
	s, err := unix.IoctlGetTermios(int(terminal.Fd()), unix.TCGETS)
	if err != nil {
		t.Fatal(err)
	}
	return s.Lflag&unix.ECHO != 0
}

// typeLine types a line as soon as the program waits for it without showing it.
func typeLine(t *testing.T, user, program *os.File, done <-chan int, line string) {
	t.Helper()
	for deadline := time.Now().Add(patience); echoes(t, program); {
		if time.Now().After(deadline) {
			t.Fatalf("nothing is waited for after %s", patience)
		}
		select {
		case code := <-done:
			t.Fatalf("ended with %d", code)
		case <-time.After(time.Millisecond):
		}
	}
	if _, err := user.WriteString(line + "\n"); err != nil {
		t.Fatal(err)
	}
}

// TestPrompt types a token at a terminal: it is not shown, and the terminal
// is afterwards as it was.
func TestPrompt(t *testing.T) {
	url := login(t)
	token := os.Getenv("DUNLIN_TOKEN")
	t.Setenv("DUNLIN_TOKEN", "")
	t.Setenv("XDG_CONFIG_HOME", t.TempDir())
	user, program := openTerminal(t)
	t.Setenv("TERM", "xterm")
	if !isTerminal(program) || !coloured(program) {
		t.Error("a terminal was not taken for one")
	}
	t.Setenv("NO_COLOR", "1")
	if coloured(program) {
		t.Error("NO_COLOR was not respected")
	}
	if !echoes(t, program) {
		t.Fatal("a new terminal does not echo")
	}
	var stdout, stderr bytes.Buffer
	done := make(chan int, 1)
	go func() { done <- run(t.Context(), []string{"login", url}, program, &stdout, &stderr) }()
	typeLine(t, user, program, done, token)
	if code := <-done; code != exitOK {
		t.Fatalf("exit code %d: %s", code, stderr.String())
	}
	if !echoes(t, program) {
		t.Error("the terminal was not put back")
	}
	if _, err := program.WriteString("end"); err != nil {
		t.Fatal(err)
	}
	shown := make([]byte, 4096)
	n, err := user.Read(shown)
	if err != nil {
		t.Fatal(err)
	}
	if all := string(shown[:n]) + stdout.String() + stderr.String(); strings.Contains(all, token) || !strings.Contains(all, "Token: ") {
		t.Errorf("shown: %q", all)
	}
	all, err := readContexts()
	if err != nil {
		t.Fatal(err)
	}
	if s := all.Contexts[all.Current]; s != (settings{URL: url, Token: token}) {
		t.Errorf("stored %s", s.URL)
	}
}

// TestNewPassword: a password that is chosen at a terminal is typed twice.
func TestNewPassword(t *testing.T) {
	login(t)
	for again, want := range map[string]string{"correct horse battery": "user/ada created", "correct horse batteri": "the two passwords differ"} {
		user, program := openTerminal(t)
		var stdout, stderr bytes.Buffer
		done := make(chan int, 1)
		go func() {
			done <- run(t.Context(), []string{"user", "create", "ada", "--role", "viewer", "--password"}, program, &stdout, &stderr)
		}()
		typeLine(t, user, program, done, "correct horse battery")
		typeLine(t, user, program, done, again)
		<-done
		if all := stdout.String() + stderr.String(); !strings.Contains(all, want) || strings.Contains(all, "horse") {
			t.Errorf("got %s, want %s", all, want)
		}
	}
}

// TestConfirm: at a terminal, what destroys something goes on when its name is
// typed, and only then.
func TestConfirm(t *testing.T) {
	login(t)
	must(t, "freeze", "--reason", "stocktaking", "-l", "site=demo")
	user, program := openTerminal(t)
	for _, test := range []struct {
		typed  string
		flags  []string
		code   int
		stdout string
		stderr string
	}{
		{typed: "yes\n", code: exitError, stderr: "This ends freeze site-demo: changes that wait for it begin. Type site-demo to go on: dunlin: not confirmed; nothing was done\n"},
		{flags: []string{"--no-input"}, code: exitUsage, stderr: "dunlin: this ends freeze site-demo: changes that wait for it begin: with --no-input it needs --yes\nrun: dunlin unfreeze --help\n"},
		{typed: "site-demo\n", stdout: "freeze/site-demo deleted\n", stderr: "This ends freeze site-demo: changes that wait for it begin. Type site-demo to go on: "},
	} {
		if _, err := user.WriteString(test.typed); err != nil {
			t.Fatal(err)
		}
		var stdout, stderr bytes.Buffer
		code := run(t.Context(), append([]string{"unfreeze", "site-demo"}, test.flags...), program, &stdout, &stderr)
		if code != test.code || stdout.String() != test.stdout || stderr.String() != test.stderr {
			t.Errorf("%q: exit code %d\n%s%s", test.typed, code, &stdout, &stderr)
		}
	}
}

// TestRolloutWatchOnTerminal: on a terminal a rollout's page takes the place of
// the one before and is gone at the end; the last page is on stdout, without
// control sequences, and the exit code says how it ended.
func TestRolloutWatchOnTerminal(t *testing.T) {
	url := login(t)
	t.Setenv("TERM", "xterm")
	t.Setenv("NO_COLOR", "1")
	must(t, "push", filepath.Join("..", "..", "models", "examples", "digits", "v1.onnx"), "digits")
	d, err := joinDevice(url, "cam-1", strings.TrimSpace(must(t, "join-token", "create", "--label", "site=demo")), nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.cancel(); d.running.Wait() })
	must(t, "apply", "-f", writeFile(t, fmt.Sprintf(deployment, 1)))
	user, program := openTerminal(t)
	if err := unix.IoctlSetWinsize(int(program.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: 24, Col: 100}); err != nil {
		t.Fatal(err)
	}
	var stdout bytes.Buffer
	done := make(chan int, 1)
	go func() {
		done <- run(t.Context(), []string{"rollout", "watch", "digits"}, strings.NewReader(""), &stdout, program)
	}()
	// read gives what is shown, until it has a text.
	shown := ""
	read := func(until string) {
		for b := make([]byte, 4096); !strings.Contains(shown, until); {
			n, err := user.Read(b)
			if err != nil {
				t.Fatalf("%v after %q", err, shown)
			}
			shown += string(b[:n])
		}
	}
	read("WAVE  DEVICES OF")
	read("[........................]")
	must(t, "rollout", "abort", "digits", "--yes", "--reason", "another time")
	if code := <-done; code != exitRolloutFailed {
		t.Errorf("exit code %d", code)
	}
	read("was aborted")
	if !strings.Contains(shown, "\x1b[J") || strings.Contains(shown, "m\x1b") || strings.Contains(shown, "\x1b[3") {
		t.Errorf("shown: %q", shown)
	}
	if s := stdout.String(); !strings.Contains(s, "digits-1") || !strings.Contains(s, "aborted") || strings.Contains(s, "\x1b") {
		t.Errorf("stdout: %q", s)
	}
}
