package worker

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dunlin/dunlin/agent/engine"
)

// escapes are what a sandboxed child tries; each gives nil if it succeeded.
var escapes = map[string]func(read, write, elsewhere string) error{
	"read the model": func(read, _, _ string) error { _, err := os.ReadFile(filepath.Join(read, "model")); return err },
	"list the model": func(read, _, _ string) error { _, err := os.ReadDir(read); return err },
	"write the output": func(_, write, _ string) error {
		return os.WriteFile(filepath.Join(write, "out"), []byte("out"), 0o600)
	},
	"write into the model": func(read, _, _ string) error { return os.WriteFile(filepath.Join(read, "new"), nil, 0o600) },
	"change the model":     func(read, _, _ string) error { return os.Truncate(filepath.Join(read, "model"), 0) },
	"write elsewhere":      func(_, _, elsewhere string) error { return os.WriteFile(filepath.Join(elsewhere, "new"), nil, 0o600) },
	"read elsewhere": func(_, _, elsewhere string) error {
		_, err := os.ReadFile(filepath.Join(elsewhere, "secret"))
		return err
	},
	"read by a link": func(_, write, elsewhere string) error {
		return os.Symlink(filepath.Join(elsewhere, "secret"), filepath.Join(write, "link"))
	},
	"read passwd": func(_, _, _ string) error { _, err := os.ReadFile("/etc/passwd"); return err },
	"read the parent's environment": func(_, _, _ string) error {
		_, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", os.Getppid()))
		return err
	},
	"signal the parent": func(_, _, _ string) error { return syscall.Kill(os.Getppid(), 0) },
	"connect": func(_, _, _ string) error {
		_, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
		return err
	},
	"unix socket": func(_, _, _ string) error { _, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0); return err },
	"exec":        func(_, _, _ string) error { return exec.Command("/proc/self/exe", "echo").Run() },
	"exec in place": func(_, _, _ string) error {
		return unix.Exec("/bin/true", []string{"true"}, nil)
	},
	"ptrace": func(_, _, _ string) error { return unix.PtraceAttach(os.Getppid()) },
	"io_uring": func(_, _, _ string) error {
		if _, _, errno := unix.Syscall(unix.SYS_IO_URING_SETUP, 1, 0, 0); errno != unix.EFAULT && errno != 0 {
			return errno
		}
		return nil
	},
	"namespace": func(_, _, _ string) error { return unix.Unshare(unix.CLONE_NEWUSER) },
	"allocate": func(_, _, _ string) error {
		b, err := unix.Mmap(-1, 0, 1<<30, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
		if err == nil {
			unix.Munmap(b)
		}
		return err
	},
	"allocate within the limit": func(_, _, _ string) error {
		b, err := unix.Mmap(-1, 0, 64<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
		if err == nil {
			unix.Munmap(b)
		}
		return err
	},
	"write beyond the limit": func(_, write, _ string) error {
		return os.WriteFile(filepath.Join(write, "large"), make([]byte, 2<<20), 0o600)
	},
}

// escapeChild enters the sandbox, tries everything, and prints what failed.
func escapeChild(folders string) int {
	report, err := enterSandbox()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	all := map[string]string{"report": report.String()}
	at := strings.Split(folders, ":")
	for name, try := range escapes {
		err := try(at[0], at[1], at[2])
		var errno syscall.Errno
		switch {
		case err == nil:
			all[name] = "done"
		case errors.As(err, &errno):
			all[name] = unix.ErrnoName(errno)
		default:
			all[name] = err.Error()
		}
	}
	json.NewEncoder(os.Stdout).Encode(all)
	return 0
}

func TestSandbox(t *testing.T) {
	cfg := testConfig(t, "")
	cfg.CheckMemory = func() int64 { return 256 << 20 }
	read, write, elsewhere := t.TempDir(), t.TempDir(), t.TempDir()
	for _, path := range []string{filepath.Join(read, "model"), filepath.Join(elsewhere, "secret")} {
		if err := os.WriteFile(path, []byte("text"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	try := func(s *sandbox) map[string]string {
		cmd := exec.Command(cfg.Command[0], "worker", "escape="+strings.Join([]string{read, write, elsewhere}, ":"))
		cmd.Env = append(childEnvironment(), s.environment()...)
		cmd.Stderr = t.Output()
		out, err := cmd.Output()
		if err != nil {
			t.Fatal(err)
		}
		var got map[string]string
		if err := json.Unmarshal(out, &got); err != nil {
			t.Fatal(err)
		}
		return got
	}
	box := cfg.confined(engine.Spec{Dir: read}, write)
	box.FileSize = 1 << 20
	confined := try(box)
	t.Log(confined["report"])
	want := map[string]string{
		"read the model": "done", "list the model": "done", "write the output": "done", "allocate within the limit": "done",
		"allocate": "ENOMEM", "write beyond the limit": "EFBIG",
	}
	landlocked := strings.Contains(confined["report"], "Landlock")
	for _, name := range []string{"write into the model", "change the model", "write elsewhere", "read elsewhere", "read by a link",
		"read passwd", "read the parent's environment"} {
		if want[name] = "EACCES"; !landlocked {
			delete(want, name)
		}
	}
	calls := []string{"connect", "unix socket", "exec", "exec in place", "ptrace", "io_uring", "namespace"}
	for _, name := range calls {
		want[name] = "EPERM"
	}
	if landlocked {
		want["signal the parent"] = "EPERM"
	}
	for name, verdict := range want {
		if confined[name] != verdict {
			t.Errorf("%s: %s, want %s", name, confined[name], verdict)
		}
	}
	// One that serves keeps its files, but not the network.
	serving := try(nil)
	for _, name := range calls {
		if serving[name] != "EPERM" {
			t.Errorf("one that serves, %s: %s", name, serving[name])
		}
	}
	if serving["read elsewhere"] != "done" || serving["allocate"] != "done" {
		t.Errorf("one that serves: %v", serving)
	}
}

func TestProbeSaysWhichSandbox(t *testing.T) {
	r, err := Probe(t.Context(), testConfig(t, ""))
	if err != nil {
		t.Fatal(err)
	}
	if !r.Sandbox.Limits || sandboxOf(r.Sandbox.number()) != r.Sandbox {
		t.Errorf("got %+v", r.Sandbox)
	}
	none := Sandbox{}
	if none.String() != "nothing" || !slices.Equal(none.Missing(), []string{"Landlock", "seccomp", "limits"}) {
		t.Errorf("%v lacks %v", none, none.Missing())
	}
}

// TestSandboxedChildDiesWithItsParent holds a restarted child against the end
// of the thread that began it.
func TestSandboxedChildDiesWithItsParent(t *testing.T) {
	cfg := testConfig(t, "").withDefaults()
	cfg.sandbox = cfg.confined(engine.Spec{}, "")
	started, done := make(chan *process), make(chan struct{})
	defer close(done)
	var begin func()
	begin = func() { // its thread ends with it
		runtime.LockOSThread()
		if unix.Gettid() == os.Getpid() { // but not the first one
			go begin()
			<-done
			return
		}
		p, err := startProcess(&cfg, nil)
		if err == nil {
			if err = p.open(t.Context(), &cfg); err != nil {
				t.Error(err)
			}
		} else {
			t.Error(err)
		}
		started <- p
	}
	go begin()
	p := <-started
	if p == nil {
		return
	}
	select {
	case <-p.dead:
	case <-time.After(20 * time.Second):
		t.Error("it lives")
		p.stop()
	}
}
