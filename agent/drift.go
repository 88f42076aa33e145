package agent

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

const (
	// driftEvery is how often the files are looked at that the agent has read
	// at its start.
	driftEvery = 30 * time.Second
	// maxSettings bounds a settings file that is compared.
	maxSettings = 1 << 20
)

// mark tells what a file was by what it is now.
type mark string

// contentMark is by the content of a file.
func contentMark(path string) mark {
	f, err := os.Open(path)
	if err == nil {
		defer f.Close()
		sum := sha256.New()
		if _, err = io.Copy(sum, io.LimitReader(f, maxSettings)); err == nil {
			return mark(fmt.Sprintf("sha256:%x", sum.Sum(nil)))
		}
	}
	return absentMark(err)
}

// fileMark is by which file it is, behind links, how long and how old.
func fileMark(path string) mark {
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		return absentMark(err)
	}
	info, err := os.Stat(real)
	if err != nil {
		return absentMark(err)
	}
	inode := uint64(0)
	if s, ok := info.Sys().(*syscall.Stat_t); ok {
		inode = s.Ino
	}
	return mark(fmt.Sprintf("%s of %d bytes and %s, inode %d", filepath.Base(real), info.Size(), info.ModTime().UTC().Format(time.RFC3339), inode))
}

func absentMark(err error) mark {
	if errors.Is(err, fs.ErrNotExist) {
		return "missing"
	}
	return "unreadable"
}

// watched is a file that was read when the agent started, and is in force as it
// was then.
type watched struct {
	kind, path string
	mark       func(string) mark
	want       mark
	since      time.Time // of the drift; zero: there is none
}

// watchedFiles gives what is in force now.
func watchedFiles(settings, runtime string) []*watched {
	var all []*watched
	for _, w := range []*watched{{kind: "setting", path: settings, mark: contentMark}, {kind: "runtime", path: runtime, mark: fileMark}} {
		if w.path != "" {
			w.want = w.mark(w.path)
			all = append(all, w)
		}
	}
	return all
}

// drifts says which files are not those in force any more: they count from the
// next start on.
func drifts(files []*watched, now time.Time) (all []*dunlinv1.Drift) {
	for _, w := range files {
		have := w.mark(w.path)
		if have == w.want {
			w.since = time.Time{}
			continue
		}
		if w.since.IsZero() {
			w.since = now
		}
		all = append(all, &dunlinv1.Drift{
			Kind: w.kind, Subject: w.path, Want: string(w.want) + ", which is in force until a restart", Have: string(have), Since: timestamppb.New(w.since),
		})
	}
	return all
}

// watchDrift looks at what the agent has read at its start until ctx is done.
func (a *agent) watchDrift(ctx context.Context, files []*watched) error {
	for sleep(ctx, driftEvery) {
		a.follow.Reconcile.Drifted(drifts(files, time.Now()))
	}
	return nil
}
