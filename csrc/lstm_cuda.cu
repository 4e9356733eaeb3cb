// The LSTM ops on CUDA: lstm_stack.h with products by cuBLAS through ATen and the recurrence of lstm_launch.cuh.
//
// Built as a library of its own, which only a process with CUDA loads. Everything is put on the current stream of x's device
// and allocated by ATen.
#include "lstm_launch.cuh"
#include "lstm_stack.h"
#include "lstm_torch.cuh"

namespace fusedprompt {
namespace {

Tensor workspace_for(const Tensor& like, const LstmProblem& problem, LstmPass pass, const LstmPlan& plan) {
  return empty(like, {int64_t(lstm_workspace_bytes(problem, pass, plan))}, ScalarType::Byte);
}

// Direction `direction` of a (directions, P, B, width) tensor as (P * B, width).
Tensor rows_of(const Tensor& tensor, int64_t direction, int64_t rows, int64_t width) {
  return torch::stable::view(torch::stable::select(tensor, 0, direction), {rows, width});
}

Tensor transposed(const Tensor& matrix) { return torch::stable::transpose(matrix, 0, 1); }

struct Cuda {
  static void fresh(Tensor&) {}  // pages of a GPU's memory need no preparation

  // Without biases, which the recurrence adds.
  static void input_products(LayerForward& f) {
    const device::DeviceGuard guard(f.inputs.get_device_index());
    const Tensor inputs = torch::stable::view(f.inputs, {f.rows, f.width});
    for (int64_t direction = 0; direction < f.directions; ++direction) {
      Tensor gates = rows_of(f.gates, direction, f.rows, 4 * f.hidden);
      device::product_in_fp32(gates, inputs, transposed(f.weights[direction][0]));
    }
  }

  static void recurrence_forward(const LstmForward& call, const Tensor& x) {
    const device::DeviceGuard guard(x.get_device_index());
    const LstmProblem problem{call.steps, call.batch, call.hidden, call.directions, call.dtype};
    const LstmPlan plan = lstm_plan_cached(problem, LstmPass::kForward);
    const Tensor workspace = workspace_for(x, problem, LstmPass::kForward, plan);
    lstm_forward_cuda(call, plan, workspace.mutable_data_ptr(), device::current_stream(x));
  }

  static void recurrence_backward(const LstmBackward& call, const Tensor& x) {
    const device::DeviceGuard guard(x.get_device_index());
    const LstmProblem problem{call.steps, call.batch, call.hidden, call.directions, call.dtype};
    const LstmPlan plan = lstm_plan_cached(problem, LstmPass::kBackward);
    const Tensor workspace = workspace_for(x, problem, LstmPass::kBackward, plan);
    lstm_backward_cuda(call, plan, workspace.mutable_data_ptr(), device::current_stream(x));
  }

  static void gradients(LayerBackward& b) {
    const device::DeviceGuard guard(b.inputs.get_device_index());
    const int64_t rows = b.steps * b.batch, n = 4 * b.hidden, before = (b.steps - 1) * b.batch;
    const Tensor inputs = torch::stable::view(b.inputs, {rows, b.width});
    const Tensor output = torch::stable::view(b.output, {rows, b.directions * b.hidden});
    Tensor d_inputs = torch::stable::view(b.d_inputs, {rows, b.width});
    for (int64_t direction = 0; direction < b.directions; ++direction) {
      const Tensor d_gates = rows_of(b.d_gates, direction, rows, n);
      std::array<Tensor, 4>& d = b.d_weights[direction];
      device::product(d[0], transposed(d_gates), inputs);
      if (b.steps > 1) {
        // h of the step before: direction 0 walks forward, so it lies one position before; of direction 1 one behind.
        Tensor after = d_gates, h = output;
        h = torch::stable::narrow(h, 1, direction * b.hidden, b.hidden);
        h = torch::stable::narrow(h, 0, direction == 0 ? 0 : b.batch, before);
        after = torch::stable::narrow(after, 0, direction == 0 ? b.batch : 0, before);
        device::product(d[1], transposed(after), h);
      }
      const int64_t dimension = 0;
      torch::stable::sum_out(d[2], d_gates, torch::headeronly::IntHeaderOnlyArrayRef(&dimension, 1));
      torch::stable::copy_(d[3], d[2]);
      if (direction == 0) {
        device::product(d_inputs, d_gates, b.weights[direction][0]);
      } else {
        device::add_product(d_inputs, d_gates, b.weights[direction][0]);
      }
    }
  }
};

}  // namespace
}  // namespace fusedprompt

STABLE_TORCH_LIBRARY_IMPL(fusedprompt, FP_DISPATCH_KEY, library) {
  fusedprompt::LstmOps<fusedprompt::Cuda>::implement(library);
}
