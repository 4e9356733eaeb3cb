// The LSTM ops on CPU: cuts the work into pieces for lstm_kernels.h and hands them to torch's threads.
//
// A layer's recurrence takes one direction after another with all threads on each: W_hh of both directions of H = 1024 in
// fp32 is 32 MB, of one 16 MB, and that is the difference between reading it from memory and from L3 at every step
// (measured with two threads: 58 and 137 GB/s). Layers too small to share give each thread a direction, with no waiting.
#include "lstm_cpu.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <stdexcept>

#include "lstm_kernels.h"
#include "lstm_stack.h"
#include "lstm_team.h"

namespace fusedprompt {
namespace {

const Kernels* best_kernels() {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2 && avx512) return &kernels_avx512();
  if (avx2) return &kernels_avx2();
#endif
  return &kernels_plain();
}

std::atomic<const Kernels*> current_kernels{best_kernels()};

constexpr int64_t kSharedBytes = 256 << 10;  // of W_hh for each thread, from where on threads share a step
constexpr int64_t kAloneWork = 1 << 15;      // multiply-adds, up to which one thread does everything

int64_t element_size(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }
const DtypeKernels& kernels_of(Dtype dtype) { return current_kernels.load()->of[static_cast<int>(dtype)]; }

const char* at(const void* base, int64_t elements, Dtype dtype) {
  return static_cast<const char*>(base) + elements * element_size(dtype);
}
char* at(void* base, int64_t elements, Dtype dtype) { return static_cast<char*>(base) + elements * element_size(dtype); }

// How many threads share a step of one direction; the result does not depend on it.
int64_t parts_of(int64_t hidden, Dtype dtype, int64_t most) {
  const int64_t bytes = 4 * hidden * hidden * element_size(dtype);
  return std::clamp<int64_t>(bytes / kSharedBytes, 1, std::min<int64_t>(torch::stable::get_num_threads(), most));
}

// Calls run(direction) for each, side by side where a direction is the work of one thread.
template <class Run>
void each_direction(int64_t directions, int64_t parts, int64_t work, const Run& run) {
  if (parts > 1 || work <= kAloneWork) {  // not by parallel_for, which would forbid the team its threads
    for (int64_t direction = 0; direction < directions; ++direction) run(direction);
    return;
  }
  torch::stable::parallel_for(0, directions, 1, [&](int64_t begin, int64_t end) {
    for (int64_t direction = begin; direction < end; ++direction) run(direction);
  });
}

// Calls piece(begin, end) on ranges that start at multiples of `unit`.
template <class Piece>
void each_piece(int64_t size, int64_t unit, int64_t work, const Piece& piece) {
  const int64_t count = (size + unit - 1) / unit;
  torch::stable::parallel_for(0, count, work <= kAloneWork ? count : 1, [&](int64_t begin, int64_t end) {
    piece(begin * unit, std::min(end * unit, size));
  });
}

void direction_forward(const LstmForward& f, int64_t direction, int64_t parts) {
  const int64_t rows = f.batch * f.hidden, padded = round_up(f.hidden, kUnits), blocks = padded / kUnits;
  const DtypeKernels& kernels = kernels_of(f.dtype);
  std::vector<float> h(2 * f.batch * padded);  // of the last step and of this one
  Team(parts).run(f.steps, [&](int64_t index, int64_t part) {
    const int64_t t = direction ? f.steps - 1 - index : index, before = direction ? t + 1 : t - 1;
    const float* cell = f.cell + direction * f.steps * rows;
    ForwardStep step{f.batch,
                     f.hidden,
                     f.weight_hh[direction],
                     index ? h.data() + (index - 1) % 2 * f.batch * padded : nullptr,
                     index ? cell + before * rows : nullptr,
                     f.gates + (direction * f.steps + t) * 4 * rows,
                     f.cell + (direction * f.steps + t) * rows,
                     h.data() + index % 2 * f.batch * padded,
                     at(f.output, (t * f.batch * f.directions + direction) * f.hidden, f.dtype),
                     f.directions * f.hidden};
    kernels.forward_units(step, blocks * part / parts * kUnits, std::min(blocks * (part + 1) / parts * kUnits, f.hidden));
  });
}

void direction_backward(const LstmBackward& b, int64_t direction, int64_t parts) {
  const int64_t rows = b.batch * b.hidden, padded = round_up(b.hidden, kUnits), blocks = padded / kUnits;
  const int64_t groups = std::min(kRowGroups, blocks);
  const DtypeKernels& kernels = kernels_of(b.dtype);
  std::vector<float> d_cell(rows), sums(2 * groups * b.batch * padded);
  Team(parts).run(b.steps, [&](int64_t index, int64_t part) {
    const int64_t t = direction ? index : b.steps - 1 - index, before = direction ? t + 1 : t - 1;
    const bool first = index == 0, last = index + 1 == b.steps;
    const float* cell = b.cell + direction * b.steps * rows;
    BackwardStep step{b.batch,
                      b.hidden,
                      b.weight_hh[direction],
                      b.gates + (direction * b.steps + t) * 4 * rows,
                      cell + t * rows,
                      last ? nullptr : cell + before * rows,
                      at(b.d_output, (t * b.batch * b.directions + direction) * b.hidden, b.dtype),
                      b.directions * b.hidden,
                      first ? nullptr : sums.data() + (index - 1) % 2 * groups * b.batch * padded,
                      groups,
                      last ? nullptr : sums.data() + index % 2 * groups * b.batch * padded,
                      d_cell.data(),
                      at(b.d_gates, (direction * b.steps + t) * 4 * rows, b.dtype)};
    for (int64_t group = groups * part / parts; group < groups * (part + 1) / parts; ++group) {
      kernels.backward_units(step, group, blocks * group / groups * kUnits,
                             std::min(blocks * (group + 1) / groups * kUnits, b.hidden));
    }
  });
}

// fp32 values of a tensor: itself, or a copy in `buffer`.
const float* widened(const Tensor& tensor, std::vector<float>& buffer) {
  if (lstm_dtype(tensor) == Dtype::kFloat32) return tensor.const_data_ptr<float>();
  buffer.resize(tensor.numel());
  kernels_of(lstm_dtype(tensor)).widen(tensor.const_data_ptr(), 1, tensor.numel(), buffer.data(), 0);
  return buffer.data();
}

struct Cpu {
  // The kernel hands out 4 KB pages one fault at a time: 41 ms for the 168 MB of gradients at D = H = 1024, 6 ms for memory
  // that is there already. Huge pages, where the system leaves the choice to us, take 84 faults instead of 41000.
  static void fresh(Tensor& tensor) {
    constexpr uintptr_t kHuge = 2 << 20;
    const uintptr_t start = reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr());
    const uintptr_t end = start + tensor.numel() * tensor.element_size();
    const uintptr_t first = (start + kHuge - 1) / kHuge * kHuge, last = end / kHuge * kHuge;
    if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  }

  static void input_products(LayerForward& f) {
    const DtypeKernels& kernels = kernels_of(lstm_dtype(f.inputs));
    const int64_t n = 4 * f.hidden, stride = round_up(f.width, kUnits) + kUnits;
    std::vector<float> inputs(f.rows * stride);
    kernels.widen(f.inputs.const_data_ptr(), f.rows, f.width, inputs.data(), stride);
    for (int64_t direction = 0; direction < f.directions; ++direction) {
      const DirectionWeights& w = f.weights[direction];
      const InputProduct product{f.rows,
                                 n,
                                 f.width,
                                 inputs.data(),
                                 stride,
                                 w[0].const_data_ptr(),
                                 w[2].const_data_ptr(),
                                 w[3].const_data_ptr(),
                                 f.gates.mutable_data_ptr<float>() + direction * f.rows * n};
      each_piece(n, kPieceRows, f.rows * n * f.width,
                 [&](int64_t begin, int64_t end) { kernels.input_product(product, begin, end); });
    }
  }

  static void recurrence_forward(const LstmForward& f, const Tensor&) {
    const int64_t parts = parts_of(f.hidden, f.dtype, round_up(f.hidden, kUnits) / kUnits);
    each_direction(f.directions, parts, 4 * f.hidden * f.hidden * f.steps * f.batch,
                   [&](int64_t direction) { direction_forward(f, direction, parts); });
  }

  static void recurrence_backward(const LstmBackward& b, const Tensor&) {
    const int64_t parts = parts_of(b.hidden, b.dtype, std::min(kRowGroups, round_up(b.hidden, kUnits) / kUnits));
    each_direction(b.directions, parts, 4 * b.hidden * b.hidden * b.steps * b.batch,
                   [&](int64_t direction) { direction_backward(b, direction, parts); });
  }

  static void gradients(LayerBackward& b) {
    const Dtype dtype = lstm_dtype(b.inputs);
    const DtypeKernels& kernels = kernels_of(dtype);
    std::vector<float> inputs_buffer, output_buffer, gates_buffer;
    const float* inputs = widened(b.inputs, inputs_buffer);
    const float* output = widened(b.output, output_buffer);
    const float* d_gates = widened(b.d_gates, gates_buffer);
    const int64_t rows = b.steps * b.batch, n = 4 * b.hidden, after = (b.steps - 1) * b.batch;
    InputGradient of_inputs{rows, n, b.width, b.directions, {}, {}, b.d_inputs.mutable_data_ptr()};
    for (int64_t direction = 0; direction < b.directions; ++direction) {
      DirectionWeights& d = b.d_weights[direction];
      of_inputs.g[direction] = d_gates + direction * rows * n;
      of_inputs.weight[direction] = b.weights[direction][0].const_data_ptr();
      const char* g = at(static_cast<const void*>(b.d_gates.const_data_ptr()), direction * rows * n, dtype);
      weight_gradient(kernels, {rows, n, b.width, g, inputs, b.width, d[0].mutable_data_ptr(),
                                d[2].mutable_data_ptr(), d[3].mutable_data_ptr()});
      if (b.steps == 1) continue;
      // h_{t-1} of direction 0 is a row of steps before, of direction 1 one behind.
      const int64_t shift = b.batch * (direction ? 0 : n), h_shift = direction ? b.batch : 0;
      const int64_t h_width = b.directions * b.hidden;
      weight_gradient(kernels, {after, n, b.hidden, at(static_cast<const void*>(g), shift, dtype),
                                output + h_shift * h_width + direction * b.hidden, h_width, d[1].mutable_data_ptr(),
                                nullptr, nullptr});
    }
    each_piece(b.width, kPieceColumns, rows * n * b.width,
               [&](int64_t begin, int64_t end) { kernels.input_gradient(of_inputs, begin, end); });
  }

 private:
  static void weight_gradient(const DtypeKernels& kernels, const WeightGradient& gradient) {
    each_piece(gradient.n, kPieceRows, gradient.m * gradient.n * gradient.k, [&](int64_t begin, int64_t end) {
      std::vector<float> panel(gradient.m * kPieceRows);
      kernels.weight_gradient(gradient, begin, end, panel.data());
    });
  }
};

}  // namespace

std::vector<std::string> cpu_levels() {
#if defined(__x86_64__)
  if (best_kernels() == &kernels_avx512()) return {"avx512", "avx2", "plain"};
  if (best_kernels() == &kernels_avx2()) return {"avx2", "plain"};
#endif
  return {"plain"};
}

std::string cpu_level() { return current_kernels.load()->name; }

void use_cpu_level(const std::string& name) {
  const std::vector<std::string> levels = cpu_levels();
  if (std::find(levels.begin(), levels.end(), name) == levels.end()) {
    std::string known;
    for (const std::string& level : levels) known += (known.empty() ? "" : ", ") + level;
    throw std::invalid_argument("level: expected one of " + known + " on this processor, got " + name);
  }
#if defined(__x86_64__)
  current_kernels = name == "avx512" ? &kernels_avx512() : name == "avx2" ? &kernels_avx2() : &kernels_plain();
#endif
}

STABLE_TORCH_LIBRARY_IMPL(fusedprompt, CPU, library) { LstmOps<Cpu>::implement(library); }

}  // namespace fusedprompt
