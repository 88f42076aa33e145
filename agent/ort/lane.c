#include "lane_internal.h"
#include "readonly.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>

// MAX_TEXT bounds the text of a failure, which may quote a model.
enum { MAX_TEXT = 4 << 10, INVALID_ARGUMENT = 2 };

void lane_drop(struct lane *l) {
	for (size_t i = 0; i < l->output_count; i++)
		if (l->values[i])
			ort_release_value(l->values[i]);
	l->output_count = 0;
	if (l->mapping.start)
		munmap(l->mapping.start, l->mapping.size);
	l->mapping.start = NULL;
	lane_leave(l);
	l->held = 0;
}

// reply sends an answer without outputs.
static int reply(struct lane *l, uint64_t kind, uint64_t bytes, const char *text) {
	uint64_t head[LANE_ANSWER_WORDS] = {kind, l->question.seq, 0, (uint64_t)l->began, (uint64_t)l->ended, bytes, 0};
	size_t n = text ? strnlen(text, MAX_TEXT) : 0;
	if (text)
		head[5] = n;
	memcpy(l->answer, head, sizeof head);
	if (n > 0)
		memcpy(l->answer + sizeof head, text, n);
	return send(l->socket, l->answer, sizeof head + n, MSG_NOSIGNAL) >= 0;
}

// fail answers with a status and releases it.
static int fail(struct lane *l, OrtStatus *s) {
	int ok = reply(l, ort_status_code(s) == INVALID_ARGUMENT ? LANE_REFUSED : LANE_FAILED, 0, ort_status_message(s));
	ort_release_status(s);
	return ok;
}

// memory_of gives the memory of a question, and maps what is attached to it.
static const char *memory_of(struct lane *l, const struct lane_question *q, struct mapping *attached, unsigned char **memory) {
	attached->start = NULL;
	if (!(q->flags & LANE_ATTACHED)) {
		*memory = l->all->memory + q->place;
		return NULL;
	}
	struct stat info;
	if (l->attached < 0 || fstat(l->attached, &info) != 0 || (uint64_t)info.st_size < q->room || q->room == 0)
		return "memory is not attached";
	void *start = mmap(NULL, q->room, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, l->attached, 0);
	if (start == MAP_FAILED)
		return errno == ENOMEM ? "attached memory cannot be mapped: out of memory" : "attached memory cannot be mapped";
	attached->start = start;
	attached->size = q->room;
	*memory = start;
	return NULL;
}

// look describes the outputs of a run.
static OrtStatus *look(struct lane *l, const char **wrong) {
	for (size_t i = 0; i < l->output_count; i++) {
		struct output *o = &l->outputs[i];
		*wrong = "an output is not a tensor of a known type";
		if (!l->values[i])
			return NULL;
		OrtStatus *s = ort_value_info(l->values[i], &o->info);
		if (s || !o->info.is_tensor)
			return s;
		*wrong = "an output has a shape that is not supported";
		if (o->info.rank > ORT_MAX_RANK)
			return NULL;
		uint64_t elements = lane_elements(o->info.shape, o->info.rank);
		if (elements == UINT64_MAX)
			return NULL;
		size_t each = lane_element_size((uint64_t)o->info.type);
		o->data = NULL;
		o->size = 0;
		o->text = 0;
		if (o->info.type == LANE_STRING) {
			if (elements > 0)
				s = ort_strings_size(l->values[i], &o->text);
			if (s)
				return s;
			o->size = o->text + 4 * elements;
		} else if (each == 0 || __builtin_mul_overflow(elements, each, &o->size)) {
			*wrong = "an output is not a tensor of a known type";
			return NULL;
		} else if (o->size > 0) {
			void *data = NULL;
			s = ort_value_data(l->values[i], &data);
			if (s)
				return s;
			o->data = data;
		}
	}
	*wrong = NULL;
	return NULL;
}

// copy writes an output's data.
static OrtStatus *copy(const struct output *o, OrtValue *value, unsigned char *to) {
	if (o->size == 0)
		return NULL;
	if (o->data) {
		if (o->data != to)
			memcpy(to, o->data, o->size);
		return NULL;
	}
	size_t n = (o->size - o->text) / 4;
	unsigned char *text = must(malloc(o->text + 1));
	size_t *bounds = must(calloc(n + 1, sizeof *bounds));
	OrtStatus *s = ort_strings(value, text, o->text, bounds, n);
	bounds[n] = o->text;
	for (size_t i = 0; !s && i < n; i++) {
		size_t length = bounds[i + 1] - bounds[i];
		for (int b = 0; b < 4; b++)
			*to++ = (unsigned char)(length >> 8 * b);
		memcpy(to, text + bounds[i], length);
		to += length;
	}
	free(text);
	free(bounds);
	return s;
}

static uint64_t align(uint64_t n) { return (n + LANE_ALIGNMENT - 1) & ~(uint64_t)(LANE_ALIGNMENT - 1); }

// answer sends the outputs that are held: in the packet where they are small,
// in memory where they fit or lie there already; or it asks for room, and
// they stay held.
static int answer(struct lane *l, unsigned char *memory, uint64_t from, uint64_t room) {
	uint64_t head = 8 * LANE_ANSWER_WORDS, all = 0;
	for (size_t i = 0; i < l->output_count; i++) {
		head += 8 * (LANE_TENSOR_WORDS + l->outputs[i].info.rank);
		all += align(l->outputs[i].size);
	}
	if (align(head) + LANE_INLINED > LANE_PACKET) {
		int ok = reply(l, LANE_FAILED, 0, "the model has too many outputs for one answer");
		lane_drop(l);
		return ok;
	}
	int in_packet = all <= LANE_INLINED;
	unsigned char *to = in_packet ? l->answer : memory;
	uint64_t next = in_packet ? align(head) : from, end = in_packet ? LANE_PACKET : room;
	for (size_t i = 0; i < l->output_count; i++) {
		struct output *o = &l->outputs[i];
		if (!in_packet && o->data && o->data >= memory && (uint64_t)(o->data - memory) < room) {
			o->at = (uint64_t)(o->data - memory);
			continue;
		}
		o->at = o->size > 0 ? next : 0;
		if (o->size > (next > end ? 0 : end - next))
			return reply(l, LANE_ROOM, all, NULL);
		next += align(o->size);
	}
	for (size_t i = 0; i < l->output_count; i++) {
		OrtStatus *s = copy(&l->outputs[i], l->values[i], to + l->outputs[i].at);
		if (s) {
			lane_drop(l);
			return fail(l, s);
		}
	}
	uint64_t flags = l->flags | (in_packet ? LANE_INLINE : 0);
	uint64_t words[LANE_ANSWER_WORDS] = {LANE_DONE, l->held, flags, (uint64_t)l->began, (uint64_t)l->ended, all, l->output_count};
	memcpy(l->answer, words, sizeof words);
	unsigned char *p = l->answer + sizeof words;
	for (size_t i = 0; i < l->output_count; i++) {
		const struct output *o = &l->outputs[i];
		uint64_t t[LANE_TENSOR_WORDS] = {o->index, (uint64_t)o->info.type, o->at, o->size, o->info.rank};
		memcpy(p, t, sizeof t);
		memcpy(p + sizeof t, o->info.shape, 8 * o->info.rank);
		p += sizeof t + 8 * o->info.rank;
	}
	int ok = send(l->socket, l->answer, in_packet ? next : head, MSG_NOSIGNAL) >= 0;
	lane_drop(l);
	return ok;
}

// prepare describes a run's inputs and outputs to the runtime.
static const char *prepare(struct lane *l, const struct lane_question *q, unsigned char *memory) {
	const struct session *s = l->session;
	if (q->inputs > l->in_capacity) {
		l->in_capacity = q->inputs;
		l->in = must(realloc(l->in, q->inputs * sizeof *l->in));
	}
	if (q->outputs > l->out_capacity) {
		l->out_capacity = q->outputs;
		l->names = must(realloc(l->names, q->outputs * sizeof *l->names));
		l->values = must(realloc(l->values, q->outputs * sizeof *l->values));
		l->outputs = must(realloc(l->outputs, q->outputs * sizeof *l->outputs));
	}
	unsigned char *inputs = q->flags & LANE_INLINE ? l->packet : memory;
	for (size_t i = 0; i < q->inputs; i++) {
		const struct lane_tensor *t = &q->tensors[q->outputs + i];
		if (t->index >= s->input_count)
			return "the model has no such input";
		if (t->type == LANE_STRING && !lane_strings(inputs + t->at, t->size, lane_elements(t->shape, t->rank)))
			return "a tensor's shape and strings do not agree";
		l->in[i] = (struct ort_tensor){s->inputs[t->index], (int)t->type, t->shape, t->rank, t->size > 0 ? inputs + t->at : NULL, t->size};
	}
	for (size_t i = 0; i < q->outputs; i++) {
		if (q->tensors[i].index >= s->output_count)
			return "the model has no such output";
		l->names[i] = s->outputs[q->tensors[i].index];
		l->outputs[i].index = q->tensors[i].index;
		l->values[i] = NULL;
	}
	l->output_count = q->outputs;
	return NULL;
}

// expect makes the values of the outputs that have their place already, and
// says whether there are some.
static int expect(struct lane *l, const struct lane_question *q, unsigned char *memory, OrtStatus **s) {
	int some = 0;
	for (size_t i = 0; !*s && i < q->outputs; i++) {
		const struct lane_tensor *t = &q->tensors[i];
		if (t->type == 0 || t->size == 0)
			continue;
		struct ort_tensor place = {l->names[i], (int)t->type, t->shape, t->rank, memory + t->at, t->size};
		*s = ort_make_value(&place, &l->values[i]);
		some = 1;
	}
	return some;
}

// arenas has options say which arenas a run leaves as it found them.
static OrtStatus *arenas(struct lane *l) {
	if (strcmp(l->arenas, l->session->arenas) == 0)
		return NULL;
	OrtStatus *s = ort_shrink_after(l->options, l->session->arenas);
	if (!s)
		memcpy(l->arenas, l->session->arenas, sizeof l->arenas);
	return s;
}

// run answers a LANE_RUN.
static int run(struct lane *l, const struct lane_question *q) {
	unsigned char *memory = NULL;
	l->began = l->ended = 0;
	const char *wrong = memory_of(l, q, &l->mapping, &memory);
	int cancelled = 0;
	if (!wrong && !(l->session = lane_enter(l, q, &cancelled)) && !cancelled)
		wrong = "the session is not open";
	if (cancelled) {
		lane_drop(l);
		return reply(l, LANE_CANCELLED, 0, NULL);
	}
	if (!wrong)
		wrong = prepare(l, q, memory);
	if (wrong) {
		if (l->session)
			lane_over(l);
		lane_drop(l);
		return reply(l, LANE_FAILED, 0, wrong);
	}
	l->flags = 0;
	OrtStatus *s = NULL;
	int expected = expect(l, q, memory, &s);
	l->began = now();
	if (!s)
		s = arenas(l);
	if (!s)
		s = ort_run(l->session->session, l->options, l->in, q->inputs, l->names, q->outputs, l->values);
	if (s && expected) {
		// The shapes may be at fault; nothing else can be told apart from that.
		ort_release_status(s);
		for (size_t i = 0; i < q->outputs; i++) {
			if (l->values[i])
				ort_release_value(l->values[i]);
			l->values[i] = NULL;
		}
		s = ort_run(l->session->session, l->options, l->in, q->inputs, l->names, q->outputs, l->values);
		l->flags = s ? 0 : LANE_SURPRISED;
	}
	l->ended = now();
	if (lane_over(l) && s) {
		ort_release_status(s);
		lane_drop(l);
		return reply(l, LANE_CANCELLED, 0, NULL);
	}
	if (!s)
		s = look(l, &wrong);
	if (s) {
		lane_drop(l);
		return fail(l, s);
	}
	if (wrong) {
		lane_drop(l);
		return reply(l, LANE_FAILED, 0, wrong);
	}
	l->held = q->seq;
	return answer(l, memory, q->from, q->room);
}

// store answers a LANE_STORE.
static int store(struct lane *l, const struct lane_question *q) {
	if (l->held == 0 || l->held != q->seq)
		return reply(l, LANE_FAILED, 0, "malformed packet: no outputs are held");
	struct mapping attached;
	unsigned char *memory = NULL;
	const char *wrong = memory_of(l, q, &attached, &memory);
	int ok = wrong ? reply(l, LANE_FAILED, 0, wrong) : answer(l, memory, q->from, q->room);
	if (attached.start)
		munmap(attached.start, attached.size);
	return ok;
}

int lane_handle(struct lane *l, const unsigned char *packet, size_t size, int whole) {
	const char *wrong = whole ? lane_read(packet, size, l->all->size, &l->question) : "it is too long";
	if (!wrong && l->held && l->question.kind == LANE_RUN)
		wrong = "outputs are held";
	if (wrong) {
		char text[128];
		snprintf(text, sizeof text, "malformed packet: %s", wrong);
		return reply(l, LANE_FAILED, 0, text);
	}
	if (l->question.kind == LANE_STORE)
		return store(l, &l->question);
	lane_drop(l);
	return l->question.kind == LANE_DROP || run(l, &l->question);
}

