// The only file that knows pybind11: the functions of the other files as cot2align.kernels._native.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "sinkhorn.h"
#include "token_alignment.h"

#ifdef _OPENMP
#include <omp.h>
#endif

#ifdef COT2ALIGN_CUDA_ARCHS
#include "device_query.h"
#include "sinkhorn_cuda.h"
#endif

namespace py = pybind11;
using namespace pybind11::literals;

namespace {

// The widest instruction set that this build has and this CPU knows: sinkhorn.cpp is compiled once
// for each.
const char* instruction_set() {
#ifdef __x86_64__
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
    return "avx512";
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return "avx2";
#endif
  return "baseline";
}

cot2align::OTLoss ot_loss_for(const std::string& isa) {
#ifdef __x86_64__
  if (isa == "avx512") return cot2align::avx512::ot_loss;
  if (isa == "avx2") return cot2align::avx2::ot_loss;
#endif
  return cot2align::baseline::ot_loss;
}

cot2align::MatMul matmul_for(const std::string& isa) {
#ifdef __x86_64__
  if (isa == "avx512") return cot2align::avx512::matmul;
  if (isa == "avx2") return cot2align::avx2::matmul;
#endif
  return cot2align::baseline::matmul;
}

cot2align::Gradient gradient_named(const std::string& name) {
  using cot2align::Gradient;
  if (name == "none") return Gradient::none;
  if (name == "unrolled") return Gradient::unrolled;
  if (name == "implicit") return Gradient::implicit;
  if (name == "detached") return Gradient::detached;
  throw py::value_error("unknown gradient: " + name);
}

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// The caller (kernels/native.py) answers for the addresses, sizes and types. Frees the interpreter
// while it works.
void ot_loss(uintptr_t x, uintptr_t z, uintptr_t segments_x, uintptr_t segments_z, uintptr_t pairs,
             uintptr_t weights, int64_t tokens_x, int64_t tokens_z, int64_t count_x,
             int64_t count_z, int64_t count, int64_t dim, float scale, double epsilon, float tol,
             int num_iters, const std::string& gradient, int num_threads, uintptr_t loss,
             uintptr_t iterations, uintptr_t marginal_error, uintptr_t dx, uintptr_t dz,
             const std::string& isa) {
  const cot2align::Problems problems{pointer<const float>(x),
                                     pointer<const float>(z),
                                     pointer<const int64_t>(segments_x),
                                     pointer<const int64_t>(segments_z),
                                     pointer<const int64_t>(pairs),
                                     pointer<const float>(weights),
                                     tokens_x,
                                     tokens_z,
                                     count_x,
                                     count_z,
                                     count,
                                     dim};
  const cot2align::Settings settings{scale,      epsilon, tol, num_iters, gradient_named(gradient),
                                     num_threads};
  const cot2align::Results results{pointer<float>(loss), pointer<int32_t>(iterations),
                                   pointer<float>(marginal_error), pointer<float>(dx),
                                   pointer<float>(dz)};
  const cot2align::OTLoss run = ot_loss_for(isa);
  py::gil_scoped_release release;
  run(problems, settings, results);
}

void matmul(int64_t m, int64_t n, int64_t depth, uintptr_t a, std::pair<int64_t, int64_t> a_strides,
            uintptr_t b, std::pair<int64_t, int64_t> b_strides, uintptr_t c, int num_threads,
            const std::string& isa) {
  const cot2align::Operand left{pointer<const float>(a), a_strides.first, a_strides.second},
      right{pointer<const float>(b), b_strides.first, b_strides.second};
  const cot2align::MatMul run = matmul_for(isa);
  py::gil_scoped_release release;
  run(m, n, depth, left, right, pointer<float>(c), num_threads);
}

py::dict build_info() {
  py::dict info("version"_a = COT2ALIGN_VERSION, "compiler"_a = __VERSION__,
                "instruction_set"_a = instruction_set(), "openmp"_a = false, "cuda"_a = false,
                "cuda_archs"_a = "");
#ifdef _OPENMP
  info["openmp"] = true;
#endif
#ifdef COT2ALIGN_CUDA_ARCHS
  info["cuda"] = true;
  info["cuda_archs"] = COT2ALIGN_CUDA_ARCHS;
#endif
  return info;
}

#ifdef COT2ALIGN_CUDA_ARCHS
py::tuple cuda_devices() {
  std::string reason;
  py::list devices;
  for (const auto& device : cot2align::cuda_devices(reason))
    devices.append(py::dict("index"_a = device.index, "name"_a = device.name,
                            "capability"_a = py::make_tuple(device.major, device.minor),
                            "total_memory"_a = device.total_memory,
                            "multiprocessors"_a = device.multiprocessors));
  return py::make_tuple(devices, reason);
}

py::tuple cuda_versions() {
  const auto versions = cot2align::cuda_versions();
  return py::make_tuple(versions.driver, versions.runtime);
}

// The caller (kernels/cuda_sinkhorn.py) answers for the addresses, sizes and types.
void cuda_solve(uintptr_t similarity, uintptr_t shapes, uintptr_t offsets, uintptr_t order,
                uintptr_t weights, int count, int max_n, int max_m, int small_n, int small_m,
                double epsilon, float tol, int num_iters, const std::string& gradient,
                uintptr_t loss, uintptr_t iterations, uintptr_t marginal_error, uintptr_t history,
                int device, uintptr_t stream) {
  const cot2align::CudaProblems problems{pointer<float>(similarity),
                                         pointer<const int32_t>(shapes),
                                         pointer<const int64_t>(offsets),
                                         pointer<const int32_t>(order),
                                         pointer<const float>(weights),
                                         count,
                                         max_n,
                                         max_m,
                                         small_n,
                                         small_m};
  const cot2align::CudaSettings settings{epsilon, tol, num_iters, gradient_named(gradient)};
  const cot2align::CudaResults results{pointer<float>(loss), pointer<int32_t>(iterations),
                                       pointer<float>(marginal_error)};
  py::gil_scoped_release release;
  cot2align::cuda_solve(problems, settings, results, pointer<float>(history), device,
                        pointer<void>(stream));
}
#endif

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.def("ot_loss", &ot_loss, "x"_a, "z"_a, "segments_x"_a, "segments_z"_a, "pairs"_a,
             "weights"_a, py::kw_only(), "tokens_x"_a, "tokens_z"_a, "count_x"_a, "count_z"_a,
             "count"_a, "dim"_a, "scale"_a, "epsilon"_a, "tol"_a, "num_iters"_a, "gradient"_a,
             "num_threads"_a, "loss"_a, "iterations"_a, "marginal_error"_a, "dx"_a, "dz"_a,
             "isa"_a = instruction_set(), "the operation of sinkhorn.h on addresses of arrays");
  module.def("matmul", &matmul, "m"_a, "n"_a, "depth"_a, "a"_a, "a_strides"_a, "b"_a, "b_strides"_a,
             "c"_a, py::kw_only(), "num_threads"_a, "isa"_a = instruction_set(),
             "the product of sinkhorn.h on addresses of arrays");
  module.def("instruction_sets", [] {
    // What this CPU can run of what was built, the widest first.
    const std::string widest = instruction_set();
    py::list sets;
    if (widest == "avx512") sets.append("avx512");
    if (widest != "baseline") sets.append("avx2");
    sets.append("baseline");
    return sets;
  });
  using cot2align::TokenIndex;
  py::class_<TokenIndex>(module, "TokenIndex", "token_alignment.h, on lists of bytes")
      .def(py::init<std::vector<std::string>>(), "tokens"_a)
      .def("nearest", &TokenIndex::nearest, "queries"_a, py::kw_only(), "num_threads"_a,
           py::call_guard<py::gil_scoped_release>());
  module.def("align_tokens", &cot2align::align_tokens, "x"_a, "y"_a,
             py::call_guard<py::gil_scoped_release>());
  module.def("build_info", &build_info,
             "version, compiler, instruction_set, openmp, cuda, cuda_archs");
#ifdef COT2ALIGN_CUDA_ARCHS
  module.def("cuda_devices", &cuda_devices,
             "(devices, reason): a dict for each CUDA device; reason says why there are none");
  module.def("cuda_versions", &cuda_versions,
             "(driver, runtime) as 13000 for 13.0; driver 0: there is none");
  module.def("cuda_solve", &cuda_solve, "similarity"_a, "shapes"_a, "offsets"_a, "order"_a,
             "weights"_a, py::kw_only(), "count"_a, "max_n"_a, "max_m"_a, "small_n"_a, "small_m"_a,
             "epsilon"_a, "tol"_a, "num_iters"_a, "gradient"_a, "loss"_a, "iterations"_a,
             "marginal_error"_a, "history"_a, "device"_a, "stream"_a,
             "the operation of sinkhorn_cuda.h on addresses of device arrays");
  module.def("cuda_cluster_size", &cot2align::cuda_cluster_size, "max_n"_a, "max_m"_a);
  module.def("cuda_history_size", &cot2align::cuda_history_size, "max_n"_a, "max_m"_a,
             "num_iters"_a);
#endif
}
