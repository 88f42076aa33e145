package rpc

import (
	"compress/gzip"
	"compress/zlib"
	"io"
	"sync"

	"google.golang.org/grpc/encoding"
)

// The compressions that a call may use; its answer uses the same. gRPC's
// "deflate" is zlib's format.
func init() {
	encoding.RegisterCompressor(newCompressor("gzip", zip[*gzip.Writer, *gzip.Reader]{
		writer: func() *gzip.Writer { w, _ := gzip.NewWriterLevel(nil, gzip.BestSpeed); return w },
		reader: func(r io.Reader) (*gzip.Reader, error) { return gzip.NewReader(r) },
		reset:  func(z *gzip.Reader, r io.Reader) error { return z.Reset(r) },
	}))
	encoding.RegisterCompressor(newCompressor("deflate", zip[*zlib.Writer, io.ReadCloser]{
		writer: func() *zlib.Writer { w, _ := zlib.NewWriterLevel(nil, zlib.BestSpeed); return w },
		reader: zlib.NewReader,
		reset:  func(z io.ReadCloser, r io.Reader) error { return z.(zlib.Resetter).Reset(r, nil) },
	}))
}

type zipWriter interface {
	io.WriteCloser
	Reset(io.Writer)
}

// zip makes the writers and readers of a format.
type zip[W zipWriter, R io.ReadCloser] struct {
	writer func() W
	reader func(io.Reader) (R, error)
	reset  func(R, io.Reader) error
}

// compressor keeps writers and readers of a format for the next call.
type compressor[W zipWriter, R io.ReadCloser] struct {
	name             string
	zip              zip[W, R]
	writers, readers sync.Pool
}

func newCompressor[W zipWriter, R io.ReadCloser](name string, z zip[W, R]) *compressor[W, R] {
	return &compressor[W, R]{name: name, zip: z}
}

func (c *compressor[W, R]) Name() string { return c.name }

func (c *compressor[W, R]) Compress(w io.Writer) (io.WriteCloser, error) {
	z, ok := c.writers.Get().(W)
	if !ok {
		z = c.zip.writer()
	}
	z.Reset(w)
	return &pooledWriter[W]{z, &c.writers}, nil
}

func (c *compressor[W, R]) Decompress(r io.Reader) (io.Reader, error) {
	z, ok := c.readers.Get().(R)
	if !ok {
		z, err := c.zip.reader(r)
		if err != nil {
			return nil, err
		}
		return &pooledReader[R]{z, &c.readers}, nil
	}
	if err := c.zip.reset(z, r); err != nil {
		c.readers.Put(z)
		return nil, err
	}
	return &pooledReader[R]{z, &c.readers}, nil
}

type pooledWriter[W zipWriter] struct {
	z    W
	pool *sync.Pool
}

func (p *pooledWriter[W]) Write(b []byte) (int, error) { return p.z.Write(b) }

func (p *pooledWriter[W]) Close() error {
	defer p.pool.Put(p.z)
	return p.z.Close()
}

type pooledReader[R io.ReadCloser] struct {
	z    R
	pool *sync.Pool
}

func (p *pooledReader[R]) Read(b []byte) (int, error) { return p.z.Read(b) }

func (p *pooledReader[R]) Close() error {
	defer p.pool.Put(p.z)
	return p.z.Close()
}
