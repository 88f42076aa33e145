// Package registry is the OCI registry of models: distribution embedded,
// behind Dunlin's own authentication, and every tag that is pushed becomes an
// immutable model version.
package registry

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/distribution/distribution/v3"
	"github.com/distribution/distribution/v3/configuration"
	"github.com/distribution/distribution/v3/registry/handlers"
	"github.com/distribution/distribution/v3/registry/storage"
	"github.com/distribution/distribution/v3/registry/storage/driver/filesystem"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/dunlin/dunlin/controller/identity"
	"github.com/dunlin/dunlin/models"
	"github.com/dunlin/dunlin/models/signing"
)

const (
	// maxManifest bounds a manifest that is pushed; a larger one is refused.
	maxManifest = 4 << 20
	// storageThreads bounds the concurrent file operations of the embedded
	// registry; more wait.
	storageThreads = 64
	// uploadAge is how old an unfinished upload gets before it is deleted,
	// and purgeInterval how often that is looked at.
	uploadAge     = 7 * 24 * time.Hour
	purgeInterval = time.Hour
)

// Config is what a Registry needs.
type Config struct {
	Root       string // folder of the registry's files, made where it is missing
	Auth       *identity.Authenticator
	Refusals   identity.Refusals
	Versions   Versions
	Signatures Signatures
	// Trust gives the trust document by which binaries of the agent count; nil
	// refuses all of them.
	Trust func(context.Context) (*signing.Trust, error)
	// Grace is how long what no version refers to stays; 0: for ever.
	Grace time.Duration
	Log   *slog.Logger
}

// Registry serves the OCI distribution API under /v2/. It is safe for
// concurrent use.
type Registry struct {
	root       string
	auth       *identity.Authenticator
	refusals   identity.Refusals
	versions   Versions
	signatures Signatures
	trust      func(context.Context) (*signing.Trust, error)
	log        *slog.Logger
	app        http.Handler // the embedded registry's own API
	driver     *filesystem.Driver
	namespace  distribution.Namespace // the same storage, for our own use
	grace      time.Duration
	claims     claims
}

// New opens the registry in cfg.Root.
func New(cfg Config) (*Registry, error) {
	root, err := filepath.Abs(cfg.Root)
	if err != nil {
		return nil, fmt.Errorf("registry folder %s: %w", cfg.Root, err)
	}
	if err := os.MkdirAll(root, 0o700); err != nil {
		return nil, fmt.Errorf("make registry folder: %w", err)
	}
	// What an ingestion that was cut short left behind.
	if err := os.RemoveAll(filepath.Join(root, ingestDir)); err != nil {
		return nil, fmt.Errorf("clear registry folder: %w", err)
	}
	secret, err := uploadSecret(filepath.Join(root, "upload-secret"))
	if err != nil {
		return nil, err
	}
	quiet(cfg.Log)

	ctx := context.Background()
	driver := filesystem.New(filesystem.DriverParameters{RootDirectory: root, MaxThreads: storageThreads})
	namespace, err := storage.NewRegistry(ctx, driver)
	if err != nil {
		return nil, fmt.Errorf("open registry: %w", err)
	}
	app := handlers.NewApp(ctx, &configuration.Configuration{
		Storage: configuration.Storage{
			"filesystem": configuration.Parameters{"rootdirectory": root, "maxthreads": storageThreads},
			"redirect":   configuration.Parameters{"disable": true},
			"delete":     configuration.Parameters{"enabled": false},
			// Run purges.
			"maintenance": configuration.Parameters{"uploadpurging": map[any]any{"enabled": false}},
		},
		HTTP: configuration.HTTP{
			Secret: secret,
			// Callers reach the registry by names that it does not know.
			RelativeURLs: true,
		},
	})
	return &Registry{root: root, auth: cfg.Auth, refusals: cfg.Refusals, versions: cfg.Versions, signatures: cfg.Signatures, trust: cfg.Trust, grace: cfg.Grace, log: cfg.Log, app: app, driver: driver, namespace: namespace}, nil
}

// uploadSecret gives the key that the state of an upload is signed with. It
// is kept, so that an upload can go on after a restart.
func uploadSecret(path string) (string, error) {
	b, err := os.ReadFile(path)
	if err == nil && len(b) > 0 {
		return string(b), nil
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("read the key of uploads: %w", err)
	}
	var key [32]byte
	rand.Read(key[:]) // never fails
	s := hex.EncodeToString(key[:])
	temp := path + ".tmp"
	if err := os.WriteFile(temp, []byte(s), 0o600); err != nil {
		return "", fmt.Errorf("write the key of uploads: %w", err)
	}
	if err := os.Rename(temp, path); err != nil {
		return "", fmt.Errorf("write the key of uploads: %w", err)
	}
	return s, nil
}

// Run deletes uploads that were given up, and garbage, now and every hour,
// until ctx ends.
func (r *Registry) Run(ctx context.Context) error {
	t := time.NewTicker(purgeInterval)
	defer t.Stop()
	for {
		r.purge(ctx, time.Now().Add(-uploadAge))
		r.collect(ctx)
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
	}
}

func (r *Registry) collect(ctx context.Context) {
	if r.grace <= 0 {
		return
	}
	c, err := r.Collect(ctx, time.Now().Add(-r.grace))
	if c != (Collected{}) {
		r.log.InfoContext(ctx, "deleted what no version refers to", slog.Int("manifests", c.Manifests), slog.Int("links", c.Links), slog.Int("blobs", c.Blobs), slog.Int64("bytes", c.Bytes))
	}
	if err != nil && ctx.Err() == nil {
		r.log.WarnContext(ctx, "cannot delete what no version refers to", slog.Any("error", err))
	}
}

func (r *Registry) purge(ctx context.Context, olderThan time.Time) {
	// A registry that nobody has pushed to has no folder to look through.
	if _, err := os.Stat(filepath.Join(r.root, filepath.FromSlash(storageDir), "repositories")); err != nil {
		return
	}
	deleted, errs := storage.PurgeUploads(ctx, r.driver, olderThan, true)
	if len(deleted) > 0 {
		r.log.InfoContext(ctx, "deleted unfinished uploads", slog.Int("count", len(deleted)))
	}
	if err := errors.Join(errs...); err != nil && ctx.Err() == nil {
		r.log.WarnContext(ctx, "cannot delete unfinished uploads", slog.Any("error", err))
	}
}

// target is what a request under /v2/ is about.
type target struct {
	model string
	kind  string // "manifests", "blobs", "uploads", "tags", "referrers", "" for /v2/ and /v2/_catalog
	ref   string // tag or digest; the upload's id
}

var errNoRoute = apiError{http.StatusNotFound, "UNSUPPORTED", "no such path in the OCI distribution API"}

// parsePath takes a path of the OCI distribution API apart, and checks that
// its repository can be a model.
func parsePath(path string) (target, error) {
	rest, ok := strings.CutPrefix(path, "/v2/")
	if !ok {
		return target{}, errNoRoute
	}
	if rest == "" || rest == "_catalog" {
		return target{}, nil
	}
	parts := strings.Split(rest, "/")
	n := len(parts)
	var t target
	var name []string
	switch {
	case n >= 4 && parts[n-3] == "blobs" && parts[n-2] == "uploads":
		t, name = target{kind: "uploads", ref: parts[n-1]}, parts[:n-3]
	case n >= 3 && (parts[n-2] == "manifests" || parts[n-2] == "blobs" || parts[n-2] == "referrers"):
		t, name = target{kind: parts[n-2], ref: parts[n-1]}, parts[:n-2]
	case n >= 3 && parts[n-2] == "tags" && parts[n-1] == "list":
		t, name = target{kind: "tags"}, parts[:n-2]
	default:
		return target{}, errNoRoute
	}
	t.model = strings.Join(name, "/")
	if err := models.CheckName(t.model); err != nil {
		return target{}, apiError{http.StatusBadRequest, "NAME_INVALID", "a repository here is a model: " + err.Error()}
	}
	return t, nil
}

// ServeHTTP answers requests under /v2/.
func (r *Registry) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	p, err := r.auth.FromRequest(req)
	req = req.WithContext(identity.WithPrincipal(req.Context(), p))
	if err != nil {
		r.fail(w, req, err)
		return
	}
	t, err := parsePath(req.URL.Path)
	if err == nil {
		err = r.authorize(req, p, t)
	}
	if err != nil {
		r.fail(w, req, err)
		return
	}
	switch {
	case t.kind == "referrers" && (req.Method == http.MethodGet || req.Method == http.MethodHead):
		r.getReferrers(w, req, t)
	case t.kind == "referrers":
		r.fail(w, req, apiError{http.StatusMethodNotAllowed, "UNSUPPORTED", "referrers are only read; a manifest with a subject is one"})
	case t.kind != "manifests":
		release, err := r.relyOnBlobs(req, t)
		if err != nil {
			r.fail(w, req, err)
			return
		}
		defer release()
		r.app.ServeHTTP(w, req)
	case req.Method == http.MethodPut:
		r.putManifest(w, req, t, p)
	default:
		r.getManifest(w, req, t)
	}
}

// relyOnBlobs keeps the collector off the blobs that a request makes, links or
// looks for, until release is called.
func (r *Registry) relyOnBlobs(req *http.Request, t target) (release func(), err error) {
	var blobs []digest.Digest
	switch query := req.URL.Query(); {
	case t.kind == "uploads":
		for _, key := range []string{"digest", "mount"} {
			if d := query.Get(key); d != "" {
				blobs = append(blobs, digest.Digest(d))
			}
		}
	case t.kind == "blobs" && req.Method == http.MethodHead: // who finds it does not push it
		blobs = append(blobs, digest.Digest(t.ref))
	}
	return r.rely(req.Context(), t.model, blobs...)
}

// authorize asks the rules whether p may pull or push; nobody deletes. A device
// reads the models that it is given, and nothing of others.
func (r *Registry) authorize(req *http.Request, p identity.Principal, t target) error {
	action := identity.RegistryPull
	switch method := req.Method; {
	case method == http.MethodDelete && t.kind != "uploads":
		return apiError{http.StatusMethodNotAllowed, "UNSUPPORTED", "model versions are immutable: nothing is deleted"}
	case method != http.MethodGet && method != http.MethodHead, t.kind == "uploads":
		action = identity.RegistryPush
	case req.URL.Path == "/v2/_catalog":
		action = identity.RegistryList
	}
	if t.kind == "" {
		return identity.Allow(p, action)
	}
	return r.given(req.Context(), p, action, t.model)
}

// tagVersion says whether a tag names a version, and which. Other tags are
// just names for what was pushed under them.
func tagVersion(tag string) (version int64, ok bool, err error) {
	if strings.Trim(tag, "0123456789") != "" || tag == "" {
		return 0, false, nil
	}
	n, err := strconv.ParseInt(tag, 10, 64)
	if err != nil || n < 1 || strconv.FormatInt(n, 10) != tag {
		return 0, false, apiError{http.StatusBadRequest, "TAG_INVALID", fmt.Sprintf("tag %q is not a version: versions are 1, 2, 3...", tag)}
	}
	return n, true, nil
}

func checkTag(model, tag string) error {
	name, err := reference.WithName(model)
	if err == nil {
		_, err = reference.WithTag(name, tag)
	}
	if err != nil {
		return apiError{http.StatusBadRequest, "TAG_INVALID", fmt.Sprintf("tag %q: %v", tag, err)}
	}
	return nil
}

func isDigest(ref string) bool { return strings.Contains(ref, ":") }

// getManifest resolves a version's tag by Versions; the rest is the embedded
// registry's.
func (r *Registry) getManifest(w http.ResponseWriter, req *http.Request, t target) {
	if !isDigest(t.ref) {
		version, ok, err := tagVersion(t.ref)
		if err != nil {
			r.fail(w, req, err)
			return
		}
		if ok {
			digest, found, err := r.versions.VersionDigest(req.Context(), t.model, version)
			if err == nil && !found {
				err = apiError{http.StatusNotFound, "MANIFEST_UNKNOWN", fmt.Sprintf("model %s has no version %d", t.model, version)}
			}
			if err != nil {
				r.fail(w, req, err)
				return
			}
			u := *req.URL
			u.Path, u.RawPath = "/v2/"+t.model+"/manifests/"+digest, ""
			req = req.Clone(req.Context())
			req.URL = &u
		}
	}
	if req.Method == http.MethodHead && isDigest(t.ref) { // who finds it does not push it
		release, err := r.relyOnManifest(req.Context(), t.model, digest.Digest(t.ref))
		if err != nil {
			r.fail(w, req, err)
			return
		}
		defer release()
	}
	// The embedded registry hides OCI manifests from clients that do not
	// list their type.
	if a := req.Header.Get("Accept"); a == "" || strings.Contains(a, "*/*") {
		req = req.Clone(req.Context())
		req.Header.Add("Accept", ocispec.MediaTypeImageManifest)
		req.Header.Add("Accept", ocispec.MediaTypeImageIndex)
	}
	r.app.ServeHTTP(w, req)
}

// putManifest stores a manifest that is pushed by digest, a signature if it
// has a subject, and makes one that is pushed by tag a version.
func (r *Registry) putManifest(w http.ResponseWriter, req *http.Request, t target, p identity.Principal) {
	body, err := io.ReadAll(http.MaxBytesReader(w, req.Body, maxManifest))
	if err != nil {
		if _, ok := errors.AsType[*http.MaxBytesError](err); ok {
			err = apiError{http.StatusRequestEntityTooLarge, "SIZE_INVALID", fmt.Sprintf("the manifest is larger than %d bytes", maxManifest)}
		} else {
			err = apiError{http.StatusBadRequest, "MANIFEST_INVALID", "read the manifest: " + err.Error()}
		}
		r.fail(w, req, err)
		return
	}
	if isDigest(t.ref) && refersTo(body) {
		bundle, err := r.putSignature(req.Context(), t, body, p)
		if err != nil {
			r.fail(w, req, err)
			return
		}
		w.Header().Set("OCI-Subject", bundle.String())
		w.Header().Set("Docker-Content-Digest", t.ref)
		w.Header().Set("Location", "/v2/"+t.model+"/manifests/"+t.ref)
		w.WriteHeader(http.StatusCreated)
		return
	}
	if isDigest(t.ref) {
		release, err := r.relyOnPushed(req.Context(), t.model, body)
		if err != nil {
			r.fail(w, req, err)
			return
		}
		defer release()
		req.Body = io.NopCloser(bytes.NewReader(body))
		r.app.ServeHTTP(w, req)
		return
	}
	want, isVersion, err := tagVersion(t.ref)
	if err == nil {
		err = checkTag(t.model, t.ref)
	}
	if err != nil {
		r.fail(w, req, err)
		return
	}
	v, err := r.ingest(req.Context(), pushed{
		model: t.model, mediaType: req.Header.Get("Content-Type"), manifest: body, want: want, by: p.String(),
	})
	if err == nil && !isVersion {
		err = r.tag(req.Context(), t.model, t.ref, v.digest)
	}
	if err != nil {
		r.fail(w, req, err)
		return
	}
	// Clients check that what they pushed is what arrived.
	d := digest.FromBytes(body)
	w.Header().Set("Docker-Content-Digest", d.String())
	w.Header().Set("Location", "/v2/"+t.model+"/manifests/"+d.String())
	w.Header().Set("Dunlin-Version", fmt.Sprintf("%s:%d", t.model, v.version))
	w.WriteHeader(http.StatusCreated)
}
