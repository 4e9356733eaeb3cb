// The LSTM's matrix products on CPU. Each reads a weight matrix, or writes a gradient of its shape, once, and the other two
// operands are small: so weights are read where they lie and gradients written where they belong, with no packed copies
// beyond a panel of 24 columns. Included like lstm_vector.h. Sums are taken in fp32, in an order that the sizes decide.

#if FP_VECTOR_BYTES == 64
constexpr int kDotRows = 6, kTileVecs = 4;  // 24 accumulators in 32 registers
#else
constexpr int kDotRows = 3, kTileVecs = 2;  // 12 in 16
#endif
constexpr int kTileRows = 6;
constexpr int64_t kRowBlock = 120;   // rows of C that `input_gradient` accumulates at a time: 60 KB of stack
constexpr int64_t kDepthBlock = 64;  // weight rows that it runs through for each: 32 KB of a piece in fp32

template <class T>
static void widen(const void* from, int64_t rows, int64_t columns, float* to, int64_t to_stride) {
  const T* source = static_cast<const T*>(from);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t k = 0; k < columns; k += kLanes) {
      store_up_to(to + row * to_stride + k, load_up_to(source + row * columns + k, columns - k), columns - k);
    }
  }
}

// Cut `rows` into the fewest tiles of at most `most` rows, as equal as can be.
FP_INLINE int64_t tile_count(int64_t rows, int64_t most) { return (rows + most - 1) / most; }
FP_INLINE int64_t tile_begin(int64_t tile, int64_t tiles, int64_t rows) { return tile * rows / tiles; }

// c[i][0..3] = a[i] . w[0..3] + bias[0..3] + bias_2[0..3]
template <class T, int kRows>
static void dot_tile(const InputProduct& p, const float* a, const T* w, int64_t n, float* c) {
  Vec sums[kRows][4] = {};
  int64_t k = 0;
  for (; k + kLanes <= p.k; k += kLanes) {
    Vec weight[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) weight[j] = load(w + j * p.k + k);
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) {
      const Vec at = load(a + i * p.a_stride + k);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) sums[i][j] += at * weight[j];
    }
  }
  if (k < p.k) {
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) {
      const Vec at = load_some(a + i * p.a_stride + k, p.k - k);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) sums[i][j] += at * load_some(w + j * p.k + k, p.k - k);
    }
  }
  const Vec bias = load_some(static_cast<const T*>(p.bias) + n, 4) + load_some(static_cast<const T*>(p.bias_2) + n, 4);
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i) {
    float dots[4];
    sums_of_four(sums[i], dots);
    for (int j = 0; j < 4; ++j) c[i * p.n + j] = dots[j] + bias[j];
  }
}

template <class T>
static void input_product(const InputProduct& p, int64_t begin, int64_t end) {
  const int64_t tiles = tile_count(p.m, kDotRows);
  for (int64_t first = begin; first < end; first += kPieceRows) {
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t row = tile_begin(tile, tiles, p.m), rows = tile_begin(tile + 1, tiles, p.m) - row;
      const float* a = p.a + row * p.a_stride;
      for (int64_t n = first; n < first + kPieceRows && n < end; n += 4) {  // 4 divides 4H
        const T* w = static_cast<const T*>(p.weight) + n * p.k;
        float* c = p.c + row * p.n + n;
        switch (rows) {
#if FP_VECTOR_BYTES == 64
          case 6: dot_tile<T, 6>(p, a, w, n, c); break;
          case 5: dot_tile<T, 5>(p, a, w, n, c); break;
          case 4: dot_tile<T, 4>(p, a, w, n, c); break;
#endif
          case 3: dot_tile<T, 3>(p, a, w, n, c); break;
          case 2: dot_tile<T, 2>(p, a, w, n, c); break;
          default: dot_tile<T, 1>(p, a, w, n, c);
        }
      }
    }
  }
}

// sums[i][j] += sum over k of a(i, k) b(k, j), with a(i, k) = a[i * a_row + k * a_step]. One vector may be cut short.
template <class T, int kRows, int kVecs>
FP_INLINE void outer_tile(const float* a, int64_t a_row, int64_t a_step, const T* b, int64_t b_stride, int64_t depth,
                          int64_t width, Vec (*sums)[kVecs]) {
  for (int64_t k = 0; k < depth; ++k) {
    Vec at[kVecs];
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) {
      at[j] = kVecs > 1 ? load(b + k * b_stride + j * kLanes) : load_up_to(b + k * b_stride, width);
    }
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) {
      const Vec scale = splat(a[i * a_row + k * a_step]);
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) sums[i][j] += scale * at[j];
    }
  }
}

// kTileRows rows and up to kVecs vectors of dW, from a panel [m][kPieceRows] of G.
template <class T, int kVecs>
FP_INLINE void weight_tile(const WeightGradient& p, const float* panel, int64_t column, T* c, int64_t rows) {
  Vec sums[kTileRows][kVecs] = {};
  outer_tile<float, kTileRows, kVecs>(panel, 1, kPieceRows, p.a + column, p.a_stride, p.m, p.k - column, sums);
#pragma GCC unroll 6
  for (int i = 0; i < kTileRows; ++i) {
    if (i >= rows) break;
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) {
      T* to = c + i * p.k + column + j * kLanes;
      if (kVecs > 1) {
        store(to, sums[i][j]);
      } else {
        store_up_to(to, sums[i][j], p.k - column);
      }
    }
  }
}

template <class T>
static void weight_gradient(const WeightGradient& p, int64_t begin, int64_t end, float* panel) {
  const T* g = static_cast<const T*>(p.g);
  for (int64_t n = begin; n < end; n += kPieceRows) {
    const int64_t rows = end - n < kPieceRows ? end - n : kPieceRows;
    float sums[kPieceRows] = {};
    for (int64_t m = 0; m < p.m; ++m) {
      float row[round_up(kPieceRows, kLanes)] = {};
      widen<T>(g + m * p.n + n, 1, rows, row, 0);
      for (int64_t i = 0; i < kPieceRows; ++i) {
        panel[m * kPieceRows + i] = row[i];
        sums[i] += row[i];
      }
    }
    for (int64_t i = 0; i < rows && p.sums; ++i) {
      store_some(static_cast<T*>(p.sums) + n + i, splat(sums[i]), 1);
      store_some(static_cast<T*>(p.sums_2) + n + i, splat(sums[i]), 1);
    }
    for (int64_t row = 0; row < rows; row += kTileRows) {
      T* c = static_cast<T*>(p.c) + (n + row) * p.k;
      int64_t column = 0;
      for (; column + kTileVecs * kLanes <= p.k; column += kTileVecs * kLanes) {
        weight_tile<T, kTileVecs>(p, panel + row, column, c, rows - row);
      }
      for (; column < p.k; column += kLanes) weight_tile<T, 1>(p, panel + row, column, c, rows - row);
    }
  }
}

// Rows [row, row + kRows) and columns [column, end) of C, from weight rows [k, k + depth), onto `c` (rows of kPieceColumns).
template <class T, int kRows>
static void input_tile(const float* g, int64_t g_stride, const T* w, int64_t w_stride, int64_t depth, int64_t width,
                       float* c) {
  int64_t column = 0;
  for (; column + kTileVecs * kLanes <= width; column += kTileVecs * kLanes) {
    Vec sums[kRows][kTileVecs];
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kTileVecs; ++j) sums[i][j] = load(c + i * kPieceColumns + column + j * kLanes);
    }
    outer_tile<T, kRows, kTileVecs>(g, g_stride, 1, w + column, w_stride, depth, width, sums);
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kTileVecs; ++j) store(c + i * kPieceColumns + column + j * kLanes, sums[i][j]);
    }
  }
  for (; column < width; column += kLanes) {
    Vec sums[kRows][1];
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) sums[i][0] = load(c + i * kPieceColumns + column);
    outer_tile<T, kRows, 1>(g, g_stride, 1, w + column, w_stride, depth, width - column, sums);
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) store(c + i * kPieceColumns + column, sums[i][0]);
  }
}

template <class T>
static void input_gradient_piece(const InputGradient& p, int64_t first, int64_t rows, int64_t column, int64_t width) {
  float c[kRowBlock * kPieceColumns];
  __builtin_memset(c, 0, rows * kPieceColumns * sizeof(float));
  const int64_t tiles = tile_count(rows, kTileRows);
  for (int64_t direction = 0; direction < p.directions; ++direction) {
    for (int64_t k = 0; k < p.n; k += kDepthBlock) {
      const int64_t depth = p.n - k < kDepthBlock ? p.n - k : kDepthBlock;
      const T* w = static_cast<const T*>(p.weight[direction]) + k * p.k + column;
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t row = tile_begin(tile, tiles, rows);
        const float* g = p.g[direction] + (first + row) * p.n + k;
        float* to = c + row * kPieceColumns;
        switch (tile_begin(tile + 1, tiles, rows) - row) {
          case 6: input_tile<T, 6>(g, p.n, w, p.k, depth, width, to); break;
          case 5: input_tile<T, 5>(g, p.n, w, p.k, depth, width, to); break;
          case 4: input_tile<T, 4>(g, p.n, w, p.k, depth, width, to); break;
          case 3: input_tile<T, 3>(g, p.n, w, p.k, depth, width, to); break;
          case 2: input_tile<T, 2>(g, p.n, w, p.k, depth, width, to); break;
          default: input_tile<T, 1>(g, p.n, w, p.k, depth, width, to);
        }
      }
    }
  }
  for (int64_t row = 0; row < rows; ++row) {
    T* to = static_cast<T*>(p.c) + (first + row) * p.k + column;
    for (int64_t j = 0; j < width; j += kLanes) store_up_to(to + j, load(c + row * kPieceColumns + j), width - j);
  }
}

template <class T>
static void input_gradient(const InputGradient& p, int64_t begin, int64_t end) {
  const int64_t blocks = tile_count(p.m, kRowBlock);
  for (int64_t column = begin; column < end; column += kPieceColumns) {
    const int64_t width = end - column < kPieceColumns ? end - column : kPieceColumns;
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t first = tile_begin(block, blocks, p.m);
      input_gradient_piece<T>(p, first, tile_begin(block + 1, blocks, p.m) - first, column, width);
    }
  }
}
