// Vectors of fp32 at one instruction set, and what they are loaded from and stored to.
//
// Included by lstm_kernels_<level>.cpp only, inside a namespace of that level: code compiled for AVX-512 must not share a
// symbol with code that runs where there is none. GCC's and clang's vector extensions do the arithmetic.

#define FP_INLINE static inline __attribute__((always_inline))

constexpr int kLanes = FP_VECTOR_BYTES / 4;
typedef float Vec __attribute__((vector_size(FP_VECTOR_BYTES)));
typedef int32_t Ints __attribute__((vector_size(FP_VECTOR_BYTES)));
typedef uint32_t Words __attribute__((vector_size(FP_VECTOR_BYTES)));
typedef uint16_t Halves __attribute__((vector_size(FP_VECTOR_BYTES / 2)));

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class To, class From>
FP_INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

FP_INLINE Vec splat(float value) { return Vec{} + value; }

// GCC 12 makes a dozen shuffles of __builtin_convertvector where one instruction does it.
FP_INLINE Words widen_words(Halves halves) {
#if FP_VECTOR_BYTES == 64
  return bits_as<Words>(_mm512_cvtepu16_epi32(bits_as<__m256i>(halves)));
#elif FP_VECTOR_BYTES == 32
  return bits_as<Words>(_mm256_cvtepu16_epi32(bits_as<__m128i>(halves)));
#else
  return __builtin_convertvector(halves, Words);
#endif
}

FP_INLINE Vec widen_bits(Halves halves, BFloat16) { return bits_as<Vec>(widen_words(halves) << 16); }

// Round to nearest even; a NaN keeps its sign and becomes quiet.
FP_INLINE Halves narrow_bits(Vec value, BFloat16) {
  const Words bits = bits_as<Words>(value);
  const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Words quiet = (bits >> 16) | 0x40u;
  return __builtin_convertvector(value == value ? rounded : quiet, Halves);
}

#if FP_VECTOR_BYTES == 64
FP_INLINE Vec widen_bits(Halves halves, Float16) { return bits_as<Vec>(_mm512_cvtph_ps(bits_as<__m256i>(halves))); }
FP_INLINE Halves narrow_bits(Vec value, Float16) {
  return bits_as<Halves>(_mm512_cvtps_ph(bits_as<__m512>(value), _MM_FROUND_TO_NEAREST_INT));
}
#elif FP_VECTOR_BYTES == 32
FP_INLINE Vec widen_bits(Halves halves, Float16) { return bits_as<Vec>(_mm256_cvtph_ps(bits_as<__m128i>(halves))); }
FP_INLINE Halves narrow_bits(Vec value, Float16) {
  return bits_as<Halves>(_mm256_cvtps_ph(bits_as<__m256>(value), _MM_FROUND_TO_NEAREST_INT));
}
#else
// Shift exponent and mantissa to fp32's places, then scale: subnormals come out right because fp32 has room for them.
FP_INLINE Vec widen_bits(Halves halves, Float16) {
  const Words bits = widen_words(halves);
  const Vec scaled = bits_as<Vec>((bits & 0x7fffu) << 13) * splat(0x1p112f);
  const Words special = bits_as<Words>(scaled) | 0x7f800000u;
  const Words magnitude = scaled >= splat(65536.0f) ? special : bits_as<Words>(scaled);
  return bits_as<Vec>(magnitude | ((bits & 0x8000u) << 16));
}
FP_INLINE Halves narrow_bits(Vec value, Float16) {
  const Words bits = bits_as<Words>(value), sign = (bits >> 16) & 0x8000u, size = bits & 0x7fffffffu;
  const Words normal = (size - 0x38000000u + 0xfffu + ((size >> 13) & 1u)) >> 13;
  // Adding 0.5 puts a subnormal's bits at the end of the mantissa, and rounds them to nearest even on the way.
  const Words subnormal = bits_as<Words>(bits_as<Vec>(size) + splat(0.5f)) - 0x3f000000u;
  Words result = size < 0x38800000u ? subnormal : normal;
  result = size >= 0x477ff000u ? Words{} + 0x7c00u : result;
  result = size > 0x7f800000u ? Words{} + 0x7e00u : result;
  return __builtin_convertvector(result | sign, Halves);
}
#endif

FP_INLINE Vec load(const float* from) {
  Vec value;
  __builtin_memcpy(&value, from, sizeof(value));
  return value;
}

template <class T>
FP_INLINE Vec load(const T* from) {
  Halves halves;
  __builtin_memcpy(&halves, from, sizeof(halves));
  return widen_bits(halves, T{});
}

FP_INLINE void store(float* to, Vec value) { __builtin_memcpy(to, &value, sizeof(value)); }

template <class T>
FP_INLINE void store(T* to, Vec value) {
  const Halves halves = narrow_bits(value, T{});
  __builtin_memcpy(to, &halves, sizeof(halves));
}

// The first `count` lanes; zeros behind them. A call to memcpy: only for what is left over at the end of a row.
template <class T>
FP_INLINE Vec load_some(const T* from, int64_t count) {
  T lanes[kLanes] = {};
  __builtin_memcpy(lanes, from, count * sizeof(T));
  return load(lanes);
}

template <class T>
FP_INLINE void store_some(T* to, Vec value, int64_t count) {
  T lanes[kLanes];
  store(lanes, value);
  __builtin_memcpy(to, lanes, count * sizeof(T));
}

template <class T>
FP_INLINE Vec load_up_to(const T* from, int64_t count) {
  return count >= kLanes ? load(from) : load_some(from, count);
}

template <class T>
FP_INLINE void store_up_to(T* to, Vec value, int64_t count) {
  if (count >= kLanes) {
    store(to, value);
  } else {
    store_some(to, value, count);
  }
}

// What is left of an fp32 value once it has been stored as T.
FP_INLINE Vec rounded_to(Vec value, float) { return value; }
template <class T>
FP_INLINE Vec rounded_to(Vec value, T) {
  return widen_bits(narrow_bits(value, T{}), T{});
}

// to[0..3] = the sums over the lanes of four vectors, which share most of their shuffles.
FP_INLINE void sums_of_four(const Vec* from, float* to) {
#if FP_VECTOR_BYTES == 64
  const __m512 a = bits_as<__m512>(from[0]), b = bits_as<__m512>(from[1]);
  const __m512 c = bits_as<__m512>(from[2]), d = bits_as<__m512>(from[3]);
  const __m512d ab = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
  const __m512d cd = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d)));
  const __m512 abcd = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)),
                                    _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
#elif FP_VECTOR_BYTES == 32
  const __m256 ab = _mm256_hadd_ps(bits_as<__m256>(from[0]), bits_as<__m256>(from[1]));
  const __m256 cd = _mm256_hadd_ps(bits_as<__m256>(from[2]), bits_as<__m256>(from[3]));
  const __m256 abcd = _mm256_hadd_ps(ab, cd);
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1)));
#else
  for (int i = 0; i < 4; ++i) to[i] = (from[i][0] + from[i][1]) + (from[i][2] + from[i][3]);
#endif
}

#if FP_VECTOR_BYTES > 16
// exp to 1 ulp for x in [-87.3, 88]; NaN stays NaN. Argument reduction by ln 2 in two parts, Taylor to the seventh power.
FP_INLINE Vec exponential(const Vec input) {
  Vec x = input;
  x = x > splat(88.0f) ? splat(88.0f) : x;
  x = x < splat(-87.3f) ? splat(-87.3f) : x;
  const Vec magic = splat(0x1.8p23f);  // adding it leaves the rounded integer in the low bits
  const Vec shifted = x * splat(1.44269504f) + magic;
  const Vec n = shifted - magic;
  const Vec r = (x - n * splat(0x1.62e4p-1f)) - n * splat(0x1.7f7d1cp-20f);
  Vec p = splat(1.0f / 5040);
  p = p * r + splat(1.0f / 720);
  p = p * r + splat(1.0f / 120);
  p = p * r + splat(1.0f / 24);
  p = p * r + splat(1.0f / 6);
  p = p * r + splat(0.5f);
  p = p * r * r + r + splat(1.0f);
  const Vec scaled = bits_as<Vec>(bits_as<Ints>(p) + (bits_as<Ints>(shifted) << 23));
  return input == input ? scaled : input;
}

FP_INLINE Vec sigmoid(Vec x) { return splat(1.0f) / (splat(1.0f) + exponential(-x)); }

// Below 0.625 the odd polynomial of Cephes' tanhf (1 - 2 / (e^2x + 1) would cancel), above it the exponential.
FP_INLINE Vec hyperbolic_tangent(Vec x) {
  const Vec size = bits_as<Vec>(bits_as<Words>(x) & 0x7fffffffu), square = x * x;
  const Vec clipped = size > splat(10.0f) ? splat(10.0f) : size;
  const Vec large = splat(1.0f) - splat(2.0f) / (exponential(clipped + clipped) + splat(1.0f));
  Vec p = splat(-5.70498872745e-3f);
  p = p * square + splat(2.06390887954e-2f);
  p = p * square + splat(-5.37397155531e-2f);
  p = p * square + splat(1.33314422036e-1f);
  p = p * square + splat(-3.33332819422e-1f);
  const Vec small = p * square * x + x;
  const Vec signed_large = bits_as<Vec>(bits_as<Words>(large) | (bits_as<Words>(x) & 0x80000000u));
  return size < splat(0.625f) ? small : signed_large;
}
#endif
