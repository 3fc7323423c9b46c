// What this machine can do at most: fused multiply-adds, and reading. measure.py compiles it for the
// machine at hand and calls it; the widest vectors of the compiler's target.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include <omp.h>

#if defined(__AVX512F__)
constexpr int lanes = 16;
#elif defined(__AVX__)
constexpr int lanes = 8;
#else
constexpr int lanes = 4;
#endif
typedef float Vec __attribute__((vector_size(lanes * sizeof(float))));

namespace {

volatile float seed = 1, kept;

double seconds() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration<double>(now).count();
}

template <class Work>
double shortest(int threads, int times, Work work) {
  double best = 1e9;
#pragma omp parallel num_threads(threads)
  for (int i = 0; i < times; ++i) {
#pragma omp barrier
    const double start = seconds();
    work();
#pragma omp barrier
#pragma omp master
    best = std::min(best, seconds() - start);
  }
  return best;
}

}  // namespace

// float32 FLOP/s of multiply-adds on registers, all threads together; an FMA is 2.
extern "C" double fma_rate(int threads) {
  constexpr int chains = 12;
  constexpr int64_t steps = 1 << 20;
  const double time = shortest(threads, 10, [] {
    Vec sums[chains], x = Vec{} + (seed - 1e-3f), y = Vec{} + 1e-3f * seed;
#pragma GCC unroll 12
    for (int c = 0; c < chains; ++c) sums[c] = Vec{} + (c + seed);
    for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 12
      for (int c = 0; c < chains; ++c) sums[c] = sums[c] * x + y;
    }
    float total = 0;
    for (int c = 0; c < chains; ++c) total += sums[c][0];
    kept = total;
  });
  return 2. * lanes * chains * steps * threads / time;
}

// Bytes/s of reading, each thread over and over from as many bytes of its own.
extern "C" double read_rate(int64_t bytes, int threads) {
  constexpr int streams = 8;
  const int64_t step = streams * lanes, count = std::max<int64_t>(1, bytes / 4 / step) * step;
  const int64_t rounds = std::max<int64_t>(1, (int64_t(1) << 24) / count);
  float* memory = static_cast<float*>(std::aligned_alloc(64, threads * count * sizeof(float)));
  if (!memory) return 0;
  std::fill_n(memory, threads * count, 1.f);
  const double best = shortest(threads, 8, [=] {
    const float* mine = memory + omp_get_thread_num() * count;
    Vec sums[streams] = {};
    for (int64_t round = 0; round < rounds; ++round)
      for (int64_t i = 0; i < count; i += step)
#pragma GCC unroll 8
        for (int s = 0; s < streams; ++s) {
          Vec read;
          std::memcpy(&read, mine + i + s * lanes, sizeof read);
          sums[s] += read;
        }
    for (int s = 1; s < streams; ++s) sums[0] += sums[s];
    kept = sums[0][0];
  });
  std::free(memory);
  return 4. * count * rounds * threads / best;
}
