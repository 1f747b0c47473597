// Parallel regions and loops by OpenMP, or by thread_pool.hpp where the compiler has no OpenMP.
#pragma once

#include "thread_team.hpp"

namespace parallel {

// One thread of a region.
class Region {
 public:
#if !defined(_OPENMP)
  Region(decode::ThreadTeam& team, int number) : team(team), number(number) {}
  int thread() const { return number; }
#else
  int thread() const { return omp_get_thread_num(); }
#endif

  // A dynamic loop: body(i) for 0 .. count - 1, `chunk` indices at a time, each on one of the region's threads, all of which
  // call this. Returns when all of them have returned.
  template <class F>
  void loop(int64_t count, [[maybe_unused]] int chunk, F body) {
#if defined(_OPENMP)
#pragma omp for schedule(dynamic, chunk)
    for (int64_t i = 0; i < count; ++i) body(i);
#else
    team.parallel_for(number, count, body, [] { return false; });
#endif
  }

#if !defined(_OPENMP)
 private:
  decode::ThreadTeam& team;
  const int number;
#endif
};

// Runs work(region) on each of `threads` threads, or on fewer if there are fewer.
template <class F>
inline void region(int threads, F work) {
#if defined(_OPENMP)
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Region own;
    work(own);
  }
#else
  decode::ThreadTeam team;
  team.run(threads, [&](int thread) {
    Region own(team, thread);
    work(own);
  });
#endif
}

// body(i) for 0 .. count - 1, on up to `threads` threads. A dynamic loop.
template <class F>
inline void dynamic_for(int threads, int64_t count, F body) {
#if defined(_OPENMP)
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < count; ++i) body(i);
#else
  region(threads, [&](Region& own) { own.loop(count, 1, body); });
#endif
}

// The same with one range of consecutive indices for each thread.
template <class F>
inline void static_for(int threads, int64_t count, F body) {
#if defined(_OPENMP)
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < count; ++i) body(i);
#else
  decode::ThreadTeam team;
  team.run(threads, [&](int thread) {
    const int64_t size = team.threads();
    for (int64_t i = count * thread / size; i < count * (thread + 1) / size; ++i) body(i);
  });
#endif
}

}  // namespace parallel
