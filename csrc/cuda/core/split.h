// How many pieces a key range is cut into when the work items alone do not fill the GPU. Pure functions, host and
// device, so that tests call them without a GPU.
#pragma once

#include "mask.h"

namespace yoco::cuda {

// Pieces of at least `min_tiles` tiles that one sequence is cut into so that its `items` (KV heads x row tiles) occupy
// `slots` resident blocks in one wave. The batch size is left out on purpose: the same sequence then gives the same
// bits alone and in any batch, and the extra pieces of a large batch cost only their partial results (rows * dim_v * 4
// bytes against at least min_tiles tiles of keys and values).
YOCO_HOST_DEVICE int64_t decode_splits(int64_t max_tiles, int64_t items, int64_t slots, int64_t min_tiles) {
  const int64_t wanted = items > 0 ? slots / items : 1;
  const int64_t possible = (max_tiles + min_tiles - 1) / min_tiles;
  return clamp_index(wanted, 1, clamp_index(possible, 1, 1024));
}

// Tiles [begin, end) of piece `split` when `tiles` are cut into at most `splits` pieces of at least `min_tiles`; the
// pieces behind the last tile are empty. Depends on the real length only, not on the size of the buffer.
YOCO_HOST_DEVICE KeyRange split_tiles(int64_t tiles, int64_t splits, int64_t min_tiles, int64_t split) {
  int64_t per_split = static_cast<uint32_t>(tiles + splits - 1) / static_cast<uint32_t>(splits);  // 32 bits: on the GPU
  if (per_split < min_tiles) per_split = min_tiles;
  const int64_t begin = clamp_index(split * per_split, 0, tiles);
  return KeyRange{begin, clamp_index(begin + per_split, 0, tiles)};
}

}  // namespace yoco::cuda
