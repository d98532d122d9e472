// Which keys a decode row sees and where they lie: contiguous, ring or paged cache, or the latent segment. Lengths and
// page numbers are read on the device, so a captured CUDA graph replays with a growing cache.
#pragma once

#include "cuda/core/vector.cuh"
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

  // Offsets (elements, head 0) of the rows of a key in [first, end). A page outside the cache makes the result invalid.
  struct Offsets {
    int64_t k, v;
    bool found;
  };
  YOCO_DEVICE Offsets locate(int64_t position) {
    int64_t outer = batch;
    uint32_t slot = static_cast<uint32_t>(position);
    if (!latent) {
      if (p.ring) slot %= static_cast<uint32_t>(p.capacity);
      if (p.block_table != nullptr) {
        const uint32_t entry = slot / static_cast<uint32_t>(p.page_size);
        slot -= entry * static_cast<uint32_t>(p.page_size);
        outer = __ldg(p.block_table + batch * p.max_pages + entry);
        if (outer < 0 || outer >= p.num_pages) {
          invalid = true;
          return {0, 0, false};
        }
      }
    }
    return {outer * k().batch_stride + slot * k().time_stride, outer * v().batch_stride + slot * v().time_stride, true};
  }
};

// Logits in base 2: q k^T times its scale (one per row; log2(e) is in it unless there is a softcap), softcapped.
struct DecodeLogits {
  static constexpr float kLog2e = 1.4426950408889634f;
  float softcap;  // 0: none
  YOCO_DEVICE float operator()(float s, float scale) const {
    s *= scale;
    if (softcap > 0.f) {
      // tanh(x) = 1 - 2 / (1 + e^2x); saturates correctly on both sides
      const float e = __expf(2.f * s / softcap);
      s = softcap * kLog2e * (1.f - __fdividef(2.f, 1.f + e));
    }
    return s;
  }
};

// Finishes one row that a block has reduced: `sum` = sum of 2^(s - max). Lane-parallel over the columns; get(column) is
// the unnormalised output.
template <typename T, typename Get>
YOCO_DEVICE void write_decode_row(const DecodeParams& p, const DecodePartials& partials, int64_t slot, int64_t b,
                                  int64_t head, int64_t t, float max, float sum, float value_scale, bool invalid,
                                  int lane, int lanes, Get get) {
  constexpr float kLn2 = 0.6931471805599453f;
  const int64_t row = (b * p.heads_q + head) * p.time_q + t;
  const int dim_v = static_cast<int>(p.dim_v);
  if (partials.slots > 1) {
    const int64_t rows = p.batch * p.heads_q * p.time_q;
    const float inverse = sum == 0.f ? 0.f : value_scale / sum;
    float* out = partials.out + (slot * rows + row) * p.dim_v;
    for (int c = lane; c < dim_v; c += lanes) out[c] = invalid ? NAN : get(c) * inverse;
    if (lane == 0) partials.lse[slot * rows + row] = invalid ? NAN : sum == 0.f ? -INFINITY : max + log2f(sum);
    return;
  }
  const float sink = p.sinks != nullptr ? p.sinks[head] * DecodeLogits::kLog2e : -INFINITY;
  const float top = fmaxf(max, sink);
  if (sink != -INFINITY && top != -INFINITY) {
    value_scale *= exp2f(max - top);
    sum = sum * exp2f(max - top) + exp2f(sink - top);
    max = top;
  }
  const float inverse = sum == 0.f ? 0.f : value_scale / sum;
  T* out = static_cast<T*>(p.out.data) + b * p.out.batch_stride + t * p.out.time_stride + head * p.out.head_stride;
  for (int c = lane; c < dim_v; c += lanes) out[c] = from_float<T>(invalid ? NAN : get(c) * inverse);
  if (lane == 0) {
    static_cast<float*>(p.lse)[row] = invalid ? NAN : sum == 0.f ? -INFINITY : (max + log2f(sum)) * kLn2;
  }
}

}  // namespace yoco::cuda
