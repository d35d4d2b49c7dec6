// What libstdc++ and the CUDA runtime take from a glibc after 2.28, for prebuilds to bring along.
#include <sys/random.h>
#include <sys/stat.h>

extern "C" {

// False is always right: it only allows shortcuts.
extern const char __libc_single_threaded;
const char __libc_single_threaded = 0;

unsigned arc4random() {
  unsigned value = 0;
  char* at = reinterpret_cast<char*>(&value);
  for (size_t got = 0; got < sizeof value;)
    if (const ssize_t n = getrandom(at + got, sizeof value - got, 0); n > 0) got += size_t(n);
  return value;
}

// The first argument is the version of struct stat.
#if defined(__x86_64__)
constexpr int kStatVersion = 1;
#else
constexpr int kStatVersion = 0;
#endif
int __fxstat(int version, int file, struct stat* out);
int fstat(int file, struct stat* out) { return __fxstat(kStatVersion, file, out); }
int fstat64(int file, struct stat64* out) {
  return __fxstat(kStatVersion, file, reinterpret_cast<struct stat*>(out));
}
}
