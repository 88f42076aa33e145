#include "shim.h"
#include "workspace.h"

#include <dlfcn.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>

#ifdef __GLIBC__
#include <malloc.h>
#endif

// Version 24 of the table came with ONNX Runtime 1.24.
enum { API_VERSION = 24 };

// Places in OrtApi.
enum {
	GetErrorCode = 1,
	GetErrorMessage = 2,
	Run = 9,
	SessionGetInputCount = 30,
	SessionGetOutputCount = 31,
	SessionGetInputTypeInfo = 33,
	SessionGetOutputTypeInfo = 34,
	SessionGetInputName = 36,
	SessionGetOutputName = 37,
	CreateRunOptions = 39,
	RunOptionsSetTerminate = 46,
	RunOptionsUnsetTerminate = 47,
	CreateTensorAsOrtValue = 48,
	CreateTensorWithDataAsOrtValue = 49,
	GetTensorMutableData = 51,
	GetStringTensorDataLength = 53,
	GetStringTensorContent = 54,
	CastTypeInfoToTensorInfo = 55,
	GetTensorElementType = 60,
	GetDimensionsCount = 61,
	GetDimensions = 62,
	GetSymbolicDimensions = 63,
	GetTensorTypeAndShape = 65,
	GetValueType = 67,
	CreateCpuMemoryInfo = 69,
	AllocatorFree = 76,
	GetAllocatorWithDefaultOptions = 78,
	ReleaseStatus = 93,
	ReleaseValue = 96,
	ReleaseRunOptions = 97,
	ReleaseTypeInfo = 98,
	ReleaseTensorTypeAndShapeInfo = 99,
	CreateEnvWithGlobalThreadPools = 119,
	DisablePerSessionThreads = 120,
	CreateThreadingOptions = 121,
	ReleaseThreadingOptions = 122,
	GetAvailableProviders = 125,
	ReleaseAvailableProviders = 126,
	SetGlobalIntraOpNumThreads = 147,
	SetGlobalInterOpNumThreads = 148,
	SetGlobalSpinControl = 149,
	RegisterAllocator = 176,
	GetResizedStringTensorElementBuffer = 252,
	SessionOptionsSetLoadCancellationFlag = 293,
	TensorTypeAndShape_HasShape = 390,
};

enum {
	LOG_FATAL = 4,
	ALLOCATOR_DEVICE = 0,
	MEMORY_DEFAULT = 0,
	VALUE_TENSOR = 1,
	ELEMENT_STRING = 8,
};

typedef void (*function)(void);
typedef struct {
	const function *(*get_api)(uint32_t version);
	const char *(*get_version)(void);
} api_base;

static const function *api;
static void *env;       // OrtEnv, held so that the binding gets the same one
static void *memory;    // OrtMemoryInfo of CPU memory
static void *allocator; // OrtAllocator, the default one

// CALL reaches a function that gives a status, DROP one that gives nothing.
#define CALL(place, ...) ((OrtStatus * (*)(__VA_ARGS__)) api[place])
#define DROP(place, p) ((void (*)(void *))api[place])(p)

int ort_status_code(OrtStatus *s) { return ((int (*)(const OrtStatus *))api[GetErrorCode])(s); }
const char *ort_status_message(OrtStatus *s) { return ((const char *(*)(const OrtStatus *))api[GetErrorMessage])(s); }
void ort_release_status(OrtStatus *s) { DROP(ReleaseStatus, s); }

static char *text(const char *format, const char *what) {
	int n = snprintf(NULL, 0, format, what);
	char *s = malloc((size_t)n + 1);
	if (s)
		snprintf(s, (size_t)n + 1, format, what);
	return s;
}

static OrtStatus *make_env(int threads) {
	void *options = NULL;
	OrtStatus *s = CALL(CreateThreadingOptions, void **)(&options);
	if (!s)
		s = CALL(SetGlobalIntraOpNumThreads, void *, int)(options, threads);
	if (!s)
		s = CALL(SetGlobalInterOpNumThreads, void *, int)(options, 1);
	if (!s)
		s = CALL(SetGlobalSpinControl, void *, int)(options, 0);
	if (!s)
		s = CALL(CreateEnvWithGlobalThreadPools, int, const char *, const void *, void **)(LOG_FATAL, "dunlin", options, &env);
	if (options)
		DROP(ReleaseThreadingOptions, options);
	if (!s)
		s = CALL(CreateCpuMemoryInfo, int, int, void **)(ALLOCATOR_DEVICE, MEMORY_DEFAULT, &memory);
	if (!s)
		s = CALL(GetAllocatorWithDefaultOptions, void **)(&allocator);
	if (!s)
		s = CALL(RegisterAllocator, void *, struct workspace *)(env, workspace_of(memory, allocator));
	return s;
}

char *ort_init(const char *library, int threads) {
	// Some builds record events in a database in the user's home and send
	// them away; this has to be said before the environment is made.
	if (setenv("ORT_DISABLE_TELEMETRY", "1", 1) != 0)
		return text("%s", "no memory");
	void *handle = dlopen(library, RTLD_LAZY | RTLD_LOCAL);
	if (!handle)
		return text("%s", dlerror());
	void *symbol = dlsym(handle, "OrtGetApiBase");
	if (!symbol)
		return text("%s is not ONNX Runtime: it has no OrtGetApiBase", library);
	const api_base *(*get_base)(void);
	memcpy(&get_base, &symbol, sizeof symbol);
	const api_base *base = get_base();
	api = base->get_api(API_VERSION);
	if (!api)
		return text("ONNX Runtime %s is too old: 1.24 or later is needed", base->get_version());
	OrtStatus *s = make_env(threads);
	if (!s)
		return NULL;
	char *message = text("%s", ort_status_message(s));
	ort_release_status(s);
	return message;
}

OrtStatus *ort_providers(char ***names, int *count) {
	return CALL(GetAvailableProviders, char ***, int *)(names, count);
}

void ort_release_providers(char **names, int count) {
	OrtStatus *s = CALL(ReleaseAvailableProviders, char **, int)(names, count);
	if (s)
		ort_release_status(s);
}

OrtStatus *ort_share_threads(OrtSessionOptions *options) {
	return CALL(DisablePerSessionThreads, OrtSessionOptions *)(options);
}

OrtStatus *ort_cancel_load(OrtSessionOptions *options) {
	return CALL(SessionOptionsSetLoadCancellationFlag, OrtSessionOptions *, _Bool)(options, 1);
}

OrtStatus *ort_count(OrtSession *session, int outputs, size_t *count) {
	return CALL(outputs ? SessionGetOutputCount : SessionGetInputCount, const OrtSession *, size_t *)(session, count);
}

// shape_info fills in what a OrtTensorTypeAndShapeInfo says.
static OrtStatus *shape_info(const void *shape, struct ort_info *info) {
	OrtStatus *s = CALL(GetTensorElementType, const void *, int *)(shape, &info->type);
	if (!s)
		s = CALL(GetDimensionsCount, const void *, size_t *)(shape, &info->rank);
	if (s || info->rank > ORT_MAX_RANK)
		return s;
	info->known = ((_Bool (*)(const void *))api[TensorTypeAndShape_HasShape])(shape);
	return CALL(GetDimensions, const void *, int64_t *, size_t)(shape, info->shape, info->rank);
}

OrtStatus *ort_describe(OrtSession *session, int outputs, size_t i, char **name, struct ort_info *info) {
	char *theirs = NULL;
	OrtStatus *s = CALL(outputs ? SessionGetOutputName : SessionGetInputName, const OrtSession *, size_t, void *, char **)(session, i, allocator, &theirs);
	if (s)
		return s;
	*name = strdup(theirs);
	s = CALL(AllocatorFree, void *, void *)(allocator, theirs);
	void *type = NULL;
	if (!s)
		s = CALL(outputs ? SessionGetOutputTypeInfo : SessionGetInputTypeInfo, const OrtSession *, size_t, void **)(session, i, &type);
	if (s)
		return s;
	const void *tensor = NULL; // belongs to type
	s = CALL(CastTypeInfoToTensorInfo, const void *, const void **)(type, &tensor);
	info->is_tensor = tensor != NULL;
	if (!s && tensor)
		s = shape_info(tensor, info);
	DROP(ReleaseTypeInfo, type);
	return s;
}

OrtStatus *ort_symbols(OrtSession *session, int outputs, size_t i, char *names[ORT_MAX_RANK]) {
	void *type = NULL;
	OrtStatus *s = CALL(outputs ? SessionGetOutputTypeInfo : SessionGetInputTypeInfo, const OrtSession *, size_t, void **)(session, i, &type);
	if (s)
		return s;
	const void *tensor = NULL; // belongs to type
	size_t rank = 0;
	s = CALL(CastTypeInfoToTensorInfo, const void *, const void **)(type, &tensor);
	if (!s && tensor)
		s = CALL(GetDimensionsCount, const void *, size_t *)(tensor, &rank);
	const char *theirs[ORT_MAX_RANK] = {0};
	if (!s && rank > 0 && rank <= ORT_MAX_RANK)
		s = CALL(GetSymbolicDimensions, const void *, const char **, size_t)(tensor, theirs, rank);
	for (size_t d = 0; d < ORT_MAX_RANK; d++)
		names[d] = !s && theirs[d] ? strdup(theirs[d]) : NULL;
	DROP(ReleaseTypeInfo, type);
	return s;
}

OrtStatus *ort_make_options(OrtRunOptions **options) {
	return CALL(CreateRunOptions, OrtRunOptions **)(options);
}

OrtStatus *ort_terminate(OrtRunOptions *options, int on) {
	return CALL(on ? RunOptionsSetTerminate : RunOptionsUnsetTerminate, OrtRunOptions *)(options);
}

void ort_release_options(OrtRunOptions *options) { DROP(ReleaseRunOptions, options); }

static OrtStatus *fill_strings(OrtValue *value, const struct ort_tensor *t) {
	const unsigned char *p = t->data, *end = p + t->size;
	for (size_t i = 0; end - p >= 4; i++) {
		size_t n = p[0] | (size_t)p[1] << 8 | (size_t)p[2] << 16 | (size_t)p[3] << 24;
		p += 4;
		if (n > (size_t)(end - p))
			break;
		char *element = NULL;
		OrtStatus *s = CALL(GetResizedStringTensorElementBuffer, OrtValue *, size_t, size_t, char **)(value, i, n, &element);
		if (s)
			return s;
		memcpy(element, p, n);
		p += n;
	}
	return NULL;
}

OrtStatus *ort_make_value(const struct ort_tensor *t, OrtValue **value) {
	if (t->type != ELEMENT_STRING)
		return CALL(CreateTensorWithDataAsOrtValue, const void *, void *, size_t, const int64_t *, size_t, int, OrtValue **)(memory, t->data, t->size, t->shape, t->rank, t->type, value);
	OrtStatus *s = CALL(CreateTensorAsOrtValue, void *, const int64_t *, size_t, int, OrtValue **)(allocator, t->shape, t->rank, t->type, value);
	return s ? s : fill_strings(*value, t);
}

OrtStatus *ort_run(OrtSession *session, OrtRunOptions *options,
	const struct ort_tensor *in, size_t in_count,
	const char *const *out_names, size_t out_count, OrtValue **out) {
	OrtStatus *s = NULL;
	// One more than needed: neither a model without inputs nor calloc minds.
	OrtValue **values = calloc(in_count + 1, sizeof *values);
	const char **names = calloc(in_count + 1, sizeof *names);
	if (!values || !names)
		abort();
	for (size_t i = 0; !s && i < in_count; i++) {
		names[i] = in[i].name;
		s = ort_make_value(&in[i], &values[i]);
	}
	if (!s)
		s = CALL(Run, OrtSession *, const OrtRunOptions *, const char *const *, const OrtValue *const *, size_t, const char *const *, size_t, OrtValue **)(
			session, options, names, (const OrtValue *const *)values, in_count, out_names, out_count, out);
	for (size_t i = 0; i < in_count; i++)
		if (values[i])
			ort_release_value(values[i]);
	free(values);
	free(names);
	return s;
}

OrtStatus *ort_value_info(OrtValue *value, struct ort_info *info) {
	int kind = 0;
	OrtStatus *s = CALL(GetValueType, const OrtValue *, int *)(value, &kind);
	info->is_tensor = kind == VALUE_TENSOR;
	if (s || !info->is_tensor)
		return s;
	void *shape = NULL;
	s = CALL(GetTensorTypeAndShape, const OrtValue *, void **)(value, &shape);
	if (s)
		return s;
	s = shape_info(shape, info);
	DROP(ReleaseTensorTypeAndShapeInfo, shape);
	return s;
}

OrtStatus *ort_value_data(OrtValue *value, void **data) {
	return CALL(GetTensorMutableData, OrtValue *, void **)(value, data);
}

OrtStatus *ort_strings_size(OrtValue *value, size_t *size) {
	return CALL(GetStringTensorDataLength, const OrtValue *, size_t *)(value, size);
}

OrtStatus *ort_strings(OrtValue *value, void *buffer, size_t size, size_t *offsets, size_t count) {
	return CALL(GetStringTensorContent, const OrtValue *, void *, size_t, size_t *, size_t)(value, buffer, size, offsets, count);
}

void ort_release_value(OrtValue *value) { DROP(ReleaseValue, value); }

int ort_trim_heap(void) {
#ifdef __GLIBC__
	return malloc_trim(0);
#else
	return 0;
#endif
}

int ort_trim(void) {
	int some = workspace_trim() > 0;
	return ort_trim_heap() || some;
}

static void *trim_when_idle(void *interval) {
	for (;;) {
		workspace_wait();
		nanosleep(interval, NULL);
		if (workspace_age() > 0 && workspace_free() == 0)
			ort_trim_heap(); // nothing runs
	}
	return NULL;
}

int ort_trim_when_idle(int64_t interval) {
	static struct timespec pause;
	pause.tv_sec = interval / 1000000000;
	pause.tv_nsec = interval % 1000000000;
	pthread_t thread;
	int failed = pthread_create(&thread, NULL, trim_when_idle, &pause);
	return failed ? failed : pthread_detach(thread);
}

int ort_die_by_signal(void) {
	static const int faults[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, SIGTRAP, SIGSYS};
	struct sigaction action = {.sa_handler = SIG_DFL};
	for (size_t i = 0; i < sizeof faults / sizeof *faults; i++)
		if (sigaction(faults[i], &action, NULL) != 0)
			return -1;
	struct rlimit none = {0, 0};
	return setrlimit(RLIMIT_CORE, &none);
}
