#include "pool.h"
#include "ranges.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum {
	WINDOW = 4,       // copies that are under way at a time
	PIECE = 16 << 20, // bytes of one, at most: what a cancelled arrival may still copy is four of them
	CLASSES = 40,     // sizes of handles: granule << class
	GROWTH = 8,       // a pool grows by this part of what it has, or by what is needed
};

// A handle of the driver's, with room to stand in a list.
struct handle {
	uint64_t id;
	size_t size;
	struct handle *next;
};

struct device {
	struct driver *driver;
	struct device_settings settings;
	size_t granule, largest;
	void *arena; // pinned
	// Of the one copy that goes on.
	void *stream;
	void *events[WINDOW];

	pthread_mutex_t mutex; // guards what follows
	struct handle *recycled[CLASSES];
	struct ranges pinned; // in arena
	struct device_ledger ledger;
};

// Memory that is mapped as a whole. Its handle is NULL while it is out.
struct chunk {
	uint64_t at;
	size_t size;
	struct handle *handle;
	int mapped;
	size_t low, high; // what of it has blocks, once the pool is sealed
	size_t offset;    // of that in the image
};

struct pool {
	struct device *device;
	struct weights_memory memory;
	uint64_t base;
	size_t reserve;
	atomic_int cancelled;
	_Atomic(enum pool_state) state;
	_Atomic uint64_t mapped;

	pthread_mutex_t mutex; // guards what follows; of chunks and image, while filling and in their change only
	struct ranges blocks;
	struct chunk *chunks;
	size_t count, room; // of chunks
	char *image;
	size_t image_size, image_at; // at: in the arena
	int pinned;
	struct failure refused;
};

// fail keeps the first failure.
static int fail(struct failure *f, int code, const char *call) {
	if (code && !f->code)
		*f = (struct failure){.code = code, .call = call};
	return code;
}

#define CALL(device, f, function, ...) fail(f, (device)->driver->function((device)->driver __VA_OPT__(, ) __VA_ARGS__), #function)

// The device's memory.

static unsigned class_of(const struct device *d, size_t size) {
	unsigned class = 0;
	while (d->granule << class < size)
		class ++;
	return class;
}

// release_all gives the driver back what is recycled, and says how much that was.
static size_t release_all(struct device *d, struct failure *f) {
	struct handle *all = NULL;
	pthread_mutex_lock(&d->mutex);
	for (unsigned i = 0; i < CLASSES; i++)
		while (d->recycled[i]) {
			struct handle *h = d->recycled[i];
			d->recycled[i] = h->next;
			h->next = all;
			all = h;
		}
	pthread_mutex_unlock(&d->mutex);
	size_t sum = 0;
	while (all) {
		struct handle *h = all;
		all = h->next;
		int code = CALL(d, f, release, h->id);
		pthread_mutex_lock(&d->mutex);
		if (code) {
			h->next = d->recycled[class_of(d, h->size)];
			d->recycled[class_of(d, h->size)] = h;
		} else {
			sum += h->size;
			d->ledger.recycled -= h->size;
			d->ledger.physical -= h->size;
			free(h);
		}
		pthread_mutex_unlock(&d->mutex);
	}
	return sum;
}

// take gives a handle, recycled if there is one.
static struct handle *take(struct device *d, size_t size, struct failure *f) {
	unsigned class = class_of(d, size);
	pthread_mutex_lock(&d->mutex);
	struct handle *h = d->recycled[class];
	if (h) {
		d->recycled[class] = h->next;
		d->ledger.recycled -= size;
	}
	pthread_mutex_unlock(&d->mutex);
	if (h)
		return h;
	h = malloc(sizeof *h);
	if (!h) {
		fail(f, POOL_HOST_MEMORY, "malloc");
		return NULL;
	}
	h->size = size;
	int code = d->driver->create(d->driver, size, &h->id);
	struct failure ignored = {0};
	if (code == DRIVER_OUT_OF_MEMORY && release_all(d, &ignored) > 0)
		code = d->driver->create(d->driver, size, &h->id);
	if (!fail(f, code, "create")) {
		pthread_mutex_lock(&d->mutex);
		d->ledger.physical += size;
		pthread_mutex_unlock(&d->mutex);
		return h;
	}
	free(h);
	size_t available = 0, total = 0;
	if (code == DRIVER_OUT_OF_MEMORY && f->code == code && d->driver->memory(d->driver, &available, &total) == 0) {
		f->asked = size;
		f->free = available;
		f->total = total;
	}
	return NULL;
}

// give recycles a handle, or gives it back to the driver where there is
// enough. One that the driver does not take is recycled all the same.
static void give(struct device *d, struct handle *h) {
	pthread_mutex_lock(&d->mutex);
	int keep = d->ledger.recycled + h->size <= d->settings.recycled;
	pthread_mutex_unlock(&d->mutex);
	if (!keep)
		keep = d->driver->release(d->driver, h->id) != 0;
	pthread_mutex_lock(&d->mutex);
	if (keep) {
		unsigned class = class_of(d, h->size);
		h->next = d->recycled[class];
		d->recycled[class] = h;
		d->ledger.recycled += h->size;
	} else {
		d->ledger.physical -= h->size;
		free(h);
	}
	pthread_mutex_unlock(&d->mutex);
}

struct device *device_open(struct driver *driver, const struct device_settings *settings, struct failure *f) {
	struct device *d = calloc(1, sizeof *d);
	if (!d) {
		fail(f, POOL_HOST_MEMORY, "calloc");
		return NULL;
	}
	d->driver = driver;
	d->settings = *settings;
	pthread_mutex_init(&d->mutex, NULL);
	int code = CALL(d, f, enter);
	if (!code)
		code = CALL(d, f, granularity, &d->granule);
	for (d->largest = d->granule; !code && d->largest * 2 <= settings->largest && class_of(d, d->largest) < CLASSES - 1;)
		d->largest *= 2;
	if (!code)
		code = CALL(d, f, stream_open, &d->stream);
	for (int i = 0; i < WINDOW && !code; i++)
		code = CALL(d, f, event_open, &d->events[i]);
	if (!code && settings->pinned > 0) {
		size_t size = settings->pinned / RANGES_ALIGNMENT * RANGES_ALIGNMENT;
		code = CALL(d, f, host_alloc, size, &d->arena);
		if (!code) {
			d->ledger.pinned = size;
			if (ranges_grow(&d->pinned, size))
				code = fail(f, POOL_HOST_MEMORY, "malloc");
		} else if (code == DRIVER_OUT_OF_MEMORY)
			f->asked = size;
	}
	if (!code)
		return d;
	struct failure ignored = {0};
	if (device_close(d, &ignored)) {
		// The driver is closed next, which ends what is left.
		pthread_mutex_destroy(&d->mutex);
		ranges_clear(&d->pinned);
		free(d);
	}
	return NULL;
}

int device_close(struct device *d, struct failure *f) {
	if (d->ledger.pools > 0)
		return fail(f, POOL_IN_USE, "device_close");
	int code = CALL(d, f, enter);
	if (code)
		return code;
	release_all(d, f);
	for (int i = 0; i < WINDOW; i++)
		if (d->events[i] && !CALL(d, f, event_close, d->events[i]))
			d->events[i] = NULL;
	if (d->stream && !CALL(d, f, stream_close, d->stream))
		d->stream = NULL;
	if (d->arena && !CALL(d, f, host_free, d->arena)) {
		d->arena = NULL;
		d->ledger.pinned = 0;
	}
	if (f->code)
		return f->code;
	ranges_clear(&d->pinned);
	pthread_mutex_destroy(&d->mutex);
	free(d);
	return 0;
}

void device_ledger(struct device *d, struct device_ledger *out) {
	pthread_mutex_lock(&d->mutex);
	*out = d->ledger;
	out->pinned_used = d->pinned.used;
	pthread_mutex_unlock(&d->mutex);
}

int device_describe(struct device *d, struct driver_info *info, struct failure *f) {
	int code = CALL(d, f, enter);
	return code ? code : CALL(d, f, describe, info);
}

int device_memory(struct device *d, size_t *available, size_t *total, struct failure *f) {
	int code = CALL(d, f, enter);
	return code ? code : CALL(d, f, memory, available, total);
}

int device_measure(struct device *d, size_t size, int times, int64_t *took, struct failure *f) {
	size = (size + d->granule - 1) / d->granule * d->granule;
	uint64_t at = 0, handle = 0;
	void *host = NULL;
	int reserved = 0, created = 0, mapped = 0;
	if (!CALL(d, f, enter) && !CALL(d, f, host_alloc, size, &host) && !CALL(d, f, reserve, size, &at)) {
		reserved = 1;
		if (!CALL(d, f, create, size, &handle)) {
			created = 1;
			mapped = !CALL(d, f, map, at, size, handle);
		}
	}
	if (host)
		memset(host, 1, size);
	if (mapped)
		CALL(d, f, access, at, size);
	for (int i = 0; i < times && !f->code; i++) {
		struct timespec begin, end;
		clock_gettime(CLOCK_MONOTONIC, &begin);
		CALL(d, f, copy_in, at, host, size, d->stream);
		CALL(d, f, stream_wait, d->stream);
		clock_gettime(CLOCK_MONOTONIC, &end);
		took[i] = (int64_t)(end.tv_sec - begin.tv_sec) * 1000000000 + end.tv_nsec - begin.tv_nsec;
	}
	if (mapped)
		CALL(d, f, unmap, at, size);
	if (created)
		CALL(d, f, release, handle);
	if (reserved)
		CALL(d, f, unreserve, at, size);
	if (host)
		CALL(d, f, host_free, host);
	return f->code;
}

// Chunks.

static void account(struct pool *p, const struct chunk *c, int mapped) {
	struct device *d = p->device;
	pthread_mutex_lock(&d->mutex);
	d->ledger.mapped += mapped ? c->size : -c->size;
	pthread_mutex_unlock(&d->mutex);
	p->mapped += mapped ? c->size : -c->size;
}

// map_chunk maps a chunk's handle.
static int map_chunk(struct pool *p, struct chunk *c, struct failure *f) {
	struct device *d = p->device;
	if (!c->mapped) {
		int code = CALL(d, f, map, c->at, c->size, c->handle->id);
		if (code)
			return code;
		c->mapped = 1;
		account(p, c, 1);
	}
	return CALL(d, f, access, c->at, c->size);
}

// unmap_chunk unmaps a chunk and gives its handle away.
static int unmap_chunk(struct pool *p, struct chunk *c, struct failure *f) {
	struct device *d = p->device;
	if (c->mapped) {
		int code = CALL(d, f, unmap, c->at, c->size);
		if (code)
			return code;
		c->mapped = 0;
		account(p, c, 0);
	}
	if (c->handle)
		give(d, c->handle);
	c->handle = NULL;
	return 0;
}

static void unmap_all(struct pool *p, struct failure *f) {
	for (size_t i = 0; i < p->count; i++)
		unmap_chunk(p, &p->chunks[i], f);
}

// take_all takes a handle for each chunk that has none, or for none.
static int take_all(struct pool *p, struct failure *f) {
	size_t asked = 0;
	for (size_t i = 0; i < p->count; i++)
		asked += p->chunks[i].handle ? 0 : p->chunks[i].size;
	for (size_t i = 0; i < p->count; i++) {
		struct chunk *c = &p->chunks[i];
		if (c->handle || (c->handle = take(p->device, c->size, f)))
			continue;
		for (size_t j = 0; j < i; j++) {
			// What was free when the driver was asked, and this besides.
			if (!p->chunks[j].mapped)
				f->free += p->chunks[j].size;
			unmap_chunk(p, &p->chunks[j], f);
		}
		if (f->code == DRIVER_OUT_OF_MEMORY)
			f->asked = asked;
		return f->code;
	}
	return 0;
}

// add_chunk makes room for a chunk at the end and takes its handle.
static struct chunk *add_chunk(struct pool *p, size_t need, struct failure *f) {
	struct device *d = p->device;
	size_t end = p->blocks.end;
	if (need < p->mapped / GROWTH)
		need = p->mapped / GROWTH;
	size_t size = d->granule;
	while (size * 2 <= d->largest && size * 2 <= need)
		size *= 2;
	while (size > d->granule && size > p->reserve - end)
		size /= 2;
	if (size > p->reserve - end) {
		*f = (struct failure){.code = POOL_FULL, .call = "allocate", .asked = need, .free = p->reserve - end, .total = p->reserve};
		return NULL;
	}
	if (p->count == p->room) {
		size_t room = p->room ? 2 * p->room : 16;
		struct chunk *chunks = realloc(p->chunks, room * sizeof *chunks);
		if (!chunks) {
			fail(f, POOL_HOST_MEMORY, "realloc");
			return NULL;
		}
		p->chunks = chunks;
		p->room = room;
	}
	struct chunk *c = &p->chunks[p->count];
	*c = (struct chunk){.at = p->base + end, .size = size, .handle = take(d, size, f)};
	if (!c->handle)
		return NULL;
	p->count++;
	return c;
}

// grow adds a chunk towards the need of so many bytes. One that the driver
// neither maps fully nor takes back stays, and is tried again next time.
static int grow(struct pool *p, size_t need, struct failure *f) {
	struct chunk *c = p->count ? &p->chunks[p->count - 1] : NULL;
	if (!c || c->at < p->base + p->blocks.end)
		c = add_chunk(p, need, f);
	if (!c)
		return f->code;
	if (!map_chunk(p, c, f) && ranges_grow(&p->blocks, c->size))
		fail(f, POOL_HOST_MEMORY, "malloc");
	struct failure ignored = {0};
	if (f->code && !unmap_chunk(p, c, &ignored))
		p->count--;
	return f->code;
}

static void *allocate(void *self, size_t size) {
	struct pool *p = self;
	struct failure f = {0};
	size_t at = 0;
	pthread_mutex_lock(&p->mutex);
	int code = p->state == POOL_FILLING ? 1 : fail(&f, POOL_STATE, "allocate");
	if (code == 1 && size > p->reserve) {
		f = (struct failure){.code = POOL_FULL, .call = "allocate", .asked = size, .free = p->reserve - p->blocks.used, .total = p->reserve};
		code = f.code;
	}
	if (code == 1 && CALL(p->device, &f, enter))
		code = f.code;
	while (code == 1) {
		code = ranges_take(&p->blocks, size, &at);
		if (code < 0)
			fail(&f, POOL_HOST_MEMORY, "malloc");
		if (code == 1 && grow(p, size - (size < ranges_tail(&p->blocks) ? size : ranges_tail(&p->blocks)), &f))
			code = f.code;
	}
	if (code)
		p->refused = f;
	pthread_mutex_unlock(&p->mutex);
	return code ? NULL : (void *)(uintptr_t)(p->base + at);
}

static void release(void *self, void *block) {
	struct pool *p = self;
	pthread_mutex_lock(&p->mutex);
	if (block && ranges_give(&p->blocks, (size_t)((uintptr_t)block - p->base)))
		abort(); // it was never given, or twice
	pthread_mutex_unlock(&p->mutex);
}

// Copies.

// copy moves size bytes between the device and the host, with at most WINDOW
// pieces under way; *n counts pieces. It returns before all of them are done.
static int copy(struct pool *p, uint64_t at, char *host, size_t size, int in, unsigned *n, struct failure *f) {
	struct device *d = p->device;
	for (size_t done = 0; done < size;) {
		size_t piece = size - done < PIECE ? size - done : PIECE;
		void *event = d->events[*n % WINDOW];
		if (p->cancelled)
			return fail(f, POOL_CANCELLED, "pool_in");
		if (*n >= WINDOW && CALL(d, f, event_wait, event))
			return f->code;
		int code = in ? CALL(d, f, copy_in, at + done, host + done, piece, d->stream) : CALL(d, f, copy_out, host + done, at + done, piece, d->stream);
		if (code || CALL(d, f, event_record, event, d->stream))
			return f->code;
		done += piece;
		++*n;
	}
	return 0;
}

// settle waits for all copies.
static int settle(struct pool *p, struct failure *f) {
	struct device *d = p->device;
	int code = CALL(d, f, stream_wait, d->stream);
	if (code)
		d->driver->synchronize(d->driver); // nothing may be under way when memory is unmapped
	return code;
}

// part copies the bytes of the image from offset on.
static int part(struct pool *p, size_t offset, char *host, size_t size, int in, struct failure *f) {
	if (offset > p->image_size || size > p->image_size - offset)
		return fail(f, POOL_ARGUMENT, "offset");
	if (CALL(p->device, f, enter))
		return f->code;
	unsigned n = 0;
	for (size_t i = 0; i < p->count && size > 0 && !f->code; i++) {
		const struct chunk *c = &p->chunks[i];
		size_t length = c->high - c->low;
		if (offset >= c->offset + length)
			continue;
		size_t from = offset - c->offset, bytes = length - from < size ? length - from : size;
		copy(p, c->at + c->low + from, host, bytes, in, &n, f);
		host += bytes;
		offset += bytes;
		size -= bytes;
	}
	settle(p, f);
	return f->code;
}

// Pools.

struct pool *pool_open(struct device *d, size_t reserve, struct failure *f) {
	if (reserve == 0 || reserve > SIZE_MAX / 2) {
		fail(f, POOL_ARGUMENT, "reserve");
		return NULL;
	}
	reserve = (reserve + d->granule - 1) / d->granule * d->granule;
	struct pool *p = calloc(1, sizeof *p);
	if (!p) {
		fail(f, POOL_HOST_MEMORY, "calloc");
		return NULL;
	}
	if (CALL(d, f, enter) || CALL(d, f, reserve, reserve, &p->base)) {
		f->asked = reserve;
		free(p);
		return NULL;
	}
	p->device = d;
	p->reserve = reserve;
	p->memory = (struct weights_memory){p, p->base, reserve, allocate, release};
	pthread_mutex_init(&p->mutex, NULL);
	pthread_mutex_lock(&d->mutex);
	d->ledger.reserved += reserve;
	d->ledger.pools++;
	pthread_mutex_unlock(&d->mutex);
	return p;
}

static void drop_image(struct pool *p) {
	struct device *d = p->device;
	if (!p->image)
		return;
	pthread_mutex_lock(&d->mutex);
	if (p->pinned)
		ranges_give(&d->pinned, p->image_at);
	else
		d->ledger.pageable -= p->image_size;
	pthread_mutex_unlock(&d->mutex);
	if (!p->pinned)
		free(p->image);
	p->image = NULL;
	p->pinned = 0;
}

static int make_image(struct pool *p, struct failure *f) {
	struct device *d = p->device;
	pthread_mutex_lock(&d->mutex);
	p->pinned = d->arena && !ranges_take(&d->pinned, p->image_size, &p->image_at);
	pthread_mutex_unlock(&d->mutex);
	if (p->pinned) {
		p->image = (char *)d->arena + p->image_at;
		return 0;
	}
	p->image = malloc(p->image_size ? p->image_size : 1);
	if (!p->image) {
		fail(f, POOL_HOST_MEMORY, "malloc");
		f->asked = p->image_size;
		return f->code;
	}
	pthread_mutex_lock(&d->mutex);
	d->ledger.pageable += p->image_size;
	pthread_mutex_unlock(&d->mutex);
	return 0;
}

int pool_close(struct pool *p, struct failure *f) {
	struct device *d = p->device;
	pthread_mutex_lock(&p->mutex);
	size_t blocks = p->blocks.count;
	pthread_mutex_unlock(&p->mutex);
	if (blocks)
		return fail(f, POOL_IN_USE, "pool_close");
	p->state = POOL_OUT;
	pthread_mutex_lock(&p->mutex);
	drop_image(p);
	pthread_mutex_unlock(&p->mutex);
	if (CALL(d, f, enter) || (p->mapped && CALL(d, f, synchronize)))
		return f->code;
	unmap_all(p, f);
	if (f->code || CALL(d, f, unreserve, p->base, p->reserve))
		return f->code;
	pthread_mutex_lock(&d->mutex);
	d->ledger.reserved -= p->reserve;
	d->ledger.pools--;
	pthread_mutex_unlock(&d->mutex);
	pthread_mutex_destroy(&p->mutex);
	ranges_clear(&p->blocks);
	free(p->chunks);
	free(p);
	return 0;
}

void pool_stats(struct pool *p, struct pool_stats *s) {
	pthread_mutex_lock(&p->mutex);
	*s = (struct pool_stats){
		.state = p->state, .pinned = p->pinned, .reserved = p->reserve, .mapped = p->mapped,
		.used = p->blocks.used, .blocks = p->blocks.count, .image = p->image_size, .chunks = p->count,
	};
	pthread_mutex_unlock(&p->mutex);
}

void pool_refused(struct pool *p, struct failure *f) {
	pthread_mutex_lock(&p->mutex);
	*f = p->refused;
	p->refused = (struct failure){0};
	pthread_mutex_unlock(&p->mutex);
}

const struct weights_memory *pool_memory(struct pool *p) { return &p->memory; }

uint64_t pool_allocate(struct pool *p, size_t size) { return (uint64_t)(uintptr_t)allocate(p, size); }
void pool_release(struct pool *p, uint64_t at) { release(p, (void *)(uintptr_t)at); }

int pool_seal(struct pool *p, struct failure *f) {
	if (p->state == POOL_IN)
		return 0;
	if (p->state != POOL_FILLING)
		return fail(f, POOL_STATE, "pool_seal");
	// What is mapped without a block goes back, behind a copy that may still
	// be under way on a stream of the runtime's.
	if (CALL(p->device, f, enter) || CALL(p->device, f, synchronize))
		return f->code;
	pthread_mutex_lock(&p->mutex);
	struct range *r = p->blocks.first;
	size_t kept = 0;
	p->image_size = 0;
	for (size_t i = 0; i < p->count; i++) {
		struct chunk c = p->chunks[i];
		size_t begin = c.at - p->base, end = begin + c.size;
		c.low = c.high = 0;
		for (int first = 1; r && r->at < end; r = r->next) {
			if (r->used && first) {
				c.low = r->at > begin ? r->at - begin : 0;
				first = 0;
			}
			if (r->used)
				c.high = (r->at + r->size < end ? r->at + r->size : end) - begin;
			if (r->at + r->size > end)
				break; // it goes on in the next chunk
		}
		c.offset = p->image_size;
		p->image_size += c.high - c.low;
		struct failure ignored = {0};
		if (c.high > c.low || unmap_chunk(p, &c, &ignored))
			p->chunks[kept++] = c;
	}
	p->count = kept;
	p->state = POOL_IN;
	pthread_mutex_unlock(&p->mutex);
	return 0;
}

int pool_capture(struct pool *p, struct failure *f) {
	if (p->image)
		return fail(f, POOL_STATE, "pool_capture");
	if (pool_seal(p, f))
		return f->code;
	pthread_mutex_lock(&p->mutex);
	make_image(p, f);
	pthread_mutex_unlock(&p->mutex);
	if (f->code || !pool_read(p, 0, p->image, p->image_size, f))
		return f->code;
	pthread_mutex_lock(&p->mutex);
	drop_image(p);
	pthread_mutex_unlock(&p->mutex);
	return f->code;
}

int pool_out(struct pool *p, struct failure *f) {
	struct device *d = p->device;
	if (p->state == POOL_FILLING)
		return fail(f, POOL_STATE, "pool_out");
	if (CALL(d, f, enter) || (p->mapped && CALL(d, f, synchronize)))
		return f->code;
	p->state = POOL_OUT;
	unmap_all(p, f);
	return f->code;
}

int pool_in(struct pool *p, struct failure *f) {
	if (p->state == POOL_IN)
		return 0;
	if (p->state != POOL_OUT || !p->image)
		return fail(f, POOL_STATE, "pool_in");
	if (CALL(p->device, f, enter) || take_all(p, f))
		return f->code;
	unsigned n = 0;
	for (size_t i = 0; i < p->count && !f->code; i++) {
		struct chunk *c = &p->chunks[i];
		if (p->cancelled)
			fail(f, POOL_CANCELLED, "pool_in");
		else if (!map_chunk(p, c, f))
			copy(p, c->at + c->low, p->image + c->offset, c->high - c->low, 1, &n, f);
	}
	if (n > 0 || f->code)
		settle(p, f);
	if (f->code)
		unmap_all(p, f);
	else
		p->state = POOL_IN;
	return f->code;
}

int pool_map(struct pool *p, struct failure *f) {
	if (p->state != POOL_OUT)
		return fail(f, POOL_STATE, "pool_map");
	if (CALL(p->device, f, enter) || take_all(p, f))
		return f->code;
	for (size_t i = 0; i < p->count && !f->code; i++)
		map_chunk(p, &p->chunks[i], f);
	if (f->code)
		unmap_all(p, f);
	return f->code;
}

int pool_write(struct pool *p, size_t offset, const void *from, size_t size, struct failure *f) {
	if (p->state != POOL_OUT)
		return fail(f, POOL_STATE, "pool_write");
	return part(p, offset, (char *)(uintptr_t)from, size, 1, f);
}

int pool_finish(struct pool *p, struct failure *f) {
	if (p->state != POOL_OUT)
		return fail(f, POOL_STATE, "pool_finish");
	p->state = POOL_IN;
	return 0;
}

int pool_unmap(struct pool *p, struct failure *f) {
	if (CALL(p->device, f, enter))
		return f->code;
	unmap_all(p, f);
	return f->code;
}

int pool_read(struct pool *p, size_t offset, void *to, size_t size, struct failure *f) {
	if (p->state != POOL_IN)
		return fail(f, POOL_STATE, "pool_read");
	return part(p, offset, to, size, 0, f);
}

static int exchange(struct pool *p, uint64_t at, void *host, size_t size, int in, struct failure *f) {
	if (p->state == POOL_OUT)
		return fail(f, POOL_STATE, "pool_put");
	if (at < p->base || at - p->base > p->blocks.end || size > p->blocks.end - (at - p->base))
		return fail(f, POOL_ARGUMENT, "address");
	if (CALL(p->device, f, enter))
		return f->code;
	unsigned n = 0;
	copy(p, at, host, size, in, &n, f);
	settle(p, f);
	return f->code;
}

int pool_put(struct pool *p, uint64_t to, const void *from, size_t size, struct failure *f) {
	return exchange(p, to, (void *)(uintptr_t)from, size, 1, f);
}

int pool_get(struct pool *p, void *to, uint64_t from, size_t size, struct failure *f) {
	return exchange(p, from, to, size, 0, f);
}

void pool_cancel(struct pool *p, int on) { p->cancelled = on; }
