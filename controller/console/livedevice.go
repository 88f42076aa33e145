package console

import (
	"bytes"
	"context"
	"encoding/json"
	"net/http"
	"strings"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	v1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

const (
	plotsFor   = time.Hour
	plotsFirst = 240             // samples that plots begin with
	lookAgain  = 3 * time.Second // between two times that the device is told that somebody looks
)

// deviceParts are those of a device's page that change.
var deviceParts = []string{"how", "part-versions", "part-alarms", "part-drift", "part-memory", "part-figures"}

// sampleOf is what plots show of a sample: seconds since 1970, then each
// figure, or null where the device does not have it.
func sampleOf(t *v1.Telemetry) [8]any {
	row := [8]any{float64(t.GetAt().AsTime().UnixMilli()) / 1000}
	set := func(i int, v *float64, by float64) {
		if v != nil {
			row[i] = *v * by
		}
	}
	set(1, t.CpuUtilisation, 100)
	share := func(i int, used, total *uint64) {
		if used != nil && total != nil && *total > 0 {
			row[i] = 100 * float64(*used) / float64(*total)
		}
	}
	share(3, t.MemoryUsedBytes, t.MemoryTotalBytes)
	set(5, t.PowerWatts, 1)
	for _, s := range t.GetTemperatures() { // the hottest
		if was, ok := row[6].(float64); !ok || s.GetCelsius() > was {
			row[6] = s.GetCelsius()
		}
	}
	for _, g := range t.GetGpus() { // the one that is used most
		if u := 100 * g.GetUtilisation(); g.Utilisation != nil {
			if was, ok := row[2].(float64); !ok || u > was {
				row[2] = u
			}
		}
		if row[4] == nil {
			share(4, g.MemoryUsedBytes, g.MemoryTotalBytes)
		}
		if c := g.GetCelsius(); g.Celsius != nil {
			if was, ok := row[6].(float64); !ok || c > was {
				row[6] = c
			}
		}
	}
	set(7, t.RequestP99Seconds, 1000)
	return row
}

// liveDevice streams the parts of a device's page that change, and its samples.
// While it does, the device sends one each second.
func (s *console) liveDevice(w http.ResponseWriter, r *http.Request, in session) {
	name := r.PathValue("device")
	if _, err := in.list(r.Context(), name); err != nil {
		http.Error(w, messageOf(err), statusOf(err))
		return
	}
	var looked, sampled time.Time
	before := map[string][]byte{}
	s.follow(w, r, in, func(ctx context.Context, out func(string, []byte)) error {
		now := s.Now()
		var rows [][8]any
		if now.Sub(looked) >= lookAgain {
			req := &v1.ListTelemetryRequest{Device: name, Look: true, Limit: 1, From: timestamppb.New(now.Add(-time.Minute)), Until: timestamppb.New(now)}
			if looked.IsZero() {
				req.Limit, req.From = plotsFirst, timestamppb.New(now.Add(-plotsFor))
			}
			resp, err := in.calls.devices().ListTelemetry(ctx, connect.NewRequest(req))
			if err != nil {
				return err
			}
			if looked.IsZero() {
				for _, t := range resp.Msg.GetSamples() {
					rows = append(rows, sampleOf(t))
				}
			}
			looked = now
		}
		d, drifts, err := in.deviceNow(ctx, name)
		if err != nil {
			return err
		}
		if t := d.GetTelemetry(); t != nil && t.GetAt().AsTime().After(sampled) {
			sampled = t.GetAt().AsTime()
			rows = append(rows, sampleOf(t))
		}
		if len(rows) > 0 {
			b, err := json.Marshal(rows)
			if err != nil {
				return err
			}
			out("samples", b)
		}
		v := deviceViewOf(d, drifts, now)
		quiet := v
		quiet.Now = v.Heard // how long ago is not news: the page counts by itself
		var news bytes.Buffer
		for _, part := range deviceParts {
			b, err := s.pages.render("device", part, quiet)
			if err != nil {
				return err
			}
			if had, ok := before[part]; ok && !bytes.Equal(had, b) {
				news.WriteString("<template>" + strings.Replace(string(b), ` id="`, ` hx-swap-oob="true" id="`, 1) + "</template>")
			}
			before[part] = b
		}
		if news.Len() > 0 {
			out("device", news.Bytes())
		}
		return nil
	})
}

// deviceNow gives a device, and what of it is other than it should be.
func (in session) deviceNow(ctx context.Context, name string) (*v1.Device, []*v1.DeviceDrift, error) {
	devices, err := in.list(ctx, name)
	if err != nil {
		return nil, nil, err
	}
	if len(devices) == 0 {
		return nil, nil, connect.NewError(connect.CodeNotFound, errNoDevice)
	}
	drift, err := in.calls.devices().ListDrift(ctx, connect.NewRequest(&v1.ListDriftRequest{Device: name}))
	if err != nil {
		return nil, nil, err
	}
	return devices[0], drift.Msg.GetDrifts(), nil
}
