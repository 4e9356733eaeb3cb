// The LSTM's arithmetic on CPU, compiled once per instruction set from the same source (lstm_recurrence.h, lstm_products.h).
//
// Nothing here waits, allocates or starts threads: a kernel does a piece of work that the caller cuts (lstm_cpu.cpp), and a
// piece's result does not depend on how the rest was cut. So a result has the same bits for any number of threads.
#pragma once

#include <cstdint>

#include "lstm.h"

namespace fusedprompt {

// Hidden units are handled in blocks of so many: one AVX-512 register of fp32, a cache line of each gate.
constexpr int64_t kUnits = 16;
// The backward product W_hh^T d is a sum over this many groups of rows, each with an accumulator of its own.
constexpr int64_t kRowGroups = 8;
// Rows of an output that one piece of a matrix product writes; pieces start at multiples of it.
constexpr int64_t kPieceRows = 24;
// Columns of an output that one piece of `input_gradient` writes.
constexpr int64_t kPieceColumns = 128;

static constexpr int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// One direction of one layer at one step. Pointers are to what belongs to this direction and step.
struct ForwardStep {
  int64_t batch, hidden;
  const void* weight;       // (4H, H) of the layer's dtype
  const float* h_previous;  // (B, round_up(H, kUnits)) zeros behind H; null at the first step
  const float* c_previous;  // (B, H); null at the first step
  float* gates;             // (B, 4H) in: pre_t; out: after their functions
  float* cell;              // (B, H)
  float* h;                 // (B, round_up(H, kUnits)) out: h_t rounded to dtype, as fp32
  void* output;             // row b at b * output_stride
  int64_t output_stride;
};

struct BackwardStep {
  int64_t batch, hidden;
  const void* weight;
  const float* gates;       // (B, 4H)
  const float* cell;        // (B, H)
  const float* c_previous;  // (B, H); null at the sequence's first step
  const void* d_output;     // row b at b * output_stride
  int64_t output_stride;
  const float* d_h_parts;   // (kRowGroups, B, round_up(H, kUnits)) W_hh^T d of the step after; null at the last step
  int64_t groups;           // row groups in use
  float* d_h_parts_out;     // the same for the step before; null at the sequence's first step
  float* d_cell;            // (B, H) carried from step to step
  void* d_gates;            // (B, 4H) of dtype
};

// C (M, N) fp32 = A (M, K) W (N, K)^T + bias + bias_2.
struct InputProduct {
  int64_t m, n, k;
  const float* a;       // fp32, whatever the layer's dtype
  int64_t a_stride;     // not a multiple of 1024, where every row would fall on the same cache lines
  const void* weight;   // of dtype
  const void* bias;
  const void* bias_2;
  float* c;
};

// C (N, K) of dtype = G (M, N)^T A (M, K), and sums (N) of dtype = the columns of G added up, where not null.
struct WeightGradient {
  int64_t m, n, k;
  const void* g;         // rows adjacent
  const float* a;
  int64_t a_stride;
  void* c;
  void* sums;
  void* sums_2;  // a second copy
};

// C (M, K) of dtype = sum over directions of G (M, N) W (N, K).
struct InputGradient {
  int64_t m, n, k, directions;
  const float* g[2];      // fp32, whatever the layer's dtype; rows adjacent
  const void* weight[2];
  void* c;
};

struct DtypeKernels {
  // Units [begin, end) of a step; begin is a multiple of kUnits.
  void (*forward_units)(const ForwardStep&, int64_t begin, int64_t end);
  // Row group `group` of a step, which owns units [begin, end); begin is a multiple of kUnits.
  void (*backward_units)(const BackwardStep&, int64_t group, int64_t begin, int64_t end);
  // Columns [begin, end) of C; begin is a multiple of kPieceRows.
  void (*input_product)(const InputProduct&, int64_t begin, int64_t end);
  // Rows [begin, end) of C; begin is a multiple of kPieceRows. panel: (M, kPieceRows) to work in.
  void (*weight_gradient)(const WeightGradient&, int64_t begin, int64_t end, float* panel);
  // Columns [begin, end) of C; begin is a multiple of kPieceColumns.
  void (*input_gradient)(const InputGradient&, int64_t begin, int64_t end);
  // (rows, columns) of dtype to fp32.
  void (*widen)(const void* from, int64_t rows, int64_t columns, float* to, int64_t to_stride);
};

struct Kernels {
  const char* name;
  DtypeKernels of[3];  // by Dtype
};

const Kernels& kernels_plain();
#if defined(__x86_64__)
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();
#endif

}  // namespace fusedprompt
