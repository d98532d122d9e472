// 1 to 16 tokens against the state, which is read and written once per group of up to kGroup tokens: the state is what
// the time goes to. Columns of the state do not depend on each other, so a task is a block of columns of one head; with
// an output gate it is a whole head, which the norm before the gate wants.
#include "retention.h"
#include "rowwise.h"

namespace yoco::cpu::YOCO_ISA {
namespace {

constexpr int kGroup = 4;
constexpr int kMaxTokens = 16;

// exp(g) as a sum of two numbers: rounded to one, the same error would enter the state at every token.
template <class C>
struct Gamma {
  C high, low;
};

template <class T, class G>
class Step {
  using C = Compute<T>;
  static constexpr int kVectors = YOCO_HAS_AVX512 ? 8 : 4;  // columns of a task, in vectors

 public:
  explicit Step(const RetentionStepParams& p) : p_(p) {}

  void run(const Launch& launch) {
    const bool gated = p_.output_gate.data != nullptr;
    const int64_t width = kVectors * kLanes<C>;
    const int64_t blocks = gated ? 1 : divide_up(p_.dim_v, width);
    const int64_t tasks = p_.batch * p_.heads * blocks;
    // A task of a few microseconds is worth a thread of its own only in company.
    const int64_t bytes = p_.dim_k * (gated ? p_.dim_v : width) * static_cast<int64_t>(sizeof(C));
    const int64_t grain = std::max<int64_t>(1, 65536 / std::max<int64_t>(bytes, 1));
    parallel(launch, tasks, grain, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t block = task % blocks, head = task / blocks % p_.heads, batch = task / blocks / p_.heads;
        if (gated) {
          gated_head(batch, head);
        } else {
          columns(batch, head, block * width, [&](int64_t t) { return element<T>(p_.o, batch, t, head); });
        }
      }
    });
  }

 private:
  // The components of q and k that turn with the token's position; returns how many.
  int64_t rotate(int64_t batch, int64_t t, const T* q_row, const T* k_row, C* q, C* k) const {
    const RotaryOnLoad& r = p_.rotary;
    if (r.inv_freq == nullptr) return 0;
    C cos[128], sin[128], factors[256], cross[256];
    const int64_t pairs = r.dim / 2;
    token_angles(t + (r.offsets == nullptr ? 0 : r.offsets[batch]), r.inv_freq, pairs, cos, sin);
    arrange_angles(cos, sin, pairs, r.interleaved, factors, cross);
    rotate_row(q_row, q, pairs, r.interleaved, factors, cross);
    rotate_row(k_row, k, pairs, r.interleaved, factors, cross);
    return r.dim;
  }

  // Rows of o wait for their norm as they are, not rounded.
  void gated_head(int64_t batch, int64_t head) {
    alignas(64) C o[kMaxTokens][256];
    for (int64_t first = 0; first < p_.dim_v; first += kVectors * kLanes<C>) {
      columns(batch, head, first, [&](int64_t t) { return o[t]; });
    }
    for (int64_t t = 0; t < p_.time; ++t) {
      const T* gate = element<T>(p_.output_gate, batch, t, head);
      norm_and_gate<C>(o[t], gate, element<T>(p_.o, batch, t, head), p_.dim_v, p_.norm_eps);
    }
  }

  // A block of columns. out(t): where the row of o of token t goes.
  template <class Out>
  void columns(int64_t batch, int64_t head, int64_t first, const Out& out) {
    const int64_t last = std::min<int64_t>(first + kVectors * kLanes<C>, p_.dim_v);
    int64_t t = 0;
    for (; t + kGroup <= p_.time; t += kGroup) tokens<kGroup>(batch, head, t, first, last, out);
    for (; t < p_.time; ++t) tokens<1>(batch, head, t, first, last, out);
  }

  // Tokens [t, t + kTokens), columns [column, last).
  template <int kTokens, class Out>
  void tokens(int64_t batch, int64_t head, int64_t t, int64_t column, int64_t last, const Out& out) {
    C q[kTokens][256], k[kTokens][256];
    Gamma<C> gamma[kTokens];
    for (int i = 0; i < kTokens; ++i) {
      const T* q_row = element<T>(p_.q, batch, t + i, head);
      const T* k_row = element<T>(p_.k, batch, t + i, head);
      const C scale = static_cast<C>(p_.scale);
      const int64_t turned = rotate(batch, t + i, q_row, k_row, q[i], k[i]);
      for_each_vector<C>(turned, [&](auto io) { io.store(q[i], scale * io.load(q[i])); });
      for_each_vector<C>(p_.dim_k - turned, [&](auto io) {
        io.store(q[i] + turned, scale * io.load(q_row + turned));
        io.store(k[i] + turned, io.load(k_row + turned));
      });
      double g = static_cast<double>(to_float(*element<G>(p_.g, batch, t + i, head)));
      if (p_.gate_normalizer > 0) g = (std::min(g, 0.0) - std::log1p(std::exp(-std::abs(g)))) / p_.gate_normalizer;
      const double exact = std::exp(g);
      gamma[i].high = static_cast<C>(exact);
      gamma[i].low = static_cast<C>(exact - static_cast<double>(gamma[i].high));
    }
    constexpr int lanes = kLanes<C>;
    const auto full = [](int j) { return FullVector<C>{j * lanes}; };
    constexpr int wide = kVectors / kTokens;  // sums and values of a block stay in registers
    for (; column + wide * lanes <= last; column += wide * lanes) {
      vectors<kTokens, wide>(batch, head, t, column, q, k, gamma, full, out);
    }
    for (; wide > 4 && column + 4 * lanes <= last; column += 4 * lanes) {
      vectors<kTokens, 4>(batch, head, t, column, q, k, gamma, full, out);
    }
    for (; column + lanes <= last; column += lanes) {
      vectors<kTokens, 1>(batch, head, t, column, q, k, gamma, full, out);
    }
    if (column < last) {
      const int64_t rest = last - column;
      vectors<kTokens, 1>(batch, head, t, column, q, k, gamma, [=](int) { return PartVector<C>{0, rest}; }, out);
    }
  }

  template <int kTokens, int kWide, class Io, class Out>
  YOCO_INLINE void vectors(int64_t batch, int64_t head, int64_t t, int64_t column, const C (*q)[256], const C (*k)[256],
                           const Gamma<C>* gamma, const Io& io, const Out& out) {
    C* state = static_cast<C*>(p_.state) + (batch * p_.heads + head) * p_.dim_k * p_.dim_v + column;
    Vec<C> v[kTokens][kWide], o[kTokens][kWide] = {};
    for (int i = 0; i < kTokens; ++i) {
      const T* row = element<T>(p_.v, batch, t + i, head) + column;
#pragma GCC unroll 8
      for (int j = 0; j < kWide; ++j) v[i][j] = io(j).load(row);
    }
    for (int64_t d = 0; d < p_.dim_k; ++d, state += p_.dim_v) {
#pragma GCC unroll 8
      for (int j = 0; j < kWide; ++j) {
        Vec<C> s = io(j).load(state);
#pragma GCC unroll 4
        for (int i = 0; i < kTokens; ++i) {
          s = gamma[i].high * s + (gamma[i].low * s + k[i][d] * v[i][j]);
          o[i][j] += q[i][d] * s;
        }
        io(j).store(state, s);
      }
    }
    for (int i = 0; i < kTokens; ++i) {
      auto* row = out(t + i) + column;
#pragma GCC unroll 8
      for (int j = 0; j < kWide; ++j) io(j).store(row, o[i][j]);
    }
  }

  const RetentionStepParams& p_;
};

}  // namespace

const char* retention_step(const RetentionStepParams& p, const Launch& launch) {
  return with_float_type(p.dtype, [&](auto t) -> const char* {
    using T = decltype(t);
    if (p.gate_dtype == p.dtype) {
      Step<T, T>(p).run(launch);
    } else {
      Step<T, float>(p).run(launch);
    }
    return nullptr;
  });
}

}  // namespace yoco::cpu::YOCO_ISA
