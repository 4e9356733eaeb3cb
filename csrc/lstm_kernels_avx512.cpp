// The CPU kernels for processors with avx512f, avx512bw, avx512dq, avx512vl, avx2, fma, f16c.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif
#include <immintrin.h>

#include "lstm_kernels.h"

#define FP_VECTOR_BYTES 64

namespace fusedprompt {
namespace avx512 {
#include "lstm_kernels_body.h"
}  // namespace avx512

const Kernels& kernels_avx512() {
  static constexpr Kernels kernels = {
      "avx512", {avx512::dtype_kernels<float>(), avx512::dtype_kernels<avx512::BFloat16>(), avx512::dtype_kernels<avx512::Float16>()}};
  return kernels;
}
}  // namespace fusedprompt
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
