#include "ops/backend.h"

namespace p2r {

std::string Device::share(void*&, size_t, const std::string&) {
  throw Error(Code::device, "memory of this device cannot be shared with other processes");
}
void* Device::open_shared(const std::string&, size_t, bool) {
  throw Error(Code::device, "this device cannot open memory of other processes");
}
void Device::close_shared(void*) {}
void Device::unshare(const std::string&) {}

}  // namespace p2r
