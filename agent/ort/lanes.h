// Lanes run models for another process: each is a socket whose packets
// (packet.h) one thread answers, one after the other, without Go.

#ifndef DUNLIN_ORT_LANES_H
#define DUNLIN_ORT_LANES_H

#include "packet.h"
#include "shim.h"

enum { LANES_MAX = 256 };

struct lanes;

// The memory stays mapped for as long as the process lives. What is made here
// aborts where there is no memory for it.
struct lanes *lanes_new(void *memory, size_t size);

// Starts the lane of this number, which takes over the SOCK_SEQPACKET socket
// and ends when the other end is closed. Returns 0 or an errno; the socket is
// closed then.
int lanes_add(struct lanes *all, size_t number, int socket);

enum { LANES_ARENAS = 32 };

// Has a session answer to a number. Its runs give back what the arenas have
// grown by that are named, by less than LANES_ARENAS characters; "" for none.
// The names live until lanes_close.
void lanes_open(struct lanes *all, uint64_t number, OrtSession *session, const char *arenas,
	const char *const *inputs, size_t input_count, const char *const *outputs, size_t output_count);

// Ends that, and returns when no lane uses the session any more.
void lanes_close(struct lanes *all, uint64_t number);

// Ends the run with this sequence number on a lane, also one that the lane
// has yet to hear of, and all before it.
void lanes_cancel(struct lanes *all, size_t lane, uint64_t seq);

#endif
