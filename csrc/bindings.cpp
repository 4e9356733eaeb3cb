// Python module fusedprompt._C: what was built, and the knobs of the native code. Loading it registers the CPU kernels of the
// ops whose schemas fusedprompt/ops/lstm/native.py defines.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>

#include "lstm_cpu.h"
#include "lstm_plan_python.h"

// Set by setup.py.
#ifndef FUSEDPROMPT_CUDA_BUILD
#define FUSEDPROMPT_CUDA_BUILD "unknown"
#endif
#ifndef FUSEDPROMPT_TORCH_BUILD
#define FUSEDPROMPT_TORCH_BUILD "unknown"
#endif

namespace {

std::map<std::string, std::string> build_info() {
  return {{"compiler", __VERSION__}, {"torch", FUSEDPROMPT_TORCH_BUILD}, {"cuda", FUSEDPROMPT_CUDA_BUILD}};
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.def("build_info", &build_info, "compiler, the torch built against, and the CUDA library built or why not");
  module.def("cpu_levels", &fusedprompt::cpu_levels, "instruction sets that this processor can run, best first");
  module.def("cpu_level", &fusedprompt::cpu_level, "the instruction set in use");
  module.def("use_cpu_level", &fusedprompt::use_cpu_level, pybind11::arg("level"),
             "use another of cpu_levels() in this process; ValueError for any other name");
  fusedprompt::add_plan_lstm(module);
}
