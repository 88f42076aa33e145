// The packets of a lane, by which one process has models run in another on
// the same machine. packet.go is the other end of them.
//
// A packet is a row of 64-bit words in the machine's byte order, at most
// LANE_PACKET bytes, and then data. A question:
//
//	kind, seq, session, flags, place, room, from, outputs, inputs,
//	each output that is asked for, then each input, as a tensor
//
// place and room say which part of the shared memory the question has for
// itself; with LANE_ATTACHED it is instead all of a memfd of room bytes that
// comes with the packet. Inputs lie in it or, with LANE_INLINE, in the packet.
// Outputs may be laid into it from byte from on. An output whose type is not
// 0 is expected to have this shape, and has its place already. An answer:
//
//	kind, seq, flags, began, ended, bytes, outputs, each output as a tensor
//
// began and ended are the run's, in nanoseconds of CLOCK_MONOTONIC. With
// LANE_INLINE the outputs lie in the packet. Instead of outputs, an answer
// that is a failure has bytes of text. A tensor:
//
//	index among the model's inputs or outputs, type, at, size, rank, dimensions
//
// at is the place of its size bytes of data, a multiple of 8.
#ifndef DUNLIN_ORT_PACKET_H
#define DUNLIN_ORT_PACKET_H

#include <stddef.h>
#include <stdint.h>

enum {
	LANE_PACKET = 64 << 10,
	// Tensors of so many bytes in all are sent in the packet: that is cheaper
	// than to share them.
	LANE_INLINED = 8 << 10,
	// Where data begins: at multiples of so many bytes.
	LANE_ALIGNMENT = 64,
	LANE_QUESTION_WORDS = 9,
	LANE_ANSWER_WORDS = 7,
	LANE_TENSOR_WORDS = 5,
	LANE_MAX_RANK = 32,
};

// Questions.
enum {
	LANE_RUN = 1,
	// After LANE_ROOM: lay the outputs of run seq into this memory.
	LANE_STORE,
	// After LANE_ROOM: forget them. There is no answer.
	LANE_DROP,
};

// Answers.
enum {
	LANE_DONE = 1,
	LANE_FAILED,
	LANE_REFUSED, // the request's inputs are at fault
	LANE_CANCELLED,
	LANE_ROOM, // the outputs need so many bytes of memory
};

// Flags.
enum {
	LANE_ATTACHED = 1,
	LANE_INLINE = 2,
	// An output did not have the shape that it was expected to have: the model
	// had to run once more.
	LANE_SURPRISED = 4,
};

struct lane_tensor {
	uint64_t index, type, at, size;
	size_t rank;
	const int64_t *shape; // in the packet
};

struct lane_question {
	uint64_t kind, seq, session, flags, place, room, from;
	size_t outputs, inputs;
	struct lane_tensor *tensors; // outputs and then inputs
	size_t capacity;             // of tensors, which the next question uses again
};

// Reads a question, which begins at a multiple of 8. shared is the size of the
// shared memory. Returns NULL, or what is wrong with it. What it accepts stays
// within the packet and the memory, and its tensors have the data that their
// type and shape need, but for strings, whose data lane_strings checks.
const char *lane_read(const void *packet, size_t size, uint64_t shared, struct lane_question *q);

// Says whether data holds exactly so many strings, each as a little-endian
// length of four bytes and that many bytes.
int lane_strings(const unsigned char *data, size_t size, uint64_t count);

// The number of elements of a shape, UINT64_MAX where that is too large.
uint64_t lane_elements(const int64_t *shape, size_t rank);

// The bytes of an element, 0 for strings and for types that there are not.
size_t lane_element_size(uint64_t type);

enum { LANE_STRING = 8 };

#endif
