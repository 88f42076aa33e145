#define _GNU_SOURCE
#include "driver.h"

#include <assert.h>
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// The CUDA driver's binary interface, as NVIDIA documents it (CUDA Driver
// API, "Virtual Memory Management" and "Memory Management"). Its header is
// not needed to build: types, numbers and the functions' versioned names are
// part of the interface and do not change.

struct location {
	int type, id;
};

struct properties {
	int type, handles;
	struct location location;
	void *windows;
	struct {
		unsigned char compression, rdma;
		unsigned short usage;
		unsigned char reserved[4];
	} flags;
};

struct access {
	struct location location;
	int flags;
};

static_assert(sizeof(struct location) == 8, "CUmemLocation");
static_assert(sizeof(struct properties) == 24 + sizeof(void *), "CUmemAllocationProp");
static_assert(sizeof(struct access) == 12, "CUmemAccessDesc");

enum {
	SUCCESS = 0,
	NO_DEVICE = 100,
	ATTRIBUTE_INTEGRATED = 18,
	ATTRIBUTE_VIRTUAL_MEMORY = 102,
	ALLOCATION_PINNED = 1,
	LOCATION_DEVICE = 1,
	ACCESS_READ_WRITE = 3,
	GRANULARITY_MINIMUM = 0,
	HOST_PORTABLE = 1,
	STREAM_NON_BLOCKING = 1,
	EVENT_BLOCKING_WITHOUT_TIME = 3,
};

#define FUNCTIONS(F) \
	F(init, "cuInit", unsigned) \
	F(driver_version, "cuDriverGetVersion", int *) \
	F(device_count, "cuDeviceGetCount", int *) \
	F(device_get, "cuDeviceGet", int *, int) \
	F(device_name, "cuDeviceGetName", char *, int, int) \
	F(device_uuid, "cuDeviceGetUuid_v2", unsigned char *, int) \
	F(device_attribute, "cuDeviceGetAttribute", int *, int, int) \
	F(context_retain, "cuDevicePrimaryCtxRetain", void **, int) \
	F(context_release, "cuDevicePrimaryCtxRelease_v2", int) \
	F(context_set, "cuCtxSetCurrent", void *) \
	F(context_synchronize, "cuCtxSynchronize", void) \
	F(memory_info, "cuMemGetInfo_v2", size_t *, size_t *) \
	F(granularity, "cuMemGetAllocationGranularity", size_t *, const struct properties *, int) \
	F(address_reserve, "cuMemAddressReserve", uint64_t *, size_t, size_t, uint64_t, unsigned long long) \
	F(address_free, "cuMemAddressFree", uint64_t, size_t) \
	F(create, "cuMemCreate", uint64_t *, size_t, const struct properties *, unsigned long long) \
	F(release, "cuMemRelease", uint64_t) \
	F(map, "cuMemMap", uint64_t, size_t, size_t, uint64_t, unsigned long long) \
	F(unmap, "cuMemUnmap", uint64_t, size_t) \
	F(set_access, "cuMemSetAccess", uint64_t, size_t, const struct access *, size_t) \
	F(host_alloc, "cuMemHostAlloc", void **, size_t, unsigned) \
	F(host_free, "cuMemFreeHost", void *) \
	F(copy_in, "cuMemcpyHtoDAsync_v2", uint64_t, const void *, size_t, void *) \
	F(copy_out, "cuMemcpyDtoHAsync_v2", void *, uint64_t, size_t, void *) \
	F(stream_create, "cuStreamCreate", void **, unsigned) \
	F(stream_destroy, "cuStreamDestroy_v2", void *) \
	F(stream_synchronize, "cuStreamSynchronize", void *) \
	F(event_create, "cuEventCreate", void **, unsigned) \
	F(event_destroy, "cuEventDestroy_v2", void *) \
	F(event_record, "cuEventRecord", void *, void *) \
	F(event_synchronize, "cuEventSynchronize", void *) \
	F(error_name, "cuGetErrorName", int, const char **)

struct cuda {
	struct driver driver; // first
	void *library;
	int ordinal, device;
	void *context; // the primary one, which the runtime uses too
	struct properties properties;
#define F(field, name, ...) int (*field)(__VA_ARGS__);
	FUNCTIONS(F)
#undef F
};

static struct cuda *of(struct driver *d) { return (struct cuda *)d; }

static int describe(struct driver *d, struct driver_info *info) {
	struct cuda *c = of(d);
	memset(info, 0, sizeof *info);
	int rc = c->device_name(info->name, sizeof info->name - 1, c->device);
	if (!rc)
		rc = c->device_uuid(info->uuid, c->device);
	if (!rc)
		rc = c->driver_version(&info->version);
	if (!rc)
		rc = c->device_attribute(&info->integrated, ATTRIBUTE_INTEGRATED, c->device);
	return rc;
}

static const char *error_name(struct driver *d, int error) {
	const char *name = NULL;
	return of(d)->error_name(error, &name) == SUCCESS && name ? name : "unknown error";
}

static int enter(struct driver *d) { return of(d)->context_set(of(d)->context); }
static int synchronize(struct driver *d) { return of(d)->context_synchronize(); }
static int memory(struct driver *d, size_t *free, size_t *total) { return of(d)->memory_info(free, total); }
static int granularity(struct driver *d, size_t *size) { return of(d)->granularity(size, &of(d)->properties, GRANULARITY_MINIMUM); }
static int reserve(struct driver *d, size_t size, uint64_t *at) { return of(d)->address_reserve(at, size, 0, 0, 0); }
static int unreserve(struct driver *d, uint64_t at, size_t size) { return of(d)->address_free(at, size); }
static int create(struct driver *d, size_t size, uint64_t *handle) { return of(d)->create(handle, size, &of(d)->properties, 0); }
static int release(struct driver *d, uint64_t handle) { return of(d)->release(handle); }
static int map(struct driver *d, uint64_t at, size_t size, uint64_t handle) { return of(d)->map(at, size, 0, handle, 0); }
static int unmap(struct driver *d, uint64_t at, size_t size) { return of(d)->unmap(at, size); }

static int access_(struct driver *d, uint64_t at, size_t size) {
	struct access a = {of(d)->properties.location, ACCESS_READ_WRITE};
	return of(d)->set_access(at, size, &a, 1);
}

static int host_alloc(struct driver *d, size_t size, void **p) { return of(d)->host_alloc(p, size, HOST_PORTABLE); }
static int host_free(struct driver *d, void *p) { return of(d)->host_free(p); }
static int stream_open(struct driver *d, void **stream) { return of(d)->stream_create(stream, STREAM_NON_BLOCKING); }
static int stream_close(struct driver *d, void *stream) { return of(d)->stream_destroy(stream); }
static int stream_wait(struct driver *d, void *stream) { return of(d)->stream_synchronize(stream); }
static int copy_in(struct driver *d, uint64_t to, const void *from, size_t size, void *stream) { return of(d)->copy_in(to, from, size, stream); }
static int copy_out(struct driver *d, void *to, uint64_t from, size_t size, void *stream) { return of(d)->copy_out(to, from, size, stream); }
static int event_open(struct driver *d, void **event) { return of(d)->event_create(event, EVENT_BLOCKING_WITHOUT_TIME); }
static int event_close(struct driver *d, void *event) { return of(d)->event_destroy(event); }
static int event_record(struct driver *d, void *event, void *stream) { return of(d)->event_record(event, stream); }
static int event_wait(struct driver *d, void *event) { return of(d)->event_synchronize(event); }

// The library stays open: it does not bear being closed.
static void close_(struct driver *d) {
	struct cuda *c = of(d);
	if (c->context)
		c->context_release(c->device);
	free(c);
}

static char *text(const char *format, const char *what, int number) {
	char *s = NULL;
	if (asprintf(&s, format, what, number) < 0)
		abort();
	return s;
}

static char *load(struct cuda *c) {
#define F(field, name, ...) \
	{ \
		void *symbol = dlsym(c->library, name); \
		if (!symbol) \
			return text("libcuda.so.1 has no %s: the driver is too old", name, 0); \
		memcpy(&c->field, &symbol, sizeof symbol); \
	}
	FUNCTIONS(F)
#undef F
	return NULL;
}

static char *start(struct cuda *c, int *no_gpu) {
	c->library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
	if (!c->library) {
		*no_gpu = 1;
		return text("no NVIDIA driver: %s", dlerror(), 0);
	}
	char *wrong = load(c);
	if (wrong)
		return wrong;
	int rc = c->init(0), count = 0;
	if (rc == SUCCESS)
		rc = c->device_count(&count);
	if (rc == NO_DEVICE || (rc == SUCCESS && count == 0)) {
		*no_gpu = 1;
		return text("the NVIDIA driver sees no GPU%s", "", 0);
	}
	if (rc != SUCCESS)
		return text("the NVIDIA driver does not start: %s", error_name(&c->driver, rc), 0);
	if (c->ordinal < 0 || c->ordinal >= count)
		return text("%s: there are %d", "no GPU has this number", count);
	rc = c->device_get(&c->device, c->ordinal);
	int able = 0;
	if (rc == SUCCESS)
		rc = c->device_attribute(&able, ATTRIBUTE_VIRTUAL_MEMORY, c->device);
	if (rc == SUCCESS && !able)
		return text("the GPU cannot map memory at chosen addresses%s", "", 0);
	if (rc == SUCCESS)
		rc = c->context_retain(&c->context, c->device);
	if (rc != SUCCESS)
		return text("open the GPU: %s", error_name(&c->driver, rc), 0);
	c->properties = (struct properties){.type = ALLOCATION_PINNED, .location = {LOCATION_DEVICE, c->device}};
	return NULL;
}

struct driver *driver_cuda(int ordinal, int *no_gpu, char **wrong) {
	*no_gpu = 0;
	*wrong = NULL;
	struct cuda *c = calloc(1, sizeof *c);
	if (!c)
		abort();
	c->ordinal = ordinal;
	c->driver = (struct driver){
		.describe = describe, .error_name = error_name, .enter = enter, .synchronize = synchronize,
		.memory = memory, .granularity = granularity, .reserve = reserve, .unreserve = unreserve,
		.create = create, .release = release, .map = map, .access = access_, .unmap = unmap,
		.host_alloc = host_alloc, .host_free = host_free,
		.stream_open = stream_open, .stream_close = stream_close, .stream_wait = stream_wait,
		.copy_in = copy_in, .copy_out = copy_out,
		.event_open = event_open, .event_close = event_close, .event_record = event_record, .event_wait = event_wait,
		.close = close_,
	};
	*wrong = start(c, no_gpu);
	if (!*wrong)
		return &c->driver;
	free(c);
	return NULL;
}
