// The forward on AMX tiles. The tile unit multiplies on its own while the vector ports compute exponentials, so the two
// are interleaved by hand. 32 rows x 32 keys of scores are one slot, a few slots one unit; while the 32 rows of a slot
// go through exp2, the score products of the next slot and a share of the output products of the previous unit are
// issued, a tile or so per row.
//
// Wider inputs are split into planes of bf16 (matrix.h).
//
// There is no running maximum: the first keys a row sees give its shift, and later scores may exceed it by 2^60 before
// float32 sums could overflow. Sums are checked at the end; the rare block that fails runs again on the general path.
#pragma once

#include "attention_tile.h"

#if YOCO_HAS_AMX

#include <utility>

namespace yoco::cpu::YOCO_ISA {
namespace {

constexpr int kTile = 512;  // elements of a bf16 tile; one of float has half as many
constexpr int64_t kSlotRows = 32, kSlotKeys = 32;
constexpr int64_t kGroups = kTaskRows / kSlotRows;
constexpr int64_t kGroupKeys = 512;  // keys that one group takes before the next one does: they stay in L2
// Sums beyond this, infinities and NaN: the shift was not good enough.
constexpr float kAmxLargestSum = 0x1p60f;

// Small exponentials become zero instead of denormals, which cost microcode.
class FlushDenormals {
 public:
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8000); }
  ~FlushDenormals() { _mm_setcsr(saved_); }
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;

 private:
  unsigned saved_;
};

// 2^x with relative error 8e-5, an eighth of the rounding to bf16 that follows; zero where `visible` is not set.
YOCO_INLINE __m512 exp2_bf16(__mmask16 visible, __m512 x) {
  const __m512 r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF);  // x - floor(x)
  __m512 y = _mm512_set1_ps(7.8024192e-2f);
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(2.2606721e-1f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(6.9583374e-1f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(9.9992517e-1f));
  return _mm512_maskz_scalef_ps(visible, y, x);  // y * 2^floor(x)
}

// The same with relative error 1e-7.
YOCO_INLINE __m512 exp2_float(__mmask16 visible, __m512 x) {
  return _mm512_maskz_mov_ps(visible, bit_cast<__m512>(exp2_nonpositive(bit_cast<Vec<float>>(x))));
}

// Keys and values of kSlotKeys keys lie together, as the tiles that are loaded, each 1 KiB: per plane depth x 2 tiles
// of K^T (32 components x 16 keys), then per plane depth x 2 tiles of V (32 keys x 16 components).
constexpr int64_t slot_elements(int64_t depth, int64_t planes) { return 4 * depth * planes * kTile; }

// Packs n <= 32 keys; what is missing is zero.
template <class T>
void pack_slot(const T* k, int64_t k_stride, int64_t dim_k, const T* v, int64_t v_stride, int64_t dim_v, int64_t n,
               int64_t depth, BFloat16* dst) {
  constexpr int kCount = kPlanes<T>;
  for (int64_t d = 0; d < depth; ++d) {
    for (int64_t half = 0; half < 2; ++half) {
      alignas(64) uint32_t words[kCount][16 * 16];
      for (int64_t j = 0; j < 16; ++j) {
        const int64_t key = half * 16 + j;
        __m512i planes[kCount] = {};
        if (key < n) load_planes(k + key * k_stride + 32 * d, dim_k - 32 * d, planes);
        for (int i = 0; i < kCount; ++i) _mm512_store_si512(words[i] + 16 * j, planes[i]);
      }
      for (int i = 0; i < kCount; ++i) {
        auto* to = reinterpret_cast<uint32_t*>(dst + (2 * (i * depth + d) + half) * kTile);
        transpose_words(words[i], 16, 16, to, 16);
      }
    }
  }
  BFloat16* values = dst + 2 * depth * kCount * kTile;
  for (int64_t t = 0; t < 2 * depth; ++t) {
    const int64_t width = std::clamp<int64_t>(dim_v - 16 * t, 0, 16);
    for (int64_t j = 0; j < 16; ++j) {
      // Words: the even key's value in the lower half, the odd one's in the upper half.
      const auto row = [&](int64_t key) {
        if constexpr (std::is_same_v<T, BFloat16>) {
          const auto columns = static_cast<__mmask16>((1u << width) - 1);
          const __m256i x = _mm256_maskz_loadu_epi16(key < n ? columns : __mmask16{0}, v + key * v_stride + 16 * t);
          return bit_cast<__m512>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
        } else {
          return key < n ? load_some(v + key * v_stride + 16 * t, width) : _mm512_setzero_ps();
        }
      };
      __m512 even = row(2 * j), odd = row(2 * j + 1);
      for (int i = 0; i < kCount; ++i) {
        const __m512i a = take_plane(even), b = take_plane(odd);
        _mm512_store_si512(values + (i * 2 * depth + t) * kTile + 32 * j, pair_planes(a, b));
      }
    }
  }
}

struct AmxUnit {
  const BFloat16* slots_data = nullptr;
  int group = 0;
  int slots = 0;
  int32_t all_low, all_high;                 // keys of the unit that every row sees
  int32_t begin[kSlotRows], end[kSlotRows];  // keys of the unit that each row sees
  bool masked(int slot) const { return all_low > slot * kSlotKeys || all_high < (slot + 1) * kSlotKeys; }
  uint32_t visible(int row, int slot) const {
    const auto below = [](int64_t n) { return n <= 0 ? 0u : (n >= 32 ? ~0u : (1u << n) - 1); };
    return below(end[row] - slot * kSlotKeys) & ~below(begin[row] - slot * kSlotKeys);
  }
};

// The units of one block of rows.
class AmxUnits {
 public:
  AmxUnits(int64_t rows, int64_t depth, int64_t planes)
      : groups_(static_cast<int>((rows + kSlotRows - 1) / kSlotRows)),
        depth_(depth),
        slot_elements_(slot_elements(depth, planes)) {}

  // False when a value that is not finite lies where the mask may put a zero: 0 * NaN is NaN.
  template <class T>
  bool add(const AttentionParams& p, const PackedKV<T>& kv, const Sequence& s, const Rows& rows, const Segment& segment,
           bool latent) {
    const Intervals seen(p, s, rows, p.heads_q / p.heads_kv, latent);
    if (seen.empty()) return true;
    const int64_t first_block = kv.block_index(segment, rows.kv_head, 0);
    for (int64_t block = seen.low / kKeys; block * kKeys < seen.high; ++block) {
      if (!kv.finite(first_block + block)) return false;
    }
    Part& part = parts_[count_++];
    part.keys = kv.slots(first_block);
    for (int g = 0; g < groups_; ++g) {
      Group& group = part.groups[g];
      for (int64_t r = 0; r < kSlotRows; ++r) {
        const int64_t row = g * kSlotRows + r;
        if (row >= rows.count) {
          group.begin[r] = group.end[r] = 0;
          continue;
        }
        group.begin[r] = seen.begin[row], group.end[r] = seen.end[row];
        group.all_low = std::max<int64_t>(group.all_low, group.begin[r]);
        group.all_high = std::min<int64_t>(group.all_high, group.end[r]);
        if (group.begin[r] < group.end[r]) {
          group.low = std::min<int64_t>(group.low, group.begin[r] / kSlotKeys * kSlotKeys);
          group.high = std::max<int64_t>(group.high, group.end[r]);
        }
      }
      group.at = group.low;
    }
    if (count_ == 1) limit_ = seen.low / kGroupKeys * kGroupKeys + kGroupKeys;
    part.first_limit = seen.low / kGroupKeys * kGroupKeys + kGroupKeys;
    part.high = seen.high;
    return true;
  }

  bool next(AmxUnit& unit) {
    while (part_ < count_) {
      Part& part = parts_[part_];
      Group& g = part.groups[group_];
      const int64_t stop = std::min(limit_, g.high);
      if (g.at < stop) {
        const int64_t slots = std::min(depth_, (stop - g.at + kSlotKeys - 1) / kSlotKeys);
        unit.slots_data = part.keys + g.at / kSlotKeys * slot_elements_;
        unit.group = group_;
        unit.slots = static_cast<int>(slots);
        const auto inside = [&](int64_t key) {
          return static_cast<int32_t>(std::clamp<int64_t>(key - g.at, 0, slots * kSlotKeys));
        };
        unit.all_low = inside(g.all_low), unit.all_high = inside(g.all_high);
        if (unit.all_low > 0 || unit.all_high < slots * kSlotKeys) {
          for (int r = 0; r < kSlotRows; ++r) unit.begin[r] = inside(g.begin[r]), unit.end[r] = inside(g.end[r]);
        }
        g.at += slots * kSlotKeys;
        return true;
      }
      if (++group_ < groups_) continue;
      group_ = 0;
      limit_ += kGroupKeys;
      if (limit_ - kGroupKeys < part.high) continue;
      if (++part_ < count_) limit_ = parts_[part_].first_limit;
    }
    return false;
  }

 private:
  struct Group {
    int64_t low = INT64_MAX, high = 0, all_low = 0, all_high = INT64_MAX, at = 0;
    int32_t begin[kSlotRows], end[kSlotRows];
  };
  struct Part {
    const BFloat16* keys;
    int64_t high, first_limit;
    Group groups[kGroups];
  };

  Part parts_[2];
  const int groups_;
  const int64_t depth_, slot_elements_;
  int count_ = 0, part_ = 0, group_ = 0;
  int64_t limit_ = 0;
};

// kDepth: head dims in units of 32. A unit has up to kDepth slots, so that the output products of one unit (kDepth
// pairs of tiles per 32 rows) spread evenly over the slots of the next.
template <class T, int kDepth>
class AmxForward {
 public:
  static constexpr int kP = kPlanes<T>;
  static constexpr int64_t kDim = kDepth * 32;
  using Pairs = PlanePairs<kP>;
  static constexpr int kPairs = Pairs::kCount;
  // Tile products of one slot's scores, and of one pair of output tiles.
  static constexpr int kSteps = 4 * kPairs * kDepth;
  static constexpr int64_t kSlotElements = slot_elements(kDepth, kP), kValues = kSlotElements / 2;

  struct Buffers {
    float* out;     // [kGroups + 1][kDepth * 2] tiles of 2 x 16 x 16; the last group is for what nobody wants
    float* sum;     // [kTaskRows, 16]: a partial sum per vector lane
    float* shift;   // [kTaskRows]: minus the maximum in base 2; infinity: not known yet
    float* scores;  // [2][kSlotRows, kSlotKeys]
    BFloat16* q;    // [kGroups][kDepth] of 2 tiles
    BFloat16* p;    // [2][kDepth] of 2 tiles
  };
  static constexpr int64_t kGroupOut = kDepth * 2 * kTile, kPlaneQ = kDepth * 2 * kTile, kGroupQ = kP * kPlaneQ,
                           kSlotP = kP * 2 * kTile;
  static constexpr size_t bytes() {
    return (kGroups + 1) * kGroupOut * 4 + kTaskRows * 17 * 4 + 2 * kSlotRows * kSlotKeys * 4 + kGroups * kGroupQ * 2 +
           2 * kDepth * kSlotP * 2;
  }
  static Buffers carve(char* memory) {
    Buffers b;
    b.out = reinterpret_cast<float*>(memory);
    b.sum = b.out + (kGroups + 1) * kGroupOut;
    b.shift = b.sum + kTaskRows * 16;
    b.scores = b.shift + kTaskRows;
    b.q = reinterpret_cast<BFloat16*>(b.scores + 2 * kSlotRows * kSlotKeys);
    b.p = b.q + kGroups * kGroupQ;
    return b;
  }

  static void clear(const Buffers& b, int64_t rows) {
    std::memset(b.out, 0, round_up(rows, kSlotRows) / kSlotRows * kGroupOut * sizeof(float));
    std::memset(b.out + kGroups * kGroupOut, 0, kGroupOut * sizeof(float));
    std::memset(b.sum, 0, round_up(rows, kSlotRows) * 16 * sizeof(float));
    // Rows that fill up the last slot have zero queries and need no shift.
    for (int64_t r = 0; r < kTaskRows; ++r) b.shift[r] = r < rows ? std::numeric_limits<float>::infinity() : 0.0f;
    if (rows % kSlotRows != 0) {
      std::memset(static_cast<void*>(b.q + rows / kSlotRows * kGroupQ), 0, kGroupQ * sizeof(BFloat16));
    }
  }

  static void set_query(const Buffers& b, int64_t r, const T* row, int64_t dim) {
    BFloat16* q = b.q + r / kSlotRows * kGroupQ + r % kSlotRows * 32;
    for (int64_t d = 0; d < kDepth; ++d) {
      __m512i planes[kP] = {};
      if (32 * d < dim) load_planes(row + 32 * d, dim - 32 * d, planes);
      for (int i = 0; i < kP; ++i) _mm512_store_si512(q + i * kPlaneQ + d * 2 * kTile, planes[i]);
    }
  }
  static void get_output(const Buffers& b, int64_t r, float* row) {
    const int64_t half = r % kSlotRows / 16;
    const float* out = b.out + r / kSlotRows * kGroupOut + half * 256 + r % 16 * 16;
    for (int64_t t = 0; t < 2 * kDepth; ++t) _mm512_storeu_ps(row + 16 * t, _mm512_load_ps(out + t * 2 * 256));
  }

  // All units of a block of rows, starting from q, zeroed out and sum, and shift.
  static void run(const Buffers& b, float factor, AmxUnits& source) {
    AmxUnit units[3];
    AmxUnit *previous = &units[0], *current = &units[1], *following = &units[2];
    bool fresh[kGroups];
    std::fill(fresh, fresh + kGroups, true);
    if (!source.next(*current)) return;
    previous->group = kGroups, previous->slots = 0, previous->slots_data = current->slots_data;
    float* scores = b.scores;
    float* next_scores = b.scores + kSlotRows * kSlotKeys;
    BFloat16* p = b.p;
    BFloat16* previous_p = b.p + kDepth * kSlotP;
    all_scores(b.q + current->group * kGroupQ, current->slots_data, scores);
    for (bool more = true; more;) {
      more = source.next(*following);
      const int64_t row = current->group * kSlotRows;
      for (int slot = 0; slot < current->slots; ++slot) {
        // After the last slot of all its own scores are formed once more, for nobody.
        const bool last = slot + 1 == current->slots;
        const AmxUnit& unit = last && more ? *following : *current;
        const int next_slot = last ? (more ? 0 : slot) : slot + 1;
        const Work work{b.q + unit.group * kGroupQ,
                        unit.slots_data + next_slot * kSlotElements,
                        next_scores,
                        previous_p,
                        previous->slots_data + kValues + 2 * slot * kTile,
                        b.out + previous->group * kGroupOut + slot * 4 * 256,
                        previous->slots};
        if (fresh[current->group]) {
          fresh[current->group] = first_shift(*current, slot, scores, factor, b.shift + row);
        }
        rows(work, *current, slot, scores, factor, b.shift + row, b.sum + row * 16, p + slot * kSlotP);
        std::swap(scores, next_scores);
      }
      for (int pair = current->slots; pair < kDepth; ++pair) all_outputs(b, *previous, previous_p, pair);
      std::swap(p, previous_p);
      std::swap(previous, current);
      std::swap(current, following);
    }
    for (int pair = 0; pair < kDepth; ++pair) all_outputs(b, *previous, previous_p, pair);
  }

 private:
  // What the tile unit does while a slot goes through exp2.
  struct Work {
    const BFloat16 *q, *keys;  // of the next slot
    float* scores;
    const BFloat16 *p, *values;  // of the previous unit: a pair of output tiles
    float* out;
    int slots;
  };

  // One product of a block of 2 x 2 tiles: tiles 4 and 5 from the left operand, 6 and 7 from the right one, loaded only
  // when the pair of planes brings new ones.
  template <int kPair, int kWhich>
  YOCO_INLINE static void product(const BFloat16* a, const BFloat16* b) {
    constexpr bool kNewA = Pairs::new_left(kPair), kNewB = Pairs::new_right(kPair);
    if constexpr (kWhich == 0) {
      if constexpr (kNewA) _tile_loadd(4, a, 64);
      if constexpr (kNewB) _tile_loadd(6, b, 64);
      _tile_dpbf16ps(0, 4, 6);
    } else if constexpr (kWhich == 1) {
      if constexpr (kNewB) _tile_loadd(7, b + kTile, 64);
      _tile_dpbf16ps(1, 4, 7);
    } else if constexpr (kWhich == 2) {
      if constexpr (kNewA) _tile_loadd(5, a + kTile, 64);
      _tile_dpbf16ps(2, 5, 6);
    } else {
      _tile_dpbf16ps(3, 5, 7);
    }
  }

  // Four tiles of scores, 2 x 2: step kStep is one product.
  template <int kStep>
  YOCO_INLINE static void score_step(const Work& w) {
    constexpr int kK = kStep / (4 * kPairs), kPair = kStep / 4 % kPairs, kWhich = kStep % 4;
    if constexpr (kStep == 0) _tile_zero(0);
    if constexpr (kStep == 1) _tile_zero(1);
    if constexpr (kStep == 2) _tile_zero(2);
    if constexpr (kStep == 3) _tile_zero(3);
    product<kPair, kWhich>(w.q + Pairs::left(kPair) * kPlaneQ + kK * 2 * kTile,
                           w.keys + (Pairs::right(kPair) * kDepth + kK) * 2 * kTile);
  }
  template <int kWhich>
  YOCO_INLINE static void score_store(const Work& w) {
    if constexpr (kWhich == 0) _tile_stored(0, w.scores, 128);
    if constexpr (kWhich == 1) _tile_stored(1, w.scores + 16, 128);
    if constexpr (kWhich == 2) _tile_stored(2, w.scores + 16 * kSlotKeys, 128);
    if constexpr (kWhich == 3) _tile_stored(3, w.scores + 16 * kSlotKeys + 16, 128);
  }

  // Two output tiles for both halves of the rows; as many steps of depth as the unit had slots.
  template <int kStep>
  YOCO_INLINE static void output_step(const Work& w) {
    constexpr int kK = kStep / (4 * kPairs), kPair = kStep / 4 % kPairs, kWhich = kStep % 4;
    if (kK >= w.slots) return;
    product<kPair, kWhich>(w.p + kK * kSlotP + Pairs::left(kPair) * 2 * kTile,
                           w.values + kK * kSlotElements + Pairs::right(kPair) * kDepth * 2 * kTile);
  }
  template <int kWhich>
  YOCO_INLINE static void output_load(const Work& w) {
    if constexpr (kWhich == 0) _tile_loadd(0, w.out, 64);
    if constexpr (kWhich == 1) _tile_loadd(1, w.out + 512, 64);
    if constexpr (kWhich == 2) _tile_loadd(2, w.out + 256, 64);
    if constexpr (kWhich == 3) _tile_loadd(3, w.out + 768, 64);
  }
  template <int kWhich>
  YOCO_INLINE static void output_store(const Work& w) {
    if constexpr (kWhich == 0) _tile_stored(0, w.out, 64);
    if constexpr (kWhich == 1) _tile_stored(1, w.out + 512, 64);
    if constexpr (kWhich == 2) _tile_stored(2, w.out + 256, 64);
    if constexpr (kWhich == 3) _tile_stored(3, w.out + 768, 64);
  }

  // All that the tile unit does for one slot, in order. Scores: kSteps products, four stores. Outputs: four loads,
  // kSteps products, four stores.
  static constexpr int kScoreEvents = kSteps + 4, kEvents = 2 * kSteps + 12;
  template <int kEvent>
  YOCO_INLINE static void event(const Work& w) {
    if constexpr (kEvent < kSteps) {
      score_step<kEvent>(w);
    } else if constexpr (kEvent < kScoreEvents) {
      score_store<kEvent - kSteps>(w);
    } else if constexpr (kEvent < kScoreEvents + 4) {
      output_load<kEvent - kScoreEvents>(w);
    } else if constexpr (kEvent < kScoreEvents + 4 + kSteps) {
      output_step<kEvent - kScoreEvents - 4>(w);
    } else {
      output_store<kEvent - kScoreEvents - 4 - kSteps>(w);
    }
  }
  // The row of softmax before which an event is issued.
  static constexpr int row_of(int event) { return event * 32 / kEvents; }

  template <int kFirst, int... kEvent>
  YOCO_INLINE static void events(const Work& w, std::integer_sequence<int, kEvent...>) {
    (event<kFirst + kEvent>(w), ...);
  }
  static void all_scores(const BFloat16* q, const BFloat16* keys, float* scores) {
    events<0>(Work{q, keys, scores, nullptr, nullptr, nullptr, 0}, std::make_integer_sequence<int, kScoreEvents>());
  }
  static void all_outputs(const Buffers& b, const AmxUnit& unit, const BFloat16* p, int pair) {
    events<kScoreEvents>(Work{nullptr, nullptr, nullptr, p, unit.slots_data + kValues + 2 * pair * kTile,
                              b.out + unit.group * kGroupOut + pair * 4 * 256, unit.slots},
                         std::make_integer_sequence<int, kEvents - kScoreEvents>());
  }

  template <int kRow, int kEvent = 0>
  YOCO_INLINE static void events_of_row(const Work& w) {
    if constexpr (kEvent < kEvents) {
      if constexpr (row_of(kEvent) == kRow) event<kEvent>(w);
      if constexpr (row_of(kEvent) <= kRow) events_of_row<kRow, kEvent + 1>(w);
    }
  }

  template <bool kMasked, int kRow>
  YOCO_INLINE static void row(const Work& work, const AmxUnit& unit, int slot, const float* scores, __m512 factor,
                              const float* shift, float* sum, BFloat16* p) {
    const uint32_t visible = kMasked ? unit.visible(kRow, slot) : ~0u;
    const __m512 minus_top = _mm512_set1_ps(shift[kRow]);
    events_of_row<kRow>(work);
    const __m512 s0 = _mm512_load_ps(scores + kRow * kSlotKeys), s1 = _mm512_load_ps(scores + kRow * kSlotKeys + 16);
    const __m512 x0 = _mm512_fmadd_ps(s0, factor, minus_top), x1 = _mm512_fmadd_ps(s1, factor, minus_top);
    const auto low = static_cast<__mmask16>(visible), high = static_cast<__mmask16>(visible >> 16);
    __m512 e0, e1;
    if constexpr (kP == 1) {
      e0 = exp2_bf16(low, x0), e1 = exp2_bf16(high, x1);
      _mm512_store_si512(p + kRow * 32, join_planes(bit_cast<__m512i>(e0), bit_cast<__m512i>(e1)));
    } else {
      e0 = exp2_float(low, x0), e1 = exp2_float(high, x1);
      __m512 r0 = e0, r1 = e1;
      for (int i = 0; i < kP; ++i) {
        const __m512i a = take_plane(r0), b = take_plane(r1);
        _mm512_store_si512(p + i * 2 * kTile + kRow * 32, join_planes(a, b));
      }
    }
    _mm512_store_ps(sum + 16 * kRow, _mm512_add_ps(_mm512_add_ps(e0, e1), _mm512_load_ps(sum + 16 * kRow)));
  }

  template <bool kMasked, int... kRow>
  __attribute__((noinline)) static void all_rows(const Work& work, const AmxUnit& unit, int slot, const float* scores,
                                                 float factor, const float* shift, float* sum, BFloat16* p,
                                                 std::integer_sequence<int, kRow...>) {
    const __m512 f = _mm512_set1_ps(factor);
    (row<kMasked, kRow>(work, unit, slot, scores, f, shift, sum, p), ...);
    __asm__ volatile("" ::: "memory");  // tile loads do not tell the compiler that they read p
  }
  YOCO_INLINE static void rows(const Work& work, const AmxUnit& unit, int slot, const float* scores, float factor,
                               const float* shift, float* sum, BFloat16* p) {
    constexpr auto kAll = std::make_integer_sequence<int, kSlotRows>();
    if (unit.masked(slot)) {
      all_rows<true>(work, unit, slot, scores, factor, shift, sum, p, kAll);
    } else {
      all_rows<false>(work, unit, slot, scores, factor, shift, sum, p, kAll);
    }
  }

  // Shifts of the rows that have none yet, from the first keys they see. Returns whether some are still missing.
  __attribute__((noinline)) static bool first_shift(const AmxUnit& unit, int slot, const float* scores, float factor,
                                                    float* shift) {
    bool missing = false;
    const __m512 f = _mm512_set1_ps(factor);
    for (int r = 0; r < kSlotRows; ++r) {
      if (shift[r] != std::numeric_limits<float>::infinity()) continue;
      const uint32_t visible = unit.masked(slot) ? unit.visible(r, slot) : ~0u;
      __m512 top = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
      for (int j = 0; j < 2; ++j) {
        const __m512 s = _mm512_mul_ps(_mm512_load_ps(scores + r * kSlotKeys + 16 * j), f);
        top = _mm512_mask_max_ps(top, static_cast<__mmask16>(visible >> (16 * j)), s, top);
      }
      shift[r] = -_mm512_reduce_max_ps(top);
      missing |= shift[r] == std::numeric_limits<float>::infinity();
    }
    return missing;
  }
};

// Head dims are padded to the next instance.
inline int amx_kernel_depth(const AttentionParams& p) {
  const int64_t depth = (std::max(p.dim_qk, p.dim_v) + 31) / 32;
  return depth <= 2 ? 2 : (depth <= 4 ? 4 : 8);
}
template <class T>
size_t amx_scratch_bytes(int depth) {
  return depth > 4 ? AmxForward<T, 8>::bytes() : AmxForward<T, 4>::bytes();
}

}  // namespace
}  // namespace yoco::cpu::YOCO_ISA

#endif
