// Reads packets from its input, each behind two 64-bit words, its size and
// that of the shared memory, and prints a line about each: what lane_read has
// against it, or "ok". It touches all that an accepted packet lets a lane
// touch, each packet and memory being a block of its own.

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../packet.h"

static unsigned long sum;

static void touch(const unsigned char *p, uint64_t size) {
	for (uint64_t i = 0; i < size; i++)
		sum += p[i];
}

int main(void) {
	struct lane_question q = {0};
	uint64_t sizes[2];
	while (fread(sizes, sizeof sizes, 1, stdin) == 1) {
		unsigned char *packet = malloc(sizes[0]), *memory = calloc(1, sizes[1]);
		if (sizes[0] > 0 && fread(packet, sizes[0], 1, stdin) != 1)
			return 1;
		const char *wrong = lane_read(packet, sizes[0], sizes[1], &q);
		for (size_t i = 0; !wrong && i < q.outputs + q.inputs; i++) {
			const struct lane_tensor *t = &q.tensors[i];
			for (size_t d = 0; d < t->rank; d++)
				sum += (unsigned long)t->shape[d];
			int in_packet = i >= q.outputs && (q.flags & LANE_INLINE);
			if (t->size == 0 || (!in_packet && (q.flags & LANE_ATTACHED)))
				continue;
			const unsigned char *data = in_packet ? packet + t->at : memory + q.place + t->at;
			touch(data, t->size);
			if (t->type == LANE_STRING && !lane_strings(data, t->size, lane_elements(t->shape, t->rank)))
				wrong = "strings";
		}
		printf("%s\n", wrong ? wrong : "ok");
		free(packet);
		free(memory);
	}
	free(q.tensors);
	return sum == 1; // which needs all of it
}
