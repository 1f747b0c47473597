// Weights that will soon be read. They do not depend on what is being computed, so the memory can work on meanwhile.
// Part of matrix.hpp.
#pragma once

namespace matrices {

// Rows of a matrix, asked for line by line: as one stream, or as several that lie side by side.
class Soon {
 public:
  Soon() = default;

  // The rows [first, last) of W, if there are any; of each stream no more than `most` bytes.
  Soon(const Matrix& w, int64_t first, int64_t last, int streams = 1, int64_t most = INT64_MAX)
      : from((const char*)w.data + first * row_bytes(w)), streams(streams) {
    apart = (last - first) / streams * row_bytes(w);
    end = apart < most ? apart : most;
  }

  // Asks for the next line of each stream, to come into the second cache; whether there was one.
  INLINE bool ask() {
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
