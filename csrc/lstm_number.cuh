// Numbers of the three dtypes as bits: 16-byte chunks widened to fp32, results narrowed to words that are never all ones.
#pragma once

#include "lstm_device.cuh"

namespace fusedprompt::device {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <typename T>
constexpr int kElements = 16 / int(sizeof(T));  // of a chunk

// The word that no result is: all ones is a NaN in fp32, and two of them in bf16 and fp16.
constexpr uint32_t kUnwritten = 0xffffffffu;

FP_DEVICE uint32_t float_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}
FP_DEVICE float bits_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

FP_DEVICE float widen(float value) { return value; }
FP_DEVICE float widen(BFloat16 value) { return bits_float(uint32_t(value.bits) << 16); }
FP_DEVICE float widen(Float16 value) { return widen_half(value.bits); }

template <typename T>
FP_DEVICE T element(const uint32_t (&words)[4], int index);
template <>
FP_DEVICE float element<float>(const uint32_t (&words)[4], int index) {
  return bits_float(words[index]);
}
template <>
FP_DEVICE BFloat16 element<BFloat16>(const uint32_t (&words)[4], int index) {
  return {uint16_t(words[index / 2] >> (16 * (index % 2)))};
}
template <>
FP_DEVICE Float16 element<Float16>(const uint32_t (&words)[4], int index) {
  return {uint16_t(words[index / 2] >> (16 * (index % 2)))};
}

template <typename T>
FP_DEVICE void widen_chunk(const uint4& chunk, float (&values)[kElements<T>]) {
  const uint32_t words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
  for (int e = 0; e < kElements<T>; ++e) values[e] = widen(element<T>(words, e));
}

// Rounded to nearest even; every NaN becomes the quiet one without payload. In the low bits of a word.
template <typename T>
FP_DEVICE uint32_t narrow(float value);
template <>
FP_DEVICE uint32_t narrow<float>(float value) {
  return value == value ? float_bits(value) : 0x7fc00000u;
}
template <>
FP_DEVICE uint32_t narrow<BFloat16>(float value) {
  const uint32_t bits = float_bits(value);
  return value == value ? (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16 : 0x7fc0u;
}
template <>
FP_DEVICE uint32_t narrow<Float16>(float value) {
  return value == value ? narrow_half(value) : 0x7e00u;
}

template <typename T>
FP_DEVICE T from_bits(uint32_t bits) {
  if constexpr (sizeof(T) == 4) {
    return bits_float(bits);
  } else {
    return T{uint16_t(bits)};
  }
}

}  // namespace fusedprompt::device
