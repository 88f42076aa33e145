// The runtime's weights in memory of ours. An allocator that is registered as
// read-only receives what a session allocates while it is made and does not
// change afterwards: initialisers and prepacked weights.

#ifndef DUNLIN_ORT_READONLY_H
#define DUNLIN_ORT_READONLY_H

#include "../weights/memory.h"
#include "shim.h"

// Registers the allocator of a kind of memory, "Cpu" or "Cuda", and a device;
// once, whoever asks how often. Sessions whose configuration says
// use_env_allocators allocate there.
OrtStatus *ort_readonly_register(const char *kind, int device);

// Has the calling thread's sessions allocate from here until the next call;
// from the C heap where it is NULL and the memory is the CPU's. It has to
// live as long as what is allocated from it.
void ort_readonly_use(const struct weights_memory *);

// How many allocations the calling thread has made since it said from where,
// and their bytes.
void ort_readonly_count(size_t *blocks, size_t *bytes);

// Has runs give back what these arenas have grown by: "gpu:0".
OrtStatus *ort_shrink_after(OrtRunOptions *, const char *arenas);

#endif
