// A read-bandwidth benchmark: the upper bound for products with one row of inputs.
#pragma once

#include "matrix.hpp"

namespace matrices {

// Reads one thread's share as several streams; returns a checksum, so that the compiler cannot remove the loads.
template <Hint HINT, int STREAMS>
inline uint32_t read_streams(const char* from, int64_t share) {
  constexpr int DISTANCE = 1536;  // bytes; the fastest of several distances with 1 to 16 streams
  Words sums[STREAMS] = {};
  for (int64_t at = 0; at < share; at += sizeof(Words))
    UNROLL for (int s = 0; s < STREAMS; ++s) {
      prefetch_ahead<HINT>(from + s * share + at, DISTANCE);
      sums[s] += load<Words>(from + s * share + at);
    }
  uint32_t total = 0;
  for (int s = 0; s < STREAMS; ++s)
    for (int lane = 0; lane < LANES; ++lane) total += sums[s][lane];
  return total;
}

// Reads all bytes once, on `threads` threads; returns a checksum. The hint is that of float32 products with one row.
inline uint32_t read_all(const void* data, int64_t bytes, int threads) {
  constexpr int STREAMS = 4;
  const int64_t share = bytes / threads / STREAMS / sizeof(Words) * sizeof(Words);
  const bool non_temporal = read_plans.get(F32, 1).hint;
  const auto read = non_temporal ? read_streams<Hint::non_temporal, STREAMS> : read_streams<Hint::temporal, STREAMS>;
  uint32_t total = 0;
#pragma omp parallel for num_threads(threads) schedule(static, 1) reduction(+ : total)
  for (int thread = 0; thread < threads; ++thread) total += read((const char*)data + thread * share * STREAMS, share);
  return total;
}

}  // namespace matrices
