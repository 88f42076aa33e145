package agent

import (
	"context"
	"crypto/sha256"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/dunlin/dunlin/agent/state"
	"github.com/dunlin/dunlin/internal/program"
	"github.com/dunlin/dunlin/models/signing"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// SignatureSuffix is what the signature of a binary is called after its name.
const SignatureSuffix = ".sig"

// Verify parses args, and says on out which version of the agent a file is,
// or gives why this device must not run it: it is signed, in FILE.sig, by an
// agent key of the device's trust document, is for its system, and not below
// the floor. What is refused becomes an event. It may run beside the agent.
func Verify(ctx context.Context, args []string, getenv func(string) string, out, help io.Writer) error {
	about, err := aboutPath(ctx, program.Source{
		Program: "dunlin-agent verify", Synopsis: "FILE", Args: args, Getenv: getenv, Help: help,
		Notes: "Says whether this device may run FILE as its agent: by the signature in FILE.sig, and the trust document that the device has.\n" + commands,
	})
	if err != nil || about == nil {
		return err
	}
	store, file := about.store, about.path
	defer store.Close()
	b, err := verifyBinary(ctx, store, file, time.Now())
	if _, ok := errors.AsType[*signing.RefusedError](err); ok {
		_, lost := store.Append(ctx, &dunlinv1.Event{
			Kind: "agent-binary.refused", Severity: dunlinv1.Severity_SEVERITY_ERROR, Message: fmt.Sprintf("%s: %v", filepath.Base(file), err),
		})
		return errors.Join(fmt.Errorf("refused: %w", err), lost)
	} else if err != nil {
		return fmt.Errorf("verify %s: %w", file, err)
	}
	_, err = fmt.Fprintf(out, "dunlin-agent %s %s/%s\n", b.Version, b.OS, b.Arch)
	return err
}

// about is what a command has that is about a file or folder, beside an agent
// that may be running.
type about struct {
	path  string
	data  string // the agent's data folder
	store *state.Store
}

// aboutPath parses the arguments of such a command, one path and the data
// folder, and opens the state of the device; nil where help was asked for.
func aboutPath(ctx context.Context, src program.Source) (*about, error) {
	cfg := Config{Data: defaultData(src.Getenv)}
	a := &about{}
	src.Prefix = "DUNLIN_AGENT_"
	src.Arguments = func(paths []string) error {
		if len(paths) != 1 {
			return fmt.Errorf("%d arguments, want one: %s", len(paths), src.Synopsis)
		}
		a.path = paths[0]
		return nil
	}
	err := src.Load([]program.Setting{
		{Name: "data", Usage: "`folder` of everything that the agent keeps", Value: &cfg.Data},
	}, &cfg, nil)
	if errors.Is(err, flag.ErrHelp) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	a.data = cfg.Data
	file := filepath.Join(a.data, stateFile)
	if _, err := os.Stat(file); err != nil { // opening it would make it
		return nil, fmt.Errorf("%s %s: the device has no state: %w", strings.TrimPrefix(src.Program, "dunlin-agent "), a.path, err)
	}
	a.store, err = state.Open(ctx, file, state.Limits{})
	return a, err
}

func verifyBinary(ctx context.Context, store *state.Store, file string, now time.Time) (signing.Binary, error) {
	trust, err := store.Trust(ctx)
	if err != nil && !errors.Is(err, state.ErrNone) {
		return signing.Binary{}, err
	}
	return admitBinary(trust, file, now)
}

// admitBinary says by a trust document which version of the agent a file is,
// or why the device must not run it; nil: there is none.
func admitBinary(trust *signing.Trust, file string, now time.Time) (signing.Binary, error) {
	if trust == nil {
		return signing.Binary{}, &signing.RefusedError{Reason: "the device has no trust document, so no agent key counts"}
	}
	binary, err := os.Open(file)
	if err != nil {
		return signing.Binary{}, err
	}
	defer binary.Close()
	h := sha256.New()
	if _, err := io.Copy(h, binary); err != nil {
		return signing.Binary{}, err
	}
	sig, err := os.Open(file + SignatureSuffix)
	if err != nil {
		return signing.Binary{}, &signing.RefusedError{Reason: fmt.Sprintf("it has no signature: %v", err)}
	}
	defer sig.Close()
	raw, err := io.ReadAll(io.LimitReader(sig, signing.MaxSignatureBytes+1))
	if err != nil {
		return signing.Binary{}, err
	}
	return trust.AdmitBinary([sha256.Size]byte(h.Sum(nil)), runtime.GOOS, runtime.GOARCH, raw, now)
}
