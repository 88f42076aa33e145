package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// filePage names one page of a file that processes map.
type filePage struct {
	device string
	inode  uint64
	page   uint64
}

// memory is what a group of processes has in physical memory.
type memory struct {
	anonymous int64                 // bytes, of each process by itself
	files     map[filePage]struct{} // pages of files, each once
}

func (m memory) rss() int64 { return m.anonymous + int64(len(m.files))*int64(os.Getpagesize()) }

// Bits of an entry of /proc/PID/pagemap, see proc_pid_pagemap(5).
const (
	pagePresent = 1 << 63
	pageOfFile  = 1 << 61
)

// measure looks at every page of the processes. The kernel's counters do not
// say which pages two processes share, and Pss divides by processes that are
// not of the group, too.
func measure(pids ...int) (memory, error) {
	m := memory{files: map[filePage]struct{}{}}
	for _, pid := range pids {
		anonymous, err := statusBytes(pid, "RssAnon")
		if err != nil {
			return m, err
		}
		m.anonymous += anonymous
		if err := m.addFiles(pid); err != nil {
			return m, err
		}
	}
	return m, nil
}

func (m *memory) addFiles(pid int) (err error) {
	maps, err := os.ReadFile(proc(pid, "maps"))
	if errors.Is(err, os.ErrPermission) {
		return fmt.Errorf("%w: agent and controller hide their memory from all but root", err)
	}
	if err != nil {
		return err
	}
	pagemap, err := os.Open(proc(pid, "pagemap"))
	if err != nil {
		return err
	}
	defer pagemap.Close()
	size := uint64(os.Getpagesize())
	for line := range strings.Lines(string(maps)) {
		var start, end, offset, inode uint64
		var perms, device string
		if _, err := fmt.Sscanf(line, "%x-%x %s %x %s %d", &start, &end, &perms, &offset, &device, &inode); err != nil {
			return fmt.Errorf("%s: %q: %w", proc(pid, "maps"), line, err)
		}
		if inode == 0 {
			continue
		}
		entries := make([]byte, (end-start)/size*8)
		if _, err := pagemap.ReadAt(entries, int64(start/size*8)); err != nil && !errors.Is(err, io.EOF) {
			return fmt.Errorf("read %s: %w", pagemap.Name(), err)
		}
		for i := uint64(0); i*8 < uint64(len(entries)); i++ {
			if e := binary.NativeEndian.Uint64(entries[i*8:]); e&pagePresent != 0 && e&pageOfFile != 0 {
				m.files[filePage{device, inode, offset/size + i}] = struct{}{}
			}
		}
	}
	return nil
}

func proc(pid int, name string) string { return filepath.Join("/proc", strconv.Itoa(pid), name) }

// statusBytes reads a field of /proc/PID/status.
func statusBytes(pid int, field string) (int64, error) {
	raw, err := os.ReadFile(proc(pid, "status"))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(raw)) {
		if rest, ok := strings.CutPrefix(line, field+":"); ok {
			kib, err := strconv.ParseInt(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(rest), "kB")), 10, 64)
			return kib << 10, err
		}
	}
	return 0, fmt.Errorf("%s has no %s", proc(pid, "status"), field)
}

// family gives a process and its children.
func family(pid int) ([]int, error) {
	pids := []int{pid}
	tasks, err := filepath.Glob(proc(pid, "task/*/children"))
	if err != nil {
		return nil, err
	}
	for _, task := range tasks {
		raw, err := os.ReadFile(task)
		if err != nil {
			continue // the thread has ended
		}
		for f := range strings.FieldsSeq(string(raw)) {
			child, err := strconv.Atoi(f)
			if err != nil {
				return nil, err
			}
			pids = append(pids, child)
		}
	}
	return pids, nil
}

// processorTime gives the time that processes have run for.
func processorTime(pids []int) (time.Duration, error) {
	const ticks = 100 // USER_HZ, the same on every Linux that Go runs on
	var sum int64
	for _, pid := range pids {
		raw, err := os.ReadFile(proc(pid, "stat"))
		if err != nil {
			return 0, err
		}
		_, rest, _ := strings.Cut(string(raw), ") ") // the name may hold anything
		fields := strings.Fields(rest)
		if len(fields) < 13 {
			return 0, fmt.Errorf("%s has %d fields", proc(pid, "stat"), len(fields))
		}
		for _, f := range fields[11:13] { // utime and stime
			n, err := strconv.ParseInt(f, 10, 64)
			if err != nil {
				return 0, err
			}
			sum += n
		}
	}
	return time.Duration(sum) * time.Second / ticks, nil
}

func command(pid int) string {
	raw, err := os.ReadFile(proc(pid, "cmdline"))
	if err != nil {
		return "?"
	}
	args := strings.Split(strings.TrimRight(string(raw), "\x00"), "\x00")
	args[0] = filepath.Base(args[0])
	return strings.Join(args[:min(len(args), 2)], " ")
}
