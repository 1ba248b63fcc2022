// Which tokens a truncation keeps, found without sorting rows: `truncate.kept_counts` is the specification.
//
// Top-k, top-p and min-p all keep a prefix of the tokens in the order (value descending, id ascending). A prefix is
// written as its edge: the value of its last token, and the highest id that is kept among the tokens of that value.
#include "host_vectors.h"

namespace {

constexpr int kBuckets = 2048;
constexpr int64_t kFew = 64;  // so many candidates are sorted
constexpr float kFar = 87.0f;  // so far below the best, a probability counts as 0
constexpr float kNothing = -std::numeric_limits<float>::infinity();

struct Edge {
  float least;
  int64_t last;
};

inline uint32_t lanes(I16 mask) {  // a bit per lane that is set
#ifdef __AVX512F__
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask);
#else
  uint32_t out = 0;
  for (int i = 0; i < kLanes; i++) out |= uint32_t(mask[i] & 1) << i;
  return out;
#endif
}

inline int64_t padded(int64_t width) { return (width + kLanes - 1) / kLanes * kLanes; }

// Id of the count-th token, count >= 1, whose value is `value`; x is padded with -inf.
int64_t nth_equal(const float* x, int64_t width, float value, int64_t count) {
  for (int64_t i = 0; i < width; i += kLanes)
    for (uint32_t found = lanes(load(x + i) == value); found; found &= found - 1)
      if (--count == 0) return i + __builtin_ctz(found);
  return width - 1;
}

// One row at work: values padded with -inf, the weights that are summed, and candidates for the edge.
struct Row {
  std::vector<float> values, weights, some, theirs;
  std::vector<double> sums;
  int64_t width;
  float high, low;  // of the finite values
  bool sound;       // finite numbers and -inf only, and not only -inf

  template <class T>
  void read(const T* from, int64_t count) {
    width = count;
    values.resize(padded(width)), weights.resize(padded(width));
    some.resize(padded(width)), theirs.resize(padded(width)), sums.resize(2 * kBuckets);
    F16 top = splat(kNothing), bottom = splat(-kNothing);
    I16 odd{};
    each(from, width, kNothing, [&](int64_t i, F16 x) {
      odd |= ~(x < -kNothing);  // +inf and NaN
      top = most(top, x), bottom = least(bottom, x > kNothing ? x : splat(-kNothing));
      store(values.data() + i, x);
    });
    high = top[0], low = bottom[0];
    for (int j = 1; j < kLanes; j++) high = std::max(high, top[j]), low = std::min(low, bottom[j]);
    sound = !lanes(odd) && high > kNothing;
  }

  double weigh(bool by_mass) {  // weights: probabilities up to a factor, or 1 a token; returns their sum
    double total = 0;
    for (int64_t i = 0; i < width;) {
      F16 part{};
      for (int64_t end = std::min(padded(width), i + 16 * kLanes); i < end; i += kLanes) {
        const F16 x = load(values.data() + i), d = x - high;
        const F16 w = by_mass ? (d > -kFar ? exponential(d) : F16{}) : (x > kNothing ? splat(1.0f) : F16{});
        store(weights.data() + i, w);
        part += w;
      }
      for (int j = 0; j < kLanes; j++) total += part[j];
    }
    return total;
  }

  // The edge of {tokens before which less than `target` of weight comes}, of at least one token.
  Edge select(double target) {
    const float *x = values.data(), *w = weights.data();
    float top = high, bottom = low;
    if (high - kFar < high) bottom = std::max(low, high - kFar);  // models that mask by -3e38 leave few buckets else
    int64_t count = padded(width), real = width;
    double before = 0;
    while (top > bottom && count > kFew) {
      const float scale = float(std::min((kBuckets - 1) / (double(top) - bottom), 3e38));
      const int bucket = crossing(x, w, count, top, scale, target, before);
      const int64_t left = gather(x, w, count, top, scale, bucket);
      x = some.data(), w = theirs.data();
      top = *std::max_element(x, x + left), bottom = *std::min_element(x, x + left);
      for (count = left; count % kLanes; count++) some[count] = kNothing, theirs[count] = 0;
      if (left == real) break;  // so close together that fp32 cannot scale their distances
      real = left;
    }
    return finish(x, w, count, top > bottom, target, before);
  }

  // The bucket of the last token that is kept; `before` grows by what is better than all of the bucket.
  int crossing(const float* x, const float* w, int64_t count, float top, float scale, double target, double& before) {
    std::fill(sums.begin(), sums.end(), 0.0);
    double *even = sums.data(), *odd = even + kBuckets;  // two of each: neighbours often share a bucket
    for (int64_t i = 0; i < count; i += kLanes) {
      const I16 at = bucket_of(load(x + i), top, scale);
      for (int j = 0; j < kLanes; j += 2) even[at[j]] += w[i + j], odd[at[j + 1]] += w[i + j + 1];
    }
    int last = 0;
    for (int b = 0; b < kBuckets; b++) {
      const double mass = even[b] + odd[b];
      if (mass == 0) continue;
      last = b;
      if (before + mass >= target) return b;
      before += mass;
    }
    before -= even[last] + odd[last];  // rounding, or a target above the sum: all are kept
    return last;
  }

  static I16 bucket_of(F16 x, float top, float scale) {
    return __builtin_convertvector(least((top - x) * scale, splat(kBuckets - 1)), I16);
  }

  int64_t gather(const float* x, const float* w, int64_t count, float top, float scale, int bucket) {
    int64_t kept = 0;
    for (int64_t i = 0; i < count; i += kLanes) {
      const F16 v = load(x + i);
      for (uint32_t in = lanes((bucket_of(v, top, scale) == bucket) & (v > kNothing)); in; in &= in - 1) {
        const int64_t at = i + __builtin_ctz(in);
        some[kept] = x[at], theirs[kept++] = w[at];
      }
    }
    return kept;
  }

  // Walk the candidates that are left, best first: few, or all of one value.
  Edge finish(const float* x, const float* w, int64_t count, bool differ, double target, double before) {
    std::vector<std::pair<float, float>> order;
    for (int64_t i = 0; i < count; i++)
      if (x[i] > kNothing) order.emplace_back(x[i], w[i]);
    if (differ) std::sort(order.begin(), order.end(), [](auto a, auto b) { return a.first > b.first; });
    int64_t ties = 0, kept = 0;
    for (; kept < int64_t(order.size()) && (kept == 0 || before < target); kept++) {
      ties = kept && order[kept].first == order[kept - 1].first ? ties + 1 : 1;
      before += order[kept].second;
    }
    const float least = order[kept - 1].first;
    return {least, nth_equal(values.data(), width, least, ties)};
  }

  void cut(Edge edge) {  // what is beyond the edge becomes -inf
    for (int64_t i = 0; i < width; i++)
      if (values[i] < edge.least || (values[i] == edge.least && i > edge.last)) values[i] = kNothing;
    low = edge.least;
  }

  Edge edge(int64_t k, double top_p, double min_p) {
    Edge found{low, width - 1};
    if (!sound) return {kNothing, width - 1};
    if (k > 0 && k < width) {
      weigh(false);
      found = select(double(k));
      if (top_p < 1) cut(found);
    }
    if (top_p < 1) found = select(weigh(true) * top_p);
    if (min_p > 0) {
      const double bound = std::min(double(high) + std::log(min_p), double(high));
      float least = float(bound);
      if (least < bound) least = std::nextafter(least, -kNothing);
      if (least > found.least) found = {least, width - 1};
    }
    return found;
  }
};

// rows [R, V] fp32 or bf16, index [n] int64, k [n] int64 (0: off), top_p and min_p [n] fp64 -> the edges of rows
// index[i], of their first `width` tokens: least [n] fp32, last [n] int64. Nothing is cut from a row that holds NaN or +inf, or no
// finite number.
std::tuple<Tensor, Tensor> kept_edges(const Tensor& rows, const Tensor& index, int64_t width, const Tensor& k,
                                      const Tensor& top_p, const Tensor& min_p) {
  const int64_t n = index.size(0);
  Tensor least = torch::stable::new_empty(rows, {n}, ScalarType::Float);
  Tensor last = torch::stable::new_empty(index, {n});
  const Picked from(rows, static_cast<const int64_t*>(index.data_ptr()), n, width);
  const int64_t* ks = static_cast<const int64_t*>(k.data_ptr());
  const double *ps = static_cast<const double*>(top_p.data_ptr()), *ms = static_cast<const double*>(min_p.data_ptr());
  float* values = static_cast<float*>(least.data_ptr());
  int64_t* ids = static_cast<int64_t*>(last.data_ptr());
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    static thread_local Row row;  // fresh memory for every call would cost as much as the work
    for (int64_t i = begin; i < end; i++) {
      from.visit(i, [&](auto x) { row.read(x, width); });
      const Edge found = row.edge(ks[i], ps[i], ms[i]);
      values[i] = found.least, ids[i] = found.last;
    }
  });
  return {least, last};
}

// Rows z [n, W] and their edges, least [n] and last [n].
class Edges {
 public:
  Edges(const Tensor& z, const Tensor& least, const Tensor& last)
      : z_(static_cast<const float*>(z.data_ptr())), least_(static_cast<const float*>(least.data_ptr())),
        last_(static_cast<const int64_t*>(last.data_ptr())), width_(z.size(1)) {
    STD_TORCH_CHECK(z.is_contiguous() && z.scalar_type() == ScalarType::Float && least.is_contiguous() &&
                        last.is_contiguous() && least.size(0) == z.size(0), "edges: contiguous float32 rows");
  }
  const float* row(int64_t i) const { return z_ + i * width_; }
  Edge edge(int64_t i) const { return {least_[i], last_[i]}; }

 private:
  const float *z_, *least_;
  const int64_t* last_;
  int64_t width_;
};

// Tokens of one row that an edge keeps: ids ascending, at most m + 1 of them.
std::vector<std::pair<float, int64_t>> kept_of(const float* x, int64_t width, Edge edge, int64_t m) {
  std::vector<std::pair<float, int64_t>> list;
  for (int64_t i = 0; i < width && int64_t(list.size()) <= m; i += kLanes)
    for (uint32_t in = lanes(load_some(x + i, width - i, kNothing) >= edge.least); in; in &= in - 1) {
      const int64_t at = i + __builtin_ctz(in);
      if (at < width && (x[at] > edge.least || at <= edge.last)) list.emplace_back(x[at], at);
    }
  return list;
}

// z [n, W] fp32 and edges -> how many tokens of each row are kept, if at most m (else more than m), and those: values [n, m], -inf
// beyond them, and ids [n, m], best first.
std::tuple<Tensor, Tensor, Tensor> kept_lists(const Tensor& z, const Tensor& least, const Tensor& last, int64_t m) {
  const int64_t n = z.size(0), width = z.size(1);
  const Edges edges(z, least, last);
  Tensor values = torch::stable::new_empty(z, {n, m}), ids = torch::stable::new_empty(last, {n, m});
  Tensor counts = torch::stable::new_empty(last, {n});
  float* to = static_cast<float*>(values.data_ptr());
  int64_t *named = static_cast<int64_t*>(ids.data_ptr()), *kept = static_cast<int64_t*>(counts.data_ptr());
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
      auto list = kept_of(edges.row(row), width, edges.edge(row), m);
      kept[row] = int64_t(list.size());
      std::stable_sort(list.begin(), list.end(), [](auto a, auto b) { return a.first > b.first; });
      list.resize(m, {kNothing, 0});
      for (int64_t i = 0; i < m; i++) to[row * m + i] = list[i].first, named[row * m + i] = list[i].second;
    }
  });
  return {values, ids, counts};
}

// z and `by` [n, W] fp32, and edges of `by` -> z with -inf where they cut.
Tensor cut_rows(const Tensor& z, const Tensor& by, const Tensor& least, const Tensor& last) {
  const int64_t n = z.size(0), width = z.size(1);
  const Edges edges(by, least, last);
  STD_TORCH_CHECK(z.is_contiguous() && z.scalar_type() == ScalarType::Float && by.size(0) == n && by.size(1) == width,
                  "cut_rows: contiguous float32 rows of one shape");
  const float* from = static_cast<const float*>(z.data_ptr());
  Tensor out = torch::stable::new_empty(z, {n, width});
  float* to = static_cast<float*>(out.data_ptr());
  const I16 counting = counted();
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
      const Edge edge = edges.edge(row);
      const float* own = from + row * width;
      each(edges.row(row), width, 0, [&](int64_t i, F16 x) {  // selections, not branches: half of them would go wrong
        const I16 beyond = (x < edge.least) | ((x == edge.least) & (counting + int32_t(i) > int32_t(edge.last)));
        store_some(to + row * width + i, beyond ? splat(kNothing) : load_some(own + i, width - i, 0), width - i);
      });
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(trimtab, m) {
  m.def(
      "kept_edges(Tensor rows, Tensor index, int width, Tensor k, Tensor top_p, Tensor min_p) -> (Tensor, Tensor)");
  m.def("kept_lists(Tensor z, Tensor least, Tensor last, int m) -> (Tensor, Tensor, Tensor)");
  m.def("cut_rows(Tensor z, Tensor by, Tensor least, Tensor last) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(trimtab, CPU, m) {
  m.impl("kept_edges", TORCH_BOX(&kept_edges));
  m.impl("kept_lists", TORCH_BOX(&kept_lists));
  m.impl("cut_rows", TORCH_BOX(&cut_rows));
}
