package models

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"path/filepath"
	"testing"

	"github.com/opencontainers/go-digest"
	"google.golang.org/protobuf/proto"
)

func FuzzParseManifest(f *testing.F) {
	f.Add(pack(f, writeModel(f, modelOf(smallGraph()), nil)).ManifestBytes)
	f.Add([]byte(`{"schemaVersion":2,"layers":[{"digest":"sha256:0","size":1}]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := ParseManifest(b)
		if _, ok := IsPlain(b); ok && err == nil {
			t.Error("a bundle is plain")
		}
		if err != nil {
			if !errors.Is(err, ErrInvalid) {
				t.Errorf("error %v is not ErrInvalid", err)
			}
			return
		}
		if len(m.Files) < 1 || len(m.Files) > MaxFiles || m.Size < 1 || m.Size > MaxBundleBytes || m.Digest != digest.FromBytes(b) {
			t.Errorf("accepted %+v", m)
		}
		for _, file := range m.Files {
			if !filepath.IsLocal(filepath.FromSlash(file.Path)) || file.Digest.Validate() != nil {
				t.Errorf("accepted %+v", file)
			}
		}
	})
}

func FuzzParseConfig(f *testing.F) {
	f.Add(pack(f, writeModel(f, modelOf(smallGraph()), nil), "a").ConfigBytes)
	f.Add([]byte(`{"format":1}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := ParseConfig(b)
		if err != nil {
			if !errors.Is(err, ErrInvalid) {
				t.Errorf("error %v is not ErrInvalid", err)
			}
			return
		}
		again, err := json.Marshal(c)
		if err != nil {
			t.Fatal(err)
		}
		if len(again) > MaxConfigBytes {
			return
		}
		c2, err := ParseConfig(again)
		if err != nil {
			t.Fatalf("%s: %v", again, err)
		}
		if b2, _ := json.Marshal(c2); !bytes.Equal(again, b2) {
			t.Errorf("%s becomes %s", again, b2)
		}
	})
}

func FuzzParseIndex(f *testing.F) {
	b := pack(f, largeModel(f))
	m, err := ParseManifest(b.ManifestBytes)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b.IndexBytes)
	f.Add([]byte{0x0a, 0x02, 0x22, 0x00})
	f.Fuzz(func(t *testing.T, b []byte) {
		index, err := parseIndex(b, m)
		if err != nil {
			if !errors.Is(err, ErrInvalid) {
				t.Errorf("error %v is not ErrInvalid", err)
			}
			return
		}
		var sum uint64
		for _, file := range index.Files {
			for _, c := range file.Chunks {
				sum += uint64(c.Length)
			}
		}
		if sum != uint64(m.Size) {
			t.Errorf("chunks have %d of %d bytes", sum, m.Size)
		}
		if n := countEntries(b); n < int64(len(index.Files)) {
			t.Errorf("counted %d entries", n)
		}
	})
}

func FuzzChunk(f *testing.F) {
	f.Add([]byte("a"), uint16(3))
	f.Add([]byte{0}, uint16(1))
	f.Fuzz(func(t *testing.T, seed []byte, times uint16) {
		content := bytes.Repeat(seed, int(times)%4096+1)
		one, err := chunk(t.Context(), bytes.NewReader(content))
		if err != nil {
			t.Fatal(err)
		}
		checkCover(t, content, one)
		again, err := chunk(t.Context(), &slowReader{content})
		if err != nil {
			t.Fatal(err)
		}
		if !proto.Equal(one, again) {
			t.Error("chunks depend on how the file is read")
		}
	})
}

// slowReader gives a little at a time.
type slowReader struct{ left []byte }

func (r *slowReader) Read(b []byte) (int, error) {
	n := min(len(b), len(r.left), 1000)
	copy(b, r.left[:n])
	r.left = r.left[n:]
	if len(r.left) == 0 {
		return n, io.EOF
	}
	return n, nil
}
