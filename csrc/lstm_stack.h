// A stack of LSTM layers around the recurrence of one: products with the input, dropout masks, gradients. The same for every
// device; what differs is a `Device` with five functions (see lstm_cpu.cpp):
//
//   input_products(LayerForward)       gates = x W_ih^T + b_ih + b_hh, for all steps at once
//   recurrence_forward(LstmForward, Tensor on the device)
//   recurrence_backward(LstmBackward, Tensor on the device)
//   gradients(LayerBackward)           what follows from d_gates
//   fresh(Tensor)                      called on every large buffer before it is first written
//
// Sequences are (P, B, width) inside. At B = 1 or P = 1 that is the memory of (B, P, width), and nothing is copied.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include "lstm.h"

namespace fusedprompt {

using torch::stable::Tensor;
using torch::headeronly::ScalarType;

inline Dtype lstm_dtype(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Dtype::kFloat32;
    case ScalarType::BFloat16: return Dtype::kBFloat16;
    case ScalarType::Half: return Dtype::kFloat16;
    default: STD_TORCH_CHECK(false, "lstm_native: expected float32, bfloat16 or float16");
  }
}

struct LstmSizes {
  int64_t batch, steps, width, hidden, directions, layers;

  LstmSizes(const Tensor& x, const std::vector<Tensor>& weights, bool bidirectional)
      : batch(x.size(0)), steps(x.size(1)), width(x.size(2)), directions(bidirectional ? 2 : 1) {
    const auto count = static_cast<int64_t>(weights.size());
    STD_TORCH_CHECK(count > 0 && count % (4 * directions) == 0, "lstm_native: expected 4 weights a layer and direction");
    layers = count / (4 * directions);
    hidden = weights[1].size(1);
    for (int64_t index = 0; index < count; ++index) {
      const Tensor& weight = weights[index];
      const int64_t into = index % 4 == 1 ? hidden : width_of(index / (4 * directions));
      STD_TORCH_CHECK(weight.dim() == (index % 4 < 2 ? 2 : 1) && weight.size(0) == 4 * hidden &&
                          (index % 4 >= 2 || weight.size(1) == into) && weight.scalar_type() == x.scalar_type() &&
                          weight.device() == x.device(),
                      "lstm_native: weight ", index, " has the wrong shape, dtype or device");
    }
  }

  int64_t width_of(int64_t layer) const { return layer ? directions * hidden : width; }
  int64_t rows() const { return steps * batch; }
  bool swap() const { return batch > 1 && steps > 1; }  // (B, P) and (P, B) differ in memory
};

// weights[layer][direction]: weight_ih, weight_hh, bias_ih, bias_hh, contiguous.
using DirectionWeights = std::array<Tensor, 4>;

struct LayerForward {
  int64_t rows, width, hidden, directions;  // rows: P * B
  Tensor inputs;                            // (P, B, width)
  DirectionWeights weights[2];
  Tensor gates;                             // out: (directions, P, B, 4H) fp32
};

struct LayerBackward {
  int64_t steps, batch, width, hidden, directions;
  Tensor inputs;                            // (P, B, width)
  Tensor output;                            // (P, B, directions * H)
  Tensor d_gates;                           // (directions, P, B, 4H)
  DirectionWeights weights[2];
  DirectionWeights d_weights[2];            // out; weight_hh's is zeroed by `stack_backward` where P = 1
  Tensor d_inputs;                          // out: (P, B, width)
};

inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  const std::vector<int64_t> shape(sizes);
  return torch::stable::new_empty(like, {shape.data(), shape.size()}, dtype);
}

inline Tensor multiply(const Tensor& a, const Tensor& b) {
  std::array<StableIValue, 2> stack{torch::stable::detail::from(a), torch::stable::detail::from(b)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mul", "Tensor", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// (B, P, width) to (P, B, width) and back, contiguous.
inline Tensor swap_batch_and_steps(const LstmSizes& sizes, const Tensor& sequence) {
  return as_contiguous(sizes.swap() ? torch::stable::transpose(sequence, 0, 1) : sequence);
}

inline DirectionWeights direction_weights(const std::vector<Tensor>& weights, const LstmSizes& sizes, int64_t layer,
                                          int64_t direction) {
  const int64_t start = 4 * (layer * sizes.directions + direction);
  return {as_contiguous(weights[start]), as_contiguous(weights[start + 1]), as_contiguous(weights[start + 2]),
          as_contiguous(weights[start + 3])};
}

// What forward keeps, flat: gates and cell of each layer, and the output of each layer but the last.
struct Kept {
  Tensor gates, cell, output;
};

inline std::vector<Kept> unpack(const std::vector<Tensor>& saved, const Tensor& output) {
  std::vector<Kept> layers;
  for (size_t start = 0; start < saved.size(); start += 3) {
    layers.push_back({saved[start], saved[start + 1], start + 2 < saved.size() ? saved[start + 2] : output});
  }
  return layers;
}

// x (B, P, D) and nn.LSTM's weights. masks: none, or (P, B, directions * H) for each layer but the last. Returns the output
// (B, P, directions * H) and, where asked for, what backward needs.
template <class Device>
std::tuple<Tensor, std::vector<Tensor>> stack_forward(const Tensor& x, const std::vector<Tensor>& weights,
                                                      const std::vector<Tensor>& masks, bool bidirectional, bool keep) {
  const LstmSizes sizes(x, weights, bidirectional);
  const Dtype dtype = lstm_dtype(x);
  const ScalarType type = x.scalar_type();
  const int64_t steps = sizes.steps, batch = sizes.batch, hidden = sizes.hidden, directions = sizes.directions;
  std::vector<Tensor> saved;
  Tensor sequence = swap_batch_and_steps(sizes, x), output = sequence;
  for (int64_t layer = 0; layer < sizes.layers; ++layer) {
    const bool last = layer + 1 == sizes.layers;
    LayerForward f{sizes.rows(), sizes.width_of(layer), hidden, directions, sequence, {}, {}};
    f.gates = empty(x, {directions, steps, batch, 4 * hidden}, ScalarType::Float);
    Tensor cell = empty(x, {directions, steps, batch, hidden}, ScalarType::Float);
    output = last && !sizes.swap() ? empty(x, {batch, steps, directions * hidden}, type)
                                   : empty(x, {steps, batch, directions * hidden}, type);
    if (sizes.rows() > 0 && hidden > 0) {
      Device::fresh(f.gates);
      LstmForward step{steps, batch, hidden, directions, dtype, {}, f.gates.template mutable_data_ptr<float>(),
                       cell.template mutable_data_ptr<float>(), output.mutable_data_ptr()};
      for (int64_t direction = 0; direction < directions; ++direction) {
        f.weights[direction] = direction_weights(weights, sizes, layer, direction);
        step.weight_hh[direction] = f.weights[direction][1].const_data_ptr();
        for (size_t kind : {0, 1}) step.bias[direction][kind] = f.weights[direction][2 + kind].const_data_ptr();
      }
      Device::input_products(f);
      Device::recurrence_forward(step, x);
    }
    if (keep) {
      saved.push_back(f.gates);
      saved.push_back(cell);
      if (!last) saved.push_back(output);
    }
    sequence = masks.empty() || last ? output : multiply(output, masks[layer]);
  }
  if (sizes.swap()) output = swap_batch_and_steps(sizes, output);
  return {output, saved};
}

// The gradients of x and of every weight, in the order of the weights.
template <class Device>
std::vector<Tensor> stack_backward(const Tensor& d_output, const Tensor& x, const std::vector<Tensor>& weights,
                                   const std::vector<Tensor>& masks, bool bidirectional, const Tensor& output,
                                   const std::vector<Tensor>& saved) {
  const LstmSizes sizes(x, weights, bidirectional);
  const ScalarType type = x.scalar_type();
  const int64_t steps = sizes.steps, batch = sizes.batch, hidden = sizes.hidden, directions = sizes.directions;
  std::vector<Tensor> gradients(1 + weights.size());
  const bool nothing = sizes.rows() == 0 || hidden == 0;
  for (size_t index = 0; index < weights.size(); ++index) {
    const bool zero = nothing || (index % 4 == 1 && steps == 1);
    const auto shape = weights[index].sizes();
    gradients[1 + index] = zero ? torch::stable::new_zeros(x, shape, type) : torch::stable::new_empty(x, shape, type);
    if (!zero) Device::fresh(gradients[1 + index]);
  }
  if (nothing) {
    gradients[0] = torch::stable::new_zeros(x, x.sizes(), type);
    return gradients;
  }
  const std::vector<Kept> kept = unpack(saved, swap_batch_and_steps(sizes, output));
  STD_TORCH_CHECK(static_cast<int64_t>(kept.size()) == sizes.layers, "lstm_native_backward: saved does not fit weights");
  Tensor d_sequence = swap_batch_and_steps(sizes, d_output);
  for (int64_t layer = sizes.layers - 1; layer >= 0; --layer) {
    if (!masks.empty() && layer + 1 < sizes.layers) d_sequence = multiply(d_sequence, masks[layer]);
    LayerBackward b{steps, batch, sizes.width_of(layer), hidden, directions, {}, kept[layer].output, {}, {}, {}, {}};
    b.d_gates = empty(x, {directions, steps, batch, 4 * hidden}, type);
    LstmBackward step{steps, batch, hidden, directions, lstm_dtype(x), {},
                      kept[layer].gates.template const_data_ptr<float>(),
                      kept[layer].cell.template const_data_ptr<float>(), d_sequence.const_data_ptr(),
                      b.d_gates.mutable_data_ptr()};
    for (int64_t direction = 0; direction < directions; ++direction) {
      b.weights[direction] = direction_weights(weights, sizes, layer, direction);
      step.weight_hh[direction] = b.weights[direction][1].const_data_ptr();
      const int64_t start = 1 + 4 * (layer * directions + direction);
      for (int64_t kind = 0; kind < 4; ++kind) b.d_weights[direction][kind] = gradients[start + kind];
    }
    Device::recurrence_backward(step, x);
    if (layer == 0) {
      b.inputs = swap_batch_and_steps(sizes, x);
    } else {
      b.inputs = masks.empty() ? kept[layer - 1].output : multiply(kept[layer - 1].output, masks[layer - 1]);
    }
    b.d_inputs = layer == 0 && !sizes.swap() ? empty(x, {batch, steps, b.width}, type)
                                             : empty(x, {steps, batch, b.width}, type);
    Device::gradients(b);
    d_sequence = b.d_inputs;
  }
  gradients[0] = sizes.swap() ? swap_batch_and_steps(sizes, d_sequence) : d_sequence;
  return gradients;
}

// The three ops of fusedprompt/ops/lstm/native.py, which has their schemas.
template <class Device>
struct LstmOps {
  static Tensor inference(Tensor x, std::vector<Tensor> weights, std::vector<Tensor> masks, bool bidirectional) {
    return std::get<0>(stack_forward<Device>(x, weights, masks, bidirectional, false));
  }

  static std::tuple<Tensor, std::vector<Tensor>> forward(Tensor x, std::vector<Tensor> weights, std::vector<Tensor> masks,
                                                         bool bidirectional) {
    return stack_forward<Device>(x, weights, masks, bidirectional, true);
  }

  static std::vector<Tensor> backward(Tensor d_output, Tensor x, std::vector<Tensor> weights, std::vector<Tensor> masks,
                                      bool bidirectional, Tensor output, std::vector<Tensor> saved) {
    return stack_backward<Device>(d_output, x, weights, masks, bidirectional, output, saved);
  }

  static void implement(torch::stable::detail::StableLibrary& library) {
    library.impl("lstm_native", TORCH_BOX(&inference));
    library.impl("lstm_native_forward", TORCH_BOX(&forward));
    library.impl("lstm_native_backward", TORCH_BOX(&backward));
  }
};

}  // namespace fusedprompt
