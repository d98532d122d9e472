// The tiles of the Hopper decode kernel, and the warp that fills its ring.
#pragma once

#include "cuda/core/sm90.cuh"
#include "cuda/decode/sm90/launch.h"
#include "cuda/decode/tiles.cuh"

namespace yoco::cuda::sm90 {

template <typename T_, typename Cache_, int kHeadDim, int kPackedRows>
struct HopperDecodeConfig {
  using T = T_;
  using Cache = Cache_;
  using M = typename std::conditional<sizeof(Cache) == 1, __half, T>::type;  // operand type, see dequant.cuh
  static constexpr int kD = kHeadDim, kRows = kPackedRows;
  static constexpr bool kNarrow = sizeof(Cache) == 1;
  static constexpr int kKeys = kHopperTileKeys;
  static constexpr int kWarps = 4, kThreads = 32 * kWarps;  // consumers
  static constexpr int kBlockThreads = kThreads + 32;
  static constexpr int kResident = hopper_resident_blocks(kD, kNarrow, kRows);
  // Panels: kKeys rows of 128 bytes, swizzled by TMA. TMA places rows at multiples of 128 bytes only, so the 64 bytes
  // of the narrowest rows are padded with zeros, which are not read from anywhere.
  static constexpr int kPanelRowBytes = 128, kPerPanel = kPanelRowBytes / 16;
  static constexpr int kPanels =
      kD * static_cast<int>(sizeof(Cache)) <= 128 ? 1 : kD * static_cast<int>(sizeof(Cache)) / 128;
  static constexpr int kPanelBytes = kKeys * kPanelRowBytes;
  static constexpr int kTileBytes = kPanels * kPanelBytes;
  static constexpr int kTileElements = kTileBytes / static_cast<int>(sizeof(Cache));
  static constexpr int kStageBytes = 2 * kTileBytes;
  static constexpr int kMTiles = kD / 64;      // of O^T
  static constexpr int kLaneRows = kRows / 4;  // packed rows that a lane has elements of: 8 i + 2 t + c
  // Where the references of the softmax and the bounds are: with 64 rows the accumulators leave no registers for them.
  static constexpr bool kSharedReference = kRows == 64 && kD > 64;
  // Keys, counted from the piece's first: tiles inside [all_low, all_high) are seen by every row and need no mask,
  // those in [any_low, count) by some row.
  struct Bounds {
    int any_low, all_low, all_high, count;
  };
  // Shared memory: Q as panels [kRows][64] of M, two tiles of P [kRows][64 keys] of M, tables, barriers, the ring.
  static constexpr int kQBytes = kRows * kD * 2;
  static constexpr int kPBytes = kRows * kKeys * 2;
  static constexpr int kMinStages = 2, kMaxStages = 8;
  struct Tables {
    float q_scale[kRows];
    float slope[kRows], diagonal[kRows];
    int2 seen[kRows];  // keys [x, y), counted from the piece's first
    Bounds bounds;
    float warp_value[kWarps][kRows];
    float2 reference[kWarps][kSharedReference ? kRows / 2 : 1];  // each warp's own copy
    float factor[kRows];
    float* out[kRows];  // partial result or T*, null behind the last row
    uint64_t full[kMaxStages], empty[kMaxStages];
    int invalid;
  };
  static constexpr int kRing = kQBytes + 2 * kPBytes;  // a multiple of 1024
  static constexpr int shared_bytes(int stages) {
    return kRing + stages * kStageBytes + static_cast<int>(sizeof(Tables));
  }
  YOCO_DEVICE static int q_offset(int row, int chunk) {
    return chunk / 8 * kRows * 128 + row * 128 + ((chunk % 8) ^ (row % 8)) * 16;
  }
  // Byte offset in a tile of chunk `step + chunk` of a row, given swizzled<kPerPanel>(row, chunk): `step` is a multiple
  // of the power of two above `chunk`, so it only flips bits of the place in the panel.
  YOCO_DEVICE static uint32_t chunk_offset(uint32_t from, int step) {
    return step / kPerPanel * kPanelBytes + (from ^ step % kPerPanel * 16);
  }
  // Column of rows g and g + 8 of warp w's part of m-tile m: the bytes of V come in pairs of columns.
  YOCO_DEVICE static int column(int m, int warp, int lane, int h) {
    const int g = lane / 4;
    return m * 64 + warp * 16 + (kNarrow ? 2 * g + h : g + 8 * h);
  }
};

// Every cross layer of a step reads the same cache. The part of it that fits into L2 stays at the normal priority, the
// rest is to be evicted first, so that a cache larger than L2 does not flush itself out: the hash of the policy picks
// the same lines in every layer.
YOCO_DEVICE uint64_t cache_policy(float bytes) {
  constexpr float kShare = 32 << 20;  // of 50 MB (H100) or 60 MB (H200)
  const float fraction = fminf(1.f, kShare / fmaxf(bytes, 1.f));
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_normal.L2::evict_first.b64 %0, %1;\n" : "=l"(policy) : "f"(fraction));
  return policy;
}

// The producer warp: tile after tile into the ring. 16 keys that lie in consecutive slots are one box per panel, and
// the 32 lanes issue the boxes of a tile together; 16 others (a page or ring edge between them, the ends of the piece)
// come row by row. A row that is not there gets coordinates outside the tensor, so TMA writes zeros.
template <typename C>
YOCO_DEVICE void produce(const DecodeMaps& maps, DecodeKeys& keys, int64_t kv_head, uint32_t ring, int stages,
                         typename C::Tables* tables) {
  constexpr int kBox = kHopperBoxKeys;
  constexpr int kPanelColumns = C::kPanelRowBytes / static_cast<int>(sizeof(typename C::Cache));
  static_assert(C::kKeys / kBox == 4 && C::kPanels <= 4, "32 lanes: 4 boxes of keys, K and V, up to 4 panels");
  const int lane = threadIdx.x % 32;
  const DecodeParams& p = keys.p;
  const uint64_t policy = cache_policy(static_cast<float>(p.batch * p.heads_kv * keys.length) *
                                       static_cast<float>((p.dim_qk + p.dim_v) * sizeof(typename C::Cache)));
  // Dimensions with stride 0 have size 1 in the maps.
  const auto coordinate = [](int64_t stride, int64_t i) { return stride == 0 ? 0 : static_cast<int>(i); };
  const auto copy = [&](bool is_k, const CUtensorMap& map, uint32_t stage, uint32_t full, int row, int panel,
                        const DecodeKeys::Place& at) {
    const View& view = is_k ? keys.k() : keys.v();
    tma_load(stage + (is_k ? 0 : C::kTileBytes) + panel * C::kPanelBytes + row * C::kPanelRowBytes, map, full, policy,
             panel * kPanelColumns, at.found ? static_cast<int>(at.slot) : -kBox, coordinate(view.head_stride, kv_head),
             coordinate(view.batch_stride, at.outer));
  };
  const int box = lane / 8, panel = lane % 4;
  const bool is_k = lane % 8 < 4;
  int slot = 0;
  uint32_t parity = 1;
  for (int64_t tile = keys.begin; tile < keys.end; tile += C::kKeys) {
    const int64_t first = tile + box * kBox;
    const bool whole = first >= keys.first && first + kBox <= keys.end && keys.consecutive(first, kBox);
    DecodeKeys::Place at{0, 0, false};
    if (whole) at = keys.place(first);
    uint32_t broken = __ballot_sync(0xffffffffu, !whole && lane % 8 == 0);
    const uint32_t full = shared_address(&tables->full[slot]);
    const uint32_t stage = ring + slot * C::kStageBytes;
    mbarrier_wait(shared_address(&tables->empty[slot]), parity);
    if (lane == 0) mbarrier_arrive_expect(full, C::kStageBytes);
    __syncwarp();
    if (whole && panel < C::kPanels) copy(is_k, is_k ? maps.k : maps.v, stage, full, box * kBox, panel, at);
    while (broken != 0) {  // half the lanes take the rows of K, half those of V
      const int row = (__ffs(broken) - 1) / 8 * kBox + lane % kBox;
      broken &= broken - 1;
      const int64_t position = tile + row;
      DecodeKeys::Place row_at{0, 0, false};
      if (position >= keys.first && position < keys.end) row_at = keys.place(position);
#pragma unroll 1
      for (int i = 0; i < C::kPanels; ++i) {
        copy(lane < kBox, lane < kBox ? maps.k_row : maps.v_row, stage, full, row, i, row_at);
      }
    }
    if (++slot == stages) slot = 0, parity ^= 1;
  }
  // The consumers read this behind a later barrier of the whole CTA.
  if (keys.invalid) tables->invalid = 1;
}

}  // namespace yoco::cuda::sm90
