// Accesses to memory behind shim/device.h: relaxed stores and sent words that arrive late, and a look at every access.
//
// g++ -fsanitize=thread calls a function before each load and store of the kernels. These functions are defined at the end of
// this file, in place of the sanitizer's own library: so plain accesses are seen, and kernels need no accessors for them.
#include <pthread.h>

#include <sstream>

#include "machine.h"

namespace fusedprompt::shim {

Races races;
bool watching = false;

namespace {

struct Named {
  uintptr_t address;
  size_t bytes;
  const char* name;
};

std::vector<Named> named;

void describe(std::ostream& text, const Access& access) {
  const bool sent = access.thread >= machine->fibers.size();
  const Fiber& fiber = *machine->fibers[access.thread % machine->fibers.size()];
  text << (sent ? "sent " : access.relaxed ? "relaxed " : "plain ") << (access.writes ? "store" : "load") << " by block "
       << fiber.block_index << " thread " << fiber.self.thread;
  if (!sent) text << " behind its barrier " << access.moment - 1;
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
  if (machine->running && machine->running->polls_step >= 0) text << " at step " << machine->running->polls_step;
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

bool has_ended(size_t block) { return machine->blocks[block].left == machine->blocks[block].members; }

void check(const Access& now, uintptr_t address, size_t bytes) {
  if (const Access* other = races.access(now, address, bytes)) complain("race", address, now, other);
  if (now.relaxed && !now.writes && !races.set(address, bytes)) complain("poll of what was not set", address, now, nullptr);
  for (size_t block = 0; block < machine->blocks.size(); ++block) {
    const bool inside = address - uintptr_t(machine->shared[block].get()) < machine->shared_bytes;
    if (inside && has_ended(block)) complain("access behind the end of its block", address, now, nullptr);
  }
}

void access(const void* where, size_t bytes, bool writes, bool relaxed) {
  const uintptr_t address = uintptr_t(where);
  if (!watching || !machine || !machine->running || on_a_stack(address)) return;
  watching = false;  // what is done here is no kernel's, though it may share templates that are instrumented
  const Fiber& fiber = *machine->running;
  if (!relaxed) machine->stores->arrive(fiber.block_index, where, bytes);
  check({uint32_t(fiber.index), races.moment(fiber.index), writes, relaxed}, address, bytes);
  watching = true;
}

// An mbarrier in its 8 bytes. Bytes may come before they are expected: then `bytes` is below 0.
struct Arrivals {
  int32_t bytes;
  uint8_t count, pending, parity, unused;
};

void fail(const char* what) {
  if (machine->error.empty()) machine->error = what;
}

Handover& handover_of(const uint64_t* address) {
  const auto [found, is_new] = machine->arrivals.try_emplace(address);
  if (is_new) fail("an mbarrier is used that nobody began");
  return found->second;
}

Arrivals arrivals_at(const uint64_t* address) {
  handover_of(address);
  Arrivals arrivals;
  memcpy(&arrivals, address, sizeof arrivals);
  return arrivals;
}

void change(uint64_t* address, int arrived, int bytes) {
  Arrivals arrivals = arrivals_at(address);
  if (arrived > arrivals.pending) fail("more threads arrive in a phase of an mbarrier than it counts");
  arrivals.pending = uint8_t(arrivals.pending - arrived);
  arrivals.bytes += bytes;
  if (arrivals.pending == 0 && arrivals.bytes == 0) {
    arrivals.parity ^= 1;
    arrivals.pending = arrivals.count;
    ++machine->events;
    if (watching) handover_of(address).open();
  }
  memcpy(address, &arrivals, sizeof arrivals);
}

template <typename T>
T* in_cluster(T* address, int rank) {
  const size_t own = machine->running->block_index, first = own / machine->cluster_size * machine->cluster_size;
  const size_t at = size_t(reinterpret_cast<unsigned char*>(address) - machine->shared[own].get());
  return reinterpret_cast<T*>(machine->shared[first + size_t(rank)].get() + at);
}

void copy(uint4* to, const uint4* from) {
  if (from) access(from, sizeof *from, false, false);
  access(to, sizeof *to, true, false);
  *to = from ? *from : uint4{0, 0, 0, 0};
}

}  // namespace

uint4 load_relaxed(const uint4* address) {
  access(address, sizeof *address, false, true);
  uint4 words;
  machine->stores->load(machine->running->block_index, &address->x, &words.x, 4);
  return words;
}

void store_relaxed(uint32_t* address, uint32_t word) {
  access(address, sizeof *address, true, true);
  if (machine->published++ == settings.lose_store_at) return;
  machine->stores->put(machine->running->block_index, address, word, nullptr);
  if (settings.seed == 0) machine->stores->arrive_all(machine->running->block_index);
  ++machine->events;
}

void name_memory(const void* address, size_t bytes, const char* name) {
  named.push_back({uintptr_t(address), bytes, name});
}

void fill(void* address, int byte, size_t bytes) {
  if (settings.lose_fills) return;
  memset(address, byte, bytes);
  if (watching) races.filled(uintptr_t(address), bytes);
}

// A copy is made at some time between its issue and the wait for it: without a seed as late as can be.
void copy_later(uint4* to, const uint4* from) {
  if (settings.seed != 0 && machine->stores->coin()) {
    copy(to, from);
  } else {
    access(to, sizeof *to, true, false);
    machine->running->copies.back().emplace_back(to, from);
  }
}
void end_copy_group() { machine->running->copies.emplace_back(); }
void wait_for_copies(size_t left) {
  auto& copies = machine->running->copies;
  while (copies.size() > left + 1) {  // the last one has not ended
    for (const auto& [to, from] : copies.front()) copy(to, from);
    copies.pop_front();
  }
}

int rank_in_cluster() { return int(machine->running->block_index % machine->cluster_size); }

void begin_arrivals(uint64_t* arrivals, int count) {
  access(arrivals, sizeof *arrivals, true, false);
  const Arrivals start{0, uint8_t(count), uint8_t(count), 0, 0};
  memcpy(arrivals, &start, sizeof start);
  if (!machine->arrivals.try_emplace(arrivals).second) fail("an mbarrier is begun twice");
}

void release_shared() {
  if (watching) machine->running->released = races.release(machine->running->index);
}

void arrive_expecting(uint64_t* arrivals, uint32_t bytes) {
  access(arrivals, sizeof *arrivals, true, true);
  if (watching) races.arrive(machine->running->released, handover_of(arrivals));
  change(arrivals, 1, int(bytes));
}
void arrive(uint64_t* arrivals, int rank) { arrive_expecting(in_cluster(arrivals, rank), 0); }

void send(uint32_t* address, uint32_t word, uint64_t* arrivals, int rank) {
  uint32_t* const to = in_cluster(address, rank);
  uint64_t* const at = in_cluster(arrivals, rank);
  const size_t block = size_t(machine->running->block_index / machine->cluster_size * machine->cluster_size + size_t(rank));
  const Access now = races.send(machine->running->index);
  if (watching) {
    check(now, uintptr_t(to), sizeof *to);
    check({now.thread, now.moment, true, true}, uintptr_t(at), sizeof *at);
  }
  if (machine->published++ == settings.lose_store_at) return;
  machine->stores->put(machine->running->block_index, to, word, [=] {
    if (has_ended(block)) complain("word sent to a block that has ended", uintptr_t(to), now, nullptr);
    if (watching) races.arrive(now, handover_of(at));
    change(at, 0, -4);
  });
  if (settings.seed == 0) machine->stores->arrive_sent(machine->running->block_index);
  ++machine->events;
}

bool arrived(const uint64_t* arrivals, uint32_t parity) {
  access(arrivals, sizeof *arrivals, false, true);
  if (arrivals_at(arrivals).parity == parity) return false;
  if (watching) races.leave(machine->running->index, handover_of(arrivals));
  return true;
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
