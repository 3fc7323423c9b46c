// The OT loss on a GPU with thread-block clusters, from the similarity on. No CUDA header is needed
// to include this one. See sinkhorn.cu for how.
#pragma once

#include <cstdint>

#include "sinkhorn.h"

namespace cot2align {

struct CudaProblems {  // addresses of the device
  float*
      similarity;  // problem q begins at offsets[q]; its rows are m rounded up to a multiple of 4
  const int32_t* shapes;    // (count, 2) n student tokens (rows), m teacher tokens (columns)
  const int64_t* offsets;   // (count) multiples of 4
  const int32_t* order;     // (count) cluster i solves problem order[i]
  const float* weights;     // (count) dL/dS is scaled by the problem's weight
  int count, max_n, max_m;  // no problem is larger
  int small_n, small_m;     // problems that are no larger than this are skipped; (0, 0) for none
};

struct CudaSettings {
  double epsilon;
  float tol;  // on the L1 error of the plan's column sums; 0 = never stop early
  int num_iters;
  Gradient gradient;
};

struct CudaResults {  // (count), untouched where a problem is skipped or has no token on a side
  float* loss;
  int32_t* iterations;
  float* marginal_error;
};

// Blocks that share a problem of this size, 1, 2, 4 or 8; 0 where it does not fit in any.
int cuda_cluster_size(int max_n, int max_m);

// Floats of scratch memory that the unrolled gradient needs for each problem.
int64_t cuda_history_size(int max_n, int max_m, int num_iters);

// Enqueues the kernel on `stream` (a cudaStream_t) of `device`; where a gradient is asked for,
// dL/dS replaces the similarity. `history` is of count * cuda_history_size floats for
// Gradient::unrolled, else null. Throws std::runtime_error that names the kernel and the sizes
// where CUDA refuses.
void cuda_solve(const CudaProblems&, const CudaSettings&, const CudaResults&, float* history,
                int device, void* stream);

}  // namespace cot2align
