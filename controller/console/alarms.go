package console

import (
	"cmp"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"

	v1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// openAlarm is an alarm that a device raises now.
type openAlarm struct {
	alarmView
	Device string
	State  state // of the device: what one says that is not heard may be over
	Heard  time.Time
}

type alarmsView struct {
	Text, Severity, Kind string
	Kinds                []choice
	Severities           []choice
	Rows                 []openAlarm
	All, Found           int
	Pager                pager
	Now                  time.Time
}

// severities are what the filter knows, and what people read.
var severities = []struct{ is, name string }{{"error", "Errors"}, {"warning", "Warnings"}}

func severityOf(a *v1.Alarm) string {
	if a.GetSeverity() == v1.Severity_SEVERITY_ERROR {
		return "error"
	}
	return "warning"
}

// alarmsOf gives what devices raise, errors first, then the newest.
func alarmsOf(devices []*v1.Device, words map[string]string, now time.Time) alarmsView {
	v := alarmsView{Text: words["q"], Severity: words["severity"], Kind: words["kind"], Now: now}
	bySeverity, byKind := map[string]int{}, map[string]int{}
	for _, d := range devices {
		for _, a := range d.GetTelemetry().GetAlarms() {
			v.All++
			if v.Text != "" && !contains(v.Text, d.GetName(), a.GetKind(), a.GetSubject(), a.GetMessage()) {
				continue
			}
			severe, kind := v.Severity == "" || v.Severity == severityOf(a), v.Kind == "" || v.Kind == a.GetKind()
			// What is counted is what would be found if it alone were changed.
			if kind {
				bySeverity[severityOf(a)]++
			}
			if severe {
				byKind[a.GetKind()]++
			}
			if severe && kind {
				v.Rows = append(v.Rows, openAlarm{alarmOf(a), d.GetName(), stateOf(d), timeOf(d.GetLastHeardAt())})
			}
		}
	}
	v.Found = len(v.Rows)
	slices.SortStableFunc(v.Rows, func(a, b openAlarm) int {
		if a.Error != b.Error {
			if a.Error {
				return -1
			}
			return 1
		}
		return cmp.Or(b.A.GetRaisedAt().AsTime().Compare(a.A.GetRaisedAt().AsTime()), strings.Compare(a.Device, b.Device))
	})
	at := func(name, value string, on bool) string {
		q := url.Values{"q": {v.Text}, "severity": {v.Severity}, "kind": {v.Kind}}
		return pathWith("/alarms", q, name, either(!on, value))
	}
	for _, s := range severities {
		on := v.Severity == s.is
		v.Severities = append(v.Severities, choice{Name: s.name, Count: bySeverity[s.is], On: on, URL: at("severity", s.is, on)})
	}
	if v.Kind != "" {
		byKind[v.Kind] += 0 // what is chosen can be taken back
	}
	for kind, n := range byKind {
		on := v.Kind == kind
		v.Kinds = append(v.Kinds, choice{Name: kind, Count: n, On: on, URL: at("kind", kind, on)})
	}
	slices.SortFunc(v.Kinds, func(a, b choice) int { return strings.Compare(a.Name, b.Name) })
	return v
}

// alarmed asks for the devices that raise alarms.
func (s *console) alarmed(r *http.Request, in session) (all []*v1.Device, err error) {
	const most = 1000 // in an answer
	for {
		resp, err := in.calls.devices().ListDevices(r.Context(), connect.NewRequest(&v1.ListDevicesRequest{
			Limit: most, Offset: uint32(len(all)), Filter: &v1.DeviceFilter{Alarmed: true},
		}))
		if err != nil {
			return nil, err
		}
		all = append(all, resp.Msg.GetDevices()...)
		if len(resp.Msg.GetDevices()) < most {
			return all, nil
		}
	}
}

func (s *console) alarms(w http.ResponseWriter, r *http.Request, in session) {
	q := r.URL.Query()
	words, err := wordsOf(q, "q", "severity", "kind")
	if err != nil {
		s.fail(w, r, in, http.StatusBadRequest, err.Error())
		return
	}
	if v := words["severity"]; v != "" && v != "error" && v != "warning" {
		s.fail(w, r, in, http.StatusBadRequest, "severity "+clip(v, 20)+" is none of error, warning")
		return
	}
	devices, err := s.alarmed(r, in)
	if err != nil {
		s.failed(w, r, in, err)
		return
	}
	v := alarmsOf(devices, words, s.Now())
	if v.Rows, v.Pager, err = pageOf(v.Rows, "/alarms", q); err != nil {
		s.fail(w, r, in, http.StatusBadRequest, err.Error())
		return
	}
	s.pages.write(w, r, http.StatusOK, "alarms", page{Session: in, Title: "Alarms", Data: v, Now: v.Now})
}
