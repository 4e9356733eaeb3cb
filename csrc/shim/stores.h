// Relaxed stores on their way: a block's are seen by itself at once, by the others later, word by word and in no order.
//
// That is all that a GPU promises: st.relaxed of 16 bytes is four stores, and neither they nor two stores of a thread arrive in
// the order in which they were written, unless a fence or a barrier of both sides lies between.
#pragma once

#include <cstdint>
#include <functional>
#include <random>
#include <utility>
#include <vector>

namespace fusedprompt::shim {

class Stores {
 public:
  explicit Stores(size_t blocks, uint64_t seed) : under_way_(blocks), random_(seed) {}

  // `then`, of a word that is sent: what its arrival does. No barrier waits for such a word, and its sender does not see it.
  void put(size_t block, uint32_t* address, uint32_t value, std::function<void()> then) {
    arrive(block, address, 4);  // stores to the same word keep their order
    under_way_[block].push_back({address, value, std::move(then)});
  }

  // The words at an address as a block sees them.
  void load(size_t block, const uint32_t* address, uint32_t* words, int count) const {
    for (int i = 0; i < count; ++i) words[i] = address[i];
    for (const Store& store : under_way_[block]) {
      if (!store.then && store.address >= address && store.address < address + count) words[store.address - address] = store.value;
    }
  }

  // Before a plain access of the block that stored.
  void arrive(size_t block, const void* address, size_t bytes) {
    for (size_t i = 0; i < under_way_[block].size();) {
      const auto word = uintptr_t(under_way_[block][i].address), from = uintptr_t(address);
      if (!under_way_[block][i].then && word < from + bytes && from < word + 4) {
        arrive_one(block, i);
      } else {
        ++i;
      }
    }
  }

  void arrive_all(size_t block) { arrive_those(block, false); }
  void arrive_sent(size_t block) { arrive_those(block, true); }

  // Some time passes: of some blocks a few words arrive, of some all but a few, of the others none.
  void drift() {
    for (size_t block = 0; block < under_way_.size(); ++block) {
      const size_t waiting = under_way_[block].size(), some = random_() % 4;
      const size_t left = some == 0 ? waiting - (waiting + 7) / 8 : some == 1 ? waiting / 8 : waiting;
      while (under_way_[block].size() > left) arrive_one(block, random_() % under_way_[block].size());
    }
  }

  // A store arrives in the end, whatever else happens. Returns false if none is under way.
  bool arrive_any() {
    for (size_t block = 0; block < under_way_.size(); ++block) {
      if (under_way_[block].empty()) continue;
      arrive_one(block, random_() % under_way_[block].size());
      return true;
    }
    return false;
  }

  bool coin() { return random_() % 2 == 0; }
  int64_t arrived() const { return arrived_; }  // so far

 private:
  struct Store {
    uint32_t* address;
    uint32_t value;
    std::function<void()> then;
  };

  void arrive_those(size_t block, bool sent) {
    for (size_t i = under_way_[block].size(); i-- > 0;) {
      if (bool(under_way_[block][i].then) == sent) arrive_one(block, i);
    }
  }

  void arrive_one(size_t block, size_t index) {
    std::vector<Store>& stores = under_way_[block];
    const Store store = std::move(stores[index]);
    if (index + 1 < stores.size()) stores[index] = std::move(stores.back());
    stores.pop_back();
    ++arrived_;
    *store.address = store.value;
    if (store.then) store.then();
  }

  std::vector<std::vector<Store>> under_way_;
  std::mt19937_64 random_;
  int64_t arrived_ = 0;
};

}  // namespace fusedprompt::shim
