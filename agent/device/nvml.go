package device

import (
	"cmp"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/NVIDIA/go-nvml/pkg/nvml"

	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

const (
	// beginLimit is how long Open waits for NVML to start, which takes a second
	// or two for each GPU whose driver sleeps; callLimit how long a sample does.
	beginLimit = 10 * time.Second
	callLimit  = 3 * time.Second
	// eventWait is how long one wait for XID events takes, and so how long the
	// end of a session may.
	eventWait = time.Second
	// eventPause is the least time between two events that are taken in.
	eventPause = 10 * time.Millisecond
	// firstAgain and lastAgain bound the wait before NVML is begun anew after
	// it failed; it doubles with each time.
	firstAgain = time.Second
	lastAgain  = time.Minute
	// maxGPUs, maxParts and maxProcesses bound what is looked at; of more
	// processes those count that have most.
	maxGPUs      = 64
	maxParts     = 64
	maxProcesses = 32
)

// client talks to NVML through one session at a time. A session whose call
// hangs is left alone until that call returns, so that at most one is lost.
// Device.mu guards it.
type client struct {
	lib  nvml.Interface
	log  *slog.Logger
	xids xids

	absent  bool      // there is no library: nothing is ever asked
	session *session  // nil: none
	until   time.Time // how long the session is waited for
	late    bool      // it was waited for in vain: it is looked at, and not waited for again
	broken  bool      // it is to be ended, and another begun
	useless bool      // and not asked before
	fault   string    // why a session did not begin
	failed  bool      // the last sample had a fault
	again   time.Time
	wait    time.Duration

	driver, cuda string
	known        []*dunlinv1.GpuInfo // every GPU that was ever seen
}

func newClient(lib nvml.Interface, log *slog.Logger) *client {
	return &client{lib: lib, log: log, xids: xids{seen: map[string]xid{}}}
}

// open begins the first session.
func (c *client) open() {
	c.until = time.Now().Add(beginLimit)
	if !c.begin() && c.session == nil && c.fault == message(nvml.ERROR_LIBRARY_NOT_FOUND) {
		c.absent = true
	}
}

// begin begins a session, and says whether it has begun in time.
func (c *client) begin() bool {
	c.session = newSession(c.lib, &c.xids, c.known)
	c.late, c.broken, c.useless, c.fault = false, false, false, ""
	go c.session.run() // end waits for it
	return c.begun()
}

// begun waits until the session has begun.
func (c *client) begun() bool {
	if !c.await(c.session.ready) {
		return false
	}
	s := c.session
	if s.failure != "" {
		c.session, c.fault = nil, s.failure
		c.later()
		return false
	}
	c.driver, c.cuda = cmp.Or(s.driver, c.driver), cmp.Or(s.cuda, c.cuda)
	for _, g := range s.gpus {
		if i := slices.IndexFunc(c.known, func(k *dunlinv1.GpuInfo) bool { return same(k, g.info) }); i < 0 {
			c.known = append(c.known, g.info)
		} else {
			c.known[i] = g.info
		}
	}
	return true
}

// await waits for a channel to be closed, but not at all where that was in
// vain before.
func (c *client) await(done <-chan struct{}) bool {
	select {
	case <-done:
		c.late = false
		return true
	default:
	}
	if c.late {
		return false
	}
	timer := time.NewTimer(time.Until(c.until))
	defer timer.Stop()
	select {
	case <-done:
		return true
	case <-timer.C:
		c.late = true
		return false
	}
}

// end ends the session, and says whether it has ended within callLimit.
func (c *client) end() bool {
	c.until = time.Now().Add(callLimit)
	return c.ended()
}

func (c *client) ended() bool {
	if c.session == nil {
		return true
	}
	c.broken, c.useless = true, true
	c.session.end()
	if !c.await(c.session.done) {
		return false
	}
	c.session = nil
	return true
}

// later puts off the next session.
func (c *client) later() {
	c.wait = min(max(2*c.wait, firstAgain), lastAgain)
	c.again = time.Now().Add(c.wait)
}

// sample gives the figures of the GPUs that answer, and why others do not.
func (c *client) sample() (gpus []*dunlinv1.GpuTelemetry, faults []string) {
	if c.absent {
		return nil, nil
	}
	gpus, faults = c.ask()
	for i, f := range faults {
		faults[i] = "nvml: " + f
	}
	switch {
	case len(faults) > 0 && !c.failed:
		c.log.Info("GPUs do not answer", "error", strings.Join(faults, "; "), "found", len(gpus))
	case len(faults) == 0 && c.failed:
		c.log.Info("GPUs answer again", "found", len(gpus))
	}
	c.failed = len(faults) > 0
	return gpus, faults
}

func (c *client) ask() ([]*dunlinv1.GpuTelemetry, []string) {
	const hangs = "a call does not return"
	now := time.Now()
	c.until = now.Add(callLimit)
	if c.session != nil && c.broken && !now.Before(c.again) && !c.ended() {
		return nil, []string{hangs}
	}
	if c.session == nil && now.Before(c.again) {
		return nil, []string{c.fault}
	}
	if c.session == nil {
		c.begin()
	}
	switch {
	case c.session == nil:
		return nil, []string{c.fault}
	case c.useless:
		return nil, []string{c.fault}
	case !c.begun():
		if c.session == nil {
			return nil, []string{c.fault}
		}
		return nil, []string{hangs}
	}
	s := c.session
	// The session's goroutine owns the reading until it closes done.
	var r reading
	done := make(chan struct{})
	select {
	case s.work <- func() { defer close(done); r = s.read() }:
	case <-s.done: // which only its end does
		done = nil
	}
	if !c.await(done) {
		c.fault = hangs
		c.broken, c.useless = true, true
		s.end()
		c.later()
		return nil, []string{hangs}
	}
	if r.broken {
		c.broken, c.useless = true, r.useless
		c.fault = strings.Join(r.faults, "; ")
		c.later()
	} else {
		c.wait = 0
	}
	return r.gpus, r.faults
}

// inventory describes every GPU that was ever seen.
func (c *client) inventory() (driver, cuda string, gpus []*dunlinv1.GpuInfo) {
	for _, g := range c.known {
		gpus = append(gpus, cloneInfo(g))
	}
	return c.driver, c.cuda, gpus
}

// integrated gives the GPU that shares the CPU's memory; nil where there is none.
func (c *client) integrated() *dunlinv1.GpuInfo {
	if i := slices.IndexFunc(c.known, (*dunlinv1.GpuInfo).GetUnifiedMemory); i >= 0 {
		return c.known[i]
	}
	return nil
}

// same says whether both describe one GPU: one whose UUID is not known is the
// one of its index.
func same(a, b *dunlinv1.GpuInfo) bool {
	return a.Uuid == b.Uuid && (a.Uuid != "" || a.Index == b.Index)
}

// session is the time between NVML's init and its shutdown. All calls but the
// wait for events are made by the goroutine of run, one after the other.
type session struct {
	lib   nvml.Interface
	known []*dunlinv1.GpuInfo
	xids  *xids
	work  chan func()
	over  chan struct{} // closed to end it
	once  sync.Once     // of over
	ready chan struct{} // closed when it has begun, or failed to
	done  chan struct{} // closed when it has ended, if it ever does

	// What follows is set when ready is closed.
	failure      string
	gpus         []*gpu
	missing      []string // of GPUs that were known
	driver, cuda string
	listens      bool         // for XID events
	deaf         atomic.Int32 // the return value that ended that; 0 while it goes on
	symbols      map[string]bool
}

func newSession(lib nvml.Interface, x *xids, known []*dunlinv1.GpuInfo) *session {
	return &session{
		lib: lib, known: slices.Clone(known), xids: x, work: make(chan func(), 1), over: make(chan struct{}), ready: make(chan struct{}), done: make(chan struct{}), symbols: map[string]bool{},
	}
}

func (s *session) end() { s.once.Do(func() { close(s.over) }) }

func (s *session) run() {
	defer close(s.done)
	begun := sync.OnceFunc(func() { close(s.ready) })
	defer begun()
	if ret := s.lib.Init(); ret != nvml.SUCCESS {
		s.failure = message(ret)
		return
	}
	defer s.lib.Shutdown() // what it says is of no use to anybody
	select {
	case <-s.over: // it has taken too long
		return
	default:
	}
	if s.failure = s.look(); s.failure != "" {
		return
	}
	var waiter sync.WaitGroup
	defer waiter.Wait() // before the shutdown
	defer s.end()       // which ends the waiter too
	if set, ok := s.events(); ok {
		s.listens = true
		waiter.Go(func() { s.listen(set) })
	}
	begun()
	for {
		select {
		case <-s.over:
			return
		case f := <-s.work:
			f()
		}
	}
}

// has says whether the library has a function. A call of one that it has not
// would end the process.
func (s *session) has(symbol string) bool {
	known, ok := s.symbols[symbol]
	if !ok {
		known = s.lib.Extensions().LookupSymbol(symbol) == nil
		s.symbols[symbol] = known
	}
	return known
}

// look finds the GPUs, and says why there are none where that is a failure.
func (s *session) look() string {
	a := asker{s: s}
	s.driver, _ = ask(&a, "nvmlSystemGetDriverVersion", s.lib.SystemGetDriverVersion)
	if v, ok := ask(&a, "nvmlSystemGetCudaDriverVersion", s.lib.SystemGetCudaDriverVersion); ok && v > 0 {
		s.cuda = fmt.Sprintf("%d.%d", v/1000, v%1000/10)
	}
	count, ok := ask(&a, "nvmlDeviceGetCount", s.lib.DeviceGetCount)
	if !ok {
		return message(a.last)
	}
	for i := range min(count, maxGPUs) {
		a := asker{s: s}
		h, ok := ask(&a, "nvmlDeviceGetHandleByIndex", func() (nvml.Device, nvml.Return) { return s.lib.DeviceGetHandleByIndex(i) })
		if ok {
			ok = s.add(&a, h, uint32(i))
		}
		if !ok {
			s.missing = append(s.missing, fmt.Sprintf("GPU %d: %s", i, message(a.last)))
		}
	}
	for _, k := range s.known {
		if k.Uuid == "" || slices.ContainsFunc(s.gpus, func(g *gpu) bool { return same(k, g.info) }) {
			continue
		}
		a := asker{s: s}
		h, ok := ask(&a, "nvmlDeviceGetHandleByUUID", func() (nvml.Device, nvml.Return) { return s.lib.DeviceGetHandleByUUID(k.Uuid) })
		if ok {
			ok = s.add(&a, h, k.Index)
		}
		if !ok {
			s.missing = append(s.missing, fmt.Sprintf("GPU %s: %s", k.Uuid, message(a.last)))
		}
	}
	return ""
}

// add takes in a GPU, unless it does not say which one it is. One that was
// known keeps its index, and what it does not say of itself now.
func (s *session) add(a *asker, h nvml.Device, index uint32) bool {
	uuid, ok := ask(a, "nvmlDeviceGetUUID", h.GetUUID)
	if !ok && a.last != nvml.ERROR_NOT_SUPPORTED && a.last != nvml.ERROR_FUNCTION_NOT_FOUND {
		return false
	}
	g := &gpu{handle: h, info: s.describe(h, index, uuid)}
	if i := slices.IndexFunc(s.known, func(k *dunlinv1.GpuInfo) bool { return same(k, g.info) }); i >= 0 {
		k := s.known[i]
		g.info.Index, g.info.Name = k.Index, cmp.Or(g.info.Name, k.Name)
		g.info.ComputeCapability, g.info.PciBusId = cmp.Or(g.info.ComputeCapability, k.ComputeCapability), cmp.Or(g.info.PciBusId, k.PciBusId)
		g.info.MemoryBytes = cmp.Or(g.info.MemoryBytes, k.MemoryBytes)
	}
	s.gpus = append(s.gpus, g)
	return true
}

// reading is what came of asking all GPUs.
type reading struct {
	gpus    []*dunlinv1.GpuTelemetry
	faults  []string
	broken  bool // the session should be begun anew
	useless bool // it does not answer any more
}

func (s *session) read() (r reading) {
	r.faults = slices.Clone(s.missing)
	r.broken = len(r.faults) > 0
	for _, g := range s.gpus {
		t, ret := s.sample(g)
		if ret == nvml.SUCCESS {
			r.gpus = append(r.gpus, t)
			continue
		}
		r.broken = true
		if ends(ret) {
			return reading{faults: []string{message(ret)}, broken: true, useless: true}
		}
		r.faults = append(r.faults, fmt.Sprintf("GPU %d: %s", g.info.Index, message(ret)))
	}
	if ret := nvml.Return(s.deaf.Load()); ret != nvml.SUCCESS {
		r.broken = true
		r.faults = append(r.faults, "events: "+message(ret))
	}
	return r
}

// ends says whether an error is of NVML as a whole; loses, whether it is of one
// GPU as a whole.
func ends(ret nvml.Return) bool {
	return ret == nvml.ERROR_UNINITIALIZED || ret == nvml.ERROR_DRIVER_NOT_LOADED || ret == nvml.ERROR_LIB_RM_VERSION_MISMATCH || ret == nvml.ERROR_LIBRARY_NOT_FOUND
}

func loses(ret nvml.Return) bool {
	return ends(ret) || ret == nvml.ERROR_GPU_IS_LOST || ret == nvml.ERROR_RESET_REQUIRED || ret == nvml.ERROR_GPU_NOT_FOUND
}

// asker asks one GPU, or NVML, for one figure after the other, until an error
// says that no more will come.
type asker struct {
	s        *session
	answered bool
	last     nvml.Return // the last error
	lost     nvml.Return // the error after which nothing is asked
}

// ask gives a figure by the library's function of that name; false where there
// is none.
func ask[T any](a *asker, symbol string, call func() (T, nvml.Return)) (v T, ok bool) {
	if a.lost != nvml.SUCCESS {
		return v, false
	}
	if !a.s.has(symbol) {
		a.last = nvml.ERROR_FUNCTION_NOT_FOUND
		return v, false
	}
	v, ret := call()
	if ret == nvml.SUCCESS {
		a.answered = true
		return v, true
	}
	a.last = ret
	if loses(ret) {
		a.lost = ret
	}
	var none T
	return none, false
}

// xids counts XID errors by the UUID of their GPU, over all sessions.
type xids struct {
	mu   sync.Mutex // guards seen
	seen map[string]xid
}

type xid struct{ count, last uint64 }

func (x *xids) add(uuid string, code uint64) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.seen[uuid] = xid{count: x.seen[uuid].count + 1, last: code}
}

func (x *xids) of(uuid string) xid {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.seen[uuid]
}

// events registers for the XID errors of all GPUs that tell of them.
func (s *session) events() (nvml.EventSet, bool) {
	for _, symbol := range []string{"nvmlDeviceRegisterEvents", "nvmlEventSetWait", "nvmlEventSetFree"} {
		if !s.has(symbol) {
			return nil, false
		}
	}
	a := asker{s: s}
	set, ok := ask(&a, "nvmlEventSetCreate", s.lib.EventSetCreate)
	if !ok {
		return nil, false
	}
	registered := false
	for _, g := range s.gpus {
		types, ok := ask(&a, "nvmlDeviceGetSupportedEventTypes", g.handle.GetSupportedEventTypes)
		if ok && types&nvml.EventTypeXidCriticalError != 0 && g.info.Uuid != "" {
			g.listens = g.handle.RegisterEvents(nvml.EventTypeXidCriticalError, set) == nvml.SUCCESS
			registered = registered || g.listens
		}
	}
	if !registered {
		_ = set.Free()
		return nil, false
	}
	return set, true
}

// listen counts XID errors until the session is over. It does not trust the
// library to wait.
func (s *session) listen(set nvml.EventSet) {
	defer set.Free()
	for {
		start, pause := time.Now(), eventPause
		switch e, ret := set.Wait(uint32(eventWait.Milliseconds())); {
		case ret == nvml.ERROR_TIMEOUT:
			pause = max(eventWait-time.Since(start), eventPause)
		case ret != nvml.SUCCESS:
			s.deaf.Store(int32(ret))
			return
		case e.EventType == nvml.EventTypeXidCriticalError && e.Device != nil:
			if uuid, ret := e.Device.GetUUID(); ret == nvml.SUCCESS {
				s.xids.add(uuid, e.EventData)
			}
		}
		select {
		case <-s.over:
			return
		case <-time.After(pause):
		}
	}
}

// message says in words what NVML returned. The library's own words would be
// asked of it by a call, and its binding keeps them in a variable that is not
// guarded.
func message(ret nvml.Return) string {
	if s, ok := messages[ret]; ok {
		return s
	}
	return fmt.Sprintf("error %d", int(ret))
}

var messages = map[nvml.Return]string{
	nvml.ERROR_UNINITIALIZED:             "NVML is not initialized any more",
	nvml.ERROR_INVALID_ARGUMENT:          "invalid argument",
	nvml.ERROR_NOT_SUPPORTED:             "not supported",
	nvml.ERROR_NO_PERMISSION:             "no permission",
	nvml.ERROR_ALREADY_INITIALIZED:       "already initialized",
	nvml.ERROR_NOT_FOUND:                 "not found",
	nvml.ERROR_INSUFFICIENT_SIZE:         "insufficient size",
	nvml.ERROR_INSUFFICIENT_POWER:        "power cables are not attached",
	nvml.ERROR_DRIVER_NOT_LOADED:         "driver is not loaded",
	nvml.ERROR_TIMEOUT:                   "time-out",
	nvml.ERROR_IRQ_ISSUE:                 "the kernel has an interrupt issue with the GPU",
	nvml.ERROR_LIBRARY_NOT_FOUND:         "no NVML library",
	nvml.ERROR_FUNCTION_NOT_FOUND:        "the library lacks the function",
	nvml.ERROR_CORRUPTED_INFOROM:         "infoROM is corrupted",
	nvml.ERROR_GPU_IS_LOST:               "GPU is lost",
	nvml.ERROR_RESET_REQUIRED:            "GPU needs a reset",
	nvml.ERROR_OPERATING_SYSTEM:          "the operating system or a container has blocked the GPU",
	nvml.ERROR_LIB_RM_VERSION_MISMATCH:   "driver and library differ in version; after an update of the driver, start the agent again",
	nvml.ERROR_IN_USE:                    "in use",
	nvml.ERROR_MEMORY:                    "insufficient memory",
	nvml.ERROR_NO_DATA:                   "no data",
	nvml.ERROR_VGPU_ECC_NOT_SUPPORTED:    "no vGPU with ECC",
	nvml.ERROR_INSUFFICIENT_RESOURCES:    "insufficient resources",
	nvml.ERROR_FREQ_NOT_SUPPORTED:        "frequency not supported",
	nvml.ERROR_ARGUMENT_VERSION_MISMATCH: "version of the argument not known",
	nvml.ERROR_DEPRECATED:                "deprecated",
	nvml.ERROR_NOT_READY:                 "not ready",
	nvml.ERROR_GPU_NOT_FOUND:             "GPU not found",
	nvml.ERROR_INVALID_STATE:             "invalid state",
	nvml.ERROR_RESET_TYPE_NOT_SUPPORTED:  "type of reset not supported",
	nvml.ERROR_UNKNOWN:                   "unknown error",
}
