// Takes and gives blocks of the workspace in threads, in an order that the
// argument is the seed of, and looks whether any two overlap.
#include "../workspace.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { THREADS = 4, HELD = 24, STEPS = 1000 };

static struct workspace *w;
static int refused;

static void *none(struct workspace *own, size_t size) {
	(void)own, (void)size;
	refused++;
	return NULL;
}

static void fail(const char *what) {
	puts(what);
	exit(1);
}

static void *work(void *seed) {
	unsigned state = *(unsigned *)seed;
	struct { unsigned char *p; size_t size; unsigned char mark; } held[HELD] = {0};
	for (int step = 0; step < STEPS; step++) {
		size_t i = (size_t)rand_r(&state) % HELD;
		if (held[i].p) {
			for (size_t at = 0; at < held[i].size; at += 1 + held[i].size / 64)
				if (held[i].p[at] != held[i].mark)
					fail("a block has changed");
			if (held[i].size > 0 && held[i].p[held[i].size - 1] != held[i].mark)
				fail("the end of a block has changed");
			w->free(w, held[i].p);
			held[i].p = NULL;
			continue;
		}
		size_t size = (size_t)rand_r(&state) % ((size_t)1 << (4 + rand_r(&state) % 17));
		unsigned char *p = rand_r(&state) % 8 ? w->alloc(w, size) : w->reserve(w, size);
		if (!p || (uintptr_t)p % 64)
			fail("a block is not aligned, or none");
		held[i].p = p;
		held[i].size = size;
		held[i].mark = (unsigned char)rand_r(&state);
		memset(p, held[i].mark, size);
		if (rand_r(&state) % 500 == 0)
			workspace_trim();
	}
	for (size_t i = 0; i < HELD; i++)
		w->free(w, held[i].p);
	return NULL;
}

int main(int argc, char **argv) {
	unsigned seeds[THREADS];
	struct workspace own = {18, none, NULL, NULL, NULL};
	w = workspace_of(&own, &own);
	if (w->info(w) != &own)
		fail("it is for other memory");
	pthread_t threads[THREADS];
	for (unsigned i = 0; i < THREADS; i++) {
		seeds[i] = (argc > 1 ? (unsigned)atoi(argv[1]) : 1) + i;
		pthread_create(&threads[i], NULL, work, &seeds[i]);
	}
	for (unsigned i = 0; i < THREADS; i++)
		pthread_join(threads[i], NULL);
	if (workspace_free() == 0)
		fail("nothing was kept");
	// What is free is used again, and by something a little smaller too.
	workspace_trim();
	void *p = w->alloc(w, 1 << 20);
	w->free(w, p);
	size_t kept = workspace_free();
	if (w->alloc(w, 1000 << 10) != p || workspace_free() != 0)
		fail("a free block was not used");
	w->free(w, p);
	if (workspace_trim() != kept || workspace_free() != 0)
		fail("a free block was not given back");
	// No memory is the runtime's to tell.
	if (w->alloc(w, SIZE_MAX) || w->reserve(w, SIZE_MAX / 2) || w->alloc(w, (size_t)1 << 45) || refused != 3)
		fail("memory came from nowhere");
	// What was not used between two looks goes, and only that.
	void *old = w->alloc(w, 1 << 20), *busy = w->alloc(w, 1 << 26);
	w->free(w, old);
	w->free(w, busy);
	workspace_wait();
	if (workspace_age() != 0)
		fail("a block that was just used was given back");
	w->free(w, w->alloc(w, 1 << 26));
	if (workspace_age() < 1 << 20 || workspace_free() < 1 << 26)
		fail("the wrong block was given back");
	if (workspace_age() < 1 << 26 || workspace_free() != 0)
		fail("a block that nobody used was kept");
	puts("ok");
	return 0;
}
