// exp, sigmoid, tanh and the activations on vectors of floats, accurate to a few ulp; horizontal sums of several vectors.
#pragma once

#include <initializer_list>
#include <type_traits>
#include <utility>

#include "simd.hpp"

namespace matrices {

INLINE Floats smallest(Floats a, Floats b) { return a < b ? a : b; }

// ---------------------------------------------------------------------------- LANES horizontal sums at once

// One step of a pairwise reduction: in both vectors, each run of 2 * D lanes is folded into D lanes.
constexpr int lane(int index, int run, int half) { return index / run * 2 * run + half * run + index % run; }

template <int D, size_t... L>
INLINE Floats folded(Floats a, Floats b, std::index_sequence<L...>) {
  return __builtin_shufflevector(a, b, lane(L, D, 0)...) + __builtin_shufflevector(a, b, lane(L, D, 1)...);
}

// Lane i is the sum of the lanes of x[i], for LANES vectors.
template <int D = LANES / 2>
INLINE Floats sums(const Floats* x) {
  Floats halves[D];
  UNROLL for (int i = 0; i < D; ++i)
    halves[i] = folded<D>(x[2 * i], x[2 * i + 1], std::make_index_sequence<LANES>());
  if constexpr (D == 1)
    return halves[0];
  else
    return sums<D / 2>(halves);
}

// ---------------------------------------------------------------------------- powers of e

// e^x = scale * (1 + rest): scale = 2^n with integer n, and rest = e^r - 1 for |r| <= log(2) / 2. The polynomial interpolates
// (e^r - 1 - r) / r^2 at the Chebyshev nodes, with an error of 1.1e-8.
struct Power {
  Floats scale, rest;
};

INLINE Power power(Floats x) {
  x = smallest(all(88.0f), largest(all(-87.0f), x));  // 2^n stays a normal number, and NaN stays NaN
  Ints n = nearest(x * 1.44269504f);
  Floats nf = __builtin_convertvector(n, Floats);
  Floats r = (x - nf * 0.693145752f) - nf * 1.42860677e-6f;  // log(2) as high + low: n * high is exact
  Floats p = all(0.0013934545f);
  for (float c : {0.0083637768f, 0.0416664556f, 0.1666657329f, 0.5f}) p = p * r + c;
  return {bits<Floats>((bits<Words>(n) + 127u) << 23), r + r * r * p};  // unsigned: for NaN, n is arbitrary and may overflow
}

INLINE Floats exp(Floats x) {
  Power e = power(x);
  return e.scale + e.scale * e.rest;
}

INLINE Floats sigmoid(Floats x) { return 1.0f / (1.0f + exp(-x)); }

// (e^2x - 1) / (e^2x + 1), with e^2x - 1 computed without cancellation for small x.
INLINE Floats tanh(Floats x) {
  Power e = power(2.0f * x);
  Floats expm1 = (e.scale - 1.0f) + e.scale * e.rest;
  return expm1 / (expm1 + 2.0f);
}

// The cumulative distribution function of the standard normal distribution. With z = |x| / sqrt(2) and t = 1 / (1 + z / 2),
// erfc(z) * e^(z * z) is approximated by a polynomial in t for z up to 6.5 (interpolation at the Chebyshev nodes, relative
// error 2e-7); for larger z the tail is below the rounding error of 1.
INLINE Floats normal_cdf(Floats x) {
  Floats z = magnitude(x) * 0.70710678f;
  Floats t = 1.0f / (1.0f + 0.5f * z);
  Floats p = all(-0.034803495f);
  for (float c : {0.1541862f, -0.18396893f, -0.121766195f, 0.30219772f, 0.028069453f, 0.30289504f, 0.2696584f,
                  0.2836102f, -7.838735e-05f})
    p = p * t + c;
  Floats tail = 0.5f * p * exp(-z * z);
  return x < 0.0f ? tail : 1.0f - tail;
}

// ---------------------------------------------------------------------------- activations

// In the order of spec.ACTIVATIONS.
enum Activation : int32_t { GELU, GELU_TANH, QUICK_GELU, RELU, RELU2, SILU };

template <Activation A>
INLINE Floats activated(Floats x) {
  if constexpr (A == GELU) return x * normal_cdf(x);
  // x * (1 + tanh(u)) / 2 = x * sigmoid(2 * u), u = sqrt(2 / pi) * (x + 0.044715 * x^3)
  if constexpr (A == GELU_TANH) return x * sigmoid(x * (1.59576912f + 0.0713548163f * x * x));
  if constexpr (A == QUICK_GELU) return x * sigmoid(1.702f * x);
  if constexpr (A == RELU) return largest(Floats{}, x);  // NaN propagates only with the operands in this order
  if constexpr (A == RELU2) return largest(Floats{}, x) * largest(Floats{}, x);
  if constexpr (A == SILU) return x * sigmoid(x);
}

// x[i] = f(x[i]); the remainder is computed in a padded buffer.
template <class F>
INLINE void each(float* x, int64_t count, F f) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) store(x + i, f(read(x + i)));
  if (i == count) return;
  float rest[LANES] = {};
  memcpy(rest, x + i, (count - i) * sizeof(float));
  store(rest, f(read(rest)));
  memcpy(x + i, rest, (count - i) * sizeof(float));
}

template <Activation A>
using Chosen = std::integral_constant<Activation, A>;

// Calls f with the activation as a std::integral_constant, so that its loops are instantiated for it; false for an unknown
// `kind`.
template <class F>
INLINE bool choose(int32_t kind, F f) {
  switch (kind) {
    case GELU: return f(Chosen<GELU>()), true;
    case GELU_TANH: return f(Chosen<GELU_TANH>()), true;
    case QUICK_GELU: return f(Chosen<QUICK_GELU>()), true;
    case RELU: return f(Chosen<RELU>()), true;
    case RELU2: return f(Chosen<RELU2>()), true;
    case SILU: return f(Chosen<SILU>()), true;
  }
  return false;
}

inline void activate(int32_t kind, float* x, int64_t count) {
  choose(kind, [&](auto act) { each(x, count, activated<decltype(act)::value>); });
}

}  // namespace matrices

namespace decode {
using namespace matrices;
}
