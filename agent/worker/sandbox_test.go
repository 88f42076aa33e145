package worker

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
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
	"kill the parent": func(_, _, _ string) error { return syscall.Kill(os.Getppid(), syscall.Signal(0)) },
	"signal itself":   func(_, _, _ string) error { return syscall.Kill(os.Getpid(), syscall.Signal(0)) },
	"limit the parent": func(_, _, _ string) error {
		return unix.Prlimit(os.Getppid(), unix.RLIMIT_NOFILE, nil, new(unix.Rlimit))
	},
	"see its own limit": func(_, _, _ string) error { return unix.Getrlimit(unix.RLIMIT_NOFILE, new(unix.Rlimit)) },
	"give files away":   func(_, _, elsewhere string) error { return os.Chmod(filepath.Join(elsewhere, "secret"), 0o644) },
	"age files": func(_, _, elsewhere string) error {
		return os.Chtimes(filepath.Join(elsewhere, "secret"), time.Time{}, time.Time{}.Add(1))
	},
	"System V shared memory": func(_, _, _ string) error { _, err := unix.SysvShmGet(1, 4096, unix.IPC_CREAT); return err },
	"new privileges": func(_, _, _ string) error {
		if set, err := unix.PrctlRetInt(unix.PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0); err != nil || set == 1 {
			return unix.EPERM
		}
		return nil
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
	files := []string{"write into the model", "write elsewhere", "read elsewhere", "read by a link", "read passwd", "read the parent's environment"}
	calls := []string{
		"connect", "unix socket", "exec", "exec in place", "ptrace", "io_uring", "namespace", "change the model", "signal the parent", "kill the parent", "limit the parent",
		"give files away", "age files", "System V shared memory", "new privileges",
	}
	all := map[string]string{"signal itself": "done", "see its own limit": "done"}
	for _, name := range files {
		if landlocked {
			all[name] = "EACCES"
		}
	}
	for _, name := range calls {
		all[name] = "EPERM"
	}
	maps.Copy(want, all)
	for name, verdict := range want {
		if confined[name] != verdict {
			t.Errorf("%s: %s, want %s", name, confined[name], verdict)
		}
	}
	// One that serves has its folders, and no bound of its memory; it writes
	// nothing.
	cfg.Folders = []string{read}
	serving := try(cfg.serving(nil))
	all["read the model"], all["list the model"], all["allocate"] = "done", "done", "done"
	if landlocked {
		all["write the output"] = "EACCES"
	}
	for name, verdict := range all {
		if serving[name] != verdict {
			t.Errorf("one that serves, %s: %s, want %s", name, serving[name], verdict)
		}
	}
	if serving["report"] != confined["report"] {
		t.Errorf("one that serves is held by %s, a confined one by %s", serving["report"], confined["report"])
	}
	// A version that is elsewhere comes in with its folder and, where it is a
	// link, what that leads to.
	if err := os.Symlink(filepath.Join(elsewhere, "secret"), filepath.Join(write, "model")); err != nil {
		t.Fatal(err)
	}
	linked := &version{spec: engine.Spec{Dir: write, Entry: "model"}}
	if got := try(cfg.serving([]*version{linked})); got["read elsewhere"] != "done" || landlocked && got["write elsewhere"] != "EACCES" {
		t.Errorf("one that serves a linked model: %v", got)
	}
}

// A folder that has come in the place of another one is none that a child that
// began before may read.
func TestRoots(t *testing.T) {
	dir := t.TempDir()
	in := func(path ...string) string { return filepath.Join(append([]string{dir}, path...)...) }
	for _, path := range []string{in("one"), in("two")} {
		if err := os.Mkdir(path, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(path, "model"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("one", in("now")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(in("two", "model"), in("one", "away")); err != nil {
		t.Fatal(err)
	}
	r := rootsOf([]string{in("now"), in("none")})
	for path, want := range map[string]bool{
		in("now"): true, in("now", "model"): true, in("one", "model"): true, in("one", "away"): false, in("two"): false, dir: false, in("none"): true,
	} {
		if r.hold(path) != want {
			t.Errorf("%s: %t", path, !want)
		}
	}
	if err := os.Rename(in("one"), in("old")); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(in("two"), in("one")); err != nil {
		t.Fatal(err)
	}
	if r.hold(in("one", "model")) {
		t.Error("another folder of the same name is taken for the one before")
	}
}

// A model that is somewhere else than all others is opened all the same, by
// another child, and nobody is to blame for the end of the one before.
func TestModelElsewhere(t *testing.T) {
	cfg := testConfig(t, "")
	cfg.Folders = nil
	var deaths atomic.Int32
	cfg.OnDeath = func(Death) { deaths.Add(1) }
	w := start(t, cfg)
	first := child(t, w)
	id, _ := load(t, w, "sum.onnx")
	second := child(t, w)
	if first == second && first.runtime.Sandbox.Landlock > 0 {
		t.Error("the child that may not read the model serves it")
	}
	if other, _ := load(t, w, "add.onnx"); other == id {
		t.Fatal("one model")
	}
	if third := child(t, w); third != second {
		t.Error("a model in the same folder needs another child")
	}
	if n := deaths.Load(); n != 0 {
		t.Errorf("%d deaths are told of", n)
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
