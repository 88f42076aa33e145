package controller

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/dunlin/dunlin/controller/registry"
	"github.com/dunlin/dunlin/controller/store"
	"github.com/dunlin/dunlin/internal/program"
)

// A backup is a tar archive: backupHeader first, then the files of the data
// folder under their names there, and backupSums, which names all of those
// with their SHA-256, last.
const (
	backupFormat = 1
	backupHeader = "dunlin-backup.json"
	backupSums   = "SHA256SUMS"
	// restoring is the folder in the data folder that holds what is being
	// restored until it is whole.
	restoring = "restoring"
)

// The limits of what is restored.
const (
	maxBackupHeader = 64 << 10
	maxBackupSums   = 1 << 30
	maxBackupFiles  = 10_000_000
	maxBackupName   = 1024
	maxSmallFile    = 1 << 20 // of a file of keys or certificates
)

// backupKeys are the folders and files that hold keys, certificates and the
// administrator's token. A store and its keys belong together.
var backupKeys = []string{authoritiesFolder, keysFolder, acmeFolder, AdminTokenFile}

type backupInfo struct {
	Format      int       `json:"format"`
	CreatedAt   time.Time `json:"createdAt"`
	Program     string    `json:"program"` // version of the one that made it
	Schema      int       `json:"schema"`
	Incarnation string    `json:"incarnation"`
}

// BackupConfig is what Backup and Restore go by.
type BackupConfig struct {
	Data string // the controller's folder
	File string // the backup's
}

// LoadBackupConfig is the LoadConfig of Backup and of Restore, which verb says.
func LoadBackupConfig(verb string, args []string, getenv func(string) string, output io.Writer) (BackupConfig, error) {
	c := DefaultConfig()
	b := BackupConfig{}
	notes := "Writes a copy of everything that the controller keeps into FILE, also while it runs.\nIt holds private keys: keep it secret. Run it as the controller's user."
	if verb == "restore" {
		notes = "Makes the folder --data, which must be empty or missing, of the backup FILE.\nRun it as the controller's user."
	}
	err := program.Source{
		Program: "dunlin-controller " + verb, Synopsis: "FILE", Notes: notes, Prefix: environment, Args: args, Getenv: getenv, Help: output,
		Arguments: func(args []string) error {
			if len(args) != 1 {
				return fmt.Errorf("%d arguments, there must be 1: the FILE", len(args))
			}
			b.File = args[0]
			return nil
		},
	}.Load(c.settings(), &c, nil)
	if err == nil && c.Data == "" {
		err = fmt.Errorf("%w: data is missing", program.ErrUsage)
	}
	if errors.Is(err, flag.ErrHelp) {
		return b, err
	}
	b.Data = c.Data
	return b, err
}

// Backup writes one state of a controller's data to c.File, mode 0600, at once
// or not at all. The controller may run. What is in it: the store, the keys,
// the administrator's token, and all that the versions in the store refer to
// in the registry.
func Backup(ctx context.Context, c BackupConfig) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("back up %s: %w", c.Data, err)
		}
	}()
	source := filepath.Join(c.Data, storeFile)
	if _, err := os.Stat(source); err != nil {
		return err
	}
	parent := filepath.Dir(c.File)
	work, err := os.MkdirTemp(parent, ".dunlin-backup-*") // mode 0700
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(work)) }()
	snapshot := filepath.Join(work, storeFile)
	keys, copied, err := consistent(ctx, c.Data, source, snapshot)
	if err != nil {
		return err
	}
	var wanted []registry.Manifest
	for _, m := range copied.Manifests {
		wanted = append(wanted, registry.Manifest{Model: m.Model, Digest: digest.Digest(m.Digest)})
	}
	root := filepath.Join(c.Data, registryFolder)
	blobs, err := registry.Files(root, wanted)
	if err != nil {
		return fmt.Errorf("registry: %w", err)
	}
	f, err := os.OpenFile(filepath.Join(work, "backup"), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	err = writeBackup(ctx, f, backupInfo{Format: backupFormat, CreatedAt: time.Now().UTC(), Program: program.Version(), Schema: copied.Schema, Incarnation: copied.Incarnation}, snapshot, keys, root, blobs)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), c.File); err != nil {
		return err
	}
	return syncFolder(parent)
}

// consistent copies the store, and gives the files of keys that belong to it:
// those that were the same before and after.
func consistent(ctx context.Context, data, source, snapshot string) (map[string][]byte, store.Copied, error) {
	for try := 0; ; try++ {
		before, err := readKeys(data)
		if err != nil {
			return nil, store.Copied{}, err
		}
		copied, err := store.Copy(ctx, source, snapshot)
		if err != nil {
			return nil, copied, err
		}
		after, err := readKeys(data)
		if err != nil {
			return nil, copied, err
		}
		if maps.EqualFunc(before, after, bytes.Equal) {
			return after, copied, nil
		}
		if try == 5 {
			return nil, copied, errors.New("the keys change all the time; try again later")
		}
		if err := os.Remove(snapshot); err != nil {
			return nil, copied, err
		}
	}
}

// readKeys reads the files of backupKeys, by their names in the data folder.
func readKeys(data string) (map[string][]byte, error) {
	files := map[string][]byte{}
	for _, top := range backupKeys {
		err := filepath.WalkDir(filepath.Join(data, top), func(file string, e fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) {
				return nil // there is none, or it went meanwhile
			}
			if err != nil || !e.Type().IsRegular() || strings.HasPrefix(e.Name(), ".new-") {
				return err
			}
			name, err := filepath.Rel(data, file)
			if err != nil {
				return err
			}
			b, err := readSmall(file)
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			files[filepath.ToSlash(name)] = b
			return err
		})
		if err != nil {
			return nil, err
		}
	}
	return files, nil
}

func readSmall(file string) ([]byte, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxSmallFile+1))
	if err == nil && len(b) > maxSmallFile {
		err = fmt.Errorf("%s has more than %d bytes", file, maxSmallFile)
	}
	return b, err
}

func writeBackup(ctx context.Context, w io.Writer, info backupInfo, snapshot string, keys map[string][]byte, root string, blobs []string) error {
	buffered := bufio.NewWriterSize(w, 1<<20)
	t := tar.NewWriter(buffered)
	var sums strings.Builder
	// add writes one entry, of exactly size bytes.
	add := func(name string, size int64, r io.Reader) (sum [sha256.Size]byte, err error) {
		if err := ctx.Err(); err != nil {
			return sum, err
		}
		if err := t.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Size: size, Mode: 0o600, ModTime: info.CreatedAt, Format: tar.FormatPAX}); err != nil {
			return sum, err
		}
		h := sha256.New()
		if _, err := io.Copy(io.MultiWriter(t, h), io.LimitReader(r, size)); err != nil {
			return sum, fmt.Errorf("%s: %w", name, err)
		}
		h.Sum(sum[:0])
		fmt.Fprintf(&sums, "%x  %s\n", sum, name)
		return sum, nil
	}
	addFile := func(name, file string) (sum [sha256.Size]byte, err error) {
		f, err := os.Open(file)
		if err != nil {
			return sum, err
		}
		defer f.Close()
		size, err := f.Stat()
		if err != nil {
			return sum, err
		}
		return add(name, size.Size(), f)
	}
	head, err := json.Marshal(info)
	if err != nil {
		return err
	}
	if _, err := add(backupHeader, int64(len(head)), bytes.NewReader(head)); err != nil {
		return err
	}
	if _, err := addFile(storeFile, snapshot); err != nil {
		return err
	}
	for _, name := range slices.Sorted(maps.Keys(keys)) {
		if _, err := add(name, int64(len(keys[name])), bytes.NewReader(keys[name])); err != nil {
			return err
		}
	}
	for _, name := range blobs {
		sum, err := addFile(path.Join(registryFolder, name), filepath.Join(root, filepath.FromSlash(name)))
		if err != nil {
			return err
		}
		if want, named := registry.FileDigest(name); named && want.Algorithm() == digest.SHA256 && want.Encoded() != hex.EncodeToString(sum[:]) {
			return fmt.Errorf("registry: blob %s is damaged: its content has the SHA-256 %x", want, sum)
		}
	}
	all := sums.String()
	if _, err := add(backupSums, int64(len(all)), strings.NewReader(all)); err != nil {
		return err
	}
	return errors.Join(t.Close(), buffered.Flush())
}

// Restore makes c.Data, which must be empty or missing, of the backup c.File.
// Nothing of it counts before all of it is there and is what the backup's sums
// say. The store gets a new incarnation.
func Restore(ctx context.Context, c BackupConfig) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("restore %s: %w", c.File, err)
		}
	}()
	f, err := os.Open(c.File)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := os.MkdirAll(c.Data, 0o700); err != nil {
		return err
	}
	lock, err := program.LockFolder(c.Data)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, lock.Close()) }()
	if err := checkEmpty(c.Data); err != nil {
		return err
	}
	work := filepath.Join(c.Data, restoring)
	if err := os.Mkdir(work, 0o700); err != nil {
		return err
	}
	whole := false
	defer func() {
		if !whole {
			err = errors.Join(err, os.RemoveAll(work))
		}
	}()
	if err := unpack(ctx, bufio.NewReaderSize(f, 1<<20), work); err != nil {
		return err
	}
	if _, err := store.Restored(ctx, filepath.Join(work, storeFile), store.Options{}); err != nil {
		return err
	}
	if err := syncFolders(work); err != nil {
		return err
	}
	whole = true
	entries, err := os.ReadDir(work)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := os.Rename(filepath.Join(work, e.Name()), filepath.Join(c.Data, e.Name())); err != nil {
			return err
		}
	}
	if err := syncFolder(c.Data); err != nil {
		return err
	}
	// From here on a controller starts with it.
	return errors.Join(os.Remove(work), syncFolder(c.Data))
}

// checkEmpty says what is in a folder beside its lock.
func checkEmpty(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.Name() != "lock" && e.Name() != "lost+found" {
			return fmt.Errorf("%s is not empty: it has %s", dir, e.Name())
		}
	}
	return nil
}

// checkRestored says whether a restoration of a data folder was cut short.
func checkRestored(data string) error {
	_, err := os.Stat(filepath.Join(data, restoring))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	}
	return fmt.Errorf("data folder %s: restoring it was cut short; empty it and run: dunlin-controller restore", data)
}

// unpack writes the files of a backup into dir, durably, and checks that they
// are all and what they should be.
func unpack(ctx context.Context, r io.Reader, dir string) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	t := tar.NewReader(r)
	sums := map[string]string{}
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		h, err := t.Next()
		if err == io.EOF {
			return errors.New("it is cut short: its sums are missing")
		}
		if err != nil {
			return err
		}
		if h.Typeflag != tar.TypeReg {
			return fmt.Errorf("%.200q is no regular file", h.Name)
		}
		if len(sums) == 0 && h.Name != backupHeader {
			return fmt.Errorf("it is no backup of a controller: it begins with %.200q", h.Name)
		}
		if _, twice := sums[h.Name]; twice {
			return fmt.Errorf("%.200q is in it twice", h.Name)
		}
		if len(sums) >= maxBackupFiles {
			return fmt.Errorf("it has more than %d files", maxBackupFiles)
		}
		sum := sha256.New()
		switch h.Name {
		case backupHeader:
			b, err := readEntry(t, h, maxBackupHeader, sum)
			if err != nil {
				return err
			}
			var info backupInfo
			if err := json.Unmarshal(b, &info); err != nil {
				return fmt.Errorf("%s: %w", backupHeader, err)
			}
			if info.Format != backupFormat {
				return fmt.Errorf("its format is %d, this program knows %d", info.Format, backupFormat)
			}
		case backupSums:
			b, err := readEntry(t, h, maxBackupSums, sum)
			if err != nil {
				return err
			}
			if err := checkSums(string(b), sums); err != nil {
				return err
			}
			if _, err := t.Next(); err != io.EOF {
				return fmt.Errorf("there is something after %s", backupSums)
			}
			if _, ok := sums[storeFile]; !ok {
				return fmt.Errorf("it lacks %s", storeFile)
			}
			return nil
		default:
			if err := checkBackupName(h.Name); err != nil {
				return err
			}
			if err := unpackFile(root, h, t, sum); err != nil {
				return fmt.Errorf("%s: %w", h.Name, err)
			}
		}
		sums[h.Name] = hex.EncodeToString(sum.Sum(nil))
	}
}

func readEntry(t *tar.Reader, h *tar.Header, limit int64, sum hash.Hash) ([]byte, error) {
	if h.Size > limit {
		return nil, fmt.Errorf("%s has %d bytes, the limit is %d", h.Name, h.Size, limit)
	}
	return io.ReadAll(io.TeeReader(t, sum))
}

// checkBackupName says whether a file belongs into a data folder.
func checkBackupName(name string) error {
	top, _, below := strings.Cut(name, "/")
	known := name == storeFile || name == AdminTokenFile || below && slices.Contains([]string{authoritiesFolder, keysFolder, acmeFolder, registryFolder}, top)
	if !known || len(name) > maxBackupName || !filepath.IsLocal(name) || path.Clean(name) != name {
		return fmt.Errorf("%.200q is no file of a controller's data", name)
	}
	return nil
}

func unpackFile(root *os.Root, h *tar.Header, r io.Reader, sum hash.Hash) error {
	if err := root.MkdirAll(path.Dir(h.Name), 0o700); err != nil {
		return err
	}
	f, err := root.OpenFile(h.Name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(io.MultiWriter(f, sum), r)
	return errors.Join(err, f.Sync(), f.Close())
}

// checkSums holds the sums that a backup names against those of what is in it.
func checkSums(text string, have map[string]string) error {
	named := 0
	for line := range strings.Lines(text) {
		want, name, ok := strings.Cut(strings.TrimSuffix(line, "\n"), "  ")
		if !ok {
			return fmt.Errorf("%s: %.200q is no line of it", backupSums, line)
		}
		switch got, there := have[name]; {
		case !there:
			return fmt.Errorf("it lacks %.200q", name)
		case got != want:
			return fmt.Errorf("%.200q is damaged: its SHA-256 is %s, not %.64s", name, got, want)
		}
		named++
	}
	if named != len(have) {
		return fmt.Errorf("%s names %d files, there are %d", backupSums, named, len(have))
	}
	return nil
}

func syncFolders(dir string) error {
	return filepath.WalkDir(dir, func(p string, e fs.DirEntry, err error) error {
		if err != nil || !e.IsDir() {
			return err
		}
		return syncFolder(p)
	})
}

func syncFolder(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}
