// csrc/sinkhorn.cu with two warps a block, on the CPU; test_cuda.py calls it through ctypes.
#include "cuda_emulation.h"

#include "../../csrc/sinkhorn.cu"

using namespace cot2align;

constexpr int warps = 2, resident = 4;

template <bool logarithmic, int strips>
bool solve(const Launch& in, unsigned seed) {
  for (int q = 0; q < in.problems.count; ++q)
    if (!emulation::run_cluster(
            q * in.cluster, in.cluster, 32 * warps, in.shared_bytes, seed + q,
            [&] { sinkhorn_cluster<logarithmic, strips, warps, resident>(in); }))
      return false;
  return true;
}

extern "C" __attribute__((visibility("default"))) int emulated_sinkhorn(
    float* similarity, const int32_t* shapes, const int64_t* offsets, const int32_t* order,
    const float* weights, int count, int max_n, int max_m, int small_n, int small_m, double epsilon,
    float tol, int num_iters, int gradient, int cluster, unsigned seed, float* loss,
    int32_t* iterations, float* marginal_error) {
  const int ld = round4(max_m), band = round4((max_n + cluster - 1) / cluster);
  const int64_t history_size = 2 * (int64_t{num_iters} + 1) * (band * cluster + ld);
  std::vector<float> history(gradient == 1 ? count * history_size + 4 : 0, NAN);
  const float inverse_epsilon = static_cast<float>(1 / epsilon);
  const Launch in{
      {similarity, shapes, offsets, order, weights, count, max_n, max_m, small_n, small_m},
      {loss, iterations, marginal_error},
      inverse_epsilon,
      tol,
      num_iters,
      static_cast<Gradient>(gradient),
      cluster,
      4 * (vectors_size(ld, band, warps) + matrix_size(ld, band, resident * warps)),
      history.empty() ? nullptr : history.data(),
      history_size};
  const bool logarithmic = inverse_epsilon > largest_exponent;
  if (max_m <= 128) return logarithmic ? solve<true, 1>(in, seed) : solve<false, 1>(in, seed);
  return logarithmic ? solve<true, 2>(in, seed) : solve<false, 2>(in, seed);
}
