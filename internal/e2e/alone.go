package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
)

// Alone is an agent that serves without a controller.
type Alone struct {
	*Process
	URL  string // of REST
	GRPC string // host:port
}

// startedLine is how an agent says where it answers.
var startedLine = regexp.MustCompile(`msg="agent started" url=(\S+)(?: grpc=(\S+))?`)

// Serve starts dunlin-agent serve with the given arguments, which say what to
// serve, logs to dir, and waits until its port answers.
func Serve(ctx context.Context, agent, dir, name, runtimeLibrary string, args ...string) (*Alone, error) {
	args = append([]string{"serve", "--listen", "127.0.0.1:0", "--grpc-listen", "127.0.0.1:0", "--runtime-lib", runtimeLibrary}, args...)
	log := filepath.Join(dir, name+".log")
	if err := os.WriteFile(log, nil, 0o600); err != nil { // an address of an earlier run would be taken for this one's
		return nil, err
	}
	p, err := Start(name, log, nil, agent, args...)
	if err != nil {
		return nil, err
	}
	a := &Alone{Process: p}
	err = p.Wait(ctx, func(context.Context) error {
		b, err := os.ReadFile(log)
		if err != nil {
			return err
		}
		m := startedLine.FindSubmatch(b)
		if m == nil {
			return errors.New("it has not said where it answers")
		}
		a.URL, a.GRPC = string(m[1]), string(m[2])
		return nil
	})
	if err != nil {
		p.Kill()
		return nil, fmt.Errorf("%w\n%s", err, p.LogTail(20))
	}
	return a, nil
}

// Ready waits until everything that the agent should serve can be answered.
func (a *Alone) Ready(ctx context.Context) error {
	return a.Wait(ctx, func(ctx context.Context) error { return get(ctx, a.URL+"/v2/health/ready") })
}
