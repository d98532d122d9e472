// From raw scores q.k to probabilities. Everything is in units of log2, so that one ex2 gives a probability.
#pragma once

#include "cuda/core/ptx.cuh"
#include "params.h"

namespace yoco::cuda {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
#define YOCO_NEG_INF (-__builtin_huge_valf())

// What happens to a raw score before the softmax: softcap, then alibi. Most calls have neither ("plain"): then the raw
// score is kept and the scale is folded into the exponent, exp2(score * multiplier - max * multiplier).
struct ScoreParams {
  float multiplier;    // scale * log2(e) when plain, else 1: the transformed score has everything in it
  float scale_log2;    // scale * log2(e)
  float cap_in;        // scale / softcap
  float cap_out;       // softcap * log2(e); 0: no softcap
  const float* alibi;  // slopes or null
  bool plain;
};

inline ScoreParams make_score_params(const AttentionParams& p) {
  ScoreParams s{};
  s.scale_log2 = float(p.scale * 1.4426950408889634);
  if (p.softcap > 0) {
    s.cap_in = float(p.scale / p.softcap);
    s.cap_out = float(p.softcap * 1.4426950408889634);
  }
  s.alibi = p.alibi_slopes;
  // A negative scale would turn the running maximum of raw scores into a minimum.
  s.plain = p.softcap <= 0 && p.alibi_slopes == nullptr && p.scale > 0;
  s.multiplier = s.plain ? s.scale_log2 : 1.f;
  return s;
}

// tanh from one exponential: absolute error 1e-7 (tanh.approx has 5e-4, which a softcap of 50 would amplify).
YOCO_DEVICE float fast_tanh(float x) { return 1.f - __fdividef(2.f, exp2_approx(2.f * kLog2E * x) + 1.f); }

// Softcap of a raw score: in log2 units, and its derivative.
struct CappedScore {
  float score, slope;
};
YOCO_DEVICE CappedScore softcap(const ScoreParams& sp, float raw) {
  const float t = fast_tanh(raw * sp.cap_in);
  return CappedScore{sp.cap_out * t, 1.f - t * t};
}

// Score in log2 units of one element when not plain. bias_log2: alibi_slope * log2(e) (0 on latents); distance to the
// diagonal.
YOCO_DEVICE float transform_score(const ScoreParams& sp, float raw, float bias_log2, float distance) {
  const float s = sp.cap_out > 0.f ? softcap(sp, raw).score : raw * sp.scale_log2;
  return s - bias_log2 * fabsf(distance);
}

// Running maximum and sum of one row over the key blocks.
//
// The reference maximum only moves when a block exceeds it by more than 2^kSlack: any reference gives the same
// quotient in the end, P stays below 2^kSlack (far from the limits of float16 and bfloat16), and after the first block
// the output is hardly ever rescaled. Each row decides for itself, so a row's result does not depend on its tile.
struct RowSoftmax {
  static constexpr float kSlack = 8.f;
  // No default member values: nvcc 13.0 applies them to the first row only of a two-dimensional array.
  float max;  // in raw score units: times multiplier = log2
  float sum;  // of this thread's columns

  YOCO_DEVICE void start() {
    max = YOCO_NEG_INF;
    sum = 0.f;
  }
  YOCO_DEVICE bool must_move(float block_max, float multiplier) const {
    return block_max * multiplier > max * multiplier + kSlack;
  }
  // New reference if it must move; returns the factor for what was accumulated before (0 for the first block).
  YOCO_DEVICE float move(float block_max, float multiplier) {
    const bool moves = must_move(block_max, multiplier);
    const float factor = moves ? exp2_approx((max - block_max) * multiplier) : 1.f;
    max = moves ? block_max : max;
    sum *= factor;
    return factor;
  }
  // What is subtracted in the exponent. While nothing was visible the maximum is -inf and every score too:
  // -inf - 0 gives probability 0 where -inf + inf would give NaN.
  YOCO_DEVICE float offset(float multiplier) const { return max == YOCO_NEG_INF ? 0.f : max * multiplier; }
};

// Ends a row: divisor of the accumulated output, and lse. `sum` is complete; sink (log2 units) counts like one more
// score, -inf when there is none. A row that saw nothing gets factor 0.
struct RowResult {
  float factor;  // output = accumulated * factor
  float lse;     // natural logarithm
};
YOCO_DEVICE RowResult finish_row(float max, float sum, float multiplier, float sink_log2) {
  const float top = max == YOCO_NEG_INF ? YOCO_NEG_INF : max * multiplier;
  if (sink_log2 > top) {  // the sink dominates: take it as the reference, exp2(sink - top) could overflow
    const float seen = top == YOCO_NEG_INF ? 0.f : sum * exp2_approx(top - sink_log2);
    const float total = 1.f + seen;
    const float shift = top == YOCO_NEG_INF ? 0.f : exp2_approx(top - sink_log2);
    return RowResult{shift / total, (sink_log2 + log2f(total)) * kLn2};
  }
  if (top == YOCO_NEG_INF) return RowResult{sum != sum ? sum : 0.f, sum != sum ? sum : YOCO_NEG_INF};
  const float total = sum + exp2_approx(sink_log2 - top);
  return RowResult{1.f / total, (top + log2f(total)) * kLn2};
}

}  // namespace yoco::cuda
