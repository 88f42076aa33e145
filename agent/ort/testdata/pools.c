// Allocates weights as the runtime does, by a table of functions that only
// notes what is registered.
#include "../readonly.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CHECK(condition) \
	do { \
		if (!(condition)) { \
			fprintf(stderr, "line %d: " #condition "\n", __LINE__); \
			exit(1); \
		} \
	} while (0)

enum { THREADS = 4, ROUNDS = 3000, SHARED = 64 };

struct allocator {
	uint32_t version;
	void *(*alloc)(struct allocator *, size_t);
	void (*free)(struct allocator *, void *);
	const void *(*info)(const struct allocator *);
	void *(*reserve)(struct allocator *, size_t);
};

static struct allocator *registered[3];
static int refuse, made;
static char description, status;

static void *no_memory(struct allocator *a, size_t size) {
	CHECK(a && size > SIZE_MAX / 4);
	return NULL;
}

static struct allocator own = {18, no_memory, NULL, NULL, no_memory};

static void *create_memory_info(const char *kind, int type, int device, int memory, void **out) {
	CHECK((!strcmp(kind, "Cpu") || !strcmp(kind, "Cuda")) && type == 2 && device >= 0 && memory == 0);
	*out = &description;
	return NULL;
}

static void *default_allocator(struct allocator **out) { return *out = &own, NULL; }

static void *register_allocator(void *env, struct allocator *a) {
	CHECK(env == &own && a->info(a) == &description && made < 3);
	if (refuse)
		return &status;
	registered[made++] = a;
	return NULL;
}

typedef void (*function)(void);

const void *ort_table(void) {
	static function table[256];
	table[68] = (function)create_memory_info;
	table[78] = (function)default_allocator;
	table[176] = (function)register_allocator;
	return table;
}

void *ort_env(void) { return &own; }

// A memory of one thread, which counts what is out.
struct memory {
	struct weights_memory memory;
	pthread_mutex_t mutex;
	long out;
	int full;
};

static void *allocate(void *self, size_t size) {
	struct memory *m = self;
	pthread_mutex_lock(&m->mutex);
	void *p = m->full ? NULL : malloc(size);
	m->out += p != NULL;
	pthread_mutex_unlock(&m->mutex);
	return p;
}

static void release(void *self, void *p) {
	struct memory *m = self;
	pthread_mutex_lock(&m->mutex);
	m->out--;
	pthread_mutex_unlock(&m->mutex);
	free(p);
}

static struct memory memories[THREADS];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; // guards shared
static void *shared[SHARED];                             // what any thread may free

static void *work(void *argument) {
	struct memory *m = argument;
	struct allocator *a = registered[0];
	unsigned random = (unsigned)(m - memories) + 1;
	for (int i = 0; i < ROUNDS; i++) {
		random = random * 1103515245u + 12345;
		ort_readonly_use(random >> 16 & 3 ? &m->memory : NULL);
		size_t size = random >> 8 & 0xfff, count, bytes;
		char *p = random >> 18 & 1 ? a->alloc(a, size) : a->reserve(a, size);
		CHECK((p != NULL) == (size > 0));
		if (p)
			memset(p, 1, size);
		ort_readonly_count(&count, &bytes);
		CHECK(random >> 16 & 3 ? count == (size > 0) && bytes == size : count == 0);
		pthread_mutex_lock(&lock);
		void **place = &shared[random >> 20 & (SHARED - 1)], *old = *place;
		*place = p;
		pthread_mutex_unlock(&lock);
		a->free(a, old);
	}
	ort_readonly_use(NULL);
	return NULL;
}

int main(void) {
	refuse = 1;
	CHECK(ort_readonly_register("Cpu", 0) == (OrtStatus *)&status);
	refuse = 0;
	CHECK(!ort_readonly_register("Cpu", 0) && !ort_readonly_register("Cpu", 0) && made == 1);
	CHECK(!ort_readonly_register("Cuda", 0) && !ort_readonly_register("Cuda", 1) && !ort_readonly_register("Cuda", 0) && made == 3);
	pthread_t threads[THREADS];
	for (int i = 0; i < THREADS; i++) {
		memories[i] = (struct memory){.memory = {&memories[i], 0, SIZE_MAX, allocate, release}};
		pthread_mutex_init(&memories[i].mutex, NULL);
	}
	for (int i = 0; i < THREADS; i++)
		CHECK(!pthread_create(&threads[i], NULL, work, &memories[i]));
	for (int i = 0; i < THREADS; i++)
		pthread_join(threads[i], NULL);
	for (int i = 0; i < SHARED; i++)
		registered[0]->free(registered[0], shared[i]);
	for (int i = 0; i < THREADS; i++)
		CHECK(memories[i].out == 0);
	// Where there is none, the runtime's own allocator says so.
	memories[0].full = 1;
	ort_readonly_use(&memories[0].memory);
	CHECK(!registered[0]->alloc(registered[0], 10));
	ort_readonly_use(NULL);
	CHECK(!registered[1]->alloc(registered[1], 10));
	CHECK(!registered[0]->alloc(registered[0], SIZE_MAX - 10));
	return 0;
}
