// The memory that runs work in. The runtime's own arenas keep what the largest
// run so far took, one for each session, and the C heap maps large blocks anew
// for each run. This one keeps free blocks for the next run, whichever
// session's it is, until none has used them for a while.

#ifndef DUNLIN_ORT_WORKSPACE_H
#define DUNLIN_ORT_WORKSPACE_H

#include <stddef.h>
#include <stdint.h>

// What the runtime's interface knows as OrtAllocator, of version 18.
struct workspace {
	uint32_t version;
	void *(*alloc)(struct workspace *w, size_t size);
	void (*free)(struct workspace *w, void *p);
	const void *(*info)(const struct workspace *w);
	void *(*reserve)(struct workspace *w, size_t size);
};

// The only one, for memory that the runtime describes as info says; own is the
// runtime's default allocator. Its functions may be called from many threads
// at a time; alloc and reserve give memory aligned to 64 bytes, or throw as
// own does. What is reserved stays long and is given back to the system at
// once when it is freed.
struct workspace *workspace_of(const void *info, void *own);

// Gives the blocks that nobody has back to the system, and their bytes.
size_t workspace_trim(void);

// Gives those back that nobody had between the last two calls.
size_t workspace_age(void);

// Waits until there is a block that nobody has. For one thread.
void workspace_wait(void);

// The bytes of the blocks that nobody has.
size_t workspace_free(void);

#endif
