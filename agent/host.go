package agent

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/dunlin/dunlin/agent/access"
	"github.com/dunlin/dunlin/agent/compiled"
	"github.com/dunlin/dunlin/agent/engine"
	"github.com/dunlin/dunlin/agent/oip"
	"github.com/dunlin/dunlin/agent/oip/rpc"
	"github.com/dunlin/dunlin/agent/ort"
	"github.com/dunlin/dunlin/agent/profile"
	"github.com/dunlin/dunlin/agent/serve"
	"github.com/dunlin/dunlin/agent/worker"
	profiles "github.com/dunlin/dunlin/firmware-profiles"
	"github.com/dunlin/dunlin/internal/program"
	"github.com/dunlin/dunlin/models"
)

const (
	// runtimeWait is the wait before the runtime is looked at again that did
	// not start.
	runtimeWait = time.Second
	// drainTime is how long requests may take to end when the agent stops, and
	// refusalTime how long it may take to refuse those that have not ended.
	drainTime   = 5 * time.Second
	refusalTime = time.Second
	// lullTime is how long callers are told with their answers to connect anew
	// before the agent changes its program: there they wait for it.
	lullTime = 250 * time.Millisecond
	// holdTime is how long they wait at most until it serves what was served.
	holdTime = 20 * time.Second
	// maxConnections is how many clients may be connected to the listeners,
	// where the process may have as many files; a further one waits until
	// another leaves.
	maxConnections = 16 << 10
	// unreadTime is how long the server waits for a body that nothing reads,
	// which it does before it answers.
	unreadTime = 10 * time.Second
	// progressLimit is how long the scheduler may take to say that it makes
	// progress.
	progressLimit = time.Second
)

// source is where the models of a host come from.
type source interface {
	oip.Repository
	// Ready says what of that which should be served is not there.
	Ready() error
}

// runner is what a host runs models with: a worker process, or what stands for
// one.
type runner interface {
	engine.Runtime
	// Supervise keeps it running until ctx is done, and gives nil then.
	Supervise(ctx context.Context) error
	// Runtime waits until models can be loaded, and says by what.
	Runtime(ctx context.Context) (worker.Runtime, error)
	// PID is the process that holds the models; 0 where there is none.
	PID() int
}

// host runs models and answers requests for them.
type host struct {
	serving Serving
	worker  runner
	engine  *engine.Engine
	front   *serve.Server
	source  source
	oip     *oip.Server
	opened  func(worker.Runtime)  // told of the runtime; nil: nobody is
	hold    func(context.Context) // waits until callers can be answered that have waited; nil: there are none
	leaving atomic.Bool           // another program answers soon
	tried   chan struct{}         // closed when the runtime has started, or failed to once
	loads   atomic.Bool           // models can be loaded
	profile profiles.Profile      // of the device's class
	budget  int64                 // bytes that models may take of the host's memory
	pools   string                // see worker.Config.Pools
	// compile gives a version as it was compiled for this device.
	compile   compileFunc
	compiling atomic.Int32 // versions that are compiled or checked
	cache     *compiled.Cache
	// profiler measures what is loaded; nil where nobody does.
	profiler *profiler
	watched  atomic.Pointer[watch] // nil: nobody samples the device
	// retired is told of the figures of versions that are not loaded any more;
	// nil: nobody is.
	retired func(engine.VersionID, engine.Figures)
}

// ports are where a host answers.
type ports struct {
	http, grpc *listener     // grpc may be nil
	tls        *tls.Config   // nil: neither speaks TLS
	access     *access.Guard // nil: everybody may ask
	had        bool          // the program before this one listened, and callers wait
}

// listen opens the ports that the settings ask for.
func listen(s *Serving) (_ *ports, err error) {
	l := &ports{}
	if l.access, err = s.guard(); err != nil {
		return nil, err
	}
	if l.tls, err = s.loadTLS(l.access); err != nil {
		return nil, err
	}
	room := make(chan struct{}, connectionLimit())
	kept := inherited()
	defer func() {
		for _, k := range kept {
			k.file.Close()
		}
	}()
	open := func(flag, address string) (*listener, error) {
		opened, had, err := listenOn(address, kept)
		if err != nil {
			return nil, fmt.Errorf("%w; --%s chooses another address", err, flag)
		}
		l.had = l.had || had
		return newListener(opened, address, room), nil
	}
	if l.http, err = open("listen", s.Listen); err != nil {
		return nil, err
	}
	if s.GRPCListen == "" {
		return l, nil
	}
	if l.grpc, err = open("grpc-listen", s.GRPCListen); err != nil {
		return nil, errors.Join(err, l.http.Close())
	}
	return l, nil
}

// connectionLimit is how many connections all listeners together may have. It
// leaves a quarter of the files that the process may open to everything that
// is not a connection.
func connectionLimit() int {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return maxConnections
	}
	return int(min(maxConnections, max(limit.Cur/4*3, 1)))
}

// keep has the ports accept no more connections, and gives the sockets in which
// those wait that come.
func (l *ports) keep(log *slog.Logger) (all []socket) {
	for _, one := range []*listener{l.http, l.grpc} {
		if one == nil {
			continue
		}
		s, err := keep(one.address, one.Listener)
		if err != nil { // callers are refused meanwhile
			log.Warn("a port is closed while the agent changes its program", "error", err)
			continue
		}
		one.pause()
		all = append(all, s)
	}
	return all
}

func (l *ports) close() {
	l.http.Close()
	if l.grpc != nil {
		l.grpc.Close()
	}
}

// url is where REST is answered.
func (l *ports) url() string {
	if l.tls != nil {
		return "https://" + l.http.Addr().String()
	}
	return "http://" + l.http.Addr().String()
}

// newHost puts the parts together; compiled models and what was measured of
// them are kept in folders of the folder data. The caller sets source, and opened and retired, before run.
func newHost(s Serving, profile profiles.Profile, data string, cfg worker.Config) (*host, error) {
	h := &host{serving: s, profile: profile, tried: make(chan struct{})}
	var err error
	if h.budget, err = s.memoryBudget(profile); err != nil {
		return nil, err
	}
	if onGPU(&profile) {
		cfg.Pools, cfg.WarmBytes, cfg.PinnedBytes = "cuda:0", h.budget, pinnedBytes(profile.Memory, h.budget)
		cfg.ProviderOptions = profile.Providers[0].Options
	}
	if err := processors(&cfg, &profile); err != nil {
		return nil, err
	}
	h.pools = cfg.Pools
	if s.sim != nil {
		simulated := newSimulated(s.sim, profile, cfg)
		h.compile, h.worker = permitted(profile.Limits, simulated.compile), simulated
	} else {
		if h.cache, err = compiled.Open(filepath.Join(data, cacheFolder), int64(s.CacheMiB)<<20); err != nil {
			return nil, err
		}
		cfg.CheckMemory = s.compileMemory
		cfg.Folders = append(cfg.Folders, filepath.Join(data, cacheFolder))
		h.compile = h.counted(permitted(profile.Limits, worker.Cached(h.cache, cfg)))
		cfg.Compile = h.compile
		if h.profiler, err = newProfiler(h, profile, data); err != nil {
			return nil, err
		} else if h.profiler != nil {
			cfg.Compile = h.profiler.noted(h.compile)
		}
		h.worker = worker.New(cfg)
	}
	h.engine = engine.New(engine.Config{Runtime: h.worker, Memory: h.budget, Oversize: s.Oversize == "map", Log: s.Log, Retired: func(id engine.VersionID, f engine.Figures) {
		if h.retired != nil {
			h.retired(id, f)
		}
	}, Data: h.watchData})
	h.front = serve.New(h.engine, h.heat)
	return h, nil
}

func (s *Serving) workerConfig(threads int) worker.Config {
	if s.Threads > 0 {
		threads = s.Threads
	}
	return worker.Config{Command: s.Worker, RuntimeLib: s.RuntimeLib, Threads: threads, Log: s.Log}
}

// heat gives the temperature of the hottest sensor in the newest sample.
func (h *host) heat() (celsius float64, known bool) {
	w := h.watched.Load()
	if w == nil {
		return 0, false
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.celsius, w.heated
}

// check compiles a version in a process of its own, on one thread: its load
// then finds it compiled. One that cannot be is loaded there. Then it is asked
// what the bundle's reference asks, and must not be out of all proportion to
// the version that it is to follow.
func (h *host) check(ctx context.Context, spec engine.Spec) (engine.Info, error) {
	found, err := h.worker.Runtime(ctx)
	if err != nil {
		return engine.Info{}, err
	}
	if err := h.fits(found, spec); err != nil {
		return engine.Info{}, err
	}
	image, err := h.compile(ctx, found, spec)
	if err == nil {
		defer image.Release()
		if err := h.verify(ctx, spec, image.File); err != nil {
			return engine.Info{}, err
		}
		return image.Info, slower(spec.ID, image.Info.Run, h.engine.Versions())
	}
	if !errors.Is(err, ort.ErrNotCompilable) {
		return engine.Info{}, err
	}
	h.compiling.Add(1)
	defer h.compiling.Add(-1)
	info, err := worker.Check(ctx, h.checkConfig(), spec)
	if err == nil {
		err = h.verify(ctx, spec, "")
	}
	return info, err
}

// checkConfig is that of children that look at a version.
func (h *host) checkConfig() worker.Config {
	cfg := h.serving.workerConfig(1)
	cfg.Threads = 1 // whatever the settings say: others are being served
	return cfg
}

// verify compares the answers of a version, as compiled in a file or as it is,
// with the reference that its bundle brings along; one that has none passes.
// It runs on the CPU, in a process of its own.
func (h *host) verify(ctx context.Context, spec engine.Spec, file string) error {
	if _, err := os.Stat(filepath.Join(spec.Dir, models.ReferenceFile)); err != nil || h.serving.sim != nil {
		return nil // a simulated device computes nothing
	}
	cfg := h.checkConfig()
	cfg.Eager, cfg.CheckMemory = true, h.serving.compileMemory
	return worker.Measure(ctx, cfg, spec, file, func(ctx context.Context, m *worker.Measuring) error {
		found, err := m.Check(ctx, profile.CPU)
		if err == nil && !found.Accepted {
			err = fmt.Errorf("its answer to the reference input is wrong: %s", found.Reason)
		}
		return err
	})
}

// A version is refused whose run, on one thread, takes longer than absurdRun and
// than absurdFactor times the mean run of the version of its model that has run
// longest. That is far beyond what a larger model of the same kind takes, and
// what threads make up for: such a version would keep all others waiting.
const (
	absurdRun     = time.Second
	absurdFactor  = 20
	comparedAfter = 10 // runs
)

// slower says why a version whose run takes so long is not to follow the loaded
// ones; a time of 0 is not known.
func slower(id engine.VersionID, run time.Duration, loaded []engine.Status) error {
	var most engine.Status
	for _, v := range loaded {
		if v.ID.Model == id.Model && v.ID.Version != id.Version && v.Figures.Run.Count >= comparedAfter && v.Figures.Run.Count > most.Figures.Run.Count {
			most = v
		}
	}
	if most.Figures.Run.Count == 0 || run <= absurdRun {
		return nil
	}
	mean := most.Figures.Run.Time / time.Duration(most.Figures.Run.Count)
	if run <= absurdFactor*mean {
		return nil
	}
	return fmt.Errorf("a run of one row takes %v, one of %s takes %v: allowed are %v and %d times that", run.Round(time.Millisecond), most.ID, mean.Round(time.Microsecond), absurdRun, absurdFactor)
}

// counted counts what is compiled.
func (h *host) counted(compile compileFunc) compileFunc {
	return func(ctx context.Context, found worker.Runtime, spec engine.Spec) (worker.Image, error) {
		h.compiling.Add(1)
		defer h.compiling.Add(-1)
		return compile(ctx, found, spec)
	}
}

// part is one of the things that run beside the answering of requests.
type part struct {
	name string
	run  func(context.Context) error
}

// run answers requests until ctx is done, and gives nil then, or until a part
// fails. It stops in reverse order: requests first, then parts, which change
// what is served, then what runs models.
func (h *host) run(ctx context.Context, l *ports, metrics http.Handler, parts ...part) error {
	ctx, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	below, stopBelow := context.WithCancel(context.WithoutCancel(ctx))
	var above, under sync.WaitGroup
	defer under.Wait()
	defer stopBelow()
	defer above.Wait()
	start := func(wg *sync.WaitGroup, ctx context.Context, p part) {
		wg.Go(func() {
			if err := p.run(ctx); err != nil && ctx.Err() == nil {
				fail(fmt.Errorf("%s: %w", p.name, err))
			}
		})
	}
	start(&under, below, part{"worker", h.worker.Supervise})
	start(&under, below, part{"engine", h.engine.Run})
	start(&under, below, part{"memory", h.followMemory})
	start(&above, ctx, part{"runtime", h.awaitRuntime})
	start(&above, ctx, part{"shadows", h.front.Shadow})
	if h.profiler != nil {
		parts = append(parts, part{"profiles", h.profiler.run})
	}
	for _, p := range parts {
		start(&above, ctx, p)
	}

	h.oip = oip.New(oip.Config{
		Backend: backend{h.front, h}, Repository: h.source, Access: l.access, Version: program.Version(), SharedMemory: h.serving.SharedMemory,
		TraceFile: h.serving.TraceFile, LogLevel: h.serving.level, Log: h.serving.Log,
	})
	if h.hold != nil {
		h.hold(ctx)
	}
	served := make(chan error, 2)
	stops := []func(context.Context){h.serveHTTP(l, metrics, served)}
	logged := []any{"url", l.url()}
	if l.grpc != nil {
		stops = append(stops, h.serveGRPC(l, served))
		logged = append(logged, "grpc", l.grpc.Addr().String())
	}
	h.serving.Log.Info("agent started", append(logged, "agent_version", program.Version())...)
	select {
	case <-ctx.Done():
	case err := <-served:
		fail(fmt.Errorf("serve: %w", err))
	}
	if r, ok := errors.AsType[*restart](context.Cause(ctx)); ok {
		r.kept = l.keep(h.serving.Log)
		h.leaving.Store(true)
		sleep(below, lullTime)
	}
	l.http.closeSilent()
	if l.grpc != nil {
		l.grpc.closeSilent()
	}
	drain, cancel := context.WithTimeout(below, drainTime)
	defer cancel()
	var stopping sync.WaitGroup
	for _, stop := range stops {
		stopping.Go(func() { stop(drain) })
	}
	stopping.Wait()
	h.serving.Log.Info("agent stops")
	if err := context.Cause(ctx); !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

var errStops = oip.Errorf(oip.Unavailable, "the agent stops")

// serveHTTP answers REST and gives what stops it, which waits for the
// requests at work until its context is done, and refuses them then. An early
// end goes to ended.
func (h *host) serveHTTP(l *ports, metrics http.Handler, ended chan<- error) (stop func(context.Context)) {
	base, refuse := context.WithCancelCause(context.Background())
	server := &http.Server{
		BaseContext: func(net.Listener) context.Context { return base },
		Handler:     hurried(h.parting(l.access.Handler(h.handler(metrics))), unreadTime), ReadHeaderTimeout: 10 * time.Second, IdleTimeout: 2 * time.Minute, MaxHeaderBytes: 64 << 10,
		TLSConfig: l.tls.Clone(), ErrorLog: slog.NewLogLogger(h.serving.Log.Handler(), slog.LevelDebug),
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		var err error
		if l.tls != nil {
			err = server.ServeTLS(l.http, "", "")
		} else {
			err = server.Serve(l.http)
		}
		if !errors.Is(err, http.ErrServerClosed) {
			ended <- err
		}
	}()
	return func(ctx context.Context) {
		err := server.Shutdown(ctx)
		refuse(errStops)
		if err != nil {
			last, cancel := context.WithTimeout(context.Background(), refusalTime)
			defer cancel()
			err = server.Shutdown(last)
		}
		if err != nil {
			server.Close()
		}
		<-done
	}
}

// serveGRPC is serveHTTP for gRPC.
func (h *host) serveGRPC(l *ports, ended chan<- error) (stop func(context.Context)) {
	var options []grpc.ServerOption
	if l.tls != nil {
		options = append(options, grpc.Creds(credentials.NewTLS(l.tls)))
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := rpc.New(h.oip, rpc.Config{Options: options, Gate: l.access}).Run(ctx, l.grpc); err != nil {
			ended <- err
		}
	}()
	return func(context.Context) { // it has a bound of its own
		cancel()
		<-done
	}
}

// awaitRuntime waits until models can be loaded.
func (h *host) awaitRuntime(ctx context.Context) error {
	tried := sync.OnceFunc(func() { close(h.tried) })
	defer tried()
	for try := 1; ; try++ {
		found, err := h.worker.Runtime(ctx)
		if err == nil {
			if h.opened != nil {
				h.opened(found)
			}
			if found.Pooling.Works {
				if err := h.engine.SetMemory(ctx, h.serving.deviceBudget(h.profile.Memory, found.PoolBytes)); err != nil {
					return nil // ctx is done
				}
			}
			h.loads.Store(true)
			return nil
		}
		if ctx.Err() != nil {
			return nil
		}
		if try == 1 {
			h.serving.Log.Error("no model can be loaded; see dunlin-agent doctor", "error", err)
		}
		tried()
		if !sleep(ctx, runtimeWait) {
			return nil
		}
	}
}

// backend answers inference.
type backend struct {
	*serve.Server
	host *host
}

// Ready says why not all that the device should serve can be answered: also
// where a scheduler that makes no progress is the reason.
func (b backend) Ready(ctx context.Context) error {
	if !b.host.loads.Load() {
		return errors.New("ONNX Runtime has not started")
	}
	if err := b.host.source.Ready(); err != nil {
		return err
	}
	if err := b.Server.Ready(ctx); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, progressLimit, fmt.Errorf("the scheduler has not answered for %v", progressLimit))
	defer cancel()
	return b.host.engine.Health(ctx)
}

// sleep waits, and says whether ctx lasted that long.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
