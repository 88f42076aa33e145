package console

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"mime"
	"net/http"
	"path"
	"strings"
	"time"
)

//go:embed assets
var assetFiles embed.FS

// assets are the files that pages load, each by a name that has its hash: what
// a browser has of one never changes.
type assets struct {
	urls  map[string]string // by file name
	files map[string]asset  // by hashed name
}

type asset struct {
	kind, etag    string
	plain, zipped []byte
}

func newAssets() *assets {
	a := &assets{urls: map[string]string{}, files: map[string]asset{}}
	for _, dir := range []string{"assets", "assets/vendor"} {
		entries, err := assetFiles.ReadDir(dir)
		if err != nil {
			panic(err) // it is part of the program
		}
		for _, e := range entries {
			ext := path.Ext(e.Name())
			if e.IsDir() || ext == ".json" {
				continue
			}
			plain, err := assetFiles.ReadFile(path.Join(dir, e.Name()))
			if err != nil {
				panic(err)
			}
			sum := sha256.Sum256(plain)
			hash := hex.EncodeToString(sum[:8])
			name := strings.TrimSuffix(e.Name(), ext) + "." + hash + ext
			a.urls[e.Name()] = "/assets/" + name
			a.files[name] = asset{kind: mime.TypeByExtension(ext), etag: `"` + hash + `"`, plain: plain, zipped: zipped(plain)}
		}
	}
	return a
}

func zipped(b []byte) []byte {
	var out bytes.Buffer
	z, _ := gzip.NewWriterLevel(&out, gzip.BestCompression) // the level is valid
	_, _ = z.Write(b)                                       // memory takes it
	_ = z.Close()
	return out.Bytes()
}

func acceptsGzip(r *http.Request) bool {
	for one := range strings.SplitSeq(r.Header.Get("Accept-Encoding"), ",") {
		name, q, _ := strings.Cut(strings.TrimSpace(one), ";")
		if name == "gzip" && strings.ReplaceAll(q, " ", "") != "q=0" {
			return true
		}
	}
	return false
}

func (a *assets) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	f, ok := a.files[r.PathValue("name")]
	if !ok {
		http.NotFound(w, r)
		return
	}
	h := w.Header()
	h.Set("Cache-Control", "public, max-age=31536000, immutable")
	h.Set("Content-Type", f.kind)
	h.Set("Vary", "Accept-Encoding")
	body, tag := f.plain, f.etag
	if acceptsGzip(r) { // other bytes, so another tag
		body, tag = f.zipped, strings.TrimSuffix(f.etag, `"`)+`-gz"`
		h.Set("Content-Encoding", "gzip")
	}
	h.Set("ETag", tag)
	http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(body))
}
