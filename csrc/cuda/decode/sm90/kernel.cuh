// Split-KV decode for Hopper (sm_90a): TMA fills a ring of key tiles, WGMMA reads it.
//
// A CTA has one KV head, one tile of packed rows (query token x head of the group) and one piece of the keys, like the
// sm_80 kernel. The products are turned round, so that the 64-row side of WGMMA is filled by keys and by columns, and
// the number of packed rows N = 8, 16 or 64 is the other side:
//   S^T [64 keys x N] = K Q^T        A = K tile: from shared memory as it lies, or (one-byte cache) through registers
//   O^T [D x N] += V^T P^T           A = V tile, transposed by WGMMA or by ldmatrix.trans; B = P, through shared memory
// Every element of K and V is touched by one instruction stream only: converted once, multiplied once.
// Warps 0 to 3 are the consumer warpgroup, warp 4 the producer. docs/cuda_decode_hopper.md has budgets and reasons.
#pragma once

#include "cuda/decode/dequant.cuh"
#include "cuda/decode/sm90/producer.cuh"

namespace yoco::cuda::sm90 {

// When every block has said so (or has ended), the combination is put on the SMs and waits there for the results.
YOCO_DEVICE void launch_dependents() { asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory"); }

template <bool kWide>
YOCO_DEVICE void store_transposed(uint32_t row, const uint32_t* r) {
  if constexpr (kWide) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(row), "r"(r[0]),
                 "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
  } else {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};\n" ::"r"(row), "r"(r[0]), "r"(r[1])
                 : "memory");
  }
}

// s = S^T of this warp's 16 keys: issued, not waited for.
template <typename C>
YOCO_DEVICE void multiply_keys(float (&s)[C::kRows / 2], uint32_t k_tile, uint32_t q, int warp, int lane) {
  using M = typename C::M;
  const uint64_t b = descriptor_k(q);
  constexpr int kQPanel = C::kRows * 128;
  if constexpr (C::kNarrow) {
    const uint32_t from = swizzled<C::kPerPanel>(warp * 16 + lane % 16, lane / 16);
    // Steps whose operands are in registers together; with 64 rows the accumulators leave room for few.
    constexpr int kSteps = C::kRows == 64 ? 4 : C::kD / 16;
#pragma unroll
    for (int first = 0; first < C::kD / 16; first += kSteps) {
      if (first > 0) {
        wgmma_wait<0>();
        pin_registers(s);
      }
      uint32_t a[kSteps][4];
#pragma unroll
      for (int step = 0; step < kSteps; step += 2) {
        uint32_t r[4];  // keys g, g + 8 of 16 columns, then of the next 16
        ldmatrix_x4(r, k_tile + C::chunk_offset(from, first + step));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          dequantise(typename C::Cache{}, r[i], a[step + i / 2][i % 2], a[step + i / 2][2 + i % 2]);
        }
      }
#pragma unroll
      for (int step = 0; step < kSteps; ++step) pin_registers(a[step]);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const int at = first + step;
        wgmma<M, Major::K>(s, a[step], b + descriptor_step(at / 4 * kQPanel + at % 4 * 32), at > 0);
      }
      wgmma_commit();
    }
  } else {
    const uint64_t a = descriptor_k(k_tile);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < C::kD / 16; ++step) {
      wgmma<M, Major::K, Major::K>(s, a + descriptor_step(step / 4 * C::kPanelBytes + step % 4 * 32),
                                   b + descriptor_step(step / 4 * kQPanel + step % 4 * 32), step > 0);
    }
    wgmma_commit();
  }
}

// o += V^T P^T: issued, not waited for.
template <typename C>
YOCO_DEVICE void multiply_values(float (&o)[C::kMTiles][C::kRows / 2], uint32_t v_tile, uint32_t weights, int warp,
                                 int lane) {
  using M = typename C::M;
  const uint64_t b = descriptor_k(weights);
  if constexpr (C::kNarrow) {
    const uint32_t from = swizzled<C::kPerPanel>(lane, warp);
#pragma unroll
    for (int m = 0; m < C::kMTiles; ++m) {
      if (C::kRows == 64 && m > 0) wgmma_wait<0>();
      uint32_t a[4][4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t r[4];  // one chunk of columns, keys 0, 8, 16, 24 of the half tile
        ldmatrix_x4_trans(r, v_tile + half * 32 * C::kPanelRowBytes + C::chunk_offset(from, m * 4));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          uint32_t* to = a[half * 2 + i / 2] + i % 2 * 2;
          dequantise(typename C::Cache{}, swap_middle_bytes(r[i]), to[0], to[1]);
        }
      }
#pragma unroll
      for (int step = 0; step < 4; ++step) pin_registers(a[step]);
      pin_registers(o[m]);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < 4; ++step) wgmma<M, Major::K>(o[m], a[step], b + descriptor_step(step * 32), true);
      wgmma_commit();
    }
  } else {
#pragma unroll
    for (int m = 0; m < C::kMTiles; ++m) pin_registers(o[m]);
    wgmma_fence();
#pragma unroll
    for (int m = 0; m < C::kMTiles; ++m) {
      const uint64_t a = descriptor_mn(v_tile + m * C::kPanelBytes, C::kPanelBytes);
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        wgmma<M, Major::MN, Major::K>(o[m], a + descriptor_step(step * 2048), b + descriptor_step(step * 32), true);
      }
    }
    wgmma_commit();
  }
}

// Keys that some rows see and others do not may hold NaN or infinity in V, and the product would take 0 * NaN into rows
// that do not see them. Such a tile (they are rare) is repaired first: what is not finite is added here to the rows
// that see it and becomes zero in the tile, so that the product gives the other rows the bits that they always have.
YOCO_DEVICE bool is_finite(float x) { return fabsf(x) < INFINITY; }
template <typename C>
YOCO_DEVICE bool any_not_finite(const char* v_tile) {
  const auto* v = reinterpret_cast<const typename C::Cache*>(v_tile);
  bool found = false;
#pragma unroll 4
  for (int i = threadIdx.x; i < C::kTileElements; i += C::kThreads) found |= !is_finite(to_float(v[i]));
  return found;
}
template <typename C>
YOCO_DEVICE void take_out_not_finite(float (&o)[C::kMTiles][C::kRows / 2], char* v_tile, const char* weights,
                                     const typename C::Tables* tables, int begin, int warp, int lane, int barrier) {
  using M = typename C::M;
  using Cache = typename C::Cache;
  constexpr int kPerChunk = kVec<Cache>;
#pragma unroll 1
  for (int key = 0; key < C::kKeys; ++key) {
#pragma unroll
    for (int m = 0; m < C::kMTiles; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int column = C::column(m, warp, lane, h), chunk = column / kPerChunk;
        const uint32_t at = chunk / C::kPerPanel * C::kPanelBytes + swizzled<C::kPerPanel>(key, chunk % C::kPerPanel);
        const float value = to_float(reinterpret_cast<const Cache*>(v_tile + at)[column % kPerChunk]);
        if (is_finite(value)) continue;
#pragma unroll
        for (int i = 0; i < C::kLaneRows; ++i) {
          const int row = i / 2 * 8 + lane % 4 * 2 + i % 2;
          const int2 seen = tables->seen[row];
          const int place = row * 128 + (key / 8 ^ row % 8) * 16 + key % 8 * 2;
          const float weight = to_float(*reinterpret_cast<const M*>(weights + place));
          if (begin + key >= seen.x && begin + key < seen.y) o[m][i / 2 * 4 + 2 * h + i % 2] += weight * value;
        }
      }
    }
  }
  named_sync(barrier, C::kThreads);
  auto* v = reinterpret_cast<Cache*>(v_tile);
#pragma unroll 1
  for (int i = threadIdx.x; i < C::kTileElements; i += C::kThreads) {
    if (!is_finite(to_float(v[i]))) v[i] = from_float<Cache>(0.f);
  }
  fence_async_proxy();
  named_sync(barrier, C::kThreads);
}

template <typename C>
__global__ void __launch_bounds__(C::kBlockThreads, C::kResident)
    hopper_decode_kernel(const DecodeParams p, const DecodeSegment segment, const DecodePartials partials,
                         const uint32_t row_tiles, const int stages, const __grid_constant__ DecodeMaps maps) {
  using T = typename C::T;
  using M = typename C::M;
  using Tables = typename C::Tables;
  constexpr int kConsumers = 1;  // named barrier
  extern __shared__ __align__(1024) char shared[];
  char* const weights = shared + C::kQBytes;
  char* const ring = shared + C::kRing;
  auto* const tables = reinterpret_cast<Tables*>(ring + stages * C::kStageBytes);

  // ---- what this block works on
  const uint32_t heads_kv = static_cast<uint32_t>(p.heads_kv);  // 32-bit divisions
  const int64_t group = static_cast<uint32_t>(p.heads_q) / heads_kv, rows = group * p.time_q;
  const uint32_t item = blockIdx.x / row_tiles;
  const int64_t row_tile = blockIdx.x - item * row_tiles, b = item / heads_kv, split = blockIdx.y;
  const int64_t kv_head = item - static_cast<uint32_t>(b) * heads_kv;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t first_row = row_tile * C::kRows;
  const int present = static_cast<int>(rows - first_row < C::kRows ? rows - first_row : C::kRows);
  const bool partial = partials.slots > 1;
  DecodeKeys keys(p, segment, b, split, C::kKeys);
  const int count = static_cast<int>(keys.end - keys.begin);
  const int tiles = (count + C::kKeys - 1) / C::kKeys;

  // Row r of the tile in [batch, heads_q, time_q].
  const auto result_row = [&](int r) {
    const PackedRow row = packed_row(first_row + r, group);
    return (b * p.heads_q + kv_head * group + row.head) * p.time_q + row.t;
  };
  const int64_t slot_begin = (segment.first_slot + split) * p.batch * p.heads_q * p.time_q;
  if (tiles == 0 && partial) {  // an empty piece: the combination reads no more than this of it
    launch_dependents();
    const int r = static_cast<int>(threadIdx.x);
    if (r < present) partials.lse[slot_begin + result_row(r)] = keys.invalid ? NAN : -INFINITY;
    return;
  }

  if (threadIdx.x == C::kThreads) {
    prefetch_tensor_map(maps.k);
    prefetch_tensor_map(maps.v);
    tables->invalid = keys.invalid;
    for (int i = 0; i < stages; ++i) {
      mbarrier_init(shared_address(&tables->full[i]), 1);
      mbarrier_init(shared_address(&tables->empty[i]), C::kWarps);
    }
    mbarrier_init_fence();
  }
  __syncthreads();
  if (warp == C::kWarps) {
    produce<C>(maps, keys, kv_head, shared_address(ring), stages, tables);
    __syncthreads();
    return;
  }

  // ---- Q, and what each row sees, while the first tiles fly
  load_q<C>(shared, tables->q_scale, p, b, kv_head, first_row, rows, group);
  const bool biased = p.alibi_slopes != nullptr && !keys.latent;
  for (int r = threadIdx.x; r < C::kRows; r += C::kThreads) {
    const PackedRow row = packed_row(r < present ? first_row + r : 0, group);
    const KeyRange seen = keys.row_range(row.t);
    tables->seen[r] = make_int2(static_cast<int>(clamp_index(seen.begin - keys.begin, 0, count)),
                                static_cast<int>(clamp_index(seen.end - keys.begin, 0, count)));
    const int64_t head = kv_head * group + row.head;
    tables->slope[r] = biased ? p.alibi_slopes[b * p.alibi_batch_stride + head] * DecodeLogits::kLog2e : 0.f;
    tables->diagonal[r] = static_cast<float>(row.t + keys.length - p.time_q - keys.begin);
    char* out = nullptr;
    if (r < present && partial) {
      out = reinterpret_cast<char*>(partials.out + (slot_begin + result_row(r)) * p.dim_v);
    } else if (r < present) {
      out = reinterpret_cast<char*>(static_cast<T*>(p.out.data) + b * p.out.batch_stride + row.t * p.out.time_stride +
                                    head * p.out.head_stride);
    }
    tables->out[r] = reinterpret_cast<float*>(out);
  }
  const typename C::Bounds lane_bounds{
      static_cast<int>(keys.first - keys.begin),
      static_cast<int>(clamp_index(keys.row_range(p.time_q - 1).begin - keys.begin, 0, count)),
      static_cast<int>(clamp_index(keys.row_range(0).end - keys.begin, 0, count)), count};
  if (C::kSharedReference && threadIdx.x == 0) tables->bounds = lane_bounds;
  const auto& bounds = C::kSharedReference ? tables->bounds : lane_bounds;
  fence_async_proxy();
  named_sync(kConsumers, C::kThreads);
  const float k_scale = p.k_scale != nullptr && !keys.latent ? p.k_scale[kv_head] : 1.f;
  const float v_scale = p.v_scale != nullptr && !keys.latent ? p.v_scale[kv_head] : 1.f;
  // With a softcap the logarithm's base changes behind it.
  const float scale = static_cast<float>(p.scale) * k_scale * (p.softcap > 0. ? 1.f : DecodeLogits::kLog2e);
  const DecodeLogits logits = make_decode_logits(p);

  // Element 4 i + 2 h + c of s: key 16 warp + g + 8 h, row 8 i + 2 t + c; of o[m]: column C::column(m, warp, lane, h)
  // of the same rows. Element 2 i + c of the row values below.
  float o[C::kMTiles][C::kRows / 2];
#pragma unroll
  for (int m = 0; m < C::kMTiles; ++m) {
#pragma unroll
    for (int i = 0; i < C::kRows / 2; ++i) o[m][i] = 0.f;
  }
  // Weights are 2^(logit - reference). The reference is a maximum of the row that moves only when a tile exceeds it by
  // 2^kSlack: the result is the same, and most tiles need no reduction over their keys. At first it is below everything
  // but finite, so that hidden keys (-inf) have weight 0 without a test.
  constexpr float kSlack = 8.f, kNothing = -1e30f;
  float2 lane_reference[C::kSharedReference ? 1 : C::kLaneRows / 2];
  // Of rows 8 i + 2 t and the next. In shared memory only lanes 0 to 3 of each warp write it.
  const auto reference = [&](int i) -> float2& {
    if constexpr (C::kSharedReference) {
      return tables->reference[warp][i * 4 + lane % 4];
    } else {
      return lane_reference[i];
    }
  };
  float sum[C::kLaneRows];
#pragma unroll
  for (int i = 0; i < C::kLaneRows; ++i) {
    if (i % 2 == 0 && (!C::kSharedReference || lane < 4)) reference(i / 2) = make_float2(kNothing, kNothing);
    sum[i] = 0.f;
  }
  if (C::kSharedReference) __syncwarp();
  const uint32_t p_address = shared_address(weights);
  // This lane's row address for stmatrix: row lane % 8 of n-tile pair member lane / 16, keys 8 (lane / 8 % 2) onwards.
  const uint32_t p_lane =
      (lane / 16 * 8 + lane % 8) * 128 + ((warp * 2 + lane / 8 % 2) ^ lane % 8) * 16;  // C::kRows == 8: lanes 0..15

  int slot = 0;
  uint32_t parity = 0;
  for (int tile = 0; tile < tiles; ++tile) {
    const int begin = tile * C::kKeys;
    char* const k_tile = ring + slot * C::kStageBytes;
    char* const v_tile = k_tile + C::kTileBytes;
    mbarrier_wait(shared_address(&tables->full[slot]), parity);

    float s[C::kRows / 2];
#pragma unroll
    for (int i = 0; i < C::kRows / 2; ++i) s[i] = 0.f;
    pin_registers(s);
    multiply_keys<C>(s, shared_address(k_tile), shared_address(shared), warp, lane);
    wgmma_wait<0>();
    pin_registers(s);

    const bool edge = begin < bounds.all_low || begin + C::kKeys > bounds.all_high;
#pragma unroll
    for (int i = 0; i < C::kRows / 2; ++i) {
      s[i] *= C::kNarrow ? scale * tables->q_scale[i / 4 * 8 + lane % 4 * 2 + i % 2] : scale;
    }
    if (logits.cap_out > 0.f) {
#pragma unroll
      for (int i = 0; i < C::kRows / 2; ++i) s[i] = logits.cap(s[i]);
    }
    if (edge || biased) {
#pragma unroll
      for (int i = 0; i < C::kRows / 2; ++i) {
        const int row = i / 4 * 8 + lane % 4 * 2 + i % 2;
        const int key = begin + warp * 16 + lane / 4 + i % 4 / 2 * 8;
        if (biased) s[i] -= tables->slope[row] * fabsf(tables->diagonal[row] - key);
        const int2 seen = tables->seen[row];
        if (key < seen.x || key >= seen.y) s[i] = -INFINITY;
      }
    }

    // Weights into shared memory, as B of the second product; two buffers, because a slower warp's product may still
    // read the last one.
    const uint32_t p_tile = p_address + tile % 2 * C::kPBytes;
    float tile_sum[C::kLaneRows];
    const auto store_weights = [&] {
      bool exceeds = false;
#pragma unroll
      for (int i = 0; i < C::kLaneRows; ++i) tile_sum[i] = 0.f;
      constexpr bool kWide = C::kRows >= 16;
#pragma unroll
      for (int n = 0; n < C::kRows / 8; n += kWide ? 2 : 1) {
        uint32_t packed[kWide ? 4 : 2];
#pragma unroll
        for (int j = 0; j < (kWide ? 4 : 2); ++j) {  // n-tile n + j / 2, keys h = j % 2
          const int at = (n + j / 2) * 4 + j % 2 * 2, row = (n + j / 2) * 2;
          const float2 from = reference(n + j / 2);
          const float x = s[at] - from.x, y = s[at + 1] - from.y;
          exceeds |= x > kSlack || y > kSlack;
          const float a = exp2_approx(x), c = exp2_approx(y);
          tile_sum[row] += a;
          tile_sum[row + 1] += c;
          packed[j] = pack2<M>(a, c);
        }
        store_transposed<kWide>(p_tile + p_lane + n * 8 * 128, packed);
      }
      fence_async_proxy();
      return exceeds;
    };
    if (named_sync_or(kConsumers, C::kThreads, store_weights())) {
      // Some row's reference moves: its maximum over the tile, all warps' keys.
#pragma unroll
      for (int i = 0; i < C::kLaneRows; ++i) {
        float top = fmaxf(s[i / 2 * 4 + i % 2], s[i / 2 * 4 + 2 + i % 2]);
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 4));
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 8));
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 16));
        if (lane < 4) tables->warp_value[warp][i / 2 * 8 + lane * 2 + i % 2] = top;
      }
      named_sync(kConsumers, C::kThreads);
#pragma unroll
      for (int i = 0; i < C::kLaneRows; ++i) {
        const int row = i / 2 * 8 + lane % 4 * 2 + i % 2;
        float top = tables->warp_value[0][row];
#pragma unroll
        for (int w = 1; w < C::kWarps; ++w) top = fmaxf(top, tables->warp_value[w][row]);
        float& own = i % 2 == 0 ? reference(i / 2).x : reference(i / 2).y;
        const float before = own;
        if (C::kSharedReference) __syncwarp();  // all lanes have read it
        if (top - before > kSlack) {
          const float factor = exp2_approx(before - top);
          if (!C::kSharedReference || lane < 4) own = top;
          sum[i] *= factor;
#pragma unroll
          for (int m = 0; m < C::kMTiles; ++m) {
            o[m][i / 2 * 4 + i % 2] *= factor;
            o[m][i / 2 * 4 + 2 + i % 2] *= factor;
          }
        }
      }
      if (C::kSharedReference) __syncwarp();
      store_weights();
      named_sync(kConsumers, C::kThreads);
    }
#pragma unroll
    for (int i = 0; i < C::kLaneRows; ++i) sum[i] += tile_sum[i];

    const bool ragged = (bounds.any_low < bounds.all_low && begin < bounds.all_low) ||
                        (bounds.all_high < bounds.count && begin + C::kKeys > bounds.all_high);
    if (ragged && named_sync_or(kConsumers, C::kThreads, any_not_finite<C>(v_tile))) {
      take_out_not_finite<C>(o, v_tile, weights + tile % 2 * C::kPBytes, tables, begin, warp, lane, kConsumers);
    }
    multiply_values<C>(o, shared_address(v_tile), p_tile, warp, lane);
    wgmma_wait<0>();
#pragma unroll
    for (int m = 0; m < C::kMTiles; ++m) pin_registers(o[m]);
    __syncwarp();
    if (lane == 0) mbarrier_arrive(shared_address(&tables->empty[slot]));
    if (++slot == stages) slot = 0, parity ^= 1;
  }

  // ---- sums over the keys of all lanes and warps, results
  launch_dependents();
  __syncthreads();  // the producer's verdict, and warp_value is free
  const bool invalid = tables->invalid != 0;
#pragma unroll
  for (int i = 0; i < C::kLaneRows; ++i) {
    sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], 4);
    sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], 8);
    sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], 16);
    const int row = i / 2 * 8 + lane % 4 * 2 + i % 2;
    if (lane < 4) {
      tables->warp_value[warp][row] = sum[i];
      if (warp == 0) tables->factor[row] = i % 2 == 0 ? reference(i / 2).x : reference(i / 2).y;
    }
  }
  named_sync(kConsumers, C::kThreads);
  for (int r = threadIdx.x; r < present; r += C::kThreads) {
    float total = 0.f;
#pragma unroll
    for (int w = 0; w < C::kWarps; ++w) total += tables->warp_value[w][r];
    const int64_t head = kv_head * group + packed_row(first_row + r, group).head;
    const DecodeRowResult result = finish_decode_row(p, partial, head, tables->factor[r], total, v_scale, invalid);
    tables->factor[r] = result.factor;
    (partial ? partials.lse + slot_begin : static_cast<float*>(p.lse))[result_row(r)] = result.lse;
  }
  named_sync(kConsumers, C::kThreads);
#pragma unroll
  for (int i = 0; i < C::kLaneRows; ++i) {
    const int row = i / 2 * 8 + lane % 4 * 2 + i % 2;
    float* const out = tables->out[row];
    if (out == nullptr) continue;
    const float factor = tables->factor[row];
#pragma unroll
    for (int m = 0; m < C::kMTiles; ++m) {
      Vec<float, 2> x;
#pragma unroll
      for (int h = 0; h < 2; ++h) x[h] = invalid ? NAN : o[m][i / 2 * 4 + 2 * h + i % 2] * factor;
      const int column = C::column(m, warp, lane, 0);
      if (partial && C::kNarrow) {  // neighbours; dim_v is a multiple of 8
        if (column < p.dim_v) store(out + column, x);
        continue;
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int at = C::column(m, warp, lane, h);
        if (at >= p.dim_v) continue;
        if (partial) {
          out[at] = x[h];
        } else {
          reinterpret_cast<T*>(out)[at] = from_float<T>(x[h]);
        }
      }
    }
  }
}

// As many stages as leave room for kResident blocks per SM.
template <typename C>
const char* launch_instance(const DecodeParams& p, const DecodePlan& plan, const DecodeSegment& segment,
                            const DecodePartials& partials, const Launch& launch) {
  if (const char* message = set_device(launch)) return message;
  DecodeMaps maps;
  constexpr int kPanelColumns = C::kPanelRowBytes / static_cast<int>(sizeof(typename C::Cache));
  if (const char* message = make_decode_maps(maps, p, segment.latent, kPanelColumns)) return message;
  const int limit = max_shared_memory(launch.device);  // of a block; an SM has 1 KB more, and takes 1 KB per block
  int stages = C::kMaxStages;
  while (stages > C::kMinStages && C::kResident * (C::shared_bytes(stages) + 1024) > limit + 1024) --stages;
  if (C::shared_bytes(stages) > limit) return "attention_decode: this GPU has too little shared memory per block";
  const dim3 grid(static_cast<unsigned>(p.batch * p.heads_kv * plan.row_tiles), static_cast<unsigned>(segment.splits));
  return launch_kernel(hopper_decode_kernel<C>, grid, C::kBlockThreads, C::shared_bytes(stages), launch, p, segment,
                       partials, plan.row_tiles, stages, maps);
}

template <typename T, int kHeadDim>
const char* launch_decode(const DecodeParams& p, const DecodePlan& plan, const DecodeSegment& segment,
                          const DecodePartials& partials, const Launch& launch) {
  const auto with_cache = [&](auto cache) {
    using Cache = decltype(cache);
    switch (plan.tile_rows) {
      case 8:
        return launch_instance<HopperDecodeConfig<T, Cache, kHeadDim, 8>>(p, plan, segment, partials, launch);
      case 16:
        return launch_instance<HopperDecodeConfig<T, Cache, kHeadDim, 16>>(p, plan, segment, partials, launch);
      default:
        return launch_instance<HopperDecodeConfig<T, Cache, kHeadDim, 64>>(p, plan, segment, partials, launch);
    }
  };
  if (segment.latent || p.cache_dtype == p.dtype) return with_cache(T{});
  if (p.cache_dtype == DType::kFloat8E4M3) return with_cache(__nv_fp8_e4m3{});
  if (p.cache_dtype == DType::kInt8) return with_cache(int8_t{});
  return "attention_decode: the cache must have the dtype of q, float8 e4m3 or int8";
}

}  // namespace yoco::cuda::sm90
