package controller

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/dunlin/dunlin/controller/store"
	"github.com/dunlin/dunlin/internal/link"
	v1 "github.com/dunlin/dunlin/proto/dunlin/v1"
	v1connect "github.com/dunlin/dunlin/proto/dunlin/v1/dunlinv1connect"
)

func deploy(version string) string {
	return "apiVersion: dunlin/v1\nkind: Deployment\nmetadata: {name: digits}\nspec: {model: digits, version: " + version + ", selector: {}}\n"
}

// sendEvents sends events of an outbox and waits until the last is kept.
func sendEvents(t *testing.T, d *device, first, last uint64) {
	t.Helper()
	batch := &v1.EventBatch{OutboxId: "outbox"}
	for n := first; n <= last; n++ {
		batch.Events = append(batch.Events, &v1.Event{Sequence: n, At: timestamppb.Now(), Kind: "test", Severity: v1.Severity_SEVERITY_INFO})
	}
	must(t, d.Send(link.Events, batch))
	inbox(t, d, func(c *v1.Command) bool { return c.GetEventAck().GetSequence() >= last })
}

// TestBackup restores a copy that was made while the controller ran: the
// device follows the restored desired state, its events are taken without loss
// or doubling, and the models are there.
func TestBackup(t *testing.T) {
	w := start(t, t.TempDir())
	w.push("digits", "1", digits)
	w.push("digits", "2", strings.Replace(digits, "v1", "v2", 1))
	dev := w.join("dev")
	objects := v1connect.NewObjectServiceClient(client, w.URL, w.auth())
	call(t, objects.Apply, &v1.ApplyRequest{Documents: deploy("1")})
	d := w.connect(w.Broker, dev)
	desires := func(version int64) func(*v1.Desired) bool {
		return func(m *v1.Desired) bool {
			doc := document(t, m)
			return len(doc.Versions) == 1 && doc.Versions[0].Version == version
		}
	}
	inbox(t, d, desires(1))
	sendEvents(t, d, 1, 3)

	file := filepath.Join(t.TempDir(), "backup.tar")
	must(t, os.WriteFile(file, []byte("an older one"), 0o644))
	must(t, Backup(t.Context(), BackupConfig{Data: w.data, File: file}))
	info, err := os.Stat(file)
	must(t, err)
	if info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v", info.Mode())
	}
	if left, err := os.ReadDir(filepath.Dir(file)); err != nil || len(left) != 1 {
		t.Errorf("beside the backup lies %v, %v", left, err)
	}

	// What comes later is not in it.
	call(t, objects.Apply, &v1.ApplyRequest{Documents: deploy("2")})
	later := inbox(t, d, desires(2))
	sendEvents(t, d, 4, 5)
	d.cancel()
	<-d.done
	must(t, w.stop())

	data := filepath.Join(t.TempDir(), "restored")
	must(t, Restore(t.Context(), BackupConfig{Data: data, File: file}))
	r := start(t, data)
	if r.token != w.token {
		t.Error("the administrator's token is another one")
	}
	d = r.connect(r.Broker, dev)
	back := inbox(t, d, desires(1))
	if back.Generation.Incarnation == later.Generation.Incarnation {
		t.Error("the restored store has the incarnation of the one before")
	}
	// The outbox goes on after what the store before had acknowledged; then it
	// is sent again, as it is where an acknowledgement is lost.
	sendEvents(t, d, 6, 7)
	sendEvents(t, d, 6, 8)
	events := call(t, v1connect.NewDeviceServiceClient(client, r.URL, r.auth()).ListEvents, &v1.ListEventsRequest{Device: "dev"}).Events
	var got []uint64
	for _, e := range events {
		got = append(got, e.Event.Sequence)
		if (e.Event.Kind == store.GapKind) != (e.Event.Sequence == 5) {
			t.Errorf("event %v", e.Event)
		}
	}
	if want := []uint64{8, 7, 6, 5, 3, 2, 1}; !slices.Equal(got, want) {
		t.Errorf("events %v, want %v", got, want)
	}
	// What has been taken up goes on as ever: a hole is waited for.
	must(t, d.Send(link.Events, &v1.EventBatch{OutboxId: "outbox", Events: []*v1.Event{{Sequence: 10, Kind: "test"}}}))
	inbox(t, d, func(c *v1.Command) bool { return c.GetEventAck().GetSequence() == 8 })

	resp, err := r.https(dev).Get(r.DeviceURL + "/v2/digits/manifests/1")
	must(t, err)
	manifest, err := io.ReadAll(resp.Body)
	must(t, err)
	must(t, resp.Body.Close())
	if resp.StatusCode != http.StatusOK || !bytes.Contains(manifest, []byte("layers")) {
		t.Errorf("manifest after the restoration: %s %s", resp.Status, manifest)
	}
	for _, v := range call(t, v1connect.NewModelServiceClient(client, r.URL, r.auth()).ListModels, &v1.ListModelsRequest{}).Versions {
		var index ocispec.Index
		_, text := r.do(http.MethodGet, "/v2/digits/referrers/"+v.Digest, nil, "")
		if err := json.Unmarshal(text, &index); err != nil || len(index.Manifests) != 1 {
			t.Fatalf("signatures of version %d: %s, %v", v.Version, text, err)
		}
		if resp, text := r.do(http.MethodGet, "/v2/digits/manifests/"+index.Manifests[0].Digest.String(), nil, ""); resp.StatusCode != http.StatusOK {
			t.Errorf("signature of version %d: %s %s", v.Version, resp.Status, text)
		}
	}
	page := call(t, v1connect.NewAuditServiceClient(client, r.URL, r.auth()).ListAudit, &v1.ListAuditRequest{})
	if !slices.ContainsFunc(page.Records, func(a *v1.AuditRecord) bool {
		return a.Action == "store.restore" && a.After == back.Generation.Incarnation
	}) {
		t.Errorf("the restoration is not in the audit log")
	}
	// Further pushes find what is there.
	r.push("digits", "3", digits)
}

// entry is one of a backup.
type entry struct {
	name    string
	content []byte
	mode    byte // type; 0: a regular file
}

func readBackup(t *testing.T, file string) []entry {
	t.Helper()
	b, err := os.ReadFile(file)
	must(t, err)
	var all []entry
	for r := tar.NewReader(bytes.NewReader(b)); ; {
		h, err := r.Next()
		if err == io.EOF {
			return all
		}
		must(t, err)
		content, err := io.ReadAll(r)
		must(t, err)
		all = append(all, entry{h.Name, content, 0})
	}
}

func writeEntries(t *testing.T, all []entry) string {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range all {
		h := &tar.Header{Name: e.name, Size: int64(len(e.content)), Typeflag: tar.TypeReg, Mode: 0o600}
		if e.mode != 0 {
			h.Typeflag, h.Linkname, h.Size = e.mode, "/etc/passwd", 0
		}
		must(t, w.WriteHeader(h))
		if h.Size > 0 {
			_, err := w.Write(e.content)
			must(t, err)
		}
	}
	must(t, w.Close())
	file := filepath.Join(t.TempDir(), "changed.tar")
	must(t, os.WriteFile(file, b.Bytes(), 0o600))
	return file
}

// TestRestoreRefuses: what is not whole and true leaves an empty folder.
func TestRestoreRefuses(t *testing.T) {
	w := start(t, t.TempDir())
	w.push("digits", "1", digits)
	good := filepath.Join(t.TempDir(), "backup.tar")
	must(t, Backup(t.Context(), BackupConfig{Data: w.data, File: good}))
	must(t, w.stop())
	all := readBackup(t, good)
	find := func(part string) int {
		i := slices.IndexFunc(all, func(e entry) bool { return strings.Contains(e.name, part) })
		if i < 0 {
			t.Fatalf("the backup has no %s", part)
		}
		return i
	}
	change := func(do func([]entry) []entry) string { return writeEntries(t, do(slices.Clone(all))) }
	flip := func(part string) string {
		return change(func(e []entry) []entry {
			i := find(part)
			e[i].content = bytes.Clone(e[i].content)
			e[i].content[len(e[i].content)/2] ^= 1
			return e
		})
	}
	raw, err := os.ReadFile(good)
	must(t, err)
	cut := filepath.Join(t.TempDir(), "cut.tar")
	must(t, os.WriteFile(cut, raw[:len(raw)/2], 0o600))
	for name, c := range map[string]struct{ file, says string }{
		"store damaged":   {flip(storeFile), "is damaged"},
		"blob damaged":    {flip("/blobs/"), "is damaged"},
		"key damaged":     {flip(keysFolder + "/"), "is damaged"},
		"header damaged":  {change(func(e []entry) []entry { e[0].content = []byte(`{"format":9}`); return e }), "its format is 9"},
		"cut":             {cut, ""},
		"sums missing":    {change(func(e []entry) []entry { return e[:len(e)-1] }), "cut short"},
		"file missing":    {change(func(e []entry) []entry { return slices.Delete(e, 2, 3) }), "it lacks"},
		"file twice":      {change(func(e []entry) []entry { return slices.Insert(e, 2, e[1]) }), "in it twice"},
		"file added":      {change(func(e []entry) []entry { return slices.Insert(e, 2, entry{name: "ca/x"}) }), "names"},
		"file behind":     {change(func(e []entry) []entry { return append(e, entry{name: "ca/x"}) }), "after"},
		"outside":         {change(func(e []entry) []entry { return slices.Insert(e, 2, entry{name: "ca/../../x"}) }), "no file of a controller's data"},
		"absolute":        {change(func(e []entry) []entry { return slices.Insert(e, 2, entry{name: "/ca/x"}) }), "no file of a controller's data"},
		"unknown":         {change(func(e []entry) []entry { return slices.Insert(e, 2, entry{name: "controller.db-wal"}) }), "no file of a controller's data"},
		"link":            {change(func(e []entry) []entry { return slices.Insert(e, 2, entry{"ca/x", nil, tar.TypeSymlink}) }), "no regular file"},
		"something else":  {writeEntries(t, all[1:]), "no backup of a controller"},
		"nothing at all":  {writeEntries(t, nil), "cut short"},
		"absent":          {filepath.Join(t.TempDir(), "absent"), "no such file"},
		"none of its own": {digits, ""},
	} {
		t.Run(name, func(t *testing.T) {
			data := filepath.Join(t.TempDir(), "data")
			err := Restore(t.Context(), BackupConfig{Data: data, File: c.file})
			if err == nil || !strings.Contains(err.Error(), c.says) {
				t.Fatalf("got %v, want %q", err, c.says)
			}
			if err := checkEmpty(data); err != nil && !errors.Is(err, fs.ErrNotExist) {
				t.Error(err)
			}
		})
	}
	if err := Restore(t.Context(), BackupConfig{Data: w.data, File: good}); err == nil || !strings.Contains(err.Error(), "is not empty") {
		t.Errorf("over another controller's data: %v", err)
	}
	// A restoration that was cut short is no controller's data yet.
	data := t.TempDir()
	must(t, os.Mkdir(filepath.Join(data, restoring), 0o700))
	c := DefaultConfig()
	c.Data = data
	if err := Run(t.Context(), c); err == nil || !strings.Contains(err.Error(), "cut short") {
		t.Errorf("a controller over half of a restoration: %v", err)
	}
}

// TestBackupRefuses: what is damaged is found out when the copy is made, and
// the copy before stays.
func TestBackupRefuses(t *testing.T) {
	w := start(t, t.TempDir())
	w.push("digits", "1", digits)
	must(t, w.stop())
	file := filepath.Join(t.TempDir(), "backup.tar")
	must(t, os.WriteFile(file, []byte("older"), 0o600))
	var blob string
	must(t, filepath.WalkDir(filepath.Join(w.data, registryFolder), func(p string, e fs.DirEntry, err error) error {
		if err == nil && e.Name() == "data" {
			if info, err := e.Info(); err != nil || info.Size() > 1000 {
				blob = p
			}
		}
		return err
	}))
	content, err := os.ReadFile(blob)
	must(t, err)
	damaged := bytes.Clone(content)
	damaged[len(damaged)-1] ^= 1
	must(t, os.WriteFile(blob, damaged, 0o600))
	if err := Backup(t.Context(), BackupConfig{Data: w.data, File: file}); err == nil || !strings.Contains(err.Error(), "is damaged") {
		t.Errorf("damaged: %v", err)
	}
	must(t, os.Remove(blob))
	if err := Backup(t.Context(), BackupConfig{Data: w.data, File: file}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("missing: %v", err)
	}
	if err := Backup(t.Context(), BackupConfig{Data: t.TempDir(), File: file}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no controller's data: %v", err)
	}
	if b, err := os.ReadFile(file); err != nil || string(b) != "older" {
		t.Errorf("the copy before is %q, %v", b, err)
	}
	if left, err := os.ReadDir(filepath.Dir(file)); err != nil || len(left) != 1 {
		t.Errorf("beside the backup lies %v, %v", left, err)
	}
}
