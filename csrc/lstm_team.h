// Steps that several threads take together: all parts of a step are done before any part of the next begins.
//
// Threads come from torch's own pool (a second pool would spin against it), and the pool promises no concurrency: it may run
// all members one after another on one thread. So parts are claimed, not assigned. Whoever comes takes its own part first
// and then any that nobody has begun; it waits only for parts that another running thread has claimed. A single member does
// everything, so there is no deadlock, and a thread that the system has put aside holds up one part and not a whole share.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <sched.h>

#include <atomic>
#include <cstdint>
#include <vector>

namespace fusedprompt {

class Team {
 public:
  explicit Team(int64_t parts) : parts_(parts), claimed_(parts) {}

  // Calls work(step, part) for every part of every step.
  template <class Work>
  void run(int64_t steps, const Work& work) {
    if (parts_ == 1) {
      for (int64_t step = 0; step < steps; ++step) work(step, int64_t{0});
      return;
    }
    torch::stable::parallel_for(0, parts_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t member = begin; member < end; ++member) take_part(member, steps, work);
    });
  }

 private:
  struct alignas(64) Count {  // a cache line each
    std::atomic<int64_t> value{0};
  };

  template <class Work>
  void take_part(int64_t member, int64_t steps, const Work& work) {
    for (int64_t step = 0; step < steps; ++step) {
      for (int64_t offset = 0; offset < parts_; ++offset) {
        const int64_t part = (member + offset) % parts_;
        int64_t expected = step;
        if (claimed_[part].value.compare_exchange_strong(expected, step + 1, std::memory_order_relaxed)) {
          work(step, part);
          finished_.value.fetch_add(1, std::memory_order_acq_rel);
        }
      }
      for (int spins = 0; finished_.value.load(std::memory_order_acquire) < (step + 1) * parts_; ++spins) {
        if (spins < kSpins) {
          pause();
        } else {
          sched_yield();
        }
      }
    }
  }

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  static constexpr int kSpins = 500;  // some 10 us; a part takes 5 to 200

  int64_t parts_;
  std::vector<Count> claimed_;  // steps claimed, for each part
  Count finished_;              // parts finished, of all steps
};

}  // namespace fusedprompt
