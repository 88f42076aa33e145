package worker

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/dunlin/dunlin/agent/engine"
)

// sandbox says what a child may do. It travels in the child's environment.
// Every child gives up all files but those that are named here, new sockets,
// processes and programs, and the system calls by which one reaches beyond
// itself. A confined one, which is short-lived, has its memory bounded too.
type sandbox struct {
	Confined bool
	Read     []string // folders and files that it may read, where they exist
	Write    []string // folders in which it may make and write files
	// Bounds, 0 for none.
	Memory   int64 // bytes that it may allocate from its start on
	FileSize int64 // of a file that it writes
	CPU      time.Duration
	// Entered says that the process has been started again with its files
	// taken away, as far as ABI says.
	Entered bool
	ABI     int
	// Command is what started the process; its first word is a path.
	Command []string
}

// sandboxVariable holds the sandbox in JSON.
const sandboxVariable = "DUNLIN_WORKER_SANDBOX"

// Sandbox says what of a sandbox the kernel had.
type Sandbox struct {
	Landlock int  // version of its interface, 0 for none
	Seccomp  bool // system calls are filtered
	Limits   bool // resources are limited
	confined bool // the process is a short-lived one
}

// String lists what there is.
func (s Sandbox) String() string {
	var all []string
	if s.Landlock > 0 {
		all = append(all, fmt.Sprintf("Landlock ABI %d", s.Landlock))
	}
	if s.Seccomp {
		all = append(all, "seccomp")
	}
	if s.Limits {
		all = append(all, "limits")
	}
	if len(all) == 0 {
		return "nothing"
	}
	return strings.Join(all, ", ")
}

// Missing lists what there is not.
func (s Sandbox) Missing() (all []string) {
	if s.Landlock == 0 {
		all = append(all, "Landlock")
	}
	if !s.Seccomp {
		all = append(all, "seccomp")
	}
	if !s.Limits {
		all = append(all, "limits")
	}
	return all
}

// number packs the report for a message.
func (s Sandbox) number() uint64 {
	n := uint64(s.Landlock) << 2
	if s.Seccomp {
		n |= 1
	}
	if s.Limits {
		n |= 2
	}
	return n
}

func sandboxOf(number uint64) Sandbox {
	return Sandbox{Landlock: int(min(number>>2, math.MaxInt16)), Seccomp: number&1 != 0, Limits: number&2 != 0}
}

// environment gives what goes into the child's environment.
func (s *sandbox) environment() []string {
	b, err := json.Marshal(s)
	if err != nil {
		panic(err)
	}
	return []string{sandboxVariable + "=" + string(b)}
}

// minimal gives a sandbox in which the runtime can be opened, and nothing else
// be read.
func (c *Config) minimal() *sandbox {
	s := &sandbox{
		Command: c.Command,
		Read: []string{
			filepath.Dir(c.RuntimeLib), "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/local/cuda", "/opt", "/nix/store", "/gnu/store",
			"/etc/ld.so.cache", "/usr/share/zoneinfo", "/sys/devices/system", "/sys/fs/cgroup", "/sys/kernel/mm",
			"/proc/cpuinfo", "/proc/meminfo", "/proc/stat", "/proc/driver",
		},
	}
	if real, err := filepath.EvalSymlinks(c.RuntimeLib); err == nil {
		s.Read = append(s.Read, filepath.Dir(real))
	}
	s.Read = append(s.Read, filepath.SplitList(os.Getenv("LD_LIBRARY_PATH"))...)
	if strings.HasPrefix(c.Pools, "cuda") {
		s.Read = append(s.Read, "/sys/bus/pci", "/sys/devices", "/sys/class", "/sys/module", "/proc/devices", "/proc/modules", "/etc/nv_tegra_release")
	}
	return s
}

// serving gives the sandbox of a child that serves versions. They may be read
// for its whole life, and so it may read no more than they need.
func (c *Config) serving(versions []*version) *sandbox {
	s := c.minimal()
	s.Read = append(s.Read, c.Folders...)
	folders := rootsOf(c.Folders)
	for _, v := range versions {
		for _, path := range v.paths(c.Pools != "") {
			if !folders.hold(path) {
				s.Read = append(s.Read, path)
			}
		}
	}
	s.Write = c.write
	return s
}

// paths gives what a child reads to open a version: a compiled file, or the
// model itself, in a folder in which it may be a link to somewhere else.
func (v *version) paths(pools bool) []string {
	if v.image.File != "" && !pools {
		return []string{v.image.File}
	}
	all := []string{v.spec.Dir}
	if v.image.File != "" {
		all = append(all, v.image.File)
	}
	if real, err := filepath.EvalSymlinks(filepath.Join(v.spec.Dir, v.spec.Entry)); err == nil {
		all = append(all, real)
	}
	return all
}

// roots are folders and files that a child may read, as they were when it
// began: others that have come in their place meanwhile it may not.
type roots map[string]os.FileInfo // by path, without links

func rootsOf(paths []string) roots {
	all := make(roots)
	for _, path := range paths {
		real, err := filepath.EvalSymlinks(path)
		if err != nil {
			continue
		}
		if info, err := os.Stat(real); err == nil {
			all[real] = info
		}
	}
	return all
}

// hold says whether a path leads to or below one of them, or nowhere.
func (r roots) hold(path string) bool {
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		return true
	}
	for ; ; real = filepath.Dir(real) {
		if then, ok := r[real]; ok {
			now, err := os.Stat(real)
			return err == nil && os.SameFile(then, now)
		}
		if real == filepath.Dir(real) {
			return false
		}
	}
}

// confined gives the sandbox of a short-lived child that reads the files of a
// version and writes into the folder write; either may be none.
func (c *Config) confined(v engine.Spec, write string) *sandbox {
	s := c.minimal()
	s.Confined, s.FileSize, s.CPU = true, 1<<20, CheckLimit*time.Duration(max(c.Threads, 1))
	if c.Threads <= 0 {
		s.CPU = CheckLimit * time.Duration(runtime.NumCPU())
	}
	if v.Dir != "" {
		s.Read = append(s.Read, (&version{spec: v}).paths(false)...)
	}
	if c.CheckMemory != nil {
		s.Memory = c.CheckMemory()
	}
	if s.Memory <= 0 {
		var machine unix.Sysinfo_t
		if unix.Sysinfo(&machine) == nil {
			s.Memory = int64(machine.Totalram) * int64(machine.Unit)
		}
	}
	if write != "" {
		s.Write, s.FileSize = []string{write}, maxCompiledFile
	}
	return s
}

// enterSandbox has this process, which has only begun, live by what its
// environment says. It may start the program once more. What the kernel
// cannot do is left out and missing from the report.
func enterSandbox() (Sandbox, error) {
	var s sandbox
	if text := os.Getenv(sandboxVariable); text != "" {
		if err := json.Unmarshal([]byte(text), &s); err != nil {
			return Sandbox{}, fmt.Errorf("%s: %w", sandboxVariable, err)
		}
	}
	if !s.Entered && (s.Confined || landlock() > 0) {
		return Sandbox{}, s.restart() // returns only if it fails
	}
	report := Sandbox{Landlock: s.ABI, Seccomp: filterCalls() == nil, Limits: s.limit() == nil, confined: s.Confined}
	return report, nil
}

// restart takes files away from this thread and starts the program again from
// it: what the thread has then holds for all of the new process, while the
// threads of this one cannot be reached.
func (s *sandbox) restart() error {
	runtime.LockOSThread()
	// The parent's death is told to the thread that it began only.
	if err := unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0, 0, 0); err != nil {
		return fmt.Errorf("enter sandbox: %w", err)
	}
	if s.Confined {
		comeLast()
	}
	s.Entered = true
	if abi, err := s.takeFiles(); err == nil {
		s.ABI = abi
	}
	others := slices.DeleteFunc(os.Environ(), func(v string) bool { return strings.HasPrefix(v, sandboxVariable+"=") })
	env := append(others, s.environment()...)
	program, args := "/proc/self/exe", os.Args
	if name, err := os.Executable(); err == nil && rootsOf([]string{program}).hold(name) {
		program = name // by which it is known to ps
	}
	if s.ABI == 0 { // any file can be executed, and what runs this one may be an emulator
		program, args = s.Command[0], s.Command
	}
	return fmt.Errorf("enter sandbox: start again: %w", unix.Exec(program, args, env))
}

// comeLast has this process be the first to go when memory runs out, and the
// last to run when others want to.
func comeLast() {
	_ = os.WriteFile("/proc/self/oom_score_adj", []byte("1000"), 0)
	if raw, err := unix.Getpriority(unix.PRIO_PROCESS, 0); err == nil {
		_ = unix.Setpriority(unix.PRIO_PROCESS, 0, min(20-raw+niceness, 19))
	}
	if a, err := unix.SchedGetAttr(0, 0); err == nil {
		a.Policy, a.Runtime = unix.SCHED_BATCH, 0
		_ = unix.SchedSetAttr(0, a, 0)
	}
}

// landlock gives the version of Landlock's interface, 0 where there is none.
func landlock() int {
	abi, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, unix.LANDLOCK_CREATE_RULESET_VERSION)
	if errno != 0 {
		return 0
	}
	return int(abi)
}

// Rights of Landlock's interface by its versions.
const (
	readFiles  = unix.LANDLOCK_ACCESS_FS_READ_FILE | unix.LANDLOCK_ACCESS_FS_READ_DIR
	writeFiles = unix.LANDLOCK_ACCESS_FS_WRITE_FILE | unix.LANDLOCK_ACCESS_FS_MAKE_REG | unix.LANDLOCK_ACCESS_FS_REMOVE_FILE | unix.LANDLOCK_ACCESS_FS_TRUNCATE
	// onFile are those that a rule for something that is no folder may give.
	onFile      = unix.LANDLOCK_ACCESS_FS_EXECUTE | unix.LANDLOCK_ACCESS_FS_WRITE_FILE | unix.LANDLOCK_ACCESS_FS_READ_FILE | unix.LANDLOCK_ACCESS_FS_TRUNCATE | unix.LANDLOCK_ACCESS_FS_IOCTL_DEV
	filesOfABI1 = 1<<13 - 1
)

// takeFiles confines the calling thread to the files that the sandbox names,
// for good, and gives the version of Landlock.
func (s *sandbox) takeFiles() (int, error) {
	abi := landlock()
	if abi == 0 {
		return 0, errors.ErrUnsupported
	}
	attr := unix.LandlockRulesetAttr{Handled_access_fs: filesOfABI1}
	size := unsafe.Offsetof(attr.Handled_access_net)
	if abi >= 2 {
		attr.Handled_access_fs |= unix.LANDLOCK_ACCESS_FS_REFER
	}
	if abi >= 3 {
		attr.Handled_access_fs |= unix.LANDLOCK_ACCESS_FS_TRUNCATE
	}
	if abi >= 4 {
		attr.Handled_access_net = unix.LANDLOCK_ACCESS_NET_BIND_TCP | unix.LANDLOCK_ACCESS_NET_CONNECT_TCP
		size = unsafe.Offsetof(attr.Scoped)
	}
	if abi >= 5 {
		attr.Handled_access_fs |= unix.LANDLOCK_ACCESS_FS_IOCTL_DEV
	}
	if abi >= 6 {
		attr.Scoped = unix.LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET | unix.LANDLOCK_SCOPE_SIGNAL
		size = unsafe.Offsetof(attr.Quiet_access_fs)
	}
	rules, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, uintptr(unsafe.Pointer(&attr)), size, 0)
	if errno != 0 {
		return 0, errno
	}
	defer unix.Close(int(rules))
	allow := func(path string, rights uint64) error {
		fd, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
		if err != nil {
			return nil // what is not there cannot be reached
		}
		defer unix.Close(fd)
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil {
			return err
		}
		if st.Mode&unix.S_IFMT != unix.S_IFDIR {
			rights &= onFile
		}
		rule := unix.LandlockPathBeneathAttr{Allowed_access: rights & attr.Handled_access_fs, Parent_fd: int32(fd)}
		if _, _, errno := unix.Syscall6(unix.SYS_LANDLOCK_ADD_RULE, rules, unix.LANDLOCK_RULE_PATH_BENEATH, uintptr(unsafe.Pointer(&rule)), 0, 0, 0); errno != 0 {
			return errno
		}
		return nil
	}
	var devices []string
	for _, pattern := range []string{"/dev/nvidia*", "/dev/nvhost*", "/dev/nvmap", "/dev/nvgpu"} {
		found, _ := filepath.Glob(pattern) // the pattern is a good one
		devices = append(devices, found...)
	}
	for _, list := range []struct {
		paths  []string
		rights uint64
	}{
		{append(s.Read, "/proc/self"), readFiles},
		// The program is started once more, by the dynamic linker.
		{append(mappedFiles(), "/proc/self/exe", "/lib", "/lib64", "/usr/lib", "/usr/lib64"), readFiles | unix.LANDLOCK_ACCESS_FS_EXECUTE},
		{[]string{"/dev/null", "/dev/zero", "/dev/urandom", "/dev/random"}, readFiles | unix.LANDLOCK_ACCESS_FS_WRITE_FILE},
		{devices, readFiles | unix.LANDLOCK_ACCESS_FS_WRITE_FILE | unix.LANDLOCK_ACCESS_FS_IOCTL_DEV},
		{s.Write, readFiles | writeFiles},
	} {
		for _, path := range list.paths {
			if err := allow(path, list.rights); err != nil {
				return 0, fmt.Errorf("allow %s: %w", path, err)
			}
		}
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return 0, err
	}
	if _, _, errno := unix.Syscall(unix.SYS_LANDLOCK_RESTRICT_SELF, rules, 0, 0); errno != 0 {
		return 0, errno
	}
	return abi, nil
}

// mappedFiles lists the files that this process has code of: the program, the
// dynamic linker and its libraries, wherever the system keeps them.
func mappedFiles() (all []string) {
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		return nil
	}
	for line := range strings.Lines(string(maps)) {
		if fields := strings.Fields(line); len(fields) == 6 && fields[1] == "r-xp" && filepath.IsAbs(fields[5]) {
			all = append(all, fields[5])
		}
	}
	return all
}

// limit bounds what the process takes.
func (s *sandbox) limit() error {
	set := func(resource int, bound uint64) error {
		var now unix.Rlimit
		if err := unix.Getrlimit(resource, &now); err != nil {
			return err
		}
		bound = min(bound, now.Max)
		return unix.Setrlimit(resource, &unix.Rlimit{Cur: bound, Max: bound})
	}
	err := set(unix.RLIMIT_CORE, 0)
	if s.FileSize > 0 {
		signal.Ignore(unix.SIGXFSZ) // an error of the write is enough
		err = errors.Join(err, set(unix.RLIMIT_FSIZE, uint64(s.FileSize)))
	}
	if s.CPU > 0 {
		err = errors.Join(err, set(unix.RLIMIT_CPU, uint64(math.Ceil(s.CPU.Seconds()))))
	}
	if s.Memory > 0 {
		have, e := statusBytes("VmData:")
		if e == nil {
			e = set(unix.RLIMIT_DATA, uint64(have+s.Memory))
		}
		err = errors.Join(err, e)
	}
	return err
}

// statusBytes reads a figure of this process's memory from /proc/self/status.
func statusBytes(name string) (int64, error) {
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return 0, err
	}
	_, rest, _ := strings.Cut(string(status), "\n"+name)
	value, _, _ := strings.Cut(strings.TrimSpace(rest), " ")
	kb, err := strconv.ParseInt(value, 10, 64)
	if err != nil {
		return 0, fmt.Errorf("/proc/self/status: %s %w", name, err)
	}
	return kb << 10, nil
}

// refused are the system calls that a child does not need and that lead out
// of it.
var refused = []uint32{
	unix.SYS_SOCKET, unix.SYS_SOCKETPAIR, unix.SYS_CONNECT, unix.SYS_BIND, unix.SYS_LISTEN, unix.SYS_ACCEPT, unix.SYS_ACCEPT4,
	unix.SYS_EXECVE, unix.SYS_EXECVEAT, unix.SYS_IO_URING_SETUP, unix.SYS_IO_URING_REGISTER, unix.SYS_IO_URING_ENTER,
	unix.SYS_PTRACE, unix.SYS_PROCESS_VM_READV, unix.SYS_PROCESS_VM_WRITEV, unix.SYS_PROCESS_MADVISE, unix.SYS_KCMP,
	unix.SYS_PIDFD_OPEN, unix.SYS_PIDFD_GETFD, unix.SYS_PIDFD_SEND_SIGNAL,
	unix.SYS_MOUNT, unix.SYS_UMOUNT2, unix.SYS_PIVOT_ROOT, unix.SYS_CHROOT, unix.SYS_FSOPEN, unix.SYS_FSCONFIG, unix.SYS_FSMOUNT,
	unix.SYS_FSPICK, unix.SYS_MOVE_MOUNT, unix.SYS_OPEN_TREE, unix.SYS_MOUNT_SETATTR, unix.SYS_SWAPON, unix.SYS_SWAPOFF,
	unix.SYS_UNSHARE, unix.SYS_SETNS, unix.SYS_BPF, unix.SYS_PERF_EVENT_OPEN, unix.SYS_USERFAULTFD,
	unix.SYS_KEYCTL, unix.SYS_ADD_KEY, unix.SYS_REQUEST_KEY, unix.SYS_NAME_TO_HANDLE_AT, unix.SYS_OPEN_BY_HANDLE_AT,
	unix.SYS_INIT_MODULE, unix.SYS_FINIT_MODULE, unix.SYS_DELETE_MODULE, unix.SYS_KEXEC_LOAD, unix.SYS_REBOOT, unix.SYS_ACCT,
	unix.SYS_QUOTACTL, unix.SYS_SYSLOG, unix.SYS_SETTIMEOFDAY, unix.SYS_CLOCK_SETTIME, unix.SYS_CLOCK_ADJTIME, unix.SYS_ADJTIMEX,
	unix.SYS_SETHOSTNAME, unix.SYS_SETDOMAINNAME, unix.SYS_PERSONALITY, unix.SYS_MKNODAT, unix.SYS_TKILL,
	// What is common to all processes of the user.
	unix.SYS_SHMGET, unix.SYS_SHMAT, unix.SYS_SHMCTL, unix.SYS_MSGGET, unix.SYS_MSGSND, unix.SYS_MSGRCV, unix.SYS_MSGCTL,
	unix.SYS_SEMGET, unix.SYS_SEMOP, unix.SYS_SEMTIMEDOP, unix.SYS_SEMCTL, unix.SYS_MQ_OPEN, unix.SYS_MQ_UNLINK,
	// What Landlock does not see done to files, or its first versions do not.
	unix.SYS_TRUNCATE, unix.SYS_FCHMOD, unix.SYS_FCHMODAT, unix.SYS_FCHMODAT2, unix.SYS_FCHOWN, unix.SYS_FCHOWNAT, unix.SYS_UTIMENSAT,
	unix.SYS_SETXATTR, unix.SYS_LSETXATTR, unix.SYS_FSETXATTR, unix.SYS_REMOVEXATTR, unix.SYS_LREMOVEXATTR, unix.SYS_FREMOVEXATTR,
}

// ownOnly are system calls whose first argument is a process, which must be
// the caller's own: by number, or as 0 where that is allowed.
var ownOnly = []struct {
	number uint32
	zero   bool
}{
	{unix.SYS_KILL, false}, {unix.SYS_TGKILL, false}, {unix.SYS_RT_SIGQUEUEINFO, false}, {unix.SYS_RT_TGSIGQUEUEINFO, false}, {unix.SYS_PRLIMIT64, true},
}

// architecture gives the kernel's number for this machine, and the calls that
// only it has and that are refused: on amd64 fork, vfork, modify_ldt, iopl,
// ioperm, mknod, chmod, chown, lchown, utime, utimes and futimesat.
func architecture() (audit uint32, more []uint32) {
	switch runtime.GOARCH {
	case "amd64":
		return unix.AUDIT_ARCH_X86_64, []uint32{57, 58, 154, 172, 173, 133, 90, 92, 94, 132, 235, 261}
	case "arm64":
		return unix.AUDIT_ARCH_AARCH64, nil
	}
	return 0, nil
}

// filterCalls takes the refused system calls away from all threads, for good:
// they fail with EPERM.
func filterCalls() error {
	audit, more := architecture()
	if audit == 0 {
		return fmt.Errorf("filter system calls: not on %s", runtime.GOARCH)
	}
	const (
		load    = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS
		equal   = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K
		atLeast = unix.BPF_JMP | unix.BPF_JGE | unix.BPF_K
		anyBit  = unix.BPF_JMP | unix.BPF_JSET | unix.BPF_K
		give    = unix.BPF_RET | unix.BPF_K
		refuse  = unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)
		// Where struct seccomp_data has them.
		number, arch, firstArgument = 0, 4, 16
		x32                         = 0x40000000 // begins the numbers of amd64's other interface
	)
	filter := []unix.SockFilter{
		{Code: load, K: arch},
		{Code: equal, K: audit, Jt: 1},
		{Code: give, K: unix.SECCOMP_RET_KILL_PROCESS},
		{Code: load, K: number},
		{Code: atLeast, K: x32, Jf: 1},
		{Code: give, K: refuse},
	}
	for _, n := range append(more, refused...) {
		filter = append(filter, unix.SockFilter{Code: equal, K: n, Jf: 1}, unix.SockFilter{Code: give, K: refuse})
	}
	for _, call := range ownOnly {
		filter = append(filter,
			unix.SockFilter{Code: equal, K: call.number, Jf: 5},
			unix.SockFilter{Code: load, K: firstArgument}, // of whose 64 bits the kernel takes these 32
			unix.SockFilter{Code: equal, K: uint32(os.Getpid()), Jt: 2},
			unix.SockFilter{Code: equal, K: 0, Jt: 1},
			unix.SockFilter{Code: give, K: refuse},
			unix.SockFilter{Code: give, K: unix.SECCOMP_RET_ALLOW},
		)
		if !call.zero {
			filter[len(filter)-3] = unix.SockFilter{Code: give, K: refuse}
		}
	}
	filter = append(filter,
		// A filter cannot see what clone3 is asked for; the C library takes
		// clone where there is none, by which threads may begin only.
		unix.SockFilter{Code: equal, K: unix.SYS_CLONE3, Jf: 1},
		unix.SockFilter{Code: give, K: unix.SECCOMP_RET_ERRNO | uint32(unix.ENOSYS)},
		unix.SockFilter{Code: equal, K: unix.SYS_CLONE, Jf: 3},
		unix.SockFilter{Code: load, K: firstArgument},
		unix.SockFilter{Code: anyBit, K: unix.CLONE_THREAD, Jt: 1},
		unix.SockFilter{Code: give, K: refuse},
		unix.SockFilter{Code: give, K: unix.SECCOMP_RET_ALLOW},
	)
	program := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("filter system calls: %w", err)
	}
	failed, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER,
		unix.SECCOMP_FILTER_FLAG_TSYNC|unix.SECCOMP_FILTER_FLAG_SPEC_ALLOW, uintptr(unsafe.Pointer(&program)))
	runtime.KeepAlive(filter)
	if errno != 0 {
		return fmt.Errorf("filter system calls: %w", errno)
	}
	if failed != 0 {
		return fmt.Errorf("filter system calls: thread %d has a filter of its own", failed)
	}
	return nil
}
