// Software prefetch of weights that are read once, in order. Part of matrix.hpp.
#pragma once

#include "numbers.hpp"

namespace matrices {

// The non-temporal hint keeps weights from displacing other data in L2 and L3, and on an AMD EPYC it was the quicker one. On
// an Intel Xeon (with AMX) lines fetched by it leave L1 before they are read, and the products take 2 to 3 times as long.
inline bool non_temporal_is_better() {
#if defined(__x86_64__) || defined(_M_X64)
  __builtin_cpu_init();
  return __builtin_cpu_is("amd");
#else
  return false;
#endif
}

// Set once, when the library is loaded. Loops keep it in a register; the branch is always predicted and costs nothing
// measurable, while a second instantiation of every kernel would double the library.
static const bool NON_TEMPORAL = non_temporal_is_better();

// The line `DISTANCE` bytes further on.
template <int DISTANCE>
INLINE void prefetch_ahead(const void* from) {
  if (NON_TEMPORAL)
    __builtin_prefetch((const char*)from + DISTANCE, 0, 0);
  else
    __builtin_prefetch((const char*)from + DISTANCE, 0, 3);
}

}  // namespace matrices
