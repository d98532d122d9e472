// What the op implementations need of torch::stable::Tensor: checks that name the argument, views, allocations.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "../params.h"

namespace yoco {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// One message, no file names: it is read by users of the Python functions.
template <class... Parts>
void check(bool condition, const Parts&... parts) {
  if (__builtin_expect(condition, 1)) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline std::string shape_of(const Tensor& t) {
  std::ostringstream s;
  s << "[";
  for (int64_t i = 0; i < t.dim(); ++i) s << (i ? ", " : "") << t.size(i);
  s << "]";
  return s.str();
}

inline std::string shape_of(const std::vector<int64_t>& sizes) {
  std::ostringstream s;
  s << "[";
  for (size_t i = 0; i < sizes.size(); ++i) s << (i ? ", " : "") << sizes[i];
  s << "]";
  return s.str();
}

inline const char* name_of(ScalarType t) { return torch::headeronly::toString(t); }

// dtype of activations: the four that every op knows.
inline DType dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Double:
      return DType::kFloat64;
    default:
      break;
  }
  check(false, name, " has dtype ", name_of(t.scalar_type()),
        "; allowed: bfloat16, float16, float32, float64 (CPU only)");
  return DType::kFloat32;
}

// dtype of a cache: an activation dtype or a quantised one.
inline DType cache_dtype_of(const Tensor& t, const char* name) {
  if (t.scalar_type() == ScalarType::Float8_e4m3fn) return DType::kFloat8E4M3;
  if (t.scalar_type() == ScalarType::Char) return DType::kInt8;
  return dtype_of(t, name);
}

// dtype of states, log-sum-exps and accumulators that belong to tensors of dtype t.
inline ScalarType accumulator_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.device().type() == b.device().type() && a.get_device_index() == b.get_device_index();
}

inline void check_device(const Tensor& t, const char* name, const Tensor& like, const char* like_name) {
  check(same_device(t, like), name, " is on another device than ", like_name, "; all tensors must be on one device");
}

inline void check_shape(const Tensor& t, const char* name, const std::vector<int64_t>& want) {
  bool ok = t.dim() == static_cast<int64_t>(want.size());
  for (size_t i = 0; ok && i < want.size(); ++i) ok = t.size(static_cast<int64_t>(i)) == want[i];
  check(ok, name, " has shape ", shape_of(t), "; expected ", shape_of(want));
}

inline void check_dtype(const Tensor& t, const char* name, ScalarType want) {
  check(t.scalar_type() == want, name, " has dtype ", name_of(t.scalar_type()), "; expected ", name_of(want));
}

inline void check_last_contiguous(const Tensor& t, const char* name) {
  check(t.dim() > 0 && (t.size(t.dim() - 1) <= 1 || t.numel() == 0 || t.stride(t.dim() - 1) == 1), name, " has stride ",
        t.dim() > 0 ? t.stride(t.dim() - 1) : 0,
        " in its last dimension; it must be contiguous there (other strides are free): call .contiguous()");
}

// [batch, time, heads, dim] of a given dtype and shape on the device of `like`.
inline void check_bthd(const Tensor& t, const char* name, const std::vector<int64_t>& want, ScalarType dtype,
                       const Tensor& like, const char* like_name) {
  check_device(t, name, like, like_name);
  check_dtype(t, name, dtype);
  check_shape(t, name, want);
  check_last_contiguous(t, name);
}

// A contiguous int32 or float32 side input, or null.
inline void check_side_input(const OptionalTensor& t, const char* name, const std::vector<int64_t>& want,
                             ScalarType dtype, const Tensor& like) {
  if (!t) return;
  check_device(*t, name, like, "the other tensors");
  check_dtype(*t, name, dtype);
  check_shape(*t, name, want);
  check(t->is_contiguous(), name, " must be contiguous");
}

template <class T>
const T* data_or_null(const OptionalTensor& t) {
  return t ? static_cast<const T*>(t->data_ptr()) : nullptr;
}

inline View view_of(const Tensor& t) {
  return View{t.data_ptr(), t.stride(0), t.stride(1), t.dim() > 2 ? t.stride(2) : 0};
}

// The stride of a broadcast batch of one is zero.
inline View broadcast_view_of(const Tensor& t) {
  View v = view_of(t);
  if (t.size(0) == 1) v.batch_stride = 0;
  return v;
}

inline Tensor empty(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.data(), sizes.size()), dtype);
}

inline Tensor zeros(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  return torch::stable::new_zeros(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.data(), sizes.size()), dtype);
}

inline Tensor nothing(const Tensor& like) { return empty(like, {0}, like.scalar_type()); }

inline Tensor expand(const Tensor& t, const std::vector<int64_t>& sizes) {
  std::array<StableIValue, 3> stack{
      torch::stable::detail::from(t),
      torch::stable::detail::from(torch::headeronly::IntHeaderOnlyArrayRef(sizes.data(), sizes.size())),
      torch::stable::detail::from(false)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::expand", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Gradients arrive with any strides (an expanded scalar, a transpose): a copy only when the last dimension is strided.
inline Tensor with_contiguous_last(const Tensor& t) {
  if (t.dim() > 0 && t.numel() > 0 && t.size(t.dim() - 1) > 1 && t.stride(t.dim() - 1) != 1) {
    return torch::stable::contiguous(t);
  }
  return t;
}

}  // namespace yoco
