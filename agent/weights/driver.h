// What pools need of the driver of a device. A table is filled from NVIDIA's
// library at run time (driver_cuda.c) or stands on the memory of this process
// (driver_fake.c).

#ifndef DUNLIN_WEIGHTS_DRIVER_H
#define DUNLIN_WEIGHTS_DRIVER_H

#include <stddef.h>
#include <stdint.h>

// The only error that is told from others; the number is CUDA's.
enum { DRIVER_OUT_OF_MEMORY = 2 };

struct driver_info {
	char name[128];
	unsigned char uuid[16];
	int version;   // of the driver: 13000 is 13.0
	int integrated; // CPU and device share their memory
};

// The functions give 0 or the driver's own number of an error. All but
// describe, close and error_name work for a thread that has entered only.
// Sizes and addresses are in bytes; those of reservations, handles and
// mappings are multiples of the granularity.
struct driver {
	int (*describe)(struct driver *, struct driver_info *);
	const char *(*error_name)(struct driver *, int error);
	// Makes the device's context the calling thread's.
	int (*enter)(struct driver *);
	// Waits for all that the device has been given to do.
	int (*synchronize)(struct driver *);
	int (*memory)(struct driver *, size_t *free, size_t *total);
	int (*granularity)(struct driver *, size_t *size);

	// Addresses, which nothing else in the process is given meanwhile.
	int (*reserve)(struct driver *, size_t size, uint64_t *at);
	int (*unreserve)(struct driver *, uint64_t at, size_t size);
	// Memory without an address.
	int (*create)(struct driver *, size_t size, uint64_t *handle);
	int (*release)(struct driver *, uint64_t handle);
	// Memory at an address. What was mapped is unmapped as a whole, and its
	// content is gone then. Nobody may touch it before access.
	int (*map)(struct driver *, uint64_t at, size_t size, uint64_t handle);
	int (*access)(struct driver *, uint64_t at, size_t size);
	int (*unmap)(struct driver *, uint64_t at, size_t size);

	// Memory of the host that the device reads by itself.
	int (*host_alloc)(struct driver *, size_t size, void **p);
	int (*host_free)(struct driver *, void *p);

	int (*stream_open)(struct driver *, void **stream);
	int (*stream_close)(struct driver *, void *stream);
	int (*stream_wait)(struct driver *, void *stream);
	// Both return before the copy is done, or has begun.
	int (*copy_in)(struct driver *, uint64_t to, const void *from, size_t size, void *stream);
	int (*copy_out)(struct driver *, void *to, uint64_t from, size_t size, void *stream);
	// An event has come when all that the stream was given before it is done.
	int (*event_open)(struct driver *, void **event);
	int (*event_close)(struct driver *, void *event);
	int (*event_record)(struct driver *, void *event, void *stream);
	int (*event_wait)(struct driver *, void *event);

	void (*close)(struct driver *);
};

// Opens a GPU. NULL with no_gpu set says that this machine has none; what is
// wrong is to be freed.
struct driver *driver_cuda(int ordinal, int *no_gpu, char **wrong);

// For callers that cannot call a pointer.
static inline void driver_close(struct driver *d) { d->close(d); }
static inline const char *driver_error_name(struct driver *d, int error) { return d->error_name(d, error); }

// The fake. It counts what it has given, refuses what the driver refuses, and
// notes the first breach of the rules above: a copy into memory that is not
// mapped, memory released while it is mapped, and so on. Copies are done as
// late as allowed. What was unmapped reads as zero when it is mapped again.
struct fake_config {
	size_t capacity, granularity;
	int integrated;
};

struct fake_count {
	uint64_t reserved, created, mapped, pinned; // bytes
	uint64_t calls;
	uint64_t copies; // that were under way at a time, at most
	uint64_t reservations, handles, mappings, streams, events;
};

struct driver *driver_fake(const struct fake_config *);
void fake_count(struct driver *, struct fake_count *);
// The first breach, "" where there was none; to be freed.
char *fake_breach(struct driver *);
// Has the n-th call from now of this function fail, and times - 1 more after
// it; call -1 counts those of all functions. n 0 takes a failure back.
void fake_fail(struct driver *, int call, uint64_t n, uint64_t times, int error);
// The functions that can fail, by number; NULL beyond the last.
const char *fake_call(int call);
void fake_free(struct driver *);

#endif
