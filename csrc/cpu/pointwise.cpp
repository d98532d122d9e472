// Row-wise and elementwise ops: bandwidth-bound, so each tensor is read once and nothing in between is stored.
#include "rowwise.h"

namespace yoco::cpu::YOCO_ISA {
namespace {

// ---- rms_norm

template <class T, class WeightOf>
void rms_norm_rows(const RmsNormParams& p, const Launch& launch, const WeightOf& weight) {
  using C = Compute<T>;
  const int64_t dim = p.dim;
  parallel(launch, p.rows, grain_rows(dim), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* x = static_cast<const T*>(p.x) + row * dim;
      T* y = static_cast<T*>(p.y) + row * dim;
      C squares;
      if (p.residual != nullptr) {
        const T* residual = static_cast<const T*>(p.residual) + row * dim;
        T* total = static_cast<T*>(p.residual_out) + row * dim;
        squares = row_sum<C>(dim, [&](auto io) {
          io.store(total, io.load(x) + io.load(residual));
          const Vec<C> rounded = io.load(total);
          return rounded * rounded;
        });
        x = total;
      } else {
        squares = row_sum<C>(dim, [&](auto io) {
          const Vec<C> v = io.load(x);
          return v * v;
        });
      }
      const C rstd = C{1} / std::sqrt(squares / static_cast<C>(dim) + static_cast<C>(p.eps));
      static_cast<C*>(p.rstd)[row] = rstd;
      for_each_vector<C>(dim, [&](auto io) { io.store(y, io.load(x) * rstd * weight(io)); });
    }
  });
}

template <class T, class WeightOf>
const char* rms_norm_backward_rows(const RmsNormBackwardParams& p, const Launch& launch, const WeightOf& weight) {
  using C = Compute<T>;
  const int64_t dim = p.dim;
  const RowBlocks blocks(p.rows);
  const size_t bytes = p.d_weight != nullptr ? blocks.count * dim * sizeof(C) : 0;
  const Scratch scratch(bytes);
  if (scratch.failed(bytes)) return "out of memory";
  parallel(launch, blocks.count, 1 + grain_rows(dim) / blocks.rows_per_block, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      C* d_weight = p.d_weight != nullptr ? scratch.as<C>() + block * dim : nullptr;
      if (d_weight != nullptr) std::memset(d_weight, 0, dim * sizeof(C));
      const int64_t first = block * blocks.rows_per_block;
      const int64_t last = first + blocks.rows_per_block < p.rows ? first + blocks.rows_per_block : p.rows;
      for (int64_t row = first; row < last; ++row) {
        const T* x = static_cast<const T*>(p.x) + row * dim;
        const T* dy = static_cast<const T*>(p.dy) + row * dim;
        const T* through = p.d_residual_out != nullptr ? static_cast<const T*>(p.d_residual_out) + row * dim : nullptr;
        T* dx = static_cast<T*>(p.dx) + row * dim;
        const C rstd = static_cast<const C*>(p.rstd)[row];
        const C projection = row_sum<C>(dim, [&](auto io) { return io.load(dy) * weight(io) * io.load(x); });
        const C along_x = projection * rstd * rstd / static_cast<C>(dim);
        for_each_vector<C>(dim, [&](auto io) {
          const Vec<C> v = io.load(x), d = io.load(dy);
          Vec<C> out = (d * weight(io) - v * along_x) * rstd;
          if (through != nullptr) out += io.load(through);
          io.store(dx, out);
          if (d_weight != nullptr) io.store(d_weight, io.load(d_weight) + d * v * rstd);
        });
      }
    }
  });
  if (p.d_weight == nullptr) return nullptr;
  sum_blocks(launch, blocks.count, dim, scratch.as<C>(), static_cast<C*>(p.d_weight));
  return nullptr;
}

// ---- swiglu

// body(io, offset) over a flat array, in pieces of whole vectors.
template <class C, class Body>
void parallel_flat(const Launch& launch, int64_t numel, const Body& body) {
  constexpr int64_t kPiece = 1024;
  parallel(launch, (numel + kPiece - 1) / kPiece, kGrainElements / kPiece, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kPiece, last = end * kPiece < numel ? end * kPiece : numel;
    for_each_vector<C>(last - first, [&](auto io) { body(io, first); });
  });
}

template <class T>
const char* run(const SwigluParams& p, const Launch& launch) {
  using C = Compute<T>;
  const T* gate = static_cast<const T*>(p.gate);
  const T* up = static_cast<const T*>(p.up);
  T* y = static_cast<T*>(p.y);
  parallel_flat<C>(launch, p.numel, [&](auto io, int64_t first) {
    const Vec<C> g = io.load(gate + first);
    io.store(y + first, g * sigmoid(g) * io.load(up + first));
  });
  return nullptr;
}

template <class T>
const char* run(const SwigluBackwardParams& p, const Launch& launch) {
  using C = Compute<T>;
  const T* gate = static_cast<const T*>(p.gate);
  const T* up = static_cast<const T*>(p.up);
  const T* dy = static_cast<const T*>(p.dy);
  T* d_gate = static_cast<T*>(p.d_gate);
  T* d_up = static_cast<T*>(p.d_up);
  parallel_flat<C>(launch, p.numel, [&](auto io, int64_t first) {
    const Vec<C> g = io.load(gate + first), u = io.load(up + first), d = io.load(dy + first);
    const Vec<C> s = sigmoid(g);
    io.store(d_up + first, d * g * s);
    io.store(d_gate + first, d * u * s * (1 + g * (1 - s)));
  });
  return nullptr;
}

// ---- retention_output

template <class T>
const char* run(const RetentionOutputParams& p, const Launch& launch) {
  using C = Compute<T>;
  parallel_heads(p, launch, [&](int64_t b, int64_t t, int64_t h) {
    const T* o = head_row<const T>(p.o, b, t, h);
    norm_and_gate<C>(o, head_row<const T>(p.gate, b, t, h), head_row<T>(p.y, b, t, h), p.dim, p.eps);
  });
  return nullptr;
}

template <class T>
const char* run(const RetentionOutputBackwardParams& p, const Launch& launch) {
  using C = Compute<T>;
  parallel_heads(p, launch, [&](int64_t b, int64_t t, int64_t h) {
    const T* o = head_row<const T>(p.o, b, t, h);
    const T* gate = head_row<const T>(p.gate, b, t, h);
    const T* dy = head_row<const T>(p.dy, b, t, h);
    T* d_o = head_row<T>(p.d_o, b, t, h);
    T* d_gate = head_row<T>(p.d_gate, b, t, h);
    const C rstd = head_rstd<C>(o, p.dim, p.eps);
    // sigmoid twice instead of a buffer: exp is cheaper than the round trip for the head dims there are.
    const C projection = row_sum<C>(p.dim, [&](auto io) {
      const Vec<C> g = io.load(gate);
      return io.load(dy) * (g * sigmoid(g)) * io.load(o);
    });
    const C along_o = projection * rstd * rstd / static_cast<C>(p.dim);
    for_each_vector<C>(p.dim, [&](auto io) {
      const Vec<C> v = io.load(o), g = io.load(gate), d = io.load(dy);
      const Vec<C> s = sigmoid(g);
      io.store(d_gate, d * v * rstd * (s * (1 + g * (1 - s))));
      io.store(d_o, (d * (g * s) - v * along_o) * rstd);
    });
  });
  return nullptr;
}

template <class Params>
const char* run_by_dtype(const Params& p, const Launch& launch) {
  return with_float_type(p.dtype, [&](auto type) { return run<decltype(type)>(p, launch); });
}

}  // namespace

const char* rms_norm(const RmsNormParams& p, const Launch& launch) {
  return with_float_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    return with_weight<T>(p.weight, p.weight_dtype, p.dtype, [&](auto weight) -> const char* {
      rms_norm_rows<T>(p, launch, weight);
      return nullptr;
    });
  });
}

const char* rms_norm_backward(const RmsNormBackwardParams& p, const Launch& launch) {
  return with_float_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    return with_weight<T>(p.weight, p.weight_dtype, p.dtype,
                          [&](auto weight) -> const char* { return rms_norm_backward_rows<T>(p, launch, weight); });
  });
}

const char* swiglu(const SwigluParams& p, const Launch& launch) { return run_by_dtype(p, launch); }
const char* swiglu_backward(const SwigluBackwardParams& p, const Launch& launch) { return run_by_dtype(p, launch); }
const char* retention_output(const RetentionOutputParams& p, const Launch& launch) { return run_by_dtype(p, launch); }
const char* retention_output_backward(const RetentionOutputBackwardParams& p, const Launch& launch) {
  return run_by_dtype(p, launch);
}

}  // namespace yoco::cpu::YOCO_ISA
