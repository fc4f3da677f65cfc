// Work cut into units, and a team of threads that does several pieces of work in turn without breaking up in between.
#pragma once

#include <atomic>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "cpu/host.h"

namespace fastres::cpu {

// run(begin, end) does the units [begin, end); `grain` is the smallest number that is worth a thread.
struct Work {
  int64_t units, grain;
  std::function<void(int64_t, int64_t)> run;
};

// The first exception of several threads.
class Failure {
 public:
  void keep() {  // the one being handled
    const std::lock_guard lock(guard_);
    if (!first_) first_ = std::current_exception();
  }
  void rethrow() const {
    if (first_) std::rethrow_exception(first_);
  }

 private:
  std::exception_ptr first_;
  std::mutex guard_;
};

// parallel_for, which loses what an exception said: the first one that `run` throws is thrown here.
template <typename Run>
void parallel_or_throw(int64_t units, int64_t grain, const Run& run) {
  Failure failure;
  parallel_for(0, units, grain, [&](int64_t begin, int64_t end) {
    try {
      run(begin, end);
    } catch (...) {
      failure.keep();
    }
  });
  failure.rethrow();
}

inline void run_now(const Work& work) { parallel_or_throw(work.units, work.grain, work.run); }

// Where members wait for one another. Those that arrive early spin for some microseconds before they yield: an OpenMP region for
// each of a network's fifty pieces of work cost 2 to 15 % of its time, depending on where the virtual machine's processors were
// (ResNet-50, batch 1, bfloat16; AMD EPYC, 2 threads, 2026-11-25).
class Meeting {
 public:
  explicit Meeting(int64_t shares) : shares_(shares) {}

  void wait(int64_t shares) {  // having done this many shares of the work
    const uint32_t round = round_.load(std::memory_order_relaxed);
    if (come_.fetch_add(shares, std::memory_order_acq_rel) + shares == shares_) {
      come_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    for (int64_t looks = 0; round_.load(std::memory_order_acquire) == round; ++looks)
      if (looks > kLooks) std::this_thread::yield();
  }

 private:
  static constexpr int64_t kLooks = 20000;
  const int64_t shares_;
  alignas(64) std::atomic<int64_t> come_{0};
  alignas(64) std::atomic<uint32_t> round_{0};
};

// All pieces of work in order, each shared out as run_now would; one begins when the one before it is done. After the first
// exception nothing more is run, and it is thrown here.
inline void run_team(const std::vector<Work>& works) {
  const int64_t team = torch::stable::get_num_threads();
  Meeting meeting(team);
  std::atomic<bool> failed{false};
  Failure failure;
  parallel_for(0, team, 1, [&](int64_t first, int64_t last) {  // a member has one share, or several where threads are few
    for (const Work& work : works) {
      const int64_t sharers = std::clamp<int64_t>(work.units / work.grain, 1, team);
      const int64_t each = (work.units + sharers - 1) / sharers;
      try {
        for (int64_t share = first; share < std::min(last, sharers) && !failed.load(std::memory_order_relaxed); ++share)
          if (share * each < work.units) work.run(share * each, std::min(share * each + each, work.units));
      } catch (...) {
        failure.keep();
        failed = true;
      }
      meeting.wait(last - first);
    }
  });
  failure.rethrow();
}

}  // namespace fastres::cpu
