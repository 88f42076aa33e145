package oip

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"

	"github.com/dunlin/dunlin/proto/inference"
)

const (
	// MaxRegions bounds the registered regions of shared memory, each of which
	// keeps a file open.
	MaxRegions = 256
	// memoryFolder is where POSIX shared memory objects are files.
	memoryFolder = "/dev/shm"
	maxKey       = 255 // bytes of the name of a shared memory object
)

// memory is what is known of the callers' shared memory. It is read and
// written through files: a caller may shorten what it maps at any time.
type memory struct {
	mu      sync.Mutex // guards what follows, and region.users
	regions map[string]*region
}

// region is a registered part of a shared memory object.
type region struct {
	status *inference.SystemSharedMemoryStatusResponse_RegionStatus // never changes
	file   *os.File
	users  int // requests at work, and the registration; the last one closes file
}

var errMemoryOff = Errorf(Unsupported, "shared memory is off on this server")

// RegisterMemory makes size bytes of the POSIX shared memory object key, from
// offset on, known as region name. A name that is taken is refused.
func (s *Server) RegisterMemory(name, key string, offset, size uint64) error {
	if !s.cfg.SharedMemory {
		return errMemoryOff
	}
	switch {
	case name == "":
		return Errorf(InvalidArgument, "the name of the shared memory region is empty")
	case len(name) > MaxName:
		return Errorf(InvalidArgument, "the name of the shared memory region has %d bytes, allowed are %d", len(name), MaxName)
	case size == 0:
		return Errorf(InvalidArgument, "shared memory region %q: byte_size is 0", name)
	}
	file, err := openObject(key, offset, size)
	if err != nil {
		return prefix(err, "shared memory region %q", name)
	}
	if err := s.memory.add(&region{
		status: &inference.SystemSharedMemoryStatusResponse_RegionStatus{Name: name, Key: key, Offset: offset, ByteSize: size},
		file:   file, users: 1,
	}); err != nil {
		return errors.Join(err, file.Close())
	}
	return nil
}

// openObject opens a shared memory object that has size bytes from offset on.
func openObject(key string, offset, size uint64) (*os.File, error) {
	name := strings.TrimPrefix(key, "/")
	if name == "" || len(name) > maxKey || strings.ContainsAny(name, "/\x00") || name == "." || name == ".." {
		return nil, Errorf(InvalidArgument, "key is %q, allowed is the name of a shared memory object of up to %d bytes, as /name", clip(key), maxKey)
	}
	root, err := os.OpenRoot(memoryFolder)
	if err != nil {
		return nil, Errorf(Unavailable, "shared memory: %w", err)
	}
	defer root.Close()
	// A pipe or a link to elsewhere is refused before it can be opened.
	info, err := root.Lstat(name)
	if err == nil && !info.Mode().IsRegular() {
		return nil, Errorf(InvalidArgument, "key %q is not a shared memory object", key)
	}
	var file *os.File
	if err == nil {
		file, err = root.OpenFile(name, os.O_RDWR, 0)
	}
	if err != nil {
		return nil, Errorf(InvalidArgument, "open shared memory object %q: %w", key, errors.Unwrap(err))
	}
	info, err = file.Stat()
	switch {
	case err != nil:
		err = Errorf(Internal, "shared memory object %q: %w", key, err)
	case !info.Mode().IsRegular():
		err = Errorf(InvalidArgument, "key %q is not a shared memory object", key)
	case offset > uint64(info.Size()) || size > uint64(info.Size())-offset:
		err = Errorf(InvalidArgument, "offset %d and byte_size %d do not fit shared memory object %q of %d bytes", offset, size, key, info.Size())
	default:
		return file, nil
	}
	return nil, errors.Join(err, file.Close())
}

func (m *memory) add(r *region) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.regions[r.status.Name] != nil {
		return Errorf(InvalidArgument, "shared memory region %q is registered already", r.status.Name)
	}
	if len(m.regions) >= MaxRegions {
		return Errorf(Unavailable, "shared memory region %q: %d regions are registered, the most that may be", r.status.Name, MaxRegions)
	}
	if m.regions == nil {
		m.regions = map[string]*region{}
	}
	m.regions[r.status.Name] = r
	return nil
}

// UnregisterMemory forgets a region, or all of them where name is empty.
// Requests at work still use it. A region that is not there is no error.
func (s *Server) UnregisterMemory(name string) error {
	if !s.cfg.SharedMemory {
		return errMemoryOff
	}
	m := &s.memory
	m.mu.Lock()
	var gone []*region
	for n, r := range m.regions {
		if name == "" || n == name {
			gone = append(gone, r)
			delete(m.regions, n)
		}
	}
	m.mu.Unlock()
	for _, r := range gone {
		m.drop(r)
	}
	return nil
}

// drop ends a use of a region.
func (m *memory) drop(r *region) {
	m.mu.Lock()
	r.users--
	last := r.users == 0
	m.mu.Unlock()
	if last {
		_ = r.file.Close() // what was written is memory already
	}
}

// Memory lists the registered regions by name; name, where not empty, is the
// only one to list.
func (s *Server) Memory(name string) (map[string]*inference.SystemSharedMemoryStatusResponse_RegionStatus, error) {
	m := &s.memory
	m.mu.Lock()
	defer m.mu.Unlock()
	list := map[string]*inference.SystemSharedMemoryStatusResponse_RegionStatus{}
	for n, r := range m.regions {
		if name == "" || n == name {
			list[n] = r.status
		}
	}
	if name != "" && len(list) == 0 {
		return nil, Errorf(NotFound, "there is no shared memory region %q", clip(name))
	}
	return list, nil
}

// use is the shared memory that a request uses.
type use struct {
	server  *Server
	regions []*region
	held    int64 // bytes of inputs
}

// open makes sure that a slice can be used until the end of the request.
func (u *use) open(s *Slice) error {
	_, err := u.region(s)
	return err
}

func (u *use) region(s *Slice) (*region, error) {
	for _, r := range u.regions {
		if r.status.Name == s.Region {
			return r, r.check(s)
		}
	}
	if !u.server.cfg.SharedMemory {
		return nil, errMemoryOff
	}
	m := &u.server.memory
	m.mu.Lock()
	r := m.regions[s.Region]
	if r != nil {
		r.users++
	}
	m.mu.Unlock()
	if r == nil {
		return nil, Errorf(NotFound, "there is no shared memory region %q", clip(s.Region))
	}
	u.regions = append(u.regions, r)
	return r, r.check(s)
}

// check says whether a slice is in the region.
func (r *region) check(s *Slice) error {
	if s.Offset < 0 || s.Size < 0 || uint64(s.Offset) > r.status.ByteSize || uint64(s.Size) > r.status.ByteSize-uint64(s.Offset) {
		return Errorf(InvalidArgument, "shared_memory_offset %d and shared_memory_byte_size %d do not fit shared memory region %q of %d bytes",
			s.Offset, s.Size, r.status.Name, r.status.ByteSize)
	}
	return nil
}

// read gives the content of a slice.
func (u *use) read(s *Slice) ([]byte, error) {
	r, err := u.region(s)
	if err != nil {
		return nil, err
	}
	if most := u.server.cfg.MaxBody; s.Size > most-u.held {
		return nil, Errorf(TooLarge, "inputs in shared memory have more than %d bytes", most)
	}
	if err := u.server.Hold(s.Size); err != nil {
		return nil, err
	}
	u.held += s.Size
	data := make([]byte, s.Size)
	n, err := r.file.ReadAt(data, int64(r.status.Offset)+s.Offset)
	if errors.Is(err, io.EOF) && n < len(data) {
		return nil, r.shortened()
	}
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("read shared memory region %q: %w", r.status.Name, err)
	}
	return data, nil
}

func (r *region) shortened() error {
	return Errorf(InvalidArgument, "shared memory object %q was shortened after region %q was registered", r.status.Key, r.status.Name)
}

// write puts data at the start of a slice and gives the part that they take.
func (u *use) write(s *Slice, data []byte) (*Slice, error) {
	r, err := u.region(s)
	if err != nil {
		return nil, err
	}
	if int64(len(data)) > s.Size {
		return nil, Errorf(InvalidArgument, "needs %d bytes of shared memory, shared_memory_byte_size gives %d", len(data), s.Size)
	}
	at := int64(r.status.Offset) + s.Offset
	// A write beyond the end would make the object longer.
	info, err := r.file.Stat()
	if err == nil && info.Size() < at+int64(len(data)) {
		return nil, r.shortened()
	}
	if err == nil {
		_, err = r.file.WriteAt(data, at)
	}
	if err != nil {
		return nil, fmt.Errorf("write shared memory region %q: %w", r.status.Name, err)
	}
	return &Slice{Region: s.Region, Offset: s.Offset, Size: int64(len(data))}, nil
}

// end gives everything back.
func (u *use) end() {
	if u.held > 0 {
		_ = u.server.Hold(-u.held) // giving back is not refused
	}
	for _, r := range u.regions {
		u.server.memory.drop(r)
	}
}

// clip shortens what a caller sent for an error message.
func clip(s string) string {
	const most = 64
	if len(s) > most {
		return strings.ToValidUTF8(s[:most], "") + "..."
	}
	return s
}
