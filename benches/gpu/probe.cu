// What this GPU can do, measured before anything is claimed about it: one JSON object on standard output.
//
//   nvcc -O3 -std=c++17 -arch=native -o probe probe.cu && ./probe
//
// Bandwidths of global memory (read, copy) and of L2 over the size of the buffer; the latency of a grid barrier, of a flag
// polled by another block, and of a flag in another block's shared memory (one cluster); the time an empty kernel takes in a
// graph, with and without programmatic dependent launch.

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <vector>

namespace cg = cooperative_groups;

#define CHECK(call)                                                                               \
  do {                                                                                            \
    cudaError_t error = (call);                                                                   \
    if (error != cudaSuccess) {                                                                   \
      std::fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(error)); \
      std::exit(1);                                                                               \
    }                                                                                             \
  } while (0)

// Sums a buffer of 16-byte words, `repeats` times over. Each thread keeps four loads in flight.
__global__ void read_kernel(const uint4* __restrict__ data, size_t words, int repeats, unsigned* sink) {
  unsigned sum = 0;
  const size_t stride = size_t(gridDim.x) * blockDim.x;
  for (int repeat = 0; repeat < repeats; ++repeat) {
    size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    for (; i + 3 * stride < words; i += 4 * stride) {
      const uint4 a = __ldcg(data + i), b = __ldcg(data + i + stride);
      const uint4 c = __ldcg(data + i + 2 * stride), d = __ldcg(data + i + 3 * stride);
      sum += (a.x ^ a.w) + (b.x ^ b.w) + (c.x ^ c.w) + (d.x ^ d.w);
    }
    for (; i < words; i += stride) sum += __ldcg(data + i).x;
  }
  if (sum == 0x12345678u) *sink = sum;  // never, but the compiler cannot know
}

__global__ void copy_kernel(const uint4* __restrict__ from, uint4* __restrict__ to, size_t words) {
  const size_t stride = size_t(gridDim.x) * blockDim.x;
  for (size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x; i < words; i += stride) __stcs(to + i, __ldcs(from + i));
}

__global__ void barrier_kernel(int rounds) {
  cg::grid_group grid = cg::this_grid();
  for (int round = 0; round < rounds; ++round) grid.sync();
}

// Blocks 0 and 1 pass a counter to and fro through global memory: two hops a round.
__global__ void flag_kernel(volatile unsigned* flags, int rounds) {
  if (threadIdx.x != 0 || blockIdx.x > 1) return;
  for (unsigned round = 1; round <= unsigned(rounds); ++round) {
    if (blockIdx.x == 0) {
      flags[0] = round;
      while (flags[32] != round) {
      }
    } else {
      while (flags[0] != round) {
      }
      flags[32] = round;
    }
  }
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define CLUSTER_OF_TWO  // no clusters before Hopper; never launched there
#else
#define CLUSTER_OF_TWO __cluster_dims__(2, 1, 1)
#endif

// The same between the two blocks of a cluster, through distributed shared memory.
__global__ void CLUSTER_OF_TWO cluster_kernel(int rounds) {
#if __CUDA_ARCH__ >= 900
  __shared__ volatile unsigned flag;
  cg::cluster_group cluster = cg::this_cluster();
  const unsigned rank = cluster.block_rank();
  if (threadIdx.x == 0) flag = 0;
  cluster.sync();
  if (threadIdx.x == 0) {
    volatile unsigned* other = cluster.map_shared_rank((unsigned*)&flag, rank ^ 1u);
    for (unsigned round = 1; round <= unsigned(rounds); ++round) {
      if (rank == 0) {
        *other = round;
        while (flag != round) {
        }
      } else {
        while (flag != round) {
        }
        *other = round;
      }
    }
  }
  cluster.sync();
#endif
}

__global__ void empty_kernel() {}

__global__ void empty_dependent_kernel() {
#if __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
  cudaGridDependencySynchronize();
#endif
}

// Median of the times of `work`, in microseconds, by events; a few runs before do not count.
static double microseconds(cudaStream_t stream, int samples, const std::function<void()>& work) {
  cudaEvent_t begin, end;
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreate(&end));
  std::vector<double> times;
  for (int sample = -3; sample < samples; ++sample) {
    CHECK(cudaEventRecord(begin, stream));
    work();
    CHECK(cudaEventRecord(end, stream));
    CHECK(cudaEventSynchronize(end));
    float milliseconds = 0;
    CHECK(cudaEventElapsedTime(&milliseconds, begin, end));
    if (sample >= 0) times.push_back(double(milliseconds) * 1e3);
  }
  CHECK(cudaGetLastError());
  std::sort(times.begin(), times.end());
  CHECK(cudaEventDestroy(begin));
  CHECK(cudaEventDestroy(end));
  return times[times.size() / 2];
}

// Microseconds per kernel of a graph of `count` kernels one after another.
static double graph_kernel_microseconds(bool dependent, int count) {
  cudaStream_t stream;
  CHECK(cudaStreamCreate(&stream));
  cudaGraph_t graph;
  CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  for (int kernel = 0; kernel < count; ++kernel) {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(1);
    config.blockDim = dim3(128);
    config.stream = stream;
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &attribute;
    config.numAttrs = dependent ? 1 : 0;
    CHECK(cudaLaunchKernelEx(&config, dependent ? empty_dependent_kernel : empty_kernel));
  }
  CHECK(cudaStreamEndCapture(stream, &graph));
  cudaGraphExec_t executable;
  CHECK(cudaGraphInstantiate(&executable, graph, 0));
  const double total = microseconds(stream, 20, [&] { CHECK(cudaGraphLaunch(executable, stream)); });
  CHECK(cudaGraphExecDestroy(executable));
  CHECK(cudaGraphDestroy(graph));
  CHECK(cudaStreamDestroy(stream));
  return total / count;
}

int main() {
  cudaDeviceProp device;
  CHECK(cudaGetDeviceProperties(&device, 0));
  int clock_khz = 0;
  CHECK(cudaDeviceGetAttribute(&clock_khz, cudaDevAttrClockRate, 0));
  const int blocks = device.multiProcessorCount * 8, threads = 256;
  const size_t large = size_t(2) << 30;
  uint4 *from, *to;
  unsigned* sink;
  CHECK(cudaMalloc(&from, large));
  CHECK(cudaMalloc(&to, large));
  CHECK(cudaMalloc(&sink, 4096));
  CHECK(cudaMemset(from, 0x5a, large));
  CHECK(cudaMemset(to, 0, large));
  CHECK(cudaMemset(sink, 0, 4096));

  std::printf("{\"gpu\": \"%s\", \"sm\": %d, \"multiprocessors\": %d, \"l2_bytes\": %d, \"shared_bytes_per_block\": %zu,\n",
              device.name, device.major * 10 + device.minor, device.multiProcessorCount, device.l2CacheSize,
              device.sharedMemPerBlockOptin);
  const double read = microseconds(0, 10, [&] { read_kernel<<<blocks, threads>>>(from, large / 16, 1, sink); });
  const double copy = microseconds(0, 10, [&] { copy_kernel<<<blocks, threads>>>(from, to, large / 16); });
  std::printf(" \"read_gb_per_s\": %.1f, \"copy_gb_per_s\": %.1f,\n", large / read / 1e3, 2.0 * large / copy / 1e3);

  std::printf(" \"l2_read_gb_per_s\": {");
  const int sizes[] = {1, 4, 8, 16, 24, 32, 40, 48, 56, 64, 80, 128, 256};
  for (size_t index = 0; index < sizeof(sizes) / sizeof(*sizes); ++index) {
    const size_t bytes = size_t(sizes[index]) << 20;
    const int repeats = int(std::max<size_t>(4, (size_t(2) << 30) / bytes));
    const double time = microseconds(0, 5, [&] { read_kernel<<<blocks, threads>>>(from, bytes / 16, repeats, sink); });
    std::printf("%s\"%d MiB\": %.1f", index ? ", " : "", sizes[index], double(bytes) * repeats / time / 1e3);
  }
  std::printf("},\n");

  int rounds = 2000;
  void* arguments[] = {&rounds};
  const double barrier = microseconds(0, 5, [&] {
    CHECK(cudaLaunchCooperativeKernel((void*)barrier_kernel, dim3(device.multiProcessorCount), dim3(128), arguments, 0, 0));
  });
  const double flag = microseconds(0, 5, [&] {
    CHECK(cudaMemsetAsync(sink, 0, 4096));
    flag_kernel<<<2, 32>>>(sink, rounds);
  });
  std::printf(" \"grid_barrier_us\": %.3f, \"flag_hop_us\": %.3f,\n", barrier / rounds, flag / (2.0 * rounds));
  if (device.major >= 9) {
    const double cluster = microseconds(0, 5, [&] { cluster_kernel<<<2, 32>>>(rounds); });
    std::printf(" \"cluster_hop_us\": %.3f, \"graph_kernel_dependent_us\": %.3f,\n", cluster / (2.0 * rounds),
                graph_kernel_microseconds(true, 200));
  }
  std::printf(" \"graph_kernel_us\": %.3f}\n", graph_kernel_microseconds(false, 200));
  CHECK(cudaDeviceSynchronize());
  CHECK(cudaFree(from));
  CHECK(cudaFree(to));
  CHECK(cudaFree(sink));
  return 0;
}
