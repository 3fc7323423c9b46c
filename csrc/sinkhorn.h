// The OT loss of packed problems and its gradient: X, Z -> loss, dX, dZ, and the matrix product for
// the projection. See sinkhorn.cpp for the formulas.
#pragma once

#include <cstdint>

namespace cot2align {

enum class Gradient { none, unrolled, implicit, detached };

struct Problems {
  const float* x;             // (tokens_x, dim) student tokens
  const float* z;             // (tokens_z, dim) projected teacher tokens
  const int64_t* segments_x;  // (count_x, 2) first token and number of tokens of each student text
  const int64_t* segments_z;  // (count_z, 2)
  const int64_t*
      pairs;  // (count, 2) problem q aligns segments_x[pairs[q][0]] with segments_z[pairs[q][1]]
  const float* weights;  // (count) dx and dz are the gradient of sum_q weights[q] * loss[q]
  int64_t tokens_x, tokens_z, count_x, count_z, count, dim;
};

struct Settings {
  float scale;  // similarity = scale * <x, z>
  double epsilon;
  float tol;  // on the L1 error of the plan's column sums; 0 = never stop early
  int num_iters;
  Gradient gradient;
  int num_threads;
};

struct Results {
  float* loss;            // (count)
  int32_t* num_iters;     // (count) iterations run
  float* marginal_error;  // (count)
  float* dx;  // (tokens_x, dim), null where it is not wanted, as always without a gradient
  float* dz;  // (tokens_z, dim), likewise
};

struct Operand {
  const float* data;  // entry (i, k) at data[i * row + k * col], one of the two being 1
  int64_t row, col;
};

// C (m, n) = A (m, depth) B (depth, n), C's rows one after the other.
using MatMul = void (*)(int64_t m, int64_t n, int64_t depth, Operand a, Operand b, float* c,
                        int num_threads);
using OTLoss = void (*)(const Problems&, const Settings&, const Results&);

// One definition per instruction set: sinkhorn.cpp is compiled once for each.
namespace baseline {
void ot_loss(const Problems&, const Settings&, const Results&);
void matmul(int64_t, int64_t, int64_t, Operand, Operand, float*, int);
}
namespace avx2 {
void ot_loss(const Problems&, const Settings&, const Results&);
void matmul(int64_t, int64_t, int64_t, Operand, Operand, float*, int);
}
namespace avx512 {
void ot_loss(const Problems&, const Settings&, const Results&);
void matmul(int64_t, int64_t, int64_t, Operand, Operand, float*, int);
}

}  // namespace cot2align
