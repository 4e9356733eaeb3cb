// Which kernel runs the recurrence of one layer on a GPU, on how many blocks, and where the weights live.
//
// Pure host code: the same inputs give the same plan on any machine, so plans for GPUs that nobody here has are tested.
// docs/lstm.md derives the arithmetic.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "lstm.h"

namespace fusedprompt {

// How the vector that all blocks share (h forward, the gate gradients backward) travels between steps, and where the weights
// are while it does.
enum class LstmVariant : int32_t {
  kCluster = 0,  // S: one cluster a direction, all weights on chip, the vector through distributed shared memory
  kOnChip = 1,   // M: all weights on chip, the vector through global memory
  kPartial = 2,  // L: as M, but the weights that do not fit are read from L2 or memory in each step
  kStream = 3,   // one launch a step, all weights read in each: no block ever waits for another, so any grid will do
};

enum class LstmPass : int32_t { kForward = 0, kBackward = 1 };

struct GpuFigures {
  int32_t multiprocessors;
  int64_t shared_bytes;    // that one block may ask for (opt-in)
  int64_t register_bytes;  // of one multiprocessor
  int64_t l2_kept_bytes;   // as much as L2 keeps of weights that all multiprocessors together read again in each step
  double l2_gb_per_s;
  double memory_gb_per_s;
  double clock_ghz;
  bool clusters;           // distributed shared memory: sm_90 and later
};

struct LstmProblem {
  int64_t steps, batch, hidden, directions;
  Dtype dtype;
};

// A block owns `units` hidden units: `rows` rows of a matrix with `columns` columns. Forward the matrix is W_hh (4 rows a unit,
// H columns), backward its transpose (1 row a unit, 4H columns). Its warps form `row_groups` x `split`: a warp takes
// `tile_rows` rows at a time, `tiles` times, and every `split`-th group of 32 chunks of 16 bytes along them, `depth` groups.
struct LstmPlan {
  LstmVariant variant;
  int32_t directions_at_once;  // 1: the directions take turns, so that each has the whole chip
  int32_t blocks;              // of each direction
  int32_t threads;             // of a block
  int32_t units, rows;
  int32_t row_groups, split, tiles, tile_rows, depth;
  int32_t held_depth;          // groups of chunks of the first tile that stay in registers
  int32_t shared_slots;        // rows of such groups, a warp's 512 bytes each, that stay in shared memory, per warp
  int64_t staged_bytes;        // of one batch entry's vector in shared memory, with padding
  int64_t shared_bytes;        // of one block
  int64_t held_bytes;          // registers of one block that hold weights
  int64_t on_chip_bytes;       // weights that stay in registers and shared memory, of all blocks that run at once
  int64_t streamed_bytes;      // weights read again in each step, by all blocks that run at once
  double predicted_us;         // of one step of all directions
};

constexpr int kLstmThreads = 256;
constexpr int kLstmTileRows = 8;   // rows that a warp accumulates at once
constexpr int kLstmHeldDepth = 5;  // 8 rows x 5 chunks x 16 bytes x 256 threads = 160 KB, five eighths of the register file
constexpr int kLstmHeldDepthBefore90 = 4;
constexpr int kLstmCluster = 8;    // largest cluster that every GPU with clusters can run
constexpr int kLstmArrivalsBytes = 16;  // two barriers at the end of the shared memory of a block of a cluster
constexpr int kLstmMaxBatch = 8;

// The fastest variant that fits, by prediction; kStream always does. `variant` asks for one: nullopt is returned if it
// does not fit, and only then. Throws std::invalid_argument on sizes below 1, directions other than 1 or 2, H > 8192 or B > 8.
std::optional<LstmPlan> plan_lstm(const LstmProblem& problem, LstmPass pass, const GpuFigures& gpu,
                                  std::optional<LstmVariant> variant = std::nullopt, int threads = kLstmThreads);

const char* name_of(LstmVariant variant);  // "S", "M", "L" or "STREAM"
LstmVariant variant_named(const std::string& name);  // throws std::invalid_argument

}  // namespace fusedprompt
