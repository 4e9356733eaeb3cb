// The slice of a matrix that a block owns, kept on chip as far as it fits, times a vector that changes with each step.
//
// A warp accumulates 8 rows at once, so that a chunk of the vector read from shared memory serves 8 chunks of weights; lanes
// lie along the columns. Every sum has a fixed order: along a lane's chunks, across lanes, across the warps of a split.
#pragma once

#include "lstm_arguments.cuh"

namespace fusedprompt::device {

// Sums each of kCount (a power of 2, at most 32) values over the 32 lanes. Lane l gets the sum of value l / (32 / kCount).
// Halving the values along with the lanes takes 9 shuffles for 8 values instead of 40.
template <int kCount, int kMask = 16>
FP_DEVICE float sum_over_lanes(const float (&values)[kCount]) {
  if constexpr (kMask == 0) {
    return values[0];
  } else {
    constexpr int kHalf = kCount > 1 ? kCount / 2 : 1;
    float halved[kHalf];
    if constexpr (kCount == 1) {
      halved[0] = values[0] + shuffle_xor(values[0], kMask);
    } else {
      const bool upper = (thread() & kMask) != 0;
#pragma unroll
      for (int i = 0; i < kHalf; ++i) {
        const float sent = upper ? values[i] : values[i + kHalf];
        halved[i] = (upper ? values[i + kHalf] : values[i]) + shuffle_xor(sent, kMask);
      }
    }
    return sum_over_lanes<kHalf, kMask / 2>(halved);
  }
}

// sums[row][batch] += chunks[row] . vector[batch], for the rows that there are
template <typename T, int kBatch>
FP_DEVICE void accumulate(const uint4 (&chunks)[kLstmTileRows], int rows, const float (&vector)[kBatch][kElements<T>],
                          float (&sums)[kLstmTileRows * kBatch]) {
#pragma unroll
  for (int s = 0; s < kLstmTileRows; ++s) {
    if (s < rows) {
      float weights[kElements<T>];
      widen_chunk<T>(chunks[s], weights);
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
#pragma unroll
        for (int e = 0; e < kElements<T>; ++e) {
          sums[s * kBatch + b] = fmaf(weights[e], vector[b][e], sums[s * kBatch + b]);
        }
      }
    }
  }
}

// Weights in registers: `kDepth` groups of chunks of a tile.
template <int kDepth>
struct Held {
  uint4 chunks[kDepth][kLstmTileRows];
};
template <>
struct Held<0> {};

template <typename T, bool kBackward, int kBatch>
class Slice {
 public:
  // slots: plan.shared_slots x warps x 512 bytes of shared memory.
  FP_DEVICE Slice(const Arguments& a, int direction, int64_t first_unit, unsigned char* slots)
      : plan_(a.plan),
        matrix_(static_cast<const unsigned char*>(a.matrix[direction])),
        pitch_(uint32_t(a.matrix_pitch * int64_t(sizeof(T)))),
        hidden_(uint32_t(a.hidden)),
        first_unit_(uint32_t(first_unit)),
        lane_(thread() % 32) {
    const int warp = thread() / 32, warps = threads() / 32;
    group_ = warp / plan_.split;
    part_ = warp % plan_.split;
    const int64_t units = min(int64_t(plan_.units), a.hidden - first_unit);
    rows_ = int(max(units, int64_t(0))) * kRowsOfUnit<kBackward>;
    own_slots_ = reinterpret_cast<uint4*>(slots) + warp * 32 + lane_;
    slot_stride_ = warps * 32;
  }

  // Brings what stays on chip. No thread reads a slot that another one wrote.
  FP_DEVICE void load() {
    if constexpr (kHeld > 0) {
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
#pragma unroll
        for (int s = 0; s < kLstmTileRows; ++s) {
          held_.chunks[i][s] = i < plan_.held_depth ? chunk(0, i, s) : uint4{0, 0, 0, 0};
        }
      }
    }
    for (int tile = 0; tile < plan_.tiles; ++tile) {
      for (int i = tile == 0 ? plan_.held_depth : 0; i < plan_.depth; ++i) {
        for (int s = 0; s < plan_.tile_rows; ++s) {
          const int slot = slot_of(tile, i) + s;
          if (slot < plan_.shared_slots) own_slots_[slot * slot_stride_] = chunk(tile, i, s);
        }
      }
    }
  }

  // sums[part][row][b] = this warp's share of row . vector[b]. The vector lies in shared memory, `staged` bytes apart,
  // followed by zeros up to a multiple of 512 bytes.
  FP_DEVICE void multiply(const unsigned char* vector, int64_t batch, float* sums) {
#pragma unroll 1
    for (int tile = 0; tile < plan_.tiles; ++tile) {
      const int first_row = first_row_of(tile);
      if (first_row >= rows_) return;
#pragma unroll 1
      for (int first_b = 0; first_b < batch; first_b += kBatch) {
        float tile_sums[kLstmTileRows * kBatch] = {};
        const int entries = int(min(batch - first_b, int64_t(kBatch)));
        const unsigned char* entry = vector + first_b * plan_.staged_bytes;
        int i = 0;
        if constexpr (kHeld > 0) {
          if (tile == 0) {
#pragma unroll
            for (int held = 0; held < kHeld; ++held) {
              if (held < plan_.held_depth) {
                float values[kBatch][kElements<T>];
                vector_chunk(entry, entries, held, values);
                // Or the compiler would widen them once for all steps, and spill what does not fit.
                for (int s = 0; s < kLstmTileRows; ++s) unpredictable(held_.chunks[held][s]);
                accumulate<T, kBatch>(held_.chunks[held], plan_.tile_rows, values, tile_sums);
              }
            }
            i = plan_.held_depth;
          }
        }
#pragma unroll 1
        for (; i < plan_.depth; ++i) {
          uint4 chunks[kLstmTileRows];
          fetch(tile, i, chunks);
          float values[kBatch][kElements<T>];
          vector_chunk(entry, entries, i, values);
          accumulate<T, kBatch>(chunks, plan_.tile_rows, values, tile_sums);
        }
        constexpr int kCount = kLstmTileRows * kBatch;
        const float sum = sum_over_lanes<kCount>(tile_sums);
        const int index = lane_ / (32 / kCount), s = index / kBatch, b = index % kBatch;
        if (lane_ % (32 / kCount) == 0 && s < plan_.tile_rows && first_row + s < rows_ && b < entries) {
          sums[(int64_t(part_) * plan_.rows + first_row + s) * batch + first_b + b] = sum;
        }
      }
    }
  }

 private:
  static constexpr int kHeld = kBatch == 1 ? kLstmHeldDepth : 0;

  FP_DEVICE int first_row_of(int tile) const { return (tile * plan_.row_groups + group_) * plan_.tile_rows; }
  // Of row 0 of group i of a tile, among the slots that are not in registers.
  FP_DEVICE int slot_of(int tile, int i) const { return (tile * plan_.depth + i - plan_.held_depth) * plan_.tile_rows; }
  FP_DEVICE int chunk_index(int i) const { return (part_ + plan_.split * i) * 32 + lane_; }

  FP_DEVICE uint4 chunk(int tile, int i, int s) const {
    const int n = first_row_of(tile) + s;
    const uint32_t column = uint32_t(chunk_index(i)) * 16;
    if (s >= plan_.tile_rows || n >= rows_ || column >= pitch_) return {0, 0, 0, 0};
    const uint32_t row = kBackward ? first_unit_ + n : (n % 4) * hidden_ + first_unit_ + n / 4;
    return load_weights(reinterpret_cast<const uint4*>(matrix_ + (row * pitch_ + column)));
  }

  // Two loops, so that the loads of a group that is read from memory are all under way before the first is used.
  FP_DEVICE void fetch(int tile, int i, uint4 (&chunks)[kLstmTileRows]) const {
    const int slot = slot_of(tile, i);
    if (slot + plan_.tile_rows <= plan_.shared_slots) {
#pragma unroll
      for (int s = 0; s < kLstmTileRows; ++s) {
        if (s < plan_.tile_rows) chunks[s] = own_slots_[(slot + s) * slot_stride_];
      }
    } else {
#pragma unroll
      for (int s = 0; s < kLstmTileRows; ++s) {
        if (s < plan_.tile_rows) {
          chunks[s] = slot + s < plan_.shared_slots ? own_slots_[(slot + s) * slot_stride_] : chunk(tile, i, s);
        }
      }
    }
  }

  FP_DEVICE void vector_chunk(const unsigned char* entry, int entries, int i,
                              float (&values)[kBatch][kElements<T>]) const {
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int64_t row = (b < entries ? b : 0) * plan_.staged_bytes;  // past the last entry: any numbers, never stored
      widen_chunk<T>(reinterpret_cast<const uint4*>(entry + row)[chunk_index(i)], values[b]);
    }
  }

  const LstmPlan& plan_;
  const unsigned char* matrix_;
  uint32_t pitch_, hidden_, first_unit_;  // pitch in bytes: all of 4 * 8192 * 8192 fp32 weights have 32-bit offsets
  int lane_, group_, part_, rows_, slot_stride_;
  uint4* own_slots_;
  Held<kHeld> held_;
};

}  // namespace fusedprompt::device
