// Software prefetch into L2 of weights that a later phase reads: a thread at a barrier issues it, to hide DRAM latency.
// Part of matrix.hpp.
#pragma once

namespace matrices {

// Rows of a matrix, prefetched cache line by cache line: as one stream, or as several parallel ones.
class WeightPrefetch {
 public:
  WeightPrefetch() = default;

  // The rows [first, last) of W, if there are any; of each stream no more than `most` bytes.
  WeightPrefetch(const Matrix& w, int64_t first, int64_t last, int streams = 1, int64_t most = INT64_MAX)
      : from((const char*)w.data + first * row_bytes(w)), streams(streams) {
    apart = (last - first) / streams * row_bytes(w);
    end = apart < most ? apart : most;
  }

  // Prefetches the next line (64 bytes) of each stream into L2; false when all lines are done.
  INLINE bool step() {
    if (at >= end) return false;
    for (int i = 0; i < streams; ++i) __builtin_prefetch(from + i * apart + at, 0, 2);
    at += 64;
    return true;
  }

 private:
  const char* from = nullptr;
  int64_t apart = 0, at = 0, end = 0;
  int streams = 1;
};

}  // namespace matrices
