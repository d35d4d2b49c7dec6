// The CUDA backend of a build without nvcc.
#include "ops/backend.h"

namespace p2r {

CudaStatus cuda_status() { return {false, false, "This build has no CUDA: nvcc was not found."}; }
std::vector<DeviceInfo> cuda_infos() { return {}; }
std::unique_ptr<Device> open_cuda(int) { throw Error(Code::device, cuda_status().reason); }

}  // namespace p2r
