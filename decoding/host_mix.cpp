// The policy's weighted sum in one pass: each model's row is read where the forward left it, and one fp32 row is
// written. `combine.TorchRows` is the specification.
#include "host_vectors.h"

namespace {

constexpr int64_t kBlock = 2048;  // columns per task: sums and masks of a block stay in the first-level cache
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// What the tokens outside a gate keep.
enum Outside : int64_t { kBase = 0, kOf = 1, kDrop = 2 };

// log sum exp x, NaN where torch's log_softmax is: in rows that hold NaN or +inf, or no finite number.
template <class T>
float log_normaliser(const T* x, int64_t width) {
  F16 high = splat(-kInfinity);
  I16 odd{};
  each(x, width, -kInfinity, [&](int64_t, F16 v) { high = most(high, v), odd |= ~(v < kInfinity); });
  float top = high[0];
  bool sound = true;
  for (int j = 0; j < kLanes; j++) top = std::max(top, high[j]), sound = sound && !odd[j];
  if (!sound || !(top > -kInfinity)) return std::numeric_limits<float>::quiet_NaN();
  double total = 0;
  for (int64_t begin = 0; begin < width; begin += kBlock) {
    F16 part{};  // exp gives at least 1e-38, which is as good as 0 here
    each(x + begin, std::min(kBlock, width - begin), -kInfinity, [&](int64_t, F16 v) { part += exponential(v - top); });
    for (int j = 0; j < kLanes; j++) total += part[j];
  }
  return float(top + std::log(total));
}

struct Plan {
  std::vector<Picked> tracks;
  int64_t n, width, terms;
  const float *shifts, *weights, *least;  // [T, n], [n, J], [G, n]
  const int64_t* last;                    // [G, n]
  std::vector<int64_t> track, gate;       // of each term: which rows, and which gate or -1
  std::vector<int64_t> of, outside;       // of each gate

  template <class Use>
  void visit(int64_t t, int64_t row, Use use) const {
    const float shift = shifts[t * n + row];
    tracks[t].visit(row, [&](auto x) { use(x, shift); });
  }

  void block(int64_t row, int64_t begin, float* to) const {
    const int64_t count = std::min(kBlock, width - begin);
    alignas(64) float sums[kBlock] = {};
    alignas(64) int32_t beyond[kBlock];  // all ones where the current gate is closed
    int64_t current = -1;
    for (int64_t j = 0; j < terms; j++) {
      if (gate[j] >= 0 && gate[j] != current) close(current = gate[j], row, begin, count, sums, beyond);
      const float weight = weights[row * terms + j];
      if (weight == 0) continue;  // dropped, not multiplied: 0 * inf is NaN
      const bool gated = gate[j] >= 0;
      visit(track[j], row, [&](auto x, float shift) {
        each(x + begin, count, 0, [&](int64_t i, F16 v) {
          F16 add = (v - shift) * weight;
          if (gated) add = mask(beyond + i) ? F16{} : add;
          store(sums + i, load(sums + i) + add);
        });
      });
    }
    float* out = to + begin;
    each(sums, count, 0, [&](int64_t i, F16 z) {
      z = (z > -kInfinity) & (z < kInfinity) ? z : splat(-kInfinity);
      store_some(out + i, z, count - i);
    });
  }

  static I16 mask(const int32_t* p) {
    I16 out;
    std::memcpy(&out, p, sizeof out);
    return out;
  }

  // Fill in where gate g is closed, and settle what the sums so far are there.
  void close(int64_t g, int64_t row, int64_t begin, int64_t count, float* sums, int32_t* beyond) const {
    const float edge = least[g * n + row];
    const int32_t end = int32_t(last[g * n + row] - begin);  // in this block
    const I16 ids = counted();
    const int64_t rule = outside[g];
    visit(of[g], row, [&](auto x, float shift) {
      each(x + begin, count, 0, [&](int64_t i, F16 v) {
        const I16 closed = (v < edge) | ((v == edge) & (ids + int32_t(i) > end));
        std::memcpy(beyond + i, &closed, sizeof closed);
        if (rule == kOf) store(sums + i, closed ? v - shift : load(sums + i));
        if (rule == kDrop) store(sums + i, closed ? splat(-kInfinity) : load(sums + i));
      });
    });
  }
};

// rows [R, V] fp32 or bf16, index [n] int64 -> [n] fp32: log-sum-exp of the first `width` logits of rows index[i].
Tensor log_normalisers(const Tensor& rows, const Tensor& index, int64_t width) {
  const int64_t n = index.size(0);
  const Picked from(rows, static_cast<const int64_t*>(index.data_ptr()), n, width);
  Tensor out = torch::stable::new_empty(rows, {n}, ScalarType::Float);
  float* to = static_cast<float*>(out.data_ptr());
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) from.visit(i, [&](auto x) { to[i] = log_normaliser(x, width); });
  });
  return out;
}

// T matrices of rows, index [T, n] int64, shifts [T, n] fp32 that are taken from each row, weights [n, J] fp32 of J terms; of each
// term its matrix and its gate (or -1), terms of a gate next to each other; of each of G gates its matrix, what is outside, and
// its edges, least [G, n] fp32 and last [G, n] int64 (`kept_edges`) -> [n, width] fp32, finite or -inf.
Tensor mix_rows(std::vector<Tensor> rows, const Tensor& index, int64_t width, const Tensor& shifts,
                const Tensor& weights, std::vector<int64_t> track, std::vector<int64_t> gate, std::vector<int64_t> of,
                std::vector<int64_t> outside, const Tensor& least, const Tensor& last) {
  const int64_t n = index.size(1);
  Plan plan{{}, n, width, weights.size(1), static_cast<const float*>(shifts.data_ptr()),
            static_cast<const float*>(weights.data_ptr()), static_cast<const float*>(least.data_ptr()),
            static_cast<const int64_t*>(last.data_ptr()), track, gate, of, outside};
  STD_TORCH_CHECK(weights.is_contiguous() && index.is_contiguous() && shifts.is_contiguous() && least.is_contiguous() &&
                      last.is_contiguous() && weights.scalar_type() == ScalarType::Float, "mix_rows: contiguous");
  const int64_t* at = static_cast<const int64_t*>(index.data_ptr());
  for (size_t t = 0; t < rows.size(); t++) plan.tracks.emplace_back(rows[t], at + t * n, n, width);
  Tensor out = torch::stable::new_empty(weights, {n, width});
  float* to = static_cast<float*>(out.data_ptr());
  const int64_t parts = (width + kBlock - 1) / kBlock;
  torch::stable::parallel_for(0, n * parts, 4, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; task++)
      plan.block(task / parts, task % parts * kBlock, to + task / parts * width);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(trimtab, m) {
  m.def("log_normalisers(Tensor rows, Tensor index, int width) -> Tensor");
  m.def(
      "mix_rows(Tensor[] rows, Tensor index, int width, Tensor shifts, Tensor weights, int[] track, int[] gate, "
      "int[] of, int[] outside, Tensor least, Tensor last) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(trimtab, CPU, m) {
  m.impl("log_normalisers", TORCH_BOX(&log_normalisers));
  m.impl("mix_rows", TORCH_BOX(&mix_rows));
}
