// Runs random sequences of calls on pools of a fake device, of which any may
// fail, and compares content and books: sequences SEED COUNT. With COUNT 0,
// threads do so side by side, each with a pool, without failures.
#include "../pool.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { PAGE = 4096, POOLS = 5, BLOCKS = 12, STEPS = 60 };

static uint64_t seed;
static unsigned random_below(unsigned n) {
	seed ^= seed << 13;
	seed ^= seed >> 7;
	seed ^= seed << 17;
	return (unsigned)(seed >> 20) % n;
}

#define CHECK(condition, ...) \
	do { \
		if (!(condition)) { \
			fprintf(stderr, "line %d: " #condition ": ", __LINE__); \
			fprintf(stderr, __VA_ARGS__); \
			fprintf(stderr, "\n"); \
			exit(1); \
		} \
	} while (0)

struct block {
	uint64_t at;
	size_t size;
	unsigned char first; // what it is filled with counts up from here
};

struct tenant {
	struct pool *pool;
	struct block blocks[BLOCKS];
	int count, captured;
};

static unsigned done[3]; // out, in, failures

static void check(struct driver *driver, struct device *device) {
	struct device_ledger l;
	struct fake_count c;
	device_ledger(device, &l);
	fake_count(driver, &c);
	CHECK(l.reserved == c.reserved && l.physical == c.created && l.mapped == c.mapped && l.pinned == c.pinned, "ledger and driver differ");
	CHECK(l.mapped + l.recycled == l.physical, "memory is neither mapped nor recycled");
	char *breach = fake_breach(driver);
	CHECK(!*breach, "%s", breach);
	free(breach);
}

static void compare(struct tenant *t) {
	for (int i = 0; i < t->count; i++) {
		struct block *b = &t->blocks[i];
		unsigned char *data = malloc(b->size + 1);
		struct failure f = {0};
		CHECK(!pool_get(t->pool, data, b->at, b->size, &f), "%s: %d", f.call, f.code);
		for (size_t j = 0; j < b->size; j++)
			CHECK(data[j] == (unsigned char)(b->first + j), "byte %zu has changed", j);
		free(data);
	}
}

static void add(struct tenant *t) {
	if (t->count == BLOCKS)
		return;
	struct block b = {.size = random_below(6 * PAGE), .first = (unsigned char)random_below(256)};
	b.at = pool_allocate(t->pool, b.size);
	if (!b.at) {
		struct failure f = {0};
		pool_refused(t->pool, &f);
		CHECK(f.code, "refused without a reason");
		return;
	}
	unsigned char *data = malloc(b.size + 1);
	for (size_t j = 0; j < b.size; j++)
		data[j] = (unsigned char)(b.first + j);
	struct failure f = {0};
	if (pool_put(t->pool, b.at, data, b.size, &f))
		b.size = 0;
	free(data);
	t->blocks[t->count++] = b;
}

static void drop(struct tenant *t, int i) {
	pool_release(t->pool, t->blocks[i].at);
	t->blocks[i] = t->blocks[--t->count];
}

static enum pool_state state(struct tenant *t) {
	struct pool_stats s;
	pool_stats(t->pool, &s);
	CHECK(s.state == POOL_OUT || s.mapped >= s.used, "less is mapped than used");
	return s.state;
}

static void step(struct driver *driver, struct device *device, struct tenant *t) {
	struct failure f = {0};
	unsigned what = random_below(12);
	if (!t->pool) {
		t->pool = pool_open(device, (1 + random_below(40)) * PAGE, &f);
		t->count = t->captured = 0;
		return;
	}
	switch (what) {
	case 0:
	case 1:
	case 2:
		add(t);
		break;
	case 3:
		if (t->count && !t->captured)
			drop(t, (int)random_below((unsigned)t->count));
		break;
	case 4:
	case 5:
		if (!t->captured)
			t->captured = !pool_capture(t->pool, &f);
		break;
	case 6:
	case 7:
		if (t->captured && !pool_out(t->pool, &f))
			done[0]++;
		break;
	case 8:
	case 9:
		pool_cancel(t->pool, random_below(6) == 0);
		if (t->captured && !pool_in(t->pool, &f))
			done[1]++;
		pool_cancel(t->pool, 0);
		CHECK(!t->captured || state(t) == (f.code ? POOL_OUT : POOL_IN), "state after %s: %d", f.call, f.code);
		break;
	case 10:
		fake_fail(driver, random_below(3) ? (int)random_below(22) : -1, 1 + random_below(15), 1 + random_below(3), random_below(2) ? DRIVER_OUT_OF_MEMORY : 999);
		break;
	case 11:
		while (t->count)
			drop(t, 0);
		t->captured = 0;
		if (!pool_close(t->pool, &f))
			t->pool = NULL;
		break;
	}
	done[2] += f.code != 0;
	fake_fail(driver, -1, random_below(4) ? 0 : 1 + random_below(9), 1, 999);
	check(driver, device);
}

static struct device *common;
static pthread_mutex_t copies = PTHREAD_MUTEX_INITIALIZER; // one at a time

static void *side_by_side(void *number) {
	unsigned char first = (unsigned char)(uintptr_t)number;
	for (int round = 0; round < 50; round++) {
		struct failure f = {0};
		struct tenant t = {.pool = pool_open(common, 20 * PAGE, &f)};
		CHECK(t.pool, "%s: %d", f.call, f.code);
		for (int i = 0; i < 3; i++) {
			struct block b = {.size = 2 * PAGE + 100, .first = first};
			b.at = pool_allocate(t.pool, b.size);
			if (!b.at)
				break; // the others have it all
			unsigned char data[2 * PAGE + 100];
			for (size_t j = 0; j < sizeof data; j++)
				data[j] = (unsigned char)(first + j);
			pthread_mutex_lock(&copies);
			CHECK(!pool_put(t.pool, b.at, data, b.size, &f), "%s: %d", f.call, f.code);
			pthread_mutex_unlock(&copies);
			t.blocks[t.count++] = b;
		}
		pthread_mutex_lock(&copies);
		CHECK(!pool_capture(t.pool, &f), "%s: %d", f.call, f.code);
		pthread_mutex_unlock(&copies);
		for (int i = 0; i < 5; i++) {
			struct failure refused = {0};
			struct device_ledger l;
			CHECK(!pool_out(t.pool, &f), "%s: %d", f.call, f.code);
			device_ledger(common, &l);
			pthread_mutex_lock(&copies);
			pool_in(t.pool, &refused);
			if (state(&t) == POOL_IN)
				compare(&t);
			pthread_mutex_unlock(&copies);
			CHECK(refused.code == 0 || refused.code == DRIVER_OUT_OF_MEMORY, "%s: %d", refused.call, refused.code);
		}
		while (t.count)
			drop(&t, 0);
		CHECK(!pool_close(t.pool, &f), "%s: %d", f.call, f.code);
	}
	return NULL;
}

static int run_side_by_side(void) {
	enum { THREADS = 6 };
	struct fake_config config = {.capacity = 40 * PAGE, .granularity = PAGE};
	struct driver *driver = driver_fake(&config);
	struct device_settings settings = {.pinned = 30 * PAGE, .recycled = 10 * PAGE, .largest = 4 * PAGE};
	struct failure f = {0};
	common = device_open(driver, &settings, &f);
	CHECK(common, "%s: %d", f.call, f.code);
	pthread_t threads[THREADS];
	for (uintptr_t i = 0; i < THREADS; i++)
		CHECK(!pthread_create(&threads[i], NULL, side_by_side, (void *)i), "no thread");
	for (int i = 0; i < THREADS; i++)
		pthread_join(threads[i], NULL);
	check(driver, common);
	CHECK(!device_close(common, &f), "%s: %d", f.call, f.code);
	fake_free(driver);
	return 0;
}

int main(int argc, char **argv) {
	CHECK(argc == 3, "two arguments");
	if (!strcmp(argv[2], "0"))
		return run_side_by_side();
	seed = strtoull(argv[1], NULL, 10) * 2654435761u + 1;
	for (long n = strtol(argv[2], NULL, 10); n > 0; n--) {
		struct fake_config config = {.capacity = 48 * PAGE, .granularity = PAGE};
		struct driver *driver = driver_fake(&config);
		struct device_settings settings = {.pinned = random_below(40) * PAGE, .recycled = random_below(40) * PAGE, .largest = (size_t)PAGE << random_below(4)};
		struct failure f = {0};
		fake_fail(driver, -1, random_below(20), 1, 999);
		struct device *device = device_open(driver, &settings, &f);
		if (device) {
			struct tenant all[POOLS] = {0};
			for (int i = 0; i < STEPS; i++)
				step(driver, device, &all[random_below(POOLS)]);
			fake_fail(driver, -1, 0, 0, 0);
			for (int i = 0; i < POOLS; i++) {
				struct tenant *t = &all[i];
				if (!t->pool)
					continue;
				if (state(t) != POOL_OUT)
					compare(t);
				while (t->count)
					drop(t, 0);
				CHECK(!pool_close(t->pool, &f), "%s: %d", f.call, f.code);
				check(driver, device);
			}
			f = (struct failure){0};
			CHECK(!device_close(device, &f), "%s: %d", f.call, f.code);
		}
		struct fake_count left;
		fake_count(driver, &left);
		CHECK(left.reserved + left.created + left.mapped == 0, "something is left");
		fake_free(driver);
	}
	printf("%u out, %u in, %u failures\n", done[0], done[1], done[2]);
	CHECK(done[0] > 100 && done[1] > 100 && done[2] > 100, "too few");
	return 0;
}
