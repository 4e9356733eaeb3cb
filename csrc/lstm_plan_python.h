// plan_lstm for Python: dictionaries in, dictionary out.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <optional>
#include <stdexcept>
#include <string>

#include "lstm_plan.h"

namespace fusedprompt {

inline Dtype plan_dtype(const std::string& name) {
  static const std::map<std::string, Dtype> known{
      {"float32", Dtype::kFloat32}, {"bfloat16", Dtype::kBFloat16}, {"float16", Dtype::kFloat16}};
  const auto found = known.find(name);
  if (found == known.end()) throw std::invalid_argument("dtype: expected float32, bfloat16 or float16, got " + name);
  return found->second;
}

inline pybind11::object plan_lstm_for_python(int64_t steps, int64_t batch, int64_t hidden, int64_t directions,
                                             const std::string& dtype, bool backward, const pybind11::dict& gpu,
                                             const std::optional<std::string>& variant) {
  const auto number = [&](const char* key) {
    if (!gpu.contains(key)) throw std::invalid_argument(std::string("gpu: expected the key ") + key + ", got none");
    return gpu[key].cast<double>();
  };
  const GpuFigures figures{int32_t(number("multiprocessors")), int64_t(number("shared_bytes")),
                           int64_t(number("register_bytes")),  int64_t(number("l2_kept_bytes")),
                           number("l2_gb_per_s"),              number("memory_gb_per_s"),
                           number("clock_ghz"),                number("clusters") != 0};
  const LstmProblem problem{steps, batch, hidden, directions, plan_dtype(dtype)};
  const LstmPass pass = backward ? LstmPass::kBackward : LstmPass::kForward;
  const auto plan = plan_lstm(problem, pass, figures, variant ? std::optional(variant_named(*variant)) : std::nullopt);
  if (!plan) return pybind11::none();
  pybind11::dict result;
  result["variant"] = name_of(plan->variant);
  result["directions_at_once"] = plan->directions_at_once;
  result["blocks"] = plan->blocks;
  result["threads"] = plan->threads;
  result["units"] = plan->units;
  result["shared_bytes"] = plan->shared_bytes;
  result["register_bytes"] = plan->held_bytes;
  result["on_chip_bytes"] = plan->on_chip_bytes;
  result["streamed_bytes"] = plan->streamed_bytes;
  result["predicted_us"] = plan->predicted_us;
  return result;
}

inline void add_plan_lstm(pybind11::module_& module) {
  namespace py = pybind11;
  module.def("plan_lstm", &plan_lstm_for_python, py::kw_only(), py::arg("steps"), py::arg("batch"), py::arg("hidden"),
             py::arg("directions"), py::arg("dtype"), py::arg("backward"), py::arg("gpu"),
             py::arg("variant") = py::none(),
             "How a GPU would run the recurrence of one layer: variant (S, M, L or STREAM), blocks of each direction, bytes "
             "on chip and bytes streamed in each step, predicted microseconds of a step. gpu: the fields of GpuFigures in "
             "csrc/lstm_plan.h. None if a variant asked for does not fit; ValueError on a wrong argument.");
}

}  // namespace fusedprompt
