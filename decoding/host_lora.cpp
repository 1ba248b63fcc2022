// LoRA of few tokens, each with its own adapter: y_t += (x_t down_i^T) up_i over the rows i of token t's adapter.
// Work is per token, so that a token costs its own adapter only; sums are fp32, y is rounded once.
#include "host_vectors.h"
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

template <class T>
void fetch(const T* p, int64_t n) {
  for (int64_t k = 0; k < n; k += 64 / int64_t(sizeof(T))) __builtin_prefetch(p + k, 0, 2);
}

template <class T>
float dot_rows(const T* a, const T* b, int64_t n) {
  F16 totals[4] = {};
  int64_t k = 0;
  for (; k + 4 * kLanes <= n; k += 4 * kLanes)
    for (int i = 0; i < 4; i++) totals[i] += load(a + k + i * kLanes) * load(b + k + i * kLanes);
  float total = sum((totals[0] + totals[1]) + (totals[2] + totals[3]));
  for (; k < n; k++) total += to_float(a[k]) * to_float(b[k]);
  return total;
}

#ifdef __AVX512BF16__
template <>
float dot_rows(const bf16* a, const bf16* b, int64_t n) {
  __m512 totals[4] = {};
  auto wide = [](const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); };
  int64_t k = 0;
  for (; k + 128 <= n; k += 128)
    for (int i = 0; i < 4; i++) totals[i] = _mm512_dpbf16_ps(totals[i], wide(a + k + 32 * i), wide(b + k + 32 * i));
  float total = sum((F16)_mm512_add_ps(_mm512_add_ps(totals[0], totals[1]), _mm512_add_ps(totals[2], totals[3])));
  for (; k < n; k++) total += to_float(a[k]) * to_float(b[k]);
  return total;
}
#endif

// y[0 .. n) += sum_r weights[r] * up[r], a few vectors of y at a time.
template <class T>
void add_rows(const float* weights, const T* up, int64_t rank, int64_t n, T* y) {
  constexpr int kWide = 4 * kLanes;
  for (int64_t k = 0; k < n; k += kWide) {
    float total[kWide];
    const int64_t taken = std::min<int64_t>(kWide, n - k);
    if (taken == kWide) {
      F16 totals[4];
      for (int i = 0; i < 4; i++) totals[i] = load(y + k + i * kLanes);
      for (int64_t r = 0; r < rank; r++)
        for (int i = 0; i < 4; i++) totals[i] += splat(weights[r]) * load(up + r * n + k + i * kLanes);
      for (int i = 0; i < 4; i++) store(total + i * kLanes, totals[i]);
      for (int j = 0; j < kWide; j++) from_float(total[j], y + k + j);
    } else {
      for (int64_t j = 0; j < taken; j++) {
        total[j] = to_float(y[k + j]);
        for (int64_t r = 0; r < rank; r++) total[j] += weights[r] * to_float(up[r * n + k + j]);
        from_float(total[j], y + k + j);
      }
    }
  }
}

template <class T>
void lora_typed(const Tensor& x, Tensor& y, const Tensor& down, const Tensor& up, const int64_t* ranges) {
  const int64_t in = down.size(1), width = up.size(1), tokens = x.numel() / in;
  const T *xs = static_cast<const T*>(x.data_ptr()), *downs = static_cast<const T*>(down.data_ptr());
  const T* ups = static_cast<const T*>(up.data_ptr());
  T* ys = static_cast<T*>(y.data_ptr());
  int64_t rows = 0;
  for (int64_t t = 0; t < tokens; t++) rows += ranges[2 * t + 1] - ranges[2 * t];
  const int64_t each = std::max<int64_t>(1, rows * (in + width) / std::max<int64_t>(1, tokens));
  const int64_t grain = std::max<int64_t>(1, 65536 / each);
  torch::stable::parallel_for(0, tokens, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> weights;
    for (int64_t t = begin; t < end; t++) {
      const int64_t first = ranges[2 * t], rank = ranges[2 * t + 1] - first;
      weights.resize(rank);
      for (int64_t r = 0; r < rank; r++) {
        fetch(ups + (first + r) * width, width);  // the next to be read, while this one is multiplied
        if (r + 1 < rank) fetch(downs + (first + r + 1) * in, in);
        weights[r] = dot_rows(xs + t * in, downs + (first + r) * in, in);
      }
      if (t + 1 < end) fetch(downs + ranges[2 * t + 2] * in, ranges[2 * t + 3] > ranges[2 * t + 2] ? in : 0);
      if (rank > 0) add_rows(weights.data(), ups + first * width, rank, width, ys + t * width);
    }
  });
}

// x [.., in] and y [.., out] of T tokens, down [K, in], up [K, out], ranges [T, 2] int64 on the CPU: the rows of token t's adapter.
void lora(const Tensor& x, Tensor y, const Tensor& down, const Tensor& up, const Tensor& ranges) {
  const bool wide = y.scalar_type() == ScalarType::Float;
  STD_TORCH_CHECK(wide || y.scalar_type() == ScalarType::BFloat16, "lora: float32 or bfloat16");
  STD_TORCH_CHECK(x.scalar_type() == y.scalar_type() && down.scalar_type() == y.scalar_type() &&
                      up.scalar_type() == y.scalar_type(), "lora: all in one dtype");
  STD_TORCH_CHECK(y.is_contiguous() && down.is_contiguous() && up.is_contiguous() && ranges.is_contiguous(),
                  "lora: all contiguous");
  STD_TORCH_CHECK(ranges.scalar_type() == ScalarType::Long && down.size(0) == up.size(0) &&
                      x.numel() == ranges.size(0) * down.size(1) && y.numel() == ranges.size(0) * up.size(1),
                  "lora: an adapted layer did not see every token of the batch");
  const Tensor input = torch::stable::contiguous(x);
  (wide ? lora_typed<float> : lora_typed<bf16>)(input, y, down, up, static_cast<const int64_t*>(ranges.data_ptr()));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(trimtab, m) {
  m.def("lora(Tensor x, Tensor(a!) y, Tensor down, Tensor up, Tensor ranges) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(trimtab, CPU, m) { m.impl("lora", TORCH_BOX(&lora)); }
