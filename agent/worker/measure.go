package worker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/dunlin/dunlin/agent/engine"
	"github.com/dunlin/dunlin/agent/ort"
	"github.com/dunlin/dunlin/agent/profile"
	"github.com/dunlin/dunlin/models"
	"github.com/dunlin/dunlin/models/tensor"
)

const (
	// questionLimit is how long one question of a Measuring may take, pauses not
	// counted.
	questionLimit = CheckLimit
	// measureCPU bounds the processor time of a child that measures, for each
	// core.
	measureCPU = time.Hour
	// staleAfter is how long ago a run may have been for the next one to find
	// memory and caches as it left them.
	staleAfter = 300 * time.Millisecond
	// maxTimes bounds the runs of a slice: their times have to fit a packet.
	maxTimes = 2048
	// checkRows are those of the inputs that are made up for Check.
	checkRows = 3
)

// Measuring is a child that measures one version, a profile.Bench. Pause and
// Resume may be called while a question is worked on.
type Measuring struct {
	p     *process
	spec  engine.Spec
	file  string
	eager bool
	gpu   map[string]string // Config.ProviderOptions

	mu     sync.Mutex // guards what follows
	paused bool
	limit  *time.Timer   // of the question that is worked on; nil for none
	since  time.Time     // when the child was asked, or went on, unless it is paused
	left   time.Duration // that the question may take from then on
}

// Measure has f measure a version in a short-lived child that can do nothing
// else and gives way to everybody. file is the compiled model; "" opens the
// version as it is. A version that kills the child gives a DeathError, here and
// from the call that was worked on, which is a profile.ErrDead too.
func Measure(ctx context.Context, cfg Config, s engine.Spec, file string, f func(context.Context, *Measuring) error) error {
	cfg.Threads = 1 // each session has its own
	cfg.sandbox = cfg.confined(s, "")
	cfg.sandbox.CPU = measureCPU * time.Duration(runtime.NumCPU())
	if file != "" {
		cfg.sandbox.Read = append(cfg.sandbox.Read, filepath.Dir(file))
	}
	// A child dies with the thread that started it.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cfg = cfg.withDefaults()
	cfg.Pools = ""
	p, err := startProcess(&cfg, nil)
	if err != nil {
		return fmt.Errorf("measure %s: %w", s.ID, unavailable(err))
	}
	defer p.stop()
	defer context.AfterFunc(ctx, func() { p.kill(verdictStopped) })()
	if err := p.open(ctx, &cfg); err != nil {
		return fmt.Errorf("measure %s: %w", s.ID, err)
	}
	if err := f(ctx, &Measuring{p: p, spec: s, file: file, eager: cfg.Eager, gpu: cfg.ProviderOptions}); err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return fmt.Errorf("measure %s: %w", s.ID, err)
	}
	return nil
}

// Pause has the child stand still, at once and until Resume.
func (m *Measuring) Pause() { m.stand(true) }

// Resume has it go on.
func (m *Measuring) Resume() { m.stand(false) }

func (m *Measuring) stand(still bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if still == m.paused {
		return
	}
	m.paused = still
	signal := unix.SIGCONT
	if still {
		signal = unix.SIGSTOP
	}
	_ = m.p.command.Process.Signal(signal) // one that is dead stands still
	if m.limit == nil {
		return
	}
	if m.limit.Stop(); still {
		m.left -= time.Since(m.since)
	} else {
		m.since = time.Now()
		m.limit.Reset(m.left)
	}
}

// measureQuestion is what a child is asked to do.
type measureQuestion struct {
	Do               string // check, activate, prepare or slice
	Dir, Entry, File string
	Setting          profile.Setting
	Tolerance        profile.Tolerance
	Runs             int
	Cold             bool
	Eager            bool              // see Config
	GPU              map[string]string // Config.ProviderOptions
}

// measured is its answer.
type measured struct {
	Check profile.Check
	Took  time.Duration
	Ready profile.Ready
	Slice profile.Slice
}

// begin has f called when a question has taken too long, unless it ends before.
func (m *Measuring) begin(f func()) (end func()) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.since, m.left = time.Now(), questionLimit
	m.limit = time.AfterFunc(questionLimit, f)
	if m.paused {
		m.limit.Stop()
	}
	return func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		m.limit.Stop()
		m.limit = nil
	}
}

func (m *Measuring) ask(ctx context.Context, q measureQuestion) (a measured, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer m.begin(func() {
		cancel(fmt.Errorf("not done within %v: %w", questionLimit, context.DeadlineExceeded))
		m.p.kill(verdictStopped)
	})()
	q.Dir, q.Entry, q.File, q.Eager, q.GPU = m.spec.Dir, m.spec.Entry, m.file, m.eager, m.gpu
	text, err := json.Marshal(q)
	if err != nil {
		return a, err
	}
	answer, err := m.p.call(ctx, m.spec.ID, &message{kind: kindMeasure, strings: []string{string(text)}})
	if err != nil {
		_, died := errors.AsType[*DeathError](err)
		if ctx.Err() != nil { // the child is killed for it
			err, died = context.Cause(ctx), true
		}
		if err = classify(err); died {
			err = fmt.Errorf("%w: %w", profile.ErrDead, err)
		}
		return a, err
	}
	if len(answer.strings) != 1 {
		return a, fmt.Errorf("%w: a measurement has %d strings", errMalformed, len(answer.strings))
	}
	if err := json.Unmarshal([]byte(answer.strings[0]), &a); err != nil {
		return a, fmt.Errorf("%w: %w", errMalformed, err)
	}
	return a, nil
}

// Check compares the outputs of a provider with those of the graph as it is, on
// the CPU, or with those that the version brings along.
func (m *Measuring) Check(ctx context.Context, provider string) (profile.Check, error) {
	q := measureQuestion{Do: "check", Setting: profile.Setting{Provider: provider, Threads: 1}, Tolerance: profile.ForFP32}
	if graph, err := models.Inspect(filepath.Join(m.spec.Dir, m.spec.Entry)); err == nil && lowers(graph) {
		q.Tolerance = profile.ForLower
	}
	a, err := m.ask(ctx, q)
	a.Check.Provider = provider
	return a.Check, err
}

// lowers says whether a model computes in less than FP32.
func lowers(g *models.Graph) bool {
	short := func(t tensor.Type) bool { return t == tensor.Float16 || t == tensor.BFloat16 }
	for _, infos := range [][]tensor.Info{g.Inputs, g.Outputs} {
		if slices.ContainsFunc(infos, func(i tensor.Info) bool { return short(i.Type) }) {
			return true
		}
	}
	return slices.ContainsFunc(g.WeightTypes, short) || slices.ContainsFunc(g.Operators, func(op string) bool {
		return strings.Contains(op, "Quantize") || strings.Contains(op, "QLinear") || strings.HasSuffix(op, "Integer")
	})
}

// Activate opens the version and runs it once.
func (m *Measuring) Activate(ctx context.Context, set profile.Setting, cold bool) (time.Duration, error) {
	a, err := m.ask(ctx, measureQuestion{Do: "activate", Setting: set, Cold: cold})
	return a.Took, err
}

// Prepare opens the version as the setting says and runs it twice on each
// instance.
func (m *Measuring) Prepare(ctx context.Context, set profile.Setting) (profile.Ready, error) {
	a, err := m.ask(ctx, measureQuestion{Do: "prepare", Setting: set})
	return a.Ready, err
}

// Slice runs what was prepared last.
func (m *Measuring) Slice(ctx context.Context, set profile.Setting, runs int) (profile.Slice, error) {
	runs = max(1, min(runs, maxTimes/max(set.Instances, 1)))
	a, err := m.ask(ctx, measureQuestion{Do: "slice", Setting: set, Runs: runs})
	if err == nil && len(a.Slice.Times) != runs*set.Instances {
		err = fmt.Errorf("%w: %d times of %d runs", errMalformed, len(a.Slice.Times), runs*set.Instances)
	}
	return a.Slice, err
}

// bench is the child's end of a Measuring.
type bench struct {
	mu      sync.Mutex // held by the question that is worked on
	began   bool
	open    *ort.Session // of what set says
	set     profile.Setting
	bytes   int64 // that the session takes
	rows    int   // of inputs
	inputs  []tensor.Tensor
	integer byte // that works, see madeUp
	last    time.Time
	want    []tensor.Tensor // of the reference
	given   []tensor.Tensor // its inputs
	// tolerance is how far outputs may be from it.
	tolerance profile.Tolerance
}

// answer answers kindMeasure.
func (b *bench) answer(ctx context.Context, m *message) (*message, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	var q measureQuestion
	if len(m.strings) != 1 {
		return nil, fmt.Errorf("%w: measure has %d strings", errMalformed, len(m.strings))
	}
	if err := json.Unmarshal([]byte(m.strings[0]), &q); err != nil {
		return nil, fmt.Errorf("%w: %w", errMalformed, err)
	}
	if !b.began {
		b.began, b.integer = true, 1
		if !q.Eager {
			giveWay()
		}
	}
	var a measured
	var err error
	switch q.Do {
	case "check":
		a.Check, err = b.check(ctx, &q)
	case "activate":
		a.Took, err = b.activate(ctx, &q)
	case "prepare":
		a.Ready, err = b.prepare(ctx, &q)
	case "slice":
		a.Slice, err = b.slice(&q)
	default:
		err = fmt.Errorf("%w: it is to measure %q", errMalformed, q.Do)
	}
	if err != nil {
		return nil, err
	}
	text, err := json.Marshal(a)
	if err != nil {
		return nil, err
	}
	return &message{kind: kindDone, seq: m.seq, strings: []string{string(text)}}, nil
}

// giveWay has all threads there are, and so all to come, run only where nobody
// else of this machine's has anything to do.
func giveWay() {
	for range 2 { // one that began meanwhile
		threads, err := os.ReadDir("/proc/self/task")
		if err != nil {
			return
		}
		for _, t := range threads {
			if id, err := strconv.Atoi(t.Name()); err == nil {
				_ = unix.Setpriority(unix.PRIO_PROCESS, id, idlest)
				_ = unix.SchedSetAttr(id, &unix.SchedAttr{Policy: unix.SCHED_IDLE, Nice: idlest}, 0)
			}
		}
	}
}

// openAs opens the version as a setting says.
func openAs(ctx context.Context, q *measureQuestion) (*ort.Session, error) {
	set := ort.Setting{Threads: q.Setting.Threads, Prepack: q.Setting.Prepacked}
	if q.Setting.Provider == ort.CPUProvider && q.File != "" {
		return ort.OpenCompiled(ctx, q.File, set)
	}
	return ort.OpenOn(ctx, q.Setting.Provider, q.Dir, q.Entry, set, q.GPU)
}

func (b *bench) close() {
	if b.open != nil {
		b.open.Close()
		b.open = nil
	}
}

// shape gives the part of a setting that a session has.
func shape(s profile.Setting) profile.Setting {
	s.Batch, s.Instances = 0, 0
	return s
}

// use has the session of a setting open, and inputs of its rows.
func (b *bench) use(ctx context.Context, q *measureQuestion) error {
	if b.open == nil || shape(b.set) != shape(q.Setting) {
		b.close()
		before := ownBytes()
		s, err := openAs(ctx, q)
		if err != nil {
			return err
		}
		b.open, b.set, b.bytes = s, shape(q.Setting), max(ownBytes()-before, 0)
	}
	return b.make(ctx, b.open, q.Setting.Batch)
}

// make makes inputs of so many rows that the model can be run on.
func (b *bench) make(ctx context.Context, s *ort.Session, rows int) error {
	rows = max(rows, 1)
	if b.rows == rows {
		return nil
	}
	known := b.rows > 0
	in, err := madeUp(s.Inputs(), int64(rows), b.integer)
	if err != nil {
		return err
	}
	if !known {
		if _, err := timed(ctx, s, in); err != nil {
			if ctx.Err() != nil || ort.IsOutOfMemory(err) {
				return err
			}
			b.integer = 0
			if in, err = madeUp(s.Inputs(), int64(rows), 0); err != nil {
				return err
			}
			if _, err := timed(ctx, s, in); err != nil {
				b.integer = 1
				return err
			}
		}
	}
	b.inputs, b.rows = in, rows
	return nil
}

// check compares a provider's outputs with the reference.
func (b *bench) check(ctx context.Context, q *measureQuestion) (profile.Check, error) {
	b.close()
	run := func(s *ort.Session, in []tensor.Tensor) (out []tensor.Tensor, err error) {
		err = s.Run(ctx, in, nil, func(all []tensor.Tensor) error {
			for _, t := range all {
				t.Data, t.Shape = slices.Clone(t.Data), slices.Clone(t.Shape)
				out = append(out, t)
			}
			return nil
		})
		return out, err
	}
	if b.want == nil {
		ref, err := models.ReadReference(q.Dir)
		switch {
		case err == nil:
			b.given, b.want, b.tolerance = ref.Inputs, ref.Outputs, profile.Tolerance{Relative: ref.Relative, Absolute: ref.Absolute}
		case errors.Is(err, fs.ErrNotExist):
			err = b.refer(ctx, q, run)
		}
		if err != nil && ctx.Err() != nil {
			return profile.Check{}, context.Cause(ctx)
		}
		if err != nil {
			// The reference would be the same provider with less done to the graph.
			return profile.Check{Accepted: q.Setting.Provider == ort.CPUProvider, Reason: "not compared: " + err.Error()}, nil
		}
	}
	s, err := openAs(ctx, q)
	if err != nil {
		return profile.Check{}, err
	}
	defer s.Close()
	got, err := run(s, b.given)
	if err != nil {
		return profile.Check{}, err
	}
	return profile.Compare(q.Setting.Provider, b.want, got, b.tolerance), nil
}

// refer takes as the reference what the graph as it is gives for inputs that
// are made up.
func (b *bench) refer(ctx context.Context, q *measureQuestion, run func(*ort.Session, []tensor.Tensor) ([]tensor.Tensor, error)) error {
	s, err := ort.OpenReference(ctx, q.Dir, q.Entry)
	if err == nil {
		defer s.Close()
		rows := 1
		if s.Batch() {
			rows = checkRows
		}
		if err = b.make(ctx, s, rows); err == nil {
			b.given, b.tolerance = b.inputs, q.Tolerance
			b.want, err = run(s, b.given)
		}
	}
	if err != nil {
		return fmt.Errorf("the graph as it is does not run: %w", err)
	}
	return nil
}

// activate gives the time until the end of the first run, 0 where the file
// cannot be had out of memory.
func (b *bench) activate(ctx context.Context, q *measureQuestion) (time.Duration, error) {
	if err := b.use(ctx, q); err != nil { // so that it works
		return 0, err
	}
	if !q.Cold {
		if _, err := timed(ctx, b.open, b.inputs); err != nil {
			return 0, err
		}
	}
	b.close()
	ort.Trim()
	if q.Cold {
		file := q.File
		if file == "" {
			file = filepath.Join(q.Dir, q.Entry)
		}
		if gone, err := evict(file); err != nil || !gone {
			return 0, err
		}
	}
	start := time.Now()
	s, err := openAs(ctx, q)
	if err != nil {
		return 0, err
	}
	defer s.Close()
	if _, err := timed(ctx, s, b.inputs); err != nil {
		return 0, err
	}
	return time.Since(start), nil
}

// evict asks the kernel to forget what it has of a file in memory, and says
// whether it did: not of one that another process has mapped.
func evict(file string) (bool, error) {
	f, err := os.Open(file)
	if err != nil {
		return false, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil || info.Size() == 0 {
		return false, err
	}
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
		return false, err
	}
	mapped, err := unix.Mmap(int(f.Fd()), 0, int(info.Size()), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return false, err
	}
	defer unix.Munmap(mapped)
	page := os.Getpagesize()
	in := make([]byte, (len(mapped)+page-1)/page)
	if _, _, errno := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(&mapped[0])), uintptr(len(mapped)), uintptr(unsafe.Pointer(&in[0]))); errno != 0 {
		return false, errno
	}
	left := 0
	for _, x := range in {
		left += int(x & 1)
	}
	return left <= len(in)/20, nil
}

// prepare opens a session, runs it and says what that takes.
func (b *bench) prepare(ctx context.Context, q *measureQuestion) (r profile.Ready, err error) {
	if q.Setting.Instances < 1 || q.Setting.Instances > profile.MaxInstances {
		return r, fmt.Errorf("%w: %d instances", errMalformed, q.Setting.Instances)
	}
	if err := b.use(ctx, q); err != nil {
		return r, err
	}
	before := ownBytes()
	for range 2 { // the first one allocates
		times, _, err := b.together(q.Setting.Instances, 1)
		if err != nil {
			return r, err
		}
		r.Run = slices.Max(times)
	}
	after, err := statusBytes("RssAnon:")
	if err != nil {
		return r, err
	}
	r.Session, r.Workspace = b.bytes, max(after-before, 1)
	return r, nil
}

// slice runs what is open on all instances at a time.
func (b *bench) slice(q *measureQuestion) (x profile.Slice, err error) {
	if b.open == nil || shape(b.set) != shape(q.Setting) || b.rows != max(q.Setting.Batch, 1) {
		return x, errors.New("the setting has not been prepared")
	}
	if n := q.Setting.Instances; n < 1 || n > profile.MaxInstances || q.Runs < 1 || q.Runs > maxTimes/n {
		return x, fmt.Errorf("%w: %d runs on %d instances", errMalformed, q.Runs, n)
	}
	if time.Since(b.last) > staleAfter {
		if _, _, err := b.together(q.Setting.Instances, 1); err != nil {
			return x, err
		}
	}
	cpu := cpuTime()
	if x.Times, x.Wall, err = b.together(q.Setting.Instances, q.Runs); err != nil {
		return x, err
	}
	x.CPU = cpuTime() - cpu
	return x, nil
}

// together has each of n instances run so often, and gives the times of the
// runs, and that from the begin of the first to the end of the last.
func (b *bench) together(n, runs int) ([]time.Duration, time.Duration, error) {
	all := make([]time.Duration, n*runs)
	errs := make([]error, n)
	one := func(i int) {
		for r := range runs {
			took, err := timed(context.Background(), b.open, b.inputs)
			if err != nil {
				errs[i] = err
				return
			}
			all[i*runs+r] = max(took, 1)
		}
	}
	var wg sync.WaitGroup
	start := time.Now()
	for i := range n - 1 {
		wg.Go(func() { one(i + 1) })
	}
	one(0)
	wg.Wait()
	wall := time.Since(start)
	b.last = time.Now()
	return all, wall, errors.Join(errs...)
}

// cpuTime gives the processor time that this process has taken.
func cpuTime() time.Duration {
	var u unix.Rusage
	if unix.Getrusage(unix.RUSAGE_SELF, &u) != nil {
		return 0
	}
	return time.Duration(min(u.Utime.Nano()+u.Stime.Nano(), math.MaxInt64))
}
