// The scheduler behind shim/device.h: one ucontext fiber for each CUDA thread, and a watchdog.
//
// A fiber runs until it must wait: at a barrier or in a shuffle for the others of its group, in a poll for a word of another
// block. Nothing outside can change memory, so if every fiber that could run has polled once and nothing happened, nothing ever
// will: that is a deadlock, found at once and without a clock.
#include <sys/mman.h>
#include <ucontext.h>

#include <random>
#include <sstream>

#include "machine.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace fusedprompt::shim {

Settings settings;
int64_t launches = 0, queries = 0, barriers = 0;

Machine* machine = nullptr;

namespace {

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
  if (fiber.copies.size() > 1 || !fiber.copies.back().empty()) machine->error = "a thread ended with a copy under way";
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
  const auto stop_if_wrong = [] {
    if (!machine->error.empty()) throw std::runtime_error(std::string(machine->name) + ": " + machine->error);
  };
  while (!order.done()) {
    const int64_t before = happened();
    machine->stores->drift();
    stop_if_wrong();
    for (const size_t index : order.next_round()) {
      Fiber& fiber = *machine->fibers[index];
      if (order.sleeps(fiber)) continue;
      if (fiber.waiting_for && fiber.waiting_for->generation == fiber.waiting_since) continue;
      run_fiber(index);
      stop_if_wrong();
    }
    if (happened() == before && !order.done() && !machine->stores->arrive_any() && settings.most_polls < 0) {
      if (order.all_awake()) throw std::runtime_error(report());
      order.wake_all();
    }
  }
  while (machine->stores->arrive_any()) {
  }
  stop_if_wrong();
}

}  // namespace

const Self& self() { return machine->running->self; }
unsigned char* shared_memory() { return machine->shared[machine->running->block_index].get(); }
void block_barrier() { meet(*machine->running->block, "a block barrier", true); }
void cluster_barrier() {
  machine->stores->arrive_all(machine->running->block_index);
  meet(*machine->running->cluster, "a cluster barrier", true);
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

void give_up(int64_t step) {
  std::ostringstream text;
  text << "block " << self().block << " waited in vain in step " << step;
  machine->error = text.str();
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
}

}  // namespace fusedprompt::shim
