// Where a token of a (possibly packed) batch belongs.
#pragma once

#include "cuda/core/vector.cuh"
#include "mask.h"

namespace yoco::cuda {

// Token of a [batch, time] tensor: row `time` of batch row `batch`, token `index` of sequence `sequence`; sequence is
// -1 for rows behind the last packed sequence.
struct Token {
  int64_t batch, time;
  int64_t sequence, index, length;
};

// flat = batch * num_times + time. cu_seqlens lives on the device and is not trusted: ends are clamped into the tensor.
YOCO_DEVICE Token find_token(int64_t flat, int64_t num_times, const int32_t* cu_seqlens, int64_t num_sequences) {
  Token t;
  t.batch = flat / num_times;
  t.time = flat - t.batch * num_times;
  if (cu_seqlens == nullptr) {
    t.sequence = t.batch;
    t.index = t.time;
    t.length = num_times;
    return t;
  }
  // The last n with cu_seqlens[n] <= time: skips zero-length sequences.
  int64_t low = 0, high = num_sequences;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (cu_seqlens[middle] <= t.time) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  t.sequence = low < num_sequences && cu_seqlens[low] <= t.time ? low : -1;
  t.index = t.sequence < 0 ? 0 : t.time - cu_seqlens[low];
  t.length = t.sequence < 0 ? 0 : clamp_index(cu_seqlens[low + 1], 0, num_times) - cu_seqlens[low];
  return t;
}

}  // namespace yoco::cuda
