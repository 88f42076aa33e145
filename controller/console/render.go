package console

import (
	"bytes"
	"cmp"
	"compress/gzip"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"fmt"
	"html/template"
	"io/fs"
	"log/slog"
	"net/http"
	"net/url"
	"path"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"
)

//go:embed templates
var templateFiles embed.FS

// page is what every template gets.
type page struct {
	Session session
	Title   string
	Here    string // path and query of this page
	Theme   string // "light", "dark", or "" for the system's
	Now     time.Time
	Data    any
}

// section is a part of the console that the bar at the top leads to. The page
// at its address has its name as the title.
type section struct{ Name, URL string }

var sections = []section{
	{"Fleet", "/"},
	{"Models", "/models"},
	{"Alarms", "/alarms"},
}

type pages struct {
	named map[string]*template.Template
	log   *slog.Logger
}

func newPages(a *assets, log *slog.Logger) *pages {
	funcs := template.FuncMap{
		"asset": func(name string) string { return a.urls[name] },
		"ago":   ago, "stamp": stamp, "bytes": bytesText, "escape": escape, "percent": percent,
		"seconds": secondsText, "labels": labelText, "signature": signatureOf,
		"sections": func() []section { return sections },
	}
	base := template.Must(template.New("").Funcs(funcs).ParseFS(templateFiles, "templates/base.html"))
	p := &pages{named: map[string]*template.Template{}, log: log}
	files, _ := fs.Glob(templateFiles, "templates/*.html") // the pattern is valid
	for _, file := range files {
		if name := strings.TrimSuffix(path.Base(file), ".html"); name != "base" {
			p.named[name] = template.Must(template.Must(base.Clone()).ParseFS(templateFiles, file))
		}
	}
	return p
}

// render gives a part of a page.
func (p *pages) render(name, part string, data any) ([]byte, error) {
	var b bytes.Buffer
	if err := p.named[name].ExecuteTemplate(&b, part, data); err != nil {
		return nil, fmt.Errorf("render %s of %s: %w", part, name, err)
	}
	return b.Bytes(), nil
}

// write answers with a whole page: none goes out in part.
func (p *pages) write(w http.ResponseWriter, r *http.Request, status int, name string, data page) {
	data.Theme, data.Here = themeOf(r), r.URL.RequestURI()
	if r.Method != http.MethodGet {
		data.Here = "/"
	}
	b, err := p.render(name, "page", data)
	if err != nil {
		p.log.Error("cannot make a page", "error", err)
		http.Error(w, "internal error; the controller's log says more", http.StatusInternalServerError)
		return
	}
	h := w.Header()
	h.Set("Content-Type", "text/html; charset=utf-8")
	h.Set("Vary", "Accept-Encoding, Cookie")
	if status == http.StatusOK {
		// The cookie says who may have it; the browser asks each time.
		h.Set("Cache-Control", "private, no-cache")
		sum := sha256.Sum256(b)
		tag := `"` + hex.EncodeToString(sum[:12]) + `"`
		h.Set("ETag", tag)
		if r.Header.Get("If-None-Match") == tag {
			w.WriteHeader(http.StatusNotModified)
			return
		}
	}
	if !acceptsGzip(r) {
		w.WriteHeader(status)
		_, _ = w.Write(b) // whoever went away does not need it
		return
	}
	h.Set("Content-Encoding", "gzip")
	w.WriteHeader(status)
	z, _ := gzip.NewWriterLevel(w, gzip.BestSpeed) // the level is valid
	_, _ = z.Write(b)
	_ = z.Close()
}

func escape(s string) string { return url.QueryEscape(s) }

func timeOf(t any) time.Time {
	switch t := t.(type) {
	case time.Time:
		return t
	case *timestamppb.Timestamp:
		if t != nil {
			return t.AsTime()
		}
	}
	return time.Time{}
}

// stamp writes a time for machines.
func stamp(t any) string { return timeOf(t).UTC().Format(time.RFC3339) }

// ago writes how long ago a time is, as "14 s ago". The page's script does the
// same each second.
func ago(now time.Time, at any) string {
	t := timeOf(at)
	if t.IsZero() || t.Unix() == 0 {
		return "never"
	}
	switch s := max(int64(now.Sub(t)/time.Second), 0); {
	case s < 120:
		return fmt.Sprintf("%d s ago", s)
	case s < 2*3600:
		return fmt.Sprintf("%d min ago", s/60)
	case s < 48*3600:
		return fmt.Sprintf("%d h ago", s/3600)
	default:
		return fmt.Sprintf("%d days ago", s/86400)
	}
}

// bytesText writes a number of bytes with its unit.
func bytesText(n uint64) string {
	units := []string{"B", "KiB", "MiB", "GiB", "TiB"}
	f, i := float64(n), 0
	for f >= 1024 && i < len(units)-1 {
		f, i = f/1024, i+1
	}
	if i == 0 {
		return fmt.Sprintf("%d B", n)
	}
	return strings.Replace(fmt.Sprintf("%.1f %s", f, units[i]), ".0 ", " ", 1)
}

// percent writes a share; nil: it is not known.
func percent(f *float64) string {
	if f == nil {
		return "not known"
	}
	return fmt.Sprintf("%.0f %%", *f*100)
}

// clip shortens a text that somebody else chose.
func clip(s string, most int) string {
	r := []rune(s)
	if len(r) <= most {
		return s
	}
	return cmp.Or(string(r[:most-1]), "") + "…"
}
