// The recurrence of one LSTM layer: what goes in, what comes out, and who owns it.
//
//   a_t = pre_t + W_hh h_{t-1}        i, f, o = sigmoid(a^i), sigmoid(a^f), sigmoid(a^o);  g = tanh(a^g)
//   c_t = f c_{t-1} + i g             h_t = o tanh(c_t)
//
// Gates in torch's order i, f, g, o. States before the first step are zero. Only the recurrence is here: the products with
// the input and all weight gradients are matrix products of whole sequences, done before or after it.
//
// Every array is contiguous, row-major and owned by the caller. The index t is the position in the sequence for both
// directions: direction 1 walks from P-1 down to 0, so "the step before t" is t-1 for direction 0 and t+1 for direction 1,
// and nothing is ever flipped. P: steps. B: batch. H: hidden size.
#pragma once

#include <cstdint>

namespace fusedprompt {

enum class Dtype : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct LstmForward {
  int64_t steps, batch, hidden, directions;  // P >= 1, B >= 1, H >= 1, 1 or 2
  Dtype dtype;                               // of weight_hh and output; gates and cells are fp32
  const void* weight_hh[2];                  // (4H, H) per direction, read in place
  float* gates;                              // (directions, P, B, 4H)  in: pre_t;  out: i, f, g, o after their functions
  float* cell;                               // (directions, P, B, H)   out: c_t
  void* output;                              // (P, B, directions * H)  out: h_t, rounded to dtype; what W_hh multiplies
  const void* bias[2][2] = {};               // b_ih and b_hh (4H) per direction. Only for a device whose pre_t comes without
                                             // them, CUDA; on CPU they are in pre_t
};

struct LstmBackward {
  int64_t steps, batch, hidden, directions;
  Dtype dtype;                               // of weight_hh, d_output and d_gates
  const void* weight_hh[2];                  // (4H, H) per direction
  const float* gates;                        // (directions, P, B, 4H)  as forward left them
  const float* cell;                         // (directions, P, B, H)   as forward left them
  const void* d_output;                      // (P, B, directions * H)  gradient of output from outside the layer
  void* d_gates;                             // (directions, P, B, 4H)  out: gradient of a_t, the operand of every product
                                             //                         that follows
};

}  // namespace fusedprompt
