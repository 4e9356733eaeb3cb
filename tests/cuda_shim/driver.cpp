// Runs one pass of the recurrence under the shim: a case on standard input, the results on standard output.
//
// In:  Header, weights and both biases of each direction, gates; backward: cells, d_output. Arrays as in csrc/lstm.h.
// Out: status (0 or the length of a message, which follows), 17 int64 of plan and counters, then forward gates, cells and
//      output; backward d_gates.
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <iostream>
#include <memory>
#include <random>
#include <vector>

#include "../../csrc/lstm_launch.cuh"

namespace {

using namespace fusedprompt;

struct Header {
  int64_t pass, steps, batch, hidden, directions, dtype;
  int64_t multiprocessors, shared_bytes, register_bytes, clusters;
  int64_t variant;     // -1: the planner chooses
  int64_t threads, seed, lose_store_at, resident_blocks;
  int64_t misaligned;    // weights begin one element behind a multiple of 16 bytes
  int64_t workspace;     // the byte that fills it; -1: random ones
  int64_t clusters_run, lose_fills, most_polls, deaf_barrier;  // see shim::Settings
};

// Exactly as large as asked for, so that AddressSanitizer sees the first byte behind it; full of NaN.
struct Array {
  size_t bytes;
  std::unique_ptr<unsigned char[]> memory;
  size_t offset;

  explicit Array(const char* name, size_t size, size_t at = 0)
      : bytes(size), memory(new unsigned char[size + at]), offset(at) {
    shim::poison(memory.get(), size + at);
    shim::name_memory(data(), size, name);
  }
  unsigned char* data() { return memory.get() + offset; }
  void read() { std::cin.read(reinterpret_cast<char*>(data()), std::streamsize(bytes)); }
  void write() { std::cout.write(reinterpret_cast<const char*>(data()), std::streamsize(bytes)); }
};

void put(int64_t value) { std::cout.write(reinterpret_cast<const char*>(&value), 8); }

void run() {
  Header h;
  std::cin.read(reinterpret_cast<char*>(&h), sizeof h);
  const size_t size = h.dtype == 0 ? 4 : 2;
  const size_t cells = size_t(h.directions * h.steps * h.batch * h.hidden);
  std::vector<Array> weights, biases;
  for (int64_t direction = 0; direction < h.directions; ++direction) {
    weights.emplace_back("weights", size_t(4 * h.hidden * h.hidden) * size, h.misaligned ? size : 0);
    weights.back().read();
    for (int which = 0; which < 2; ++which) {
      biases.emplace_back("bias", size_t(4 * h.hidden) * size);
      biases.back().read();
    }
  }
  Array gates("gates", 4 * cells * 4), cell("cell", cells * 4), output("output", cells * size);
  Array d_gates("d_gates", 4 * cells * size);
  gates.read();

  shim::settings = {{int32_t(h.multiprocessors), h.shared_bytes, h.register_bytes, 50 << 20, 5500, 4300, 1.7, h.clusters != 0},
                    uint64_t(h.seed), h.lose_store_at, h.resident_blocks, h.most_polls, h.lose_fills != 0, h.clusters_run != 0,
                    h.deaf_barrier, std::getenv("FAULT") ? std::getenv("FAULT") : ""};
  const LstmProblem problem{h.steps, h.batch, h.hidden, h.directions, Dtype(h.dtype)};
  const LstmPass pass = LstmPass(h.pass);
  setenv("FUSEDPROMPT_LSTM_VARIANT", h.variant < 0 ? "" : name_of(LstmVariant(h.variant)), 1);
  const auto queries_of = [&](int64_t steps) {
    const int64_t before = shim::queries;
    lstm_plan_cached({steps, h.batch, h.hidden, h.directions, problem.dtype}, pass, int(h.threads));
    return shim::queries - before;
  };
  const int64_t first = queries_of(h.steps), again = queries_of(h.steps) + queries_of(1) + queries_of(4096);
  const LstmPlan plan = lstm_plan_cached(problem, pass, int(h.threads));
  setenv("FUSEDPROMPT_LSTM_L2_MB", "12.5", 1);
  const int64_t elsewhere = queries_of(h.steps);
  Array workspace("workspace", lstm_workspace_bytes(problem, pass, plan));
  std::mt19937 random;
  for (size_t index = 0; index < workspace.bytes; ++index) {
    workspace.data()[index] = static_cast<unsigned char>(h.workspace < 0 ? random() : h.workspace);
  }
  const auto weight = [&](int64_t direction) { return direction < h.directions ? weights[size_t(direction)].data() : nullptr; };
  if (pass == LstmPass::kForward) {
    LstmForward call{h.steps, h.batch, h.hidden, h.directions, problem.dtype, {weight(0), weight(1)},
                           reinterpret_cast<float*>(gates.data()), reinterpret_cast<float*>(cell.data()), output.data(), {}};
    for (size_t index = 0; index < biases.size(); ++index) call.bias[index / 2][index % 2] = biases[index].data();
    lstm_forward_cuda(call, plan, workspace.data(), nullptr);
  } else {
    cell.read();
    output.read();  // d_output
    const LstmBackward call{h.steps, h.batch, h.hidden, h.directions, problem.dtype, {weight(0), weight(1)},
                            reinterpret_cast<float*>(gates.data()), reinterpret_cast<float*>(cell.data()), output.data(),
                            d_gates.data()};
    lstm_backward_cuda(call, plan, workspace.data(), nullptr);
  }
  put(0);
  for (const int64_t value : {int64_t(plan.variant), int64_t(plan.directions_at_once), int64_t(plan.blocks),
                              int64_t(plan.units), int64_t(plan.row_groups), int64_t(plan.split), int64_t(plan.tiles),
                              int64_t(plan.tile_rows), int64_t(plan.depth), int64_t(plan.held_depth),
                              int64_t(plan.shared_slots), plan.streamed_bytes, shim::launches, first,
                              again, elsewhere, shim::barriers}) {
    put(value);
  }
  if (pass == LstmPass::kForward) {
    gates.write();
    cell.write();
    output.write();
  } else {
    d_gates.write();
  }
}

}  // namespace

int main() {
  try {
    run();
  } catch (const std::exception& error) {
    const std::string message = error.what();
    put(int64_t(message.size()));
    std::cout << message;
  }
  return 0;
}
