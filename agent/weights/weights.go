// Package weights keeps the weights of models in pools of device memory whose
// content can leave the device and come back to the same addresses, so that
// what points there stays valid. It talks to a driver's table of functions:
// NVIDIA's, found at run time, or a fake one on the memory of this process.
package weights

// #cgo CFLAGS: -O2 -Wall -Wextra -Werror
// #cgo LDFLAGS: -ldl
// #include <stdlib.h>
// #include "pool.h"
import "C"

import (
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"
	"time"
	"unsafe"
)

var (
	// ErrOutOfMemory is the error of what needs more memory than there is;
	// the text has the numbers.
	ErrOutOfMemory = errors.New("out of memory")
	// ErrFull is the error of an allocation for which a pool has no addresses.
	ErrFull = errors.New("pool is full")
	// ErrNoGPU is the error of a machine without an NVIDIA GPU or its driver.
	ErrNoGPU = errors.New("no GPU")
	// ErrInUse is the error of closing what is in use.
	ErrInUse = errors.New("in use")
	// ErrClosed is the error of using what is closed.
	ErrClosed = errors.New("closed")
	// ErrState is the error of what a pool cannot do while it is out, or
	// filled, or not yet captured.
	ErrState = errors.New("not in this state")
)

// Driver is what Open opens: CUDA or a Fake.
type Driver interface {
	open() (*C.struct_driver, error)
}

// CUDA is the GPU with this number, counted as NVIDIA's driver does.
type CUDA int

func (c CUDA) open() (*C.struct_driver, error) {
	var none C.int
	var wrong *C.char
	d := C.driver_cuda(C.int(c), &none, &wrong)
	if d != nil {
		return d, nil
	}
	defer C.free(unsafe.Pointer(wrong))
	if none != 0 {
		return nil, fmt.Errorf("%w: %s", ErrNoGPU, C.GoString(wrong))
	}
	return nil, fmt.Errorf("GPU %d: %s", int(c), C.GoString(wrong))
}

// FakeConfig describes a fake device. Sizes are in bytes.
type FakeConfig struct {
	Capacity    int64
	Granularity int64 // a power of two, of at least a page; 0: 2 MiB
	Integrated  bool  // shares its memory with the CPU
}

// Fake is a device that is made of this process's memory. Memory that is not
// mapped cannot be touched, and what was unmapped is lost. It counts what it
// has given, and notes the first breach of the driver's rules.
type Fake struct{ driver *C.struct_driver }

// NewFake makes a fake device, to be closed after the Device that was opened
// on it.
func NewFake(c FakeConfig) (*Fake, error) {
	if c.Granularity == 0 {
		c.Granularity = 2 << 20
	}
	if c.Granularity < 4096 || c.Granularity&(c.Granularity-1) != 0 {
		return nil, fmt.Errorf("fake device: granularity of %d bytes is not a power of two from 4096 on", c.Granularity)
	}
	if c.Capacity <= 0 {
		return nil, fmt.Errorf("fake device: capacity of %d bytes is not positive", c.Capacity)
	}
	config := C.struct_fake_config{capacity: C.size_t(c.Capacity), granularity: C.size_t(c.Granularity)}
	if c.Integrated {
		config.integrated = 1
	}
	return &Fake{C.driver_fake(&config)}, nil
}

func (f *Fake) open() (*C.struct_driver, error) { return f.driver, nil }

// Close gives everything back, even what the driver's user has left.
func (f *Fake) Close() {
	if f.driver != nil {
		C.fake_free(f.driver)
	}
	f.driver = nil
}

// FakeCount is what a fake device has given, in bytes, how often it was
// called, and how many copies were under way at a time, at most.
type FakeCount struct {
	Reserved, Created, Mapped, Pinned                int64
	Reservations, Handles, Mappings, Streams, Events int
	Calls, Copies                                    int
}

// Count counts what is out.
func (f *Fake) Count() FakeCount {
	var c C.struct_fake_count
	C.fake_count(f.driver, &c)
	return FakeCount{
		Reserved: int64(c.reserved), Created: int64(c.created), Mapped: int64(c.mapped), Pinned: int64(c.pinned),
		Reservations: int(c.reservations), Handles: int(c.handles), Mappings: int(c.mappings), Streams: int(c.streams), Events: int(c.events),
		Calls: int(c.calls), Copies: int(c.copies),
	}
}

// Breach says which rule of the driver's was broken first; "" for none.
func (f *Fake) Breach() string {
	s := C.fake_breach(f.driver)
	defer C.free(unsafe.Pointer(s))
	return C.GoString(s)
}

// Calls names the functions that can be made to fail.
func (f *Fake) Calls() []string {
	var all []string
	for i := C.int(0); ; i++ {
		name := C.fake_call(i)
		if name == nil {
			return all
		}
		all = append(all, C.GoString(name))
	}
}

// Codes of errors that Fail can give.
const (
	CodeOutOfMemory = C.DRIVER_OUT_OF_MEMORY
	CodeUnknown     = 999
)

// Fail has the n-th call of the named function from now on fail, and the ones
// after it until times have failed; "" counts all functions' calls. n 0 takes
// a failure back.
func (f *Fake) Fail(call string, n, times, code int) {
	number := -1
	if call != "" {
		for i, name := range f.Calls() {
			if name == call {
				number = i
			}
		}
		if number < 0 {
			panic("weights: the fake has no call " + call)
		}
	}
	C.fake_fail(f.driver, C.int(number), C.uint64_t(n), C.uint64_t(times), C.int(code))
}

// Settings are those of a device's pools, in bytes.
type Settings struct {
	// Pinned is host memory for images that the device reads by itself. It is
	// taken when the device is opened, which may take seconds. Images that
	// find no room in it are in ordinary memory, and slower.
	Pinned int64
	// Recycled bounds the device memory that is kept unmapped for the next
	// that needs some, because to get it from the driver is slow. All of it
	// goes back to the driver where that runs out of memory.
	Recycled int64
	// Largest bounds what is mapped as one piece; 0: 256 MiB.
	Largest int64
}

// Info describes a device.
type Info struct {
	Name       string
	UUID       string // as NVML writes it
	Driver     string // version of CUDA that the driver speaks: "13.0"; "" for a fake
	Integrated bool   // CPU and device share their memory
}

// Device is a device and the memory of its pools. Its methods may be called
// from many goroutines at a time.
type Device struct {
	device *C.struct_device
	driver *C.struct_driver
	info   Info
	copies chan struct{} // holds one while content is copied, or the device is closed
	closed bool          // owned by who holds copies
	alarm  runtime.Cleanup
}

// Open opens a device. ErrNoGPU says that there is none.
func Open(driver Driver, s Settings) (*Device, error) {
	if s.Largest == 0 {
		s.Largest = 256 << 20
	}
	if s.Pinned < 0 || s.Recycled < 0 || s.Largest < 0 {
		return nil, fmt.Errorf("open device: negative setting in %+v", s)
	}
	table, err := driver.open()
	if err != nil {
		return nil, fmt.Errorf("open device: %w", err)
	}
	d := &Device{driver: table, copies: make(chan struct{}, 1)}
	var f C.struct_failure
	d.device = C.device_open(table, &C.struct_device_settings{
		pinned: C.size_t(s.Pinned), recycled: C.size_t(s.Recycled), largest: C.size_t(s.Largest),
	}, &f)
	if d.device == nil {
		err := d.failure(&f)
		C.driver_close(table)
		return nil, fmt.Errorf("open device: %w", err)
	}
	if d.info, err = d.describe(); err != nil {
		return nil, errors.Join(fmt.Errorf("open device: %w", err), d.Close())
	}
	d.alarm = runtime.AddCleanup(d, func(struct{}) { panic("weights: a device was never closed") }, struct{}{})
	return d, nil
}

func (d *Device) describe() (Info, error) {
	var i C.struct_driver_info
	var f C.struct_failure
	if C.device_describe(d.device, &i, &f) != 0 {
		return Info{}, d.failure(&f)
	}
	info := Info{Name: C.GoString(&i.name[0]), Integrated: i.integrated != 0}
	if i.version > 0 {
		info.Driver = fmt.Sprintf("%d.%d", i.version/1000, i.version%1000/10)
	}
	id := C.GoBytes(unsafe.Pointer(&i.uuid[0]), 16)
	info.UUID = fmt.Sprintf("GPU-%x-%x-%x-%x-%x", id[:4], id[4:6], id[6:8], id[8:10], id[10:])
	return info, nil
}

// failure makes an error of what C says, with a sentinel where it has one.
func (d *Device) failure(f *C.struct_failure) error {
	call := C.GoString(f.call)
	switch f.code {
	case C.DRIVER_OUT_OF_MEMORY:
		if f.total == 0 {
			return fmt.Errorf("%w: %s of %d bytes", ErrOutOfMemory, call, f.asked)
		}
		return fmt.Errorf("%w: %d bytes are needed, and %d of the device's %d are free", ErrOutOfMemory, f.asked, f.free, f.total)
	case C.POOL_HOST_MEMORY:
		return fmt.Errorf("%w: %s of %d bytes on the host", ErrOutOfMemory, call, f.asked)
	case C.POOL_FULL:
		return fmt.Errorf("%w: %d bytes are needed, and %d of its %d are left", ErrFull, f.asked, f.free, f.total)
	case C.POOL_STATE:
		return fmt.Errorf("%w: %s", ErrState, call)
	case C.POOL_IN_USE:
		return ErrInUse
	case C.POOL_ARGUMENT:
		return fmt.Errorf("%s is outside of the pool", call)
	case C.POOL_CANCELLED:
		return context.Canceled
	}
	return fmt.Errorf("%s: %s (%d)", call, C.GoString(C.driver_error_name(d.driver, f.code)), f.code)
}

// Close refuses with ErrInUse while there are pools. After another error it
// may be called again; after none it does nothing.
func (d *Device) Close() error {
	d.copies <- struct{}{}
	defer func() { <-d.copies }()
	if d.closed {
		return nil
	}
	var f C.struct_failure
	if C.device_close(d.device, &f) != 0 {
		return fmt.Errorf("close device: %w", d.failure(&f))
	}
	C.driver_close(d.driver)
	d.closed = true
	d.alarm.Stop()
	return nil
}

// Info describes the device.
func (d *Device) Info() Info { return d.info }

// Stats is the ledger of a device's pools, in bytes. Physical is what the
// driver has given, which is either mapped or recycled.
type Stats struct {
	Reserved                   int64 // addresses
	Physical, Mapped, Recycled int64
	Pinned, PinnedUsed         int64 // host memory that the device reads by itself; what of it are images
	Pageable                   int64 // images that found no room there
	Pools                      int
}

// Stats gives the ledger. The device must not be closed.
func (d *Device) Stats() Stats {
	var l C.struct_device_ledger
	C.device_ledger(d.device, &l)
	return Stats{
		Reserved: int64(l.reserved), Physical: int64(l.physical), Mapped: int64(l.mapped), Recycled: int64(l.recycled),
		Pinned: int64(l.pinned), PinnedUsed: int64(l.pinned_used), Pageable: int64(l.pageable), Pools: int(l.pools),
	}
}

// Memory asks the driver how much of the device's memory is free; what is
// recycled counts as taken.
func (d *Device) Memory() (free, total int64, err error) {
	var f C.struct_failure
	var available, all C.size_t
	if C.device_memory(d.device, &available, &all, &f) != 0 {
		return 0, 0, fmt.Errorf("device memory: %w", d.failure(&f))
	}
	return int64(available), int64(all), nil
}

// Measure copies so many bytes from pinned memory to the device, in one piece
// and so many times, and says how long each took: no pool comes in faster.
func (d *Device) Measure(size int64, times int) ([]time.Duration, error) {
	if size <= 0 || times <= 0 {
		return nil, fmt.Errorf("measure device: %d copies of %d bytes", times, size)
	}
	d.copies <- struct{}{}
	defer func() { <-d.copies }()
	took := make([]time.Duration, times)
	var f C.struct_failure
	if C.device_measure(d.device, C.size_t(size), C.int(times), (*C.int64_t)(unsafe.Pointer(&took[0])), &f) != 0 {
		return nil, fmt.Errorf("measure device: %w", d.failure(&f))
	}
	return took, nil
}

// Pool is memory for the weights of one session. It is filled through Memory
// or Allocate and Write; Capture ends that. From then on the content does not
// change, and goes Out and comes In at the same addresses. Whoever calls Out
// sees to it that nothing uses the content before In has returned without an
// error. Calls wait for each other; Stats does not.
type Pool struct {
	device *Device
	pool   *C.struct_pool
	file   File          // that has the image, from CaptureTo on
	ready  bool          // captured
	turn   chan struct{} // holds one while a call is at work, which owns the fields above
	alarm  runtime.Cleanup
}

// File keeps the content of a pool, and gives it back.
type File interface {
	io.ReaderAt
	io.WriterAt
}

// NewPool makes an empty pool with so many bytes of addresses, which cost
// nothing; memory is taken as it is filled.
func (d *Device) NewPool(reserve int64) (*Pool, error) {
	if reserve <= 0 {
		return nil, fmt.Errorf("new pool: %d bytes of addresses", reserve)
	}
	var f C.struct_failure
	c := C.pool_open(d.device, C.size_t(reserve), &f)
	if c == nil {
		return nil, fmt.Errorf("new pool of %d bytes: %w", reserve, d.failure(&f))
	}
	p := &Pool{device: d, pool: c, turn: make(chan struct{}, 1)}
	p.alarm = runtime.AddCleanup(p, func(struct{}) { panic("weights: a pool was never closed") }, struct{}{})
	return p, nil
}

// begin waits for the pool's turn, and the device's where content is copied.
func (p *Pool) begin(ctx context.Context, copies bool) (end func(), err error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	select {
	case p.turn <- struct{}{}:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	if p.pool == nil {
		<-p.turn
		return nil, ErrClosed
	}
	if !copies {
		return func() { <-p.turn }, nil
	}
	select {
	case p.device.copies <- struct{}{}:
	case <-ctx.Done():
		<-p.turn
		return nil, context.Cause(ctx)
	}
	return func() { <-p.device.copies; <-p.turn }, nil
}

// Memory is where a runtime allocates: a struct weights_memory of memory.h,
// valid until Close, and nil afterwards.
func (p *Pool) Memory() unsafe.Pointer {
	if p.pool == nil {
		return nil
	}
	return unsafe.Pointer(C.pool_memory(p.pool))
}

// Base is the first of the pool's addresses, where its first block begins.
func (p *Pool) Base() uintptr { return uintptr(C.pool_memory(p.pool).base) }

// Refused says what the last allocation that found no memory was refused
// for, and forgets it; nil where none was. A runtime does not pass it on.
func (p *Pool) Refused() error {
	var f C.struct_failure
	C.pool_refused(p.pool, &f)
	if f.code == 0 {
		return nil
	}
	return p.device.failure(&f)
}

// Allocate takes a block and gives its address on the device, a multiple of
// 256.
func (p *Pool) Allocate(size int64) (uintptr, error) {
	if size < 0 {
		return 0, fmt.Errorf("allocate %d bytes", size)
	}
	end, err := p.begin(context.Background(), false)
	if err != nil {
		return 0, fmt.Errorf("allocate: %w", err)
	}
	defer end()
	at := C.pool_allocate(p.pool, C.size_t(size))
	if at == 0 {
		return 0, fmt.Errorf("allocate: %w", p.Refused())
	}
	return uintptr(at), nil
}

// Free gives a block back that Allocate or a runtime has taken.
func (p *Pool) Free(at uintptr) {
	end, err := p.begin(context.Background(), false)
	if err != nil {
		panic("weights: free in a closed pool")
	}
	defer end()
	C.pool_release(p.pool, C.uint64_t(at))
}

// Write copies data to an address of the pool. What is written after Capture
// is gone when the content leaves.
func (p *Pool) Write(to uintptr, data []byte) error { return p.exchange(to, data, true) }

// Read copies the content from an address of the pool on.
func (p *Pool) Read(data []byte, from uintptr) error { return p.exchange(from, data, false) }

func (p *Pool) exchange(at uintptr, data []byte, write bool) error {
	end, err := p.begin(context.Background(), true)
	if err != nil {
		return fmt.Errorf("copy: %w", err)
	}
	defer end()
	C.pool_cancel(p.pool, 0)
	// Copies are done when the calls return; the driver keeps no pointer.
	var pin runtime.Pinner
	defer pin.Unpin()
	host := unsafe.Pointer(unsafe.SliceData(data))
	if host != nil {
		pin.Pin(host)
	}
	var f C.struct_failure
	if write {
		C.pool_put(p.pool, C.uint64_t(at), host, C.size_t(len(data)), &f)
	} else {
		C.pool_get(p.pool, host, C.uint64_t(at), C.size_t(len(data)), &f)
	}
	if f.code != 0 {
		return fmt.Errorf("copy: %w", p.device.failure(&f))
	}
	return nil
}

// Capture ends filling and copies the content to an image on the host. After
// an error the content is still there and the pool not captured.
func (p *Pool) Capture() error {
	end, err := p.begin(context.Background(), true)
	if err != nil {
		return fmt.Errorf("capture: %w", err)
	}
	defer end()
	if p.ready {
		return fmt.Errorf("capture: %w: it is captured", ErrState)
	}
	C.pool_cancel(p.pool, 0)
	var f C.struct_failure
	if C.pool_capture(p.pool, &f) != 0 {
		return fmt.Errorf("capture: %w", p.device.failure(&f))
	}
	p.ready = true
	return nil
}

// staging bounds what is copied at a time between a device and a File.
const staging = 8 << 20

// CaptureTo ends filling and writes the content to file, where In reads it
// until Close. Devices that share their memory with the CPU would otherwise
// hold it twice.
func (p *Pool) CaptureTo(file File) error {
	end, err := p.begin(context.Background(), true)
	if err != nil {
		return fmt.Errorf("capture: %w", err)
	}
	defer end()
	if p.ready {
		return fmt.Errorf("capture: %w: it is captured", ErrState)
	}
	C.pool_cancel(p.pool, 0)
	var f C.struct_failure
	if C.pool_seal(p.pool, &f) != 0 {
		return fmt.Errorf("capture: %w", p.device.failure(&f))
	}
	err = p.each(context.Background(), func(offset int64, data []byte) error {
		if C.pool_read(p.pool, C.size_t(offset), unsafe.Pointer(&data[0]), C.size_t(len(data)), &f) != 0 {
			return p.device.failure(&f)
		}
		_, err := file.WriteAt(data, offset)
		return err
	})
	if err != nil {
		return fmt.Errorf("capture: %w", err)
	}
	p.file, p.ready = file, true
	return nil
}

// each calls do with memory for each part of the image.
func (p *Pool) each(ctx context.Context, do func(offset int64, data []byte) error) error {
	var s C.struct_pool_stats
	C.pool_stats(p.pool, &s)
	size := int64(s.image)
	if size == 0 {
		return nil
	}
	buffer := C.malloc(C.size_t(min(size, staging)))
	defer C.free(buffer)
	for offset := int64(0); offset < size; offset += staging {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err := do(offset, unsafe.Slice((*byte)(buffer), min(size-offset, staging))); err != nil {
			return err
		}
	}
	return nil
}

// Out waits for what the device is doing and takes the content's memory back.
// The pool must be captured; where it is out, nothing happens. After an error
// State says where it is: the content is still in where the device could not
// be waited for; otherwise it is out, and memory that the driver did not take
// back stays counted as mapped until the next call.
func (p *Pool) Out() error {
	end, err := p.begin(context.Background(), false)
	if err != nil {
		return fmt.Errorf("out: %w", err)
	}
	defer end()
	if !p.ready {
		return fmt.Errorf("out: %w: it is not captured", ErrState)
	}
	var f C.struct_failure
	if C.pool_out(p.pool, &f) != 0 {
		return fmt.Errorf("out: %w", p.device.failure(&f))
	}
	return nil
}

// In brings the content back; where it is in, nothing happens. After an error,
// which is ctx's cause where that has ended, content that was out is out.
func (p *Pool) In(ctx context.Context) error {
	end, err := p.begin(ctx, true)
	if err != nil {
		return fmt.Errorf("in: %w", err)
	}
	defer end()
	if !p.ready {
		return fmt.Errorf("in: %w: it is not captured", ErrState)
	}
	C.pool_cancel(p.pool, 0)
	release := whenDone(ctx, func() { C.pool_cancel(p.pool, 1) })
	defer release()
	if p.file != nil {
		err = p.read(ctx)
	} else {
		var f C.struct_failure
		if C.pool_in(p.pool, &f) != 0 {
			err = p.device.failure(&f)
		}
	}
	if err == nil {
		return nil
	}
	if errors.Is(err, context.Canceled) {
		err = context.Cause(ctx)
	}
	return fmt.Errorf("in: %w", err)
}

// read brings the content in from its file.
func (p *Pool) read(ctx context.Context) error {
	if p.state() == In {
		return nil
	}
	var f C.struct_failure
	if C.pool_map(p.pool, &f) != 0 {
		return p.device.failure(&f)
	}
	err := p.each(ctx, func(offset int64, data []byte) error {
		if n, err := p.file.ReadAt(data, offset); n < len(data) {
			if err == nil || err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return err
		}
		if C.pool_write(p.pool, C.size_t(offset), unsafe.Pointer(&data[0]), C.size_t(len(data)), &f) != 0 {
			return p.device.failure(&f)
		}
		return nil
	})
	if err == nil {
		C.pool_finish(p.pool, &f)
		return nil
	}
	var undo C.struct_failure
	if C.pool_unmap(p.pool, &undo) != 0 {
		err = errors.Join(err, p.device.failure(&undo))
	}
	return err
}

// whenDone calls f once ctx is done, unless the function that it gives was
// called before; that one returns when f does not run any more.
func whenDone(ctx context.Context, f func()) (release func()) {
	over := make(chan struct{})
	stop := context.AfterFunc(ctx, func() { defer close(over); f() })
	return func() {
		if !stop() {
			<-over
		}
	}
}

// Close gives everything back. It refuses with ErrInUse while blocks are
// allocated: the session goes first. After another error the content is lost,
// and Close may be called again; after none it does nothing.
func (p *Pool) Close() error {
	end, err := p.begin(context.Background(), true)
	if errors.Is(err, ErrClosed) {
		return nil
	} else if err != nil {
		return fmt.Errorf("close pool: %w", err)
	}
	defer end()
	var f C.struct_failure
	if C.pool_close(p.pool, &f) != 0 {
		p.ready = p.ready && f.code == C.POOL_IN_USE
		return fmt.Errorf("close pool: %w", p.device.failure(&f))
	}
	p.pool = nil
	p.alarm.Stop()
	return nil
}

// State says where a pool's content is.
type State int

// The states.
const (
	Filling State = C.POOL_FILLING // in, and not captured
	In      State = C.POOL_IN
	Out     State = C.POOL_OUT
)

// String gives the state's name.
func (s State) String() string { return [...]string{"filling", "in", "out"}[s] }

// PoolStats describes a pool. Sizes are in bytes.
type PoolStats struct {
	State            State
	Reserved, Mapped int64
	Used             int64 // of blocks
	Image            int64 // what comes in
	Pinned           bool  // the image lies in memory that the device reads by itself
	Blocks, Chunks   int   // chunks are mapped one by one
}

// Stats describes the pool, which must not be closed.
func (p *Pool) Stats() PoolStats {
	var s C.struct_pool_stats
	C.pool_stats(p.pool, &s)
	return PoolStats{
		State: State(s.state), Reserved: int64(s.reserved), Mapped: int64(s.mapped), Used: int64(s.used),
		Image: int64(s.image), Pinned: s.pinned != 0, Blocks: int(s.blocks), Chunks: int(s.chunks),
	}
}

func (p *Pool) state() State { return p.Stats().State }
