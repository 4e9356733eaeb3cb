// lstm_device.cuh for g++: every CUDA thread is a fiber, all blocks are resident, and the scheduler decides who runs next.
//
// Checks indexing, the protocol between blocks, its freedom from deadlock, and with a seed that it stands relaxed stores that
// arrive late and in any order (stores.h). Compiled with -fsanitize=thread and linked without that sanitizer's library, it also
// finds accesses that nothing orders (races.h). Only tests include this.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>

#include "../lstm_plan.h"

#define FP_DEVICE inline
#define FP_KERNEL(threads) void
#define FP_PARAMETER
#define FP_DYNAMIC_SHARED(name) unsigned char* const name = shim::shared_memory()

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

namespace fusedprompt::shim {

// ---- what a test sets and reads ----

struct Settings {
  GpuFigures gpu = {4, 96 << 10, 256 << 10, 50 << 20, 5500, 4300, 1.7, false};
  uint64_t seed = 0;             // of the order in which fibers run and stores arrive; 0: round robin, at once
  int64_t lose_store_at = -1;    // a published word to lose, counted from 0: the others must then wait for ever
  int64_t resident_blocks = -1;  // how many blocks the device holds at once; -1: any number
  int64_t most_polls = -1;       // that a thread makes before it gives up, with the watchdog off; -1: the watchdog alone
  bool lose_fills = false;       // memory keeps what it held
  bool clusters_run = true;      // false: the device has clusters, but none of the size asked for
  int64_t deaf_barrier = -1;     // a barrier of each thread, counted from 0, that all reach but that orders nothing
  std::string fault;             // for kernels that a test made wrong in several ways
};
extern Settings settings;
extern int64_t launches, queries, barriers;  // queries: of what fits on the device; barriers: of a thread, in the last launch

// Runs all threads of all blocks to their end. Throws std::runtime_error, naming kernel and step, if none can go on.
void run(const char* name, unsigned blocks, unsigned blocks_y, unsigned threads, unsigned cluster, size_t shared_bytes,
         const std::function<void()>& thread_body);

// Fills with NaN of any dtype: what nobody wrote must not be used. No word of it is all ones, which a poll takes for unwritten.
inline void poison(unsigned char* memory, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i) memory[i] = i % 4 == 3 ? 0x7f : 0xff;
}
void name_memory(const void* address, size_t bytes, const char* name);  // for messages
void fill(void* address, int byte, size_t bytes);

// ---- what a thread asks ----

struct Self {
  int thread, threads, block, block_y;
};
const Self& self();
unsigned char* shared_memory();
void block_barrier();
void cluster_barrier();
uint32_t exchange_in_warp(uint32_t value, int from_lane, int expected);  // the value of lane `from_lane`
void wait_in_poll(int64_t step);
uint4 load_relaxed(const uint4* address);
void store_relaxed(uint32_t* address, uint32_t word);
void give_up(int64_t step);
void copy_later(uint4* to, const uint4* from);  // null: zeros
void end_copy_group();
void wait_for_copies(size_t left);
int rank_in_cluster();
void begin_arrivals(uint64_t* arrivals, int count);
void release_shared();
void arrive_expecting(uint64_t* arrivals, uint32_t bytes);
void arrive(uint64_t* arrivals, int rank);
void send(uint32_t* address, uint32_t word, uint64_t* arrivals, int rank);
bool arrived(const uint64_t* arrivals, uint32_t parity);

}  // namespace fusedprompt::shim

namespace fusedprompt::device {

using std::max;
using std::min;

constexpr int kHeldDepth = kLstmHeldDepth;

inline int thread() { return shim::self().thread; }
inline int threads() { return shim::self().threads; }
inline int block() { return shim::self().block; }
inline int block_y() { return shim::self().block_y; }
inline void block_barrier() { shim::block_barrier(); }
inline void cluster_barrier() { shim::cluster_barrier(); }
inline uint32_t most_polls() { return uint32_t(shim::settings.most_polls); }
inline void give_up(int64_t step) { shim::give_up(step); }
inline void between_polls(int64_t step) { shim::wait_in_poll(step); }
inline void unpredictable(uint4&) {}

inline uint32_t shuffle_xor(uint32_t value, int mask) {
  return shim::exchange_in_warp(value, (thread() % 32) ^ mask, mask);
}
inline float shuffle_xor(float value, int mask) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  bits = shuffle_xor(bits, mask);
  memcpy(&value, &bits, 4);
  return value;
}
inline float shuffle(float value, int lane) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  bits = shim::exchange_in_warp(bits, lane, 64 + lane);
  memcpy(&value, &bits, 4);
  return value;
}

inline uint4 load_weights(const uint4* address) { return *address; }
inline void copy_later(uint4* to, const uint4* from, bool inside) { shim::copy_later(to, inside ? from : nullptr); }
inline void end_copy_group() { shim::end_copy_group(); }
template <int left>
void wait_for_copies() {
  shim::wait_for_copies(left);
}
inline uint4 load_relaxed(const uint4* address) { return shim::load_relaxed(address); }
template <int kWords>
void store_relaxed(uint32_t* address, const uint32_t (&words)[kWords]) {
  for (int word = 0; word < kWords; ++word) shim::store_relaxed(address + word, words[word]);
}

using shim::arrive;
using shim::arrive_expecting;
using shim::arrived;
using shim::begin_arrivals;
using shim::rank_in_cluster;
using shim::release_shared;
template <int kWords>
void send(uint32_t* address, const uint32_t (&words)[kWords], uint64_t* arrivals, int rank) {
  for (int word = 0; word < kWords; ++word) shim::send(address + word, words[word], arrivals, rank);
}

// Written out, because not every compiler of the CPU has a type of 16 bits.
inline float widen_half(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  float magnitude = std::ldexp(float(fraction + (exponent ? 1024 : 0)), (exponent ? exponent : 1) - 25);
  if (exponent == 31) magnitude = fraction ? NAN : INFINITY;
  return bits & 0x8000 ? -magnitude : magnitude;
}
inline uint16_t narrow_half(float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const float magnitude = std::fabs(value);
  if (magnitude >= 65520.0f) return uint16_t(sign | 0x7c00);
  if (magnitude == 0.0f) return sign;
  const int exponent = std::max(std::ilogb(magnitude), -14);
  const int steps = int(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));  // to even; 2048 carries into the exponent
  return uint16_t(sign | (((exponent + 14) << 10) + steps));
}

using Stream = void*;

inline int current_device() { return 0; }
inline GpuFigures figures() { return shim::settings.gpu; }

inline void fill(void* address, int byte, size_t bytes, Stream) { shim::fill(address, byte, bytes); }
inline void copy_rows(void* to, size_t pitch, const void* from, size_t width, size_t rows, Stream) {
  for (size_t row = 0; row < rows; ++row) {
    memcpy(static_cast<unsigned char*>(to) + row * pitch, static_cast<const unsigned char*>(from) + row * width, width);
  }
}

enum class Together { kNo, kCluster, kGrid };

struct Launch {
  unsigned blocks, blocks_y, threads;
  size_t shared_bytes;
  Together together;
  Stream stream;
};

template <typename Argument>
using Kernel = void (*)(Argument);

template <typename Argument>
bool fits(Kernel<Argument>, const Launch& launch, unsigned) {
  ++shim::queries;
  if (launch.together == Together::kCluster && !shim::settings.clusters_run) return false;
  return shim::settings.resident_blocks < 0 || launch.blocks <= shim::settings.resident_blocks;
}

template <typename Argument>
void launch(const char* name, Kernel<Argument> kernel, const Launch& launch, unsigned cluster, const Argument& argument) {
  ++shim::launches;
  shim::run(name, launch.blocks, launch.blocks_y, launch.threads, cluster, launch.shared_bytes,
            [&] { kernel(argument); });
}

}  // namespace fusedprompt::device
