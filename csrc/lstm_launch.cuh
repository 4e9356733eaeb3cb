// Chooses and launches the kernels of the recurrence; docs/lstm.md explains them. For the one file that registers the ops.
//
// Nothing here allocates, synchronises or sets the device: the caller owns workspace, stream and device, so every call can be
// captured in a CUDA graph. Everything here throws std::runtime_error if CUDA refuses something.
#pragma once

#include <cstdlib>
#include <map>
#include <mutex>
#include <optional>
#include <tuple>

#include "lstm_persistent.cuh"
#include "lstm_stream.cuh"

namespace fusedprompt {
namespace detail {

using device::Arguments;
using device::Launch;
using device::Together;
using device::Transpose;

inline size_t round_up(size_t value, size_t to) { return (value + to - 1) / to * to; }
inline size_t element_size(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

// The workspace: the exchanged vectors, then weights that cannot be read in place, then gradients of cells. Weights are
// transposed for a backward pass; forward, rows that are no multiple of 16 bytes are copied with padding.
struct Workspace {
  size_t exchange_pitch, ring, exchange_bytes;
  size_t matrix_pitch, matrix_bytes;  // of one direction's weights
  size_t d_cell_bytes;
  size_t total;

  Workspace(const LstmProblem& p, LstmPass pass, const LstmPlan& plan) {
    const bool backward = pass == LstmPass::kBackward, stream = plan.variant == LstmVariant::kStream;
    const size_t columns = size_t(p.hidden) * (backward ? 4 : 1);
    exchange_pitch = round_up(columns * element_size(p.dtype), 16);
    ring = plan.variant == LstmVariant::kCluster ? 0 : stream ? 2 : size_t(p.steps);
    exchange_bytes = round_up(size_t(plan.directions_at_once) * ring * size_t(p.batch) * exchange_pitch, 256);
    matrix_pitch = round_up(columns, 16 / element_size(p.dtype));
    matrix_bytes = round_up(size_t(p.hidden) * (backward ? 1 : 4) * matrix_pitch * element_size(p.dtype), 256);
    d_cell_bytes = backward && stream ? size_t(p.directions * p.batch * p.hidden) * 4 : 0;
    total = exchange_bytes + size_t(plan.directions_at_once) * matrix_bytes + d_cell_bytes;
  }
};

inline unsigned cluster_of(const LstmPlan& plan) {
  return plan.variant == LstmVariant::kCluster ? unsigned(plan.blocks) : 1;
}

inline Launch launch_of(const LstmPlan& plan, device::Stream stream) {
  const unsigned all = unsigned(plan.blocks) * unsigned(plan.directions_at_once);
  switch (plan.variant) {
    case LstmVariant::kStream:
      return {unsigned(plan.blocks), unsigned(plan.directions_at_once), unsigned(plan.threads), 0, Together::kNo, stream};
    case LstmVariant::kCluster:
      return {all, 1, unsigned(plan.threads), size_t(plan.shared_bytes), Together::kCluster, stream};
    default:
      return {all, 1, unsigned(plan.threads), size_t(plan.shared_bytes), Together::kGrid, stream};
  }
}

template <typename T, bool kBackward>
auto persistent_kernel(int64_t batch) {
  // Up to 4 entries share a read of the weights; more would not leave enough registers.
  return batch == 1 ? &device::lstm_persistent<T, kBackward, 1> : &device::lstm_persistent<T, kBackward, 4>;
}

template <typename T, bool kBackward>
void run(const Arguments& a, device::Stream stream) {
  const Launch launch = launch_of(a.plan, stream);
  if (a.plan.variant == LstmVariant::kStream) {
    Arguments one = a;
    for (one.step = 0; one.step < a.steps; ++one.step) {
      device::launch("lstm_step", &device::lstm_step<T, kBackward>, launch, 1, one);
    }
  } else {
    device::launch("lstm_persistent", persistent_kernel<T, kBackward>(a.batch), launch, cluster_of(a.plan), a);
  }
}

template <bool kBackward>
void run(Dtype dtype, const Arguments& a, device::Stream stream) {
  switch (dtype) {
    case Dtype::kFloat32: return run<float, kBackward>(a, stream);
    case Dtype::kBFloat16: return run<device::BFloat16, kBackward>(a, stream);
    case Dtype::kFloat16: return run<device::Float16, kBackward>(a, stream);
  }
}

template <bool kBackward>
inline bool fits(Dtype dtype, int64_t batch, const LstmPlan& plan) {
  const Launch launch = launch_of(plan, {});
  const unsigned cluster = cluster_of(plan);
  switch (dtype) {
    case Dtype::kFloat32: return device::fits(persistent_kernel<float, kBackward>(batch), launch, cluster);
    case Dtype::kBFloat16: return device::fits(persistent_kernel<device::BFloat16, kBackward>(batch), launch, cluster);
    default: return device::fits(persistent_kernel<device::Float16, kBackward>(batch), launch, cluster);
  }
}

// W_hh in place, or a copy whose rows begin at multiples of 16 bytes.
inline const void* readable(const LstmProblem& p, const void* weight_hh, void* copy, const Workspace& w, device::Stream stream) {
  const size_t row = size_t(p.hidden) * element_size(p.dtype), pitch = w.matrix_pitch * element_size(p.dtype);
  if (row == pitch && reinterpret_cast<uintptr_t>(weight_hh) % 16 == 0) return weight_hh;
  device::fill(copy, 0, w.matrix_bytes, stream);
  device::copy_rows(copy, pitch, weight_hh, row, size_t(4 * p.hidden), stream);
  return copy;
}

inline const void* transpose(const LstmProblem& p, const void* weight_hh, void* transposed, size_t pitch, device::Stream stream) {
  const unsigned tiles = unsigned((p.hidden + device::kTransposeTile - 1) / device::kTransposeTile);
  const size_t shared = element_size(p.dtype) * device::kTransposeTile * (4 * device::kTransposeTile + 1);
  const Launch launch{tiles, tiles, unsigned(kLstmThreads), shared, Together::kNo, stream};
  const Transpose argument{weight_hh, transposed, p.hidden, int64_t(pitch)};
  if (p.dtype == Dtype::kFloat32) {
    device::launch("lstm_transpose", &device::lstm_transpose<uint32_t>, launch, 1, argument);
  } else {
    device::launch("lstm_transpose", &device::lstm_transpose<uint16_t>, launch, 1, argument);
  }
  return transposed;
}

inline int64_t megabytes(const char* name, const std::string& text) {
  char* end = nullptr;
  const double value = std::strtod(text.c_str(), &end);
  if (end == text.c_str() || *end != '\0' || !(value >= 0 && value < 1e6)) {
    throw std::invalid_argument(std::string(name) + ": expected a number of megabytes, got " + text);
  }
  return int64_t(value * 1e6);
}

// All directions, `directions_at_once` of them together.
template <bool kBackward>
void run_pass(const LstmProblem& p, const void* const (&weight_hh)[2], Arguments a, const LstmPlan& plan, void* memory,
              device::Stream stream) {
  const Workspace workspace(p, kBackward ? LstmPass::kBackward : LstmPass::kForward, plan);
  unsigned char* const exchange = static_cast<unsigned char*>(memory);
  unsigned char* const matrices = exchange + workspace.exchange_bytes;
  a.plan = plan;
  a.steps = p.steps;
  a.batch = p.batch;
  a.hidden = p.hidden;
  a.directions = p.directions;
  a.exchange = exchange;
  a.exchange_pitch = int64_t(workspace.exchange_pitch);
  a.ring = int64_t(workspace.ring);
  a.d_cell = reinterpret_cast<float*>(matrices + size_t(plan.directions_at_once) * workspace.matrix_bytes);

  a.matrix_pitch = int64_t(workspace.matrix_pitch);
  for (int first = 0; first < p.directions; first += plan.directions_at_once) {
    a.first_direction = first;
    for (int direction = first; direction < first + plan.directions_at_once; ++direction) {
      void* const copy = matrices + size_t(direction - first) * workspace.matrix_bytes;
      a.matrix[direction] = kBackward ? transpose(p, weight_hh[direction], copy, workspace.matrix_pitch, stream)
                                      : readable(p, weight_hh[direction], copy, workspace, stream);
    }
    // All ones: nobody has published. STREAM reads only what was written, and zeros behind it.
    const int unwritten = plan.variant == LstmVariant::kStream ? 0 : 0xff;
    if (workspace.exchange_bytes > 0) device::fill(exchange, unwritten, workspace.exchange_bytes, stream);
    run<kBackward>(p.dtype, a, stream);
  }
}

}  // namespace detail

// The plan that will run on the current device: plan_lstm's, or if the device cannot hold all its blocks at once (another
// process may have a share of it) the best without clusters, or kStream. A variant asked for by name (or "") that cannot run
// throws std::invalid_argument, as does a wrong name. l2_kept_mb: GpuFigures::l2_kept_bytes in megabytes, or "".
inline LstmPlan lstm_plan_here(const LstmProblem& problem, LstmPass pass, const std::string& variant_name,
                               const std::string& l2_kept_mb, int threads = kLstmThreads) {
  const auto variant = variant_name.empty() ? std::nullopt : std::optional(variant_named(variant_name));
  const auto runs = [&](const LstmPlan& plan) {
    return plan.variant == LstmVariant::kStream ||
           (pass == LstmPass::kForward ? detail::fits<false>(problem.dtype, problem.batch, plan)
                                       : detail::fits<true>(problem.dtype, problem.batch, plan));
  };
  GpuFigures gpu = device::figures();
  if (!l2_kept_mb.empty()) gpu.l2_kept_bytes = detail::megabytes("FUSEDPROMPT_LSTM_L2_MB", l2_kept_mb);
  std::optional<LstmPlan> plan = plan_lstm(problem, pass, gpu, variant, threads);
  if (plan && runs(*plan)) return *plan;
  if (variant) {
    throw std::invalid_argument(std::string("variant: expected one that fits this GPU, got ") + name_of(*variant));
  }
  gpu.clusters = false;
  plan = plan_lstm(problem, pass, gpu, variant, threads);
  return runs(*plan) ? *plan : *plan_lstm(problem, pass, gpu, LstmVariant::kStream);
}

// The same for what the environment says, FUSEDPROMPT_LSTM_VARIANT and FUSEDPROMPT_LSTM_L2_MB, and searched and asked for once: a
// device's answers stay what they are. The length of the sequence changes nothing in a plan.
inline LstmPlan lstm_plan_cached(const LstmProblem& problem, LstmPass pass, int threads = kLstmThreads) {
  const auto text = [](const char* name) { return std::string(std::getenv(name) ? std::getenv(name) : ""); };
  const auto key = std::make_tuple(device::current_device(), problem.batch, problem.hidden, problem.directions, problem.dtype, pass,
                                   threads, text("FUSEDPROMPT_LSTM_VARIANT"), text("FUSEDPROMPT_LSTM_L2_MB"));
  static std::mutex mutex;
  static std::map<std::remove_const_t<decltype(key)>, LstmPlan> plans;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto known = plans.find(key);
  if (known != plans.end()) return known->second;
  const LstmPlan plan = lstm_plan_here(problem, pass, std::get<7>(key), std::get<8>(key), threads);
  plans.emplace(key, plan);
  return plan;
}

// Bytes of scratch memory, aligned to 256, that the call with this plan needs; their contents do not matter.
inline size_t lstm_workspace_bytes(const LstmProblem& problem, LstmPass pass, const LstmPlan& plan) {
  return detail::Workspace(problem, pass, plan).total;
}

inline void lstm_forward_cuda(const LstmForward& call, const LstmPlan& plan, void* workspace, device::Stream stream) {
  device::Arguments a{};
  memcpy(a.bias, call.bias, sizeof a.bias);
  a.gates = call.gates;
  a.cell = call.cell;
  a.output = call.output;
  const LstmProblem problem{call.steps, call.batch, call.hidden, call.directions, call.dtype};
  detail::run_pass<false>(problem, call.weight_hh, a, plan, workspace, stream);
}

inline void lstm_backward_cuda(const LstmBackward& call, const LstmPlan& plan, void* workspace, device::Stream stream) {
  device::Arguments a{};
  a.gates = const_cast<float*>(call.gates);  // read only, as are the cells
  a.cell = const_cast<float*>(call.cell);
  a.d_output = call.d_output;
  a.d_gates = call.d_gates;
  const LstmProblem problem{call.steps, call.batch, call.hidden, call.directions, call.dtype};
  detail::run_pass<true>(problem, call.weight_hh, a, plan, workspace, stream);
}

}  // namespace fusedprompt
