// The CUDA backend of a build without one.
#include "ops/backend.h"

namespace p2r {

CudaStatus cuda_status() { return {false, false, "This addon was built without CUDA."}; }
std::vector<DeviceInfo> cuda_infos() { return {}; }
std::unique_ptr<Device> open_cuda(int) { throw Error(Code::device, cuda_status().reason); }

}  // namespace p2r
