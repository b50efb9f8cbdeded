// Probes of the watch over global memory: small kernels that hand values on, from thread to thread
// and from block to block, each as it must be and with one thing missing.
#include <vector>

#include "cuda_host_probes.h"
#include "kvcomp/device.cuh"
#include "kvcomp/matrix.cuh"

namespace {

using kvcomp::kFullMask;

// --- from block to block -------------------------------------------------------------------------

// What is done before and after the counting, or not.
struct Steps {
  bool barrier = true, fence = true, fence_again = true, barrier_again = true;
  bool all_fence = false;     // each thread by itself, and not the one that counts
  bool write_late = false;    // once more, behind the counting
  bool own_counters = false;  // one per block
};

// The last of the blocks to count adds up what all have written: a warp each.
__global__ void sum_kernel(int* values, unsigned* counters, int* sums, Steps steps) {
  const int lane = threadIdx.x;
  int* mine = values + blockIdx.x * 32;
  mine[lane] = lane;
  if (steps.all_fence) __threadfence();
  if (steps.barrier) __syncthreads();
  unsigned count = 0;
  if (lane == 0) {
    if (steps.fence && !steps.all_fence) __threadfence();
    count = atomicAdd(counters + (steps.own_counters ? blockIdx.x : 0), 1);
    if (steps.own_counters) count = blockIdx.x;
    if (steps.fence_again && !steps.all_fence) __threadfence();
  }
  if (steps.write_late) mine[lane] = lane;
  const bool last = __shfl_sync(kFullMask, count, 0) == gridDim.x - 1;  // orders no memory
  if (steps.barrier_again) __syncthreads();
  if (steps.all_fence) __threadfence();
  if (!last) return;
  int sum = 0;
  for (unsigned block = 0; block < gridDim.x; ++block) sum += values[block * 32 + 31 - lane];
  sums[lane] = sum;
}

template <Steps kSteps>
void sum() {
  constexpr int kBlocks = 3;
  std::vector<int> values(kBlocks * 32), sums(32);
  for (int launches = 0; launches < 3; ++launches) {  // each takes the blocks in another order
    std::vector<unsigned> counters(kBlocks);
    launch(sum_kernel, kBlocks, 32, 0, values.data(), counters.data(), sums.data(), kSteps);
    for (int lane = 0; lane < 32; ++lane) EXPECT(sums[lane] == kBlocks * (31 - lane));
  }
}

// Blocks of one thread, in the order in which the first launch takes them: block 2 has from block 1
// what block 0 wrote, if there is a fence between what block 1 does with the two counters.
__global__ void chain_kernel(int* values, unsigned* counters, int* sum, bool passes_on) {
  const unsigned block = blockIdx.x;
  values[block] = 1;
  if (!passes_on) __threadfence();
  if (block > 0) atomicAdd(&counters[block - 1], 1);
  if (passes_on || block == 2) __threadfence();
  if (block < 2) {
    atomicAdd(&counters[block], 1);
  } else {
    *sum = values[0] + values[1] + values[2];
  }
}

template <bool kPassesOn>
void chain() {
  std::vector<int> values(3), sum(1);
  std::vector<unsigned> counters(2);
  launch(chain_kernel, 3, 1, 0, values.data(), counters.data(), sum.data(), kPassesOn);
  EXPECT(sum[0] == 3);
}

// Each block works in place on what all have read. The last to say so may, if all have.
__global__ void replace_kernel(int* values, unsigned* counter, unsigned first_to_count) {
  const int lane = threadIdx.x;
  const int value = values[lane] + values[lane ^ 1];
  __syncthreads();
  unsigned before = 0;
  if (lane == 0 && blockIdx.x >= first_to_count) {
    __threadfence();
    before = first_to_count + atomicAdd(counter, 1);
    __threadfence();
  }
  before = __shfl_sync(kFullMask, before, 0);
  __syncthreads();
  if (before == gridDim.x - 1) values[lane] = value;
}

template <unsigned kFirstToCount>
void replace() {
  std::vector<int> values(32, 1);
  std::vector<unsigned> counter(1);
  launch(replace_kernel, 3, 32, 0, values.data(), counter.data(), kFirstToCount);
  for (int value : values) EXPECT(value == 2);
}

// The same value from all blocks, or one that they work out together.
__global__ void store_kernel(int* word) { *word = 7; }
__global__ void count_kernel(int* word) { atomicAdd(word, 7); }
__global__ void count_and_look_kernel(int* word, int* seen) {
  atomicAdd(word, 7);
  if (blockIdx.x == 1) *seen = *word + 1;
}
__global__ void copy_kernel(const int* from, int* to) { to[blockIdx.x] = from[blockIdx.x ^ 1]; }
__global__ void bytes_kernel(unsigned char* bytes) { bytes[blockIdx.x] = 1; }

void neighbours() {  // bytes of one word by different blocks
  std::vector<unsigned char> bytes(64);
  launch(bytes_kernel, 64, 1, 0, bytes.data());
  for (unsigned char byte : bytes) EXPECT(byte == 1);
}

void counts() {
  std::vector<int> word(1);
  launch(count_kernel, 5, 33, 0, word.data());
  EXPECT(word[0] == 5 * 33 * 7);
}

void stream() {  // what one launch wrote is there for the next
  std::vector<int> a(4, 1), b(4);
  launch(store_kernel, 1, 1, 0, a.data());
  launch(copy_kernel, 4, 1, 0, a.data(), b.data());
  launch(copy_kernel, 4, 1, 0, b.data(), a.data());
  EXPECT(a[0] == 7 && a[1] == 1 && b[1] == 7);
}

// --- in a block ----------------------------------------------------------------------------------

__global__ void rotate_kernel(int* values, int num_barriers) {
  const int thread = threadIdx.x;
  values[thread] = thread;
  if (num_barriers > 0) __syncthreads();
  const int next = values[(thread + 1) % 64];
  if (num_barriers > 1) __syncthreads();
  values[thread] = next;
}

template <int kBarriers>
void rotate() {
  std::vector<int> values(64);
  launch(rotate_kernel, 1, 64, 0, values.data(), kBarriers);
  for (int i = 0; i < 64; ++i) EXPECT(values[i] == (i + 1) % 64);
}

__global__ void swap_kernel(int* values, bool of_warp) {
  values[threadIdx.x] = threadIdx.x;
  __syncwarp();
  const int other = values[threadIdx.x ^ (of_warp ? 1 : 32)];
  __syncwarp();
  if (of_warp) values[threadIdx.x] = other;
}

template <bool kOfWarp>
void swap() {
  std::vector<int> values(64);
  launch(swap_kernel, 1, 64, 0, values.data(), kOfWarp);
  for (int i = 0; i < 64; ++i) EXPECT(values[i] == (i ^ 1));
}

// --- copies and vectors --------------------------------------------------------------------------

__global__ void copy_async_kernel(float* from, float* to, bool early) {
  alignas(16) __shared__ float shared[4];
  kvcomp::copy_async(shared, from, true);
  kvcomp::end_copy_group();
  if (early) from[0] = 2;
  kvcomp::wait_for_copies<0>();
  from[0] = 2;
  to[0] = shared[0];
}

template <bool kEarly>
void copy_async() {
  std::vector<float4> from(1, {1, 1, 1, 1}), to(1);
  launch(copy_async_kernel, 1, 1, 0, &from[0].x, &to[0].x, kEarly);
  EXPECT(from[0].x == 2 && to[0].x == 1);
}

__global__ void copy_of_block_kernel(float* from) {
  alignas(16) __shared__ float shared[4];
  if (blockIdx.x == 0) from[3] = 1;
  if (blockIdx.x == 1) kvcomp::copy_async(shared, from, true);
}

__global__ void vectors_kernel(float* floats, int offset) {
  auto* vectors = reinterpret_cast<float4*>(floats + offset);
  vectors[0] = vectors[1];
}

template <int kOffset>
void vectors() {
  std::vector<float4> floats(3);
  launch(vectors_kernel, 1, 1, 0, &floats[0].x, kOffset);
}

}  // namespace

const Probes global_memory_probes = {
    {"sum", sum<Steps{}>},
    {"sum_all_fence", sum<Steps{.all_fence = true}>},
    {"sum_without_fence", sum<Steps{.fence = false}>},
    {"sum_without_second_fence", sum<Steps{.fence_again = false}>},
    {"sum_without_barrier", sum<Steps{.barrier = false}>},
    {"sum_without_second_barrier", sum<Steps{.barrier_again = false}>},
    {"sum_written_late", sum<Steps{.write_late = true}>},
    {"sum_of_own_counters", sum<Steps{.own_counters = true}>},
    {"chain", chain<true>},
    {"broken_chain", chain<false>},
    {"replace", replace<0>},
    {"replace_without_first", replace<1>},
    {"counts", counts},
    {"neighbours", neighbours},
    {"stream", stream},
    {"same_word", [] { launch(store_kernel, 2, 1, 0, std::vector<int>(1).data()); }},
    {"in_place_copy",
     [] {
       std::vector<int> values(2);
       launch(copy_kernel, 2, 1, 0, values.data(), values.data());
     }},
    {"look_at_count",
     [] {
       std::vector<int> words(2);
       launch(count_and_look_kernel, 3, 1, 0, &words[0], &words[1]);
     }},
    {"rotate", rotate<2>},
    {"rotate_without_barrier", rotate<0>},
    {"rotate_without_second_barrier", rotate<1>},
    {"swap", swap<true>},
    {"swap_of_warps", swap<false>},
    {"copy_async", copy_async<false>},
    {"copy_async_early_write", copy_async<true>},
    {"copy_async_of_block",
     [] { launch(copy_of_block_kernel, 2, 1, 0, &std::vector<float4>(1)[0].x); }},
    {"vectors", vectors<4>},
    {"crooked_vectors", vectors<2>},
};
