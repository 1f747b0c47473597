// The weights that a thread will read next. They do not depend on what is being computed: a thread asks for them while it
// waits for the others, and the memory works on meanwhile.
#pragma once

#include <algorithm>

#include "matrix.hpp"

namespace decode {

// Half of an L2 cache, so that they stay there until they are read, or the nearest cache of all threads.
constexpr int64_t SOON = 256 << 10;

class Soon {
 public:
  Soon() = default;

  // The outputs [first, last) of W with `rows` rows of inputs, as `multiply` goes through them.
  Soon(const Matrix& w, int64_t first, int64_t last, int rows) : from((const char*)w.data + first * row_bytes(w)) {
    streams = matrices::streams_of(w.format, rows > matrices::MOST_OF_FEW);
    stream = (last - first) / streams * row_bytes(w);
    end = std::min(stream, SOON / streams);
  }

  // Asks for the next line of each stream; whether there was one.
  INLINE bool ask() {
    if (at >= end) return false;
    for (int i = 0; i < streams; ++i) __builtin_prefetch(from + i * stream + at, 0, 2);
    at += 64;
    return true;
  }

 private:
  const char* from = nullptr;
  int64_t stream = 0, at = 0, end = 0;
  int streams = 0;
};

}  // namespace decode
