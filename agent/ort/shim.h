// The part of ONNX Runtime's C interface that this package uses and the
// binding does not offer. The functions are reached by their place in the
// OrtApi table, which the runtime never changes: functions are only added.

#ifndef DUNLIN_ORT_SHIM_H
#define DUNLIN_ORT_SHIM_H

#include <stddef.h>
#include <stdint.h>

typedef struct OrtStatus OrtStatus;
typedef struct OrtSession OrtSession;
typedef struct OrtSessionOptions OrtSessionOptions;
typedef struct OrtRunOptions OrtRunOptions;
typedef struct OrtValue OrtValue;

enum { ORT_MAX_RANK = 32 };

// A tensor that goes in. For strings, data holds each element as a
// little-endian length of four bytes and that many bytes; size and the number
// of elements must agree with shape.
struct ort_tensor {
	const char *name;
	int type;
	const int64_t *shape;
	size_t rank;
	void *data;
	size_t size;
};

// What a value or a session's input or output is like. known is 0 for a rank
// that the model leaves open.
struct ort_info {
	int is_tensor;
	int type;
	int known;
	size_t rank;
	int64_t shape[ORT_MAX_RANK];
};

// Opens the library and makes its environment with one pool of threads for
// all sessions; the binding can only make one without. Returns NULL, or what
// went wrong, to be freed.
char *ort_init(const char *library, int threads);

// The binding does not list the providers.
OrtStatus *ort_providers(char ***names, int *count);
void ort_release_providers(char **names, int count);

// The binding gives an error's message only.
int ort_status_code(OrtStatus *status);
const char *ort_status_message(OrtStatus *status);
void ort_release_status(OrtStatus *status);

// The binding's options know neither the pool nor the end of a load.
OrtStatus *ort_share_threads(OrtSessionOptions *options);
OrtStatus *ort_cancel_load(OrtSessionOptions *options);

// The binding describes a file by loading it once more, and cannot tell a
// scalar from a tensor whose rank is left open.
OrtStatus *ort_count(OrtSession *session, int outputs, size_t *count);
// The name is to be freed with free.
OrtStatus *ort_describe(OrtSession *session, int outputs, size_t i, char **name, struct ort_info *info);

// The names of a tensor's open dimensions, to be freed with free; NULL where
// one has none. The binding does not give them.
OrtStatus *ort_symbols(OrtSession *session, int outputs, size_t i, char *names[ORT_MAX_RANK]);

// A value over the tensor's data, or, of strings, with a copy of it.
OrtStatus *ort_make_value(const struct ort_tensor *t, OrtValue **value);

// The binding's options cannot be used again after a run that was ended.
OrtStatus *ort_make_options(OrtRunOptions **options);
OrtStatus *ort_terminate(OrtRunOptions *options, int on);
void ort_release_options(OrtRunOptions *options);

// Runs once; out has room for as many values as there are names. The binding
// copies each output, refuses scalar ones, gives half of one in FP16 or BF16,
// ends string inputs at a NUL, and panics for a model without inputs. Where
// out has values already, the runtime writes into them.
OrtStatus *ort_run(OrtSession *session, OrtRunOptions *options,
	const struct ort_tensor *in, size_t in_count,
	const char *const *out_names, size_t out_count, OrtValue **out);

// Values, in place: the binding's give copies.
OrtStatus *ort_value_info(OrtValue *value, struct ort_info *info);
// Where the elements of a tensor that does not hold strings begin.
OrtStatus *ort_value_data(OrtValue *value, void **data);
OrtStatus *ort_strings_size(OrtValue *value, size_t *size);
OrtStatus *ort_strings(OrtValue *value, void *buffer, size_t size, size_t *offsets, size_t count);
void ort_release_value(OrtValue *value);

// Gives free memory of the C heap back to the system, where the C library
// can; ort_trim that of the workspace too. Both say whether there was some.
int ort_trim_heap(void);
int ort_trim(void);

// Begins a thread that gives back blocks of the workspace that were not used
// for so many nanoseconds, or twice as many, and trims the heap when there are
// none left. Returns 0 or an error number.
int ort_trim_when_idle(int64_t interval);

// Has a fault in this process kill it by its signal and without a core dump,
// whatever handlers there are. Returns 0, or -1 with errno set.
int ort_die_by_signal(void);

#endif
