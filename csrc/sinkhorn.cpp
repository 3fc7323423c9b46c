// The OT loss on the CPU: similarity, softmax, cost, Sinkhorn, loss and the exact gradient, problem
// by problem.
//
// For a problem with N student tokens X and M projected teacher tokens Z (a = 1/N, b = 1/M):
//
//     S = scale X Z^T        p = softmax of S's rows        C = 1 - p        E = exp(-C / epsilon)
//     v_k = b / (E^T u_{k-1})       u_k = a / (E v_k)       u_0 = 1          k = 1..K
//     T = diag(u_K) E diag(v_K)     W = T * C               loss = sum W
//
// and backwards through exactly these K iterations, from fbar = W 1, gbar = W^T 1:
//
// clang-format off
//     x_k = fbar u_k / a     gbar -= v_k (E^T x_k)
//     y_k = gbar v_k / b     fbar = -u_{k-1} (E y_k)     gbar = 0
//     dL/dp = -T + (W - E * sum_k (x_k v_k^T + u_{k-1} y_k^T)) / epsilon
//     dS = p * (dL/dp - rowsum(p * dL/dp))     dX = scale dS Z     dZ = scale dS^T X
// clang-format on
//
// Each iteration, in either direction, reads the matrix once: a row's dot product gives the row's
// new value, which adds the row to the next column sums at once (`sweep`). Where 1/epsilon is so
// large that E leaves the range of float, the same iterations run on logarithms
// (`iterate_logarithms`). A thread holds the matrices of one problem (p, and E, which the gradient
// overwrites) and the history of its vectors, 2 (N + M) floats an iteration; problems share tokens
// through `pairs`.
//
// Threads: problems that share a text form a group and are solved in order by one thread, so that
// the sum of their gradients has one order; a group that would keep the others waiting, or whose
// matrix outgrows a core's cache, is solved by all threads together, each owning a block of rows.
// The same input and number of threads give the same bits.

#include "sinkhorn.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <numeric>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace cot2align {
namespace COT2ALIGN_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int lanes = 16, tile_rows = 8;
#elif defined(__AVX2__)
constexpr int lanes = 8, tile_rows = 6;
#else
constexpr int lanes = 4, tile_rows = 4;
#endif
constexpr int tile_cols = 2 * lanes;

typedef float Vec __attribute__((vector_size(lanes * sizeof(float))));
typedef uint32_t BitVec __attribute__((vector_size(lanes * sizeof(uint32_t))));
typedef int32_t IntVec __attribute__((vector_size(lanes * sizeof(int32_t))));

inline Vec load(const float* at) {
  Vec v;
  std::memcpy(&v, at, sizeof v);
  return v;
}
inline void store(float* at, Vec v) { std::memcpy(at, &v, sizeof v); }
inline Vec splat(float value) { return Vec{} + value; }
inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }

inline float sum(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  for (int width = lanes / 2; width > 0; width /= 2)
    for (int l = 0; l < width; ++l) v[l] += v[l + width];
  return v[0];
#endif
}

// e^x for x <= 88, to 2 units in the last place; 0 below the smallest normal float.
inline Vec exp(Vec x) {
  const Vec magic =
      splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const Vec shifted = x * 1.44269504f + magic;
  const Vec n = shifted - magic;
  const Vec r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  Vec poly = splat(1.98412698e-4f);
  poly = poly * r + 1.38888889e-3f;
  poly = poly * r + 8.33333333e-3f;
  poly = poly * r + 4.16666667e-2f;
  poly = poly * r + 1.66666667e-1f;
  poly = poly * r + 0.5f;
  poly = poly * r + 1.f;
  poly = poly * r + 1.f;
  BitVec bits, power;
  std::memcpy(&bits, &poly, sizeof bits);
  std::memcpy(&power, &shifted, sizeof power);
  bits += power << 23;
  Vec result;
  std::memcpy(&result, &bits, sizeof result);
  return x < -87.f ? Vec{} : result;
}

// ---------------------------------------------------------------------------------------------------------------
// Matrix product on strided operands: C (m, n) = alpha A B, or += where `add`; A(i, k) = a[i *
// a_row + k * a_col]. One stride of each operand is 1. Blocks of both are packed as panels that the
// innermost loop reads in order: B's in the second-level cache, A's in half of the first.

constexpr int64_t depth_block = 256, col_block = 512, row_block = 64 / tile_rows * tile_rows;

struct PackBuffer {
  alignas(64) float a[row_block * depth_block];
  alignas(64) float b[col_block * depth_block];
};

// to[k * width + i] = from(i, k), i < count <= width and k < depth, 0 for the other i.
template <int width>
void pack_panel(const float* from, int64_t stride_i, int64_t stride_k, int64_t count, int64_t depth,
                float* to) {
  if (count < width) std::fill_n(to, depth * width, 0.f);
  if (stride_i == 1) {
    for (int64_t k = 0; k < depth; ++k) {
      if (count == width) std::copy_n(from + k * stride_k, width, to + k * width);
      else std::copy_n(from + k * stride_k, count, to + k * width);
    }
    return;
  }
  int64_t i = 0;
#if defined(__x86_64__)
  const int64_t quads = depth / 4 * 4;
  for (; i + 4 <= count; i += 4) {
    const float* at = from + i * stride_i;
    for (int64_t k = 0; k < quads; k += 4) {
      __m128 r0 = _mm_loadu_ps(at + k), r1 = _mm_loadu_ps(at + stride_i + k),
             r2 = _mm_loadu_ps(at + 2 * stride_i + k), r3 = _mm_loadu_ps(at + 3 * stride_i + k);
      _MM_TRANSPOSE4_PS(r0, r1, r2, r3);
      float* into = to + k * width + i;
      _mm_storeu_ps(into, r0);
      _mm_storeu_ps(into + width, r1);
      _mm_storeu_ps(into + 2 * width, r2);
      _mm_storeu_ps(into + 3 * width, r3);
    }
    for (int64_t k = quads; k < depth; ++k)
      for (int64_t l = 0; l < 4; ++l) to[k * width + i + l] = at[l * stride_i + k];
  }
#endif
  for (; i < count; ++i)
    for (int64_t k = 0; k < depth; ++k) to[k * width + i] = from[i * stride_i + k];
}

void gemm(int64_t m, int64_t n, int64_t depth, float alpha, const float* a, int64_t a_row,
          int64_t a_col, const float* b, int64_t b_row, int64_t b_col, float* c, int64_t c_row,
          bool add, PackBuffer& pack) {
  if (depth == 0 && !add) {
    for (int64_t i = 0; i < m; ++i) std::fill_n(c + i * c_row, n, 0.f);
  }
  for (int64_t j0 = 0; j0 < n; j0 += col_block) {
    const int64_t nj = std::min(col_block, n - j0);
    for (int64_t k0 = 0; k0 < depth; k0 += depth_block) {
      const int64_t nk = std::min(depth_block, depth - k0);
      for (int64_t jt = 0; jt < nj; jt += tile_cols)
        pack_panel<tile_cols>(b + k0 * b_row + (j0 + jt) * b_col, b_col, b_row,
                              std::min<int64_t>(tile_cols, nj - jt), nk, pack.b + jt * nk);
      const bool accumulate = add || k0 > 0;
      for (int64_t i0 = 0; i0 < m; i0 += row_block) {
        const int64_t ni = std::min(row_block, m - i0);
        for (int64_t it = 0; it < ni; it += tile_rows)
          pack_panel<tile_rows>(a + (i0 + it) * a_row + k0 * a_col, a_row, a_col,
                                std::min<int64_t>(tile_rows, ni - it), nk, pack.a + it * nk);
        for (int64_t it = 0; it < ni; it += tile_rows) {
          for (int64_t jt = 0; jt < nj; jt += tile_cols) {
            const int64_t height = std::min<int64_t>(tile_rows, ni - it),
                          width = std::min<int64_t>(tile_cols, nj - jt);
            const float *left = pack.a + it * nk, *right = pack.b + jt * nk;
            Vec tile[tile_rows][2] = {};
            for (int64_t k = 0; k < nk; ++k) {
              const Vec b0 = load(right + k * tile_cols), b1 = load(right + k * tile_cols + lanes);
#pragma GCC unroll 16
              for (int i = 0; i < tile_rows; ++i) {
                const float factor = left[k * tile_rows + i];
                tile[i][0] += factor * b0;
                tile[i][1] += factor * b1;
              }
            }
            float* to = c + (i0 + it) * c_row + j0 + jt;
            if (width == tile_cols) {
              for (int64_t i = 0; i < height; ++i) {
                for (int h = 0; h < 2; ++h) {
                  float* at = to + i * c_row + h * lanes;
                  const Vec value = alpha * tile[i][h];
                  store(at, accumulate ? load(at) + value : value);
                }
              }
            } else {
              for (int64_t i = 0; i < height; ++i)
                for (int64_t j = 0; j < width; ++j) {
                  const float value = alpha * tile[i][j / lanes][j % lanes];
                  to[i * c_row + j] = accumulate ? to[i * c_row + j] + value : value;
                }
            }
          }
        }
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------
// Threads that solve one problem together.

class Barrier {
 public:
  explicit Barrier(int size) : size_(size) {}
  void resize(int size) { size_ = size; }
  void wait() {
    if (size_ == 1) return;
    const int phase = phase_.load(std::memory_order_relaxed);
    if (waiting_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
      waiting_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; ++spins) {
      if (spins < 1024) relax();
      else std::this_thread::yield();
    }
  }

 private:
  static void relax() {
#if defined(__x86_64__)
    _mm_pause();
#endif
  }
  int size_;
  std::atomic<int> waiting_{0}, phase_{0};
};

struct Team {
  int rank, size;
  Barrier* barrier;
  // This member's part of `total` things, cut at multiples of `grain`.
  std::pair<int64_t, int64_t> part(int64_t total, int64_t grain) const {
    const int64_t grains = (total + grain - 1) / grain;
    return {std::min(total, grains * rank / size * grain),
            std::min(total, grains * (rank + 1) / size * grain)};
  }
};

// One block of memory, cut into aligned arrays.
class Arena {
 public:
  static int64_t rounded(int64_t count) { return (count + 15) / 16 * 16; }
  void reserve(int64_t count) {
    if (count <= capacity_) return;
    const size_t size = count * sizeof(float), page = 2 << 20;
    const size_t align = size < 2 * page ? 64 : page;
    block_.reset(static_cast<float*>(std::aligned_alloc(align, (size + align - 1) / align * align)));
    if (!block_) throw std::bad_alloc();
#ifdef __linux__
    // The first touch of a small page costs as much as a few reads of it.
    if (align == page) madvise(block_.get(), size, MADV_HUGEPAGE);
#endif
    capacity_ = count;
  }
  struct Cursor {
    float* at;
    float* take(int64_t count) {
      float* start = at;
      at += rounded(count);
      return start;
    }
  };
  Cursor start() const { return {block_.get()}; }

 private:
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  std::unique_ptr<float, Free> block_;
  int64_t capacity_ = 0;
};

// ---------------------------------------------------------------------------------------------------------------

// The matrix p, with the entry of each row's argmax kept as its cost, sign bit set: 1 - p cancels
// there.
inline Vec probability(Vec kept) { return (IntVec)kept < 0 ? 1.f + kept : kept; }
inline double cost_at(float kept) { return std::signbit(kept) ? -double(kept) : 1. - kept; }
inline Vec cost(Vec kept) { return (IntVec)kept < 0 ? -kept : 1.f - kept; }

// to (ld) = sum over rows i in [first, last) of row(i, matrix_i . v) matrix_i: one read of the
// matrix.
template <class Row>
void sweep(const float* matrix, int64_t ld, int64_t first, int64_t last, const float* v, float* to,
           Row row) {
  std::fill_n(to, ld, 0.f);
  int64_t i = first;
  for (; i + 4 <= last; i += 4) {
    const float *m0 = matrix + i * ld, *m1 = m0 + ld, *m2 = m1 + ld, *m3 = m2 + ld;
    Vec d0{}, d1{}, d2{}, d3{};
    for (int64_t j = 0; j < ld; j += lanes) {
      const Vec vj = load(v + j);
      d0 += load(m0 + j) * vj;
      d1 += load(m1 + j) * vj;
      d2 += load(m2 + j) * vj;
      d3 += load(m3 + j) * vj;
    }
    const float c0 = row(i, sum(d0)), c1 = row(i + 1, sum(d1)), c2 = row(i + 2, sum(d2)),
                c3 = row(i + 3, sum(d3));
    for (int64_t j = 0; j < ld; j += lanes) {
      Vec total = load(to + j);
      total += c0 * load(m0 + j);
      total += c1 * load(m1 + j);
      total += c2 * load(m2 + j);
      total += c3 * load(m3 + j);
      store(to + j, total);
    }
  }
  for (; i < last; ++i) {
    const float* m = matrix + i * ld;
    Vec d{};
    for (int64_t j = 0; j < ld; j += lanes) d += load(m + j) * load(v + j);
    const float c = row(i, sum(d));
    for (int64_t j = 0; j < ld; j += lanes) store(to + j, load(to + j) + c * load(m + j));
  }
}

constexpr float never = -1e30f;  // a logarithm of nothing that stays finite under addition
// 1/epsilon up to which products of E's, u's and v's entries fit in float.
constexpr float largest_exponent = 64;
constexpr int64_t block_entries = 128 << 10;  // 512 KiB

// One problem, as seen by one member of the team that solves it. Of the arrays that `take` cuts
// from `shared` each member writes its own rows (or rank 0 the columns); those from `own` are its
// own.
class Solver {
 public:
  Solver(const Problems& problems, const Settings& settings, int64_t problem, Team team)
      : in_(problems), set_(settings), team_(team), q_(problem) {
    const int64_t* x = in_.segments_x + 2 * in_.pairs[2 * q_];
    const int64_t* z = in_.segments_z + 2 * in_.pairs[2 * q_ + 1];
    first_x_ = x[0], n_ = x[1], first_z_ = z[0], m_ = z[1];
    ld_ = Arena::rounded(m_), ldn_ = Arena::rounded(n_);
    std::tie(begin_, end_) = team_.part(n_, tile_rows);
    inverse_epsilon_ = static_cast<float>(1 / set_.epsilon);
    logarithmic_ = logarithmic(set_);
  }

  static bool logarithmic(const Settings& set) {
    return static_cast<float>(1 / set.epsilon) > largest_exponent;
  }
  // dS lies over E, but for the iterations on logarithms, which need both.
  static bool apart(const Settings& set) {
    return set.gradient == Gradient::unrolled && logarithmic(set);
  }
  // The rows whose correction is made at once, to be read from the second-level cache.
  static int64_t block_rows(int64_t ld) {
    return std::max<int64_t>(tile_rows, block_entries / ld / tile_rows * tile_rows);
  }

  static int64_t shared_size(int64_t n, int64_t m, const Settings& set, int members) {
    const int64_t ld = Arena::rounded(m), ldn = Arena::rounded(n), k = set.num_iters;
    const bool history = set.gradient == Gradient::unrolled;
    int64_t size = (apart(set) ? 3 : 2) * n * ld + 3 * ldn;  // p, E, dS; argmax, row values
    size +=
        2 * members * 2 * ld + 2 * 16 * members;  // column sums, loss and validity of each member
    return size + (history ? (2 * k + 1) * ldn + 2 * k * ld : 2 * ldn + ld) + 16 * 16;
  }
  static int64_t own_size(int64_t n, int64_t m) {
    const int64_t ld = Arena::rounded(m);
    return 16 * ld + Arena::rounded(std::min(n * ld, std::max(block_entries, tile_rows * ld)));
  }

  // add_x, add_z: add to the gradient's rows (an earlier problem wrote them) rather than write
  // them.
  void run(const Arena& shared, const Arena& own, PackBuffer& pack, bool add_x, bool add_z,
           const Results& out) {
    take(shared.start(), own.start());
    if (!prepare(pack)) return give_up(out);
    if (logarithmic_) iterate_logarithms();
    else iterate();
    const bool gradient = set_.gradient != Gradient::none && in_.weights[q_] != 0;
    const float loss = finish(gradient);
    if (team_.rank == 0) {
      out.loss[q_] = loss;
      out.num_iters[q_] = iterations_;
      out.marginal_error[q_] = marginal_error_;
    }
    if (gradient) {
      if (set_.gradient == Gradient::unrolled) {
        if (logarithmic_) reverse_logarithms();
        else reverse();
      } else if (set_.gradient == Gradient::implicit) {
        solve_fixed_point();
      }
      similarity_gradient(pack);
    }
    const int64_t dim = in_.dim;
    const float factor = in_.weights[q_] * set_.scale;
    if (out.dx) {
      float* dx = out.dx + (first_x_ + begin_) * dim;
      if (gradient)
        gemm(end_ - begin_, dim, m_, factor, ds_ + begin_ * ld_, ld_, 1, in_.z + first_z_ * dim,
             dim, 1, dx, dim, add_x, pack);
      else if (!add_x) std::fill_n(dx, (end_ - begin_) * dim, 0.f);
    }
    if (out.dz) {
      team_.barrier->wait();  // for the other members' rows of dS
      const auto [first, last] = team_.part(m_, tile_rows);
      float* dz = out.dz + (first_z_ + first) * dim;
      if (gradient)
        gemm(last - first, dim, n_, factor, ds_ + first, 1, ld_, in_.x + first_x_ * dim, dim, 1, dz,
             dim, add_z, pack);
      else if (!add_z) std::fill_n(dz, (last - first) * dim, 0.f);
    }
  }

 private:
  void take(Arena::Cursor shared, Arena::Cursor own) {
    const int64_t k = set_.num_iters;
    const bool history = set_.gradient == Gradient::unrolled;
    p_ = shared.take(n_ * ld_);
    e_ = shared.take(n_ * ld_);
    ds_ = apart(set_) ? shared.take(n_ * ld_) : e_;
    argmax_ = reinterpret_cast<int32_t*>(shared.take(ldn_));
    row_ = reinterpret_cast<double*>(shared.take(2 * ldn_));
    columns_ = shared.take(2 * team_.size * 2 * ld_);
    parts_ = shared.take(2 * 16 * team_.size);
    u_ = shared.take((history ? 2 * k + 1 : 2) * ldn_);
    if (history) v_ = shared.take(2 * k * ld_);
    float** const mine[] = {&v_now_, &total_, &spread_, &t_, &y_now_};
    for (float** array : mine) {
      *array = own.take(ld_);
      std::fill_n(*array, ld_, 0.f);
    }
    double_ = reinterpret_cast<double*>(own.take(10 * ld_));
    correction_ = own.take(std::min(n_, block_rows(ld_)) * ld_);
  }

  // The history, for the unrolled gradient: u_0 x_1 u_1 x_2 .. u_K and y_1 v_1 y_2 v_2 .. (f and g for
  // u and v in logarithms), so that sum_k u_{k-1} y_k^T + x_k v_k^T is one product. Else the last u.
  float* u_at(int64_t k) { return u_ + (v_ ? 2 * k : k != 0) * ldn_; }
  float* x_at(int64_t k) { return u_ + (2 * k - 1) * ldn_; }
  float* y_at(int64_t k) { return v_ + (2 * k - 2) * ld_; }
  float* v_at(int64_t k) { return v_ + (2 * k - 1) * ld_; }

  // The member's column sums of a sweep; two sets, so that one barrier a sweep is enough.
  float* my_columns(int of = 0) {
    return columns_ + ((2 * parity_ + of) * team_.size + team_.rank) * ld_;
  }

  // Waits for every member's column sums and adds them up, in order; `second`: of the second set.
  void add_columns(float* second = nullptr) {
    team_.barrier->wait();
    const float* from = columns_ + 2 * parity_ * team_.size * ld_;
    std::copy_n(from, ld_, total_);
    for (int t = 1; t < team_.size; ++t)
      for (int64_t j = 0; j < ld_; ++j) total_[j] += from[t * ld_ + j];
    if (second) {
      const float* of = from + team_.size * ld_;
      std::copy_n(of, ld_, second);
      for (int t = 1; t < team_.size; ++t)
        for (int64_t j = 0; j < ld_; ++j) second[j] += of[t * ld_ + j];
    }
    parity_ ^= 1;
  }

  // S, p and E (-C / epsilon in logarithms) of the member's rows, and E's column sums; false where S
  // is not finite somewhere.
  bool prepare(PackBuffer& pack) {
    gemm(end_ - begin_, m_, in_.dim, 1, in_.x + (first_x_ + begin_) * in_.dim, in_.dim, 1,
         in_.z + first_z_ * in_.dim, 1, in_.dim, p_ + begin_ * ld_, ld_, false, pack);
    const float lowest = std::numeric_limits<float>::lowest();
    float finite = 0, *columns = my_columns();
    std::fill_n(columns, ld_, 0.f);
    for (int64_t i = begin_; i < end_; ++i) {
      float* p = p_ + i * ld_;
      float* e = e_ + i * ld_;
      std::fill(p + m_, p + ld_, lowest);
      // The largest entry and where it first is: the stretch of 256, then the place.
      float largest = lowest;
      int64_t at = 0;
      Vec check{};
      for (int64_t from = 0; from < ld_; from += 256) {
        Vec top = splat(lowest);
        for (int64_t j = from; j < std::min(ld_, from + 256); j += lanes) {
          top = larger(load(p + j), top);
          check += load(p + j) * 0.f;
        }
        for (int l = 0; l < lanes; ++l)
          if (top[l] > largest) largest = top[l], at = from;
      }
      finite += sum(check);
      at = std::find(p + at, p + m_ - 1, largest) - p;
      p[at] = lowest;
      Vec others{};
      for (int64_t j = 0; j < ld_; j += lanes) {
        const Vec exponential = exp((load(p + j) - largest) * set_.scale);
        others += exponential;
        store(p + j, exponential);
      }
      const float rest = sum(others), inverse_total = 1 / (1 + rest);
      for (int64_t j = 0; j < ld_; j += lanes) store(p + j, load(p + j) * inverse_total);
      p[at] = std::copysign(rest * inverse_total, -1.f);
      argmax_[i] = static_cast<int32_t>(at);
      for (int64_t j = 0; j < ld_; j += lanes) {
        const Vec exponent = cost(load(p + j)) * -inverse_epsilon_;
        store(e + j, logarithmic_ ? exponent : exp(exponent));
      }
      std::fill(e + m_, e + ld_, logarithmic_ ? never : 0.f);
      for (int64_t j = 0; j < ld_; j += lanes) store(columns + j, load(columns + j) + load(e + j));
    }
    parts_[16 * team_.rank] = finite;
    team_.barrier->wait();
    for (int t = 1; t < team_.size; ++t) finite += parts_[16 * t];
    return parts_[0] * 0.f + finite * 0.f == 0.f;
  }

  // NaN in: NaN out, for this problem and the tokens that it aligns.
  void give_up(const Results& out) {
    const float nan = std::numeric_limits<float>::quiet_NaN();
    if (team_.rank != 0) return;
    out.loss[q_] = out.marginal_error[q_] = nan;
    out.num_iters[q_] = set_.num_iters;
    if (out.dx) std::fill_n(out.dx + first_x_ * in_.dim, n_ * in_.dim, nan);
    if (out.dz) std::fill_n(out.dz + first_z_ * in_.dim, m_ * in_.dim, nan);
  }

  // The plan's column sums are in spread_; true where the problem is done.
  bool converged() {
    float error = 0;
    for (int64_t j = 0; j < m_; ++j) error += std::abs(spread_[j] - 1.f / m_);
    marginal_error_ = error;
    return set_.tol > 0 && error <= set_.tol;
  }

  void iterate() {
    const float a = 1.f / n_, b = 1.f / m_;
    std::fill(u_at(0) + begin_, u_at(0) + end_, 1.f);
    add_columns();  // of E, from `prepare`
    for (iterations_ = 1;; ++iterations_) {
      for (int64_t j = 0; j < m_; ++j) v_now_[j] = b / total_[j];
      if (v_ && team_.rank == 0) std::copy_n(v_now_, ld_, v_at(iterations_));
      float* u = u_at(iterations_);
      sweep(e_, ld_, begin_, end_, v_now_, my_columns(),
            [=](int64_t i, float dot) { return u[i] = a / dot; });
      add_columns();
      for (int64_t j = 0; j < m_; ++j) spread_[j] = v_now_[j] * total_[j];
      if (converged() || iterations_ == set_.num_iters) return;
    }
  }

  // The plan's row i into t_.
  void plan_row(int64_t i) {
    const float* e = e_ + i * ld_;
    const float u = u_at(iterations_)[i];
    if (logarithmic_) {
      for (int64_t j = 0; j < ld_; j += lanes)
        store(t_ + j, exp(load(e + j) + load(v_now_ + j) + u));
    } else {
      for (int64_t j = 0; j < ld_; j += lanes) store(t_ + j, u * load(e + j) * load(v_now_ + j));
    }
  }

  // The loss; for a gradient also row_ = W 1 / T 1, the mean cost of a row, in total_ the column
  // sums of T * (C - row_), and, for the implicit gradient, the plan in E's place. T's rows sum to
  // 1/N but for rounding; their own sums are taken because C - row_ cancels where a row goes to one
  // column.
  float finish(bool gradient) {
    double loss = 0;
    float* columns = my_columns();
    std::fill_n(columns, ld_, 0.f);
    for (int64_t i = begin_; i < end_; ++i) {
      plan_row(i);
      const float* p = p_ + i * ld_;
      Vec weighted{}, mass{};
      for (int64_t j = 0; j < ld_; j += lanes) {
        weighted += load(t_ + j) * cost(load(p + j));
        mass += load(t_ + j);
      }
      loss += sum(weighted);
      if (!gradient) continue;
      const float mean = sum(weighted) / sum(mass);
      row_[i] = mean;
      for (int64_t j = 0; j < ld_; j += lanes)
        store(columns + j, load(columns + j) + load(t_ + j) * (cost(load(p + j)) - mean));
      if (set_.gradient == Gradient::implicit) std::copy_n(t_, ld_, e_ + i * ld_);
    }
    parts_[16 * (team_.size + team_.rank)] = static_cast<float>(loss);
    add_columns();
    for (int t = 0; t < team_.size; ++t)
      if (t != team_.rank) loss += parts_[16 * (team_.size + t)];
    return static_cast<float>(loss);
  }

  void reverse() {
    const float rows = n_, columns = m_;
    for (int64_t j = 0; j < m_; ++j)
      total_[j] *= -1 / v_now_[j];  // as a sweep would have left it: -gbar / v
    for (int64_t i = begin_; i < end_; ++i)
      x_at(iterations_)[i] = static_cast<float>(row_[i]) * u_at(iterations_)[i];
    for (int64_t k = iterations_; k >= 1; --k) {
      const float* v = v_at(k);
      for (int64_t j = 0; j < m_; ++j) y_now_[j] = -total_[j] * v[j] * v[j] * columns;
      if (team_.rank == 0) std::copy_n(y_now_, ld_, y_at(k));
      if (k == 1) break;
      const float* u = u_at(k - 1);
      float* x = x_at(k - 1);
      sweep(e_, ld_, begin_, end_, y_now_, my_columns(),
            [=](int64_t i, float dot) { return x[i] = -u[i] * dot * u[i] * rows; });
      add_columns();
    }
    team_.barrier->wait();
  }

  // ---- the same on logarithms: f, g in the places of u, v

  // Column log-sum-exps are built row by row: the largest so far and the sum relative to it.
  void add_logarithms(float* top, float* relative, const float* matrix, float f) {
    for (int64_t j = 0; j < ld_; j += lanes) {
      const Vec term = load(matrix + j) + f, old = load(top + j), s = load(relative + j),
                rise = term - old;
      const Vec small = exp(-larger(rise, -rise));
      store(relative + j, rise > 0 ? s * small + 1.f : s + small);
      store(top + j, larger(term, old));
    }
  }

  void add_column_logarithms() {
    team_.barrier->wait();
    const float* top = columns_ + 2 * parity_ * team_.size * ld_;
    const float* relative = top + team_.size * ld_;
    for (int64_t j = 0; j < m_; ++j) {
      float largest = top[j];
      for (int t = 1; t < team_.size; ++t) largest = std::max(largest, top[t * ld_ + j]);
      float total = 0;
      for (int t = 0; t < team_.size; ++t)
        total += relative[t * ld_ + j] * std::exp(top[t * ld_ + j] - largest);
      total_[j] = largest + std::log(total);
    }
    parity_ ^= 1;
  }

  void iterate_logarithms() {
    const float log_a = -std::log(static_cast<float>(n_)),
                log_b = -std::log(static_cast<float>(m_));
    std::fill(u_at(0) + begin_, u_at(0) + end_, 0.f);
    for (iterations_ = 0;; ++iterations_) {
      float *f = u_at(iterations_), *top = my_columns(0), *relative = my_columns(1);
      std::fill_n(top, ld_, never);
      std::fill_n(relative, ld_, 0.f);
      for (int64_t i = begin_; i < end_; ++i) {
        const float* e = e_ + i * ld_;
        if (iterations_ > 0) {
          Vec largest = splat(never);
          for (int64_t j = 0; j < ld_; j += lanes)
            largest = larger(load(e + j) + load(v_now_ + j), largest);
          float row_top = largest[0];
          for (int l = 1; l < lanes; ++l) row_top = std::max(row_top, largest[l]);
          Vec total{};
          for (int64_t j = 0; j < ld_; j += lanes)
            total += exp(load(e + j) + load(v_now_ + j) - row_top);
          f[i] = log_a - row_top - std::log(sum(total));
        }
        add_logarithms(top, relative, e, f[i]);
      }
      add_column_logarithms();
      if (iterations_ > 0) {
        for (int64_t j = 0; j < m_; ++j) spread_[j] = std::exp(total_[j] + v_now_[j]);
        if (converged() || iterations_ == set_.num_iters) return;
      }
      for (int64_t j = 0; j < m_; ++j) v_now_[j] = log_b - total_[j];
      if (v_ && team_.rank == 0) std::copy_n(v_now_, ld_, v_at(iterations_ + 1));
    }
  }

  // Adds row i of the plan after the column half of iteration k. Its columns sum to 1/M only but
  // for the rounding of f and g, which 1/epsilon magnifies: the gradient divides by their own sums.
  void add_masses(float* masses, int64_t i, int64_t k) {
    const float *e = e_ + i * ld_, *g = v_at(k);
    const float f = u_at(k - 1)[i];
    for (int64_t j = 0; j < ld_; j += lanes)
      store(masses + j, load(masses + j) + exp(load(e + j) + load(g + j) + f));
  }

  // Leaves sum_k (x_k v_k^T + u_{k-1} y_k^T) * E - W in ds_; W - x_K v_K^T * E is summed first,
  // since it cancels.
  void reverse_logarithms() {
    float* masses = my_columns(1);
    std::fill_n(my_columns(), ld_, 0.f);
    std::fill_n(masses, ld_, 0.f);
    for (int64_t i = begin_; i < end_; ++i) {
      plan_row(i);
      for (int64_t j = 0; j < ld_; j += lanes)
        store(ds_ + i * ld_ + j,
              load(t_ + j) * (static_cast<float>(row_[i]) - cost(load(p_ + i * ld_ + j))));
      add_masses(masses, i, iterations_);
    }
    std::copy_n(total_, ld_, t_);  // gbar of the last iteration, from `finish`
    add_columns(spread_);
    for (int64_t j = 0; j < m_; ++j) total_[j] = -t_[j];  // as a sweep would have left it
    for (int64_t k = iterations_; k >= 1; --k) {
      for (int64_t j = 0; j < m_; ++j) y_now_[j] = -total_[j] / spread_[j];
      const float *f = u_at(k - 1), *g = v_at(k), *g_before = v_at(k - 1);
      float* sums = my_columns();
      masses = my_columns(1);
      std::fill_n(sums, ld_, 0.f);
      std::fill_n(masses, ld_, 0.f);
      for (int64_t i = begin_; i < end_; ++i) {
        const float* e = e_ + i * ld_;
        float* correction = ds_ + i * ld_;
        Vec dot{};
        for (int64_t j = 0; j < ld_; j += lanes) {
          const Vec term = exp(load(e + j) + load(g + j) + f[i]) * load(y_now_ + j);
          dot += term;
          store(correction + j, load(correction + j) + term);
        }
        if (k == 1) continue;
        Vec mass{};
        for (int64_t j = 0; j < ld_; j += lanes) {
          const Vec plan = exp(load(e + j) + load(g_before + j) + f[i]);
          mass += plan;
          store(t_ + j, plan);
        }
        const float x = -sum(dot) / sum(mass);
        for (int64_t j = 0; j < ld_; j += lanes) {
          const Vec term = load(t_ + j) * x;
          store(sums + j, load(sums + j) + term);
          store(correction + j, load(correction + j) + term);
        }
        add_masses(masses, i, k - 1);
      }
      if (k > 1) add_columns(spread_);
    }
  }

  // ---- the gradient at the fixed point

  // to = sum over the member's rows of (T_i . d) / r_i T_i, in double: the system is singular along
  // the constants and nearly so wherever the plan falls into blocks, which single precision does
  // not survive.
  template <class Row>
  void sweep_plan(const double* d, double* to, Row row) {
    std::fill_n(to, m_, 0.);
    for (int64_t i = begin_; i < end_; ++i) {
      const float* plan = e_ + i * ld_;
      double dot = 0, mass = 0;
#pragma omp simd reduction(+ : dot, mass)
      for (int64_t j = 0; j < m_; ++j) {
        dot += plan[j] * d[j];
        mass += plan[j];
      }
      const double factor = row(i, dot, mass);
#pragma omp simd
      for (int64_t j = 0; j < m_; ++j) to[j] += factor * plan[j];
    }
  }

  void add_double_columns(double* total) {
    team_.barrier->wait();
    const float* from = columns_ + 2 * parity_ * team_.size * ld_;
    std::fill_n(total, m_, 0.);
    for (int t = 0; t < team_.size; ++t) {
      const double* part = reinterpret_cast<const double*>(from + 2 * t * ld_);
      for (int64_t j = 0; j < m_; ++j) total[j] += part[j];
    }
    parity_ ^= 1;
  }
  double* my_double_columns() {
    return reinterpret_cast<double*>(columns_ + 2 * (parity_ * team_.size + team_.rank) * ld_);
  }

  // Conjugate gradients, preconditioned by diag(c), for (diag(c) - T^T diag(1/r) T) w = column sums
  // of T * (C - row_), r and c the plan's own sums; then row_ = z = (W 1 - T w) / r.
  void solve_fixed_point() {
    const auto projected = [](int64_t, double dot, double mass) {
      return mass > 0 ? dot / mass : 0;
    };
    double *c = double_, *w = c + ld_, *residual = w + ld_, *direction = residual + ld_,
           *product = direction + ld_;
    std::fill_n(w, m_, 0.);
    std::fill_n(direction, m_, 0.);
    sweep_plan(w, my_double_columns(), [](int64_t, double, double) { return 1; });
    add_double_columns(c);
    double* sums = my_double_columns();
    std::fill_n(sums, m_, 0.);
    for (int64_t i = begin_; i < end_; ++i) {
      const float *plan = e_ + i * ld_, *p = p_ + i * ld_;
      double weighted = 0, mass = 0;
      for (int64_t j = 0; j < m_; ++j) weighted += plan[j] * cost_at(p[j]), mass += plan[j];
      row_[i] = weighted / mass;
      for (int64_t j = 0; j < m_; ++j) sums[j] += plan[j] * (cost_at(p[j]) - row_[i]);
    }
    add_double_columns(residual);
    // Solvable only without a component along the constants: rounding's must not reach the
    // iteration.
    const double excess =
        std::accumulate(residual, residual + m_, 0.) / std::accumulate(c, c + m_, 0.);
    for (int64_t j = 0; j < m_; ++j) residual[j] -= excess * c[j];
    double norm = 0, first_norm = 0;
    for (int64_t step = 0, limit = 2 * m_ + 50; step < limit; ++step) {
      double next = 0;
      for (int64_t j = 0; j < m_; ++j)
        if (c[j] > 0) next += residual[j] * residual[j] / c[j];
      if (step == 0) first_norm = next;
      if (!(next > 1e-24 * first_norm)) break;
      const double beta = step == 0 ? 0 : next / norm;
      norm = next;
      for (int64_t j = 0; j < m_; ++j)
        direction[j] = beta * direction[j] + (c[j] > 0 ? residual[j] / c[j] : 0);
      sweep_plan(direction, my_double_columns(), projected);
      add_double_columns(product);
      double curvature = 0;
      for (int64_t j = 0; j < m_; ++j) {
        product[j] = c[j] * direction[j] - product[j];
        curvature += direction[j] * product[j];
      }
      if (!(curvature > 0)) break;
      for (int64_t j = 0; j < m_; ++j) {
        w[j] += norm / curvature * direction[j];
        residual[j] -= norm / curvature * product[j];
      }
    }
    sweep_plan(w, my_double_columns(), [&](int64_t i, double dot, double mass) {
      row_[i] -= projected(i, dot, mass);
      return 0;
    });
  }

  // dL/dS of the member's rows, into ds_.
  void similarity_gradient(PackBuffer& pack) {
    const bool product = set_.gradient == Gradient::unrolled && !logarithmic_;
    const int64_t step = block_rows(ld_);
    for (int64_t first = begin_; first < end_; first += step) {
      const int64_t last = std::min(end_, first + step);
      if (product)
        gemm(last - first, ld_, 2 * iterations_, 1, u_ + first, 1, ldn_, y_at(1), ld_, 1,
             correction_, ld_, false, pack);
      for (int64_t i = first; i < last; ++i)
        row_gradient(i, product ? correction_ + (i - first) * ld_ : ds_ + i * ld_);
    }
  }

  // Of the row whose correction sum_k x_k v_k^T + u_{k-1} y_k^T is given; on logarithms, that
  // which `reverse_logarithms` left.
  void row_gradient(int64_t i, const float* correction) {
    const float *p = p_ + i * ld_, *e = e_ + i * ld_;
    float* ds = ds_ + i * ld_;
    if (set_.gradient == Gradient::implicit) {
      const double* w = double_ + ld_;
      for (int64_t j = 0; j < m_; ++j)
        ds[j] = static_cast<float>(e[j] * ((cost_at(p[j]) - w[j] - row_[i]) / set_.epsilon - 1));
      std::fill(ds + m_, ds + ld_, 0.f);
    } else {
      plan_row(i);
      for (int64_t j = 0; j < ld_; j += lanes) {
        const Vec t = load(t_ + j);
        if (set_.gradient == Gradient::detached) {
          store(ds + j, -t);
          continue;
        }
        const Vec c = load(correction + j),
                  slope = logarithmic_ ? c : c * load(e + j) - t * cost(load(p + j));
        store(ds + j, -slope * inverse_epsilon_ - t);
      }
    }
    // Relative to the argmax, whose own p is all but 1 where the softmax saturates.
    const float at_argmax = ds[argmax_[i]];
    Vec mean{};
    for (int64_t j = 0; j < ld_; j += lanes)
      mean += probability(load(p + j)) * (load(ds + j) - at_argmax);
    const float expected = sum(mean);
    for (int64_t j = 0; j < ld_; j += lanes)
      store(ds + j, probability(load(p + j)) * (load(ds + j) - at_argmax - expected));
  }

  const Problems& in_;
  const Settings& set_;
  const Team team_;
  const int64_t q_;
  int64_t first_x_, n_, first_z_, m_, ld_, ldn_, begin_, end_;
  float inverse_epsilon_, marginal_error_ = 0;
  bool logarithmic_;
  int parity_ = 0, iterations_ = 0;
  int32_t* argmax_;
  float *p_, *e_, *ds_, *columns_, *parts_, *u_, *v_ = nullptr;
  float *v_now_, *total_, *spread_, *t_, *y_now_, *correction_;
  double *row_, *double_;
};

// ---------------------------------------------------------------------------------------------------------------

// Subnormal numbers cost a hundred cycles each, and nothing here depends on them.
class FlushSubnormals {
#if defined(__x86_64__)
 public:
  FlushSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~FlushSubnormals() { _mm_setcsr(before_); }

 private:
  const unsigned before_;
#endif
};

struct Group {
  std::vector<int64_t> problems;
  int64_t entries = 0, largest = 0;
};

// Problems that share a text, in order; without a gradient nothing is shared. Largest group first.
std::vector<Group> make_groups(const Problems& in, bool gradient) {
  std::vector<int64_t> parent(in.count_x + in.count_z);
  std::iota(parent.begin(), parent.end(), 0);
  const auto root = [&](int64_t node) {
    while (parent[node] != node) node = parent[node] = parent[parent[node]];
    return node;
  };
  if (gradient)
    for (int64_t q = 0; q < in.count; ++q)
      parent[root(in.pairs[2 * q])] = root(in.count_x + in.pairs[2 * q + 1]);
  std::vector<int64_t> group_of(parent.size(), -1);
  std::vector<Group> groups;
  for (int64_t q = 0; q < in.count; ++q) {
    const int64_t entries =
        in.segments_x[2 * in.pairs[2 * q] + 1] * in.segments_z[2 * in.pairs[2 * q + 1] + 1];
    if (entries == 0) continue;
    int64_t index = groups.size();
    if (gradient) {
      int64_t& known = group_of[root(in.pairs[2 * q])];
      if (known < 0) known = index;
      index = known;
    }
    if (index == static_cast<int64_t>(groups.size())) groups.emplace_back();
    groups[index].problems.push_back(q);
    groups[index].entries += entries;
    groups[index].largest = std::max(groups[index].largest, entries);
  }
  std::stable_sort(groups.begin(), groups.end(),
                   [](const Group& a, const Group& b) { return a.entries > b.entries; });
  return groups;
}

constexpr int64_t cache_entries =
    192 * 1024;  // a matrix of more outgrows a core's cache (E and p: 1.5 MiB)
constexpr int64_t shared_entries =
    32 * 1024;  // a matrix of less is not worth a barrier an iteration

}  // namespace

void ot_loss(const Problems& in, const Settings& set, const Results& out) {
  const bool gradient = set.gradient != Gradient::none;
  std::vector<char> add_x(in.count), add_z(in.count), seen_x(in.count_x), seen_z(in.count_z);
  int64_t written_x = 0, written_z = 0, longest_x = 0, longest_z = 0;
  for (int64_t q = 0; q < in.count; ++q) {
    const int64_t s = in.pairs[2 * q], t = in.pairs[2 * q + 1];
    const int64_t n = in.segments_x[2 * s + 1], m = in.segments_z[2 * t + 1];
    out.loss[q] = out.marginal_error[q] = 0;
    out.num_iters[q] = 0;
    if (n == 0 || m == 0) continue;
    add_x[q] = std::exchange(seen_x[s], 1);
    add_z[q] = std::exchange(seen_z[t], 1);
    written_x += add_x[q] ? 0 : n;
    written_z += add_z[q] ? 0 : m;
    longest_x = std::max(longest_x, n);
    longest_z = std::max(longest_z, m);
  }
  if (out.dx && written_x < in.tokens_x) std::fill_n(out.dx, in.tokens_x * in.dim, 0.f);
  if (out.dz && written_z < in.tokens_z) std::fill_n(out.dz, in.tokens_z * in.dim, 0.f);

  const std::vector<Group> groups = make_groups(in, gradient);
  if (groups.empty()) return;
  int threads = 1;
#ifdef _OPENMP
  threads = std::max(1, set.num_threads);
#endif
  int64_t waiting = 0;
  for (const Group& group : groups) waiting += group.entries;
  std::vector<const Group*> together, alone;
  for (const Group& group : groups) {
    const bool straggler = group.entries * threads > waiting && group.largest > shared_entries;
    const bool split = threads > 1 && (straggler || group.largest > cache_entries);
    (split ? together : alone).push_back(&group);
    waiting -= group.entries;
  }
  if (together.empty()) threads = std::min<int>(threads, alone.size());

  // All memory is taken here: an exception must not leave a thread.
  const auto widest = [&](const std::vector<const Group*>& chosen, int members) {
    int64_t size = 0;
    for (const Group* group : chosen)
      for (int64_t q : group->problems)
        size = std::max(
            size, Solver::shared_size(in.segments_x[2 * in.pairs[2 * q] + 1],
                                      in.segments_z[2 * in.pairs[2 * q + 1] + 1], set, members));
    return size;
  };
  Arena team_arena;
  team_arena.reserve(Arena::rounded(widest(together, threads)));
  std::vector<Arena> arenas(threads), own(threads);
  std::vector<std::unique_ptr<PackBuffer>> packs(threads);
  for (int t = 0; t < threads; ++t) {
    arenas[t].reserve(Arena::rounded(widest(alone, 1)));
    own[t].reserve(Solver::own_size(longest_x, longest_z));
    packs[t].reset(new PackBuffer);  // not cleared, as make_unique would
  }

  Barrier everyone(threads), nobody(1);
  std::atomic<int64_t> next{0};
  const auto work = [&](int rank, int members) {
    FlushSubnormals flush;
    for (const Group* group : together)
      for (int64_t q : group->problems) {
        Solver(in, set, q, {rank, members, &everyone})
            .run(team_arena, own[rank], *packs[rank], add_x[q], add_z[q], out);
        everyone.wait();
      }
    for (int64_t g; (g = next.fetch_add(1)) < static_cast<int64_t>(alone.size());)
      for (int64_t q : alone[g]->problems)
        Solver(in, set, q, {0, 1, &nobody})
            .run(arenas[rank], own[rank], *packs[rank], add_x[q], add_z[q], out);
  };
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
  {
    // OpenMP may give fewer threads than asked for, inside another parallel region for one.
#pragma omp single
    everyone.resize(omp_get_num_threads());
    work(omp_get_thread_num(), omp_get_num_threads());
  }
#else
  work(0, 1);
#endif
}

void matmul(int64_t m, int64_t n, int64_t depth, Operand a, Operand b, float* c, int num_threads) {
  // Each thread makes whole rows, or whole columns where there are more of them: no sum is split.
  const bool by_rows = m >= n;
  const int64_t whole = by_rows ? m : n, grain = by_rows ? tile_rows : tile_cols;
  int threads = 1;
#ifdef _OPENMP
  if (m * n * depth > 1 << 18)
    threads = std::max<int>(1, std::min<int64_t>(num_threads, (whole + grain - 1) / grain));
#endif
  std::vector<std::unique_ptr<PackBuffer>> packs(threads);
  for (auto& pack : packs) pack.reset(new PackBuffer);
  const auto work = [&](int rank, int members) {
    const auto [first, last] = Team{rank, members, nullptr}.part(whole, grain);
    if (by_rows)
      gemm(last - first, n, depth, 1, a.data + first * a.row, a.row, a.col, b.data, b.row, b.col,
           c + first * n, n, false, *packs[rank]);
    else
      gemm(m, last - first, depth, 1, a.data, a.row, a.col, b.data + first * b.col, b.row, b.col,
           c + first, n, false, *packs[rank]);
  };
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
  work(omp_get_thread_num(), omp_get_num_threads());
#else
  work(0, 1);
#endif
}

}  // namespace COT2ALIGN_ISA
}  // namespace cot2align
