// Enough of CUDA to run one cluster of blocks on the CPU: each thread is a fiber, which runs until
// it waits for others. Whose turn it is then the seed decides: where even, anyone's; where odd, one
// of those who waited least long, so that warps and blocks run far ahead of each other. This shows
// that the arithmetic and the barriers are right, not that the launch, the memory model or the
// speed are.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct Index {
  unsigned x;
};

namespace emulation {

struct Fiber;

// All of `size` fibers arrive, then all go on.
struct Barrier {
  int size;
  std::vector<Fiber*> waiting;
};

struct Warp {
  Barrier barrier{32, {}};
  int64_t values[2][32];  // alternating, so that one barrier a shuffle is enough
};

struct Block {
  Barrier barrier;
  std::vector<double> memory;  // gone once no thread is running
  std::vector<Warp> warps;
  int running;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Index thread, block_index;
  Block* block;
  Warp* warp;
  int parity = 0;
};

constexpr size_t stack_size = 256 << 10;
inline std::vector<Block> blocks;
inline Barrier cluster;
inline std::vector<Fiber*> ready;
inline Fiber* current;
inline ucontext_t scheduler;
inline std::function<void()> body;
inline std::minstd_rand random_number;
inline bool latest_first;  // else at random

// Leaves this fiber, or the scheduler, for one that is ready; for the scheduler where none is.
inline void switch_from(ucontext_t& self) {
  ucontext_t* to = &scheduler;
  if (!ready.empty()) {
    if (!latest_first) std::swap(ready[random_number() % ready.size()], ready.back());
    current = ready.back();
    ready.pop_back();
    to = &current->context;
  }
  if (to != &self) swapcontext(&self, to);
}

inline void wait(Barrier& barrier) {
  barrier.waiting.push_back(current);
  if (static_cast<int>(barrier.waiting.size()) == barrier.size) {
    ready.insert(ready.end(), barrier.waiting.begin(), barrier.waiting.end());
    barrier.waiting.clear();
  }
  switch_from(current->context);
}

inline void start() {
  body();
  Block& block = *current->block;
  if (--block.running == 0) block.memory.assign(block.memory.size(), NAN);
}

// Runs `kernel` in the blocks first_block .. first_block + size - 1, which are one cluster; false
// where threads are left waiting for each other.
inline bool run_cluster(int first_block, int size, int threads, size_t shared_bytes, unsigned seed,
                        std::function<void()> kernel) {
  random_number.seed(seed);
  latest_first = seed % 2;
  std::vector<Fiber> fibers(size * threads);
  body = std::move(kernel);
  blocks.clear();
  for (int b = 0; b < size; ++b)
    blocks.push_back({{threads, {}},
                      std::vector<double>(shared_bytes / 8 + 1, NAN),
                      std::vector<Warp>(threads / 32),
                      threads});
  cluster = {size * threads, {}};
  for (int f = 0; f < size * threads; ++f) {
    const unsigned b = f / threads, t = f % threads;
    Fiber& fiber = fibers[f];
    fiber.stack.reset(new char[stack_size]);
    fiber.thread = {t}, fiber.block_index = {first_block + b};
    fiber.block = &blocks[b], fiber.warp = &blocks[b].warps[t / 32];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = stack_size;
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, start, 0);
    ready.push_back(&fiber);
  }
  while (!ready.empty()) switch_from(scheduler);
  bool stuck = !cluster.waiting.empty();
  for (Block& block : blocks) {
    stuck |= !block.barrier.waiting.empty();
    for (Warp& warp : block.warps) stuck |= !warp.barrier.waiting.empty();
  }
  return !stuck;
}

template <class T>
T exchange(T value, int from) {
  Warp& warp = *current->warp;
  int64_t* values = warp.values[current->parity ^= 1];
  std::memcpy(&values[current->thread.x % 32], &value, sizeof value);
  wait(warp.barrier);
  std::memcpy(&value, &values[from], sizeof value);
  return value;
}

}  // namespace emulation

#define threadIdx (emulation::current->thread)
#define blockIdx (emulation::current->block_index)
inline void __syncthreads() { emulation::wait(emulation::current->block->barrier); }
inline void __syncwarp() { emulation::wait(emulation::current->warp->barrier); }
template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return emulation::exchange(value, lane);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulation::exchange(value, threadIdx.x % 32 ^ mask);
}

// The primitives of csrc/sinkhorn.cu.
inline char* shared_memory() {
  return reinterpret_cast<char*>(emulation::current->block->memory.data());
}
inline void cluster_barrier() { emulation::wait(emulation::cluster); }
template <class T>
T of_block(const T* mine, int rank) {
  const int64_t offset = reinterpret_cast<const char*>(mine) - shared_memory();
  const char* memory = reinterpret_cast<const char*>(emulation::blocks[rank].memory.data());
  return *reinterpret_cast<const T*>(memory + offset);
}
inline void opaque(int&) {}
inline float power_of_2(float x) { return std::exp2(x); }
inline void copy_async(float* shared, const float* global) { std::memcpy(shared, global, 16); }
inline void copies_done() {}
