// As much of CUDA and of TileLang's device library as decode kernels use, on threads of the CPU: one a CUDA thread.
#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>
using std::max, std::min;

typedef unsigned char uchar;
struct Index { int x, y, z; };
static thread_local Index threadIdx, blockIdx;
static std::barrier<>* block_barrier;
static float (*exchanged)[64];  // what each thread shows the others
static uchar* shared_memory;

#define __global__
#define __launch_bounds__(...)
#define __syncthreads() block_barrier->arrive_and_wait()

struct bfloat16_t {
    uint16_t bits;
    bfloat16_t() = default;
    bfloat16_t(float x) {
        uint32_t u;
        memcpy(&u, &x, 4);
        bits = x != x ? 0x7fc0 : (u + 0x7fff + (u >> 16 & 1)) >> 16;
    }
    operator float() const {
        uint32_t u = uint32_t(bits) << 16;
        float x;
        memcpy(&x, &u, 4);
        return x;
    }
};
struct __nv_bfloat162 { bfloat16_t x, y; };
struct uint1 { unsigned x; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
#define MAKE(T, U) template <class... A> T make_##T(A... a) { return {U(a)...}; }
MAKE(uint1, unsigned) MAKE(uint2, unsigned) MAKE(uint4, unsigned) MAKE(float2, float) MAKE(float4, float)
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {v.x, v.y}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 v) { return {v.x, v.y}; }
inline unsigned __pack_nv_bfloat162(bfloat16_t a, bfloat16_t b) { return a.bits | unsigned(b.bits) << 16; }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }

namespace tl {
struct SumOp {};
template <int> struct NamedBarrier {};
template <class, int threads, int scale, int, class = void, int batch = 1, int = 0> struct AllReduce {
    static void run_batch(float* x, float* = nullptr) {
        std::copy(x, x + batch, exchanged[threadIdx.x]);
        __syncthreads();
        for (int i = 0; i < batch; i++) {
            x[i] = 0;
            for (int other = 0; other < threads; other += scale) x[i] += exchanged[threadIdx.x ^ other][i];
        }
        __syncthreads();
    }
    static float run(float x, float* = nullptr) { run_batch(&x); return x; }
};
}  // namespace tl

template <class Kernel> void on_grid(int width, int height, int threads, int shared_bytes, Kernel kernel) {
    std::vector<float> shown(threads * 64);
    exchanged = reinterpret_cast<float(*)[64]>(shown.data());
    for (int block = 0; block < width * height; block++) {
        std::vector<float4> memory(shared_bytes / 16 + 1, float4{NAN, NAN, NAN, NAN});
        shared_memory = reinterpret_cast<uchar*>(memory.data());
        std::barrier<> all(threads);
        block_barrier = &all;
        std::vector<std::jthread> running;
        for (int t = 0; t < threads; t++)
            running.emplace_back([=] {
                threadIdx = {t, 0, 0}, blockIdx = {block % width, block / width, 0};
                kernel();
            });
    }
}
