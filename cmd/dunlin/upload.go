package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	// uploadChunk is how much of a blob one request carries: what is sent
	// again at most when a connection breaks and the registry kept nothing.
	uploadChunk = 8 << 20
	// uploadTries is how often in a row one step may fail; retryBase and
	// retryMost bound the random wait before the next try.
	uploadTries = 6
	retryBase   = 200 * time.Millisecond
	retryMost   = 5 * time.Second
	// stepTimeout bounds one request. A chunk on a link of 15 kB/s takes as
	// long.
	stepTimeout = 10 * time.Minute
	// maxErrorBody bounds what is read of an error's text.
	maxErrorBody = 64 << 10
)

// uploader pushes blobs and manifests to one repository of an OCI registry.
type uploader struct {
	http          *http.Client
	base          string // URL of the repository: https://host/v2/name
	authorization string
}

// statusError is a registry's answer that is not the one hoped for.
type statusError struct {
	status  int
	message string
}

func (e statusError) Error() string {
	if e.message == "" {
		return fmt.Sprintf("the registry answers %d %s", e.status, http.StatusText(e.status))
	}
	return e.message
}

// errLost says that the registry has no such upload any more.
var errLost = errors.New("the registry lost the upload")

func (u *uploader) do(ctx context.Context, method, url string, body io.Reader, size int64, set http.Header, want int) (*http.Response, error) {
	ctx, cancel := context.WithTimeout(ctx, stepTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, url, body)
	if err != nil {
		return nil, err
	}
	maps.Copy(req.Header, set)
	req.Header.Set("Authorization", u.authorization)
	if size == 0 {
		req.Body = http.NoBody
	}
	req.ContentLength = size
	res, err := u.http.Do(req)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	b, readErr := io.ReadAll(io.LimitReader(res.Body, maxErrorBody))
	if res.StatusCode == want {
		return res, nil
	}
	if readErr != nil {
		return nil, readErr
	}
	var e struct{ Errors []struct{ Message string } }
	message := ""
	if json.Unmarshal(b, &e) == nil && len(e.Errors) > 0 {
		message = e.Errors[0].Message
	}
	err = statusError{res.StatusCode, message}
	if res.StatusCode == http.StatusUnauthorized || res.StatusCode == http.StatusForbidden {
		return nil, codeError{code: exitNotAllowed, err: err}
	}
	return nil, err
}

// put uploads a blob unless the registry has it, and goes on after broken
// connections where it stopped.
func (u *uploader) put(ctx context.Context, b blob, p *progress) error {
	var has bool
	err := retry(ctx, func() error {
		_, err := u.do(ctx, http.MethodHead, u.base+"/blobs/"+b.digest.String(), nil, 0, nil, http.StatusOK)
		if e, ok := errors.AsType[statusError](err); ok && e.status == http.StatusNotFound {
			return nil
		}
		has = err == nil
		return err
	})
	if err != nil {
		return err
	}
	if has {
		p.reuse(b.size)
		return nil
	}
	r, closer, err := b.open()
	if err != nil {
		return err
	}
	defer closer.Close()
	for try := 1; ; try++ {
		err := u.send(ctx, b, r, p)
		if !errors.Is(err, errLost) || try == uploadTries {
			return err
		}
	}
}

// send is one upload from its start to its end.
func (u *uploader) send(ctx context.Context, b blob, r io.ReaderAt, p *progress) error {
	s := &session{u: u, blob: b, r: r}
	sent := int64(0)
	// Progress counts what the registry has; an upload that was lost is
	// taken back.
	account := func() {
		p.add(s.offset - sent)
		sent = s.offset
	}
	err := retry(ctx, func() error { return s.start(ctx) })
	for err == nil && s.offset < b.size {
		err = retry(ctx, func() error { return s.chunk(ctx) })
		account()
	}
	if err == nil {
		err = retry(ctx, func() error { return s.finish(ctx) })
	}
	if err != nil {
		s.offset = 0
		account()
	}
	return err
}

// session is the state of an upload.
type session struct {
	u        *uploader
	blob     blob
	r        io.ReaderAt
	location string
	offset   int64 // what the registry has
	unsure   bool  // a request failed: the registry may have more than offset
}

func (s *session) start(ctx context.Context) error {
	return s.step(ctx, http.MethodPost, s.u.base+"/blobs/uploads/", 0, http.StatusAccepted)
}

// chunk sends the next bytes. After a failure it first asks how far the
// registry got.
func (s *session) chunk(ctx context.Context) error {
	if s.unsure {
		if err := s.ask(ctx); err != nil || s.offset >= s.blob.size {
			return err
		}
	}
	n := min(uploadChunk, s.blob.size-s.offset)
	s.unsure = true
	if err := s.step(ctx, http.MethodPatch, s.location, n, http.StatusAccepted); err != nil {
		return err
	}
	s.unsure = false
	s.offset += n
	return nil
}

func (s *session) ask(ctx context.Context) error {
	if err := s.step(ctx, http.MethodGet, s.location, 0, http.StatusNoContent); err != nil {
		return err
	}
	s.unsure = false
	return nil
}

func (s *session) finish(ctx context.Context) error {
	l, err := url.Parse(s.location)
	if err != nil {
		return err
	}
	q := l.Query()
	q.Set("digest", s.blob.digest.String())
	l.RawQuery = q.Encode()
	return s.step(ctx, http.MethodPut, l.String(), 0, http.StatusCreated)
}

// step makes one request of the upload, with n bytes from offset on.
func (s *session) step(ctx context.Context, method, to string, n int64, want int) error {
	set := http.Header{"Content-Type": {"application/octet-stream"}}
	var body io.Reader
	if n > 0 {
		set.Set("Content-Range", fmt.Sprintf("%d-%d", s.offset, s.offset+n-1))
		body = io.NewSectionReader(s.r, s.offset, n)
	}
	res, err := s.u.do(ctx, method, to, body, n, set, want)
	if e, ok := errors.AsType[statusError](err); ok && method != http.MethodPost {
		switch e.status {
		case http.StatusNotFound, http.StatusRequestedRangeNotSatisfiable, http.StatusBadRequest:
			return fmt.Errorf("%w: %w", errLost, err)
		}
	}
	if err != nil {
		return err
	}
	if l := res.Header.Get("Location"); l != "" && method != http.MethodPut {
		at, err := res.Request.URL.Parse(l)
		if err != nil {
			return fmt.Errorf("the registry's location %q: %w", l, err)
		}
		if at.Host != res.Request.URL.Host || at.Scheme != res.Request.URL.Scheme {
			return fmt.Errorf("the registry points to another host, %s", at.Host)
		}
		s.location = at.String()
	}
	if method == http.MethodGet {
		_, last, ok := strings.Cut(res.Header.Get("Range"), "-")
		n, err := strconv.ParseInt(last, 10, 64)
		if !ok || err != nil || n < 0 || n >= s.blob.size {
			return fmt.Errorf("%w: it says range %q", errLost, res.Header.Get("Range"))
		}
		// "0-0" stands for nothing too.
		s.offset = n
		if n > 0 {
			s.offset++
		}
	}
	return nil
}

func (u *uploader) putManifest(ctx context.Context, d digest.Digest, b []byte) error {
	return retry(ctx, func() error {
		_, err := u.do(ctx, http.MethodPut, u.base+"/manifests/"+d.String(), bytes.NewReader(b), int64(len(b)),
			http.Header{"Content-Type": {ocispec.MediaTypeImageManifest}}, http.StatusCreated)
		return err
	})
}

// retry does a step again, after a random and growing wait, when it failed
// for a reason that may pass.
func retry(ctx context.Context, step func() error) error {
	for try := 1; ; try++ {
		err := step()
		if err == nil || !mayPass(err) || try == uploadTries || ctx.Err() != nil {
			return err
		}
		most := min(retryBase<<try, retryMost)
		t := time.NewTimer(rand.N(most))
		select {
		case <-ctx.Done():
			t.Stop()
			return ctx.Err()
		case <-t.C:
		}
	}
}

func mayPass(err error) bool {
	if errors.Is(err, errLost) {
		return false
	}
	if e, ok := errors.AsType[statusError](err); ok {
		return e.status >= 500 || e.status == http.StatusTooManyRequests
	}
	_, broken := errors.AsType[*url.Error](err)
	return broken
}
