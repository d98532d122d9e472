// Split-KV attention of a few query tokens over a long cache, on tensor cores (mma.sync, sm_80 and later).
//
// All query heads of one KV head and all query tokens are packed into the rows of one tile, so K and V are read once.
// The kernel streams memory: what counts is bytes in flight. Two schedules share the code:
//   kRowWarps = 1 (at most 16 rows): every warp is a team of its own. It takes 16 keys of each tile through its own
//   ring
//     of cp.async stages, with its own softmax state and accumulator: no block barrier until the final merge.
//   kRowWarps = 4 (up to 64 rows): the four warps are one team, each with 16 rows of the tile and all of its keys.
// docs/cuda_decode.md has the derivation and the budgets.
#pragma once

#include "cuda/decode/dequant.cuh"
#include "cuda/decode/tiles.cuh"

namespace yoco::cuda {

// Shared address of this lane's row for ldmatrix at chunk pair 0. Rows are aligned to their size, so chunk c of the row
// is at address ^ (c * 16) for even c, and eight rows further down lie at a constant distance.
template <int kChunks>
YOCO_DEVICE uint32_t lane_address(const char* tile, int row, int chunk) {
  return shared_address(tile + swizzled<kChunks>(row, chunk));
}

// s[16 rows x kTeamKeys] = Q K^T for the team's keys, which start at row `first` of the K tile. q_address: this lane's
// row of Q, used when Q is not in registers.
template <typename C>
YOCO_DEVICE void multiply_qk(float (&s)[C::kTeamKeys / 8][4], const uint32_t (*q)[4], uint32_t q_address,
                             const char* k_tile, int first, int lane) {
  using M = typename C::M;
  constexpr int kNTiles = C::kTeamKeys / 8, kKSteps = C::kD / 16;
#pragma unroll
  for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) s[n][i] = 0.f;
  }
  const uint32_t address = lane_address<C::kChunks>(k_tile, first + lane % 8 + lane / 16 * 8, lane / 8 % 2);
  // Two k-steps at a time: one ldmatrix of a narrow tile holds both.
#pragma unroll
  for (int step = 0; step < kKSteps; step += 2) {
    uint32_t a[2][4];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if constexpr (C::kQInRegisters) {
#pragma unroll
        for (int i = 0; i < 4; ++i) a[j][i] = q[step + j][i];
      } else {
        ldmatrix_x4(a[j], q_address ^ (step + j) * 32);
      }
    }
#pragma unroll
    for (int n = 0; n < kNTiles; n += 2) {
      const uint32_t distance = n * 8 * C::kRowBytes;
      uint32_t b[4];
      if constexpr (C::kNarrow) {
        // b[0], b[1]: keys 0..7 for both k-steps; b[2], b[3]: keys 8..15
        ldmatrix_x4(b, (address ^ step * 16) + distance);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          uint32_t low, high;
          dequantise(typename C::Cache{}, b[i], low, high);
          mma_16816<M>(s[n + i / 2], a[i % 2], low, high);
        }
      } else {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          ldmatrix_x4(b, (address ^ (step + j) * 32) + distance);
          mma_16816<M>(s[n], a[j], b[0], b[1]);
          mma_16816<M>(s[n + 1], a[j], b[2], b[3]);
        }
      }
    }
  }
}

// o[16 rows x kD] += P V. P comes as the A fragments of 16 keys each.
template <typename C>
YOCO_DEVICE void multiply_pv(float (&o)[C::kD / 8][4], const uint32_t (&p)[C::kTeamKeys / 16][4], const char* v_tile,
                             int first, int lane) {
  using M = typename C::M;
  const uint32_t address = lane_address<C::kChunks>(v_tile, first + lane % 16, lane / 16);
#pragma unroll
  for (int step = 0; step < C::kTeamKeys / 16; ++step) {
#pragma unroll
    for (int n = 0; n < C::kD / 8; n += C::kNarrow ? 4 : 2) {
      uint32_t b[4];
      const int chunk = C::kNarrow ? n / 2 : n;
      ldmatrix_x4_trans(b, (address ^ chunk * 16) + step * 16 * C::kRowBytes);
      if constexpr (C::kNarrow) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          uint32_t even[2], odd[2];
          dequantise(typename C::Cache{}, swap_middle_bytes(b[2 * j]), even[0], odd[0]);
          dequantise(typename C::Cache{}, swap_middle_bytes(b[2 * j + 1]), even[1], odd[1]);
          mma_16816<M>(o[n + 2 * j], p[step], even[0], even[1]);
          mma_16816<M>(o[n + 2 * j + 1], p[step], odd[0], odd[1]);
        }
      } else {
        mma_16816<M>(o[n], p[step], b[0], b[1]);
        mma_16816<M>(o[n + 1], p[step], b[2], b[3]);
      }
    }
  }
}

// Keys that some rows see and others do not may hold NaN or infinity in V, and the product would take 0 * NaN into rows
// that do not see them. Such a tile (they are rare) is repaired first: what is not finite is added here to the rows
// that see it and becomes zero in the tile, so that the product gives the other rows the bits that they always have.
template <typename Cache>
YOCO_DEVICE bool is_finite(Cache x) {
  return fabsf(to_float(x)) < INFINITY;
}
template <typename C>
YOCO_DEVICE bool any_not_finite(const char* v_tile, int first, int lane) {
  const auto* v = reinterpret_cast<const typename C::Cache*>(v_tile + first * C::kRowBytes);
  bool found = false;
#pragma unroll 4
  for (int i = lane; i < C::kTeamKeys * C::kD; i += 32) found |= !is_finite(v[i]);
  return __any_sync(0xffffffffu, found);
}
// Called by all warps of the team. The accumulator goes through local memory to keep the loops rolled.
template <typename C, typename Sees>
YOCO_DEVICE void take_out_not_finite(float (&o)[C::kD / 8][4], const uint32_t (&p)[C::kTeamKeys / 16][4], char* v_tile,
                                     int first, int lane, Sees sees) {
  using M = typename C::M;
  using Cache = typename C::Cache;
  constexpr int kPerChunk = kVec<Cache>;
  float sum[C::kD / 8][4];
  uint32_t weights[C::kTeamKeys / 16][4];
#pragma unroll
  for (int n = 0; n < C::kD / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[n][i] = o[n][i];
  }
#pragma unroll
  for (int step = 0; step < C::kTeamKeys / 16; ++step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) weights[step][i] = p[step][i];
  }
#pragma unroll 1
  for (int key = 0; key < C::kTeamKeys; ++key) {
#pragma unroll 1
    for (int h = 0; h < 2; ++h) {
      // The fragment register and the lane of the quad that hold row g + 8 h and this key.
      const uint32_t pair =
          __shfl_sync(0xffffffffu, weights[key / 16][key % 16 / 8 * 2 + h], lane / 4 * 4 + key % 8 / 2);
      const uint16_t bits = static_cast<uint16_t>(key % 2 == 0 ? pair : pair >> 16);
      const float weight = to_float(*reinterpret_cast<const M*>(&bits));
      if (!sees(h, key)) continue;
#pragma unroll 1
      for (int n = 0; n < C::kD / 8; ++n) {
#pragma unroll 1
        for (int e = 0; e < 2; ++e) {
          const int column = output_column<C::kNarrow>(n, lane, e);
          const auto* chunk =
              reinterpret_cast<const Cache*>(v_tile + swizzled<C::kChunks>(first + key, column / kPerChunk));
          const Cache value = chunk[column % kPerChunk];
          if (!is_finite(value)) sum[n][2 * h + e] += weight * to_float(value);
        }
      }
    }
  }
#pragma unroll
  for (int n = 0; n < C::kD / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) o[n][i] = sum[n][i];
  }
  const auto team_barrier = [] {
    if constexpr (C::kRowWarps == 1) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  };
  team_barrier();
  auto* v = reinterpret_cast<Cache*>(v_tile + first * C::kRowBytes);
#pragma unroll 1
  for (int i = C::kRowWarps == 1 ? lane : threadIdx.x; i < C::kTeamKeys * C::kD; i += 32 * C::kRowWarps) {
    if (!is_finite(v[i])) v[i] = from_float<Cache>(0.f);
  }
  team_barrier();
}

template <typename C>
__global__ void __launch_bounds__(C::kThreads, C::kResident)
    decode_kernel(const DecodeParams p, const DecodeSegment segment, const DecodePartials partials,
                  const uint32_t row_tiles, const int stages) {
  using T = typename C::T;
  using Cache = typename C::Cache;
  extern __shared__ __align__(1024) char shared[];
  char* const q_shared = shared;
  char* const ring = shared + C::kQBytes;
  const uint32_t ring_address = shared_address(ring);

  // ---- what this block works on
  const uint32_t heads_kv = static_cast<uint32_t>(p.heads_kv);  // 32-bit divisions
  const int64_t group = static_cast<uint32_t>(p.heads_q) / heads_kv, rows = group * p.time_q;
  const uint32_t item = blockIdx.x / row_tiles;
  const int64_t row_tile = blockIdx.x - item * row_tiles, b = item / heads_kv, split = blockIdx.y;
  const int64_t kv_head = item - static_cast<uint32_t>(b) * heads_kv;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int team = warp / C::kRowWarps, row_warp = warp % C::kRowWarps;
  const int64_t first_row = row_tile * C::kRows;
  DecodeKeys keys(p, segment, b, split, C::kKeys);
  const int count = static_cast<int>(keys.end - keys.begin);
  const int tiles = (count + C::kKeys - 1) / C::kKeys;

  TileLoader<C> loader(keys, kv_head, warp, lane);

  // ---- fill the ring, then Q while the copies fly
  int to_copy = 0;  // next tile to copy
  loader.look_up(keys, keys.begin);
  const auto copy_next = [&](int slot) {
    if (to_copy < tiles) {
      loader.copy(ring_address + slot * C::kStageBytes);
      ++to_copy;
      loader.look_up(keys, keys.begin + int64_t(to_copy) * C::kKeys);
    }
    cp_async_commit();  // an empty group keeps the count of groups in step with the tiles
  };
  for (int slot = 0; slot < stages - 1; ++slot) copy_next(slot);
  __shared__ float q_scale[C::kNarrow ? C::kRows : 1];
  load_q<C>(q_shared, q_scale, p, b, kv_head, first_row, rows, group);
  __syncthreads();
  const uint32_t q_address = lane_address<C::kD / 8>(q_shared, row_warp * 16 + lane % 16, lane / 16);
  uint32_t q[C::kQInRegisters ? C::kD / 16 : 1][4];
  if constexpr (C::kQInRegisters) {
#pragma unroll
    for (int step = 0; step < C::kD / 16; ++step) ldmatrix_x4(q[step], q_address ^ step * 32);
  }

  // ---- what the two rows of this lane see: keys [low, high), counted from keys.begin
  int low[2], high[2];
  float slope[2], diagonal[2], scale[2];
  const bool biased = p.alibi_slopes != nullptr && !keys.latent;
  const float k_scale = p.k_scale != nullptr && !keys.latent ? p.k_scale[kv_head] : 1.f;
  const float v_scale = p.v_scale != nullptr && !keys.latent ? p.v_scale[kv_head] : 1.f;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int64_t r = first_row + row_warp * 16 + lane / 4 + h * 8;
    const PackedRow row = packed_row(r < rows ? r : 0, group);
    const KeyRange seen = keys.row_range(row.t);
    low[h] = static_cast<int>(clamp_index(seen.begin - keys.begin, 0, count));
    high[h] = static_cast<int>(clamp_index(seen.end - keys.begin, 0, count));
    slope[h] =
        biased ? p.alibi_slopes[b * p.alibi_batch_stride + kv_head * group + row.head] * DecodeLogits::kLog2e : 0.f;
    diagonal[h] = static_cast<float>(row.t + keys.length - p.time_q - keys.begin);
    // With a softcap the logarithm's base changes behind it.
    scale[h] = static_cast<float>(p.scale) * k_scale;
    if (p.softcap <= 0.) scale[h] *= DecodeLogits::kLog2e;
    if constexpr (C::kNarrow) scale[h] *= q_scale[row_warp * 16 + lane / 4 + h * 8];
  }
  // Tiles inside [all_low, all_high) are seen by every row: no mask.
  const int all_low = static_cast<int>(clamp_index(keys.row_range(p.time_q - 1).begin - keys.begin, 0, count));
  const int all_high = static_cast<int>(clamp_index(keys.row_range(0).end - keys.begin, 0, count));
  const int any_low = static_cast<int>(keys.first - keys.begin);
  const DecodeLogits logits = make_decode_logits(p);

  float o[C::kD / 8][4];
#pragma unroll
  for (int n = 0; n < C::kD / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) o[n][i] = 0.f;
  }
  float row_max[2] = {-INFINITY, -INFINITY}, row_sum[2] = {0.f, 0.f};  // row_sum: of this lane's keys only

  const int team_first = team * C::kTeamKeys;  // the team's keys inside a tile
  int slot = 0;
  for (int tile = 0; tile < tiles; ++tile) {
    // Tile `tile` has landed when at most stages - 2 younger groups are unfinished.
    if (stages == 2) {
      cp_async_wait<0>();
    } else if (stages == 3) {
      cp_async_wait<1>();
    } else {
      cp_async_wait<2>();
    }
    if constexpr (C::kTeams == C::kWarps) {
      __syncwarp();
    } else {
      __syncthreads();
    }
    // The slot of the previous tile: everybody in the team is past it.
    copy_next(slot == 0 ? stages - 1 : slot - 1);
    const char* k_tile = ring + slot * C::kStageBytes;
    char* v_tile = ring + slot * C::kStageBytes + C::kTileBytes;
    slot = slot + 1 == stages ? 0 : slot + 1;

    const int begin = tile * C::kKeys + team_first;
    if (begin >= count) continue;
    float s[C::kTeamKeys / 8][4];
    multiply_qk<C>(s, q, q_address, k_tile, team_first, lane);
    const bool edge = begin < all_low || begin + C::kTeamKeys > all_high;
    float tile_max[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int n = 0; n < C::kTeamKeys / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int key = begin + n * 8 + lane % 4 * 2 + i % 2;
        float x = logits(s[n][i], scale[i / 2]);
        if (biased) x -= slope[i / 2] * fabsf(diagonal[i / 2] - key);
        if (edge && (key < low[i / 2] || key >= high[i / 2])) x = -INFINITY;
        s[n][i] = x;
        tile_max[i / 2] = fmaxf(tile_max[i / 2], x);
      }
    }
    float correction[2], offset[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      tile_max[h] = fmaxf(tile_max[h], __shfl_xor_sync(0xffffffffu, tile_max[h], 1));
      tile_max[h] = fmaxf(tile_max[h], __shfl_xor_sync(0xffffffffu, tile_max[h], 2));
      const float top = fmaxf(row_max[h], tile_max[h]);
      offset[h] = top == -INFINITY ? 0.f : top;
      correction[h] = exp2_approx(row_max[h] - offset[h]);
      row_max[h] = top;
      row_sum[h] *= correction[h];
    }
    uint32_t weights[C::kTeamKeys / 16][4];
#pragma unroll
    for (int n = 0; n < C::kTeamKeys / 8; ++n) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float a = exp2_approx(s[n][2 * h] - offset[h]), c = exp2_approx(s[n][2 * h + 1] - offset[h]);
        row_sum[h] += a + c;
        weights[n / 2][n % 2 * 2 + h] = pack2<typename C::M>(a, c);
      }
    }
    // The maximum settles early in a long cache; then the accumulator stays as it is.
    if (__any_sync(0xffffffffu, correction[0] != 1.f || correction[1] != 1.f)) {
#pragma unroll
      for (int n = 0; n < C::kD / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) o[n][i] *= correction[i / 2];
      }
    }
    const bool ragged = (any_low < all_low && begin < all_low) || (all_high < count && begin + C::kTeamKeys > all_high);
    if (ragged && any_not_finite<C>(v_tile, team_first, lane)) {
      take_out_not_finite<C>(o, weights, v_tile, team_first, lane,
                             [&](int h, int key) { return begin + key >= low[h] && begin + key < high[h]; });
    }
    multiply_pv<C>(o, weights, v_tile, team_first, lane);
  }

  // ---- merge the teams through shared memory, one warp per row
  cp_async_wait<0>();
  const bool invalid = __syncthreads_or(keys.invalid);                   // also: nobody reads the ring any more
  float* const merged = reinterpret_cast<float*>(ring);                  // [kTeams][kRows][kMergeStride]
  float* const state = merged + C::kTeams * C::kRows * C::kMergeStride;  // [kTeams][kRows][2]
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float sum = row_sum[h];
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    const int row = team * C::kRows + row_warp * 16 + lane / 4 + h * 8;
    float* to = merged + row * C::kMergeStride;
    if constexpr (C::kNarrow) {
#pragma unroll
      for (int n = 0; n < C::kD / 8; n += 2) {
        store(to + output_column<true>(n, lane, 0),
              Vec<float, 4>{o[n][2 * h], o[n + 1][2 * h], o[n][2 * h + 1], o[n + 1][2 * h + 1]});
      }
    } else {
#pragma unroll
      for (int n = 0; n < C::kD / 8; ++n) {
        store(to + output_column<false>(n, lane, 0), Vec<float, 2>{o[n][2 * h], o[n][2 * h + 1]});
      }
    }
    if (lane % 4 == 0) {
      state[row * 2] = row_max[h];
      state[row * 2 + 1] = sum;
    }
  }
  __syncthreads();
  const int present = static_cast<int>(rows - first_row < C::kRows ? rows - first_row : C::kRows);
  for (int row = warp; row < present; row += C::kWarps) {
    float max = -INFINITY, sum = 0.f, factor[C::kTeams];
#pragma unroll
    for (int m = 0; m < C::kTeams; ++m) max = fmaxf(max, state[(m * C::kRows + row) * 2]);
#pragma unroll
    for (int m = 0; m < C::kTeams; ++m) {
      const float* of = state + (m * C::kRows + row) * 2;
      factor[m] = max == -INFINITY ? 0.f : exp2f(of[0] - max);
      // A team that saw nothing has sum 0; one that saw only NaN has no maximum, and its NaN must not vanish.
      sum += of[1] == 0.f ? 0.f : of[1] * (max == -INFINITY ? 1.f : factor[m]);
    }
    const PackedRow r = packed_row(first_row + row, group);
    write_decode_row<T>(p, partials, segment.first_slot + split, b, kv_head * group + r.head, r.t, max, sum, v_scale,
                        invalid, lane, 32, [&](int column) {
                          float x = 0.f;
#pragma unroll
                          for (int m = 0; m < C::kTeams; ++m) {
                            x += merged[(m * C::kRows + row) * C::kMergeStride + column] * factor[m];
                          }
                          return x;
                        });
  }
}

// As many stages as leave room for kResident blocks per SM.
template <typename C>
const char* launch_decode_instance(const DecodeParams& p, const DecodePlan& plan, const DecodeSegment& segment,
                                   const DecodePartials& partials, const Launch& launch) {
  const int limit = max_shared_memory(launch.device);  // of a block; an SM has 1 KB more, and takes 1 KB per block
  int stages = C::kMaxStages;
  while (stages > C::kMinStages && C::kResident * (C::shared_bytes(stages) + 1024) > limit + 1024) --stages;
  if (C::shared_bytes(stages) > limit) return "attention_decode: this GPU has too little shared memory per block";
  const dim3 grid(static_cast<unsigned>(p.batch * p.heads_kv * plan.row_tiles), static_cast<unsigned>(segment.splits));
  return launch_kernel(decode_kernel<C>, grid, C::kThreads, C::shared_bytes(stages), launch, p, segment, partials,
                       plan.row_tiles, stages);
}

template <typename T, int kHeadDim>
const char* launch_decode(const DecodeParams& p, const DecodePlan& plan, const DecodeSegment& segment,
                          const DecodePartials& partials, const Launch& launch) {
  const auto with_cache = [&](auto cache) {
    using Cache = decltype(cache);
    return plan.tile_rows == 16
               ? launch_decode_instance<DecodeConfig<T, Cache, kHeadDim, 1>>(p, plan, segment, partials, launch)
               : launch_decode_instance<DecodeConfig<T, Cache, kHeadDim, 4>>(p, plan, segment, partials, launch);
  };
  if (segment.latent || p.cache_dtype == p.dtype) return with_cache(T{});
  if (p.cache_dtype == DType::kFloat8E4M3) return with_cache(__nv_fp8_e4m3{});
  if (p.cache_dtype == DType::kInt8) return with_cache(int8_t{});
  return "attention_decode: the cache must have the dtype of q, float8 e4m3 or int8";
}

}  // namespace yoco::cuda
