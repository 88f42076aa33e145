#define _GNU_SOURCE
#include "workspace.h"

#include <pthread.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

enum {
	ALIGNMENT = 64,
	// Smaller ones are the C heap's.
	SMALLEST_BITS = 16,
	// Sizes go up in so many steps to their double.
	STEP_BITS = 3,
	STEPS = 1 << STEP_BITS,
	CLASSES = (47 - SMALLEST_BITS) << STEP_BITS,
	HUGE_PAGE = 2 << 20,
	// A block may be so many steps larger than what it is taken for.
	GENEROUS = 3 * STEPS,
};

// What lies before the memory of a block.
union head {
	struct {
		size_t size;      // of the whole mapping, 0 for one of the C heap
		size_t number;    // of its class, CLASSES for one that was reserved
		union head *next; // in the list of its class
		uint64_t given;   // when it came into the list
	} block;
	char room[ALIGNMENT];
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; // guards what follows
static union head *lists[CLASSES];
static size_t kept;
static uint64_t now; // counts calls of workspace_age
static pthread_cond_t some = PTHREAD_COND_INITIALIZER; // is kept
static int waiting;                                    // for some

// class_of gives the number of the first class whose size is at least so much,
// and the size.
static size_t class_of(size_t size, size_t *rounded) {
	size_t bits = 63 - (size_t)__builtin_clzl(size); // size >= 2^SMALLEST_BITS
	size_t unit = (size_t)1 << (bits - STEP_BITS);
	size_t steps = (size - ((size_t)1 << bits) + unit - 1) / unit;
	*rounded = ((size_t)1 << bits) + steps * unit;
	return ((bits - SMALLEST_BITS) << STEP_BITS) + steps;
}

static struct workspace *runtimes; // the runtime's own allocator

// none is what there is where there is no memory. The runtime does not look
// whether an allocator gave any; its own throws instead, by which a run or a
// load fails in good order, and so it is asked for what nobody has. No lock is
// held, and this file is compiled so that the exception passes.
static void *none(void) {
	return runtimes->alloc(runtimes, SIZE_MAX >> 1);
}

// pages maps memory. Blocks as large as a huge page begin at a multiple of one,
// so that the kernel can use them where it has some: kernels that stream
// through weights or large activations miss the TLB less.
static void *pages(size_t size) {
	if (size < HUGE_PAGE)
		return mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	size_t page = (size_t)sysconf(_SC_PAGESIZE);
	size = (size + page - 1) & ~(page - 1);
	char *p = mmap(NULL, size + HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (p == MAP_FAILED)
		return p;
	size_t before = -(size_t)p & (HUGE_PAGE - 1);
	if (before > 0)
		munmap(p, before);
	if (before < HUGE_PAGE)
		munmap(p + before + size, HUGE_PAGE - before);
	madvise(p + before, size, MADV_HUGEPAGE);
	return p + before;
}

static void *map(size_t size, size_t number) {
	union head *h = pages(size);
	if (h == MAP_FAILED)
		return NULL;
	h->block.size = size;
	h->block.number = number;
	return h + 1;
}

static void *small(size_t size) {
	union head *h = aligned_alloc(ALIGNMENT, (size + sizeof *h + ALIGNMENT - 1) & ~(size_t)(ALIGNMENT - 1));
	if (!h)
		return none();
	h->block.size = 0;
	return h + 1;
}

// whole adds the head to a size; it gives 0 for one that cannot be.
static size_t whole(size_t size) {
	return size > (size_t)1 << 46 ? 0 : size + sizeof(union head);
}

static void *take(struct workspace *w, size_t size) {
	(void)w;
	size_t all = whole(size), rounded;
	if (all == 0)
		return none();
	if (all < (size_t)1 << SMALLEST_BITS)
		return small(size);
	size_t number = class_of(all, &rounded);
	pthread_mutex_lock(&lock);
	for (size_t i = number; i < CLASSES && i <= number + GENEROUS; i++) {
		union head *h = lists[i];
		if (!h)
			continue;
		lists[i] = h->block.next;
		kept -= h->block.size;
		pthread_mutex_unlock(&lock);
		return h + 1;
	}
	pthread_mutex_unlock(&lock);
	void *p = map(rounded, number);
	if (!p && workspace_trim() > 0)
		p = map(rounded, number);
	return p ? p : none();
}

static void *reserve(struct workspace *w, size_t size) {
	(void)w;
	size_t all = whole(size);
	if (all == 0)
		return none();
	if (all < (size_t)1 << SMALLEST_BITS)
		return small(size);
	void *p = map(all, CLASSES);
	if (!p && workspace_trim() > 0)
		p = map(all, CLASSES);
	return p ? p : none();
}

static void give(struct workspace *w, void *p) {
	(void)w;
	if (!p)
		return;
	union head *h = (union head *)p - 1;
	if (h->block.size == 0) {
		free(h);
	} else if (h->block.number == CLASSES) {
		munmap(h, h->block.size);
	} else {
		pthread_mutex_lock(&lock);
		h->block.next = lists[h->block.number];
		lists[h->block.number] = h;
		kept += h->block.size;
		h->block.given = now;
		if (waiting)
			pthread_cond_signal(&some);
		pthread_mutex_unlock(&lock);
	}
}

static const void *memory_info;

static const void *info(const struct workspace *w) {
	(void)w;
	return memory_info;
}

struct workspace *workspace_of(const void *of, void *own) {
	static struct workspace only = {18, take, give, info, reserve};
	memory_info = of;
	runtimes = own;
	return &only;
}

// drop gives back the free blocks that were given before a time. It releases
// lock, which is held.
static size_t drop(uint64_t before) {
	union head *all = NULL;
	for (size_t i = 0; i < CLASSES; i++)
		for (union head **at = &lists[i]; *at;) {
			union head *h = *at;
			if (h->block.given >= before) {
				at = &h->block.next;
				continue;
			}
			*at = h->block.next;
			h->block.next = all;
			all = h;
			kept -= h->block.size;
		}
	pthread_mutex_unlock(&lock);
	size_t freed = 0;
	while (all) {
		union head *h = all;
		all = h->block.next;
		freed += h->block.size;
		munmap(h, h->block.size);
	}
	return freed;
}

size_t workspace_trim(void) {
	pthread_mutex_lock(&lock);
	return drop(UINT64_MAX);
}

size_t workspace_age(void) {
	pthread_mutex_lock(&lock);
	return drop(now++);
}

void workspace_wait(void) {
	pthread_mutex_lock(&lock);
	waiting = 1;
	while (kept == 0)
		pthread_cond_wait(&some, &lock);
	waiting = 0;
	pthread_mutex_unlock(&lock);
}

size_t workspace_free(void) {
	pthread_mutex_lock(&lock);
	size_t n = kept;
	pthread_mutex_unlock(&lock);
	return n;
}
