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

// One adapter on one linear layer, a row of the table: addresses of down [rank, in] and up [rank, out]; rank 0 for none.
struct Part {
  int64_t down, up, rank;
};

template <class T>
void lora_typed(const Tensor& x, Tensor& y, const Part* parts, const int64_t* owners, int64_t tokens) {
  const int64_t in = x.size(x.dim() - 1), width = y.size(y.dim() - 1);
  const T* xs = static_cast<const T*>(x.data_ptr());
  T* ys = static_cast<T*>(y.data_ptr());
  const Part none{0, 0, 0};
  auto part = [&](int64_t t) -> const Part& { return owners[t] < 0 ? none : parts[owners[t]]; };
  int64_t rows = 0;
  for (int64_t t = 0; t < tokens; t++) rows += part(t).rank;
  const int64_t each = std::max<int64_t>(1, rows * (in + width) / std::max<int64_t>(1, tokens));
  const int64_t grain = std::max<int64_t>(1, 65536 / each);
  torch::stable::parallel_for(0, tokens, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> weights;
    for (int64_t t = begin; t < end; t++) {
      const int64_t rank = part(t).rank;
      if (rank == 0) continue;
      const T *down = reinterpret_cast<const T*>(part(t).down), *up = reinterpret_cast<const T*>(part(t).up);
      weights.resize(rank);
      for (int64_t r = 0; r < rank; r++) {
        fetch(up + r * width, width);  // the next to be read, while this one is multiplied
        if (r + 1 < rank) fetch(down + (r + 1) * in, in);
        weights[r] = dot_rows(xs + t * in, down + r * in, in);
      }
      if (t + 1 < end && part(t + 1).rank > 0) fetch(reinterpret_cast<const T*>(part(t + 1).down), in);
      add_rows(weights.data(), up, rank, width, ys + t * width);
    }
  });
}

// x [.., in] and y [.., out] of T tokens; table [linears, slots, 3] int64, each slot a Part; owners [T] int64 on the CPU: the
// slot of token t's adapter, -1 for none. Addresses instead of tensors, so that a compiled forward has one input for all
// adapters on all layers, and adapters may come and go under it; `lora.Loras` keeps the tensors alive.
void lora(const Tensor& x, Tensor y, const Tensor& table, int64_t linear, const Tensor& owners) {
  const bool wide = y.scalar_type() == ScalarType::Float;
  STD_TORCH_CHECK(wide || y.scalar_type() == ScalarType::BFloat16, "lora: float32 or bfloat16");
  STD_TORCH_CHECK(x.scalar_type() == y.scalar_type(), "lora: both in one dtype");
  STD_TORCH_CHECK(y.is_contiguous() && table.is_contiguous() && owners.is_contiguous(), "lora: all contiguous");
  STD_TORCH_CHECK(table.scalar_type() == ScalarType::Long && owners.scalar_type() == ScalarType::Long &&
                      table.dim() == 3 && table.size(2) == 3 && linear >= 0 && linear < table.size(0),
                  "lora: a table of layers and adapters");
  const int64_t tokens = owners.numel(), slots = table.size(1);
  STD_TORCH_CHECK(x.numel() == tokens * x.size(x.dim() - 1) && y.numel() == tokens * y.size(y.dim() - 1),
                  "lora: an adapted layer did not see every token of the batch");
  const int64_t* owner = static_cast<const int64_t*>(owners.data_ptr());
  for (int64_t t = 0; t < tokens; t++) STD_TORCH_CHECK(owner[t] < slots, "lora: no such adapter");
  const Part* parts = static_cast<const Part*>(table.data_ptr()) + linear * slots;
  const Tensor input = torch::stable::contiguous(x);
  (wide ? lora_typed<float> : lora_typed<bf16>)(input, y, parts, owner, tokens);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(trimtab, m) {
  m.def("lora(Tensor x, Tensor(a!) y, Tensor table, int linear, Tensor owners) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(trimtab, CPU, m) { m.impl("lora", TORCH_BOX(&lora)); }
