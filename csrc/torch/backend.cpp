#include "backend.h"

#include <dlfcn.h>

#include <atomic>
#include <mutex>

#include "../cpu/dispatch.h"

namespace yoco {
namespace {

using TableFunction = const KernelTable* (*)();

void parallel_for(int64_t begin, int64_t end, int64_t grain, void (*body)(void*, int64_t, int64_t), void* ctx) {
  torch::stable::parallel_for(begin, end, grain, [&](int64_t b, int64_t e) { body(ctx, b, e); });
}

// Opens a kernel library and checks that it speaks this version of the table.
const KernelTable* load_table(const char* path, std::string& error) {
  void* handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) {
    error = dlerror();
    return nullptr;
  }
  auto function = reinterpret_cast<TableFunction>(dlsym(handle, "yoco_kernels"));
  if (function == nullptr) {
    error = std::string(path) + " exports no yoco_kernels()";
    return nullptr;
  }
  const KernelTable* table = function();
  if (table == nullptr || table->abi_version != kKernelTableVersion) {
    error = std::string(path) + " was built for another version of yoco_ext";
    return nullptr;
  }
  return table;
}

// libyoco_ext_cuda.so lies beside this library.
std::string cuda_library_path() {
  Dl_info info;
  if (dladdr(reinterpret_cast<void*>(&load_table), &info) == 0 || info.dli_fname == nullptr) return "";
  std::string path(info.dli_fname);
  return path.substr(0, path.find_last_of('/') + 1) + "libyoco_ext_cuda.so";
}

struct CudaBackend {
  const KernelTable* table = nullptr;
  std::string error;
  // Part of CUDA builds of torch only, so it is looked up instead of linked: one op library serves both.
  AOTITorchError (*current_stream)(int32_t, void**) = nullptr;

  CudaBackend() {
    table = load_table(cuda_library_path().c_str(), error);
    current_stream =
        reinterpret_cast<decltype(current_stream)>(dlsym(RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream"));
    if (current_stream == nullptr) {
      if (void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD)) {
        current_stream =
            reinterpret_cast<decltype(current_stream)>(dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream"));
      }
    }
  }
};

CudaBackend& cuda_backend() {
  static CudaBackend backend;
  return backend;
}

// Serves CPU tensors: the built-in CPU kernels, or CUDA kernels linked against an emulator.
std::atomic<const KernelTable*> cpu_table{nullptr};

}  // namespace

Backend backend_for(const Tensor& t) {
  Backend backend;
  if (t.is_cpu()) {
    backend.table = cpu_table.load(std::memory_order_acquire);
    if (backend.table == nullptr) backend.table = cpu::kernels();
    backend.launch.num_threads = static_cast<int32_t>(torch::stable::get_num_threads());
    backend.launch.parallel_for = parallel_for;
    return backend;
  }
  CudaBackend& cuda = cuda_backend();
  check(cuda.table != nullptr, "yoco_ext was built without CUDA kernels (", cuda.error,
        "); rebuild with nvcc and YOCO_EXT_CUDA=1, or use yoco_ext.reference");
  check(cuda.current_stream != nullptr, "this PyTorch has no CUDA support");
  backend.table = cuda.table;
  backend.gpu = true;
  backend.launch.device = t.get_device_index();
  check(cuda.current_stream(backend.launch.device, &backend.launch.stream) == 0, "no current CUDA stream");
  return backend;
}

void check_cu_seqlens(const OptionalTensor& cu_seqlens, const char* name, int64_t total, const Tensor& like) {
  if (!cu_seqlens) return;
  check_device(*cu_seqlens, name, like, "the other tensors");
  check_dtype(*cu_seqlens, name, ScalarType::Int);
  check(cu_seqlens->dim() == 1 && cu_seqlens->size(0) >= 1, name, " has shape ", shape_of(*cu_seqlens),
        "; expected [number of sequences + 1]");
  check(cu_seqlens->is_contiguous(), name, " must be contiguous");
  if (!cu_seqlens->is_cpu()) return;
  const auto* bounds = static_cast<const int32_t*>(cu_seqlens->data_ptr());
  check(bounds[0] == 0, name, "[0] is ", bounds[0], "; it must be 0");
  for (int64_t i = 1; i < cu_seqlens->size(0); ++i) {
    check(bounds[i] >= bounds[i - 1] && bounds[i] <= total, name, "[", i, "] is ", bounds[i],
          "; it must not be below its predecessor ", bounds[i - 1], " or above the total length ", total);
  }
}

void check_index_range(const OptionalTensor& index, const char* name, int64_t low, int64_t high, const Tensor& like) {
  if (!index || !like.is_cpu()) return;
  const auto* values = static_cast<const int32_t*>(index->data_ptr());
  for (int64_t i = 0; i < index->numel(); ++i) {
    check(values[i] >= low && values[i] <= high, name, " holds ", values[i], "; allowed: ", low, " to ", high);
  }
}

}  // namespace yoco

namespace {

// "retention_forward=1 retention_backward=0 ...": which entries of a table hold a kernel.
std::string list_ops(const yoco::KernelTable& t) {
  std::string text;
  const auto add = [&](const char* name, bool present) { text += std::string(name) + (present ? "=1 " : "=0 "); };
#define YOCO_ADD(entry) add(#entry, t.entry != nullptr)
  YOCO_ADD(retention_forward);
  YOCO_ADD(retention_backward);
  YOCO_ADD(retention_step);
  YOCO_ADD(attention_forward);
  YOCO_ADD(attention_backward);
  YOCO_ADD(decode);
  YOCO_ADD(append_kv);
  YOCO_ADD(rms_norm);
  YOCO_ADD(rms_norm_backward);
  YOCO_ADD(rotary);
  YOCO_ADD(swiglu);
  YOCO_ADD(swiglu_backward);
  YOCO_ADD(retention_output);
  YOCO_ADD(retention_output_backward);
  YOCO_ADD(pair_norm);
  YOCO_ADD(pair_norm_backward);
#undef YOCO_ADD
  return text;
}

const yoco::KernelTable* table_named(const char* name) {
  return std::string(name) == "cpu" ? yoco::cpu::kernels() : yoco::cuda_backend().table;
}

}  // namespace

// ---- called from Python through ctypes
extern "C" {

// Chooses the kernels behind CPU tensors: null for the built-in ones, else the path of a kernel library (the CUDA
// kernels linked against an emulator). Returns null or what went wrong.
__attribute__((visibility("default"))) const char* yoco_use_backend(const char* path) {
  static std::mutex mutex;
  static std::string error;
  std::lock_guard<std::mutex> lock(mutex);
  if (path == nullptr) {
    yoco::cpu_table.store(nullptr, std::memory_order_release);
    return nullptr;
  }
  const yoco::KernelTable* table = yoco::load_table(path, error);
  if (table == nullptr) return error.c_str();
  yoco::cpu_table.store(table, std::memory_order_release);
  return nullptr;
}

// "cpu" or "cuda" -> what was picked at run time ("avx512_bf16", "sm_90a"), or null when there are no such kernels.
__attribute__((visibility("default"))) const char* yoco_backend_variant(const char* name) {
  const yoco::KernelTable* table = table_named(name);
  return table == nullptr ? nullptr : (table->variant == nullptr ? "" : table->variant());
}

// "cpu" or "cuda" -> "retention_forward=1 ...": one word per kernel entry, 0 where this back end has none; null when
// there are no such kernels at all.
__attribute__((visibility("default"))) const char* yoco_backend_ops(const char* name) {
  static thread_local std::string text;
  const yoco::KernelTable* table = table_named(name);
  if (table == nullptr) return nullptr;
  text = list_ops(*table);
  return text.c_str();
}
}
