#include "lstm_plan.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace fusedprompt {
namespace {

constexpr int64_t kChunk = 16;               // bytes that a thread reads at once
constexpr int64_t kSlot = 32 * kChunk;       // bytes that a warp reads at once
constexpr double kGlobalHopUs = 1.3;         // a step's fixed cost: publish, one trip through L2, two block barriers, the cell
constexpr double kClusterHopUs = 0.8;        // the same through distributed shared memory
constexpr double kLatencyUs = 0.9;           // of a read from memory that many others compete with
constexpr double kLaunchUs = 3.0;            // a launch that depends on the one before it
constexpr double kSharedBytesPerClock = 128; // of one multiprocessor
constexpr double kLanesPerClock = 128 * 0.7; // fp32 operations of one multiprocessor, at the share of issue slots that is realistic

int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }
int64_t round_up(int64_t value, int64_t to) { return divide_up(value, to) * to; }

int64_t element_size(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

struct Sizes {
  LstmProblem problem;
  LstmPass pass;
  int64_t element, columns, rows_of_unit;

  int64_t weight_bytes() const { return problem.hidden * rows_of_unit * columns * element; }  // of one direction
  int64_t vector_bytes() const { return problem.batch * columns * element; }
};

Sizes sizes_of(const LstmProblem& problem, LstmPass pass) {
  const bool forward = pass == LstmPass::kForward;
  return {problem, pass, element_size(problem.dtype), forward ? problem.hidden : 4 * problem.hidden, forward ? 4 : 1};
}

// Weights that are read in each step come from L2 if all of them stay in it; of more, a cache that is walked in turn keeps none.
// GB/s, if enough is under way at any time.
double stream_rate(const GpuFigures& gpu, int64_t bytes) {
  return bytes <= gpu.l2_kept_bytes ? gpu.l2_gb_per_s : gpu.memory_gb_per_s;
}

// How `rows` rows are divided among the warps of a block, and the chunks along them.
void divide_among_warps(LstmPlan& plan, const Sizes& sizes, int row_groups) {
  const int warps = plan.threads / 32;
  plan.row_groups = row_groups;
  plan.split = warps / row_groups;
  plan.tiles = int32_t(divide_up(plan.rows, int64_t(row_groups) * kLstmTileRows));
  plan.tile_rows = int32_t(divide_up(plan.rows, int64_t(row_groups) * plan.tiles));
  plan.depth = int32_t(divide_up(divide_up(sizes.columns * sizes.element, kSlot), plan.split));
  plan.staged_bytes = int64_t(plan.depth) * plan.split * kSlot;
}

// Registers first, then shared memory. False if the vector and the sums alone do not fit.
bool place_weights(LstmPlan& plan, const Sizes& sizes, const GpuFigures& gpu) {
  const int64_t held_bytes = int64_t(plan.threads) * kChunk * kLstmTileRows;  // of one group of chunks
  const bool held = sizes.problem.batch == 1;  // with more, the accumulators need the registers
  const int64_t most = gpu.clusters ? kLstmHeldDepth : kLstmHeldDepthBefore90;
  plan.held_depth =
      held ? int32_t(std::min<int64_t>({most, plan.depth, gpu.register_bytes * 5 / 8 / held_bytes})) : 0;
  plan.held_bytes = plan.held_depth * held_bytes;

  const bool cluster = plan.variant == LstmVariant::kCluster;
  const int64_t sums = round_up(int64_t(plan.split) * plan.rows * sizes.problem.batch * 4, kChunk);
  int64_t fixed = (cluster ? 2 : 1) * (sizes.problem.batch * plan.staged_bytes + sums) + (cluster ? kLstmArrivalsBytes : 0);
  const int64_t slot = (plan.threads / 32) * kSlot;
  if (plan.variant == LstmVariant::kPartial) fixed += plan.tile_rows * slot;  // what is under way
  if (fixed > gpu.shared_bytes) return false;
  const int64_t wanted = (int64_t(plan.tiles) * plan.depth - plan.held_depth) * plan.tile_rows;
  plan.shared_slots = int32_t(std::min(wanted, (gpu.shared_bytes - fixed) / slot));
  plan.shared_bytes = fixed + plan.shared_slots * slot;

  // By share of slots: the padding of the last rows and columns counts as much as the rest, on average.
  const int64_t slots = int64_t(plan.tiles) * plan.depth * plan.tile_rows;
  const int64_t total = sizes.weight_bytes() * plan.directions_at_once;
  plan.streamed_bytes = divide_up(total * (wanted - plan.shared_slots), slots);
  plan.on_chip_bytes = total - plan.streamed_bytes;
  return true;
}

double persistent_us(const LstmPlan& plan, const Sizes& sizes, const GpuFigures& gpu) {
  const int64_t batch = sizes.problem.batch;
  const double chunks = double(plan.tiles) * plan.depth * plan.tile_rows * plan.threads;  // of one block
  const double vector_reads = double(plan.tiles) * plan.depth * plan.threads * kChunk * batch;
  const double shared_reads = double(plan.shared_slots) * (plan.threads / 32) * kSlot + vector_reads;
  const double shared_us = shared_reads / (kSharedBytesPerClock * gpu.clock_ghz * 1e3);
  const double operations = chunks * (kChunk / sizes.element) * double(batch + (sizes.element == 2));  // and widening
  const double issue_us = operations / (kLanesPerClock * gpu.clock_ghz * 1e3);
  const bool cluster = plan.variant == LstmVariant::kCluster;
  const double gather = cluster ? 0.0 : double(sizes.vector_bytes()) * plan.blocks * plan.directions_at_once;
  // Warps take turns, so arithmetic hides behind reads. Half of them stream while the others read shared memory; what is under way
  // when a step begins came during the hop.
  double reads_us = shared_us;
  if (plan.streamed_bytes > 0) {
    const double under_way = double(plan.tile_rows) * (plan.threads / 32) * kSlot * plan.blocks * plan.directions_at_once;
    const double rate = std::min(stream_rate(gpu, plan.streamed_bytes), under_way / kLatencyUs / 1e3);
    reads_us = std::max(shared_us, shared_us / 2 + std::max(double(plan.streamed_bytes) - under_way, 0.0) / rate / 1e3);
  }
  const double turn =
      (cluster ? kClusterHopUs : kGlobalHopUs) + std::max(reads_us, issue_us) + gather / gpu.l2_gb_per_s / 1e3;
  return turn * double(sizes.problem.directions) / plan.directions_at_once;
}

LstmPlan stream_plan(const Sizes& sizes, const GpuFigures& gpu) {
  LstmPlan plan{};
  plan.variant = LstmVariant::kStream;
  plan.threads = kLstmThreads;
  plan.directions_at_once = int32_t(sizes.problem.directions);
  plan.units = kLstmThreads / 32;  // a warp each
  plan.rows = plan.units * int32_t(sizes.rows_of_unit);
  plan.blocks = int32_t(divide_up(sizes.problem.hidden, plan.units));
  plan.streamed_bytes = sizes.weight_bytes() * sizes.problem.directions;
  plan.predicted_us = kLaunchUs + double(plan.streamed_bytes) / stream_rate(gpu, plan.streamed_bytes) / 1e3;
  return plan;
}

std::optional<LstmPlan> persistent_plan(const Sizes& sizes, const GpuFigures& gpu, LstmVariant variant,
                                        int directions_at_once, int64_t units, int row_groups, int threads) {
  LstmPlan plan{};
  plan.variant = variant;
  plan.threads = threads;
  plan.directions_at_once = directions_at_once;
  plan.units = int32_t(units);
  plan.rows = plan.units * int32_t(sizes.rows_of_unit);
  plan.blocks = int32_t(divide_up(sizes.problem.hidden, units));
  if (variant == LstmVariant::kCluster) {
    plan.blocks = kLstmCluster;
    while (plan.blocks > 1 && plan.blocks * directions_at_once > gpu.multiprocessors) plan.blocks /= 2;
  }
  if (units * sizes.problem.batch > threads) return std::nullopt;  // a thread computes one cell
  if (plan.blocks * directions_at_once > gpu.multiprocessors) return std::nullopt;
  if (variant == LstmVariant::kCluster && plan.blocks < 2) return std::nullopt;  // a block cannot send to itself alone
  divide_among_warps(plan, sizes, row_groups);
  if (!place_weights(plan, sizes, gpu)) return std::nullopt;
  if ((variant == LstmVariant::kPartial) != (plan.streamed_bytes > 0)) return std::nullopt;
  plan.predicted_us = persistent_us(plan, sizes, gpu);
  return plan;
}

void check(const LstmProblem& p, int threads) {
  const auto require = [](bool holds, const char* name, const char* rule, int64_t value) {
    if (!holds) {
      throw std::invalid_argument(std::string(name) + ": expected " + rule + ", got " + std::to_string(value));
    }
  };
  require(p.steps >= 1, "steps", "at least 1", p.steps);
  require(p.batch >= 1 && p.batch <= kLstmMaxBatch, "batch", "1 to 8", p.batch);
  require(p.hidden >= 1 && p.hidden <= 8192, "hidden", "1 to 8192", p.hidden);
  require(p.directions == 1 || p.directions == 2, "directions", "1 or 2", p.directions);
  require(threads >= 32 && threads <= kLstmThreads && (threads & (threads - 1)) == 0, "threads", "32, 64, 128 or 256",
          threads);
}

}  // namespace

std::optional<LstmPlan> plan_lstm(const LstmProblem& problem, LstmPass pass, const GpuFigures& gpu,
                                  std::optional<LstmVariant> variant, int threads) {
  check(problem, threads);
  const Sizes sizes = sizes_of(problem, pass);
  if (variant == LstmVariant::kStream) return stream_plan(sizes, gpu);

  std::optional<LstmPlan> best;
  const auto consider = [&](LstmVariant candidate, int directions_at_once, int64_t units) {
    if (variant && *variant != candidate) return;
    // Two 2-byte values make one word that is published at once: see lstm_exchange.cuh.
    if (sizes.element == 2) units = round_up(units, 2);
    // Fewer groups of rows are for rows that would not fill the tiles: a tile of 6 wastes a quarter of the registers.
    for (int row_groups = threads / 32; row_groups >= 1; row_groups /= 2) {
      const auto plan = persistent_plan(sizes, gpu, candidate, directions_at_once, units, row_groups, threads);
      if (plan && (!best || plan->predicted_us < best->predicted_us)) best = plan;
    }
  };
  for (int at_once = int(problem.directions); at_once >= 1; --at_once) {
    const int64_t fewest = divide_up(problem.hidden, std::max(1, gpu.multiprocessors / at_once));
    for (const int64_t multiple : {1, 4, 8, 16}) {  // whole tiles waste no lanes; fewer units a block spread the work
      const int64_t units = round_up(fewest, multiple);
      consider(LstmVariant::kOnChip, at_once, units);
      consider(LstmVariant::kPartial, at_once, units);
    }
    if (gpu.clusters) {
      int blocks = kLstmCluster;
      while (blocks > 1 && blocks * at_once > gpu.multiprocessors) blocks /= 2;
      consider(LstmVariant::kCluster, at_once, divide_up(problem.hidden, blocks));
    }
  }
  if (variant) return best;
  const LstmPlan stream = stream_plan(sizes, gpu);
  return best && best->predicted_us <= stream.predicted_us ? best : stream;
}

const char* name_of(LstmVariant variant) {
  switch (variant) {
    case LstmVariant::kCluster: return "S";
    case LstmVariant::kOnChip: return "M";
    case LstmVariant::kPartial: return "L";
    default: return "STREAM";
  }
}

LstmVariant variant_named(const std::string& name) {
  for (const LstmVariant variant :
       {LstmVariant::kCluster, LstmVariant::kOnChip, LstmVariant::kPartial, LstmVariant::kStream}) {
    if (name == name_of(variant)) return variant;
  }
  throw std::invalid_argument("variant: expected S, M, L or STREAM, got " + name);
}

}  // namespace fusedprompt
