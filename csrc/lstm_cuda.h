// The recurrence of lstm.h on a GPU, for the file that registers the ops. Nothing here allocates, synchronises or sets the
// device: the caller owns workspace, stream and device, so every call can be captured in a CUDA graph.
#pragma once

#include <cstddef>
#include <optional>

#include "lstm.h"
#include "lstm_plan.h"

namespace fusedprompt {

GpuFigures gpu_figures();  // of the current device

// The plan that will run on the current device: plan_lstm's, or kStream if the device cannot hold all its blocks at once
// (another process may have a share of it). A variant asked for by name that cannot run throws std::invalid_argument.
LstmPlan lstm_plan_here(const LstmProblem& problem, LstmPass pass, std::optional<LstmVariant> variant = std::nullopt,
                        int threads = kLstmThreads);

// Bytes of scratch memory, aligned to 256, that the call with this plan needs; their contents do not matter.
size_t lstm_workspace_bytes(const LstmProblem& problem, LstmPass pass, const LstmPlan& plan);

// stream: a cudaStream_t. Both throw std::runtime_error if CUDA refuses a launch.
void lstm_forward_cuda(const LstmForward& call, const LstmPlan& plan, void* workspace, void* stream);
void lstm_backward_cuda(const LstmBackward& call, const LstmPlan& plan, void* workspace, void* stream);

}  // namespace fusedprompt
