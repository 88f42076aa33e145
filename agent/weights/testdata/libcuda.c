// The functions of libcuda.so.1 that are used, by the names and with the
// arguments that NVIDIA documents, on the fake device: built as that library,
// it shows that the table of the real driver calls them rightly.
#include "../driver.h"

#include <string.h>

typedef int CUresult, CUdevice;
typedef unsigned long long CUdeviceptr, CUhandle;

static struct driver *fake;
static char context[] = "the primary context";

enum { INVALID_VALUE = 1, INVALID_DEVICE = 101 };

CUresult cuInit(unsigned flags) {
	struct fake_config config = {.capacity = 64 << 20, .granularity = 1 << 16};
	if (flags != 0)
		return INVALID_VALUE;
	if (!fake)
		fake = driver_fake(&config);
	return 0;
}

CUresult cuDriverGetVersion(int *version) { return *version = 12090, 0; }
CUresult cuDeviceGetCount(int *count) { return *count = 1, 0; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { return *device = 0, ordinal == 0 ? 0 : INVALID_DEVICE; }

CUresult cuDeviceGetName(char *name, int length, CUdevice device) {
	if (device != 0 || length < 16)
		return INVALID_VALUE;
	strcpy(name, "Stub 9000");
	return 0;
}

CUresult cuDeviceGetUuid_v2(unsigned char uuid[16], CUdevice device) {
	for (int i = 0; i < 16; i++)
		uuid[i] = (unsigned char)(i * 17);
	return device == 0 ? 0 : INVALID_VALUE;
}

CUresult cuDeviceGetAttribute(int *value, int attribute, CUdevice device) {
	*value = attribute == 102 || attribute == 18; // virtual memory; integrated
	return device == 0 ? 0 : INVALID_VALUE;
}

CUresult cuDevicePrimaryCtxRetain(void **c, CUdevice device) { return *c = context, device == 0 ? 0 : INVALID_VALUE; }
CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device) { return device == 0 ? 0 : INVALID_VALUE; }
CUresult cuCtxSetCurrent(void *c) { return c == context ? fake->enter(fake) : INVALID_VALUE; }
CUresult cuCtxSynchronize(void) { return fake->synchronize(fake); }
CUresult cuMemGetInfo_v2(size_t *free, size_t *total) { return fake->memory(fake, free, total); }

// pinned says whether a CUmemAllocationProp is one of pinned memory on device 0.
static int pinned(const void *properties) {
	const int *p = properties;
	static const int want[8] = {1, 0, 1, 0};
	return memcmp(p, want, sizeof want) == 0;
}

CUresult cuMemGetAllocationGranularity(size_t *granularity, const void *properties, int option) {
	return pinned(properties) && option == 0 ? fake->granularity(fake, granularity) : INVALID_VALUE;
}

CUresult cuMemAddressReserve(CUdeviceptr *p, size_t size, size_t alignment, CUdeviceptr at, unsigned long long flags) {
	return alignment == 0 && at == 0 && flags == 0 ? fake->reserve(fake, size, (uint64_t *)p) : INVALID_VALUE;
}

CUresult cuMemAddressFree(CUdeviceptr p, size_t size) { return fake->unreserve(fake, p, size); }

CUresult cuMemCreate(CUhandle *handle, size_t size, const void *properties, unsigned long long flags) {
	return pinned(properties) && flags == 0 ? fake->create(fake, size, (uint64_t *)handle) : INVALID_VALUE;
}

CUresult cuMemRelease(CUhandle handle) { return fake->release(fake, handle); }

CUresult cuMemMap(CUdeviceptr p, size_t size, size_t offset, CUhandle handle, unsigned long long flags) {
	return offset == 0 && flags == 0 ? fake->map(fake, p, size, handle) : INVALID_VALUE;
}

CUresult cuMemUnmap(CUdeviceptr p, size_t size) { return fake->unmap(fake, p, size); }

CUresult cuMemSetAccess(CUdeviceptr p, size_t size, const void *description, size_t count) {
	static const int want[3] = {1, 0, 3}; // device 0, read and write
	return count == 1 && memcmp(description, want, sizeof want) == 0 ? fake->access(fake, p, size) : INVALID_VALUE;
}

CUresult cuMemHostAlloc(void **p, size_t size, unsigned flags) { return flags == 1 ? fake->host_alloc(fake, size, p) : INVALID_VALUE; }
CUresult cuMemFreeHost(void *p) { return fake->host_free(fake, p); }
CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void *from, size_t size, void *stream) { return fake->copy_in(fake, to, from, size, stream); }
CUresult cuMemcpyDtoHAsync_v2(void *to, CUdeviceptr from, size_t size, void *stream) { return fake->copy_out(fake, to, from, size, stream); }
CUresult cuStreamCreate(void **stream, unsigned flags) { return flags == 1 ? fake->stream_open(fake, stream) : INVALID_VALUE; }
CUresult cuStreamDestroy_v2(void *stream) { return fake->stream_close(fake, stream); }
CUresult cuStreamSynchronize(void *stream) { return fake->stream_wait(fake, stream); }
CUresult cuEventCreate(void **event, unsigned flags) { return flags == 3 ? fake->event_open(fake, event) : INVALID_VALUE; }
CUresult cuEventDestroy_v2(void *event) { return fake->event_close(fake, event); }
CUresult cuEventRecord(void *event, void *stream) { return fake->event_record(fake, event, stream); }
CUresult cuEventSynchronize(void *event) { return fake->event_wait(fake, event); }

CUresult cuGetErrorName(CUresult error, const char **name) {
	if (error < 0 || error > 10000)
		return INVALID_VALUE;
	*name = fake->error_name(fake, error);
	return 0;
}
