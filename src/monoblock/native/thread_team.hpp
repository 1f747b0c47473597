// The threads of one parallel region, which run a sequence of phases: each phase is a dynamic parallel loop that ends with a
// barrier.
#pragma once

#include <stdint.h>

#include <atomic>
#include <vector>
#if defined(__unix__) || defined(__APPLE__)
#include <sched.h>
#endif
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "thread_pool.hpp"

namespace decode {

// A thread at the barrier spins this many times, about as long as a phase takes, before it yields its core: the thread that
// it waits for may have been preempted.
constexpr int SPINS = 2000;

// Calls of `idle` before a thread arrives at the barrier: the last thread to arrive does not wait and would otherwise make
// none.
constexpr int IDLE_CALLS = 16;

inline void spin(int spins) {
#if defined(__x86_64__)
  if (spins < SPINS) return __builtin_ia32_pause();
#elif defined(__aarch64__)
  if (spins < SPINS) return (void)({ asm volatile("yield"); });
#endif
#if defined(__unix__) || defined(__APPLE__)
  if (spins >= SPINS) sched_yield();
#endif
}

class ThreadTeam {
 public:
  // Calls `work` for the indices 0 .. count - 1, each once on one of the threads; returns when all calls have returned. A
  // thread's first index is its own number, so that its first weights can be prefetched earlier. `idle` is called at the
  // barrier; it does a little useful work, or returns false.
  template <class F, class Idle>
  void parallel_for(int thread, int64_t count, F work, Idle idle) {
    for (int64_t index = thread; index < count; index = size + next.fetch_add(1, std::memory_order_relaxed)) work(index);
    barrier(idle);
  }

  // The same with an equal range of consecutive indices for each thread, which then helps the others: where index i of every
  // phase stands for the same rows, a thread finds most of them in its own caches.
  template <class F>
  void parallel_ranges(int thread, int64_t count, F work) {
    for (int64_t i = 0; i < size; ++i) {
      const int64_t owner = (thread + i) % size, begin = count * owner / size, end = count * (owner + 1) / size;
      for (int64_t index; (index = begin + ranges[owner].taken.fetch_add(1, std::memory_order_relaxed)) < end;) work(index);
    }
    barrier([] { return false; }, true);
  }

  // The number of threads; valid in `run`.
  int64_t threads() const { return size; }

  // Runs `work(thread)` on `threads` threads, or on fewer if there are fewer.
  template <class F>
  void run(int threads, F work) {
#if defined(_OPENMP)
#pragma omp parallel num_threads(threads)
    {
#pragma omp single
      {
        size = omp_get_num_threads();
        ranges = std::vector<Range>(size);
      }
      work(omp_get_thread_num());
    }
#else
    const auto prepare = [&](int count) {
      size = count;
      ranges = std::vector<Range>(size);
    };
    ThreadPool::get().run(threads, prepare, work);
#endif
  }

 private:
  // The barrier. The last thread to arrive resets the counters that the loop used (`ranged`: those of the ranges) and releases
  // the others.
  template <class Idle>
  void barrier(Idle idle, bool ranged = false) {
    const int64_t now = phase.load(std::memory_order_relaxed);
    for (int i = 0; i < IDLE_CALLS && idle(); ++i) {}
    if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
      arrived.store(0, std::memory_order_relaxed);
      next.store(0, std::memory_order_relaxed);
      if (ranged)
        for (Range& range : ranges) range.taken.store(0, std::memory_order_relaxed);
      phase.store(now + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; phase.load(std::memory_order_acquire) == now; spins += spins < SPINS)
      if (!idle()) spin(spins);
  }

  // Each on its own cache line, to avoid false sharing between working threads and those at the barrier.
  alignas(64) std::atomic<int64_t> next{0};
  alignas(64) std::atomic<int64_t> arrived{0};
  alignas(64) std::atomic<int64_t> phase{0};
  int64_t size = 1;

  struct alignas(64) Range {
    std::atomic<int64_t> taken{0};  // indices of a thread's range that have been begun
  };
  std::vector<Range> ranges = std::vector<Range>(1);
};

// Tasks of attention over the sequences [first, last): blocks of a sequence's tokens, and their heads, in order. Each thread has
// its own, whose cursor finds the sequence of an index; a thread's indices mostly grow.
class SequenceTasks {
 public:
  struct Task {
    int64_t sequence, head, begin, end;  // the tokens [begin, end) of the sequence
  };

  // `starts`: the first token of each sequence, and the end.
  SequenceTasks(const int64_t* starts, int64_t first, int64_t last, int64_t heads, int64_t block)
      : starts(starts), heads(heads), block(block), from(first), sequence(first) {
    for (int64_t i = first; i < last; ++i) total += tasks_of(i);
  }

  int64_t count() const { return total; }

  Task at(int64_t index) {
    if (index < before) sequence = from, before = 0;
    while (index - before >= tasks_of(sequence)) before += tasks_of(sequence++);
    const int64_t own = index - before, begin = own / heads * block, length = length_of(sequence);
    return {sequence, own % heads, begin, begin + block < length ? begin + block : length};
  }

 private:
  int64_t length_of(int64_t i) const { return starts[i + 1] - starts[i]; }
  int64_t tasks_of(int64_t i) const { return heads * ((length_of(i) + block - 1) / block); }

  const int64_t* starts;
  int64_t heads, block, from, sequence, before = 0, total = 0;
};

}  // namespace decode
