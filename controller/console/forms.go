package console

import (
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	v1connect "github.com/dunlin/dunlin/proto/dunlin/v1/dunlinv1connect"
)

// The limits of forms and lists.
const (
	maxDocumentForm = 3<<20 + maxForm // bytes; 1 MiB of YAML may be three times that in a form
	listRows        = 50
)

// inventory has the routes of all pages beside the fleet and its devices. A
// form is sent to the page that shows it.
func (s *console) inventory(mux *http.ServeMux) {
	for path, h := range map[string]func(http.ResponseWriter, *http.Request, session){
		"GET /alarms": s.alarms,
		"GET /models": s.models, "GET /models/{model}": s.model, "POST /models/{model}": s.changeModel,
	} {
		mux.HandleFunc(path, s.signedIn(h))
	}
}

func (c calls) models() v1connect.ModelServiceClient {
	return v1connect.NewModelServiceClient(c, c.base(), asIs)
}

func (c calls) objects() v1connect.ObjectServiceClient {
	return v1connect.NewObjectServiceClient(c, c.base(), asIs)
}

func (c calls) profiles() v1connect.ProfileServiceClient {
	return v1connect.NewProfileServiceClient(c, c.base(), asIs)
}

// form reads a form; false: it was answered that it cannot be read.
func (s *console) form(w http.ResponseWriter, r *http.Request, in session, most int64) (url.Values, bool) {
	r.Body = http.MaxBytesReader(w, r.Body, most)
	if err := r.ParseForm(); err != nil {
		s.fail(w, r, in, http.StatusBadRequest, fmt.Sprintf("The form cannot be read: it may have up to %s.", bytesText(uint64(most))))
		return nil, false
	}
	return r.PostForm, true
}

// wordsOf gives the values of a query, each of maxFilter characters at most.
func wordsOf(q url.Values, names ...string) (map[string]string, error) {
	words := map[string]string{}
	for _, name := range names {
		v := strings.TrimSpace(q.Get(name))
		if n := len([]rune(v)); n > maxFilter {
			return nil, fmt.Errorf("%s has %d characters, the limit is %d", name, n, maxFilter)
		}
		words[name] = v
	}
	return words, nil
}

// labelsOf reads labels as "site=berlin, line=1".
func labelsOf(field, text string) (map[string]string, error) {
	labels := map[string]string{}
	for one := range strings.FieldsFuncSeq(text, func(r rune) bool { return r == ',' || r == ' ' || r == '\n' || r == '\r' || r == '\t' }) {
		k, v, ok := strings.Cut(one, "=")
		if !ok || k == "" {
			return nil, fmt.Errorf("%s: %q is not of the form key=value", field, clip(one, 60))
		}
		if _, twice := labels[k]; twice {
			return nil, fmt.Errorf("%s: %q is given twice", field, clip(k, 60))
		}
		labels[k] = v
	}
	return labels, nil
}

// numberOf reads a whole number of a form; "": the default.
func numberOf(field, text string, by, least, most int64) (int64, error) {
	if text = strings.TrimSpace(text); text == "" {
		return by, nil
	}
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil || n < least || n > most {
		return 0, fmt.Errorf("%s is %q, allowed are %d to %d", field, clip(text, 20), least, most)
	}
	return n, nil
}

// pager is where one is in a long list.
type pager struct {
	Page, Pages int
	Prev, Next  string // URLs; "": there is none
}

// pageOf cuts the rows of one page out of all; q has its number.
func pageOf[T any](all []T, path string, q url.Values) ([]T, pager, error) {
	at, err := numberOf("page", q.Get("page"), 1, 1, 1<<31)
	if err != nil {
		return nil, pager{}, err
	}
	p := pager{Pages: max(1, (len(all)+listRows-1)/listRows)}
	p.Page = min(int(at), p.Pages)
	to := func(n int) string {
		if n < 1 || n > p.Pages {
			return ""
		}
		return pathWith(path, q, "page", strconv.Itoa(n))
	}
	p.Prev, p.Next = to(p.Page-1), to(p.Page+1)
	return all[min(len(all), (p.Page-1)*listRows):min(len(all), p.Page*listRows)], p, nil
}

// pathWith gives a path with what is not empty of a query, and one value
// changed.
func pathWith(path string, q url.Values, name, value string) string {
	out := url.Values{}
	for k, v := range q {
		if v = slices.DeleteFunc(slices.Clone(v), func(s string) bool { return s == "" }); len(v) > 0 {
			out[k] = v
		}
	}
	out.Del(name)
	if value != "" {
		out.Set(name, value)
	}
	if len(out) == 0 {
		return path
	}
	return path + "?" + out.Encode()
}

// contains says whether one of texts has a part, whatever the case.
func contains(part string, texts ...string) bool {
	part = strings.ToLower(part)
	return slices.ContainsFunc(texts, func(t string) bool { return strings.Contains(strings.ToLower(t), part) })
}

// secondsText writes a time with a unit that suits it.
func secondsText(f float64) string {
	switch d := time.Duration(f * float64(time.Second)); {
	case d < time.Millisecond:
		return fmt.Sprintf("%.0f µs", f*1e6)
	case d < time.Second:
		return fmt.Sprintf("%.3g ms", f*1e3)
	}
	return fmt.Sprintf("%.3g s", f)
}
