// Threads where there may be no room for them.
#pragma once
#include <string>
#include <system_error>
#include <thread>
#include <utility>

#include "ops/error.h"

namespace p2r {

// Throws Code::memory where the system has no room for another thread.
template <class Run>
std::thread start_thread(Run run) {
  try {
    return std::thread(std::move(run));
  } catch (const std::system_error& e) {
    throw Error(Code::memory, std::string("a thread could not be started: ") + e.what());
  }
}

}  // namespace p2r
