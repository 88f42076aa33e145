package api

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/dunlin/dunlin/controller/dispatch"
	"github.com/dunlin/dunlin/controller/identity"
	"github.com/dunlin/dunlin/controller/store"
	"github.com/dunlin/dunlin/internal/link"
	v1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

func TestStateOf(t *testing.T) {
	now := time.Now()
	ago := func(d time.Duration) *timestamppb.Timestamp { return timestamppb.New(now.Add(-d)) }
	generation := &v1.Generation{Incarnation: "i", Number: 3}
	resident := []*v1.VersionStatus{{State: v1.VersionState_VERSION_STATE_RESIDENT}}
	for want, d := range map[string]*v1.Device{
		"ok":      {Connected: true, LastHeardAt: ago(staleAfter), Desired: generation, Reported: &v1.Reported{Observed: generation, Versions: resident}},
		"stale":   {Connected: true, LastHeardAt: ago(staleAfter + time.Second), Reported: &v1.Reported{Versions: resident}},
		"offline": {LastHeardAt: ago(0), Reported: &v1.Reported{Versions: resident}},
		"revoked": {Connected: true, LastHeardAt: ago(0), Identity: &v1.DeviceIdentity{RevokedAt: ago(0)}},
		"working": {Connected: true, LastHeardAt: ago(0), Desired: generation, Reported: &v1.Reported{Versions: resident}},
		"trouble": {Connected: true, LastHeardAt: ago(0), Reported: &v1.Reported{Versions: []*v1.VersionStatus{{State: v1.VersionState_VERSION_STATE_STORED}, {State: v1.VersionState_VERSION_STATE_QUARANTINED}}}},
	} {
		if got := stateOfDevice(d, now); got != want {
			t.Errorf("got %s, want %s for %v", got, want, d)
		}
	}
}

// A page is filtered, ordered and counted where the devices are.
func TestPagesOfDevices(t *testing.T) {
	w := start(t)
	up := func(name, kind string, m proto.Message) {
		t.Helper()
		b, err := proto.Marshal(m)
		must(t, err)
		w.dispatch.Handle(link.Up(name, kind), b)
	}
	status := func(model string, s v1.VersionState) *v1.VersionStatus {
		return &v1.VersionStatus{Model: model, Version: 2, State: s, Serving: s == v1.VersionState_VERSION_STATE_RESIDENT}
	}
	resident, quarantined := v1.VersionState_VERSION_STATE_RESIDENT, v1.VersionState_VERSION_STATE_QUARANTINED
	for i, versions := range [][]*v1.VersionStatus{
		{status("digits", resident)}, {status("digits", quarantined), status("faces", resident)}, {status("faces", resident)}, nil, {status("digits", v1.VersionState_VERSION_STATE_STORED)},
	} {
		name := fmt.Sprint("cam-", i)
		w.join(t, name)
		if versions == nil {
			continue
		}
		up(name, link.Hello, &v1.Hello{BootId: name, Session: name, Labels: map[string]string{"line": fmt.Sprint(i % 2)}, Info: &v1.DeviceInfo{Hostname: "Host" + name, FirmwareProfile: "board"}})
		if i == 2 {
			up(name, link.Telemetry, &v1.Telemetry{Alarms: []*v1.Alarm{{Kind: "temperature", Subject: "cpu-thermal"}}})
		}
		up(name, link.Reported, &v1.Reported{Session: name, Sequence: 1, Versions: versions})
	}
	c := w.devices(viewer)
	var resp *v1.ListDevicesResponse
	ask := func(q *v1.ListDevicesRequest) (names string) {
		t.Helper()
		resp = call(t, c.ListDevices, q)
		var all []string
		for _, d := range resp.GetDevices() {
			all = append(all, d.GetName())
		}
		return strings.Join(all, " ")
	}
	for end := time.Now().Add(20 * time.Second); ; {
		ask(&v1.ListDevicesRequest{Limit: 10, Filter: &v1.DeviceFilter{Model: "digits"}})
		faces := resp.GetCounts().GetFound()
		ask(&v1.ListDevicesRequest{Limit: 10, Filter: &v1.DeviceFilter{Model: "faces:2"}})
		if resp.GetCounts().GetAll() == 5 && faces == 3 && resp.GetCounts().GetFound() == 2 {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("got %v", resp)
		}
	}
	for want, q := range map[string]*v1.ListDevicesRequest{
		"cam-0 cam-1":       {Limit: 2},
		"cam-2 cam-3":       {Limit: 2, Offset: 2},
		"":                  {Limit: 2, Offset: 9},
		"cam-0 cam-2 cam-4": {Limit: 9, Filter: &v1.DeviceFilter{Labels: []string{"line=0"}}},
		"cam-1":             {Limit: 9, Filter: &v1.DeviceFilter{Labels: []string{"line"}, Text: "hostCAM-1", Class: "board"}},
		"cam-3":             {Limit: 9, Filter: &v1.DeviceFilter{State: "offline"}},
		"cam-2":             {Limit: 9, Filter: &v1.DeviceFilter{Alarmed: true}},
		"cam-1 cam-3":       {Limit: 2, Order: "state"},
	} {
		if got := ask(q); got != want {
			t.Errorf("got %s, want %s", got, want)
		}
	}
	// A facet counts what would be found if it alone were changed.
	ask(&v1.ListDevicesRequest{Limit: 1, Facets: true, Uses: true, Brief: true, Filter: &v1.DeviceFilter{Model: "faces:2", State: "offline"}})
	if got, want := fmt.Sprint(resp.GetCounts().GetFacets()), []string{`name:"model"`, `name:"state"`}; resp.GetCounts().GetFound() != 0 || !strings.Contains(strings.ReplaceAll(got, "  ", " "), `value:"trouble" count:1`) {
		t.Errorf("got %s, want %v", got, want)
	}
	if u := resp.GetCounts().GetUses(); len(u) != 2 || u[0].GetModel() != "digits" || u[0].GetResident() != 1 || u[0].GetQuarantined() != 1 || u[0].GetWaiting() != 1 || u[0].GetServing() != 1 || u[1].GetResident() != 2 {
		t.Errorf("got %v", u)
	}
	if got := ask(&v1.ListDevicesRequest{Limit: 1, Brief: true, Filter: &v1.DeviceFilter{Text: "cam-1"}}); got != "cam-1" || resp.GetDevices()[0].GetState() != "trouble" || resp.GetDevices()[0].GetIdentity() != nil {
		t.Errorf("got %v", resp)
	}
	call(t, w.devices(admin).RevokeDevice, &v1.RevokeDeviceRequest{Device: "cam-3"})
	if got := ask(&v1.ListDevicesRequest{Limit: 9, Filter: &v1.DeviceFilter{State: "revoked"}}); got != "cam-3" {
		t.Errorf("got %q of those revoked", got)
	}
	for message, q := range map[string]*v1.ListDevicesRequest{
		"limit is 1001":              {Limit: 1001},
		"limit is 0: filter":         {Facets: true},
		"order is \"luck\"":          {Limit: 1, Order: "luck"},
		"filter.state is \"happy\"":  {Limit: 1, Filter: &v1.DeviceFilter{State: "happy"}},
		"filter.text has 801 bytes":  {Limit: 1, Filter: &v1.DeviceFilter{Text: strings.Repeat("x", 801)}},
		"filter.labels has 801":      {Limit: 1, Filter: &v1.DeviceFilter{Labels: []string{"a", strings.Repeat("x", 801)}}},
		"filter.labels has 9":        {Limit: 1, Filter: &v1.DeviceFilter{Labels: make([]string, 9)}},
		"with a limit it must be em": {Limit: 1, Device: "cam-1"},
	} {
		refused(t, c.ListDevices, q, connect.CodeInvalidArgument, message)
	}
}

func BenchmarkPage(b *testing.B) {
	var seen []dispatch.Seen
	now := time.Now()
	for i := range 10000 {
		seen = append(seen, dispatch.Seen{Heard: now, Device: &store.Device{
			Name: fmt.Sprintf("cam-%05d", i), Connected: true, Labels: map[string]string{"site": fmt.Sprint(i % 40), "line": fmt.Sprint(i % 100)}, Info: &v1.DeviceInfo{FirmwareProfile: "board"},
			Reported: &v1.Reported{Versions: []*v1.VersionStatus{{Model: fmt.Sprint("m", i%200), Version: 1, State: v1.VersionState_VERSION_STATE_RESIDENT}}},
		}})
	}
	l := &list{
		now: func() time.Time { now = now.Add(time.Second / 4); return now }, fleet: func(context.Context) ([]dispatch.Seen, error) { return seen, nil },
		suspects: func(context.Context) (map[string]*v1.DeviceIdentity, error) {
			return map[string]*v1.DeviceIdentity{}, nil
		},
	}
	state, err := l.look(b.Context())
	if err != nil {
		b.Fatal(err)
	}
	b.Run("look", func(b *testing.B) {
		for b.Loop() {
			_, _ = l.look(b.Context())
		}
	})
	for name, f := range map[string]*v1.DeviceFilter{"all": nil, "label": {Labels: []string{"line=3"}}} {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				state.page(&v1.ListDevicesRequest{Limit: 50, Facets: true, Brief: true, Filter: f}, identity.Principal{})
			}
		})
	}
}
