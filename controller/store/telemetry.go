package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// The spans that samples of telemetry stand for, the finest first. Each is
// made of the one before.
var telemetrySpans = [...]time.Duration{time.Minute, 10 * time.Minute, time.Hour}

// The limits of the history of telemetry.
const (
	// MaxTelemetry bounds the samples that are kept of all devices together;
	// each span has a third of it. With more devices the history is shorter.
	MaxTelemetry = 30_000_000
	// maxSample bounds a sample in bytes; a longer one is kept without its
	// models, GPUs and temperatures.
	maxSample = 4 << 10
	// telemetryBatch bounds the samples that are written in one transaction.
	telemetryBatch = 2000
	// telemetryLag is how long after a span's end its samples are put together.
	telemetryLag = 2 * time.Minute
	// telemetryScan bounds the slots of one span that are looked at for one
	// answer.
	telemetryScan = 10_000
	// telemetryStep bounds the spans that are put together, and the slots that
	// are forgotten, in one call.
	telemetryStep = 60
)

// TelemetryKeep is for how long the samples of each span are kept.
type TelemetryKeep [len(telemetrySpans)]time.Duration

// DefaultTelemetryKeep is a day of minutes, two weeks of ten minutes, and a
// little more than a year of hours.
var DefaultTelemetryKeep = TelemetryKeep{24 * time.Hour, 14 * 24 * time.Hour, 400 * 24 * time.Hour}

// Sample is what a device sent, and when that came.
type Sample struct {
	Device     string
	ReceivedAt time.Time
	Telemetry  *dunlinv1.Telemetry
}

// AddTelemetry keeps samples, at most one a minute of each device, the newest:
// by the clock of the controller, whatever that of the device says.
func (s *Store) AddTelemetry(ctx context.Context, samples []Sample) error {
	for some := range slices.Chunk(samples, telemetryBatch) {
		err := s.write(ctx, "telemetry", func(tx *sql.Tx) error {
			put, err := putTelemetry(ctx, tx)
			if err != nil {
				return err
			}
			defer put.Close()
			for _, one := range some {
				t := kept(one.Telemetry)
				t.At = timestamppb.New(one.ReceivedAt)
				if err := put.add(ctx, 0, slotOf(one.ReceivedAt, telemetrySpans[0]), one.Device, t); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return fmt.Errorf("keep telemetry: %w", err)
		}
	}
	return nil
}

type telemetryPut struct{ *sql.Stmt }

func putTelemetry(ctx context.Context, tx *sql.Tx) (telemetryPut, error) {
	stmt, err := tx.PrepareContext(ctx, "INSERT OR REPLACE INTO telemetry (span, slot, device, sample) VALUES (?, ?, ?, ?)")
	return telemetryPut{stmt}, err
}

func (p telemetryPut) add(ctx context.Context, span int, slot int64, device string, t *dunlinv1.Telemetry) error {
	b, err := proto.Marshal(t)
	if err == nil && len(b) > maxSample {
		t = proto.CloneOf(t)
		t.Models, t.Gpus, t.Temperatures, t.Alarms = nil, nil, nil, nil
		b, err = proto.Marshal(t)
	}
	if err != nil {
		return fmt.Errorf("encode telemetry of device %s: %w", device, err)
	}
	_, err = p.ExecContext(ctx, int64(telemetrySpans[span]/time.Second), slot, device, b)
	return err
}

func slotOf(t time.Time, span time.Duration) int64 { return t.Unix() / int64(span/time.Second) }

// kept is what is kept of a sample: of alarms only which there were, and
// nothing that only matters now.
func kept(t *dunlinv1.Telemetry) *dunlinv1.Telemetry {
	t = proto.CloneOf(t)
	t.ProtoReflect().SetUnknown(nil)
	t.Faults = nil
	for _, m := range t.GetModels() {
		m.Figures, m.Activations, m.Evictions = nil, nil, nil
	}
	for _, g := range t.GetGpus() {
		g.Processes = nil
	}
	for i, a := range t.GetAlarms() {
		t.Alarms[i] = &dunlinv1.Alarm{Kind: a.GetKind(), Subject: a.GetSubject(), Severity: a.GetSeverity()}
	}
	return t
}

// RollTelemetry puts the samples of spans that are over together to samples of
// the next longer span. It goes on where it stopped, and does a bounded part
// in one call; again says whether there is more to do.
func (s *Store) RollTelemetry(ctx context.Context) (again bool, err error) {
	for span := 1; span < len(telemetrySpans); span++ {
		more, err := s.rollSpan(ctx, span)
		if err != nil {
			return false, fmt.Errorf("put telemetry together: %w", err)
		}
		again = again || more
	}
	return again, nil
}

func (s *Store) rollSpan(ctx context.Context, span int) (again bool, err error) {
	from, to := telemetrySpans[span-1], telemetrySpans[span]
	key := "telemetry_rolled_" + strconv.Itoa(int(to/time.Second))
	ratio := int64(to / from)
	now := s.now()
	for range telemetryStep {
		var next sql.Null[int64] // the first slot of from that is not put together
		err := s.reader.QueryRowContext(ctx, "SELECT min(slot) FROM telemetry WHERE span = ? AND slot >= coalesce((SELECT CAST(value AS INTEGER) FROM meta WHERE key = ?), 0) * ?",
			int64(from/time.Second), key, ratio).Scan(&next)
		if err != nil || !next.Valid {
			return false, err
		}
		slot := next.V / ratio
		if end := time.Unix((slot+1)*int64(to/time.Second), 0); now.Sub(end) < telemetryLag {
			return false, nil
		}
		if err := s.rollSlot(ctx, span, slot, key); err != nil {
			return false, err
		}
	}
	return true, nil
}

// rollSlot makes the samples of one slot of a span, some devices at a time.
func (s *Store) rollSlot(ctx context.Context, span int, slot int64, key string) error {
	from, to := telemetrySpans[span-1], telemetrySpans[span]
	ratio := int64(to / from)
	after := ""
	for {
		var devices []string
		err := s.read(ctx, func(tx *sql.Tx) error {
			return each(ctx, tx, "SELECT DISTINCT device FROM telemetry WHERE span = ? AND slot BETWEEN ? AND ? AND device > ? ORDER BY device LIMIT ?",
				[]any{int64(from / time.Second), slot * ratio, (slot+1)*ratio - 1, after, telemetryBatch}, func(scan func(...any) error) error {
					var device string
					err := scan(&device)
					devices = append(devices, device)
					return err
				})
		})
		if err != nil {
			return err
		}
		last := len(devices) < telemetryBatch
		made := make(map[string]*summary, len(devices))
		if len(devices) > 0 {
			after = devices[len(devices)-1]
			err = s.read(ctx, func(tx *sql.Tx) error {
				return each(ctx, tx, "SELECT device, sample FROM telemetry WHERE span = ? AND slot BETWEEN ? AND ? AND device BETWEEN ? AND ? ORDER BY slot",
					[]any{int64(from / time.Second), slot * ratio, (slot+1)*ratio - 1, devices[0], after}, func(scan func(...any) error) error {
						var device string
						var b []byte
						if err := scan(&device, &b); err != nil {
							return err
						}
						t := &dunlinv1.Telemetry{}
						if err := proto.Unmarshal(b, t); err != nil {
							return fmt.Errorf("telemetry of device %s: %w", device, err)
						}
						if made[device] == nil {
							made[device] = &summary{}
						}
						made[device].add(t)
						return nil
					})
			})
			if err != nil {
				return err
			}
		}
		err = s.write(ctx, "telemetry rolled", func(tx *sql.Tx) error {
			put, err := putTelemetry(ctx, tx)
			if err != nil {
				return err
			}
			defer put.Close()
			for _, device := range devices {
				if err := put.add(ctx, span, slot, device, made[device].telemetry()); err != nil {
					return err
				}
			}
			if !last {
				return nil
			}
			_, err = tx.ExecContext(ctx, "INSERT OR REPLACE INTO meta (key, value) VALUES (?, ?)", key, strconv.FormatInt(slot+1, 10))
			return err
		})
		if err != nil || last {
			return err
		}
	}
}

// summary makes one sample of several: rates and levels are means, what is a
// peak stays one, and the rest is as in the newest.
type summary struct {
	newest *dunlinv1.Telemetry
	means  map[string]*mean
	peaks  map[string]float64
}

type mean struct {
	sum float64
	n   int
}

// levels are the figures that are means, by their names.
func levels(t *dunlinv1.Telemetry) map[string]**float64 {
	return map[string]**float64{
		"cpu": &t.CpuUtilisation, "power": &t.PowerWatts, "requests": &t.RequestsPerSecond, "failures": &t.FailuresPerSecond,
	}
}

func sizes(t *dunlinv1.Telemetry) map[string]**uint64 {
	return map[string]**uint64{"memory": &t.MemoryUsedBytes, "models": &t.ModelMemoryUsedBytes, "agent": &t.AgentAnonymousBytes}
}

func (m *summary) add(t *dunlinv1.Telemetry) {
	if m.means == nil {
		m.means, m.peaks = map[string]*mean{}, map[string]float64{}
	}
	average := func(name string, v float64) {
		if m.means[name] == nil {
			m.means[name] = &mean{}
		}
		m.means[name].sum += v
		m.means[name].n++
	}
	for name, v := range levels(t) {
		if *v != nil {
			average(name, **v)
		}
	}
	for name, v := range sizes(t) {
		if *v != nil {
			average(name, float64(**v))
		}
	}
	peak := func(name string, v float64) {
		if was, ok := m.peaks[name]; !ok || v > was {
			m.peaks[name] = v
		}
	}
	if t.RequestP99Seconds != nil {
		peak("p99", t.GetRequestP99Seconds())
	}
	for _, s := range t.GetTemperatures() {
		peak("sensor "+s.GetSensor(), s.GetCelsius())
	}
	for _, g := range t.GetGpus() {
		name := fmt.Sprintf("gpu %d ", g.GetIndex())
		if g.Celsius != nil {
			peak(name, g.GetCelsius())
		}
		if g.Utilisation != nil {
			average(name+"utilisation", g.GetUtilisation())
		}
		if g.PowerWatts != nil {
			average(name+"power", g.GetPowerWatts())
		}
	}
	m.newest = t
}

// telemetry gives the sample; m has been given one at least.
func (m *summary) telemetry() *dunlinv1.Telemetry {
	t := proto.CloneOf(m.newest)
	average := func(name string) *float64 {
		if a := m.means[name]; a != nil {
			return new(a.sum / float64(a.n))
		}
		return nil
	}
	for name, v := range levels(t) {
		*v = average(name)
	}
	for name, v := range sizes(t) {
		if a := average(name); a != nil {
			*v = new(uint64(*a))
		}
	}
	if p, ok := m.peaks["p99"]; ok {
		t.RequestP99Seconds = &p
	}
	for _, s := range t.GetTemperatures() {
		s.Celsius = m.peaks["sensor "+s.GetSensor()]
	}
	for _, g := range t.GetGpus() {
		name := fmt.Sprintf("gpu %d ", g.GetIndex())
		if p, ok := m.peaks[name]; ok {
			g.Celsius = &p
		}
		if a := average(name + "utilisation"); a != nil {
			g.Utilisation = a
		}
		if a := average(name + "power"); a != nil {
			g.PowerWatts = a
		}
	}
	return t
}

// PruneTelemetry forgets samples that are older than keep says, or than there
// is room for, a bounded part of them in one call; again says whether there
// are more.
func (s *Store) PruneTelemetry(ctx context.Context, keep TelemetryKeep) (again bool, err error) {
	var devices int64
	if err := s.reader.QueryRowContext(ctx, "SELECT count(*) FROM devices").Scan(&devices); err != nil {
		return false, err
	}
	now := s.now()
	for i, span := range telemetrySpans {
		slots := min(int64(keep[i]/span), MaxTelemetry/int64(len(telemetrySpans))/max(devices, 1))
		oldest := slotOf(now, span) - max(slots, 1)
		for step := 0; ; step++ {
			var slot sql.Null[int64]
			err := s.reader.QueryRowContext(ctx, "SELECT min(slot) FROM telemetry WHERE span = ?", int64(span/time.Second)).Scan(&slot)
			if err != nil {
				return false, fmt.Errorf("forget telemetry: %w", err)
			}
			if !slot.Valid || slot.V >= oldest {
				break
			}
			if step == telemetryStep {
				again = true
				break
			}
			err = s.write(ctx, "prune telemetry", func(tx *sql.Tx) error {
				_, err := tx.ExecContext(ctx, "DELETE FROM telemetry WHERE span = ? AND slot = ?", int64(span/time.Second), slot.V)
				return err
			})
			if err != nil {
				return false, fmt.Errorf("forget telemetry: %w", err)
			}
		}
	}
	return again, nil
}

// Telemetry gives the kept samples of a device from one time until another,
// oldest first: of each time the finest there are, and at most limit, evenly
// apart. What came before the device joined is of another one.
func (s *Store) Telemetry(ctx context.Context, device string, from, until time.Time, limit int) (samples []*dunlinv1.Telemetry, err error) {
	d, err := s.Device(ctx, device)
	if err != nil {
		return nil, err
	}
	if from.Before(d.JoinedAt) {
		from = d.JoinedAt
	}
	if !from.Before(until) || limit < 1 {
		return nil, nil
	}
	err = s.read(ctx, func(tx *sql.Tx) error {
		// Longer spans stand in for the time before the finer ones begin.
		end := until
		var parts [][][]byte
		for i, span := range telemetrySpans {
			seconds := int64(span / time.Second)
			oldest, err := oldestSlot(ctx, tx, span)
			if err != nil {
				return err
			}
			if !oldest.Valid {
				continue
			}
			begin := time.Unix(oldest.V*seconds, 0)
			if i+1 < len(telemetrySpans) { // or where a slot of the next span ends, if there is one before
				longer := telemetrySpans[i+1]
				edge := time.Unix((slotOf(begin.Add(-1), longer)+1)*int64(longer/time.Second), 0)
				before, err := oldestSlot(ctx, tx, longer)
				if err != nil {
					return err
				}
				if before.Valid && before.V < slotOf(edge, longer) {
					begin = edge
				}
			}
			if begin.Before(from) {
				begin = from
			}
			if begin.Before(end) {
				part, err := telemetrySpan(ctx, tx, device, seconds, slotOf(begin, span), slotOf(end.Add(-1), span))
				if err != nil {
					return err
				}
				parts = append(parts, part)
				end = begin
			}
			if !from.Before(end) {
				break
			}
		}
		var encoded [][]byte
		for _, p := range slices.Backward(parts) {
			encoded = append(encoded, p...)
		}
		for _, b := range thin(encoded, limit) {
			t := &dunlinv1.Telemetry{}
			if err := proto.Unmarshal(b, t); err != nil {
				return fmt.Errorf("telemetry of device %s: %w", device, err)
			}
			samples = append(samples, t)
		}
		return nil
	})
	return samples, err
}

func oldestSlot(ctx context.Context, tx *sql.Tx, span time.Duration) (slot sql.Null[int64], err error) {
	err = tx.QueryRowContext(ctx, "SELECT min(slot) FROM telemetry WHERE span = ?", int64(span/time.Second)).Scan(&slot)
	return slot, err
}

// telemetrySpan gives the samples of one span in some slots; of more than
// telemetryScan slots only of those evenly apart.
func telemetrySpan(ctx context.Context, tx *sql.Tx, device string, seconds, first, last int64) (samples [][]byte, err error) {
	stmt, err := tx.PrepareContext(ctx, "SELECT sample FROM telemetry WHERE span = ? AND slot = ? AND device = ?")
	if err != nil {
		return nil, err
	}
	defer stmt.Close()
	step := (last - first + telemetryScan) / telemetryScan
	for slot := first; slot <= last; slot += step {
		var b []byte
		err := stmt.QueryRowContext(ctx, seconds, slot, device).Scan(&b)
		if errors.Is(err, sql.ErrNoRows) {
			continue
		}
		if err != nil {
			return nil, err
		}
		samples = append(samples, b)
	}
	return samples, nil
}

// thin leaves at most limit of items, evenly apart, with the last of them.
func thin[T any](items []T, limit int) []T {
	if len(items) <= limit {
		return items
	}
	left := make([]T, 0, limit)
	for i := 1; i <= limit; i++ {
		left = append(left, items[i*len(items)/limit-1])
	}
	return left
}
