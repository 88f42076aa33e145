// Pools of device memory whose content can leave the device and come back at
// the same addresses.

#ifndef DUNLIN_WEIGHTS_POOL_H
#define DUNLIN_WEIGHTS_POOL_H

#include "driver.h"
#include "memory.h"

// Errors that are not the driver's.
enum {
	POOL_CANCELLED = -1,
	POOL_HOST_MEMORY = -2, // malloc gave nothing
	POOL_FULL = -3,        // the pool's addresses are used up
	POOL_STATE = -4,       // not in this state
	POOL_IN_USE = -5,
	POOL_ARGUMENT = -6,
};

// What went wrong: the call, and, where memory ran out, what was asked for
// and what the device or the pool had.
struct failure {
	int code; // 0: nothing
	const char *call;
	uint64_t asked, free, total;
};

struct device;
struct pool;

struct device_settings {
	size_t pinned;   // bytes of pinned host memory for images, taken at once
	size_t recycled; // bytes of device memory that are kept for the next pool, at most
	size_t largest;  // bytes of the largest handle; a power of two granules is used
};

struct device_ledger {
	uint64_t reserved;              // addresses of pools
	uint64_t physical;              // memory that the driver has given: mapped or recycled
	uint64_t mapped, recycled;
	uint64_t pinned, pinned_used;   // the arena for images, and what of it is one
	uint64_t pageable;              // images that found no room there
	uint64_t pools;
};

enum pool_state { POOL_FILLING, POOL_IN, POOL_OUT };

struct pool_stats {
	enum pool_state state;
	int pinned;      // the image lies in pinned memory
	uint64_t reserved, mapped;
	uint64_t used;   // bytes of blocks
	uint64_t blocks;
	uint64_t image;  // bytes that are copied when the content comes in
	uint64_t chunks;
};

// The driver stays the caller's, and is closed after the device.
struct device *device_open(struct driver *, const struct device_settings *, struct failure *);
// Refused while there are pools; after another failure it may be tried again.
int device_close(struct device *, struct failure *);
void device_ledger(struct device *, struct device_ledger *);
// Copies size bytes times times from pinned memory to the device's, both
// their own and in one piece, and says how many nanoseconds each took.
int device_measure(struct device *, size_t size, int times, int64_t *took, struct failure *);
int device_describe(struct device *, struct driver_info *, struct failure *);
int device_memory(struct device *, size_t *free, size_t *total, struct failure *);

// A pool is used by one thread at a time, but that its memory may be
// allocated and released by any, and pool_cancel and pool_stats be called by
// any. Captures and arrivals of one device's pools come one at a time too.
struct pool *pool_open(struct device *, size_t reserve, struct failure *);
// Refused while blocks are in use; after another failure the content is lost
// and it may be tried again.
int pool_close(struct pool *, struct failure *);
void pool_stats(struct pool *, struct pool_stats *);
// What the last refused allocation was refused for, once.
void pool_refused(struct pool *, struct failure *);
const struct weights_memory *pool_memory(struct pool *);

// What weights_memory does, by address; 0 for none.
uint64_t pool_allocate(struct pool *, size_t size);
void pool_release(struct pool *, uint64_t at);

// Ends filling. The pool is in then; memory without a block goes back.
int pool_seal(struct pool *, struct failure *);
// Seals, and copies the content into an image on the host. After a failure
// the content is where it was, without an image.
int pool_capture(struct pool *, struct failure *);
// Unmaps the content. After a failure to synchronize the pool is still in;
// after any other it is out, and keeps what the driver did not take back
// until the next call.
int pool_out(struct pool *, struct failure *);
// Maps the memory again and copies the image into it. After a failure, and
// after pool_cancel, the pool is out.
int pool_in(struct pool *, struct failure *);

// The same in parts, for content that is kept elsewhere: pool_map, then
// pool_write for each byte of the image, then pool_finish, or pool_unmap to
// be out again.
int pool_map(struct pool *, struct failure *);
int pool_write(struct pool *, size_t offset, const void *from, size_t size, struct failure *);
int pool_finish(struct pool *, struct failure *);
int pool_unmap(struct pool *, struct failure *);
int pool_read(struct pool *, size_t offset, void *to, size_t size, struct failure *);

// Copies between the host and addresses of the pool, while that is not out;
// what is written after a capture is not in the image.
int pool_put(struct pool *, uint64_t to, const void *from, size_t size, struct failure *);
int pool_get(struct pool *, void *to, uint64_t from, size_t size, struct failure *);

// Has pool_in end soon; off takes that back.
void pool_cancel(struct pool *, int on);

#endif
