/* A CUDA driver with no GPU behind it: libcuda.so.1 for tests. It writes one line a call to a log that the test reads,
 * checks what the real driver would refuse, and fails on demand. Two devices. */
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { DEVICES = 2, CAPACITY = 1 << 18, OUT_OF_MEMORY = 2, INVALID_VALUE = 1 };
static char text[CAPACITY], failing[64];
static int used, failure, major = 9, minor = 0, first_scalar, scalars;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static __thread intptr_t contexts[16];
static __thread int depth;

const char *mock_log(void) { return text; }
void mock_reset(void) { used = 0, *text = 0, *failing = 0, failure = 0, scalars = 0; }
void mock_fail(const char *call, int code) { snprintf(failing, sizeof failing, "%s", call), failure = code; }
void mock_capability(int a, int b) { major = a, minor = b; }
void mock_scalars(int first, int count) { first_scalar = first, scalars = count; } /* 32-bit parameters to log at a launch */

#define LOG(...)                                                                                              \
  do {                                                                                                        \
    pthread_mutex_lock(&lock);                                                                                \
    used += snprintf(text + used, CAPACITY - used, __VA_ARGS__), text[used++] = '\n', text[used] = 0;         \
    pthread_mutex_unlock(&lock);                                                                              \
  } while (0)
#define ENTER() do { if (!strcmp(__func__, failing)) return failure; } while (0)

int cuInit(unsigned flags) { ENTER(); LOG("cuInit"); return 0; }
int cuGetErrorName(int code, const char **name) {
  *name = code == OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : code == INVALID_VALUE ? "CUDA_ERROR_INVALID_VALUE" : "CUDA_ERROR_MOCK";
  return 0;
}
int cuGetErrorString(int code, const char **description) { *description = code == OUT_OF_MEMORY ? "out of memory" : "as the test asked"; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  ENTER();
  *value = attribute == 75 ? major : attribute == 76 ? minor : -1;
  return device < DEVICES ? 0 : INVALID_VALUE;
}
int cuDevicePrimaryCtxRetain(void **context, int device) {
  ENTER(); LOG("cuDevicePrimaryCtxRetain device=%d", device);
  *context = (void *)(intptr_t)(device + 1);
  return 0;
}
int cuCtxPushCurrent_v2(void *context) { ENTER(); contexts[depth++] = (intptr_t)context; return 0; }
int cuCtxPopCurrent_v2(void **context) { *context = (void *)contexts[--depth]; return 0; }
int cuLibraryLoadData(void **library, const void *image, void *a, void *b, unsigned c, void *d, void *e, unsigned f) {
  ENTER();
  usleep(20000); /* leaves time for a second thread to arrive */
  LOG("cuLibraryLoadData image=%.8s aligned=%d", (const char *)image, (uintptr_t)image % 64 == 0);
  *library = (void *)1;
  return 0;
}
int cuLibraryGetKernel(void **kernel, void *library, const char *name) {
  ENTER(); LOG("cuLibraryGetKernel %s", name);
  *kernel = strdup(name);
  return library ? 0 : INVALID_VALUE;
}
int cuKernelSetAttribute(int attribute, int value, void *kernel, int device) {
  ENTER(); LOG("cuKernelSetAttribute %s attribute=%d value=%d device=%d", (char *)kernel, attribute, value, device);
  return 0;
}

static int list(char *to, const char *name, const uint64_t *wide, const uint32_t *narrow, int n) {
  int length = sprintf(to, " %s=", name);
  for (int i = 0; i < n; i++) length += sprintf(to + length, "%s%llu", i ? "," : "", wide ? (unsigned long long)wide[i] : narrow[i]);
  return length;
}

int cuTensorMapEncodeTiled(void *map, int dtype, uint32_t rank, void *address, const uint64_t *extents, const uint64_t *strides,
                           const uint32_t *box, const uint32_t *element_strides, int interleave, int swizzle, int promotion, int fill) {
  ENTER();
  if ((uintptr_t)map % 64 || (uintptr_t)address % 16 || rank < 1 || rank > 5) return INVALID_VALUE;
  for (uint32_t i = 0; i + 1 < rank; i++) if (strides[i] % 16) return INVALID_VALUE;
  for (uint32_t i = 0; i < rank; i++) if (!extents[i] || box[i] > 256 || !box[i] || !element_strides[i]) return INVALID_VALUE;
  char line[512];
  int n = list(line, "extents", extents, 0, rank);
  n += list(line + n, "strides", strides, 0, rank - 1);
  list(line + n, "box", 0, box, rank);
  LOG("cuTensorMapEncodeTiled dtype=%d address=%p%s modes=%d,%d,%d,%d", dtype, address, line, interleave, swizzle, promotion, fill);
  memset(map, 0xab, 128);
  return 0;
}
int cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared,
                   void *stream, void **arguments, void **extra) {
  ENTER();
  if (!depth) return 201; /* CUDA_ERROR_INVALID_CONTEXT */
  if (!gx || !gy || !gz || bx * by * bz > 1024) return INVALID_VALUE;
  char line[256] = "";
  uint32_t values[8];
  for (int i = 0; i < scalars; i++) values[i] = *(uint32_t *)arguments[first_scalar + i];
  if (scalars) list(line, "scalars", 0, values, scalars);
  LOG("cuLaunchKernel %s grid=%u,%u,%u block=%u,%u,%u shared=%u stream=%p context=%d%s", (char *)function, gx, gy, gz, bx, by, bz, shared,
      stream, (int)contexts[depth - 1], line);
  return 0;
}
