// What lanes.c, the lanes and their threads, and lane.c, what a thread does
// with a packet, share.

#ifndef DUNLIN_ORT_LANE_INTERNAL_H
#define DUNLIN_ORT_LANE_INTERNAL_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>

#include "lanes.h"

struct session {
	uint64_t number;
	OrtSession *session;
	char arenas[LANES_ARENAS]; // that its runs leave as they found them; "" for none
	const char **inputs, **outputs; // inputs is the array of both
	size_t input_count, output_count;
	size_t users; // lanes that use it, and one for itself until it is closed
};

struct lanes {
	unsigned char *memory;
	size_t size;
	atomic_flag looking; // set while a lane looks for its next packet

	pthread_mutex_t mutex; // guards what follows, and what lanes and sessions say
	pthread_cond_t unused; // told when a session's users are gone
	struct session **sessions;
	size_t count, capacity;
	struct lane *lanes[LANES_MAX];
};

// output is one of a run that has not been sent yet.
struct output {
	struct ort_info info;
	uint64_t index, size, at;
	unsigned char *data; // NULL for strings
	size_t text;         // of strings, without their lengths
};

struct mapping {
	void *start;
	size_t size;
};

struct lane {
	struct lanes *all;
	size_t number;
	int socket;
	OrtRunOptions *options;

	// Guarded by all->mutex.
	uint64_t running;   // sequence number of the run that goes on; 0 for none
	uint64_t cancelled; // the highest that was given up
	int terminated;     // options say so

	// The thread's own.
	int quick;    // whether the last packet came soon
	int shy;      // packets until it may look again
	int attached; // descriptor that came with it, or -1
	_Alignas(LANE_ALIGNMENT) unsigned char packet[LANE_PACKET];
	_Alignas(LANE_ALIGNMENT) unsigned char answer[LANE_PACKET];
	struct lane_question question;
	char arenas[LANES_ARENAS]; // those that options say
	struct ort_tensor *in;
	const char **names;
	size_t in_capacity, out_capacity;

	// The run whose outputs have not been sent yet.
	uint64_t held; // its sequence number, 0 for none
	struct session *session;
	OrtValue **values;
	struct output *outputs;
	size_t output_count;
	struct mapping mapping; // what was attached to its question
	int64_t began, ended;
	uint64_t flags;
};

static inline void *must(void *p) {
	if (!p)
		abort();
	return p;
}

static inline int64_t now(void) {
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

// Takes a session for a run. NULL says that it is not open, or, with
// *cancelled set, that the run was given up before.
struct session *lane_enter(struct lane *l, const struct lane_question *q, int *cancelled);

// Says that the run is over, and gives whether it was cancelled.
int lane_over(struct lane *l);

// Gives back the session of a run whose outputs are not held any more.
void lane_leave(struct lane *l);

// Answers one packet, of which whole says that it did not lose its end; 0 says
// that the other end is gone.
int lane_handle(struct lane *l, const unsigned char *packet, size_t size, int whole);

// Forgets the run that is held.
void lane_drop(struct lane *l);

#endif
