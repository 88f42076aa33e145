package main

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptrace"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"
)

type figures struct {
	ttfb, live  []time.Duration
	worst       string // page with the slowest first byte
	missed      int
	first, next int // bytes
	cpu         float64
	rss         int64
	axe, policy int
	messages    float64
}

func percentile(d []time.Duration, p int) time.Duration {
	if len(d) == 0 {
		return 0
	}
	d = slices.Sorted(slices.Values(d))
	return d[min(len(d)-1, len(d)*p/100)]
}

func (f figures) print() {
	ms := func(d time.Duration) int64 { return d.Milliseconds() }
	fmt.Printf("first byte of %d pages: p50 %d ms, p95 %d ms, most %d ms (%s)\n", len(f.ttfb), ms(percentile(f.ttfb, 50)), ms(percentile(f.ttfb, 95)), ms(percentile(f.ttfb, 100)), f.worst)
	fmt.Printf("%d live updates: p50 %d ms, p95 %d ms, most %d ms; %d did not come within 10 s\n", len(f.live), ms(percentile(f.live, 50)), ms(percentile(f.live, 95)), ms(percentile(f.live, 100)), f.missed)
	fmt.Printf("meanwhile devices sent %.0f messages/s; the controller used %.2f cores, and has had %d MB of memory at most\n", f.messages, f.cpu, f.rss>>20)
	fmt.Printf("console: ttfb_p95_ms=%d live_p95_ms=%d first_kb=%.0f next_kb=%.0f axe_serious=%d csp_violations=%d\n",
		ms(percentile(f.ttfb, 95)), ms(percentile(f.live, 95)), float64(f.first)/1024, float64(f.next)/1024, f.axe, f.policy)
}

// get gives a page, the bytes that it took, and when the first one came.
func (w *world) get(ctx context.Context, path string, cookie *http.Cookie) (body []byte, size int, first time.Duration, err error) {
	began := time.Now()
	trace := &httptrace.ClientTrace{GotFirstResponseByte: func() { first = time.Since(began) }}
	req, err := http.NewRequestWithContext(httptrace.WithClientTrace(ctx, trace), "GET", w.url+path, nil)
	if err != nil {
		return nil, 0, 0, err
	}
	req.Header.Set("Accept-Encoding", "gzip")
	req.Header.Set("Accept", "text/html")
	req.AddCookie(cookie)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, 0, 0, err
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		return nil, 0, 0, errors.Join(err, fmt.Errorf("GET %s: %s", path, resp.Status))
	}
	size, body = len(raw), raw
	if resp.Header.Get("Content-Encoding") == "gzip" {
		z, err := gzip.NewReader(bytes.NewReader(raw))
		if err != nil {
			return nil, 0, 0, err
		}
		body, err = io.ReadAll(z)
		return body, size, first, err
	}
	return body, size, first, nil
}

var (
	links  = regexp.MustCompile(`<a [^>]*href="(/[^"#]*)"`)
	loads  = regexp.MustCompile(`(?:src|href)="(/assets/[^"]+)"`)
	liveAt = regexp.MustCompile(`sse-connect="([^"]+)"`)
)

// kind is what pages have in common that differ by a name only.
func kind(path string) string {
	p, _, _ := strings.Cut(path, "?")
	parts := strings.Split(p, "/")
	if len(parts) > 2 && len(parts) < 5 {
		parts[2] = "*"
	}
	return strings.Join(parts, "/")
}

// crawl gives paths that links lead to from "/": up to each of every kind.
func (w *world) crawl(ctx context.Context, each int) (paths []string, err error) {
	seen, of := map[string]bool{"/": true}, map[string]int{}
	for queue := []string{"/"}; len(queue) > 0; {
		path := queue[0]
		queue = queue[1:]
		body, _, _, err := w.get(ctx, path, w.cookies[0])
		if err != nil {
			return nil, err
		}
		paths = append(paths, path)
		for _, m := range links.FindAllSubmatch(body, -1) {
			to := strings.ReplaceAll(string(m[1]), "&amp;", "&")
			if seen[to] || strings.HasPrefix(to, "/sign-") || of[kind(to)] >= each {
				continue
			}
			seen[to] = true
			of[kind(to)]++
			queue = append(queue, to)
		}
	}
	return paths, nil
}

// watching is a viewer of a live page.
type watching struct {
	devices []int // some that its page shows
	mu      sync.Mutex
	waits   map[string]time.Time // what is looked for, and when it was sent
	took    []time.Duration
}

func (v *watching) waiting() bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return len(v.waits) > 0
}

func (v *watching) read(ctx context.Context, w *world, path string, cookie *http.Cookie) error {
	req, err := http.NewRequestWithContext(ctx, "GET", w.url+path, nil)
	if err != nil {
		return err
	}
	req.AddCookie(cookie)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("GET %s: %s", path, resp.Status)
	}
	lines := bufio.NewReader(resp.Body)
	for {
		line, err := lines.ReadString('\n')
		if err != nil {
			return err
		}
		v.mu.Lock()
		for what, at := range v.waits {
			if strings.Contains(line, what) {
				v.took = append(v.took, time.Since(at))
				delete(v.waits, what)
			}
		}
		v.mu.Unlock()
	}
}

func (w *world) measure(ctx context.Context) (f figures, err error) {
	fmt.Fprintln(os.Stderr, "what pages weigh")
	body, size, _, err := w.get(ctx, "/", w.cookies[0])
	if err != nil {
		return f, err
	}
	f.first, f.next = size, 0
	for _, m := range loads.FindAllSubmatch(body, -1) {
		_, size, _, err := w.get(ctx, string(m[1]), w.cookies[0])
		if err != nil {
			return f, err
		}
		f.first += size
	}
	paths, err := w.crawl(ctx, 3)
	if err != nil {
		return f, err
	}
	fmt.Fprintf(os.Stderr, "%d viewers look for %s\n", w.viewers, w.load)
	looking, done := context.WithCancel(ctx)
	defer done()
	var viewers []*watching
	var streams sync.WaitGroup
	defer streams.Wait()
	defer done()
	failed := make(chan error, w.viewers)
	for i := range w.viewers {
		// Half look at the begin of the fleet, the others each at something else.
		path, v := "/", &watching{devices: []int{i % 50}, waits: map[string]time.Time{}}
		if i%2 == 1 {
			line := i % 100
			path, v.devices = fmt.Sprint("/?label=line%3D", line), []int{line}
		}
		cookie := w.cookies[i/perUser]
		page, _, _, err := w.get(ctx, path, cookie)
		if err != nil {
			return f, err
		}
		m := liveAt.FindSubmatch(page)
		if m == nil {
			return f, fmt.Errorf("%s has no stream", path)
		}
		viewers = append(viewers, v)
		streams.Go(func() {
			if err := v.read(looking, w, strings.ReplaceAll(string(m[1]), "&amp;", "&"), cookie); err != nil && looking.Err() == nil {
				failed <- err
			}
		})
	}
	before, err := w.controller.CPUTime()
	if err != nil {
		return f, err
	}
	began, sent := time.Now(), w.sent.Load()
	probe := int64(0)
	tick := time.NewTicker(500 * time.Millisecond)
	defer tick.Stop()
	for n := 0; time.Since(began) < w.load; n++ {
		select {
		case <-ctx.Done():
			return f, ctx.Err()
		case err := <-failed:
			return f, fmt.Errorf("a stream ended: %w", err)
		case <-tick.C:
		}
		// A device of each of some viewers begins to have another version.
		for k := range 5 {
			v := viewers[(n*5+k)%len(viewers)]
			i := v.devices[0]
			probe++
			v.mu.Lock()
			v.waits[fmt.Sprintf("probe:%d<", probe)] = time.Now()
			v.mu.Unlock()
			d := w.devices[i]
			d.mu.Lock()
			d.probe = probe
			d.mu.Unlock()
			if err := w.report(i, d); err != nil {
				return f, err
			}
		}
		path := paths[n%len(paths)]
		_, size, first, err := w.get(ctx, path, w.cookies[n%len(w.cookies)])
		if err != nil {
			return f, err
		}
		if f.ttfb = append(f.ttfb, first); first >= slices.Max(f.ttfb) {
			f.worst = path
		}
		f.next = max(f.next, size)
	}
	took := time.Since(began)
	for end := time.Now().Add(10 * time.Second); slices.ContainsFunc(viewers, (*watching).waiting) && time.Now().Before(end); {
		<-tick.C // what is on its way comes
	}
	after, err := w.controller.CPUTime()
	if err != nil {
		return f, err
	}
	f.cpu, f.messages = (after-before).Seconds()/time.Since(began).Seconds(), float64(w.sent.Load()-sent)/took.Seconds()
	for _, v := range viewers {
		v.mu.Lock()
		f.live, f.missed = append(f.live, v.took...), f.missed+len(v.waits)
		v.mu.Unlock()
	}
	f.rss, err = w.controller.PeakMemory()
	return f, err
}
