// Layer norm and RMS norm, RoPE, and (gated) activations of a prompt, each in one pass over memory. Tensors are float32 or
// bfloat16; arithmetic is float32.
#pragma once

#include <cmath>
#include <cstdint>

#include "parallel.hpp"
#include "vector_math.hpp"

namespace prompt {

using namespace matrices;

constexpr float LOG2E = 1.44269504f;

INLINE Floats iota() {
  Floats x;
  for (int i = 0; i < LANES; ++i) x[i] = float(i);
  return x;
}

// Reads `count` lanes; the others are 0.
template <class T>
INLINE Floats read_some(const T* from, int count) {
  Floats x{};
  for (int i = 0; i < count; ++i) x[i] = read1(from + i);
  return x;
}

template <class T>
INLINE void write_some(T* to, Floats x, int count) {
  for (int i = 0; i < count; ++i) write1(to + i, x[i]);
}

// Calls f(index, lanes) for each vector of `count` elements; the last one may have fewer lanes.
template <class F>
INLINE void over(int64_t count, F f) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) f(i, LANES);
  if (i < count) f(i, int(count - i));
}

template <class T>
INLINE Floats read_up_to(const T* from, int count) {
  return count == LANES ? read(from) : read_some(from, count);
}

template <class T>
INLINE void write_up_to(T* to, Floats x, int count) {
  count == LANES ? write(to, x) : write_some(to, x, count);
}

// 2^x with a relative error of 1e-7; 0 below 2^-125, so that there are no subnormal results. x is at most 127; NaN propagates.
INLINE Floats exp2(Floats x) {
  const Floats least = all(-125.0f), kept = matrices::largest(least, x);
  // Adding 1.5 * 2^23 leaves no bits for a fraction: the low bits of the sum are x, rounded to an integer. With 127 more,
  // they are the biased exponent of 2^x.
  const Floats big = all(0x1.8p23f + 127), rounded = kept + big;
  const Floats r = kept - (rounded - big);
  // The minimax polynomial of degree 6 on [-1/2, 1/2], relative error 2e-9.
  Floats p = all(1.53458008e-4f);
  UNROLL for (float c : {1.33999309e-3f, 9.61848907e-3f, 5.55032864e-2f, 2.40226462e-1f, 6.93147182e-1f, 1.0f}) p =
      p * r + c;
  const Floats scaled = p * (Floats)((Ints)rounded << 23);
  return x < least ? Floats{} : scaled;
}

// ---------------------------------------------------------------------------- norms

// out = norm(x) * weight + bias for rows (rows, width); bias may be null.
struct NormCall {
  const void *x, *weight, *bias;
  void* out;
  int64_t rows, width;
  float eps;
  int32_t bf16, rms, threads;
};

template <class T>
void norm_row(const NormCall& n, int64_t row) {
  const T *x = (const T*)n.x + row * n.width, *weight = (const T*)n.weight, *bias = (const T*)n.bias;
  T* out = (T*)n.out + row * n.width;
  Floats total{}, squares{};
  float mean = 0.0f;
  if (!n.rms) {
    over(n.width, [&](int64_t i, int lanes) { total += read_up_to(x + i, lanes); });
    mean = sum(total) / n.width;
  }
  over(n.width, [&](int64_t i, int lanes) {
    Floats a = read_up_to(x + i, lanes) - mean;
    for (int j = lanes; j < LANES; ++j) a[j] = 0.0f;
    squares += a * a;
  });
  const float factor = 1.0f / std::sqrt(sum(squares) / n.width + n.eps);
  over(n.width, [&](int64_t i, int lanes) {
    Floats a = (read_up_to(x + i, lanes) - mean) * factor;
    a *= read_up_to(weight + i, lanes);
    if (bias) a += read_up_to(bias + i, lanes);
    write_up_to(out + i, a, lanes);
  });
}

inline int norm(const NormCall& n) {
  parallel::static_for(n.rows > 8 ? n.threads : 1, n.rows,
                       [&](int64_t row) { n.bf16 ? norm_row<uint16_t>(n, row) : norm_row<float>(n, row); });
  return 0;
}

// ---------------------------------------------------------------------------- RoPE

// Strides (batch, head, token) in elements; cos and sin are (batch or 1, token, rotary_dim), with batch stride 0 for 1.
// Of the first `rotary_dim` channels, the pairs (a, b) of channels i and i + rotary_dim / 2 are rotated to
// (a cos - b sin, b cos + a sin); the others are copied.
struct RopeCall {
  const void *x, *cos, *sin;
  void* out;
  int64_t x_strides[3], out_strides[3], angle_strides[3];  // the angles have no heads
  int64_t batch, heads, tokens, head_dim, rotary_dim;
  int32_t bf16, threads;
};

template <class T>
void rope_token(const RopeCall& t, int64_t b, int64_t s) {
  const int64_t half = t.rotary_dim / 2, angle = b * t.angle_strides[0] + s * t.angle_strides[2];
  const T *cos = (const T*)t.cos + angle, *sin = (const T*)t.sin + angle;
  for (int64_t h = 0; h < t.heads; ++h) {
    const T* x = (const T*)t.x + b * t.x_strides[0] + h * t.x_strides[1] + s * t.x_strides[2];
    T* out = (T*)t.out + b * t.out_strides[0] + h * t.out_strides[1] + s * t.out_strides[2];
    over(half, [&](int64_t i, int lanes) {
      const Floats one = read_up_to(x + i, lanes), other = read_up_to(x + half + i, lanes);
      write_up_to(out + i, one * read_up_to(cos + i, lanes) - other * read_up_to(sin + i, lanes), lanes);
      write_up_to(out + half + i, other * read_up_to(cos + half + i, lanes) + one * read_up_to(sin + half + i, lanes),
                  lanes);
    });
    for (int64_t i = t.rotary_dim; i < t.head_dim; ++i) out[i] = x[i];
  }
}

inline int rope(const RopeCall& t) {
  parallel::static_for(t.tokens > 8 ? t.threads : 1, t.batch * t.tokens, [&](int64_t i) {
    const int64_t b = i / t.tokens, s = i % t.tokens;
    t.bf16 ? rope_token<uint16_t>(t, b, s) : rope_token<float>(t, b, s);
  });
  return 0;
}

// ---------------------------------------------------------------------------- activations

// out (rows, width) = act(x), or act(gate) * up of x (rows, [gate | up]).
struct ActivationCall {
  const void* x;
  void* out;
  int64_t rows, width;
  int32_t kind, gated, bf16, threads;
};

template <class T, Activation A>
void activate_row(const ActivationCall& a, int64_t row) {
  const T* x = (const T*)a.x + row * a.width * (a.gated ? 2 : 1);
  T* out = (T*)a.out + row * a.width;
  over(a.width, [&](int64_t i, int lanes) {
    Floats y = activated<A>(read_up_to(x + i, lanes));
    if (a.gated) y *= read_up_to(x + a.width + i, lanes);
    write_up_to(out + i, y, lanes);
  });
}

inline int activate(const ActivationCall& a) {
  const bool known = choose(a.kind, [&](auto act) {
    constexpr Activation A = decltype(act)::value;
    parallel::static_for(a.rows > 8 ? a.threads : 1, a.rows, [&](int64_t row) {
      a.bf16 ? activate_row<uint16_t, A>(a, row) : activate_row<float, A>(a, row);
    });
  });
  return !known;
}

}  // namespace prompt
