// What the CPU kernels share: vectors of 16 floats (8 without AVX-512), and bf16.
//
// Written with GCC vector extensions, which compile to AVX-512, AVX2 or NEON. Sums are always fp32.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <vector>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#ifdef __AVX512F__
constexpr int kLanes = 16;
#else  // wider vectors than the machine's would be kept in memory
constexpr int kLanes = 8;
#endif
// F16 and its kin are named by their widest.
typedef float F16 __attribute__((vector_size(4 * kLanes)));
typedef int32_t I16 __attribute__((vector_size(4 * kLanes)));
typedef uint32_t U16 __attribute__((vector_size(4 * kLanes)));
typedef uint16_t H16 __attribute__((vector_size(2 * kLanes)));

struct bf16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
inline void from_float(float x, float* out) { *out = x; }
inline void from_float(float x, bf16* out) {  // round to nearest even, NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  out->bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline F16 load(const float* p) {
  F16 out;
  std::memcpy(&out, p, sizeof out);
  return out;
}
inline F16 load(const bf16* p) {
  H16 half;
  std::memcpy(&half, p, sizeof half);
  return (F16)(__builtin_convertvector(half, U16) << 16);
}
inline H16 to_bf16(F16 x) {  // as `from_float`, 16 at once
  U16 bits = (U16)x;
  bits = (x != x) ? U16{} + 0x7fc00000u : bits + 0x7fff + ((bits >> 16) & 1);
  return __builtin_convertvector(bits >> 16, H16);
}
inline F16 splat(float x) { return F16{} + x; }
template <class T>
inline F16 load_some(const T* p, int64_t count, float rest) {  // `rest` beyond the first `count`
  if (count >= kLanes) return load(p);
  F16 out = splat(rest);
  for (int64_t i = 0; i < count; i++) out[i] = to_float(p[i]);
  return out;
}
template <class T, class Use>
inline void each(const T* p, int64_t count, float rest, Use use) {  // use(i, the 16 values from i on)
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) use(i, load(p + i));
  if (i < count) use(i, load_some(p + i, count - i, rest));
}
inline void store(float* p, F16 x) { std::memcpy(p, &x, sizeof x); }
inline void store_some(float* p, F16 x, int64_t count) {
  if (count >= kLanes) return store(p, x);
  std::memcpy(p, &x, count * sizeof(float));
}
inline I16 counted() {  // 0, 1, .. 15
  I16 out;
  for (int i = 0; i < kLanes; i++) out[i] = i;
  return out;
}
#ifdef __AVX512F__  // one instruction each, with these very semantics for NaN; GCC makes two of the selections below
inline F16 least(F16 a, F16 b) { return (F16)_mm512_min_ps((__m512)a, (__m512)b); }
inline F16 most(F16 a, F16 b) { return (F16)_mm512_max_ps((__m512)a, (__m512)b); }
#else
inline F16 least(F16 a, F16 b) { return a < b ? a : b; }
inline F16 most(F16 a, F16 b) { return a > b ? a : b; }
#endif
inline float sum(F16 x) {
  float total = 0;
  for (int i = 0; i < kLanes; i++) total += x[i];
  return total;
}

// exp, relative error below 2e-7 (Cephes' polynomial); underflows to about 1e-38 instead of 0.
inline F16 exponential(F16 x) {
  x = least(most(x, splat(-87.0f)), splat(88.0f));
  // Added to 1.5 x 2^23, a number is rounded to a whole one, which is then in the low bits.
  const F16 whole = x * 1.44269504088896341f + 12582912.0f, n = whole - 12582912.0f;
  F16 r = x - n * 0.693359375f + n * 2.12194440e-4f;
  F16 p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return (F16)((I16)p + ((I16)whole << 23));
}

// Rows index[i] of a matrix [R, V] of fp32 or bf16, of which the first `width` columns count.
class Picked {
 public:
  Picked(const Tensor& rows, const int64_t* index, int64_t n, int64_t width)
      : data_(rows.data_ptr()), index_(index), stride_(rows.stride(0)), wide_(rows.scalar_type() == ScalarType::Float) {
    STD_TORCH_CHECK(wide_ || rows.scalar_type() == ScalarType::BFloat16, "rows: float32 or bfloat16");
    STD_TORCH_CHECK(rows.stride(1) == 1 && width <= rows.size(1), "rows: too narrow, or not row by row");
    for (int64_t i = 0; i < n; i++) STD_TORCH_CHECK(index[i] >= 0 && index[i] < rows.size(0), "rows: no such row");
  }

  template <class Use>
  void visit(int64_t i, Use use) const {  // use(pointer to the row), in its own type
    const int64_t at = index_[i] * stride_;
    if (wide_) use(static_cast<const float*>(data_) + at);
    else use(static_cast<const bf16*>(data_) + at);
  }

 private:
  const void* data_;
  const int64_t* index_;
  int64_t stride_;
  bool wide_;
};

}  // namespace
