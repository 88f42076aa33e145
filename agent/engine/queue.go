package engine

import "time"

// moment is a time, counted from when the core began.
type moment = time.Duration

// never comes after every moment.
const never = moment(1 << 62)

// queue holds the waiting requests of a version in the order in which they
// are served. It is a treap whose nodes are the requests: all of its methods
// take O(log n) steps, for it keeps for each subtree what add up and what is
// least.
type queue struct {
	root *request
	len  int
}

// place is the part of a request that is the queue's node.
type place struct {
	late   bool   // behind all that are not
	rank   moment // lowest first
	number uint64 // lowest first among equal ranks

	cost   time.Duration // by how much it delays those behind it
	latest moment        // when its run must start
	moves  moment        // when it becomes late

	left, right *request
	heap        uint64        // random; highest on top
	total       time.Duration // of the subtree's costs
	slack       moment        // least in the subtree of latest less the costs before it in the subtree
	soonest     moment        // least in the subtree of moves and, by one more, latest
}

func (r *request) before(o *request) bool {
	switch {
	case r.late != o.late:
		return o.late
	case r.rank != o.rank:
		return r.rank < o.rank
	default:
		return r.number < o.number
	}
}

// update computes what the node knows of its subtree.
func (r *request) update() {
	r.total, r.slack, r.soonest = r.cost, r.latest, min(r.moves, r.latest+1)
	if l := r.left; l != nil {
		r.slack = min(l.slack, r.latest-l.total)
		r.soonest = min(r.soonest, l.soonest)
		r.total += l.total
	}
	if n := r.right; n != nil {
		r.slack = min(r.slack, n.slack-r.total)
		r.soonest = min(r.soonest, n.soonest)
		r.total += n.total
	}
}

func (q *queue) insert(r *request) {
	r.heap = scatter(r.number)
	r.left, r.right = nil, nil
	q.root = insert(q.root, r)
	q.len++
}

func insert(top, r *request) *request {
	switch {
	case top == nil:
		r.update()
		return r
	case r.heap > top.heap:
		r.left, r.right = split(top, r)
		r.update()
		return r
	case r.before(top):
		top.left = insert(top.left, r)
	default:
		top.right = insert(top.right, r)
	}
	top.update()
	return top
}

// split parts a subtree into what comes before r and what comes after it.
func split(top, r *request) (before, after *request) {
	if top == nil {
		return nil, nil
	}
	if r.before(top) {
		before, top.left = split(top.left, r)
		after = top
	} else {
		top.right, after = split(top.right, r)
		before = top
	}
	top.update()
	return before, after
}

// first gives the first in line; nil where there is none.
func (q *queue) first() *request {
	r := q.root
	for r != nil && r.left != nil {
		r = r.left
	}
	return r
}

func (q *queue) remove(r *request) {
	q.root = remove(q.root, r)
	q.len--
	r.left, r.right = nil, nil
}

func remove(top, r *request) *request {
	switch {
	case top == r:
		return merge(r.left, r.right)
	case r.before(top):
		top.left = remove(top.left, r)
	default:
		top.right = remove(top.right, r)
	}
	top.update()
	return top
}

func merge(a, b *request) *request {
	switch {
	case a == nil:
		return b
	case b == nil:
		return a
	case a.heap > b.heap:
		a.right = merge(a.right, b)
		a.update()
		return a
	default:
		b.left = merge(a, b.left)
		b.update()
		return b
	}
}

// ahead gives the costs of what comes before r, which need not be in the queue.
func (q *queue) ahead(r *request) (sum time.Duration) {
	for top := q.root; top != nil; {
		if top == r || r.before(top) {
			if top == r {
				return sum + total(top.left)
			}
			top = top.left
			continue
		}
		sum += total(top.left) + top.cost
		top = top.right
	}
	return sum
}

func total(top *request) time.Duration {
	if top == nil {
		return 0
	}
	return top.total
}

// total is the sum of all costs.
func (q *queue) total() time.Duration { return total(q.root) }

// slack is the latest start of the first run for which every request can
// still make it.
func (q *queue) slack() moment {
	if q.root == nil {
		return never
	}
	return q.root.slack
}

// hopeless gives the first request that is too late when the next run starts
// at start and each request delays those behind it by its cost; nil where
// there is none.
func (q *queue) hopeless(start moment) *request {
	top := q.root
	for top != nil && top.slack < start {
		if l := top.left; l != nil {
			if l.slack < start {
				top = l
				continue
			}
			start += l.total
		}
		if top.latest < start {
			return top
		}
		start += top.cost
		top = top.right
	}
	return nil
}

// soonest is when the next request becomes late, or too late to start.
func (q *queue) soonest() moment {
	if q.root == nil {
		return never
	}
	return q.root.soonest
}

// moving gives a request that should be late by now; nil where there is none.
func (q *queue) moving(now moment) *request {
	return find(q.root, now, func(r *request) bool { return r.moves <= now })
}

// overdue gives a request that is too late to start now; nil where there is
// none.
func (q *queue) overdue(now moment) *request {
	return find(q.root, now, func(r *request) bool { return r.latest < now })
}

// find gives a request that is one of those which soonest tells of; there are
// few.
func find(top *request, now moment, is func(*request) bool) *request {
	if top == nil || top.soonest > now {
		return nil
	}
	if is(top) {
		return top
	}
	if r := find(top.left, now, is); r != nil {
		return r
	}
	return find(top.right, now, is)
}

// all yields the requests in order.
func (q *queue) all(yield func(*request) bool) { walk(q.root, yield) }

func walk(top *request, yield func(*request) bool) bool {
	return top == nil || walk(top.left, yield) && yield(top) && walk(top.right, yield)
}

// reprice lets price change the cost and the latest start of every request.
func (q *queue) reprice(price func(*request)) { reprice(q.root, price) }

func reprice(top *request, price func(*request)) {
	if top != nil {
		reprice(top.left, price)
		reprice(top.right, price)
		price(top)
		top.update()
	}
}

// scatter spreads numbers over all of uint64 (the finaliser of SplitMix64), so
// that the treap is balanced and yet the same in each run of a test.
func scatter(n uint64) uint64 {
	n += 0x9e3779b97f4a7c15
	n = (n ^ n>>30) * 0xbf58476d1ce4e5b9
	n = (n ^ n>>27) * 0x94d049bb133111eb
	return n ^ n>>31
}
