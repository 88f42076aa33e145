package reconcile

import (
	"errors"
	"strings"
	"testing"
	"time"

	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

func TestFetchOrder(t *testing.T) {
	sized := func(model string, size uint64, priority uint32) *dunlinv1.DesiredVersion {
		v := wantVersion(model, 1, model)
		v.SizeBytes, v.Delivery = size, &dunlinv1.Delivery{Priority: priority}
		return v
	}
	const small, large = 1 << 20, 1 << 30
	doc := func(v ...*dunlinv1.DesiredVersion) *dunlinv1.DesiredDocument {
		return &dunlinv1.DesiredDocument{Versions: v}
	}
	cancelled := outcome{err: errors.New("cancelled")}
	tests := []struct {
		name string
		run  func(w *world)
		want string
	}{
		{"small ones first, and one large one beside them", func(w *world) {
			w.desire(doc(sized("a", large, 0), sized("b", small, 0), sized("c", small+1, 0)))
			w.begin()
			w.end(keyOf(sized("b", 0, 0)), outcome{})
			w.begin()
		}, "fetch b:1, fetch c:1, check b:1, fetch a:1"},
		{"two large ones one after the other", func(w *world) {
			w.desire(doc(sized("a", large, 0), sized("b", large+1, 0)))
			w.begin()
			w.end(keyOf(sized("a", 0, 0)), outcome{})
			w.begin()
		}, "fetch a:1, check a:1, fetch b:1"},
		{"a small one does not wait for a large one", func(w *world) {
			w.desire(doc(sized("a", large, 0)))
			w.begin()
			w.desire(doc(sized("a", large, 0), sized("b", small, 0)))
			w.begin()
		}, "fetch a:1, fetch b:1"},
		{"an urgent one takes the place of others, which go on", func(w *world) {
			w.desire(doc(sized("a", large, 0), sized("b", small, 0)))
			w.begin()
			w.desire(doc(sized("a", large, 0), sized("b", small, 0), sized("c", large, 7)))
			w.begin()
			w.end(keyOf(sized("a", 0, 0)), cancelled)
			w.begin()
			w.end(keyOf(sized("b", 0, 0)), cancelled)
			w.begin()
			w.begin()
			w.end(keyOf(sized("c", 0, 0)), outcome{})
			w.begin()
		}, "fetch b:1, fetch a:1, cancel a:1, cancel b:1, fetch c:1, check c:1, fetch b:1, fetch a:1"},
		{"one that waits blocks nobody", func(w *world) {
			w.desire(doc(sized("a", small, 0), sized("c", large, 7)))
			w.begin()
			wait := &WaitError{"a window", w.now.Add(time.Hour)}
			w.end(keyOf(sized("c", 0, 0)), outcome{err: wait, waits: wait})
			w.begin()
			if v := w.core.versions[keyOf(sized("c", 0, 0))]; v.waitsFor != "a window" || v.reason() != "" || v.failures != 0 {
				w.complain("waits for %q, because %q", v.waitsFor, v.reason())
			}
			w.core.retry() // the network is back: that is not what it waits for
			w.begin()
		}, "fetch c:1, fetch a:1"},
		{"another delivery ends the wait", func(w *world) {
			v := sized("c", large, 0)
			w.desire(doc(v))
			w.begin()
			wait := &WaitError{"metered link", w.now.Add(time.Hour)}
			w.end(keyOf(v), outcome{err: wait, waits: wait})
			v.Delivery = &dunlinv1.Delivery{Metered: true}
			w.desire(doc(v))
			w.begin()
			if v := w.core.versions[keyOf(v)]; v.waitsFor != "" {
				w.complain("waits for %q", v.waitsFor)
			}
		}, "fetch c:1, fetch c:1"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld(t.Errorf)
			tt.run(w)
			if got := strings.Join(w.log, ", "); got != tt.want {
				t.Errorf("got:  %s\nwant: %s", got, tt.want)
			}
		})
	}
}
