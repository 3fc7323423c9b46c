// What the CUDA driver says of itself and of its devices. No CUDA header is needed to include this
// one.
#pragma once

#include <string>
#include <vector>

namespace cot2align {

struct CudaDevice {
  int index;
  std::string name;
  int major, minor;        // compute capability
  long long total_memory;  // bytes
  int multiprocessors;
};

struct CudaVersions {  // 13000 is 13.0
  int driver;          // the newest runtime that the driver supports; 0: no driver
  int runtime;         // of the cudart in this module
};

// The devices in the order of CUDA_VISIBLE_DEVICES. Where there are none, `reason` says why.
// Throws std::runtime_error if the CUDA runtime reports an error beyond "no driver" and "no
// device".
std::vector<CudaDevice> cuda_devices(std::string& reason);

CudaVersions cuda_versions();

}  // namespace cot2align
