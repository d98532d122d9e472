// From a tensor's device to the kernels that serve it.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include "tensor.h"

namespace yoco {

struct Backend {
  const KernelTable* table;
  Launch launch;
  bool gpu = false;  // the tensors are on one: launch.device
};

// Kernels for tensors that live where `t` lives; fails with a sentence when there are none.
Backend backend_for(const Tensor& t);

// Runs a table entry; allocates its workspace first.
template <class Params>
void run(const Backend& backend, const char* op, const char* (*kernel)(const Params&, const Launch&),
         const Params& params) {
  check(kernel != nullptr, op, " has no ", backend.table->name,
        " kernel in this build; yoco_ext.reference has a plain PyTorch version");
  // The kernels make launch.device the current one: behind the call it is again what it was.
  std::optional<torch::stable::accelerator::DeviceGuard> guard;
  if (backend.gpu) guard.emplace(backend.launch.device);
  const char* error = kernel(params, backend.launch);
  check(error == nullptr, op, ": ", error);
}

template <class Params>
Tensor allocate_workspace(const Backend& backend, size_t (*size)(const Params&, const Launch&), Params& params,
                          const Tensor& like) {
  const int64_t bytes = size == nullptr ? 0 : static_cast<int64_t>(size(params, backend.launch));
  Tensor workspace = empty(like, {bytes}, ScalarType::Byte);
  params.workspace = bytes > 0 ? workspace.data_ptr() : nullptr;
  return workspace;
}

// Boundaries and lengths that live on the CPU are checked before anything runs; on a GPU that would need a
// synchronisation, so there the kernels clamp them.
void check_cu_seqlens(const OptionalTensor& cu_seqlens, const char* name, int64_t total, const Tensor& like);
void check_index_range(const OptionalTensor& index, const char* name, int64_t low, int64_t high, const Tensor& like);

}  // namespace yoco
