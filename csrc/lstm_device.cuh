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

// Weights that are read once in a step: past L1, which would only be flushed by them.
FP_DEVICE uint4 load_weights(const uint4* address) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(address));
  return v;
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

// Between two polls. The tests' scheduler switches threads here, and their watchdog reports this step.
FP_DEVICE void poll_again(int64_t) {}

// All threads of the cluster, after which they see what the others wrote to any of its shared memories.
FP_DEVICE void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
  cooperative_groups::this_cluster().sync();
#endif
}
// `address` in this block's shared memory, as block `rank` of the cluster has it.
template <typename T>
FP_DEVICE T* in_cluster(T* address, int rank) {
#if __CUDA_ARCH__ >= 900
  return cooperative_groups::this_cluster().map_shared_rank(address, unsigned(rank));
#else
  return address;
#endif
}

FP_DEVICE float widen_half(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
FP_DEVICE uint16_t narrow_half(float value) { return __half_as_ushort(__float2half_rn(value)); }

// ---- host ----

using Stream = cudaStream_t;

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Of the current device. The bandwidth of L2 is not told: 25 bytes a clock and multiprocessor is what an H100 reaches.
inline GpuFigures figures() {
  thread_local int known = -1;
  thread_local GpuFigures result;
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  if (device == known) return result;
  const auto ask = [&](cudaDeviceAttr attribute) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
    return value;
  };
  result.multiprocessors = ask(cudaDevAttrMultiProcessorCount);
  result.shared_bytes = ask(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  result.register_bytes = 4 * int64_t(ask(cudaDevAttrMaxRegistersPerMultiprocessor));
  result.l2_bytes = ask(cudaDevAttrL2CacheSize);
  result.clock_ghz = std::max(ask(cudaDevAttrClockRate) / 1e6, 1.0);  // some drivers say 0
  result.l2_gb_per_s = 25.0 * result.multiprocessors * result.clock_ghz;
  result.memory_gb_per_s =
      std::max(2.0 * ask(cudaDevAttrMemoryClockRate) / 1e6 * ask(cudaDevAttrGlobalMemoryBusWidth) / 8, 200.0);
  result.clusters = ask(cudaDevAttrComputeCapabilityMajor) >= 9 && ask(cudaDevAttrClusterLaunch) != 0;
  known = device;
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
  int device = 0, multiprocessors = 0, cooperative = 0, blocks = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
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
