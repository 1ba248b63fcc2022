// What dynamic fusion asks of a whole vocabulary, in one pass each: `solvers._TorchEvidence` is the
// specification. Rows are log-probs b (base), s (small), t (expert), [n, V] fp32; d = t - s.
#include "host_vectors.h"
#ifdef __SSE__
#include <xmmintrin.h>
#endif

namespace {

constexpr int64_t kShare = 2048;  // elements per task: what a task keeps of them fits the first-level cache
constexpr int kAfresh = 4;        // points per exponential: products of rounded ratios drift
constexpr float kLeast = -80.0f;  // below it, a probability counts as 0

struct NoDenormals {  // tails underflow all the time; denormal arithmetic would cost a hundred times as much
#ifdef __SSE__
  unsigned before = _mm_getcsr();
  NoDenormals() { _mm_setcsr(before | 0x8040); }
  ~NoDenormals() { _mm_setcsr(before); }
#endif
};

struct Rows {
  const float *base, *small, *expert;
  int64_t width;
};

// Per row: sum e^b, e^s, e^t, e^b d, e^s d, e^t d, and how many tokens some row cannot say.
constexpr int kSums = 7;

void sums_of(const Rows& r, int64_t row, int64_t begin, int64_t end, float* out) {
  NoDenormals guard;
  F16 eb{}, es{}, et{}, ebd{}, esd{}, etd{}, bad{};
  const F16 one = splat(1.0f), zero{};
  for (int64_t i = begin; i < end; i += kLanes) {
    int64_t at = row * r.width + i, count = end - i;
    F16 b = load_some(r.base + at, count, -1e4f), s = load_some(r.small + at, count, -1e4f);
    F16 t = load_some(r.expert + at, count, -1e4f), d = t - s;
    bad += (b > -1e30f) & (s > -1e30f) & (t > -1e30f) ? zero : one;  // false for NaN too
    F16 p = b > kLeast ? exponential(b) : zero, q = s > kLeast ? exponential(s) : zero;
    F16 w = t > kLeast ? exponential(t) : zero;
    eb += p, es += q, et += w;
    ebd += p * d, esd += q * d, etd += w * d;
  }
  const F16 all[] = {eb, es, et, ebd, esd, etd};
  for (int k = 0; k < 6; k++) out[k] = sum(all[k]);
  out[6] = sum(bad);
}

// For a = start + k step, k < points: top, sum of e^(b + a d - top), and of the same times d. `top` is the largest
// exponent of the points' group, so that nothing that counts underflows, however far apart the rows are. All 0 if
// `start` is NaN, which is the caller's way to leave a cell out.
constexpr int kMoments = 3;

void moments_of(const Rows& r, int64_t row, int64_t begin, int64_t end, float start, float step, int64_t points,
                float* out) {
  if (start != start) return void(std::fill(out, out + kMoments * points, 0.0f));
  NoDenormals guard;
  alignas(64) float base[kShare], delta[kShare], ratio[kShare];
  const int64_t taken = end - begin;
  for (int64_t i = 0; i < taken; i += kLanes) {
    int64_t at = row * r.width + begin + i, count = taken - i;
    F16 d = load_some(r.expert + at, count, 0.0f) - load_some(r.small + at, count, 0.0f);
    store(base + i, load_some(r.base + at, count, -1e4f));
    store(delta + i, d);
    store(ratio + i, exponential(d * step));
  }
  for (int64_t k = 0; k < points; k += kAfresh) {
    const float a = start + float(k) * step;
    F16 high = splat(-1e30f);
    for (int64_t i = 0; i < taken; i += kLanes) high = most(high, load(base + i) + load(delta + i) * a);
    float top = high[0];
    for (int j = 1; j < kLanes; j++) top = std::max(top, high[j]);
    F16 total[kAfresh] = {}, mean[kAfresh] = {};
    for (int64_t i = 0; i < taken; i += kLanes) {
      F16 d = load(delta + i), grow = load(ratio + i), e = exponential(load(base + i) + d * a - top);
      for (int q = 0; q < kAfresh; q++) total[q] += e, mean[q] += e * d, e *= grow;
    }
    for (int q = 0; q < std::min<int64_t>(kAfresh, points - k); q++) {
      float* to = out + kMoments * (k + q);
      to[0] = top, to[1] = sum(total[q]), to[2] = sum(mean[q]);
    }
  }
}

const float* data(const Tensor& x) { return static_cast<const float*>(x.data_ptr()); }

int64_t shares(int64_t width) { return (width + kShare - 1) / kShare; }

// base, small, expert [n, V] fp32, contiguous -> [n, shares, 7] partial sums.
Tensor fusion_sums(const Tensor& base, const Tensor& small, const Tensor& expert) {
  const Rows rows{data(base), data(small), data(expert), base.size(1)};
  const int64_t n = base.size(0), parts = shares(rows.width);
  Tensor out = torch::stable::new_empty(base, {n, parts, int64_t(kSums)});
  float* to = static_cast<float*>(out.data_ptr());
  torch::stable::parallel_for(0, n * parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; task++) {
      const int64_t begin = task % parts * kShare;
      sums_of(rows, task / parts, begin, std::min(begin + kShare, rows.width), to + task * kSums);
    }
  });
  return out;
}

// ... and starts [n, c] -> [n, c, shares, points, 3] partial sums.
Tensor fusion_moments(const Tensor& base, const Tensor& small, const Tensor& expert, const Tensor& starts, double step,
                      int64_t points) {
  const Rows rows{data(base), data(small), data(expert), base.size(1)};
  const int64_t n = base.size(0), cells = starts.size(1), parts = shares(rows.width);
  Tensor out = torch::stable::new_empty(base, {n, cells, parts, points, int64_t(kMoments)});
  float* to = static_cast<float*>(out.data_ptr());
  const float* from = data(starts);
  torch::stable::parallel_for(0, n * cells * parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; task++) {
      const int64_t cell = task / parts, row = cell / cells, begin = task % parts * kShare;
      moments_of(rows, row, begin, std::min(begin + kShare, rows.width), from[cell], float(step), points,
                 to + task * points * kMoments);
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(trimtab, m) {
  m.def("fusion_sums(Tensor base, Tensor small, Tensor expert) -> Tensor");
  m.def(
      "fusion_moments(Tensor base, Tensor small, Tensor expert, Tensor starts, float step, int points) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(trimtab, CPU, m) {
  m.impl("fusion_sums", TORCH_BOX(&fusion_sums));
  m.impl("fusion_moments", TORCH_BOX(&fusion_moments));
}
