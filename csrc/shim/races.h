// Finds accesses to the same memory that nothing orders: vector clocks, as in a race detector for CPU threads.
//
// Only barriers order anything, and phases of mbarriers. Two accesses to a word race if they come from different threads, one of
// them writes, neither lies between them and they are not both relaxed. So a plain read of what another block wrote in the same
// launch is a race whenever it happens to run, and so are a missing barrier, a missing release, and a store into another block's
// shared memory that its owner may still be reading. A shuffle orders nothing: PTX does not promise that it does. A release
// tells of all memory here; the kernels' tells of shared memory alone, so do not rely on it for global memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <unordered_map>
#include <unordered_set>
#include <vector>

namespace fusedprompt::shim {

// For each thread: up to which of its moments everything that it did is over and seen. A thread's moments count its barriers.
using Past = std::shared_ptr<const std::vector<uint32_t>>;

inline Past joined(const Past& a, const Past& b) {
  auto result = std::make_shared<std::vector<uint32_t>>(*a);
  for (size_t i = 0; i < result->size(); ++i) (*result)[i] = std::max((*result)[i], (*b)[i]);
  return result;
}

// What the threads that arrive at a barrier bring along, and take with them when it opens. Nearly all threads arrive with the
// same past, so each different one is joined once.
struct Handover {
  std::vector<uint32_t> brought;
  Past last_brought, opened, taken_from, taken;

  void open() {
    opened = std::make_shared<const std::vector<uint32_t>>(std::move(brought));
    brought.clear();
    last_brought = taken_from = nullptr;
  }
};

// What a thread's fence made ready for those that it tells later. Empty before any fence.
struct Released {
  size_t thread = 0;
  Past past;
  uint32_t moment = 0;
};

struct Access {
  uint32_t thread, moment;
  bool writes, relaxed;
};

class Races {
 public:
  void begin(size_t threads) {
    const Past nothing = std::make_shared<const std::vector<uint32_t>>(2 * threads, 0);
    threads_.assign(2 * threads, {nothing, 1});
    pages_.clear();
    last_page_ = nullptr;
  }

  void arrive(size_t thread, Handover& at) { arrive(release(thread), at); }

  Released release(size_t thread) { return {thread, threads_[thread].past, threads_[thread].moment++}; }

  void arrive(const Released& released, Handover& at) {
    at.brought.resize(threads_.size());
    if (!released.past) return;
    if (at.last_brought != released.past) {
      for (size_t i = 0; i < at.brought.size(); ++i) at.brought[i] = std::max(at.brought[i], (*released.past)[i]);
      at.last_brought = released.past;
    }
    uint32_t& moment = at.brought[released.thread];
    moment = std::max(moment, released.moment);
  }

  // A word that is sent is stored by nobody's thread: behind all that its sender did, but told of by its own arrival alone. Each
  // sender has a second thread for its words.
  Access send(size_t thread) {
    const size_t words = threads_.size() / 2 + thread;
    auto past = std::make_shared<std::vector<uint32_t>>(*threads_[thread].past);
    (*past)[thread] = threads_[thread].moment;
    threads_[words].past = past;
    return {uint32_t(words), threads_[words].moment++, true, false};
  }

  void arrive(const Access& sent, Handover& at) {
    at.brought.resize(threads_.size());
    at.brought[sent.thread] = std::max(at.brought[sent.thread], sent.moment);
  }

  void leave(size_t thread, Handover& at) {
    Past& past = threads_[thread].past;
    if (!at.opened) return;
    if (at.taken_from != past) {
      at.taken_from = past;
      at.taken = joined(past, at.opened);
    }
    past = at.taken;
  }

  uint32_t moment(size_t thread) const { return threads_[thread].moment; }

  // Notes an access and returns an earlier one that it races with, or nullptr. Memory is looked at in pieces of 2 bytes, the
  // smallest that a kernel stores.
  const Access* access(Access now, uintptr_t address, size_t bytes) {
    for (uintptr_t piece = address / 2; piece <= (address + bytes - 1) / 2; ++piece) {
      if (now.writes) filled_.erase(piece / 2);
      if (const Access* other = access(now, piece_at(piece))) return &(found_ = *other);
    }
    return nullptr;
  }

  // Whether each word was filled before the launch and not written since by an earlier one, or is written in it.
  bool set(uintptr_t address, size_t bytes) {
    for (uintptr_t word = address / 4; word < (address + bytes) / 4; ++word) {
      if (filled_.count(word) == 0 && piece_at(2 * word).written.moment == 0) return false;
    }
    return true;
  }
  void filled(uintptr_t address, size_t bytes) {
    for (uintptr_t word = address / 4; word < (address + bytes) / 4; ++word) filled_.insert(word);
  }

 private:
  struct Thread {
    Past past;
    uint32_t moment;
  };
  struct Piece {
    Access written{};
    std::vector<Access> read;  // since it was written, as far as no other of them tells the same
  };
  static constexpr uintptr_t kPage = 2048;  // pieces
  struct Page {
    Piece pieces[kPage];
  };

  Piece& piece_at(uintptr_t piece) {
    if (!last_page_ || last_number_ != piece / kPage) {
      std::unique_ptr<Page>& page = pages_[piece / kPage];
      if (!page) page.reset(new Page());
      last_page_ = page.get();
      last_number_ = piece / kPage;
    }
    return last_page_->pieces[piece % kPage];
  }

  const Access* access(Access now, Piece& piece) {
    const Thread& self = threads_[now.thread];
    const auto over = [&](const Access& before) {
      const bool in_order = before.thread == now.thread && now.thread < threads_.size() / 2;  // sent words have none
      return in_order || before.moment <= (*self.past)[before.thread];
    };
    const auto races = [&](const Access& before) { return !(before.relaxed && now.relaxed) && !over(before); };
    if (races(piece.written)) return &piece.written;
    if (now.writes) {
      for (const Access& before : piece.read) {
        if (races(before)) return &before;
      }
      piece.read.clear();
      piece.written = now;
    } else {
      const auto told = [&](const Access& before) { return over(before) && (before.relaxed || !now.relaxed); };
      piece.read.erase(std::remove_if(piece.read.begin(), piece.read.end(), told), piece.read.end());
      piece.read.push_back(now);
    }
    return nullptr;
  }

  std::vector<Thread> threads_;
  std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages_;
  std::unordered_set<uintptr_t> filled_;  // words
  Page* last_page_ = nullptr;
  uintptr_t last_number_ = 0;
  Access found_{};
};

}  // namespace fusedprompt::shim
