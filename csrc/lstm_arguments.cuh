// What a kernel of the recurrence is given, and the arithmetic of one cell where the arrays are. See lstm.h for the arrays.
#pragma once

#include "lstm_cell.h"
#include "lstm_number.cuh"
#include "lstm_plan.h"

namespace fusedprompt::device {

struct Arguments {
  LstmPlan plan;
  int64_t steps, batch, hidden, directions;
  int32_t first_direction;   // of this launch
  int64_t step;              // of a launch of one step only

  const void* matrix[2];     // (4H, H) W_hh, or its transpose (H, 4H) with column 4 unit + gate; rows begin at 16 bytes
  int64_t matrix_pitch;      // elements from row to row, a multiple of 16 bytes; zeros behind the last column

  unsigned char* exchange;   // (directions at once, ring, B) rows of exchange_pitch bytes: the vector of each step
  int64_t exchange_pitch;    // multiple of 16
  int64_t ring;              // P, or 2 where a launch is one step

  const void* bias[2][2];    // b_ih and b_hh of each direction, forward: added to gates here, which saves a launch
  float* gates;              // (directions, P, B, 4H)
  float* cell;               // (directions, P, B, H)
  void* output;              // (P, B, directions * H), forward
  const void* d_output;      // the same shape, backward
  void* d_gates;             // (directions, P, B, 4H), backward
  float* d_cell;             // (directions, B, H), backward where a launch is one step
};

// Rows of the multiplied matrix that one hidden unit owns, and columns, in units of H.
template <bool kBackward>
constexpr int kRowsOfUnit = kBackward ? 1 : 4;
template <bool kBackward>
constexpr int kColumnsOfUnit = kBackward ? 4 : 1;
// Words in which a cell publishes its part of the vector. Forward two 2-byte values share one.
template <typename T, bool kBackward>
constexpr int kWords = kBackward ? int(sizeof(T)) : 1;

// Position in the sequence of step `step` of a pass: backward takes the steps in the opposite order.
template <bool kBackward>
FP_DEVICE int64_t position(const Arguments& a, int direction, int64_t step) {
  return (direction == 1) != kBackward ? a.steps - 1 - step : step;
}

// row: the step, or its parity where a launch is one step.
FP_DEVICE unsigned char* exchange_row(const Arguments& a, int direction, int64_t row, int64_t b) {
  return a.exchange + (((direction - a.first_direction) * a.ring + row) * a.batch + b) * a.exchange_pitch;
}

// One cell (unit, b) of one direction through the steps of a pass. `begin` reads what all steps share, `load` what a step knows
// before the vector of the step before arrives; `finish` takes the products with that vector and returns what the
// others wait for, and `store` writes the rest.
template <typename T, bool kBackward>
struct Cell;

template <typename T>
struct Cell<T, false> {
  LstmGates bias, gate;  // gate: before its functions, then after them
  uint32_t h;

  FP_DEVICE void begin(const Arguments& a, int direction, int64_t unit) {
    const T* const ih = static_cast<const T*>(a.bias[direction][0]) + unit;
    const T* const hh = static_cast<const T*>(a.bias[direction][1]) + unit;
    bias = {widen(ih[0]) + widen(hh[0]), widen(ih[a.hidden]) + widen(hh[a.hidden]),
            widen(ih[2 * a.hidden]) + widen(hh[2 * a.hidden]), widen(ih[3 * a.hidden]) + widen(hh[3 * a.hidden])};
  }

  FP_DEVICE void load(const Arguments& a, int direction, int64_t step, int64_t b, int64_t unit) {
    const int64_t row = (direction * a.steps + position<false>(a, direction, step)) * a.batch + b;
    const float* gates = a.gates + row * 4 * a.hidden + unit;
    gate = {gates[0] + bias.i, gates[a.hidden] + bias.f, gates[2 * a.hidden] + bias.g, gates[3 * a.hidden] + bias.o};
  }

  // products: of the four gates. state: c, of the step before, then of this.
  FP_DEVICE void finish(const float (&products)[4], float& state, uint32_t (&published)[1]) {
    gate = lstm_activate({gate.i + products[0], gate.f + products[1], gate.g + products[2], gate.o + products[3]});
    const LstmState next = lstm_cell_forward(gate, state);
    state = next.c;
    h = published[0] = narrow<T>(next.h);
  }

  FP_DEVICE void store(const Arguments& a, int direction, int64_t step, int64_t b, int64_t unit, float state) const {
    const int64_t t = position<false>(a, direction, step);
    const int64_t row = (direction * a.steps + t) * a.batch + b;
    float* gates = a.gates + row * 4 * a.hidden + unit;
    gates[0] = gate.i;
    gates[a.hidden] = gate.f;
    gates[2 * a.hidden] = gate.g;
    gates[3 * a.hidden] = gate.o;
    a.cell[row * a.hidden + unit] = state;
    T* output = static_cast<T*>(a.output);
    output[((t * a.batch + b) * a.directions + direction) * a.hidden + unit] = from_bits<T>(h);
  }
};

template <typename T>
struct Cell<T, true> {
  LstmGates gate;
  float c, c_prev, d_h;
  uint32_t bits[4];

  FP_DEVICE void begin(const Arguments&, int, int64_t) {}

  FP_DEVICE void load(const Arguments& a, int direction, int64_t step, int64_t b, int64_t unit) {
    const int64_t t = position<true>(a, direction, step);
    const int64_t row = (direction * a.steps + t) * a.batch + b;
    const float* gates = a.gates + row * 4 * a.hidden + unit;
    gate = {gates[0], gates[a.hidden], gates[2 * a.hidden], gates[3 * a.hidden]};
    c = a.cell[row * a.hidden + unit];
    const int64_t row_before = (direction * a.steps + t + (direction == 1 ? 1 : -1)) * a.batch + b;
    c_prev = step + 1 < a.steps ? a.cell[row_before * a.hidden + unit] : 0.0f;
    const T* d_output = static_cast<const T*>(a.d_output);
    d_h = widen(d_output[((t * a.batch + b) * a.directions + direction) * a.hidden + unit]);
  }

  // products[0]: what the step after hands back to h. state: the gradient of c that it hands back, then that of this step.
  FP_DEVICE void finish(const float (&products)[1], float& state, uint32_t (&published)[int(sizeof(T))]) {
    const LstmCellGradient gradient = lstm_cell_backward(gate, c, c_prev, d_h + products[0], state);
    state = gradient.d_c_prev;
    bits[0] = narrow<T>(gradient.d_a.i);
    bits[1] = narrow<T>(gradient.d_a.f);
    bits[2] = narrow<T>(gradient.d_a.g);
    bits[3] = narrow<T>(gradient.d_a.o);
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int g = 0; g < 4; ++g) published[g] = bits[g];
    } else {
      published[0] = bits[0] | bits[1] << 16;
      published[1] = bits[2] | bits[3] << 16;
    }
  }

  FP_DEVICE void store(const Arguments& a, int direction, int64_t step, int64_t b, int64_t unit, float) const {
    const int64_t row = (direction * a.steps + position<true>(a, direction, step)) * a.batch + b;
    T* d_gates = static_cast<T*>(a.d_gates) + row * 4 * a.hidden + unit;
#pragma unroll
    for (int g = 0; g < 4; ++g) d_gates[g * a.hidden] = from_bits<T>(bits[g]);
  }
};

}  // namespace fusedprompt::device
