// Tiles of 16-bit elements in shared memory, and matrix products on them.
//
// A tile of R rows and D columns (D a multiple of 64) is D / 64 panels of [R][64]: rows of 128 bytes, whose eight
// 16-byte chunks are permuted by chunk ^= row % 8. Eight rows at one chunk column then lie in eight different bank
// groups, so ldmatrix, its transposed form, the 4-byte stores of accumulators and the 16-byte copies are all free of
// bank conflicts. Tiles start at multiples of 128 bytes.
#pragma once

#include "cuda/core/ptx.cuh"

namespace yoco::cuda {

// A value the compiler must take as it is: what follows from it is computed again instead of kept in registers.
YOCO_DEVICE int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// Up to 32 values that are equal in all lanes, kept in one register of the warp: lane i holds number i. For what a
// kernel needs once per block and has no registers for. All lanes must take part.
struct WarpValues {
  int held;
  YOCO_DEVICE void set(int i, int v) { held = int(threadIdx.x % 32) == i ? v : held; }
  YOCO_DEVICE int get(int i) const { return __shfl_sync(0xffffffffu, held, i); }
  template <typename T>
  YOCO_DEVICE void set_pointer(int i, const T* p) {
    set(i, int(reinterpret_cast<uint64_t>(p)));
    set(i + 1, int(reinterpret_cast<uint64_t>(p) >> 32));
  }
  template <typename T>
  YOCO_DEVICE const T* get_pointer(int i) const {
    return reinterpret_cast<const T*>(uint64_t(uint32_t(get(i))) | uint64_t(uint32_t(get(i + 1))) << 32);
  }
};

// ---- addresses
// A lane's
// ldmatrix address inside a 16 x 16 block. Two patterns serve all four operands:
//   rows 0..15 in lanes 0..15, chunk in lane / 16:  A stored [m][k];  B stored [k][n], transposed on the way
//   rows in lane % 8 + 8 * (lane / 16), chunk in (lane / 8) % 2:  B stored [n][k];  A stored [k][m], transposed
YOCO_DEVICE uint32_t lane_by_rows(uint32_t tile, int row) {
  const int lane = opaque(threadIdx.x) % 32;
  return tile + (row + lane % 16) * 128 + (((lane / 16) ^ (lane % 8)) << 4);
}
YOCO_DEVICE uint32_t lane_by_chunks(uint32_t tile, int row) {
  const int lane = opaque(threadIdx.x) % 32;
  return tile + (row + lane % 8 + lane / 16 * 8) * 128 + (((lane / 8 % 2) ^ (lane % 8)) << 4);
}
// The same lane at (row, col) further on, multiples of 16. Chunk bits are exclusive-ored, all else is a constant.
template <int kRows>
YOCO_DEVICE uint32_t block_at(uint32_t lane_address, int row, int col) {
  return (lane_address ^ ((col & 48) << 1)) + (col >> 6) * (kRows * 128) + row * 128;
}
// Byte address of element (row, col).
template <int kRows>
YOCO_DEVICE uint32_t element_at(uint32_t tile, int row, int col) {
  return tile + (col >> 6) * (kRows * 128) + row * 128 + ((((col >> 3) & 7) ^ (row & 7)) << 4) + (col & 7) * 2;
}

YOCO_DEVICE void ldmatrix(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
YOCO_DEVICE void ldmatrix_trans(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
YOCO_DEVICE void store_shared(uint32_t address, uint32_t v) {
  asm volatile("st.shared.b32 [%0], %1;\n" ::"r"(address), "r"(v) : "memory");
}
YOCO_DEVICE void store_shared(uint32_t address, uint4 v) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}
YOCO_DEVICE uint4 load_shared(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

// ---- global to shared and back
// row_pointer(r) gives the
// global address of row r, a multiple of 16 bytes; it is not read for r >= rows. Rows behind and columns from dim on
// become zero (NaN that a neighbour or unused memory holds must not reach a product: 0 * NaN is NaN).
template <int kRows, int kDim, int kThreads, typename T, typename RowPointer>
YOCO_DEVICE void load_tile(uint32_t tile, int rows, int dim, RowPointer row_pointer) {
  constexpr int kStep = kThreads / 8;
  static_assert(kRows % kStep == 0 && kStep % 8 == 0);
  const int thread = opaque(threadIdx.x), chunk = thread % 8, row0 = thread / 8;
  const uint32_t to = tile + row0 * 128 + ((chunk ^ (row0 & 7)) << 4);
#pragma unroll
  for (int i = 0; i < kRows / kStep; ++i) {
    const T* from = row_pointer(row0 + i * kStep) + chunk * 8;
#pragma unroll
    for (int panel = 0; panel < kDim / 64; ++panel) {
      const int bytes = row0 + i * kStep < rows && panel * 64 + chunk * 8 < dim ? 16 : 0;
      asm volatile(
          "cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(to + (panel * kRows + i * kStep) * 128),
          "l"(from + panel * 64), "r"(bytes)
          : "memory");
    }
  }
}

template <int kRows, int kDim, int kThreads, typename T, typename RowPointer>
YOCO_DEVICE void store_tile(uint32_t tile, int rows, int dim, bool aligned, RowPointer row_pointer) {
  constexpr int kStep = kThreads / 8;
  const int chunk = threadIdx.x % 8, row0 = threadIdx.x / 8;
  const uint32_t from = tile + row0 * 128 + ((chunk ^ (row0 & 7)) << 4);
#pragma unroll
  for (int i = 0; i < kRows / kStep; ++i) {
    const int row = row0 + i * kStep;
    if (row >= rows) break;
    T* to = row_pointer(row) + chunk * 8;
#pragma unroll
    for (int panel = 0; panel < kDim / 64; ++panel) {
      if (panel * 64 + chunk * 8 >= dim) break;
      uint4 v = load_shared(from + (panel * kRows + i * kStep) * 128);
      if (aligned) {
        // Spelt out: merged with the other branch the compiler makes four 4-byte stores of it, 4 x the sectors.
        asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"l"(to + panel * 64), "r"(v.x), "r"(v.y), "r"(v.z),
                     "r"(v.w)
                     : "memory");
      } else {
        const Vec<T, 8>& e = *reinterpret_cast<const Vec<T, 8>*>(&v);
#pragma unroll
        for (int j = 0; j < 8; ++j) to[panel * 64 + j] = e[j];
      }
    }
  }
}

// ---- products
// Accumulators: acc[m][n][4] are 16 x 8 blocks; element j of a lane is at row 16 m + 8 (j / 2) + lane / 4, column
// 8 n + 2 (lane % 4) + j % 2 of the warp's part.
template <int M, int N>
YOCO_DEVICE void clear(float (&acc)[M][N][4]) {
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int j = 0; j < 4; ++j) acc[m][n][j] = 0.f;
}

// acc += A B, A from shared memory: stored [m][k] (a = lane_by_rows) or, kTransA, [k][m] (a = lane_by_chunks);
// B stored [n][k] (b = lane_by_chunks) or, kTransB, [k][n] (b = lane_by_rows). K columns are summed; kRowsA, kRowsB are
// the rows of the tiles in shared memory. colA, colB: first column of the warp's part where m (n) runs along columns.
template <typename T, int K, int kRowsA, bool kTransA, int kRowsB, bool kTransB, int M, int N>
YOCO_DEVICE void multiply(float (&acc)[M][N][4], uint32_t a, int col_a, uint32_t b, int col_b) {
  static_assert(N % 2 == 0);
#pragma unroll
  for (int k = 0; k < K; k += 16) {
    uint32_t fa[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m) {
      if constexpr (kTransA) {
        ldmatrix_trans(fa[m], block_at<kRowsA>(a, k, col_a + m * 16));
      } else {
        ldmatrix(fa[m], block_at<kRowsA>(a, m * 16, k));
      }
    }
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      uint32_t fb[4];
      if constexpr (kTransB) {
        ldmatrix_trans(fb, block_at<kRowsB>(b, k, col_b + n * 8));
      } else {
        ldmatrix(fb, block_at<kRowsB>(b, n * 8, k));
      }
#pragma unroll
      for (int m = 0; m < M; ++m) {
        mma_16816<T>(acc[m][n], fa[m], fb[0], fb[1]);
        mma_16816<T>(acc[m][n + 1], fa[m], fb[2], fb[3]);
      }
    }
  }
}

// acc += A B, A's fragments already in registers; B stored [n][k] or, kTransB, [k][n].
template <typename T, int kRowsB, bool kTransB, int KA, int M, int N>
YOCO_DEVICE void multiply_from_registers(float (&acc)[M][N][4], const uint32_t (&fa)[KA][M][4], uint32_t b) {
  static_assert(N % 2 == 0);
#pragma unroll
  for (int k = 0; k < KA; ++k) {
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      uint32_t fb[4];
      if constexpr (kTransB) {
        ldmatrix_trans(fb, block_at<kRowsB>(b, k * 16, n * 8));
      } else {
        ldmatrix(fb, block_at<kRowsB>(b, n * 8, k * 16));
      }
#pragma unroll
      for (int m = 0; m < M; ++m) {
        mma_16816<T>(acc[m][n], fa[k][m], fb[0], fb[1]);
        mma_16816<T>(acc[m][n + 1], fa[k][m], fb[2], fb[3]);
      }
    }
  }
}

// Accumulators [16 M x 8 N], rounded to T, as the A fragments of a product over their columns.
template <typename T, int M, int N>
YOCO_DEVICE void pack_fragments(uint32_t (&fa)[N / 2][M][4], const float (&acc)[M][N][4]) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int k = 0; k < N / 2; ++k) {
#pragma unroll
      for (int j = 0; j < 4; ++j)
        fa[k][m][j] = pack2<T>(acc[m][2 * k + j / 2][j % 2 * 2], acc[m][2 * k + j / 2][j % 2 * 2 + 1]);
    }
  }
}

// Writes accumulators, rounded to T, into a tile at (row, col) of the warp's part.
template <typename T, int kRows, int M, int N>
YOCO_DEVICE void put_accumulators(uint32_t tile, int row, int col, const float (&acc)[M][N][4]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const int r = row + m * 16 + lane / 4, c = col + n * 8 + lane % 4 * 2;
      store_shared(element_at<kRows>(tile, r, c), pack2<T>(acc[m][n][0], acc[m][n][1]));
      store_shared(element_at<kRows>(tile, r + 8, c), pack2<T>(acc[m][n][2], acc[m][n][3]));
    }
  }
}

}  // namespace yoco::cuda
