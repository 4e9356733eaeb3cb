// How the blocks hand each other the vector of a step.
//
// Through global memory (M, L): the buffer starts as all ones, a word that no result is (lstm_number.cuh). A cell stores its
// words; a block polls until no word is all ones. So the data is its own flag: one trip through L2 and no barrier. Words are
// read and written whole and relaxed; their order does not matter, because each one is checked.
// Through distributed shared memory (S): a cell sends its words into each block of the cluster, where they are counted.
#pragma once

#include "lstm_arguments.cuh"

namespace fusedprompt::device {

constexpr int kPollsAtOnce = 4;  // a thread's loads under way together: one after another they would cost a trip each

// A thread counts its own polls for the vector of the step before.
FP_DEVICE void poll_again(int64_t step, uint32_t& polls) {
  if (++polls == most_polls()) give_up(step);
  between_polls(step);
}

// Words of a 16-byte chunk that belong to a row of `words` words.
FP_DEVICE int words_in_chunk(int chunk, int words) { return min(words - 4 * chunk, 4); }

FP_DEVICE bool complete(const uint4& chunk, int words) {
  return chunk.x != kUnwritten && (words < 2 || chunk.y != kUnwritten) && (words < 3 || chunk.z != kUnwritten) &&
         (words < 4 || chunk.w != kUnwritten);
}

FP_DEVICE uint4 without_padding(const uint4& chunk, int words) {
  return {chunk.x, words < 2 ? 0 : chunk.y, words < 3 ? 0 : chunk.z, words < 4 ? 0 : chunk.w};
}

// Waits for one row of `words` words and copies it to shared memory. All threads of the block take part.
FP_DEVICE void gather(const unsigned char* row, int words, unsigned char* vector, int64_t step) {
  const uint4* from = reinterpret_cast<const uint4*>(row);
  uint4* to = reinterpret_cast<uint4*>(vector);
  const int chunks = (words + 3) / 4;
  for (int first = thread(); first < chunks; first += kPollsAtOnce * threads()) {
    uint4 arrived[kPollsAtOnce];
    bool waiting = true;
    uint32_t polls = 0;
    while (waiting) {
      waiting = false;
#pragma unroll
      for (int k = 0; k < kPollsAtOnce; ++k) {
        const int chunk = first + k * threads();
        if (chunk < chunks) arrived[k] = load_relaxed(from + chunk);
      }
#pragma unroll
      for (int k = 0; k < kPollsAtOnce; ++k) {
        const int chunk = first + k * threads();
        if (chunk < chunks && !complete(arrived[k], words_in_chunk(chunk, words))) waiting = true;
      }
      if (waiting) poll_again(step, polls);
    }
#pragma unroll
    for (int k = 0; k < kPollsAtOnce; ++k) {
      const int chunk = first + k * threads();
      if (chunk < chunks) to[chunk] = without_padding(arrived[k], words_in_chunk(chunk, words));
    }
  }
}

// Forward in 2 bytes, the cells of two neighbouring units share a word: even lanes get their neighbour's half and store.
// All lanes of the warp take part. Returns whether this lane stores.
template <typename T, bool kBackward>
FP_DEVICE bool join_neighbours(uint32_t (&published)[kWords<T, kBackward>]) {
  if constexpr (!kBackward && sizeof(T) == 2) {
    published[0] |= shuffle_xor(published[0], 1) << 16;
    return thread() % 2 == 0;
  } else {
    return true;
  }
}

// The exchange through distributed shared memory. A phase of `arrivals` is a step: it ends in a block once all words of that step's
// vector are there and every block of the cluster has read the vector of the step before, whose place the next one takes.
struct ClusterExchange {
  uint64_t* arrivals;  // two, because there are two vectors
  int blocks;
  uint32_t bytes;      // of a vector of all batch entries

  FP_DEVICE void begin() const {
    if (thread() < 2) begin_arrivals(arrivals + thread(), blocks);
  }

  // By all threads, after they met: nobody here reads the vector of step - 1 any more.
  FP_DEVICE void have_read(int64_t step) const {
    const int rank = thread() - (threads() - 32);  // the last warp, which seldom has cells
    if (rank < 0 || rank >= blocks) return;
    if (rank == rank_in_cluster()) expect_bytes(arrivals + step % 2, bytes);
    release_shared();
    arrive(arrivals + step % 2, rank);
  }

  template <int kWords>
  FP_DEVICE void publish(unsigned char* address, const uint32_t (&words)[kWords], int64_t step) const {
    for (int rank = 0; rank < blocks; ++rank) send(reinterpret_cast<uint32_t*>(address), words, arrivals + step % 2, rank);
  }

  // For the vector of step - 1.
  FP_DEVICE void wait(int64_t step) const {
    const int64_t before = step - 1;
    uint32_t polls = 0;
    while (!arrived(arrivals + before % 2, uint32_t(before / 2 % 2))) poll_again(step, polls);
  }
};

}  // namespace fusedprompt::device
