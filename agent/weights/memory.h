// Where a runtime gets the memory for a model's weights from.

#ifndef DUNLIN_WEIGHTS_MEMORY_H
#define DUNLIN_WEIGHTS_MEMORY_H

#include <stddef.h>
#include <stdint.h>

// Addresses are the device's: the host may not be able to read them. Both
// functions may be called by any thread.
struct weights_memory {
	void *self;
	uint64_t base, size; // all that allocate gives lies in there
	void *(*allocate)(void *self, size_t size); // NULL: no memory, or sealed
	void (*release)(void *self, void *block);
};

#endif
