package engine

import (
	"cmp"
	"math"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// TestQueue holds the queue against a sorted slice.
func TestQueue(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var q queue
		var model []*request
		number := uint64(0)
		moments := rapid.Int64Range(0, 50)
		draw := func(r *request) {
			r.late = rapid.Bool().Draw(t, "late")
			r.rank = moment(moments.Draw(t, "rank"))
			r.cost = time.Duration(rapid.Int64Range(0, 5).Draw(t, "cost"))
			r.latest = rapid.SampledFrom([]moment{never, moment(moments.Draw(t, "latest"))}).Draw(t, "which")
			r.moves = rapid.SampledFrom([]moment{never, moment(moments.Draw(t, "moves"))}).Draw(t, "which")
		}
		insert := func(r *request) {
			q.insert(r)
			model = append(model, r)
			slices.SortFunc(model, func(a, b *request) int {
				if a.late != b.late {
					return map[bool]int{true: 1, false: -1}[a.late]
				}
				return cmp.Or(cmp.Compare(a.rank, b.rank), cmp.Compare(a.number, b.number))
			})
		}
		ahead := func(r *request) (sum time.Duration) {
			for _, o := range model {
				if o.before(r) {
					sum += o.cost
				}
			}
			return sum
		}
		t.Repeat(map[string]func(*rapid.T){
			"insert": func(*rapid.T) {
				r := &request{place: place{number: number}}
				number++
				draw(r)
				insert(r)
			},
			"remove": func(t *rapid.T) {
				if len(model) > 0 {
					i := rapid.IntRange(0, len(model)-1).Draw(t, "which")
					q.remove(model[i])
					model = slices.Delete(model, i, i+1)
				}
			},
			"reprice": func(*rapid.T) {
				q.reprice(func(r *request) {
					r.cost = (r.cost*7 + 1) % 6
					r.latest = min(never, r.latest+1)
				})
			},
			"": func(t *rapid.T) {
				if got := slices.Collect(q.all); !slices.Equal(got, model) || q.len != len(model) {
					t.Fatalf("%d of %d requests, or not in order", len(got), len(model))
				}
				slack, moves, latest, sum := never, never, never, time.Duration(0)
				start := moment(moments.Draw(t, "start"))
				var hopeless *request
				for _, r := range model {
					if got := q.ahead(r); got != ahead(r) {
						t.Fatalf("%v are ahead instead of %v", got, ahead(r))
					}
					if hopeless == nil && start+sum > r.latest {
						hopeless = r
					}
					slack, moves, latest = min(slack, r.latest-sum), min(moves, r.moves), min(latest, r.latest)
					sum += r.cost
				}
				if q.slack() != slack || q.soonest() != min(moves, latest+1, never) || q.total() != sum {
					t.Fatalf("slack %v, soonest %v, total %v instead of %v, %v, %v", q.slack(), q.soonest(), q.total(), slack, min(moves, latest+1), sum)
				}
				if got := q.hopeless(start); got != hopeless {
					t.Fatalf("hopeless is %v instead of %v", got, hopeless)
				}
				if r := q.moving(start); (r != nil) != (moves <= start) || r != nil && r.moves > start {
					t.Fatalf("moving is %v at %v, the soonest is %v", r, start, moves)
				}
				if r := q.overdue(start); (r != nil) != (latest < start) || r != nil && r.latest >= start {
					t.Fatalf("overdue is %v at %v, the soonest is %v", r, start, latest)
				}
				other := &request{place: place{number: number}}
				draw(other)
				if got := q.ahead(other); got != ahead(other) {
					t.Fatalf("%v are ahead of a newcomer instead of %v", got, ahead(other))
				}
			},
		})
	})
}

// TestQueueIsShallow says that 100,000 requests in order stand in a tree of
// logarithmic height.
func TestQueueIsShallow(t *testing.T) {
	var q queue
	const n = 100_000
	for i := range uint64(n) {
		q.insert(&request{place: place{number: i, rank: moment(i)}})
	}
	var height func(*request) int
	height = func(r *request) int {
		if r == nil {
			return 0
		}
		return 1 + max(height(r.left), height(r.right))
	}
	if h, most := height(q.root), 4*int(math.Log2(n)); h > most {
		t.Errorf("height %d of %d requests, at most %d expected", h, n, most)
	}
}
