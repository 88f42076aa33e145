package console

import (
	"fmt"
	"net/http"
	"regexp"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/dunlin/dunlin/internal/link"
	v1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

func TestAlarmsPage(t *testing.T) {
	w := start(t)
	ada := w.browser().signIn("ada")
	_, body := ada.do("GET", "/alarms", nil)
	has(t, body, "No alarm is raised", `aria-current="page">Alarms`)
	at := time.Now()
	for i, a := range []*v1.Alarm{
		{Kind: "temperature", Subject: "cpu", Severity: v1.Severity_SEVERITY_WARNING, Message: "مرحبا 🐦", Method: "theil-sen"},
		{Kind: "disk", Subject: "root", Severity: v1.Severity_SEVERITY_ERROR, Message: script, Unit: "%", Threshold: new(90.0),
			Samples: []*v1.AlarmSample{{At: timestamppb.New(at.Add(-time.Hour)), Value: 70}, {At: timestamppb.New(at), Value: 85}}},
	} {
		name := fmt.Sprint("cam-", i+1)
		w.join(name, map[string]string{"site": []string{"berlin", "rome"}[i]}, &v1.Reported{})
		a.RaisedAt = timestamppb.New(at)
		w.up(name, link.Telemetry, &v1.Telemetry{At: timestamppb.New(at), Alarms: []*v1.Alarm{a}})
		w.wait(func() bool { return w.dispatch.Telemetry(name) != nil })
	}
	w.wait(func() bool {
		_, body = ada.do("GET", "/alarms", nil)
		return strings.Contains(body, "<b>2</b> of 2")
	})
	has(t, body, "مرحبا 🐦", `points="0.0,95.0 1000.0,27.5"`, "2 samples", "&lt;script&gt;")
	if strings.Contains(body, "<script>alert") || strings.Contains(body, "ZgotmplZ") {
		t.Error("a text runs as a script, or is refused")
	}
	devices := func(b *browser, query string) string {
		t.Helper()
		_, body := b.do("GET", query, nil)
		var got []string
		for _, m := range regexp.MustCompile(`<a href="/devices/([^"]*)"`).FindAllStringSubmatch(body, -1) {
			got = append(got, m[1])
		}
		return strings.Join(got, " ")
	}
	for query, want := range map[string]string{
		"/alarms":                            "cam-2 cam-1", // errors first
		"/alarms?severity=warning":           "cam-1",
		"/alarms?kind=disk":                  "cam-2",
		"/alarms?kind=disk&severity=warning": "",
		"/alarms?q=CAM-1":                    "cam-1",
		"/alarms?q=%F0%9F%90%A6":             "cam-1",
		"/alarms?page=9":                     "cam-2 cam-1",
	} {
		if got := devices(ada, query); got != want {
			t.Errorf("%s: got %q, want %q", query, got, want)
		}
	}
	for _, query := range []string{"/alarms?severity=happy", "/alarms?page=0", "/alarms?q=" + strings.Repeat("x", 201)} {
		if resp, _ := ada.do("GET", query, nil); resp.StatusCode != http.StatusBadRequest {
			t.Errorf("%s: got %s", query, resp.Status)
		}
	}
	// A scope bounds it.
	if got := devices(w.browser().signIn("ben"), "/alarms"); got != "cam-1" {
		t.Errorf("ben sees %q", got)
	}
}
