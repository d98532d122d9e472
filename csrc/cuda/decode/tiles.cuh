// The tiles of the decode kernel: their sizes, their layout in shared memory, and how Q, K and V get there.
#pragma once

#include "cuda/core/ptx.cuh"
#include "cuda/core/reduce.cuh"
#include "cuda/decode/keys.cuh"

namespace yoco::cuda {

// Byte offset of 16-byte chunk `chunk` of row `row` in a tile: chunks are permuted so that the eight rows of an
// ldmatrix fall into different banks.
template <int kChunks>
YOCO_DEVICE int swizzled(int row, int chunk) {
  if constexpr (kChunks >= 8) {
    return (row * kChunks + (chunk ^ (row & 7))) * 16;
  } else {
    static_assert(kChunks == 4, "rows of 64 bytes or of a multiple of 128");
    return (row * kChunks + (chunk ^ (row >> 1 & 3))) * 16;
  }
}

template <typename T_, typename Cache_, int kHeadDim, int kRowWarps_>
struct DecodeConfig {
  using T = T_;
  using Cache = Cache_;
  // Operand type of the tensor cores; see dequant.cuh.
  using M = typename std::conditional<sizeof(Cache) == 1, __half, T>::type;
  static constexpr int kD = kHeadDim;
  static constexpr bool kNarrow = sizeof(Cache) == 1;
  static constexpr int kKeys = static_cast<int>(decode_tile_keys(kHeadDim));  // per block and stage
  static constexpr int kRowWarps = kRowWarps_;
  static constexpr int kWarps = kRowWarps == 1 ? kKeys / 16 : kRowWarps;
  static constexpr int kTeams = kWarps / kRowWarps;
  static constexpr int kTeamKeys = kKeys / kTeams;
  static constexpr int kRows = 16 * kRowWarps;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kLoadRows = kKeys / kWarps;  // keys that a warp copies per stage
  static constexpr int kRowBytes = kD * static_cast<int>(sizeof(Cache));
  static constexpr int kChunks = kRowBytes / 16;
  static constexpr int kTileBytes = kKeys * kRowBytes;
  static constexpr int kStageBytes = 2 * kTileBytes;
  static constexpr int kQBytes = kRows * kD * 2;
  // Floats; the padding keeps the rows of a fragment in different banks (stores of 2, with a narrow cache 4 floats).
  static constexpr int kMergeStride = kD + (kNarrow ? 16 : 8);
  static constexpr int kMergeBytes = kTeams * kRows * (kMergeStride + 2) * 4;
  static constexpr int kMinStages = 2, kMaxStages = 4;
  static constexpr int kResident = decode_resident_blocks(kHeadDim, kNarrow, 16 * kRowWarps);
  static constexpr bool kQInRegisters = kD <= 128;

  YOCO_DEVICE static int q_offset(int row, int chunk) { return swizzled<kD / 8>(row, chunk); }
  static constexpr int shared_bytes(int stages) {
    return kQBytes + (stages * kStageBytes > kMergeBytes ? stages * kStageBytes : kMergeBytes);
  }
};

// Column of accumulator element (n_tile, pair element e) of lane l. One-byte V rows come in pairs of columns, so two
// n-tiles share 16 columns and a lane holds four neighbours.
template <bool kNarrow>
YOCO_DEVICE int output_column(int n_tile, int lane, int e) {
  const int t = lane % 4;
  return kNarrow ? n_tile / 2 * 16 + 4 * t + 2 * e + n_tile % 2 : n_tile * 8 + 2 * t + e;
}

// Packed row r of the tile: query token and head of the group.
struct PackedRow {
  int64_t t, head;
};
YOCO_DEVICE PackedRow packed_row(int64_t r, int64_t group) {
  const int64_t t = static_cast<uint32_t>(r) / static_cast<uint32_t>(group);
  return {t, r - t * group};
}

// Copies one stage (K and V rows); per warp, kLoadRows rows. Where they lie is looked up one stage ahead, so that the
// block table's latency is not in the way of the copies.
template <typename C>
struct TileLoader {
  using Cache = typename C::Cache;
  static constexpr int kRowsPerPass = 32 / C::kChunks, kPasses = C::kLoadRows / kRowsPerPass;
  static_assert(C::kChunks <= 32, "a row is at most one pass");

  const Cache *k, *v;          // of this KV head, at this lane's column
  int64_t k_stride, v_stride;  // elements from key to key
  int warp_row;                // first row of this warp in the tile
  int lane, chunk;
  int k_bytes, v_bytes;  // valid bytes of this lane's chunk
  // The next tile: rows [row_begin, row_end) of the warp are there; `next` is the first row's place when they are
  // consecutive, else this lane's row's.
  DecodeKeys::Offsets next;
  bool consecutive;
  int row_begin, row_end;

  YOCO_DEVICE TileLoader(const DecodeKeys& keys, int64_t kv_head, int warp, int lane_) : lane(lane_) {
    chunk = lane % C::kChunks;
    warp_row = warp * C::kLoadRows;
    constexpr int kSize = sizeof(Cache);
    k = static_cast<const Cache*>(keys.k().data) + kv_head * keys.k().head_stride + chunk * (16 / kSize);
    v = static_cast<const Cache*>(keys.v().data) + kv_head * keys.v().head_stride + chunk * (16 / kSize);
    k_stride = keys.k().time_stride;
    v_stride = keys.v().time_stride;
    k_bytes = static_cast<int>(clamp_index(keys.p.dim_qk * kSize - chunk * 16, 0, 16));
    v_bytes = static_cast<int>(clamp_index(keys.p.dim_v * kSize - chunk * 16, 0, 16));
  }

  YOCO_DEVICE void look_up(DecodeKeys& keys, int64_t tile_begin) {
    const int64_t position = tile_begin + warp_row;
    row_begin = static_cast<int>(clamp_index(keys.first - position, 0, C::kLoadRows));
    row_end = static_cast<int>(clamp_index(keys.end - position, 0, C::kLoadRows));
    next = {0, 0, false};
    consecutive = true;
    if (row_begin >= row_end) {
      row_end = 0;
      return;
    }
    consecutive = keys.consecutive(position, C::kLoadRows);
    if (consecutive) {
      next = keys.locate(position);
      if (!next.found) row_end = 0;
    } else if (lane >= row_begin && lane < row_end) {
      next = keys.locate(position + lane);
    }
  }

  // Shared address of this lane's chunk in row `pass * kRowsPerPass + lane / kChunks` of the warp, from that of pass 0.
  YOCO_DEVICE static uint32_t pass_address(uint32_t first, int pass) {
    constexpr int kPattern = C::kChunks >= 8 ? 7 : 0;  // a pass of short rows covers the whole swizzle pattern
    return (first ^ (pass * kRowsPerPass & kPattern) * 16) + pass * kRowsPerPass * C::kRowBytes;
  }

  // stage: shared address. Rows that are not there are never read: their copy has 0 bytes and writes zeros.
  YOCO_DEVICE void copy(uint32_t stage) const {
    const int lane_row = lane / C::kChunks;
    const uint32_t first = stage + swizzled<C::kChunks>(warp_row + lane_row, chunk);
    if (consecutive) {
      const Cache* k_row = k + next.k + lane_row * k_stride;
      const Cache* v_row = v + next.v + lane_row * v_stride;
      const bool full = row_begin == 0 && row_end == C::kLoadRows;
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) {
        const int row = pass * kRowsPerPass + lane_row;
        const bool there = full || (row >= row_begin && row < row_end);
        const uint32_t to = pass_address(first, pass);
        cp_async_16_partial(to, k_row, there ? k_bytes : 0);
        cp_async_16_partial(to + C::kTileBytes, v_row, there ? v_bytes : 0);
        k_row += kRowsPerPass * k_stride;
        v_row += kRowsPerPass * v_stride;
      }
    } else {
#pragma unroll 1
      for (int pass = 0; pass < kPasses; ++pass) {
        const int row = pass * kRowsPerPass + lane_row;
        const bool there = __shfl_sync(0xffffffffu, next.found, row);
        const uint32_t to = pass_address(first, pass);
        cp_async_16_partial(to, k + __shfl_sync(0xffffffffu, next.k, row), there ? k_bytes : 0);
        cp_async_16_partial(to + C::kTileBytes, v + __shfl_sync(0xffffffffu, next.v, row), there ? v_bytes : 0);
      }
    }
  }
};

// Rows of Q into shared memory (chunks of 8 elements where C::q_offset says) as M, zeros where there is no row or
// column. With a narrow cache each row is scaled by a power of two into half's range, and the pairs of every 16 columns
// are reordered: pair 2i goes to place i, pair 2i + 1 to 4 + i, which matches four neighbouring bytes of K in one
// register. row_scale[row] undoes the scaling.
template <typename C>
YOCO_DEVICE void load_q(char* q_shared, float* row_scale, const DecodeParams& p, int64_t b, int64_t kv_head,
                        int64_t first_row, int64_t rows, int64_t group) {
  using T = typename C::T;
  constexpr int kChunks = C::kD / 8;
  const int lane = threadIdx.x % 32;
  const auto read = [&](int row, int chunk) {
    Vec<T, 8> q{};
    if (first_row + row < rows && chunk * 8 < p.dim_qk) {
      const PackedRow r = packed_row(first_row + row, group);
      q = load_const<8>(static_cast<const T*>(p.q.data) + b * p.q.batch_stride + r.t * p.q.time_stride +
                        (kv_head * group + r.head) * p.q.head_stride + chunk * 8);
    }
    return q;
  };
  if constexpr (!C::kNarrow) {
    for (int i = threadIdx.x; i < C::kRows * kChunks; i += C::kThreads) {
      const int row = i / kChunks, chunk = i % kChunks;
      store(reinterpret_cast<T*>(q_shared + C::q_offset(row, chunk)), read(row, chunk));
    }
  } else {
    for (int row = threadIdx.x / 32; row < C::kRows; row += C::kWarps) {  // a warp per row, a lane per chunk
      const bool active = lane < kChunks;
      Vec<T, 8> q{};
      if (active) q = read(row, lane);
      float largest = 0.f;
#pragma unroll
      for (int i = 0; i < 8; ++i) largest = fmaxf(largest, fabsf(to_float(q[i])));
      largest = group_max(largest);
      // 2^14 <= largest * 2^-exponent < 2^15; bounds keep both factors normal.
      const int exponent = min(max(static_cast<int>(__float_as_uint(largest) >> 23) - 127, -100), 100) - 14;
      const float scale = largest == 0.f ? 1.f : __uint_as_float(static_cast<uint32_t>(127 - exponent) << 23);
      if (lane == 0) row_scale[row] = 1.f / scale;
      uint32_t pairs[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) pairs[j] = pack2<__half>(to_float(q[2 * j]) * scale, to_float(q[2 * j + 1]) * scale);
      // Two lanes have the eight pairs of 16 columns: the even one ends up with pairs 0, 2, 4, 6, the odd one with the
      // others, and each stores a chunk.
      const bool odd = lane % 2 != 0;
      const uint32_t a = __shfl_xor_sync(0xffffffffu, odd ? pairs[0] : pairs[1], 1);
      const uint32_t c = __shfl_xor_sync(0xffffffffu, odd ? pairs[2] : pairs[3], 1);
      const Vec<uint32_t, 4> chunk =
          odd ? Vec<uint32_t, 4>{a, c, pairs[1], pairs[3]} : Vec<uint32_t, 4>{pairs[0], pairs[2], a, c};
      if (active) store(reinterpret_cast<uint32_t*>(q_shared + C::q_offset(row, lane)), chunk);
    }
  }
}

}  // namespace yoco::cuda
