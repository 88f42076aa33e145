package store

import (
	"context"
	"crypto/sha256"
	"database/sql"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/dunlin/dunlin/controller/fleet"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// Device is what the store knows of a device.
type Device struct {
	Name        string
	Labels      map[string]string
	Info        *dunlinv1.DeviceInfo
	JoinedAt    time.Time
	LastHeardAt time.Time // zero: never
	Connected   bool
	Session     string
	Desired     uint64 // number of its generation; 0 where it has none yet
	DesiredSHA  [32]byte
	Reported    *dunlinv1.Reported // nil: none yet
	DiskFree    *uint64            // bytes, as it said last; nil: it has not
}

// Fleet gives what selectors and plans look at.
func (d *Device) Fleet() fleet.Device {
	f := fleet.Device{
		Name: d.Name, Labels: d.Labels, Class: d.Info.GetFirmwareProfile(), Limits: d.Info.GetLimits(),
		DiskBytes: d.Info.GetDiskBytes(), DiskFree: d.DiskFree,
	}
	for _, v := range d.Reported.GetVersions() {
		if v.GetDigest() == "" {
			continue
		}
		h := fleet.Holding{Bytes: v.GetBytesPresent()}
		switch v.GetState() {
		case dunlinv1.VersionState_VERSION_STATE_RESIDENT, dunlinv1.VersionState_VERSION_STATE_DRAINING:
			h.Resident, h.Bytes = true, max(h.Bytes, v.GetBytesTotal(), 1)
		case dunlinv1.VersionState_VERSION_STATE_STORED, dunlinv1.VersionState_VERSION_STATE_COMPILED, dunlinv1.VersionState_VERSION_STATE_WARM:
			h.Bytes = max(h.Bytes, v.GetBytesTotal(), 1)
		}
		if f.Has == nil {
			f.Has = map[string]fleet.Holding{}
		}
		f.Has[v.GetDigest()] = h
	}
	return f
}

// Observe gives what d is known to do with a version of a model. Only what it
// reports of its current generation counts.
func (d *Device) Observe(incarnation, model string, version int64) fleet.Observation {
	o := fleet.Observation{Device: d.Name, Connected: d.Connected}
	g := d.Reported.GetObserved()
	if d.Desired == 0 || g.GetIncarnation() != incarnation || g.GetNumber() != d.Desired {
		return o
	}
	o.Observed = true
	for _, v := range d.Reported.GetVersions() {
		if v.GetModel() == model && v.GetVersion() == version {
			o.Quarantined = v.GetState() == dunlinv1.VersionState_VERSION_STATE_QUARANTINED
			o.Serving = v.GetServing() && !o.Quarantined
			o.Reason, o.BytesPresent, o.BytesTotal = v.GetReason(), v.GetBytesPresent(), v.GetBytesTotal()
		}
	}
	return o
}

const selectDevices = `SELECT name, own_labels, token_labels, info, joined_at, last_heard_at, connected, session, reported, disk_free,
	coalesce(number, 0), coalesce(sha256, zeroblob(32)) FROM devices LEFT JOIN desired ON desired.device = devices.name `

func scanDevice(scan func(...any) error) (*Device, error) {
	d := &Device{Info: &dunlinv1.DeviceInfo{}}
	var own, token string
	var info, reported, sum []byte
	var joined, heard int64
	var free sql.Null[int64]
	if err := scan(&d.Name, &own, &token, &info, &joined, &heard, &d.Connected, &d.Session, &reported, &free, &d.Desired, &sum); err != nil {
		return nil, err
	}
	var err error
	if d.Labels, err = merge(own, token); err != nil {
		return nil, fmt.Errorf("labels of device %s: %w", d.Name, err)
	}
	if err := proto.Unmarshal(info, d.Info); err != nil {
		return nil, fmt.Errorf("info of device %s: %w", d.Name, err)
	}
	if len(reported) > 0 {
		d.Reported = &dunlinv1.Reported{}
		if err := proto.Unmarshal(reported, d.Reported); err != nil {
			return nil, fmt.Errorf("report of device %s: %w", d.Name, err)
		}
	}
	d.JoinedAt, d.LastHeardAt = instant(joined), instant(heard)
	copy(d.DesiredSHA[:], sum)
	if free.Valid {
		d.DiskFree = new(uint64(free.V))
	}
	return d, nil
}

func devices(ctx context.Context, tx *sql.Tx, where string, args ...any) (all []*Device, err error) {
	err = each(ctx, tx, selectDevices+where+" ORDER BY name", args, func(scan func(...any) error) error {
		d, err := scanDevice(scan)
		all = append(all, d)
		return err
	})
	return all, err
}

// Devices gives all devices by name.
func (s *Store) Devices(ctx context.Context) (all []*Device, err error) {
	err = s.read(ctx, func(tx *sql.Tx) error {
		all, err = devices(ctx, tx, "")
		return err
	})
	return all, err
}

// Device gives one device, or ErrNotFound.
func (s *Store) Device(ctx context.Context, name string) (*Device, error) {
	d, err := scanDevice(s.reader.QueryRowContext(ctx, selectDevices+"WHERE name = ?", name).Scan)
	if errors.Is(err, sql.ErrNoRows) {
		return nil, fmt.Errorf("device %s: %w", name, ErrNotFound)
	}
	return d, err
}

// Hello begins a device's session: it is connected, and reports are numbered
// anew if the session is. Without labels it keeps those that it had. It says
// whether anything changed that desired documents follow from: its labels, its
// class, its limits or the size of its disk.
func (s *Store) Hello(ctx context.Context, device string, h *dunlinv1.Hello) (d *Device, changed bool, err error) {
	info, err := proto.Marshal(h.GetInfo())
	if err != nil {
		return nil, false, fmt.Errorf("encode device info: %w", err)
	}
	err = s.write(ctx, "hello", func(tx *sql.Tx) error {
		var own, session string
		var known []byte
		err := tx.QueryRowContext(ctx, "SELECT own_labels, session, info FROM devices WHERE name = ?", device).Scan(&own, &session, &known)
		if errors.Is(err, sql.ErrNoRows) {
			return fmt.Errorf("device %s: %w", device, ErrNotFound)
		}
		if err != nil {
			return err
		}
		if len(h.GetLabels()) > 0 {
			labels := jsonText(h.GetLabels())
			changed, own = labels != own, labels
		}
		if len(info) > 0 {
			was := &dunlinv1.DeviceInfo{}
			if err := proto.Unmarshal(known, was); err != nil {
				return fmt.Errorf("info of device %s: %w", device, err)
			}
			now := h.GetInfo()
			changed = changed || was.GetFirmwareProfile() != now.GetFirmwareProfile() || was.GetDiskBytes() != now.GetDiskBytes() || !proto.Equal(was.GetLimits(), now.GetLimits())
		}
		if _, err = tx.ExecContext(ctx, `UPDATE devices SET connected = 1, last_heard_at = ?, own_labels = ?, session = ?,
			report_number = CASE WHEN session = ? THEN report_number ELSE 0 END,
			info = CASE WHEN ? > 0 THEN ? ELSE info END, trust_version = ?, root_ids = ? WHERE name = ?`,
			s.now().UnixNano(), own, h.GetSession(), h.GetSession(), len(info), append([]byte{}, info...),
			int64(min(h.GetTrustVersion(), math.MaxInt64)), jsonText(hexes(h.GetRootIds())), device); err != nil {
			return err
		}
		d, err = scanDevice(tx.QueryRowContext(ctx, selectDevices+"WHERE name = ?", device).Scan)
		return err
	})
	if err != nil {
		return nil, false, err
	}
	return d, changed, nil
}

// hexes writes the fingerprints of a device's roots, as many as make sense.
func hexes(ids [][]byte) []string {
	texts := []string{}
	for _, id := range ids[:min(len(ids), 16)] {
		if len(id) == sha256.Size {
			texts = append(texts, hex.EncodeToString(id))
		}
	}
	return texts
}

// Report keeps what a device reports. One of another session than the
// device's, or that is not newer than the last, is ErrStale.
func (s *Store) Report(ctx context.Context, device string, r *dunlinv1.Reported) error {
	blob, err := proto.Marshal(r)
	if err != nil {
		return fmt.Errorf("encode report: %w", err)
	}
	if r.GetSequence() > math.MaxInt64 {
		return fmt.Errorf("report of device %s: sequence %d: %w", device, r.GetSequence(), ErrStale)
	}
	return s.write(ctx, "report", func(tx *sql.Tx) error {
		return changedOne(tx.ExecContext(ctx, `UPDATE devices SET connected = 1, last_heard_at = ?, reported = ?, report_number = ?
			WHERE name = ? AND session = ? AND report_number < ?`,
			s.now().UnixNano(), blob, int64(r.GetSequence()), device, r.GetSession(), int64(r.GetSequence())))
	})
}

// Gone ends a device's session. Another one than the device's is ErrStale.
func (s *Store) Gone(ctx context.Context, device, session string) error {
	return s.write(ctx, "gone", func(tx *sql.Tx) error {
		return changedOne(tx.ExecContext(ctx, "UPDATE devices SET connected = 0, last_heard_at = ? WHERE name = ? AND session = ? AND connected = 1",
			s.now().UnixNano(), device, session))
	})
}

// Heard keeps when devices were last heard, and which are away now for want of
// it: those that were not heard after the time that away has for them. It also
// keeps how many bytes are free on the disks of devices.
func (s *Store) Heard(ctx context.Context, heard, away map[string]time.Time, free map[string]uint64) error {
	if len(heard) == 0 && len(away) == 0 && len(free) == 0 {
		return nil
	}
	return s.write(ctx, "heard", func(tx *sql.Tx) error {
		for device, at := range heard {
			if _, err := tx.ExecContext(ctx, "UPDATE devices SET last_heard_at = max(last_heard_at, ?) WHERE name = ?", nanos(at), device); err != nil {
				return err
			}
		}
		for device, at := range away {
			if _, err := tx.ExecContext(ctx, "UPDATE devices SET connected = 0 WHERE name = ? AND last_heard_at <= ?", device, nanos(at)); err != nil {
				return err
			}
		}
		for device, n := range free {
			if _, err := tx.ExecContext(ctx, "UPDATE devices SET disk_free = ? WHERE name = ?", int64(min(n, math.MaxInt64)), device); err != nil {
				return err
			}
		}
		return nil
	})
}

func changedOne(r sql.Result, err error) error {
	if err != nil {
		return err
	}
	n, err := r.RowsAffected()
	if err == nil && n == 0 {
		return ErrStale
	}
	return err
}

// Desired is a device's desired document and the number of its generation.
type Desired struct {
	Device   string
	Number   uint64
	SHA256   [32]byte
	Document []byte
}

// SaveDesired makes each document a new generation of its device, unless the
// device has it or is gone, and gives those that it made. Numbers come from
// one counter of the store, so that a device which is removed and joins again
// never sees a number twice.
func (s *Store) SaveDesired(ctx context.Context, documents []Desired) (saved []Desired, err error) {
	err = s.write(ctx, "desired", func(tx *sql.Tx) error {
		saved = nil
		for _, d := range documents {
			var known, same bool
			if err := tx.QueryRowContext(ctx, "SELECT EXISTS (SELECT 1 FROM devices WHERE name = ?), EXISTS (SELECT 1 FROM desired WHERE device = ? AND sha256 = ?)",
				d.Device, d.Device, d.SHA256[:]).Scan(&known, &same); err != nil {
				return err
			}
			if !known || same {
				continue
			}
			if err := tx.QueryRowContext(ctx, `INSERT INTO meta (key, value) VALUES ('generation', '1')
				ON CONFLICT (key) DO UPDATE SET value = CAST(value AS INTEGER) + 1 RETURNING CAST(value AS INTEGER)`).Scan(&d.Number); err != nil {
				return fmt.Errorf("next generation: %w", err)
			}
			if _, err := tx.ExecContext(ctx, "INSERT INTO desired (device, number, sha256, document) VALUES (?, ?, ?, ?) ON CONFLICT (device) DO UPDATE SET number = excluded.number, sha256 = excluded.sha256, document = excluded.document",
				d.Device, d.Number, d.SHA256[:], append([]byte{}, d.Document...)); err != nil {
				return fmt.Errorf("desired document of device %s: %w", d.Device, err)
			}
			saved = append(saved, d)
		}
		return nil
	})
	return saved, err
}

// Desired gives a device's desired document, or ErrNotFound.
func (s *Store) Desired(ctx context.Context, device string) (d Desired, err error) {
	var sum []byte
	err = s.reader.QueryRowContext(ctx, "SELECT device, number, sha256, document FROM desired WHERE device = ?", device).Scan(&d.Device, &d.Number, &sum, &d.Document)
	if errors.Is(err, sql.ErrNoRows) {
		return d, fmt.Errorf("desired document of device %s: %w", device, ErrNotFound)
	}
	copy(d.SHA256[:], sum)
	return d, err
}

// Documents gives the desired documents of devices; those that have none yet
// are left out.
func (s *Store) Documents(ctx context.Context, names []string) (map[string]*dunlinv1.DesiredDocument, error) {
	documents := make(map[string]*dunlinv1.DesiredDocument, len(names))
	if len(names) == 0 {
		return documents, nil
	}
	err := s.read(ctx, func(tx *sql.Tx) error {
		for _, name := range names {
			var b []byte
			err := tx.QueryRowContext(ctx, "SELECT document FROM desired WHERE device = ?", name).Scan(&b)
			if errors.Is(err, sql.ErrNoRows) {
				continue
			}
			if err != nil {
				return err
			}
			doc := &dunlinv1.DesiredDocument{}
			if err := proto.Unmarshal(b, doc); err != nil {
				return fmt.Errorf("desired document of device %s: %w", name, err)
			}
			documents[name] = doc
		}
		return nil
	})
	return documents, err
}

// Snapshot is one state of all that desired documents and rollouts follow from.
type Snapshot struct {
	Devices  []*Device
	Objects  fleet.Objects
	Rollouts []fleet.Rollout // that run
}

// Snapshot reads one state of the store.
func (s *Store) Snapshot(ctx context.Context) (snap Snapshot, err error) {
	err = s.read(ctx, func(tx *sql.Tx) error {
		snap, err = snapshot(ctx, tx, nil)
		return err
	})
	return snap, err
}

// Suppose gives the state that there would be once objects were applied; its
// error is that of Apply.
func (s *Store) Suppose(ctx context.Context, apply []fleet.Object) (snap Snapshot, err error) {
	err = s.read(ctx, func(tx *sql.Tx) error {
		stored, err := objects(ctx, tx)
		if err != nil {
			return err
		}
		if err := check(ctx, tx, byName(stored), apply); err != nil {
			return err
		}
		snap, err = snapshot(ctx, tx, apply)
		return err
	})
	return snap, err
}

func snapshot(ctx context.Context, tx *sql.Tx, apply []fleet.Object) (snap Snapshot, err error) {
	if snap.Devices, err = devices(ctx, tx, ""); err != nil {
		return snap, err
	}
	stored, err := objects(ctx, tx)
	if err != nil {
		return snap, err
	}
	after := byName(stored)
	for _, o := range apply {
		after[[2]string{o.Kind(), o.Name()}] = o
	}
	for _, key := range slices.SortedFunc(maps.Keys(after), func(a, b [2]string) int { return slices.Compare(a[:], b[:]) }) {
		if o := after[key]; o.Deployment != nil {
			snap.Objects.Deployments = append(snap.Objects.Deployments, *o.Deployment)
		} else {
			snap.Objects.Routes = append(snap.Objects.Routes, *o.Route)
		}
	}
	for _, d := range snap.Objects.Deployments {
		v, err := scanVersion(tx.QueryRowContext(ctx, selectVersions+"WHERE model = ? AND version = ?", d.Model, d.Version).Scan)
		if err != nil {
			return snap, fmt.Errorf("version %d of model %s: %w", d.Version, d.Model, err)
		}
		given := v.Fleet()
		if given.Signatures, err = signaturesOf(ctx, tx, v.Model, v.Digest); err != nil {
			return snap, err
		}
		snap.Objects.Versions = append(snap.Objects.Versions, given)
		if snap.Objects.Measured, err = measured(ctx, tx, v.Model, v.Digest, snap.Objects.Measured); err != nil {
			return snap, err
		}
	}
	snap.Rollouts, err = rollouts(ctx, tx, "WHERE state = 1 ORDER BY number")
	return snap, err
}
