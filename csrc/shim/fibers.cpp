// The scheduler behind shim/device.h: one ucontext fiber for each CUDA thread, and a watchdog.
//
// A fiber runs until it must wait: at a barrier or in a shuffle for the others of its group, in a poll for a word of another
// block. Nothing outside can change memory, so if every fiber that could run has polled once and nothing happened, nothing ever
// will: that is a deadlock, found at once and without a clock.
//
// g++ -fsanitize=thread calls a function before each load and store of the kernels. These functions are defined at the end of
// this file, in place of the sanitizer's own library: so plain accesses are seen, and kernels need no accessors for them.
#include <pthread.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <memory>
#include <random>
#include <sstream>
#include <vector>

#include "device.h"
#include "races.h"
#include "stores.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace fusedprompt::shim {

Settings settings;
int64_t launches = 0, barriers = 0;

namespace {

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
  const char* where = "running";
  bool finished = false;
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
  std::string error;
};

struct Named {
  uintptr_t address;
  size_t bytes;
  const char* name;
};

Machine* machine = nullptr;  // while a kernel runs
Races races;                 // across launches, because a fill before one is read in it
std::vector<Named> named;
bool watching = false;       // whether plain accesses are seen

unsigned char* stack_of(size_t index) { return machine->stacks + index * kStack; }

void to_scheduler(bool last) {
  Fiber& fiber = *machine->running;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(last ? nullptr : &fiber.fake_stack, machine->scheduler_stack,
                                 machine->scheduler_stack_size);
#endif
  swapcontext(&fiber.context, &machine->scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fiber.fake_stack, nullptr, nullptr);
#endif
  (void)last;
}

void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &machine->scheduler_stack, &machine->scheduler_stack_size);
#endif
  Fiber& fiber = *machine->running;
  (*machine->body)();
  fiber.finished = true;
  for (Group* group : {fiber.warp, fiber.block, fiber.cluster}) {
    ++group->left;
    if (group->arrived > 0) machine->error = "a thread ended while others wait for it at a barrier or in a shuffle";
  }
  ++machine->events;
  to_scheduler(true);
}

void run_fiber(size_t index) {
  machine->running = machine->fibers[index].get();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&machine->scheduler_fake_stack, stack_of(index), kStack);
#endif
  swapcontext(&machine->scheduler, &machine->running->context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(machine->scheduler_fake_stack, nullptr, nullptr);
#endif
  machine->running = nullptr;
}

void add_fiber(size_t index, unsigned threads, unsigned blocks) {
  machine->fibers.emplace_back(new Fiber());
  Fiber& fiber = *machine->fibers.back();
  const size_t block = index / threads;
  fiber.self = {int(index % threads), int(threads), int(block % blocks), int(block / blocks)};
  fiber.index = index;
  fiber.block_index = block;
  fiber.warp = &machine->warps[index / 32];
  fiber.block = &machine->blocks[block];
  fiber.cluster = &machine->clusters[block / machine->cluster_size];
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack_of(index);
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
}

// Waits for the others of the group. A barrier also orders: what each did before it is seen by all behind it.
void meet(Group& group, const char* where, bool barrier) {
  Fiber& fiber = *machine->running;
  const bool orders = barrier && fiber.barriers++ != settings.deaf_barrier && watching;
  if (group.left > 0) machine->error = "a thread waits at a barrier or in a shuffle for one that has ended";
  if (orders) races.arrive(fiber.index, group.handover);
  if (++group.arrived == group.members) {
    group.arrived = 0;
    ++group.generation;
    ++machine->events;
    if (orders) group.handover.open();
  } else {
    fiber.waiting_for = &group;
    fiber.waiting_since = group.generation;
    fiber.where = where;
    to_scheduler(false);
    fiber.waiting_for = nullptr;
    fiber.where = "running";
  }
  if (orders) races.leave(fiber.index, group.handover);
}

// ---- accesses to memory ----

void describe(std::ostream& text, const Access& access) {
  const Fiber& fiber = *machine->fibers[access.thread];
  text << (access.relaxed ? "relaxed " : "plain ") << (access.writes ? "store" : "load") << " by block "
       << fiber.block_index << " thread " << fiber.self.thread << " behind its barrier " << access.moment - 1;
}

void describe(std::ostream& text, uintptr_t address) {
  for (size_t block = 0; block < machine->shared.size(); ++block) {
    const uintptr_t start = uintptr_t(machine->shared[block].get());
    if (address - start < machine->shared_bytes) {
      text << "shared memory of block " << block << ", byte " << address - start;
      return;
    }
  }
  for (const Named& memory : named) {
    if (address - memory.address < memory.bytes) {
      text << memory.name << ", byte " << address - memory.address;
      return;
    }
  }
  text << "address 0x" << std::hex << address << std::dec;
}

void complain(const char* what, uintptr_t address, const Access& access, const Access* other) {
  if (!machine->error.empty()) return;
  std::ostringstream text;
  text << what << " at ";
  describe(text, address);
  text << ": ";
  describe(text, access);
  if (machine->running->polls_step >= 0) text << " at step " << machine->running->polls_step;
  if (other) {
    text << ", and nothing orders it behind the ";
    describe(text, *other);
  }
  machine->error = text.str();
}

// Stacks are each thread's own: the fibers', and the host thread's, which holds the arguments of the launch.
bool on_a_stack(uintptr_t address) {
  static thread_local uintptr_t host = 0;
  static thread_local size_t host_bytes = 0;
  if (host_bytes == 0) {
    pthread_attr_t attributes;
    void* start = nullptr;
    if (pthread_getattr_np(pthread_self(), &attributes) != 0) throw std::runtime_error("no bounds of the stack");
    pthread_attr_getstack(&attributes, &start, &host_bytes);
    pthread_attr_destroy(&attributes);
    host = uintptr_t(start);
  }
  return address - uintptr_t(machine->stacks) < machine->fibers.size() * kStack || address - host < host_bytes;
}

void access(const void* where, size_t bytes, bool writes, bool relaxed) {
  const uintptr_t address = uintptr_t(where);
  if (!watching || !machine || !machine->running || on_a_stack(address)) return;
  watching = false;  // what is done here is no kernel's, though it may share templates that are instrumented
  const Fiber& fiber = *machine->running;
  if (!relaxed) machine->stores->arrive(fiber.block_index, where, bytes);
  const Access now{uint32_t(fiber.index), races.moment(fiber.index), writes, relaxed};
  if (const Access* other = races.access(now, address, bytes)) complain("race", address, now, other);
  if (relaxed && !writes && !races.set(address, bytes)) complain("poll of what was not set", address, now, nullptr);
  for (size_t block = 0; block < machine->blocks.size(); ++block) {
    const bool inside = address - uintptr_t(machine->shared[block].get()) < machine->shared_bytes;
    if (inside && machine->blocks[block].left == machine->blocks[block].members) {
      complain("access behind the end of its block", address, now, nullptr);
    }
  }
  watching = true;
}

std::string report() {
  std::ostringstream text;
  int64_t step = -1, polling = 0, waiting = 0;
  const Fiber* first = nullptr;
  for (const auto& fiber : machine->fibers) {
    if (fiber->finished) continue;
    if (fiber->waiting_for) {
      ++waiting;
    } else {
      ++polling;
      if (!first || fiber->polls_step < step) {
        first = fiber.get();
        step = fiber->polls_step;
      }
    }
  }
  text << "deadlock in " << machine->name << " at step " << step << ": " << polling << " threads poll, " << waiting
       << " wait";
  if (first) text << "; block " << first->self.block << " thread " << first->self.thread << " polls";
  for (const auto& fiber : machine->fibers) {
    if (!fiber->finished && fiber->waiting_for) {
      text << "; block " << fiber->self.block << " thread " << fiber->self.thread << " is in " << fiber->where;
      break;
    }
  }
  return text.str();
}

// With a seed, fibers run in random order, and for some rounds at a time random blocks do not run at all: so blocks drift apart
// as far as their barriers let them, which is where a missing barrier or buffer shows.
class Order {
 public:
  explicit Order(size_t fibers, size_t blocks) : asleep_(blocks, false), random_(settings.seed) {
    for (size_t index = 0; index < fibers; ++index) left_.push_back(index);
  }

  bool done() const { return left_.empty(); }
  bool all_awake() const { return std::find(asleep_.begin(), asleep_.end(), true) == asleep_.end(); }
  void wake_all() {
    std::fill(asleep_.begin(), asleep_.end(), false);
    rounds_left_ = 1;
  }

  const std::vector<size_t>& next_round() {
    left_.erase(std::remove_if(left_.begin(), left_.end(), [](size_t i) { return machine->fibers[i]->finished; }),
                left_.end());
    if (settings.seed != 0) {
      std::shuffle(left_.begin(), left_.end(), random_);
      if (rounds_left_-- == 0) {
        rounds_left_ = random_() % 24;
        for (size_t block = 0; block < asleep_.size(); ++block) asleep_[block] = random_() % 2 == 0;
      }
    }
    return left_;
  }
  bool sleeps(const Fiber& fiber) const { return asleep_[fiber.block_index]; }

 private:
  std::vector<size_t> left_;
  std::vector<bool> asleep_;
  std::mt19937_64 random_;
  uint64_t rounds_left_ = 0;
};

void schedule() {
  Order order(machine->fibers.size(), machine->blocks.size());
  const auto happened = [] { return machine->events + machine->stores->arrived(); };
  while (!order.done()) {
    const int64_t before = happened();
    machine->stores->drift();
    for (const size_t index : order.next_round()) {
      Fiber& fiber = *machine->fibers[index];
      if (order.sleeps(fiber)) continue;
      if (fiber.waiting_for && fiber.waiting_for->generation == fiber.waiting_since) continue;
      run_fiber(index);
      if (!machine->error.empty()) throw std::runtime_error(std::string(machine->name) + ": " + machine->error);
    }
    if (happened() == before && !order.done() && !machine->stores->arrive_any()) {
      if (order.all_awake()) throw std::runtime_error(report());
      order.wake_all();
    }
  }
}

}  // namespace

const Self& self() { return machine->running->self; }
unsigned char* shared_memory() { return machine->shared[machine->running->block_index].get(); }
void block_barrier() { meet(*machine->running->block, "a block barrier", true); }
void cluster_barrier() {
  machine->stores->arrive_all(machine->running->block_index);
  meet(*machine->running->cluster, "a cluster barrier", true);
}

uint4 load_relaxed(const uint4* address) {
  access(address, sizeof *address, false, true);
  uint4 words;
  machine->stores->load(machine->running->block_index, &address->x, &words.x, 4);
  return words;
}

void store_relaxed(uint32_t* address, uint32_t word) {
  access(address, sizeof *address, true, true);
  if (machine->published++ == settings.lose_store_at) return;
  machine->stores->put(machine->running->block_index, address, word);
  if (settings.seed == 0) machine->stores->arrive_all(machine->running->block_index);
  ++machine->events;
}

void name_memory(const void* address, size_t bytes, const char* name) {
  named.push_back({uintptr_t(address), bytes, name});
}

void fill(void* address, int byte, size_t bytes) {
  memset(address, byte, bytes);
  if (watching) races.filled(uintptr_t(address), bytes);
}

uint32_t exchange_in_warp(uint32_t value, int from_lane, int expected) {
  Group& warp = *machine->running->warp;
  if (warp.arrived == 0) warp.expected = expected;
  if (warp.expected != expected && expected < 64) machine->error = "lanes of a warp are in different shuffles";
  const int64_t side = warp.generation % 2;
  warp.values[side][self().thread % 32] = value;
  meet(warp, "a shuffle", false);
  return warp.values[side][from_lane];
}

void wait_in_poll(int64_t step) {
  machine->running->polls_step = step;
  to_scheduler(false);
}

unsigned char* in_cluster(unsigned char* address, int rank) {
  const size_t own = machine->running->block_index, first = own / machine->cluster_size * machine->cluster_size;
  return machine->shared[first + size_t(rank)].get() + (address - machine->shared[own].get());
}

void run(const char* name, unsigned blocks, unsigned blocks_y, unsigned threads, unsigned cluster, size_t shared_bytes,
         const std::function<void()>& thread_body) {
  Machine here;
  here.name = name;
  here.body = &thread_body;
  here.cluster_size = cluster;
  here.shared_bytes = shared_bytes;
  const size_t block_count = size_t(blocks) * blocks_y, count = block_count * threads;
  here.warps.resize(block_count * (threads / 32));
  here.blocks.resize(block_count);
  here.clusters.resize(block_count / cluster);
  for (Group& warp : here.warps) warp.members = 32;
  for (Group& block : here.blocks) block.members = int(threads);
  for (Group& group : here.clusters) group.members = int(threads * cluster);
  for (size_t block = 0; block < block_count; ++block) {
    here.shared.emplace_back(new unsigned char[shared_bytes]);
    poison(here.shared.back().get(), shared_bytes);
  }
  void* stacks = mmap(nullptr, count * kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stacks == MAP_FAILED) throw std::runtime_error("no memory for fibers");
  const std::unique_ptr<void, std::function<void(void*)>> owner(stacks, [=](void* s) { munmap(s, count * kStack); });
  here.stacks = static_cast<unsigned char*>(stacks);
  here.stores = std::make_unique<Stores>(block_count, settings.seed);
  races.begin(count);
  machine = &here;
  const std::unique_ptr<Machine, void (*)(Machine*)> until_the_end(&here, [](Machine*) { machine = nullptr; });
  for (size_t index = 0; index < count; ++index) add_fiber(index, threads, blocks);
  schedule();
  barriers = here.fibers[0]->barriers;
  while (here.stores->arrive_any()) {
  }
}

}  // namespace fusedprompt::shim

// ---- what g++ -fsanitize=thread calls ----

#define FP_SEEN(bytes)                                                                                             \
  void __tsan_read##bytes(void* at) { fusedprompt::shim::access(at, bytes, false, false); }                        \
  void __tsan_write##bytes(void* at) { fusedprompt::shim::access(at, bytes, true, false); }                        \
  void __tsan_unaligned_read##bytes(void* at) { fusedprompt::shim::access(at, bytes, false, false); }              \
  void __tsan_unaligned_write##bytes(void* at) { fusedprompt::shim::access(at, bytes, true, false); }

extern "C" {
FP_SEEN(1) FP_SEEN(2) FP_SEEN(4) FP_SEEN(8) FP_SEEN(16)
void __tsan_read_range(void* at, size_t bytes) { fusedprompt::shim::access(at, bytes, false, false); }
void __tsan_write_range(void* at, size_t bytes) { fusedprompt::shim::access(at, bytes, true, false); }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() { fusedprompt::shim::watching = true; }
}
