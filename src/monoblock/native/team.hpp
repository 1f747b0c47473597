// The threads of one parallel region, which go through the same phases together: each phase deals its turns out to
// whoever is free, and ends when all are done.
#pragma once

#include <stdint.h>

#include <atomic>
#if defined(__unix__) || defined(__APPLE__)
#include <sched.h>
#endif
#if defined(_OPENMP)
#include <omp.h>
#endif

namespace decode {

// A thread that waits looks this many times before it lets others run: about as long as a phase takes. Other programs
// may have taken the core of the thread that it waits for.
constexpr int LOOKS = 2000;

// And does as much of what it would do while waiting before it says that it has come: the last one would do nothing of it.
constexpr int FIRST = 16;

inline void pause_here(int looks) {
#if defined(__x86_64__)
  if (looks < LOOKS) return __builtin_ia32_pause();
#endif
#if defined(__unix__) || defined(__APPLE__)
  if (looks >= LOOKS) sched_yield();
#endif
}

class Team {
 public:
  // Calls `work` for 0 .. turns - 1, each once by one of the threads; returns when all calls have returned. A thread's
  // first turn is that of its own number, so that it can know beforehand; `idle` does something while it waits, or says
  // false.
  template <class F, class Idle>
  void share(int thread, int64_t turns, F work, Idle idle) {
    for (int64_t turn = thread; turn < turns; turn = size + next.fetch_add(1, std::memory_order_relaxed)) work(turn);
    wait(idle);
  }

  // Runs `work(thread)` on that many threads, or on fewer if the system has no more.
  template <class F>
  void run(int threads, F work) {
#if defined(_OPENMP)
#pragma omp parallel num_threads(threads)
    {
#pragma omp single
      size = omp_get_num_threads();
      work(omp_get_thread_num());
    }
#else
    (void)threads;
    work(0);
#endif
  }

 private:
  // The last thread to come deals anew, and lets the others go.
  template <class Idle>
  void wait(Idle idle) {
    const int64_t now = phase.load(std::memory_order_relaxed);
    for (int i = 0; i < FIRST && idle(); ++i) {}
    if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
      arrived.store(0, std::memory_order_relaxed);
      next.store(0, std::memory_order_relaxed);
      phase.store(now + 1, std::memory_order_release);
      return;
    }
    for (int looks = 0; phase.load(std::memory_order_acquire) == now; looks += looks < LOOKS)
      if (!idle()) pause_here(looks);
  }

  // Each on a line of its own: threads that wait must not slow down those that take turns.
  alignas(64) std::atomic<int64_t> next{0};
  alignas(64) std::atomic<int64_t> arrived{0};
  alignas(64) std::atomic<int64_t> phase{0};
  int64_t size = 1;
};

}  // namespace decode
