package store

import (
	"bytes"
	"cmp"
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
	if a := d.Reported.GetAgent(); model == fleet.AgentModel {
		if a.GetVersion() == version {
			switch a.GetState() {
			case dunlinv1.AgentStatus_STATE_CURRENT:
				o.Serving = true
			case dunlinv1.AgentStatus_STATE_REVERTED, dunlinv1.AgentStatus_STATE_REFUSED:
				o.Quarantined = true
			}
			o.Reason, o.BytesPresent, o.BytesTotal = a.GetReason(), a.GetBytesPresent(), a.GetBytesTotal()
		}
		if a == nil {
			o.Quarantined, o.Reason = true, fmt.Sprintf("its agent, %s, is from before agents update themselves", cmp.Or(d.Info.GetAgentVersion(), "of no version"))
		}
		return o
	}
	for _, v := range d.Reported.GetVersions() {
		if v.GetModel() == model && v.GetVersion() == version {
			o.Quarantined = v.GetState() == dunlinv1.VersionState_VERSION_STATE_QUARANTINED
			o.Serving = v.GetServing() && !o.Quarantined
			o.Reason, o.BytesPresent, o.BytesTotal = v.GetReason(), v.GetBytesPresent(), v.GetBytesTotal()
		}
	}
	return o
}

// ObserveRollout gives what d is known to do of a rollout: whether it serves
// the new version, or the one before again. What it reports counts only where
// its document follows from the rollout: not before it is given the version.
func (d *Device) ObserveRollout(incarnation string, r fleet.Rollout) fleet.Observation {
	o := d.Observe(incarnation, r.Model, r.To)
	o.Class, o.HeardAt = d.Info.GetFirmwareProfile(), d.LastHeardAt
	if o.HeardAt.IsZero() {
		o.HeardAt = d.JoinedAt
	}
	part, known := r.Device(d.Name)
	if r.State != fleet.RollingBack && (!known || part.AdmittedAt.IsZero()) || r.Since.IsZero() {
		return fleet.Observation{Device: o.Device, Class: o.Class, Connected: o.Connected, HeardAt: o.HeardAt}
	}
	if o.Observed && r.From > 0 {
		o.RolledBack = d.Observe(incarnation, r.Back(), r.From).Serving
	} else if o.Observed {
		o.RolledBack = !o.Serving
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
	err = s.write(ctx, "hello", func(tx *sql.Tx) error {
		d, changed, err = s.hello(ctx, tx, device, h)
		return err
	})
	if err != nil {
		return nil, false, err
	}
	return d, changed, nil
}

func (s *Store) hello(ctx context.Context, tx *sql.Tx, device string, h *dunlinv1.Hello) (d *Device, changed bool, err error) {
	info, err := proto.Marshal(h.GetInfo())
	if err != nil {
		return nil, false, fmt.Errorf("encode device info: %w", err)
	}
	var own, session string
	var known []byte
	err = s.prepared(ctx, tx, helloQuery).QueryRowContext(ctx, device).Scan(&own, &session, &known)
	if errors.Is(err, sql.ErrNoRows) {
		return nil, false, fmt.Errorf("device %s: %w", device, ErrNotFound)
	}
	if err != nil {
		return nil, false, err
	}
	if len(h.GetLabels()) > 0 {
		labels := jsonText(h.GetLabels())
		changed, own = labels != own, labels
	}
	if len(info) > 0 && !bytes.Equal(info, known) {
		was := &dunlinv1.DeviceInfo{}
		if err := proto.Unmarshal(known, was); err != nil {
			return nil, false, fmt.Errorf("info of device %s: %w", device, err)
		}
		now := h.GetInfo()
		changed = changed || was.GetFirmwareProfile() != now.GetFirmwareProfile() || was.GetDiskBytes() != now.GetDiskBytes() || !proto.Equal(was.GetLimits(), now.GetLimits())
	}
	if _, err = s.prepared(ctx, tx, helloUpdate).ExecContext(ctx,
		s.now().UnixNano(), own, h.GetSession(), h.GetSession(), len(info), append([]byte{}, info...),
		int64(min(h.GetTrustVersion(), math.MaxInt64)), jsonText(hexes(h.GetRootIds())), device); err != nil {
		return nil, false, err
	}
	d, err = scanDevice(s.prepared(ctx, tx, deviceQuery).QueryRowContext(ctx, device).Scan)
	return d, changed, err
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
	return s.write(ctx, "report", func(tx *sql.Tx) error { return s.report(ctx, tx, device, r) })
}

func (s *Store) report(ctx context.Context, tx *sql.Tx, device string, r *dunlinv1.Reported) error {
	blob, err := proto.Marshal(r)
	if err != nil {
		return fmt.Errorf("encode report: %w", err)
	}
	if r.GetSequence() > math.MaxInt64 {
		return fmt.Errorf("report of device %s: sequence %d: %w", device, r.GetSequence(), ErrStale)
	}
	return changedOne(s.prepared(ctx, tx, reportUpdate).ExecContext(ctx,
		s.now().UnixNano(), blob, int64(r.GetSequence()), device, r.GetSession(), int64(r.GetSequence())))
}

// Gone ends a device's session. Another one than the device's is ErrStale.
func (s *Store) Gone(ctx context.Context, device, session string) error {
	return s.write(ctx, "gone", func(tx *sql.Tx) error { return s.gone(ctx, tx, device, session) })
}

func (s *Store) gone(ctx context.Context, tx *sql.Tx, device, session string) error {
	return changedOne(s.prepared(ctx, tx, goneUpdate).ExecContext(ctx, s.now().UnixNano(), device, session))
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
	inner := context.WithoutCancel(ctx)
	err = s.write(ctx, "desired", func(tx *sql.Tx) error {
		saved = nil
		for _, d := range documents {
			var known, same bool
			if err := s.prepared(inner, tx, desiredQuery).QueryRowContext(inner, d.Device, d.SHA256[:]).Scan(&known, &same); err != nil {
				return err
			}
			if known && !same {
				saved = append(saved, d)
			}
		}
		if len(saved) == 0 {
			return ctx.Err()
		}
		var last uint64
		if err := tx.QueryRowContext(ctx, `INSERT INTO meta (key, value) VALUES ('generation', CAST(?1 AS TEXT))
			ON CONFLICT (key) DO UPDATE SET value = CAST(value AS INTEGER) + ?1 RETURNING CAST(value AS INTEGER)`, len(saved)).Scan(&last); err != nil {
			return fmt.Errorf("next generation: %w", err)
		}
		for i := range saved {
			d := &saved[i]
			d.Number = last - uint64(len(saved)-1-i)
			if _, err := s.prepared(inner, tx, desiredPut).ExecContext(inner, d.Device, d.Number, d.SHA256[:], append([]byte{}, d.Document...)); err != nil {
				return fmt.Errorf("desired document of device %s: %w", d.Device, err)
			}
		}
		return ctx.Err()
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
	Devices []*Device
	Objects fleet.Objects
	// The newest rollout of each deployment, and all that have not ended, by
	// number.
	Rollouts []fleet.Rollout
}

// Snapshot reads one state of the store.
func (s *Store) Snapshot(ctx context.Context) (snap Snapshot, err error) {
	err = s.read(ctx, func(tx *sql.Tx) error {
		snap, err = snapshot(ctx, tx, nil)
		return err
	})
	return snap, err
}

// Plans gives a snapshot without devices. Of rollouts that had knows, as they
// are but for their devices, it gives those; it reads the others' devices.
func (s *Store) Plans(ctx context.Context, had []fleet.Rollout) (snap Snapshot, err error) {
	err = s.read(ctx, func(tx *sql.Tx) error {
		if snap.Objects, err = plans(ctx, tx, nil); err != nil {
			return err
		}
		if snap.Rollouts, err = rolloutHeads(ctx, tx, whereCurrent); err != nil {
			return err
		}
		for i := range snap.Rollouts {
			r := &snap.Rollouts[i]
			if j, ok := slices.BinarySearchFunc(had, r.Number, func(h fleet.Rollout, n int64) int { return cmp.Compare(h.Number, n) }); ok {
				r.Devices = had[j].Devices
				if r.Equal(had[j]) {
					continue
				}
				r.Devices = nil
			}
			if err := withDevices(ctx, tx, r); err != nil {
				return err
			}
		}
		return nil
	})
	return snap, err
}

// DevicesOf gives the devices of some names, those that there are, by name.
func (s *Store) DevicesOf(ctx context.Context, names []string) (all []*Device, err error) {
	err = s.read(ctx, func(tx *sql.Tx) error {
		all, err = devices(ctx, tx, "WHERE name IN (SELECT value FROM json_each(?))", jsonText(names))
		return err
	})
	return all, err
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

// whereCurrent selects the rollouts that desired documents follow from.
const whereCurrent = "WHERE state IN " + openStates + " OR number IN (SELECT max(number) FROM rollouts GROUP BY deployment) ORDER BY number"

func snapshot(ctx context.Context, tx *sql.Tx, apply []fleet.Object) (snap Snapshot, err error) {
	if snap.Devices, err = devices(ctx, tx, ""); err != nil {
		return snap, err
	}
	if snap.Objects, err = plans(ctx, tx, apply); err != nil {
		return snap, err
	}
	snap.Rollouts, err = rollouts(ctx, tx, whereCurrent)
	return snap, err
}

// plans gives the objects as they would be once some were applied, with the
// versions that they and the current rollouts name.
func plans(ctx context.Context, tx *sql.Tx, apply []fleet.Object) (all fleet.Objects, err error) {
	stored, err := objects(ctx, tx)
	if err != nil {
		return all, err
	}
	after := byName(stored)
	for _, o := range apply {
		after[[2]string{o.Kind(), o.Name()}] = o
	}
	for _, key := range slices.SortedFunc(maps.Keys(after), func(a, b [2]string) int { return slices.Compare(a[:], b[:]) }) {
		switch o := after[key]; {
		case o.Deployment != nil:
			all.Deployments = append(all.Deployments, *o.Deployment)
		case o.Route != nil:
			all.Routes = append(all.Routes, *o.Route)
		case o.Freeze != nil:
			all.Freezes = append(all.Freezes, *o.Freeze)
		case o.Maintenance != nil:
			all.Maintenances = append(all.Maintenances, *o.Maintenance)
		}
	}
	type wanted struct {
		model   string
		version int64
	}
	want := map[wanted]bool{} // true: it must be there
	rollouts, err := rolloutHeads(ctx, tx, whereCurrent)
	if err != nil {
		return all, err
	}
	for _, r := range rollouts {
		want[wanted{r.Back(), r.From}], want[wanted{r.Model, r.To}] = false, false
	}
	for _, d := range all.Deployments {
		want[wanted{d.Model, d.Version}] = true
	}
	for _, w := range slices.SortedFunc(maps.Keys(want), func(a, b wanted) int { return cmp.Or(cmp.Compare(a.model, b.model), cmp.Compare(a.version, b.version)) }) {
		v, err := scanVersion(tx.QueryRowContext(ctx, selectVersions+"WHERE model = ? AND version = ?", w.model, w.version).Scan)
		if errors.Is(err, sql.ErrNoRows) && !want[w] {
			continue
		}
		if err != nil {
			return all, fmt.Errorf("version %d of model %s: %w", w.version, w.model, err)
		}
		given := v.Fleet()
		if given.Signatures, err = signaturesOf(ctx, tx, v.Model, v.Digest); err != nil {
			return all, err
		}
		all.Versions = append(all.Versions, given)
		if all.Measured, err = measured(ctx, tx, v.Model, v.Digest, all.Measured); err != nil {
			return all, err
		}
	}
	return all, nil
}
