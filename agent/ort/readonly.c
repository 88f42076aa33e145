#include "readonly.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

// Places in OrtApi.
enum {
	CreateMemoryInfo = 68,
	GetAllocatorWithDefaultOptions = 78,
	AddRunConfigEntry = 165,
	RegisterAllocator = 176,
};

typedef void (*function)(void);

enum {
	READ_ONLY = 2, // OrtReadOnlyAllocator
	MEMORY_DEFAULT = 0,
	ALIGNMENT = 64,
	BUCKETS = 1 << 12,
};

// What the runtime's interface knows as OrtAllocator, of version 18.
struct allocator {
	uint32_t version;
	void *(*alloc)(struct allocator *, size_t size);
	void (*free)(struct allocator *, void *p);
	const void *(*info)(const struct allocator *);
	void *(*reserve)(struct allocator *, size_t size);
	// Ours.
	char kind[8];
	int device;
	const void *memory_info;
	struct allocator *next;
};

// What was allocated, and where from: it is freed by any thread.
struct block {
	void *at;
	const struct weights_memory *from;
	struct block *next;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; // guards what follows
static struct allocator *registered;
static struct block *blocks[BUCKETS];

static struct allocator *runtimes; // the runtime's own, set before the first is registered

static __thread const struct weights_memory *current;
static __thread size_t count, sum;

static struct block **bucket(const void *p) { return &blocks[((uintptr_t)p >> 8) * 0x9E3779B97F4A7C15u >> 52]; }

// none is what there is where there is no memory: see workspace.c.
static void *none(void) {
	return runtimes->alloc(runtimes, SIZE_MAX >> 1);
}

static void *take(struct allocator *a, size_t size) {
	const struct weights_memory *from = current;
	if (size == 0)
		return NULL;
	if (!from) {
		void *p = NULL;
		if (strcmp(a->kind, "Cpu") == 0 && size < SIZE_MAX >> 1)
			p = aligned_alloc(ALIGNMENT, (size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
		return p ? p : none();
	}
	struct block *b = malloc(sizeof *b);
	if (!b)
		return none();
	b->at = from->allocate(from->self, size);
	b->from = from;
	if (!b->at) {
		free(b);
		return none();
	}
	count++;
	sum += size;
	pthread_mutex_lock(&lock);
	struct block **first = bucket(b->at);
	b->next = *first;
	*first = b;
	pthread_mutex_unlock(&lock);
	return b->at;
}

static void give(struct allocator *a, void *p) {
	(void)a;
	if (!p)
		return;
	pthread_mutex_lock(&lock);
	struct block **at = bucket(p);
	while (*at && (*at)->at != p)
		at = &(*at)->next;
	struct block *b = *at;
	if (b)
		*at = b->next;
	pthread_mutex_unlock(&lock);
	if (!b) {
		free(p); // of the C heap: the device's is always ours
		return;
	}
	b->from->release(b->from->self, p);
	free(b);
}

static const void *info(const struct allocator *a) { return a->memory_info; }

OrtStatus *ort_readonly_register(const char *kind, int device) {
	const function *api = ort_table();
	OrtStatus *s = NULL;
	pthread_mutex_lock(&lock);
	struct allocator *a = registered;
	while (a && (strcmp(a->kind, kind) != 0 || a->device != device))
		a = a->next;
	if (!a) {
		a = calloc(1, sizeof *a);
		if (!a)
			abort();
		*a = (struct allocator){.version = 18, .alloc = take, .free = give, .info = info, .reserve = take, .device = device};
		strncpy(a->kind, kind, sizeof a->kind - 1);
		void *memory = NULL;
		s = ((OrtStatus * (*)(const char *, int, int, int, void **)) api[CreateMemoryInfo])(a->kind, READ_ONLY, device, MEMORY_DEFAULT, &memory);
		a->memory_info = memory;
		if (!s)
			s = ((OrtStatus * (*)(struct allocator **)) api[GetAllocatorWithDefaultOptions])(&runtimes);
		if (!s)
			s = ((OrtStatus * (*)(void *, struct allocator *)) api[RegisterAllocator])(ort_env(), a);
		if (s) {
			free(a); // its description is a few bytes, left behind once in a process
		} else {
			a->next = registered;
			registered = a;
		}
	}
	pthread_mutex_unlock(&lock);
	return s;
}

void ort_readonly_use(const struct weights_memory *from) {
	current = from;
	count = sum = 0;
}

void ort_readonly_count(size_t *n, size_t *bytes) {
	*n = count;
	*bytes = sum;
}

OrtStatus *ort_shrink_after(OrtRunOptions *options, const char *arenas) {
	const function *api = ort_table();
	return ((OrtStatus * (*)(OrtRunOptions *, const char *, const char *)) api[AddRunConfigEntry])(options, "memory.enable_memory_arena_shrinkage", arenas);
}
