// Software prefetch of the weights of the next phase into L2, issued by threads that wait at a barrier, to hide DRAM latency.
// Part of matrix.hpp.
#pragma once

namespace matrices {

// Prefetches rows of a matrix, one cache line at a time, as one stream or as several interleaved ones.
class WeightPrefetch {
 public:
  WeightPrefetch() = default;

  // The rows [first, last) of W, which may be empty; at most `most` bytes of each stream.
  WeightPrefetch(const Matrix& w, int64_t first, int64_t last, int streams = 1, int64_t most = INT64_MAX)
      : from((const char*)w.data + first * row_bytes(w)), streams(streams) {
    apart = (last - first) / streams * row_bytes(w);
    end = apart < most ? apart : most;
  }

  // Prefetches the next line (64 bytes) of each stream into L2; false after the last line.
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

// Prefetch of `count` rows from row `first` on, as far as the matrix has them.
inline WeightPrefetch row_prefetch(const Matrix& m, int64_t first, int64_t count) {
  return WeightPrefetch(m, first, first + count < m.outputs ? first + count : m.outputs);
}

}  // namespace matrices
