#include "lane_internal.h"

#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

// A lane looks for its next packet for LOOK nanoseconds before it sleeps: to
// wake a core that sleeps takes as long as a small run. Only one lane at a
// time looks, only after a packet that came this soon after the one before,
// and only while nobody else can use its core: it offers that all the time,
// and where it gets it back after more than AWAY nanoseconds, it does not look
// any more for its next SHY packets.
enum { LOOK = 50 * 1000, AWAY = 5 * 1000, SHY = 100 };

struct lanes *lanes_new(void *memory, size_t size) {
	struct lanes *all = must(calloc(1, sizeof *all));
	all->memory = memory;
	all->size = size;
	atomic_flag_clear(&all->looking);
	pthread_mutex_init(&all->mutex, NULL);
	pthread_cond_init(&all->unused, NULL);
	return all;
}

void lanes_open(struct lanes *all, uint64_t number, OrtSession *session, const char *arenas,
	const char *const *inputs, size_t input_count, const char *const *outputs, size_t output_count) {
	struct session *s = must(calloc(1, sizeof *s));
	s->number = number;
	s->session = session;
	snprintf(s->arenas, sizeof s->arenas, "%s", arenas);
	s->inputs = must(calloc(input_count + output_count + 1, sizeof *s->inputs));
	s->outputs = s->inputs + input_count;
	for (size_t i = 0; i < input_count; i++)
		s->inputs[i] = inputs[i];
	for (size_t i = 0; i < output_count; i++)
		s->outputs[i] = outputs[i];
	s->input_count = input_count;
	s->output_count = output_count;
	s->users = 1;
	pthread_mutex_lock(&all->mutex);
	if (all->count == all->capacity) {
		all->capacity = 2 * all->capacity + 8;
		all->sessions = must(realloc(all->sessions, all->capacity * sizeof *all->sessions));
	}
	all->sessions[all->count++] = s;
	pthread_mutex_unlock(&all->mutex);
}

void lanes_close(struct lanes *all, uint64_t number) {
	pthread_mutex_lock(&all->mutex);
	for (size_t i = 0; i < all->count; i++) {
		struct session *s = all->sessions[i];
		if (s->number != number)
			continue;
		all->sessions[i] = all->sessions[--all->count];
		s->users--;
		while (s->users > 0)
			pthread_cond_wait(&all->unused, &all->mutex);
		free(s->inputs);
		free(s);
		break;
	}
	pthread_mutex_unlock(&all->mutex);
}

void lanes_cancel(struct lanes *all, size_t number, uint64_t seq) {
	pthread_mutex_lock(&all->mutex);
	struct lane *l = number < LANES_MAX ? all->lanes[number] : NULL;
	if (l && l->cancelled < seq)
		l->cancelled = seq;
	if (l && l->running != 0 && l->running <= seq && !l->terminated) {
		l->terminated = 1;
		OrtStatus *s = ort_terminate(l->options, 1);
		if (s)
			ort_release_status(s);
	}
	pthread_mutex_unlock(&all->mutex);
}

struct session *lane_enter(struct lane *l, const struct lane_question *q, int *cancelled) {
	struct session *found = NULL;
	pthread_mutex_lock(&l->all->mutex);
	*cancelled = q->seq <= l->cancelled;
	for (size_t i = 0; !*cancelled && i < l->all->count; i++)
		if (l->all->sessions[i]->number == q->session)
			found = l->all->sessions[i];
	if (found) {
		found->users++;
		l->running = q->seq;
	}
	pthread_mutex_unlock(&l->all->mutex);
	return found;
}

int lane_over(struct lane *l) {
	pthread_mutex_lock(&l->all->mutex);
	int terminated = l->terminated;
	l->running = 0;
	l->terminated = 0;
	pthread_mutex_unlock(&l->all->mutex);
	if (terminated) {
		OrtStatus *s = ort_terminate(l->options, 0);
		if (s)
			ort_release_status(s);
	}
	return terminated;
}

void lane_leave(struct lane *l) {
	if (!l->session)
		return;
	pthread_mutex_lock(&l->all->mutex);
	if (--l->session->users == 0)
		pthread_cond_broadcast(&l->all->unused);
	pthread_mutex_unlock(&l->all->mutex);
	l->session = NULL;
}

// receive waits for a packet and takes the descriptor that comes with it.
static ssize_t receive(struct lane *l, unsigned char **packet, int *whole) {
	union {
		struct cmsghdr header;
		char room[CMSG_SPACE(sizeof(int))];
	} control;
	// Held outputs may be inputs, which lie in the packet that brought them.
	*packet = l->held ? l->answer : l->packet;
	struct iovec part = {*packet, LANE_PACKET};
	// There is room for one descriptor: the kernel closes others.
	struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = CMSG_LEN(sizeof(int))};
	int64_t began = now(), last = began;
	ssize_t n = -1;
	errno = EAGAIN;
	if (l->shy > 0) {
		l->shy--;
	} else if (l->quick && !atomic_flag_test_and_set(&l->all->looking)) {
		while ((n = recvmsg(l->socket, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC)) < 0 && errno == EAGAIN) {
			sched_yield();
			int64_t before = last;
			last = now();
			if (last - before > AWAY)
				l->shy = SHY;
			if (last - began > LOOK || l->shy > 0)
				break;
		}
		atomic_flag_clear(&l->all->looking);
	}
	while (n < 0 && (errno == EAGAIN || errno == EINTR)) {
		message.msg_controllen = CMSG_LEN(sizeof(int));
		n = recvmsg(l->socket, &message, MSG_CMSG_CLOEXEC);
	}
	l->quick = now() - began < LOOK;
	l->attached = -1;
	struct cmsghdr *c = n >= 0 ? CMSG_FIRSTHDR(&message) : NULL;
	if (c && c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS && c->cmsg_len >= CMSG_LEN(sizeof(int)))
		memcpy(&l->attached, CMSG_DATA(c), sizeof(int));
	*whole = !(message.msg_flags & (MSG_TRUNC | MSG_CTRUNC));
	return n;
}

static void *serve(void *arg) {
	struct lane *l = arg;
	for (int ok = 1; ok;) {
		int whole = 1;
		unsigned char *packet = NULL;
		ssize_t n = receive(l, &packet, &whole);
		ok = n > 0 && lane_handle(l, packet, (size_t)n, whole);
		if (l->attached >= 0)
			close(l->attached);
	}
	lane_drop(l);
	pthread_mutex_lock(&l->all->mutex);
	l->all->lanes[l->number] = NULL;
	pthread_mutex_unlock(&l->all->mutex);
	close(l->socket);
	ort_release_options(l->options);
	free(l->question.tensors);
	free(l->in);
	free(l->names);
	free(l->values);
	free(l->outputs);
	free(l);
	return NULL;
}

// start begins the thread. No signal is for it: a fault in it kills the
// process all the same.
static int start(struct lane *l) {
	sigset_t all, before;
	pthread_attr_t attributes;
	pthread_t thread;
	sigfillset(&all);
	pthread_attr_init(&attributes);
	pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	int failed = pthread_create(&thread, &attributes, serve, l);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	pthread_attr_destroy(&attributes);
	return failed;
}

static int add(struct lanes *all, size_t number, int socket) {
	OrtRunOptions *options = NULL;
	OrtStatus *s = ort_make_options(&options);
	if (s) {
		ort_release_status(s);
		return ENOMEM;
	}
	struct lane *l = must(aligned_alloc(LANE_ALIGNMENT, sizeof *l));
	// The packets stay as they are: what is not used of them takes no memory.
	memset(l, 0, offsetof(struct lane, packet));
	memset(&l->question, 0, sizeof *l - offsetof(struct lane, question));
	l->all = all;
	l->number = number;
	l->socket = socket;
	l->options = options;
	pthread_mutex_lock(&all->mutex);
	int failed = all->lanes[number] ? EEXIST : start(l);
	if (!failed)
		all->lanes[number] = l;
	pthread_mutex_unlock(&all->mutex);
	if (failed) {
		ort_release_options(options);
		free(l);
	}
	return failed;
}

int lanes_add(struct lanes *all, size_t number, int socket) {
	int failed = number < LANES_MAX ? add(all, number, socket) : EINVAL;
	if (failed)
		close(socket);
	return failed;
}
