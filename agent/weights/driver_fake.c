#define _GNU_SOURCE
#include "driver.h"

#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

// CUDA's numbers for what the fake refuses.
enum { INVALID_VALUE = 1, INVALID_CONTEXT = 201, INVALID_HANDLE = 400 };

#define CALLS(F) \
	F(enter) F(synchronize) F(memory) F(granularity) F(reserve) F(unreserve) F(create) F(release) F(map) F(access) \
	F(unmap) F(host_alloc) F(host_free) F(stream_open) F(stream_close) F(stream_wait) F(copy_in) F(copy_out) \
	F(event_open) F(event_close) F(event_record) F(event_wait)

enum call {
#define F(name) CALL_##name,
	CALLS(F)
#undef F
	CALL_COUNT
};

static const char *const names[] = {
#define F(name) #name,
	CALLS(F)
#undef F
};

enum kind { RESERVATION, HANDLE, MAPPING, HOST, STREAM, EVENT, COPY };

// All that the driver has given is in one list, copies in the order in which
// they are to be done.
struct thing {
	enum kind kind;
	uint64_t at; // RESERVATION, MAPPING; of a COPY, the device's side
	size_t size; // RESERVATION, HANDLE, MAPPING, HOST, COPY
	int file;    // HANDLE
	int accessible; // MAPPING
	struct thing *handle; // MAPPING
	char *host;           // HOST, COPY
	int in;               // COPY
	struct thing *stream; // COPY, EVENT
	uint64_t number;      // COPY; of an EVENT, that of the last copy before it
	struct thing *previous, *next;
};

struct fake {
	struct driver driver; // first
	struct fake_config config;
	pthread_mutex_t mutex; // guards what follows
	struct thing *first, *last;
	struct fake_count count;
	uint64_t copies; // ever
	uint64_t pending;
	char *breach;
	int fail_call, fail_error;
	uint64_t fail_after, fail_times;
};

static __thread struct fake *current;

static struct fake *of(struct driver *d) { return (struct fake *)d; }

__attribute__((format(printf, 2, 3))) static int breach(struct fake *f, const char *format, ...) {
	va_list arguments;
	va_start(arguments, format);
	if (!f->breach && vasprintf(&f->breach, format, arguments) < 0)
		abort();
	va_end(arguments);
	return INVALID_VALUE;
}

static struct thing *add(struct fake *f, enum kind kind) {
	struct thing *t = calloc(1, sizeof *t);
	if (!t)
		abort();
	t->kind = kind;
	t->previous = f->last;
	*(f->last ? &f->last->next : &f->first) = t;
	f->last = t;
	return t;
}

static void drop(struct fake *f, struct thing *t) {
	*(t->previous ? &t->previous->next : &f->first) = t->next;
	*(t->next ? &t->next->previous : &f->last) = t->previous;
	free(t);
}

static struct thing *find(struct fake *f, enum kind kind, const void *p) {
	for (struct thing *t = f->first; t; t = t->next)
		if (t->kind == kind && (const void *)t == p)
			return t;
	return NULL;
}

static int overlaps(const struct thing *t, uint64_t at, size_t size) { return t->at < at + size && at < t->at + t->size; }

// begin counts a call, and says whether it is to fail.
static int begin(struct fake *f, enum call call) {
	f->count.calls++;
	if (call != CALL_enter && current != f) {
		breach(f, "%s: the thread has not entered", names[call]);
		return INVALID_CONTEXT;
	}
	if (f->fail_times == 0 || (f->fail_call >= 0 && f->fail_call != (int)call) || --f->fail_after > 0)
		return 0;
	f->fail_after = 1;
	f->fail_times--;
	return f->fail_error;
}

// Each function of the table begins and ends with these.
#define ENTER(d, name) \
	struct fake *f = of(d); \
	pthread_mutex_lock(&f->mutex); \
	int rc = begin(f, CALL_##name)

#define LEAVE \
	pthread_mutex_unlock(&f->mutex); \
	return rc

// whole says whether all of it is mapped and may be touched.
static int whole(struct fake *f, uint64_t at, size_t size) {
	while (size > 0) {
		struct thing *t = f->first;
		while (t && !(t->kind == MAPPING && t->accessible && overlaps(t, at, 1)))
			t = t->next;
		if (!t)
			return 0;
		size_t there = (size_t)(t->at + t->size - at);
		if (there >= size)
			return 1;
		at += there;
		size -= there;
	}
	return 1;
}

// carry does the copies of a stream, NULL for all, up to a number; or, where
// the wait for them has failed, ends them: an error there says that the
// device's work has failed, and none of it goes on.
static void carry(struct fake *f, const struct thing *stream, uint64_t number, int failed) {
	for (struct thing *t = f->first, *next; t; t = next) {
		next = t->next;
		if (t->kind != COPY || (stream && t->stream != stream) || t->number > number)
			continue;
		if (failed)
			;
		else if (!whole(f, t->at, t->size))
			breach(f, "a copy of %zu bytes reaches memory that is not mapped any more", t->size);
		else if (t->in)
			memcpy((void *)(uintptr_t)t->at, t->host, t->size);
		else
			memcpy(t->host, (void *)(uintptr_t)t->at, t->size);
		f->pending--;
		drop(f, t);
	}
}

static int describe(struct driver *d, struct driver_info *info) {
	memset(info, 0, sizeof *info);
	strcpy(info->name, "fake");
	info->integrated = of(d)->config.integrated;
	return 0;
}

static const char *error_name(struct driver *d, int error) {
	(void)d;
	switch (error) {
	case DRIVER_OUT_OF_MEMORY:
		return "CUDA_ERROR_OUT_OF_MEMORY";
	case INVALID_VALUE:
		return "CUDA_ERROR_INVALID_VALUE";
	case INVALID_CONTEXT:
		return "CUDA_ERROR_INVALID_CONTEXT";
	case INVALID_HANDLE:
		return "CUDA_ERROR_INVALID_HANDLE";
	}
	return "CUDA_ERROR_UNKNOWN";
}

static int enter(struct driver *d) {
	ENTER(d, enter);
	if (!rc)
		current = f;
	LEAVE;
}

static int synchronize(struct driver *d) {
	ENTER(d, synchronize);
	if (!rc)
		carry(f, NULL, UINT64_MAX, 0);
	LEAVE;
}

static int memory(struct driver *d, size_t *available, size_t *total) {
	ENTER(d, memory);
	*available = f->config.capacity - f->count.created;
	*total = f->config.capacity;
	LEAVE;
}

static int granularity(struct driver *d, size_t *size) {
	ENTER(d, granularity);
	*size = f->config.granularity;
	LEAVE;
}

// multiple says whether all of them are multiples of the granularity.
static int multiple(struct fake *f, uint64_t a, uint64_t b) { return a % f->config.granularity == 0 && b % f->config.granularity == 0 && b > 0; }

static int reserve(struct driver *d, size_t size, uint64_t *at) {
	ENTER(d, reserve);
	if (!rc && !multiple(f, 0, size))
		rc = breach(f, "reserve of %zu bytes, not a multiple of %zu", size, f->config.granularity);
	if (!rc) {
		// So much more that an aligned part is in it.
		size_t granule = f->config.granularity;
		char *p = mmap(NULL, size + granule, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
		if (p == MAP_FAILED)
			rc = DRIVER_OUT_OF_MEMORY;
		else {
			uint64_t start = ((uintptr_t)p + granule - 1) / granule * granule;
			size_t before = start - (uintptr_t)p;
			if (before)
				munmap(p, before);
			if (granule - before)
				munmap((char *)(uintptr_t)start + size, granule - before);
			struct thing *t = add(f, RESERVATION);
			t->at = *at = start;
			t->size = size;
			f->count.reserved += size;
			f->count.reservations++;
		}
	}
	LEAVE;
}

static int unreserve(struct driver *d, uint64_t at, size_t size) {
	ENTER(d, unreserve);
	struct thing *r = NULL;
	for (struct thing *t = f->first; t; t = t->next) {
		if (t->kind == RESERVATION && t->at == at && t->size == size)
			r = t;
		if (!rc && t->kind == MAPPING && overlaps(t, at, size))
			rc = breach(f, "unreserve of addresses that are mapped");
	}
	if (!rc && !r)
		rc = breach(f, "unreserve of what was not reserved so");
	if (!rc) {
		munmap((void *)(uintptr_t)at, size);
		f->count.reserved -= size;
		f->count.reservations--;
		drop(f, r);
	}
	LEAVE;
}

static int create(struct driver *d, size_t size, uint64_t *handle) {
	ENTER(d, create);
	if (!rc && !multiple(f, 0, size))
		rc = breach(f, "create of %zu bytes, not a multiple of %zu", size, f->config.granularity);
	if (!rc && size > f->config.capacity - f->count.created)
		rc = DRIVER_OUT_OF_MEMORY;
	if (!rc) {
		int file = memfd_create("dunlin-fake-device", MFD_CLOEXEC);
		if (file < 0 || ftruncate(file, (off_t)size) != 0) {
			if (file >= 0)
				close(file);
			rc = DRIVER_OUT_OF_MEMORY;
		} else {
			struct thing *t = add(f, HANDLE);
			t->file = file;
			t->size = size;
			*handle = (uint64_t)(uintptr_t)t;
			f->count.created += size;
			f->count.handles++;
		}
	}
	LEAVE;
}

static int release(struct driver *d, uint64_t handle) {
	ENTER(d, release);
	struct thing *h = find(f, HANDLE, (void *)(uintptr_t)handle);
	if (!rc && !h) {
		breach(f, "release of what is not a handle");
		rc = INVALID_HANDLE;
	}
	for (struct thing *t = f->first; t && !rc; t = t->next)
		if (t->kind == MAPPING && t->handle == h)
			rc = breach(f, "release of a handle that is mapped");
	if (!rc) {
		close(h->file);
		f->count.created -= h->size;
		f->count.handles--;
		drop(f, h);
	}
	LEAVE;
}

static int map(struct driver *d, uint64_t at, size_t size, uint64_t handle) {
	ENTER(d, map);
	struct thing *h = find(f, HANDLE, (void *)(uintptr_t)handle);
	int inside = 0;
	if (!rc && !h) {
		breach(f, "map of what is not a handle");
		rc = INVALID_HANDLE;
	}
	if (!rc && (!multiple(f, at, size) || size != h->size))
		rc = breach(f, "map of %zu bytes of a handle of %zu", size, h->size);
	for (struct thing *t = f->first; t && !rc; t = t->next) {
		inside |= t->kind == RESERVATION && t->at <= at && at + size <= t->at + t->size;
		if (t->kind == MAPPING && overlaps(t, at, size))
			rc = breach(f, "map at addresses that are mapped");
		if (t->kind == MAPPING && t->handle == h)
			rc = breach(f, "map of a handle that is mapped");
	}
	if (!rc && !inside)
		rc = breach(f, "map at addresses that are not reserved");
	if (!rc && mmap((void *)(uintptr_t)at, size, PROT_NONE, MAP_SHARED | MAP_FIXED, h->file, 0) == MAP_FAILED)
		rc = DRIVER_OUT_OF_MEMORY;
	if (!rc) {
		struct thing *t = add(f, MAPPING);
		t->at = at;
		t->size = size;
		t->handle = h;
		f->count.mapped += size;
		f->count.mappings++;
	}
	LEAVE;
}

static int access_(struct driver *d, uint64_t at, size_t size) {
	ENTER(d, access);
	struct thing *m = NULL;
	for (struct thing *t = f->first; t; t = t->next)
		if (t->kind == MAPPING && t->at == at && t->size == size)
			m = t;
	if (!rc && !m)
		rc = breach(f, "access to what is not mapped so");
	if (!rc && mprotect((void *)(uintptr_t)at, size, PROT_READ | PROT_WRITE) != 0)
		rc = DRIVER_OUT_OF_MEMORY;
	if (!rc)
		m->accessible = 1;
	LEAVE;
}

static int unmap(struct driver *d, uint64_t at, size_t size) {
	ENTER(d, unmap);
	struct thing *m = NULL;
	for (struct thing *t = f->first; t && !rc; t = t->next) {
		if (t->kind == MAPPING && t->at == at && t->size == size)
			m = t;
		if (t->kind == COPY && overlaps(t, at, size))
			rc = breach(f, "unmap while a copy is under way");
	}
	if (!rc && !m)
		rc = breach(f, "unmap of what was not mapped so");
	if (!rc && mmap((void *)(uintptr_t)at, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) == MAP_FAILED)
		rc = DRIVER_OUT_OF_MEMORY;
	if (!rc) {
		// The next one to map the memory must not find anything in it.
		if (ftruncate(m->handle->file, 0) != 0 || ftruncate(m->handle->file, (off_t)size) != 0)
			abort();
		f->count.mapped -= size;
		f->count.mappings--;
		drop(f, m);
	}
	LEAVE;
}

static int host_alloc(struct driver *d, size_t size, void **p) {
	ENTER(d, host_alloc);
	char *memory = rc ? NULL : malloc(size);
	if (!rc && !memory)
		rc = DRIVER_OUT_OF_MEMORY;
	if (!rc) {
		struct thing *t = add(f, HOST);
		*p = t->host = memory;
		t->size = size;
		f->count.pinned += size;
	}
	LEAVE;
}

static int host_free(struct driver *d, void *p) {
	ENTER(d, host_free);
	struct thing *h = NULL;
	for (struct thing *t = f->first; t; t = t->next)
		if (t->kind == HOST && t->host == p)
			h = t;
	if (!rc && !h)
		rc = breach(f, "host_free of what host_alloc did not give");
	for (struct thing *t = f->first; t && !rc; t = t->next)
		if (t->kind == COPY && t->host < h->host + h->size && h->host < t->host + t->size)
			rc = breach(f, "host_free while a copy is under way");
	if (!rc) {
		free(h->host);
		f->count.pinned -= h->size;
		drop(f, h);
	}
	LEAVE;
}

static int stream_open(struct driver *d, void **stream) {
	ENTER(d, stream_open);
	if (!rc) {
		*stream = add(f, STREAM);
		f->count.streams++;
	}
	LEAVE;
}

static int stream_close(struct driver *d, void *stream) {
	ENTER(d, stream_close);
	if (!rc && !find(f, STREAM, stream))
		rc = breach(f, "stream_close of what is not a stream");
	for (struct thing *t = f->first; t && !rc; t = t->next)
		if (t->kind == COPY && t->stream == stream)
			rc = breach(f, "stream_close while a copy is under way");
	if (!rc) {
		f->count.streams--;
		drop(f, stream);
	}
	LEAVE;
}

static int stream_wait(struct driver *d, void *stream) {
	ENTER(d, stream_wait);
	if (!find(f, STREAM, stream))
		rc = breach(f, "stream_wait for what is not a stream");
	else
		carry(f, stream, UINT64_MAX, rc);
	LEAVE;
}

static int copy(struct fake *f, int rc, uint64_t at, char *host, size_t size, int in, void *stream) {
	if (!rc && !find(f, STREAM, stream))
		rc = breach(f, "a copy on what is not a stream");
	if (!rc && !whole(f, at, size))
		rc = breach(f, "a copy of %zu bytes reaches memory that is not mapped", size);
	if (!rc) {
		struct thing *t = add(f, COPY);
		t->at = at;
		t->host = host;
		t->size = size;
		t->in = in;
		t->stream = stream;
		t->number = ++f->copies;
		if (++f->pending > f->count.copies)
			f->count.copies = f->pending;
	}
	return rc;
}

static int copy_in(struct driver *d, uint64_t to, const void *from, size_t size, void *stream) {
	ENTER(d, copy_in);
	rc = copy(f, rc, to, (char *)(uintptr_t)from, size, 1, stream);
	LEAVE;
}

static int copy_out(struct driver *d, void *to, uint64_t from, size_t size, void *stream) {
	ENTER(d, copy_out);
	rc = copy(f, rc, from, to, size, 0, stream);
	LEAVE;
}

static int event_open(struct driver *d, void **event) {
	ENTER(d, event_open);
	if (!rc) {
		*event = add(f, EVENT);
		f->count.events++;
	}
	LEAVE;
}

static int event_close(struct driver *d, void *event) {
	ENTER(d, event_close);
	if (!rc && !find(f, EVENT, event))
		rc = breach(f, "event_close of what is not an event");
	if (!rc) {
		f->count.events--;
		drop(f, event);
	}
	LEAVE;
}

static int event_record(struct driver *d, void *event, void *stream) {
	ENTER(d, event_record);
	struct thing *e = find(f, EVENT, event), *s = find(f, STREAM, stream);
	if (!rc && (!e || !s))
		rc = breach(f, "event_record of what is not an event, or not on a stream");
	if (!rc) {
		e->stream = s;
		e->number = f->copies;
	}
	LEAVE;
}

static int event_wait(struct driver *d, void *event) {
	ENTER(d, event_wait);
	struct thing *e = find(f, EVENT, event);
	if (!e)
		rc = breach(f, "event_wait for what is not an event");
	else if (e->stream)
		carry(f, e->stream, e->number, rc);
	LEAVE;
}

// The counts outlive the use as a driver, until fake_free.
static void close_(struct driver *d) {
	if (current == of(d))
		current = NULL;
}

struct driver *driver_fake(const struct fake_config *config) {
	struct fake *f = calloc(1, sizeof *f);
	if (!f)
		abort();
	f->config = *config;
	pthread_mutex_init(&f->mutex, NULL);
	f->driver = (struct driver){
		.describe = describe, .error_name = error_name, .enter = enter, .synchronize = synchronize,
		.memory = memory, .granularity = granularity, .reserve = reserve, .unreserve = unreserve,
		.create = create, .release = release, .map = map, .access = access_, .unmap = unmap,
		.host_alloc = host_alloc, .host_free = host_free,
		.stream_open = stream_open, .stream_close = stream_close, .stream_wait = stream_wait,
		.copy_in = copy_in, .copy_out = copy_out,
		.event_open = event_open, .event_close = event_close, .event_record = event_record, .event_wait = event_wait,
		.close = close_,
	};
	return &f->driver;
}

void fake_count(struct driver *d, struct fake_count *count) {
	struct fake *f = of(d);
	pthread_mutex_lock(&f->mutex);
	*count = f->count;
	pthread_mutex_unlock(&f->mutex);
}

char *fake_breach(struct driver *d) {
	struct fake *f = of(d);
	pthread_mutex_lock(&f->mutex);
	char *s = strdup(f->breach ? f->breach : "");
	pthread_mutex_unlock(&f->mutex);
	return s;
}

void fake_fail(struct driver *d, int call, uint64_t n, uint64_t times, int error) {
	struct fake *f = of(d);
	pthread_mutex_lock(&f->mutex);
	f->fail_call = call;
	f->fail_after = n;
	f->fail_times = n ? times : 0;
	f->fail_error = error;
	pthread_mutex_unlock(&f->mutex);
}

const char *fake_call(int call) { return call >= 0 && call < CALL_COUNT ? names[call] : NULL; }

void fake_free(struct driver *d) {
	struct fake *f = of(d);
	while (f->first) {
		struct thing *t = f->first;
		if (t->kind == HANDLE)
			close(t->file);
		if (t->kind == HOST)
			free(t->host);
		if (t->kind == RESERVATION)
			munmap((void *)(uintptr_t)t->at, t->size);
		drop(f, t);
	}
	free(f->breach);
	pthread_mutex_destroy(&f->mutex);
	free(f);
}
