// The highest level of build.py that an AArch64 machine can run. `level_of` compiles on every architecture, for tests.
#pragma once

#include <stdint.h>

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#include <sys/prctl.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace arm_level {

// What a machine has, in the order of Linux's <asm/hwcap.h>; `vector_bytes`: the length of SVE vectors, 0 without SVE.
struct Features {
  bool atomics, dot_product, i8mm, bf16, sve_i8mm, sve_bf16;
  int vector_bytes;
};

// The index in the table of levels: base, neon_dotprod, neon_i8mm_bf16, sve256. The compiler may use the atomics of Armv8.1
// in all but the first.
constexpr int level_of(const Features& f) {
  if (!f.atomics || !f.dot_product) return 0;
  if (!f.i8mm || !f.bf16) return 1;
  return f.sve_i8mm && f.sve_bf16 && f.vector_bytes == 32 ? 3 : 2;
}

// The features in the words AT_HWCAP and AT_HWCAP2 of Linux's auxiliary vector.
constexpr Features features_of(uint64_t hwcap, uint64_t hwcap2, int vector_bytes) {
  return {(hwcap >> 8 & 1) != 0,   (hwcap >> 20 & 1) != 0, (hwcap2 >> 13 & 1) != 0, (hwcap2 >> 14 & 1) != 0,
          (hwcap2 >> 9 & 1) != 0, (hwcap2 >> 12 & 1) != 0, hwcap >> 22 & 1 ? vector_bytes : 0};
}

#if defined(__aarch64__) && defined(__linux__)
inline int level() {
  constexpr int SVE_GET_VL = 51;  // PR_SVE_GET_VL, which old headers lack; the low 16 bits are the length in bytes
  const int length = prctl(SVE_GET_VL, 0, 0, 0, 0);
  return level_of(features_of(getauxval(AT_HWCAP), getauxval(AT_HWCAP2), length < 0 ? 0 : length & 0xffff));
}
#elif defined(__aarch64__) && defined(__APPLE__)
inline int level() {
  const auto has = [](const char* name) {
    int value = 0;
    size_t size = sizeof value;
    return !sysctlbyname(name, &value, &size, nullptr, 0) && value;
  };
  return level_of({has("hw.optional.arm.FEAT_LSE"), has("hw.optional.arm.FEAT_DotProd"), has("hw.optional.arm.FEAT_I8MM"),
                   has("hw.optional.arm.FEAT_BF16"), false, false, 0});
}
#else
inline int level() { return 0; }
#endif

}  // namespace arm_level
