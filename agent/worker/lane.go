package worker

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"syscall"
	"time"

	"github.com/dunlin/dunlin/agent/engine"
	"github.com/dunlin/dunlin/agent/ort"
)

// A run that is alone looks for its answer for lookLimit before it sleeps, if
// the one before did not take longer: to be woken takes as long as a small
// run. It offers its core to others meanwhile; where it gets it back after more
// than awayLimit, it sleeps, and so do the lane's next shyRuns.
const (
	lookLimit = 50 * time.Microsecond
	awayLimit = 5 * time.Microsecond
	shyRuns   = 100
)

// lane is the parent's end of one of the child's lanes. One run at a time has
// it, and with it all that follows.
type lane struct {
	process *process
	number  uint64
	conn    *net.UnixConn
	raw     syscall.RawConn

	id       engine.VersionID // of the run that has it; guarded by process.mu
	alone    bool             // no other run goes on
	quick    bool             // the last answer came within lookLimit
	seq      uint64
	question ort.Question
	answer   ort.Answer
	packet   []byte // both ways
	plan     plan
	memory   memory
	data     [][]byte // of the outputs

	// For raw.Read, whose function is made once.
	look    func(fd uintptr) bool
	looking bool // it has not slept yet
	shy     int  // runs until it may look again
	began   time.Time
	n       int
	err     error

	// For cancellation.
	grace  *time.Timer
	gaveUp chan struct{} // holds one once giveUp is done
}

// lane gives a lane that nobody uses, a new one where there is none.
func (p *process) lane(id engine.VersionID) (*lane, error) {
	p.mu.Lock()
	if n := len(p.free); n > 0 {
		l := p.free[n-1] // the one used last: its thread may still be awake
		p.free = p.free[:n-1]
		p.start(l, id)
		p.mu.Unlock()
		return l, nil
	}
	p.mu.Unlock()
	ours, theirs, err := socketPair()
	if err != nil {
		return nil, fmt.Errorf("open lane: %w", err)
	}
	defer theirs.Close()
	l, err := newLane(p, ours)
	if err != nil {
		return nil, fmt.Errorf("open lane: %w", err)
	}
	p.mu.Lock()
	l.number = uint64(len(p.lanes))
	ended := p.ended
	if !ended {
		p.lanes = append(p.lanes, l)
		p.start(l, id)
	}
	p.mu.Unlock()
	if ended {
		l.conn.Close()
		<-p.dead
		return nil, p.death
	}
	if err := p.send(&message{kind: kindLane, number: l.number}, theirs); err != nil {
		return nil, err
	}
	return l, nil
}

// start has a run take a lane; it is called with mu held.
func (p *process) start(l *lane, id engine.VersionID) {
	p.running++
	l.id, l.alone = id, p.running == 1
}

// newLane takes over one end of a socket pair.
func newLane(p *process, end *os.File) (*lane, error) {
	conn, err := connect(end)
	if err != nil {
		return nil, err
	}
	raw, err := conn.SyscallConn()
	if err != nil {
		conn.Close()
		return nil, err
	}
	l := &lane{
		process: p, conn: conn, raw: raw,
		packet: make([]byte, 0, maxPacket+1), gaveUp: make(chan struct{}, 1),
	}
	l.look = l.read
	return l, nil
}

// release gives the lane to the next run, and back what memory it still has.
func (l *lane) release() {
	l.memory.give()
	l.memory = memory{}
	l.plan.requests = nil
	clear(l.plan.sources)
	clear(l.question.Inputs)
	clear(l.data)
	l.data = l.data[:0]
	p := l.process
	p.mu.Lock()
	p.running--
	p.free = append(p.free, l)
	l.id = engine.VersionID{}
	p.mu.Unlock()
}

// ask sends the question, with the data of what is inline behind it in
// packet, and reads the answer. Its error is a DeathError.
func (l *lane) ask(room uint64) error {
	if err := l.tell(); err != nil {
		return err
	}
	l.began = time.Now()
	l.looking = l.alone && l.quick && l.shy == 0
	l.shy = max(l.shy-1, 0)
	err := l.raw.Read(l.look)
	if err == nil {
		err = l.err
	}
	if err == nil && l.n == 0 {
		err = io.EOF
	}
	if err != nil {
		return l.process.fail(err)
	}
	l.quick = time.Since(l.began) < lookLimit
	err = l.answer.Read(l.packet[:l.n], room)
	if err == nil && l.answer.Sequence != l.seq {
		err = fmt.Errorf("%w: sequence number %d instead of %d", ort.ErrPacket, l.answer.Sequence, l.seq)
	}
	if err != nil {
		return l.process.fail(err)
	}
	return nil
}

// tell sends the question. Its error is a DeathError.
func (l *lane) tell() error {
	var err error
	if oob := l.memory.attached(); l.question.Attached && oob != nil {
		_, _, err = l.conn.WriteMsgUnix(l.packet, oob, nil)
		l.memory.sent()
	} else {
		_, err = l.conn.Write(l.packet)
	}
	if err != nil {
		return l.process.fail(err)
	}
	return nil
}

// read is for raw.Read: it reads a packet, or says that the goroutine is to
// sleep until there is one.
func (l *lane) read(fd uintptr) bool {
	for last := l.began; ; runtime.Gosched() {
		l.n, l.err = syscall.Read(int(fd), l.packet[:maxPacket+1])
		if l.err == syscall.EINTR {
			continue
		}
		if l.err != syscall.EAGAIN {
			return true
		}
		if !l.looking {
			return false
		}
		now := time.Now()
		if now.Sub(last) > awayLimit {
			l.shy = shyRuns
		}
		if l.looking = l.shy == 0 && now.Sub(l.began) < lookLimit; !l.looking {
			return false
		}
		last = now
	}
}

// watch has the run that the lane is about to ask for end soon after ctx is
// done: a child that does not answer within the grace period is killed. The
// function that it gives is to be called once when the run is over.
func (l *lane) watch(ctx context.Context) (over func()) {
	if ctx.Done() == nil {
		return func() {}
	}
	stop := context.AfterFunc(ctx, func() { l.giveUp(context.Cause(ctx)) })
	return func() {
		if !stop() {
			<-l.gaveUp
			l.grace.Stop()
		}
	}
}

// giveUp asks for the early end of the run that has the lane.
func (l *lane) giveUp(cause error) {
	p, id, grace, what := l.process, l.id, l.process.grace, "was cancelled"
	if errors.Is(cause, engine.ErrStalled) {
		grace, what = p.stall, "had stalled and was cancelled"
	}
	l.grace = time.AfterFunc(grace, func() {
		p.killFor(id, fmt.Sprintf("gave no answer for %v after a request %s", grace, what))
	})
	// Where that fails, the child is dead or about to be, and so is the run.
	p.send(&message{kind: kindCancelRun, number: l.number, seq: l.seq}, nil)
	l.gaveUp <- struct{}{}
}
