// Attention forward for Hopper (sm_90a): one persistent kernel, read top to bottom.
//
// A CTA takes tiles of rows (token x query head of one KV head) and walks over the blocks of keys they see, first in
// the main segment, then in the latents. Warpgroup 0 is the producer: one warp moves Q, K and V by TMA. The other
// warpgroups own 64 rows each:
//   S = Q K^T          WGMMA, both operands from shared memory
//   P = exp2(S - max)  float32, in registers
//   O += P V           WGMMA, P rounded to T from registers, V from shared memory as it lies (keys x columns)
// S of block n and O of block n - 1 are in flight together; the softmax of block n runs while O of block n - 1 does.
// The warpgroups take turns in issuing products (named barriers), so that one's softmax meets another's products:
//   warpgroup 1   S1 O0 | softmax 1 ....... | S2 O1 | softmax 2 ...
//   warpgroup 2          S1 O0 | softmax 1 ....... | S2 O1 | ...
#pragma once

#include <algorithm>
#include <cstddef>
#include <type_traits>

#include "cuda/attention/simt.h"
#include "cuda/attention/sm90/plan.h"
#include "cuda/attention/sm90/visit.cuh"
#include "cuda/attention/tile.h"

namespace yoco::cuda::sm90 {

// Tile table. Registers: 65536 = sum over warpgroups of 128 x (producer or consumer). Shared memory: Q, and kStages
// slots for K and V each.
//   D    rows keys  consumers         producer  stages  shared
//   64   192  128   3 x 160 registers   32        3     120 KB   O 32 + S 64 + P 32 registers: three groups fit
//   128  128  128   2 x 240             24        2     160 KB   O 64 + S 64 + P 32
//   256  128  80    2 x 240             24        2     224 KB   O 128 + S 40 + P 20; more keys do not fit
// kTransform: softcap or alibi.
template <typename T, int D, bool Transform>
struct ForwardConfig {
  static constexpr bool kTransform = Transform;
  using Element = T;
  static constexpr int kDim = D;
  static constexpr int kWarpgroups = ForwardTiles<D>::kWarpgroups;  // consumers
  static constexpr int kRows = ForwardTiles<D>::kRows;
  static constexpr int kKeys = ForwardTiles<D>::kKeys;
  static constexpr int kThreads = kWarpgroup * (1 + kWarpgroups);
  // Keys of a block that are multiplied where a warpgroup sees only one end of it.
  static constexpr int kPart = D == 256 ? 48 : 64;
  static constexpr int kStages = D == 64 ? 3 : 2;
  static constexpr int kConsumerRegisters = kWarpgroups == 3 ? 160 : 240;
  static constexpr int kProducerRegisters = kWarpgroups == 3 ? 32 : 24;
  static constexpr int kPanels = D / 64;
  static constexpr int kQBytes = kRows * D * 2;
  static constexpr int kSlotBytes = kKeys * D * 2;
  static constexpr int kSharedBytes = kQBytes + 2 * kStages * kSlotBytes + 2 * kRows * int(sizeof(int2)) + 512;
};

// Offsets in shared memory. Barriers: "full" counts TMA bytes, "empty" one arrival per consumer warp.
template <typename Config>
struct ForwardShared {
  static constexpr int kQ = 0;
  static constexpr int kK = Config::kQBytes;
  static constexpr int kV = kK + Config::kStages * Config::kSlotBytes;
  static constexpr int kRowKeys =
      kV + Config::kStages * Config::kSlotBytes;  // int2 per row: keys, then latents it sees
  static constexpr int kTile = kRowKeys + 2 * Config::kRows * int(sizeof(int2));  // two Tiles
  static constexpr int kVisit = kTile + 2 * int(sizeof(Tile));  // for each of them, one Visit per warpgroup
  static constexpr int kKFull = kVisit + 2 * Config::kWarpgroups * int(sizeof(Visit));
  static constexpr int kKEmpty = kKFull + 8 * Config::kStages;
  static constexpr int kVFull = kKEmpty + 8 * Config::kStages;
  static constexpr int kVEmpty = kVFull + 8 * Config::kStages;
  static constexpr int kQFull = kVEmpty + 8 * Config::kStages;
  static constexpr int kQEmpty = kQFull + 8;
  static constexpr int kTileFull = kQEmpty + 8;
  static constexpr int kTileEmpty = kTileFull + 16;
  static_assert(kTileEmpty + 16 <= Config::kSharedBytes && Config::kSharedBytes <= 227 * 1024);
};
// Named barriers: 1 + w is the turn of warpgroup w; one for all consumers.
constexpr int kTurnBarrier = 1, kConsumerBarrier = 4;

// The producer warp: says what the tiles are and fills the rings.
template <typename Config>
YOCO_DEVICE void produce(const AttentionParams& p, const ForwardPlan& plan, const ForwardMaps& maps, int* counter,
                         uint32_t shared) {
  using Shared = ForwardShared<Config>;
  constexpr int kKeys = Config::kKeys, kRows = Config::kRows, kPanels = Config::kPanels;
  const bool leader = threadIdx.x % 32 == 0;
  const int tiles = int(plan.schedule.count()) * plan.splits;
  RingPosition<Config::kStages> at_k, at_v;
  RingPosition<2> at_tile;
  uint32_t q_parity = 0;
  // keys: from warpgroup_keys.
  const auto publish = [&](const Tile& tile, int2 keys) {
    mbarrier_wait(shared + Shared::kTileEmpty + 8 * at_tile.slot, at_tile.parity ^ 1);
    const int w = int(threadIdx.x);
    const TileBounds own = warpgroup_bounds(keys, w);
    if (w < Config::kWarpgroups) {
      put_visit(shared + Shared::kVisit + int(sizeof(Visit)) * (int(at_tile.slot) * Config::kWarpgroups + w),
                make_visit<kKeys, Config::kPart>(tile, own, 64 * w < tile.rows));
    }
    __syncwarp();
    if (leader) {
      put_tile(shared + Shared::kTile + int(sizeof(Tile)) * at_tile.slot, tile);
      mbarrier_arrive(shared + Shared::kTileFull + 8 * at_tile.slot);
    }
    at_tile.advance();
  };
  for (int index = int(blockIdx.x); index < tiles;) {
    const WorkTile work = plan.schedule.decode(index / plan.splits);
    const RowMap map = make_row_map(p, work.sequence, work.head);
    const int tile_rows = kRows / map.group * map.group;
    // Once, unless max_seqlen_q understated a sequence.
#pragma unroll 1
    for (int first_row = work.tile * tile_rows; first_row < map.rows; first_row += plan.schedule.tiles * tile_rows) {
      const int rows = min(tile_rows, map.rows - first_row);
      const int2 keys = warpgroup_keys<Config::kWarpgroups>(p, map, first_row, rows);
      const Tile tile =
          make_tile<kKeys>(p, map, all_bounds(keys), index, first_row, rows, index % plan.splits, plan.splits);
      publish(tile, keys);
      if (tile.begin >= tile.end) continue;
      const int batch = int(map.sequence.batch), k_begin = int(map.sequence.k_begin);
      const int latent_batch = p.latents_shared ? 0 : batch;
      const auto load = [&](const CUtensorMap& main, const CUtensorMap& latent, int n, uint32_t slot,
                            uint32_t barrier) {
        if (!leader) return;
        mbarrier_arrive_expect(barrier, Config::kSlotBytes);
        const bool in_main = n < tile.num_main;
        const CUtensorMap& from = in_main ? main : latent;
        const int key = tile.first_key<kKeys>(n) + (in_main ? k_begin : 0), b = in_main ? batch : latent_batch;
#pragma unroll
        for (int panel = 0; panel < kPanels; ++panel) {
          tma_load(slot + panel * kKeys * 128, from, barrier, panel * 64, key, map.head_kv, b);
        }
      };
      const auto load_k = [&](int n) {
        mbarrier_wait(shared + Shared::kKEmpty + 8 * at_k.slot, at_k.parity ^ 1);
        load(maps.k, maps.latent_k, n, shared + Shared::kK + at_k.slot * Config::kSlotBytes,
             shared + Shared::kKFull + 8 * at_k.slot);
        at_k.advance();
      };
      const auto load_v = [&](int n) {
        mbarrier_wait(shared + Shared::kVEmpty + 8 * at_v.slot, at_v.parity ^ 1);
        load(maps.v, maps.latent_v, n, shared + Shared::kV + at_v.slot * Config::kSlotBytes,
             shared + Shared::kVFull + 8 * at_v.slot);
        at_v.advance();
      };

      // In the order of use; the last tile may still hold Q when there is room for K.
      load_k(tile.begin);
      mbarrier_wait(shared + Shared::kQEmpty, q_parity ^ 1);
      q_parity ^= 1;
      if (leader) {
        // Rows behind the sequence belong to its neighbour or are zero; nobody stores what comes of them.
        mbarrier_arrive_expect(shared + Shared::kQFull, kPanels * tile_rows * 128);
        const int token = int(map.sequence.q_begin) + first_row / map.group;
#pragma unroll
        for (int panel = 0; panel < kPanels; ++panel) {
          tma_load(shared + Shared::kQ + panel * kRows * 128, maps.q, shared + Shared::kQFull, panel * 64, 0, token,
                   map.head_kv, batch);
        }
      }
      for (int n = tile.begin; n < tile.end; ++n) {
        if (n + 1 < tile.end) load_k(n + 1);
        load_v(n);
      }
    }
    index =
        counter == nullptr ? tiles : __shfl_sync(0xffffffffu, leader ? int(gridDim.x) + atomicAdd(counter, 1) : 0, 0);
  }
  Tile last{};
  last.index = Tile::kNoMore;
  publish(last, make_int2(0, 0));
}

// A consumer warpgroup: rows 64 w .. 64 w + 63 of every tile.
template <typename Config>
YOCO_DEVICE void consume(const AttentionParams& p, const ForwardPlan& plan, uint32_t shared) {
  using Shared = ForwardShared<Config>;
  using T = typename Config::Element;
  constexpr int kKeys = Config::kKeys, kRows = Config::kRows, kDim = Config::kDim, kS = kKeys / 2, kO = kDim / 2;
  constexpr int kPart = Config::kPart;
  const int warpgroup = uniform(int(threadIdx.x) / kWarpgroup) - 1, lane = int(threadIdx.x % 32);
  const int tile_row = int(threadIdx.x - kWarpgroup) / 32 * 16 + lane / 4;  // and + 8
  const uint32_t q_tile = shared + Shared::kQ + warpgroup * 64 * 128;
  const uint32_t row_keys_at = shared + Shared::kRowKeys + tile_row * int(sizeof(int2));
  const int dim_v = int(p.dim_v);
  const float multiplier = plan.score.multiplier;
  const int next_turn = kTurnBarrier + (warpgroup + 1) % Config::kWarpgroups;
  RingPosition<Config::kStages> at_k, at_v;
  RingPosition<2> at_tile;
  uint32_t q_parity = 0;
  if (warpgroup == 0) named_arrive(kTurnBarrier, 2 * kWarpgroup);

  for (;;) {
    mbarrier_wait(shared + Shared::kTileFull + 8 * at_tile.slot, at_tile.parity);
    const uint32_t tile_at = shared + Shared::kTile + int(sizeof(Tile)) * at_tile.slot;
    // The fields of the tile are read where they are needed: the accumulators fill the register file.
    const auto field = [&](size_t offset) { return get_field(tile_at + uint32_t(offset)); };
    if (field(offsetof(Tile, index)) == Tile::kNoMore) return;
    const Visit visit =
        get_visit(shared + Shared::kVisit + int(sizeof(Visit)) * (int(at_tile.slot) * Config::kWarpgroups + warpgroup));
    const auto row_map = [&] {
      const WorkTile work = plan.schedule.decode(field(offsetof(Tile, index)) / plan.splits);
      return make_row_map(p, work.sequence, work.head);
    };
    float o[kO];
#pragma unroll
    for (int i = 0; i < kO; ++i) o[i] = 0.f;
    RowSoftmax softmax[2];
    softmax[0].start(), softmax[1].start();

    if (field(offsetof(Tile, begin)) < field(offsetof(Tile, end))) {
      // What this thread's rows see, in shared memory until a masked block asks for it.
      {
        const RowMap map = row_map();
        const int first_row = field(offsetof(Tile, first_row)), rows = field(offsetof(Tile, rows));
        __syncwarp();
#pragma unroll 1
        for (int latents = 0; latents < (p.num_latents > 0 ? 2 : 1); ++latents) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const int row = tile_row + 8 * h;
            const int2 keys = row < rows ? row_keys(p, map, first_row + row, latents != 0) : make_int2(0, 0);
            if (lane % 4 != 0) continue;
            asm volatile("st.shared.v2.b32 [%0], {%1, %2};\n" ::"r"(row_keys_at + 8 * (latents * kRows + 8 * h)),
                         "r"(keys.x), "r"(keys.y)
                         : "memory");
          }
        }
        __syncwarp();
      }
      float bias[2] = {}, diagonal[2] = {};
      if constexpr (Config::kTransform) {
        const RowMap map = row_map();
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int row = field(offsetof(Tile, first_row)) + min(tile_row + 8 * h, field(offsetof(Tile, rows)) - 1);
          bias[h] = alibi_log2(p, map.sequence_index, map.head(row));
          diagonal[h] = float(map.token(row) + int(map.sequence.len_k - map.sequence.len_q) - lane % 4 * 2);
        }
      }

      float s[kS];
      uint32_t probabilities[kS / 8][4];
      float factor[2] = {1.f, 1.f};
      bool moves = false;
      // Below, `count` keys (a constant) of a block from key `from` on: all of them, or a part at one end.
      const std::integral_constant<int, kKeys> whole{};
      const std::integral_constant<int, kPart> part{};
      const auto issue_s = [&](auto count, int from) {
        const uint64_t a = descriptor_k(q_tile);
        const uint64_t b = descriptor_k(shared + Shared::kK + at_k.slot * Config::kSlotBytes + from * 128);
        auto& d = columns<count()>(s);
        new_registers(d);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < kDim / 16; ++k) {
          wgmma<T, Major::K, Major::K>(d, a + descriptor_step(k / 4 * (kRows * 128) + k % 4 * 32),
                                       b + descriptor_step(k / 4 * (kKeys * 128) + k % 4 * 32), k > 0);
        }
        wgmma_commit();
      };
      const auto issue_o = [&](auto count, int from) {
        const uint64_t b =
            descriptor_mn(shared + Shared::kV + at_v.slot * Config::kSlotBytes + from * 128, kKeys * 128);
        pin_registers(o);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < count() / 16; ++k) {
          wgmma<T, Major::MN>(o, probabilities[k], b + descriptor_step(k * 2048), true);
        }
        wgmma_commit();
      };
      const auto wait_k = [&] { mbarrier_wait(shared + Shared::kKFull + 8 * at_k.slot, at_k.parity); };
      const auto release_k = [&] {
        if (lane == 0) mbarrier_arrive(shared + Shared::kKEmpty + 8 * at_k.slot);
        at_k.advance();
      };
      const auto release_v = [&] {
        if (lane == 0) mbarrier_arrive(shared + Shared::kVEmpty + 8 * at_v.slot);
        at_v.advance();
      };
      const auto wait_v = [&] { mbarrier_wait(shared + Shared::kVFull + 8 * at_v.slot, at_v.parity); };
      // Before the product of V(n): what lies behind the sequence becomes zero, as 0 * NaN would be NaN. The
      // consumers share the work; nobody holds the turn meanwhile.
      const auto zero_loose_end = [&](int n) {
        if (n != visit.loose) return;
        wait_v();
        constexpr int kConsumers = kWarpgroup * Config::kWarpgroups;
        zero_tile_rows<kKeys, Config::kPanels, kConsumers>(shared + Shared::kV + at_v.slot * Config::kSlotBytes,
                                                           field(offsetof(Tile, keep)), int(threadIdx.x) - kWarpgroup);
        fence_async_proxy();
        named_sync(kConsumerBarrier, kConsumers);
      };
      // S(n) to P(n) in place; how O of the blocks before must be scaled.
      const auto softmax_step = [&](auto count, int n, int from) {
        constexpr int kCount = count() / 2;
        // Whether block n lies in the main segment, and where in its segment.
        const auto in_main = [&] { return n < field(offsetof(Tile, num_main)); };
        const auto first_key = [&](bool main) {
          return (n + field(main ? offsetof(Tile, main_first) : offsetof(Tile, latent_first))) * kKeys + from;
        };
        if constexpr (Config::kTransform) {
          const bool main = in_main();
          const int first = first_key(main);
          const auto transform = [&](const ScoreParams& score) {
#pragma unroll
            for (int i = 0; i < kCount; ++i) {
              const int h = i / 2 % 2;
              const float distance = diagonal[h] - float(first + i / 4 * 8 + i % 2);
              s[i] = transform_score(score, s[i], main ? bias[h] : 0.f, distance);
            }
          };
          // Whether there is a softcap is asked once, not for every score.
          ScoreParams score = plan.score;
          if (score.cap_out > 0.f) {
            transform(score);
          } else {
            score.cap_out = 0.f;
            transform(score);
          }
        }
        const bool full = count() == kKeys && n >= visit.full_begin && n < visit.full_end;
        if (!full && !(n < visit.full_latents && !in_main())) {
          const bool main = in_main();
          const int first = first_key(main);
          int2 keys[2];
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];\n"
                         : "=r"(keys[h].x), "=r"(keys[h].y)
                         : "r"(row_keys_at + 8 * ((main ? 0 : kRows) + 8 * h))
                         : "memory");
            keys[h].x -= first + lane % 4 * 2;
            keys[h].y -= first + lane % 4 * 2;
          }
#pragma unroll
          for (int i = 0; i < kCount; ++i) s[i] = sees(keys[i / 2 % 2], i / 4 * 8 + i % 2) ? s[i] : YOCO_NEG_INF;
        }
        float top[2] = {YOCO_NEG_INF, YOCO_NEG_INF};
#pragma unroll
        for (int i = 0; i < kCount; ++i) top[i / 2 % 2] = fmaxf(top[i / 2 % 2], s[i]);
        top[0] = group_max<4>(top[0]), top[1] = group_max<4>(top[1]);
        moves = __any_sync(0xffffffffu,
                           softmax[0].must_move(top[0], multiplier) || softmax[1].must_move(top[1], multiplier));
        if (moves) {
          factor[0] = softmax[0].move(top[0], multiplier);
          factor[1] = softmax[1].move(top[1], multiplier);
        }
        const float offset[2] = {softmax[0].offset(multiplier), softmax[1].offset(multiplier)};
        float sum[2] = {0.f, 0.f};
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          const int h = i / 2 % 2;
          s[i] = exp2_approx(fmaf(s[i], multiplier, -offset[h]));
          sum[h] += s[i];
        }
        softmax[0].sum += sum[0], softmax[1].sum += sum[1];
      };

      const auto pass_turn = [&] {
        named_sync(kTurnBarrier + warpgroup, 2 * kWarpgroup);
        named_arrive(next_turn, 2 * kWarpgroup);
      };
      // Block n, of which this warpgroup's rows see nothing.
      const auto skip = [&](int n) {
        if (n > field(offsetof(Tile, begin))) pass_turn();
        wait_k();
        release_k();
        zero_loose_end(n);
        wait_v();
        release_v();
      };
      // S and P of the first block.
      const auto start = [&](auto count, int from) {
        wait_k();
        issue_s(count, from);
        wgmma_wait<0>();
        pin_registers(columns<count()>(s));
        release_k();
        softmax_step(count, visit.begin, from);
        pack_operand<T>(columns<count()>(probabilities), columns<count()>(s));
      };
      // S and P of block n, O of block n - 1.
      const auto step = [&](auto s_count, auto o_count, int n) {
        zero_loose_end(n - 1);
        wait_k();
        named_sync(kTurnBarrier + warpgroup, 2 * kWarpgroup);
        issue_s(s_count, 0);
        wait_v();
        issue_o(o_count, kKeys - o_count());
        named_arrive(next_turn, 2 * kWarpgroup);
        wgmma_wait<1>();
        pin_registers(columns<s_count()>(s));
        release_k();
        softmax_step(s_count, n, 0);
        wgmma_wait<0>();
        pin_registers(o);
        release_v();
        if (moves) {
#pragma unroll
          for (int i = 0; i < kO; ++i) o[i] *= factor[i / 2 % 2];
        }
        pack_operand<T>(columns<s_count()>(probabilities), columns<s_count()>(s));
      };
      // O of the last block.
      const auto finish = [&](auto count, int from) {
        zero_loose_end(visit.end - 1);
        wait_v();
        issue_o(count, from);
        wgmma_wait<0>();
        pin_registers(o);
        release_v();
      };

      // Every block but the first takes a turn, visited or not, so that all warpgroups count the same ones. Only the
      // blocks at the ends are multiplied in part, each case in code of its own: with a branch inside one loop the
      // compiler would serialise all products.
      mbarrier_wait(shared + Shared::kQFull, q_parity);
      q_parity ^= 1;
#pragma unroll 1
      for (int n = field(offsetof(Tile, begin)); n < visit.begin; ++n) skip(n);
      if (visit.begin < visit.end) {
        const bool first_whole = visit.first_part == Visit::kWhole;
        const bool last_whole = visit.last_part == Visit::kWhole;
        const int whole_end = last_whole ? visit.end : visit.end - 1;
        if (first_whole) {
          start(whole, 0);
        } else {
          start(part, visit.first_part);
        }
        if (visit.begin > field(offsetof(Tile, begin))) pass_turn();
        int n = visit.begin + 1;
        if (!first_whole && n < visit.end) {
          if (n < whole_end) {
            step(whole, part, n);
          } else {
            step(part, part, n);
          }
          ++n;
        }
        at_k.slot = uniform(at_k.slot), at_k.parity = uniform(at_k.parity);
        at_v.slot = uniform(at_v.slot), at_v.parity = uniform(at_v.parity);
#pragma unroll 1
        for (; n < whole_end; ++n) step(whole, whole, n);
        if (!last_whole && n < visit.end) step(part, whole, n);
        if (lane == 0) mbarrier_arrive(shared + Shared::kQEmpty);
        if (last_whole) {
          finish(whole, 0);
        } else {
          finish(part, visit.last_part);
        }
      } else if (lane == 0) {
        mbarrier_arrive(shared + Shared::kQEmpty);
      }
      const int tile_end = field(offsetof(Tile, end));
#pragma unroll 1
      for (int n = visit.end; n < tile_end; ++n) skip(n);
    }

    // ---- epilogue
    const RowMap map = row_map();
    const int first_row = field(offsetof(Tile, first_row));
    const int rows = field(offsetof(Tile, rows));
    const int split = field(offsetof(Tile, index)) % plan.splits;
    float not_finite[2];  // NaN if a product put an infinity or NaN into a row whose own scores had none
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = first_row + tile_row + 8 * h;
      const bool valid = tile_row + 8 * h < rows;
      const float sum = group_sum<4>(softmax[h].sum);
      const float sink = valid && plan.splits == 1 ? sink_log2(p, map.head(row)) : YOCO_NEG_INF;
      const RowResult r = finish_row(softmax[h].max, sum, multiplier, sink);
      float check = 0.f;
#pragma unroll
      for (int i = 0; i < kO / 2; ++i) check = fmaf(o[i / 2 * 4 + h * 2 + i % 2], 0.f, check);
      not_finite[h] = valid && sum == sum ? check : 0.f;
      const int64_t statistic = valid ? map.statistic(p, row) : 0;
      if (plan.splits == 1) {
        if (valid && lane % 4 == 0) static_cast<float*>(p.lse)[statistic] = r.lse;
        T* const to = static_cast<T*>(p.out.data) + (valid ? map.offset(p.out, row) : 0);
        store_row<T>(to, o, h, r.factor, dim_v, valid, plan.aligned_out);
      } else if (valid) {
        const int64_t partial = split * (p.batch * p.heads_q * p.time_q) + statistic;
        if (lane % 4 == 0) plan.partial_lse[partial] = r.lse * kLog2E;
        float* const to = plan.partial_out + partial * dim_v + lane % 4 * 2;
#pragma unroll
        for (int i = 0; i < kO / 4; ++i) {
          if (i * 8 + lane % 4 * 2 >= dim_v) continue;
          *reinterpret_cast<float2*>(to + i * 8) =
              make_float2(o[i * 4 + h * 2] * r.factor, o[i * 4 + h * 2 + 1] * r.factor);
        }
      }
    }
    // A masked key's value may be infinite or NaN and still have entered the products as 0 * NaN: such rows are
    // computed again, key by key. (Split rows: by combine_kernel.)
    if (plan.splits == 1 && __any_sync(0xffffffffu, not_finite[0] != 0.f || not_finite[1] != 0.f)) {
      __syncwarp();
#pragma unroll 1
      for (int h = 0; h < 2; ++h) {
        for (unsigned todo = __ballot_sync(0xffffffffu, (h == 0 ? not_finite[0] : not_finite[1]) != 0.f); todo != 0;) {
          const int r = (__ffs(int(todo)) - 1) / 4;
          todo &= ~(0xfu << (r * 4));
          attend_row<T>(p, plan.score, map.sequence_index, map.head_kv, first_row + tile_row - lane / 4 + 8 * h + r);
        }
      }
    }
    if (lane == 0) mbarrier_arrive(shared + Shared::kTileEmpty + 8 * at_tile.slot);
    at_tile.advance();
  }
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    attention_forward_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ ForwardPlan plan,
                             const __grid_constant__ ForwardMaps maps, int* counter) {
  using Shared = ForwardShared<Config>;
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  const uint32_t shared = shared_address(shared_memory);
  if (threadIdx.x == 0) {
    constexpr int kConsumerWarps = 4 * Config::kWarpgroups;
    for (int i = 0; i < Config::kStages; ++i) {
      mbarrier_init(shared + Shared::kKFull + 8 * i, 1);
      mbarrier_init(shared + Shared::kVFull + 8 * i, 1);
      mbarrier_init(shared + Shared::kKEmpty + 8 * i, kConsumerWarps);
      mbarrier_init(shared + Shared::kVEmpty + 8 * i, kConsumerWarps);
    }
    mbarrier_init(shared + Shared::kQFull, 1);
    mbarrier_init(shared + Shared::kQEmpty, kConsumerWarps);
    for (int i = 0; i < 2; ++i) {
      mbarrier_init(shared + Shared::kTileFull + 8 * i, 1);
      mbarrier_init(shared + Shared::kTileEmpty + 8 * i, kConsumerWarps);
    }
    mbarrier_init_fence();
  }
  zero_tail<typename Config::Element>(p, blockIdx.x, gridDim.x);
  if (p.num_sequences == 0) return;
  __syncthreads();
  if (threadIdx.x < kWarpgroup) {
    give_registers<Config::kProducerRegisters>();
    if (threadIdx.x < 32) produce<Config>(p, plan, maps, counter, shared);
  } else {
    take_registers<Config::kConsumerRegisters>();
    consume<Config>(p, plan, shared);
  }
}

template <typename T, int D>
const char* launch_attention_forward(const AttentionParams& p, const ForwardPlan& plan, int* counter,
                                     const Launch& launch) {
  using Config = ForwardConfig<T, D, false>;
  if (const char* message = set_device(launch)) return message;
  ForwardMaps maps{};
  const int64_t group = p.heads_q / p.heads_kv, latent_batch = p.latents_shared ? 1 : p.batch;
  const char* m = make_grouped_map(maps.q, p.q, p.dtype, p.batch, p.time_q, p.heads_kv, group, p.dim_qk,
                                   int(Config::kRows / group));
  if (!m) m = make_rows_map(maps.k, p.k, p.dtype, p.batch, p.time_k, p.heads_kv, p.dim_qk, Config::kKeys);
  if (!m) m = make_rows_map(maps.v, p.v, p.dtype, p.batch, p.time_k, p.heads_kv, p.dim_v, Config::kKeys);
  if (!m) {
    m = make_rows_map(maps.latent_k, p.latent_k, p.dtype, latent_batch, p.num_latents, p.heads_kv, p.dim_qk,
                      Config::kKeys);
  }
  if (!m) {
    m = make_rows_map(maps.latent_v, p.latent_v, p.dtype, latent_batch, p.num_latents, p.heads_kv, p.dim_v,
                      Config::kKeys);
  }
  if (m) return m;
  const int64_t tiles = std::max<int64_t>(plan.schedule.count() * plan.splits, 1);
  const unsigned ctas = unsigned(std::min<int64_t>(tiles, std::max(sm_count(launch.device), 1)));
  if (tiles > ctas) {
    YOCO_CUDA_CHECK(cudaMemsetAsync(counter, 0, sizeof(int), static_cast<cudaStream_t>(launch.stream)));
  } else {
    counter = nullptr;
  }
  const auto kernel =
      plan.score.plain ? attention_forward_kernel<Config> : attention_forward_kernel<ForwardConfig<T, D, true>>;
  return launch_kernel(kernel, dim3(ctas), Config::kThreads, Config::kSharedBytes, launch, p, plan, maps, counter);
}

}  // namespace yoco::cuda::sm90
