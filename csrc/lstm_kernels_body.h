// What lstm_kernels_<level>.cpp is made of, inside a namespace of that level.
#include "lstm_vector.h"
#include "lstm_recurrence.h"
#include "lstm_products.h"

template <class T>
constexpr DtypeKernels dtype_kernels() {
  return {forward_units<T>, backward_units<T>, input_product<T>, weight_gradient<T>, input_gradient<T>, widen<T>};
}
