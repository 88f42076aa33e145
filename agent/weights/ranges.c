#include "ranges.h"

#include <stdlib.h>

static struct range *insert(struct ranges *r, struct range *after, size_t at, size_t size) {
	struct range *n = calloc(1, sizeof *n);
	if (!n)
		return NULL;
	n->at = at;
	n->size = size;
	n->previous = after;
	n->next = after ? after->next : r->first;
	*(after ? &after->next : &r->first) = n;
	*(n->next ? &n->next->previous : &r->last) = n;
	return n;
}

// swallow joins a free part with the free one behind it.
static void swallow(struct ranges *r, struct range *n) {
	struct range *next = n->next;
	if (!next || next->used)
		return;
	n->size += next->size;
	n->next = next->next;
	*(n->next ? &n->next->previous : &r->last) = n;
	free(next);
}

int ranges_grow(struct ranges *r, size_t size) {
	if (r->last && !r->last->used)
		r->last->size += size;
	else if (!insert(r, r->last, r->end, size))
		return -1;
	r->end += size;
	return 0;
}

size_t ranges_tail(const struct ranges *r) { return r->last && !r->last->used ? r->last->size : 0; }

int ranges_take(struct ranges *r, size_t size, size_t *at) {
	if (size > r->end)
		return 1;
	size = (size + RANGES_ALIGNMENT - 1) / RANGES_ALIGNMENT * RANGES_ALIGNMENT;
	if (size == 0)
		size = RANGES_ALIGNMENT;
	for (struct range *n = r->first; n; n = n->next) {
		if (n->used || n->size < size)
			continue;
		if (n->size > size) {
			if (!insert(r, n, n->at + size, n->size - size))
				return -1;
			n->size = size;
		}
		n->used = 1;
		r->used += size;
		r->count++;
		*at = n->at;
		return 0;
	}
	return 1;
}

int ranges_give(struct ranges *r, size_t at) {
	for (struct range *n = r->first; n; n = n->next) {
		if (n->at != at || !n->used)
			continue;
		n->used = 0;
		r->used -= n->size;
		r->count--;
		swallow(r, n);
		if (n->previous && !n->previous->used)
			swallow(r, n->previous);
		return 0;
	}
	return -1;
}

void ranges_clear(struct ranges *r) {
	for (struct range *n = r->first; n;) {
		struct range *next = n->next;
		free(n);
		n = next;
	}
	*r = (struct ranges){0};
}
