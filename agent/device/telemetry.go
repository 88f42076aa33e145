package device

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// Sampler samples the figures of a device. It is for one goroutine.
type Sampler struct {
	dir  string
	last processor
}

// NewSampler gives a Sampler. dataDir is as for Info.
func NewSampler(dataDir string) *Sampler {
	s := &Sampler{dir: dataDir}
	s.last, _ = readProcessor()
	return s
}

// Sample gives the device's figures now. The use of the processor is that
// since the last sample, or since NewSampler. The anonymous memory is that of
// this process and its children. A figure that cannot be had is absent.
func (s *Sampler) Sample() *dunlinv1.Telemetry {
	t := &dunlinv1.Telemetry{At: timestamppb.New(time.Now())}
	if p, err := readProcessor(); err == nil {
		t.CpuUtilisation = utilisation(s.last, p)
		s.last = p
	}
	if m, err := readMemory(); err == nil {
		t.MemoryUsedBytes, t.MemoryTotalBytes = new(m.used), new(m.total)
	}
	if free, _, err := Disk(s.dir); err == nil {
		t.DiskFreeBytes = new(free)
	}
	t.AgentAnonymousBytes = anonymous()
	return t
}

func utilisation(before, now processor) *float64 {
	if now.total <= before.total || now.busy < before.busy || now.busy-before.busy > now.total-before.total {
		return nil
	}
	return new(float64(now.busy-before.busy) / float64(now.total-before.total))
}

// anonymous sums over this process and its children; nil where it cannot be
// read.
func anonymous() *uint64 {
	sum, err := Anonymous(os.Getpid())
	if err != nil {
		return nil
	}
	tasks, err := filepath.Glob("/proc/self/task/*/children")
	if err != nil || len(tasks) == 0 {
		return nil
	}
	for _, task := range tasks {
		raw, err := readFile(task)
		if err != nil {
			continue // the thread has ended
		}
		for f := range strings.FieldsSeq(raw) {
			pid, err := strconv.Atoi(f)
			if err != nil {
				return nil
			}
			if n, err := Anonymous(pid); err == nil { // else it has ended
				sum += n
			}
		}
	}
	return new(sum)
}
