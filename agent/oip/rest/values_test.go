package rest

import (
	"context"
	"maps"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/dunlin/dunlin/agent/oip"
)

// asking keeps what was asked for, and refuses it.
type asking struct {
	oip.Backend
	call                oip.Call
	parameters, headers map[string]string
}

func (a *asking) Infer(_ context.Context, c oip.Call) (oip.Answer, error) {
	a.call, a.parameters, a.headers = c, nil, nil
	if c.Parameters != nil {
		a.parameters = maps.Collect(c.Parameters.All())
	}
	if c.Headers != nil {
		a.headers = maps.Collect(c.Headers.All())
	}
	return oip.Answer{}, oip.Errorf(oip.Unavailable, "no")
}

func TestValues(t *testing.T) {
	const inputs = `"inputs":[{"name":"x","datatype":"UINT8","shape":[1],"data":[1],"parameters":{"not":"this"}}]`
	for body, want := range map[string]map[string]string{
		`{` + inputs + `}`:                   nil,
		`{"parameters":null,` + inputs + `}`: nil,
		`{"parameters":{},` + inputs + `}`:   {},
		`{"parameters": {"a":"b", "quo\"te":"\u00e4", "n": -1.50e3 ,"t":true,"f" : false,"null":null,"list":["x"],"object":{"a":"c"},"priority":2},` + inputs + `}`: {
			"a": "b", `quo"te`: "ä", "n": "-1.50e3", "t": "true", "f": "false", "priority": "2"},
		`{"parameters":{"a":"1","a":"2"},` + inputs + `}`: {"a": "2"},
	} {
		b := new(asking)
		h := New(oip.New(oip.Config{Backend: b}))
		q := httptest.NewRequest(http.MethodPost, "/v2/models/m/infer", strings.NewReader(body))
		q.Header.Set("x-USER", "u")
		q.Header["X-Many"] = []string{"1", "2"}
		w := httptest.NewRecorder()
		if h.ServeHTTP(w, q); w.Code != http.StatusServiceUnavailable {
			t.Fatalf("%s: status %d, %s", body, w.Code, w.Body)
		}
		if diff := cmp.Diff(want, b.parameters); diff != "" {
			t.Errorf("%s: %s", body, diff)
		}
		if diff := cmp.Diff(map[string]string{"x-user": "u", "x-many": "1, 2"}, b.headers); diff != "" {
			t.Error(diff)
		}
		for name, value := range b.parameters {
			if got, ok := b.call.Parameters.Get(name); !ok || got != value {
				t.Errorf("%s: %s is %q, %v", body, name, got, ok)
			}
		}
		for _, name := range []string{"null", "list", "object", "not"} {
			if b.call.Parameters == nil {
				break
			}
			if got, ok := b.call.Parameters.Get(name); ok {
				t.Errorf("%s: %s is %q", body, name, got)
			}
		}
		for name, value := range map[string]string{"X-User": "u", "x-user": "u", "X-MANY": "1, 2"} {
			if got, ok := b.call.Headers.Get(name); !ok || got != value {
				t.Errorf("%s is %q, %v", name, got, ok)
			}
		}
		for _, name := range []string{"", "x", strings.Repeat("x", 200)} {
			if got, ok := b.call.Headers.Get(name); ok {
				t.Errorf("%s is %q", name, got)
			}
		}
	}
}

func TestHeadersDoNotAllocate(t *testing.T) {
	h := oip.Values(headers{"X-Request-Session": {"a"}})
	if n := testing.AllocsPerRun(100, func() {
		if v, ok := h.Get("x-request-session"); !ok || v != "a" {
			t.Error(v, ok)
		}
	}); n > 0 {
		t.Errorf("%v allocations", n)
	}
}
