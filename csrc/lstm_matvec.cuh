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

// sums[batch] += chunk . vector[batch], for one row
template <typename T, int kBatch>
FP_DEVICE void accumulate(const uint4& chunk, const float (&vector)[kBatch][kElements<T>], float* sums) {
  float weights[kElements<T>];
  widen_chunk<T>(chunk, weights);
#pragma unroll
  for (int b = 0; b < kBatch; ++b) {
#pragma unroll
    for (int e = 0; e < kElements<T>; ++e) sums[b] = fmaf(weights[e], vector[b][e], sums[b]);
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
  // slots: plan.shared_slots x warps x 512 bytes of shared memory, in L plan.tile_rows more for what is streamed.
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
    while (own_tiles_ < plan_.tiles && first_row_of(own_tiles_) < rows_) ++own_tiles_;
    first_streamed_ = plan_.held_depth + plan_.shared_slots / plan_.tile_rows;
    stream_tile_ = first_streamed_ / plan_.depth;
    first_tile_ = warp / 4 % 2 == 1 && stream_tile_ < own_tiles_ ? stream_tile_ : 0;
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
    if (stream_tile_ < own_tiles_) {
#pragma unroll
      for (int s = 0; s < kLstmTileRows; ++s) fly(stream_tile_, first_streamed_of(stream_tile_), s);
    }
  }

  // sums[part][row][b] = this warp's share of row . vector[b]. The vector lies in shared memory, `staged` bytes apart,
  // followed by zeros up to a multiple of 512 bytes.
  //
  // A row of a group that is streamed takes the place of the same row of the group before it as soon as that is multiplied, and
  // the first group of the next step comes while this block publishes and waits: memory never rests. Half of the warps begin with
  // what is streamed, so that the others read shared memory meanwhile.
  FP_DEVICE void multiply(const unsigned char* vector, int64_t batch, float* sums) {
#pragma unroll 1
    for (int n = 0; n < own_tiles_; ++n) {
      const int tile = first_tile_ + n < own_tiles_ ? first_tile_ + n : first_tile_ + n - own_tiles_;
      const int first_row = first_row_of(tile), first_streamed = first_streamed_of(tile);
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
#pragma unroll
                for (int s = 0; s < kLstmTileRows; ++s) {
                  if (s < plan_.tile_rows) accumulate<T, kBatch>(held_.chunks[held][s], values, tile_sums + s * kBatch);
                }
              }
            }
            i = plan_.held_depth;
          }
        }
#pragma unroll 1
        for (; i < first_streamed; ++i) {
          float values[kBatch][kElements<T>];
          vector_chunk(entry, entries, i, values);
          const uint4* const slots = own_slots_ + slot_of(tile, i) * slot_stride_;
#pragma unroll
          for (int s = 0; s < kLstmTileRows; ++s) {
            if (s < plan_.tile_rows) accumulate<T, kBatch>(slots[s * slot_stride_], values, tile_sums + s * kBatch);
          }
        }
#pragma unroll 1
        for (; i < plan_.depth; ++i) {
          float values[kBatch][kElements<T>];
          vector_chunk(entry, entries, i, values);
          int next_tile = tile, next = i + 1;
          if (next == plan_.depth) {
            if (first_b + kBatch >= batch && ++next_tile == own_tiles_) next_tile = stream_tile_;
            next = first_streamed_of(next_tile);
          }
#pragma unroll
          for (int s = 0; s < kLstmTileRows; ++s) {
            wait_for_copies<kLstmTileRows - 1>();
            if (s < plan_.tile_rows) accumulate<T, kBatch>(own_slots_[place_of(tile, i, s)], values, tile_sums + s * kBatch);
            fly(next_tile, next, s);
          }
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

  FP_DEVICE void end() { wait_for_copies<0>(); }

 private:
  static constexpr int kHeld = kBatch == 1 ? kHeldDepth : 0;

  FP_DEVICE int first_row_of(int tile) const { return (tile * plan_.row_groups + group_) * plan_.tile_rows; }
  // Of row 0 of group i of a tile, among the slots that are not in registers.
  FP_DEVICE int slot_of(int tile, int i) const { return (tile * plan_.depth + i - plan_.held_depth) * plan_.tile_rows; }
  FP_DEVICE int chunk_index(int i) const { return (part_ + plan_.split * i) * 32 + lane_; }

  // Null past the last row or column, where zeros stand for it.
  FP_DEVICE const uint4* address_of(int tile, int i, int s) const {
    const int n = first_row_of(tile) + s;
    const uint32_t column = uint32_t(chunk_index(i)) * 16;
    if (s >= plan_.tile_rows || n >= rows_ || column >= pitch_) return nullptr;
    const uint32_t row = kBackward ? first_unit_ + n : (n % 4) * hidden_ + first_unit_ + n / 4;
    return reinterpret_cast<const uint4*>(matrix_ + (row * pitch_ + column));
  }
  FP_DEVICE uint4 chunk(int tile, int i, int s) const {
    const uint4* const address = address_of(tile, i, s);
    return address ? load_weights(address) : uint4{0, 0, 0, 0};
  }

  // The first group of a tile that is not on chip as a whole, or `depth`.
  FP_DEVICE int first_streamed_of(int tile) const {
    return min(max(first_streamed_ - tile * plan_.depth, 0), plan_.depth);
  }
  // Where row s of a streamed group is once it has come: behind the slots that stay. Of the first such group some rows may stay.
  FP_DEVICE bool stays(int tile, int i, int s) const { return slot_of(tile, i) + s < plan_.shared_slots; }
  FP_DEVICE int place_of(int tile, int i, int s) const {
    return (stays(tile, i, s) ? slot_of(tile, i) + s : plan_.shared_slots + s) * slot_stride_;
  }
  FP_DEVICE void fly(int tile, int i, int s) {
    if (s < plan_.tile_rows && !stays(tile, i, s)) copy_later(own_slots_ + place_of(tile, i, s), address_of(tile, i, s));
    end_copy_group();
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
  int own_tiles_ = 0, first_streamed_, stream_tile_, first_tile_;  // first_streamed_: counts the groups of all tiles
  uint4* own_slots_;
  Held<kHeld> held_;
};

}  // namespace fusedprompt::device
