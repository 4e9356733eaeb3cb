// The CPU kernels for any processor: 16-byte vectors (SSE2, NEON), and cells by lstm_cell.h.
#include "lstm_cell.h"
#include "lstm_kernels.h"

#define FP_VECTOR_BYTES 16

namespace fusedprompt {
namespace plain {
#include "lstm_kernels_body.h"
}  // namespace plain

const Kernels& kernels_plain() {
  static constexpr Kernels kernels = {
      "plain", {plain::dtype_kernels<float>(), plain::dtype_kernels<plain::BFloat16>(), plain::dtype_kernels<plain::Float16>()}};
  return kernels;
}
}  // namespace fusedprompt
