// monoblock's native kernels: one translation unit, compiled once per instruction set (see build.py), with a C interface for
// ctypes. The code uses vector extensions; only dot-product instructions and masked loads are intrinsics.
#if defined(__x86_64__) || defined(_M_X64)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "abi.hpp"
#include "arm_level.hpp"
#include "attention.hpp"
#include "bandwidth.hpp"
#include "decode_step.hpp"
#include "matrix.hpp"
#include "packed_forward.hpp"
#include "paged_step.hpp"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

// Whether the machine has AMX for bf16 and int8.
bool has_amx() {
#if defined(__x86_64__) || defined(_M_X64)
  static const bool found = [] {  // once: on a virtual machine CPUID causes a VM exit
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1) && (d >> 24 & 1) && (d >> 25 & 1);
  }();
  return found;
#else
  return false;
#endif
}

#if defined(__x86_64__) || defined(_M_X64)
// Asks Linux to let this process use the tile registers, whose state is large; threads that it starts later may use them too.
bool may_use_tiles() {
#if defined(__linux__)
  constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  return !syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA);
#else
  return false;
#endif
}
#endif

}  // namespace

// The index of the highest level of build.py that this machine can run; called on the base library.
EXPORT int mb_level() {
#if defined(__x86_64__) || defined(_M_X64)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
    return 1;
  if (!__builtin_cpu_supports("avx512vnni") || !__builtin_cpu_supports("avx512bf16")) return 2;
  return has_amx() && may_use_tiles() ? 4 : 3;
#else
  return arm_level::level();
#endif
}

// Whether the machine has AMX, which PyTorch's products in bf16 use.
EXPORT int mb_amx() { return has_amx(); }

// The digest (build.py) of the sources that the library was built from.
EXPORT const char* mb_sources() { return MB_SOURCES; }

// Whether the library was built with OpenMP; without it, calls run on threads of its own (thread_pool.hpp).
EXPORT int mb_openmp() {
#if defined(_OPENMP)
  return 1;
#else
  return 0;
#endif
}

// Sizes and offsets of the structures of the interface; the last entry's name is null.
EXPORT const abi::LayoutEntry* mb_layout() { return abi::LAYOUT; }

EXPORT int mb_linear(const Matrix* m, const void* x, int32_t x_format, int64_t ldx, int64_t rows, void* y,
                     int32_t y_format, int64_t ldy, int threads) {
  return matrices::linear(*m, x, x_format, ldx, rows, y, y_format, ldy, threads);
}

// How products of a format with this many rows of inputs read their weights; 1 if there is no such plan. See read_plan.hpp.
EXPORT int mb_read_plan(int32_t format, int64_t rows, ReadPlan* plan) {
  if (!matrices::ReadPlans::has(format, rows)) return 1;
  *plan = matrices::read_plans.get(format, rows);
  return 0;
}
EXPORT int mb_set_read_plan(int32_t format, int64_t rows, const ReadPlan* plan) {
  return !matrices::read_plans.set(format, rows, *plan);
}

// y (rows, outputs) = x (rows, inputs) W^T for up to 16 rows of float32, with the chunks of a decoding step; for tuning.py.
EXPORT int mb_product(const Matrix* m, const float* x, int64_t rows, float* y, int threads) {
  return matrices::product_by_plan(*m, x, int(rows), y, threads);
}

// Decompresses a LOSSLESS matrix to bf16 (outputs, inputs).
EXPORT int mb_unfold(const Matrix* m, uint16_t* to, int threads) {
  matrices::decompress(*m, to, threads);
  return 0;
}

// Reads `bytes` bytes once, for bandwidth measurements; stores a checksum in `sum`.
EXPORT int mb_read(const void* data, int64_t bytes, int threads, uint32_t* sum) {
  *sum = matrices::read_all(data, bytes, threads);
  return 0;
}

// Operations of a prompt; see attention.hpp and prompt_ops.hpp.
EXPORT int mb_attention(const prompt::AttentionCall* a) { return prompt::attention(*a); }
EXPORT int mb_norm(const prompt::NormCall* a) { return prompt::norm(*a); }
EXPORT int mb_rope(const prompt::RopeCall* a) { return prompt::rope(*a); }
EXPORT int mb_activate(const prompt::ActivationCall* a) { return prompt::activate(*a); }

// One decode step; see decode_step.hpp.
EXPORT int64_t mb_step(const decode::ModelWeights* model, const decode::DecodeStep* step) {
  return decode::step(*model, *step);
}

// A forward pass over sequences without padding; see packed_forward.hpp.
EXPORT int64_t mb_forward(const decode::ModelWeights* model, const packed::PackedForward* call) {
  return packed::forward(*model, *call);
}

// One step of an engine over a paged KV cache; see paged_step.hpp.
EXPORT int64_t mb_paged_step(const decode::ModelWeights* model, const paged::PagedStep* step) {
  return paged::step(*model, *step);
}

// Elements of a block of one head and layer of the paged cache, and its tokens.
EXPORT int64_t mb_block_size(const decode::ModelWeights* model) { return paged::block_size(*model); }
EXPORT int64_t mb_block_tokens() { return decode::BLOCK_TOKENS; }
