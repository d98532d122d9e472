// Rotates (or only converts) the rows of one token, all heads, with the token's cosines and sines in shared memory.
// Used by rotary and by append_kv; a group of kThreads threads works on one token.
#pragma once

#include "cuda/core/rotary.cuh"

namespace yoco::cuda {

// Where the cosine and sine of a pair lie in shared memory. A thread reads 4 or 8 neighbours; one word of padding every
// 32 puts the threads of a row into different banks. Blocks of 8 pairs stay contiguous.
YOCO_HOST_DEVICE constexpr int rotary_slot(int pair) { return pair + pair / 32; }

// Sink(value, head) converts a float to the stored type. kPairs pairs per item: kVec<T> (half-split) or kVec<T> / 2
// (interleaved) when everything is aligned, so that all accesses have 16 bytes; 1 otherwise.
template <typename T, typename Out, int kPairs, bool kInterleaved, typename Sink>
YOCO_DEVICE void rotate_item(const T* x, Out* y, int pair, int half, const float* cos, const float* sin, Sink sink) {
  float c[kPairs], s[kPairs];
#pragma unroll
  for (int i = 0; i < kPairs; ++i) c[i] = cos[rotary_slot(pair) + i], s[i] = sin[rotary_slot(pair) + i];
  if constexpr (kInterleaved && kPairs > 1) {
    float v[2 * kPairs];
    load_float(v, x + 2 * pair);
    Vec<Out, 2 * kPairs> out;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      rotate(v[2 * i], v[2 * i + 1], c[i], s[i]);
      out[2 * i] = sink(v[2 * i]);
      out[2 * i + 1] = sink(v[2 * i + 1]);
    }
    store_global(y + 2 * pair, out);
  } else {
    const int first = kInterleaved ? 2 * pair : pair;
    const int second = kInterleaved ? 2 * pair + 1 : pair + half;
    float a[kPairs], b[kPairs];
    load_float(a, x + first);
    load_float(b, x + second);
    Vec<Out, kPairs> out_a, out_b;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      rotate(a[i], b[i], c[i], s[i]);
      out_a[i] = sink(a[i]);
      out_b[i] = sink(b[i]);
    }
    store_global(y + first, out_a);
    store_global(y + second, out_b);
  }
}

template <typename T, typename Out, int N, typename Sink>
YOCO_DEVICE void convert_item(const T* x, Out* y, Sink sink) {
  float v[N];
  load_float(v, x);
  Vec<Out, N> out;
#pragma unroll
  for (int i = 0; i < N; ++i) out[i] = sink(v[i]);
  store_global(y, out);
}

// All heads of one token: x, y point at head 0. rotary_dim = 0 converts only. `lane` of `lanes` threads; kVectors: rows
// and rotary_dim allow 16-byte accesses. make_sink(head) gives the Sink.
template <typename T, typename Out, bool kVectors, bool kInterleaved, typename MakeSink>
YOCO_DEVICE void rotate_heads(const T* x, int64_t x_head_stride, Out* y, int64_t y_head_stride, int heads, int dim,
                              int rotary_dim, const float* cos, const float* sin, int lane, int lanes,
                              MakeSink make_sink) {
  constexpr int kPairs = !kVectors ? 1 : kInterleaved ? kVec<T> / 2 : kVec<T>;
  constexpr int kCopy = kVectors ? kVec<T> : 1;
  const int half = rotary_dim / 2;
  const int rotated = half / kPairs, copied = (dim - rotary_dim) / kCopy;
  const int items = rotated + copied;
  for (int i = lane; i < heads * items; i += lanes) {
    const int head = i / items, item = i - head * items;
    const T* from = x + head * x_head_stride;
    Out* to = y + head * y_head_stride;
    const auto sink = make_sink(head);
    if (item < rotated) {
      rotate_item<T, Out, kPairs, kInterleaved>(from, to, item * kPairs, half, cos, sin, sink);
    } else {
      const int column = rotary_dim + (item - rotated) * kCopy;
      convert_item<T, Out, kCopy>(from + column, to + column, sink);
    }
  }
}

}  // namespace yoco::cuda
