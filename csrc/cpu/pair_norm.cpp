// y = norm(x) * weight * scale with x made of two rows: first - lambda * second (differential attention) or
// first * silu(second) (gated memory unit). Forward and backward each read their inputs from memory once: the second
// look at a row finds it in L1, and x is cheaper to compute again than to keep.
#include "rowwise.h"

namespace yoco::cpu::YOCO_ISA {
namespace {

template <class C>
struct Difference {
  C lambda;
  YOCO_INLINE Vec<C> combine(Vec<C> first, Vec<C> second) const { return first - lambda * second; }
  // dx -> gradients of the two rows; d_lambda collects its sum's terms.
  YOCO_INLINE void backward(Vec<C> dx, Vec<C>, Vec<C> second, Vec<C>& d_first, Vec<C>& d_second,
                            Vec<C>& d_lambda) const {
    d_first = dx;
    d_second = -lambda * dx;
    d_lambda = -(dx * second);
  }
};

template <class C>
struct Gate {
  YOCO_INLINE Vec<C> combine(Vec<C> memory, Vec<C> gate) const { return memory * (gate * sigmoid(gate)); }
  YOCO_INLINE void backward(Vec<C> dx, Vec<C> memory, Vec<C> gate, Vec<C>& d_memory, Vec<C>& d_gate, Vec<C>&) const {
    const Vec<C> s = sigmoid(gate);
    d_memory = dx * (gate * s);
    d_gate = dx * memory * (s * (1 + gate * (1 - s)));
  }
};

// f(source, dsource) for one row: how its two inputs are combined, and d(lambda used) / d(lambda given).
template <class C, class F>
YOCO_INLINE void with_source(const PairNormParams& p, int64_t b, int64_t t, int64_t h, const F& f) {
  if (p.kind == PairKind::kGate) return f(Gate<C>{}, C{0});
  const C given = *head_row<const C>(p.lambda, b, t, h);
  if (!p.lambda_is_logit) return f(Difference<C>{given}, C{1});
  const C lambda = C{1} / (C{1} + std::exp(-given));
  f(Difference<C>{lambda}, lambda * (C{1} - lambda));
}

template <class C, class T, class Source>
YOCO_INLINE C row_rstd(const PairNormParams& p, const Source& source, const T* first, const T* second) {
  if (!p.normalize) return C{1};
  const C squares = row_sum<C>(p.dim, [&](auto io) {
    const Vec<C> x = source.combine(io.load(first), io.load(second));
    return x * x;
  });
  return C{1} / std::sqrt(squares / static_cast<C>(p.dim) + static_cast<C>(p.eps));
}

template <class T, class WeightOf>
void forward(const PairNormParams& p, const Launch& launch, const WeightOf& weights) {
  using C = Compute<T>;
  parallel_heads(p, launch, [&](int64_t b, int64_t t, int64_t h) {
    const T* first = head_row<const T>(p.first, b, t, h);
    const T* second = head_row<const T>(p.second, b, t, h);
    T* y = head_row<T>(p.y, b, t, h);
    const WeightOf weight = weights.at(p.weight_per_head ? h * p.dim : 0);
    with_source<C>(p, b, t, h, [&](const auto& source, C) {
      const C factor = row_rstd<C>(p, source, first, second) * static_cast<C>(p.scale);
      for_each_vector<C>(
          p.dim, [&](auto io) { io.store(y, source.combine(io.load(first), io.load(second)) * factor * weight(io)); });
    });
  });
}

// With n = x * rstd and dn = dy * weight * scale:  dx = rstd * (dn - n * mean(dn * n)),  d_weight = sum of dy * n *
// scale.
template <class T, class WeightOf>
const char* backward(const PairNormBackwardParams& p, const Launch& launch, const WeightOf& weights) {
  using C = Compute<T>;
  const int64_t tokens = p.batch * p.time, weight_dim = p.weight_per_head ? p.heads * p.dim : p.dim;
  const RowBlocks blocks(tokens);
  const size_t bytes = p.d_weight != nullptr ? blocks.count * weight_dim * sizeof(C) : 0;
  const Scratch scratch(bytes);
  if (scratch.failed(bytes)) return "out of memory";
  const C scale = static_cast<C>(p.scale);
  const auto row = [&](int64_t b, int64_t t, int64_t h, C* d_weight) {
    const T* first = head_row<const T>(p.first, b, t, h);
    const T* second = head_row<const T>(p.second, b, t, h);
    const T* dy = head_row<const T>(p.dy, b, t, h);
    T* d_first = head_row<T>(p.d_first, b, t, h);
    T* d_second = head_row<T>(p.d_second, b, t, h);
    const WeightOf weight = weights.at(p.weight_per_head ? h * p.dim : 0);
    with_source<C>(p, b, t, h, [&](const auto& source, C d_given) {
      const C rstd = row_rstd<C>(p, source, first, second);
      const C factor = rstd * scale;
      C along_x{0};
      if (p.normalize) {
        const C projection = row_sum<C>(
            p.dim, [&](auto io) { return io.load(dy) * weight(io) * source.combine(io.load(first), io.load(second)); });
        along_x = projection * rstd * rstd / static_cast<C>(p.dim);
      }
      const C d_lambda = row_sum<C>(p.dim, [&](auto io) {
        const Vec<C> a = io.load(first), b = io.load(second), d = io.load(dy);
        const Vec<C> x = source.combine(a, b);
        Vec<C> da, db, dl{};
        source.backward((d * weight(io) - x * along_x) * factor, a, b, da, db, dl);
        io.store(d_first, da);
        io.store(d_second, db);
        if (d_weight != nullptr) io.store(d_weight, io.load(d_weight) + d * x * factor);
        return dl;
      });
      if (p.d_lambda != nullptr) static_cast<C*>(p.d_lambda)[(b * p.time + t) * p.heads + h] = d_lambda * d_given;
    });
  };
  parallel(launch, blocks.count, 1 + grain_rows(p.heads * p.dim) / blocks.rows_per_block,
           [&](int64_t begin, int64_t end) {
             for (int64_t block = begin; block < end; ++block) {
               C* d_weight = p.d_weight != nullptr ? scratch.as<C>() + block * weight_dim : nullptr;
               if (d_weight != nullptr) std::memset(d_weight, 0, weight_dim * sizeof(C));
               const int64_t start = block * blocks.rows_per_block;
               const int64_t stop = start + blocks.rows_per_block < tokens ? start + blocks.rows_per_block : tokens;
               for (int64_t token = start; token < stop; ++token) {
                 for (int64_t h = 0; h < p.heads; ++h) {
                   const bool shared = d_weight == nullptr || !p.weight_per_head;
                   row(token / p.time, token % p.time, h, shared ? d_weight : d_weight + h * p.dim);
                 }
               }
             }
           });
  if (p.d_weight != nullptr) {
    sum_blocks(launch, blocks.count, weight_dim, scratch.as<C>(), static_cast<C*>(p.d_weight));
  }
  return nullptr;
}

}  // namespace

const char* pair_norm(const PairNormParams& p, const Launch& launch) {
  return with_float_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    return with_weight<T>(p.weight, p.weight_dtype, p.dtype, [&](auto weight) -> const char* {
      forward<T>(p, launch, weight);
      return nullptr;
    });
  });
}

const char* pair_norm_backward(const PairNormBackwardParams& p, const Launch& launch) {
  return with_float_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    return with_weight<T>(p.weight, p.weight_dtype, p.dtype,
                          [&](auto weight) -> const char* { return backward<T>(p, launch, weight); });
  });
}

}  // namespace yoco::cpu::YOCO_ISA
