/* What all C here begins with: functions of floats, and sums in a fixed order. */
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
#define FMA(a, b, c) __builtin_fmaf(a, b, c)
#else
#define FMA(a, b, c) ((a) * (b) + (c))
#endif
#define LANES 16 /* sums are of so many, and vectors begin at a multiple of so many floats: native.LANES */
#define APART static __attribute__((noinline)) /* compiled once, not where it is called */
#define EACH(i, n) _Pragma("omp simd") for (int64_t i = 0; i < (n); i++)

typedef float f32;
typedef uint16_t bf16;

static inline float float_of(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
static inline uint32_t bits_of(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }

static inline float get_f32(f32 x) { return x; }
static inline f32 put_f32(float x) { return x; }
static inline float get_bf16(bf16 x) { return float_of((uint32_t)x << 16); }
static inline bf16 put_bf16(float x) {
    const uint32_t bits = bits_of(x), even = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    return (bf16)(x != x ? 0x7fc0u : even);
}

/* -- functions: polynomials of the Cephes library, branches as selections, so that loops of them are vectorised */

static inline float max_(float a, float b) { return a > b ? a : b; }
static inline float min_(float a, float b) { return a < b ? a : b; }
static inline float sign_(float x) { return x > 0.0f ? 1.0f : x < 0.0f ? -1.0f : 0.0f; }
static inline float heaviside_(float x, float at_zero) { return x > 0.0f ? 1.0f : x < 0.0f ? 0.0f : at_zero; }
static inline float inverse_or_zero_(float x) { return x == 0.0f ? 0.0f : 1.0f / x; }

/* exp(-inf) = 0 exactly, as gates that reset the state ask for; 2^n in two factors, as it may be out of range. */
static inline float exp_(float x) {
    const float c = x < -104.0f ? -104.0f : x > 89.0f ? 89.0f : x;
    const float shifted = FMA(c, 1.44269504088896341f, 12582912.0f), n = shifted - 12582912.0f;
    const float f = FMA(n, 2.12194440e-4f, FMA(n, -0.693359375f, c));
    float y = FMA(f, 1.9875691500e-4f, 1.3981999507e-3f);
    y = FMA(y, f, 8.3334519073e-3f);
    y = FMA(y, f, 4.1665795894e-2f);
    y = FMA(y, f, 1.6666665459e-1f);
    y = FMA(y, f, 5.0000001201e-1f);
    y = FMA(y, f * f, f) + 1.0f;
    const int32_t e = (int32_t)(bits_of(shifted) - 0x4b400000u), half = e >> 1;
    return y * float_of((uint32_t)(half + 127) << 23) * float_of((uint32_t)(e - half + 127) << 23);
}

static inline float log_(float x) {
    const float tiny = 1.17549435e-38f, big = x < tiny ? x * 8388608.0f : x;
    const uint32_t bits = bits_of(big) - 0x3f3504f3u;
    const float e = (float)((int32_t)bits >> 23) - (x < tiny ? 23.0f : 0.0f);
    const float f = float_of((bits & 0x007fffffu) + 0x3f3504f3u) - 1.0f, ff = f * f;
    float y = FMA(f, 7.0376836292e-2f, -1.1514610310e-1f);
    y = FMA(y, f, 1.1676998740e-1f);
    y = FMA(y, f, -1.2420140846e-1f);
    y = FMA(y, f, 1.4249322787e-1f);
    y = FMA(y, f, -1.6668057665e-1f);
    y = FMA(y, f, 2.0000714765e-1f);
    y = FMA(y, f, -2.4999993993e-1f);
    y = FMA(y, f, 3.3333331174e-1f);
    y = FMA(e, -2.12194440e-4f, y * f * ff);
    y = FMA(e, 0.693359375f, f + FMA(-0.5f, ff, y));
    return x > 0.0f ? (x < INFINITY ? y : x) : x == 0.0f ? -INFINITY : NAN;
}

/* max(x, 0) + log(1 + e), the logarithm corrected by what 1 + e lost */
static inline float softplus_(float x) {
    const float e = exp_(-fabsf(x)), u = 1.0f + e;
    return max_(x, 0.0f) + (log_(u) + (e - (u - 1.0f)) / u);
}

static float ends(float *lane) {
    for (int w = LANES / 2; w; w /= 2)
        for (int l = 0; l < w; l++) lane[l] += lane[l + w];
    return lane[0];
}

APART float total(const float *x, int64_t n) {
    float lane[LANES] = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        EACH(l, LANES) lane[l] += x[i + l];
    for (int l = 0; i < n; i++, l++) lane[l] += x[i];
    return ends(lane);
}
