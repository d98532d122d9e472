// Rotary embedding inside gated retention: q and k turn while a chunk's rows are copied into scratch, dq and dk turn
// back while they are stored. The angles of a chunk serve every row of it that is loaded or stored.
#pragma once

#include "retention_matrix.h"
#include "rotary.h"

namespace yoco::cpu::YOCO_ISA {
namespace {

// Cosines and sines of position * inv_freq for the tokens of one chunk. Those of the tokens' places in a chunk are made
// once, those of a chunk's first position once per chunk; the sum of two angles costs four multiplications where a
// sine and a cosine cost forty.
template <class C>
class ChunkRotation {
 public:
  ChunkRotation(const RotaryOnLoad& r, int64_t tokens, Arena& arena) : r_(r), pairs_(r.dim / 2) {
    if (r.inv_freq == nullptr) return;
    width_ = row_width(r);
    for (C** x : {&place_factors_, &place_cross_, &factors_, &cross_}) *x = arena.take<C>(tokens * width_);
    for (C** x : {&first_factors_, &first_cross_, &cos_, &sin_}) *x = arena.take<C>(width_);
    for (int64_t i = 0; i < tokens; ++i) angles(i, place_factors_ + i * width_, place_cross_ + i * width_);
  }

  // Of the arena, for up to `tokens` tokens a chunk.
  static size_t bytes(const RotaryOnLoad& r, int64_t tokens) {
    return r.inv_freq == nullptr ? 0 : static_cast<size_t>(4 * (tokens + 1) * row_width(r)) * sizeof(C) + 512;
  }

  // A chunk of `length` tokens whose first has this position.
  void start(int64_t position, int64_t length) {
    if (r_.inv_freq == nullptr || (position == position_ && length <= length_)) return;
    position_ = position, length_ = length;
    angles(position, first_factors_, first_cross_);
    for (int64_t i = 0; i < length; ++i) {
      const C *f = place_factors_ + i * width_, *x = place_cross_ + i * width_;
      C *to_f = factors_ + i * width_, *to_x = cross_ + i * width_;
      for (int64_t n = 0; n < width_; n += kLanes<C>) {
        const Vec<C> a = load<C>(f + n), b = load<C>(x + n);
        const Vec<C> first_a = load<C>(first_factors_ + n), first_b = load<C>(first_cross_ + n);
        store<C>(to_f + n, a * first_a - b * first_b);
        store<C>(to_x + n, b * first_a + a * first_b);
      }
    }
  }

  // Components that turn; 0 without rotation.
  int64_t dim() const { return 2 * pairs_; }

  // Row i of the chunk, the components that turn; kInverse: by the negative angle.
  template <bool kInverse, class In, class Out>
  YOCO_INLINE void turn(const In* x, Out* y, int64_t i) const {
    rotate_row<C, In, Out, kInverse>(x, y, pairs_, r_.interleaved, factors_ + i * width_, cross_ + i * width_);
  }

 private:
  static int64_t row_width(const RotaryOnLoad& r) { return (r.dim + 15) / 16 * 16; }

  void angles(int64_t position, C* factors, C* cross) {
    for (C* x : {factors, cross}) std::fill(x, x + width_, C(0));
    token_angles(position, r_.inv_freq, pairs_, cos_, sin_);
    arrange_angles(cos_, sin_, pairs_, r_.interleaved, factors, cross);
  }

  const RotaryOnLoad& r_;
  int64_t pairs_, width_ = 0, position_ = -1, length_ = 0;
  // [tokens][width]: of a token's place in the chunk, and of its position; [width]: of the chunk's first position.
  C *place_factors_ = nullptr, *place_cross_ = nullptr, *factors_ = nullptr, *cross_ = nullptr;
  C *first_factors_ = nullptr, *first_cross_ = nullptr, *cos_ = nullptr, *sin_ = nullptr;
};

}  // namespace
}  // namespace yoco::cpu::YOCO_ISA
