// Which of the CPU kernels run.
#pragma once

#include <string>
#include <vector>

namespace fusedprompt {

std::vector<std::string> cpu_levels();        // that this processor can run, best first
std::string cpu_level();                      // in use
void use_cpu_level(const std::string& name);  // throws std::invalid_argument for one that cpu_levels() lacks

}  // namespace fusedprompt
