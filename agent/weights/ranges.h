// Hands out parts of a range of addresses, first fit, without touching them.

#ifndef DUNLIN_WEIGHTS_RANGES_H
#define DUNLIN_WEIGHTS_RANGES_H

#include <stddef.h>

enum { RANGES_ALIGNMENT = 256 };

struct range {
	size_t at, size;
	int used;
	struct range *previous, *next;
};

// All zero, it has no addresses yet. The parts stand in their order, free
// ones never side by side.
struct ranges {
	struct range *first, *last;
	size_t end, used, count; // count of used parts
};

// Adds size bytes at the end, a multiple of the alignment. -1: no memory.
int ranges_grow(struct ranges *, size_t size);
// How many bytes at the end are free.
size_t ranges_tail(const struct ranges *);
// Takes size bytes, at a multiple of the alignment. 0: taken; 1: there is no
// room; -1: no memory.
int ranges_take(struct ranges *, size_t size, size_t *at);
// Gives back what began at at. -1: nothing does.
int ranges_give(struct ranges *, size_t at);
void ranges_clear(struct ranges *);

#endif
