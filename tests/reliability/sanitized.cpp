// Linked into the CPU library where a sanitizer watches it: faults that it must report, and with ThreadSanitizer threads
// that it can follow. It does not know the barriers of OpenMP's own library, which is compiled without it, and would call
// all that they order a race; a thread's beginning and its end it knows.
#include <algorithm>
#include <cstdint>
#include <exception>
#include <limits>
#include <string>
#include <thread>
#include <vector>

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED void fastres_planted(const char* fault) {
  const std::string name = fault;
  volatile int last = 64;  // not known to the compiler
  if (name == "address") {
    std::vector<float> row(64);
    volatile float* end = row.data() + last;
    *end = 1;
  } else if (name == "undefined") {
    volatile int most = std::numeric_limits<int>::max();
    most = most + last;
  } else if (name == "thread") {
    int sum = 0;
    std::thread other([&] { sum += last; });
    sum += last;
    other.join();
  }
}

#if defined(__SANITIZE_THREAD__)

namespace {

thread_local bool inside = false;

constexpr uint32_t kThreads = 4;

}  // namespace

// In place of torch's: shares as at::parallel_for makes them, but of loops of any length, each in a thread of its own.
extern "C" int32_t torch_get_num_threads(uint32_t* found) {
  *found = kThreads;
  return 0;
}

extern "C" int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t, void (*run)(int64_t, int64_t, void*),
                                      void* context) {
  if (begin >= end) return 0;
  const int64_t team = inside ? 1 : std::min<int64_t>(kThreads, end - begin);
  const int64_t share = (end - begin + team - 1) / team;
  std::vector<std::thread> others;
  std::vector<std::exception_ptr> failures(team);
  const auto work = [&](int64_t member) {
    const int64_t first = begin + member * share;
    inside = true;
    try {
      if (first < end) run(first, std::min(end, first + share), context);
    } catch (...) {
      failures[member] = std::current_exception();
    }
    inside = false;
  };
  for (int64_t member = 1; member < team; ++member) others.emplace_back(work, member);
  work(0);
  for (std::thread& other : others) other.join();
  for (const std::exception_ptr& failure : failures)
    if (failure) std::rethrow_exception(failure);
  return 0;
}

#endif
