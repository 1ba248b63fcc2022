// Products of few rows of x with all rows of w, so that w streams through memory once and is used where it lies;
// `torch.nn.functional.linear` is the specification. A row's sums have the same order whatever the other rows are.
#include "host_vectors.h"
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

#ifdef __AVX512BF16__
using Wide = __m512bh;
constexpr int64_t kStep = 32;
inline Wide load_wide(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }
inline F16 dot(F16 total, Wide a, Wide b) { return (F16)_mm512_dpbf16_ps((__m512)total, a, b); }

// Sums of 16 vectors at once, as one vector: a tree of transposing additions.
inline F16 sum_each(const F16* x) {
  __m512 quad[4];
  for (int i = 0; i < 4; i++) {
    __m512 a = (__m512)x[4 * i], b = (__m512)x[4 * i + 1], c = (__m512)x[4 * i + 2], d = (__m512)x[4 * i + 3];
    __m512d ab = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
    __m512d cd = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d)));
    quad[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)), _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
  }
  __m512 low = _mm512_add_ps(_mm512_shuffle_f32x4(quad[0], quad[1], 0x44), _mm512_shuffle_f32x4(quad[0], quad[1], 0xee));
  __m512 top = _mm512_add_ps(_mm512_shuffle_f32x4(quad[2], quad[3], 0x44), _mm512_shuffle_f32x4(quad[2], quad[3], 0xee));
  return (F16)_mm512_add_ps(_mm512_shuffle_f32x4(low, top, 0x88), _mm512_shuffle_f32x4(low, top, 0xdd));
}
#else
using Wide = F16;
constexpr int64_t kStep = kLanes;
inline Wide load_wide(const bf16* p) { return load(p); }
inline F16 dot(F16 total, Wide a, Wide b) { return total + a * b; }
inline F16 sum_each(const F16* x) {
  F16 out;
  for (int i = 0; i < kLanes; i++) out[i] = sum(x[i]);
  return out;
}
#endif

// M rows of x times N rows of w -> out [M, N]; meanwhile P lines a step are fetched of what comes next, `ahead`.
template <int M, int N, int P>
void product(const bf16* x, const bf16* w, int64_t depth, const char* ahead, F16* out) {
  F16 total[(M * N + kLanes - 1) / kLanes * kLanes] = {};
  for (int64_t k = 0; k < depth; k += kStep) {
    Wide weights[N];
    for (int n = 0; n < N; n++) weights[n] = load_wide(w + n * depth + k);
    for (int p = 0; p < P; p++) __builtin_prefetch(ahead + p * 64, 0, 2);
    ahead += P * 64;
    for (int m = 0; m < M; m++) {
      Wide row = load_wide(x + m * depth + k);
      for (int n = 0; n < N; n++) total[m * N + n] = dot(total[m * N + n], row, weights[n]);
    }
  }
  for (int i = 0; i < M * N; i += kLanes) out[i / kLanes] = sum_each(total + i);
}

struct Product {
  const bf16 *x, *w, *bias;
  bf16* out;
  int64_t rows, depth, width;

  template <int M, int N, int P>
  void tile(int64_t row, int64_t column, const char* ahead) const {  // M rows of N columns of the output
    constexpr int kParts = (M * N + kLanes - 1) / kLanes;
    F16 sums[kParts];
    H16 rounded[kParts];
    product<M, N, P>(x + row * depth, w + column * depth, depth, ahead, sums);
    if (bias) {
      float extra[kParts * kLanes] = {};
      for (int i = 0; i < M * N; i++) extra[i] = to_float(bias[column + i % N]);
      for (int i = 0; i < kParts; i++) sums[i] += load(extra + i * kLanes);
    }
    for (int i = 0; i < kParts; i++) rounded[i] = to_bf16(sums[i]);
    const bf16* from = reinterpret_cast<const bf16*>(rounded);
    for (int m = 0; m < M; m++) std::memcpy(out + (row + m) * width + column, from + m * N, N * sizeof(bf16));
  }

  template <int N>
  void together(int64_t column) const {  // N columns of the output, up to eight rows at once: w is read once
    const char* ahead = reinterpret_cast<const char*>(w + (column + N) * depth);
    switch (rows) {
      case 8: return tile<8, N, 3>(0, column, ahead);
      case 7: return tile<7, N, 3>(0, column, ahead);
      case 6: return tile<6, N, 3>(0, column, ahead);
      case 5: return tile<5, N, 3>(0, column, ahead);
      case 4: return tile<4, N, 4>(0, column, ahead);
      case 3: return tile<3, N, 4>(0, column, ahead);
      case 2: return tile<2, N, 4>(0, column, ahead);
      default: return tile<1, N, 4>(0, column, ahead);
    }
  }

  template <int N, int P>
  void by_fours(int64_t column) const {  // N columns of the output, all rows, four at a time
    const char* ahead = reinterpret_cast<const char*>(w + (column + N) * depth);
    for (int64_t row = 0; row < rows; row += 4, ahead += P * 64 * (depth / kStep)) {
      switch (std::min<int64_t>(4, rows - row)) {
        case 4: tile<4, N, P>(row, column, ahead); break;
        case 3: tile<3, N, P>(row, column, ahead); break;
        case 2: tile<2, N, P>(row, column, ahead); break;
        default: tile<1, N, P>(row, column, ahead);
      }
    }
  }

  void run(int64_t begin, int64_t end) const {  // columns 4 * begin .. 4 * end
    int64_t column = begin * 4, last = std::min(end * 4, width);
    if (rows <= 4)
      for (; column + 4 <= last; column += 4) together<4>(column);
    else if (rows <= 8)
      for (; column + 3 <= last; column += 3) together<3>(column);
    else
      for (; column + 6 <= last; column += 6) by_fours<6, 2>(column);
    for (; column < last; column++) by_fours<1, 1>(column);
  }
};

// x [..., K] bf16 with at most 64 rows, weight [N, K] bf16, bias [N] or none -> [..., N] bf16. K divides by 32.
Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  Tensor input = torch::stable::contiguous(x);
  int64_t depth = weight.size(1), width = weight.size(0), rows = input.numel() / depth;
  STD_TORCH_CHECK(rows <= 64 && depth % 32 == 0 && weight.is_contiguous(), "linear: too many rows, or K % 32 != 0");
  std::vector<int64_t> shape(input.sizes().begin(), input.sizes().end());
  shape.back() = width;
  Tensor out = torch::stable::new_empty(input, shape);
  Product product{static_cast<const bf16*>(input.data_ptr()), static_cast<const bf16*>(weight.data_ptr()),
                  bias ? static_cast<const bf16*>(bias->data_ptr()) : nullptr, static_cast<bf16*>(out.data_ptr()),
                  rows, depth, width};
  if (rows == 0) return out;  // a forward in which no row is wanted
  const int64_t grain = std::max<int64_t>(1, 16384 / depth);
  torch::stable::parallel_for(0, (width + 3) / 4, grain, [&](int64_t begin, int64_t end) { product.run(begin, end); });
  return out;
}

// Up to how many rows this machine gains from `linear`: without bf16 instructions it is arithmetic that decides.
int64_t few_rows() {
#if defined(__AVX512BF16__)
  return 64;
#elif defined(__AVX512F__)
  return 4;
#else
  return 1;
#endif
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(trimtab, m) {
  m.def("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def("few_rows() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(trimtab, CPU, m) { m.impl("linear", TORCH_BOX(&linear)); }

STABLE_TORCH_LIBRARY_IMPL(trimtab, CompositeExplicitAutograd, m) { m.impl("few_rows", TORCH_BOX(&few_rows)); }
