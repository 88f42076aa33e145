#include "packet.h"

#include <stdlib.h>

size_t lane_element_size(uint64_t type) {
	static const unsigned char sizes[] = {
		[1] = 4, [2] = 1, [3] = 1, [4] = 2, [5] = 2, [6] = 4, [7] = 8,
		[9] = 1, [10] = 2, [11] = 8, [12] = 4, [13] = 8, [16] = 2};
	return type < sizeof sizes ? sizes[type] : 0;
}

uint64_t lane_elements(const int64_t *shape, size_t rank) {
	uint64_t n = 1;
	int empty = 0;
	for (size_t i = 0; i < rank; i++) {
		if (shape[i] < 0)
			return UINT64_MAX;
		if (shape[i] == 0)
			empty = 1;
		else if (__builtin_mul_overflow(n, (uint64_t)shape[i], &n) || n > INT64_MAX)
			return UINT64_MAX;
	}
	return empty ? 0 : n;
}

int lane_strings(const unsigned char *data, size_t size, uint64_t count) {
	for (; size >= 4; count--) {
		size_t n = data[0] | (size_t)data[1] << 8 | (size_t)data[2] << 16 | (size_t)data[3] << 24;
		if (count == 0 || n > size - 4)
			return 0;
		data += 4 + n;
		size -= 4 + n;
	}
	return size == 0 && count == 0;
}

// words is what is left of a packet.
struct words {
	const uint64_t *next;
	size_t left;
};

// tensor reads one whose data lies within so many bytes.
static const char *tensor(struct words *w, uint64_t bytes, struct lane_tensor *t) {
	if (w->left < LANE_TENSOR_WORDS)
		return "it ends within a tensor";
	t->index = w->next[0];
	t->type = w->next[1];
	t->at = w->next[2];
	t->size = w->next[3];
	uint64_t rank = w->next[4];
	w->next += LANE_TENSOR_WORDS;
	w->left -= LANE_TENSOR_WORDS;
	if (rank > LANE_MAX_RANK || rank > w->left)
		return "a tensor has too many dimensions";
	t->rank = rank;
	t->shape = (const int64_t *)w->next;
	w->next += rank;
	w->left -= rank;
	if (t->type == 0 && rank == 0 && t->size == 0)
		return NULL; // an output of which nothing is expected
	if (t->at % 8 != 0 || t->at > bytes || t->size > bytes - t->at)
		return "a tensor lies outside the memory";
	uint64_t elements = lane_elements(t->shape, t->rank), size;
	if (elements == UINT64_MAX)
		return "a tensor has a bad shape";
	if (t->type == LANE_STRING)
		return NULL;
	size_t each = lane_element_size(t->type);
	if (each == 0)
		return "a tensor has an unknown type";
	if (__builtin_mul_overflow(elements, each, &size) || size != t->size)
		return "a tensor's shape and data do not agree";
	return NULL;
}

const char *lane_read(const void *packet, size_t size, uint64_t shared, struct lane_question *q) {
	struct words w = {packet, size / 8};
	if (w.left < LANE_QUESTION_WORDS)
		return "it ends within its head";
	q->kind = w.next[0];
	q->seq = w.next[1];
	q->session = w.next[2];
	q->flags = w.next[3];
	q->place = w.next[4];
	q->room = w.next[5];
	q->from = w.next[6];
	uint64_t outputs = w.next[7], inputs = w.next[8];
	w.next += LANE_QUESTION_WORDS;
	w.left -= LANE_QUESTION_WORDS;
	if (q->kind < LANE_RUN || q->kind > LANE_DROP || q->seq == 0 || (q->flags & ~(uint64_t)(LANE_ATTACHED | LANE_INLINE)))
		return "it is of an unknown kind";
	if (q->flags & LANE_ATTACHED)
		shared = q->room;
	if (q->place > shared || q->room > shared - q->place || q->from > q->room || q->from % LANE_ALIGNMENT != 0 || q->place % LANE_ALIGNMENT != 0)
		return "its memory is not there";
	if (outputs > w.left / LANE_TENSOR_WORDS || inputs > w.left / LANE_TENSOR_WORDS - outputs)
		return "it ends before its tensors";
	if (q->kind == LANE_RUN ? outputs == 0 : outputs + inputs != 0)
		return "it has a wrong number of tensors";
	if (outputs + inputs > q->capacity) {
		free(q->tensors);
		q->capacity = outputs + inputs;
		q->tensors = calloc(q->capacity, sizeof *q->tensors);
		if (!q->tensors)
			abort();
	}
	q->outputs = outputs;
	q->inputs = inputs;
	for (size_t i = 0; i < outputs + inputs; i++) {
		int in_packet = i >= outputs && (q->flags & LANE_INLINE);
		const char *wrong = tensor(&w, in_packet ? size : q->room, &q->tensors[i]);
		if (!wrong && q->tensors[i].type == (i < outputs ? LANE_STRING : 0))
			wrong = "a tensor has an unknown type";
		if (wrong)
			return wrong;
	}
	return NULL;
}
