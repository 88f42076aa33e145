package broker

import (
	"bytes"
	"crypto/pbkdf2"
	"crypto/rand"
	"crypto/sha512"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
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
	"github.com/dunlin/dunlin/internal/pki"
)

// ControllerUser is the common name of the controller's own certificate, which
// external brokers take for its user name. It is not a name that a device can
// have.
const ControllerUser = pki.ControllerName

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

// The files in a Mosquitto's folder.
const (
	mosquittoConf      = "mosquitto.conf"
	mosquittoACL       = "acl"
	mosquittoRoots     = "ca.pem"
	mosquittoServer    = "server.pem" // certificate and key, which change at once
	mosquittoCRL       = "crl.pem"
	mosquittoPasswords = "passwords"
	mosquittoPID       = "pid"
)

// Mosquitto is a Mosquitto 2 broker on the same machine, whose files are the
// controller's. The controller must be allowed to replace them and to signal
// the process.
type Mosquitto struct {
	Dir string

	told bool // Mosquitto has read what is in the files
}

// MosquittoFiles is what Mosquitto goes by.
type MosquittoFiles struct {
	// Roots are of the controller's authorities.
	Roots []*x509.Certificate
	// CRLs are their lists of revoked certificates, DER. Mosquitto refuses the
	// devices of an authority that has none, or whose list has run out.
	CRLs [][]byte
	// Certificate is the broker's, with what is needed to verify it.
	Certificate *tls.Certificate
	// Revoked are the devices that may send and receive nothing any more.
	Revoked []string
	// JoinTokens are the join tokens that can still be used: the HashPassword
	// of each by its id.
	JoinTokens map[string]string
}

// HashPassword gives a secret the form that Mosquitto 2 keeps it in:
// $7$<iterations>$<salt>$<PBKDF2 with SHA-512>.
func HashPassword(secret string) (string, error) {
	salt := make([]byte, mosquittoSalt)
	rand.Read(salt)
	return hashPassword(secret, salt)
}

func hashPassword(secret string, salt []byte) (string, error) {
	key, err := pbkdf2.Key(sha512.New, secret, salt, mosquittoIterations, sha512.Size)
	if err != nil {
		return "", fmt.Errorf("hash a password for Mosquitto: %w", err)
	}
	enc := base64.StdEncoding
	return fmt.Sprintf("$7$%d$%s$%s", mosquittoIterations, enc.EncodeToString(salt), enc.EncodeToString(key)), nil
}

// Write makes files all that Mosquitto goes by, and has it read them again
// where they have changed, and the first time. When Mosquitto cannot be told,
// the error says so, the files are written all the same, and the next call
// tells it. One call at a time.
//
// Mosquitto 2.0.11 reads everything but its listeners and limits again, within
// 0.1 s. Connections stay, but for those that enrol by a password that is no
// more. A revoked device keeps its connection (until External.Disconnect),
// through which by the ACL nothing goes any more, and by the CRL gets no new
// one.
func (m *Mosquitto) Write(files MosquittoFiles) error {
	text, err := files.text()
	if err != nil {
		return fmt.Errorf("files for Mosquitto: %w", err)
	}
	if err := m.replace(text); err != nil {
		return err
	}
	if m.told {
		return nil
	}
	if err := m.reload(); err != nil {
		return fmt.Errorf("files written, but Mosquitto not told: %w", err)
	}
	m.told = true
	return nil
}

// Setup writes files and Config, for Mosquitto to be started with.
func (m *Mosquitto) Setup(port, enrolPort int, files MosquittoFiles) error {
	text, err := files.text()
	if err != nil {
		return fmt.Errorf("files for Mosquitto: %w", err)
	}
	text[mosquittoConf] = []byte(m.Config(port, enrolPort))
	return m.replace(text)
}

// replace replaces those files that differ.
func (m *Mosquitto) replace(text map[string][]byte) error {
	for _, name := range slices.Sorted(maps.Keys(text)) {
		path := filepath.Join(m.Dir, name)
		if old, err := os.ReadFile(path); err == nil && bytes.Equal(old, text[name]) {
			continue
		}
		m.told = false
		if err := replaceFile(path, text[name]); err != nil {
			return fmt.Errorf("write a file for Mosquitto: %w", err)
		}
	}
	return nil
}

// text gives the files by name.
func (f MosquittoFiles) text() (map[string][]byte, error) {
	if f.Certificate == nil || len(f.Roots) == 0 || len(f.CRLs) == 0 {
		return nil, errors.New("certificate, roots or CRLs are missing")
	}
	key, err := x509.MarshalPKCS8PrivateKey(f.Certificate.PrivateKey)
	if err != nil {
		return nil, fmt.Errorf("key of the broker's certificate: %w", err)
	}
	chain, err := pki.ParseCertificates(f.Certificate.Certificate)
	if err != nil {
		return nil, err
	}
	var crls []byte
	for _, der := range f.CRLs {
		if _, err := x509.ParseRevocationList(der); err != nil {
			return nil, fmt.Errorf("list of revoked certificates: %w", err)
		}
		crls = append(crls, pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: der})...)
	}
	acl, err := MosquittoACL(f.Revoked)
	if err != nil {
		return nil, err
	}
	passwords, err := mosquittoAccounts(f.JoinTokens)
	if err != nil {
		return nil, err
	}
	return map[string][]byte{
		mosquittoRoots:     pki.EncodeCertificates(f.Roots...),
		mosquittoServer:    append(pki.EncodeCertificates(chain...), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key})...),
		mosquittoCRL:       crls,
		mosquittoACL:       []byte(acl),
		mosquittoPasswords: []byte(passwords),
	}, nil
}

// MosquittoACL is the text of Mosquitto's ACL file. It holds for any set of
// devices: %u is the name of the one that asks. A denial goes before all that
// a pattern allows.
func MosquittoACL(revoked []string) (string, error) {
	var text strings.Builder
	text.WriteString(`# Who may send and receive what. Names of devices hold no / + #.
user ` + ControllerUser + `
topic read dunlin/v1/+/+/up/+
topic write dunlin/v1/+/+/down/+
topic write ` + link.EpochTopic + `
topic read dunlin/v1/join/+/+/up
topic write dunlin/v1/join/+/+/down

pattern write dunlin/v1/+/%u/up/+
pattern read dunlin/v1/+/%u/down/+
pattern read ` + link.EpochTopic + `

# Devices that enrol have no certificate, and the user name of a join token.
pattern write dunlin/v1/join/%u/+/up
pattern read dunlin/v1/join/%u/+/down
`)
	for _, device := range slices.Sorted(slices.Values(revoked)) {
		if err := link.CheckDevice(device); err != nil {
			return "", fmt.Errorf("revoked device: %w", err)
		}
		fmt.Fprintf(&text, "\nuser %s\ntopic deny #\n", device)
	}
	return text.String(), nil
}

// mosquittoAccounts is the text of Mosquitto's password file: those by which
// devices enrol.
func mosquittoAccounts(joinTokens map[string]string) (string, error) {
	// No secret: everybody knows it.
	renew, err := hashPassword(link.RenewUser, make([]byte, mosquittoSalt))
	if err != nil {
		return "", err
	}
	var text strings.Builder
	text.WriteString(link.RenewUser + ":" + renew + "\n")
	for _, id := range slices.Sorted(maps.Keys(joinTokens)) {
		user, hash := link.JoinUser(id), joinTokens[id]
		if err := link.CheckEnrolUser(user); err != nil {
			return "", fmt.Errorf("join token %q: %w", id, err)
		}
		if !strings.HasPrefix(hash, "$7$") || strings.ContainsAny(hash, "\r\n:") {
			return "", fmt.Errorf("join token %s: the password is not hashed", id)
		}
		text.WriteString(user + ":" + hash + "\n")
	}
	return text.String(), nil
}

// replaceFile replaces a file by one with the same mode and owner, or makes
// one with mode 0600. After a crash there is the old or the new one.
func replaceFile(path string, data []byte) error {
	dir := filepath.Dir(path)
	f, err := os.CreateTemp(dir, "."+filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // fails once it is renamed
	defer f.Close()
	mode := fs.FileMode(0o600)
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

// reload sends SIGHUP to the process of the PID file, if it is Mosquitto: most
// others would die of it.
func (m *Mosquitto) reload() error {
	file := filepath.Join(m.Dir, mosquittoPID)
	b, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	if len(b) > maxPIDFile {
		return fmt.Errorf("PID file %s has %d bytes, the limit is %d", file, len(b), maxPIDFile)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil || pid <= 1 {
		return fmt.Errorf("PID file %s holds %q, not the id of a process", file, b)
	}
	process, err := os.FindProcess(pid) // holds on to the process, if it is there
	if err != nil {
		return fmt.Errorf("process %d of PID file %s: %w", pid, file, err)
	}
	defer process.Release()
	name, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
	if err != nil {
		return fmt.Errorf("process %d of PID file %s: %w", pid, file, err)
	}
	if got := strings.TrimSpace(string(name)); got != "mosquitto" {
		return fmt.Errorf("process %d of PID file %s is %q, not mosquitto", pid, file, got)
	}
	if err := process.Signal(syscall.SIGHUP); err != nil {
		return fmt.Errorf("process %d of PID file %s: %w", pid, file, err)
	}
	return nil
}

// Config is the text of a mosquitto.conf: a listener for devices and the
// controller, and, unless enrolPort is 0, one for devices that enrol, with the
// limits of the embedded broker where Mosquitto has them.
func (m *Mosquitto) Config(port, enrolPort int) string {
	path := func(name string) string { return filepath.Join(m.Dir, name) }
	var text strings.Builder
	fmt.Fprintf(&text, `# Mosquitto 2 for Dunlin, by dunlin-controller broker config mosquitto.
max_qos 0
allow_anonymous false
password_file %s
acl_file %s
pid_file %s

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

# Devices and the controller, by their certificates.
listener %d
max_connections %d
`, path(mosquittoPasswords), path(mosquittoACL), path(mosquittoPID), link.MaxPayload, maxPacket,
		mosquittoQueue, mosquittoQueueBytes, port, defaultMaxConnections)
	tls := fmt.Sprintf(`tls_version tlsv1.3
cafile %s
certfile %s
keyfile %s
`, path(mosquittoRoots), path(mosquittoServer), path(mosquittoServer))
	fmt.Fprintf(&text, `%scrlfile %s
require_certificate true
use_identity_as_username true
# A client's id is its user name: nobody can take over another's connection.
use_username_as_clientid true
`, tls, path(mosquittoCRL))
	if enrolPort != 0 {
		fmt.Fprintf(&text, `
# Devices that enrol, by join token. Those of one token take turns: with ids of
# their own they could take over the connections of devices.
listener %d
max_connections %d
%srequire_certificate false
use_username_as_clientid true
`, enrolPort, maxEnrolling, tls)
	}
	return text.String()
}
