// lstm_torch.cuh for tensors on the CPU: the ops run with the kernels on fibers, so tests can call them like any op.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "device.h"

#define FP_DISPATCH_KEY CPU

namespace fusedprompt::device {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct DeviceGuard {
  explicit DeviceGuard(int32_t) {}
};

inline Stream current_stream(const Tensor&) { return nullptr; }

inline void product(Tensor& out, const Tensor& a, const Tensor& b) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
}
inline void add_product(Tensor& out, const Tensor& a, const Tensor& b) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), 1.0, 1.0));
}
inline void product_in_fp32(Tensor& out, const Tensor& a, const Tensor& b) {
  product(out, torch::stable::to(a, ScalarType::Float), torch::stable::to(b, ScalarType::Float));
}

}  // namespace fusedprompt::device
