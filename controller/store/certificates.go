package store

import (
	"cmp"
	"context"
	"crypto/x509"
	"database/sql"
	"errors"
	"fmt"
	"math/big"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/dunlin/dunlin/controller/identity"
	"github.com/dunlin/dunlin/internal/pki"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// Join is a device that wants to be known.
type Join struct {
	Token  [32]byte // hash of its join token
	Device string
	Key    string // pki.ID of its key
	Labels map[string]string
	Info   *dunlinv1.DeviceInfo
	// Issue makes the certificate, once it is clear that there will be one.
	Issue func() (*x509.Certificate, error)
	// Replaced, if set, is called before Join returns where the device has
	// taken the place of another one.
	Replaced func()
}

// Join makes a device known, uses its join token once, and gives its
// certificate; the token's labels win over the device's own. A device that is
// known by the same key is joined already, whatever became of the token. A
// name that is taken is ErrExists, but for a token that is meant for it: then
// the device takes that one's place, and what it had is revoked. A token that
// is unknown, used up, expired or for another device is ErrRefused.
func (s *Store) Join(ctx context.Context, j Join) (cert *x509.Certificate, err error) {
	replaced := false
	err = s.write(ctx, "join", func(tx *sql.Tx) error {
		var revoked int64
		err := tx.QueryRowContext(ctx, "SELECT revoked_at FROM devices WHERE name = ?", j.Device).Scan(&revoked)
		taken := err == nil
		if err != nil && !errors.Is(err, sql.ErrNoRows) {
			return err
		}
		if taken && revoked == 0 {
			if cert, err = sameKey(ctx, tx, j.Device, j.Key, s.now()); err != nil || cert != nil {
				return err
			}
		}
		now := s.now().UnixNano()
		var id, labels, device string
		err = tx.QueryRowContext(ctx, "UPDATE join_tokens SET uses_left = uses_left - 1 WHERE hash = ? AND uses_left > 0 AND expires_at > ? RETURNING id, labels, device", j.Token[:], now).Scan(&id, &labels, &device)
		if errors.Is(err, sql.ErrNoRows) {
			return fmt.Errorf("join token is unknown, used up or expired: %w", ErrRefused)
		}
		if err != nil {
			return err
		}
		if device != "" && device != j.Device {
			return fmt.Errorf("join token %s is for device %s: %w", id, device, ErrRefused)
		}
		if taken && device == "" { // told only to one who may join; the token is not used
			return fmt.Errorf("device %s: %w; a join token for it lets it join again", j.Device, ErrExists)
		}
		info, err := proto.Marshal(j.Info)
		if err != nil {
			return fmt.Errorf("encode device info: %w", err)
		}
		if info == nil {
			info = []byte{}
		}
		if j.Labels == nil {
			j.Labels = map[string]string{}
		}
		action, before := "device.join", ""
		if replaced = taken; taken {
			action = "device.rejoin"
			var token, own string
			err = tx.QueryRowContext(ctx, "SELECT token_labels, own_labels FROM devices WHERE name = ?", j.Device).Scan(&token, &own)
			before = fmt.Sprintf("labels %s, its own %s", token, own)
			if labels == "null" || labels == "{}" { // it keeps those that it had
				labels = token
			}
			_, e := tx.ExecContext(ctx, "UPDATE devices SET own_labels = ?, token_labels = ?, info = ?, connected = 0, session = '', revoked_at = 0, revoked_reason = '', twins = x'' WHERE name = ?",
				jsonText(j.Labels), labels, info, j.Device)
			if err = errors.Join(err, e); err == nil {
				err = s.revokeCertificates(ctx, tx, j.Device, "the device joined again")
			}
		} else {
			_, err = tx.ExecContext(ctx, "INSERT INTO devices (name, own_labels, token_labels, info, joined_at) VALUES (?, ?, ?, ?, ?)",
				j.Device, jsonText(j.Labels), labels, info, now)
		}
		if err != nil {
			return fmt.Errorf("add device %s: %w", j.Device, err)
		}
		if cert, err = j.Issue(); err != nil {
			return err
		}
		if err := s.addCertificate(ctx, tx, j.Device, cert); err != nil {
			return err
		}
		return s.audit(ctx, tx, AuditRecord{
			Who: "device:" + j.Device, Action: action, Object: "device/" + j.Device, Before: before,
			After: fmt.Sprintf("join token %s, labels %s, its own %s, certificate %x until %s", id, labels, jsonText(j.Labels), cert.SerialNumber, cert.NotAfter.UTC().Format(time.RFC3339)),
		})
	})
	if err == nil && replaced && j.Replaced != nil {
		j.Replaced()
	}
	return cert, err
}

// known says in SQL that an authority is one of ours still, by the name that
// issuer gives it.
const known = "EXISTS (SELECT 1 FROM authorities WHERE instr(%s, substr(id, 1, 16)) > 0)"

// sameKey gives the valid certificate that a device has for a key, or nil.
func sameKey(ctx context.Context, tx *sql.Tx, device, key string, now time.Time) (*x509.Certificate, error) {
	var der []byte
	err := tx.QueryRowContext(ctx, "SELECT der FROM certificates WHERE device = ? AND key = ? AND revoked_at = 0 AND not_after > ? AND "+fmt.Sprintf(known, "authority")+" ORDER BY not_after DESC LIMIT 1", device, key, nanos(now)).Scan(&der)
	if errors.Is(err, sql.ErrNoRows) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

func (s *Store) addCertificate(ctx context.Context, tx *sql.Tx, device string, c *x509.Certificate) error {
	_, err := tx.ExecContext(ctx, "INSERT INTO certificates (serial, device, authority, key, der, not_after, issued_at) VALUES (?, ?, ?, ?, ?, ?, ?)",
		serial(c), device, issuer(c), pki.CertificateID(c), c.Raw, nanos(c.NotAfter), s.now().UnixNano())
	if err != nil {
		return fmt.Errorf("add certificate of device %s: %w", device, err)
	}
	return nil
}

// serial is a certificate's serial number in a column: 20 bytes, the most that it may have.
func serial(c *x509.Certificate) []byte { return c.SerialNumber.FillBytes(make([]byte, 20)) }

// issuer names the authority by its subject, which has the start of its ID.
func issuer(c *x509.Certificate) string { return c.Issuer.CommonName }

// Renewal is a device that wants a new certificate in place of the one it has.
type Renewal struct {
	Device string
	Old    *x509.Certificate
	Key    string // pki.ID of the new key
	Issue  func() (*x509.Certificate, error)
}

// maxRenewals bounds the certificates that one device is given in an hour, so
// that one that is taken over fills neither the store nor the audit log.
const maxRenewals = 20

// Renew gives a device one more certificate; a repeated renewal gives the same
// again. The old one counts until the new one is used (Used). One that is
// revoked, or that a newer one in use has taken the place of, is
// identity.ErrRevoked, and a device that renews all the time ErrLimit.
func (s *Store) Renew(ctx context.Context, r Renewal) (cert *x509.Certificate, err error) {
	err = s.write(ctx, "renew", func(tx *sql.Tx) error {
		if err := s.check(ctx, tx, r.Device, r.Old); err != nil {
			return err
		}
		if r.Key != pki.CertificateID(r.Old) || r.Old.NotAfter.Before(s.now()) {
			if cert, err = sameKey(ctx, tx, r.Device, r.Key, s.now()); err != nil {
				return err
			}
			if cert != nil && cert.SerialNumber.Cmp(r.Old.SerialNumber) != 0 {
				return nil
			}
		}
		var n int
		if err := tx.QueryRowContext(ctx, "SELECT count(*) FROM certificates WHERE device = ? AND issued_at > ?", r.Device, s.now().Add(-time.Hour).UnixNano()).Scan(&n); err != nil {
			return err
		}
		if n >= maxRenewals {
			return fmt.Errorf("device %s was given %d certificates within an hour, the limit is %d: %w", r.Device, n, maxRenewals, ErrLimit)
		}
		if cert, err = r.Issue(); err != nil {
			return err
		}
		if err := s.addCertificate(ctx, tx, r.Device, cert); err != nil {
			return err
		}
		return s.audit(ctx, tx, AuditRecord{
			Who: "device:" + r.Device, Action: "device.renew", Object: "device/" + r.Device,
			Before: fmt.Sprintf("certificate %x until %s", r.Old.SerialNumber, r.Old.NotAfter.UTC().Format(time.RFC3339)),
			After:  fmt.Sprintf("certificate %x until %s", cert.SerialNumber, cert.NotAfter.UTC().Format(time.RFC3339)),
		})
	})
	return cert, err
}

// queryer is a database or a transaction.
type queryer interface {
	QueryRowContext(ctx context.Context, query string, args ...any) *sql.Row
}

// check says whether a certificate that an authority of ours vouches for, or
// did when the connection began, is one by which a device is known. One that is not recorded, as after a restore
// of the store, counts while its device does.
func (s *Store) check(ctx context.Context, q queryer, device string, c *x509.Certificate) error {
	var of, reason, deviceReason string
	var revoked, deviceRevoked int64
	var ours bool
	err := q.QueryRowContext(ctx, `SELECT coalesce(c.device, d.name), coalesce(c.revoked_at, 0), coalesce(c.reason, ''), d.revoked_at, d.revoked_reason, `+fmt.Sprintf(known, "?")+`
		FROM devices d LEFT JOIN certificates c ON c.serial = ? WHERE d.name = ?`, issuer(c), serial(c), device).Scan(&of, &revoked, &reason, &deviceRevoked, &deviceReason, &ours)
	switch {
	case errors.Is(err, sql.ErrNoRows):
		return fmt.Errorf("there is no device %s: %w", device, identity.ErrUnknown)
	case err != nil:
		return err
	case deviceRevoked != 0:
		return fmt.Errorf("device %s is revoked (%s): %w", device, cmp.Or(deviceReason, "no reason was given"), identity.ErrRevoked)
	case revoked != 0:
		return fmt.Errorf("certificate %x of device %s is revoked (%s): %w", c.SerialNumber, device, reason, identity.ErrRevoked)
	case !ours:
		return fmt.Errorf("certificate %x of device %s is of %q, which is retired: %w", c.SerialNumber, device, issuer(c), identity.ErrUnknown)
	case of != device:
		return fmt.Errorf("certificate %x is of device %s, not %s: %w", c.SerialNumber, of, device, identity.ErrUnknown)
	}
	return nil
}

// CheckDevice implements identity.Credentials.
func (s *Store) CheckDevice(ctx context.Context, device string, c *x509.Certificate) error {
	return s.check(ctx, s.reader, device, c)
}

// Use is that a device has connected with a certificate.
type Use struct {
	Device string
	Serial *big.Int
}

// Used records that devices have connected with certificates, in one
// transaction: those that they had before, used or not, count no more. It says
// whether there were any. Of uses that are known already nothing is written.
func (s *Store) Used(ctx context.Context, uses ...Use) (superseded bool, err error) {
	var first []Use
	for _, u := range uses {
		var used int64
		err = s.reader.QueryRowContext(ctx, "SELECT used_at FROM certificates WHERE serial = ? AND device = ?", key(u.Serial), u.Device).Scan(&used)
		switch {
		case err == nil && used == 0:
			first = append(first, u)
		case err != nil && !errors.Is(err, sql.ErrNoRows):
			return false, err
		}
	}
	if len(first) == 0 {
		return false, nil
	}
	err = s.write(ctx, "certificate used", func(tx *sql.Tx) error {
		superseded = false
		for _, u := range first {
			n, err := s.use(ctx, tx, u)
			if err != nil {
				return fmt.Errorf("certificate of device %s: %w", u.Device, err)
			}
			superseded = superseded || n > 0
		}
		return nil
	})
	return superseded, err
}

func key(serial *big.Int) []byte { return serial.FillBytes(make([]byte, 20)) }

// use gives how many others count no more.
func (s *Store) use(ctx context.Context, tx *sql.Tx, u Use) (superseded int64, err error) {
	now, serial := s.now().UnixNano(), key(u.Serial)
	if _, err := tx.ExecContext(ctx, "UPDATE certificates SET used_at = ? WHERE serial = ? AND used_at = 0", now, serial); err != nil {
		return 0, err
	}
	r, err := tx.ExecContext(ctx, `UPDATE certificates SET revoked_at = ?1, reason = 'a newer one took its place'
		WHERE device = ?2 AND serial <> ?3 AND revoked_at = 0
		AND (used_at <> 0 OR issued_at < (SELECT issued_at FROM certificates WHERE serial = ?3))`, now, u.Device, serial)
	if err != nil {
		return 0, err
	}
	return r.RowsAffected()
}

// SetTwins keeps the agents that use one device's identity; none: there is one.
func (s *Store) SetTwins(ctx context.Context, device string, twins []*dunlinv1.Twin) error {
	b, err := proto.Marshal(&dunlinv1.DeviceIdentity{Twins: twins})
	if err != nil {
		return fmt.Errorf("encode twins: %w", err)
	}
	return s.write(ctx, "twins", func(tx *sql.Tx) error {
		if err := changedOne(tx.ExecContext(ctx, "UPDATE devices SET twins = ? WHERE name = ?", append([]byte{}, b...), device)); errors.Is(err, ErrStale) {
			return fmt.Errorf("device %s: %w", device, ErrNotFound)
		} else if err != nil {
			return err
		}
		var hosts []string
		for _, t := range twins {
			hosts = append(hosts, t.GetHostname())
		}
		if len(hosts) == 0 {
			return nil
		}
		return s.audit(ctx, tx, AuditRecord{Who: "device:" + device, Action: "device.cloned", Object: "device/" + device, After: "agents on " + strings.Join(hosts, ", ")})
	})
}

// Identities gives how devices are known: some by their names or, without
// names, all.
func (s *Store) Identities(ctx context.Context, names ...string) (map[string]*dunlinv1.DeviceIdentity, error) {
	all := map[string]*dunlinv1.DeviceIdentity{}
	var args []any
	named, certified := "", ""
	if len(names) > 0 {
		const in = "IN (SELECT value FROM json_each(?))"
		args, named, certified = []any{jsonText(names)}, " WHERE name "+in, " WHERE device "+in
	}
	err := s.read(ctx, func(tx *sql.Tx) error {
		err := each(ctx, tx, "SELECT name, revoked_at, revoked_reason, twins FROM devices"+named, args, func(scan func(...any) error) error {
			var name, reason string
			var revoked int64
			var twins []byte
			if err := scan(&name, &revoked, &reason, &twins); err != nil {
				return err
			}
			i, err := identityOf(name, revoked, reason, twins)
			all[name] = i
			return err
		})
		if err != nil {
			return err
		}
		// The newest last.
		return each(ctx, tx, "SELECT device, serial, authority, not_after FROM certificates"+certified+" ORDER BY revoked_at = 0, used_at, not_after", args, func(scan func(...any) error) error {
			var name, authority string
			var number []byte
			var end int64
			if err := scan(&name, &number, &authority, &end); err != nil {
				return err
			}
			if i := all[name]; i != nil {
				i.Serial, i.Authority, i.NotAfter = fmt.Sprintf("%x", new(big.Int).SetBytes(number)), authority, timestamppb.New(instant(end))
			}
			return nil
		})
	})
	return all, err
}

// Suspects gives how those devices are known that are revoked, or are more
// than one agent.
func (s *Store) Suspects(ctx context.Context) (map[string]*dunlinv1.DeviceIdentity, error) {
	all := map[string]*dunlinv1.DeviceIdentity{}
	err := s.read(ctx, func(tx *sql.Tx) error {
		return each(ctx, tx, "SELECT name, revoked_at, revoked_reason, twins FROM devices WHERE revoked_at <> 0 OR length(twins) > 0", nil, func(scan func(...any) error) error {
			var name, reason string
			var revoked int64
			var twins []byte
			if err := scan(&name, &revoked, &reason, &twins); err != nil {
				return err
			}
			i, err := identityOf(name, revoked, reason, twins)
			all[name] = i
			return err
		})
	})
	return all, err
}

func identityOf(name string, revoked int64, reason string, twins []byte) (*dunlinv1.DeviceIdentity, error) {
	i := &dunlinv1.DeviceIdentity{}
	if err := proto.Unmarshal(twins, i); err != nil {
		return nil, fmt.Errorf("twins of device %s: %w", name, err)
	}
	if i.RevokedReason = reason; revoked != 0 {
		i.RevokedAt = timestamppb.New(instant(revoked))
	}
	return i, nil
}

func (s *Store) revokeCertificates(ctx context.Context, tx *sql.Tx, device, reason string) error {
	_, err := tx.ExecContext(ctx, "UPDATE certificates SET revoked_at = ?, reason = ? WHERE device = ? AND revoked_at = 0", s.now().UnixNano(), reason, device)
	return err
}

// RevokeDevice takes a device's certificates back, and the join tokens that are
// for it; what is known of it stays.
func (s *Store) RevokeDevice(ctx context.Context, by, device, reason string) error {
	return s.write(ctx, "revoke device", func(tx *sql.Tx) error {
		if err := s.takeJoinTokens(ctx, tx, by, device); err != nil {
			return err
		}
		err := changedOne(tx.ExecContext(ctx, "UPDATE devices SET revoked_at = ?, revoked_reason = ? WHERE name = ? AND revoked_at = 0", s.now().UnixNano(), reason, device))
		if errors.Is(err, ErrStale) {
			var n int
			if err := tx.QueryRowContext(ctx, "SELECT count(*) FROM devices WHERE name = ?", device).Scan(&n); err != nil || n > 0 {
				return err // it is revoked already
			}
			return fmt.Errorf("device %s: %w", device, ErrNotFound)
		}
		if err != nil {
			return err
		}
		if err := s.revokeCertificates(ctx, tx, device, cmp.Or(reason, "the device was revoked")); err != nil {
			return err
		}
		return s.audit(ctx, tx, AuditRecord{Who: by, Action: "device.revoke", Object: "device/" + device, After: "revoked", Reason: reason})
	})
}

// RemoveDevice forgets a device and its events, revokes its certificates, and
// takes back the join tokens that are for it.
func (s *Store) RemoveDevice(ctx context.Context, by, device string) error {
	return s.write(ctx, "remove device", func(tx *sql.Tx) error {
		var own, token string
		var joined int64
		err := tx.QueryRowContext(ctx, "DELETE FROM devices WHERE name = ? RETURNING own_labels, token_labels, joined_at", device).Scan(&own, &token, &joined)
		if errors.Is(err, sql.ErrNoRows) {
			return fmt.Errorf("device %s: %w", device, ErrNotFound)
		}
		if err != nil {
			return err
		}
		if err := errors.Join(s.takeJoinTokens(ctx, tx, by, device), s.revokeCertificates(ctx, tx, device, "the device was removed")); err != nil {
			return err
		}
		return s.audit(ctx, tx, AuditRecord{Who: by, Action: "device.remove", Object: "device/" + device,
			Before: fmt.Sprintf("joined %s, labels %s, its own %s", instant(joined).Format(time.RFC3339), token, own)})
	})
}

// Revoked gives the certificates that are revoked and not expired.
func (s *Store) Revoked(ctx context.Context) (entries []x509.RevocationListEntry, err error) {
	err = s.read(ctx, func(tx *sql.Tx) error {
		return each(ctx, tx, "SELECT serial, revoked_at FROM certificates WHERE revoked_at <> 0 AND not_after > ? ORDER BY serial", []any{s.now().UnixNano()}, func(scan func(...any) error) error {
			var number []byte
			var at int64
			if err := scan(&number, &at); err != nil {
				return err
			}
			entries = append(entries, x509.RevocationListEntry{SerialNumber: new(big.Int).SetBytes(number), RevocationTime: instant(at)})
			return nil
		})
	})
	return entries, err
}

// RevokedDevices gives the names whose certificates are all revoked, and those
// of revoked devices, for brokers that go by names.
func (s *Store) RevokedDevices(ctx context.Context) (names []string, err error) {
	err = s.read(ctx, func(tx *sql.Tx) error {
		query := `SELECT DISTINCT device FROM certificates WHERE revoked_at <> 0 AND not_after > ?1
			AND NOT EXISTS (SELECT 1 FROM certificates c WHERE c.device = certificates.device AND c.revoked_at = 0 AND c.not_after > ?1)
			UNION SELECT name FROM devices WHERE revoked_at <> 0 ORDER BY 1`
		return each(ctx, tx, query, []any{s.now().UnixNano()}, func(scan func(...any) error) error {
			var name string
			err := scan(&name)
			names = append(names, name)
			return err
		})
	})
	return names, err
}

// Authorities implements identity.AuthorityStore.
func (s *Store) Authorities(ctx context.Context) (all []identity.AuthorityRecord, err error) {
	err = s.read(ctx, func(tx *sql.Tx) error {
		return each(ctx, tx, "SELECT certificate, cross_certs, active FROM authorities ORDER BY created_at, id", nil, func(scan func(...any) error) error {
			var der, cross []byte
			var r identity.AuthorityRecord
			err := scan(&der, &cross, &r.Active)
			if err != nil {
				return err
			}
			if r.Certificate, err = x509.ParseCertificate(der); err != nil {
				return err
			}
			if r.Cross, err = x509.ParseCertificates(cross); err != nil {
				return err
			}
			all = append(all, r)
			return nil
		})
	})
	return all, err
}

// AddAuthority implements identity.AuthorityStore.
func (s *Store) AddAuthority(ctx context.Context, by string, r identity.AuthorityRecord) error {
	return s.write(ctx, "authority", func(tx *sql.Tx) error {
		if _, err := tx.ExecContext(ctx, "UPDATE authorities SET active = 0 WHERE active = 1"); err != nil {
			return err
		}
		cross := []byte{}
		for _, c := range r.Cross {
			cross = append(cross, c.Raw...)
		}
		id := pki.CertificateID(r.Certificate)
		if _, err := tx.ExecContext(ctx, "INSERT INTO authorities (id, certificate, cross_certs, active, created_at) VALUES (?, ?, ?, 1, ?)",
			id, r.Certificate.Raw, cross, s.now().UnixNano()); err != nil {
			return fmt.Errorf("add authority %s: %w", id, err)
		}
		return s.audit(ctx, tx, AuditRecord{Who: by, Action: "authority.create", Object: "authority/" + id, After: r.Certificate.Subject.CommonName})
	})
}

// RemoveAuthority implements identity.AuthorityStore. One that issues, or,
// unless forced, one of which a device has a valid certificate or whose
// successor a device does not know, is ErrRefused.
func (s *Store) RemoveAuthority(ctx context.Context, by, id string, force bool) error {
	return s.write(ctx, "authority", func(tx *sql.Tx) error {
		var active bool
		var der []byte
		err := tx.QueryRowContext(ctx, "SELECT active, certificate FROM authorities WHERE id = ?", id).Scan(&active, &der)
		if errors.Is(err, sql.ErrNoRows) {
			return fmt.Errorf("authority %s: %w", id, ErrNotFound)
		}
		if err != nil {
			return err
		}
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return err
		}
		if active {
			return fmt.Errorf("authority %s issues certificates; rotate first: %w", id, ErrRefused)
		}
		if !force {
			var devices, behind int
			var next string
			if err := tx.QueryRowContext(ctx, "SELECT count(DISTINCT device) FROM certificates WHERE authority = ? AND revoked_at = 0 AND not_after > ?", cert.Subject.CommonName, s.now().UnixNano()).Scan(&devices); err != nil {
				return err
			}
			if err := tx.QueryRowContext(ctx, "SELECT id FROM authorities WHERE active = 1").Scan(&next); err != nil {
				return err
			}
			if err := tx.QueryRowContext(ctx, "SELECT count(*) FROM devices WHERE revoked_at = 0 AND root_ids NOT LIKE '%' || ? || '%'", next).Scan(&behind); err != nil {
				return err
			}
			if devices > 0 || behind > 0 {
				return fmt.Errorf("%d devices have a valid certificate of authority %s, and %d do not know its successor yet: %w", devices, id, behind, ErrRefused)
			}
		}
		if _, err := tx.ExecContext(ctx, "DELETE FROM authorities WHERE id = ?", id); err != nil {
			return err
		}
		return s.audit(ctx, tx, AuditRecord{Who: by, Action: "authority.retire", Object: "authority/" + id, Before: cert.Subject.CommonName})
	})
}

// AuthorityDevices counts the devices with a valid certificate by the name of
// its authority.
func (s *Store) AuthorityDevices(ctx context.Context) (map[string]uint32, error) {
	counts := map[string]uint32{}
	err := s.read(ctx, func(tx *sql.Tx) error {
		return each(ctx, tx, "SELECT authority, count(DISTINCT device) FROM certificates WHERE revoked_at = 0 AND not_after > ? GROUP BY authority", []any{s.now().UnixNano()}, func(scan func(...any) error) error {
			var name string
			var n uint32
			err := scan(&name, &n)
			counts[name] = n
			return err
		})
	})
	return counts, err
}
