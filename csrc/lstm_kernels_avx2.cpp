// The CPU kernels for processors with avx2, fma, f16c.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#include <immintrin.h>

#include "lstm_kernels.h"

#define FP_VECTOR_BYTES 32

namespace fusedprompt {
namespace avx2 {
#include "lstm_kernels_body.h"
}  // namespace avx2

const Kernels& kernels_avx2() {
  static constexpr Kernels kernels = {
      "avx2", {avx2::dtype_kernels<float>(), avx2::dtype_kernels<avx2::BFloat16>(), avx2::dtype_kernels<avx2::Float16>()}};
  return kernels;
}
}  // namespace fusedprompt
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
