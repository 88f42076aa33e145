package broker

import (
	"bytes"
	"crypto/pbkdf2"
	"crypto/rand"
	"crypto/sha512"
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/dunlin/dunlin/internal/link"
)

// ControllerUser is the controller's own account at an external broker. It is
// not a name that a device can have.
const ControllerUser = "dunlin.controller"

// MosquittoACL is the text of Mosquitto's ACL file. It holds for any set of
// devices: %u is the name of the one that asks.
const MosquittoACL = `# Who may send and receive what. Names of devices hold no / + #.
user ` + ControllerUser + `
topic read dunlin/v1/+/+/up/+
topic write dunlin/v1/+/+/down/+
topic write ` + link.EpochTopic + `

pattern write dunlin/v1/+/%u/up/+
pattern read dunlin/v1/+/%u/down/+
pattern read ` + link.EpochTopic + `
`

const (
	// mosquittoIterations is what mosquitto_passwd takes. Secrets are 256
	// random bits, which more iterations would make no stronger, and
	// Mosquitto computes them on its only thread at each connect.
	mosquittoIterations = 101
	mosquittoSalt       = 12 // bytes; Mosquitto takes no other length
	// mosquittoQueue and mosquittoQueueBytes bound what waits for one client.
	// Further messages for it are dropped. The controller is one client, and
	// every device may send at the same time.
	mosquittoQueue      = defaultMaxConnections
	mosquittoQueueBytes = 64 << 20
	// maxPIDFile bounds what is read of a PID file.
	maxPIDFile = 32
)

// Mosquitto keeps the accounts of a Mosquitto broker on the same machine.
type Mosquitto struct {
	// PasswordFile is Mosquitto's password_file. It is replaced as a whole,
	// in a folder that the controller may write to and Mosquitto may read
	// from.
	PasswordFile string
	// PIDFile is Mosquitto's pid_file. If empty, Mosquitto is not told of
	// changes.
	PIDFile string
}

// HashPassword gives a secret the form that Mosquitto 2 keeps it in:
// $7$<iterations>$<salt>$<PBKDF2 with SHA-512>.
func HashPassword(secret string) (string, error) {
	salt := make([]byte, mosquittoSalt)
	rand.Read(salt)
	key, err := pbkdf2.Key(sha512.New, secret, salt, mosquittoIterations, sha512.Size)
	if err != nil {
		return "", fmt.Errorf("hash a password for Mosquitto: %w", err)
	}
	enc := base64.StdEncoding
	return fmt.Sprintf("$7$%d$%s$%s", mosquittoIterations, enc.EncodeToString(salt), enc.EncodeToString(key)), nil
}

// Write makes accounts, hashes of HashPassword by name, all that there are:
// those of the devices, and ControllerUser's. Mosquitto then reads them, and
// ends the sessions of accounts that are gone. When Mosquitto cannot be told,
// the error says so and the file is written all the same. One call at a time.
func (m Mosquitto) Write(accounts map[string]string) error {
	var text bytes.Buffer
	for _, name := range slices.Sorted(maps.Keys(accounts)) {
		if name != ControllerUser {
			if err := link.CheckDevice(name); err != nil {
				return fmt.Errorf("account for Mosquitto: %w", err)
			}
		}
		hash := accounts[name]
		if !strings.HasPrefix(hash, "$7$") || strings.ContainsAny(hash, "\r\n:") {
			return fmt.Errorf("account %s for Mosquitto: the password is not hashed", name)
		}
		fmt.Fprintf(&text, "%s:%s\n", name, hash)
	}
	if err := replaceFile(m.PasswordFile, text.Bytes()); err != nil {
		return fmt.Errorf("write the accounts for Mosquitto: %w", err)
	}
	if m.PIDFile == "" {
		return nil
	}
	if err := m.reload(); err != nil {
		return fmt.Errorf("accounts written, but Mosquitto not told: %w", err)
	}
	return nil
}

// replaceFile replaces a file by one with the same mode and owner, or makes
// one with mode 0640. After a crash there is the old or the new one.
func replaceFile(path string, data []byte) error {
	dir := filepath.Dir(path)
	f, err := os.CreateTemp(dir, "."+filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // fails once it is renamed
	defer f.Close()
	mode := fs.FileMode(0o640)
	old, err := os.Stat(path)
	switch {
	case err == nil:
		mode = old.Mode().Perm()
		if err := keepOwner(f, old); err != nil {
			return err
		}
	case !errors.Is(err, fs.ErrNotExist):
		return err
	}
	if err := f.Chmod(mode); err != nil {
		return err
	}
	if _, err := f.Write(data); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// keepOwner gives f the owner and group of an older file.
func keepOwner(f *os.File, old fs.FileInfo) error {
	now, err := f.Stat()
	if err != nil {
		return err
	}
	want, ok1 := old.Sys().(*syscall.Stat_t)
	have, ok2 := now.Sys().(*syscall.Stat_t)
	if !ok1 || !ok2 || want.Uid == have.Uid && want.Gid == have.Gid {
		return nil
	}
	return f.Chown(int(want.Uid), int(want.Gid))
}

// reload sends SIGHUP to the process that PIDFile names, if it is Mosquitto:
// most others would die of it.
func (m Mosquitto) reload() error {
	b, err := os.ReadFile(m.PIDFile)
	if err != nil {
		return err
	}
	if len(b) > maxPIDFile {
		return fmt.Errorf("PID file %s has %d bytes, the limit is %d", m.PIDFile, len(b), maxPIDFile)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil || pid <= 1 {
		return fmt.Errorf("PID file %s holds %q, not the id of a process", m.PIDFile, b)
	}
	process, err := os.FindProcess(pid) // holds on to the process, if it is there
	if err != nil {
		return fmt.Errorf("process %d of PID file %s: %w", pid, m.PIDFile, err)
	}
	defer process.Release()
	name, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
	if err != nil {
		return fmt.Errorf("process %d of PID file %s: %w", pid, m.PIDFile, err)
	}
	if got := strings.TrimSpace(string(name)); got != "mosquitto" {
		return fmt.Errorf("process %d of PID file %s is %q, not mosquitto", pid, m.PIDFile, got)
	}
	if err := process.Signal(syscall.SIGHUP); err != nil {
		return fmt.Errorf("process %d of PID file %s: %w", pid, m.PIDFile, err)
	}
	return nil
}

// Config is the text of a mosquitto.conf that serves these accounts, and
// MosquittoACL from aclFile, on a loopback port, with the limits of the
// embedded broker where Mosquitto has them.
func (m Mosquitto) Config(port int, aclFile string) string {
	return fmt.Sprintf(`# Mosquitto 2 for Dunlin.
listener %d 127.0.0.1
max_connections %d
max_qos 0

allow_anonymous false
password_file %s
acl_file %s
pid_file %s

# A client's id is its user name: nobody can take over another's connection.
use_username_as_clientid true

# Nothing is kept for a client that is away.
persistence false
retain_available false
queue_qos0_messages false
persistent_client_expiration 1h

message_size_limit %d
max_packet_size %d
max_queued_messages %d
max_queued_bytes %d

log_dest stderr
log_type error
log_type warning
log_type notice
`, port, defaultMaxConnections, m.PasswordFile, aclFile, m.PIDFile, link.MaxPayload, maxPacket, mosquittoQueue, mosquittoQueueBytes)
}
