// The OT loss on a GPU with thread-block clusters (sm_90 and up), from the similarity on: the
// operation of sinkhorn.cpp, whose formulas and names it shares, one problem per cluster.
//
// Each block of the cluster owns a band of rows. Its matrix, E, stays on the chip: the first rows
// of every warp in registers, the others in shared memory. An iteration reads it once: a warp makes
// a row's dot product, which gives the row's new value, which adds the row to the warp's column
// sums at once (`sweep`). The warps' sums are added up in shared memory, the blocks' through
// distributed shared memory, with one cluster barrier; every block does this for all columns, in
// the same order, so that all take the same decision to stop. S is read again where p is needed,
// rather than kept.
//
// Where 1/epsilon is so large that E leaves the range of float, u and v are kept as logarithms to
// base 2 and E as its exponent. After one iteration no sum of the plan T = 2^(E + u + v) can leave
// the range either: each half-iteration adds log2(wanted sum / sum) to u or v, without a maximum.
//
// The unrolled gradient needs u_k, v_k and the x_k, z_k of the reverse iterations, z_k = y_{k+1}
// (in logarithms x_k / u_k and z_k / v_k, so that the plans of the iterations take E's place). They
// go through global memory, 2 (N + M) floats an iteration; the matrix part of dL/dS is then
//
//     sum_{0 < k < K} x_k v_k^T + sum_{0 <= k < K} u_k z_k^T
//
// and x_K v_K^T * E is subtracted from W exactly, as T * (C - the row's mean cost).

#include "sinkhorn_cuda.h"

#include <cmath>

#ifdef __CUDACC__
#include <cooperative_groups.h>
#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>

#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <tuple>
#endif

namespace cot2align {
namespace {

// 1/epsilon up to which products of E's, u's and v's entries fit in float.
constexpr float largest_exponent = 64;
constexpr int largest_cluster = 8;

struct Launch {
  CudaProblems problems;
  CudaResults results;
  float inverse_epsilon, tol;
  int num_iters;
  Gradient gradient;
  int cluster;           // blocks of a cluster
  int64_t shared_bytes;  // of a block
  float* history;
  int64_t history_size;  // of a problem
};

__host__ __device__ constexpr int round4(int count) { return (count + 3) / 4 * 4; }

// Shared memory in floats: of fixed size, arrays of columns and of rows (`Solver::cut`), the
// matrix.
__host__ __device__ constexpr int fixed_size(int warps) { return 4 * warps + 4; }
__host__ __device__ constexpr int column_arrays(int warps) { return 2 * warps + 10; }
constexpr int row_arrays = 13;

constexpr int64_t vectors_size(int ld, int band, int warps) {
  return fixed_size(warps) + column_arrays(warps) * int64_t{ld} + row_arrays * band;
}
// The matrix's place also stages the history, at least two iterations of it.
constexpr int64_t matrix_size(int ld, int band, int resident_rows) {
  const int64_t kept = band > resident_rows ? int64_t{band - resident_rows} * ld : 0;
  const int64_t staged = 4 * (int64_t{ld} + band) + 16;  // `correct` reads past the last row
  return kept > staged ? kept : staged;
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
template <class Real>
struct alignas(16) Quad {
  Real at[4];
};

#ifdef __CUDACC__
__device__ __forceinline__ char* shared_memory() {
  extern __shared__ Quad<float> bytes[];
  return reinterpret_cast<char*>(bytes);
}
__device__ __forceinline__ void cluster_barrier() { cooperative_groups::this_cluster().sync(); }
// What another block of the cluster has at this place of its shared memory. Volatile: addresses
// that the compiler keeps for the next time cost more registers than there are.
template <class T>
__device__ __forceinline__ T of_block(const T* mine, int rank) {
  unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(mine));
  asm volatile("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(address) : "r"(rank));
  union {
    T value;
    unsigned long long wide;
    unsigned narrow;
  } of{};
  if constexpr (sizeof(T) == 8)
    asm volatile("ld.shared::cluster.b64 %0, [%1];" : "=l"(of.wide) : "r"(address) : "memory");
  else asm volatile("ld.shared::cluster.b32 %0, [%1];" : "=r"(of.narrow) : "r"(address) : "memory");
  return of.value;
}
__device__ __forceinline__ void opaque(int& value) { asm volatile("" : "+r"(value)); }
__device__ __forceinline__ float power_of_2(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}
__device__ __forceinline__ void copy_async(float* shared, const float* global) {  // 4 floats
  __pipeline_memcpy_async(shared, global, 16);
}
__device__ __forceinline__ void copies_done() {
  __pipeline_commit();
  __pipeline_wait_prior(0);
}
#endif

constexpr float never = -1e30f;  // a logarithm of nothing that stays finite under addition

struct Pair {
  float first, second;
};

struct Plus {
  template <class Real>
  __device__ Real operator()(Real a, Real b) const {
    return a + b;
  }
  __device__ Pair operator()(Pair a, Pair b) const {
    return {a.first + b.first, a.second + b.second};
  }
};

struct Larger {
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

template <class Real>
__device__ __forceinline__ Real warp_sum(Real value) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step);
  return value;
}

// Lane l gets the warp's sum of value[l / (32 / count)]: fewer shuffles than `count` sums.
template <int count>
__device__ __forceinline__ float warp_sums(float (&value)[count]) {
  const int lane = threadIdx.x % 32;
  int step = 16;
#pragma unroll
  for (int half = count / 2; half > 0; half /= 2, step /= 2) {
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const bool upper = lane & step;
      const float given = upper ? value[i] : value[i + half];
      value[i] = (upper ? value[i + half] : value[i]) + __shfl_xor_sync(~0u, given, step);
    }
  }
#pragma unroll
  for (; step > 0; step /= 2) value[0] += __shfl_xor_sync(~0u, value[0], step);
  return value[0];
}

// One problem, as seen by one thread. A lane holds columns 4 lane + 128 s .. 4 lane + 128 s + 3 of
// its warp's rows, s < strips, and its thread reduces columns thread + o threads, o < owned. Rows
// are counted within the block's band; warp w's are w, w + warps, ..., of which the first
// `resident` stay in registers.
template <bool logarithmic, int strips, int warps, int resident>
class Solver {
  static constexpr int width = 4 * strips, threads = 32 * warps;
  static constexpr int owned = (128 * strips + threads - 1) / threads;
  static constexpr int batch = strips > 2 ? 2 : 4;  // rows of a sweep that a warp takes together
  // Rows of dL/dS that a warp makes together: as many accumulators as registers allow.
  static constexpr int group = (logarithmic ? 48 : 128) / width;
  static_assert(resident % batch == 0, "sweep takes the resident rows in batches");

 public:
  __device__ __forceinline__ Solver(const Launch& in, int rank)
      : in_(in),
        q_(in.problems.order[blockIdx.x / in.cluster]),
        n_(in.problems.shapes[2 * q_]),
        m_(in.problems.shapes[2 * q_ + 1]),
        ld_(round4(m_)),
        band_(round4((n_ + in.cluster - 1) / in.cluster)),
        rank_(rank),
        begin_(rank * band_),
        rows_(n_ < begin_           ? 0
              : n_ - begin_ < band_ ? n_ - begin_
                                    : band_),
        thread_(threadIdx.x),
        lane_(threadIdx.x % 32),
        warp_(threadIdx.x / 32),
        similarity_(in.problems.similarity + in.problems.offsets[q_] + int64_t{begin_} * ld_),
        history_(in.history ? in.history + blockIdx.x / in.cluster * in.history_size : nullptr) {}

  __device__ __forceinline__ void run() {
    const bool small = n_ <= in_.problems.small_n && m_ <= in_.problems.small_m;
    if (n_ == 0 || m_ == 0 || small) return;
    prepare();
    iterate();
    double gradient[owned];
    finish(gradient);
    if (in_.gradient != Gradient::none) {
      if (in_.gradient == Gradient::unrolled) reverse(gradient);
      else if (in_.gradient == Gradient::implicit) solve_fixed_point(gradient);
      similarity_gradient();
    }
    cluster_barrier();  // no block may leave while another reads its sums
  }

 private:
  // Shared memory: sums of warps, then arrays of ld_ columns, then of band_ rows, then the matrix.
  // An address is made where it is needed: kept in registers, they would not leave enough of them.
  __device__ __forceinline__ float* cut(int columns, int rows) const {
    return reinterpret_cast<float*>(shared_memory()) + fixed_size(warps) + columns * ld_ +
           rows * band_;
  }
  static constexpr int all = column_arrays(warps);
  __device__ __forceinline__ double* slots() const {  // two sets, and the block's loss
    return reinterpret_cast<double*>(shared_memory());
  }
  __device__ __forceinline__ double* block_loss() const { return slots() + 2 * warps; }
  template <class Real>
  __device__ __forceinline__ Real* of_warp() const {
    return reinterpret_cast<Real*>(cut(0, 0)) + warp_ * ld_;
  }
  __device__ __forceinline__ void* own() const { return cut(2 * (warps + parity_), 0); }
  __device__ __forceinline__ double* shared_direction() const {
    return reinterpret_cast<double*>(cut(2 * warps + 4, 0));
  }
  // u_k and v_k: the last three of them are on the chip.
  __device__ __forceinline__ float* columns_at(int k) const {
    return cut(2 * warps + 6 + k % 3, 0);
  }
  __device__ __forceinline__ float* rows_at(int k) const { return cut(all, 4 + k % 3); }
  __device__ __forceinline__ float* z_now() const { return cut(2 * warps + 9, 0); }
  __device__ __forceinline__ float* x_at(int k) const { return cut(all, 7 + k % 2); }
  __device__ __forceinline__ double* mean_cost() const {
    return reinterpret_cast<double*>(cut(all, 0));
  }
  __device__ __forceinline__ double* row_mass() const {
    return reinterpret_cast<double*>(cut(all, 2));
  }
  __device__ __forceinline__ float* largest() const { return cut(all, 9); }
  __device__ __forceinline__ float* inverse_total() const { return cut(all, 10); }
  __device__ __forceinline__ float* least() const { return cut(all, 11); }
  __device__ __forceinline__ int* argmax() const { return reinterpret_cast<int*>(cut(all, 12)); }
  __device__ __forceinline__ float* matrix() const { return cut(all, row_arrays); }

  // Addresses and comparisons are made again from here on: the compiler would keep hundreds of them
  // in registers, where the matrix is.
  __device__ __forceinline__ void forget() {
    opaque(m_), opaque(ld_), opaque(band_), opaque(thread_), opaque(lane_), opaque(warp_);
  }

  __device__ __forceinline__ int row_of(int position) const { return position * warps + warp_; }
  __device__ __forceinline__ int column(int c) const { return 4 * lane_ + 128 * (c / 4) + c % 4; }

  // Iteration k's u (1: x) of the band, and v (1: z): history, in global memory.
  __device__ __forceinline__ float* row_history(int k, int which) const {
    const int64_t ldn = band_ * in_.cluster;
    return history_ + 2 * k * (ldn + ld_) + which * ldn + begin_;
  }
  __device__ __forceinline__ float* column_history(int k, int which) const {
    const int64_t ldn = band_ * in_.cluster;
    return history_ + 2 * k * (ldn + ld_) + 2 * ldn + which * ld_;
  }

  __device__ __forceinline__ void record(int k) {
    if (!history_) return;
    for (int i = thread_; i < rows_; i += threads) row_history(k, 0)[i] = rows_at(k)[i];
    for (int j = thread_; j < ld_ && rank_ == 0; j += threads)
      column_history(k, 0)[j] = columns_at(k)[j];
  }

  // Brings u_k and v_k back, by the time of `copies_done`.
  __device__ __forceinline__ void fetch(int k) {
    if (!history_ || k < 0) return;
    for (int i = 4 * thread_; i < band_; i += 4 * threads)
      copy_async(rows_at(k) + i, row_history(k, 0) + i);
    for (int j = 4 * thread_; j < ld_; j += 4 * threads)
      copy_async(columns_at(k) + j, column_history(k, 0) + j);
  }

  // The lane's columns of a strip.
  template <class Real>
  __device__ __forceinline__ Quad<Real> strip(const Real* from, int s, Real beyond = {}) const {
    const int j = column(4 * s);
    if (j < ld_) return *reinterpret_cast<const Quad<Real>*>(from + j);
    return {beyond, beyond, beyond, beyond};
  }

  template <class Real>
  __device__ __forceinline__ void set_strip(Real* to, int s, Quad<Real> four) const {
    const int j = column(4 * s);
    if (j < ld_) *reinterpret_cast<Quad<Real>*>(to + j) = four;
  }

  template <class Real>
  __device__ __forceinline__ void load(Real (&to)[width], const Real* from, Real beyond = 0) const {
#pragma unroll
    for (int s = 0; s < strips; ++s) {
      const Quad<Real> four = strip(from, s, beyond);
#pragma unroll
      for (int e = 0; e < 4; ++e) to[4 * s + e] = four.at[e];
    }
  }

  template <class Real>
  __device__ __forceinline__ void store(Real* to, const Real (&from)[width]) const {
#pragma unroll
    for (int s = 0; s < strips; ++s)
      set_strip(to, s, Quad<Real>{from[4 * s], from[4 * s + 1], from[4 * s + 2], from[4 * s + 3]});
  }

  // An array in registers takes no index that is known only when it runs.
  template <int count>
  __device__ __forceinline__ static void copy_row(float (&to)[width],
                                                  const float (&rows)[count][width], int row) {
#pragma unroll
    for (int r = 0; r < count; ++r) {
      if (r != row) continue;
#pragma unroll
      for (int c = 0; c < width; ++c) to[c] = rows[r][c];
    }
  }
  template <int count>
  __device__ __forceinline__ static void set_row(float (&rows)[count][width], int row,
                                                 const float (&from)[width]) {
#pragma unroll
    for (int r = 0; r < count; ++r) {
      if (r != row) continue;
#pragma unroll
      for (int c = 0; c < width; ++c) rows[r][c] = from[c];
    }
  }

  template <class Real>
  __device__ __forceinline__ Real block_sum(Real value) {
    Real* sums = reinterpret_cast<Real*>(slots() + flip_ * warps);
    flip_ ^= 1;
    value = warp_sum(value);
    if (lane_ == 0) sums[warp_] = value;
    __syncthreads();
    Real total = sums[0];
#pragma unroll
    for (int w = 1; w < warps; ++w) total += sums[w];
    return total;
  }

  // Combines the warps' and the blocks' values of each column: use(o, j, total) by the column's
  // owner, in every block. What a block offers to the others alternates between two places, so that
  // one cluster barrier is enough.
  template <class Real, class Combine, class Use>
  __device__ __forceinline__ void exchange(const Real (&sums)[width], Combine combine, Use use) {
    store(of_warp<Real>(), sums);
    exchange<Real>(combine, use);
  }

  // The same of what the warps left in of_warp().
  template <class Real, class Combine, class Use>
  __device__ __forceinline__ void exchange(Combine combine, Use use) {
    forget();
    const Real* of_warps = of_warp<Real>() - warp_ * ld_;
    Real* mine = static_cast<Real*>(own());
    parity_ ^= 1;
    __syncthreads();
    for (int j = thread_; j < ld_; j += threads) {
      Real total = of_warps[j];
#pragma unroll
      for (int w = 1; w < warps; ++w) total = combine(total, of_warps[w * ld_ + j]);
      mine[j] = total;
    }
    cluster_barrier();
#pragma unroll
    for (int o = 0; o < owned; ++o) {
      const int j = thread_ + o * threads;
      if (j >= ld_) continue;
      Real from[largest_cluster];
#pragma unroll
      for (int r = 0; r < largest_cluster; ++r)
        if (r < in_.cluster) from[r] = of_block(mine + j, r);
      Real total = from[0];
#pragma unroll
      for (int r = 1; r < largest_cluster; ++r)
        if (r < in_.cluster) total = combine(total, from[r]);
      use(o, j, total);
    }
  }

  // ---- p, the cost and E

  // Each row's maximum, sum and argmax, from which p is made again where it is needed, and E.
  __device__ __forceinline__ void prepare() {
    for (int j = thread_; j < ld_; j += threads)
      columns_at(0)[j] = columns_at(1)[j] = columns_at(2)[j] = z_now()[j] = 0;
    for (int position = 0; row_of(position) < rows_; ++position) {
      const int i = row_of(position);
      float s[width], top = -INFINITY, not_finite = 0;
      int at = 0;
      load(s, similarity_ + int64_t{i} * ld_);
#pragma unroll
      for (int c = 0; c < width; ++c) {
        if (column(c) >= m_) continue;
        if (s[c] > top) top = s[c], at = column(c);
        not_finite += s[c] * 0;
      }
#pragma unroll
      for (int step = 16; step > 0; step /= 2) {
        const float other = __shfl_xor_sync(~0u, top, step);
        const int its = __shfl_xor_sync(~0u, at, step);
        if (other > top || (other == top && its < at)) top = other, at = its;
      }
      float rest = not_finite;
#pragma unroll
      for (int c = 0; c < width; ++c)
        if (column(c) < m_ && column(c) != at) rest += expf(s[c] - top);
      rest = warp_sum(rest);
      if (lane_ == 0) {
        largest()[i] = top;
        inverse_total()[i] = 1 / (1 + rest);
        least()[i] = rest / (1 + rest);
        argmax()[i] = at;
      }
      __syncwarp();
      float e[width];
      probabilities(e, i);
#pragma unroll
      for (int c = 0; c < width; ++c) e[c] = stored(e[c], c, i);
      if (position < resident) set_row(resident_, position, e);
      else store(matrix_row(position), e);
    }
    __syncthreads();
  }

  __device__ __forceinline__ float* matrix_row(int position) const {
    return matrix() + (row_of(position) - resident * warps) * ld_;
  }

  __device__ __forceinline__ void probabilities(float (&p)[width], int i) const {
    load(p, similarity_ + int64_t{i} * ld_);
#pragma unroll
    for (int c = 0; c < width; ++c) {
      const float off_argmax = expf(p[c] - largest()[i]) * inverse_total()[i];
      p[c] = column(c) >= m_ ? 0 : column(c) == argmax()[i] ? 1 - least()[i] : off_argmax;
    }
  }

  // 1 - p, which cancels at the row's argmax.
  template <class Real>
  __device__ __forceinline__ Real cost(float p, int c, int i) const {
    return column(c) == argmax()[i] ? Real(least()[i]) : Real(1) - p;
  }

  // E as it is kept, in logarithms its exponent.
  __device__ __forceinline__ float stored(float p, int c, int i) const {
    const float exponent = -cost<float>(p, c, i) * in_.inverse_epsilon;
    if (column(c) >= m_) return logarithmic ? never : 0;
    return logarithmic ? exponent * 1.44269504f : expf(exponent);
  }

  __device__ __forceinline__ float plan(float e, float u, float v) const {
    return logarithmic ? power_of_2(e + u + v) : u * e * v;
  }

  // body(i, E's row i) for the warp's rows.
  template <class Body>
  __device__ __forceinline__ void for_rows(Body body) {
#pragma unroll 1
    for (int position = 0; row_of(position) < rows_; ++position) {
      forget();
      float e[width];
      if (position < resident) copy_row(e, resident_, position);
      else load(e, matrix_row(position), logarithmic ? never : 0);
      body(row_of(position), e);
    }
  }

  // ---- the iterations

  // sums = sum over the warp's rows of row(i, E_i . v) E_i, or of row(i, t_i . 1) t_i with
  // t_i = 2^(E_i + u_i + v) in logarithms; keep(i, value) by one lane.
  template <class Row, class Keep>
  __device__ __forceinline__ void sweep(float (&sums)[width], const float* u, const float* v,
                                        Row row, Keep keep) {
    forget();
#pragma unroll
    for (int c = 0; c < width; ++c) sums[c] = 0;
    if constexpr (logarithmic) {
      for_rows([&](int i, const float (&e)[width]) {
        float t[width], mass = 0;
#pragma unroll
        for (int s = 0; s < strips; ++s) {
          const auto by = strip(v, s);
#pragma unroll
          for (int j = 0, c = 4 * s; j < 4; ++j, ++c) mass += t[c] = plan(e[c], u[i], by.at[j]);
        }
        const float value = row(i, warp_sum(mass));
        if (lane_ == 0) keep(i, value);
#pragma unroll
        for (int c = 0; c < width; ++c) sums[c] += value * t[c];
      });
    } else {
      float by[width];
      load(by, v);
      const auto take_batch = [&](const float (*e)[width], int position) {
        float dot[batch];
#pragma unroll
        for (int r = 0; r < batch; ++r) {
          dot[r] = 0;
#pragma unroll
          for (int c = 0; c < width; ++c) dot[r] += e[r][c] * by[c];
        }
        const float total = warp_sums(dot);
        const int i = row_of(position + lane_ / (32 / batch));
        const float value = i < rows_ ? row(i, total) : 0;
        if (i < rows_ && lane_ % (32 / batch) == 0) keep(i, value);
#pragma unroll
        for (int r = 0; r < batch; ++r) {
          const float factor = __shfl_sync(~0u, value, r * (32 / batch));
#pragma unroll
          for (int c = 0; c < width; ++c) sums[c] += factor * e[r][c];
        }
      };
#pragma unroll
      for (int position = 0; position < resident; position += batch)
        if (row_of(position) < rows_) take_batch(resident_ + position, position);
      for (int position = resident; row_of(position) < rows_; position += batch) {
        float e[batch][width];
#pragma unroll
        for (int r = 0; r < batch; ++r)  // any row where there is none: its value is 0
          load(e[r], matrix_row(row_of(position + r) < rows_ ? position + r : position));
        take_batch(e, position);
      }
    }
  }

  // In logarithms v_0, which is only a scale there: so that the largest of a column's terms is 1.
  __device__ __forceinline__ void scale_columns() {
    float top[width];
#pragma unroll
    for (int c = 0; c < width; ++c) top[c] = never;
    for_rows([&](int, const float (&e)[width]) {
#pragma unroll
      for (int c = 0; c < width; ++c) top[c] = fmaxf(top[c], e[c]);
    });
    exchange(top, Larger(), [&](int, int j, float e) { columns_at(0)[j] = j < m_ ? -e : 0; });
    __syncthreads();
  }

  // The same for the rows, by u_0: the first iteration replaces it.
  __device__ __forceinline__ void scale_rows() {
    float v[width];
    load(v, columns_at(1));
    for_rows([&](int i, const float (&e)[width]) {
      float top = never;
#pragma unroll
      for (int c = 0; c < width; ++c) top = fmaxf(top, e[c] + v[c]);
#pragma unroll
      for (int step = 16; step > 0; step /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
      if (lane_ == 0) rows_at(0)[i] = -top;
    });
    __syncthreads();
  }

  __device__ __forceinline__ void iterate() {
    const float a = 1.f / n_, b = 1.f / m_;
    for (int i = thread_; i < rows_; i += threads) {
      rows_at(0)[i] = logarithmic ? 0 : 1;
      if (history_) row_history(0, 1)[i] = 0;
    }
    __syncthreads();
    if (logarithmic) scale_columns();
    record(0);
    for (iterations_ = 0;; ++iterations_) {
      const int k = iterations_, before = k == 0 ? 0 : k - 1;
      if (logarithmic && k == 1) scale_rows();
      float sums[width], error = 0;
      sweep(
          sums, rows_at(before), columns_at(k),
          [&](int, float sum) { return k == 0 ? 1 : a / sum; },
          [&](int i, float u) {
            if (k > 0) rows_at(k)[i] = logarithmic ? rows_at(before)[i] + log2f(u) : u;
          });
      exchange(sums, Plus(), [&](int, int j, float sum) {
        if (j >= m_) return;
        const float v = columns_at(k)[j];
        error += fabsf((logarithmic ? sum : v * sum) - b);
        columns_at(k + 1)[j] = logarithmic ? v + log2f(b / sum) : b / sum;
      });
      error = block_sum(error);
      if (k > 0) record(k);
      if (k == in_.num_iters || (k > 0 && in_.tol > 0 && error <= in_.tol)) {
        if (rank_ == 0 && thread_ == 0) {
          in_.results.iterations[q_] = k;
          in_.results.marginal_error[q_] = error;
        }
        return;
      }
    }
  }

  // Sums of 8 bytes a column have their place in shared memory, where `exchange` takes them from.
  __device__ __forceinline__ void clear_sums() const {
#pragma unroll
    for (int s = 0; s < strips; ++s) set_strip(of_warp<double>(), s, Quad<double>{});
  }
  template <class Term>
  __device__ __forceinline__ void add_to_sums(Term term) const {
#pragma unroll
    for (int s = 0; s < strips; ++s) {
      auto sum = strip(of_warp<double>(), s);
#pragma unroll
      for (int j = 0; j < 4; ++j) sum.at[j] += term(4 * s + j);
      set_strip(of_warp<double>(), s, sum);
    }
  }

  // The loss; the rows' mass T 1 and mean cost W 1 / T 1, and the column sums of T * (C - the row's
  // mean): T's rows sum to 1/N but for rounding, and C - mean cancels where a row goes to one
  // column.
  __device__ __forceinline__ void finish(double (&gradient)[owned]) {
    double loss = 0;
    clear_sums();
    for (int position = 0; row_of(position) < rows_; ++position) {
      forget();
      const int i = row_of(position);
      const float u = rows_at(iterations_)[i];
      float p[width], t[width];
      probabilities(p, i);
      double weighted = 0, mass = 0;
#pragma unroll
      for (int s = 0; s < strips; ++s) {
        const auto v = strip(columns_at(iterations_), s);
#pragma unroll
        for (int j = 0, c = 4 * s; j < 4; ++j, ++c) {
          t[c] = plan(stored(p[c], c, i), u, v.at[j]);
          weighted += t[c] * cost<double>(p[c], c, i);
          mass += t[c];
        }
      }
      weighted = warp_sum(weighted), mass = warp_sum(mass);
      const double mean = weighted / mass;
      loss += weighted;
      if (lane_ == 0) mean_cost()[i] = mean, row_mass()[i] = mass;
      add_to_sums([&](int c) { return t[c] * (cost<double>(p[c], c, i) - mean); });
    }
    loss = block_sum(lane_ == 0 ? loss : 0);
    if (thread_ == 0) *block_loss() = loss;
    exchange<double>(Plus(), [&](int o, int, double sum) { gradient[o] = sum; });
    if (rank_ == 0 && thread_ == 0) {
      for (int r = 1; r < in_.cluster; ++r) loss += of_block(block_loss(), r);
      in_.results.loss[q_] = static_cast<float>(loss);
    }
  }

  // ---- the gradient through the iterations

  // of_warp() = column sums of x_i t_i, t = T^(k) = 2^(E + u_k + v_k) and x_i = -(t_i . z) / (t_i .
  // 1), and of T^(k-1), by which the next step divides: its sums are 1/M only but for the rounding
  // of u and v, which 1/epsilon magnifies.
  __device__ __forceinline__ void reverse_sweep(int k, float* x) {
    clear_sums();
    const float *u = rows_at(k), *u_before = rows_at(k - 1);
    for_rows([&](int i, const float (&e)[width]) {
      float t[width], dot = 0, mass = 0;
#pragma unroll
      for (int s = 0; s < strips; ++s) {
        const auto v = strip(columns_at(k), s), z = strip(z_now(), s);
#pragma unroll
        for (int j = 0, c = 4 * s; j < 4; ++j, ++c) {
          t[c] = plan(e[c], u[i], v.at[j]);
          dot += t[c] * z.at[j];
          mass += t[c];
        }
      }
      const float value = -warp_sum(dot) / warp_sum(mass);
      if (lane_ == 0) x[i] = value;
#pragma unroll
      for (int s = 0; s < strips; ++s) {
        const auto v_before = strip(columns_at(k - 1), s);
        auto sum = strip(of_warp<Pair>(), s);
#pragma unroll
        for (int j = 0, c = 4 * s; j < 4; ++j, ++c) {
          sum.at[j].first += value * t[c];
          sum.at[j].second += plan(e[c], u_before[i], v_before.at[j]);
        }
        set_strip(of_warp<Pair>(), s, sum);
      }
    });
  }

  __device__ __forceinline__ void reverse(const double (&last)[owned]) {
    const float rows = n_, columns = m_;
    float gradient[owned], mass[owned];
#pragma unroll
    for (int o = 0; o < owned; ++o) gradient[o] = static_cast<float>(last[o]);
    fetch(iterations_ - 1);  // in logarithms v_{K-1} or its neighbour, and u_0, were overwritten
    fetch(iterations_ - 2);
    copies_done();
    __syncthreads();
    if constexpr (logarithmic) {
      float sums[width] = {}, v[width];
      load(v, columns_at(iterations_ - 1));
      for_rows([&](int i, const float (&e)[width]) {
#pragma unroll
        for (int c = 0; c < width; ++c) sums[c] += plan(e[c], rows_at(iterations_ - 1)[i], v[c]);
      });
      exchange(sums, Plus(), [&](int o, int, float sum) { mass[o] = sum; });
    }
    for (int k = iterations_ - 1;; --k) {
#pragma unroll
      for (int o = 0; o < owned; ++o) {
        const int j = thread_ + o * threads;
        if (j >= ld_) continue;
        const float z =
            logarithmic ? gradient[o] / mass[o] : gradient[o] * columns_at(k + 1)[j] * columns;
        z_now()[j] = j < m_ ? z : 0;
        if (rank_ == 0) column_history(k, 1)[j] = z_now()[j];
      }
      copies_done();
      __syncthreads();
      if (k == 0) return;
      fetch(k - 2);
      float* x = x_at(k);
      if constexpr (logarithmic) {
        reverse_sweep(k, x);
        exchange<Pair>(Plus(), [&](int o, int, Pair sum) {
          gradient[o] = -sum.first;
          mass[o] = sum.second;
        });
      } else {
        float sums[width];
        const float* u = rows_at(k);
        sweep(
            sums, nullptr, z_now(), [&](int i, float sum) { return -u[i] * sum * u[i] * rows; },
            [&](int i, float value) { x[i] = value; });
        exchange(sums, Plus(),
                 [&](int o, int j, float sum) { gradient[o] = -columns_at(k)[j] * sum; });
      }
      for (int i = thread_; i < rows_; i += threads) row_history(k, 1)[i] = x[i];
    }
  }

  // ---- the gradient at the fixed point

  // of_warp() = sum over the warp's rows of row(i, T_i . d) T_i.
  template <class Row>
  __device__ __forceinline__ void sweep_plan(Row row) {
    clear_sums();
    for_rows([&](int i, const float (&e)[width]) {
      const float u = rows_at(iterations_)[i];
      float t[width];
      double dot = 0;
#pragma unroll
      for (int s = 0; s < strips; ++s) {
        const auto v = strip(columns_at(iterations_), s);
        const auto d = strip(shared_direction(), s);
#pragma unroll
        for (int j = 0, c = 4 * s; j < 4; ++j, ++c) {
          t[c] = plan(e[c], u, v.at[j]);
          dot += t[c] * d.at[j];
        }
      }
      const double value = row(i, warp_sum(dot));
      add_to_sums([&](int c) { return value * t[c]; });
    });
  }

  // Conjugate gradients, preconditioned by diag(c), for (diag(c) - T^T diag(1/r) T) w = residual, r
  // and c the plan's own sums; w is left in shared_direction(). In double: the system is singular
  // along the constants and nearly so wherever the plan falls into blocks, which float does not
  // survive.
  __device__ __forceinline__ void solve_fixed_point(double (&residual)[owned]) {
    double c[owned] = {}, w[owned] = {}, direction[owned] = {}, product[owned] = {};
    double norm = 0, first_norm = 0;
    const int limit = 2 * m_ + 50;
    for (int step = -1; step < limit; ++step) {
      if (step >= 0) {
        double next = 0;
#pragma unroll
        for (int o = 0; o < owned; ++o)
          if (c[o] > 0) next += residual[o] * residual[o] / c[o];
        next = block_sum(next);
        if (step == 0) first_norm = next;
        if (!(next > 1e-24 * first_norm)) break;
        const double beta = step == 0 ? 0 : next / norm;
        norm = next;
#pragma unroll
        for (int o = 0; o < owned; ++o) {
          const int j = thread_ + o * threads;
          direction[o] = beta * direction[o] + (c[o] > 0 ? residual[o] / c[o] : 0);
          if (j < ld_) shared_direction()[j] = direction[o];
        }
      }
      __syncthreads();
      sweep_plan([&](int i, double dot) {
        return step < 0 ? 1 : row_mass()[i] > 0 ? dot / row_mass()[i] : 0;  // first the column sums
      });
      exchange<double>(Plus(), [&](int o, int, double sum) { product[o] = sum; });
      if (step < 0) {
        double excess = 0, mass = 0;
#pragma unroll
        for (int o = 0; o < owned; ++o) {
          if (thread_ + o * threads < m_) c[o] = product[o], excess += residual[o], mass += c[o];
          else residual[o] = 0;
        }
        // Solvable only without a component along the constants: rounding's must not reach the
        // iteration.
        excess = block_sum(excess) / block_sum(mass);
#pragma unroll
        for (int o = 0; o < owned; ++o) residual[o] -= excess * c[o];
        continue;
      }
      double curvature = 0;
#pragma unroll
      for (int o = 0; o < owned; ++o) {
        product[o] = c[o] * direction[o] - product[o];
        curvature += direction[o] * product[o];
      }
      curvature = block_sum(curvature);
      if (!(curvature > 0)) break;
#pragma unroll
      for (int o = 0; o < owned; ++o) {
        w[o] += norm / curvature * direction[o];
        residual[o] -= norm / curvature * product[o];
      }
    }
#pragma unroll
    for (int o = 0; o < owned; ++o)
      if (thread_ + o * threads < ld_) shared_direction()[thread_ + o * threads] = w[o];
    __syncthreads();
  }

  // ---- dL/dS

  // In place of S. A warp makes `group` rows together, over the history in chunks.
  __device__ __forceinline__ void similarity_gradient() {
    if (history_) {
      cluster_barrier();  // for the first block's part of the history
      fetch(iterations_);
      copies_done();
      __syncthreads();
    }
    for (int first = 0; first < rows_; first += warps * group) {
      const int begin = first + warp_ * group;
      float correction[group][width] = {};
      if (history_) correct(correction, begin);
#pragma unroll 1
      for (int r = 0; r < group && begin + r < rows_; ++r) {
        float slope[width];
        copy_row(slope, correction, r);
        finish_row(begin + r, slope);
      }
    }
  }

  // correction = sum_k x_k v_k^T + u_k z_k^T for rows begin .. begin + group - 1, all warps
  // staging; in logarithms sum_k T^(k) * (x_k 1^T + 1 z_k^T).
  __device__ __forceinline__ void correct(float (&correction)[group][width], int begin) {
    forget();
    const int64_t used = matrix() - reinterpret_cast<float*>(shared_memory());
    const int chunk = (in_.shared_bytes / 4 - used - group) / (2 * (ld_ + band_));
    float* column_stage = matrix();
    float* row_stage = matrix() + 2 * chunk * ld_;
    float e[logarithmic ? group : 1][width];
    if constexpr (logarithmic) {
#pragma unroll 1
      for (int r = 0; r < group && begin + r < rows_; ++r) {
        float p[width];
        probabilities(p, begin + r);
#pragma unroll
        for (int c = 0; c < width; ++c) p[c] = stored(p[c], c, begin + r);
        set_row(e, r, p);
      }
    }
    for (int start = 0; start < iterations_; start += chunk) {
      const int count = iterations_ - start < chunk ? iterations_ - start : chunk;
      __syncthreads();
      for (int k = 0; k < count; ++k) {
        for (int j = 4 * thread_; j < 2 * ld_; j += 4 * threads)
          copy_async(column_stage + 2 * k * ld_ + j, column_history(start + k, 0) + j);
        for (int which = 0; which < 2; ++which)
          for (int i = 4 * thread_; i < band_; i += 4 * threads)
            copy_async(row_stage + (2 * k + which) * band_ + i, row_history(start + k, which) + i);
      }
      copies_done();
      __syncthreads();
      if (begin >= rows_) continue;
      for (int k = 0; k < count; ++k) {
        float v[width], z[width];
        load(v, column_stage + 2 * k * ld_);
        load(z, column_stage + (2 * k + 1) * ld_);
        const float *u = row_stage + 2 * k * band_ + begin, *x = u + band_;
#pragma unroll
        for (int r = 0; r < group; ++r) {
#pragma unroll
          for (int c = 0; c < width; ++c) {
            float& to = correction[r][c];
            if constexpr (logarithmic) to += plan(e[r][c], u[r], v[c]) * (x[r] + z[c]);
            else to += x[r] * v[c], to += u[r] * z[c];
          }
        }
      }
    }
  }

  // dL/dS of row i, given its matrix part.
  __device__ __forceinline__ void finish_row(int i, float (&slope)[width]) {
    forget();
    const float u = rows_at(iterations_)[i], inverse_epsilon = in_.inverse_epsilon;
    float p[width], at_argmax = 0;
    probabilities(p, i);
    double mean = mean_cost()[i];
    if (in_.gradient == Gradient::implicit) {
      double dot = 0;
#pragma unroll
      for (int s = 0; s < strips; ++s) {
        const auto v = strip(columns_at(iterations_), s);
        const auto w = strip(shared_direction(), s);
#pragma unroll
        for (int j = 0, c = 4 * s; j < 4; ++j, ++c)
          dot += plan(stored(p[c], c, i), u, v.at[j]) * w.at[j];
      }
      mean -= warp_sum(dot) / row_mass()[i];
    }
#pragma unroll
    for (int s = 0; s < strips; ++s) {
      const auto v = strip(columns_at(iterations_), s);
      Quad<double> w{};
      if (in_.gradient == Gradient::implicit) w = strip(shared_direction(), s);
#pragma unroll
      for (int j = 0, c = 4 * s; j < 4; ++j, ++c) {
        const float e = stored(p[c], c, i), t = plan(e, u, v.at[j]);
        const double slack = cost<double>(p[c], c, i) - mean - w.at[j];
        if (in_.gradient == Gradient::detached) {
          slope[c] = -t;
        } else {
          const float corrected = logarithmic ? slope[c] : slope[c] * e;
          slope[c] = (t * static_cast<float>(slack) - corrected) * inverse_epsilon - t;
        }
        if (column(c) >= m_) slope[c] = 0;
        if (column(c) == argmax()[i]) at_argmax = slope[c];
      }
    }
    at_argmax = warp_sum(at_argmax);
    // Relative to the argmax, whose own p is all but 1 where the softmax saturates.
    float expected = 0;
#pragma unroll
    for (int c = 0; c < width; ++c) expected += p[c] * (slope[c] - at_argmax);
    expected = warp_sum(expected);
    const float weight = in_.problems.weights[q_];
#pragma unroll
    for (int c = 0; c < width; ++c) slope[c] = weight * p[c] * (slope[c] - at_argmax - expected);
    store(similarity_ + int64_t{i} * ld_, slope);
  }

  const Launch& in_;
  const int q_, n_;
  int m_, ld_, band_;
  const int rank_, begin_, rows_;
  int thread_, lane_, warp_;
  int iterations_ = 0, parity_ = 0, flip_ = 0;
  float* const similarity_;  // of the band
  float* const history_;     // of the problem, null without
  float resident_[resident][width] = {};
};
#endif

template <bool logarithmic, int strips, int warps, int resident>
__global__ void __launch_bounds__(32 * warps, 1) sinkhorn_cluster(const Launch in) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  Solver<logarithmic, strips, warps, resident>(in, blockIdx.x % in.cluster).run();
#endif
}

#ifdef __CUDACC__
constexpr int warps = 8;
constexpr int shared_limit = 227 * 1024;  // of a block, on sm_90 and sm_100

struct Configuration {
  int max_m, resident;
  void (*scaling)(Launch);
  void (*logarithmic)(Launch);
};

template <int strips, int resident>
constexpr Configuration configuration{128 * strips, resident,
                                      sinkhorn_cluster<false, strips, warps, resident>,
                                      sinkhorn_cluster<true, strips, warps, resident>};

// As many resident rows as leave registers for the rest; nvcc -Xptxas -v shows no spills.
const Configuration configurations[] = {configuration<2, 12>, configuration<4, 6>,
                                        configuration<5, 4>};

struct Choice {
  const Configuration* configuration;
  int cluster = 0;
  int64_t shared_bytes = 0;
};

Choice choose(int max_n, int max_m) {
  for (const Configuration& candidate : configurations) {
    if (max_m > candidate.max_m) continue;
    for (int cluster = 1; cluster <= largest_cluster; cluster *= 2) {
      const int ld = round4(max_m), band = round4((max_n + cluster - 1) / cluster);
      const int64_t bytes =
          4 * (vectors_size(ld, band, warps) + matrix_size(ld, band, candidate.resident * warps));
      if (bytes <= shared_limit) return {&candidate, cluster, bytes};
    }
    break;
  }
  return {nullptr};
}

}  // namespace

int cuda_cluster_size(int max_n, int max_m) { return choose(max_n, max_m).cluster; }

int64_t cuda_history_size(int max_n, int max_m, int num_iters) {
  const int cluster = choose(max_n, max_m).cluster;
  const int64_t ldn = cluster ? round4((max_n + cluster - 1) / cluster) * cluster : 0;
  return 2 * (int64_t{num_iters} + 1) * (ldn + round4(max_m));
}

void cuda_solve(const CudaProblems& problems, const CudaSettings& settings,
                const CudaResults& results, float* history, int device, void* stream) {
  const Choice choice = choose(problems.max_n, problems.max_m);
  const auto check = [&](cudaError_t status, const std::string& what) {
    if (status == cudaSuccess) return;
    cudaGetLastError();  // else the next kernel launch would be blamed for it
    throw std::runtime_error(
        "sinkhorn_cluster, " + std::to_string(problems.count) + " problems of at most " +
        std::to_string(problems.max_n) + " x " + std::to_string(problems.max_m) +
        " in clusters of " + std::to_string(choice.cluster) + " blocks with " +
        std::to_string(choice.shared_bytes) + " bytes of shared memory: " + what + ": " +
        cudaGetErrorString(status));
  };
  if (choice.cluster == 0) check(cudaErrorInvalidValue, "no configuration holds them");
  if (problems.count == 0) return;
  const float inverse_epsilon = static_cast<float>(1 / settings.epsilon);
  const auto kernel = inverse_epsilon > largest_exponent ? choice.configuration->logarithmic
                                                         : choice.configuration->scaling;
  const Launch launch{problems,
                      results,
                      inverse_epsilon,
                      settings.tol,
                      settings.num_iters,
                      settings.gradient,
                      choice.cluster,
                      choice.shared_bytes,
                      history,
                      cuda_history_size(problems.max_n, problems.max_m, settings.num_iters)};
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(choice.cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(problems.count * choice.cluster);
  config.blockDim = dim3(32 * warps);
  config.dynamicSmemBytes = choice.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = 1;

  check(cudaSetDevice(device), "cudaSetDevice");
  static std::mutex mutex;
  static std::set<std::tuple<int, void (*)(Launch), int, int64_t>> launched;
  const std::tuple key{device, kernel, choice.cluster, choice.shared_bytes};
  const std::lock_guard<std::mutex> lock(mutex);
  if (launched.count(key) == 0) {
    // The same for every launch of this kernel, whatever its size.
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_limit),
          "cudaFuncSetAttribute");
    cudaFuncAttributes attributes;
    check(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
    if (attributes.ptxVersion < 90)
      check(cudaErrorNoKernelImageForDevice, "compiled for no architecture with clusters");
    int clusters = 0;
    check(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config),
          "cudaOccupancyMaxActiveClusters");
    if (clusters == 0) check(cudaErrorLaunchOutOfResources, "the device holds no such cluster");
    launched.insert(key);
  }
  check(cudaLaunchKernelEx(&config, kernel, launch), "cudaLaunchKernelEx");
}
#else
}  // namespace
#endif

}  // namespace cot2align
