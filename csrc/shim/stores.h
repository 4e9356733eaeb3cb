// Relaxed stores on their way: a block's are seen by itself at once, by the others later, word by word and in no order.
//
// That is all that a GPU promises: st.relaxed of 16 bytes is four stores, and neither they nor two stores of a thread arrive in
// the order in which they were written, unless a fence or a barrier of both sides lies between.
#pragma once

#include <cstdint>
#include <random>
#include <vector>

namespace fusedprompt::shim {

class Stores {
 public:
  explicit Stores(size_t blocks, uint64_t seed) : under_way_(blocks), random_(seed) {}

  void put(size_t block, uint32_t* address, uint32_t value) {
    arrive(block, address, 4);  // stores to the same word keep their order
    under_way_[block].push_back({address, value});
  }

  // The words at an address as a block sees them.
  void load(size_t block, const uint32_t* address, uint32_t* words, int count) const {
    for (int i = 0; i < count; ++i) words[i] = address[i];
    for (const Store& store : under_way_[block]) {
      if (store.address >= address && store.address < address + count) words[store.address - address] = store.value;
    }
  }

  // Before a plain access of the block that stored.
  void arrive(size_t block, const void* address, size_t bytes) {
    for (size_t i = 0; i < under_way_[block].size();) {
      const auto word = uintptr_t(under_way_[block][i].address), from = uintptr_t(address);
      if (word < from + bytes && from < word + 4) {
        arrive_one(block, i);
      } else {
        ++i;
      }
    }
  }

  void arrive_all(size_t block) {
    while (!under_way_[block].empty()) arrive_one(block, under_way_[block].size() - 1);
  }

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

  int64_t arrived() const { return arrived_; }  // so far

 private:
  struct Store {
    uint32_t* address;
    uint32_t value;
  };

  void arrive_one(size_t block, size_t index) {
    std::vector<Store>& stores = under_way_[block];
    *stores[index].address = stores[index].value;
    stores[index] = stores.back();
    stores.pop_back();
    ++arrived_;
  }

  std::vector<std::vector<Store>> under_way_;
  std::mt19937_64 random_;
  int64_t arrived_ = 0;
};

}  // namespace fusedprompt::shim
