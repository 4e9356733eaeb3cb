// One step of the recurrence on CPU: matrix-vector products fused with the cell. Included like lstm_vector.h.
//
// At batch 1 a step is bound by reading W_hh from L3 (4 H^2 weights, each used once), so rows are read where they lie, eight
// streams at a time, in either direction of the chain rule: forward dots them with h, backward adds them up.

struct CellValues {
  Vec i, f, g, o, c, h;
};

struct CellGradients {
  Vec i, f, g, o, c_previous;
};

#if FP_VECTOR_BYTES > 16
FP_INLINE void cell_forward(CellValues& v, Vec c_previous) {
  v.i = sigmoid(v.i);
  v.f = sigmoid(v.f);
  v.g = hyperbolic_tangent(v.g);
  v.o = sigmoid(v.o);
  v.c = v.f * c_previous + v.i * v.g;
  v.h = v.o * hyperbolic_tangent(v.c);
}

FP_INLINE CellGradients cell_backward(const CellValues& v, Vec c_previous, Vec d_h, Vec d_c) {
  const Vec one = splat(1.0f), tanh_c = hyperbolic_tangent(v.c);
  const Vec d_cell = d_c + d_h * v.o * (one - tanh_c * tanh_c);
  return {d_cell * v.g * v.i * (one - v.i), d_cell * c_previous * v.f * (one - v.f), d_cell * v.i * (one - v.g * v.g),
          d_h * tanh_c * v.o * (one - v.o), d_cell * v.f};
}
#else
// lstm_cell.h itself, element by element: the plain level is what the vector levels are tested against.
FP_INLINE void cell_forward(CellValues& v, Vec c_previous) {
  for (int lane = 0; lane < kLanes; ++lane) {
    const LstmGates gate = lstm_activate({v.i[lane], v.f[lane], v.g[lane], v.o[lane]});
    const LstmState state = lstm_cell_forward(gate, c_previous[lane]);
    v.i[lane] = gate.i, v.f[lane] = gate.f, v.g[lane] = gate.g, v.o[lane] = gate.o;
    v.c[lane] = state.c, v.h[lane] = state.h;
  }
}

FP_INLINE CellGradients cell_backward(const CellValues& v, Vec c_previous, Vec d_h, Vec d_c) {
  CellGradients result;
  for (int lane = 0; lane < kLanes; ++lane) {
    const LstmCellGradient d = lstm_cell_backward({v.i[lane], v.f[lane], v.g[lane], v.o[lane]}, v.c[lane],
                                                  c_previous[lane], d_h[lane], d_c[lane]);
    result.i[lane] = d.d_a.i, result.f[lane] = d.d_a.f, result.g[lane] = d.d_a.g, result.o[lane] = d.d_a.o;
    result.c_previous[lane] = d.d_c_prev;
  }
  return result;
}
#endif

// out[b][row] = w[row] . h[b] for kRows adjacent rows (a multiple of 4) and kBatch vectors. Of rows behind `rows`, the first
// is read again.
template <class T, int kRows, int kBatch>
FP_INLINE void dots(const T* w, int64_t width, int rows, const float* h, int64_t h_stride, float (*out)[kUnits]) {
  Vec sums[kBatch][kRows] = {};
  const T* row_of[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) row_of[r] = w + (r < rows ? r : 0) * width;
  int64_t k = 0;
  for (; k + kLanes <= width; k += kLanes) {
    Vec at[kBatch];
#pragma GCC unroll 4
    for (int b = 0; b < kBatch; ++b) at[b] = load(h + b * h_stride + k);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vec weight = load(row_of[r] + k);
#pragma GCC unroll 4
      for (int b = 0; b < kBatch; ++b) sums[b][r] += weight * at[b];
    }
  }
  if (k < width) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vec weight = load_some(row_of[r] + k, width - k);
#pragma GCC unroll 4
      for (int b = 0; b < kBatch; ++b) sums[b][r] += weight * load_some(h + b * h_stride + k, width - k);
    }
  }
#pragma GCC unroll 4
  for (int b = 0; b < kBatch; ++b) {
#pragma GCC unroll 2
    for (int r = 0; r < kRows; r += 4) sums_of_four(sums[b] + r, out[b] + r);
  }
}

template <class T, int kBatch>
static void forward_block(const ForwardStep& step, int64_t first_batch, int64_t unit, int count) {
  constexpr int kRows = kBatch == 1 ? 8 : 4;  // 8 to 16 accumulators
  const int64_t hidden = step.hidden, padded = round_up(hidden, kUnits);
  float a[4][kBatch][kUnits] = {};
  if (step.h_previous) {
    const T* weight = static_cast<const T*>(step.weight);
    for (int gate = 0; gate < 4; ++gate) {
      for (int row = 0; row < count; row += kRows) {
        const int rows = count - row < kRows ? count - row : kRows;
        float(*out)[kUnits] = reinterpret_cast<float(*)[kUnits]>(a[gate][0] + row);
        dots<T, kRows, kBatch>(weight + (gate * hidden + unit + row) * hidden, hidden, rows,
                               step.h_previous + first_batch * padded, padded, out);
      }
    }
  }
  for (int b = 0; b < kBatch; ++b) {
    const int64_t batch = first_batch + b;
    float* gates = step.gates + batch * 4 * hidden + unit;
    T* output = reinterpret_cast<T*>(step.output) + batch * step.output_stride + unit;
    for (int lane = 0; lane < count; lane += kLanes) {
      const int64_t left = count - lane;
      CellValues v;
      v.i = load_up_to(gates + 0 * hidden + lane, left) + load(a[0][b] + lane);
      v.f = load_up_to(gates + 1 * hidden + lane, left) + load(a[1][b] + lane);
      v.g = load_up_to(gates + 2 * hidden + lane, left) + load(a[2][b] + lane);
      v.o = load_up_to(gates + 3 * hidden + lane, left) + load(a[3][b] + lane);
      const Vec before = step.c_previous ? load_up_to(step.c_previous + batch * hidden + unit + lane, left) : Vec{};
      cell_forward(v, before);
      store_up_to(gates + 0 * hidden + lane, v.i, left);
      store_up_to(gates + 1 * hidden + lane, v.f, left);
      store_up_to(gates + 2 * hidden + lane, v.g, left);
      store_up_to(gates + 3 * hidden + lane, v.o, left);
      store_up_to(step.cell + batch * hidden + unit + lane, v.c, left);
      store_up_to(step.h + batch * padded + unit + lane, rounded_to(v.h, T{}), left);
      store_up_to(output + lane, v.h, left);
    }
  }
}

template <class T>
static void forward_units(const ForwardStep& step, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; unit += kUnits) {
    const int count = static_cast<int>(end - unit < kUnits ? end - unit : kUnits);
    int64_t b = 0;
    for (; b + 4 <= step.batch; b += 4) forward_block<T, 4>(step, b, unit, count);
    for (; b + 2 <= step.batch; b += 2) forward_block<T, 2>(step, b, unit, count);
    for (; b < step.batch; ++b) forward_block<T, 1>(step, b, unit, count);
  }
}

// out[0:width] = (first ? 0 : out) + sum of d[row] * w[row] over kRows adjacent rows.
template <class T, int kRows>
FP_INLINE void add_rows(const T* w, int64_t width, const float* d, float* out, bool first) {
  Vec scale[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) scale[r] = splat(d[r]);
  int64_t k = 0;
  for (; k + kLanes <= width; k += kLanes) {
    Vec total = first ? Vec{} : load(out + k), other = Vec{};
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r += 2) {
      total += scale[r] * load(w + r * width + k);
      if (r + 1 < kRows) other += scale[r + 1] * load(w + (r + 1) * width + k);
    }
    store(out + k, total + other);
  }
  if (k < width) {
    Vec total = first ? Vec{} : load(out + k);  // out is padded to kUnits
    for (int r = 0; r < kRows; ++r) total += scale[r] * load_some(w + r * width + k, width - k);
    store(out + k, total);
  }
}

template <class T>
static void backward_cells(const BackwardStep& step, int64_t batch, int64_t unit, int count, float (*d_a)[kUnits]) {
  const int64_t hidden = step.hidden, padded = round_up(hidden, kUnits);
  const float* gates = step.gates + batch * 4 * hidden + unit;
  T* d_gates = static_cast<T*>(step.d_gates) + batch * 4 * hidden + unit;
  float* d_cell = step.d_cell + batch * hidden + unit;
  const T* d_output = static_cast<const T*>(step.d_output) + batch * step.output_stride + unit;
  for (int lane = 0; lane < count; lane += kLanes) {
    const int64_t left = count - lane;
    Vec d_h = load_up_to(d_output + lane, left), d_c = Vec{};
    if (step.d_h_parts) {
      Vec recurrent = Vec{};
      for (int64_t group = 0; group < step.groups; ++group) {
        recurrent += load(step.d_h_parts + (group * step.batch + batch) * padded + unit + lane);
      }
      d_h += recurrent;
      d_c = load_up_to(d_cell + lane, left);
    }
    const CellValues v = {load_up_to(gates + 0 * hidden + lane, left), load_up_to(gates + 1 * hidden + lane, left),
                          load_up_to(gates + 2 * hidden + lane, left), load_up_to(gates + 3 * hidden + lane, left),
                          load_up_to(step.cell + batch * hidden + unit + lane, left), Vec{}};
    const Vec before = step.c_previous ? load_up_to(step.c_previous + batch * hidden + unit + lane, left) : Vec{};
    const CellGradients d = cell_backward(v, before, d_h, d_c);
    const Vec of_gate[4] = {d.i, d.f, d.g, d.o};
    for (int gate = 0; gate < 4; ++gate) {
      store_up_to(d_gates + gate * hidden + lane, of_gate[gate], left);
      store(d_a[gate] + lane, rounded_to(of_gate[gate], T{}));  // what the other products will read
    }
    store_up_to(d_cell + lane, d.c_previous, left);
  }
}

template <class T>
static void backward_units(const BackwardStep& step, int64_t group, int64_t begin, int64_t end) {
  const int64_t hidden = step.hidden, padded = round_up(hidden, kUnits);
  const T* weight = static_cast<const T*>(step.weight);
  for (int64_t unit = begin; unit < end; unit += kUnits) {
    const int count = static_cast<int>(end - unit < kUnits ? end - unit : kUnits);
    float d_a[8][4][kUnits];
    for (int64_t b0 = 0; b0 < step.batch; b0 += 8) {
      const int64_t batches = step.batch - b0 < 8 ? step.batch - b0 : 8;
      for (int64_t b = 0; b < batches; ++b) backward_cells<T>(step, b0 + b, unit, count, d_a[b]);
      if (!step.d_h_parts_out) continue;
      for (int gate = 0; gate < 4; ++gate) {
        const T* rows = weight + (gate * hidden + unit) * hidden;
        for (int row = 0; row < count; row += 8) {
          for (int64_t b = 0; b < batches; ++b) {  // eight rows stay in L1 for all of the batch
            float* out = step.d_h_parts_out + (group * step.batch + b0 + b) * padded;
            const bool first = unit == begin && gate == 0 && row == 0;
            if (count - row >= 8) {
              add_rows<T, 8>(rows + row * hidden, hidden, d_a[b][gate] + row, out, first);
            } else {
              for (int r = row; r < count; ++r) {
                add_rows<T, 1>(rows + r * hidden, hidden, d_a[b][gate] + r, out, first && r == row);
              }
            }
          }
        }
      }
    }
  }
}
