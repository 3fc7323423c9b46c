#include "device_query.h"

#include <cuda_runtime.h>

#include <stdexcept>

namespace cot2align {
namespace {

void check(cudaError_t status, const char* call) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // else the next kernel launch would be blamed for it
  throw std::runtime_error(std::string(call) + ": " + cudaGetErrorString(status));
}

}  // namespace

std::vector<CudaDevice> cuda_devices(std::string& reason) {
  if (cuda_versions().driver == 0) {  // cudaGetDeviceCount would call it too old
    reason = "no CUDA driver";
    return {};
  }
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) {
    cudaGetLastError();
    reason = cudaGetErrorString(status);
    return {};
  }
  std::vector<CudaDevice> devices;
  for (int i = 0; i < count; ++i) {
    cudaDeviceProp properties;
    check(cudaGetDeviceProperties(&properties, i), "cudaGetDeviceProperties");
    devices.push_back({i, properties.name, properties.major, properties.minor,
                       static_cast<long long>(properties.totalGlobalMem),
                       properties.multiProcessorCount});
  }
  return devices;
}

CudaVersions cuda_versions() {
  CudaVersions versions{};
  check(cudaDriverGetVersion(&versions.driver), "cudaDriverGetVersion");
  check(cudaRuntimeGetVersion(&versions.runtime), "cudaRuntimeGetVersion");
  return versions;
}

}  // namespace cot2align
