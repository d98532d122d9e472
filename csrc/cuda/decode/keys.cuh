// Which keys a decode row sees and where they lie: contiguous, ring or paged cache, or the latent segment. Lengths and
// page numbers are read on the device, so a captured CUDA graph replays with a growing cache.
#pragma once

#include "cuda/core/ptx.cuh"
#include "cuda/decode/plan.h"

namespace yoco::cuda {

// The keys of one sequence, one segment and one piece of it.
struct DecodeKeys {
  const DecodeParams& p;
  bool latent;
  int64_t batch;
  int64_t length;      // keys of the segment
  int64_t first, end;  // of this piece: keys that at least one row may see
  int64_t begin;       // where its tiles start: `first` or, in the first piece of a window, up to 15 keys before it, so
                       // that the 16 rows of a warp never straddle two pages whose size is a multiple of 16
  bool invalid;        // lengths or pages outside the cache: the result is NaN, nothing is read out of range

  YOCO_DEVICE DecodeKeys(const DecodeParams& params, const DecodeSegment& segment, int64_t b, int64_t split,
                         int64_t tile_keys)
      : p(params), latent(segment.latent), batch(b), invalid(false) {
    KeyRange all;
    if (latent) {
      length = p.latent_len != nullptr ? clamp_index(p.latent_len[b], 0, p.num_latents) : p.num_latents;
      all = {0, length};
    } else {
      length = p.seqused_k[b];
      if (length < 0 || (!p.ring && length > p.capacity)) {
        invalid = true;
        length = clamp_index(length, 0, p.capacity);
      }
      // The first row sees the earliest key, the last row the latest.
      all.begin = row_range(0).begin;
      all.end = row_range(p.time_q - 1).end;
      if (all.end < all.begin) all.end = all.begin;
      // A ring holds the last `capacity` positions; a window larger than that was overwritten.
      if (p.ring && all.end - all.begin > p.capacity) {
        invalid = true;
        all.begin = all.end - p.capacity;
      }
    }
    const int64_t origin = all.begin / 16 * 16;
    const int64_t tiles = (all.end - origin + tile_keys - 1) / tile_keys;
    const KeyRange mine = split_tiles(tiles, segment.splits, segment.min_tiles, split);
    end = clamp_index(origin + mine.end * tile_keys, 0, all.end);
    begin = clamp_index(origin + mine.begin * tile_keys, 0, end);
    first = clamp_index(all.begin, begin, end);
  }

  // Keys that query token t sees, as positions in the segment.
  YOCO_DEVICE KeyRange row_range(int64_t t) const {
    if (latent) return {0, length};
    return window_range(p.mask.window_left, p.mask.window_right, t, p.time_q, length);
  }

  YOCO_DEVICE const View& k() const { return latent ? p.latent_k : p.k_cache; }
  YOCO_DEVICE const View& v() const { return latent ? p.latent_v : p.v_cache; }

  // Whether keys position .. position + count - 1 lie in consecutive rows of one page or batch row.
  YOCO_DEVICE bool consecutive(int64_t position, int count) const {
    if (latent || (!p.ring && p.block_table == nullptr)) return true;
    // Positions and capacities are below 2^31: 32-bit divisions.
    const uint32_t period = static_cast<uint32_t>(p.ring ? p.capacity : p.page_size);
    return static_cast<uint32_t>(position) % period + count <= period;
  }

  // Where a key in [first, end) lies: batch row or page, and slot in it. A page outside the cache makes the result
  // invalid.
  struct Place {
    int64_t outer;
    uint32_t slot;
    bool found;
  };
  YOCO_DEVICE Place place(int64_t position) {
    Place at{batch, static_cast<uint32_t>(position), true};
    if (latent) return at;
    if (p.ring) at.slot %= static_cast<uint32_t>(p.capacity);
    if (p.block_table != nullptr) {
      const uint32_t entry = at.slot / static_cast<uint32_t>(p.page_size);
      at.slot -= entry * static_cast<uint32_t>(p.page_size);
      at.outer = __ldg(p.block_table + batch * p.max_pages + entry);
      at.found = at.outer >= 0 && at.outer < p.num_pages;
      invalid |= !at.found;
    }
    return at;
  }
  // The same as offsets (elements, head 0).
  struct Offsets {
    int64_t k, v;
    bool found;
  };
  YOCO_DEVICE Offsets locate(int64_t position) {
    const Place at = place(position);
    if (!at.found) return {0, 0, false};
    return {at.outer * k().batch_stride + at.slot * k().time_stride,
            at.outer * v().batch_stride + at.slot * v().time_stride, true};
  }
};

// Logits in base 2: q k^T times its scale (one per row; log2(e) is in it unless there is a softcap), softcapped.
struct DecodeLogits {
  static constexpr float kLog2e = 1.4426950408889634f;
  float cap_in;   // 2 log2(e) / softcap
  float cap_out;  // softcap log2(e); 0: no softcap
  // tanh(x) = 1 - 2 / (1 + e^2x); saturates correctly on both sides
  YOCO_DEVICE float cap(float s) const { return cap_out * (1.f - __fdividef(2.f, 1.f + exp2_approx(s * cap_in))); }
  YOCO_DEVICE float operator()(float s, float scale) const { return cap_out > 0.f ? cap(s * scale) : s * scale; }
};
YOCO_DEVICE DecodeLogits make_decode_logits(const DecodeParams& p) {
  if (p.softcap <= 0.) return {0.f, 0.f};
  const float softcap = static_cast<float>(p.softcap);
  return {2.f * DecodeLogits::kLog2e / softcap, softcap * DecodeLogits::kLog2e};
}

// One row that a block has reduced, with `sum` = sum of 2^(s - max): what its unnormalised output is multiplied by, and
// the lse to store (base 2 for a partial result, natural for the final one).
struct DecodeRowResult {
  float factor, lse;
};
YOCO_DEVICE DecodeRowResult finish_decode_row(const DecodeParams& p, bool partial, int64_t head, float max, float sum,
                                              float value_scale, bool invalid) {
  constexpr float kLn2 = 0.6931471805599453f;
  if (invalid) return {NAN, NAN};
  if (!partial) {
    const float sink = p.sinks != nullptr ? p.sinks[head] * DecodeLogits::kLog2e : -INFINITY;
    const float top = fmaxf(max, sink);
    if (sink != -INFINITY && top != -INFINITY) {
      value_scale *= exp2f(max - top);
      sum = sum * exp2f(max - top) + exp2f(sink - top);
      max = top;
    }
  }
  if (sum == 0.f) return {0.f, -INFINITY};
  return {value_scale / sum, (max + log2f(sum)) * (partial ? 1.f : kLn2)};
}

// Lane-parallel over the columns; get(column) is the unnormalised output.
template <typename T, typename Get>
YOCO_DEVICE void write_decode_row(const DecodeParams& p, const DecodePartials& partials, int64_t slot, int64_t b,
                                  int64_t head, int64_t t, float max, float sum, float value_scale, bool invalid,
                                  int lane, int lanes, Get get) {
  const bool partial = partials.slots > 1;
  const int64_t row = (b * p.heads_q + head) * p.time_q + t;
  const int dim_v = static_cast<int>(p.dim_v);
  const DecodeRowResult result = finish_decode_row(p, partial, head, max, sum, value_scale, invalid);
  if (partial) {
    const int64_t rows = p.batch * p.heads_q * p.time_q;
    float* out = partials.out + (slot * rows + row) * p.dim_v;
    for (int c = lane; c < dim_v; c += lanes) out[c] = invalid ? NAN : get(c) * result.factor;
    if (lane == 0) partials.lse[slot * rows + row] = result.lse;
    return;
  }
  T* out = static_cast<T*>(p.out.data) + b * p.out.batch_stride + t * p.out.time_stride + head * p.out.head_stride;
  for (int c = lane; c < dim_v; c += lanes) out[c] = from_float<T>(invalid ? NAN : get(c) * result.factor);
  if (lane == 0) static_cast<float*>(p.lse)[row] = result.lse;
}

}  // namespace yoco::cuda
