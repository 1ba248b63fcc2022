// Paged attention in place over the pool, and the store into it; `attention.attend_reference` is the specification.
//
// Softmax runs over rounds of `kChunk` keys with a running maximum. The query heads of one KV head, for neighbouring
// tokens of one track, are rows that share every load of keys and values.
#include "host_vectors.h"

#include <numeric>

namespace {

constexpr int64_t kChunk = 256;

template <class T>
struct Call {  // one layer's attention, as raw pointers; strides in elements
  const T *query, *key, *value;
  int64_t query_head, query_token, key_head, key_token, value_head, value_token;
  T *keys, *values, *out;
  const int64_t *slots, *tracks, *positions;
  const int32_t* tables;
  int64_t table_width, tokens, heads, kv_heads, k_dim, v_dim, block;
  float scale, softcap;
  int64_t window, chunk;
  const float* sinks;

  int64_t lowest(int64_t position) const {  // the first key a query at `position` sees
    int64_t low = window > 0 ? std::max<int64_t>(0, position - window + 1) : 0;
    return chunk > 0 ? std::max(low, position - position % chunk) : low;
  }
};

template <class T>
void write_token(const Call<T>& c, int64_t token) {
  if (c.slots[token] < 0) return;  // fills up a batch of a fixed size
  int64_t block = c.slots[token] / c.block, offset = c.slots[token] % c.block;
  for (int64_t head = 0; head < c.kv_heads; head++) {
    const T* key = c.key + token * c.key_token + head * c.key_head;
    T* keys = c.keys + (block * c.kv_heads + head) * c.k_dim * c.block + offset;
    for (int64_t d = 0; d < c.k_dim; d++) keys[d * c.block] = key[d];
    const T* value = c.value + token * c.value_token + head * c.value_head;
    std::memcpy(c.values + ((block * c.kv_heads + head) * c.block + offset) * c.v_dim, value, c.v_dim * sizeof(T));
  }
}

// scores[r][0..block) = q[r] . keys of one tile, for R rows at once.
template <class T, int R>
void score_rows(const float* q, int64_t k_dim, const T* tile, int64_t block, float* scores, int64_t stride) {
  int64_t lane = 0;
  for (; lane + kLanes <= block; lane += kLanes) {
    F16 total[R] = {};
    for (int64_t d = 0; d < k_dim; d++) {
      F16 keys = load(tile + d * block + lane);
      for (int r = 0; r < R; r++) total[r] += q[r * k_dim + d] * keys;
    }
    for (int r = 0; r < R; r++) store(scores + r * stride + lane, total[r]);
  }
  for (; lane < block; lane++)
    for (int r = 0; r < R; r++) {
      float total = 0;
      for (int64_t d = 0; d < k_dim; d++) total += q[r * k_dim + d] * to_float(tile[d * block + lane]);
      scores[r * stride + lane] = total;
    }
}

// sums[r] += weights[r][0..block) @ values of one tile, for R rows at once.
template <class T, int R>
void mix_rows(const float* weights, int64_t stride, const T* tile, int64_t block, int64_t v_dim, float* sums) {
  int64_t lane = 0;
  for (; lane + kLanes <= v_dim; lane += kLanes) {
    F16 total[R];
    for (int r = 0; r < R; r++) total[r] = load(sums + r * v_dim + lane);
    for (int64_t j = 0; j < block; j++) {
      F16 values = load(tile + j * v_dim + lane);
      for (int r = 0; r < R; r++) total[r] += weights[r * stride + j] * values;
    }
    for (int r = 0; r < R; r++) store(sums + r * v_dim + lane, total[r]);
  }
  for (; lane < v_dim; lane++)
    for (int r = 0; r < R; r++) {
      float total = sums[r * v_dim + lane];
      for (int64_t j = 0; j < block; j++) total += weights[r * stride + j] * to_float(tile[j * v_dim + lane]);
      sums[r * v_dim + lane] = total;
    }
}

// Turns scores of keys [first, first + n) into softmax weights in place; keys outside [low, high] weigh 0.
// Returns the factor by which earlier sums shrink, and updates the running maximum and total.
inline float weigh(float* scores, int64_t n, int64_t low, int64_t high, float softcap, float* best, float* total) {
  low = std::max<int64_t>(low, 0), high = std::min(high, n);
  if (low >= high) {
    std::fill(scores, scores + n, 0.0f);
    return 1.0f;
  }
  int64_t padded = (n + kLanes - 1) / kLanes * kLanes;
  if (softcap > 0)
    for (int64_t i = 0; i < padded; i += kLanes)
      store(scores + i, softcap - 2 * softcap / (exponential(load(scores + i) * (2 / softcap)) + 1.0f));
  std::fill(scores, scores + low, -std::numeric_limits<float>::infinity());
  std::fill(scores + high, scores + padded, -std::numeric_limits<float>::infinity());
  F16 peak = splat(*best);
  for (int64_t i = 0; i < padded; i += kLanes) peak = most(peak, load(scores + i));
  float top = peak[0];
  for (int i = 1; i < kLanes; i++) top = std::max(top, peak[i]);
  F16 added = {};
  for (int64_t i = 0; i < padded; i += kLanes) {
    F16 weight = exponential(load(scores + i) - top);
    store(scores + i, weight);
    added += weight;
  }
  // exponential() never returns 0: what is masked is masked.
  for (int64_t i = 0; i < low; i++) added[0] -= scores[i], scores[i] = 0;
  for (int64_t i = high; i < padded; i++) added[0] -= scores[i], scores[i] = 0;
  float shrink = std::exp(*best - top);
  *best = top;
  *total = *total * shrink + sum(added);
  return shrink;
}

template <class T, int R>
void dispatch_score(int64_t rows, const float* q, int64_t k_dim, const T* tile, int64_t block, float* s, int64_t stride) {
  for (; rows >= R; rows -= R, q += R * k_dim, s += R * stride) score_rows<T, R>(q, k_dim, tile, block, s, stride);
  if constexpr (R > 1)
    if (rows) dispatch_score<T, R / 2>(rows, q, k_dim, tile, block, s, stride);
}

template <class T, int R>
void dispatch_mix(int64_t rows, const float* w, int64_t stride, const T* tile, int64_t block, int64_t v_dim, float* o) {
  for (; rows >= R; rows -= R, w += R * stride, o += R * v_dim) mix_rows<T, R>(w, stride, tile, block, v_dim, o);
  if constexpr (R > 1)
    if (rows) dispatch_mix<T, R / 2>(rows, w, stride, tile, block, v_dim, o);
}

inline void fetch(const void* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(p) + i, 0, 2);
}

// Attention of `n` neighbouring tokens of one track, for the query heads of one KV head.
template <class T>
void attend_tile(const Call<T>& c, int64_t first, int64_t n, int64_t kv_head, std::vector<float>& scratch) {
  const int64_t group = c.heads / c.kv_heads, rows = n * group;
  const int64_t per_chunk = std::max<int64_t>(1, kChunk / c.block), span = per_chunk * c.block;
  const int64_t stride = (span + kLanes - 1) / kLanes * kLanes;
  scratch.resize(rows * (c.k_dim + c.v_dim + stride + 2));
  float *q = scratch.data(), *sums = q + rows * c.k_dim, *scores = sums + rows * c.v_dim;
  float *best = scores + rows * stride, *total = best + rows;
  std::fill(sums, scores, 0.0f);
  for (int64_t r = 0; r < rows; r++) {
    int64_t token = first + r / group, head = kv_head * group + r % group;
    const T* source = c.query + token * c.query_token + head * c.query_head;
    for (int64_t d = 0; d < c.k_dim; d++) q[r * c.k_dim + d] = to_float(source[d]) * c.scale;
    best[r] = c.sinks ? c.sinks[head] : -std::numeric_limits<float>::infinity();
    total[r] = c.sinks ? 1.0f : 0.0f;
  }
  const int32_t* table = c.tables + c.tracks[first] * c.table_width;
  auto tile = [&](const T* pool, int64_t b, int64_t dim) {
    return pool + (table[b] * c.kv_heads + kv_head) * dim * c.block;
  };
  const int64_t low = c.lowest(c.positions[first]), high = c.positions[first + n - 1];
  // Chunks of a fixed grid, and keys in fixed lanes: a row's sums do not depend on where its neighbours' windows begin.
  const int64_t aligned = kLanes / std::gcd<int64_t>(kLanes, c.block);
  for (int64_t begin = low / c.block - low / c.block % per_chunk % aligned, end; begin <= high / c.block; begin = end) {
    end = std::min((begin / per_chunk + 1) * per_chunk, high / c.block + 1);
    int64_t keys = (end - begin) * c.block;
    for (int64_t b = begin; b < end; b++) {
      if (b + 2 < end) fetch(tile(c.keys, b + 2, c.k_dim), c.k_dim * c.block * sizeof(T));
      fetch(tile(c.values, b, c.v_dim), c.v_dim * c.block * sizeof(T));
      dispatch_score<T, 4>(rows, q, c.k_dim, tile(c.keys, b, c.k_dim), c.block, scores + (b - begin) * c.block, stride);
    }
    for (int64_t r = 0; r < rows; r++) {
      int64_t position = c.positions[first + r / group], base = begin * c.block;
      float shrink = weigh(scores + r * stride, keys, c.lowest(position) - base, position + 1 - base, c.softcap,
                           best + r, total + r);
      if (shrink != 1.0f)
        for (int64_t d = 0; d < c.v_dim; d++) sums[r * c.v_dim + d] *= shrink;
    }
    for (int64_t b = begin; b < end; b++)
      dispatch_mix<T, 4>(rows, scores + (b - begin) * c.block, stride, tile(c.values, b, c.v_dim), c.block, c.v_dim,
                         sums);
  }
  for (int64_t r = 0; r < rows; r++) {
    T* out = c.out + ((first + r / group) * c.heads + kv_head * group + r % group) * c.v_dim;
    float inverse = 1.0f / total[r];
    for (int64_t d = 0; d < c.v_dim; d++) from_float(sums[r * c.v_dim + d] * inverse, out + d);
  }
}

template <class T>
void attend_all(const Call<T>& c) {
  if (c.tokens <= 32) {
    for (int64_t t = 0; t < c.tokens; t++) write_token(c, t);
  } else {
    torch::stable::parallel_for(0, c.tokens, 16, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; t++) write_token(c, t);
    });
  }
  const int64_t group = c.heads / c.kv_heads, most_tokens = std::max<int64_t>(1, 16 / group);
  std::vector<int64_t> starts;
  int64_t work = 0;
  for (int64_t t = 0, n; t < c.tokens; t += n) {
    for (n = 1; n < most_tokens && t + n < c.tokens && c.tracks[t + n] == c.tracks[t]; n++) {
    }
    starts.push_back(t);
    work += n * c.heads * (c.positions[t] + 1 - c.lowest(c.positions[t])) * (c.k_dim + c.v_dim);
  }
  const int64_t tiles = int64_t(starts.size()), items = tiles * c.kv_heads;
  starts.push_back(c.tokens);
  // Waking the other threads costs some microseconds: below about 200k products one thread is faster.
  torch::stable::parallel_for(0, items, work < 200000 ? items : 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch;
    for (int64_t i = begin; i < end; i++) {
      int64_t tile = i % tiles;
      attend_tile(c, starts[tile], starts[tile + 1] - starts[tile], i / tiles, scratch);
    }
  });
}

template <class T>
Tensor attend_typed(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& keys,
                    const Tensor& values, const Tensor& slots, const Tensor& tracks, const Tensor& positions,
                    const Tensor& tables, double scale, int64_t window, int64_t chunk, double softcap,
                    const float* sinks) {
  Tensor out = torch::stable::new_empty(query, {1, query.size(2), query.size(1), value.size(3)});
  Call<T> c{static_cast<const T*>(query.data_ptr()), static_cast<const T*>(key.data_ptr()),
            static_cast<const T*>(value.data_ptr()), query.stride(1), query.stride(2), key.stride(1), key.stride(2),
            value.stride(1), value.stride(2), static_cast<T*>(keys.data_ptr()), static_cast<T*>(values.data_ptr()),
            static_cast<T*>(out.data_ptr()), static_cast<const int64_t*>(slots.data_ptr()),
            static_cast<const int64_t*>(tracks.data_ptr()), static_cast<const int64_t*>(positions.data_ptr()),
            static_cast<const int32_t*>(tables.data_ptr()), tables.stride(0), query.size(2), query.size(1),
            key.size(1), key.size(3), value.size(3), keys.size(3), float(scale), float(softcap), window, chunk, sinks};
  attend_all(c);
  return out;
}

// query [1, H, T, dk], key [1, KH, T, dk], value [1, KH, T, dv]; pools as in attention.py -> [1, T, H, dv].
Tensor attend(const Tensor& query, const Tensor& key, const Tensor& value, Tensor keys, Tensor values,
              const Tensor& slots, const Tensor& tracks, const Tensor& positions, const Tensor& tables, double scale,
              int64_t window, int64_t chunk, double softcap, const std::optional<Tensor>& sinks) {
  auto dense = [](const Tensor& x) { return x.stride(3) == 1 ? x : torch::stable::contiguous(x); };
  Tensor q = dense(query), k = dense(key), v = dense(value);
  bool wide = keys.scalar_type() == ScalarType::Float;
  STD_TORCH_CHECK(wide || keys.scalar_type() == ScalarType::BFloat16, "the KV pool must be float32 or bfloat16");
  STD_TORCH_CHECK(q.scalar_type() == keys.scalar_type() && k.scalar_type() == keys.scalar_type() &&
                      v.scalar_type() == keys.scalar_type(), "query, key and value must have the pool's dtype");
  std::vector<float> sink;
  for (int64_t h = 0; sinks && h < sinks->size(0); h++)
    sink.push_back(sinks->scalar_type() == ScalarType::Float ? static_cast<const float*>(sinks->data_ptr())[h]
                                                             : to_float(static_cast<const bf16*>(sinks->data_ptr())[h]));
  auto run = wide ? attend_typed<float> : attend_typed<bf16>;
  return run(q, k, v, keys, values, slots, tracks, positions, tables, scale, window, chunk, softcap,
             sinks ? sink.data() : nullptr);
}

}  // namespace

STABLE_TORCH_LIBRARY(trimtab, m) {
  m.def(
      "attend(Tensor query, Tensor key, Tensor value, Tensor(a!) keys, Tensor(b!) values, Tensor slots, Tensor tracks, "
      "Tensor positions, Tensor tables, float scale, int window, int chunk, float softcap, Tensor? sinks) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(trimtab, CPU, m) { m.impl("attend", TORCH_BOX(&attend)); }
