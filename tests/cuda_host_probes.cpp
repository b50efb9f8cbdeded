// Small kernels that show what the emulator in csrc/emulator does, and what it refuses to do.
// `probes NAME` runs one and prints "ok", or the error of the launch; test_cuda_host.py runs all.
#include "cuda_host_probes.h"

#include <cstdio>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <vector>

#include "kvcomp/device.cuh"
#include "kvcomp/matrix.cuh"

namespace {

using kvcomp::kFullMask;

// --- what must work ------------------------------------------------------------------------------

__global__ void record_kernel(int* ranks) {
  const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  ranks[block * (blockDim.x * blockDim.y * blockDim.z) + thread] += block * 1000 + thread;
}

void indices() {
  std::vector<int> ranks(2 * 3 * 4 * 5 * 3 * 2);
  launch(record_kernel, dim3(2, 3, 4), dim3(5, 3, 2), 0, ranks.data());
  for (int i = 0; i < static_cast<int>(ranks.size()); ++i)
    EXPECT(ranks[i] == i / 30 * 1000 + i % 30);
}

__global__ void __launch_bounds__(256) softmax_kernel(const float* in, float* out) {
  __shared__ float partial[8];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const float x = __expf(in[blockIdx.x * blockDim.x + threadIdx.x]);
  const float warp_sum = kvcomp::group_sum(x, 32);
  if (lane == 0) partial[warp] = warp_sum;
  __syncthreads();
  float sum = 0;
  for (int i = 0; i < 8; ++i) sum += partial[i];
  out[blockIdx.x * blockDim.x + threadIdx.x] = x / sum;
}

void softmax() {
  std::vector<float> in(512), out(512);
  for (int i = 0; i < 512; ++i) in[i] = static_cast<float>(i * 37 % 101) / 50;
  launch(softmax_kernel, 2, 256, 0, in.data(), out.data());
  for (int block = 0; block < 2; ++block) {
    double sum = 0;
    for (int i = 0; i < 256; ++i) sum += exp(double{in[block * 256 + i]});
    for (int i = block * 256; i < block * 256 + 256; ++i) {
      EXPECT(fabs(out[i] - exp(double{in[i]}) / sum) < 1e-8);
    }
  }
}

// Values that count up in dynamic shared memory are reversed in it, block after block.
__global__ void reverse_kernel(int* values) {
  int* shared = kvcomp::dynamic_shared<int>();
  const int i = threadIdx.x, n = blockDim.x;
  shared[i] = values[blockIdx.x * n + i];
  __syncthreads();
  values[blockIdx.x * n + i] = shared[n - 1 - i];
}

void dynamic_shared() {
  std::vector<int> values(3 * 1024);
  for (int i = 0; i < 3 * 1024; ++i) values[i] = i;
  launch(reverse_kernel, 3, 1024, 4096, values.data());
  for (int i = 0; i < 3 * 1024; ++i) EXPECT(values[i] == i / 1024 * 1024 + 1023 - i % 1024);
}

__global__ void shuffle_kernel(int* out, double* wide) {
  const int lane = threadIdx.x;
  out[lane] = __shfl_sync(kFullMask, lane, 3);
  out[32 + lane] = __shfl_sync(kFullMask, lane, 9, 8);
  out[64 + lane] = __shfl_xor_sync(kFullMask, lane, 5);
  out[96 + lane] = __shfl_down_sync(kFullMask, lane, 4);
  out[128 + lane] = __shfl_up_sync(kFullMask, lane, 4, 16);
  wide[lane] = __shfl_xor_sync(kFullMask, lane + 0.5, 1);
  const unsigned half = lane < 16 ? 0xffffu : 0xffff0000u;
  if (lane < 16) {  // the halves of the warp go separate ways and exchange among themselves
    out[160 + lane] = __reduce_add_sync(half, lane);
    out[192 + lane] = __shfl_xor_sync(half, lane, 1);
  } else {
    out[160 + lane] = __reduce_max_sync(half, lane);
    out[192 + lane] = __reduce_min_sync(half, lane);
  }
  __syncwarp();
}

void shuffles() {
  std::vector<int> out(224);
  std::vector<double> wide(32);
  launch(shuffle_kernel, 1, 32, 0, out.data(), wide.data());
  for (int lane = 0; lane < 32; ++lane) {
    EXPECT(out[lane] == 3);
    EXPECT(out[32 + lane] == lane / 8 * 8 + 1);
    EXPECT(out[64 + lane] == (lane ^ 5));
    EXPECT(out[96 + lane] == (lane + 4 < 32 ? lane + 4 : lane));
    EXPECT(out[128 + lane] == (lane % 16 >= 4 ? lane - 4 : lane));
    EXPECT(wide[lane] == (lane ^ 1) + 0.5);
    EXPECT(out[160 + lane] == (lane < 16 ? 120 : 31));
    EXPECT(out[192 + lane] == (lane < 16 ? (lane ^ 1) : 16));
  }
}

__global__ void vote_kernel(unsigned* out) {
  const int thread = threadIdx.x, lane = thread % 32;
  if (thread >= 80) return;  // the last warp is half gone; barriers count the living
  const unsigned here = thread < 64 ? kFullMask : 0xffffu;
  const unsigned results[7] = {
      unsigned(__syncthreads_count(thread % 3 == 0)),
      __activemask(),
      unsigned(__syncthreads_or(thread == 70)),
      unsigned(__syncthreads_and(thread < 80)),
      unsigned(__syncthreads_and(thread < 79)),
      __ballot_sync(here, lane % 2),
      unsigned(__any_sync(here, lane == 31) + 2 * __all_sync(here, lane < 31)),
  };
  for (int i = 0; i < 7; ++i) out[i * 80 + thread] = results[i];
}

void votes() {
  std::vector<unsigned> out(7 * 80);
  launch(vote_kernel, 1, 96, 0, out.data());
  for (int thread = 0; thread < 80; ++thread) {
    const bool whole = thread < 64;  // its warp
    const unsigned want[7] = {
        27, whole ? kFullMask : 0xffffu, 1, 1, 0, whole ? 0xaaaaaaaau : 0xaaaau, whole ? 1u : 2u};
    for (int i = 0; i < 7; ++i) EXPECT(out[i * 80 + thread] == want[i]);
  }
}

// A histogram in shared memory, and the last block to finish sums what all blocks wrote.
__global__ void atomics_kernel(int* totals, unsigned* blocks_done, long long* extremes, int* sum) {
  __shared__ int histogram[10];
  __shared__ bool last;
  if (threadIdx.x < 10) histogram[threadIdx.x] = 0;
  __syncthreads();
  const int value = blockIdx.x * blockDim.x + threadIdx.x;
  atomicAdd(&histogram[value % 10], 1);
  atomicMax(&extremes[0], value);
  atomicMin(&extremes[1], value);
  __syncthreads();
  if (threadIdx.x < 10) atomicAdd(&totals[threadIdx.x], histogram[threadIdx.x]);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(blocks_done, 1) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  if (last && threadIdx.x == 0) {
    for (int i = 0; i < 10; ++i) *sum += totals[i];
  }
}

void atomics() {
  std::vector<int> totals(10);
  std::vector<long long> extremes = {-1, 1 << 20};
  unsigned blocks_done = 0;
  int sum = 0;
  launch(atomics_kernel, 7, 64, 0, totals.data(), &blocks_done, extremes.data(), &sum);
  EXPECT(sum == 448 && totals[3] == 45 && totals[8] == 44);
  EXPECT(extremes[0] == 447 && extremes[1] == 0);
  int word = 5;
  EXPECT(atomicCAS(&word, 4, 9) == 5 && atomicCAS(&word, 5, 9) == 5 && word == 9);
  EXPECT(atomicExch(&word, 1) == 9 && atomicOr(&word, 6) == 1 && atomicAnd(&word, 3) == 7);
  EXPECT(word == 3);
}

__global__ void warp_memory_kernel(int* out) {
  __shared__ int shared[64];
  shared[threadIdx.x] = threadIdx.x;
  __syncwarp();  // enough between the lanes of one warp
  out[blockIdx.x * 64 + threadIdx.x] = shared[threadIdx.x ^ 1];
}

void warp_memory() {
  std::vector<int> out(2 * 64);
  launch(warp_memory_kernel, 2, 64, 0, out.data());
  for (int i = 0; i < 2 * 64; ++i) EXPECT(out[i] == (i % 64 ^ 1));
}

void intrinsics() {
  EXPECT(__popc(0xf0u) == 4 && __clz(1u) == 31 && __clz(0) == 32 && __ffs(8) == 4 && __ffs(0) == 0);
  EXPECT(__brev(1u) == 0x80000000u && min(3, 4) == 3 && max(-1.0f, 2.0f) == 2.0f);
  EXPECT(__float_as_uint(1.0f) == 0x3f800000u && rsqrtf(4.0f) == 0.5f);
  for (unsigned bits = 0; bits < 0x10000; ++bits) {  // every 16-bit value survives the round trip
    const auto word = static_cast<std::uint16_t>(bits);
    const float half = __half2float({word}), bfloat = __bfloat162float({word});
    if (half == half) EXPECT(__float2half_rn(half).bits == word);
    if (bfloat == bfloat) EXPECT(__float2bfloat16_rn(bfloat).bits == word);
  }
  EXPECT(__float2half_rn(1.0f + 0x1p-11f).bits == 0x3c00);  // a tie goes to even
  EXPECT(__float2half_rn(1.0f + 3 * 0x1p-11f).bits == 0x3c02);
  EXPECT(__float2half_rn(65519.9f).bits == 0x7bff && __float2half_rn(-1e6f).bits == 0xfc00);
  EXPECT(__float2half_rn(0x1.8p-25f).bits == 1 && __float2half_rn(0x1p-25f).bits == 0);
  EXPECT(__float2bfloat16_rn(1.0f + 0x1p-8f).bits == 0x3f80);
  EXPECT(__half2float(__float2half_rn(NAN)) != 0 && __half2float({0x3555}) == 0.333251953125f);
}

// C [16, 8] = A [16, 16] B [16, 8] from shared memory: A by rows, B by rows and so transposed.
template <typename T>
__global__ void matrices_kernel(const uint16_t* a, const uint16_t* b, float* c, uint16_t* turned) {
  alignas(16) __shared__ uint16_t shared_a[16 * 24], shared_b[32 * 8];
  const int lane = threadIdx.x, row = lane % 16, half = lane / 16 * 8;
  kvcomp::copy_async(shared_a + row * 24 + half, a + row * 16 + half, true);
  kvcomp::end_copy_group();
  kvcomp::copy_async(shared_b + lane * 8, b + row * 8, lane < 16);  // the lower half becomes 0
  kvcomp::end_copy_group();
  unsigned fragment_a[4], fragment_b[4];
  kvcomp::wait_for_copies<1>();
  __syncwarp();
  kvcomp::load_matrices(fragment_a, shared_a + row * 24 + half);
  kvcomp::wait_for_copies<0>();
  __syncwarp();
  kvcomp::load_matrices_transposed(fragment_b, shared_b + lane * 8);
  const unsigned upper_and_lower[2] = {fragment_b[0], fragment_b[1]};
  float sums[4] = {};
  kvcomp::multiply_add(sums, fragment_a, upper_and_lower, T{});
  for (int i = 0; i < 4; ++i) {
    c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] =
        sums[i] + static_cast<float>(fragment_b[2] | fragment_b[3]);
  }
  const unsigned back = kvcomp::transpose_matrix(fragment_b[0]);
  std::memcpy(turned + lane / 4 * 8 + lane % 4 * 2, &back, sizeof back);
}

template <typename T>
void matrices_of(uint16_t (*bits)(float)) {
  alignas(16) uint16_t a[16 * 16], b[16 * 8], turned[64];
  float x[16 * 16], y[16 * 8], c[16 * 8];
  for (int i = 0; i < 256; ++i) a[i] = bits(x[i] = static_cast<float>(i * 29 % 61 - 30));
  for (int i = 0; i < 128; ++i) b[i] = bits(y[i] = static_cast<float>(i * 17 % 47 - 23));
  launch(matrices_kernel<T>, 1, 32, 0, a, b, c, turned);
  for (int i = 0; i < 128; ++i) {
    float sum = 0;
    for (int k = 0; k < 16; ++k) sum += x[i / 8 * 16 + k] * y[k * 8 + i % 8];
    EXPECT(c[i] == sum);
  }
  EXPECT(std::memcmp(turned, b, sizeof turned) == 0);
}

void matrices() {
  matrices_of<__half>([](float x) { return __float2half_rn(x).bits; });
  matrices_of<__nv_bfloat16>([](float x) { return __float2bfloat16_rn(x).bits; });
}

// --- what must be refused ------------------------------------------------------------------------

// A copy that nobody has waited for.
__global__ void early_read_kernel(const float* in, float* out) {
  alignas(16) __shared__ float shared[4];
  for (int i = 0; i < 4; ++i) shared[i] = 0;
  kvcomp::copy_async(shared, in, true);
  kvcomp::end_copy_group();
  kvcomp::wait_for_copies<1>();
  out[0] = shared[0];
}

__global__ void crooked_copy_kernel(const float* in) {
  alignas(16) __shared__ float shared[8];
  kvcomp::copy_async(shared + 1, in, true);
}

__global__ void divergent_barrier_kernel() {
  if (threadIdx.x < 40) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void early_warp_kernel(int* out) {
  if (threadIdx.x % 2) out[threadIdx.x] = __shfl_xor_sync(kFullMask, threadIdx.x, 2);
  __syncthreads();
}

__global__ void returned_lane_kernel(unsigned* out) {
  if (threadIdx.x == 5) return;
  out[threadIdx.x] = __ballot_sync(kFullMask, 1);
}

__global__ void foreign_mask_kernel() { __syncwarp(0x7fffffffu); }

__global__ void foreign_lane_kernel(int* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_sync(0xffffu, threadIdx.x, 20);
}

__global__ void unwritten_kernel(float* out, int written) {
  __shared__ float shared[64];
  if (static_cast<int>(threadIdx.x) < written) shared[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = fmaxf(0.0f, shared[threadIdx.x]);
}

__global__ void race_kernel(float* out) {
  __shared__ float shared[64];
  shared[threadIdx.x] = threadIdx.x;
  __syncthreads();
  const float next = shared[(threadIdx.x + 1) % 64];
  shared[threadIdx.x] = next;  // a neighbour may not have read it yet
  __syncthreads();
  out[threadIdx.x] = shared[threadIdx.x];
}

__global__ void warp_race_kernel(float* out) {
  __shared__ float shared[32];
  shared[threadIdx.x] = threadIdx.x;
  out[threadIdx.x] = __shfl_sync(kFullMask, shared[threadIdx.x], 0);  // orders no memory
  out[threadIdx.x] += shared[threadIdx.x ^ 1];
}

__global__ void past_dynamic_kernel(int offset) { kvcomp::dynamic_shared<int>()[offset] = 1; }

__global__ void past_static_kernel(float* out, int offset) {
  __shared__ float shared[16];
  float* volatile pointer = shared;  // what the compiler cannot see through
  pointer[offset] = 1;
  out[0] = pointer[offset];
}

__global__ void past_global_kernel(float* out, int offset) { out[offset] = 1; }

__global__ void throwing_kernel() {
  if (threadIdx.x == 3) throw std::domain_error("thrown by a kernel");
  __syncthreads();
}

std::vector<float> floats(64);
alignas(16) float aligned[4] = {1, 1, 1, 1};

const Probes execution_probes = {
    {"indices", indices},
    {"softmax", softmax},
    {"dynamic_shared", dynamic_shared},
    {"shuffles", shuffles},
    {"votes", votes},
    {"atomics", atomics},
    {"warp_memory", warp_memory},
    {"intrinsics", intrinsics},
    {"matrices", matrices},
    {"early_read", [] { launch(early_read_kernel, 1, 1, 0, aligned, floats.data()); }},
    {"crooked_copy", [] { launch(crooked_copy_kernel, 1, 1, 0, aligned); }},
    {"divergent_barrier", [] { launch(divergent_barrier_kernel, 1, 64, 0); }},
    {"early_warp", [] { launch(early_warp_kernel, 1, 64, 0, std::vector<int>(64).data()); }},
    {"returned_lane",
     [] { launch(returned_lane_kernel, 1, 32, 0, std::vector<unsigned>(32).data()); }},
    {"foreign_mask", [] { launch(foreign_mask_kernel, 1, 32, 0); }},
    {"foreign_lane", [] { launch(foreign_lane_kernel, 1, 32, 0, std::vector<int>(32).data()); }},
    {"unwritten", [] { launch(unwritten_kernel, 1, 64, 0, floats.data(), 63); }},
    {"unwritten_in_second_block",
     [] {
       launch(unwritten_kernel, 1, 64, 0, floats.data(), 64);
       launch(unwritten_kernel, 1, 64, 0, floats.data(), 10);
     }},
    {"race", [] { launch(race_kernel, 1, 64, 0, floats.data()); }},
    {"warp_race", [] { launch(warp_race_kernel, 1, 32, 0, floats.data()); }},
    {"past_dynamic", [] { launch(past_dynamic_kernel, 1, 1, 64, 16); }},
    {"past_static", [] { launch(past_static_kernel, 1, 1, 0, floats.data(), 16); }},
    {"past_global", [] { launch(past_global_kernel, 1, 1, 0, std::vector<float>(8).data(), 8); }},
    {"throwing", [] { launch(throwing_kernel, 1, 32, 0); }},
    {"too_many_threads", [] { launch(foreign_mask_kernel, 1, dim3(64, 32), 0); }},
    {"after_failure",
     [] {  // a launch that failed leaves nothing behind
       try {
         launch(divergent_barrier_kernel, 1, 1024, 0);
       } catch (const std::runtime_error&) {
         softmax();
         return;
       }
       expect(false, "the divergent barrier is refused");
     }},
};

}  // namespace

int main(int, char** argv) {
  try {
    const auto probe = execution_probes.find(argv[1]);
    (probe != execution_probes.end() ? probe->second : global_memory_probes.at(argv[1]))();
    std::puts("ok");
  } catch (const std::exception& error) {
    std::puts(error.what());
  }
}
