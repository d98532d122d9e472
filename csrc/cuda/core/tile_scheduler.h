// Which tile a CTA works on. Host and device code: the host sizes the grid, the kernel decodes its block index.
#pragma once

#include "mask.h"

namespace yoco::cuda {

struct WorkTile {
  int tile;  // row tile (forward, dQ) or key tile (dK, dV)
  int head;  // KV head
  int sequence;
};

// tiles x heads x sequences in an order that keeps the K and V of the running CTAs in L2 and starts the longest first.
//
// CTAs start in the order of their index. Pairs (head, sequence) are cut into sections whose K and V fit into L2
// together; inside a section all pairs do their last (under a causal mask: longest) tile first. So the tiles that run
// at the end of the grid are short ones, and a K block fetched from memory serves every row tile that needs it.
struct TileSchedule {
  int tiles;  // per pair, an upper bound: sequences may be shorter (their CTAs return at once)
  int heads;
  int sequences;
  int section;      // pairs per section
  bool last_first;  // tile order: true for rows of a causal mask, false for keys

  YOCO_HOST_DEVICE int64_t count() const { return int64_t(tiles) * heads * sequences; }

  // index < count() < 2^31
  YOCO_HOST_DEVICE WorkTile decode(int index) const {
    const int pairs = heads * sequences;
    const int per_section = section * tiles;
    const int first = index / per_section * section;
    const int width = pairs - first < section ? pairs - first : section;  // the last section may be narrower
    const int rest = index % per_section;
    const int pair = first + rest % width;
    const int tile = rest / width;
    return WorkTile{last_first ? tiles - 1 - tile : tile, pair % heads, pair / heads};
  }
};

// pair_bytes: K and V of one head of one sequence.
inline TileSchedule make_tile_schedule(int64_t tiles, int64_t heads, int64_t sequences, int64_t pair_bytes,
                                       bool last_first) {
  constexpr int64_t kL2Share = 24 << 20;  // A100 has 40 MB of L2, H200 50: room for Q, O and the next section
  const int64_t pairs = heads * sequences;
  const int64_t fit = pair_bytes > 0 ? kL2Share / pair_bytes : pairs;
  const int64_t section = clamp_index(fit, 1, pairs > 0 ? pairs : 1);
  return TileSchedule{int(tiles), int(heads), int(sequences), int(section), last_first};
}

}  // namespace yoco::cuda
