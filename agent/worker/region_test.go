package worker

import (
	"testing"

	"pgregory.net/rapid"
)

// TestRegion takes and gives slots at random: they never overlap, hold what
// was asked for, and all of the region is there again at the end.
func TestRegion(t *testing.T) {
	const units = 16
	rapid.Check(t, func(t *rapid.T) {
		r, err := newRegion(units*slotUnit - 1)
		if err != nil {
			t.Fatal(err)
		}
		defer r.close()
		var held []slot
		for range rapid.IntRange(1, 50).Draw(t, "steps") {
			if len(held) > 0 && rapid.Bool().Draw(t, "give") {
				i := rapid.IntRange(0, len(held)-1).Draw(t, "slot")
				r.give(held[i], false)
				held = append(held[:i], held[i+1:]...)
				continue
			}
			size := rapid.Uint64Range(0, 6*slotUnit).Draw(t, "size")
			s := r.take(size)
			if s.room == 0 {
				continue
			}
			if s.room < size || s.place+s.room > units*slotUnit {
				t.Fatalf("%d bytes: %+v", size, s)
			}
			for _, o := range held {
				if s.place < o.place+o.room && o.place < s.place+s.room {
					t.Fatalf("%+v and %+v overlap", s, o)
				}
			}
			held = append(held, s)
		}
		for _, s := range held {
			r.give(s, false)
		}
		if err := r.trim(); err != nil {
			t.Fatal(err)
		}
		if s := r.take(units * slotUnit); s.room != units*slotUnit {
			t.Fatalf("all of it: %+v", s)
		} else if r.take(1).room != 0 {
			t.Fatal("more than all of it")
		} else {
			r.close()
			clear(r.bytes(s)) // still mapped
			r.give(s, false)
		}
		if r.memory != nil || r.take(1).room != 0 || r.take(1<<63).room != 0 {
			t.Fatal("a closed region is there")
		}
	})
}
