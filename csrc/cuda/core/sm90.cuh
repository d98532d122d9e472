// Building blocks of the Hopper kernels (sm_90a): mbarriers, TMA, WGMMA, named barriers, register reallocation.
// One function per instruction; files that use them lie in attention/sm90/ and retention/sm90/ and are compiled for 90a
// only.
//
// Tiles of 16-bit elements in shared memory are as in attention/tile.h: a tile of R rows and D columns is D / 64 panels
// of [R][64], rows of 128 bytes whose eight 16-byte chunks are permuted by chunk ^= row % 8. This is what TMA writes
// with 128-byte swizzle (one box of 64 columns per panel) and what WGMMA reads, in either orientation. Panels start at
// multiples of 1024 bytes.
#pragma once

#include <cuda.h>

#define CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED  // any N that is a multiple of 8
#include <cute/arch/mma_sm90_gmma.hpp>
#include <utility>

#include "cuda/core/ptx.cuh"

namespace yoco::cuda::sm90 {

constexpr int kWarpgroup = 128;  // threads

// One lane of a converged warp, always the same one.
YOCO_DEVICE bool elect_one() {
  uint32_t chosen;
  asm volatile(
      "{\n.reg .pred p;\n"
      "elect.sync _|p, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, p;\n}\n"
      : "=r"(chosen));
  return chosen != 0;
}

// ---- mbarriers: 8 bytes in shared memory, given by address
YOCO_DEVICE void mbarrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(barrier), "r"(arrivals) : "memory");
}
// Makes the initialised barriers known to TMA; then a barrier of the CTA.
YOCO_DEVICE void mbarrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory"); }
YOCO_DEVICE void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(barrier) : "memory");
}
// Arrives, and the phase also waits for `bytes` of asynchronous copies.
YOCO_DEVICE void mbarrier_arrive_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(barrier), "r"(bytes) : "memory");
}
// Until the phase of this parity has completed. A barrier starts in phase 0; waiting for parity 1 on a new one returns
// at once (that is how producers find all slots empty).
YOCO_DEVICE void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred p;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
      "@p bra done;\n"
      "bra again;\n"
      "done:\n}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// Position in a ring of kStages slots: slot, and the parity of the current round.
template <int kStages>
struct RingPosition {
  uint32_t slot = 0, parity = 0;
  YOCO_DEVICE void advance() {
    if (++slot == kStages) slot = 0, parity ^= 1;
  }
};

// ---- named barriers (0 is __syncthreads)
YOCO_DEVICE void named_sync(int id, int threads) {
  asm volatile("barrier.cta.sync %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
}
YOCO_DEVICE void named_arrive(int id, int threads) {
  asm volatile("barrier.cta.arrive %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
}

// A barrier that also tells whether `flag` was true in any of its threads.
YOCO_DEVICE bool named_sync_or(int id, int threads, bool flag) {
  uint32_t any;
  asm volatile(
      "{\n.reg .pred p, q;\n"
      "setp.ne.u32 p, %3, 0;\n"
      "barrier.cta.red.or.pred q, %1, %2, p;\n"
      "selp.u32 %0, 1, 0, q;\n}\n"
      : "=r"(any)
      : "r"(id), "r"(threads), "r"(uint32_t(flag))
      : "memory");
  return any != 0;
}

// ---- registers: every warp of the warpgroup executes it; multiples of 8
template <int kRegisters>
YOCO_DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}
template <int kRegisters>
YOCO_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}

// ---- TMA
YOCO_DEVICE void prefetch_tensor_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];\n" ::"l"(&map) : "memory");
}
// A box of a tensor to shared memory, by one thread; coordinates innermost first. What lies outside the tensor is
// written as zero and counts in the barrier's bytes like the rest.
YOCO_DEVICE void tma_load(uint32_t shared, const CUtensorMap& map, uint32_t barrier, int c0, int c1, int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];\n" ::"r"(shared),
      "l"(&map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}
YOCO_DEVICE void tma_load(uint32_t shared, const CUtensorMap& map, uint32_t barrier, int c0, int c1, int c2, int c3,
                          int c4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6, %7}], "
      "[%2];\n" ::"r"(shared),
      "l"(&map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
      : "memory");
}
// With a cache policy (createpolicy).
YOCO_DEVICE void tma_load(uint32_t shared, const CUtensorMap& map, uint32_t barrier, uint64_t policy, int c0, int c1,
                          int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%4, %5, %6, %7}], [%2], %3;\n" ::"r"(shared),
      "l"(&map), "r"(barrier), "l"(policy), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}
YOCO_DEVICE void tma_store(const CUtensorMap& map, uint32_t shared, int c0, int c1, int c2, int c3) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];\n" ::"l"(&map),
               "r"(shared), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
               : "memory");
}
YOCO_DEVICE void tma_store(const CUtensorMap& map, uint32_t shared, int c0, int c1, int c2, int c3, int c4) {
  asm volatile("cp.async.bulk.tensor.5d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];\n" ::"l"(&map),
               "r"(shared), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
               : "memory");
}
// global[i] += shared[i], float32, `bytes` (a multiple of 16) in a row.
YOCO_DEVICE void bulk_reduce_add(float* global, uint32_t shared, int bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;\n" ::"l"(
                   __cvta_generic_to_global(global)),
               "r"(shared), "r"(bytes)
               : "memory");
}
// Closes the group of stores and reductions that this thread issued since the last commit.
YOCO_DEVICE void bulk_commit() { asm volatile("cp.async.bulk.commit_group;\n" ::: "memory"); }
// Until shared memory has been read by all but kPending of this thread's groups.
template <int kPending>
YOCO_DEVICE void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;\n" ::"n"(kPending) : "memory");
}
// The same, and the results are visible in global memory.
template <int kPending>
YOCO_DEVICE void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;\n" ::"n"(kPending) : "memory");
}
// Between ordinary stores to shared memory and their asynchronous readers (WGMMA, TMA); then a barrier.
YOCO_DEVICE void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory"); }

// ---- stmatrix: four 8 x 8 matrices to shared memory, the inverse of ldmatrix_x4 and of its transposed form
YOCO_DEVICE void stmatrix_x4(uint32_t shared_row, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(shared_row), "r"(r[0]),
               "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}
YOCO_DEVICE void stmatrix_x4_trans(uint32_t shared_row, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(shared_row), "r"(r[0]),
               "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

// ---- WGMMA
using cute::SM90::GMMA::Major;

// Before the first product that reads registers ordinary instructions wrote (accumulators, or A from registers).
YOCO_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
YOCO_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }
template <int kPending>
YOCO_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kPending) : "memory");
}
// The compiler may not move accesses of these registers across. Put one before wgmma_fence and one after wgmma_wait.
template <int N>
YOCO_DEVICE void pin_registers(float (&r)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(r[i])::"memory");
}
template <int N>
YOCO_DEVICE void pin_registers(uint32_t (&r)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+r"(r[i])::"memory");
}

// Operand descriptors of a panel tile (see top), as 64 bits whose low 14 are the address in units of 16 bytes.
//   Major::K   [m or n][k]: the product runs along the 64 columns; 16 columns further on is + 32 bytes, the next panel
//              + rows * 128 bytes
//   Major::MN  [k][m or n]: the product runs along the rows; 16 rows further on is + 2048 bytes. The panels (64 columns
//              of m or n each) lie panel_bytes apart, one descriptor covers all that a product needs.
YOCO_DEVICE uint64_t descriptor_k(uint32_t shared) {
  return uint64_t((shared & 0x3ffff) >> 4) | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}
YOCO_DEVICE uint64_t descriptor_mn(uint32_t shared, uint32_t panel_bytes) {
  return uint64_t((shared & 0x3ffff) >> 4) | uint64_t(panel_bytes >> 4) << 16 | uint64_t(1024 >> 4) << 32 |
         uint64_t(1) << 62;
}
YOCO_DEVICE constexpr uint64_t descriptor_step(int bytes) { return uint64_t(bytes >> 4); }
// The same descriptor `bytes` further on, for half the instructions of a 64-bit sum: addresses do not carry.
YOCO_DEVICE uint64_t descriptor_at(uint64_t descriptor, int bytes) {
  return (descriptor & 0xffffffff00000000) | (static_cast<uint32_t>(descriptor) + (bytes >> 4));
}

namespace detail {
template <typename T, int N, Major kA, Major kB>
struct Atom;
#define YOCO_WGMMA_ATOM(N)                                                            \
  template <Major kA, Major kB>                                                       \
  struct Atom<__nv_bfloat16, N, kA, kB> {                                             \
    using Shared = cute::SM90::GMMA::MMA_64x##N##x16_F32BF16BF16_SS<kA, kB>;          \
    using Registers = cute::SM90::GMMA::MMA_64x##N##x16_F32BF16BF16_RS<Major::K, kB>; \
  };                                                                                  \
  template <Major kA, Major kB>                                                       \
  struct Atom<__half, N, kA, kB> {                                                    \
    using Shared = cute::SM90::GMMA::MMA_64x##N##x16_F32F16F16_SS<kA, kB>;            \
    using Registers = cute::SM90::GMMA::MMA_64x##N##x16_F32F16F16_RS<Major::K, kB>;   \
  };
YOCO_WGMMA_ATOM(8)
YOCO_WGMMA_ATOM(16)
YOCO_WGMMA_ATOM(32)
YOCO_WGMMA_ATOM(48)
YOCO_WGMMA_ATOM(64)
YOCO_WGMMA_ATOM(80)
YOCO_WGMMA_ATOM(96)
YOCO_WGMMA_ATOM(128)
YOCO_WGMMA_ATOM(192)
YOCO_WGMMA_ATOM(256)
#undef YOCO_WGMMA_ATOM

template <typename Op, int N, size_t... I>
YOCO_DEVICE void multiply(float (&d)[N], uint64_t a, uint64_t b, bool add, std::index_sequence<I...>) {
  Op::fma(a, b, d[I]..., add ? cute::SM90::GMMA::ScaleOut::One : cute::SM90::GMMA::ScaleOut::Zero);
}
template <typename Op, int N, size_t... I>
YOCO_DEVICE void multiply(float (&d)[N], const uint32_t (&a)[4], uint64_t b, bool add, std::index_sequence<I...>) {
  Op::fma(a[0], a[1], a[2], a[3], b, d[I]..., add ? cute::SM90::GMMA::ScaleOut::One : cute::SM90::GMMA::ScaleOut::Zero);
}
}  // namespace detail

// d[64 x N] (+)= a[64 x 16] b[16 x N], one warpgroup, float32 accumulation; without `add` d is overwritten. Warp w of
// the group holds rows 16 w .. 16 w + 15; with g = lane / 4, t = lane % 4:
//   d[4 i + 2 h + c] = (16 w + g + 8 h, 8 i + 2 t + c)
//   a[0] (g, 2t..), a[1] (g + 8, 2t..), a[2] (g, 2t + 8..), a[3] (g + 8, 2t + 8..)   when a is in registers
template <typename T, Major kA, Major kB, int N>
YOCO_DEVICE void wgmma(float (&d)[N], uint64_t a, uint64_t b, bool add) {
  detail::multiply<typename detail::Atom<T, 2 * N, kA, kB>::Shared>(d, a, b, add, std::make_index_sequence<N>{});
}
template <typename T, Major kB, int N>
YOCO_DEVICE void wgmma(float (&d)[N], const uint32_t (&a)[4], uint64_t b, bool add) {
  detail::multiply<typename detail::Atom<T, 2 * N, Major::K, kB>::Registers>(d, a, b, add,
                                                                             std::make_index_sequence<N>{});
}

// Accumulators [64 x 2N] rounded to T as the A operand of a product over their columns, 16 at a time.
template <typename T, int N>
YOCO_DEVICE void pack_operand(uint32_t (&a)[N / 8][4], const float (&d)[N]) {
#pragma unroll
  for (int k = 0; k < N / 8; ++k) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int from = (2 * k + j / 2) * 4 + j % 2 * 2;
      a[k][j] = pack2<T>(d[from], d[from + 1]);
    }
  }
}

}  // namespace yoco::cuda::sm90
