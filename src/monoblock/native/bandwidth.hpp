// How fast the memory can be read at all: what the products with one row of inputs are measured against.
#pragma once

#include "prefetch.hpp"

namespace matrices {

// Reads everything once, several streams in each thread, and gives a checksum (so that nothing is left out).
inline uint32_t read_all(const void* data, int64_t bytes, int threads) {
  constexpr int STREAMS = 4, FURTHER = 1536;  // of 1 to 16 streams and prefetches, what reads fastest
  const int64_t share = bytes / threads / STREAMS / sizeof(Words) * sizeof(Words);
  uint32_t total = 0;
#pragma omp parallel for num_threads(threads) schedule(static, 1) reduction(+ : total)
  for (int thread = 0; thread < threads; ++thread) {
    const char* from = (const char*)data + thread * share * STREAMS;
    Words sums[STREAMS] = {};
    for (int64_t at = 0; at < share; at += sizeof(Words))
      UNROLL for (int s = 0; s < STREAMS; ++s) {
        prefetch_ahead<FURTHER>(from + s * share + at);
        sums[s] += load<Words>(from + s * share + at);
      }
    for (int s = 0; s < STREAMS; ++s)
      for (int lane = 0; lane < LANES; ++lane) total += sums[s][lane];
  }
  return total;
}

}  // namespace matrices
