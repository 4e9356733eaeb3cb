// What runs a kernel on the CPU: fibers.cpp switches its threads, memory.cpp carries out and watches their accesses.
#pragma once

#include <ucontext.h>

#include <deque>
#include <map>
#include <memory>
#include <vector>

#include "device.h"
#include "races.h"
#include "stores.h"

namespace fusedprompt::shim {

constexpr size_t kStack = 128 << 10;

// Threads that wait for each other. The last to arrive lets all go on.
struct Group {
  int members = 0, arrived = 0, left = 0;
  int64_t generation = 0;
  uint32_t values[2][32] = {};  // of a warp's shuffle; two, because fast lanes may be one shuffle ahead
  int expected = 0;             // which shuffle the first lane came to
  Handover handover;            // of a barrier; a shuffle hands nothing over
};

struct Fiber {
  ucontext_t context;
  Self self;
  size_t index, block_index;
  Group *warp, *block, *cluster;
  Group* waiting_for = nullptr;
  int64_t waiting_since = 0;  // the generation it waits to pass
  int64_t polls_step = -1, barriers = 0;
  Released released;
  const char* where = "running";
  bool finished = false;
  std::deque<std::vector<std::pair<uint4*, const uint4*>>> copies{1};  // groups of those that are under way
  void* fake_stack = nullptr;
};

struct Machine {
  const char* name;
  const std::function<void()>* body;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Group> warps, blocks, clusters;
  std::vector<std::unique_ptr<unsigned char[]>> shared;  // exactly as large as asked for, so that ASan sees the end
  size_t shared_bytes;
  unsigned cluster_size;
  Fiber* running = nullptr;
  ucontext_t scheduler;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_size = 0;
  unsigned char* stacks = nullptr;
  std::unique_ptr<Stores> stores;
  int64_t events = 0, published = 0;
  std::map<const uint64_t*, Handover> arrivals;  // of each mbarrier
  std::string error;
};

extern Machine* machine;  // while a kernel runs
extern Races races;       // across launches, because a fill before one is read in it
extern bool watching;     // whether plain accesses are seen

}  // namespace fusedprompt::shim
