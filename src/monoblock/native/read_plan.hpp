// How products with few rows of inputs read their weights. The results have the same bits for every plan; tuning.py measures
// which one is the fastest on a machine. Part of matrix.hpp.
#pragma once

#include "prefetch.hpp"

namespace matrices {

constexpr int SMALL_BATCH = 4;  // rows of inputs up to which the number of streams is chosen for bandwidth

struct ReadPlan {
  int32_t hint;      // a Hint
  int32_t distance;  // of the software prefetch, in bytes
  int32_t streams;   // rows of weights that are read in parallel
  int32_t chunks;    // of a thread's outputs; a thread that is done with its own takes others
};

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

// Rows of weights that are read in parallel, for up to SMALL_BATCH rows of inputs or for more (`more`).
constexpr int streams_of(int32_t format, bool more) {
  return format == INT8 ? (more ? 4 : 2) : format == BF16 ? (more ? 3 : 2) : 4;
}

// The plans of the formats, for 1, 2 to SMALL_BATCH, and more rows of inputs.
class ReadPlans {
 public:
  // What is used where nothing has been measured. Prefetching 2 or 3 KiB ahead gains 50% with eight rows of inputs and 10%
  // with one on AMD, and 30% on Intel, where distances of 1 to 3 KiB differ by no more than 5%.
  ReadPlans() {
    const int32_t hint = non_temporal_is_better();
    for (int32_t format = 0; format < FORMATS; ++format)
      for (int rows = 0; rows < CLASSES; ++rows)
        plans[format][rows] = {hint, rows == 0 ? 2048 : 3072, streams_of(format, rows == CLASSES - 1), 2};
  }

  static bool has(int32_t format, int64_t rows) { return format >= 0 && format < FORMATS && rows > 0; }

  INLINE ReadPlan get(int32_t format, int64_t rows) const {
    const ReadPlan& own = plans[format][class_of(rows)];
    return {read(own.hint), read(own.distance), read(own.streams), read(own.chunks)};
  }

  // False if there are no such kernels.
  bool set(int32_t format, int64_t rows, const ReadPlan& plan) {
    if (!has(format, rows) || (plan.hint != 0 && plan.hint != 1)) return false;
    if (plan.distance < 0 || plan.distance > 1 << 16 || plan.chunks < 1 || plan.chunks > 64) return false;
    const bool more = rows > SMALL_BATCH;
    if (more ? plan.streams != streams_of(format, true) : plan.streams != 2 && plan.streams != 4) return false;
    ReadPlan& own = plans[format][class_of(rows)];
    write(own.hint, plan.hint), write(own.distance, plan.distance);
    write(own.streams, plan.streams), write(own.chunks, plan.chunks);
    return true;
  }

 private:
  static constexpr int FORMATS = 5, CLASSES = 3;

  static constexpr int class_of(int64_t rows) { return rows == 1 ? 0 : rows <= SMALL_BATCH ? 1 : 2; }

  // Another thread may set a plan during a product; any mixture of two plans is a plan.
  static INLINE int32_t read(const int32_t& from) { return __atomic_load_n(&from, __ATOMIC_RELAXED); }
  static void write(int32_t& to, int32_t value) { __atomic_store_n(&to, value, __ATOMIC_RELAXED); }

  ReadPlan plans[FORMATS][CLASSES];
};

static ReadPlans read_plans;

// Outputs of one iteration of a parallel loop over `outputs` outputs of W.
INLINE int64_t chunk_of(const Matrix& w, int64_t outputs, int64_t rows, int64_t threads) {
  return round_up(outputs / (read_plans.get(w.format, rows).chunks * threads) + 1, 16);
}

}  // namespace matrices
