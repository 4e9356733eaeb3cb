// One element of an LSTM cell, forward and backward, in fp32: the formulas of lstm.h, once, for host and device.
//
// Plain expf and tanhf: each is good to 2 units in the last place on either side, and a cell does five of them against
// 8H multiply-adds. Never compile this with -use_fast_math: tanh.approx is good to 11 bits only.
#pragma once

#include <cmath>

#ifdef __CUDACC__
#define FP_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FP_HOST_DEVICE inline
#endif

namespace fusedprompt {

// The gates of one element in torch's order: before their functions, after them, or their gradients.
struct LstmGates {
  float i, f, g, o;
};

struct LstmState {
  float c, h;
};

struct LstmCellGradient {
  LstmGates d_a;    // gradient of the gates before their functions
  float d_c_prev;   // gradient of the cell state of the step before
};

// Large |x| needs no special case: expf gives inf or 0, and so 0 or 1. NaN stays NaN.
FP_HOST_DEVICE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

FP_HOST_DEVICE LstmGates lstm_activate(const LstmGates& a) {
  return {sigmoid(a.i), sigmoid(a.f), tanhf(a.g), sigmoid(a.o)};
}

// c = f c_prev + i g,  h = o tanh(c);  gates after their functions. h is not rounded here.
FP_HOST_DEVICE LstmState lstm_cell_forward(const LstmGates& gate, float c_prev) {
  const float c = gate.f * c_prev + gate.i * gate.g;
  return {c, gate.o * tanhf(c)};
}

// gate: after its functions, as forward left them. d_h: whole gradient of h_t (from outside and from the step after).
// d_c: gradient of c_t that the step after handed back as its d_c_prev (0 at the last step).
FP_HOST_DEVICE LstmCellGradient lstm_cell_backward(const LstmGates& gate, float c, float c_prev, float d_h, float d_c) {
  const float tanh_c = tanhf(c);
  const float d_cell = d_c + d_h * gate.o * (1.0f - tanh_c * tanh_c);
  return {{d_cell * gate.g * gate.i * (1.0f - gate.i),
           d_cell * c_prev * gate.f * (1.0f - gate.f),
           d_cell * gate.i * (1.0f - gate.g * gate.g),
           d_h * tanh_c * gate.o * (1.0f - gate.o)},
          d_cell * gate.f};
}

}  // namespace fusedprompt
