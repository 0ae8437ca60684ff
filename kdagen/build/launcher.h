/* Host side of one kdagen kernel: what every launcher shares.
 *
 * A launcher is one generated C file (launcher.c.j2) that embeds a cubin and includes this header. It is called
 * through tvm-ffi's C ABI with DLPack tensors, checks them, encodes TMA descriptors and launches on the caller's
 * current stream. It needs libcuda.so.1 (opened at the first call) and libtvm_ffi, nothing else.
 *
 * First use is safe from several threads. Each device's primary context is retained once and never released.
 * All sizes are 64-bit; dimensions passed to a kernel are checked to fit its 32-bit parameters. */
#include <dlfcn.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <tvm/ffi/c_api.h>
#include <tvm/ffi/extra/c_env_api.h>

enum { MAX_DEVICES = 64, MESSAGE_SIZE = 1024, ALIGNMENT = 16, STATIC_SHARED_LIMIT = 48 * 1024 };
enum { CAPABILITY_MAJOR = 75, CAPABILITY_MINOR = 76 };   /* CUdevice_attribute */
enum { MAX_DYNAMIC_SHARED_SIZE = 8 };                    /* CUfunction_attribute */

#define TRY(step) do { if (step) return -1; } while (0)
#define EMBED(name, file)                                                                        \
  __asm__(".section .rodata\n.balign 64\n" #name ":\n.incbin \"" file "\"\n.byte 0\n.previous\n"); \
  extern const char name[] __attribute__((visibility("hidden")))

/* CUtensorMap: 128 opaque bytes that must lie on a multiple of 64. */
typedef struct { _Alignas(64) uint64_t opaque[16]; } TensorMap;

/* What the launcher needs of the CUDA driver API: X(result type, symbol, parameter types). */
#define DRIVER_API(X)                                                                                                 \
  X(cuInit, (unsigned))                                                                                               \
  X(cuGetErrorName, (int, const char **))                                                                             \
  X(cuGetErrorString, (int, const char **))                                                                           \
  X(cuDeviceGetAttribute, (int *, int, int))                                                                          \
  X(cuDevicePrimaryCtxRetain, (void **, int))                                                                         \
  X(cuCtxPushCurrent_v2, (void *))                                                                                    \
  X(cuCtxPopCurrent_v2, (void **))                                                                                    \
  X(cuLibraryLoadData, (void **, const void *, void *, void *, unsigned, void *, void *, unsigned))                    \
  X(cuLibraryGetKernel, (void **, void *, const char *))                                                              \
  X(cuKernelSetAttribute, (int, int, void *, int))                                                                    \
  X(cuTensorMapEncodeTiled, (TensorMap *, int, uint32_t, void *, const uint64_t *, const uint64_t *,                  \
                             const uint32_t *, const uint32_t *, int, int, int, int))                                 \
  X(cuLaunchKernel, (void *, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void *, void **,   \
                     void **))

#define DECLARE(symbol, parameters) int(*symbol) parameters;
static struct { DRIVER_API(DECLARE) } driver;
static char driver_problem[MESSAGE_SIZE];
static pthread_once_t driver_once = PTHREAD_ONCE_INIT;

typedef struct {
  const char *name;       /* as in the manifest */
  const char *symbol;     /* in the cubin */
  const char *image;      /* the cubin */
  const char *target;     /* "sm90" */
  const int *capabilities; /* devices that can run it, 10 * major + minor; ends with 0 */
  int shared_bytes;       /* dynamic shared memory */
} Kernel;

static struct {
  pthread_mutex_t lock;
  void *library;
  struct { atomic_int ready; void *context, *function; } device[MAX_DEVICES];
} state = {.lock = PTHREAD_MUTEX_INITIALIZER};

/* Raises a Python exception of `kind`, its message prefixed by the kernel's name. Always returns -1. */
__attribute__((format(printf, 3, 4))) static int fail(const Kernel *kernel, const char *kind, const char *format, ...) {
  char message[MESSAGE_SIZE];
  int used = snprintf(message, sizeof message, "%s: ", kernel->name);
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(message + used, sizeof message - used, format, arguments);
  va_end(arguments);
  TVMFFIErrorSetRaisedFromCStr(kind, message);
  return -1;
}

static int driver_failed(const Kernel *kernel, const char *call, int code) {
  const char *name = "unknown error", *text = "no description";
  driver.cuGetErrorName(code, &name);
  driver.cuGetErrorString(code, &text);
  return fail(kernel, "RuntimeError", "%s failed with %s (%s)", call, name, text);
}

#define DRIVER(kernel, call, ...)                                       \
  do {                                                                  \
    int code_ = driver.call(__VA_ARGS__);                               \
    if (code_) return driver_failed(kernel, #call, code_);              \
  } while (0)

static void open_driver(void) {
  void *handle = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (!handle) {
    snprintf(driver_problem, sizeof driver_problem, "cannot open libcuda.so.1: is an NVIDIA driver installed? (%s)", dlerror());
    return;
  }
#define RESOLVE(symbol, parameters)                                                                                \
  if (!(*(void **)&driver.symbol = dlsym(handle, #symbol))) {                                                      \
    snprintf(driver_problem, sizeof driver_problem, "the NVIDIA driver has no " #symbol ": update it to one of CUDA 12.0 or later"); \
    return;                                                                                                        \
  }
  DRIVER_API(RESOLVE)
  int code = driver.cuInit(0);
  if (code) snprintf(driver_problem, sizeof driver_problem, "cuInit failed with error %d", code);
}

/* -- arguments ---------------------------------------------------------------------------------------------------- */

static int check_count(const Kernel *kernel, int given, int expected) {
  return given == expected ? 0 : fail(kernel, "TypeError", "takes %d arguments, got %d", expected, given);
}

static const char *dtype_name(DLDataType dtype) {
  static const struct { uint8_t code, bits; const char *name; } names[] = {
      {kDLBfloat, 16, "bfloat16"}, {kDLFloat, 16, "float16"}, {kDLFloat, 32, "float32"}, {kDLFloat, 64, "float64"},
      {kDLInt, 32, "int32"},       {kDLInt, 64, "int64"}};
  for (size_t i = 0; i < sizeof names / sizeof *names; i++)
    if (names[i].code == dtype.code && names[i].bits == dtype.bits && dtype.lanes == 1) return names[i].name;
  return "another dtype";
}

/* The tensor at `index`: on a CUDA device, of this dtype and rank, contiguous, 16-byte aligned. */
static int get_tensor(const Kernel *kernel, const TVMFFIAny *arguments, int index, const char *name, const char *dtype,
                      int ndim, const char *shape, const DLTensor **out) {
  const TVMFFIAny *any = &arguments[index];
  const DLTensor *t;
  if (any->type_index == kTVMFFITensor) t = (const DLTensor *)((const char *)any->v_obj + sizeof(TVMFFIObject));
  else if (any->type_index == kTVMFFIDLTensorPtr) t = (const DLTensor *)any->v_ptr;
  else return fail(kernel, "TypeError", "argument %s (number %d) must be a tensor", name, index);
  if (t->device.device_type != kDLCUDA)
    return fail(kernel, "ValueError", "%s is not on a CUDA device (DLPack device type %d): call %s.cuda()", name,
                (int)t->device.device_type, name);
  if (t->device.device_id < 0 || t->device.device_id >= MAX_DEVICES)
    return fail(kernel, "ValueError", "%s is on cuda:%d, expected cuda:0 to cuda:%d", name, t->device.device_id, MAX_DEVICES - 1);
  if (strcmp(dtype_name(t->dtype), dtype))
    return fail(kernel, "ValueError", "%s is %s, expected %s", name, dtype_name(t->dtype), dtype);
  if (t->ndim != ndim) return fail(kernel, "ValueError", "%s has %d dimensions, expected %s", name, t->ndim, shape);
  int64_t elements = 1;
  for (int i = 0; i < ndim; i++) elements *= t->shape[i];
  int64_t stride = 1;
  for (int i = ndim - 1; i >= 0 && t->strides && elements; stride *= t->shape[i--])
    if (t->shape[i] != 1 && t->strides[i] != stride)
      return fail(kernel, "ValueError", "%s is not contiguous (stride %" PRId64 " in dimension %d, expected %" PRId64
                  "): call %s.contiguous()", name, t->strides[i], i, stride, name);
  if (elements && ((uintptr_t)t->data + t->byte_offset) % ALIGNMENT)
    return fail(kernel, "ValueError", "%s starts at an address that is not a multiple of %d bytes: pass %s.clone()", name,
                ALIGNMENT, name);
  *out = t;
  return 0;
}

/* The integer at `index`, which the kernel takes by value. */
__attribute__((unused)) static int get_int32(const Kernel *kernel, const TVMFFIAny *arguments, int index, const char *name, int32_t *out) {
  const TVMFFIAny *any = &arguments[index];
  if (any->type_index != kTVMFFIInt) return fail(kernel, "TypeError", "argument %s (number %d) must be an int", name, index);
  if (any->v_int64 < INT32_MIN || any->v_int64 > INT32_MAX)
    return fail(kernel, "ValueError", "%s = %" PRId64 " is out of range: expected %d to %d", name, any->v_int64, INT32_MIN, INT32_MAX);
  *out = (int32_t)any->v_int64;
  return 0;
}

static void *address(const DLTensor *t) { return (char *)t->data + t->byte_offset; }

static int check_device(const Kernel *kernel, const char *name, const DLTensor *t, const char *first_name, const DLTensor *first) {
  if (t->device.device_id == first->device.device_id) return 0;
  return fail(kernel, "ValueError", "%s is on cuda:%d and %s on cuda:%d: expected one device", first_name,
              first->device.device_id, name, t->device.device_id);
}

static int print_sizes(char *to, size_t size, const int64_t *sizes, int n) {
  int used = 0;
  for (int i = 0; i < n && used < (int)size; i++) used += snprintf(to + used, size - used, "%s%" PRId64, i ? ", " : "", sizes[i]);
  return used;
}

static int check_shape(const Kernel *kernel, const char *name, const DLTensor *t, const int64_t *expected, const char *formula) {
  int same = 1;
  for (int i = 0; i < t->ndim; i++) same &= t->shape[i] == expected[i];
  if (same) return 0;
  char given[256], wanted[256];
  print_sizes(given, sizeof given, t->shape, t->ndim);
  print_sizes(wanted, sizeof wanted, expected, t->ndim);
  return fail(kernel, "ValueError", "%s has shape [%s], expected %s = [%s]", name, given, formula, wanted);
}

static int check_dimension(const Kernel *kernel, const char *name, int64_t value) {
  if (value >= 0 && value <= INT32_MAX) return 0;
  return fail(kernel, "ValueError", "%s = %" PRId64 " is out of range: expected 0 to %d", name, value, INT32_MAX);
}

/* -- device ------------------------------------------------------------------------------------------------------- */

static int check_capability(const Kernel *kernel, int device) {
  int major, minor;
  DRIVER(kernel, cuDeviceGetAttribute, &major, CAPABILITY_MAJOR, device);
  DRIVER(kernel, cuDeviceGetAttribute, &minor, CAPABILITY_MINOR, device);
  for (const int *c = kernel->capabilities; *c; c++)
    if (*c == 10 * major + minor) return 0;
  return fail(kernel, "RuntimeError", "built for %s, but cuda:%d has compute capability %d.%d: build for that GPU with `kdagen build --arch`",
              kernel->target, device, major, minor);
}

static int prepare_locked(const Kernel *kernel, int device) {
  if (state.device[device].ready) return 0;
  void *context, *function;
  TRY(check_capability(kernel, device));
  if (!state.library) DRIVER(kernel, cuLibraryLoadData, &state.library, kernel->image, 0, 0, 0, 0, 0, 0);
  DRIVER(kernel, cuLibraryGetKernel, &function, state.library, kernel->symbol);
  if (kernel->shared_bytes > STATIC_SHARED_LIMIT)
    DRIVER(kernel, cuKernelSetAttribute, MAX_DYNAMIC_SHARED_SIZE, kernel->shared_bytes, function, device);
  DRIVER(kernel, cuDevicePrimaryCtxRetain, &context, device);
  state.device[device].context = context;
  state.device[device].function = function;
  atomic_store_explicit(&state.device[device].ready, 1, memory_order_release);
  return 0;
}

/* Opens the driver, loads the cubin and sets up the device, each once. */
static int prepare_device(const Kernel *kernel, int device) {
  if (atomic_load_explicit(&state.device[device].ready, memory_order_acquire)) return 0;
  pthread_once(&driver_once, open_driver);
  if (*driver_problem) return fail(kernel, "RuntimeError", "%s", driver_problem);
  pthread_mutex_lock(&state.lock);
  int status = prepare_locked(kernel, device);
  pthread_mutex_unlock(&state.lock);
  return status;
}

__attribute__((unused)) static int encode(const Kernel *kernel, TensorMap *map, const char *name, const DLTensor *t, int dtype, uint32_t rank,
                  const uint64_t *extents, const uint64_t *strides, const uint32_t *box, const uint32_t *element_strides,
                  const int *modes) {
  for (uint32_t i = 0; i < rank; i++)
    if (!extents[i]) { /* nothing that a kernel could copy, and the driver refuses it */
      memset(map, 0, sizeof *map);
      return 0;
    }
  for (uint32_t i = 1; i < rank; i++)
    if (strides[i] % ALIGNMENT)
      return fail(kernel, "ValueError", "%s has a stride of %" PRIu64 " bytes, which TMA cannot read: expected a multiple of %d", name,
                  strides[i], ALIGNMENT);
  /* the driver takes no stride for the innermost dimension */
  DRIVER(kernel, cuTensorMapEncodeTiled, map, dtype, rank, address(t), extents, strides + 1, box, element_strides, modes[0],
         modes[1], modes[2], modes[3]);
  return 0;
}

static int check_grid(const Kernel *kernel, const int64_t *grid) {
  static const int64_t limit[3] = {INT32_MAX, 65535, 65535};
  for (int i = 0; i < 3; i++)
    if (grid[i] > limit[i])
      return fail(kernel, "ValueError", "needs %" PRId64 " blocks in grid dimension %c, the GPU allows %" PRId64 ": pass fewer sequences or heads a call",
                  grid[i], 'x' + i, limit[i]);
  return 0;
}

static int launch(const Kernel *kernel, int device, const int64_t *grid, const int64_t *block, void **arguments) {
  void *stream = TVMFFIEnvGetStream(kDLCUDA, device), *previous;
  DRIVER(kernel, cuCtxPushCurrent_v2, state.device[device].context);
  int code = driver.cuLaunchKernel(state.device[device].function, grid[0], grid[1], grid[2], block[0], block[1], block[2],
                                   kernel->shared_bytes, stream, arguments, 0);
  driver.cuCtxPopCurrent_v2(&previous);
  return code ? driver_failed(kernel, "cuLaunchKernel", code) : 0;
}
