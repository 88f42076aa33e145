package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"math"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/dunlin/dunlin/controller/fleet"
	"github.com/dunlin/dunlin/internal/estimate"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// MaxProfiles bounds the profiles of one device that are kept; beyond it the
// one that was received first is forgotten.
const MaxProfiles = 1000

// DeviceProfile is what a device measured of a version.
type DeviceProfile struct {
	Device     string
	Profile    *dunlinv1.ModelProfile
	ReceivedAt time.Time
}

// ProfileFilter narrows profiles down; what is empty does not.
type ProfileFilter struct {
	Model   string
	Version int64
	Device  string
	Class   string // firmware profile
}

// measurementOf gives what plans need of a profile.
func measurementOf(p *dunlinv1.ModelProfile) fleet.Measurement {
	m := fleet.Measurement{
		Class: p.GetFirmwareProfile(), Model: p.GetModel(), Digest: p.GetDigest(),
		Weights: p.GetWeightBytes(), Session: p.GetSessionBytes(), Fixed: p.GetWorkspaceFixedBytes(), Row: p.GetWorkspaceRowBytes(),
		Batch: int(p.GetRecommended().GetBatch()),
	}
	var points []estimate.Point
	for _, l := range p.GetLatency() {
		points = append(points, estimate.Point{Rows: int(l.GetRows()), Seconds: l.GetSeconds()})
	}
	rows := uint32(math.MaxUint32)
	for _, point := range p.GetPoints() {
		s := point.GetSetting()
		if len(p.GetLatency()) == 0 {
			points = append(points, estimate.Point{Rows: int(s.GetBatch()), Seconds: point.GetP50Seconds()})
		}
		// The smallest batch comes next to a run of one row.
		if j := point.GetJoulesPerRow(); j > 0 && s.GetBatch() < rows && s.GetProvider() == p.GetRecommended().GetProvider() {
			rows, m.Joules = s.GetBatch(), j
		}
	}
	m.Latency = estimate.FitLatency(points).At(1)
	return m
}

// putProfile keeps p as the device's newest of its version, and says whether
// the figures that plans follow from are others than before.
func (s *Store) putProfile(ctx context.Context, tx *sql.Tx, device string, p *dunlinv1.ModelProfile) (news bool, err error) {
	blob, err := proto.Marshal(p)
	if err != nil {
		return false, fmt.Errorf("encode profile of %s:%d: %w", p.GetModel(), p.GetVersion(), err)
	}
	m := measurementOf(p)
	if m.Class, err = measuredClass(ctx, tx, device, m.Class); err != nil {
		return false, err
	}
	var had fleet.Measurement
	err = tx.QueryRowContext(ctx, "SELECT firmware_profile, weights, session, fixed, row, batch FROM profiles WHERE device = ? AND model = ? AND digest = ?", device, m.Model, m.Digest).
		Scan(&had.Class, &had.Weights, &had.Session, &had.Fixed, &had.Row, &had.Batch)
	if err != nil && !errors.Is(err, sql.ErrNoRows) {
		return false, err
	}
	news = err != nil || had.Class != m.Class || had.Weights != m.Weights || had.Session != m.Session || had.Fixed != m.Fixed || had.Row != m.Row || had.Batch != m.Batch
	if _, err := tx.ExecContext(ctx, `INSERT INTO profiles (device, model, version, digest, firmware_profile, received_at, weights, session, fixed, row, batch, latency, joules, profile)
		VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (device, model, digest) DO UPDATE SET version = excluded.version,
		firmware_profile = excluded.firmware_profile, received_at = excluded.received_at, weights = excluded.weights, session = excluded.session,
		fixed = excluded.fixed, row = excluded.row, batch = excluded.batch, latency = excluded.latency, joules = excluded.joules, profile = excluded.profile`,
		device, m.Model, p.GetVersion(), m.Digest, m.Class, s.now().UnixNano(), int64(m.Weights), int64(m.Session), int64(m.Fixed), int64(m.Row),
		m.Batch, int64(m.Latency), m.Joules, blob); err != nil {
		return false, fmt.Errorf("profile of %s:%d on device %s: %w", m.Model, p.GetVersion(), device, err)
	}
	return news, nil
}

// measuredClass gives the class whose devices a measurement speaks for: that of
// the device itself, or none where the profile says another one, or where the
// device is simulated.
func measuredClass(ctx context.Context, tx *sql.Tx, device, claimed string) (string, error) {
	var blob []byte
	if err := tx.QueryRowContext(ctx, "SELECT info FROM devices WHERE name = ?", device).Scan(&blob); err != nil {
		return "", fmt.Errorf("device %s: %w", device, err)
	}
	info := &dunlinv1.DeviceInfo{}
	if err := proto.Unmarshal(blob, info); err != nil {
		return "", fmt.Errorf("device %s: %w", device, err)
	}
	if info.GetSimulated() || info.GetFirmwareProfile() != claimed {
		return "", nil
	}
	return claimed, nil
}

// boundProfiles forgets what a device has beyond MaxProfiles.
func boundProfiles(ctx context.Context, tx *sql.Tx, device string) error {
	_, err := tx.ExecContext(ctx, `DELETE FROM profiles WHERE device = ? AND (model, digest) IN
		(SELECT model, digest FROM profiles WHERE device = ? ORDER BY received_at DESC, model, digest LIMIT -1 OFFSET ?)`, device, device, MaxProfiles)
	return err
}

// measured adds what devices measured of a version.
func measured(ctx context.Context, tx *sql.Tx, model, digest string, to []fleet.Measurement) ([]fleet.Measurement, error) {
	err := each(ctx, tx, "SELECT device, firmware_profile, received_at, weights, session, fixed, row, batch, latency, joules FROM profiles WHERE model = ? AND digest = ? ORDER BY device", []any{model, digest}, func(scan func(...any) error) error {
		m := fleet.Measurement{Model: model, Digest: digest}
		var received int64
		if err := scan(&m.Device, &m.Class, &received, &m.Weights, &m.Session, &m.Fixed, &m.Row, &m.Batch, &m.Latency, &m.Joules); err != nil {
			return err
		}
		m.ReceivedAt = instant(received)
		to = append(to, m)
		return nil
	})
	return to, err
}

// Profiles gives profiles by model, version and device. The version is that
// which the digest has in this store, or, where it has none, the one that the
// device gave it.
func (s *Store) Profiles(ctx context.Context, f ProfileFilter) (all []DeviceProfile, err error) {
	err = s.read(ctx, func(tx *sql.Tx) error {
		return each(ctx, tx, `SELECT device, coalesce(versions.version, profiles.version) AS number, received_at, profile
			FROM profiles LEFT JOIN versions ON versions.model = profiles.model AND versions.digest = profiles.digest
			WHERE ? IN ('', profiles.model) AND ? IN (0, coalesce(versions.version, profiles.version)) AND ? IN ('', device) AND ? IN ('', firmware_profile)
			ORDER BY profiles.model, number, device, profiles.digest`, []any{f.Model, f.Version, f.Device, f.Class}, func(scan func(...any) error) error {
			p := DeviceProfile{Profile: &dunlinv1.ModelProfile{}}
			var version, received int64
			var blob []byte
			if err := scan(&p.Device, &version, &received, &blob); err != nil {
				return err
			}
			if err := proto.Unmarshal(blob, p.Profile); err != nil {
				return fmt.Errorf("profile on device %s: %w", p.Device, err)
			}
			p.Profile.Version, p.ReceivedAt = version, instant(received)
			all = append(all, p)
			return nil
		})
	})
	return all, err
}
