package device

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

const (
	// maxFile bounds what is read of a file below /proc or /sys, and maxFigure
	// of one that has one figure or a few.
	maxFile   = 1 << 20
	maxFigure = 4096
	// maxEntries bounds what is looked at of a folder below /sys.
	maxEntries = 1024
)

// root is the folder in which proc and sys lie; "" for the system's.
type root string

// read reads a file into buf, as far as it has room.
func (r root) read(name string, buf []byte) ([]byte, error) {
	fd, err := unix.Open(string(r)+name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	for err == unix.EINTR {
		fd, err = unix.Open(string(r)+name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	}
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	n := 0
	for n < len(buf) {
		m, err := unix.Read(fd, buf[n:])
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return nil, err
		}
		if m <= 0 {
			break
		}
		n += m
	}
	return buf[:n], nil
}

// text reads a file, at most maxFile bytes of it.
func (r root) text(name string) (string, error) {
	var b strings.Builder
	f, err := os.Open(string(r) + name)
	if err != nil {
		return "", err
	}
	defer f.Close()
	buf := make([]byte, maxFigure)
	for b.Len() < maxFile {
		n, err := f.Read(buf)
		b.Write(buf[:n])
		if err != nil || n == 0 {
			break
		}
	}
	return b.String(), nil
}

// line reads the first line of a file, or the first string of those that a
// zero byte ends.
func (r root) line(name string) string {
	var buf [256]byte
	raw, err := r.read(name, buf[:])
	if err != nil {
		return ""
	}
	return firstLine(raw)
}

func firstLine(raw []byte) string {
	s := string(raw)
	if i := strings.IndexAny(s, "\x00\n"); i >= 0 {
		s = s[:i]
	}
	return strings.ToValidUTF8(strings.TrimSpace(s), "?")
}

// entries names what a folder has, by name, at most maxEntries.
func (r root) entries(dir string) []string {
	f, err := os.Open(string(r) + dir)
	if err != nil {
		return nil
	}
	defer f.Close()
	names, _ := f.Readdirnames(maxEntries)
	sortNatural(names)
	return names
}

// Disk gives the bytes that are free to this process in the file system of a
// folder, and its size.
func Disk(dir string) (free, size uint64, err error) {
	var s unix.Statfs_t
	if err := unix.Statfs(dir, &s); err != nil {
		return 0, 0, fmt.Errorf("statfs %s: %w", dir, err)
	}
	return s.Bavail * uint64(s.Bsize), s.Blocks * uint64(s.Bsize), nil
}

// Anonymous gives the anonymous resident memory of a process in bytes.
func Anonymous(pid int) (uint64, error) { return root("").anonymousOf(strconv.Itoa(pid)) }

func (r root) anonymousOf(process string) (uint64, error) {
	var buf [maxFigure]byte
	raw, err := r.read("/proc/"+process+"/status", buf[:])
	if err != nil {
		return 0, fmt.Errorf("status of process %s: %w", process, err)
	}
	kib, ok := kibibytes(string(raw), "RssAnon")
	if !ok {
		return 0, fmt.Errorf("status of process %s has no RssAnon", process)
	}
	return kib, nil
}

// anonymous sums over this process and its children; nil where it cannot be
// read.
func (r root) anonymous() *uint64 {
	sum, err := r.anonymousOf("self")
	if err != nil {
		return nil
	}
	tasks := r.entries("/proc/self/task")
	if len(tasks) == 0 {
		return nil
	}
	var buf [maxFigure]byte
	for _, task := range tasks {
		raw, err := r.read("/proc/self/task/"+task+"/children", buf[:])
		if err != nil {
			continue // the thread has ended
		}
		for pid := range strings.FieldsSeq(string(raw)) {
			if n, err := r.anonymousOf(pid); err == nil { // else it has ended
				sum += n
			}
		}
	}
	return new(sum)
}

// cpuModel reads the processor's name out of /proc/cpuinfo.
func cpuModel(cpuinfo string) string {
	for _, name := range []string{"model name", "Model", "Hardware", "cpu model"} {
		for line := range strings.Lines(cpuinfo) {
			k, v, ok := strings.Cut(line, ":")
			if v = strings.TrimSpace(v); ok && v != "" && strings.TrimSpace(k) == name {
				return v
			}
		}
	}
	return ""
}

// kibibytes reads the bytes of a field as "Name:   123 kB" says them.
func kibibytes(file, name string) (uint64, bool) {
	for line := range strings.Lines(file) {
		rest, ok := strings.CutPrefix(line, name+":")
		if !ok {
			continue
		}
		number, unit, _ := strings.Cut(strings.TrimSpace(rest), " ")
		if strings.TrimSpace(unit) != "kB" {
			return 0, false
		}
		n, err := strconv.ParseUint(number, 10, 64)
		return n << 10, err == nil && n < 1<<54
	}
	return 0, false
}

// Memory gives the bytes of memory that programs can still have without
// swapping, and those that there are. Where this process is bounded by a
// control group (version 2), that is the bound.
func Memory() (available, total uint64, err error) { return root("").available() }

func (r root) available() (available, total uint64, err error) {
	m, err := r.memory()
	if err != nil {
		return 0, 0, err
	}
	available, total = m.total-m.used, m.total
	for dir := r.controlGroup(); dir != ""; dir = parentGroup(dir) {
		limit, used, ok := r.groupMemory(dir)
		if !ok {
			continue
		}
		total = min(total, limit)
		available = min(available, limit-min(limit, used))
	}
	return available, total, nil
}

const groups = "/sys/fs/cgroup"

// controlGroup gives the folder of this process's control group; "" where
// there is none of version 2.
func (r root) controlGroup() string {
	raw, err := r.text("/proc/self/cgroup")
	if err != nil {
		return ""
	}
	for line := range strings.Lines(raw) {
		if path, ok := strings.CutPrefix(strings.TrimSpace(line), "0::"); ok {
			return filepath.Join(groups, path)
		}
	}
	return ""
}

func parentGroup(dir string) string {
	if dir == groups || !strings.HasPrefix(dir, groups) {
		return ""
	}
	return filepath.Dir(dir)
}

// groupMemory gives a group's bound and what of it cannot be taken back: pages
// of files can.
func (r root) groupMemory(dir string) (limit, used uint64, ok bool) {
	raw, err := r.text(dir + "/memory.max")
	if err != nil {
		return 0, 0, false
	}
	if limit, err = strconv.ParseUint(strings.TrimSpace(raw), 10, 64); err != nil {
		return 0, 0, false // "max": no bound
	}
	if raw, err = r.text(dir + "/memory.current"); err != nil {
		return 0, 0, false
	}
	if used, err = strconv.ParseUint(strings.TrimSpace(raw), 10, 64); err != nil {
		return 0, 0, false
	}
	raw, err = r.text(dir + "/memory.stat")
	if err != nil {
		return 0, 0, false
	}
	for line := range strings.Lines(raw) {
		if text, found := strings.CutPrefix(strings.TrimSpace(line), "file "); found {
			if file, err := strconv.ParseUint(text, 10, 64); err == nil {
				used -= min(used, file)
			}
		}
	}
	return limit, used, true
}

type memory struct{ total, used uint64 }

func (r root) memory() (memory, error) {
	var buf [maxFigure]byte
	raw, err := r.read("/proc/meminfo", buf[:])
	if err != nil {
		return memory{}, fmt.Errorf("meminfo: %w", err)
	}
	return parseMemory(string(raw))
}

// parseMemory reads /proc/meminfo. Used is what is not available to programs.
func parseMemory(meminfo string) (memory, error) {
	total, ok := kibibytes(meminfo, "MemTotal")
	available, ok2 := kibibytes(meminfo, "MemAvailable")
	if !ok || !ok2 || available > total {
		return memory{}, fmt.Errorf("meminfo has MemTotal %d and MemAvailable %d bytes", total, available)
	}
	return memory{total: total, used: total - available}, nil
}

// processor counts ticks since the start of the system, over all cores.
type processor struct{ busy, total uint64 }

// processor reads the first line of /proc/stat.
func (r root) processor() (processor, error) {
	var buf [512]byte
	raw, err := r.read("/proc/stat", buf[:])
	if err != nil {
		return processor{}, fmt.Errorf("stat: %w", err)
	}
	return parseProcessor(string(raw))
}

// parseProcessor reads the first line of /proc/stat: user, nice, system,
// idle, iowait, irq, softirq, steal, and two that are parts of the first two.
func parseProcessor(stat string) (processor, error) {
	line, _, _ := strings.Cut(stat, "\n")
	fields := strings.Fields(line)
	if len(fields) < 5 || fields[0] != "cpu" {
		return processor{}, fmt.Errorf("stat begins with %.40q", line)
	}
	var p processor
	for i, f := range fields[1:min(len(fields), 9)] {
		n, err := strconv.ParseUint(f, 10, 56)
		if err != nil {
			return processor{}, fmt.Errorf("stat field %d: %w", i+1, err)
		}
		p.total += n
		if i != 3 && i != 4 {
			p.busy += n
		}
	}
	return p, nil
}

func utilisation(before, now processor) *float64 {
	if now.total <= before.total || now.busy < before.busy || now.busy-before.busy > now.total-before.total {
		return nil
	}
	return new(float64(now.busy-before.busy) / float64(now.total-before.total))
}

// tegra describes the GPU of NVIDIA's system on a chip, as the device tree has
// it; nil where there is none. It shares the memory of the CPU.
func (r root) tegra() *dunlinv1.GpuInfo {
	dir := r.tegraFolder()
	if dir == "" {
		return nil
	}
	g := &dunlinv1.GpuInfo{Name: r.line(dir + "/of_node/compatible"), UnifiedMemory: true}
	// NVIDIA's table of compute capabilities, developer.nvidia.com/cuda-gpus.
	switch strings.TrimPrefix(g.Name, "nvidia,") {
	case "gm20b":
		g.ComputeCapability = "5.3"
	case "gp10b":
		g.ComputeCapability = "6.2"
	case "gv11b":
		g.ComputeCapability = "7.2"
	case "ga10b":
		g.ComputeCapability = "8.7"
	}
	return g
}
