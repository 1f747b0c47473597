// Software prefetch of weights that are read once, in order. Part of matrix.hpp.
#pragma once

#include "simd.hpp"

namespace matrices {

// The non-temporal hint keeps weights from displacing other data in L2 and L3, and is the faster one on an AMD EPYC. On an
// Intel Xeon (with AMX), lines prefetched with it are evicted from L1 before they are read, and the products take 2 to 3
// times as long.
inline bool non_temporal_is_better() {
#if defined(__x86_64__) || defined(_M_X64)
  __builtin_cpu_init();
  return __builtin_cpu_is("amd");
#else
  return false;
#endif
}

static const bool NON_TEMPORAL = non_temporal_is_better();  // set once, when the library is loaded

// A template parameter of the loops: a branch at each prefetch costs 15% of a float32 product with one row of inputs, and
// 6% of a 4-bit product with eight.
enum class Hint { temporal, non_temporal };

// Prefetches the cache line `DISTANCE` bytes ahead.
template <int DISTANCE, Hint HINT>
INLINE void prefetch_ahead(const void* from) {
  if (HINT == Hint::non_temporal)
    __builtin_prefetch((const char*)from + DISTANCE, 0, 0);
  else
    __builtin_prefetch((const char*)from + DISTANCE, 0, 3);
}

}  // namespace matrices
