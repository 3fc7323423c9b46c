// The only file that knows pybind11: the functions of the other files as cot2align.kernels._native.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#ifdef _OPENMP
#include <omp.h>
#endif

#ifdef COT2ALIGN_CUDA_ARCHS
#include "device_query.h"
#endif

namespace py = pybind11;
using namespace pybind11::literals;

namespace {

// The widest instruction set that this build has and this CPU knows: sinkhorn.cpp is compiled once for each.
const char* instruction_set() {
#ifdef __x86_64__
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
    return "avx512";
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return "avx2";
#endif
  return "baseline";
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
#endif

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.def("build_info", &build_info, "version, compiler, instruction_set, openmp, cuda, cuda_archs");
#ifdef COT2ALIGN_CUDA_ARCHS
  module.def("cuda_devices", &cuda_devices,
             "(devices, reason): a dict for each CUDA device; reason says why there are none");
  module.def("cuda_versions", &cuda_versions,
             "(driver, runtime) as 13000 for 13.0; driver 0: there is none");
#endif
}
