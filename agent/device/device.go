// Package device finds out what a device is and how it is doing, from what
// the kernel says of it.
package device

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// maxFile bounds what is read of a file below /proc.
const maxFile = 1 << 20

// Info describes the device. dataDir is a folder on the file system that
// holds the agent's data. What cannot be found out stays empty.
func Info(dataDir string) *dunlinv1.DeviceInfo {
	info := &dunlinv1.DeviceInfo{Os: runtime.GOOS, Arch: runtime.GOARCH, CpuCount: uint32(runtime.NumCPU())}
	info.Hostname, _ = os.Hostname()
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		info.Kernel = unix.ByteSliceToString(u.Release[:])
	}
	if raw, err := readFile("/proc/cpuinfo"); err == nil {
		info.CpuModel = cpuModel(raw)
	}
	if info.CpuModel == "" { // boards describe themselves here
		if raw, err := readFile("/proc/device-tree/model"); err == nil {
			info.CpuModel = strings.TrimRight(raw, "\x00\n")
		}
	}
	if m, err := readMemory(); err == nil {
		info.MemoryBytes = m.total
	}
	if _, size, err := Disk(dataDir); err == nil {
		info.DiskBytes = size
	}
	return info
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
func Anonymous(pid int) (uint64, error) {
	raw, err := readFile(filepath.Join("/proc", strconv.Itoa(pid), "status"))
	if err != nil {
		return 0, err
	}
	kib, ok := kibibytes(raw, "RssAnon")
	if !ok {
		return 0, fmt.Errorf("status of process %d has no RssAnon", pid)
	}
	return kib, nil
}

func readFile(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	var b strings.Builder
	buf := make([]byte, 4096)
	for b.Len() < maxFile {
		n, err := f.Read(buf)
		b.Write(buf[:n])
		if err != nil || n == 0 {
			break
		}
	}
	return b.String(), nil
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
		fields := strings.Fields(rest)
		if len(fields) != 2 || fields[1] != "kB" {
			return 0, false
		}
		n, err := strconv.ParseUint(fields[0], 10, 64)
		return n << 10, err == nil && n < 1<<54
	}
	return 0, false
}

// Memory gives the bytes of memory that programs can still have without
// swapping, and those that there are. Where this process is bounded by a
// control group (version 2), that is the bound.
func Memory() (available, total uint64, err error) {
	m, err := readMemory()
	if err != nil {
		return 0, 0, err
	}
	available, total = m.total-m.used, m.total
	for dir := controlGroup(); dir != ""; dir = parentGroup(dir) {
		limit, used, ok := groupMemory(dir)
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
func controlGroup() string {
	raw, err := readFile("/proc/self/cgroup")
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
func groupMemory(dir string) (limit, used uint64, ok bool) {
	raw, err := readFile(filepath.Join(dir, "memory.max"))
	if err != nil {
		return 0, 0, false
	}
	if limit, err = strconv.ParseUint(strings.TrimSpace(raw), 10, 64); err != nil {
		return 0, 0, false // "max": no bound
	}
	if raw, err = readFile(filepath.Join(dir, "memory.current")); err != nil {
		return 0, 0, false
	}
	if used, err = strconv.ParseUint(strings.TrimSpace(raw), 10, 64); err != nil {
		return 0, 0, false
	}
	raw, err = readFile(filepath.Join(dir, "memory.stat"))
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

func readMemory() (memory, error) {
	raw, err := readFile("/proc/meminfo")
	if err != nil {
		return memory{}, err
	}
	return parseMemory(raw)
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

func readProcessor() (processor, error) {
	raw, err := readFile("/proc/stat")
	if err != nil {
		return processor{}, err
	}
	return parseProcessor(raw)
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
