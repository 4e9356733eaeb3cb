// Variants S, M and L: one launch for all steps. Each block keeps its slice of the weights and computes its units' cells.
//
// A step is: wait for the vector of the step before, multiply, meet, compute the cells, publish. The first step has no vector.
// All blocks must run at the same time: the launch is cooperative (M, L), or each direction is one cluster (S).
#pragma once

#include "lstm_exchange.cuh"
#include "lstm_matvec.cuh"

namespace fusedprompt::device {

template <typename T, bool kBackward, int kBatch>
FP_KERNEL(kLstmThreads) lstm_persistent(const FP_PARAMETER Arguments a) {
  FP_DYNAMIC_SHARED(memory);
  const LstmPlan& plan = a.plan;
  const bool cluster = plan.variant == LstmVariant::kCluster;
  const int direction = a.first_direction + block() / plan.blocks;
  const int64_t first_unit = int64_t(block() % plan.blocks) * plan.units;
  const int64_t batch = kBatch == 1 ? 1 : a.batch;  // a constant frees registers
  const int64_t vector_bytes = batch * plan.staged_bytes;
  // In S a faster block writes the next vector while this one still reads the last, and a faster warp of this block its sums.
  const int copies = cluster ? 2 : 1;

  unsigned char* const vector = memory;
  unsigned char* const all_sums = memory + copies * vector_bytes;
  const int64_t sums_bytes = (int64_t(plan.split) * plan.rows * batch * 4 + 15) / 16 * 16;
  for (int i = thread(); i < int(copies * vector_bytes / 16); i += threads()) {
    reinterpret_cast<uint4*>(vector)[i] = {0, 0, 0, 0};
  }
  Slice<T, kBackward, kBatch> slice(a, direction, first_unit, all_sums + copies * sums_bytes);
  slice.load();

  // A thread's cell. Planned units are counted, not those that exist, so that neighbours in 2 bytes share a warp.
  const int64_t b = thread() / plan.units, unit_here = thread() % plan.units, unit = first_unit + unit_here;
  const bool in_cells = thread() / 32 * 32 < plan.units * batch;  // the same for a whole warp
  const bool has_cell = b < batch && unit < a.hidden;
  const int words = int((a.hidden * kColumnsOfUnit<kBackward> * int64_t(sizeof(T)) + 3) / 4);
  const int64_t place = unit * kColumnsOfUnit<kBackward> * int64_t(sizeof(T));  // of the cell's words in a row
  const ClusterExchange exchange{reinterpret_cast<uint64_t*>(memory + plan.shared_bytes - kLstmArrivalsBytes), plan.blocks,
                                 uint32_t(words) * 4 * uint32_t(batch)};
  Cell<T, kBackward> cell{};
  float state = 0.0f;
  if (has_cell) {
    cell.begin(a, direction, unit);
    cell.load(a, direction, 0, b, unit);
  }
  if (cluster) {
    exchange.begin();
    cluster_barrier();
  } else {
    block_barrier();
  }

  for (int64_t step = 0; step < a.steps; ++step) {
    const bool last = step + 1 == a.steps, second = cluster && step % 2 == 1;
    unsigned char* const now = vector + (second ? vector_bytes : 0);
    float* const sums = reinterpret_cast<float*>(all_sums + (second ? sums_bytes : 0));
    if (step > 0) {
      if (cluster) {
        exchange.wait(step);
      } else {
        for (int64_t entry = 0; entry < batch; ++entry) {
          gather(exchange_row(a, direction, step - 1, entry), words, now + entry * plan.staged_bytes, step);
        }
        block_barrier();
      }
      slice.multiply(now, batch, sums);
      block_barrier();
    }
    if (cluster && !last) exchange.have_read(step);
    if (in_cells) {
      uint32_t published[kWords<T, kBackward>] = {};
      if (has_cell) {
        float products[kRowsOfUnit<kBackward>] = {};
        for (int part = 0; part < plan.split && step > 0; ++part) {
#pragma unroll
          for (int r = 0; r < kRowsOfUnit<kBackward>; ++r) {
            products[r] += sums[(int64_t(part) * plan.rows + unit_here * kRowsOfUnit<kBackward> + r) * batch + b];
          }
        }
        cell.finish(products, state, published);
      }
      const bool stores = join_neighbours<T, kBackward>(published);
      if (has_cell && stores && !last) {
        if (cluster) {
          unsigned char* const next = vector + (second ? 0 : vector_bytes);
          exchange.publish(next + b * plan.staged_bytes + place, published, step);
        } else {
          store_relaxed(reinterpret_cast<uint32_t*>(exchange_row(a, direction, step, b) + place), published);
        }
      }
      if (has_cell) {
        cell.store(a, direction, step, b, unit, state);
        if (!last) cell.load(a, direction, step + 1, b, unit);  // arrives while the block waits
      }
    }
  }
  slice.end();
}

}  // namespace fusedprompt::device
