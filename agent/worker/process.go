package worker

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dunlin/dunlin/agent/engine"
	"github.com/dunlin/dunlin/agent/ort"
)

// DeathError is the error of what was in flight when the child died.
type DeathError struct {
	Status string // "signal: killed", "exit status 2", or what the parent had against it
	Reason string // the line in which it gave a reason, perhaps empty
}

// Error names the status and the reason.
func (e *DeathError) Error() string {
	if e.Reason == "" {
		return "the worker process died: " + e.Status
	}
	return "the worker process died: " + e.Status + ": " + e.Reason
}

// process is one child and the parent's end of its socket.
type process struct {
	command *exec.Cmd
	socket  *socket
	region  *region
	stderr  *stderr
	onDeath func(p *process, culprit engine.VersionID) // told of its death before others are, where not nil
	grace   time.Duration                              // see Config.grace
	stall   time.Duration                              // see Config.StallGrace
	runtime Runtime                                    // what it has opened; set by open
	reads   roots                                      // what its sandbox lets it read

	mu      sync.Mutex // guards what follows
	seq     uint64
	pending map[uint64]question
	verdict string           // why the parent killed it
	culprit engine.VersionID // which it was killed for; zero where it was for none
	lanes   []*lane          // by number
	free    []*lane          // that no run has
	running int              // lanes that one has
	ended   bool             // lanes are closed, and there will be no more

	dead     chan struct{}      // closed when the process has been waited for
	death    *DeathError        // set before dead is closed, as is
	inFlight []engine.VersionID // what it was working on then
	weak     bool               // a kill that the parent did not send
	blamed   []engine.VersionID // what its death was put down to

	proved bool // it has run something; guarded by Worker.mu
}

// question is one that the child has not answered yet.
type question struct {
	id     engine.VersionID // zero for kindInit
	answer chan *message    // holds one
}

// startProcess starts a child and a goroutine that reads from it; stop ends
// both. The child dies with the calling thread: the caller has locked it
// until then.
func startProcess(cfg *Config, onDeath func(*process, engine.VersionID)) (*process, error) {
	end, theirs, err := socketPair()
	if err != nil {
		return nil, fmt.Errorf("start worker: %w", err)
	}
	defer theirs.Close()
	ours, err := newSocket(end)
	if err != nil {
		return nil, fmt.Errorf("start worker: %w", err)
	}
	shared, err := newRegion(cfg.SharedBytes)
	if err != nil {
		ours.close()
		return nil, fmt.Errorf("start worker: %w", err)
	}
	cmd := exec.Command(cfg.Command[0], cfg.Command[1:]...)
	cmd.Dir = "/"
	cmd.Env = append(childEnvironment(), cfg.sandbox.environment()...)
	cmd.ExtraFiles = []*os.File{theirs, shared.file} // become socketFD and regionFD
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Pdeathsig: syscall.SIGKILL,
		Setpgid:   true, // an interrupt from the terminal is for the parent
	}
	cmd.WaitDelay = time.Second
	p := &process{
		command: cmd, socket: ours, region: shared, onDeath: onDeath, grace: cfg.grace, stall: cfg.StallGrace,
		stderr:  &stderr{log: cfg.Log},
		reads:   rootsOf(cfg.sandbox.Read),
		pending: make(map[uint64]question),
		dead:    make(chan struct{}),
	}
	cmd.Stderr = p.stderr
	if err := startOn(cmd, cfg.Affinity); err != nil {
		ours.close()
		shared.close()
		return nil, fmt.Errorf("start worker: %w", err)
	}
	shared.file.Close()
	go p.read()
	return p, nil
}

// startOn starts a child that may use the numbered processors only, where there
// are any: it inherits what the calling thread, which is locked, may use.
func startOn(cmd *exec.Cmd, processors []int) error {
	if len(processors) == 0 {
		return cmd.Start()
	}
	var before, set unix.CPUSet
	if err := unix.SchedGetaffinity(0, &before); err != nil {
		return fmt.Errorf("affinity: %w", err)
	}
	for _, n := range processors {
		set.Set(n)
	}
	if err := unix.SchedSetaffinity(0, &set); err != nil {
		return fmt.Errorf("affinity: processors %v: %w", processors, err)
	}
	err := cmd.Start()
	_ = unix.SchedSetaffinity(0, &before) // it was allowed
	return err
}

// childEnvironment is all that the child gets: no credentials, a C heap that
// stays small, short traces.
func childEnvironment() []string {
	env := []string{
		"MALLOC_ARENA_MAX=2",
		// It would go up with the first large block that is freed, and weights
		// would then lie, and leave holes, among small blocks.
		"MALLOC_MMAP_THRESHOLD_=131072",
		"GOTRACEBACK=none",
		"GOGC=50",
		"GOMAXPROCS=" + strconv.Itoa(min(4, runtime.NumCPU())),
	}
	for _, name := range []string{"LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "TZ"} {
		if v, ok := os.LookupEnv(name); ok {
			env = append(env, name+"="+v)
		}
	}
	return env
}

// read takes in answers until the child is gone or breaks the format; it
// then makes sure that the child is dead and says so.
func (p *process) read() {
	for {
		m, lane, err := p.socket.receive()
		if errors.Is(err, errMalformed) {
			p.kill(err.Error())
		}
		if err != nil {
			break
		}
		if lane != nil {
			lane.Close() // it is not for the child to offer one: its kind is not that of an answer
		}
		p.mu.Lock()
		q, asked := p.pending[m.seq]
		delete(p.pending, m.seq)
		p.mu.Unlock()
		if !asked || m.kind < kindDone {
			p.kill(fmt.Sprintf("%v: kind %d with sequence number %d", errMalformed, m.kind, m.seq))
			break
		}
		q.answer <- m
	}
	p.kill("")
	p.socket.close()
	p.region.close()
	err := p.command.Wait()
	p.mu.Lock()
	p.ended = true
	verdict, culprit := p.verdict, p.culprit
	for _, q := range p.pending {
		p.inFlight = append(p.inFlight, q.id)
	}
	for _, l := range p.lanes {
		p.inFlight = append(p.inFlight, l.id)
	}
	lanes := p.lanes // there will be no more
	p.mu.Unlock()
	for _, l := range lanes {
		l.conn.Close()
	}
	p.inFlight = slices.DeleteFunc(p.inFlight, func(id engine.VersionID) bool { return id == engine.VersionID{} })
	slices.SortFunc(p.inFlight, engine.VersionID.Compare)
	p.inFlight = slices.Compact(p.inFlight)
	status, state := verdict, p.command.ProcessState
	if status == "" && state != nil {
		status = state.String()
		ended, ok := state.Sys().(syscall.WaitStatus)
		p.weak = ok && ended.Signaled() && ended.Signal() == syscall.SIGKILL
	} else if status == "" {
		status = err.Error()
	}
	p.death = &DeathError{Status: status, Reason: p.stderr.reason}
	if p.onDeath != nil && verdict != verdictStopped && verdict != verdictReplaced {
		p.onDeath(p, culprit)
	}
	close(p.dead)
}

// verdictStopped is the verdict on a child that is not needed any more, and
// verdictReplaced that on one whose place another one takes at once.
const (
	verdictStopped  = "stopped"
	verdictReplaced = "replaced by one that may read what this one may not"
)

// replaced says whether the parent has ended the child for another one.
func (p *process) replaced() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.verdict == verdictReplaced
}

// kill ends the child; the reason, where there is one, is what its death is
// put down to.
func (p *process) kill(reason string) { p.killFor(engine.VersionID{}, reason) }

// killFor ends the child because of a version.
func (p *process) killFor(culprit engine.VersionID, reason string) {
	p.mu.Lock()
	if p.verdict == "" {
		p.verdict, p.culprit = reason, culprit
	}
	p.mu.Unlock()
	p.command.Process.Kill()
}

// stop ends the child and waits for its end.
func (p *process) stop() {
	p.kill(verdictStopped)
	<-p.dead
}

// quiet says that the child has nothing to do.
func (p *process) quiet() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.running == 0 && len(p.pending) == 0
}

func (p *process) isDead() bool {
	select {
	case <-p.dead:
		return true
	default:
		return false
	}
}

// call asks a question about a version and waits for its answer. Once ctx is
// done it cancels the question, which the child then answers soon: a child
// that does not answer within the grace period is killed.
func (p *process) call(ctx context.Context, id engine.VersionID, m *message) (*message, error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	answer := make(chan *message, 1)
	p.mu.Lock()
	p.seq++
	m.seq = p.seq
	p.pending[m.seq] = question{id, answer}
	p.mu.Unlock()
	defer func() {
		// After an answer it is not there; after an error of send the child
		// has not heard of it, or is dead.
		p.mu.Lock()
		delete(p.pending, m.seq)
		p.mu.Unlock()
	}()
	if err := p.send(m, nil); err != nil {
		return nil, err
	}
	select {
	case a := <-answer:
		return a, p.judge(id, a)
	case <-p.dead:
		return p.last(answer)
	case <-ctx.Done():
	}
	if err := p.send(&message{kind: kindCancel, seq: m.seq}, nil); err != nil {
		return nil, err
	}
	grace := p.graceAfter(ctx)
	timer := time.NewTimer(grace)
	defer timer.Stop()
	select {
	case a := <-answer:
		if a.kind == kindCancelled {
			return nil, context.Cause(ctx)
		}
		return a, p.judge(id, a)
	case <-timer.C:
		p.killFor(id, fmt.Sprintf("gave no answer for %v after a request was cancelled", grace))
		<-p.dead
	case <-p.dead:
	}
	return p.last(answer)
}

// graceAfter says how long the child may take to give up what ctx was for.
func (p *process) graceAfter(ctx context.Context) time.Duration {
	if errors.Is(context.Cause(ctx), engine.ErrStalled) {
		return p.stall
	}
	return p.grace
}

// last gives the answer that a child gave before it died, or its death.
func (p *process) last(answer <-chan *message) (*message, error) {
	select {
	case a := <-answer:
		return a, a.err()
	default:
		return nil, p.death
	}
}

// judge gives the error of an answer about a version that is one: the child's
// death where it can do nothing more.
func (p *process) judge(id engine.VersionID, a *message) error {
	err := a.err()
	if !errors.Is(err, errPoisoned) {
		return err
	}
	p.mu.Lock()
	p.pending[a.seq] = question{id, make(chan *message, 1)} // it was at work on it
	p.mu.Unlock()
	return p.fail(err)
}

// errPoisoned is the error of a child whose GPU does nothing more for it.
var errPoisoned = errors.New("the GPU's state is lost")

// err gives the error of an answer that is one.
func (m *message) err() error {
	switch m.kind {
	case kindDone:
		return nil
	case kindCancelled:
		return context.Canceled
	}
	reason := strings.ToValidUTF8(strings.Join(m.strings, " "), "\uFFFD")
	if ort.PoisonedText(reason) {
		return fmt.Errorf("%w: %s", errPoisoned, reason)
	}
	if m.kind == kindOutOfMemory {
		return fmt.Errorf("%w: %s", engine.ErrOutOfMemory, reason)
	}
	return errors.New(reason)
}

// send sends a message, with kindLane and the lane's socket. A socket that
// fails is the end of the child; with any other error the message has not
// left, and the child is as before.
func (p *process) send(m *message, lane *os.File) error {
	err := p.socket.send(m, lane)
	if !errors.Is(err, errSocket) {
		return err
	}
	return p.fail(err)
}

// fail ends the child because of an error of a socket, or of what came over
// it, and gives its death.
func (p *process) fail(err error) error {
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		p.kill(fmt.Sprintf("took nothing off its socket for %v", writeLimit))
	case errors.Is(err, unix.EPIPE), errors.Is(err, unix.ECONNRESET), errors.Is(err, net.ErrClosed), errors.Is(err, io.EOF):
		p.kill("") // it is dead or about to be
	default:
		p.kill(err.Error())
	}
	<-p.dead
	return p.death
}

// stderr passes what the child prints on to the log, line by line, and keeps
// the last line that gives a reason for its end. One goroutine writes; the
// reason may be read when that is done.
type stderr struct {
	log    *slog.Logger
	line   []byte // that has not ended yet
	reason string
}

// maxLine bounds a line of the child's; a longer one is cut up.
const maxLine = 1 << 10

func (s *stderr) Write(b []byte) (int, error) {
	s.line = append(s.line, b...)
	for len(s.line) > 0 {
		end := bytes.IndexByte(s.line, '\n')
		next := end + 1
		if end < 0 || end > maxLine {
			if len(s.line) < maxLine {
				break
			}
			end, next = maxLine, maxLine
		}
		text := strings.ToValidUTF8(string(bytes.TrimSpace(s.line[:end])), "\uFFFD")
		s.line = s.line[next:]
		if text == "" {
			continue
		}
		s.log.Warn("worker prints", "line", text)
		for _, start := range []string{"panic: ", "fatal error: ", "terminate called", "worker: "} {
			if strings.HasPrefix(text, start) {
				s.reason = text
			}
		}
	}
	return len(b), nil
}
