// The few things that only a GPU does: barriers, shuffles, relaxed memory, clusters, launches. The kernels use nothing else,
// so tests compile the same kernels with g++ against shim/device.h, where each CUDA thread is a fiber.
#pragma once

#ifdef FP_SHIM
#include "shim/device.h"
#else

#include <cooperative_groups.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cassert>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "lstm_plan.h"

#define FP_DEVICE __device__ __forceinline__
#define FP_KERNEL(threads) __global__ void __launch_bounds__(threads, 1)
#define FP_PARAMETER __grid_constant__
#define FP_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

namespace fusedprompt::device {

FP_DEVICE int thread() { return int(threadIdx.x); }
FP_DEVICE int threads() { return int(blockDim.x); }
FP_DEVICE int block() { return int(blockIdx.x); }
FP_DEVICE int block_y() { return int(blockIdx.y); }

FP_DEVICE void block_barrier() { __syncthreads(); }
FP_DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
FP_DEVICE uint32_t shuffle_xor(uint32_t value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
FP_DEVICE float shuffle(float value, int lane) { return __shfl_sync(0xffffffffu, value, lane); }

// The same value, but the compiler no longer knows that.
FP_DEVICE void unpredictable(uint4& v) { asm volatile("" : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)); }

// Groups of weights in registers: 32 registers each. Before sm_90 a fifth would spill.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kHeldDepth = kLstmHeldDepthBefore90;
#else
constexpr int kHeldDepth = kLstmHeldDepth;
#endif

// Weights that are read once in a step: past L1, which would only be flushed by them.
FP_DEVICE uint4 load_weights(const uint4* address) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(address));
  return v;
}

// 16 bytes from memory to shared memory, or zeros where `from` is null, while this thread does other things. Only it may read them,
// once no more than `left` of the groups that it began later are under way.
FP_DEVICE void copy_later(uint4* to, const uint4* from) {
  const uint32_t address = uint32_t(__cvta_generic_to_shared(to)), bytes = from ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
}
FP_DEVICE void end_copy_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int left>
FP_DEVICE void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(left) : "memory");
}

// Each 32-bit word is read or written as a whole, from where all blocks see it (L2), and in no order with other words.
FP_DEVICE uint4 load_relaxed(const uint4* address) {
  uint4 v;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(address)
               : "memory");
  return v;
}
template <int kWords>
FP_DEVICE void store_relaxed(uint32_t* address, const uint32_t (&words)[kWords]) {
  static_assert(kWords == 1 || kWords == 2 || kWords == 4);
  if constexpr (kWords == 1) {
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(address), "r"(words[0]) : "memory");
  } else if constexpr (kWords == 2) {
    asm volatile("st.relaxed.gpu.global.v2.u32 [%0], {%1, %2};" ::"l"(address), "r"(words[0]), "r"(words[1]) : "memory");
  } else {
    asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(words[0]), "r"(words[1]),
                 "r"(words[2]), "r"(words[3])
                 : "memory");
  }
}

// A poll takes about a microsecond, so this is some seconds: nothing that is still alive takes as long.
FP_DEVICE constexpr uint32_t most_polls() { return 1u << 24; }

// Ends the kernel, and with it the process's use of the device: what it waits for will never come. What assert prints has block
// and thread, and a number, which is the step here. (printf needs a stack, and may print nothing before a trap.)
FP_DEVICE void give_up(int64_t step) {
  __assert_fail("the vector of the step before has come", "fusedprompt, lstm_persistent, step", unsigned(step), "poll_again");
}

FP_DEVICE void between_polls(int64_t) {}  // the tests' scheduler switches threads here, and their watchdog reports this step

// ---- clusters: sm_90 and later; elsewhere never run, but compiled ----

// All threads of the cluster, after which they see what the others wrote to any of its shared memories.
FP_DEVICE void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
  cooperative_groups::this_cluster().sync();
#endif
}

// Fences for shared memory alone, which cost nothing or a fence of the block. Older compilers have only the one that also waits for
// every store to global memory and empties L1.
#if CUDART_VERSION >= 12080
#define FP_RELEASE_SHARED "fence.release.sync_restrict::shared::cta.cluster;"
#define FP_ACQUIRE_SHARED "fence.acquire.sync_restrict::shared::cluster.cluster;"
#else
#define FP_RELEASE_SHARED "fence.acq_rel.cluster;"
#define FP_ACQUIRE_SHARED "fence.acq_rel.cluster;"
#endif

FP_DEVICE uint32_t shared_address(const void* address) { return uint32_t(__cvta_generic_to_shared(address)); }

// The address of the same variable in the shared memory of block `rank` of the cluster.
FP_DEVICE uint32_t shared_address(const void* address, int rank) {
  uint32_t there = 0;
#if __CUDA_ARCH__ >= 900
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(address)), "r"(rank));
#endif
  return there;
}

FP_DEVICE int rank_in_cluster() {
  uint32_t rank = 0;
#if __CUDA_ARCH__ >= 900
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return int(rank);
}

// An mbarrier whose phase ends once `count` threads have arrived and as many bytes as were expected.
FP_DEVICE void begin_arrivals(uint64_t* arrivals, int count) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(arrivals)), "r"(count) : "memory");
#endif
}
FP_DEVICE void expect_bytes(uint64_t* arrivals, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(shared_address(arrivals)), "r"(bytes)
               : "memory");
#endif
}

// Before `arrive`: what this thread and those that it met at a block barrier did in their shared memory is done.
FP_DEVICE void release_shared() {
#if __CUDA_ARCH__ >= 900
  asm volatile(FP_RELEASE_SHARED ::: "memory");
#endif
}
FP_DEVICE void arrive(uint64_t* arrivals, int rank) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [%0];" ::"r"(shared_address(arrivals, rank)) : "memory");
#endif
}

// Stores words into block `rank`, where they count as bytes of `arrivals`. Says nothing about anything else that this thread did.
template <int kWords>
FP_DEVICE void send(uint32_t* address, const uint32_t (&words)[kWords], uint64_t* arrivals, int rank) {
  static_assert(kWords == 1 || kWords == 2 || kWords == 4);
#if __CUDA_ARCH__ >= 900
  const uint32_t to = shared_address(address, rank), at = shared_address(arrivals, rank);
  if constexpr (kWords == 1) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(to), "r"(words[0]), "r"(at)
                 : "memory");
  } else if constexpr (kWords == 2) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.u32 [%0], {%1, %2}, [%3];" ::"r"(to), "r"(words[0]),
                 "r"(words[1]), "r"(at)
                 : "memory");
  } else {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.u32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to),
                 "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3]), "r"(at)
                 : "memory");
  }
#endif
}

// Whether the phase with this parity has ended; waits for it for a microsecond. Then this thread sees what was sent, and what was
// done before `release_shared` by those that arrived.
FP_DEVICE bool arrived(uint64_t* arrivals, uint32_t parity) {
  uint32_t done = 1;
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n .reg .pred p;\n"
      " mbarrier.try_wait.parity.relaxed.cluster.shared::cta.b64 p, [%1], %2, %3;\n"
      " " FP_ACQUIRE_SHARED "\n"
      " selp.u32 %0, 1, 0, p;\n}"
      : "=r"(done)
      : "r"(shared_address(arrivals)), "r"(parity), "r"(1000)
      : "memory");
#endif
  return done != 0;
}

FP_DEVICE float widen_half(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
FP_DEVICE uint16_t narrow_half(float value) { return __half_as_ushort(__float2half_rn(value)); }

// ---- host ----

using Stream = cudaStream_t;

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

inline int current_device() {
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  return device;
}

// Of the current device. The bandwidth of L2 is not told: 25 bytes a clock and multiprocessor is what an H100 reaches. Nor is how
// much of it serves one multiprocessor: large GPUs have two halves, and what lies in the far one may be kept in both.
inline GpuFigures figures() {
  const int device = current_device();
  GpuFigures result{};
  const auto ask = [&](cudaDeviceAttr attribute) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
    return value;
  };
  result.multiprocessors = ask(cudaDevAttrMultiProcessorCount);
  result.shared_bytes = ask(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  result.register_bytes = 4 * int64_t(ask(cudaDevAttrMaxRegistersPerMultiprocessor));
  result.l2_kept_bytes = ask(cudaDevAttrL2CacheSize) / 2;
  result.clock_ghz = std::max(ask(cudaDevAttrClockRate) / 1e6, 1.0);  // some drivers say 0
  result.l2_gb_per_s = 25.0 * result.multiprocessors * result.clock_ghz;
  result.memory_gb_per_s =
      std::max(2.0 * ask(cudaDevAttrMemoryClockRate) / 1e6 * ask(cudaDevAttrGlobalMemoryBusWidth) / 8, 200.0);
  result.clusters = ask(cudaDevAttrComputeCapabilityMajor) >= 9 && ask(cudaDevAttrClusterLaunch) != 0;
  return result;
}

inline void fill(void* address, int byte, size_t bytes, Stream stream) {
  check(cudaMemsetAsync(address, byte, bytes, stream), "cudaMemsetAsync");
}

// `rows` rows of `width` bytes, one after another, to rows that begin `pitch` bytes apart.
inline void copy_rows(void* to, size_t pitch, const void* from, size_t width, size_t rows, Stream stream) {
  check(cudaMemcpy2DAsync(to, pitch, from, width, width, rows, cudaMemcpyDeviceToDevice, stream), "cudaMemcpy2DAsync");
}

enum class Together { kNo, kCluster, kGrid };  // which blocks must run at the same time

struct Launch {
  unsigned blocks, blocks_y, threads;
  size_t shared_bytes;
  Together together;
  Stream stream;
};

struct Configuration {
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute attribute = {};

  explicit Configuration(const Launch& launch, unsigned cluster) {
    config.gridDim = dim3(launch.blocks, launch.blocks_y);
    config.blockDim = dim3(launch.threads);
    config.dynamicSmemBytes = launch.shared_bytes;
    config.stream = launch.stream;
    config.attrs = &attribute;
    config.numAttrs = launch.together == Together::kNo ? 0 : 1;
    if (launch.together == Together::kGrid) {
      attribute.id = cudaLaunchAttributeCooperative;
      attribute.val.cooperative = 1;
    } else {
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim = {cluster, 1, 1};
    }
  }
  Configuration(const Configuration&) = delete;
};

template <typename Argument>
using Kernel = void (*)(Argument);

// Whether all blocks of `launch` can be on the current device at the same time, as `together` asks. Also allows the kernel all
// the shared memory of a block: always the same figure, so that threads with different plans do not undo each other's.
template <typename Argument>
bool fits(Kernel<Argument> kernel, const Launch& launch, unsigned cluster) {
  const void* function = reinterpret_cast<const void*>(kernel);
  check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, int(figures().shared_bytes)),
        "cudaFuncSetAttribute");
  if (launch.together == Together::kCluster) {
    int clusters = 0;
    const Configuration configuration(launch, cluster);
    if (cudaOccupancyMaxActiveClusters(&clusters, function, &configuration.config) != cudaSuccess) {
      (void)cudaGetLastError();  // a cluster that this device cannot run at all
      return false;
    }
    return unsigned(clusters) * cluster >= launch.blocks;
  }
  const int device = current_device();
  int multiprocessors = 0, cooperative = 0, blocks = 0;
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, device), "cudaDeviceGetAttribute");
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, function, int(launch.threads), launch.shared_bytes),
        "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  return cooperative != 0 && unsigned(blocks) * unsigned(multiprocessors) >= launch.blocks;
}

template <typename Argument>
void launch(const char* name, Kernel<Argument> kernel, const Launch& launch, unsigned cluster, const Argument& argument) {
  const Configuration configuration(launch, cluster);
  void* arguments[] = {const_cast<Argument*>(&argument)};
  check(cudaLaunchKernelExC(&configuration.config, reinterpret_cast<const void*>(kernel), arguments), name);
}

}  // namespace fusedprompt::device
#endif
