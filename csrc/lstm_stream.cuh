// Variant STREAM: one launch for one step, a warp for each unit, weights read where they are. It asks nothing of the grid.
// Also the transpose that every backward pass reads.
#pragma once

#include "lstm_matvec.cuh"

namespace fusedprompt::device {

template <typename T, bool kBackward>
FP_KERNEL(kLstmThreads) lstm_step(const FP_PARAMETER Arguments a) {
  constexpr int kRows = kRowsOfUnit<kBackward>;
  const int direction = a.first_direction + block_y();
  const int lane = thread() % 32;
  const int64_t unit = int64_t(block()) * (threads() / 32) + thread() / 32;
  if (unit >= a.hidden) return;  // whole warps
  const T* const matrix = static_cast<const T*>(a.matrix[direction]);
  const int64_t before = position<kBackward>(a, direction, a.step - 1);
  for (int64_t b = 0; b < a.batch; ++b) {
    float sums[kRows] = {};
    if (a.step > 0) {
      const uint4* const vector = reinterpret_cast<const uint4*>(exchange_row(a, direction, (a.step - 1) % 2, b));
      for (int64_t chunk = lane; chunk * kElements<T> < a.matrix_pitch; chunk += 32) {
        float values[kElements<T>];
        widen_chunk<T>(vector[chunk], values);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          float weights[kElements<T>];
          const T* const row = matrix + (r * a.hidden + unit) * a.matrix_pitch;
          widen_chunk<T>(load_weights(reinterpret_cast<const uint4*>(row) + chunk), weights);
#pragma unroll
          for (int e = 0; e < kElements<T>; ++e) sums[r] = fmaf(weights[e], values[e], sums[r]);
        }
      }
    }
    const float sum = sum_over_lanes<kRows>(sums);
    float products[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) products[r] = shuffle(sum, r * (32 / kRows));
    if (lane != 0) continue;

    float state = 0.0f;
    float* const d_cell = kBackward ? a.d_cell + (direction * a.batch + b) * a.hidden + unit : nullptr;
    if (a.step > 0) {
      state = kBackward ? *d_cell : a.cell[((direction * a.steps + before) * a.batch + b) * a.hidden + unit];
    }
    Cell<T, kBackward> cell{};
    cell.begin(a, direction, unit);
    cell.load(a, direction, a.step, b, unit);
    uint32_t published[kWords<T, kBackward>] = {};
    cell.finish(products, state, published);
    cell.store(a, direction, a.step, b, unit, state);
    if constexpr (kBackward) *d_cell = state;

    unsigned char* const row = exchange_row(a, direction, a.step % 2, b);  // the next launch reads it: plain stores will do
    if constexpr (!kBackward) {
      reinterpret_cast<T*>(row)[unit] = from_bits<T>(published[0]);
    } else {
#pragma unroll
      for (int word = 0; word < kWords<T, kBackward>; ++word) {
        reinterpret_cast<uint32_t*>(row)[unit * kWords<T, kBackward> + word] = published[word];
      }
    }
  }
}

struct Transpose {
  const void* weight_hh;  // (4H, H)
  void* transposed;       // (H, pitch): column 4 unit + gate, then zeros
  int64_t hidden, pitch;
};

constexpr int kTransposeTile = 32;

// One block: 32 units to the right by 32 down, all four gates; reads and writes whole sectors.
template <typename Word>
FP_KERNEL(kLstmThreads) lstm_transpose(const FP_PARAMETER Transpose t) {
  FP_DYNAMIC_SHARED(memory);
  Word* const tile = reinterpret_cast<Word*>(memory);     // [unit of the row][4 * unit of the column + gate], padded
  constexpr int kRow = 4 * kTransposeTile + 1;
  const int64_t first_in = int64_t(block_y()) * kTransposeTile, first_out = int64_t(block()) * kTransposeTile;
  const Word* const from = static_cast<const Word*>(t.weight_hh);
  for (int i = thread(); i < 4 * kTransposeTile * kTransposeTile; i += threads()) {
    const int out = i % kTransposeTile, in = i / kTransposeTile % kTransposeTile, gate = i / kTransposeTile / kTransposeTile;
    const bool inside = first_in + in < t.hidden && first_out + out < t.hidden;
    tile[out * kRow + 4 * in + gate] =
        inside ? from[(gate * t.hidden + first_in + in) * t.hidden + first_out + out] : Word(0);
  }
  block_barrier();
  Word* const to = static_cast<Word*>(t.transposed);
  for (int i = thread(); i < 4 * kTransposeTile * kTransposeTile; i += threads()) {
    const int column = i % (4 * kTransposeTile), out = i / (4 * kTransposeTile);
    if (first_out + out < t.hidden && 4 * first_in + column < t.pitch) {
      to[(first_out + out) * t.pitch + 4 * first_in + column] = tile[out * kRow + column];
    }
  }
}

}  // namespace fusedprompt::device
